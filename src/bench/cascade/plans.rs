//! The plans that are judged, over the arms of [`super::answers`].

use super::answers::{Asking, SIMULATED, SMALL};
use crate::{
    cascade::{canonical::form, vote},
    domain::{Aggregate, Bound, CallSpec, Condition, Plan, Sampling, Score, Stage, Verified},
};

/// Temperatures of the probes and of the samples that vote.
pub const PROBE: f64 = 0.3;
pub const VOTE: f64 = 0.7;
const PROBES: usize = 3;
pub const VOTES: usize = 5;
/// As AutoMix has it.
pub const VERDICTS: u32 = 8;

/// The first stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// One answer at temperature 0.
    Greedy,
    /// The vote of three answers at [`PROBE`].
    Probes,
    /// One answer at temperature 0, and what the model says of it [`VERDICTS`] times.
    Verified,
}

/// The stage that is escalated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// The vote of five answers at [`VOTE`] of the same model.
    Vote,
    /// A made up model.
    Simulated,
}

fn call(model: &str, temperature: f64) -> Plan {
    let sampling = Sampling { temperature: Some(temperature), ..Sampling::default() };
    Plan::Call(CallSpec { sampling, firm: true, ..CallSpec::bare(model) })
}

fn votes(of: usize, temperature: f64) -> Plan {
    Plan::Parallel { branches: vec![call(SMALL, temperature); of], aggregate: Aggregate::Vote }
}

pub fn first(first: First) -> Plan {
    match first {
        First::Greedy => call(SMALL, 0.0),
        First::Probes => votes(PROBES, PROBE),
        First::Verified => {
            Plan::Verified(Box::new(Verified { plan: call(SMALL, 0.0), by: CallSpec::bare(SMALL), times: VERDICTS }))
        }
    }
}

pub fn last(last: Last) -> Plan {
    match last {
        Last::Vote => votes(VOTES, VOTE),
        Last::Simulated => call(SIMULATED, 0.0),
    }
}

/// One stage behind a gate, and one more.
pub fn cascade(first: Plan, accept_when: Condition, last: Plan) -> Plan {
    Plan::Cascade(vec![
        Stage { plan: first, accept_when: vec![accept_when], stop_early: false },
        Stage { plan: last, accept_when: Vec::new(), stop_early: false },
    ])
}

/// Three modes by how far answers agree, after ACAR (arXiv 2602.21231): all three probes agree and one of them is given out;
/// else two more are asked, and if these agree one of them is; else the last resort, a vote of three more or this model.
/// ACAR chooses between the last two by the probes alone, and has other models there.
pub fn modes(model: Option<&str>) -> Plan {
    let agree = Condition::new(Score::Disagreement, Bound::Below(0.25));
    let full = model.map_or_else(|| votes(VOTES - 2, VOTE), |model| call(model, 0.0));
    Plan::Cascade(vec![
        Stage { plan: votes(PROBES, PROBE), accept_when: vec![agree], stop_early: false },
        Stage { plan: votes(2, VOTE), accept_when: vec![agree], stop_early: false },
        Stage { plan: full, accept_when: Vec::new(), stop_early: false },
    ])
}

/// How far the probes disagree, for a threshold to be found; the machine finds it for itself.
pub fn disagreement(asking: &Asking) -> f64 {
    let mut forms: Vec<_> = asking.samples(PROBE).take(PROBES).map(|answer| form(&answer.text)).collect();
    let all = forms.len();
    forms.sort();
    forms.dedup();
    vote::sigma(forms.len(), all).unwrap_or(0.0)
}
