//! Plans that tests run.

use super::{Aggregate, Bound, CallSpec, Condition, Plan, Score, Stage};

pub fn call(model: &str) -> Plan {
    Plan::Call(CallSpec::bare(model))
}

/// `small` if its mean log-probability is above -0.5, else `large`.
pub fn frugal() -> Plan {
    let sure = Condition::new(Score::MeanLogprob, Bound::Above(-0.5));
    Plan::Cascade(vec![
        Stage { plan: call("small"), accept_when: vec![sure], stop_early: false },
        Stage { plan: call("large"), accept_when: Vec::new(), stop_early: false },
    ])
}

/// A call of each of these models at once.
pub fn parallel(models: &[&str], aggregate: Aggregate) -> Plan {
    Plan::Parallel { branches: models.iter().map(|m| call(m)).collect(), aggregate }
}
