//! Calls of scripted upstream servers: raw sockets, so that a stream can be cut at any byte.

mod connections;
mod rate_limits;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::StreamExt as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};

use super::{
    testing::{Received, TRANSCRIPT, events, json, receive, request, upstream},
    *,
};
use crate::domain::{CallSpec, Chunk, DecisionId};

/// A server that always answers these bytes and closes; what it received comes out of the channel.
async fn always(answer: impl Into<Vec<u8>>) -> (String, mpsc::UnboundedReceiver<Received>) {
    let answer: Arc<[u8]> = answer.into().into();
    let (tell, told) = mpsc::unbounded_channel();
    let url = upstream(move |_, received, mut socket| {
        let (answer, tell) = (Arc::clone(&answer), tell.clone());
        async move {
            let _ = tell.send(received);
            let _ = socket.write_all(&answer).await;
        }
    })
    .await;
    (url, told)
}

/// A stream in chunked encoding, one chunk per event.
fn chunked(transcript: &str) -> String {
    let mut out = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for event in transcript.split_inclusive("\n\n") {
        out.push_str(&format!("{:x}\r\n{event}\r\n", event.len()));
    }
    out + "0\r\n\r\n"
}

const BODY: &str = r#"{"model":"auto","stream":true,"messages":[{"role":"user","content":"hello"}]}"#;

fn remote(url: &str) -> RemoteConfig {
    RemoteConfig { model: UpstreamModel::Named("real".into()), ..RemoteConfig::new("fast", url) }
}

fn call(body: &str, stream: bool) -> Call {
    Call {
        id: DecisionId::new(),
        index: 0,
        spec: CallSpec::bare("fast"),
        request: Arc::new(request(body, stream)),
        client_authorization: None,
        deadline: None,
    }
}

/// All chunks up to the end or the first error.
async fn collect(backend: &RemoteBackend, call: Call) -> (Vec<Chunk>, Option<BackendError>) {
    let mut chunks = match backend.start(call).await {
        Ok(Reply::Stream { chunks, .. }) => chunks,
        Ok(Reply::Whole { .. }) => panic!("a whole answer to a stream"),
        Err(error) => return (Vec::new(), Some(error)),
    };
    let mut out = Vec::new();
    while let Some(item) = chunks.next().await {
        match item {
            Ok(chunk) => out.push(chunk),
            Err(error) => {
                assert!(chunks.next().await.is_none(), "an error is the last item");
                return (out, Some(error));
            }
        }
    }
    (out, None)
}

async fn stream_of(answer: impl Into<Vec<u8>>, body: &str) -> (Vec<Chunk>, Option<BackendError>) {
    let (url, _told) = always(answer).await;
    collect(&RemoteBackend::new(remote(&url)).unwrap(), call(body, true)).await
}

async fn whole_of(answer: impl Into<Vec<u8>>) -> Result<(Bytes, Usage, Option<String>), BackendError> {
    let (url, _told) = always(answer).await;
    match RemoteBackend::new(remote(&url)).unwrap().start(call(BODY, false)).await? {
        Reply::Whole { completion: Completion::Wire { body, usage }, model_reported } => {
            Ok((body, usage, model_reported))
        }
        _ => panic!("not a whole answer"),
    }
}

fn wires(chunks: &[Chunk]) -> Vec<String> {
    let text = |c: &Chunk| match c {
        Chunk::Wire(bytes) => Some(String::from_utf8(bytes.to_vec()).unwrap()),
        _ => None,
    };
    chunks.iter().filter_map(text).collect()
}

fn reported(p: u32, c: u32, k: u32) -> Usage {
    Usage {
        prompt_tokens: p,
        completion_tokens: c,
        cached_tokens: k,
        source: UsageSource::Reported,
        ..Usage::default()
    }
}

fn usage_of(chunks: &[Chunk]) -> Usage {
    match chunks.last() {
        Some(Chunk::Usage(usage)) => *usage,
        other => panic!("usage is the last chunk: {other:?}"),
    }
}

/// The JSON of the transcript's events, as the client is to get them.
fn expected(id: &DecisionId, with_usage: bool) -> Vec<String> {
    let data = TRANSCRIPT.split("\n\n").filter_map(|e| e.strip_prefix("data: {"));
    let all = data.map(|e| format!("{{{e}").replace("up-1", &id.completion_id()));
    all.filter(|e| with_usage || !e.contains("\"choices\":[]")).collect()
}

