//! Scripted upstream servers on raw sockets, and requests to send them; shared by the tests of several modules.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};

use crate::domain::{ContentPart, Message, Request, Role, Sampling};

/// A request as the gateway would read it out of `body`, as far as backends look at it.
pub(crate) fn request(body: &str, stream: bool) -> Request {
    let json: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let text = |v: &serde_json::Value| vec![ContentPart::Text(v["content"].as_str().unwrap_or_default().to_owned())];
    let messages = json["messages"].as_array().into_iter().flatten();
    let messages: Vec<Message> = messages.map(|m| Message { role: Role::User, content: text(m) }).collect();
    Request {
        model: "auto".into(),
        messages: messages.into(),
        sampling: Sampling::default(),
        n: json["n"].as_u64().unwrap_or(1) as u32,
        logprobs: false,
        top_logprobs: 0,
        stream,
        include_usage: json["stream_options"]["include_usage"].as_bool().unwrap_or(false),
        needs: Vec::new(),
        metadata: BTreeMap::new(),
        user: None,
        session: None,
        client_retry: 0,
        priority: 0,
        exact: false,
        keep: None,
        sharing: String::new(),
        begun: None,
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

/// What an upstream server received.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received {
    pub(crate) head: String,
    pub(crate) body: String,
}

pub(crate) async fn receive(socket: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    loop {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head.split("content-length: ").nth(1).and_then(|t| t.split("\r\n").next()?.parse().ok());
            if bytes.len() >= end + 4 + length.unwrap_or(0) {
                return Some(Received { head, body: String::from_utf8(bytes[end + 4..].to_vec()).unwrap() });
            }
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// A server that hands every connection, numbered, to `handle` once a request has been read from it. Its base URL.
pub(crate) async fn upstream<F, Fut>(handle: F) -> String
where
    F: Fn(usize, Received, TcpStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let handle = Arc::new(handle);
        for number in 0.. {
            let Ok((mut socket, _)) = listener.accept().await else { return };
            socket.set_nodelay(true).unwrap();
            let handle = Arc::clone(&handle);
            tokio::spawn(async move {
                if let Some(received) = receive(&mut socket).await {
                    handle(number, received, socket).await;
                }
            });
        }
    });
    url
}

pub(crate) fn json(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}")
}

/// A stream whose end is the end of the connection.
pub(crate) fn events(transcript: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n{transcript}"
    )
}

pub(crate) const TRANSCRIPT: &str = concat!(
    ": comment\n\n",
    "data: {\"id\":\"up-1\",\"object\":\"chat.completion.chunk\",\"model\":\"real-7b\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}],\"usage\":null}\n\n",
    "data: {\"id\":\"up-1\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Grüße 漢🙂\"},\"finish_reason\":null}],\"usage\":null}\n\n",
    "data: {\"id\":\"up-1\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
    "data: {\"id\":\"up-1\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\n",
    "data: [DONE]\n\n",
);
