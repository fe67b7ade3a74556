//! Parallel branches and the one answer made of theirs: the first, a vote (self-consistency, ACAR: see [`super::vote`]), a
//! judge's choice, or an answer refined from all.
//!
//! A branch that fails or does not fit is left out while a quorum remains ([`Aggregate::quorum`]). A vote ends as soon as
//! it is decided, unless a gate asks how far all branches disagree. Where a judge or a refinement cannot be had, the
//! branches' vote stands in for it.

use crate::domain::{Aggregate, AttemptReason, CallSpec, ErrorKind, Left, Mask, Plan, What};

use super::{
    Event, Input,
    call::CallNode,
    node::{Got, Node, Position, Step},
    scope::{Room, Scope},
    vote::{self, Ballot},
};

/// A parallel plan and where it stands.
#[derive(Debug)]
pub(super) struct ParallelNode {
    position: Position,
    branches: Vec<Branch>,
    aggregate: Aggregate,
    why: AttemptReason,
    /// The judge's or the refining call, once it is made.
    asked: Option<CallNode>,
    result: Option<Got>,
}

#[derive(Debug)]
struct Branch {
    node: Node,
    state: State,
}

#[derive(Debug)]
enum State {
    Idle,
    Running,
    Answered(Got),
    Out,
}

/// The branches' vote.
struct Poll {
    branch: usize,
    got: Got,
    answers: usize,
    count: vote::Count,
}

impl ParallelNode {
    pub(super) fn new(branches: &[Plan], aggregate: Aggregate, position: Position) -> Self {
        let branch = |(i, plan): (usize, &Plan)| {
            let position = Position { place: position.child(i), live: false, all_votes: false };
            Branch { node: Node::of(plan, position), state: State::Idle }
        };
        let branches = branches.iter().enumerate().map(branch).collect();
        Self { position, branches, aggregate, why: AttemptReason::Planned, asked: None, result: None }
    }

