//! What a running plan says about itself: each decision of the machine that no call shows, with a reason from a fixed
//! list. Notes are made by `cascade`, and carry what a record needs to tell the whole way of a request: which node, which
//! call, which number against which threshold.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Condition, ErrorKind, IfUnscored};

/// A node's place in its plan's tree: the child's index at each level, from 0; the root's is empty. The call of a judge or
/// of a refinement comes after the branches, those that verify an answer after its plan. Fallback, which belongs to the request, has the root's place.
pub type Place = Vec<u32>;

/// One decision of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// The node that decided.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub at: Place,
    #[serde(flatten)]
    pub what: What,
}

/// What was decided. The variant is the reason; the list is closed, so that it can be counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum What {
    /// A condition of a stage holds for the answer of `call`. `exact`: computed from whole distributions, not from the few
    /// likeliest tokens.
    GateHolds {
        call: u32,
        #[serde(flatten)]
        condition: Condition,
        value: f64,
        exact: bool,
    },
    /// It does not.
    GateFails {
        call: u32,
        #[serde(flatten)]
        condition: Condition,
        value: f64,
        exact: bool,
    },
    /// The answer carries too little for the score; whether the condition then holds, it says itself.
    GateUnscored {
        call: u32,
        #[serde(flatten)]
        condition: Condition,
        why: Unscored,
    },
    /// A stage's answer is the cascade's.
    Accepted { stage: u32, call: u32 },
    /// A stage's answer was not good enough: on to a later stage, with a fresh prompt.
    Escalated { from: u32, to: u32, call: u32 },
    /// A stage has failed: on to a later stage.
    Rerouted { from: u32, to: u32, error: ErrorKind, call: u32 },
    /// The last stage that could run has failed, and the cascade with it.
    StagesFailed { stage: u32, error: ErrorKind, call: u32 },
    /// This node, or another try of its call, would overrun a bound and is not begun.
    Masked { by: Mask },
    /// A stage was to answer a failure and is not begun: no model that could begin it can be called now.
    Down,
    /// The call has failed and is not made again: all requests together have used up their retries.
    RetryDenied { call: u32 },
    /// The call has not begun to answer in time: `hedge` goes out beside it.
    Hedged { call: u32, hedge: u32 },
    /// It would, and all requests together have used up what calls may be repeated.
    HedgeDenied { call: u32 },
    /// It would overrun a bound and does not.
    HedgeMasked { call: u32, by: Mask },
    /// The hedge began to answer first; the call is cancelled.
    HedgeWon { call: u32, hedge: u32 },
    /// The call began to answer first; the hedge is cancelled.
    HedgeLost { call: u32, hedge: u32 },
    /// One of the two has failed; the other goes on.
    HedgeLeft { call: u32, failed: u32, error: ErrorKind },
    /// A call of the request's fallback would; its index there.
    FallbackMasked { index: u32, by: Mask },
    /// A call of the fallback is not begun: its model cannot be called now.
    FallbackDown { index: u32 },
    /// A call of the request's fallback follows, by the shortest path; its index there, and the path's weight.
    FailedOver { index: u32, weight: f64 },
    /// No call of the fallback can follow: of so many models each has failed, or is vetoed.
    NoPath { models: u32 },
    /// A branch takes no part in the answer.
    BranchLeftOut { branch: u32, left: Left },
    /// Too few branches are left: the parallel node fails.
    QuorumLost { needed: u32, could: u32, error: ErrorKind, call: u32 },
    /// The first branch is complete.
    First { branch: u32, call: u32 },
    /// Counted: `answers` branches gave `distinct` different answers. `share`: of all weight given, the winner's.
    /// `tie`: another form had as much. `early`: it was decided before all branches were there.
    Voted { branch: u32, call: u32, answers: u32, distinct: u32, share: f64, tie: bool, early: bool },
    /// The branches need no aggregating call: there is one answer, or (for a judge) all are the same.
    Agreed { branch: u32, call: u32, answers: u32 },
    /// The judge's call names a branch.
    Judged { branch: u32, call: u32, judge: u32 },
    /// The judge names no branch, or more than one; the branches' vote decides.
    JudgeUnclear { branch: u32, call: u32, judge: u32 },
    /// The aggregating call has failed; the branches' vote decides.
    AggregateFailed { branch: u32, call: u32, error: ErrorKind },
    /// The aggregating call would overrun a bound; the branches' vote decides.
    AggregateMasked { branch: u32, call: u32, by: Mask },
    /// The refining call's answer is the parallel node's.
    Refined { call: u32, answers: u32 },
    /// Asked whether the answer of `call` is right, so many calls said that it is, that it is not, and neither.
    Verified { call: u32, right: u32, wrong: u32, unclear: u32 },
    /// A verifying call has failed, and says neither.
    VerifierFailed { call: u32, verifier: u32, error: ErrorKind },
    /// A verifying call would overrun a bound and is not made.
    VerifierMasked { call: u32, by: Mask },
    /// How sure the small model is of the beginning of a reasoning step, in nats: below `tau` it writes the step.
    Glimpsed { step: u32, call: u32, value: f64, tau: f64, exact: bool, sure: bool },
    /// The small model's beginning carries too little for its entropy: the large model writes the step.
    GlimpseUnscored { step: u32, call: u32, why: Unscored },
    /// The small model has failed: the large model writes the step.
    StepFailed { step: u32, error: ErrorKind, call: u32 },
    /// A reasoning step is there; `large`: by the large model.
    StepWritten { step: u32, call: u32, large: bool, tokens: u32 },
    /// The reasoning has ended; the answer follows.
    Reasoned { steps: u32, tokens: u32, because: Ends },
    /// The whole plan was stopped.
    Stopped { by: Abort },
    /// The request is answered by what there was, though no stage accepted it, and why nothing better came.
    BestSoFar { call: u32, because: BestBecause },
}

