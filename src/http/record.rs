//! What comes after an answer: `POST /v1/feedback`, and the record as `GET /v1/audit/decisions[/{id}]`.

use std::{borrow::Cow, fmt, sync::Arc};

use axum::{
    Json,
    extract::{Path, Query, Request, State, rejection::QueryRejection},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Deserializer, Serialize, de::Visitor};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    App, DecisionsQuery,
    auth::{Admin, Authorized},
    body,
    error::{ApiError, ErrorBody, REQUEST_ID, insert},
    wire::parse::{self, Invalid},
};
use crate::domain::{DecisionId, Feedback};

/// Rows where the client does not say.
const DEFAULT_LIMIT: u32 = 20;
const MAX_LIMIT: u32 = 1000;
/// Characters of a name, a source or a key, all of which are recorded.
const MAX_LABEL: usize = 128;

/// A judgement on an answer.
#[derive(Deserialize, ToSchema)]
#[schema(as = FeedbackRequest)]
pub(super) struct FeedbackBody<'a> {
    /// The decision: `x-request-id`, or the completion's `id`.
    #[serde(borrow, default)]
    #[schema(value_type = String, required)]
    id: Option<Cow<'a, str>>,
    /// What is judged; `score` when absent.
    #[serde(default)]
    name: Option<String>,
    /// A number, or true (1) and false (0).
    #[serde(default)]
    #[schema(value_type = f64, required)]
    value: Option<Judgement>,
    /// Who judges; `user` when absent.
    #[serde(default)]
    source: Option<String>,
    /// A repeated key is answered with `recorded: false` and changes nothing.
    #[serde(default)]
    idempotency_key: Option<String>,
}

struct Judgement(f64);

impl<'de> Deserialize<'de> for Judgement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Judgement;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a boolean")
            }

            fn visit_bool<E>(self, v: bool) -> Result<Judgement, E> {
                Ok(Judgement(f64::from(u8::from(v))))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Judgement, E> {
                Ok(Judgement(v as f64))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Judgement, E> {
                Ok(Judgement(v as f64))
            }

            fn visit_f64<E>(self, v: f64) -> Result<Judgement, E> {
                Ok(Judgement(v))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// What became of a judgement.
#[derive(Serialize, ToSchema)]
#[schema(as = FeedbackResponse)]
pub(super) struct Recorded {
    id: String,
    /// False when the idempotency key was seen before.
    recorded: bool,
}

/// Takes a judgement on an answer.
#[utoipa::path(
    post, path = "/v1/feedback", tag = "record",
    request_body = FeedbackBody,
    responses(
        (status = 200, body = Recorded),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 404, body = ErrorBody, description = "No such thing"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
    )
)]
pub(super) async fn feedback(
    State(app): State<Arc<App>>,
    Authorized(_): Authorized,
    request: Request,
) -> Result<Json<Recorded>, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &parts.headers, app.body_limit).await?;
    let body: FeedbackBody<'_> = parse::object(&bytes)?;
    let id = body.id.ok_or_else(|| {
        Invalid::missing("id", "You must provide 'id': the `x-request-id` header or the `id` of the completion.")
    })?;
    let id = decision_id(&id)?;
    let value =
        body.value.ok_or_else(|| Invalid::missing("value", "You must provide 'value': a number, or true or false."))?;
    let feedback = Feedback {
        source: label("source", body.source, "user")?,
        name: label("name", body.name, "score")?,
        value: value.0,
        idempotency_key: body.idempotency_key.map(|key| label("idempotency_key", Some(key), "")).transpose()?,
    };
    let recorded = app.service.feedback(id, feedback).await?;
    Ok(Json(Recorded { id: id.to_string(), recorded }))
}

fn label(param: &str, value: Option<String>, default: &str) -> Result<String, Invalid> {
    let value = value.unwrap_or_else(|| default.to_owned());
    if value.is_empty() || value.chars().count() > MAX_LABEL {
        return Err(Invalid::value(param, format!("'{param}' must have 1 to {MAX_LABEL} characters.")));
    }
    Ok(value)
}

fn decision_id(text: &str) -> Result<DecisionId, Invalid> {
    text.parse().map_err(|_| {
        Invalid::value("id", "'id' is no decision's: a UUID, as in `x-request-id`, or `chatcmpl-` and a UUID.")
    })
}

/// Lists decisions, newest first.
#[utoipa::path(
    get, path = "/v1/audit/decisions", tag = "record",
    params(DecisionsQuery),
    responses(
        (status = 200, body = Value, description = "`data` holds the rows; `last_id` is the next page's `before`"),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "Not allowed, or the policy refused"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
    )
)]
pub(super) async fn decisions(
    State(app): State<Arc<App>>,
    _: Admin,
    query: Result<Query<DecisionsQuery>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(mut query) =
        query.map_err(|rejection| ApiError::invalid("invalid_query", format!("{}.", rejection.body_text())))?;
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        let message = format!("'limit' must be from 1 to {MAX_LIMIT}, but is {limit}.");
        return Err(Invalid::value("limit", message).into());
    }
    // One more than asked tells whether there are more.
    query.limit = Some(limit + 1);
    let mut rows = app.service.decisions(query).await?;
    let has_more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let id = |row: Option<&Value>| row.and_then(|row| row.get("id")).cloned();
    let (first, last) = (id(rows.first()), id(rows.last()));
    Ok(Json(json!({"object": "list", "data": rows, "has_more": has_more, "first_id": first, "last_id": last})))
}

/// Shows one decision whole.
#[utoipa::path(
    get, path = "/v1/audit/decisions/{id}", tag = "record",
    params(("id" = String, Path, description = "`x-request-id`, or the `id` of a completion")),
    responses(
        (status = 200, body = Value, description = "Record, context, candidates, attempts, outcome, feedback"),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "Not allowed, or the policy refused"),
        (status = 404, body = ErrorBody, description = "No such thing"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
    )
)]
pub(super) async fn decision(
    State(app): State<Arc<App>>,
    _: Admin,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let id = decision_id(&id)?;
    let view = app.service.decision(id).await?;
    let mut response = Json(view).into_response();
    insert(response.headers_mut(), REQUEST_ID, &id.to_string());
    Ok(response)
}
