//! What goes in and out of the gateway.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    backend::{BackendError, LocalModel},
    domain::{BestBecause, Chunk, Completion, Context, Decision, DecisionId, KeyView, Need},
};

/// What becomes of a `model` that nothing here is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnknownModel {
    /// 404, listing what is served.
    Error,
    /// The default policy decides.
    Auto,
    /// On to the named fleet entry, with the client's own model name.
    PassThrough(String),
}

/// Who sent a request.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    pub key: KeyView,
    /// The client's `authorization` header, for fleet entries that are configured to forward it.
    pub authorization: Option<String>,
}

/// An answer on its way to the client.
pub struct Answer {
    pub id: DecisionId,
    /// The model that answers; for a stream, the one that began.
    pub model: String,
    pub policy: String,
    pub arm: String,
    pub created: i64,
    /// Why it is only the best answer that there was, where it is.
    pub best_so_far: Option<BestBecause>,
    pub body: AnswerBody,
}

/// Whole or streamed.
pub enum AnswerBody {
    Whole(Completion),
    /// Chunks in order. An `Err` is the last item and must reach the client as an error event, never as `[DONE]`.
    /// Dropping the stream cancels the request.
    Stream(BoxStream<'static, Result<Chunk, GatewayError>>),
}

/// One entry of `GET /v1/models`.
#[derive(Clone, Debug, Serialize)]
pub struct Served {
    pub id: String,
    /// `policy`, `plan` or `model`.
    pub kind: &'static str,
    pub created: i64,
    pub owned_by: String,
}

/// A decision that was asked for without an answer (`POST /v1/decision`, `weir policy explain`).
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    pub id: DecisionId,
    pub decision: Decision,
    pub context: Context,
}

/// Embeddings of several texts.
pub struct Embedded {
    pub model: String,
    pub vectors: Vec<Arc<[f32]>>,
    pub tokens: u32,
}

/// Whether this weir can serve, and what keeps it from it.
#[derive(Clone, Debug, Serialize)]
pub struct Readiness {
    pub ready: bool,
    /// Component name to `ok` or what is wrong with it. A degraded component need not make weir unready.
    pub components: BTreeMap<String, String>,
}

/// One entry of the fleet at this moment.
#[derive(Clone, Debug, Serialize)]
pub struct FleetStatus {
    pub name: String,
    /// `local`, `remote` or `scripted`.
    pub kind: &'static str,
    /// Whether calls may be sent there.
    pub available: bool,
    /// Calls under way, and calls that wait for a place.
    pub running: u32,
    pub waiting: u32,
    /// `closed`, `open` or `half_open`, of entries that are left alone when their calls keep failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<&'static str>,
    /// Share of its server's rate limit that is used, 0 to 1, where the server reports it and some is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_used: Option<f64>,
    /// Calls at once that it is given now, of entries with `adaptive_concurrency`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency_limit: Option<u32>,
    /// Of a model that runs in this process.
    #[serde(flatten)]
    pub local: Option<LocalModel>,
}

/// Why a request got no answer. The HTTP edge maps `kind()` to a status and an OpenAI error object.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GatewayError {
    /// Nothing is served under that name.
    #[error("the model `{name}` is not served here; served are: {}", served.join(", "))]
    UnknownModel { name: String, served: Vec<String> },
    /// The policy refused, or every arm was eliminated.
    #[error("{reason}")]
    Refused { id: DecisionId, reason: String },
    /// Of what the policy would take, nothing can be called now.
    #[error(
        "{reason}; `weir models running` shows how each model stands, and `weir models load NAME` takes one into this process again"
    )]
    Unavailable { id: DecisionId, reason: String },
    /// What the caller may spend leaves no arm.
    #[error("{reason}")]
    OverBudget { id: DecisionId, reason: String },
    /// No arm can do what the request needs.
    #[error("no model of this policy can do what the request asks for: {}", needs.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", "))]
    Incapable { id: DecisionId, needs: Vec<Need> },
    /// The call failed, and so did what was to follow it.
    #[error("{error}")]
    Backend { id: DecisionId, model: String, error: BackendError },
    /// The event log cannot be written.
    #[error("the decision could not be recorded: {0}")]
    NotRecorded(String),
    /// No such decision, or nothing that may be done with it.
    #[error("{0}")]
    NotFound(String),
    /// The request is not one.
    #[error("{message}")]
    Invalid { message: String, param: Option<String> },
    /// Stopping.
    #[error("weir is shutting down; try again in a moment")]
    Draining,
    /// The store cannot be read.
    #[error("the store is not available: {0}")]
    Store(String),
    /// No embedder is loaded.
    #[error("{0}")]
    NoEmbedder(String),
}

impl GatewayError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            GatewayError::UnknownModel { .. } => "unknown_model",
            GatewayError::Refused { .. } => "refused",
            GatewayError::Unavailable { .. } => "unavailable",
            GatewayError::OverBudget { .. } => "over_budget",
            GatewayError::Incapable { .. } => "incapable",
            GatewayError::Backend { error, .. } => error.kind.as_str(),
            GatewayError::NotRecorded(_) => "not_recorded",
            GatewayError::NotFound(_) => "not_found",
            GatewayError::Invalid { .. } => "invalid",
            GatewayError::Draining => "draining",
            GatewayError::Store(_) => "store",
            GatewayError::NoEmbedder(_) => "no_embedder",
        }
    }
}
