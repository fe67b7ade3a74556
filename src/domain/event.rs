//! Everything that is recorded. One sequencer appends these to the write-ahead log; the stores are fed from there.
//!
//! An event's `record` is the canonical JSON of [`Event`]; context and embedding travel beside it and only their hashes
//! are inside, so that they can be erased while the chain still verifies.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Decision, DecisionId, EmbedderIdentity, Facts, FinishReason, Fleet, Hash, Micros, Note, Place, Sampling, Usage,
};

/// A thing that happened, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub at: Micros,
    /// The decision that it belongs to; absent for events of the whole weir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<DecisionId>,
    #[serde(flatten)]
    pub body: EventBody,
    /// Canonical JSON of the context; recorded beside the event, hashed inside it.
    #[serde(skip)]
    pub context: Option<Vec<u8>>,
    /// Little-endian f32 of the embedding; likewise.
    #[serde(skip)]
    pub embedding: Option<Vec<u8>>,
    /// Prompt and answer as JSON, where `bodies` keeps them; likewise.
    #[serde(skip)]
    pub bodies: Option<Vec<u8>>,
}

impl Event {
    /// An event without context, embedding or bodies.
    pub fn new(at: Micros, decision: Option<DecisionId>, body: EventBody) -> Self {
        Self { at, decision, body, context: None, embedding: None, bodies: None }
    }

    pub fn kind(&self) -> EventKind {
        match self.body {
            EventBody::Decision(_) => EventKind::Decision,
            EventBody::Attempt(_) => EventKind::Attempt,
            EventBody::Note(_) => EventKind::Note,
            EventBody::Outcome(_) => EventKind::Outcome,
            EventBody::Feedback(_) => EventKind::Feedback,
            EventBody::StateUpdate(_) => EventKind::StateUpdate,
            EventBody::PolicyVersion(_) => EventKind::PolicyVersion,
            EventBody::Admin(_) => EventKind::Admin,
        }
    }
}

/// The kinds of event, as they are named in records and queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    Decision,
    Attempt,
    Note,
    Outcome,
    Feedback,
    StateUpdate,
    PolicyVersion,
    Admin,
}

impl EventKind {
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Decision => "decision",
            EventKind::Attempt => "attempt",
            EventKind::Note => "note",
            EventKind::Outcome => "outcome",
            EventKind::Feedback => "feedback",
            EventKind::StateUpdate => "state_update",
            EventKind::PolicyVersion => "policy_version",
            EventKind::Admin => "admin",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "body", rename_all = "snake_case")]
pub enum EventBody {
    Decision(Box<DecisionRecord>),
    Attempt(Box<Attempt>),
    /// What the plan's machine decided between calls.
    Note(Note),
    Outcome(Outcome),
    Feedback(Feedback),
    StateUpdate(StateUpdate),
    PolicyVersion(Box<PolicyVersion>),
    Admin(Admin),
}

/// A decision with all that is needed to derive it again (together with context, embedding and policy version).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    #[serde(flatten)]
    pub decision: Decision,
    /// What the client wrote as `model`.
    pub model_requested: String,
    pub stream: bool,
    pub key: String,
    pub tenant: String,
    /// Hash of the session id; empty without one.
    pub session: String,
    pub client_retry: u32,
    /// `/v1/decision` decides and calls nothing; nothing more will follow such a record.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry: bool,
    /// The decision beside which this one was made, by another policy; it is dry, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow_of: Option<DecisionId>,
    /// weir's version and commit.
    pub build: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedder: Option<EmbedderIdentity>,
    /// BLAKE3 of the context's canonical JSON; absent with `context: none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_hash: Option<Hash>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_hash: Option<Hash>,
    /// BLAKE3 of the request body, unless `bodies: off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_hash: Option<Hash>,
}

/// Why a call was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptReason {
    Planned,
    Escalation,
    Fallback,
    Hedge,
    Retry,
    Probe,
}

impl AttemptReason {
    pub fn as_str(self) -> &'static str {
        match self {
            AttemptReason::Planned => "planned",
            AttemptReason::Escalation => "escalation",
            AttemptReason::Fallback => "fallback",
            AttemptReason::Hedge => "hedge",
            AttemptReason::Retry => "retry",
            AttemptReason::Probe => "probe",
        }
    }
}

