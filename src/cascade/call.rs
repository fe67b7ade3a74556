//! The leaf: one call with its retries, and where the plan says so a second one beside it, the hedge (Dean and Barroso, "The Tail at
//! Scale", CACM 56(2), 2013).
//!
//! A hedge goes out once in a run of the node, when the call has given neither a piece nor an end in time. Which of the two begins
//! to answer first is the node's call from then on, and the other is cancelled. Where one of them fails the other goes on, and no retry
//! is made beside it.

use std::sync::Arc;

use crate::domain::{AttemptReason, CallSpec, ErrorKind, Mask, Micros, What};

use super::{
    Command, Event, Input, Timer,
    node::{Got, Position, Step},
    scope::{Room, Scope},
};

/// One call with its retries and its hedge.
#[derive(Debug)]
pub(super) struct CallNode {
    spec: CallSpec,
    input: Input,
    position: Position,
    /// Tries after the first.
    retries: u32,
    at: At,
    hedge: Hedge,
}

#[derive(Debug)]
enum At {
    Idle,
    Running(u32),
    /// Waiting to make the call again; the call that failed, and how.
    Waiting(u32, ErrorKind),
    Answered(Got),
    Ended,
}

/// The second call.
#[derive(Debug)]
enum Hedge {
    /// None, or no more.
    None,
    /// Goes out so many microseconds after a call that has not begun to answer.
    Ready(Box<CallSpec>, i64),
    Running(Box<CallSpec>, u32),
}

