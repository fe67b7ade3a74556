//! Budgets: which calls are within what is left. The price of a call is bounded from above by its prompt and the answer
//! that it may give ([`estimated_cost`]); what was spent before comes with the context, so that a decision can be derived
//! again. A model without a price is never out of a budget.
//!
//! What is under way is not counted until it ends, so a burst of requests can overrun a budget by what they cost together.

use super::{
    Policy, Target,
    select::{Offer, price::estimated_cost},
    spec::{Per, WhenSpent},
};
use crate::domain::{Context, Elimination, Micros};

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
