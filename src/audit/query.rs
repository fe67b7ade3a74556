//! What is asked of a store and what comes back: filters, rows of a list, and one decision whole.

use serde::{Deserialize, Serialize};

use super::{
    explain,
    record::{Beside, Logged},
    store::{StoreError, StoredEvent},
};
use crate::domain::{
    Attempt, Context, DecisionId, DecisionRecord, EventBody, Feedback, Hash, Micros, Note, Outcome, PolicyVersion,
    StateUpdate, canonical,
};

/// Rows given when the filter does not say how many.
pub const DEFAULT_LIMIT: u32 = 50;
/// Most rows of one answer.
pub const MAX_LIMIT: u32 = 1000;

/// Which decisions; all conditions hold. An absent one does not restrict.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecisionFilter {
    /// At most this many, newest first; 50 when absent, never more than 1000.
    pub limit: Option<u32>,
    /// The oldest first instead.
    pub oldest_first: bool,
    /// Older than this decision: the last id of one page gives the next page.
    pub before: Option<DecisionId>,
    /// Newer than this decision.
    pub after: Option<DecisionId>,
    /// Decided at or after this time (microseconds since the epoch).
    pub since: Option<Micros>,
    /// Decided before this time.
    pub until: Option<Micros>,
    pub policy: Option<String>,
    pub arm: Option<String>,
    /// The model whose answer the client got.
    pub model: Option<String>,
    /// `ok`, `error`, `cancelled`, `refused`, `interrupted`, or `open` for decisions without an outcome.
    pub status: Option<String>,
    /// Hash of the session id, as recorded.
    pub session: Option<String>,
    pub tenant: Option<String>,
    /// `rule`, `select`, `pinned`, `shadow` or `refused`.
    pub decided_by: Option<String>,
}

impl DecisionFilter {
    /// The limit that applies.
    pub fn rows(&self) -> u32 {
        self.limit.unwrap_or(DEFAULT_LIMIT).clamp(1, MAX_LIMIT)
    }
}

/// One line of a list of decisions. What belongs to the end is absent while there is none.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecisionRow {
    pub id: DecisionId,
    pub at: Micros,
    pub replica: String,
    pub seq: u64,
    pub policy: String,
    pub policy_hash: Hash,
    pub state_seq: u64,
    pub decided_by: String,
    pub rule: Option<String>,
    /// Empty when refused.
    pub arm: String,
    pub propensity: f64,
    pub model_requested: String,
    pub stream: bool,
    pub key: String,
    pub tenant: String,
    pub session: String,
    pub client_retry: u32,
    pub dry: bool,
    pub status: Option<String>,
    pub served_by: Option<String>,
    pub attempts: Option<u32>,
    pub cost_usd: Option<f64>,
    pub latency_us: Option<i64>,
    pub ttft_us: Option<i64>,
    pub prompt_tokens: Option<u32>,
    pub completion_tokens: Option<u32>,
    /// Of all prompts and answers of its calls together; those above are of the answer that was given.
    pub tokens: Option<u64>,
    pub error: Option<String>,
}

/// A decision of a plan's machine and when it was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NoteView {
    pub at: Micros,
    pub note: Note,
}

/// A judgement and when it came.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FeedbackView {
    pub at: Micros,
    #[serde(flatten)]
    pub feedback: Feedback,
}

/// Everything that is known of one decision, read from the records themselves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecisionView {
    pub id: DecisionId,
    pub at: Micros,
    pub replica: String,
    pub seq: u64,
    /// BLAKE3 of `record`.
    pub hash: Hash,
    pub prev: Hash,
    pub decision: DecisionRecord,
    pub attempts: Vec<Attempt>,
    /// What the plan's machine decided between the calls, in order.
    pub notes: Vec<NoteView>,
    pub outcome: Option<Outcome>,
    pub feedback: Vec<FeedbackView>,
    pub state_updates: Vec<StateUpdate>,
    /// Absent where it was not kept, or was erased (then `decision.context_hash` is still there).
    pub context: Option<Context>,
    /// Base64 of little-endian f32 in JSON.
    #[serde(serialize_with = "base64_vector")]
    pub embedding: Option<Vec<f32>>,
    /// The decision's record, byte for byte.
    pub record: String,
    /// All of the above told to a person.
    pub explanation: String,
    /// The context's bytes as recorded.
    #[serde(skip)]
    pub context_bytes: Option<Vec<u8>>,
    /// Request and answer as JSON, where `bodies` kept them: those of the decision, those of the outcome.
    #[serde(skip)]
    pub bodies: [Option<Vec<u8>>; 2],
}