impl Hedge {
    /// Of one that is running: its call, and there is none any more.
    fn end(&mut self) -> Option<(Box<CallSpec>, u32)> {
        match std::mem::replace(self, Hedge::None) {
            Hedge::Running(spec, call) => Some((spec, call)),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl CallNode {
    pub(super) fn new(spec: CallSpec, input: Input, position: Position) -> Self {
        Self { spec, input, position, retries: 0, at: At::Idle, hedge: Hedge::None }
    }

    /// A call that is hedged.
    pub(super) fn hedged(spec: CallSpec, hedge: CallSpec, after_ms: u32, position: Position) -> Self {
        let hedge = Hedge::Ready(Box::new(hedge), i64::from(after_ms) * 1000);
        Self { hedge, ..Self::new(spec, Input::Request, position) }
    }

    /// The hedge is not counted: the call can do without it.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        room.take(scope.worst(&self.spec))
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        let call = scope.start(&self.spec, why, &self.input, &self.position.place);
        self.at = At::Running(call);
        if let Hedge::Ready(_, after) = self.hedge {
            let at: Micros = scope.now.saturating_add(after);
            scope.push(Command::SetTimer { timer: Timer::Hedge { call }, at });
        }
        Step::Running
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        match (&self.at, event) {
            (At::Running(_), Event::Delta { call }) if self.is_of(*call) => {
                self.begins(*call, scope);
                if self.position.live && !scope.forwarded {
                    scope.forward(*call);
                }
                Step::Running
            }
            (At::Running(_), Event::Done { call, answer }) if self.is_of(*call) => {
                self.begins(*call, scope);
                let answer = Arc::clone(answer);
                let got = Got { call: *call, answer, live: self.position.live, disagreement: None, verified: None };
                self.at = At::Answered(got.clone());
                Step::Succeeded(got)
            }
            (At::Running(mine), Event::Failed { call, kind, retry_after, .. }) if self.is_of(*call) => {
                let mine = *mine;
                if let Some((spec, hedge)) = self.hedge.end() {
                    if *call == mine {
                        (self.spec, self.at) = (*spec, At::Running(hedge));
                    }
                    let left = if *call == mine { hedge } else { mine };
                    scope.note(&self.position.place, What::HedgeLeft { call: left, failed: *call, error: *kind });
                    return Step::Running;
                }
                let Some(at) = scope.retry_at(&self.spec, *call, *kind, self.retries, *retry_after) else {
                    return self.fail(*call, *kind);
                };
                self.retries += 1;
                self.at = At::Waiting(*call, *kind);
                scope.push(Command::SetTimer { timer: Timer::Backoff { call: *call }, at });
                Step::Running
            }
            (At::Running(mine), Event::Timer(Timer::Hedge { call })) if call == mine => {
                let Hedge::Ready(spec, _) = &self.hedge else { return Step::Running };
                self.hedge = match scope.admits(spec) {
                    Ok(()) => {
                        let hedge = scope.start(spec, AttemptReason::Hedge, &self.input, &self.position.place);
                        scope.note(&self.position.place, What::Hedged { call: *call, hedge });
                        Hedge::Running(spec.clone(), hedge)
                    }
                    Err(by) => {
                        scope.note(&self.position.place, What::HedgeMasked { call: *call, by });
                        Hedge::None
                    }
                };
                Step::Running
            }
            (At::Running(mine), Event::HedgeDenied { call }) if call == mine => {
                if matches!(self.hedge, Hedge::Ready(..)) {
                    scope.note(&self.position.place, What::HedgeDenied { call: *call });
                    self.hedge = Hedge::None;
                }
                Step::Running
            }
            (At::Waiting(failed, kind), Event::RetryDenied { call }) if call == failed => {
                let kind = *kind;
                scope.note(&self.position.place, What::RetryDenied { call: *call });
                scope.retry_denied();
                self.fail(*call, kind)
            }
            (At::Waiting(failed, kind), Event::Timer(Timer::Backoff { call })) if call == failed => {
                // Others may have used up meanwhile what was left.
                if let Err(by) = scope.admits(&self.spec) {
                    scope.note(&self.position.place, What::Masked { by });
                    return self.fail(*call, *kind);
                }
                self.start(AttemptReason::Retry, scope)
            }
            _ => Step::Running,
        }
    }

    /// The call that is under way.
    pub(super) fn running(&self) -> Option<u32> {
        match self.at {
            At::Running(call) => Some(call),
            At::Idle | At::Waiting(..) | At::Answered(_) | At::Ended => None,
        }
    }

    /// Whether the call is this node's, which is running, or its hedge.
    fn is_of(&self, call: u32) -> bool {
        matches!(self.at, At::Running(mine) if mine == call)
            || matches!(self.hedge, Hedge::Running(_, hedge) if hedge == call)
    }

    /// One of the two begins to answer, and is the node's call from now on. What has begun is not hedged.
    fn begins(&mut self, winner: u32, scope: &mut Scope) {
        let ended = self.hedge.end();
        self.hedge = Hedge::None;
        let (Some((spec, hedge)), &At::Running(call)) = (ended, &self.at) else { return };
        if winner == hedge {
            (self.spec, self.at) = (*spec, At::Running(hedge));
            scope.cancel(call);
            scope.note(&self.position.place, What::HedgeWon { call, hedge });
        } else {
            scope.cancel(hedge);
            scope.note(&self.position.place, What::HedgeLost { call, hedge });
        }
    }

    fn fail(&mut self, call: u32, kind: ErrorKind) -> Step {
        self.at = At::Ended;
        Step::Failed { call, kind }
    }

    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        let call = match self.at {
            At::Running(call) => {
                scope.cancel(call);
                call
            }
            At::Waiting(call, _) => call,
            At::Idle | At::Answered(_) | At::Ended => return None,
        };
        if let Hedge::Running(_, hedge) = self.hedge {
            scope.cancel(hedge);
        }
        (self.at, self.hedge) = (At::Ended, Hedge::None);
        Some(call)
    }

    pub(super) fn best(&self) -> Option<Got> {
        match &self.at {
            At::Answered(got) => Some(got.clone()),
            At::Idle | At::Running(_) | At::Waiting(..) | At::Ended => None,
        }
    }
}
