//! What a policy would have spent by then, for its budgets: recorded sums are those of the policy that served.
//!
//! A decision uses what the log says (USD, tokens, calls, seconds) where the arm is the logged one, and elsewhere what that
//! arm's decisions in the log have used on average until then (all decisions, before the first); each arm by the policy's
//! probability. So what is left of a budget is right on average, not request by request. What is recorded counts when an
//! answer ends; here it counts at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::entry::{Entry, each_chance};
use crate::{
    domain::{Context, Decision},
    policy::{Counted, Observed, Policy, Spent, Used, Who},
};

/// Sums and means so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Ledger {
    spent: Spent,
    /// By arm: decisions, and what they used.
    arms: BTreeMap<String, (f64, Used)>,
    all: (f64, Used),
}

fn used(observed: &Observed) -> Used {
    Used {
        usd: observed.cost_usd,
        tokens: observed.tokens as f64,
        calls: f64::from(observed.calls),
        seconds: observed.latency_us as f64 / 1e6,
    }
}

impl Ledger {
    /// Puts what was spent into a context.
    pub(super) fn fill(&self, policy: &Policy, context: &mut Context) {
        let Context { session, key, now, .. } = context;
        self.spent.fill(policy.spending(), *now, session, key);
    }

    /// Counts a decision.
    pub(super) fn take(&mut self, policy: &Policy, entry: &Entry, decision: &Decision, context: &Context) {
        let logged = entry.observed.as_ref().map(used);
        let mean = |(n, sum): (f64, Used)| if n > 0.0 { sum.shared(n) } else { Used::default() };
        let mut sum = Used::default();
        // Nothing is called where all are refused.
        if decision.plan.is_some() {
            each_chance(decision, |arm, p| {
                let known = logged.filter(|_| arm == entry.arm);
                let other = || self.arms.get(arm).map_or_else(|| mean(self.all), |of| mean(*of));
                sum += known.unwrap_or_else(other).times(p);
            });
        }
        let counted: Counted = policy.spending().collect();
        self.spent.add(&Who::of(context), context.now, sum, &counted);
        if let Some(used) = logged {
            for (n, sum) in [self.arms.entry(entry.arm.clone()).or_default(), &mut self.all] {
                *n += 1.0;
                *sum += used;
            }
        }
    }
}
