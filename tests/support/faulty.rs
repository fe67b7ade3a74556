//! Upstream servers that misbehave by plan: each is one model of a fleet, on raw sockets, so that an answer can be cut at any
//! byte. What it does with a request is drawn from a seed, its name and the request's number, and from nothing else.
//!
//! The answer of a request is known ([`answer_to`]): whoever asked can tell a whole answer from a piece, and his own from
//! another's.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// What a server does with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Conduct {
    /// Answers as asked.
    Good,
    /// The same, in many small pieces.
    Drip,
    /// Says nothing, until the caller leaves.
    StallBeforeHead,
    /// Stops within its answer, until the caller leaves.
    StallWithin,
    CutHead,
    /// At any byte of what follows the head.
    CutBody,
    /// In the middle of a character.
    CutCharacter,
    /// In the middle of a field of server-sent events, or of JSON.
    CutField,
    /// 429 with `retry-after`, sensible or not, or without.
    TooMany,
    /// 500, 502 or 503 with a web page.
    Failure,
    /// Something else than JSON, at the start or in the middle of a stream.
    NotJson,
    /// JSON that is no completion.
    WrongShape,
    /// A completion without a choice.
    NoChoice,
    /// An error object with status 200, or as an event in the middle of a stream.
    ErrorInside,
    /// 200 and nothing.
    Empty,
    /// A line of a megabyte.
    HugeLine,
    /// Announces more bytes than it sends, and closes.
    LongLength,
    /// Announces fewer bytes than it sends.
    ShortLength,
    BrokenChunks,
    /// A whole answer that nobody asked for follows the answer.
    Surplus,
    /// `data: [DONE]` and nothing else.
    DoneAlone,
    /// A good answer with token counts that are none, or none at all.
    LyingUsage,
}

use Conduct::*;

/// The conducts of a server by weight, and the numbers of the requests in which it is ill: it fails them all.
#[derive(Clone, Debug)]
pub struct Character {
    pub name: &'static str,
    pub conducts: &'static [(u32, Conduct)],
    pub ill: Range<u64>,
}

/// A server that runs for as long as the test's runtime.
pub struct Faulty {
    pub name: &'static str,
    pub url: String,
    state: Arc<State>,
}

struct State {
    character: Character,
    seed: u64,
    requests: AtomicU64,
    conducts: Mutex<BTreeMap<Conduct, u64>>,
    /// Requests that it takes at once; what is beyond them gets 429.
    places: AtomicUsize,
    taken: AtomicUsize,
    /// How long each takes.
    work: Duration,
}

/// What this question's answer is: characters of one to four bytes, and an end that can be told.
pub fn answer_to(question: &str) -> String {
    format!("An answer to {question}: Grüße, 漢字 and \"🙂\" as they come; nothing is missing up to the end.")
}

impl Faulty {
    /// Listens on a free port.
    pub async fn start(character: Character, seed: u64) -> Self {
        Self::start_small(character, seed, usize::MAX, Duration::ZERO).await
    }

    /// One that takes so many requests at once, each for so long, and answers 429 to what is beyond them.
    pub async fn start_small(character: Character, seed: u64, places: usize, work: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let name = character.name;
        let seed = name.bytes().fold(seed, |seed, byte| Draws(seed ^ u64::from(byte)).next());
        let state = Arc::new(State {
            character,
            seed,
            requests: AtomicU64::new(0),
            conducts: Mutex::default(),
            places: AtomicUsize::new(places),
            taken: AtomicUsize::new(0),
            work,
        });
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let state = Arc::clone(&serving);
                tokio::spawn(async move {
                    let _ = socket.set_nodelay(true);
                    let _ = state.serve(socket).await;
                });
            }
        });
        Self { name, url, state }
    }

    /// Requests that have come.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// From now on it takes so many requests at once.
    pub fn grow_to(&self, places: usize) {
        self.state.places.store(places, Ordering::SeqCst);
    }

    /// What it never did although it is in its character.
    pub fn untried(&self) -> Vec<Conduct> {
        let done = self.conducts();
        let all = self.state.character.conducts.iter().map(|(_, conduct)| *conduct);
        all.filter(|conduct| !done.contains_key(conduct)).collect()
    }

    /// What was done with them.
    pub fn conducts(&self) -> BTreeMap<Conduct, u64> {
        self.state.conducts.lock().unwrap().clone()
    }
}

