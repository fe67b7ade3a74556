//! What a policy may know about a request. No prompt text: whatever rules may ask of the text is a named signal.
//!
//! The JSON form of a [`Context`] is at once what is recorded, what is hashed, and the variables of CEL conditions
//! (`request`, `signals`, `session`, `key`, `fleet`).

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{Micros, Need};

/// The request without its text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestView {
    pub model: String,
    pub stream: bool,
    /// What the client asked for; 0 when it did not say.
    pub max_tokens: u32,
    pub n: u32,
    pub needs: Vec<Need>,
    pub metadata: BTreeMap<String, String>,
    /// Above zero: the client repeats a request on its own account.
    pub client_retry: u32,
}

/// What was measured on the text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Signals {
    /// Estimated or counted prompt tokens of the whole conversation.
    pub tokens: u32,
    /// Tokens (same estimate) of the query alone.
    pub query_tokens: u32,
    /// ISO 639-1 code of the query's language, or `und`.
    pub language: String,
    /// Share of the query's lines that look like code, 0 to 1.
    pub code_share: f64,
    /// 100 minus Flesch reading ease, clipped to 0..100 (GreenServ, arXiv 2601.17551, section 3).
    pub complexity: f64,
    /// Number of user messages, 1 for a first question.
    pub turn: u32,
    /// First 16 hexadecimal digits of the system prompt's BLAKE3; empty without one.
    pub system_prompt: String,
    /// Whether tools or a response format were asked for.
    pub tools: bool,
    pub response_format: bool,
    pub pii: PiiSignals,
    /// Per named example set of the policy: the greatest cosine to one of its texts; -1 without an embedding.
    pub similarity: BTreeMap<String, f64>,
    /// Whether the query was embedded (`no_embedding` decides otherwise).
    pub embedded: bool,
}

/// Personal data found by pattern.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PiiSignals {
    /// Matches of all kinds.
    pub count: u32,
    pub email: u32,
    pub phone: u32,
    /// Digit runs that pass the Luhn check.
    pub card: u32,
    pub iban: u32,
    pub ssn: u32,
}

/// The conversation, as far as weir remembers it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionView {
    /// Hash of the session id; empty without one.
    pub id: String,
    /// Requests of this session decided before, plus one.
    pub turn: u32,
    /// Arm of the session's last decision; empty for a first one.
    pub last_arm: String,
    /// Fleet name of the model whose answer the session got last; empty where none has ended.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_model: String,
    /// Tokens of that answer and of the prompt before it.
    #[serde(default, skip_serializing_if = "none")]
    pub last_tokens: u32,
    /// Mean probability of each arm over the session's earlier decisions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shares: BTreeMap<String, f64>,
    /// What feedback in this session said of each arm: the sum of its values, less 0.5 each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub judged: BTreeMap<String, f64>,
    /// What the session has cost within the time of the policy's budget per session, in USD; 0 without such a budget.
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_usd: f64,
    /// Likewise: tokens of all prompts and answers, calls, and seconds that its requests took.
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_tokens: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_calls: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_s: f64,
}

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KeyView {
    /// Name of the API key as configured, never the key; empty without authentication.
    pub id: String,
    pub tenant: String,
    pub tier: String,
    /// What the key has cost within the time of the policy's budget per key, in USD; 0 without such a budget.
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_usd: f64,
    /// Likewise: tokens of all prompts and answers, calls, and seconds that its requests took.
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_tokens: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_calls: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub spent_s: f64,
    /// The same of the tenant.
    #[serde(default, skip_serializing_if = "zero")]
    pub tenant_spent_usd: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub tenant_spent_tokens: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub tenant_spent_calls: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub tenant_spent_s: f64,
}

impl SessionView {
    /// One of which every part says something, so that its form has every key.
    pub fn whole() -> Self {
        let some = BTreeMap::from([(String::new(), 0.0)]);
        Self {
            id: String::new(),
            turn: 1,
            last_arm: String::new(),
            last_model: "m".to_owned(),
            last_tokens: 1,
            shares: some.clone(),
            judged: some,
            spent_usd: 1.0,
            spent_tokens: 1.0,
            spent_calls: 1.0,
            spent_s: 1.0,
        }
    }
}

impl KeyView {
    /// Likewise.
    pub fn whole() -> Self {
        Self {
            spent_usd: 1.0,
            spent_tokens: 1.0,
            spent_calls: 1.0,
            spent_s: 1.0,
            tenant_spent_usd: 1.0,
            tenant_spent_tokens: 1.0,
            tenant_spent_calls: 1.0,
            tenant_spent_s: 1.0,
            ..Self::default()
        }
    }
}

