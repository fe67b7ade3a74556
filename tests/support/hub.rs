//! A stand-in for the Hugging Face hub on loopback, with one file, which knows what was asked and misbehaves on demand.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// What the server does with its one file.
#[derive(Default)]
pub struct Conduct {
    pub body: Vec<u8>,
    pub etag: Option<&'static str>,
    /// `x-linked-etag` and `x-linked-size` of the answer to HEAD.
    pub linked: Option<(String, usize)>,
    /// For each transfer in turn: cut it after so many bytes.
    pub cuts: VecDeque<usize>,
    /// Send the first half and then nothing more.
    pub stall: bool,
    /// Wait before sending.
    pub delay: Duration,
    /// Answer every request with this status.
    pub refuse: Option<&'static str>,
}

/// A hub on loopback: knows what was asked, and misbehaves on demand.
pub struct FakeHub {
    pub url: String,
    pub conduct: Arc<Mutex<Conduct>>,
    /// The heads of all requests.
    pub log: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    pub fn new(conduct: Conduct) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (conduct, log) = (Arc::new(Mutex::new(conduct)), Arc::new(Mutex::new(Vec::new())));
        let hub = Self { url, conduct: conduct.clone(), log: log.clone() };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (conduct, log) = (conduct.clone(), log.clone());
                // A client that goes away ends its connection, not the server.
                thread::spawn(move || drop(answer(stream, &conduct, &log)));
            }
        });
        hub
    }

    /// The heads of the requests with that method, in order.
    pub fn asked(&self, method: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|l| l.starts_with(method)).cloned().collect()
    }
}

fn answer(mut stream: TcpStream, conduct: &Mutex<Conduct>, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        head += &line;
    }
    let head = head.replace("\r\n", "\n");
    log.lock().unwrap().push(head.clone());
    let lower = head.to_ascii_lowercase();
    let field = |name: &str| lower.lines().find_map(|l| l.strip_prefix(&format!("{name}: ")).map(str::to_owned));
    let get = head.starts_with("GET");
    let (body, etag, linked, cut, stall, delay, refuse) = {
        let mut c = conduct.lock().unwrap();
        let cut = if get { c.cuts.pop_front() } else { None };
        (c.body.clone(), c.etag, c.linked.clone(), cut, c.stall, c.delay, c.refuse)
    };
    if let Some(status) = refuse {
        return write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    if !get {
        let linked = linked.map(|(sum, size)| format!("x-linked-etag: \"{sum}\"\r\nx-linked-size: {size}\r\n"));
        return write!(stream, "HTTP/1.1 200 OK\r\n{}connection: close\r\n\r\n", linked.unwrap_or_default());
    }
    thread::sleep(delay);
    let start: usize =
        field("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let valid = field("if-range").is_none_or(|v| Some(v.as_str()) == etag);
    let start = if valid { start } else { 0 };
    let (status, range) = match start {
        0 => ("200 OK", String::new()),
        n => ("206 Partial Content", format!("content-range: bytes {n}-{}/{}\r\n", body.len() - 1, body.len())),
    };
    let etag = etag.map(|e| format!("etag: {e}\r\n")).unwrap_or_default();
    let rest = &body[start..];
    write!(stream, "HTTP/1.1 {status}\r\n{etag}{range}content-length: {}\r\nconnection: close\r\n\r\n", rest.len())?;
    let end = cut.unwrap_or(rest.len()).min(rest.len());
    if stall {
        stream.write_all(&rest[..rest.len() / 2])?;
        stream.flush()?;
        thread::sleep(Duration::from_secs(60));
    }
    stream.write_all(&rest[..end])
}
