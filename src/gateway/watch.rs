//! Whether gates keep in production what their calibrations promised: of accepted answers that were judged, the share that
//! was wrong, tested after each of them ([`Monitor`]). A weir counts from its start; judgements before it are not counted
//! again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::{
    audit::query::DecisionView,
    cascade::calibration::{Monitor, Verdict},
    domain::{Admin, Condition, Hash, What},
};

/// How probable an alarm is, ever, where a gate keeps its promise.
const FALSE_ALARM: f64 = 0.05;
/// A judgement below this says that the answer was wrong.
const WRONG_BELOW: f64 = 0.5;
/// The admin event's action.
const VIOLATED: &str = "guarantee_violated";

/// The monitors of one weir: per calibration and bound.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<BTreeMap<(Hash, u64), Monitor>>);

impl Watch {
    /// Takes in a judgement on a decision's answer: an event for each guarantee that is now known to be violated.
    pub(super) fn judged(&self, view: &DecisionView, value: f64) -> Vec<Admin> {
        let mut monitors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = Vec::new();
        for condition in guaranteed(view) {
            let (Some(calibration), Some(max_error)) = (condition.calibration, condition.max_error) else { continue };
            // What compiled is a bound between 0 and 1.
            let Ok(new) = Monitor::new(max_error, FALSE_ALARM) else { continue };
            let monitor = monitors.entry((calibration, max_error.to_bits())).or_insert(new);
            let before = monitor.verdict();
            if monitor.observe(value < WRONG_BELOW) == Verdict::Violated && before == Verdict::Fine {
                out.push(violated(&view.decision.decision.policy, &condition, monitor));
            }
        }
        out
    }
}

/// The conditions with a guarantee by which the answer that was given out had been accepted.
fn guaranteed(view: &DecisionView) -> Vec<Condition> {
    let notes = || view.notes.iter().map(|note| &note.note.what);
    let accepted = |answer: u32| notes().any(|what| matches!(what, What::Accepted { call, .. } if *call == answer));
    notes()
        .filter_map(|what| match what {
            What::GateHolds { call, condition, .. } if condition.max_error.is_some() && accepted(*call) => {
                Some(*condition)
            }
            _ => None,
        })
        .collect()
}

fn violated(policy: &str, condition: &Condition, monitor: &Monitor) -> Admin {
    let calibration = condition.calibration.map(|hash| hash.short()).unwrap_or_default();
    let detail = format!(
        "policy {policy}: {condition}, calibrated by {calibration} for at most {} % wrong, accepted {} wrong answers of {} judged; \
         calibrate it again with new answers",
        monitor.max_error() * 100.0,
        monitor.wrong(),
        monitor.seen()
    );
    Admin { action: VIOLATED.to_owned(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::testing,
        domain::{Bound, DecisionId, Event, EventBody, Note, Score},
    };

    fn view(whats: Vec<What>) -> DecisionView {
        let id = DecisionId::new();
        let note = |what| Event::new(2, Some(id), EventBody::Note(Note { at: vec![0], what }));
        let mut events = vec![testing::decision(id, 1)];
        events.extend(whats.into_iter().map(note));
        testing::view(events)
    }

    #[test]
    fn a_broken_promise_is_told_once_and_only_accepted_answers_count() {
        let calibration = Some(Hash::of(b"c"));
        let bound = Bound::Below(0.9);
        let condition =
            Condition { calibration, max_error: Some(0.1), ..Condition::new(Score::MeanTokenEntropy, bound) };
        let holds = What::GateHolds { call: 0, condition, value: 0.5, exact: true };
        let accepted = view(vec![holds, What::Accepted { stage: 0, call: 0 }]);
        let escalated = view(vec![holds, What::Escalated { from: 0, to: 1, call: 0 }]);
        let watch = Watch::default();
        for _ in 0..200 {
            assert_eq!(watch.judged(&escalated, 0.0), []);
            assert_eq!(watch.judged(&accepted, 1.0), []);
        }
        let told: Vec<Admin> = (0..200).flat_map(|_| watch.judged(&accepted, 0.0)).collect();
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].action, "guarantee_violated");
        assert!(told[0].detail.contains("mean_token_entropy < 0.9") && told[0].detail.contains("at most 10 % wrong"));
    }
}
