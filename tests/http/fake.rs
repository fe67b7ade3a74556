//! A gateway that does what the `model` says, a server around it, and a client that shows bytes as they are.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use weir::{
    backend::BackendError,
    domain::{
        Abort, BestBecause, Choice, Chunk, Completion, ContentPart, Context, DecidedBy, Decision, DecisionId,
        DocumentKv, ErrorKind, Feedback, FinishReason, Hash, KvAnswer, KvCleared, KvCommand, Need, PromptKv, Request,
        TokenLogprob, Usage, UsageSource,
    },
    gateway::{Answer, AnswerBody, Caller, Embedded, Explained, FleetStatus, GatewayError, Readiness, Served},
    http::{self, DecisionsQuery, Drained, HttpOptions, ServeOptions, Service},
    telemetry::Metrics,
};

pub const ID: &str = "0192f0c1-2f5c-7c30-9d8a-6f5a3c2b1a00";

pub fn id() -> DecisionId {
    ID.parse().unwrap()
}

/// Remembers what it was asked, and answers by the model's name.
#[derive(Default)]
pub struct Fake {
    pub requests: Mutex<Vec<(Request, Caller)>>,
    pub feedback: Mutex<Vec<(DecisionId, Feedback)>>,
    pub queries: Mutex<Vec<DecisionsQuery>>,
    pub unready: AtomicBool,
    /// Streams and calls that were dropped before their end.
    pub cancelled: Arc<AtomicUsize>,
    pub metrics: Arc<Metrics>,
}

