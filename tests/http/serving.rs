//! The server itself: connections, cancellation, heartbeats, drain, and what is logged.

use std::{
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use weir::{
    http::{HttpOptions, ServeOptions},
    telemetry::{self, LogFormat},
};

use super::fake::{ID, Reply, Server, chat, head};

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Reads until `end` has come.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&bytes).contains(end) {
        let read = timeout(Duration::from_secs(5), stream.read(&mut buffer)).await.unwrap().unwrap();
        assert!(read > 0, "closed before {end:?}: {}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&buffer[..read]);
    }
    String::from_utf8(bytes).unwrap()
}

fn streaming(model: &str) -> Vec<u8> {
    let mut body = chat(model);
    body["stream"] = true.into();
    let body = body.to_string();
    let mut bytes = head("POST", "/v1/chat/completions", &[], body.len(), false);
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        let body = chat("auto").to_string();
        stream.write_all(&head("POST", "/v1/chat/completions", &[], body.len(), false)).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        read_until(&mut stream, "\"cached_tokens\":4}}}").await;
        stream.write_all(&streaming("auto")).await.unwrap();
        read_until(&mut stream, "data: [DONE]\n\n\r\n0\r\n\r\n").await;
        // An error does not end the connection either.
        stream.write_all(&head("POST", "/v1/chat/completions", &[], 1, false)).await.unwrap();
        stream.write_all(b"{").await.unwrap();
        read_until(&mut stream, "invalid_json\"}}").await;
    }
    assert_eq!(server.fake.requests.lock().unwrap().len(), 6);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    let mut bytes = streaming("auto");
    bytes.extend(head("GET", "/healthz", &[], 0, true));
    stream.write_all(&bytes).await.unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    assert!(all.find("[DONE]").unwrap() < all.find("{\"status\":\"ok\"}").unwrap());
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_stream() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    stream.write_all(&streaming("endless")).await.unwrap();
    read_until(&mut stream, "more ").await;
    assert_eq!(server.fake.cancelled.load(Ordering::SeqCst), 0);
    drop(stream);
    until("the stream is dropped", || server.fake.cancelled.load(Ordering::SeqCst) == 1).await;
    let line = "http_server_requests_total{http_route=\"/v1/chat/completions\",http_response_status_code=\"499\"} 1";
    until("the metrics say 499", || server.fake.metrics.render().contains(line)).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_cancels_it() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    stream.write_all(&streaming("hangs")).await.unwrap();
    until("the request arrives", || server.fake.requests.lock().unwrap().len() == 1).await;
    drop(stream);
    until("the call is dropped", || server.fake.cancelled.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn heartbeats_until_something_streams() {
    let server = Server::with(soon(), ServeOptions::default()).await;
    let reply = server.stream("silent").await;
    let beats = reply.body.matches(": waiting\n\n").count();
    assert!((2..=5).contains(&beats), "{}", reply.body);
    let (waiting, rest) = reply.body.split_at(reply.body.find("data: ").unwrap());
    assert_eq!(waiting, ": waiting\n\n".repeat(beats), "only before the first chunk");
    assert!(rest.contains("Hello") && rest.ends_with("data: [DONE]\n\n"));
    assert!(!rest.contains(": waiting"), "{rest}");
}

fn soon() -> HttpOptions {
    HttpOptions { heartbeat: Duration::from_millis(50), ..HttpOptions::default() }
}

#[tokio::test]
async fn the_head_goes_out_before_an_answer_that_is_long_in_coming() {
    let server = Server::with(soon(), ServeOptions::default()).await;
    let mut stream = server.connect().await;
    let asked = Instant::now();
    stream.write_all(&streaming("slow")).await.unwrap();
    let begin = read_until(&mut stream, ": waiting\n\n").await;
    assert!(asked.elapsed() < Duration::from_millis(250), "the answer takes 300: {:?}", asked.elapsed());
    assert!(begin.starts_with("HTTP/1.1 200 OK\r\n") && begin.contains("text/event-stream"), "{begin}");
    assert!(!begin.contains("x-weir-model"), "nobody knows yet: {begin}");
    let rest = read_until(&mut stream, "data: [DONE]\n\n").await;
    assert!(rest.contains(": waiting\n\n"), "{rest}");
    let said = format!(
        ": x-request-id: {ID}\n: x-weir-policy: default\n: x-weir-arm: quick\n: x-weir-model: smol\n: x-weir-best-so-far: the deadline passed\n\n"
    );
    let (before, after) = rest.split_at(rest.find("data: ").unwrap());
    assert!(before.contains(&said), "{before}");
    assert!(after.contains("late") && !after.contains("\n: "), "{after}");

    // One that comes in time says it all in its head, and fails by its status.
    let reply = server.stream("auto").await;
    assert_eq!(reply.header("x-weir-model"), Some("smol"));
    assert!(!reply.body.contains(": x-") && !reply.body.contains(": waiting"));
    assert_eq!(server.stream("timeout").await.status, 504);
    // Who asks for a whole answer gets no head without it.
    let reply = server.chat("slow_fails").await;
    assert_eq!(reply.status, 504, "{}", reply.body);
}

#[tokio::test]
async fn what_goes_wrong_after_the_head_is_an_error_event() {
    let server = Server::with(soon(), ServeOptions::default()).await;
    let reply = server.stream("slow_fails").await;
    assert_eq!(reply.status, 200);
    let event = reply.body.trim_start_matches(": waiting\n\n");
    assert!(event.starts_with("data: {\"error\":{") && event.contains("smol: this is a timeout"), "{}", reply.body);
    assert!(!event.contains("[DONE]"), "{event}");
    let line = "http_server_requests_total{http_route=\"/v1/chat/completions\",http_response_status_code=\"504\"} 1";
    until("the metrics say 504", || server.fake.metrics.render().contains(line)).await;

    // A client that leaves after the head cancels the call.
    let mut stream = server.connect().await;
    stream.write_all(&streaming("hangs")).await.unwrap();
    read_until(&mut stream, ": waiting\n\n").await;
    assert_eq!(server.fake.cancelled.load(Ordering::SeqCst), 0);
    drop(stream);
    until("the call is dropped", || server.fake.cancelled.load(Ordering::SeqCst) == 1).await;
    let line = "http_server_requests_total{http_route=\"/v1/chat/completions\",http_response_status_code=\"499\"} 1";
    until("the metrics say 499", || server.fake.metrics.render().contains(line)).await;
}

#[tokio::test]
async fn a_drain_lets_requests_finish_and_refuses_new_ones() {
    let mut server = Server::start().await;
    let mut idle = server.connect().await;
    idle.write_all(&head("GET", "/healthz", &[], 0, false)).await.unwrap();
    read_until(&mut idle, "\"ok\"}").await;
    let mut busy = server.connect().await;
    busy.write_all(&streaming("slow")).await.unwrap();
    until("the request arrives", || server.fake.requests.lock().unwrap().len() == 1).await;

    server.stop();
    // An idle connection is closed.
    let mut rest = Vec::new();
    timeout(Duration::from_secs(2), idle.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
    // A new one is refused in so many words, but for questions about health.
    let refused = server.chat("auto").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("2")));
    assert_eq!(refused.json()["error"]["code"], "draining");
    assert_eq!(server.get("/healthz").await.status, 200);
    // What was under way ends as it should.
    let answer = read_until(&mut busy, "data: [DONE]\n\n").await;
    assert!(answer.contains("late"));
    assert_eq!(server.fake.cancelled.load(Ordering::SeqCst), 0);
    assert_eq!(server.stopped().await.cut, 0);
}

