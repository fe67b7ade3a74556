//! The nodes of a running plan. Each is asked whether it fits into what is left of the request's bounds, is started once,
//! is told of events, and ends by succeeding or failing; what they share is the [`Scope`]. A file per kind of node.

use std::sync::Arc;

use crate::domain::{AttemptReason, ErrorKind, Mask, Place, Plan, Score, Scored, Unscored};

use super::{
    Answered, Event, Input,
    call::CallNode,
    parallel::ParallelNode,
    scope::{Room, Scope},
    stages::CascadeNode,
    steps::StepsNode,
    verified::VerifiedNode,
};

/// The answer of a node.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Got {
    /// The call that gave it.
    pub(super) call: u32,
    pub(super) answer: Arc<Answered>,
    /// Whether the call's stream may go to the client as it comes; else the answer has been held back.
    pub(super) live: bool,
    /// How far the branches that it was chosen from disagreed, 0 to 1; absent where it was chosen from none.
    pub(super) disagreement: Option<f64>,
    /// Which share of the calls that were asked says that it is right, 0 to 1; absent where none was.
    pub(super) verified: Option<f64>,
}

impl Got {
    pub(super) fn score(&self, score: Score) -> Result<Scored, Unscored> {
        let known = |value: Option<f64>, else_why| value.map(|value| Scored { value, exact: true }).ok_or(else_why);
        match score {
            Score::Disagreement => known(self.disagreement, Unscored::NoVote),
            Score::Verified => known(self.verified, Unscored::NoVerdict),
            _ => self.answer.facts.score(score),
        }
    }
}

/// What became of a node through an event.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Running,
    Succeeded(Got),
    Failed {
        call: u32,
        kind: ErrorKind,
    },
    /// Nothing of it could be begun.
    Masked(Mask),
}

/// What a node is told of its surroundings.
#[derive(Clone, Debug)]
pub(super) struct Position {
    pub(super) place: Place,
    /// Nothing after the node can change its answer.
    pub(super) live: bool,
    /// Its gate asks how far branches disagree, so that a vote waits for all of them.
    pub(super) all_votes: bool,
}

impl Position {
    pub(super) fn root() -> Self {
        Self { place: Place::new(), live: true, all_votes: false }
    }

    /// The place of the child with this index.
    pub(super) fn child(&self, index: usize) -> Place {
        let mut place = self.place.clone();
        place.push(index as u32);
        place
    }
}

/// A node of a running plan.
#[derive(Debug)]
pub(super) enum Node {
    Call(Box<CallNode>),
    Cascade(CascadeNode),
    Parallel(Box<ParallelNode>),
    Steps(Box<StepsNode>),
    Verified(Box<VerifiedNode>),
}

impl Node {
    /// The node for a plan, not started.
    pub(super) fn of(plan: &Plan, position: Position) -> Self {
        match plan {
            Plan::Call(spec) => Node::Call(Box::new(CallNode::new(spec.clone(), Input::Request, position))),
            Plan::Hedged { call, hedge, after_ms } => {
                Node::Call(Box::new(CallNode::hedged(call.clone(), hedge.clone(), *after_ms, position)))
            }
            Plan::Cascade(stages) => Node::Cascade(CascadeNode::new(stages, position)),
            Plan::Parallel { branches, aggregate } => {
                Node::Parallel(Box::new(ParallelNode::new(branches, aggregate.clone(), position)))
            }
            Plan::Steps(steps) => Node::Steps(Box::new(StepsNode::new((**steps).clone(), position))),
            Plan::Verified(spec) => Node::Verified(Box::new(VerifiedNode::new((**spec).clone(), position))),
        }
    }

    /// Takes what the node begins with from `room`; where that is not possible, leaves `room` as it was. A node that fits
    /// into [`Scope::room`] can be started.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        let mut left = *room;
        match self {
            Node::Call(node) => node.fits(scope, &mut left),
            Node::Cascade(node) => node.fits(scope, &mut left),
            Node::Parallel(node) => node.fits(scope, &mut left),
            Node::Steps(node) => node.fits(scope, &mut left),
            Node::Verified(node) => node.fits(scope, &mut left),
        }?;
        *room = left;
        Ok(())
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        match self {
            Node::Call(node) => node.start(why, scope),
            Node::Cascade(node) => node.start(why, scope),
            Node::Parallel(node) => node.start(why, scope),
            Node::Steps(node) => node.start(why, scope),
            Node::Verified(node) => node.start(why, scope),
        }
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        match self {
            Node::Call(node) => node.handle(event, scope),
            Node::Cascade(node) => node.handle(event, scope),
            Node::Parallel(node) => node.handle(event, scope),
            Node::Steps(node) => node.handle(event, scope),
            Node::Verified(node) => node.handle(event, scope),
        }
    }

    /// Ends the node; the first call of it that was running or had failed last.
    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        match self {
            Node::Call(node) => node.cancel(scope),
            Node::Cascade(node) => node.cancel(scope),
            Node::Parallel(node) => node.cancel(scope),
            Node::Steps(node) => node.cancel(scope),
            Node::Verified(node) => node.cancel(scope),
        }
    }

    /// The best complete answer so far, of a node in any state: what it chose itself before what it was choosing from, a
    /// later stage before an earlier one, the vote of the branches that have answered before the first branch that has
    /// something.
    pub(super) fn best(&self) -> Option<Got> {
        match self {
            Node::Call(node) => node.best(),
            Node::Cascade(node) => node.best(),
            Node::Parallel(node) => node.best(),
            Node::Steps(node) => node.best(),
            Node::Verified(node) => node.best(),
        }
    }
}