/// Why a score could not be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unscored {
    /// The answer came without log-probabilities, or has no tokens.
    NoLogprobs,
    /// A token came with neither an entropy nor two alternatives.
    NoAlternatives,
    /// The score is no finite number.
    NotFinite,
    /// It was not computed when the answer came.
    NotComputed,
    /// The stage is no parallel plan of which at least two branches answered.
    NoVote,
    /// Nobody said whether the answer is right.
    NoVerdict,
}

/// A bound of the request that the machine keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    Deadline,
    /// The request's calls.
    Calls,
    /// The request's money: what is spent, what running calls may yet cost and what this one may.
    Budget,
    /// Likewise its tokens.
    Tokens,
    /// The request's first token, where what waits before a model would be too long.
    FirstToken,
}

impl Mask {
    /// The error of a request for which nothing else could be done.
    pub fn error(self) -> ErrorKind {
        match self {
            Mask::Deadline | Mask::FirstToken => ErrorKind::Timeout,
            Mask::Calls | Mask::Budget | Mask::Tokens => ErrorKind::RateLimited,
        }
    }
}

/// Why a branch takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    Failed { error: ErrorKind, call: u32 },
    Masked { by: Mask },
}

/// Why reasoning has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ends {
    /// A step says so, or says nothing.
    Closed,
    /// A step says what the step before it said.
    Repeats,
    /// As many as may be.
    Steps,
    Tokens,
    /// Another would leave no room for the answer.
    Masked {
        by: Mask,
    },
}

/// What stopped a plan from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Abort {
    Deadline,
    ClientGone,
}

/// Why the best answer so far has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestBecause {
    Masked { by: Mask },
    Failed { error: ErrorKind },
    Stopped { by: Abort },
}

