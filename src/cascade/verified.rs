//! A verified answer: the plan that gives it, then calls that are asked whether it is right (AutoMix: Aggarwal et al.,
//! "AutoMix: Automatically Mixing Language Models", arXiv 2310.12963, section 3, "self-verification").
//!
//! They all go out at once. One that fails says nothing, one that does not fit is not made, and with none of them the answer
//! has no such score: verifying never costs an answer that is there.

use crate::domain::{AttemptReason, ErrorKind, Mask, Verified, What};

use super::{
    Event, Input,
    call::CallNode,
    node::{Got, Node, Position, Step},
    scope::{Room, Scope},
};

/// A plan, the calls that verify its answer, and where both stand.
#[derive(Debug)]
pub(super) struct VerifiedNode {
    position: Position,
    plan: Node,
    spec: Verified,
    why: AttemptReason,
    /// The plan's answer, once it is there.
    got: Option<Got>,
    asked: Vec<CallNode>,
    count: Count,
}

/// What the verifying calls say.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    right: u32,
    wrong: u32,
    unclear: u32,
}

impl VerifiedNode {
    pub(super) fn new(spec: Verified, position: Position) -> Self {
        let inner = Position { place: position.child(Verified::PLAN as usize), live: false, ..position.clone() };
        let plan = Node::of(&spec.plan, inner);
        Self {
            position,
            plan,
            spec,
            why: AttemptReason::Planned,
            got: None,
            asked: Vec::new(),
            count: Count::default(),
        }
    }

    /// The verifying calls are not counted: the answer can do without.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        self.plan.fits(scope, room)
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        self.why = why;
        let step = self.plan.start(why, scope);
        self.settle(step, scope)
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        if self.got.is_none() {
            let step = self.plan.handle(event, scope);
            return self.settle(step, scope);
        }
        for i in 0..self.asked.len() {
            match self.asked[i].handle(event, scope) {
                Step::Running => {}
                step => {
                    self.asked.remove(i);
                    return self.heard(step, scope);
                }
            }
        }
        Step::Running
    }

    /// Goes on to verifying where the plan has answered.
    fn settle(&mut self, step: Step, scope: &mut Scope) -> Step {
        let Step::Succeeded(got) = step else { return step };
        let (call, place) = (got.call, self.position.child(Verified::BY as usize));
        self.got = Some(got);
        for _ in 0..self.spec.times {
            if let Err(by) = scope.admits(&self.spec.by) {
                scope.note(&self.position.place, What::VerifierMasked { call, by });
                break;
            }
            let position = Position { place: place.clone(), live: false, all_votes: false };
            let mut node = CallNode::new(self.spec.by.clone(), Input::Verify(call), position);
            node.start(self.why, scope);
            self.asked.push(node);
        }
        self.conclude(scope)
    }

    /// Takes in what a verifying call came to.
    fn heard(&mut self, step: Step, scope: &mut Scope) -> Step {
        let answer = self.got.as_ref().map_or(0, |got| got.call);
        match step {
            Step::Succeeded(said) => match said.answer.facts.verdict {
                Some(0) => self.count.wrong += 1,
                Some(_) => self.count.right += 1,
                None => self.count.unclear += 1,
            },
            // weir is stopping.
            Step::Failed { call, kind: ErrorKind::Cancelled } => {
                self.cancel(scope);
                return Step::Failed { call, kind: ErrorKind::Cancelled };
            }
            Step::Failed { call: verifier, kind: error } => {
                scope.note(&self.position.place, What::VerifierFailed { call: answer, verifier, error });
            }
            Step::Masked(by) => scope.note(&self.position.place, What::VerifierMasked { call: answer, by }),
            Step::Running => return step,
        }
        self.conclude(scope)
    }

    /// The answer with its score, when no verifying call is left.
    fn conclude(&mut self, scope: &mut Scope) -> Step {
        let Some(got) = self.got.as_mut().filter(|_| self.asked.is_empty()) else { return Step::Running };
        let Count { right, wrong, unclear } = self.count;
        if right + wrong + unclear > 0 {
            scope.note(&self.position.place, What::Verified { call: got.call, right, wrong, unclear });
        }
        got.verified = (right + wrong > 0).then(|| f64::from(right) / f64::from(right + wrong));
        Step::Succeeded(got.clone())
    }

    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        if self.got.is_none() {
            return self.plan.cancel(scope);
        }
        let mut first = None;
        for node in &mut self.asked {
            let call = node.cancel(scope);
            first = first.or(call);
        }
        self.asked.clear();
        first
    }

    pub(super) fn best(&self) -> Option<Got> {
        self.got.clone().or_else(|| self.plan.best())
    }
}
