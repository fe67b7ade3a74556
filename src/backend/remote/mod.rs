//! Any OpenAI-compatible server. The client's own body goes there with `model` and what the plan overrides spliced in
//! ([`body`]); the answer comes back as it is, but for its `id` ([`stream`], [`crate::backend::wire`]). Never retries.

mod body;
mod client;
mod config;
mod rate_limits;
mod sse;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Method, Response, Uri,
    body::Incoming,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER},
};
use tokio::time::Instant;

use super::{
    Backend, BackendError, Call, Reply,
    slots::Slots,
    status::{self, ErrorObject},
    tally, wire,
};
use crate::domain::{Completion, ErrorKind, ModelState, Request, Usage, UsageSource};
pub use config::{RemoteConfig, RemoteError, Secret, UpstreamModel};

use client::HttpClient;
use config::{endpoint, headers};
use rate_limits::RateLimits;
use stream::{RemoteStream, Times};

/// The longest answer that is taken whole.
const MAX_BODY: usize = 64 << 20;
/// The longest error body that is kept for the client.
const MAX_ERROR_BODY: usize = 64 << 10;

/// A remote fleet entry, ready for calls.
pub struct RemoteBackend {
    config: RemoteConfig,
    client: HttpClient,
    completions: Uri,
    embeddings: Uri,
    /// Sent with every call; `accept` and a forwarded key are set per call.
    headers: HeaderMap,
    /// Model and server, as messages name them.
    whose: Arc<str>,
    slots: Slots,
    limits: RateLimits,
}

impl RemoteBackend {
    /// Checks the configuration and prepares the client; connects to nothing yet.
    ///
    /// # Errors
    /// When the URL or a header cannot be used, or TLS is not to be had.
    pub fn new(config: RemoteConfig) -> Result<Self, RemoteError> {
        let wrong = |why: String| RemoteError::Url { model: config.name.clone(), url: config.url.clone(), why };
        let completions = endpoint(&config.url, "chat/completions").map_err(wrong)?;
        let embeddings = endpoint(&config.url, "embeddings").map_err(wrong)?;
        let client = client::client(&completions, config.connect_timeout)
            .map_err(|source| RemoteError::Tls { model: config.name.clone(), source })?;
        let headers = headers(&config)?;
        let server = completions.authority().map(|a| a.as_str()).unwrap_or_default();
        // A URL may carry a user and a password; messages must not.
        let server = server.rsplit('@').next().unwrap_or_default();
        let whose = format!("model `{}` at {server}", config.name).into();
        let slots = Slots::new(config.max_concurrent, config.max_waiting, config.first_byte_timeout);
        Ok(Self { config, client, completions, embeddings, headers, whose, slots, limits: RateLimits::default() })
    }

    /// Asks for embeddings: an OpenAI `/v1/embeddings` body in, the server's answer out, untouched but for `model`.
    ///
    /// # Errors
    /// As a call's, with the server's error body where it sent one.
    pub async fn embed(&self, body: Bytes) -> Result<Bytes, BackendError> {
        let _slot = self.slots.take(&self.config.name).await?;
        let body = body::with_model(&body, self.upstream_model())
            .map_err(|error| BackendError::new(ErrorKind::BadRequest, error.to_string()))?;
        let began = Instant::now();
        let response = self.send(Method::POST, &self.embeddings, body, false, None, began).await?;
        let body = self.whole_body(response, began).await?;
        if let Some(object) = ErrorObject::in_body(&body) {
            return Err(status::reported_inside(&self.whose, &object, body));
        }
        if !wire::fields(&body).is_ok_and(|fields| fields.iter().any(|f| f.key == "data")) {
            return Err(self.error(ErrorKind::Garbage, "answered something that is no list of embeddings"));
        }
        Ok(body)
    }

    /// The models that the server lists (`GET /v1/models`), in its order.
    ///
    /// # Errors
    /// As a call's; `garbage` for an answer that is no list of models.
    pub async fn models(&self) -> Result<Vec<String>, BackendError> {
        #[derive(serde::Deserialize)]
        struct List {
            data: Vec<Listed>,
        }
        #[derive(serde::Deserialize)]
        struct Listed {
            id: String,
        }
        let garbage = |why: String| self.error(ErrorKind::Garbage, &format!("lists no models: {why}"));
        let to = config::endpoint(&self.config.url, "models").map_err(garbage)?;
        let began = Instant::now();
        let response = self.send(Method::GET, &to, Bytes::new(), false, None, began).await?;
        let body = self.whole_body(response, began).await?;
        let list: List = serde_json::from_slice(&body).map_err(|e| garbage(e.to_string()))?;
        Ok(list.data.into_iter().map(|listed| listed.id).collect())
    }

