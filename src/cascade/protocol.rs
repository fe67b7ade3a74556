//! What the machine is told, what it says, and what it is set up with. Data only; the whole exchange with dispatch, and
//! what a journal of a run holds.

use std::{collections::BTreeMap, sync::Arc};

use crate::domain::{
    AttemptReason, CallSpec, Decision, DecisionId, ErrorKind, Facts, FailoverGraph, MicroUsd, Micros, Note, Place,
    Plan, Reading, RequestBounds, Spend,
};

use super::RetryPolicy;

/// A complete answer as the nodes see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answered {
    pub facts: Facts,
    /// What the call cost.
    pub cost: Spend,
}

/// What happened. Events of calls that have ended, or that never were, change nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The backend has accepted the call.
    Started { call: u32 },
    /// The first piece of the call's answer is there.
    Delta { call: u32 },
    /// What is known of an answer that is still coming, of the scores that are watched ([`Plan::watched_at`]).
    Early { call: u32, readings: Vec<Reading> },
    /// The call's answer is complete. A call that may be forwarded needs none of its facts. Where these say what waits before
    /// models ([`Facts::waits`]), it holds from now on.
    Done { call: u32, answer: Arc<Answered> },
    /// The call has failed. `retry_after`: how long the server asked to be left alone, in microseconds. `cost`: of what it
    /// did all the same. `down`: the models of the plan and its fallback that cannot be called at this moment.
    Failed { call: u32, kind: ErrorKind, retry_after: Option<i64>, cost: Spend, down: Vec<String> },
    /// A timer set by [`Command::SetTimer`] has run out.
    Timer(Timer),
    /// The call that has failed is not made again, though [`Timer::Backoff`] was set for it: all requests together have used up
    /// their retries ([`super::retry_budget`]).
    RetryDenied { call: u32 },
    /// Likewise the call that has not begun to answer is not hedged, though its [`Timer::Hedge`] has run out.
    HedgeDenied { call: u32 },
    /// The client has left.
    ClientGone,
}

/// The timers of one machine; setting one again moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// The whole request's.
    Deadline,
    /// The wait before a retry of the call that has failed. Several may run at once.
    Backoff { call: u32 },
    /// How long the call may take to begin its answer before it is hedged. Several may run at once.
    Hedge { call: u32 },
}

/// What a call is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The client's request and nothing else: also of a stage that others went before.
    Request,
    /// The request and the answers of these calls, numbered from 1 in this order; to be answered by the best one's number.
    Judge(Vec<u32>),
    /// Likewise; to be answered by one answer made of them.
    Refine(Vec<u32>),
    /// The request and this call's answer; to be answered by whether it is right.
    Verify(u32),
    /// The request, and the reasoning that these calls wrote, to go on from with one step.
    Step(Vec<u32>),
    /// Likewise, to be followed by the answer.
    Reasoned(Vec<u32>),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Make a call. `call` counts the request's calls from 0; `at`: the node that makes it.
    Start { call: u32, spec: CallSpec, why: AttemptReason, input: Input, at: Place },
    /// Stop a call; nothing more is wanted of it.
    Cancel { call: u32 },
    /// Splice the call's stream to the client, from its first piece to its last.
    Forward { call: u32 },
    /// Give the client the whole answer of a call that has been held back so far. `Finish` of the same call follows.
    Emit { call: u32 },
    /// Raise [`Event::Timer`] at this instant.
    SetTimer { timer: Timer, at: Micros },
    /// Record a decision. Asks for nothing else.
    Note(Note),
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
    /// What all calls together may cost. A call is begun only where its worst case fits beside what is spent and what the
    /// running calls may yet cost.
    pub budget: Option<MicroUsd>,
    /// What they may use of tokens, prompts and answers together; likewise.
    pub tokens: Option<u64>,
    /// Microseconds from the start to the first token: what is not expected to begin by then is not escalated to.
    pub first_token: Option<i64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { deadline: None, max_calls: 8, budget: None, tokens: None, first_token: None }
    }
}

impl Limits {
    /// Those of one call, with room for every call of the plan, or the policy's bounds where they are narrower.
    fn of(self, plan: &Plan, bounds: Option<&RequestBounds>) -> Self {
        let max_calls = self.max_calls.saturating_add(plan.most_calls().saturating_sub(1));
        let Some(bounds) = bounds else { return Self { max_calls, ..self } };
        Self {
            deadline: self.deadline.into_iter().chain(bounds.time_us).min(),
            max_calls: bounds.calls.map_or(max_calls, |calls| calls.min(max_calls)),
            budget: self.budget.into_iter().chain(bounds.usd).min(),
            tokens: self.tokens.into_iter().chain(bounds.tokens).min(),
            first_token: self.first_token.into_iter().chain(bounds.first_token_us).min(),
        }
    }
}

/// What a machine runs.
#[derive(Clone, Debug)]
pub struct Setup {
    pub plan: Plan,
    /// Calls that may follow an error, in order.
    pub fallback: Vec<CallSpec>,
    /// In which the next of them is sought; absent: they follow in order.
    pub failover: Option<FailoverGraph>,
    /// The kinds of error that the fallback answers.
    pub fallback_on: Vec<ErrorKind>,
    pub retry: RetryPolicy,
    pub limits: Limits,
    /// The most that one call of a model can cost for this request, by fleet name, where the call does not say ([`CallSpec::worst`]);
    /// matters only under a budget, where a model without an entry is taken to cost more than any.
    pub worst: BTreeMap<String, Spend>,
    /// Microseconds to the first token that are expected of a call, by fleet name; 0 for a model without an entry. Of the decision's
    /// moment; complete answers tell newer ones.
    pub waits: BTreeMap<String, i64>,
    /// Of the jitter.
    pub seed: u64,
}

impl Setup {
    /// A plan and nothing else: no retry, no fallback, room for all of its calls.
    pub fn bare(plan: Plan) -> Self {
        Self {
            limits: Limits::default().of(&plan, None),
            plan,
            fallback: Vec::new(),
            failover: None,
            fallback_on: Vec::new(),
            retry: RetryPolicy::never(),
            worst: BTreeMap::new(),
            waits: BTreeMap::new(),
            seed: 0,
        }
    }

    /// What a decision is run with: its plan, its fallback, its number of retries where it says one, and the limits with
    /// room for every call of the plan, or the policy's bounds where they are narrower. `None` where it refuses. The seed is
    /// a part of the decision's id, so that the record gives it again.
    pub fn of(id: DecisionId, decision: &Decision, retry: &RetryPolicy, limits: Limits) -> Option<Self> {
        let named = |label: &String| ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == label);
        let plan = decision.plan.clone()?;
        let bounds = decision.bounds.as_deref();
        Some(Self {
            limits: limits.of(&plan, bounds),
            plan,
            fallback: decision.fallback.clone(),
            failover: decision.failover.as_deref().cloned(),
            fallback_on: decision.fallback_on.iter().filter_map(named).collect(),
            retry: RetryPolicy { max_retries: decision.retries.unwrap_or(retry.max_retries), ..retry.clone() },
            worst: bounds.map(|bounds| bounds.worst.clone()).unwrap_or_default(),
            waits: bounds.map(|bounds| bounds.waits.clone()).unwrap_or_default(),
            seed: id.0.as_u64_pair().1,
        })
    }
}
