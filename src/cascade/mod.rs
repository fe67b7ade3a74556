//! The plan machine: which calls are made, in which order, and what follows each failure. Pure: it is told what happened
//! ([`Event`]) and when, and says what is to be done ([`Command`]); dispatch does it.
//!
//! A plan is a tree of nodes. Today there is one kind of node, the call with its retries ([`node`]), and one composition
//! above it, the fallback chain, which belongs to the request and not to the plan. Stages, parallel branches and steps
//! become further nodes; the commands they need (`Emit` for text that no call produced) come with them.
//!
//! Rules that every node keeps:
//! - Once a call has been forwarded, the client has seen a part of its answer: nothing is repeated from there on, a
//!   failure ends the request.
//! - Fallback answers errors of the listed kinds, in order, each model at most once in a request.
//! - The same events at the same instants give the same commands: the only randomness is the seed's.

pub mod canonical;
pub mod gate;
mod node;
mod retry;
pub mod vote;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::domain::{AttemptReason, CallSpec, ErrorKind, Micros, Plan};

pub use retry::RetryPolicy;

use node::{Node, Scope, Step};

/// What happened. Events of calls that have ended, or that never were, change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The backend has accepted the call.
    Started { call: u32 },
    /// The first piece of the call's answer is there.
    Delta { call: u32 },
    /// The call's answer is complete.
    Done { call: u32 },
    /// The call has failed. `retry_after`: how long the server asked to be left alone, in microseconds.
    Failed { call: u32, kind: ErrorKind, retry_after: Option<i64> },
    /// A timer set by [`Command::SetTimer`] has run out.
    Timer(Timer),
    /// The client has left.
    ClientGone,
}

/// The timers of one machine; setting one again moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// The whole request's.
    Deadline,
    /// The wait before a retry.
    Backoff,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Make a call. `call` counts the request's calls from 0.
    Start { call: u32, spec: CallSpec, why: AttemptReason },
    /// Stop a call; nothing more is wanted of it.
    Cancel { call: u32 },
    /// Splice the call's stream to the client, from its first piece to its last.
    Forward { call: u32 },
    /// Raise [`Event::Timer`] at this instant.
    SetTimer { timer: Timer, at: Micros },
    /// The request is answered by this call. The last command.
    Finish { call: u32 },
    /// The request has failed; the error is that of `call`, where one was made and failed. The last command.
    Fail { kind: ErrorKind, call: Option<u32> },
}

/// Bounds on one request, whatever its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Microseconds from the start to the end of the answer; `None` leaves time to the backends' own limits.
    pub deadline: Option<i64>,
    /// Calls in all: planned, retries and fallback together. At least 1.
    pub max_calls: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { deadline: None, max_calls: 8 }
    }
}

/// What a machine runs.
#[derive(Clone, Debug)]
pub struct Setup {
    pub plan: Plan,
    /// Calls that may follow an error, in order.
    pub fallback: Vec<CallSpec>,
    /// The kinds of error that the fallback answers.
    pub fallback_on: Vec<ErrorKind>,
    pub retry: RetryPolicy,
    pub limits: Limits,
    /// Of the jitter.
    pub seed: u64,
}

/// One request's run of its plan.
#[derive(Debug)]
pub struct Machine {
    current: Node,
    fallback: VecDeque<CallSpec>,
    fallback_on: Vec<ErrorKind>,
    /// Models that were called, or that are about to be.
    tried: Vec<String>,
    scope: Scope,
    ended: bool,
}

impl Machine {
    /// A machine at its start; its first commands are ready at once.
    pub fn new(setup: Setup, now: Micros) -> Self {
        let Setup { plan, fallback, fallback_on, retry, limits, seed } = setup;
        let tried = plan.models().into_iter().map(str::to_owned).collect();
        let deadline = limits.deadline.map(|d| now.saturating_add(d));
        let mut scope = Scope::new(retry, limits.max_calls.max(1), deadline, seed, now);
        if let Some(at) = deadline {
            scope.push(Command::SetTimer { timer: Timer::Deadline, at });
        }
        let mut current = Node::of(&plan);
        current.start(AttemptReason::Planned, &mut scope);
        Self { current, fallback: fallback.into(), fallback_on, tried, scope, ended: false }
    }

    /// Takes in what happened. `now` never goes back from one event to the next.
    pub fn handle(&mut self, event: Event, now: Micros) {
        if self.ended {
            return;
        }
        self.scope.now = now;
        match event {
            Event::ClientGone => self.stop(ErrorKind::Cancelled),
            Event::Timer(Timer::Deadline) => self.stop(ErrorKind::Timeout),
            event => match self.current.handle(event, &mut self.scope) {
                Step::Running => {}
                Step::Succeeded { call } => self.end(Command::Finish { call }),
                Step::Failed { call, kind } => self.fall_back(call, kind),
            },
        }
    }

    /// The next thing to do, if there is one now.
    pub fn poll(&mut self) -> Option<Command> {
        self.scope.pop()
    }

    /// Whether the last command has been given (it may still have to be polled).
    pub fn ended(&self) -> bool {
        self.ended
    }

    fn fall_back(&mut self, call: u32, kind: ErrorKind) {
        if !self.scope.forwarded && self.scope.may_call() && self.fallback_on.contains(&kind) {
            while let Some(spec) = self.fallback.pop_front() {
                if self.tried.contains(&spec.model) {
                    continue;
                }
                self.tried.push(spec.model.clone());
                self.current = Node::of(&Plan::Call(spec));
                self.current.start(AttemptReason::Fallback, &mut self.scope);
                return;
            }
        }
        self.end(Command::Fail { kind, call: Some(call) });
    }

    fn stop(&mut self, kind: ErrorKind) {
        let call = self.current.cancel(&mut self.scope);
        self.end(Command::Fail { kind, call });
    }

    fn end(&mut self, last: Command) {
        self.scope.push(last);
        self.ended = true;
    }
}
