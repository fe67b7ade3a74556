//! Reasoning steps by two models (GlimpRouter: "GlimpRouter", arXiv 2601.05110, whose published code this follows in its
//! order of calls, limits and ends): the small model begins each step, and the entropy of its first token decides whether
//! it goes on or the large model writes the step. The answer is written by a model that the plan names, from the whole of
//! the reasoning.
//!
//! Otherwise than there, glimpse and step are one call: the first token's entropy is that of the model's distribution
//! whatever is drawn from it, and a small model that is unsure is stopped at its first token. An answer that comes whole is
//! judged by the same number when it is there.
//!
//! Room for the answer is kept from the beginning, so that there is one whatever the steps, and others beside them, use up.

use crate::domain::{AttemptReason, CallSpec, Ends, ErrorKind, Mask, Scored, StepFacts, Steps, Unscored, What};

use super::{
    Event, Input,
    call::CallNode,
    node::{Got, Position, Step},
    scope::{Room, Scope},
};

/// A plan of steps and where it stands.
#[derive(Debug)]
pub(super) struct StepsNode {
    position: Position,
    plan: Steps,
    /// The calls that wrote the steps so far.
    written: Vec<u32>,
    tokens: u32,
    why: AttemptReason,
    state: State,
    /// Room for the answer is kept.
    held: bool,
}

#[derive(Debug)]
enum State {
    Idle,
    /// With the call whose first token has been looked at.
    Small(CallNode, Option<u32>),
    Large(CallNode),
    Answer(CallNode),
    Ended,
}

impl StepsNode {
    pub(super) fn new(plan: Steps, position: Position) -> Self {
        Self {
            position,
            plan,
            written: Vec::new(),
            tokens: 0,
            why: AttemptReason::Planned,
            state: State::Idle,
            held: false,
        }
    }

