//! What an HTTP status, its headers and an OpenAI error object mean: one of the closed list of kinds. Used for remote
//! servers, and by scripted backends that pretend to be one.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

use super::{BackendError, wire::Field};
use crate::domain::ErrorKind;

/// The kind of failure that a status code says by itself.
pub fn kind_of(status: u16) -> ErrorKind {
    match status {
        401 | 403 => ErrorKind::Auth,
        404 => ErrorKind::ModelNotFound,
        408 => ErrorKind::Timeout,
        429 => ErrorKind::RateLimited,
        501 => ErrorKind::Unsupported,
        400..=499 => ErrorKind::BadRequest,
        500..=599 => ErrorKind::ServerError,
        _ => ErrorKind::Garbage,
    }
}

/// The status that an error object names itself, as gateways in front of other servers do.
fn status_in(error: &ErrorObject) -> Option<u16> {
    let number = match &error.code {
        Some(serde_json::Value::Number(n)) => n.as_u64(),
        Some(serde_json::Value::String(s)) => s.parse().ok(),
        _ => None,
    };
    number.and_then(|n| u16::try_from(n).ok()).filter(|n| (400..600).contains(n))
}

/// An OpenAI error object; servers differ in which of its fields they fill, and with what.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ErrorObject {
    #[serde(default)]
    message: Option<serde_json::Value>,
    #[serde(default, rename = "type")]
    class: Option<serde_json::Value>,
    #[serde(default)]
    code: Option<serde_json::Value>,
}

impl ErrorObject {
    /// The error in `body`, whose fields are known: as [`ErrorObject::in_body`], and next to nothing where there is none.
    pub(super) fn in_fields(fields: &[Field<'_>], body: &[u8]) -> Option<Self> {
        let is_error = |f: &Field<'_>| match &*f.key {
            "error" => f.value != "null",
            "object" => f.value == "\"error\"",
            _ => false,
        };
        if fields.iter().any(is_error) { Self::in_body(body) } else { None }
    }

    /// The error in `body`: `{"error": {...}}`, `{"error": "text"}`, or vLLM's older form where the body is the object.
    pub(super) fn in_body(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Body {
            error: serde_json::Value,
        }
        if let Ok(Body { error }) = serde_json::from_slice::<Body>(body) {
            return match error {
                serde_json::Value::Null => None,
                serde_json::Value::Object(_) => serde_json::from_value(error).ok(),
                text => Some(Self { message: Some(text), ..Self::default() }),
            };
        }
        #[derive(Deserialize)]
        struct Flat {
            object: String,
            #[serde(flatten)]
            error: ErrorObject,
        }
        let flat = serde_json::from_slice::<Flat>(body).ok()?;
        (flat.object == "error").then_some(flat.error)
    }

    fn word(value: &Option<serde_json::Value>) -> Option<&str> {
        value.as_ref().and_then(serde_json::Value::as_str)
    }

    /// Whether the error says that prompt and answer do not fit: by OpenAI's code, llama.cpp's type, or the sentences that
    /// vLLM, SGLang, TGI and Anthropic's compatible endpoint use.
    fn is_context_too_long(&self) -> bool {
        const LABELS: [&str; 3] = ["context_length_exceeded", "exceed_context_size_error", "context_too_long"];
        const SENTENCES: [&str; 5] = [
            "maximum context length",
            "context length exceeded",
            "exceeds the available context size",
            "longer than the model's context length",
            "prompt is too long",
        ];
        [&self.code, &self.class].into_iter().any(|v| Self::word(v).is_some_and(|w| LABELS.contains(&w)))
            || Self::word(&self.message).is_some_and(|m| {
                let m = m.to_lowercase();
                SENTENCES.iter().any(|s| m.contains(s))
            })
    }

    fn kind(&self, status: Option<u16>) -> ErrorKind {
        if self.is_context_too_long() {
            return ErrorKind::ContextTooLong;
        }
        match (status, Self::word(&self.code), Self::word(&self.class)) {
            (Some(429), ..) => ErrorKind::RateLimited,
            (_, Some("model_not_found"), _) => ErrorKind::ModelNotFound,
            (Some(status), ..) => kind_of(status),
            (None, Some("rate_limit_exceeded" | "insufficient_quota"), _) => ErrorKind::RateLimited,
            (None, Some("invalid_api_key"), _) => ErrorKind::Auth,
            (None, _, Some("invalid_request_error" | "BadRequestError")) => ErrorKind::BadRequest,
            (None, ..) => ErrorKind::ServerError,
        }
    }

    /// The error's code or type, where it is a mere label: messages may quote the prompt, labels do not.
    fn label(&self) -> Option<&str> {
        [&self.code, &self.class].into_iter().filter_map(Self::word).find(|w| {
            !w.is_empty() && w.len() <= 64 && w.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        })
    }
}

