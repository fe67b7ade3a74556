use bytes::Bytes;

use super::*;
use crate::{
    domain::{CallSpec, DecisionId, Sampling, Usage, UsageSource},
    engine::{
        EngineOptions,
        model_file::TensorType,
        testing::{CONTEXT, tiny},
    },
};

fn backend(options: EngineOptions) -> LocalBackend {
    let dir = tempfile::tempdir().unwrap();
    let path = tiny(TensorType::Q8_0, TensorType::Q8_0).write(dir.path());
    LocalBackend::load(&path, options, "tiny").unwrap()
}

fn request(text: &str, stream: bool, sampling: Sampling) -> Request {
    Request {
        model: "tiny".into(),
        messages: [Message::text(Role::User, text)].into(),
        sampling,
        n: 1,
        logprobs: false,
        top_logprobs: 0,
        stream,
        include_usage: true,
        needs: Vec::new(),
        metadata: Default::default(),
        user: None,
        session: None,
        client_retry: 0,
        priority: 0,
        exact: false,
        keep: None,
        sharing: String::new(),
        begun: None,
        body: Bytes::new(),
    }
}

fn call(request: Request, spec: CallSpec) -> Call {
    Call {
        id: "0190a1b2-0000-7000-8000-000000000001".parse::<DecisionId>().unwrap(),
        index: 0,
        spec,
        request: Arc::new(request),
        client_authorization: None,
        deadline: None,
    }
}

fn short(n: u32) -> Sampling {
    Sampling { max_tokens: Some(n), ..Sampling::default() }
}

async fn whole(backend: &LocalBackend, call: Call) -> (Vec<Choice>, Usage) {
    match backend.start(call).await.unwrap_or_else(|e| panic!("{e}")) {
        Reply::Whole { completion: Completion::Choices { choices, usage }, .. } => (choices, usage),
        _ => panic!("not a whole reply of choices"),
    }
}

#[tokio::test]
async fn a_stream_carries_the_text_that_the_whole_answer_has() {
    let backend = backend(EngineOptions::default());
    let bare = || CallSpec::bare("tiny");
    let (choices, usage) = whole(&backend, call(request("the cat", false, short(24)), bare())).await;
    assert_eq!(choices.len(), 1);
    assert_eq!((usage.completion_tokens, usage.source), (24, UsageSource::Reported));

    let reply = backend.start(call(request("the cat", true, short(24)), bare())).await.map_err(|e| e.to_string());
    let Ok(Reply::Stream { chunks, .. }) = reply else { panic!("not a stream") };
    let chunks: Vec<Chunk> = chunks.map(|c| c.unwrap()).collect().await;
    let text: String =
        chunks.iter().map(|c| if let Chunk::Text { text, .. } = c { text.as_str() } else { "" }).collect();
    assert_eq!(text, choices[0].text);
    assert!(matches!(chunks[chunks.len() - 2], Chunk::Finish { choice: 0, reason: FinishReason::Length }));
    assert!(matches!(chunks[chunks.len() - 1], Chunk::Usage(u) if u == usage));
}

#[tokio::test]
async fn seeds_follow_the_call_where_nobody_gives_one() {
    let backend = backend(EngineOptions::default());
    let ask = async |index, seed| {
        let sampling = Sampling { seed, ..short(24) };
        let mut call = call(request("the", false, sampling), CallSpec::bare("tiny"));
        call.index = index;
        whole(&backend, call).await.0[0].text.clone()
    };
    assert_eq!(ask(0, None).await, ask(0, None).await);
    assert_ne!(ask(0, None).await, ask(1, None).await);
    assert_eq!(ask(0, Some(5)).await, ask(1, Some(5)).await);
}

