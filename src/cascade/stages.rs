//! Cascades: stages in order, until one accepts its answer (FrugalGPT: Chen, Zaharia, Zou, "FrugalGPT: How to Use Large
//! Language Models While Reducing Cost and Improving Performance", arXiv 2305.05176, section 3, "LLM cascade").
//!
//! A stage whose answer is not accepted escalates, one that fails is rerouted; both go to the next stage that fits into
//! what is left of the request's bounds; a failure is not followed by a stage whose models cannot be called. Each stage is
//! called with the client's request alone: a failed chain shown to the stronger model makes it worse.

use crate::domain::{
    AttemptReason, BestBecause, Condition, ErrorKind, IfUnscored, Mask, Reading, Score, Scored, Stage, What,
};

use super::{
    Event,
    node::{Got, Node, Position, Step},
    scope::{Room, Scope},
};

/// A cascade and where it stands.
#[derive(Debug)]
pub(super) struct CascadeNode {
    position: Position,
    stages: Vec<Running>,
    current: usize,
}

#[derive(Debug)]
struct Running {
    node: Node,
    accept_when: Vec<Condition>,
    stop_early: bool,
    /// Models that it begins with.
    first: Vec<String>,
    /// Models that could begin it.
    openings: Vec<String>,
}

/// Why a stage is entered.
#[derive(Clone, Copy, Debug)]
enum Cause {
    /// As the cascade's first.
    Start(AttemptReason),
    Rejected {
        call: u32,
    },
    Failed {
        call: u32,
        kind: ErrorKind,
    },
}

impl CascadeNode {
    pub(super) fn new(stages: &[Stage], position: Position) -> Self {
        let node = |(i, stage): (usize, &Stage)| {
            let gate = &stage.accept_when;
            let position = Position {
                place: position.child(i),
                live: position.live && gate.is_empty(),
                all_votes: position.all_votes || gate.iter().any(|c| c.score == Score::Disagreement),
            };
            Running {
                node: Node::of(&stage.plan, position),
                accept_when: gate.clone(),
                stop_early: stage.stop_early,
                first: stage.plan.beginning(),
                openings: stage.plan.openings(),
            }
        };
        let stages = stages.iter().enumerate().map(node).collect();
        Self { stages, current: 0, position }
    }

    /// The first stage that fits is what the cascade begins with.
    pub(super) fn fits(&self, scope: &Scope, room: &mut Room) -> Result<(), Mask> {
        let mut first = Err(Mask::Calls);
        for stage in &self.stages {
            first = stage.node.fits(scope, room);
            if first.is_ok() {
                break;
            }
        }
        first
    }

    pub(super) fn start(&mut self, why: AttemptReason, scope: &mut Scope) -> Step {
        self.enter(0, Cause::Start(why), scope)
    }

    pub(super) fn handle(&mut self, event: &Event, scope: &mut Scope) -> Step {
        let Some(stage) = self.stages.get_mut(self.current) else { return Step::Running };
        if let (Event::Early { call, readings }, Node::Call(node), true) = (event, &stage.node, stage.stop_early)
            && node.running() == Some(*call)
        {
            return self.look(*call, readings, scope);
        }
        let step = stage.node.handle(event, scope);
        self.settle(step, scope)
    }

    /// Stops the current stage's call where one of its conditions cannot hold any more and a later stage can begin.
    fn look(&mut self, call: u32, readings: &[Reading], scope: &mut Scope) -> Step {
        let Some(stage) = self.stages.get_mut(self.current) else { return Step::Running };
        let fails = stage.accept_when.iter().filter(|condition| condition.is_early()).find_map(|condition| {
            let reading = readings.iter().find(|reading| reading.score == condition.score)?;
            let Scored { value, exact } = reading.read.ok().filter(|scored| !condition.bound.holds(scored.value))?;
            Some(What::GateFails { call, condition: *condition, value, exact })
        });
        let Some(fails) = fails else { return Step::Running };
        let mut later = self.stages.iter().skip(self.current + 1);
        if !later.any(|stage| scope.in_time(&stage.first).is_ok() && stage.node.fits(scope, &mut scope.room()).is_ok())
        {
            return Step::Running;
        }
        scope.note(&self.position.child(self.current), fails);
        self.cancel(scope);
        self.enter(self.current + 1, Cause::Rejected { call }, scope)
    }

