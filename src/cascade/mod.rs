//! The plan machine: which calls are made, in which order, and what follows each failure. Pure: it is told what happened
//! ([`Event`]) and when, and says what is to be done ([`Command`]); dispatch does it.
//!
//! A plan is a tree of nodes: the call with its retries and its hedge ([`call`]), stages behind gates ([`stages`], [`gate`]), branches
//! at the same time and one answer made of theirs ([`parallel`], [`vote`], [`canonical`]), reasoning step by step ([`steps`]), an
//! answer and calls that verify it ([`verified`]).
//! The fallback chain stands above the tree; it belongs to the request and not to the plan.
//!
//! Rules that every node keeps:
//! - A call's stream is forwarded only where nothing after it can change the answer: a bare call, a stage without a gate, a
//!   refining call, a fallback, and each only where nothing above it is gated or aggregated. Every other answer is held
//!   back and emitted whole.
//! - Once a call has been forwarded, the client has seen a part of its answer: nothing is repeated from there on, a
//!   failure ends the request.
//! - **Escalation** answers a rejected answer, with a fresh prompt; **fallback** answers an error: the next stage that fits,
//!   a quorum without the branch, and at last the request's calls for errors of the listed kinds, in order, each model at
//!   most once in a request.
//! - What follows an error is sought among the models that can be called at that moment, as the failure's event says; the others are
//!   passed over, and noted where they would have been next. What waits before a model is known as of the last complete answer.
//! - What would overrun the deadline, the bound on calls or the budget is masked: not begun, and noted. Where nothing else
//!   can be done the request is answered with the best complete answer so far, which a note says. Best is, in this order:
//!   what a node chose itself (accepted, voted, judged); the answer of a later stage; of branches not yet aggregated, their
//!   vote; the first branch that has anything.
//! - Each decision that no call shows is a [`Command::Note`] with a reason from a fixed list. A bare call has none: its
//!   attempts and its end tell all. (Only a fallback that was passed over and a retry that was denied are noted there, too.)
//! - The same events at the same instants give the same commands: the only randomness is the seed's.

pub mod breaker;
pub mod calibration;
mod call;
pub mod canonical;
mod facts;
pub mod failover;
mod fallback;
pub mod gate;
pub mod limiter;
mod node;
mod parallel;
mod protocol;
mod retry;
pub mod retry_budget;
mod scope;
mod stages;
mod steps;
mod verified;
pub mod vote;

#[cfg(test)]
mod tests;

use crate::domain::{Abort, AttemptReason, BestBecause, ErrorKind, Mask, Micros, Plan, What};

pub use facts::{Forms, readings};
pub use protocol::{Answered, Command, Event, Input, Limits, Setup, Timer};
pub use retry::RetryPolicy;

use fallback::Fallback;
use node::{Got, Node, Position, Step};
use scope::Scope;

/// One request's run of its plan.
#[derive(Debug)]
pub struct Machine {
    plan: Node,
    /// The fallback's call that took over from the plan.
    instead: Option<Node>,
    fallback: Fallback,
    fallback_on: Vec<ErrorKind>,
    /// The plan is one call.
    bare: bool,
    scope: Scope,
    ended: bool,
}

impl Machine {
    /// A machine at its start; its first commands are ready at once. A plan that makes no sense ([`Plan::check`]) fails
    /// without a call.
    pub fn new(setup: Setup, now: Micros) -> Self {
        let Setup { plan, fallback, failover, fallback_on, retry, limits, worst, waits, seed } = setup;
        let mut scope = Scope::new(retry, limits, worst, waits, seed, now);
        if let Some(at) = scope.deadline() {
            scope.push(Command::SetTimer { timer: Timer::Deadline, at });
        }
        let mut machine = Self {
            plan: Node::of(&plan, Position::root()),
            instead: None,
            fallback: Fallback::new(fallback, failover.as_ref()),
            fallback_on,
            bare: matches!(plan, Plan::Call(_)),
            scope,
            ended: false,
        };
        if plan.check().is_err() {
            machine.end(Command::Fail { kind: ErrorKind::Internal, call: None });
            return machine;
        }
        let step = match machine.plan.fits(&machine.scope, &mut machine.scope.room()) {
            Ok(()) => machine.plan.start(AttemptReason::Planned, &mut machine.scope),
            Err(by) => {
                machine.scope.note(&[], What::Masked { by });
                Step::Masked(by)
            }
        };
        machine.settle(step);
        machine
    }

