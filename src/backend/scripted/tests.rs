//! Scripts as they are written, and what comes of them.

use std::sync::Arc;

use super::*;
use crate::{
    backend::remote::testing::request,
    domain::{CallSpec, DecisionId, FinishReason, Request},
};

fn backend(config: serde_json::Value) -> ScriptedBackend {
    ScriptedBackend::new("s", serde_json::from_value(config).unwrap())
}

fn asked(text: &str, stream: bool) -> Request {
    request(&serde_json::json!({"messages": [{"role": "user", "content": text}]}).to_string(), stream)
}

fn call(request: Request) -> Call {
    let request = Arc::new(request);
    Call {
        id: DecisionId::new(),
        index: 0,
        spec: CallSpec::bare("s"),
        request,
        client_authorization: None,
        deadline: None,
    }
}

async fn whole(backend: &ScriptedBackend, request: Request) -> Result<(Vec<Choice>, Usage), BackendError> {
    match backend.start(call(request)).await? {
        Reply::Whole { completion: Completion::Choices { choices, usage }, .. } => Ok((choices, usage)),
        _ => panic!("not a whole answer"),
    }
}

/// Texts by choice, the finishes, the usage, the error.
type Streamed = (Vec<String>, Vec<FinishReason>, Option<Usage>, Option<BackendError>);

async fn streamed(backend: &ScriptedBackend, request: Request) -> Streamed {
    let mut out: Streamed = (vec![String::new(); request.n as usize], Vec::new(), None, None);
    let Ok(Reply::Stream { mut chunks, .. }) = backend.start(call(request)).await else { panic!("no stream") };
    while let Some(item) = chunks.next().await {
        assert!(out.2.is_none(), "usage is last");
        match item {
            Ok(Chunk::Text { choice, text, .. }) => out.0[choice as usize].push_str(&text),
            Ok(Chunk::Finish { reason, .. }) => out.1.push(reason),
            Ok(Chunk::Usage(usage)) => out.2 = Some(usage),
            Ok(Chunk::Wire(_)) => panic!("a script has no wire"),
            Err(error) => out.3 = Some(error),
        }
    }
    out
}

#[tokio::test]
async fn without_rules_it_echoes_whole_and_streamed_alike() {
    let backend = backend(serde_json::json!({}));
    let text = "say  this\nback, Grüße 🙂";
    let (choices, usage) = whole(&backend, asked(text, false)).await.unwrap();
    assert_eq!((&*choices[0].text, choices[0].finish), (text, FinishReason::Stop));
    let (texts, finishes, again, error) = streamed(&backend, asked(text, true)).await;
    assert_eq!((texts, finishes), (vec![text.to_owned()], vec![FinishReason::Stop]));
    assert_eq!((again, error.is_none()), (Some(usage), true));
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (5, 5));
    assert_eq!(backend.state().running, 0);
}

#[tokio::test]
async fn bounds_stops_choices_and_logprobs_are_honoured() {
    let backend = backend(serde_json::json!({"rules": [{"reply": {"words": 6}}]}));
    let mut request = asked("x", true);
    request.n = 2;
    request.sampling.max_tokens = Some(4);
    request.sampling.seed = Some(1);
    let (texts, finishes, usage, _) = streamed(&backend, request.clone()).await;
    assert_ne!(texts[0], texts[1]);
    assert_eq!(finishes, [FinishReason::Length; 2]);
    assert_eq!(usage.unwrap().completion_tokens, 8);
    assert_eq!(streamed(&backend, request.clone()).await.0, texts, "the same again");

    request.stream = false;
    request.logprobs = true;
    request.top_logprobs = 2;
    request.sampling.stop = vec![texts[0].split(' ').nth(2).unwrap().to_owned()];
    let (choices, _) = whole(&backend, request).await.unwrap();
    assert_eq!(choices[0].finish, FinishReason::Stop);
    assert!(texts[0].starts_with(&choices[0].text));
    for choice in &choices {
        let tokens: String = choice.logprobs.iter().map(|l| l.token.as_str()).collect();
        assert_eq!(tokens, choice.text);
        assert!(choice.logprobs.iter().all(|l| l.top.len() == 2));
    }
}

#[tokio::test]
async fn the_first_rule_that_fits_decides() {
    let backend = backend(serde_json::json!({"rules": [
        {"contains": "flaky", "fail": {"kind": "rate_limited", "times": 2, "retry_after_ms": 5}, "reply": {"text": "at last"}},
        {"contains": "down", "fail": {"status": 401}},
        {"contains": "odd", "usage": {"prompt_tokens": 7, "completion_tokens": 1000}},
        {"contains": "cut", "cut_after": 2},
        {"contains": "stall", "stall_after": 1},
    ]}));
    for _ in 0..2 {
        let error = whole(&backend, asked("flaky", false)).await.unwrap_err();
        assert_eq!((error.kind, error.retry_after), (ErrorKind::RateLimited, Some(Duration::from_millis(5))));
    }
    assert_eq!(whole(&backend, asked("flaky", false)).await.unwrap().0[0].text, "at last");
    for _ in 0..3 {
        let error = whole(&backend, asked("down", false)).await.unwrap_err();
        assert_eq!((error.kind, error.status), (ErrorKind::Auth, Some(401)));
    }
    assert_eq!(whole(&backend, asked("odd", false)).await.unwrap().1.completion_tokens, 1000);
    let (texts, finishes, usage, error) = streamed(&backend, asked("cut it in two", true)).await;
    assert_eq!((&*texts[0], finishes.len(), usage, error.unwrap().kind), ("cut it", 0, None, ErrorKind::Cut));
    assert_eq!(whole(&backend, asked("cut", false)).await.unwrap_err().kind, ErrorKind::Cut);

    let Ok(Reply::Stream { mut chunks, .. }) = backend.start(call(asked("stall now", true))).await else {
        panic!("no stream")
    };
    assert!(matches!(chunks.next().await, Some(Ok(Chunk::Text { .. }))));
    assert!(futures_util::FutureExt::now_or_never(chunks.next()).is_none());
    assert_eq!(backend.state().running, 1);
    drop(chunks);
    assert_eq!(backend.state().running, 0);
}

#[tokio::test]
async fn delays_are_kept() {
    let backend = backend(serde_json::json!({"rules": [{"first_token_ms": 20, "token_ms": 5}]}));
    for stream in [true, false] {
        let began = tokio::time::Instant::now();
        match stream {
            true => drop(streamed(&backend, asked("one two three", true)).await),
            false => drop(whole(&backend, asked("one two three", false)).await.unwrap()),
        }
        // A timer never rings early; how late it may ring is the machine's business.
        assert!(began.elapsed() >= Duration::from_millis(30));
    }
}

#[test]
fn scripts_say_what_is_wrong_with_them() {
    let wrong = |json: serde_json::Value| serde_json::from_value::<ScriptedConfig>(json).unwrap_err().to_string();
    let message = wrong(serde_json::json!({"rules": [{"fail": {"kind": "tired"}}]}));
    assert!(message.contains("`tired`") && message.contains("rate_limited"), "{message}");
    assert!(wrong(serde_json::json!({"rule": []})).contains("rules"));
    assert!(wrong(serde_json::json!({"rules": [{"reply": "shout"}]})).contains("echo"));
    let config = ScriptedConfig { rules: vec![Rule { cut_after: Some(1), ..Rule::default() }], max_concurrent: None };
    assert_eq!(serde_json::from_value::<ScriptedConfig>(serde_json::to_value(&config).unwrap()).unwrap(), config);
}