impl What {
    /// The reason as records write it.
    pub fn reason(&self) -> String {
        let json = serde_json::to_value(self).unwrap_or_default();
        json["reason"].as_str().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for What {
    /// A sentence for a person, without the place.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            What::GateHolds { call, condition, value, exact } => {
                write!(f, "holds: {condition} ({}{value:.4}, call {call}){}", about(exact), calibrated(&condition))
            }
            What::GateFails { call, condition, value, exact } => {
                write!(f, "fails: {condition} ({}{value:.4}, call {call}){}", about(exact), calibrated(&condition))
            }
            What::GateUnscored { call, condition, why } => {
                let then = match condition.if_unscored {
                    IfUnscored::Accept => "which counts as holding",
                    IfUnscored::Escalate => "which counts as failing",
                };
                write!(f, "no score: {condition} (call {call}: {why}), {then}{}", calibrated(&condition))
            }
            What::Accepted { stage, call } => write!(f, "accepted: stage {stage}, call {call}"),
            What::Escalated { from, to, call } => {
                write!(f, "escalated from stage {from} to {to}: call {call} was not accepted")
            }
            What::Rerouted { from, to, error, call } => {
                write!(f, "rerouted from stage {from} to {to}: call {call} failed with {error}")
            }
            What::StagesFailed { stage, error, call } => {
                write!(f, "failed: call {call} of stage {stage} with {error}, and no later stage could run")
            }
            What::Masked { by } => write!(f, "not begun: it would overrun {by}"),
            What::Down => f.write_str("not begun: no model that could begin it can be called now"),
            What::RetryDenied { call } => {
                write!(f, "call {call} is not made again: all requests together have used up their retries")
            }
            What::Hedged { call, hedge } => {
                write!(f, "hedged: call {call} had not begun to answer, call {hedge} goes out beside it")
            }
            What::HedgeDenied { call } => {
                write!(f, "call {call} not hedged: all requests together have used up what calls may be repeated")
            }
            What::HedgeMasked { call, by } => write!(f, "call {call} not hedged: that would overrun {by}"),
            What::HedgeWon { call, hedge } => {
                write!(f, "call {hedge} began to answer before call {call}, which it hedges")
            }
            What::HedgeLost { call, hedge } => write!(f, "call {call} began to answer before call {hedge}, its hedge"),
            What::HedgeLeft { call, failed, error } => {
                write!(f, "call {failed} failed with {error}; call {call} beside it goes on")
            }
            What::FallbackMasked { index, by } => write!(f, "fallback {index} not begun: it would overrun {by}"),
            What::FallbackDown { index } => write!(f, "fallback {index} not begun: its model cannot be called now"),
            What::FailedOver { index, weight } => write!(f, "failed over to fallback {index}, at weight {weight:.3}"),
            What::NoPath { models } => write!(f, "no path: none of {models} models of the fallback can follow"),
            What::BranchLeftOut { branch, left: Left::Failed { error, call } } => {
                write!(f, "branch {branch} left out: call {call} failed with {error}")
            }
            What::BranchLeftOut { branch, left: Left::Masked { by } } => {
                write!(f, "branch {branch} left out: it would overrun {by}")
            }
            What::QuorumLost { needed, could, error, call } => {
                write!(f, "failed: {could} of {needed} branches that are needed are left (call {call}: {error})")
            }
            What::First { branch, call } => write!(f, "first: branch {branch}, call {call}"),
            What::Voted { branch, call, answers, distinct, share, tie, early } => {
                let tie = if tie { ", a tie: the first branch wins" } else { "" };
                let early = if early { ", decided before all had answered" } else { "" };
                write!(
                    f,
                    "voted: branch {branch}, call {call}, with {:.0} % of the weight; {distinct} different of {answers} \
                     answers{tie}{early}",
                    share * 100.0
                )
            }
            What::Agreed { branch, call, answers } => {
                write!(f, "agreed: branch {branch}, call {call}, of {answers} answers; nobody need be asked")
            }
            What::Judged { branch, call, judge } => write!(f, "judged: branch {branch}, call {call}, by call {judge}"),
            What::JudgeUnclear { branch, call, judge } => {
                write!(f, "call {judge} names no one answer; the vote decides: branch {branch}, call {call}")
            }
            What::AggregateFailed { branch, call, error } => {
                write!(f, "the aggregating call failed with {error}; the vote decides: branch {branch}, call {call}")
            }
            What::AggregateMasked { branch, call, by } => {
                write!(f, "the aggregating call would overrun {by}; the vote decides: branch {branch}, call {call}")
            }
            What::Refined { call, answers } => write!(f, "refined: call {call}, from {answers} answers"),
            What::Verified { call, right, wrong, unclear } => {
                write!(f, "verified: of call {call}, {right} say that it is right, {wrong} that it is not")?;
                if unclear > 0 { write!(f, ", {unclear} neither") } else { Ok(()) }
            }
            What::VerifierFailed { call, verifier, error } => {
                write!(f, "call {verifier}, to verify call {call}, failed with {error}")
            }
            What::VerifierMasked { call, by } => {
                write!(f, "call {call} not verified once more: that would overrun {by}")
            }
            What::Glimpsed { step, call, value, tau, exact, sure } => {
                let (sign, then) = if sure { ("<", "goes on") } else { (">=", "is unsure") };
                let about = about(exact);
                write!(
                    f,
                    "step {step}: the small model {then} (call {call}, first token's entropy {about}{value:.4} {sign} {tau})"
                )
            }
            What::GlimpseUnscored { step, call, why } => {
                write!(f, "step {step}: no score of its first token (call {call}: {why}), which counts as unsure")
            }
            What::StepFailed { step, error, call } => {
                write!(f, "step {step}: call {call} failed with {error}; the large model writes it")
            }
            What::StepWritten { step, call, large, tokens } => {
                let by = if large { "large" } else { "small" };
                write!(f, "step {step}: {tokens} tokens by the {by} model, call {call}")
            }
            What::Reasoned { steps, tokens, because } => {
                write!(f, "reasoned: {steps} steps, {tokens} tokens; {because}")
            }
            What::Stopped { by } => write!(f, "stopped: {by}"),
            What::BestSoFar { call, because } => write!(f, "the best answer so far has to do: call {call}; {because}"),
        }
    }
}

