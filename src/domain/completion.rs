//! What comes back: whole completions and streamed chunks, from any backend.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Where token counts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    /// Counted by the backend.
    Reported,
    /// The backend said nothing; counted by us, roughly.
    #[default]
    Estimated,
}

/// Tokens of one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Of the prompt tokens, those whose KV the backend had already.
    pub cached_tokens: u32,
    /// Of the cached ones, those of documents that were computed apart; the others are a prompt's beginning that was there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub chunk_tokens: u32,
    /// First tokens of such documents, which were computed all the same.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub recomputed_tokens: u32,
    /// Of requests with marked documents to models in the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_reuse: Option<ChunkReuse>,
    pub completion_tokens: u32,
    pub source: UsageSource,
}

impl Usage {
    /// Tokens of prompt and answer together.
    pub fn total(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.completion_tokens)
    }
}

/// Whether a request's marked documents were reused, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkReuse {
    Reused,
    /// All of them are too short or too long.
    OutOfSize,
    /// The request asked for an exact computation.
    AskedExact,
    /// What it costs this model was never measured (`weir kv calibrate`).
    NoFidelityRecord,
    /// What was measured is worse than what is configured.
    BelowBound,
    /// Switched off.
    Off,
    /// Not with this model.
    Unsupported,
}

impl ChunkReuse {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reused => "reused",
            Self::OutOfSize => "out_of_size",
            Self::AskedExact => "asked_exact",
            Self::NoFidelityRecord => "no_fidelity_record",
            Self::BelowBound => "below_bound",
            Self::Off => "off",
            Self::Unsupported => "unsupported",
        }
    }
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
    ToolCalls,
    ContentFilter,
    /// The client left, or the plan stopped this call.
    Cancelled,
}

impl FinishReason {
    /// OpenAI's word. A cancelled choice never reaches a client; its word is only for records.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::ContentFilter => "content_filter",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// An alternative at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// One sampled token and how likely it was under the model's unscaled distribution (natural logarithm).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top: Vec<TopLogprob>,
    /// Entropy of that distribution over all tokens, in nats; `None` where only the likeliest are known, as of remote servers.
    pub entropy: Option<f32>,
}

/// A piece of a streamed answer.
#[derive(Clone, Debug)]
pub enum Chunk {
    /// New text of one choice; never half a character. May be empty when only log-probabilities are carried.
    Text { choice: u32, text: String, logprobs: Vec<TokenLogprob> },
    /// A choice has ended.
    Finish { choice: u32, reason: FinishReason },
    /// The call has ended; always the last chunk of a call that went right.
    Usage(Usage),
    /// One SSE event's data as a remote server sent it: a `chat.completion.chunk` in JSON, spliced to the client with
    /// only its `id` (and `model`, where the plan renames it) rewritten.
    Wire(Bytes),
}

/// One whole choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub index: u32,
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
    pub finish: FinishReason,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub enum Completion {
    /// From an engine of ours.
    Choices { choices: Vec<Choice>, usage: Usage },
    /// A remote server's `chat.completion` JSON, passed on with only `id` rewritten.
    Wire { body: Bytes, usage: Usage },
}

impl Completion {
    pub fn usage(&self) -> Usage {
        match self {
            Completion::Choices { usage, .. } | Completion::Wire { usage, .. } => *usage,
        }
    }
}
