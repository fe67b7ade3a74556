//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. The one place that knows which failure has
//! which status, chosen so that the `openai` packages raise their own exception types.
//!
//! | status | exception | what |
//! |---|---|---|
//! | 400 | BadRequestError | the request itself: malformed, too long for the context, asks what no arm can do |
//! | 401 / 403 | AuthenticationError / PermissionDeniedError | no or a wrong key / not allowed, or the policy refused |
//! | 404 | NotFoundError | unknown model, decision or path |
//! | 413 | APIStatusError | body too large |
//! | 429 | RateLimitError | every arm that may answer is out of places, or a budget is spent |
//! | 5xx | InternalServerError | 502 and 504: a backend; 503: weir itself (record, store, shutdown) |

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;
use serde::Serialize;
use utoipa::ToSchema;

use super::wire::parse::Invalid;
use crate::{
    backend::BackendError,
    domain::{DecisionId, ErrorKind},
    gateway::GatewayError,
};

/// OpenAI's name for the id of a request; here the id of its decision.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Read by the `openai` packages: whether to try again on their own account.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// What to tell clients to wait while weir stops.
const DRAIN_RETRY: Duration = Duration::from_secs(2);
/// nginx's status for a client that left; it is only ever logged.
pub const CLIENT_LEFT: u16 = 499;

/// An error on its way to the client.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub class: &'static str,
    pub code: Option<&'static str>,
    pub param: Option<String>,
    pub message: String,
    /// Seconds.
    pub retry_after: Option<u32>,
    /// False where another try cannot help although the status suggests it.
    pub retry: bool,
    pub id: Option<DecisionId>,
    /// An upstream's own error object, sent instead of ours.
    pub body: Option<Box<Bytes>>,
}

/// The object that clients get.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

/// What went wrong, for people (`message`) and for programs (the rest).
#[derive(Serialize, ToSchema)]
struct ErrorObject<'a> {
    message: &'a str,
    /// `invalid_request_error`, `authentication_error`, `permission_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    class: &'a str,
    /// Path of the field at fault.
    param: Option<&'a str>,
    code: Option<&'a str>,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    pub fn new(status: StatusCode, class: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            class,
            code: Some(code),
            param: None,
            message: message.into(),
            retry_after: None,
            retry: true,
            id: None,
            body: None,
        }
    }

    /// 400.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, code, message)
    }

    /// 401.
    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", message)
    }

    /// 403.
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", code, message)
    }

    /// 404.
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, code, message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("The body is larger than {limit} bytes; send less, or raise `body_limit` in weir.yaml.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "request_too_large", message)
    }

    /// 500, for what should not happen.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal", message)
    }

    /// Fixed label for logs.
    pub fn kind(&self) -> &'static str {
        self.code.unwrap_or(self.class)
    }

    /// The JSON that the client gets.
    pub fn json(&self) -> Bytes {
        if let Some(body) = &self.body {
            return Bytes::clone(body);
        }
        let body = ErrorBody {
            error: ErrorObject {
                message: &self.message,
                class: self.class,
                param: self.param.as_deref(),
                code: self.code,
            },
        };
        serde_json::to_vec(&body).map(Bytes::from).unwrap_or_else(|_| Bytes::from_static(b"{\"error\":{}}"))
    }

    fn param(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    fn of(mut self, id: DecisionId) -> Self {
        self.id = Some(id);
        self
    }

    fn after(mut self, wait: Option<Duration>) -> Self {
        // Whole seconds, rounded up: sooner would be too soon.
        let whole = |wait: Duration| wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
        self.retry_after = wait.map(|wait| u32::try_from(whole(wait)).unwrap_or(u32::MAX));
        self
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        let mut error = Self::invalid("", invalid.message);
        error.code = invalid.code;
        error.param = invalid.param;
        error
    }
}