#[tokio::test]
async fn what_the_engine_cannot_do_is_refused_by_name() {
    let backend = backend(EngineOptions::default());
    let fail = async |request: Request| match backend.start(call(request, CallSpec::bare("tiny"))).await {
        Err(error) => error,
        Ok(_) => panic!("accepted"),
    };
    let mut image = request("x", false, short(1));
    image.messages =
        [Message { role: Role::User, content: vec![ContentPart::Other { kind: "image_url".into() }] }].into();
    let error = fail(image).await;
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.message.contains("`image_url`"), "{error}");

    let mut tools = request("x", false, short(1));
    tools.needs = vec![Need::Tools];
    assert_eq!(fail(tools).await.kind, ErrorKind::Unsupported);

    let error = fail(request(&"word ".repeat(60), false, short(1))).await;
    assert_eq!(error.kind, ErrorKind::ContextTooLong);
    assert!(error.message.contains(&CONTEXT.to_string()), "{error}");
    // Too long to be worth tokenising.
    let error = fail(request(&"word ".repeat(600_000), false, short(1))).await;
    assert_eq!(error.kind, ErrorKind::ContextTooLong);
    assert!(error.message.contains("at least"), "{error}");
}

#[tokio::test]
async fn a_full_queue_is_a_rate_limit_with_a_hint() {
    let backend = backend(EngineOptions { max_waiting: 0, ..EngineOptions::default() });
    let error = match backend.start(call(request("x", true, short(1)), CallSpec::bare("tiny"))).await {
        Err(error) => error,
        Ok(_) => panic!("accepted"),
    };
    assert_eq!(error.kind, ErrorKind::RateLimited);
    assert!(error.retry_after.is_some());
}

#[test]
fn the_plans_system_text_comes_first() {
    let backend = backend(EngineOptions::default());
    let mut request = request("hi", false, short(1));
    let messages = backend.messages(&request, Some("Think.")).unwrap();
    assert_eq!(messages, [Message::text(Role::System, "Think."), Message::text(Role::User, "hi")]);
    request.messages = [Message::text(Role::Developer, "Be brief."), Message::text(Role::User, "hi")].into();
    let messages = backend.messages(&request, Some("Think.")).unwrap();
    assert_eq!((messages[0].role, messages[0].joined_text()), (Role::System, "Think.\n\nBe brief.".to_owned()));
    assert_eq!(messages.len(), 2);
}

#[tokio::test]
async fn choices_differ_and_are_all_counted() {
    let backend = backend(EngineOptions::default());
    let mut request = request("the", false, short(16));
    request.n = 3;
    let (choices, usage) = whole(&backend, call(request, CallSpec::bare("tiny"))).await;
    assert_eq!(choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(choices[0].text != choices[1].text && choices[1].text != choices[2].text);
    assert!(choices.iter().all(|c| c.finish == FinishReason::Length || c.finish == FinishReason::Stop));
    assert!(usage.completion_tokens > 16);
}

#[tokio::test]
async fn a_prompt_that_was_computed_is_in_memory() {
    let backend = backend(EngineOptions::default());
    let asked = request(&"Tell me a story about the sea. ".repeat(3), false, short(3));
    let before = backend.prompt(&Arc::new(asked.clone())).await.unwrap();
    let (_, usage) = whole(&backend, call(asked.clone(), CallSpec::bare("tiny"))).await;
    assert_eq!(before, PromptState { tokens: usage.prompt_tokens, resident: 0 });
    let after = backend.prompt(&Arc::new(asked.clone())).await.unwrap();
    assert_eq!(after.resident, (usage.prompt_tokens - 1) / 32 * 32);
    let (_, usage) = whole(&backend, call(asked, CallSpec::bare("tiny"))).await;
    assert_eq!(usage.cached_tokens, after.resident, "what was said beforehand is what is found");
    let state = backend.state();
    assert!(state.prefill_tokens_per_s > 0.0 && state.decode_tokens_per_s > 0.0);
    // Too long for the model, and tokenised apart.
    assert_eq!(backend.prompt(&Arc::new(request(&"a".repeat(100_000), false, short(1)))).await, None);
}