    /// Takes in what happened. `now` never goes back from one event to the next.
    pub fn handle(&mut self, event: Event, now: Micros) {
        if self.ended {
            return;
        }
        self.scope.now = now;
        match &event {
            Event::ClientGone => return self.stop(Abort::ClientGone),
            Event::Timer(Timer::Deadline) => return self.stop(Abort::Deadline),
            Event::Timer(Timer::Backoff { .. } | Timer::Hedge { .. })
            | Event::RetryDenied { .. }
            | Event::HedgeDenied { .. } => {}
            Event::Started { call } | Event::Delta { call } | Event::Early { call, .. }
                if !self.scope.is_running(*call) =>
            {
                return;
            }
            Event::Started { .. } | Event::Delta { .. } | Event::Early { .. } => {}
            Event::Done { call, .. } | Event::Failed { call, .. } if !self.scope.is_running(*call) => return,
            Event::Done { call, answer } => {
                self.scope.settle(*call, answer.cost);
                self.scope.expect(&answer.facts.waits);
            }
            Event::Failed { call, kind, cost, down, .. } => {
                self.scope.settle(*call, *cost);
                self.scope.down.clone_from(down);
                self.fallback.failed(&self.scope.models()[*call as usize], *kind);
            }
        }
        let running = self.instead.as_mut().unwrap_or(&mut self.plan);
        let step = running.handle(&event, &mut self.scope);
        self.settle(step);
    }

    /// The next thing to do, if there is one now.
    pub fn poll(&mut self) -> Option<Command> {
        self.scope.pop()
    }

    /// Why nothing was left to fall back to, where a failover graph says so.
    pub fn no_path(&self) -> Option<&failover::NoPath> {
        self.fallback.no_path()
    }

    /// Whether the last command has been given (it may still have to be polled).
    pub fn ended(&self) -> bool {
        self.ended
    }

    fn settle(&mut self, step: Step) {
        match step {
            Step::Running => {}
            Step::Succeeded(got) => self.answer(got),
            Step::Failed { call, kind } => self.fall_back(call, kind),
            Step::Masked(by) => match self.plan.best().filter(|_| !self.scope.forwarded) {
                Some(best) => self.answer_with(best, BestBecause::Masked { by }),
                None => self.end(Command::Fail { kind: by.error(), call: None }),
            },
        }
    }

    fn fall_back(&mut self, call: u32, kind: ErrorKind) {
        if self.scope.forwarded {
            return self.end(Command::Fail { kind, call: Some(call) });
        }
        let mut late = false;
        if self.answers(kind) {
            let (next, masked) = self.fallback.next(kind, &mut self.scope);
            late = masked == Some(Mask::Deadline);
            if let Some(spec) = next {
                let mut instead = Node::of(&Plan::Call(spec), Position::root());
                let step = instead.start(AttemptReason::Fallback, &mut self.scope);
                self.instead = Some(instead);
                return self.settle(step);
            }
        }
        match self.plan.best() {
            Some(best) => self.answer_with(best, BestBecause::Failed { error: kind }),
            // It was the deadline that left no time for another call.
            None if late => self.end(Command::Fail { kind: ErrorKind::Timeout, call: Some(call) }),
            None => self.end(Command::Fail { kind, call: Some(call) }),
        }
    }

    /// Whether the fallback answers errors of this kind. A model that is left alone was not even asked.
    fn answers(&self, kind: ErrorKind) -> bool {
        kind == ErrorKind::BreakerOpen || self.fallback_on.contains(&kind)
    }

    fn stop(&mut self, by: Abort) {
        let running = self.instead.as_mut().unwrap_or(&mut self.plan);
        let call = running.cancel(&mut self.scope);
        if !self.bare {
            self.scope.note(&[], What::Stopped { by });
        }
        let kind = match by {
            Abort::ClientGone => ErrorKind::Cancelled,
            Abort::Deadline => match self.plan.best().filter(|_| !self.scope.forwarded) {
                Some(best) => return self.answer_with(best, BestBecause::Stopped { by }),
                None => ErrorKind::Timeout,
            },
        };
        self.end(Command::Fail { kind, call });
    }

    fn answer_with(&mut self, best: Got, because: BestBecause) {
        self.scope.note(&[], What::BestSoFar { call: best.call, because });
        self.answer(best);
    }

    fn answer(&mut self, got: Got) {
        if !got.live {
            self.scope.push(Command::Emit { call: got.call });
        }
        self.end(Command::Finish { call: got.call });
    }

    fn end(&mut self, last: Command) {
        self.scope.push(last);
        self.ended = true;
    }
}
