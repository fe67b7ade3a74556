//! `POST /v1/chat/completions` and `POST /v1/decision`: the same body, one answered and one only decided.

use std::{str::FromStr, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;

use super::{
    App,
    auth::Authorized,
    body,
    error::{ApiError, ErrorBody, REQUEST_ID, insert},
    observe::StreamObservation,
    sse::{Begun, SseBody},
    wire::{self, chunk::Encoder},
};
use crate::{
    domain::{self, Completion},
    gateway::{Answer, AnswerBody, Caller, Explained},
    policy::explain,
};

const SESSION: HeaderName = HeaderName::from_static("x-weir-session");
const CLIENT_RETRY: HeaderName = HeaderName::from_static("x-stainless-retry-count");
const POLICY: HeaderName = HeaderName::from_static("x-weir-policy");
const ARM: HeaderName = HeaderName::from_static("x-weir-arm");
const MODEL: HeaderName = HeaderName::from_static("x-weir-model");
const BEST_SO_FAR: HeaderName = HeaderName::from_static("x-weir-best-so-far");
/// nginx must not hold events back.
const NO_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Answers a chat.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "chat",
    request_body = wire::chat::Body,
    responses(
        (status = 200, description = "Whole, or with `stream: true` server-sent events of chat.completion.chunk objects",
         content((wire::completion::CompletionBody = "application/json"), (String = "text/event-stream")),
         headers(("x-request-id" = String, description = "Id of the decision"),
                 ("x-weir-policy" = String, description = "Policy that decided"),
                 ("x-weir-arm" = String, description = "Arm that was taken"),
                 ("x-weir-model" = String, description = "Model that answers"),
                 ("x-weir-best-so-far" = String, description = "Why the answer is only the best that there was, where it is"))),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 403, body = ErrorBody, description = "Not allowed, or the policy refused"),
        (status = 404, body = ErrorBody, description = "No such thing"),
        (status = 413, body = ErrorBody, description = "The body is too large"),
        (status = 429, body = ErrorBody, description = "No place; try again later"),
        (status = 502, body = ErrorBody, description = "A backend failed"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
        (status = 504, body = ErrorBody, description = "A backend took too long"),
    )
)]
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    Authorized(caller): Authorized,
    request: Request,
) -> Result<Response, ApiError> {
    let request = read(&app, request, &caller).await?;
    let asked = Asked { include_usage: request.include_usage, logprobs: request.logprobs };
    if !request.stream {
        let answer = app.service.chat(request, caller).await?;
        return respond(&app, answer, asked);
    }
    let service = Arc::clone(&app.service);
    let mut answer = async move { service.chat(request, caller).await }.boxed();
    match tokio::time::timeout(app.heartbeat, &mut answer).await {
        Ok(answer) => respond(&app, answer?, asked),
        // Whoever is between would take the connection for dead. What goes wrong from here on is an error event.
        Err(_) => {
            let begun = async move { begun(answer.await?, asked) }.boxed();
            Ok(streamed(app.heartbeat, |heartbeat, observation| SseBody::before(begun, heartbeat, observation)))
        }
    }
}

/// Decides and explains.
#[utoipa::path(
    post, path = "/v1/decision", tag = "chat",
    request_body = wire::chat::Body,
    responses(
        (status = 200, body = Value, description = "The decision, and the context that it was made upon"),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 404, body = ErrorBody, description = "No such thing"),
        (status = 413, body = ErrorBody, description = "The body is too large"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
    )
)]
pub(super) async fn decide(
    State(app): State<Arc<App>>,
    Authorized(caller): Authorized,
    request: Request,
) -> Result<Response, ApiError> {
    let request = read(&app, request, &caller).await?;
    let explained = app.service.decide(request, caller).await?;
    let id = explained.id.to_string();
    let Explained { id: _, decision, context } = &explained;
    let draw = explain::draw(decision, context);
    let body = serde_json::json!({
        "id": &id, "object": "decision", "decision": decision, "draw": draw, "context": context,
    });
    let mut response = Json(body).into_response();
    insert(response.headers_mut(), REQUEST_ID, &id);
    insert(response.headers_mut(), POLICY, &decision.policy);
    insert(response.headers_mut(), ARM, &decision.arm);
    Ok(response)
}

/// What the answer's shape depends on.
struct Asked {
    include_usage: bool,
    logprobs: bool,
}

async fn read(app: &App, request: Request, caller: &Caller) -> Result<domain::Request, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &parts.headers, app.body_limit).await?;
    let mut request = wire::chat::parse(bytes)?;
    if let Some(session) = text(&parts.headers, &SESSION).filter(|session| !session.is_empty()) {
        request.session = Some(session.to_owned());
    }
    request.client_retry =
        text(&parts.headers, &CLIENT_RETRY).and_then(|count| u32::from_str(count.trim()).ok()).unwrap_or(0);
    request.sharing = domain::sharing(&caller.key.tenant, &caller.key.id);
    Ok(request)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    std::str::from_utf8(headers.get(name)?.as_bytes()).ok()
}

fn respond(app: &App, answer: Answer, asked: Asked) -> Result<Response, ApiError> {
    let Answer { id, model, policy, arm, created, best_so_far, body } = answer;
    let mut response = match body {
        AnswerBody::Whole(completion) => {
            let json = match completion {
                Completion::Wire { body, .. } => body,
                Completion::Choices { choices, usage } => {
                    wire::completion::encode(id, &model, created, &choices, usage, asked.logprobs)
                        .map_err(|e| ApiError::internal(format!("the answer could not be written as JSON: {e}")))?
                }
            };
            let mut response = Response::new(Body::from(json));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        AnswerBody::Stream(chunks) => {
            let encoder = Encoder::new(id, &model, created, asked.include_usage, asked.logprobs);
            let begun = Begun { chunks, encoder, said: Vec::new() };
            streamed(app.heartbeat, |heartbeat, observation| SseBody::new(begun, heartbeat, observation))
        }
    };
    let headers = response.headers_mut();
    insert(headers, REQUEST_ID, &id.to_string());
    insert(headers, POLICY, &policy);
    insert(headers, ARM, &arm);
    insert(headers, MODEL, &model);
    if let Some(because) = best_so_far {
        insert(headers, BEST_SO_FAR, &because.to_string());
    }
    Ok(response)
}

/// The head of a stream, and its body.
fn streamed(heartbeat: Duration, body: impl FnOnce(Duration, StreamObservation) -> SseBody) -> Response {
    let observation = StreamObservation::default();
    let mut response = Response::new(Body::new(body(heartbeat, observation.clone())));
    response.extensions_mut().insert(observation);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(NO_BUFFERING, HeaderValue::from_static("no"));
    response
}

/// An answer whose head is out already.
fn begun(answer: Answer, asked: Asked) -> Result<Begun, ApiError> {
    let Answer { id, model, policy, arm, created, best_so_far, body } = answer;
    let AnswerBody::Stream(chunks) = body else {
        return Err(ApiError::internal("a whole answer came where a stream was asked for"));
    };
    let encoder = Encoder::new(id, &model, created, asked.include_usage, asked.logprobs);
    let mut said = vec![(REQUEST_ID, id.to_string()), (POLICY, policy), (ARM, arm), (MODEL, model)];
    said.extend(best_so_far.map(|because| (BEST_SO_FAR, because.to_string())));
    Ok(Begun { chunks, encoder, said })
}
