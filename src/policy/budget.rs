//! Budgets: which calls are within what is left. The price of a call is bounded from above by its prompt and the answer
//! that it may give ([`estimated_cost`]); what was spent before comes with the context, so that a decision can be derived
//! again. A model without a price is never out of a budget.
//!
//! What is under way is not counted until it ends, so a burst of requests can overrun a budget by what they cost together.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    Policy, Target,
    select::{Offer, price::estimated_cost},
    spec::{Per, WhenSpent},
};
use crate::domain::{Context, Elimination, KeyView, Micros, SessionView};

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
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Budget {
    pub per: Per,
    pub usd: f64,
    /// Meaningless per request.
    pub every: Micros,
    pub when_spent: WhenSpent,
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
        self.budgets.iter().filter(|b| b.per != Per::Request).map(|b| (b.per, b.every))
    }

    /// Gives its budgets of a kind another sum; whether it has one.
    pub fn rebudget(&mut self, per: Per, usd: f64) -> bool {
        let mut of_kind = self.budgets.iter_mut().filter(|b| b.per == per).peekable();
        let found = of_kind.peek().is_some();
        of_kind.for_each(|b| b.usd = usd);
        found
    }

    /// What a call of this model may cost.
    fn cost(&self, model: usize, target: &Target, context: &Context) -> f64 {
        estimated_cost(&Offer { card: &self.cards[model], max_tokens: target.call.sampling.max_tokens }, context)
    }

    /// The budgets that a call of this cost may overrun, each with what is left of it.
    fn overrun<'a>(&'a self, cost: f64, context: &'a Context) -> impl Iterator<Item = (&'a Budget, f64)> {
        let left = |b: &'a Budget| (b, (b.usd - b.spent(context)).max(0.0));
        self.budgets.iter().filter(|b| b.applies(context)).map(left).filter(move |(_, left)| cost > 0.0 && cost > *left)
    }

    pub(super) fn over_budget(&self, model: usize, target: &Target, context: &Context) -> Option<Elimination> {
        if self.budgets.is_empty() {
            return None;
        }
        let cost = self.cost(model, target, context);
        let (budget, left) = self.overrun(cost, context).next()?;
        Some(Elimination::Budget(format!(
            "a call of {} may cost ${cost:.6}, and the budget of ${} per {} has ${left:.6} left",
            self.cards[model].name,
            budget.usd,
            budget.per.as_str()
        )))
    }

    /// Where no arm is left and budgets are why, and all of these say `when_spent: cheapest`: the arm and model that are
    /// expected to cost least.
    pub(super) fn cheapest_when_spent(
        &self,
        stands: &[Result<usize, Elimination>],
        restricting: &[usize],
        context: &Context,
    ) -> Option<(usize, usize)> {
        if stands.iter().any(Result::is_ok) {
            return None;
        }
        let mut best: Option<(f64, usize, usize)> = None;
        for (arm, stand) in stands.iter().enumerate() {
            if !matches!(stand, Err(Elimination::Budget(_))) {
                continue;
            }
            let target = &self.targets[self.arm_targets[arm]];
            for &model in &target.models {
                let Some(Elimination::Budget(_)) = self.eliminated(model, target, restricting, context) else {
                    continue;
                };
                let cost = self.cost(model, target, context);
                let strict = self.overrun(cost, context).any(|(b, _)| b.when_spent == WhenSpent::Refuse);
                if !strict && best.is_none_or(|(before, ..)| cost < before) {
                    best = Some((cost, arm, model));
                }
            }
        }
        best.map(|(_, arm, model)| (arm, model))
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
