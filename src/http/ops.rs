//! What there is and how it does: models, health, readiness, metrics.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    App,
    auth::{Admin, Authorized},
    body,
    error::{ApiError, ErrorBody},
};
use crate::gateway::{GatewayError, Served};

/// What the text of `/metrics` is.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A name that `model` may hold.
#[derive(Serialize, ToSchema)]
#[schema(as = Model)]
pub(super) struct ModelBody {
    id: String,
    #[schema(example = "model")]
    object: &'static str,
    created: i64,
    owned_by: String,
    /// `policy`, `plan` or `model`.
    kind: &'static str,
}

/// All names that `model` may hold.
#[derive(Serialize, ToSchema)]
#[schema(as = ModelList)]
pub(super) struct ModelsBody {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<ModelBody>,
}

impl From<Served> for ModelBody {
    fn from(served: Served) -> Self {
        let Served { id, kind, created, owned_by } = served;
        Self { id, object: "model", created, owned_by, kind }
    }
}

/// Lists what is served.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses((status = 200, body = ModelsBody), (status = 401, body = ErrorBody, description = "No or a wrong key"))
)]
pub(super) async fn models(State(app): State<Arc<App>>, Authorized(_): Authorized) -> Json<ModelsBody> {
    Json(ModelsBody { object: "list", data: app.service.served().into_iter().map(Into::into).collect() })
}

/// Shows one of what is served. Names may hold slashes.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "A name; it may hold slashes")),
    responses(
        (status = 200, body = ModelBody),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 404, body = ErrorBody, description = "No such thing"),
    )
)]
pub(super) async fn model(
    State(app): State<Arc<App>>,
    Authorized(_): Authorized,
    Path(id): Path<String>,
) -> Result<Json<ModelBody>, ApiError> {
    let mut served = app.service.served();
    match served.iter().position(|served| served.id == id) {
        Some(at) => Ok(Json(served.swap_remove(at).into())),
        None => {
            let served = served.into_iter().map(|served| served.id).collect();
            Err(GatewayError::UnknownModel { name: id, served }.into())
        }
    }
}

/// What `PUT /v1/fleet/{name}` changes.
#[derive(Deserialize, ToSchema)]
#[schema(as = FleetChange)]
#[serde(deny_unknown_fields)]
pub(super) struct FleetChange {
    /// Whether the model is to be in memory.
    loaded: bool,
}

/// Lists the fleet: where each entry runs, whether it takes calls, and of models in this process what they are.
#[utoipa::path(
    get, path = "/v1/fleet", tag = "operation",
    responses(
        (status = 200, body = Value, description = "`data`: one object per entry"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
    )
)]
pub(super) async fn fleet(State(app): State<Arc<App>>, _: Admin) -> Json<Value> {
    Json(json!({"object": "list", "data": app.service.fleet()}))
}

/// Loads a model that runs in this process, or unloads it once its calls have ended. Others serve meanwhile.
#[utoipa::path(
    put, path = "/v1/fleet/{id}", tag = "operation",
    params(("id" = String, Path, description = "The entry; it may hold slashes")),
    request_body = FleetChange,
    responses(
        (status = 200, body = Value, description = "The entry as it is then"),
        (status = 400, body = ErrorBody, description = "It runs elsewhere, or cannot be loaded"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "The key is no administrator's"),
        (status = 404, body = ErrorBody, description = "No such entry"),
    )
)]
pub(super) async fn set_loaded(
    State(app): State<Arc<App>>,
    _: Admin,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &parts.headers, app.body_limit).await?;
    let change: FleetChange = serde_json::from_slice(&bytes).map_err(|e| {
        ApiError::invalid("invalid_body", format!("The body must be {{\"loaded\": true}} or false: {e}."))
    })?;
    let status = app.service.set_loaded(&name, change.loaded).await?;
    Ok(Json(status).into_response())
}

/// The process lives.
#[utoipa::path(get, path = "/healthz", tag = "operation", responses((status = 200, body = Value, description = "Alive")))]
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Requests can be served: 200, else 503 with what keeps them from it.
#[utoipa::path(
    get, path = "/readyz", tag = "operation",
    responses(
        (status = 200, body = Value, description = "Ready; each component with `ok` or what is wrong with it"),
        (status = 503, body = Value, description = "Not ready, in the same shape"),
    )
)]
pub(super) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let readiness = app.service.readiness().await;
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// All metrics.
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses(
        (status = 200, body = String, content_type = "application/openmetrics-text"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "Not allowed, or the policy refused"),
    )
)]
pub(super) async fn metrics(State(app): State<Arc<App>>, _: Admin) -> Response {
    let mut response = app.service.metrics().into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS));
    response
}
