//! Plans: what may be run for a request. Policies choose among them; the cascade machine runs them.
//!
//! A plan is a tree whose leaves are calls. This file owns its shape and what can be said of it before anything runs: the
//! models that it reaches, how many calls it makes at most, what it costs at most, and whether it makes sense.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{CallSpec, Condition, MicroUsd, Score, Steps};

/// What may be run for a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    /// One call of one model.
    Call(CallSpec),
    /// The same, and a second call beside it where it has not begun to answer after so many milliseconds: the one that begins
    /// first is the node's, the other is cancelled (Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013, "hedged requests").
    Hedged { call: CallSpec, hedge: CallSpec, after_ms: u32 },
    /// Stages in order, until one accepts its answer.
    Cascade(Vec<Stage>),
    /// Branches at the same time, and one answer made of theirs.
    Parallel { branches: Vec<Plan>, aggregate: Aggregate },
    /// Reasoning steps by two models, then an answer.
    Steps(Box<Steps>),
    /// An answer, and calls that are asked whether it is right.
    Verified(Box<Verified>),
}

/// A plan whose answer is verified: `by` is shown the request and the answer, `times` over at the same time, and says whether
/// it is right. How many say so is the answer's [`Score::Verified`] (AutoMix: Aggarwal et al., "AutoMix: Automatically Mixing
/// Language Models", arXiv 2310.12963, section 3, "self-verification", where the model that answers verifies, 8 times).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    pub plan: Plan,
    pub by: CallSpec,
    pub times: u32,
}

impl Verified {
    /// Places of the children.
    pub const PLAN: u32 = 0;
    pub const BY: u32 = 1;
}

/// One stage of a cascade: `{call: …, accept_when: […]}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    #[serde(flatten)]
    pub plan: Plan,
    /// All hold, or the cascade escalates. A stage without conditions accepts always, as the last one has to; the stages
    /// after it are for its failures.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accept_when: Vec<Condition>,
    /// A call that streams is stopped as soon as a condition cannot hold any more and a later stage can begin. Its answer is
    /// gone then: where the later stages fail, it is not there to fall back to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stop_early: bool,
}

/// How the branches of a parallel plan become one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// The branch that is complete first; the others are cancelled.
    First,
    /// The answer that most branches give, compared by canonical form.
    Vote,
    /// Likewise, with a weight per branch in the branches' order. Weights are used as they are; the logarithm of the odds
    /// of being right is optimal for independent voters (Nitzan and Paroush, "Optimal decision rules in uncertain
    /// dichotomous choice situations", International Economic Review 23(2), 1982).
    WeightedVote { weights: Vec<f64> },
    /// One more call is shown the branches' answers and names the best.
    Judge { call: CallSpec },
    /// One more call is shown the branches' answers and writes its own.
    Refine { call: CallSpec },
}

impl Aggregate {
    /// How many of `branches` have to answer: a vote needs more than half of them, the others one.
    pub fn quorum(&self, branches: usize) -> usize {
        match self {
            Aggregate::Vote | Aggregate::WeightedVote { .. } => branches / 2 + 1,
            Aggregate::First | Aggregate::Judge { .. } | Aggregate::Refine { .. } => 1,
        }
    }

    /// The call that follows the branches, where one does.
    pub fn call(&self) -> Option<&CallSpec> {
        match self {
            Aggregate::Judge { call } | Aggregate::Refine { call } => Some(call),
            Aggregate::First | Aggregate::Vote | Aggregate::WeightedVote { .. } => None,
        }
    }
}

/// What makes a plan none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("a cascade needs at least one stage")]
    NoStages,
    #[error("a parallel plan needs at least one branch")]
    NoBranches,
    #[error("the last stage of a cascade accepts always and can have no `accept_when`")]
    LastStageGated,
    #[error(
        "the thresholds, quantiles and weights of a plan are finite numbers, quantiles from 0 to 1, weights not negative"
    )]
    Number,
    #[error("a weighted vote has one weight for each branch")]
    Weights,
    #[error("reasoning has at least one step, and its separator and its end are texts that are not empty")]
    Steps,
    #[error("an answer is verified at least once")]
    Times,
}

impl Plan {
    /// Every call that the plan can make, in order of mention.
    pub fn calls(&self) -> Vec<&CallSpec> {
        let mut calls = Vec::new();
        self.gather(&mut calls);
        calls
    }