/// SplitMix64.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

impl State {
    /// Each conduct once to begin with, as few requests may come; then by their weights.
    fn draw(&self) -> (Conduct, Draws) {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let mut draws = Draws(self.seed ^ number.wrapping_mul(0xa076_1d64_78bd_642f));
        let Character { conducts, ill, .. } = &self.character;
        let total: u32 = conducts.iter().map(|(weight, _)| weight).sum();
        let mut left = draws.below(total as usize) as u32;
        let drawn = conducts.iter().find(|(weight, _)| {
            let this = left < *weight;
            left = left.saturating_sub(*weight);
            this
        });
        let first = conducts.get(number as usize);
        let conduct = if ill.contains(&number) { Failure } else { first.or(drawn).unwrap().1 };
        *self.conducts.lock().unwrap().entry(conduct).or_default() += 1;
        (conduct, draws)
    }

    /// Requests of one connection, for as long as it can be kept.
    async fn serve(&self, mut socket: TcpStream) -> std::io::Result<()> {
        while let Some(body) = receive(&mut socket).await? {
            let body: Value = serde_json::from_slice(&body).unwrap();
            let (conduct, draws) = self.draw();
            let question = body["messages"][0]["content"].as_str().unwrap();
            let reply = Reply::new(question, body["stream"] == true, draws);
            let full = self.taken.fetch_add(1, Ordering::SeqCst) >= self.places.load(Ordering::SeqCst);
            let conduct = if full { TooMany } else { conduct };
            if !full && !self.work.is_zero() {
                tokio::time::sleep(self.work).await;
            }
            // Before its end is seen, as the next one may follow at once.
            self.taken.fetch_sub(1, Ordering::SeqCst);
            if !reply.give(conduct, &mut socket).await? {
                break;
            }
        }
        Ok(())
    }
}

/// The body of the next request; `None` when the caller is done.
async fn receive(socket: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head.split("content-length: ").nth(1).and_then(|t| t.split("\r\n").next()?.parse().ok());
            let whole = end + 4 + length.unwrap_or(0usize);
            if bytes.len() >= whole {
                return Ok(Some(bytes[end + 4..whole].to_vec()));
            }
        }
        if socket.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

/// The answer to one request, and the ways to spoil it.
struct Reply {
    stream: bool,
    /// Whether a stream's body is framed; otherwise the connection's end is its end.
    chunked: bool,
    text: String,
    draws: Draws,
}

const ID: &str = "up-1";

/// Counts that are none: not whole, negative, beyond all measure, of another type, missing.
const LIES: [&str; 10] = [
    r#"{"prompt_tokens":-7,"completion_tokens":-1,"total_tokens":-8}"#,
    r#"{"prompt_tokens":99999999999999999999,"completion_tokens":1e30}"#,
    r#"{"prompt_tokens":4294967295,"completion_tokens":4294967295,"total_tokens":0}"#,
    r#"{"prompt_tokens":12.5,"completion_tokens":3.25}"#,
    r#"{"prompt_tokens":100000,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":200000}}"#,
    r#"{"prompt_tokens":"many","completion_tokens":[]}"#,
    r#"{"completion_tokens":null,"prompt_tokens_details":{"cached_tokens":-1}}"#,
    // Not 1e999: that is JSON and passes through as it is, but many clients cannot read it.
    r#"{"prompt_tokens":1e300,"completion_tokens":1}"#,
    "{}",
    "null",
];

impl Reply {
    fn new(question: &str, stream: bool, mut draws: Draws) -> Self {
        Self { stream, chunked: draws.below(2) == 0, text: answer_to(question), draws }
    }

