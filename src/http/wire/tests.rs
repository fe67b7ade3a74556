//! The wire types: what parses, what does not and how that is said, and what is written.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    chat::parse,
    chunk::{self, Encoder},
    completion,
    parse::Invalid,
};
use crate::domain::{
    Choice, Chunk, ContentPart, DecisionId, FinishReason, Need, Request, Role, TokenLogprob, TopLogprob, Usage,
    UsageSource,
};

fn ok(body: Value) -> Request {
    parse(Bytes::from(body.to_string())).unwrap()
}

fn bad(body: &str) -> Invalid {
    parse(Bytes::copy_from_slice(body.as_bytes())).unwrap_err()
}

/// A valid body with `extra` merged in.
fn with(extra: Value) -> Value {
    let mut body = json!({"model": "auto", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn everything_that_is_asked_arrives() {
    let body = json!({
        "model": "support",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "Ünïcode \u{0} and \"quotes\""},
        ],
        "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": -3, "stop": ["x", "y"],
        "n": 2, "logprobs": true, "top_logprobs": 4, "stream": true, "stream_options": {"include_usage": true},
        "metadata": {"session_id": "s1", "k": "v"}, "user": "u", "unheard_of": {"deep": [1, 2, 3]},
    });
    let text = body.to_string();
    let request = ok(body);
    assert_eq!(request.model, "support");
    assert_eq!(request.messages.len(), 3);
    assert_eq!(request.messages[1].role, Role::Developer);
    assert_eq!(request.messages[1].joined_text(), "a\nb");
    assert_eq!(request.query(), "Ünïcode \u{0} and \"quotes\"");
    assert_eq!(request.sampling.max_tokens, Some(7), "max_completion_tokens wins");
    assert_eq!(request.sampling.temperature, Some(0.0));
    assert_eq!(request.sampling.top_p, Some(0.5));
    assert_eq!(request.sampling.seed, Some(-3));
    assert_eq!(request.sampling.stop, ["x", "y"]);
    assert_eq!((request.n, request.logprobs, request.top_logprobs), (2, true, 4));
    assert!(request.stream && request.include_usage);
    assert_eq!(request.needs, [Need::Logprobs]);
    assert_eq!(request.session.as_deref(), Some("s1"));
    assert_eq!(request.user.as_deref(), Some("u"));
    assert_eq!(request.body, text.as_bytes(), "the body is the client's own");
}

#[test]
fn nulls_count_as_absent() {
    let request = ok(with(json!({
        "max_tokens": null, "temperature": null, "top_p": null, "seed": null, "stop": null, "n": null, "logprobs": null,
        "top_logprobs": null, "stream": null, "stream_options": null, "tools": null, "response_format": null,
        "metadata": null, "user": null, "modalities": null,
    })));
    assert_eq!(request.sampling, Default::default());
    assert_eq!(request.n, 1);
    assert!(!request.stream && !request.logprobs && request.needs.is_empty());
}

#[test]
fn needs_follow_what_is_asked() {
    let needs = |extra: Value| ok(with(extra)).needs;
    let tool = json!({"type": "function", "function": {"name": "f"}});
    assert_eq!(needs(json!({"tools": [tool]})), [Need::Tools]);
    assert_eq!(needs(json!({"tools": []})), []);
    assert_eq!(needs(json!({"functions": [{"name": "f"}]})), [Need::Tools]);
    assert_eq!(needs(json!({"response_format": {"type": "text"}})), []);
    assert_eq!(needs(json!({"response_format": {"type": "json_object"}})), [Need::ResponseFormat]);
    assert_eq!(needs(json!({"modalities": ["text"]})), []);
    assert_eq!(needs(json!({"modalities": ["text", "audio"]})), [Need::Audio]);
    let image = json!([{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]);
    assert_eq!(needs(json!({"messages": [{"role": "user", "content": image}]})), [Need::Images]);
    let audio = json!([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]);
    let all = json!({"messages": [{"role": "user", "content": audio}], "tools": [tool], "logprobs": true});
    assert_eq!(needs(all), [Need::Tools, Need::Audio, Need::Logprobs]);
}

#[test]
fn an_assistant_that_calls_tools_needs_no_content() {
    let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let request = ok(with(json!({"messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]})));
    assert_eq!(request.messages[1].content, []);
    assert_eq!(request.messages[2].content, [ContentPart::Text("42".to_owned())]);
    assert_eq!(request.needs, [Need::Tools]);
}

/// Each: what is put into a valid body, the param of the error, and words that its message must hold.
#[test]
fn what_is_wrong_is_named() {
    let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let many: Value = (0..17).map(|i| (format!("k{i}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    let cases = [
        (json!({"model": null}), "model", "auto"),
        (json!({"model": ""}), "model", "GET /v1/models"),
        (json!({"model": 4}), "model", "expected a string"),
        (json!({"messages": null}), "messages", "must provide"),
        (json!({"messages": []}), "messages", "empty"),
        (json!({"messages": "hi"}), "messages", "expected a sequence"),
        (json!({"messages": ["hi"]}), "messages[0]", "expected an object"),
        (json!({"messages": [["user", "hi"]]}), "messages[0]", "expected an object"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0]", "missing field `role`"),
        (json!({"messages": [{"role": "robot", "content": "hi"}]}), "messages[0].role", "unknown variant `robot`"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content", "a string, an array"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing"),
        (json!({"messages": [{"role": "user", "content": null}]}), "messages[0].content", "missing"),
        (json!({"messages": [{"role": "assistant", "content": null}]}), "messages[0].content", "missing"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content", "empty"),
        (part(json!("hi")), "messages[0].content[0]", "expected an object"),
        (part(json!({"text": "hi"})), "messages[0].content[0]", "missing field `type`"),
        (part(json!({"type": "text"})), "messages[0].content[0].text", "missing"),
        (part(json!({"type": "text", "text": 1})), "messages[0].content[0].text", "expected a string"),
        (json!({"max_tokens": -1}), "max_tokens", "from 1 to"),
        (json!({"max_tokens": 0}), "max_tokens", "from 1 to"),
        (json!({"max_tokens": 1_000_000_000_000_u64}), "max_tokens", "2147483647"),
        (json!({"max_tokens": u64::MAX}), "max_tokens", "a larger number"),
        (json!({"max_tokens": 1.5}), "max_tokens", "expected an integer"),
        (json!({"max_tokens": "5"}), "max_tokens", "expected an integer"),
        (json!({"max_completion_tokens": -5}), "max_completion_tokens", "is -5"),
        (json!({"temperature": 2.1}), "temperature", "from 0 to 2"),
        (json!({"temperature": -0.1}), "temperature", "from 0 to 2"),
        (json!({"temperature": "hot"}), "temperature", "expected a number"),
        (json!({"top_p": 1.01}), "top_p", "from 0 to 1"),
        (json!({"seed": 0.5}), "seed", "expected an integer"),
        (json!({"n": 0}), "n", "from 1 to 128"),
        (json!({"n": 129}), "n", "from 1 to 128"),
        (json!({"stop": ""}), "stop", "empty string"),
        (json!({"stop": 5}), "stop", "a string or an array of strings"),
        (json!({"stop": ["a", 5]}), "stop[1]", "expected a string"),
        (json!({"stop": vec!["x"; 17]}), "stop", "17 strings"),
        (json!({"logprobs": 5}), "logprobs", "expected a boolean"),
        (json!({"top_logprobs": 2}), "top_logprobs", "needs 'logprobs'"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
        (json!({"stream": "yes"}), "stream", "expected a boolean"),
        (json!({"stream_options": []}), "stream_options", "expected an object"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage", "expected a boolean"),
        (json!({"tools": {}}), "tools", "an array or null"),
        (json!({"response_format": "json"}), "response_format", "expected an object"),
        (json!({"response_format": {}}), "response_format", "missing field `type`"),
        (json!({"metadata": {"k": 5}}), "metadata.k", "expected a string"),
        (json!({"metadata": many}), "metadata", "17 entries"),
        (json!({"metadata": {"k": "v".repeat(513)}}), "metadata", "metadata.k"),
        (json!({"metadata": {"k".repeat(65): "v"}}), "metadata", "64 characters"),
        (json!({"user": 5}), "user", "expected a string"),
    ];
    for (extra, param, words) in cases {
        let body = with(extra.clone()).to_string();
        let Invalid { message, param: got, .. } = bad(&body);
        assert_eq!(got.as_deref(), Some(param), "{extra}: {message}");
        assert!(message.contains(words), "{extra}: {message}");
        assert!(message.len() < 400, "{extra}: {message}");
    }
}

#[test]
fn what_is_no_json_is_placed() {
    let cases = [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("{", "line 1 column 1"),
        ("{\"model\": \"auto\",\n  \"messages\": [}", "line 2 column 16"),
        ("{\"model\": \"auto\"} x", "trailing characters at line 1 column 19"),
        ("{\"model\": \"a\u{0}b\"}", "control character"),
        ("{\"model\": \"\\ud800\"}", "line 1 column"),
    ];
    for (body, words) in cases {
        let error = bad(body);
        assert_eq!(error.code, Some("invalid_json"), "{body}: {error}");
        assert!(error.message.contains(words), "{body}: {error}");
    }
    for body in ["[1]", "5", "\"x\"", "null", "[\"auto\", []]"] {
        let error = bad(body);
        assert_eq!(error.param, None);
        assert!(error.message.contains("expected an object"), "{body}: {error}");
    }
    assert!(bad("{\"model\": \"a\", \"model\": \"b\", \"messages\": []}").message.contains("duplicate field `model`"));
    let deep = format!("{{\"model\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(bad(&deep).message.contains("line 1"));
}

#[test]
fn invalid_utf8_is_found_wherever_it_stands() {
    for body in [&b"{\"model\": \"\xff\"}"[..], b"\xfe\xff", b"{\"model\":\"m\",\n\"messages\":[],\"unread\":\"\xc3\"}"]
    {
        let error = parse(Bytes::copy_from_slice(body)).unwrap_err();
        assert_eq!(error.code, Some("invalid_utf8"), "{error}");
    }
    let error = parse(Bytes::from_static(b"{\n\"a\xff\"}")).unwrap_err();
    assert!(error.message.contains("byte 4 (line 2, column 3)"), "{error}");
}

#[test]
fn long_text_of_the_client_is_not_repeated_whole() {
    let error = bad(&with(json!({"messages": "secret ".repeat(1000)})).to_string());
    assert!(error.message.len() < 400, "{error}");
    assert!(error.message.contains(" at line 1 column"), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(Bytes::from(bytes));
    }

    /// Closer to the mark: a valid body of which some bytes were changed.
    #[test]
    fn no_damage_makes_the_parser_panic(
        at in proptest::collection::vec((0usize..300, any::<u8>()), 1..6),
        cut in 0usize..320,
    ) {
        let body = with(json!({
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hällo \u{1F600}"}]}],
            "stop": ["a"], "metadata": {"k": "v"}, "stream_options": {"include_usage": true}, "temperature": 1.0,
            "tools": [{"type": "function"}], "response_format": {"type": "json_object"}, "max_tokens": 5,
        }));
        let mut bytes = body.to_string().into_bytes();
        for (i, byte) in at {
            let i = i % bytes.len();
            bytes[i] = byte;
        }
        bytes.truncate(cut);
        if let Err(error) = parse(Bytes::from(bytes)) {
            prop_assert!(!error.message.is_empty());
        }
    }

    /// Any text survives: in as JSON, out as a chunk.
    #[test]
    fn any_text_comes_out_as_it_went_in(text in ".{0,40}") {
        let request = ok(with(json!({"messages": [{"role": "user", "content": text}]})));
        prop_assert_eq!(request.query(), text.clone());
        let events = events(&[Chunk::Text { choice: 0, text: text.clone(), logprobs: vec![] }], false, false);
        prop_assert_eq!(&events[0]["choices"][0]["delta"]["content"], &Value::String(text));
    }
}

fn id() -> DecisionId {
    "0192f0c1-2f5c-7c30-9d8a-6f5a3c2b1a00".parse().unwrap()
}

fn encode(chunks: &[Chunk], include_usage: bool, logprobs: bool) -> String {
    let mut encoder = Encoder::new(id(), "smol \"2\"", 1_700_000_000, include_usage, logprobs);
    let mut out = BytesMut::new();
    for chunk in chunks {
        encoder.chunk(chunk, &mut out);
    }
    chunk::done(&mut out);
    String::from_utf8(out.to_vec()).unwrap()
}

fn events(chunks: &[Chunk], include_usage: bool, logprobs: bool) -> Vec<Value> {
    encode(chunks, include_usage, logprobs)
        .split_terminator("\n\n")
        .filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
        .collect()
}

fn usage() -> Usage {
    Usage {
        prompt_tokens: 10,
        cached_tokens: 4,
        completion_tokens: 3,
        source: UsageSource::Reported,
        ..Usage::default()
    }
}

fn token(text: &str, logprob: f32) -> TokenLogprob {
    TokenLogprob {
        token: text.to_owned(),
        logprob,
        bytes: text.as_bytes().to_vec(),
        top: vec![TopLogprob { token: "no".to_owned(), logprob: f32::NEG_INFINITY, bytes: b"no".to_vec() }],
        entropy: None,
    }
}

#[test]
fn a_stream_of_two_choices() {
    let text = |choice, text: &str| Chunk::Text { choice, text: text.to_owned(), logprobs: vec![] };
    let chunks = [
        text(0, "He said \"hi\"\n"),
        text(1, "\u{1F600}"),
        text(0, " again"),
        Chunk::Finish { choice: 0, reason: FinishReason::Stop },
        Chunk::Finish { choice: 1, reason: FinishReason::Length },
        Chunk::Usage(usage()),
    ];
    insta::assert_snapshot!("stream", encode(&chunks, false, false));
    insta::assert_snapshot!("stream_with_usage", encode(&chunks, true, false));
}

#[test]
fn log_probabilities_stream_with_their_text() {
    let chunks = [
        Chunk::Text { choice: 0, text: "é".to_owned(), logprobs: vec![token("é", -0.25)] },
        Chunk::Finish { choice: 0, reason: FinishReason::Stop },
    ];
    insta::assert_snapshot!("stream_with_logprobs", encode(&chunks, false, true));
}

#[test]
fn a_choice_that_says_nothing_still_has_a_role() {
    let events = events(&[Chunk::Finish { choice: 0, reason: FinishReason::Stop }], false, false);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant"}));
    assert_eq!(events[0]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn remote_events_pass_as_they_are() {
    let data = br#"{"id":"x", "choices":[],"unheard_of":1}"#;
    let chunks = [Chunk::Wire(Bytes::from_static(data)), Chunk::Usage(usage())];
    let out = encode(&chunks, true, false);
    assert_eq!(out, "data: {\"id\":\"x\", \"choices\":[],\"unheard_of\":1}\n\ndata: [DONE]\n\n", "no second usage");
    let pretty = [Chunk::Wire(Bytes::from_static(b"{\n}"))];
    assert_eq!(encode(&pretty, false, false), "data: {\ndata: }\n\ndata: [DONE]\n\n");
}

#[test]
fn a_whole_answer() {
    let choices = [
        Choice { index: 0, text: "Yes.".to_owned(), logprobs: vec![token("Yes", -0.5)], finish: FinishReason::Stop },
        Choice { index: 1, text: String::new(), logprobs: vec![], finish: FinishReason::Length },
    ];
    let encode = |logprobs| {
        let body = completion::encode(id(), "smol", 1_700_000_000, &choices, usage(), logprobs).unwrap();
        serde_json::from_slice::<Value>(&body).unwrap()
    };
    insta::assert_json_snapshot!("whole", encode(true));
    assert_eq!(encode(false)["choices"][0]["logprobs"], Value::Null);
}

/// `cargo test --lib timings -- --ignored --nocapture`, for a note; says nothing on a busy machine.
#[test]
#[ignore = "a measurement, not a check"]
fn timings() {
    let message = "The quick brown fox jumps over the lazy dog. ".repeat(4);
    let turn = |role: &str| json!({"role": role, "content": message});
    let messages = [turn("system"), turn("user"), turn("assistant"), turn("user")];
    let body = Bytes::from(with(json!({"messages": messages, "max_tokens": 100, "temperature": 0.7})).to_string());
    let time = |name: &str, size: usize, f: &mut dyn FnMut()| {
        let mut best = f64::INFINITY;
        for _ in 0..50 {
            let started = Instant::now();
            (0..1000).for_each(|_| f());
            best = best.min(started.elapsed().as_secs_f64() * 1e6 / 1000.0);
        }
        println!("{name}: {best:.3} µs for {size} bytes");
    };
    time("parse", body.len(), &mut || drop(std::hint::black_box(parse(body.clone()).unwrap())));

    let mut out = BytesMut::with_capacity(4096);
    let mut encoder = Encoder::new(id(), "smol", 1_700_000_000, false, false);
    let text = Chunk::Text { choice: 0, text: " token".to_owned(), logprobs: vec![] };
    encoder.chunk(&text, &mut out);
    let size = out.len();
    time("encode a text chunk", size, &mut || {
        out.clear();
        encoder.chunk(std::hint::black_box(&text), &mut out);
    });
    let wire = Chunk::Wire(Bytes::from(vec![b'x'; 200]));
    time("splice a wire chunk", 200, &mut || {
        out.clear();
        encoder.chunk(std::hint::black_box(&wire), &mut out);
    });
}

#[test]
fn documents_are_marked_in_a_part_or_a_whole_message() {
    let parsed = |body: &str| parse(Bytes::copy_from_slice(body.as_bytes()));
    let chunk = |text: &str| ContentPart::Chunk(text.to_owned());
    let text = |text: &str| ContentPart::Text(text.to_owned());
    let request = parsed(
        r#"{"model":"auto","weir":{"exact":true},"messages":[
            {"role":"system","content":"a","cache_control":{"type":"ephemeral"}},
            {"role":"user","content":[{"type":"text","text":"b","cache_control":{"type":"ephemeral","ttl":"5m"}},
                                      {"type":"text","text":"c","weir":{"chunk":true}},
                                      {"type":"text","text":"d","cache_control":null,"weir":{"chunk":false}}]},
            {"role":"user","content":[{"type":"text","text":"e"}],"weir":{"chunk":true}}]}"#,
    )
    .unwrap();
    assert!(request.exact);
    assert_eq!(request.keep, Some(Duration::from_secs(300)));
    let kept = |ttl: &str| {
        let control = format!(r#"{{"type":"ephemeral","ttl":{ttl}}}"#);
        let message = format!(r#"{{"role":"user","content":"x","cache_control":{control}}}"#);
        parsed(&format!(r#"{{"model":"auto","messages":[{message}]}}"#)).unwrap().keep
    };
    // What another server may understand is none of ours.
    assert_eq!(
        [r#""1h""#, r#""900h""#, r#""-5m""#, r#""long""#, "7"].map(kept),
        [3600, 86_400, 0, 0, 0].map(|s| { (s > 0).then_some(Duration::from_secs(s)) })
    );
    let contents: Vec<_> = request.messages.iter().map(|message| message.content.clone()).collect();
    assert_eq!(contents, [vec![chunk("a")], vec![chunk("b"), chunk("c"), text("d")], vec![chunk("e")]]);
    assert_eq!(request.messages[1].joined_text(), "b\nc\nd");
    let wrong =
        parsed(r#"{"model":"auto","messages":[{"role":"user","content":"x"}],"weir":{"exakt":true}}"#).unwrap_err();
    assert!(wrong.message.contains("exakt") && wrong.message.contains("exact"), "{}", wrong.message);
}