    fn gather<'a>(&'a self, calls: &mut Vec<&'a CallSpec>) {
        match self {
            Plan::Call(call) => calls.push(call),
            Plan::Hedged { call, hedge, .. } => calls.extend([call, hedge]),
            Plan::Cascade(stages) => stages.iter().for_each(|stage| stage.plan.gather(calls)),
            Plan::Parallel { branches, aggregate } => {
                branches.iter().for_each(|branch| branch.gather(calls));
                calls.extend(aggregate.call());
            }
            Plan::Steps(steps) => calls.extend(steps.calls()),
            Plan::Verified(verified) => {
                verified.plan.gather(calls);
                calls.push(&verified.by);
            }
        }
    }

    /// The same calls in the same order, to be changed.
    pub fn calls_mut(&mut self) -> Vec<&mut CallSpec> {
        let mut calls = Vec::new();
        self.gather_mut(&mut calls);
        calls
    }

    fn gather_mut<'a>(&'a mut self, calls: &mut Vec<&'a mut CallSpec>) {
        match self {
            Plan::Call(call) => calls.push(call),
            Plan::Hedged { call, hedge, .. } => calls.extend([call, hedge]),
            Plan::Cascade(stages) => stages.iter_mut().for_each(|stage| stage.plan.gather_mut(calls)),
            Plan::Parallel { branches, aggregate } => {
                branches.iter_mut().for_each(|branch| branch.gather_mut(calls));
                match aggregate {
                    Aggregate::Judge { call } | Aggregate::Refine { call } => calls.push(call),
                    Aggregate::First | Aggregate::Vote | Aggregate::WeightedVote { .. } => {}
                }
            }
            Plan::Steps(steps) => {
                let Steps { small, large, answer, .. } = &mut **steps;
                calls.extend([small, large, answer]);
            }
            Plan::Verified(verified) => {
                let Verified { plan, by, .. } = &mut **verified;
                plan.gather_mut(calls);
                calls.push(by);
            }
        }
    }

    /// Every condition on an answer, to be changed.
    pub fn conditions_mut(&mut self) -> Vec<&mut Condition> {
        let mut conditions = Vec::new();
        self.gather_conditions(&mut conditions);
        conditions
    }

    fn gather_conditions<'a>(&'a mut self, conditions: &mut Vec<&'a mut Condition>) {
        match self {
            Plan::Call(_) | Plan::Hedged { .. } | Plan::Steps(_) => {}
            Plan::Cascade(stages) => {
                for Stage { plan, accept_when, .. } in stages {
                    plan.gather_conditions(conditions);
                    conditions.extend(accept_when);
                }
            }
            Plan::Parallel { branches, .. } => {
                branches.iter_mut().for_each(|branch| branch.gather_conditions(conditions));
            }
            Plan::Verified(verified) => verified.plan.gather_conditions(conditions),
        }
    }

    /// Models whose calls the plan begins with.
    pub fn beginning(&self) -> Vec<String> {
        match self {
            Plan::Call(call) | Plan::Hedged { call, .. } => vec![call.model.clone()],
            Plan::Cascade(stages) => stages.first().map(|stage| stage.plan.beginning()).unwrap_or_default(),
            Plan::Parallel { branches, .. } => branches.iter().flat_map(Plan::beginning).collect(),
            Plan::Steps(steps) => vec![steps.small.model.clone()],
            Plan::Verified(verified) => verified.plan.beginning(),
        }
    }

    /// Models of which a call could begin the plan: also those that stand in for one that fails.
    pub fn openings(&self) -> Vec<String> {
        match self {
            Plan::Cascade(stages) => stages.iter().flat_map(|stage| stage.plan.openings()).collect(),
            Plan::Parallel { branches, .. } => branches.iter().flat_map(Plan::openings).collect(),
            Plan::Steps(steps) => vec![steps.small.model.clone(), steps.large.model.clone()],
            Plan::Verified(verified) => verified.plan.openings(),
            Plan::Call(_) | Plan::Hedged { .. } => self.beginning(),
        }
    }

    /// Every model that the plan can reach, in order of first mention.
    pub fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = Vec::new();
        for call in self.calls() {
            if !models.contains(&call.model.as_str()) {
                models.push(&call.model);
            }
        }
        models
    }

    /// The scores that may be asked of the answer of the call at `at`: by the gates above it, and of the beginning of a
    /// reasoning step. A judge's answer and a verifying one are never the plan's and are asked for none.
    pub fn scores_at(&self, at: &[u32]) -> Vec<Score> {
        let mut scores = Vec::new();
        let (mut plan, mut rest) = (self, at);
        while let Some((&child, below)) = rest.split_first() {
            let next = match plan {
                Plan::Call(_) | Plan::Hedged { .. } => None,
                Plan::Cascade(stages) => stages.get(child as usize).map(|stage| {
                    scores.extend(stage.accept_when.iter().map(|condition| condition.score));
                    &stage.plan
                }),
                Plan::Parallel { branches, aggregate } => {
                    let branch = branches.get(child as usize);
                    if branch.is_none() && matches!(aggregate, Aggregate::Judge { .. }) {
                        return Vec::new();
                    }
                    branch
                }
                Plan::Steps(_) => match child {
                    Steps::SMALL => return vec![Steps::SCORE],
                    Steps::LARGE => return Vec::new(),
                    _ => None,
                },
                Plan::Verified(_) if child == Verified::BY => return Vec::new(),
                Plan::Verified(verified) => Some(&verified.plan),
            };
            let Some(next) = next else { break };
            (plan, rest) = (next, below);
        }
        scores
    }

    /// The scores of the call at `at` that are looked at while its answer comes.
    pub fn watched_at(&self, at: &[u32]) -> Vec<Score> {
        let (mut plan, mut rest) = (self, at);
        while let Some((&child, below)) = rest.split_first() {
            let next = match plan {
                Plan::Call(_) | Plan::Hedged { .. } => return Vec::new(),
                Plan::Cascade(stages) => match stages.get(child as usize) {
                    Some(stage) if stage.stop_early && below.is_empty() => {
                        let early = stage.accept_when.iter().filter(|condition| condition.is_early());
                        return early.map(|condition| condition.score).collect();
                    }
                    stage => stage.map(|stage| &stage.plan),
                },
                Plan::Parallel { branches, .. } => branches.get(child as usize),
                Plan::Steps(_) if child == Steps::SMALL => return vec![Steps::SCORE],
                Plan::Steps(_) => return Vec::new(),
                Plan::Verified(verified) => (child == Verified::PLAN).then_some(&verified.plan),
            };
            let Some(next) = next else { break };
            (plan, rest) = (next, below);
        }
        Vec::new()
    }

    /// The reasoning steps that the call at `at` is of.
    pub fn steps_at(&self, at: &[u32]) -> Option<&Steps> {
        let (&child, rest) = at.split_first()?;
        match self {
            Plan::Call(_) | Plan::Hedged { .. } => None,
            Plan::Cascade(stages) => stages.get(child as usize)?.plan.steps_at(rest),
            Plan::Parallel { branches, .. } => branches.get(child as usize)?.steps_at(rest),
            Plan::Steps(steps) => Some(steps),
            Plan::Verified(verified) => verified.plan.steps_at(rest),
        }
    }

    /// Each call, in the order of [`Plan::calls`], and how often one run makes it at most, retries aside.
    pub fn calls_with_times(&self) -> Vec<(&CallSpec, u32)> {
        match self {
            Plan::Call(call) => vec![(call, 1)],
            Plan::Hedged { call, hedge, .. } => vec![(call, 1), (hedge, 1)],
            Plan::Cascade(stages) => stages.iter().flat_map(|stage| stage.plan.calls_with_times()).collect(),
            Plan::Parallel { branches, aggregate } => {
                let calls = branches.iter().flat_map(Plan::calls_with_times);
                calls.chain(aggregate.call().map(|call| (call, 1))).collect()
            }
            Plan::Steps(steps) => steps.times().to_vec(),
            Plan::Verified(verified) => {
                let mut calls = verified.plan.calls_with_times();
                calls.push((&verified.by, verified.times));
                calls
            }
        }
    }

    /// The most calls that one run makes, retries and the request's fallback aside.
    pub fn most_calls(&self) -> u32 {
        self.calls_with_times().into_iter().fold(0, |sum, (_, times)| sum.saturating_add(times))
    }

    /// The most that one run costs, retries and the request's fallback aside: the sum of what `worst` says of each call.
    /// For a judge or a refining call `worst` has to count the branches' answers, which are a part of its prompt, for a
    /// verifying one the answer, and for one of reasoning steps the steps.
    pub fn worst_cost(&self, worst: &dyn Fn(&CallSpec) -> MicroUsd) -> MicroUsd {
        let cost = |(call, times): (&CallSpec, u32)| worst(call).saturating_mul(MicroUsd::from(times));
        self.calls_with_times().into_iter().map(cost).fold(0, MicroUsd::saturating_add)
    }

    /// Whether the plan makes sense.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn check(&self) -> Result<(), PlanError> {
        match self {
            Plan::Call(_) | Plan::Hedged { .. } => Ok(()),
            Plan::Cascade(stages) => {
                let (last, gated) = stages.split_last().ok_or(PlanError::NoStages)?;
                if !last.accept_when.is_empty() {
                    return Err(PlanError::LastStageGated);
                }
                if !gated.iter().flat_map(|stage| &stage.accept_when).all(sensible) {
                    return Err(PlanError::Number);
                }
                stages.iter().try_for_each(|stage| stage.plan.check())
            }
            Plan::Parallel { branches, aggregate } => {
                if branches.is_empty() {
                    return Err(PlanError::NoBranches);
                }
                if let Aggregate::WeightedVote { weights } = aggregate {
                    if weights.len() != branches.len() {
                        return Err(PlanError::Weights);
                    }
                    if !weights.iter().all(|w| w.is_finite() && *w >= 0.0) {
                        return Err(PlanError::Number);
                    }
                }
                branches.iter().try_for_each(Plan::check)
            }
            Plan::Steps(steps) if !steps.tau.is_finite() => Err(PlanError::Number),
            Plan::Steps(steps) if steps.max_steps == 0 || steps.separator.is_empty() || steps.close.is_empty() => {
                Err(PlanError::Steps)
            }
            Plan::Steps(_) => Ok(()),
            Plan::Verified(verified) if verified.times == 0 => Err(PlanError::Times),
            Plan::Verified(verified) => verified.plan.check(),
        }
    }
}