/// The policy version that a record holds.
pub(super) fn policy_version(record: Vec<u8>) -> Result<PolicyVersion, StoreError> {
    match Logged::parse(record, Beside::default())?.event.body {
        EventBody::PolicyVersion(version) => Ok(*version),
        _ => Err(StoreError::Row("a policy version's event is of another kind".to_owned())),
    }
}

/// The state update that a record holds.
pub(super) fn state_update(record: Vec<u8>) -> Result<StateUpdate, StoreError> {
    match Logged::parse(record, Beside::default())?.event.body {
        EventBody::StateUpdate(update) => Ok(update),
        _ => Err(StoreError::Row("a state update's event is of another kind".to_owned())),
    }
}

fn base64_vector<S: serde::Serializer>(vector: &Option<Vec<f32>>, s: S) -> Result<S::Ok, S::Error> {
    vector.as_deref().map(canonical::vector_to_base64).serialize(s)
}

impl DecisionView {
    /// Tokens of the prompts and answers of all calls together.
    pub fn tokens(&self) -> u64 {
        self.attempts.iter().map(|attempt| attempt.usage.total()).sum()
    }

    /// From a decision's events as stored.
    ///
    /// # Errors
    /// When a record is no event of this version.
    pub fn of(events: Vec<StoredEvent>) -> Result<Option<Self>, StoreError> {
        let events = events.into_iter().map(StoredEvent::parse).collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(events))
    }

    /// Puts a decision's events together; `None` when there is no decision among them.
    pub fn new(events: Vec<Logged>) -> Option<Self> {
        let mut view: Option<DecisionView> = None;
        let (mut attempts, mut feedback, mut state_updates) = (Vec::new(), Vec::new(), Vec::new());
        let mut notes = Vec::new();
        let (mut outcome, mut answer) = (None, None);
        for logged in events {
            let at = logged.event.at;
            match logged.event.body {
                EventBody::Decision(decision) if view.is_none() => {
                    let context_bytes = logged.event.context;
                    view = Some(DecisionView {
                        id: logged.event.decision?,
                        at,
                        replica: logged.replica,
                        seq: logged.seq,
                        hash: logged.hash,
                        prev: logged.prev,
                        decision: *decision,
                        attempts: Vec::new(),
                        notes: Vec::new(),
                        outcome: None,
                        feedback: Vec::new(),
                        state_updates: Vec::new(),
                        context: context_bytes.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok()),
                        embedding: logged.event.embedding.as_deref().and_then(canonical::vector_from_bytes),
                        record: String::from_utf8_lossy(&logged.record).into_owned(),
                        explanation: String::new(),
                        context_bytes,
                        bodies: [logged.event.bodies, None],
                    });
                }
                EventBody::Attempt(attempt) => attempts.push(*attempt),
                EventBody::Note(note) => notes.push(NoteView { at, note }),
                EventBody::Outcome(end) if outcome.is_none() => {
                    outcome = Some(end);
                    answer = logged.event.bodies;
                }
                EventBody::Feedback(given) => feedback.push(FeedbackView { at, feedback: given }),
                EventBody::StateUpdate(update) => state_updates.push(update),
                _ => {}
            }
        }
        let mut view = view?;
        attempts.sort_by_key(|attempt| attempt.index);
        view.attempts = attempts;
        view.notes = notes;
        view.outcome = outcome;
        view.feedback = feedback;
        view.state_updates = state_updates;
        view.bodies[1] = answer;
        view.explanation = explain::explain(&view);
        Some(view)
    }
}
