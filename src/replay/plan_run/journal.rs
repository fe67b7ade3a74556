//! A recorded decision's plan over its own attempts: the same machine must decide the same again.
//!
//! What is not in the record is what weir is started with: retries' waits and the bounds of a request. They are taken to be
//! weir's own ([`RetryPolicy::default`], [`Limits::default`]).

use serde::{Deserialize, Serialize};

use super::{Answers, Asked, End, Ending, Recorded, run};
use crate::{
    audit::{DecisionView, query::NoteView},
    cascade::{Limits, RetryPolicy, Setup, Timer},
    domain::{
        Abort, Attempt, AttemptReason, ErrorKind, FinishReason, Micros, Note, Outcome, OutcomeStatus, Plan, Spend,
        What, canonical,
    },
};

/// The attempts of one decision, by their index.
pub struct Journal<'a> {
    attempts: &'a [Attempt],
    notes: &'a [NoteView],
    /// What is not there was running when the record broke off.
    broken_off: bool,
}

impl<'a> Journal<'a> {
    /// `notes`: what the machine could not know by itself is told by these alone.
    pub fn new(attempts: &'a [Attempt], notes: &'a [NoteView], broken_off: bool) -> Self {
        Self { attempts, notes, broken_off }
    }

    /// When such a note was made.
    fn noted(&self, is: impl Fn(&Note) -> bool) -> Option<Micros> {
        self.notes.iter().find(|noted| is(&noted.note)).map(|noted| noted.at)
    }

    fn attempt(&self, call: u32) -> Option<&'a Attempt> {
        self.attempts.iter().find(|attempt| attempt.index == call)
    }
}

impl Answers for Journal<'_> {
    fn answer(&mut self, asked: &Asked<'_>) -> Option<Recorded> {
        let never = Recorded {
            answer: 0,
            ending: Ending::Never,
            cost: Spend::default(),
            first: None,
            known: Vec::new(),
            latency: 0,
        };
        let Some(attempt) = self.attempt(asked.call) else { return self.broken_off.then_some(never) };
        if attempt.model != asked.spec.model || attempt.why != asked.why || attempt.at != asked.at {
            return None;
        }
        let ending = match &attempt.error {
            Some(label) => {
                let kind = ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == label);
                Ending::Fails {
                    kind: kind.unwrap_or(ErrorKind::Internal),
                    retry_after: attempt.retry_after_us,
                    down: attempt.down.clone(),
                }
            }
            None if attempt.finish == Some(FinishReason::Cancelled) => Ending::Never,
            None => Ending::Answers(attempt.facts.clone().unwrap_or_default()),
        };
        let after = |more: i64| (attempt.started + more).saturating_sub(asked.now);
        Some(Recorded {
            answer: attempt.index as usize,
            ending,
            cost: Spend::of(attempt.cost_usd, &attempt.usage),
            first: attempt.ttft_us.map(after),
            known: attempt.facts.as_ref().map(|facts| facts.scores.clone()).unwrap_or_default(),
            latency: after(attempt.latency_us),
        })
    }

    /// Other requests had used up the retries.
    fn denies(&mut self, timer: Timer) -> bool {
        let denied = match timer {
            Timer::Backoff { call } => What::RetryDenied { call },
            Timer::Hedge { call } => What::HedgeDenied { call },
            Timer::Deadline => return false,
        };
        self.noted(|note| note.what == denied).is_some()
    }

    /// A retry or a hedge began when its wait was over. Where the record has none, and no note that it was masked, something else
    /// came first, were it only by being looked at first.
    fn rings(&mut self, timer: Timer, at: Micros) -> Option<Micros> {
        let begun = |call: u32, why: AttemptReason| {
            let first = self.attempt(call)?;
            let follows = |a: &&Attempt| a.index > call && a.why == why && a.at == first.at;
            self.attempts.iter().filter(follows).map(|a| a.started).min()
        };
        match timer {
            Timer::Deadline => {
                let stopped = What::Stopped { by: Abort::Deadline };
                self.noted(|note| note.what == stopped).map(|_| at)
            }
            Timer::Backoff { call } => begun(call, AttemptReason::Retry).or_else(|| {
                let failed = self.attempt(call)?;
                let masked = |note: &Note| matches!(note.what, What::Masked { .. }) && note.at == failed.at;
                self.noted(masked)
            }),
            Timer::Hedge { call } => begun(call, AttemptReason::Hedge).or_else(|| {
                self.noted(|note| match note.what {
                    What::HedgeMasked { call: of, .. } | What::HedgeDenied { call: of } => of == call,
                    _ => false,
                })
            }),
        }
    }
}

/// What the machine decided: the notes, and which model answered; empty where the request failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Course {
    pub notes: Vec<Note>,
    pub served_by: String,
}

impl Course {
    /// Canonical JSON.
    pub fn json(&self) -> String {
        String::from_utf8(canonical::to_bytes(self).unwrap_or_default()).unwrap_or_default()
    }
}

/// The recorded course, and the one that the machine takes again.
#[derive(Clone, Debug, PartialEq)]
pub struct Again {
    pub recorded: Course,
    pub derived: Course,
    /// Whether they are the same; of a record that breaks off, as far as it goes.
    pub same: bool,
}

/// Runs the plan of a recorded decision again. `None` where there is nothing to run: a plan of one call, whose attempts
/// tell all, a refusal, a decision that was only asked for, or one without an end.
pub fn again(view: &DecisionView) -> Option<Again> {
    let outcome = view.outcome.as_ref().filter(|_| !view.decision.dry)?;
    let setup = Setup::of(view.id, &view.decision.decision, &RetryPolicy::default(), Limits::default())?;
    if matches!(setup.plan, Plan::Call(_)) {
        return None;
    }
    Some(run_again(&setup, view.at, &view.attempts, &view.notes, outcome))
}

/// Runs a plan that began at `begin` again, over what is recorded of that run.
pub fn run_again(setup: &Setup, begin: Micros, attempts: &[Attempt], notes: &[NoteView], outcome: &Outcome) -> Again {
    let broken_off = matches!(outcome.status, OutcomeStatus::Cancelled | OutcomeStatus::Interrupted);
    let begin = attempts.iter().map(|attempt| attempt.started).fold(begin, Micros::min);
    let run = run(setup, begin, &mut Journal::new(attempts, notes, broken_off));
    let answered = outcome.status == OutcomeStatus::Ok;
    let notes = notes.iter().map(|noted| noted.note.clone()).collect();
    // An answer that was cut while it was given out has a model, too.
    let recorded = Course { notes, served_by: if answered { outcome.served_by.clone() } else { String::new() } };
    let served_by = run.served().map(|made| made.model.clone()).unwrap_or_default();
    let derived = Course { notes: run.notes, served_by };
    let same = match broken_off {
        true => derived.notes.starts_with(&recorded.notes),
        false => derived == recorded && (answered || matches!(run.end, End::Failed { .. })),
    };
    Again { recorded, derived, same }
}