    /// Does as `conduct` says; whether the connection may serve another request.
    async fn give(mut self, conduct: Conduct, socket: &mut TcpStream) -> std::io::Result<bool> {
        let usage = match conduct {
            LyingUsage => self.draws.one_of(&LIES),
            _ => r#"{"prompt_tokens":9,"completion_tokens":20,"total_tokens":29}"#,
        };
        let body = self.body(usage);
        let head = self.head(body.len());
        let whole = [&head[..], &body].concat();
        match conduct {
            Good | LyingUsage => {
                socket.write_all(&whole).await?;
                return Ok(self.chunked || !self.stream);
            }
            Drip => {
                let size = whole.len() / 40 + 1;
                for piece in whole.chunks(size) {
                    socket.write_all(piece).await?;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                return Ok(self.chunked || !self.stream);
            }
            StallBeforeHead => {}
            StallWithin => socket.write_all(&whole[..head.len() + body.len() / 2]).await?,
            CutHead => socket.write_all(&whole[..self.draws.below(head.len())]).await?,
            CutBody => socket.write_all(&whole[..head.len() + self.draws.below(body.len())]).await?,
            CutCharacter => {
                let at = find(&whole, "🙂".as_bytes()) + 1 + self.draws.below(3);
                socket.write_all(&whole[..at]).await?;
            }
            CutField => {
                let field = if self.stream { "data: {" } else { "\"finish_reason\"" };
                let at = rfind(&whole, field.as_bytes()) + 1 + self.draws.below(field.len() - 1);
                socket.write_all(&whole[..at]).await?;
            }
            TooMany => {
                let wishes = ["", "0", "0.2", "1", "3600", "-1", "soon", "4294967295.5", "1e400", "nan"];
                let wish = match self.draws.one_of(&wishes) {
                    "" => String::new(),
                    wish => format!("retry-after: {wish}\r\n"),
                };
                let body = r#"{"error":{"message":"slow down","type":"requests","code":"rate_limit_exceeded"}}"#;
                let answer = plain("429 Too Many Requests", "application/json", &wish, body.as_bytes());
                socket.write_all(&answer).await?;
                return Ok(true);
            }
            Failure => {
                let status = self.draws.one_of(&["500 Internal Server Error", "502 Bad Gateway", "503 x"]);
                let page = "<html><body><h1>Oops</h1></body></html>";
                socket.write_all(&plain(status, "text/html", "", page.as_bytes())).await?;
                return Ok(true);
            }
            NotJson => {
                let nonsense: &[&[u8]] = &[
                    b"nonsense",
                    b"{\"id\":\"up-1\",\"choices\":[}",
                    b"{\"id\":\"up-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\xff\xfe\"},\"message\":{\"content\":\"\xff\"}}]}",
                    b"<html>{}</html>",
                ];
                let nonsense = self.draws.one_of(nonsense);
                socket.write_all(&self.with_event(nonsense)).await?;
            }
            WrongShape => {
                let shapes: &[&[u8]] =
                    &[b"[1, 2]", b"null", b"\"text\"", b"{\"result\":\"ok\"}", b"{\"id\":\"x\",\"choices\":\"none\"}"];
                let shape = self.draws.one_of(shapes);
                socket.write_all(&self.instead(shape)).await?;
            }
            NoChoice => {
                let body = self.draws.one_of(&[r#"{"id":"up-1","choices":[]}"#, r#"{"id":"up-1","choices":[ null ]}"#]);
                let body = if self.stream { format!("{body}\n\ndata: [DONE]") } else { body.to_owned() };
                socket.write_all(&self.instead(body.as_bytes())).await?;
            }
            ErrorInside => {
                let error = br#"{"error":{"message":"overloaded","type":"server_error","code":"overloaded"}}"#;
                let answer = match self.draws.below(2) {
                    // Whole, whatever was asked.
                    0 => plain("200 OK", "application/json", "", error),
                    _ => self.with_event(error),
                };
                socket.write_all(&answer).await?;
            }
            Empty => socket.write_all(&plain("200 OK", self.kind(), "", b"")).await?,
            HugeLine => {
                let line = vec![b'x'; 1 << 20];
                socket.write_all(&self.with_event(&line)).await?;
            }
            LongLength => {
                let body = self.content(usage);
                socket.write_all(&self.announcing(body.len() + 100, &body)).await?;
            }
            ShortLength => {
                let body = self.content(usage);
                let short = 1 + self.draws.below(body.len() / 2);
                socket.write_all(&self.announcing(body.len() - short, &body)).await?;
            }
            BrokenChunks => {
                let body = self.content(usage);
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type:";
                let mut answer = format!("{head} {}\r\n\r\n", self.kind()).into_bytes();
                let half = body.len() / 2;
                answer.extend(format!("{half:x}\r\n").bytes());
                answer.extend(&body[..half]);
                answer.extend(self.draws.one_of(&["\r\nzz\r\n", "no line end here", "\r\n-5\r\n"]).bytes());
                answer.extend(&body[half..]);
                socket.write_all(&answer).await?;
            }
            Surplus => {
                // After a body without a frame there is no other.
                let framed = self.chunked || !self.stream;
                let nobodys = Self { text: "An answer to nobody.".to_owned(), ..self };
                let body = nobodys.body(usage);
                let more = [nobodys.head(body.len()), body].concat();
                socket.write_all(&[&whole[..], if framed { &more } else { &[] }].concat()).await?;
                return Ok(framed);
            }
            DoneAlone => socket.write_all(&self.instead(b"[DONE]")).await?,
        }
        match conduct {
            StallBeforeHead | StallWithin => _ = socket.read_u8().await,
            _ => {}
        }
        Ok(false)
    }

    /// The head of an answer whose body, framed, has this length.
    fn head(&self, length: usize) -> Vec<u8> {
        let framing = match (self.stream, self.chunked) {
            (false, _) => format!("content-type: application/json\r\ncontent-length: {length}\r\n"),
            (true, true) => "content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n".to_owned(),
            (true, false) => "content-type: text/event-stream\r\nconnection: close\r\n".to_owned(),
        };
        format!("HTTP/1.1 200 OK\r\n{framing}\r\n").into_bytes()
    }

    /// The answer before it is framed.
    fn content(&self, usage: &str) -> Vec<u8> {
        if self.stream {
            return self.events(usage).concat().into_bytes();
        }
        let message = json!({"role": "assistant", "content": self.text});
        format!(
            r#"{{"id":"{ID}","object":"chat.completion","created":1,"model":"real","choices":[{{"index":0,"message":{message},"finish_reason":"stop"}}],"usage":{usage}}}"#
        )
        .into_bytes()
    }

    fn body(&self, usage: &str) -> Vec<u8> {
        if !(self.stream && self.chunked) {
            return self.content(usage);
        }
        let mut out = Vec::new();
        for event in self.events(usage) {
            out.extend(format!("{:x}\r\n{event}\r\n", event.len()).bytes());
        }
        out.extend(b"0\r\n\r\n");
        out
    }

    fn events(&self, usage: &str) -> Vec<String> {
        let chunk = |delta: Value, finish: Value| {
            let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
            format!(
                "data: {{\"id\":\"{ID}\",\"object\":\"chat.completion.chunk\",\"model\":\"real\",\"choices\":[{choice}]}}\n\n"
            )
        };
        let characters: Vec<char> = self.text.chars().collect();
        let mut events = vec![chunk(json!({"role": "assistant", "content": ""}), Value::Null)];
        for piece in characters.chunks(9) {
            events.push(chunk(json!({"content": String::from_iter(piece)}), Value::Null));
        }
        events.push(chunk(json!({}), json!("stop")));
        events.push(format!("data: {{\"id\":\"{ID}\",\"choices\":[],\"usage\":{usage}}}\n\n"));
        events.push("data: [DONE]\n\n".to_owned());
        events
    }

    /// An answer that says this and nothing else.
    fn instead(&self, what: &[u8]) -> Vec<u8> {
        let event = [b"data: ", what, b"\n\n"].concat();
        plain("200 OK", self.kind(), "", if self.stream { &event } else { what })
    }

    /// A stream with this event at its start or in its middle; as a whole answer, this.
    fn with_event(&mut self, what: &[u8]) -> Vec<u8> {
        if !self.stream {
            return self.instead(what);
        }
        let events = self.events("null");
        let at = self.draws.one_of(&[0, 3]);
        let (before, after) = (events[..at].concat(), events[at..].concat());
        let body = [before.as_bytes(), b"data: ", what, b"\n\n", after.as_bytes()].concat();
        plain("200 OK", "text/event-stream", "", &body)
    }

    fn announcing(&self, length: usize, body: &[u8]) -> Vec<u8> {
        let kind = self.kind();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n");
        [head.as_bytes(), body].concat()
    }

    /// The type of what was asked for.
    fn kind(&self) -> &'static str {
        if self.stream { "text/event-stream" } else { "application/json" }
    }
}

fn plain(status: &str, kind: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{headers}content-length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|w| w == what).unwrap()
}

fn rfind(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).rposition(|w| w == what).unwrap()
}