fn about(exact: bool) -> &'static str {
    if exact { "" } else { "about " }
}

fn calibrated(condition: &Condition) -> String {
    let guarantee = condition.max_error.map(|error| format!(" for at most {} % wrong", error * 100.0));
    let by = condition.calibration.map(|hash| format!(", calibrated by {}", hash.short()));
    by.map(|by| by + &guarantee.unwrap_or_default()).unwrap_or_default()
}

impl fmt::Display for Unscored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unscored::NoLogprobs => "it came without log-probabilities",
            Unscored::NoAlternatives => "a token came with neither an entropy nor two alternatives",
            Unscored::NotFinite => "the score is no finite number",
            Unscored::NotComputed => "it was not computed when the answer came",
            Unscored::NoVote => "fewer than two branches answered",
            Unscored::NoVerdict => "nobody said whether it is right",
        })
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mask::Deadline => "the deadline",
            Mask::Calls => "the bound on calls",
            Mask::Budget => "the budget",
            Mask::Tokens => "the bound on tokens",
            Mask::FirstToken => "the time for its first token",
        })
    }
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ends::Closed => f.write_str("the last one ends it"),
            Ends::Repeats => f.write_str("the last one repeats the one before it"),
            Ends::Steps => f.write_str("no more steps may be"),
            Ends::Tokens => f.write_str("no more tokens may be"),
            Ends::Masked { by } => write!(f, "another step would leave no room for the answer within {by}"),
        }
    }
}

impl fmt::Display for Abort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Abort::Deadline => "the deadline passed",
            Abort::ClientGone => "the client left",
        })
    }
}

impl fmt::Display for BestBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BestBecause::Masked { by } => write!(f, "more would overrun {by}"),
            BestBecause::Failed { error } => write!(f, "what was to follow failed with {error}"),
            BestBecause::Stopped { by } => write!(f, "{by}"),
        }
    }
}