    fn upstream_model(&self) -> Option<&str> {
        match &self.config.model {
            UpstreamModel::Named(model) => Some(model),
            UpstreamModel::AsAsked => None,
        }
    }

    fn error(&self, kind: ErrorKind, what: &str) -> BackendError {
        BackendError::new(kind, format!("{} {what}", self.whose))
    }

    fn times(&self, began: Instant) -> Times {
        Times {
            first: began + self.config.first_byte_timeout,
            first_limit: self.config.first_byte_timeout,
            idle: self.config.idle_timeout,
            end: self.config.total_timeout.map(|t| began + t),
        }
    }

    /// Sends a body and waits for the head of an answer with a status of success.
    async fn send(
        &self,
        method: Method,
        to: &Uri,
        body: Bytes,
        stream: bool,
        authorization: Option<&str>,
        began: Instant,
    ) -> Result<Response<Incoming>, BackendError> {
        let mut request = hyper::Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = to.clone();
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        let accept = if stream { "text/event-stream" } else { "application/json" };
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        if let Some(key) = authorization.filter(|_| self.config.forward_client_key) {
            let mut key = HeaderValue::from_str(key)
                .map_err(|_| BackendError::new(ErrorKind::Auth, "the client's authorization is no header value"))?;
            key.set_sensitive(true);
            headers.insert(AUTHORIZATION, key);
        }
        let times = self.times(began);
        let until = times.end.map_or(times.first, |end| end.min(times.first));
        let response = match tokio::time::timeout_at(until, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if error.is_connect() => {
                let why = root_cause(&error);
                return Err(self.error(ErrorKind::Unreachable, &format!("cannot be reached: {why}")));
            }
            Ok(Err(error)) => return Err(self.broken(&error)),
            Err(_) => {
                let limit = until - began;
                return Err(self.error(ErrorKind::Timeout, &format!("did not begin to answer within {limit:?}")));
            }
        };
        self.limits.read(response.headers(), Instant::now());
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let retry_after = retry_after(response.headers());
        // An error without its body is still that error.
        let body = self.bounded(response.into_body(), MAX_ERROR_BODY, began).await.unwrap_or_default();
        Err(status::reported(&self.whose, status, retry_after, body))
    }

    /// A connection that broke, or spoke something that is no HTTP.
    fn broken(&self, error: &(dyn std::error::Error + 'static)) -> BackendError {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
                return self.error(ErrorKind::Garbage, "does not speak HTTP");
            }
            cause = error.source();
        }
        self.error(ErrorKind::Cut, &format!("broke off the connection: {}", root_cause(error)))
    }

    async fn whole_body(&self, response: Response<Incoming>, began: Instant) -> Result<Bytes, BackendError> {
        let kind = content_type(&response);
        let body = self.bounded(response.into_body(), MAX_BODY, began).await?;
        if kind.starts_with("text/html") {
            return Err(self.error(ErrorKind::Garbage, "answered with a web page; check the entry's url"));
        }
        Ok(body)
    }

    /// The whole of a body of at most `limit` bytes.
    async fn bounded(&self, mut body: Incoming, limit: usize, began: Instant) -> Result<Bytes, BackendError> {
        let times = self.times(began);
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        loop {
            let quiet_until = Instant::now() + times.idle;
            let until = times.end.map_or(quiet_until, |end| end.min(quiet_until));
            let data = match tokio::time::timeout_at(until, body.frame()).await {
                Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
                Ok(Some(Err(error))) => return Err(self.broken(&error)),
                Ok(None) => break,
                Err(_) => return Err(self.error(ErrorKind::Timeout, "stopped in the middle of its answer")),
            };
            if first.len() + rest.len() + data.len() > limit {
                return Err(self.error(ErrorKind::Garbage, &format!("answered more than {limit} bytes")));
            }
            // Most bodies come in one frame, which is then the body.
            if first.is_empty() {
                first = data;
            } else {
                rest.extend_from_slice(&data);
            }
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Bytes::from([&first[..], &rest[..]].concat()))
    }

    fn completion(&self, call: &Call, body: Bytes) -> Result<Reply, BackendError> {
        let Ok(fields) = wire::fields(&body) else {
            return Err(self.error(ErrorKind::Garbage, "answered something that is no JSON object"));
        };
        if let Some(object) = ErrorObject::in_fields(&fields, &body) {
            return Err(status::reported_inside(&self.whose, &object, body.clone()));
        }
        let field = |name: &str| fields.iter().rfind(|f| f.key == name);
        if !field("choices").is_some_and(|f| f.value.starts_with('[')) {
            return Err(self.error(ErrorKind::Garbage, "answered something that is no completion"));
        }
        if !wire::has_choice(&fields) {
            return Err(self.error(ErrorKind::Garbage, "answered a completion without a choice"));
        }
        let model_reported = field("model").and_then(|f| serde_json::from_str(f.value).ok());
        let usage = wire::usage_in(&fields).unwrap_or_else(|| estimated(&call.request, &body));
        let body = wire::rewrite_id_in(&body, &fields, &call.id.completion_id());
        Ok(Reply::Whole { completion: Completion::Wire { body, usage }, model_reported })
    }
}