/// One model's state when the decision was made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelState {
    /// Whether calls may be sent there at all.
    pub available: bool,
    /// Calls under way.
    pub running: u32,
    /// Calls waiting for a place.
    pub waiting: u32,
    /// Recent mean time to the first token, in milliseconds; 0 where nothing was measured yet.
    #[serde(default, skip_serializing_if = "zero")]
    pub ttft_ms: f64,
    /// Recent mean rate of answer tokens per second of a call; 0 where nothing was measured yet.
    #[serde(default, skip_serializing_if = "zero")]
    pub tokens_per_s: f64,
    /// Share of its last calls that failed, 0 to 1, where a breaker counts them.
    #[serde(default, skip_serializing_if = "zero")]
    pub failed_share: f64,
    /// Share of its server's rate limit that is used, 0 to 1, where the server reports one.
    #[serde(default, skip_serializing_if = "zero")]
    pub limit_used: f64,
    /// Tokens of prompts that are still to be computed, of calls under way and of those that wait; of in-process models.
    #[serde(default, skip_serializing_if = "none")]
    pub pending_tokens: u32,
    /// Recent rate at which prompts are computed, and at which each running answer goes on, in tokens per second; of in-process
    /// models, 0 where nothing was measured yet.
    #[serde(default, skip_serializing_if = "zero")]
    pub prefill_tokens_per_s: f64,
    #[serde(default, skip_serializing_if = "zero")]
    pub decode_tokens_per_s: f64,
    /// Tokens of this request's prompt for this model, and how many of them are in its memory already (keys and values), so that
    /// they need not be computed; of in-process models, where the policy asks for either.
    #[serde(default, skip_serializing_if = "none")]
    pub prompt_tokens: u32,
    #[serde(default, skip_serializing_if = "none")]
    pub resident_tokens: u32,
}

impl ModelState {
    /// Seconds to the first token that are expected of a call now: of a model in the process, which knows its pace, until the
    /// prompts before this one are computed and what of this one is not in its memory; of any other the time that it took
    /// lately, once more per call that waits already. 0 where nothing was measured, so that the model is tried. `prompt`:
    /// tokens, where the model's own count is not known.
    pub fn first_token_s(&self, prompt: u32) -> f64 {
        if self.prefill_tokens_per_s > 0.0 {
            let prompt = if self.prompt_tokens > 0 { self.prompt_tokens } else { prompt };
            let fresh = prompt.saturating_sub(self.resident_tokens);
            return (f64::from(self.pending_tokens) + f64::from(fresh)) / self.prefill_tokens_per_s;
        }
        self.ttft_ms / 1000.0 * (1.0 + f64::from(self.waiting))
    }

    /// One of which every part says something, so that its form has every key.
    pub fn whole() -> Self {
        Self {
            available: true,
            running: 1,
            waiting: 1,
            ttft_ms: 1.0,
            tokens_per_s: 1.0,
            failed_share: 1.0,
            limit_used: 1.0,
            pending_tokens: 1,
            prefill_tokens_per_s: 1.0,
            decode_tokens_per_s: 1.0,
            prompt_tokens: 1,
            resident_tokens: 1,
        }
    }
}

fn zero(x: &f64) -> bool {
    *x == 0.0
}

fn none(n: &u32) -> bool {
    *n == 0
}

/// What an in-process model has done since it was loaded. Tokens but `preempted`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Of prompts, that were computed.
    pub prefilled: u64,
    /// Of prompts, whose keys and values were there already.
    pub reused: u64,
    /// Of the reused ones, those of documents that were computed apart.
    pub attached: u64,
    /// Of those, the ones that were read from disk.
    pub loaded: u64,
    /// Of answers.
    pub decoded: u64,
    /// Tokens whose keys and values are kept for reuse now.
    pub kept: u64,
    /// Of prompts and answers, that were computed again because their blocks had been given to others.
    pub recomputed: u64,
    /// Times that a sequence had to give its blocks to others.
    pub preempted: u64,
    /// Of answers, that were guessed ahead, and those of them that were right.
    pub guessed: u64,
    pub guessed_right: u64,
}

/// Which embedder produced a vector. Another embedder is another policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EmbedderIdentity {
    pub name: String,
    /// SHA-256 of the weights.
    pub weights: String,
    pub precision: String,
    pub pooling: String,
    /// Longest text in tokens and how a longer one is cut.
    pub window: String,
    pub dimensions: u32,
}

/// A unit vector and where it is from.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    pub vector: Arc<[f32]>,
    pub embedder: Arc<EmbedderIdentity>,
}

/// All that a policy decides upon, besides its own state. A pure function of it and the state decides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Context {
    pub now: Micros,
    /// Hash of request id and policy name, as 16 hexadecimal digits: JSON numbers hold only 53 bits.
    #[serde(with = "hex_seed")]
    pub seed: u64,
    pub request: RequestView,
    pub signals: Signals,
    pub session: SessionView,
    pub key: KeyView,
    pub fleet: BTreeMap<String, ModelState>,
    /// Recorded and hashed apart from the rest, so that it can be erased.
    #[serde(skip)]
    pub embedding: Option<Embedding>,
}

mod hex_seed {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(seed: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{seed:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = String::deserialize(d)?;
        u64::from_str_radix(&text, 16).map_err(serde::de::Error::custom)
    }
}