#[tokio::test]
async fn a_stream_passes_with_new_ids_and_the_usage_that_nobody_asked_for_is_hidden() {
    for answer in [events(TRANSCRIPT), chunked(TRANSCRIPT), events(&TRANSCRIPT.replace('\n', "\r\n"))] {
        let (url, mut told) = always(answer).await;
        let backend = RemoteBackend::new(remote(&url)).unwrap();
        let call = call(BODY, true);
        let id = call.id;
        let Ok(Reply::Stream { chunks, model_reported }) = backend.start(call).await else { panic!("no stream") };
        assert_eq!(model_reported.as_deref(), Some("real-7b"));
        let chunks: Vec<Chunk> = chunks.map(Result::unwrap).collect().await;
        assert_eq!(wires(&chunks), expected(&id, false));
        assert_eq!(usage_of(&chunks), reported(9, 4, 8));
        let received = told.recv().await.unwrap();
        assert!(received.head.starts_with("post /v1/chat/completions http/1.1\r\n"), "{}", received.head);
        let asked = BODY.replace("auto", "real").replace("]}", "],\"stream_options\":{\"include_usage\":true}}");
        assert_eq!(received.body, asked);
    }
}

#[tokio::test]
async fn the_usage_that_the_client_asked_for_is_shown() {
    let body = BODY.replace("]}", r#"],"stream_options":{"include_usage":true}}"#);
    let (url, mut told) = always(events(TRANSCRIPT)).await;
    let call = call(&body, true);
    let id = call.id;
    let (chunks, error) = collect(&RemoteBackend::new(remote(&url)).unwrap(), call).await;
    assert!(error.is_none());
    assert_eq!(wires(&chunks), expected(&id, true));
    assert_eq!(told.recv().await.unwrap().body, body.replace("auto", "real"));
}

#[tokio::test]
async fn a_stream_cut_at_any_byte_never_ends_well() {
    let finish = TRANSCRIPT.find("\"stop\"").unwrap();
    let finish = finish + TRANSCRIPT[finish..].find("\n\n").unwrap() + 2;
    for (whole, ends_well_from) in [
        // Without framing the end of the connection is all that says "end": a stream that has told its finish is over.
        (events(TRANSCRIPT), events(&TRANSCRIPT[..finish]).len()),
        // With framing, only the mark, or the last chunk, ends it.
        (chunked(TRANSCRIPT), chunked(TRANSCRIPT).len() - "\r\n0\r\n\r\n".len()),
    ] {
        let bytes: Arc<[u8]> = whole.into_bytes().into();
        let length = bytes.len();
        let url = upstream(move |number, _, mut socket| {
            let bytes = Arc::clone(&bytes);
            async move {
                let _ = socket.write_all(&bytes[..number]).await;
            }
        })
        .await;
        let backend = RemoteBackend::new(remote(&url)).unwrap();
        for cut in 0..length {
            let call = call(BODY, true);
            let wanted = expected(&call.id, false);
            let (chunks, error) = collect(&backend, call).await;
            let wires = wires(&chunks);
            assert_eq!(wires, wanted[..wires.len()], "cut at {cut}");
            if cut < ends_well_from {
                let error = error.unwrap_or_else(|| panic!("a good end, cut at {cut} of {length}"));
                assert!(matches!(error.kind, ErrorKind::Cut | ErrorKind::Garbage), "cut at {cut}: {error}");
                assert!(!chunks.iter().any(|c| matches!(c, Chunk::Usage(_))));
            } else {
                assert!(error.is_none(), "cut at {cut} of {length}: {error:?}");
                assert_eq!(wires.len(), wanted.len());
            }
        }
    }
}

#[tokio::test]
async fn a_forgotten_mark_is_forgiven_only_after_every_choice_has_finished() {
    let no_mark = TRANSCRIPT.replace("data: [DONE]\n\n", "");
    let (chunks, error) = stream_of(events(&no_mark), BODY).await;
    assert!(error.is_none());
    assert_eq!(usage_of(&chunks), reported(9, 4, 8));
    let two = BODY.replace("]}", r#"],"n":2}"#);
    let (_, error) = stream_of(events(&no_mark), &two).await;
    assert_eq!(error.unwrap().kind, ErrorKind::Cut);
}

/// Some servers begin with a chunk that carries no choice; where nothing else comes there is no answer.
#[tokio::test]
async fn a_stream_without_a_choice_is_no_answer() {
    let empty = "data: {\"id\":\"up-1\",\"choices\":[]}\n\n";
    for none in [empty.to_owned(), format!("{empty}{empty}"), empty.replace("[]", "[ null ]")] {
        for end in ["data: [DONE]\n\n", "data: [DONE]"] {
            let (_, error) = stream_of(events(&format!("{none}{end}")), BODY).await;
            assert_eq!(error.unwrap().kind, ErrorKind::Garbage, "{none}{end}");
        }
    }
    let (chunks, error) = stream_of(events(&format!("{empty}{TRANSCRIPT}")), BODY).await;
    assert!(error.is_none());
    assert_eq!((wires(&chunks).len(), usage_of(&chunks)), (4, reported(9, 4, 8)));
}

#[tokio::test]
async fn usage_is_estimated_where_the_server_tells_none() {
    let silent: String = TRANSCRIPT.split_inclusive("\n\n").filter(|e| !e.contains("\"choices\":[]")).collect();
    let (chunks, error) = stream_of(events(&silent), BODY).await;
    assert!(error.is_none());
    let usage = usage_of(&chunks);
    assert_eq!(usage.source, UsageSource::Estimated);
    assert!(usage.prompt_tokens > 0 && usage.completion_tokens > 0, "{usage:?}");
    // Nor where it tells what is none; and the client, who has not asked, is not told of it either.
    let lying = TRANSCRIPT.replace("\"prompt_tokens\":9", "\"prompt_tokens\":-9");
    let (chunks, error) = stream_of(events(&lying), BODY).await;
    assert!(error.is_none());
    assert_eq!((wires(&chunks).len(), usage_of(&chunks)), (3, usage));
}

#[tokio::test]
async fn a_stream_that_comes_byte_by_byte_is_the_same_stream() {
    let bytes: Arc<[u8]> = chunked(TRANSCRIPT).into_bytes().into();
    let url = upstream(move |_, _, mut socket| {
        let bytes = Arc::clone(&bytes);
        async move {
            for byte in bytes.iter() {
                socket.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    })
    .await;
    let call = call(BODY, true);
    let id = call.id;
    let (chunks, error) = collect(&RemoteBackend::new(remote(&url)).unwrap(), call).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(wires(&chunks), expected(&id, false));
}

#[tokio::test]
async fn what_is_no_completion_is_garbage_or_the_error_that_it_is() {
    let html = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>";
    let completion = r#"{"id":"x","object":"chat.completion","choices":[]}"#;
    let error_body = r#"{"error":{"message":"no","code":429}}"#;
    for (answer, kind) in [
        (html.to_owned(), ErrorKind::Garbage),
        (json("200 OK", "", completion), ErrorKind::Garbage),
        (json("200 OK", "", error_body), ErrorKind::RateLimited),
        (events("data: nonsense\n\n"), ErrorKind::Garbage),
        (events("data: {\"x\":1}\n\n"), ErrorKind::Garbage),
        (events("data: [1]\n\n"), ErrorKind::Garbage),
        (events("data: [DONE]\n\n"), ErrorKind::Garbage),
        (events("data: [DONE]"), ErrorKind::Garbage),
        (events(""), ErrorKind::Cut),
        (events(&format!("data: {error_body}\n\n")), ErrorKind::RateLimited),
        (events("event: error\ndata: {\"error\":\"boom\"}\n\n"), ErrorKind::ServerError),
        ("SSH-2.0-OpenSSH\r\n".to_owned(), ErrorKind::Garbage),
        (json("302 Found", "location: /elsewhere\r\n", ""), ErrorKind::Garbage),
        (String::new(), ErrorKind::Cut),
        ("HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nnonsense".to_owned(), ErrorKind::Cut),
    ] {
        let (chunks, error) = stream_of(answer.clone(), BODY).await;
        let error = error.unwrap_or_else(|| panic!("no error: {answer}"));
        assert_eq!(error.kind, kind, "{answer}: {error}");
        assert!(chunks.is_empty());
    }
}

#[tokio::test]
async fn an_error_in_the_middle_of_a_stream_is_that_error() {
    let head: String = TRANSCRIPT.split_inclusive("\n\n").take(3).collect();
    for (event, kind) in [
        (r#"{"error":{"message":"overloaded","type":"server_error"}}"#, ErrorKind::ServerError),
        (
            r#"{"id":"up-1","error":{"code":502,"message":"x"},"choices":[{"index":0,"delta":{},"finish_reason":"error"}]}"#,
            ErrorKind::ServerError,
        ),
        (r#"{"id":"up-1","choices":[{"index":0"#, ErrorKind::Garbage),
        (r#"{"id":"up-1","choices":[}"#, ErrorKind::Garbage),
        (r#"{"id":"up-1","choices":[{}],"usage":{]}"#, ErrorKind::Garbage),
        ("<html>", ErrorKind::Garbage),
    ] {
        let (chunks, error) = stream_of(events(&format!("{head}data: {event}\n\ndata: [DONE]\n\n")), BODY).await;
        assert_eq!(wires(&chunks).len(), 2);
        assert_eq!(error.unwrap().kind, kind, "{event}");
    }
    let no_text =
        [head.as_bytes(), b"data: {\"id\":\"up-1\",\"choices\":[{\"text\":\"\xff\"}]}\n\ndata: [DONE]\n\n"].concat();
    let (chunks, error) = stream_of([events("").as_bytes(), &no_text].concat(), BODY).await;
    assert_eq!((wires(&chunks).len(), error.unwrap().kind), (2, ErrorKind::Garbage));
    // A field of that name that is empty, or text that speaks of it, is none.
    let harmless =
        r#"{"id":"up-1","error":null,"choices":[{"index":0,"delta":{"content":"\"error\":{}"},"finish_reason":null}]}"#;
    let fine = TRANSCRIPT.replace("data: [DONE]", &format!("data: {harmless}\n\ndata: [DONE]"));
    assert!(stream_of(events(&fine), BODY).await.1.is_none());
}

#[tokio::test]
async fn a_whole_answer_keeps_every_byte_but_its_id() {
    let body = r#"{ "object":"chat.completion", "id" : "up-9","x":1.0e2,"model":"real-7b","choices":[{"index":0,"message":{"role":"assistant","content":null,"tool_calls":[{"id":"up-9","type":"function"}]},"finish_reason":"tool_calls"},{"index":1}],"usage":{"prompt_tokens":3,"completion_tokens":5} }"#;
    let (url, mut told) = always(json("200 OK", "", body)).await;
    let sent = r#"{"n":2 ,"model":"auto","tools":[{"strict":true}],"unknown":{"a":[1.10,1e400]},"messages":[]}"#;
    let call = call(sent, false);
    let id = call.id.completion_id();
    let reply = RemoteBackend::new(remote(&url)).unwrap().start(call).await.unwrap();
    let Reply::Whole { completion: Completion::Wire { body: got, usage }, model_reported } = reply else {
        panic!("not a whole answer")
    };
    assert_eq!(got, body.replacen("up-9", &id, 1));
    assert_eq!((usage, model_reported.as_deref()), (reported(3, 5, 0), Some("real-7b")));
    assert_eq!(told.recv().await.unwrap().body, sent.replace("auto", "real"));
}

#[tokio::test]
async fn a_whole_answer_that_is_none_fails() {
    let kind = |answer: String| async { whole_of(answer).await.unwrap_err().kind };
    assert_eq!(kind(json("200 OK", "", "nonsense")).await, ErrorKind::Garbage);
    assert_eq!(kind(json("200 OK", "", "{}")).await, ErrorKind::Garbage);
    assert_eq!(kind(json("200 OK", "", r#"{"id":"x","choices":[]}"#)).await, ErrorKind::Garbage);
    assert_eq!(kind(json("200 OK", "", r#"{"id":"x","choices":[ null]}"#)).await, ErrorKind::Garbage);
    assert_eq!(kind(events(TRANSCRIPT)).await, ErrorKind::Garbage);
    assert_eq!(kind(json("200 OK", "", r#"{"error":{"message":"m"}}"#)).await, ErrorKind::ServerError);
    let whole = json("200 OK", "", r#"{"id":"x","choices":[{"message":{"content":"hey you"}}]}"#);
    for cut in 1..whole.len() {
        let error = whole_of(&whole.as_bytes()[..cut]).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Cut, "cut at {cut}: {error}");
    }
    let (_, usage, _) = whole_of(whole).await.unwrap();
    assert_eq!((usage.source, usage.completion_tokens), (UsageSource::Estimated, 2));
}

#[tokio::test]
async fn statuses_come_with_their_wishes_and_bodies() {
    let body = r#"{"error":{"message":"slow down","code":"rate_limit_exceeded"}}"#;
    let error = whole_of(json("429 Too Many Requests", "retry-after: 3\r\n", body)).await.unwrap_err();
    assert_eq!(
        (error.kind, error.status, error.retry_after),
        (ErrorKind::RateLimited, Some(429), Some(Duration::from_secs(3)))
    );
    assert_eq!(error.body.as_deref(), Some(body.as_bytes()));
    assert!(error.message.contains("`fast`") && error.message.contains("rate_limit_exceeded"), "{error}");
    let error = whole_of(json("503 x", "retry-after: 9\r\nretry-after-ms: 250\r\n", "")).await.unwrap_err();
    assert_eq!((error.kind, error.retry_after), (ErrorKind::ServerError, Some(Duration::from_millis(250))));
    let long_ago = "retry-after: Wed, 21 Oct 2015 07:28:00 GMT\r\n";
    let error = whole_of(json("503 x", long_ago, "")).await.unwrap_err();
    assert_eq!(error.retry_after, Some(Duration::ZERO));
    let context = r#"{"error":{"code":"context_length_exceeded"}}"#;
    assert_eq!(whole_of(json("400 x", "", context)).await.unwrap_err().kind, ErrorKind::ContextTooLong);
}

#[tokio::test]
async fn keys_and_headers_go_where_they_are_configured_to() {
    let answer = json("200 OK", "", r#"{"id":"x","choices":[{}]}"#);
    let ask = |config: RemoteConfig, client: Option<&str>| {
        let client_authorization = client.map(str::to_owned);
        let answer = answer.clone();
        async move {
            let (url, mut told) = always(answer).await;
            let backend = RemoteBackend::new(RemoteConfig { url, ..config }).unwrap();
            backend.start(Call { client_authorization, ..call(BODY, false) }).await.unwrap();
            told.recv().await.unwrap().head
        }
    };
    let head = ask(remote(""), Some("Bearer client")).await;
    assert!(!head.contains("authorization"), "{head}");
    let with_key = RemoteConfig {
        api_key: Some(Secret::new("ours")),
        headers: [("X-Org".to_owned(), "acme".to_owned())].into(),
        ..remote("")
    };
    let head = ask(with_key.clone(), Some("Bearer client")).await;
    assert!(head.contains("authorization: bearer ours") && head.contains("x-org: acme"), "{head}");
    let forwarding = RemoteConfig { forward_client_key: true, ..with_key };
    let head = ask(forwarding.clone(), Some("Bearer client")).await;
    assert!(head.contains("authorization: bearer client") && !head.contains("ours"), "{head}");
    assert!(ask(forwarding.clone(), None).await.contains("authorization: bearer ours"));
    assert!(!format!("{forwarding:?}").contains("ours"));
}

#[tokio::test]
async fn embeddings_pass_through() {
    let answer = r#"{"object":"list","data":[{"embedding":[0.10]}]}"#;
    let (url, mut told) = always(json("200 OK", "", answer)).await;
    let backend = RemoteBackend::new(remote(&url)).unwrap();
    let got = backend.embed(Bytes::from_static(br#"{"input":["a"], "model":"x"}"#)).await.unwrap();
    assert_eq!(got, answer);
    let received = told.recv().await.unwrap();
    assert!(received.head.starts_with("post /v1/embeddings "));
    assert_eq!(received.body, r#"{"input":["a"], "model":"real"}"#);
    let (url, _told) = always(json("200 OK", "", "{}")).await;
    let error = RemoteBackend::new(remote(&url)).unwrap().embed(Bytes::from_static(b"{}")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Garbage);
}

#[tokio::test]
async fn places_limit_calls_at_once() {
    let running = Arc::new(Mutex::new((0, 0)));
    let url = upstream({
        let running = Arc::clone(&running);
        move |_, _, mut socket| {
            let running = Arc::clone(&running);
            async move {
                {
                    let mut running = running.lock().unwrap();
                    running.0 += 1;
                    running.1 = running.0.max(running.1);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
                running.lock().unwrap().0 -= 1;
                let _ = socket.write_all(events(TRANSCRIPT).as_bytes()).await;
            }
        }
    })
    .await;
    let backend = RemoteBackend::new(RemoteConfig { max_concurrent: Some(2), ..remote(&url) }).unwrap();
    let all = futures_util::future::join_all((0..12).map(|_| collect(&backend, call(BODY, true)))).await;
    assert!(all.iter().all(|(_, error)| error.is_none()));
    assert_eq!(running.lock().unwrap().1, 2);
}

#[test]
fn bases_are_taken_as_people_write_them() {
    for (base, uri) in [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        (" https://h/openai ", "https://h/openai/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("https://h/chat/completions", "https://h/chat/completions"),
        ("https://h/v1?api-version=1", "https://h/v1/chat/completions?api-version=1"),
        ("http://[::1]:1/v2", "http://[::1]:1/v2/chat/completions"),
    ] {
        assert_eq!(endpoint(base, "chat/completions").unwrap().to_string(), uri);
    }
    assert_eq!(endpoint("https://h/chat/completions", "embeddings").unwrap().to_string(), "https://h/embeddings");
    for base in ["", "h:8000", "ftp://h", "http://", "/v1", "http://user:pw@h", "http://h h"] {
        let error = RemoteBackend::new(remote(base)).err().unwrap_or_else(|| panic!("{base}"));
        assert_eq!(error.kind(), "url", "{base}: {error}");
    }
}
