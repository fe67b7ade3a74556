//! `GET /openapi.json`: the document of all routes, made from the types that parse and write them.

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use utoipa::OpenApi;

use super::{chat, embeddings, error, kv, ops, record, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "weir",
        description = "OpenAI's API in front of a policy that routes each request to a plan over a fleet of models, and \
                       records every decision. Where keys are configured, `/v1/*` needs one as a bearer token, \
                       `/v1/audit/*`, `/v1/fleet`, `/v1/kv` and `/metrics` one with `admin: true`.",
        license(name = "Apache-2.0")
    ),
    paths(
        chat::chat,
        chat::decide,
        embeddings::embeddings,
        ops::models,
        ops::model,
        record::feedback,
        record::decisions,
        record::decision,
        ops::fleet,
        ops::set_loaded,
        kv::stat,
        kv::lookup,
        kv::pin,
        kv::clear,
        ops::healthz,
        ops::readyz,
        ops::metrics,
        document
    ),
    components(schemas(error::ErrorBody, wire::chat::Body))
)]
struct Document;

static JSON: LazyLock<Bytes> = LazyLock::new(|| {
    let json = serde_json::to_vec(&Document::openapi());
    json.map(Bytes::from).unwrap_or_else(|_| Bytes::from_static(b"{}"))
});

/// The document itself.
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses((status = 200, body = serde_json::Value)))]
pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.clone()).into_response()
}
