//! A whole answer as OpenAI's `chat.completion`.

use bytes::Bytes;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::{Choice, DecisionId, FinishReason, TokenLogprob, Usage};

/// OpenAI's stand-in for a probability of zero, whose logarithm JSON cannot hold.
const LOG_OF_ZERO: f32 = -9999.0;

/// A whole answer.
#[derive(Serialize, ToSchema)]
#[schema(as = ChatCompletion)]
pub struct CompletionBody<'a> {
    /// `chatcmpl-` and the id of the decision.
    id: String,
    #[schema(example = "chat.completion")]
    object: &'static str,
    /// Seconds since the Unix epoch.
    created: i64,
    /// The model that answered.
    model: &'a str,
    choices: Vec<ChoiceBody<'a>>,
    usage: UsageBody,
}

/// One of the `n` answers.
#[derive(Serialize, ToSchema)]
#[schema(as = Choice)]
struct ChoiceBody<'a> {
    index: u32,
    message: AnswerMessage<'a>,
    logprobs: Option<LogprobsBody<'a>>,
    /// `stop`, `length`, `tool_calls` or `content_filter`.
    finish_reason: &'static str,
}

/// What the model said.
#[derive(Serialize, ToSchema)]
struct AnswerMessage<'a> {
    #[schema(example = "assistant")]
    role: &'static str,
    content: &'a str,
    refusal: Option<&'a str>,
}

/// Tokens of a request.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[schema(as = Usage)]
pub struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

/// Prompt tokens by kind.
#[derive(Clone, Copy, Serialize, ToSchema)]
struct PromptTokensDetails {
    /// Tokens whose KV the backend had already.
    cached_tokens: u32,
    /// Of those, the ones of documents that were reused where they stand.
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_tokens: Option<u32>,
    /// First tokens of such documents, which were computed again.
    #[serde(skip_serializing_if = "Option::is_none")]
    recomputed_tokens: Option<u32>,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: usage.cached_tokens,
                chunk_tokens: Some(usage.chunk_tokens).filter(|n| *n > 0),
                recomputed_tokens: Some(usage.recomputed_tokens).filter(|n| *n > 0),
            },
        }
    }
}

/// Log-probabilities of a choice's tokens.
#[derive(Serialize, ToSchema)]
#[schema(as = Logprobs)]
pub struct LogprobsBody<'a> {
    content: Vec<TokenBody<'a>>,
    refusal: Option<&'a str>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TokenLogprob)]
struct TokenBody<'a> {
    token: &'a str,
    logprob: f32,
    bytes: &'a [u8],
    top_logprobs: Vec<TopBody<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TopLogprob)]
struct TopBody<'a> {
    token: &'a str,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> LogprobsBody<'a> {
    pub fn new(tokens: &'a [TokenLogprob]) -> Self {
        let content = tokens
            .iter()
            .map(|t| TokenBody {
                token: &t.token,
                logprob: finite(t.logprob),
                bytes: &t.bytes,
                top_logprobs: t
                    .top
                    .iter()
                    .map(|top| TopBody { token: &top.token, logprob: finite(top.logprob), bytes: &top.bytes })
                    .collect(),
            })
            .collect();
        Self { content, refusal: None }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOG_OF_ZERO }
}

/// The JSON of a whole answer. `logprobs` says whether the client asked for them.
///
/// # Errors
/// None in practice: every field can be JSON.
pub fn encode(
    id: DecisionId,
    model: &str,
    created: i64,
    choices: &[Choice],
    usage: Usage,
    logprobs: bool,
) -> Result<Bytes, serde_json::Error> {
    let choices = choices
        .iter()
        .map(|choice| ChoiceBody {
            index: choice.index,
            message: AnswerMessage { role: "assistant", content: &choice.text, refusal: None },
            logprobs: logprobs.then(|| LogprobsBody::new(&choice.logprobs)),
            finish_reason: finish_reason(choice.finish),
        })
        .collect();
    let body = CompletionBody {
        id: id.completion_id(),
        object: "chat.completion",
        created,
        model,
        choices,
        usage: usage.into(),
    };
    serde_json::to_vec(&body).map(Bytes::from)
}

/// OpenAI's word for why a choice ended. A cancelled choice has no client; should one be shown all the same, it was cut.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Cancelled => FinishReason::Length.as_str(),
        reason => reason.as_str(),
    }
}
