//! Budgets: which calls are within what is left. The price of a call is bounded from above by its prompt and the answer
//! that it may give ([`estimated_cost`]); what was spent before comes with the context, so that a decision can be derived
//! again. Of a plan of several calls it is the price of all of them. A model without a price is never out of a budget.
//!
//! What is under way is not counted until it ends, so a burst of requests can overrun a budget by what they cost together.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    Policy, Target,
    choose::{Chosen, Out},
    reckon::Tokens,
    select::{Offer, price::estimated_cost},
    spec::{Per, WhenSpent},
};
use crate::domain::{
    CallSpec, Context, Elimination, KeyView, MicroUsd, Micros, Plan, RequestBounds, SessionView, Spend,
};

/// Sums that are kept at most before those of times gone by are dropped.
const SUMS: usize = 200_000;

/// What is counted, and over what time each.
pub type Counted = BTreeSet<(Per, Micros)>;

/// Who is behind a request; empty where it is not known.
#[derive(Clone, Debug, Default)]
pub struct Who {
    pub session: String,
    pub key: String,
    pub tenant: String,
}

impl Who {
    /// Of a context.
    pub fn of(context: &Context) -> Self {
        let Context { session, key, .. } = context;
        Self { session: session.id.clone(), key: key.id.clone(), tenant: key.tenant.clone() }
    }

    fn name(&self, per: Per) -> &str {
        match per {
            Per::Request => "",
            Per::Session => &self.session,
            Per::Key => &self.key,
            Per::Tenant => &self.tenant,
        }
    }
}

/// What was spent, by kind, length of time and name: which time, and the sum in USD.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Vec<Sum>", into = "Vec<Sum>")]
pub struct Spent(BTreeMap<(Per, Micros, String), (Micros, f64)>);

/// A sum as it is kept.
type Sum = ((Per, Micros, String), (Micros, f64));

impl From<Vec<Sum>> for Spent {
    fn from(sums: Vec<Sum>) -> Self {
        Self(sums.into_iter().collect())
    }
}

impl From<Spent> for Vec<Sum> {
    fn from(spent: Spent) -> Self {
        spent.0.into_iter().collect()
    }
}

impl Spent {
    /// Adds what a request has cost that ended at `at`.
    pub fn add(&mut self, who: &Who, at: Micros, usd: f64, counted: &Counted) {
        for (per, every) in counted {
            let name = who.name(*per);
            if name.is_empty() || usd <= 0.0 {
                continue;
            }
            let time = at.div_euclid(*every);
            let sum = self.0.entry((*per, *every, name.to_owned())).or_default();
            match sum.0.cmp(&time) {
                std::cmp::Ordering::Less => *sum = (time, usd),
                std::cmp::Ordering::Equal => sum.1 += usd,
                std::cmp::Ordering::Greater => {}
            }
        }
        if self.0.len() > SUMS {
            self.0.retain(|(_, every, _), (time, _)| *time == at.div_euclid(*every));
        }
    }

    fn of(&self, per: Per, every: Micros, name: &str, now: Micros) -> f64 {
        let sum = self.0.get(&(per, every, name.to_owned()));
        sum.filter(|(time, _)| *time == now.div_euclid(every)).map_or(0.0, |(_, usd)| *usd)
    }

    /// Writes what was spent into what a policy with these budgets sees of session and key.
    pub fn fill(
        &self,
        budgets: impl Iterator<Item = (Per, Micros)>,
        now: Micros,
        session: &mut SessionView,
        key: &mut KeyView,
    ) {
        for (per, every) in budgets {
            match per {
                Per::Request => {}
                Per::Session => session.spent_usd = self.of(per, every, &session.id, now),
                Per::Key => key.spent_usd = self.of(per, every, &key.id, now),
                Per::Tenant => key.tenant_spent_usd = self.of(per, every, &key.tenant, now),
            }
        }
    }
}

/// One bound.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Budget {
    pub per: Per,
    /// Infinite where money is not bounded.
    pub usd: f64,
    /// Meaningless per request.
    pub every: Micros,
    pub when_spent: WhenSpent,
    /// Per request: tokens, calls and time.
    pub limits: RequestBounds,
}

