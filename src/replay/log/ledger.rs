//! What a policy would have spent by then, for its budgets: recorded sums are those of the policy that served.
//!
//! A decision costs what the log says where the arm is the logged one, and elsewhere what that arm's decisions in the log
//! have cost on average until then (all decisions, before the first); each arm by the policy's probability. So what is
//! left of a budget is right on average, not request by request. Recorded costs count when an answer ends; here they count
//! at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::entry::{Entry, each_chance};
use crate::{
    domain::{Context, Decision},
    policy::{Counted, Policy, Spent, Who},
};

/// Sums and mean costs so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Ledger {
    spent: Spent,
    /// By arm: decisions, and their cost in USD.
    costs: BTreeMap<String, (f64, f64)>,
    all: (f64, f64),
}

impl Ledger {
    /// Puts what was spent into a context.
    pub(super) fn fill(&self, policy: &Policy, context: &mut Context) {
        let Context { session, key, now, .. } = context;
        (session.spent_usd, key.spent_usd, key.tenant_spent_usd) = (0.0, 0.0, 0.0);
        self.spent.fill(policy.spending(), *now, session, key);
    }

    /// Counts a decision.
    pub(super) fn take(&mut self, policy: &Policy, entry: &Entry, decision: &Decision, context: &Context) {
        let logged = entry.observed.as_ref().map(|o| o.cost_usd);
        let mean = |(n, sum): (f64, f64)| if n > 0.0 { sum / n } else { 0.0 };
        let mut usd = 0.0;
        each_chance(decision, |arm, p| {
            let known = logged.filter(|_| arm == entry.arm);
            let other = || self.costs.get(arm).map_or_else(|| mean(self.all), |of| mean(*of));
            // Nothing is called where all are refused.
            usd += if decision.plan.is_none() { 0.0 } else { p * known.unwrap_or_else(other) };
        });
        let counted: Counted = policy.spending().collect();
        self.spent.add(&Who::of(context), context.now, usd, &counted);
        if let Some(cost) = logged {
            let of = self.costs.entry(entry.arm.clone()).or_default();
            *of = (of.0 + 1.0, of.1 + cost);
            self.all = (self.all.0 + 1.0, self.all.1 + cost);
        }
    }
}
