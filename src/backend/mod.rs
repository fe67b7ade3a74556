//! Backends: where calls run. One trait, three implementations: [`local`] (the in-process engine), [`remote`] (any
//! OpenAI-compatible server), [`scripted`] (deterministic, for tests, demonstrations and development without models).

mod guarded;
mod limited;
pub mod local;
pub mod remote;
pub mod scripted;
mod slots;
mod status;
pub mod tally;
pub mod wire;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::Serialize;

pub use guarded::{BreakerChange, Guarded, Listener};
pub use limited::Limited;

use crate::{
    cascade::breaker::BreakerState,
    domain::{CallSpec, Chunk, Completion, Counters, DecisionId, ErrorKind, KvAnswer, KvCommand, ModelState, Request},
};

/// One call, ready to be made.
#[derive(Clone, Debug)]
pub struct Call {
    pub id: DecisionId,
    /// Place in the request's sequence of calls; with `id` the seed of whatever is sampled without a given seed.
    pub index: u32,
    pub spec: CallSpec,
    pub request: Arc<Request>,
    /// `authorization` of the client, where the fleet entry is configured to forward it.
    pub client_authorization: Option<String>,
    /// When nobody waits for the answer any more: the request's deadline. Dispatch cancels what is late; a backend that queues may
    /// let the more urgent go first.
    pub deadline: Option<Instant>,
}

/// What a backend gives back once a call has been accepted.
pub enum Reply {
    Whole {
        completion: Completion,
        model_reported: Option<String>,
    },
    /// Chunks in order; ends after [`Chunk::Usage`] when all went right, else with an error. Dropping the stream cancels
    /// the call, on the backend too.
    Stream {
        chunks: BoxStream<'static, Result<Chunk, BackendError>>,
        model_reported: Option<String>,
    },
}

/// A failed call.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {message}", kind.as_str())]
pub struct BackendError {
    pub kind: ErrorKind,
    /// For a person; names the model and the remedy where there is one. Never holds prompt text.
    pub message: String,
    /// The upstream's status code.
    pub status: Option<u16>,
    pub retry_after: Option<Duration>,
    /// The upstream's own error body, passed to the client for kinds that are the request's fault.
    pub body: Option<Bytes>,
}

impl BackendError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), status: None, retry_after: None, body: None }
    }
}

/// A model that runs in this process.
#[derive(Clone, Debug, Serialize)]
pub struct LocalModel {
    pub file: String,
    /// Whether it is in memory, and so takes calls.
    pub loaded: bool,
    #[serde(flatten)]
    pub info: LocalInfo,
}

/// What a model file is.
#[derive(Clone, Debug, Serialize)]
pub struct LocalInfo {
    pub architecture: String,
    /// `weir`, or `candle` for architectures that our own engine does not have: slower, and without reuse of prompts.
    pub computed_by: &'static str,
    pub parameters: u64,
    pub quantisation: String,
    /// Longest prompt plus answer, in tokens.
    pub context: usize,
    /// Bytes of weights in memory, and of keys and values per token.
    pub weight_bytes: usize,
    pub kv_bytes_per_token: usize,
    /// Whether marked documents are reused, how, and at what cost; or why not.
    pub chunk_reuse: String,
}

/// A prompt as a model sees it, without what a plan would put before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptState {
    pub tokens: u32,
    /// Tokens whose keys and values are there already.
    pub resident: u32,
}

/// Where one fleet entry runs.
///
/// Contract: `start` either returns a [`Reply`] or fails; it never retries (dispatch does, by the plan). It may be called
/// from many tasks at once and queues or fails with `rate_limited` when it has no place. Dropping the future, or the
/// reply's stream, cancels the call. Whether the reply is whole or a stream follows `request.stream`.
#[async_trait]
pub trait Backend: Send + Sync {
    /// `local`, `remote` or `scripted`.
    fn kind(&self) -> &'static str;

    /// Makes the call.
    async fn start(&self, call: Call) -> Result<Reply, BackendError>;

    /// Load and availability at this moment; cheap, called for every decision.
    fn state(&self) -> ModelState;

    /// The backend that this one stands before, where it does: what it does not answer itself, that one does.
    fn inner(&self) -> Option<&dyn Backend> {
        None
    }

    /// What of a request's prompt is in memory, asked for a decision that depends on it; `None` where that is not known, as of
    /// remote servers. Tokenises the prompt.
    async fn prompt(&self, request: &Arc<Request>) -> Option<PromptState> {
        self.inner()?.prompt(request).await
    }

    /// Of a model that runs in this process: what it is, and whether it is in memory.
    fn local(&self) -> Option<LocalModel> {
        self.inner()?.local()
    }

    /// Takes a model that runs in this process into memory, or out of it once its calls have ended; others go on meanwhile.
    /// Does nothing where it is so already.
    async fn set_loaded(&self, loaded: bool) -> Result<(), BackendError> {
        if let Some(inner) = self.inner() {
            return inner.set_loaded(loaded).await;
        }
        let message = "only models that run in this process are loaded and unloaded";
        Err(BackendError::new(ErrorKind::Unsupported, message))
    }

    /// What a model in this process keeps of keys and values: asked for, computed beforehand, let go.
    async fn kv(&self, command: KvCommand) -> Result<KvAnswer, BackendError> {
        if let Some(inner) = self.inner() {
            return inner.kv(command).await;
        }
        let message = "only models that run in this process keep keys and values here";
        Err(BackendError::new(ErrorKind::Unsupported, message))
    }

    /// The breaker before it; `None` where there is none.
    fn breaker(&self) -> Option<BreakerState> {
        self.inner()?.breaker()
    }

    /// How many calls at once it is given now, where that is adapted to what its server bears.
    fn concurrency_limit(&self) -> Option<u32> {
        self.inner()?.concurrency_limit()
    }

    /// What has been computed and reused; `None` where that is not known, as of remote servers.
    fn counters(&self) -> Option<Counters> {
        self.inner()?.counters()
    }
}