impl Budget {
    fn spent(&self, context: &Context) -> f64 {
        match self.per {
            Per::Request => 0.0,
            Per::Session => context.session.spent_usd,
            Per::Key => context.key.spent_usd,
            Per::Tenant => context.key.tenant_spent_usd,
        }
    }

    /// USD that are left of it.
    fn left(&self, context: &Context) -> f64 {
        (self.usd - self.spent(context)).max(0.0)
    }

    /// Whether the context has somebody whom the budget is for.
    fn applies(&self, context: &Context) -> bool {
        match self.per {
            Per::Request => true,
            Per::Session => !context.session.id.is_empty(),
            Per::Key => !context.key.id.is_empty(),
            Per::Tenant => !context.key.tenant.is_empty(),
        }
    }
}

impl Policy {
    /// What is counted per session, key and tenant, and over what time.
    pub fn spending(&self) -> impl Iterator<Item = (Per, Micros)> + '_ {
        self.budgets.iter().filter(|b| b.per != Per::Request && b.usd.is_finite()).map(|b| (b.per, b.every))
    }

    /// Gives its budgets of a kind another sum; whether it has one.
    pub fn rebudget(&mut self, per: Per, usd: f64) -> bool {
        let mut of_kind = self.budgets.iter_mut().filter(|b| b.per == per).peekable();
        let found = of_kind.peek().is_some();
        of_kind.for_each(|b| b.usd = usd);
        found
    }

    /// What running a target in this way may cost.
    fn cost(&self, target: &Target, chosen: &Chosen, context: &Context) -> f64 {
        self.offer(target, chosen).map_or(0.0, |offer| estimated_cost(&offer, context))
    }

    /// The budgets that a call of this cost may overrun, each with what is left of it.
    fn overrun<'a>(&'a self, cost: f64, context: &'a Context) -> impl Iterator<Item = (&'a Budget, f64)> {
        let left = |b: &'a Budget| (b, b.left(context));
        self.budgets.iter().filter(|b| b.applies(context)).map(left).filter(move |(_, left)| cost > 0.0 && cost > *left)
    }

    /// Why a call of a model, with at most `limit` tokens of answer, is out of a budget.
    pub(super) fn over_budget(&self, model: usize, limit: Option<u32>, context: &Context) -> Option<Elimination> {
        if self.budgets.is_empty() {
            return None;
        }
        let card = &self.cards[model];
        let cost = estimated_cost(&Offer::Call { card, max_tokens: limit }, context);
        self.beyond(cost, context, || format!("a call of {}", card.name))
    }

    /// Why a plan of several calls is: not even its beginning, the first stage that would do and a quorum of branches, is
    /// within what is left. What comes later is masked as it runs ([`Policy::request_bounds`]).
    pub(super) fn plan_over_budget(&self, target: &Target, chosen: &[usize], context: &Context) -> Option<Elimination> {
        if self.budgets.is_empty() {
            return None;
        }
        let mut models = chosen.iter().filter_map(|model| self.cards.get(*model));
        let mut costs = Vec::new();
        let tokens = Tokens::of(context);
        tokens.whole(&target.plan, |a, b| a + b, &mut |call, shown| {
            let cost = models.next().map_or(0.0, |card| tokens.cost(&card.price, call.sampling.max_tokens, shown));
            costs.push(micros_up(cost));
            cost
        });
        for budget in self.budgets.iter().filter(|b| b.applies(context)) {
            let left = budget.left(context);
            if !begins(&target.plan, &mut micros_down(left), &mut costs.iter().copied()) {
                let (usd, per) = (budget.usd, budget.per.as_str());
                return Some(Elimination::Budget(format!(
                    "what {} begins with may cost more than the budget of ${usd} per {per} has left, ${left:.6}",
                    target.name
                )));
            }
        }
        None
    }

    /// What a request with this plan and fallback may use; `None` where no budget says.
    pub(super) fn request_bounds(
        &self,
        plan: &Plan,
        fallback: &[CallSpec],
        context: &Context,
    ) -> Option<Box<RequestBounds>> {
        let per_request = self.budgets.iter().find(|b| b.per == Per::Request);
        let mut bounds = per_request.map(|b| b.limits.clone()).unwrap_or_default();
        let tokens = Tokens::of(context);
        let mut costs = Vec::new();
        let mut worst = BTreeMap::new();
        let mut reckon = |call: &CallSpec, shown: f64| {
            let card = self.cards.iter().find(|card| card.name == call.model);
            let usd = card.map_or(0.0, |card| tokens.cost(&card.price, call.sampling.max_tokens, shown));
            let answer = u64::from(tokens.answer(call.sampling.max_tokens));
            let spend = Spend { usd: micros_up(usd), tokens: u64::from(tokens.prompt) + shown as u64 + answer };
            let most: &mut Spend = worst.entry(call.model.clone()).or_default();
            *most = Spend { usd: most.usd.max(spend.usd), tokens: most.tokens.max(spend.tokens) };
            costs.push(spend.usd);
            usd
        };
        if !matches!(plan, Plan::Call(_)) {
            tokens.whole(plan, |a, b| a + b, &mut reckon);
            let left = self.budgets.iter().filter(|b| b.applies(context)).map(|b| b.left(context));
            let left = left.fold(f64::INFINITY, f64::min);
            // What is taken although it is spent (`when_spent: cheapest`) is taken whole.
            let begun = begins(plan, &mut micros_down(left), &mut costs.iter().copied());
            bounds.usd = (left.is_finite() && begun).then(|| micros_down(left));
        } else if bounds.tokens.is_some() {
            let mut reckon = |call: &CallSpec| reckon(call, 0.0);
            plan.calls().into_iter().for_each(|call| {
                reckon(call);
            });
        }
        if matches!(plan, Plan::Call(_)) {
            bounds.first_token_us = None;
        }
        if bounds.first_token_us.is_some() {
            let wait = |model: &str| {
                let state = context.fleet.get(model)?;
                let micros = (state.first_token_s(context.signals.tokens) * 1e6) as i64;
                (micros > 0).then(|| (model.to_owned(), micros))
            };
            bounds.waits = plan.models().into_iter().filter_map(wait).collect();
        }
        if bounds == RequestBounds::default() {
            return None;
        }
        if bounds.usd.is_some() || bounds.tokens.is_some() {
            fallback.iter().for_each(|call| {
                let card = self.cards.iter().find(|card| card.name == call.model);
                let usd = card.map_or(0.0, |card| tokens.cost(&card.price, call.sampling.max_tokens, 0.0));
                let answer = u64::from(tokens.answer(call.sampling.max_tokens));
                let spend = Spend { usd: micros_up(usd), tokens: u64::from(tokens.prompt) + answer };
                worst.entry(call.model.clone()).or_insert(spend);
            });
            bounds.worst = worst;
        }
        Some(Box::new(bounds))
    }

    fn beyond(&self, cost: f64, context: &Context, what: impl FnOnce() -> String) -> Option<Elimination> {
        let (budget, left) = self.overrun(cost, context).next()?;
        let (usd, per) = (budget.usd, budget.per.as_str());
        let what = what();
        Some(Elimination::Budget(format!(
            "{what} may cost ${cost:.6}, and the budget of ${usd} per {per} has ${left:.6} left"
        )))
    }

    /// Where no arm is left and budgets are why, and all of these say `when_spent: cheapest`: the arm that may cost least,
    /// and what it would call.
    pub(super) fn cheapest_when_spent(
        &self,
        stands: &[Result<Chosen, Out>],
        restricting: &[usize],
        context: &Context,
    ) -> Option<(usize, Chosen)> {
        if stands.iter().any(Result::is_ok) {
            return None;
        }
        let mut best: Option<(f64, usize, Chosen)> = None;
        for (arm, stand) in stands.iter().enumerate() {
            if !matches!(stand, Err(Out { reason: Elimination::Budget(_), .. })) {
                continue;
            }
            let target = &self.targets[self.arm_targets[arm]];
            for chosen in self.but_for_budgets(target, restricting, context) {
                let cost = self.cost(target, &chosen, context);
                let strict = self.overrun(cost, context).any(|(b, _)| b.when_spent == WhenSpent::Refuse);
                if !strict && best.as_ref().is_none_or(|(before, ..)| cost < *before) {
                    best = Some((cost, arm, chosen));
                }
            }
        }
        best.map(|(_, arm, chosen)| (arm, chosen))
    }

    /// The ways to run a target that only budgets keep it from: of one call each entry, of several the first entries.
    fn but_for_budgets(&self, target: &Target, restricting: &[usize], context: &Context) -> Vec<Chosen> {
        let Plan::Call(call) = &target.plan else {
            let models = self.available_tree(target, restricting, context, false);
            return models.into_iter().map(Chosen::Tree).collect();
        };
        let out = |model: usize| self.eliminated(model, call.sampling.max_tokens, restricting, context);
        let models = target.calls.iter().flatten().copied();
        models.filter(|m| matches!(out(*m), Some(Elimination::Budget(_)))).map(Chosen::Call).collect()
    }
}

