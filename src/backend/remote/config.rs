//! How a remote entry is configured, and what is wrong with one that cannot be used.

use std::{collections::BTreeMap, fmt, time::Duration};

use hyper::{
    HeaderMap, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT},
};

/// A key that is shown to nobody.
#[derive(Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The key itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What the server calls the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamModel {
    /// This.
    Named(String),
    /// Whatever the client wrote: for an entry that passes every model name through.
    AsAsked,
}

/// One remote fleet entry.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// Name within the fleet; for messages.
    pub name: String,
    /// Base URL, `http` or `https`, with the API version (`…/v1`) or without: `/v1` is added where no segment of the path
    /// looks like a version. A URL that ends with `/chat/completions` is used as it is. `http` goes straight to the server,
    /// `https` through the system's proxy where there is one.
    pub url: String,
    pub model: UpstreamModel,
    /// Sent as a bearer token.
    pub api_key: Option<Secret>,
    /// Whether the client's own `authorization` is sent instead, where it has one.
    pub forward_client_key: bool,
    /// Further headers for every call.
    pub headers: BTreeMap<String, String>,
    /// Whether to ask streams for their usage; off for servers that refuse `stream_options`. Usage is then estimated.
    pub stream_usage: bool,
    /// Until a connection stands, TLS included.
    pub connect_timeout: Duration,
    /// From the call to the answer's head, and of a stream to its first event.
    pub first_byte_timeout: Duration,
    /// Longest silence within an answer.
    pub idle_timeout: Duration,
    /// From the call to the answer's end.
    pub total_timeout: Option<Duration>,
    /// Calls at once; `None`: any number.
    pub max_concurrent: Option<u32>,
    /// Calls that may wait for a place, each for at most the first-byte limit; more are refused as `rate_limited`.
    pub max_waiting: u32,
}

impl RemoteConfig {
    /// An entry with the defaults: the server knows the model by the entry's name; 5 s to connect, 120 s to the first byte,
    /// 60 s of silence, no total limit, any number of calls.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            model: UpstreamModel::Named(name.clone()),
            name,
            url: url.into(),
            api_key: None,
            forward_client_key: false,
            headers: BTreeMap::new(),
            stream_usage: true,
            connect_timeout: Duration::from_secs(5),
            first_byte_timeout: Duration::from_secs(120),
            idle_timeout: Duration::from_secs(60),
            total_timeout: None,
            max_concurrent: None,
            max_waiting: 1024,
        }
    }
}

/// An entry that cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error(
        "the url `{url}` of model `{model}` cannot be used: {why}; expected something like http://localhost:8000/v1"
    )]
    Url { model: String, url: String, why: String },
    #[error("the header `{name}` of model `{model}` cannot be sent: {why}")]
    Header { model: String, name: String, why: String },
    #[error("no TLS for model `{model}`: {source}; install the system's CA certificates (package ca-certificates)")]
    Tls { model: String, source: rustls::Error },
}

impl RemoteError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            RemoteError::Url { .. } => "url",
            RemoteError::Header { .. } => "header",
            RemoteError::Tls { .. } => "tls",
        }
    }
}

/// The address of one of the API's endpoints under a base as people write it.
pub(super) fn endpoint(base: &str, name: &str) -> Result<Uri, String> {
    let base: Uri = base.trim().parse().map_err(|error: hyper::http::uri::InvalidUri| error.to_string())?;
    if !matches!(base.scheme_str(), Some("http" | "https")) {
        return Err("it must begin with http:// or https://".to_owned());
    }
    if base.authority().is_some_and(|a| a.as_str().contains('@')) {
        return Err("a user and password cannot be part of it; configure the key apart".to_owned());
    }
    let path = base.path().trim_end_matches('/');
    let is_version = |s: &str| s.strip_prefix('v').is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()));
    let path = if let Some(exact) = path.strip_suffix("/chat/completions") {
        exact.to_owned()
    } else if path.split('/').any(is_version) {
        path.to_owned()
    } else {
        format!("{path}/v1")
    };
    let query = base.query().map(|q| format!("?{q}")).unwrap_or_default();
    let mut parts = base.into_parts();
    let path = format!("{path}/{name}{query}").parse();
    parts.path_and_query = Some(path.map_err(|error: hyper::http::uri::InvalidUri| error.to_string())?);
    Uri::from_parts(parts).map_err(|error| error.to_string())
}

/// The headers of every call.
pub(super) fn headers(config: &RemoteConfig) -> Result<HeaderMap, RemoteError> {
    let wrong = |name: &str, why: &dyn fmt::Display| RemoteError::Header {
        model: config.name.clone(),
        name: name.to_owned(),
        why: why.to_string(),
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("weir/", env!("CARGO_PKG_VERSION"))));
    if let Some(key) = &config.api_key {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", key.reveal()))
            .map_err(|error| wrong("authorization", &error))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    for (name, value) in &config.headers {
        let key = HeaderName::try_from(name.as_str()).map_err(|error| wrong(name, &error))?;
        let mut value = HeaderValue::from_str(value).map_err(|error| wrong(name, &error))?;
        value.set_sensitive(true);
        headers.insert(key, value);
    }
    Ok(headers)
}