    fn settle(&mut self, step: Step, scope: &mut Scope) -> Step {
        match step {
            Step::Succeeded(got) => {
                if self.accepts(&got, scope) {
                    scope.note(&self.position.place, What::Accepted { stage: self.current as u32, call: got.call });
                    return Step::Succeeded(got);
                }
                self.enter(self.current + 1, Cause::Rejected { call: got.call }, scope)
            }
            Step::Failed { call, kind } => {
                // The client has seen a part of the answer, or weir is stopping: no stage can help.
                let first = match scope.forwarded || kind == ErrorKind::Cancelled {
                    true => self.stages.len(),
                    false => self.current + 1,
                };
                self.enter(first, Cause::Failed { call, kind }, scope)
            }
            step @ (Step::Running | Step::Masked(_)) => step,
        }
    }

    /// Begins the first stage from `first` on that fits; without one the cascade ends.
    fn enter(&mut self, first: usize, cause: Cause, scope: &mut Scope) -> Step {
        let from = self.current as u32;
        let mut mask = Mask::Calls;
        for i in first..self.stages.len() {
            // An answer that is there is better than one that comes too late; without one there is nothing to lose.
            let in_time = match cause {
                Cause::Rejected { .. } => scope.in_time(&self.stages[i].first),
                Cause::Start(_) | Cause::Failed { .. } => Ok(()),
            };
            if let Err(by) = in_time.and_then(|()| self.stages[i].node.fits(scope, &mut scope.room())) {
                scope.note(&self.position.child(i), What::Masked { by });
                mask = by;
                continue;
            }
            // Of an answer that is there, the next stage's failure takes nothing away.
            let is_down = |model: &String| scope.is_down(model);
            if matches!(cause, Cause::Failed { .. }) && self.stages[i].openings.iter().all(is_down) {
                scope.note(&self.position.child(i), What::Down);
                continue;
            }
            let to = i as u32;
            let why = match cause {
                Cause::Start(why) => why,
                Cause::Rejected { call } => {
                    scope.note(&self.position.place, What::Escalated { from, to, call });
                    AttemptReason::Escalation
                }
                Cause::Failed { call, kind } => {
                    scope.note(&self.position.place, What::Rerouted { from, to, error: kind, call });
                    AttemptReason::Fallback
                }
            };
            self.current = i;
            let step = self.stages[i].node.start(why, scope);
            return self.settle(step, scope);
        }
        match cause {
            Cause::Start(_) => Step::Masked(mask),
            Cause::Failed { call, kind } => {
                scope.note(&self.position.place, What::StagesFailed { stage: from, error: kind, call });
                Step::Failed { call, kind }
            }
            Cause::Rejected { .. } => match self.best() {
                Some(best) => {
                    let because = BestBecause::Masked { by: mask };
                    scope.note(&self.position.place, What::BestSoFar { call: best.call, because });
                    Step::Succeeded(best)
                }
                None => Step::Masked(mask),
            },
        }
    }

    /// Whether all conditions of the current stage hold. Each is noted, also after one that does not.
    fn accepts(&self, got: &Got, scope: &mut Scope) -> bool {
        let Some(stage) = self.stages.get(self.current) else { return false };
        let place = self.position.child(self.current);
        let mut all = true;
        for &condition in &stage.accept_when {
            let call = got.call;
            let what = match got.score(condition.score) {
                Ok(Scored { value, exact }) if condition.bound.holds(value) => {
                    What::GateHolds { call, condition, value, exact }
                }
                Ok(Scored { value, exact }) => What::GateFails { call, condition, value, exact },
                Err(why) => What::GateUnscored { call, condition, why },
            };
            all &= match what {
                What::GateHolds { .. } => true,
                What::GateUnscored { .. } => condition.if_unscored == IfUnscored::Accept,
                _ => false,
            };
            scope.note(&place, what);
        }
        all
    }

    pub(super) fn cancel(&mut self, scope: &mut Scope) -> Option<u32> {
        self.stages.get_mut(self.current)?.node.cancel(scope)
    }

    pub(super) fn best(&self) -> Option<Got> {
        self.stages.iter().rev().find_map(|stage| stage.node.best())
    }
}