    /// As many branches as fit have to be a quorum. The aggregate's call is not counted: a vote can stand in for it.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        let mut fitting = 0;
        let mut mask = Mask::Calls;
        for branch in &self.branches {
            match branch.node.fits(scope, room) {
                Ok(()) => fitting += 1,
                Err(by) => mask = by,
            }
        }
        if fitting >= self.quorum() { Ok(()) } else { Err(mask) }
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        self.why = why;
        let mut last = Step::Masked(Mask::Calls);
        for i in 0..self.branches.len() {
            let branch = &mut self.branches[i];
            match branch.node.fits(scope, &mut scope.room()) {
                Ok(()) => {
                    branch.state = State::Running;
                    let step = branch.node.start(why, scope);
                    self.settle(i, step, scope);
                }
                Err(by) => {
                    branch.state = State::Out;
                    scope.note(
                        &self.position.place,
                        What::BranchLeftOut { branch: i as u32, left: Left::Masked { by } },
                    );
                    last = Step::Masked(by);
                }
            }
        }
        self.next(last, scope)
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        if let Some(asked) = &mut self.asked {
            let step = asked.handle(event, scope);
            return self.aggregated(step, scope);
        }
        for i in 0..self.branches.len() {
            let branch = &mut self.branches[i];
            if !matches!(branch.state, State::Running) {
                continue;
            }
            match branch.node.handle(event, scope) {
                Step::Running => {}
                step => {
                    let last = self.settle(i, step, scope);
                    return self.next(last, scope);
                }
            }
        }
        Step::Running
    }

    /// Takes in what a branch did; the step of a branch that is out, to be passed on where the quorum is lost with it.
    fn settle(&mut self, i: usize, step: Step, scope: &mut Scope) -> Step {
        let left = match step {
            Step::Running => return Step::Running,
            Step::Succeeded(got) => {
                self.branches[i].state = State::Answered(got);
                return Step::Running;
            }
            Step::Failed { call, kind } => Left::Failed { error: kind, call },
            Step::Masked(by) => Left::Masked { by },
        };
        self.branches[i].state = State::Out;
        scope.note(&self.position.place, What::BranchLeftOut { branch: i as u32, left });
        step
    }

    /// What follows from the branches as they stand. `last`: what the node ends with where the quorum is lost.
    fn next(&mut self, last: Step, scope: &mut Scope) -> Step {
        let running = self.branches.iter().filter(|b| matches!(b.state, State::Running)).count();
        let answered = self.branches.iter().filter(|b| matches!(b.state, State::Answered(_))).count();
        let (needed, could) = (self.quorum(), running + answered);
        if could < needed {
            self.drop_running(scope);
            if let Step::Failed { call, kind } = last {
                let (needed, could) = (needed as u32, could as u32);
                scope.note(&self.position.place, What::QuorumLost { needed, could, error: kind, call });
            }
            return last;
        }
        let complete = match self.aggregate {
            Aggregate::First => answered > 0,
            Aggregate::Vote | Aggregate::WeightedVote { .. } => running == 0 || self.decided(),
            Aggregate::Judge { .. } | Aggregate::Refine { .. } => running == 0,
        };
        match self.poll().filter(|_| complete) {
            Some(poll) => self.conclude(poll, running > 0, scope),
            None => Step::Running,
        }
    }

    /// Makes one answer of the branches', or begins to.
    fn conclude(&mut self, poll: Poll, early: bool, scope: &mut Scope) -> Step {
        self.drop_running(scope);
        let Poll { branch, answers, count, .. } = poll;
        let (branch, call, answers) = (branch as u32, poll.got.call, answers as u32);
        let place = &self.position.place;
        match &self.aggregate {
            Aggregate::First => scope.note(place, What::First { branch, call }),
            Aggregate::Vote | Aggregate::WeightedVote { .. } => {
                let (distinct, share, tie) = (count.distinct as u32, count.share, count.tie);
                scope.note(place, What::Voted { branch, call, answers, distinct, share, tie, early });
            }
            Aggregate::Judge { call: spec } if count.distinct > 1 => {
                let spec = spec.clone();
                return self.ask(spec, Input::Judge(self.answered()), false, poll, scope);
            }
            Aggregate::Refine { call: spec } if answers > 1 => {
                let spec = spec.clone();
                return self.ask(spec, Input::Refine(self.answered()), self.position.live, poll, scope);
            }
            Aggregate::Judge { .. } | Aggregate::Refine { .. } => {
                scope.note(place, What::Agreed { branch, call, answers });
            }
        }
        self.succeed(poll.got)
    }

    fn ask(&mut self, spec: CallSpec, input: Input, live: bool, poll: Poll, scope: &mut Scope) -> Step {
        if let Err(by) = scope.admits(&spec) {
            let (branch, call) = (poll.branch as u32, poll.got.call);
            scope.note(&self.position.place, What::AggregateMasked { branch, call, by });
            return self.succeed(poll.got);
        }
        let position = Position { place: self.position.child(self.branches.len()), live, all_votes: false };
        let mut asked = CallNode::new(spec, input, position);
        let step = asked.start(self.why, scope);
        self.asked = Some(asked);
        step
    }

    /// What follows from what the judge's or the refining call did.
    fn aggregated(&mut self, step: Step, scope: &mut Scope) -> Step {
        if step == Step::Running {
            return step;
        }
        let Some(poll) = self.poll() else { return step };
        let place = &self.position.place;
        let (branch, call) = (poll.branch as u32, poll.got.call);
        match step {
            Step::Failed { call, kind } if scope.forwarded || kind == ErrorKind::Cancelled => {
                return Step::Failed { call, kind };
            }
            Step::Failed { kind, .. } => scope.note(place, What::AggregateFailed { branch, call, error: kind }),
            Step::Masked(by) => scope.note(place, What::AggregateMasked { branch, call, by }),
            Step::Succeeded(got) if matches!(self.aggregate, Aggregate::Refine { .. }) => {
                scope.note(place, What::Refined { call: got.call, answers: poll.answers as u32 });
                return self.succeed(Got { disagreement: poll.got.disagreement, ..got });
            }
            Step::Succeeded(got) => {
                let judge = got.call;
                let shown = self.shown();
                let named = got.answer.facts.verdict.and_then(|n| shown.get(n as usize));
                if let Some(&(i, chosen)) = named {
                    scope.note(place, What::Judged { branch: i as u32, call: chosen.call, judge });
                    let chosen = Got { disagreement: poll.got.disagreement, ..chosen.clone() };
                    return self.succeed(chosen);
                }
                scope.note(place, What::JudgeUnclear { branch, call, judge });
            }
            Step::Running => return step,
        }
        self.succeed(poll.got)
    }

    fn succeed(&mut self, got: Got) -> Step {
        self.result = Some(got.clone());
        Step::Succeeded(got)
    }

    fn quorum(&self) -> usize {
        self.aggregate.quorum(self.branches.len())
    }

    /// The branches that have answered, with their answers.
    fn shown(&self) -> Vec<(usize, &Got)> {
        let mut shown = Vec::new();
        for (i, branch) in self.branches.iter().enumerate() {
            if let State::Answered(got) = &branch.state {
                shown.push((i, got));
            }
        }
        shown
    }

    fn answered(&self) -> Vec<u32> {
        self.shown().into_iter().map(|(_, got)| got.call).collect()
    }

    fn weight(&self, branch: usize) -> f64 {
        match &self.aggregate {
            Aggregate::WeightedVote { weights } => weights.get(branch).copied().unwrap_or(0.0),
            _ => 1.0,
        }
    }

    fn ballots(&self) -> (Vec<usize>, Vec<Ballot>) {
        let mut of = Vec::new();
        let mut ballots = Vec::new();
        for (i, branch) in self.branches.iter().enumerate() {
            if let State::Answered(got) = &branch.state {
                of.push(i);
                ballots.push(Ballot { form: got.answer.facts.form, weight: self.weight(i) });
            }
        }
        (of, ballots)
    }

    /// The vote of the branches that have answered, with how far they disagree.
    fn poll(&self) -> Option<Poll> {
        let (of, ballots) = self.ballots();
        let count = vote::count(&ballots)?;
        let branch = *of.get(count.winner)?;
        let State::Answered(got) = &self.branches[branch].state else { return None };
        let disagreement = vote::sigma(count.distinct, ballots.len());
        Some(Poll { branch, got: Got { disagreement, ..got.clone() }, answers: ballots.len(), count })
    }

    fn decided(&self) -> bool {
        let running = self.branches.iter().enumerate().filter(|(_, b)| matches!(b.state, State::Running));
        let outstanding = running.map(|(i, _)| self.weight(i)).sum();
        !self.position.all_votes && vote::decided(&self.ballots().1, outstanding)
    }

    /// Cancels the branches that are running; the first call that was.
    fn drop_running(&mut self, scope: &mut Scope) -> Option<u32> {
        let mut first = None;
        for branch in self.branches.iter_mut().filter(|b| matches!(b.state, State::Running)) {
            let call = branch.node.cancel(scope);
            branch.state = State::Out;
            first = first.or(call);
        }
        first
    }

    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        let first = self.drop_running(scope);
        first.or(self.asked.as_mut().and_then(|asked| asked.cancel(scope)))
    }

    pub(super) fn best(&self) -> Option<Got> {
        let chosen = self.result.clone().or_else(|| self.poll().map(|poll| poll.got));
        chosen.or_else(|| self.branches.iter().find_map(|branch| branch.node.best()))
    }
}