/// Counts itself as cancelled unless it was disarmed.
struct Guard(Option<Arc<AtomicUsize>>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(count) = self.0.take() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn usage() -> Usage {
    Usage {
        prompt_tokens: 9,
        cached_tokens: 4,
        completion_tokens: 3,
        source: UsageSource::Reported,
        ..Usage::default()
    }
}

fn text(choice: u32, text: &str) -> Result<Chunk, GatewayError> {
    let logprobs = vec![TokenLogprob {
        token: text.to_owned(),
        logprob: -0.5,
        bytes: text.as_bytes().to_vec(),
        top: Vec::new(),
        entropy: None,
    }];
    Ok(Chunk::Text { choice, text: text.to_owned(), logprobs })
}

fn finish() -> Result<Chunk, GatewayError> {
    Ok(Chunk::Finish { choice: 0, reason: FinishReason::Stop })
}

pub fn failure(kind: ErrorKind) -> GatewayError {
    let mut error = BackendError::new(kind, format!("smol: this is a {}", kind.as_str()));
    if kind == ErrorKind::RateLimited {
        error.retry_after = Some(Duration::from_millis(1500));
    }
    GatewayError::Backend { id: id(), model: "smol".to_owned(), error }
}

#[async_trait]
impl Service for Fake {
    async fn chat(&self, request: Request, caller: Caller) -> Result<Answer, GatewayError> {
        let (model, stream) = (request.model.clone(), request.stream);
        self.requests.lock().unwrap().push((request, caller));
        let mut guard = Guard(Some(Arc::clone(&self.cancelled)));
        let hold = Duration::from_millis(300);
        let chunks: Vec<Result<Chunk, GatewayError>> = match &*model {
            "unknown" => {
                guard.0 = None;
                let served = vec!["auto".to_owned(), "smol".to_owned()];
                return Err(GatewayError::UnknownModel { name: model, served });
            }
            "refused" => {
                guard.0 = None;
                return Err(GatewayError::Refused { id: id(), reason: "rule pii-stays-home left no model".to_owned() });
            }
            "unavailable" => {
                guard.0 = None;
                return Err(GatewayError::Unavailable { id: id(), reason: "smol is not available".to_owned() });
            }
            "incapable" => {
                guard.0 = None;
                return Err(GatewayError::Incapable { id: id(), needs: vec![Need::Tools, Need::Images] });
            }
            "unrecorded" => return Err(GatewayError::NotRecorded("no space left on device".to_owned())),
            "draining" => return Err(GatewayError::Draining),
            "panics" => panic!("on purpose"),
            "upstream_400" => {
                let mut error = BackendError::new(ErrorKind::BadRequest, "smol: 422");
                error.status = Some(422);
                error.body = Some(Bytes::from_static(b"{\"error\":{\"message\":\"theirs\",\"code\":\"x\"}}"));
                return Err(GatewayError::Backend { id: id(), model, error });
            }
            "upstream_html" => {
                let mut error = BackendError::new(ErrorKind::BadRequest, "smol answered 400");
                error.status = Some(400);
                error.body = Some(Bytes::from_static(b"<html>"));
                return Err(GatewayError::Backend { id: id(), model, error });
            }
            "hangs" => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                unreachable!("the test is over long before");
            }
            "slow" => {
                tokio::time::sleep(hold).await;
                vec![text(0, "late"), finish(), Ok(Chunk::Usage(usage()))]
            }
            "slow_fails" => {
                tokio::time::sleep(hold).await;
                guard.0 = None;
                return Err(failure(ErrorKind::Timeout));
            }
            "breaks" => vec![text(0, "half"), Err(failure(ErrorKind::Cut))],
            "wire" => vec![
                Ok(Chunk::Wire(Bytes::from_static(b"{\"id\":\"chatcmpl-theirs\",\"choices\":[],\"their\":\"own\"}"))),
                Ok(Chunk::Usage(usage())),
            ],
            name => match ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == name) {
                Some(kind) => {
                    guard.0 = None;
                    return Err(failure(kind));
                }
                None => vec![text(0, "Hello"), text(0, " there"), finish(), Ok(Chunk::Usage(usage()))],
            },
        };
        let body = if stream {
            let endless = model == "endless";
            let silent = model == "silent";
            // A silent one thinks for a quarter of a second before each chunk.
            let after = stream::iter(chunks).then(move |chunk| async move {
                if silent {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
                chunk
            });
            let rest = stream::unfold(0u32, move |i| async move {
                if !endless {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
                Some((text(0, "more "), i + 1))
            });
            let end = stream::once(async move {
                guard.0 = None;
                drop(guard);
            })
            .filter_map(|()| async { None });
            AnswerBody::Stream(after.chain(rest).chain(end).boxed())
        } else {
            guard.0 = None;
            AnswerBody::Whole(match &*model {
                "wire" => Completion::Wire {
                    body: Bytes::from_static(b"{\"id\":\"chatcmpl-theirs\",\"their\":\"own\"}"),
                    usage: usage(),
                },
                _ => Completion::Choices {
                    choices: vec![Choice {
                        index: 0,
                        text: "Hello there".to_owned(),
                        logprobs: Vec::new(),
                        finish: FinishReason::Stop,
                    }],
                    usage: usage(),
                },
            })
        };
        Ok(Answer {
            id: id(),
            model: "smol".to_owned(),
            policy: "default".to_owned(),
            arm: "quick".to_owned(),
            created: 1_700_000_000,
            best_so_far: (model == "slow").then_some(BestBecause::Stopped { by: Abort::Deadline }),
            body,
        })
    }

    async fn decide(&self, request: Request, caller: Caller) -> Result<Explained, GatewayError> {
        self.requests.lock().unwrap().push((request, caller));
        let decision = Decision {
            policy: "default".to_owned(),
            policy_hash: Hash::of(b"policy"),
            state_seq: 3,
            decided_by: DecidedBy::Select,
            rule: None,
            arm: "quick".to_owned(),
            plan: None,
            fallback: vec![],
            retries: None,
            fallback_on: vec![],
            propensity: 0.5,
            candidates: vec![],
            features: vec![],
            rules: vec![],
            refusal: None,
            no_embedding: None,
            split: None,
            bounds: None,
            failover: None,
        };
        Ok(Explained { id: id(), decision, context: Context::default() })
    }

    async fn embeddings(&self, model: &str, texts: Vec<String>) -> Result<Embedded, GatewayError> {
        if model == "none" {
            return Err(GatewayError::NoEmbedder("no embedder is installed; run `weir models fetch`".to_owned()));
        }
        let vectors = texts.iter().map(|t| Arc::from(vec![t.len() as f32, 0.5])).collect();
        Ok(Embedded { model: "bge".to_owned(), vectors, tokens: 4 })
    }

    fn served(&self) -> Vec<Served> {
        let served = |id: &str, kind| Served { id: id.to_owned(), kind, created: 1, owned_by: "weir".to_owned() };
        vec![served("default", "policy"), served("org/smol", "model")]
    }

    fn fleet(&self) -> Vec<FleetStatus> {
        vec![FleetStatus {
            name: "org/smol".into(),
            kind: "local",
            available: true,
            running: 1,
            waiting: 0,
            breaker: None,
            limit_used: None,
            concurrency_limit: None,
            local: None,
        }]
    }

    async fn set_loaded(&self, name: &str, loaded: bool) -> Result<FleetStatus, GatewayError> {
        match self.fleet().pop().filter(|status| status.name == name) {
            Some(status) => Ok(FleetStatus { available: loaded, ..status }),
            None => Err(GatewayError::UnknownModel { name: name.to_owned(), served: vec!["org/smol".into()] }),
        }
    }

    async fn kv(&self, name: &str, command: KvCommand) -> Result<KvAnswer, GatewayError> {
        let invalid = |message: &str| GatewayError::Invalid { message: message.to_owned(), param: None };
        let documents = |request: &Request| {
            let parts = request.messages.iter().flat_map(|message| &message.content);
            let chunks = parts.filter(|part| matches!(part, ContentPart::Chunk(_)));
            let document = |pinned_s| DocumentKv { tokens: 64, in_memory: true, on_disk: false, pinned_s };
            let documents = |pinned_s| chunks.clone().map(|_| document(pinned_s)).collect();
            (request.sharing.len(), documents(None), documents(Some(1)))
        };
        let prompt =
            |tokens, documents| KvAnswer::Prompt(PromptKv { tokens, prefix_tokens: 32, documents, chunk_reuse: None });
        match command {
            _ if name != "org/smol" => {
                Err(GatewayError::UnknownModel { name: name.to_owned(), served: vec!["org/smol".into()] })
            }
            KvCommand::Stat => Err(invalid("not asked for: it is not loaded")),
            // The tokens are the length of who shares.
            KvCommand::Lookup(request) => Ok(prompt(documents(&request).0, documents(&request).1)),
            KvCommand::Pin(request, keep) => Ok(prompt(keep.as_secs() as usize, documents(&request).2)),
            KvCommand::Clear(None) => Ok(KvAnswer::Cleared(KvCleared { entries: 9, on_disk: 2 })),
            KvCommand::Clear(Some(_)) => Ok(KvAnswer::Cleared(KvCleared { entries: 1, on_disk: 0 })),
        }
    }

    async fn feedback(&self, id: DecisionId, feedback: Feedback) -> Result<bool, GatewayError> {
        let mut all = self.feedback.lock().unwrap();
        let key = feedback.idempotency_key.as_ref();
        let fresh = key.is_none() || all.iter().all(|(i, f)| *i != id || f.idempotency_key.as_ref() != key);
        all.push((id, feedback));
        Ok(fresh)
    }

    async fn decisions(&self, query: DecisionsQuery) -> Result<Vec<Value>, GatewayError> {
        if query.policy.as_deref() == Some("down") {
            return Err(GatewayError::Store("connection refused".to_owned()));
        }
        let rows = (0..query.limit.unwrap()).map(|i| json!({"id": format!("row-{i}")})).collect();
        self.queries.lock().unwrap().push(query);
        Ok(rows)
    }

    async fn decision(&self, wanted: DecisionId) -> Result<Value, GatewayError> {
        if wanted != id() {
            return Err(GatewayError::NotFound(format!("there is no decision {wanted}")));
        }
        Ok(json!({"id": wanted.to_string(), "record": {}}))
    }

    async fn readiness(&self) -> Readiness {
        let ready = !self.unready.load(Ordering::SeqCst);
        let log = if ready { "ok" } else { "no space left on device" };
        Readiness { ready, components: [("log".to_owned(), log.to_owned())].into() }
    }

    fn metrics(&self) -> String {
        self.metrics.render()
    }
}

/// A running server.
pub struct Server {
    pub fake: Arc<Fake>,
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Drained>,
}

impl Server {
    pub async fn start() -> Self {
        Self::with(HttpOptions::default(), ServeOptions::default()).await
    }

    pub async fn with(mut options: HttpOptions, serving: ServeOptions) -> Self {
        let fake = Arc::new(Fake::default());
        options.metrics = Arc::clone(&fake.metrics);
        let app = http::app(Arc::clone(&fake) as Arc<dyn Service>, options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let running = tokio::spawn(http::serve(listener, app, serving, shutdown));
        Self { fake, address, stop: Some(stop), running }
    }

    /// Begins the drain.
    pub fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits for the end of the drain.
    pub async fn stopped(self) -> Drained {
        timeout(Duration::from_secs(10), self.running).await.unwrap().unwrap()
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends a request on its own connection, and reads all that comes back.
    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        stream.write_all(&head(method, path, headers, body.len(), true)).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
        Reply::parse(&bytes)
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes()).await
    }

    pub async fn chat(&self, model: &str) -> Reply {
        self.post("/v1/chat/completions", &chat(model)).await
    }

    pub async fn stream(&self, model: &str) -> Reply {
        let mut body = chat(model);
        body["stream"] = true.into();
        self.post("/v1/chat/completions", &body).await
    }
}

pub fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "MARKERPROMPT"}]})
}

pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize, close: bool) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: weir\r\ncontent-length: {length}\r\n");
    if close {
        head.push_str("connection: close\r\n");
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// A response, taken apart.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: String,
    /// A chunked body that ended as it should.
    pub whole: bool,
}

impl Reply {
    pub fn parse(bytes: &[u8]) -> Self {
        let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("no response: {:?}", String::from_utf8_lossy(bytes));
        });
        let head = String::from_utf8(bytes[..split].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> =
            lines.map(|l| l.split_once(": ").unwrap()).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        let rest = &bytes[split + 4..];
        let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
        let (body, whole) = if chunked { unchunk(rest) } else { (rest.to_vec(), true) };
        Self { status, headers, body: String::from_utf8(body).unwrap(), whole }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Status, weir's headers and the body, for snapshots.
    pub fn transcript(&self) -> String {
        let mut out = format!("{}\n", self.status);
        for (name, value) in &self.headers {
            if name != "date" && name != "connection" {
                out.push_str(&format!("{name}: {value}\n"));
            }
        }
        out + "\n" + &self.body
    }
}

fn unchunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { return (body, false) };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
    }
}