#[async_trait]
impl Backend for RemoteBackend {
    fn kind(&self) -> &'static str {
        "remote"
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let slot = self.slots.take(&self.config.name).await?;
        let body = body::upstream_body(&call, self.upstream_model(), self.config.stream_usage)
            .map_err(|error| BackendError::new(ErrorKind::BadRequest, error.to_string()))?;
        let began = Instant::now();
        let stream = call.request.stream;
        let authorization = call.client_authorization.as_deref();
        let response = self.send(Method::POST, &self.completions, body, stream, authorization, began).await?;
        let kind = content_type(&response);
        if !stream {
            if kind.starts_with("text/event-stream") {
                return Err(self.error(ErrorKind::Garbage, "answered with a stream although none was asked for"));
            }
            let body = self.whole_body(response, began).await?;
            return self.completion(&call, body);
        }
        // Some servers stream under another type, or none: what is no stream then fails as one.
        if kind.starts_with("application/json") || kind.starts_with("text/html") {
            let body = self.whole_body(response, began).await?;
            if let Some(object) = ErrorObject::in_body(&body) {
                return Err(status::reported_inside(&self.whose, &object, body));
            }
            let what = "answered as a whole although a stream was asked for; the server cannot stream";
            return Err(self.error(ErrorKind::Garbage, what));
        }
        let mut stream = RemoteStream::new(
            response.into_body(),
            Arc::clone(&self.whose),
            call.request,
            call.id.completion_id(),
            self.times(began),
            slot,
        );
        stream.open().await?;
        let model_reported = stream.model_reported();
        Ok(Reply::Stream { chunks: stream.boxed(), model_reported })
    }

    fn state(&self) -> ModelState {
        ModelState { limit_used: self.limits.used(Instant::now()), ..self.slots.state() }
    }
}

fn content_type(response: &Response<Incoming>) -> String {
    let value = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    value.unwrap_or_default().trim_start().to_ascii_lowercase()
}

fn estimated(request: &Request, body: &[u8]) -> Usage {
    let bytes = wire::texts(body).iter().map(|(_, text)| text.len()).sum();
    Usage {
        prompt_tokens: tally::prompt_tokens(request),
        cached_tokens: 0,
        completion_tokens: tally::text_tokens(bytes),
        source: UsageSource::Estimated,
        ..Usage::default()
    }
}

/// How long the server asks to be left alone: `retry-after-ms`, else `retry-after` in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok().map(str::trim);
    let milliseconds = text(&HeaderName::from_static("retry-after-ms")).and_then(|t| t.parse::<f64>().ok());
    let seconds = |s: f64| Duration::try_from_secs_f64(s.max(0.0)).ok();
    if let Some(wait) = milliseconds.and_then(|ms| seconds(ms / 1e3)) {
        return Some(wait);
    }
    let value = text(&RETRY_AFTER)?;
    if let Ok(s) = value.parse::<f64>() {
        return seconds(s);
    }
    let at = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
    seconds(at.duration_since(jiff::Timestamp::now()).as_secs_f64())
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
