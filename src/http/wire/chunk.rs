//! A streamed answer as server-sent events: `chat.completion.chunk` objects, heartbeats, the error that ends a stream,
//! and `[DONE]`. Appends to a buffer that the caller reuses; what does not change between chunks is formatted once.

use std::io;

use axum::http::HeaderName;
use bytes::{BufMut, BytesMut};
use serde::Serialize;

use super::completion::{LogprobsBody, UsageBody, finish_reason};
use crate::domain::{Chunk, DecisionId, TokenLogprob};

/// A comment: clients skip it, proxies see that the connection lives.
pub const HEARTBEAT: &[u8] = b": waiting\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";
const DATA: &[u8] = b"data: ";
const END: &[u8] = b"\n\n";

/// Writes the chunks of one stream.
#[derive(Debug)]
pub struct Encoder {
    /// From `data: {"id":` up to the choices.
    head: Vec<u8>,
    /// After the choices.
    tail: &'static [u8],
    include_usage: bool,
    logprobs: bool,
    /// Choices whose first delta, which carries the role, was written.
    started: Vec<bool>,
    /// Whether the chunks come from a remote server, which writes its own usage.
    wired: bool,
}

impl Encoder {
    /// For the stream of decision `id`; `created` in Unix seconds. `include_usage` and `logprobs`: what the client asked.
    pub fn new(id: DecisionId, model: &str, created: i64, include_usage: bool, logprobs: bool) -> Self {
        let mut head = Vec::with_capacity(160);
        head.extend_from_slice(b"data: {\"id\":\"chatcmpl-");
        head.extend_from_slice(id.0.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()).as_bytes());
        head.extend_from_slice(b"\",\"object\":\"chat.completion.chunk\",\"created\":");
        json(&mut head, &created);
        head.extend_from_slice(b",\"model\":");
        json(&mut head, &model);
        head.extend_from_slice(b",\"choices\":[");
        let tail: &[u8] = if include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        Self { head, tail, include_usage, logprobs, started: Vec::new(), wired: false }
    }

    /// Appends one chunk as an event, or nothing where the chunk is not for the client.
    pub fn chunk(&mut self, chunk: &Chunk, out: &mut BytesMut) {
        match chunk {
            Chunk::Wire(data) => {
                self.wired = true;
                wire(data, out);
            }
            Chunk::Text { choice, text, logprobs } => self.text(*choice, text, logprobs, out),
            Chunk::Finish { choice, reason } => {
                out.extend_from_slice(&self.head);
                self.delta(*choice, out);
                out.extend_from_slice(b"},\"logprobs\":null,\"finish_reason\":\"");
                out.extend_from_slice(finish_reason(*reason).as_bytes());
                out.extend_from_slice(b"\"}");
                out.extend_from_slice(self.tail);
            }
            Chunk::Usage(usage) if self.include_usage && !self.wired => {
                out.extend_from_slice(&self.head);
                out.extend_from_slice(b"],\"usage\":");
                json_to(out, &UsageBody::from(*usage));
                out.extend_from_slice(b"}\n\n");
            }
            Chunk::Usage(_) => {}
        }
    }

    fn text(&mut self, choice: u32, text: &str, logprobs: &[TokenLogprob], out: &mut BytesMut) {
        out.extend_from_slice(&self.head);
        let comma: &[u8] = if self.delta(choice, out) { b",\"content\":" } else { b"\"content\":" };
        out.extend_from_slice(comma);
        json_to(out, &text);
        out.extend_from_slice(b"},\"logprobs\":");
        if self.logprobs {
            json_to(out, &LogprobsBody::new(logprobs));
        } else {
            out.extend_from_slice(b"null");
        }
        out.extend_from_slice(b",\"finish_reason\":null}");
        out.extend_from_slice(self.tail);
    }

    /// Opens a choice and its delta; writes the role, and returns true, when it is the choice's first.
    fn delta(&mut self, choice: u32, out: &mut BytesMut) -> bool {
        out.extend_from_slice(b"{\"index\":");
        json_to(out, &choice);
        out.extend_from_slice(b",\"delta\":{");
        let at = choice as usize;
        if self.started.len() <= at {
            self.started.resize(at + 1, false);
        }
        let first = !std::mem::replace(&mut self.started[at], true);
        if first {
            out.extend_from_slice(b"\"role\":\"assistant\"");
        }
        first
    }
}

/// Appends a remote server's event. It is spliced unread; only a line feed inside, which would end the event, is mended.
fn wire(data: &[u8], out: &mut BytesMut) {
    out.reserve(DATA.len() + data.len() + END.len());
    if data.contains(&b'\n') {
        for line in data.split(|b| *b == b'\n') {
            out.extend_from_slice(DATA);
            out.extend_from_slice(line);
            out.extend_from_slice(b"\n");
        }
        out.extend_from_slice(b"\n");
        return;
    }
    out.extend_from_slice(DATA);
    out.extend_from_slice(data);
    out.extend_from_slice(END);
}

/// Appends names and values as comments, one event's worth of them.
pub fn comments(said: &[(HeaderName, String)], out: &mut BytesMut) {
    for (name, value) in said {
        out.extend_from_slice(b": ");
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        // A line break would end the comment.
        out.extend_from_slice(value.replace(char::is_control, " ").as_bytes());
        out.extend_from_slice(b"\n");
    }
    if !said.is_empty() {
        out.extend_from_slice(b"\n");
    }
}

/// Appends the end of a stream that went right.
pub fn done(out: &mut BytesMut) {
    out.extend_from_slice(DONE);
}

/// Appends an error object as the last event. No `[DONE]` may follow: the answer is not whole.
pub fn error(body: &[u8], out: &mut BytesMut) {
    wire(body, out);
}

fn json_to<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    written(serde_json::to_writer(out.writer(), value));
}

fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    written(serde_json::to_writer(out as &mut dyn io::Write, value));
}

/// Writing strings and numbers to memory has no way to fail.
fn written(result: serde_json::Result<()>) {
    debug_assert!(result.is_ok());
}
