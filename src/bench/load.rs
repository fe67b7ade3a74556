//! A closed-loop client: as many kept-alive connections as asked for, each sending its next request when the last answer is
//! whole. Every answer is checked, since a proxy that loses an event is fast. Latency is from the request's first write to
//! the answer's last byte; for streams the first byte of the body is timed, too.
//!
//! A closed loop never sends faster than it is answered: latencies at several connections include waiting for each other,
//! on both sides, and on a machine of few cores the client takes its share of them.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    client::conn::http1::{SendRequest, handshake},
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::{net::TcpStream, time::timeout};

use super::mock_upstream::{ANSWER, EVENTS};

/// No measured server may take longer for one answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection that failed this often is given up.
const MAX_FAILURES: u32 = 10;

/// Whether answers are streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    Json,
    Sse,
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Json => "json",
            Mode::Sse => "sse",
        }
    }
}

/// One run's load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub mode: Mode,
    pub connections: usize,
    /// Ends the run; requests under way are finished.
    pub seconds: f64,
    /// Ends it earlier.
    pub requests: Option<u64>,
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// Seconds from the first request to the last answer.
    pub seconds: f64,
    /// Nanoseconds until the whole answer, sorted.
    pub whole: Vec<u64>,
    /// Nanoseconds until the body's first byte, sorted.
    pub first: Vec<u64>,
    /// Frames of the bodies as they arrived, in all; tells whether events came one by one.
    pub frames: u64,
    pub errors: u64,
    /// The first error, in words.
    pub error: Option<String>,
}

/// Prompts of 60 to 300 characters, so that nothing lives from a cache of one.
const PROMPTS: &[&str] = &[
    "What is the capital of France, and how many people live there?",
    "I was charged twice for my order last week. How do I get the second payment back?",
    "Write a Rust function that reverses a singly linked list in place, and explain its lifetime annotations.",
    "Summarise the causes of the French Revolution in three sentences for a twelve-year-old.",
    "My flight was cancelled and the airline offers only a voucher. Which rights do I have in the European Union, and what \
     should I write to them so that they pay the money back within a week?",
    "Translate into German: the quick brown fox jumps over the lazy dog while the weir lets the river down in steps.",
    "Given a table of orders with columns id, customer, amount and day, write SQL that finds the three customers with the \
     greatest revenue per month, ties broken by name.",
    "Why is the sky blue at noon and red in the evening? Please mention Rayleigh scattering.",
];

/// The bodies that are sent, one per prompt. Usage is asked for in streams, so that every target passes on all events.
pub fn bodies(mode: Mode, model: &str) -> Vec<Bytes> {
    let body = |prompt: &&str| {
        let mut body = serde_json::json!({
            "model": model,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
                {"role": "user", "content": prompt},
            ],
            "temperature": 0.7,
            "max_tokens": 128,
        });
        if mode == Mode::Sse {
            body["stream"] = true.into();
            body["stream_options"] = serde_json::json!({"include_usage": true});
        }
        Bytes::from(body.to_string())
    };
    PROMPTS.iter().map(body).collect()
}

/// Sends `load` to `address` until it is over.
pub async fn run(address: SocketAddr, model: &str, load: Load) -> Answered {
    let bodies: Arc<[Bytes]> = bodies(load.mode, model).into();
    // Connections take their requests from one count, so that the bound is exact.
    let left = Arc::new(AtomicU64::new(load.requests.unwrap_or(u64::MAX)));
    let start = Instant::now();
    let deadline = start + Duration::from_secs_f64(load.seconds);
    let clients: Vec<_> = (0..load.connections)
        .map(|index| {
            let client = Client { address, mode: load.mode, bodies: bodies.clone(), next: index, sender: None };
            tokio::spawn(client.run(left.clone(), deadline))
        })
        .collect();
    let mut all = Answered::default();
    for client in clients {
        match client.await {
            Ok(one) => all.add(one),
            Err(error) => all.fail(error.to_string()),
        }
    }
    all.seconds = start.elapsed().as_secs_f64();
    all.whole.sort_unstable();
    all.first.sort_unstable();
    all
}

impl Answered {
    fn add(&mut self, other: Answered) {
        self.whole.extend(other.whole);
        self.first.extend(other.first);
        self.frames += other.frames;
        self.errors += other.errors;
        self.error = self.error.take().or(other.error);
    }

    fn fail(&mut self, reason: String) {
        self.errors += 1;
        self.error.get_or_insert(reason);
    }
}

struct Client {
    address: SocketAddr,
    mode: Mode,
    bodies: Arc<[Bytes]>,
    next: usize,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    async fn run(mut self, left: Arc<AtomicU64>, deadline: Instant) -> Answered {
        let mut answered = Answered::default();
        let mut failures = 0;
        let mut buffer = BytesMut::new();
        while Instant::now() < deadline && failures < MAX_FAILURES {
            if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err() {
                break;
            }
            let result = timeout(PATIENCE, self.ask(&mut buffer)).await;
            match result.unwrap_or_else(|_| Err(format!("no whole answer within {} s", PATIENCE.as_secs()))) {
                Ok(times) => {
                    answered.whole.push(times.whole);
                    answered.first.push(times.first);
                    answered.frames += times.frames;
                }
                Err(reason) => {
                    answered.fail(reason);
                    failures += 1;
                    self.sender = None;
                }
            }
        }
        answered
    }

