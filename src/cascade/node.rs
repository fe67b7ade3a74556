//! The nodes of a running plan. Each is started once, is told of events, and ends by succeeding or failing; what they
//! share (the clock, the numbering of calls, the bounds, the commands given) is the [`Scope`].

use std::collections::VecDeque;

use crate::domain::{AttemptReason, CallSpec, ErrorKind, Micros, Plan};

use super::{Command, Event, RetryPolicy, Timer, retry};

/// What all nodes of one machine share.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) now: Micros,
    /// Whether a part of an answer has gone to the client.
    pub(super) forwarded: bool,
    retry: RetryPolicy,
    deadline: Option<Micros>,
    seed: u64,
    calls: u32,
    max_calls: u32,
    retries: u32,
    commands: VecDeque<Command>,
}

impl Scope {
    pub(super) fn new(retry: RetryPolicy, max_calls: u32, deadline: Option<Micros>, seed: u64, now: Micros) -> Self {
        Self {
            now,
            forwarded: false,
            retry,
            deadline,
            seed,
            calls: 0,
            max_calls,
            retries: 0,
            commands: VecDeque::with_capacity(4),
        }
    }

    pub(super) fn push(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    pub(super) fn pop(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// Whether the request may make one more call.
    pub(super) fn may_call(&self) -> bool {
        self.calls < self.max_calls
    }

    fn start(&mut self, spec: &CallSpec, why: AttemptReason) -> u32 {
        let call = self.calls;
        self.calls += 1;
        self.push(Command::Start { call, spec: spec.clone(), why });
        call
    }

    /// When the same call may be made again; `None`: not at all. Draws from the seed's place for the failed call.
    fn retry_at(&mut self, call: u32, kind: ErrorKind, retry: u32, retry_after: Option<i64>) -> Option<Micros> {
        if self.forwarded || !self.may_call() || self.retries >= self.retry.budget {
            return None;
        }
        let seed = self.seed ^ retry::mix(u64::from(call));
        let at = self.now.saturating_add(self.retry.wait(kind, retry, retry_after, seed)?);
        // A retry that the deadline would cut off at once is none.
        if self.deadline.is_some_and(|deadline| at >= deadline) {
            return None;
        }
        self.retries += 1;
        Some(at)
    }
}

/// What became of a node through an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Running,
    Succeeded { call: u32 },
    Failed { call: u32, kind: ErrorKind },
}

/// A node of a running plan.
#[derive(Debug)]
pub(super) enum Node {
    Call(CallNode),
}

impl Node {
    /// The node for a plan, not started.
    pub(super) fn of(plan: &Plan) -> Self {
        match plan {
            Plan::Call(spec) => Node::Call(CallNode { spec: spec.clone(), retries: 0, at: At::Idle }),
        }
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) {
        match self {
            Node::Call(node) => node.start(why, scope),
        }
    }

    pub(super) fn handle(&mut self, event: Event, scope: &mut Scope) -> Step {
        match self {
            Node::Call(node) => node.handle(event, scope),
        }
    }

    /// Ends the node; the call that was running or had failed last.
    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        match self {
            Node::Call(node) => node.cancel(scope),
        }
    }
}

/// One call with its retries.
#[derive(Debug)]
pub(super) struct CallNode {
    spec: CallSpec,
    /// Tries after the first.
    retries: u32,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Idle,
    Running(u32),
    /// Waiting to make the call again; the call that failed.
    Waiting(u32),
    Ended,
}

impl CallNode {
    fn start(&mut self, why: AttemptReason, scope: &mut Scope) {
        self.at = At::Running(scope.start(&self.spec, why));
    }

    fn handle(&mut self, event: Event, scope: &mut Scope) -> Step {
        match (self.at, event) {
            (At::Running(mine), Event::Delta { call }) if call == mine => {
                if !scope.forwarded {
                    scope.forwarded = true;
                    scope.push(Command::Forward { call });
                }
                Step::Running
            }
            (At::Running(mine), Event::Done { call }) if call == mine => {
                self.at = At::Ended;
                Step::Succeeded { call }
            }
            (At::Running(mine), Event::Failed { call, kind, retry_after }) if call == mine => {
                let Some(at) = scope.retry_at(call, kind, self.retries, retry_after) else {
                    self.at = At::Ended;
                    return Step::Failed { call, kind };
                };
                self.retries += 1;
                self.at = At::Waiting(call);
                scope.push(Command::SetTimer { timer: Timer::Backoff, at });
                Step::Running
            }
            (At::Waiting(_), Event::Timer(Timer::Backoff)) => {
                self.start(AttemptReason::Retry, scope);
                Step::Running
            }
            _ => Step::Running,
        }
    }

    fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        let at = std::mem::replace(&mut self.at, At::Ended);
        match at {
            At::Running(call) => {
                scope.push(Command::Cancel { call });
                Some(call)
            }
            At::Waiting(call) => Some(call),
            At::Idle | At::Ended => None,
        }
    }
}