/// The failure that a server reported with `status` and `body`. `whose` names model and server.
pub(super) fn reported(whose: &str, status: u16, retry_after: Option<Duration>, body: Bytes) -> BackendError {
    let object = ErrorObject::in_body(&body);
    let kind = object.as_ref().map_or_else(|| kind_of(status), |e| e.kind(Some(status)));
    let label = object.as_ref().and_then(ErrorObject::label).map(|l| format!(" ({l})")).unwrap_or_default();
    let hint = match kind {
        ErrorKind::Auth => "; check the entry's API key",
        ErrorKind::ModelNotFound => "; check the entry's url and model name",
        ErrorKind::Garbage => "; weir follows no redirects: check the entry's url",
        _ => "",
    };
    BackendError {
        kind,
        message: format!("{whose} answered with status {status}{label}{hint}"),
        status: Some(status),
        retry_after,
        body: (!body.is_empty() && object.is_some()).then_some(body),
    }
}

/// The failure inside a stream, or inside a body with status 200.
pub(super) fn reported_inside(whose: &str, object: &ErrorObject, body: Bytes) -> BackendError {
    let status = status_in(object);
    let label = object.label().map(|l| format!(" ({l})")).unwrap_or_default();
    BackendError {
        kind: object.kind(status),
        message: format!("{whose} reported an error in its answer{label}"),
        status,
        retry_after: None,
        body: Some(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: u16, body: &'static str) -> BackendError {
        reported("model `m`", status, None, Bytes::from_static(body.as_bytes()))
    }

    #[test]
    fn statuses_have_kinds() {
        for (status, kind) in [
            (301, ErrorKind::Garbage),
            (400, ErrorKind::BadRequest),
            (401, ErrorKind::Auth),
            (403, ErrorKind::Auth),
            (404, ErrorKind::ModelNotFound),
            (408, ErrorKind::Timeout),
            (413, ErrorKind::BadRequest),
            (422, ErrorKind::BadRequest),
            (429, ErrorKind::RateLimited),
            (500, ErrorKind::ServerError),
            (501, ErrorKind::Unsupported),
            (503, ErrorKind::ServerError),
            (529, ErrorKind::ServerError),
        ] {
            assert_eq!(of(status, "<html>").kind, kind, "{status}");
        }
    }

    #[test]
    fn a_prompt_that_does_not_fit_is_told_from_a_bad_request() {
        for body in [
            r#"{"error":{"message":"x","type":"invalid_request_error","code":"context_length_exceeded"}}"#,
            r#"{"error":{"code":400,"message":"the request exceeds the available context size. try increasing it","type":"exceed_context_size_error"}}"#,
            r#"{"object":"error","message":"This model's maximum context length is 8192 tokens.","type":"BadRequestError","code":400}"#,
        ] {
            assert_eq!(of(400, body).kind, ErrorKind::ContextTooLong, "{body}");
        }
        assert_eq!(of(400, r#"{"error":{"message":"no such field"}}"#).kind, ErrorKind::BadRequest);
    }

    #[test]
    fn the_message_names_labels_and_never_the_servers_sentence() {
        let error = of(400, r#"{"error":{"message":"bad word: SECRET","type":"invalid_request_error"}}"#);
        assert_eq!(error.message, "model `m` answered with status 400 (invalid_request_error)");
        assert!(error.body.unwrap().windows(6).any(|w| w == b"SECRET"));
        let error = of(400, r#"{"error":{"type":"a sentence with SECRET"}}"#);
        assert!(!error.message.contains("SECRET"));
        assert_eq!(of(502, "<html>").body, None);
    }

    #[test]
    fn errors_inside_answers_have_kinds() {
        let inside = |body: &'static str| {
            let object = ErrorObject::in_body(body.as_bytes()).unwrap();
            reported_inside("m", &object, Bytes::from_static(body.as_bytes())).kind
        };
        assert_eq!(inside(r#"{"error":{"message":"x","code":429}}"#), ErrorKind::RateLimited);
        assert_eq!(inside(r#"{"error":{"message":"x","code":"502"}}"#), ErrorKind::ServerError);
        assert_eq!(inside(r#"{"error":"boom"}"#), ErrorKind::ServerError);
        assert_eq!(inside(r#"{"error":{"type":"invalid_request_error"}}"#), ErrorKind::BadRequest);
        assert!(ErrorObject::in_body(br#"{"error":null,"choices":[]}"#).is_none());
        assert!(ErrorObject::in_body(br#"{"object":"chat.completion"}"#).is_none());
    }
}