#[tokio::test]
async fn a_drain_ends() {
    let serving = ServeOptions { drain: Duration::from_millis(200), ..ServeOptions::default() };
    let mut server = Server::with(HttpOptions::default(), serving).await;
    let mut busy = server.connect().await;
    busy.write_all(&streaming("endless")).await.unwrap();
    read_until(&mut busy, "more ").await;
    let fake = Arc::clone(&server.fake);
    let started = Instant::now();
    server.stop();
    assert_eq!(server.stopped().await.cut, 1);
    assert!(started.elapsed() < Duration::from_secs(3));
    assert_eq!(fake.cancelled.load(Ordering::SeqCst), 1, "what is cut off is cancelled");
}

#[tokio::test]
async fn a_head_that_never_ends_is_given_up() {
    let serving = ServeOptions { head: Duration::from_millis(100), ..ServeOptions::default() };
    let server = Server::with(HttpOptions::default(), serving).await;
    let mut stream = server.connect().await;
    stream.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost:").await.unwrap();
    let mut rest = Vec::new();
    timeout(Duration::from_secs(3), stream.read_to_end(&mut rest)).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_no_http_is_refused() {
    let server = Server::start().await;
    let mut stream = server.connect().await;
    stream.write_all(b"\x16\x03\x01 hello\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    timeout(Duration::from_secs(3), stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(Reply::parse(&rest).status, 400);
    assert_eq!(server.get("/healthz").await.status, 200);
}

/// Collects log lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn prompts_are_never_logged() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = telemetry::subscriber(LogFormat::Json, "trace", move || writer.clone()).unwrap();
    // This test's runtime has one thread, so its thread's default sees all that the server does.
    let _guard = tracing::subscriber::set_default(subscriber);

    let mut server = Server::start().await;
    for model in ["auto", "unknown", "refused", "timeout", "panics", "breaks", "wire", "upstream_400"] {
        server.chat(model).await;
        server.stream(model).await;
    }
    let wrong = serde_json::json!({"model": "auto", "messages": "MARKERPROMPT"});
    assert_eq!(server.post("/v1/chat/completions", &wrong).await.status, 400);
    let broken = b"{\"model\": \"auto\", \"messages\": [{\"role\": \"user\", \"content\": \"MARKERPROMPT\"]}";
    assert_eq!(server.send("POST", "/v1/chat/completions", &[], broken).await.status, 400);
    let embed = serde_json::json!({"model": "bge", "input": ["MARKERPROMPT", ""]});
    assert_eq!(server.post("/v1/embeddings", &embed).await.status, 400);
    server.stop();
    server.stopped().await;

    let log = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("\"message\":\"draining\"") && log.contains("request failed"), "the log was caught: {log}");
    assert!(log.contains("invalid_type"), "refusals are there by their label: {log}");
    assert!(!log.contains("MARKERPROMPT"), "{log}");
}
