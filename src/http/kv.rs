//! What models in this process keep of keys and values, for administrators: numbers, one prompt's part, pins, and letting go.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Request, State},
};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    App,
    auth::Admin,
    body,
    error::{ApiError, ErrorBody},
    wire,
};
use crate::domain::{self, KvCommand};

/// Pins without a time of their own.
const DEFAULT_TTL_S: u64 = 3600;
const MOST_TTL_S: u64 = 30 * 24 * 3600;

/// What stands beside `model` and `messages` in the body; these are a chat's, with its documents marked.
#[derive(Default, Deserialize, ToSchema)]
#[schema(as = KvRequest)]
#[serde(deny_unknown_fields)]
pub(super) struct KvOptions {
    /// A model of the fleet that runs in this process.
    model: Option<String>,
    /// As of a chat, documents marked.
    #[schema(value_type = Option<Vec<Value>>)]
    messages: Option<serde::de::IgnoredAny>,
    /// Whose documents: those of this tenant, else of this key's id, else of the key that asks.
    tenant: Option<String>,
    key: Option<String>,
    /// Of a pin: for how many seconds [default: 3600].
    ttl_s: Option<u64>,
}

/// A body as it is read.
struct Asked {
    model: String,
    /// `None` where there are no messages.
    request: Option<Arc<domain::Request>>,
    ttl: Duration,
}

async fn asked(app: &App, admin: &Admin, request: Request) -> Result<Asked, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &parts.headers, app.body_limit).await?;
    let invalid = |message: String| ApiError::invalid("invalid_body", message);
    let options: KvOptions = serde_json::from_slice(&bytes)
        .map_err(|e| invalid(format!("The body must be {{\"model\": …, \"messages\": […]}}: {e}.")))?;
    let model = options.model.ok_or_else(|| invalid("'model' is missing: a model of `GET /v1/kv`.".to_owned()))?;
    let ttl_s = options.ttl_s.unwrap_or(DEFAULT_TTL_S);
    if ttl_s == 0 || ttl_s > MOST_TTL_S {
        return Err(invalid(format!("'ttl_s' must be from 1 to {MOST_TTL_S}, but is {ttl_s}.")));
    }
    let request = match options.messages {
        None => None,
        Some(_) => {
            let mut request = wire::chat::parse(bytes)?;
            request.sharing = match (options.tenant, options.key) {
                (Some(tenant), _) => domain::sharing(&tenant, ""),
                (None, Some(key)) => domain::sharing("", &key),
                (None, None) => domain::sharing(&admin.0.key.tenant, &admin.0.key.id),
            };
            Some(Arc::new(request))
        }
    };
    Ok(Asked { model, request, ttl: Duration::from_secs(ttl_s) })
}

fn with_messages(asked: Asked) -> Result<(String, Arc<domain::Request>, Duration), ApiError> {
    match asked.request {
        Some(request) => Ok((asked.model, request, asked.ttl)),
        None => Err(ApiError::invalid("invalid_body", "'messages' is missing: a chat with its documents marked.")),
    }
}

/// What models that run in this process keep, in numbers.
#[utoipa::path(
    get, path = "/v1/kv", tag = "operation",
    responses(
        (status = 200, body = Value, description = "`data`: one object per model that is loaded"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
    )
)]
pub(super) async fn stat(State(app): State<Arc<App>>, _: Admin) -> Result<Json<Value>, ApiError> {
    let mut data = Vec::new();
    for entry in app.service.fleet() {
        if !entry.local.is_some_and(|local| local.loaded && local.info.computed_by == "weir") {
            continue;
        }
        let answer = app.service.kv(&entry.name, KvCommand::Stat).await?;
        data.push(json!({"model": entry.name, "kv": answer}));
    }
    Ok(Json(json!({"object": "list", "data": data})))
}

/// What is kept of a chat's prompt: its beginning, and each marked document.
#[utoipa::path(
    post, path = "/v1/kv/lookup", tag = "operation", request_body = KvOptions,
    responses(
        (status = 200, body = Value, description = "`tokens`, `prefix_tokens`, `documents`"),
        (status = 400, body = ErrorBody, description = "No such thing to look at"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
        (status = 404, body = ErrorBody, description = "No such model"),
    )
)]
pub(super) async fn lookup(
    State(app): State<Arc<App>>,
    admin: Admin,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let (model, request, _) = with_messages(asked(&app, &admin, request).await?)?;
    Ok(Json(json!(app.service.kv(&model, KvCommand::Lookup(request)).await?)))
}

/// Computes a chat's marked documents and keeps them before all that is not pinned, for `ttl_s` seconds.
#[utoipa::path(
    post, path = "/v1/kv/pin", tag = "operation", request_body = KvOptions,
    responses(
        (status = 200, body = Value, description = "As of `/v1/kv/lookup`, afterwards"),
        (status = 400, body = ErrorBody, description = "The model reuses no documents, or there are none"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
        (status = 404, body = ErrorBody, description = "No such model"),
    )
)]
pub(super) async fn pin(State(app): State<Arc<App>>, admin: Admin, request: Request) -> Result<Json<Value>, ApiError> {
    let (model, request, ttl) = with_messages(asked(&app, &admin, request).await?)?;
    Ok(Json(json!(app.service.kv(&model, KvCommand::Pin(request, ttl)).await?)))
}

/// Lets go of a chat's marked documents, or without `messages` of all that the model keeps; on disk, too. What is in use stays.
#[utoipa::path(
    post, path = "/v1/kv/clear", tag = "operation", request_body = KvOptions,
    responses(
        (status = 200, body = Value, description = "How much went, from memory and from disk"),
        (status = 400, body = ErrorBody, description = "The model runs elsewhere"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
        (status = 404, body = ErrorBody, description = "No such model"),
    )
)]
pub(super) async fn clear(
    State(app): State<Arc<App>>,
    admin: Admin,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let Asked { model, request, .. } = asked(&app, &admin, request).await?;
    Ok(Json(json!(app.service.kv(&model, KvCommand::Clear(request)).await?)))
}