impl From<GatewayError> for ApiError {
    fn from(error: GatewayError) -> Self {
        use StatusCode as S;
        let kind = error.kind();
        let message = error.to_string();
        match error {
            GatewayError::UnknownModel { .. } => Self::not_found("model_not_found", message).param("model"),
            GatewayError::Unavailable { id, .. } => {
                Self::new(S::SERVICE_UNAVAILABLE, SERVER, "model_unavailable", message).of(id)
            }
            GatewayError::Refused { id, .. } => Self::forbidden("policy_refused", message).of(id),
            GatewayError::OverBudget { id, .. } => {
                // As OpenAI says it; the money does not come back by trying again.
                let mut error = Self::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "insufficient_quota", message);
                error.retry = false;
                error.of(id)
            }
            GatewayError::Incapable { id, .. } => Self::invalid("unsupported_by_models", message).of(id),
            GatewayError::Backend { id, error, .. } => backend(error).of(id),
            GatewayError::NotFound(_) => Self::not_found("not_found", message),
            GatewayError::Invalid { param, .. } => {
                let mut error = Self::invalid("invalid_value", message);
                error.param = param;
                error
            }
            GatewayError::Draining => Self::new(S::SERVICE_UNAVAILABLE, SERVER, kind, message).after(Some(DRAIN_RETRY)),
            GatewayError::NotRecorded(_) | GatewayError::Store(_) => {
                Self::new(S::SERVICE_UNAVAILABLE, SERVER, kind, message)
            }
            GatewayError::NoEmbedder(_) => {
                let mut error = Self::new(S::SERVICE_UNAVAILABLE, SERVER, kind, message);
                // It will not come by itself.
                error.retry = false;
                error
            }
        }
    }
}

fn backend(error: BackendError) -> ApiError {
    use StatusCode as S;
    let (status, class, code) = match error.kind {
        ErrorKind::Timeout => (S::GATEWAY_TIMEOUT, SERVER, "timeout"),
        ErrorKind::RateLimited => (S::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded"),
        ErrorKind::ContextTooLong => (S::BAD_REQUEST, INVALID, "context_length_exceeded"),
        ErrorKind::BadRequest => (S::BAD_REQUEST, INVALID, "bad_request"),
        ErrorKind::Unsupported => (S::BAD_REQUEST, INVALID, "unsupported"),
        ErrorKind::ModelNotFound => (S::NOT_FOUND, INVALID, "model_not_found"),
        ErrorKind::Cancelled => (S::from_u16(CLIENT_LEFT).unwrap_or(S::BAD_REQUEST), SERVER, "cancelled"),
        ErrorKind::BreakerOpen => (S::SERVICE_UNAVAILABLE, SERVER, "model_unavailable"),
        ErrorKind::Internal => (S::INTERNAL_SERVER_ERROR, SERVER, "internal"),
        ErrorKind::ServerError | ErrorKind::Unreachable | ErrorKind::Cut | ErrorKind::Garbage | ErrorKind::Auth => {
            (S::BAD_GATEWAY, SERVER, error.kind.as_str())
        }
    };
    let mut out = ApiError::new(status, class, code, error.message).after(error.retry_after);
    match error.kind {
        ErrorKind::ContextTooLong => out = out.param("messages"),
        ErrorKind::ModelNotFound => out = out.param("model"),
        _ => {}
    }
    // For what is the request's fault, the upstream's own words say it best: fields that weir has never heard of included.
    let theirs = matches!(
        error.kind,
        ErrorKind::BadRequest | ErrorKind::ContextTooLong | ErrorKind::ModelNotFound | ErrorKind::Unsupported
    );
    if theirs && let Some(body) = error.body.filter(|body| is_error_object(body)) {
        out.body = Some(Box::new(body));
        if error.kind == ErrorKind::BadRequest
            && let Some(status) = error.status.filter(|s| (400..500).contains(s)).and_then(|s| S::from_u16(s).ok())
        {
            out.status = status;
        }
    }
    out
}

/// Whether `body` is JSON of the shape that clients know how to read.
fn is_error_object(body: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Shape {
        #[serde(rename = "error")]
        _error: serde::de::IgnoredAny,
    }
    super::wire::parse::object::<Shape>(body).is_ok()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(id) = self.id {
            insert(headers, REQUEST_ID, &id.to_string());
        }
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait));
        }
        if !self.retry {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"weir\""));
            }
            // What is left of the body is not read.
            StatusCode::PAYLOAD_TOO_LARGE => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        let kind = self.kind();
        // Messages of 4xx may quote the request, so only their label is logged; those of 5xx never hold prompt text.
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), kind, id = ?self.id, message = %self.message, "request failed");
        } else {
            tracing::debug!(status = self.status.as_u16(), kind, param = ?self.param, id = ?self.id, "request refused");
        }
        response
    }
}

/// Puts a header whose value may hold any text; leaves it out where HTTP cannot carry it.
pub fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_whole_seconds_however_long() {
        let told = |wait: f64| ApiError::internal("").after(Some(Duration::from_secs_f64(wait))).retry_after;
        assert_eq!([told(0.0), told(0.2), told(3.0)], [Some(0), Some(1), Some(3)]);
        assert_eq!([told(4_294_967_294.5), told(4_294_967_295.5), told(1e15)], [Some(u32::MAX); 3]);
    }
}
