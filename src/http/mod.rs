//! The HTTP edge: OpenAI's API in front of a [`Service`]. Routes, wire types, SSE, keys, limits, errors and metrics are
//! here; what is served, decided and recorded is the gateway's. Only this floor knows status codes.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/chat/completions` | whole or streamed |
//! | `POST /v1/decision` | the same body; decides, explains, calls nothing |
//! | `POST /v1/embeddings`, `GET /v1/models[/{id}]` | as OpenAI |
//! | `POST /v1/feedback` | a judgement on an answer |
//! | `GET /v1/fleet`, `PUT /v1/fleet/{name}` | what runs where; loading and unloading; an admin key where keys are configured |
//! | `GET /v1/audit/decisions[/{id}]` | the record; an admin key where keys are configured |
//! | `GET /metrics` | OpenMetrics; likewise |
//! | `GET /healthz`, `/readyz`, `/openapi.json` | open |

mod auth;
mod body;
mod chat;
mod embeddings;
pub mod error;
mod kv;
mod observe;
mod openapi;
mod ops;
mod record;
mod serve;
mod service;
mod sse;
pub mod wire;

use std::{fmt, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{Method, Uri},
    middleware,
    routing::{get, post, put},
};

pub use auth::ApiKey;
pub use serve::{Drained, ServeOptions, serve};
pub use service::{DecisionsQuery, Service};

use crate::telemetry::Metrics;

/// Every route, which is also every value of the metrics' label.
pub const ROUTES: [&str; 18] = [
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/{*id}",
    "/v1/decision",
    "/v1/feedback",
    "/v1/audit/decisions",
    "/v1/audit/decisions/{id}",
    "/v1/fleet",
    "/v1/fleet/{*id}",
    "/v1/kv",
    "/v1/kv/lookup",
    "/v1/kv/pin",
    "/v1/kv/clear",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
];

/// How the edge behaves.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// None: everyone may everything.
    pub keys: Vec<ApiKey>,
    /// Greatest request body in bytes.
    pub body_limit: usize,
    /// Between two comments on a stream on which nothing has come yet; its head goes out at the first, if no answer has begun.
    pub heartbeat: Duration,
    /// Shared with whoever else measures, and rendered by [`Service::metrics`].
    pub metrics: Arc<Metrics>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            body_limit: 10 << 20,
            heartbeat: sse::HEARTBEAT_EVERY,
            metrics: Arc::new(Metrics::new()),
        }
    }
}

/// What handlers share.
struct App {
    service: Arc<dyn Service>,
    keys: auth::Keys,
    body_limit: usize,
    heartbeat: Duration,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").finish_non_exhaustive()
    }
}

/// All routes over `service`; hand it to [`serve`].
pub fn app(service: Arc<dyn Service>, options: HttpOptions) -> Router {
    let app = Arc::new(App {
        service,
        keys: auth::Keys::new(options.keys),
        body_limit: options.body_limit,
        heartbeat: options.heartbeat,
        metrics: options.metrics,
    });
    let [
        chat,
        embeddings,
        models,
        model,
        decision,
        feedback,
        decisions,
        one,
        fleet,
        entry,
        kv_stat,
        kv_lookup,
        kv_pin,
        kv_clear,
        healthz,
        readyz,
        metrics,
        openapi,
    ] = ROUTES;
    Router::new()
        .route(chat, post(chat::chat))
        .route(embeddings, post(embeddings::embeddings))
        .route(models, get(ops::models))
        .route(model, get(ops::model))
        .route(decision, post(chat::decide))
        .route(feedback, post(record::feedback))
        .route(decisions, get(record::decisions))
        .route(one, get(record::decision))
        .route(fleet, get(ops::fleet))
        .route(entry, put(ops::set_loaded))
        .route(kv_stat, get(kv::stat))
        .route(kv_lookup, post(kv::lookup))
        .route(kv_pin, post(kv::pin))
        .route(kv_clear, post(kv::clear))
        .route(healthz, get(ops::healthz))
        .route(readyz, get(ops::readyz))
        .route(metrics, get(ops::metrics))
        .route(openapi, get(openapi::document))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe::edge))
        .with_state(app)
}

async fn no_such_path(method: Method, uri: Uri) -> error::ApiError {
    let path = uri.path();
    let hint = if ROUTES.contains(&format!("/v1{path}").as_str()) {
        format!("; did you mean /v1{path}? (the base URL ends in /v1)")
    } else {
        "; GET /openapi.json lists what there is".to_owned()
    };
    error::ApiError::not_found("unknown_url", format!("There is nothing at {method} {path}{hint}."))
}

async fn no_such_method(method: Method, uri: Uri) -> error::ApiError {
    error::ApiError::new(
        axum::http::StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request_error",
        "method_not_allowed",
        format!("{method} is not allowed at {}; the `allow` header says what is.", uri.path()),
    )
}
