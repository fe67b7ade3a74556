//! Budgets: which calls are within what is left. What a call may use is bounded from above by its prompt and the answer
//! that it may give ([`Tokens`]); what was used before comes with the context ([`spent`]), so that a decision can be derived
//! again. Of a plan of several calls it is what it begins with ([`begin`]). A model without a price costs no budget in USD.
//!
//! What is under way is not counted until it ends, so a burst of requests can overrun a budget by what they use together.

mod begin;
mod spent;

pub use spent::{Counted, Spent, Used, Who};

use super::{
    Policy, Target,
    choose::{Chosen, Out},
    reckon::{Shown, Tokens},
    select::price::estimated_cost,
    spec::{Per, WhenSpent},
};
use crate::domain::{CallSpec, Context, Elimination, Micros, ModelCard, Plan, RequestBounds, Spend};
use begin::{Ask, Unit, micros_down, micros_up};

/// One bound.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Budget {
    pub per: Per,
    /// Infinite where a unit is not bounded.
    pub most: Used,
    /// Meaningless per request.
    pub every: Micros,
    pub when_spent: WhenSpent,
    /// Per request only.
    pub first_token_us: Option<i64>,
}

impl Budget {
    /// What is left of it.
    fn left(&self, context: &Context) -> Used {
        self.most.zip(spent::told(self.per, context), |most, spent| (most - spent).max(0.0))
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

    /// That it has too little left of a unit, in words; `left`: what it has.
    fn too_little(&self, unit: Unit, left: &Used, ask: &Ask<'_>, what: &str) -> String {
        let (most, left, per) = (unit.of(&self.most), unit.of(left), self.per.as_str());
        match (unit, ask) {
            (Unit::Usd, Ask::Call(Used { usd, .. })) => {
                format!("{what} may cost ${usd:.6}, and the budget of ${most} per {per} has ${left:.6} left")
            }
            (Unit::Usd, Ask::Tree(..)) => {
                format!("{what} may cost more than the budget of ${most} per {per} has left, ${left:.6}")
            }
            (Unit::Tokens, Ask::Call(Used { tokens, .. })) => {
                let left = some(left);
                format!("{what} may take {tokens} tokens, and the budget of {most} tokens per {per} has {left} left")
            }
            (Unit::Tokens, Ask::Tree(..)) => {
                let left = some(left);
                format!("{what} may take more tokens than the budget of {most} tokens per {per} has left, {left}")
            }
            (Unit::Calls, Ask::Call(_)) => {
                format!("{what} would be one more, and the budget of {most} calls per {per} has none left")
            }
            (Unit::Calls, Ask::Tree(..)) => {
                let left = some(left);
                format!("{what} makes more calls than the budget of {most} calls per {per} has left, {left}")
            }
            (Unit::Seconds, _) => {
                format!("{what} takes time, and the budget of {most} seconds per {per} has none left")
            }
        }
    }
}

/// A number of whole things.
fn some(left: f64) -> String {
    match left.floor() {
        left if left > 0.0 => left.to_string(),
        _ => "none".to_owned(),
    }
}

impl Policy {
    /// What is counted per session, key and tenant, and over what time.
    pub fn spending(&self) -> impl Iterator<Item = (Per, Micros)> + '_ {
        self.budgets.iter().filter(|b| b.per != Per::Request).map(|b| (b.per, b.every))
    }

    /// Gives its budgets of a kind another sum in USD; whether it has one.
    pub fn rebudget(&mut self, per: Per, usd: f64) -> bool {
        let mut of_kind = self.budgets.iter_mut().filter(|b| b.per == per).peekable();
        let found = of_kind.peek().is_some();
        of_kind.for_each(|b| b.most.usd = usd);
        found
    }

