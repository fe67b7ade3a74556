//! An upstream that costs next to nothing: fixed answers, so that what is measured is the gateway in front of it.
//!
//! Not streamed: a `chat.completion` of about 600 bytes. Streamed: [`EVENTS`] server-sent events, each flushed by a write of
//! its own as a model's tokens are, on sockets with TCP_NODELAY. Whether to stream is read off the request's bytes.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Frame, Incoming},
    header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::{BenchError, until_orphaned};

/// The model that it serves.
pub const MODEL: &str = "mock-model";

/// Server-sent events of a streamed answer: the role, seventeen pieces of text, the end, the usage, `[DONE]`.
pub const EVENTS: usize = 21;

/// What both forms of the answer hold.
pub const ANSWER: &str = "A weir is a low dam that lets a river down in steps; the water behind it stands a little higher, \
                          and whatever goes over it is counted.";

const ID: &str = "chatcmpl-8f2c7d1e5b3a49608c7f1d2e3b4a5968";

/// The answer that is not streamed.
pub fn completion() -> String {
    serde_json::json!({
        "id": ID,
        "object": "chat.completion",
        "created": 1_763_889_600,
        "model": MODEL,
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": null, "annotations": []},
            "logprobs": null,
            "finish_reason": "stop",
        }],
        "usage": {
            "prompt_tokens": 42, "completion_tokens": 31, "total_tokens": 73,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_weir_mock",
    })
    .to_string()
}

/// The events of the streamed answer, each as it goes on the wire.
pub fn events() -> Vec<Bytes> {
    let chunk = |choices: serde_json::Value, usage: serde_json::Value| {
        let chunk = serde_json::json!({
            "id": ID, "object": "chat.completion.chunk", "created": 1_763_889_600, "model": MODEL,
            "system_fingerprint": "fp_weir_mock", "choices": choices, "usage": usage,
        });
        Bytes::from(format!("data: {chunk}\n\n"))
    };
    let choice = |delta: serde_json::Value, finish: serde_json::Value| {
        chunk(serde_json::json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]), ().into())
    };
    let mut events = vec![choice(serde_json::json!({"role": "assistant", "content": ""}), ().into())];
    // Seventeen pieces of about the same length, cut between words.
    let pieces = EVENTS - 4;
    let words: Vec<&str> = ANSWER.split_inclusive(' ').collect();
    for piece in 0..pieces {
        let text = words[words.len() * piece / pieces..words.len() * (piece + 1) / pieces].concat();
        events.push(choice(serde_json::json!({"content": text}), ().into()));
    }
    events.push(choice(serde_json::json!({}), "stop".into()));
    let usage = serde_json::json!({"prompt_tokens": 42, "completion_tokens": 31, "total_tokens": 73});
    events.push(chunk(serde_json::json!([]), usage));
    events.push(Bytes::from_static(b"data: [DONE]\n\n"));
    events
}

/// One frame per event. Between two of them it is pending once, so that hyper writes out what it has: it gathers frames only
/// as long as the body has more.
struct Events {
    events: std::vec::IntoIter<Bytes>,
    rest: bool,
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.rest = !self.rest;
        if self.rest && self.events.len() < EVENTS {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.rest = false;
        Poll::Ready(self.events.next().map(|event| Ok(Frame::data(event))))
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// What is sent, made once.
struct Answers {
    completion: Bytes,
    events: Vec<Bytes>,
    models: Bytes,
}

impl Answers {
    fn json(&self, status: StatusCode, body: &Bytes) -> Answer {
        let mut answer = Response::new(Full::new(body.clone()).boxed());
        *answer.status_mut() = status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        answer
    }

    fn stream(&self) -> Answer {
        let body = Events { events: self.events.clone().into_iter(), rest: false };
        let mut answer = Response::new(body.boxed());
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        answer
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Answer, hyper::Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(match (head.method, head.uri.path()) {
            (Method::POST, "/v1/chat/completions") if asks_to_stream(&body) => self.stream(),
            (Method::POST, "/v1/chat/completions") => self.json(StatusCode::OK, &self.completion),
            (Method::GET, "/v1/models") => self.json(StatusCode::OK, &self.models),
            _ => self.json(StatusCode::NOT_FOUND, &Bytes::from_static(b"{\"error\":{\"message\":\"no such route\"}}")),
        })
    }
}

/// `"stream":true` in JSON with or without a space; the mock does not parse.
fn asks_to_stream(body: &[u8]) -> bool {
    const KEY: &[u8] = b"\"stream\":";
    body.windows(KEY.len())
        .position(|window| window == KEY)
        .is_some_and(|at| body[at + KEY.len()..].trim_ascii_start().starts_with(b"true"))
}

/// Serves until its standard input closes.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(listen: SocketAddr) -> Result<(), BenchError> {
    let listener = TcpListener::bind(listen).await.map_err(BenchError::io(format!("cannot listen on {listen}")))?;
    let address = listener.local_addr().map_err(BenchError::io("its own address"))?;
    tokio::select! {
        () = accept(listener) => Ok(()),
        () = until_orphaned(address) => Ok(()),
    }
}

/// Accepts connections for good.
pub async fn accept(listener: TcpListener) {
    let models = serde_json::json!({
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 1_763_889_600, "owned_by": "mock"}],
    });
    let answers: &'static Answers = Box::leak(Box::new(Answers {
        completion: completion().into(),
        events: events(),
        models: models.to_string().into(),
    }));
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        let service = service_fn(move |request| answers.answer(request));
        tokio::spawn(async move {
            // A client that leaves is no concern of the mock's.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_are_what_they_claim_to_be() {
        let body = completion();
        assert!((500..750).contains(&body.len()), "{}", body.len());
        let events = events();
        assert_eq!(events.len(), EVENTS);
        let text: String = events[..EVENTS - 1]
            .iter()
            .map(|event| {
                let json = event.strip_prefix(b"data: ").unwrap().strip_suffix(b"\n\n").unwrap();
                let value: serde_json::Value = serde_json::from_slice(json).unwrap();
                value["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
            })
            .collect();
        assert_eq!(text, ANSWER);
        assert!(events[..EVENTS].iter().skip(1).take(17).all(|e| !e.windows(12).any(|w| w == b"\"content\":\"\"")));
    }

    #[test]
    fn streaming_is_read_off_the_bytes() {
        assert!(asks_to_stream(br#"{"stream": true}"#));
        assert!(asks_to_stream(br#"{"a":1,"stream":true}"#));
        assert!(!asks_to_stream(br#"{"stream":false}"#));
        assert!(!asks_to_stream(br#"{"stream_options":{}}"#));
    }
}
