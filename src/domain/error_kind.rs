//! The kinds of failure that a call can end in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong with a call. A closed list: policies' `fallback.on` names these, records count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No answer, or no next byte, in time.
    Timeout,
    /// 429, or no place in the queue.
    RateLimited,
    /// 5xx.
    ServerError,
    /// No connection.
    Unreachable,
    /// The stream ended before the answer did.
    Cut,
    /// The server answered something that is no completion.
    Garbage,
    /// 401 or 403: our key, not the client's request.
    Auth,
    /// Prompt plus answer do not fit.
    ContextTooLong,
    /// 4xx: the request itself is wrong; another try anywhere will fail too.
    BadRequest,
    /// 404 for the model.
    ModelNotFound,
    /// The backend cannot do what was asked.
    Unsupported,
    /// The model is left alone for a while, as its calls kept failing.
    BreakerOpen,
    /// weir is stopping, or the client left.
    Cancelled,
    /// A defect of ours.
    Internal,
}

impl ErrorKind {
    /// All kinds, in the order of the documentation.
    pub const ALL: [ErrorKind; 14] = [
        ErrorKind::Timeout,
        ErrorKind::RateLimited,
        ErrorKind::ServerError,
        ErrorKind::Unreachable,
        ErrorKind::Cut,
        ErrorKind::Garbage,
        ErrorKind::Auth,
        ErrorKind::ContextTooLong,
        ErrorKind::BadRequest,
        ErrorKind::ModelNotFound,
        ErrorKind::Unsupported,
        ErrorKind::BreakerOpen,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ];

    /// The label in records, metrics and policies.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::Timeout => "timeout",
            ErrorKind::RateLimited => "rate_limited",
            ErrorKind::ServerError => "server_error",
            ErrorKind::Unreachable => "unreachable",
            ErrorKind::Cut => "cut",
            ErrorKind::Garbage => "garbage",
            ErrorKind::Auth => "auth",
            ErrorKind::ContextTooLong => "context_too_long",
            ErrorKind::BadRequest => "bad_request",
            ErrorKind::ModelNotFound => "model_not_found",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::BreakerOpen => "breaker_open",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