/// One call of one model, as it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Place in the request's sequence of calls, from 0.
    pub index: u32,
    pub why: AttemptReason,
    /// The node of the plan that made it; the root's for a bare call and for fallback.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub at: Place,
    pub model: String,
    /// The `model` that the server said it used, where it said one and it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_reported: Option<String>,
    /// Which backend served it: `local`, `remote`, `scripted`.
    pub backend: String,
    pub sampling: Sampling,
    pub started: Micros,
    /// Time to the first token, in microseconds from `started`; absent when none came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_us: Option<i64>,
    pub latency_us: i64,
    pub usage: Usage,
    pub cost_usd: f64,
    /// From the tokens and the fleet's joules per token; absent where the fleet has none for the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<FinishReason>,
    /// The fixed label of the error, where the call failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_detail: Option<String>,
    /// How long the server asked to be left alone, in microseconds, where the call failed and it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_us: Option<i64>,
    /// Where the call failed: which models of the plan and its fallback could not be called at that moment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub down: Vec<String>,
    /// What gates, votes and judges knew of the answer; absent where none of them saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<Facts>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeStatus {
    Ok,
    /// An error went to the client.
    Error,
    /// The client left first.
    Cancelled,
    /// The policy refused.
    Refused,
    /// weir stopped before the end; written at the next start.
    Interrupted,
}

impl OutcomeStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            OutcomeStatus::Ok => "ok",
            OutcomeStatus::Error => "error",
            OutcomeStatus::Cancelled => "cancelled",
            OutcomeStatus::Refused => "refused",
            OutcomeStatus::Interrupted => "interrupted",
        }
    }
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub status: OutcomeStatus,
    /// The model whose answer the client got; empty when there was none.
    pub served_by: String,
    /// Calls made.
    pub attempts: u32,
    pub cost_usd: f64,
    /// Of all calls; absent where it is not known of each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<f64>,
    pub latency_us: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_us: Option<i64>,
    pub usage: Usage,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// BLAKE3 of the answer's text, unless `bodies: off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_hash: Option<Hash>,
}

/// A judgement on an answer, from outside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    /// Who says so: `user`, `judge`, a program's name.
    pub source: String,
    /// What is judged: `score`, `resolved`, ...
    pub name: String,
    pub value: f64,
    /// A repeated key is answered as the first time and changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// One step of a policy's learning. The state after `seq` updates is a fold over exactly these, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateUpdate {
    pub policy: String,
    pub policy_hash: Hash,
    /// Position among the policy's updates, from 1.
    pub seq: u64,
    pub arm: String,
    /// As the decision recorded them.
    pub features: Vec<f64>,
    pub reward: f64,
    /// What the request cost, for pacing.
    #[serde(default, skip_serializing_if = "free")]
    pub cost_usd: f64,
    /// Probability with which the arm had been drawn.
    pub propensity: f64,
    /// When the decision was made, which is what half-lives count from.
    pub decided: Micros,
    /// An operator's: the state is this one from here on (`weir policy state import`, `reset`), and nothing of the rest
    /// counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<Box<serde_json::Value>>,
}

impl StateUpdate {
    /// What a decision teaches that was worth `reward`, as the update after `seq` others.
    pub fn of(decision: &Decision, seq: u64, reward: f64, cost_usd: f64, decided: Micros) -> Self {
        Self {
            policy: decision.policy.clone(),
            policy_hash: decision.policy_hash,
            seq: seq + 1,
            arm: decision.arm.clone(),
            features: decision.features.clone(),
            reward,
            cost_usd,
            propensity: decision.propensity,
            decided,
            set: None,
        }
    }
}

fn free(usd: &f64) -> bool {
    *usd == 0.0
}

/// A policy taken into use: everything that compiling it was handed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyVersion {
    /// Hashes of the artifacts that the file names, by path as written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub artifacts: BTreeMap<String, Hash>,
    pub name: String,
    pub hash: Hash,
    /// File name, for people.
    pub file: String,
    pub yaml: String,
    pub fleet: Fleet,
    /// Per example set, each text's vector as base64 of little-endian f32.
    pub examples: std::collections::BTreeMap<String, Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedder: Option<EmbedderIdentity>,
}

/// Something an operator or weir itself did: start, stop, reload, erase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admin {
    pub action: String,
    pub detail: String,
}
