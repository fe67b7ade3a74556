//! The leaf: one call with its retries.

use std::sync::Arc;

use crate::domain::{AttemptReason, CallSpec, ErrorKind, Mask, What};

use super::{
    Command, Event, Input, Timer,
    node::{Got, Position, Step},
    scope::{Room, Scope},
};

/// One call with its retries.
#[derive(Debug)]
pub(super) struct CallNode {
    spec: CallSpec,
    input: Input,
    position: Position,
    /// Tries after the first.
    retries: u32,
    at: At,
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

impl CallNode {
    pub(super) fn new(spec: CallSpec, input: Input, position: Position) -> Self {
        Self { spec, input, position, retries: 0, at: At::Idle }
    }

    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        room.take(scope.worst(&self.spec))
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        self.at = At::Running(scope.start(&self.spec, why, &self.input, &self.position.place));
        Step::Running
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        match (&self.at, event) {
            (At::Running(mine), Event::Delta { call }) if call == mine => {
                if self.position.live && !scope.forwarded {
                    scope.forward(*call);
                }
                Step::Running
            }
            (At::Running(mine), Event::Done { call, answer }) if call == mine => {
                let answer = Arc::clone(answer);
                let got = Got { call: *call, answer, live: self.position.live, disagreement: None };
                self.at = At::Answered(got.clone());
                Step::Succeeded(got)
            }
            (At::Running(mine), Event::Failed { call, kind, retry_after, .. }) if call == mine => {
                let Some(at) = scope.retry_at(&self.spec, *call, *kind, self.retries, *retry_after) else {
                    return self.fail(*call, *kind);
                };
                self.retries += 1;
                self.at = At::Waiting(*call, *kind);
                scope.push(Command::SetTimer { timer: Timer::Backoff { call: *call }, at });
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
        self.at = At::Ended;
        Some(call)
    }

    pub(super) fn best(&self) -> Option<Got> {
        match &self.at {
            At::Answered(got) => Some(got.clone()),
            At::Idle | At::Running(_) | At::Waiting(..) | At::Ended => None,
        }
    }
}