    /// The budgets that are for somebody of this context, each with what is left of it.
    fn applying<'a>(&'a self, context: &'a Context) -> impl Iterator<Item = (&'a Budget, Used)> {
        self.budgets.iter().filter(|b| b.applies(context)).map(|b| (b, b.left(context)))
    }

    /// Why what is asked is out of these budgets.
    fn beyond<'a>(
        budgets: impl Iterator<Item = (&'a Budget, Used)>,
        ask: &Ask<'_>,
        what: impl Fn() -> String,
    ) -> Option<Elimination> {
        let mut together = Used::UNBOUNDED;
        for (budget, left) in budgets {
            if let Some(unit) = ask.lacks(&left) {
                return Some(Elimination::Budget(budget.too_little(unit, &left, ask, &what())));
            }
            together = together.zip(left, f64::min);
        }
        // One stage may be too dear and the other too long.
        let begun = ask.fits(&together);
        (!begun).then(|| Elimination::Budget(format!("{} may use more than the budgets together have left", what())))
    }

    /// Why a call of a model, with at most `limit` tokens of answer, is out of a budget.
    pub(super) fn over_budget(&self, model: usize, limit: Option<u32>, context: &Context) -> Option<Elimination> {
        if self.budgets.is_empty() {
            return None;
        }
        let card = &self.cards[model];
        let ask = call_of(card, limit, context);
        Self::beyond(self.applying(context), &ask, || format!("a call of {}", card.name))
    }

    /// Why a plan of several calls is: not even its beginning, the first stage that would do and a quorum of branches, is
    /// within what is left. What comes later is masked as it runs ([`Policy::request_bounds`]).
    pub(super) fn plan_over_budget(&self, target: &Target, chosen: &[usize], context: &Context) -> Option<Elimination> {
        if self.budgets.is_empty() {
            return None;
        }
        let ask = self.tree_of(&target.plan, chosen, context);
        Self::beyond(self.applying(context), &ask, || format!("what {} begins with", target.name))
    }

    /// A plan of several calls as it is asked for; `chosen`: what its calls go to.
    fn tree_of<'a>(&self, plan: &'a Plan, chosen: &[usize], context: &Context) -> Ask<'a> {
        let mut models = chosen.iter().map(|model| self.cards.get(*model));
        let mut calls = Vec::new();
        let tokens = Tokens::of(context);
        tokens.whole(plan, |a, b| a + b, &mut |call, shown| {
            calls.push(worst(&tokens, models.next().flatten(), call, shown));
            0.0
        });
        Ask::Tree(plan, calls)
    }

    /// What a request with this plan and fallback may use, and of each call the most that it can; `None` where no budget says.
    pub(super) fn request_bounds(
        &self,
        plan: &mut Plan,
        fallback: &mut [CallSpec],
        context: &Context,
    ) -> Option<Box<RequestBounds>> {
        let place = |call: &CallSpec| self.cards.iter().position(|card| card.name == call.model);
        let tokens = Tokens::of(context);
        let ask = match &*plan {
            Plan::Call(call) => {
                let card = place(call).and_then(|place| self.cards.get(place));
                card.map_or(Ask::call(0.0, 0), |card| call_of(card, call.sampling.max_tokens, context))
            }
            _ => {
                let chosen: Vec<usize> = plan.calls().into_iter().map(|c| place(c).unwrap_or(usize::MAX)).collect();
                self.tree_of(plan, &chosen, context)
            }
        };
        // What is taken although a budget is spent (`when_spent: cheapest`) is not bounded by it, but for its time: that of a
        // request is never spent before it begins.
        let mut left = Used::UNBOUNDED;
        for (budget, of_it) in self.applying(context) {
            if ask.lacks(&of_it).is_none() {
                left = left.zip(of_it, f64::min);
            } else if budget.per == Per::Request {
                left.seconds = left.seconds.min(of_it.seconds);
            }
        }
        if !ask.fits(&left) {
            // Each alone would do: those that refuse bind it, as they do together.
            let seconds = left.seconds;
            let strict = self.applying(context).filter(|(budget, _)| budget.when_spent == WhenSpent::Refuse);
            left = strict.fold(Used::UNBOUNDED, |left, (_, of_it)| left.zip(of_it, f64::min));
            left = if ask.fits(&left) { left } else { Used::UNBOUNDED };
            left.seconds = left.seconds.min(seconds);
        }
        let mut bounds = RequestBounds {
            tokens: left.tokens.is_finite().then_some(left.tokens as u64),
            calls: left.calls.is_finite().then_some(left.calls as u32),
            time_us: left.seconds.is_finite().then_some((left.seconds * 1e6) as i64),
            ..RequestBounds::default()
        };
        // Of one call the cost is known before the draw, and it begins when it begins.
        if !matches!(plan, Plan::Call(_)) {
            bounds.usd = left.usd.is_finite().then(|| micros_down(left.usd));
            bounds.first_token_us = self.budgets.iter().find_map(|b| b.first_token_us);
        }
        if bounds == RequestBounds::default() {
            return None;
        }
        if bounds.first_token_us.is_some() {
            let wait = |model: &str| {
                let state = context.fleet.get(model)?;
                let micros = (state.first_token_s(context.signals.tokens) * 1e6) as i64;
                (micros > 0).then(|| (model.to_owned(), micros))
            };
            bounds.waits = plan.models().into_iter().filter_map(wait).collect();
        }
        if bounds.usd.is_some() || bounds.tokens.is_some() {
            let of =
                |call: &CallSpec, shown| worst(&tokens, place(call).and_then(|at| self.cards.get(at)), call, shown);
            let mut all = Vec::new();
            tokens.whole(plan, |a, b| a + b, &mut |call, shown| {
                all.push(of(call, shown));
                0.0
            });
            for (call, worst) in plan.calls_mut().into_iter().zip(all) {
                call.worst = Some(worst);
            }
            for call in fallback {
                call.worst = Some(of(call, Shown::REQUEST));
            }
        }
        Some(Box::new(bounds))
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
                let cost = self.offer(target, &chosen).map_or(0.0, |offer| estimated_cost(&offer, context));
                let strict = self.applying(context).filter(|(budget, _)| budget.when_spent == WhenSpent::Refuse);
                let refused = Self::beyond(strict, &self.ask(target, &chosen, context), String::new).is_some();
                if !refused && best.as_ref().is_none_or(|(before, ..)| cost < *before) {
                    best = Some((cost, arm, chosen));
                }
            }
        }
        best.map(|(_, arm, chosen)| (arm, chosen))
    }

    /// What running a target in this way asks of budgets.
    fn ask<'a>(&self, target: &'a Target, chosen: &Chosen, context: &Context) -> Ask<'a> {
        match (&target.plan, chosen) {
            (Plan::Call(call), Chosen::Call(model)) => call_of(&self.cards[*model], call.sampling.max_tokens, context),
            (plan, Chosen::Call(model)) => self.tree_of(plan, &[*model], context),
            (plan, Chosen::Tree(models)) => self.tree_of(plan, models, context),
        }
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

/// A call of a model with at most `limit` tokens of answer.
fn call_of(card: &ModelCard, limit: Option<u32>, context: &Context) -> Ask<'static> {
    let tokens = Tokens::of(context);
    Ask::call(tokens.cost(&card.price, limit, Shown::REQUEST), tokens.all(limit, Shown::REQUEST))
}

/// The most that one call of a plan is reckoned with; without a card it costs nothing.
fn worst(tokens: &Tokens, card: Option<&ModelCard>, call: &CallSpec, shown: Shown) -> Spend {
    let limit = call.sampling.max_tokens;
    let usd = card.map_or(0.0, |card| tokens.cost(&card.price, limit, shown));
    Spend { usd: micros_up(usd), tokens: tokens.all(limit, shown) }
}