fn sensible(condition: &Condition) -> bool {
    let quantile = match condition.score {
        Score::LogprobQuantile(q) => (0.0..=1.0).contains(&q),
        _ => true,
    };
    quantile && condition.bound.threshold().is_finite()
}

/// One line for people: `cascade(small if mean_token_entropy < 0.9, else large)`.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Plan::Call(call) => f.write_str(&call.model),
            Plan::Hedged { call, hedge, after_ms } => {
                write!(f, "{} hedged by {} after {after_ms} ms", call.model, hedge.model)
            }
            Plan::Cascade(stages) => {
                f.write_str("cascade(")?;
                for (i, stage) in stages.iter().enumerate() {
                    f.write_str(if i == 0 { "" } else { ", else " })?;
                    write!(f, "{}", stage.plan)?;
                    for (n, condition) in stage.accept_when.iter().enumerate() {
                        write!(f, " {} {condition}", if n == 0 { "if" } else { "and" })?;
                    }
                }
                f.write_str(")")
            }
            Plan::Parallel { branches, aggregate } => {
                f.write_str(match aggregate {
                    Aggregate::First => "first(",
                    Aggregate::Vote => "vote(",
                    Aggregate::WeightedVote { .. } => "weighted_vote(",
                    Aggregate::Judge { .. } => "judge(",
                    Aggregate::Refine { .. } => "refine(",
                })?;
                for (i, branch) in branches.iter().enumerate() {
                    write!(f, "{}{branch}", if i == 0 { "" } else { ", " })?;
                    if let Aggregate::WeightedVote { weights } = aggregate
                        && let Some(weight) = weights.get(i)
                    {
                        write!(f, " x {weight}")?;
                    }
                }
                match aggregate.call() {
                    Some(call) => write!(f, "; by {})", call.model),
                    None => f.write_str(")"),
                }
            }
            Plan::Steps(steps) => {
                let Steps { small, large, answer, tau, max_steps, .. } = &**steps;
                let (small, large) = (&small.model, &large.model);
                write!(f, "steps({small} if first_token_entropy < {tau}, else {large}; at most {max_steps}")?;
                write!(f, "; answered by {})", answer.model)
            }
            Plan::Verified(verified) => {
                write!(f, "{} verified {} x by {}", verified.plan, verified.times, verified.by.model)
            }
        }
    }
}
