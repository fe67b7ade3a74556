//! What can go wrong in the engine, said so that a person knows what to do. Never holds prompt text.

use std::{io, path::PathBuf};

use crate::domain::ErrorKind;

/// An error of loading or of generating.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The model file cannot be opened or read.
    #[error("{}: cannot be read: {reason}; check the path, or fetch the model again with `weir models fetch`", path.display())]
    Io { path: PathBuf, reason: String },
    /// The file is not whole.
    #[error(
        "{}: the model file is damaged: {reason}; check it with `weir models verify` and fetch it again with \
         `weir models fetch`", path.display()
    )]
    Corrupt { path: PathBuf, reason: String },
    /// The file is sound, but this engine cannot run it.
    #[error("{}: this model cannot be run: {reason}; choose a GGUF file or a folder of safetensors of a llama, qwen2, qwen3 or gemma3 model, or a GGUF file of a phi2 or phi3 model", path.display())]
    UnsupportedModel { path: PathBuf, reason: String },
    /// Options that make no sense together with the model.
    #[error("engine options: {0}")]
    Options(String),
    /// The request cannot be served as it stands.
    #[error("{0}")]
    BadRequest(String),
    /// The model's chat template refused the messages, or failed.
    #[error("the model's chat template cannot render these messages: {0}")]
    Template(String),
    /// Prompt plus at least one token do not fit.
    #[error(
        "the prompt has {} tokens; with at least one token for the answer that exceeds this model's context of \
         {context} tokens: shorten the prompt", at_least(*prompt, *exact)
    )]
    PromptTooLong { prompt: usize, exact: bool, context: usize },
    /// No place to wait.
    #[error(
        "the engine is busy: {running} sequences run and {waiting} requests wait (at most {max_waiting}); try again shortly"
    )]
    Busy { running: usize, waiting: usize, max_waiting: usize },
    /// The forward pass gave NaN or infinity.
    #[error(
        "the model computed numbers that are not finite: its weights are damaged; check them with `weir models verify`"
    )]
    NotFinite,
    /// candle could not compute a step of a model that runs through it.
    #[error("candle failed: {0}; report it with the model's name, and use another model until then")]
    Candle(String),
    /// A [`super::sampler::TokenMask`] left no token.
    #[error("no token may come next by the rule that the answer must follow: the rule has a dead end")]
    NothingAllowed,
    /// The engine's thread has ended.
    #[error("the engine has stopped; restart weir, and report what its log says before this")]
    Stopped,
    /// The tokenizer failed on a text that it should take.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

fn at_least(prompt: usize, exact: bool) -> String {
    if exact { prompt.to_string() } else { format!("at least {prompt}") }
}

impl EngineError {
    pub(crate) fn io(path: &std::path::Path, error: &io::Error) -> Self {
        EngineError::Io { path: path.to_owned(), reason: error.to_string() }
    }

    /// The kind that records, metrics and policies count it under.
    pub fn kind(&self) -> ErrorKind {
        match self {
            EngineError::Io { .. }
            | EngineError::Corrupt { .. }
            | EngineError::Options(_)
            | EngineError::NotFinite
            | EngineError::Candle(_)
            | EngineError::NothingAllowed
            | EngineError::Tokenizer(_) => ErrorKind::Internal,
            EngineError::UnsupportedModel { .. } => ErrorKind::Unsupported,
            EngineError::BadRequest(_) | EngineError::Template(_) => ErrorKind::BadRequest,
            EngineError::PromptTooLong { .. } => ErrorKind::ContextTooLong,
            EngineError::Busy { .. } => ErrorKind::RateLimited,
            EngineError::Stopped => ErrorKind::ServerError,
        }
    }
}