    /// The answer has to fit; steps do without.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        let mut both = *room;
        let answer = scope.worst(&self.plan.answer);
        if both.take(scope.worst(&self.plan.small)).and_then(|()| both.take(answer)).is_ok() {
            *room = both;
            return Ok(());
        }
        room.take(answer)
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        self.why = why;
        scope.hold(&self.plan.answer);
        self.held = true;
        self.begin(scope)
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        match &mut self.state {
            State::Idle | State::Ended => Step::Running,
            State::Answer(node) => node.handle(event, scope),
            State::Large(node) => {
                let step = node.handle(event, scope);
                self.wrote(step, true, scope)
            }
            State::Small(node, glimpsed) => {
                if let Event::Early { call, readings } = event {
                    let first = readings.iter().find(|reading| reading.score == Steps::SCORE);
                    return match first {
                        Some(first) if node.running() == Some(*call) && *glimpsed != Some(*call) => {
                            *glimpsed = Some(*call);
                            let read = first.read;
                            match self.is_sure(*call, read, scope) || !self.has_room_for_large(scope) {
                                true => Step::Running,
                                false => {
                                    self.stop(scope);
                                    self.ask_large(scope)
                                }
                            }
                        }
                        _ => Step::Running,
                    };
                }
                let glimpsed = *glimpsed;
                match node.handle(event, scope) {
                    Step::Succeeded(got) if glimpsed != Some(got.call) => {
                        let read = got.answer.facts.score(Steps::SCORE);
                        match self.is_sure(got.call, read, scope) || !self.has_room_for_large(scope) {
                            true => self.wrote(Step::Succeeded(got), false, scope),
                            false => self.ask_large(scope),
                        }
                    }
                    Step::Failed { call, kind } if kind != ErrorKind::Cancelled && self.has_room_for_large(scope) => {
                        let step = self.written.len() as u32;
                        scope.note(&self.position.place, What::StepFailed { step, error: kind, call });
                        self.ask_large(scope)
                    }
                    step => self.wrote(step, false, scope),
                }
            }
        }
    }

    /// Begins the next step, or the answer where there is none.
    fn begin(&mut self, scope: &mut Scope) -> Step {
        let ends = if self.written.len() as u32 >= self.plan.max_steps {
            Some(Ends::Steps)
        } else if self.tokens >= self.plan.max_tokens {
            Some(Ends::Tokens)
        } else {
            scope.admits(&self.plan.small).err().map(|by| Ends::Masked { by })
        };
        if let Some(ends) = ends {
            return self.answer(ends, scope);
        }
        let mut node = self.call(self.plan.small.clone(), Input::Step(self.written.clone()), Steps::SMALL);
        let step = node.start(self.why, scope);
        self.state = State::Small(node, None);
        step
    }

    /// Whether the small model goes on with the step that `call` has begun.
    fn is_sure(&mut self, call: u32, read: Result<Scored, Unscored>, scope: &mut Scope) -> bool {
        let step = self.written.len() as u32;
        let tau = self.plan.tau;
        let (what, sure) = match read {
            Ok(Scored { value, exact }) => {
                let sure = value < tau;
                (What::Glimpsed { step, call, value, tau, exact, sure }, sure)
            }
            Err(why) => (What::GlimpseUnscored { step, call, why }, false),
        };
        scope.note(&self.position.place, what);
        sure
    }

    fn has_room_for_large(&mut self, scope: &mut Scope) -> bool {
        let fits = scope.admits(&self.plan.large);
        if let Err(by) = fits {
            scope.note(&self.place(Steps::LARGE), What::Masked { by });
        }
        fits.is_ok()
    }

    fn ask_large(&mut self, scope: &mut Scope) -> Step {
        let mut node = self.call(self.plan.large.clone(), Input::Step(self.written.clone()), Steps::LARGE);
        let step = node.start(AttemptReason::Escalation, scope);
        self.state = State::Large(node);
        step
    }

    /// What follows from what the call did that writes the step.
    fn wrote(&mut self, step: Step, large: bool, scope: &mut Scope) -> Step {
        let got = match step {
            Step::Succeeded(got) => got,
            Step::Failed { .. } | Step::Masked(_) => {
                self.state = State::Ended;
                self.let_go(scope);
                return step;
            }
            Step::Running => return step,
        };
        let StepFacts { tokens, closes, repeats } = got.answer.facts.step.unwrap_or_default();
        let number = self.written.len() as u32;
        scope.note(&self.position.place, What::StepWritten { step: number, call: got.call, large, tokens });
        self.written.push(got.call);
        self.tokens = self.tokens.saturating_add(tokens);
        match (closes, repeats && self.written.len() > 2) {
            (true, _) => self.answer(Ends::Closed, scope),
            (false, true) => self.answer(Ends::Repeats, scope),
            (false, false) => self.begin(scope),
        }
    }

    fn answer(&mut self, because: Ends, scope: &mut Scope) -> Step {
        let (steps, tokens) = (self.written.len() as u32, self.tokens);
        scope.note(&self.position.place, What::Reasoned { steps, tokens, because });
        self.let_go(scope);
        if let Err(by) = scope.admits(&self.plan.answer) {
            scope.note(&self.place(Steps::ANSWER), What::Masked { by });
            self.state = State::Ended;
            return Step::Masked(by);
        }
        let mut node = self.call(self.plan.answer.clone(), Input::Reasoned(self.written.clone()), Steps::ANSWER);
        let step = node.start(self.why, scope);
        self.state = State::Answer(node);
        step
    }

    /// The room that was kept for the answer is anybody's.
    fn let_go(&mut self, scope: &mut Scope) {
        if std::mem::take(&mut self.held) {
            scope.release(&self.plan.answer);
        }
    }

    fn place(&self, child: u32) -> Vec<u32> {
        self.position.child(child as usize)
    }

    fn call(&self, spec: CallSpec, input: Input, child: u32) -> CallNode {
        let live = self.position.live && child == Steps::ANSWER;
        CallNode::new(spec, input, Position { place: self.place(child), live, all_votes: false })
    }

    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        self.let_go(scope);
        self.stop(scope)
    }

    fn stop(&mut self, scope: &mut Scope) -> Option<u32> {
        match &mut self.state {
            State::Small(node, _) | State::Large(node) | State::Answer(node) => node.cancel(scope),
            State::Idle | State::Ended => None,
        }
    }

    /// Steps are no answer.
    pub(super) fn best(&self) -> Option<Got> {
        match &self.state {
            State::Answer(node) => node.best(),
            State::Idle | State::Small(..) | State::Large(_) | State::Ended => None,
        }
    }
}