    async fn connected(&mut self) -> Result<&mut SendRequest<Full<Bytes>>, String> {
        if self.sender.as_ref().is_none_or(SendRequest::is_closed) {
            let stream = TcpStream::connect(self.address).await.map_err(|e| format!("no connection: {e}"))?;
            stream.set_nodelay(true).map_err(|e| e.to_string())?;
            let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
            tokio::spawn(async move {
                // What breaks a connection shows in the answer that it carries.
                let _ = connection.await;
            });
            self.sender = Some(sender);
        }
        self.sender.as_mut().ok_or_else(|| "no connection".to_owned())
    }

    async fn ask(&mut self, buffer: &mut BytesMut) -> Result<Times, String> {
        let body = self.bodies[self.next % self.bodies.len()].clone();
        self.next += 1;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/chat/completions")
            .header(HOST, self.address.to_string())
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| e.to_string())?;
        let mode = self.mode;
        let sender = self.connected().await?;
        sender.ready().await.map_err(|e| e.to_string())?;
        buffer.clear();
        let start = Instant::now();
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let mut body = response.into_body();
        let (mut first, mut frames) = (None, 0);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| format!("the answer broke off: {e}"))?;
            if let Some(data) = frame.data_ref() {
                first.get_or_insert_with(|| start.elapsed());
                frames += 1;
                buffer.extend_from_slice(data);
            }
        }
        let whole = start.elapsed();
        check(mode, status, buffer)?;
        Ok(Times { whole: nanos(whole), first: nanos(first.unwrap_or(whole)), frames })
    }
}

struct Times {
    whole: u64,
    first: u64,
    frames: u64,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether this is the mock's answer, whole. Ids, model and white space may have been rewritten.
fn check(mode: Mode, status: StatusCode, body: &[u8]) -> Result<(), String> {
    let shown = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
    if status != StatusCode::OK {
        return Err(format!("status {status}: {}", shown()));
    }
    match mode {
        Mode::Json => {
            if !contains(body, ANSWER.as_bytes()) || !contains(body, b"\"chat.completion\"") {
                return Err(format!("not the mock's answer: {}", shown()));
            }
        }
        Mode::Sse => {
            if !body.ends_with(b"data: [DONE]\n\n") {
                return Err(format!("the stream does not end with [DONE]: {}", shown()));
            }
            let events = body.split(|b| *b == b'\n').filter(|line| line.starts_with(b"data:")).count();
            if events != EVENTS {
                return Err(format!("{events} events instead of {EVENTS}: {}", shown()));
            }
        }
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{bare_proxy, mock_upstream};

    async fn mock() -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(mock_upstream::accept(listener));
        address
    }

    async fn bare() -> SocketAddr {
        let upstream = format!("http://{}", mock().await);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { bare_proxy::accept(listener, &upstream).await });
        address
    }

    fn load(mode: Mode) -> Load {
        Load { mode, connections: 4, seconds: 20.0, requests: Some(40) }
    }

    #[tokio::test]
    async fn mock_and_bare_proxy_answer_every_request_rightly() {
        for address in [mock().await, bare().await] {
            for mode in [Mode::Json, Mode::Sse] {
                let answered = run(address, "mock-model", load(mode)).await;
                assert_eq!((answered.errors, answered.error), (0, None));
                assert_eq!((answered.whole.len(), answered.first.len()), (40, 40));
                assert!(answered.whole.is_sorted());
                // One event a write: nearly all of them arrive by themselves, even here where all share one thread.
                let least = if mode == Mode::Sse { 40 * EVENTS as u64 / 2 } else { 40 };
                assert!(answered.frames >= least, "{} frames", answered.frames);
            }
        }
    }

    #[tokio::test]
    async fn what_is_wrong_is_an_error_with_its_reason() {
        let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let answered = run(nobody, "mock-model", load(Mode::Json)).await;
        assert_eq!(answered.whole.len(), 0);
        assert!(answered.error.unwrap().starts_with("no connection"));
        // Four connections, each given up after its tenth failure.
        assert_eq!(answered.errors, 40);
    }

    #[test]
    fn answers_are_checked() {
        let whole: Vec<u8> = mock_upstream::events().concat();
        let json = mock_upstream::completion();
        assert!(check(Mode::Sse, StatusCode::OK, &whole).is_ok());
        assert!(check(Mode::Json, StatusCode::OK, json.as_bytes()).is_ok());
        assert!(check(Mode::Json, StatusCode::BAD_GATEWAY, json.as_bytes()).is_err());
        assert!(check(Mode::Json, StatusCode::OK, b"{}").is_err());
        assert!(check(Mode::Sse, StatusCode::OK, &whole[..whole.len() - 1]).is_err());
        let lost = [&mock_upstream::events()[1..]].concat().concat();
        assert!(check(Mode::Sse, StatusCode::OK, &lost).unwrap_err().starts_with("20 events"));
    }
}