/// USD in millionths: a cost rounded up, and what is left of a budget rounded down. What is infinite is more than any.
fn micros_up(usd: f64) -> MicroUsd {
    (usd * 1e6).ceil() as MicroUsd
}

fn micros_down(usd: f64) -> MicroUsd {
    (usd * 1e6).floor() as MicroUsd
}

/// Whether a plan can be begun with what is left, as the machine begins it ([`crate::cascade`]): the first stage of a cascade
/// that fits, as many branches as fit and at least a quorum. Takes what that may cost; `costs`: of each call, in order.
fn begins(plan: &Plan, left: &mut MicroUsd, costs: &mut impl Iterator<Item = MicroUsd>) -> bool {
    let full = *left;
    match plan {
        Plan::Call(_) | Plan::Hedged { .. } => {
            let cost = costs.next().unwrap_or(0);
            // The hedge is made where there is room for it.
            if matches!(plan, Plan::Hedged { .. }) {
                costs.next();
            }
            match left.checked_sub(cost) {
                Some(rest) => {
                    *left = rest;
                    true
                }
                None => false,
            }
        }
        Plan::Cascade(stages) => {
            let mut first = None;
            for stage in stages {
                let mut rest = full;
                if begins(&stage.plan, &mut rest, costs) {
                    first = first.or(Some(rest));
                }
            }
            *left = first.unwrap_or(full);
            first.is_some()
        }
        Plan::Parallel { branches, aggregate } => {
            let fitting = branches.iter().filter(|branch| begins(branch, left, costs)).count();
            if aggregate.call().is_some() {
                costs.next();
            }
            let fits = fitting >= aggregate.quorum(branches.len());
            if !fits {
                *left = full;
            }
            fits
        }
        // The answer has to fit, a step before it need not.
        Plan::Steps(_) => {
            let [small, _, answer] = [(); 3].map(|()| costs.next().unwrap_or(0));
            let rest = left.checked_sub(small.saturating_add(answer)).or(left.checked_sub(answer));
            *left = rest.unwrap_or(full);
            rest.is_some()
        }
        // Verified where there is room for it.
        Plan::Verified(verified) => {
            let begins = begins(&verified.plan, left, costs);
            costs.next();
            begins
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_of_one_time_and_one_name() {
        let mut spent = Spent::default();
        let who = Who { session: "s".into(), key: "k".into(), tenant: String::new() };
        let counted = BTreeSet::from([(Per::Session, 100), (Per::Key, 1000), (Per::Tenant, 1000)]);
        for (at, usd) in [(10, 1.0), (90, 2.0), (110, 4.0), (20, 8.0)] {
            spent.add(&who, at, usd, &counted);
        }
        // What came late for a time gone by is not counted in the one that runs.
        assert_eq!(spent.of(Per::Session, 100, "s", 150), 4.0);
        assert_eq!(spent.of(Per::Session, 100, "s", 250), 0.0);
        assert_eq!(spent.of(Per::Key, 1000, "k", 999), 15.0);
        assert_eq!(spent.of(Per::Key, 1000, "other", 999), 0.0);
        assert_eq!(spent.0.len(), 2);
    }
}
