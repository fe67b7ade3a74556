//! Requests over scripted and remote backends: what the client gets, and what is in the journal when it gets it.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

mod plans;

use tokio::{io::AsyncWriteExt, sync::Notify};

use super::*;
use crate::{
    backend::{
        remote::{RemoteBackend, RemoteConfig, testing as upstream},
        scripted::{ScriptedBackend, ScriptedConfig},
    },
    domain::{
        Attempt, Completion, DecidedBy, EventBody, FinishReason, Hash, ModelCard, Outcome, Plan, Price, Sampling,
        UsageSource,
    },
};

/// A journal in memory that can be made to fail, or to wait.
#[derive(Default)]
struct Memory {
    /// One list per append.
    writes: Mutex<Vec<Vec<Event>>>,
    broken: AtomicBool,
    held: AtomicBool,
    changed: Notify,
}

#[async_trait]
impl Journal for Memory {
    async fn append(&self, events: Vec<Event>) -> Result<(), String> {
        while self.held.load(Ordering::SeqCst) {
            self.changed.notified().await;
        }
        if self.broken.load(Ordering::SeqCst) {
            return Err("the disk is full".to_owned());
        }
        self.writes.lock().unwrap().push(events);
        self.changed.notify_waiters();
        Ok(())
    }
}

impl Memory {
    fn events(&self) -> Vec<Event> {
        self.writes.lock().unwrap().concat()
    }

    fn attempts(&self) -> Vec<Attempt> {
        let attempt = |e: Event| match e.body {
            EventBody::Attempt(attempt) => Some(*attempt),
            _ => None,
        };
        self.events().into_iter().filter_map(attempt).collect()
    }

    fn outcomes(&self) -> Vec<Outcome> {
        let outcome = |e: Event| match e.body {
            EventBody::Outcome(outcome) => Some(outcome),
            _ => None,
        };
        self.events().into_iter().filter_map(outcome).collect()
    }

    fn outcome(&self) -> Outcome {
        let mut all = self.outcomes();
        assert_eq!(all.len(), 1, "exactly one outcome");
        let attempts = self.attempts();
        let outcome = all.remove(0);
        assert_eq!(outcome.attempts as usize, attempts.len());
        let cost: f64 = attempts.iter().map(|a| a.cost_usd).sum();
        assert!((outcome.cost_usd - cost).abs() < 1e-12);
        outcome
    }

    /// Waits for the outcome that a guard writes after everybody has gone.
    async fn settled(&self) -> Outcome {
        loop {
            let changed = self.changed.notified();
            if !self.outcomes().is_empty() {
                return self.outcome();
            }
            changed.await;
        }
    }
}

struct House {
    journal: Arc<Memory>,
    dispatcher: Dispatcher,
}

fn house_of(backends: Vec<(&str, Arc<dyn Backend>)>, options: DispatchOptions) -> House {
    let journal = Arc::new(Memory::default());
    let price = Price { input: 1.0, output: 1e6, cached_input: None };
    let fleet = Fleet::new(backends.iter().map(|(name, _)| ModelCard {
        name: (*name).to_owned(),
        tags: Vec::new(),
        context: 0,
        price,
        energy: None,
        capabilities: Default::default(),
    }));
    let backends = backends.into_iter().map(|(name, backend)| (name.to_owned(), backend)).collect();
    let dispatcher = Dispatcher::new(backends, Arc::clone(&journal) as Arc<dyn Journal>, fleet, options);
    House { journal, dispatcher }
}

fn quick() -> DispatchOptions {
    let retry = RetryPolicy { base: 10, max: 100, ..RetryPolicy::default() };
    DispatchOptions { retry, ..DispatchOptions::default() }
}

fn scripted(name: &str, rule: serde_json::Value) -> Arc<dyn Backend> {
    let config: ScriptedConfig = serde_json::from_value(serde_json::json!({"rules": [rule]})).unwrap();
    Arc::new(ScriptedBackend::new(name, config))
}

fn house(rules: &[(&str, serde_json::Value)]) -> House {
    house_of(rules.iter().map(|(name, rule)| (*name, scripted(name, rule.clone()))).collect(), quick())
}

fn decision(models: &[&str], on: &[&str]) -> Decision {
    Decision {
        policy: "p".into(),
        policy_hash: Hash::ZERO,
        state_seq: 0,
        decided_by: DecidedBy::Rule,
        rule: None,
        arm: models.first().copied().unwrap_or_default().to_owned(),
        plan: models.first().map(|m| Plan::Call(CallSpec::bare(*m))),
        fallback: models.iter().skip(1).map(|m| CallSpec::bare(*m)).collect(),
        retries: None,
        fallback_on: on.iter().map(|s| (*s).to_owned()).collect(),
        propensity: 1.0,
        candidates: Vec::new(),
        features: Vec::new(),
        rules: Vec::new(),
        refusal: models.is_empty().then(|| "not from here".to_owned()),
        no_embedding: None,
        split: None,
        bounds: None,
        failover: None,
    }
}

const BODY: &str = r#"{"messages":[{"role":"user","content":"one two three"}]}"#;

impl House {
    async fn ask(&self, decision: &Decision, stream: bool) -> Result<Dispatched, GatewayError> {
        let request = Arc::new(upstream::request(BODY, stream));
        self.dispatcher.run(DecisionId::new(), decision, request, &Caller::default()).await
    }

    /// The stream's text, and how it ended.
    async fn stream(&self, decision: &Decision) -> (String, Result<(), GatewayError>) {
        let mut chunks = match self.ask(decision, true).await {
            Ok(Dispatched { body: AnswerBody::Stream(chunks), .. }) => chunks,
            Ok(_) => panic!("not a stream"),
            Err(error) => return (String::new(), Err(error)),
        };
        let mut text = String::new();
        let mut ended = None;
        while let Some(item) = chunks.next().await {
            assert!(ended.is_none(), "nothing follows the last item");
            match item {
                Ok(Chunk::Text { text: more, .. }) => text.push_str(&more),
                Ok(Chunk::Wire(json)) => text.extend(crate::backend::wire::texts(&json).into_iter().map(|t| t.1)),
                Ok(Chunk::Finish { .. }) => {}
                Ok(Chunk::Usage(_)) => {
                    assert_eq!(self.journal.outcomes().len(), 1, "the outcome is there before the last item");
                    ended = Some(Ok(()));
                }
                Err(error) => {
                    if !matches!(error, GatewayError::NotRecorded(_)) {
                        assert_eq!(self.journal.outcomes().len(), 1);
                    }
                    ended = Some(Err(error));
                }
            }
        }
        (text, ended.unwrap())
    }
}

fn kind(error: &GatewayError) -> ErrorKind {
    match error {
        GatewayError::Backend { error, .. } => error.kind,
        other => panic!("not a backend's error: {other}"),
    }
}

#[tokio::test]
async fn an_answer_leaves_one_attempt_and_one_outcome_in_one_write() {
    for stream in [true, false] {
        let house = house(&[("a", serde_json::json!({}))]);
        if stream {
            let (text, end) = house.stream(&decision(&["a"], &[])).await;
            assert_eq!(text, "one two three");
            end.unwrap();
        } else {
            let answer = house.ask(&decision(&["a"], &[]), false).await.unwrap();
            assert!(matches!(answer.body, AnswerBody::Whole(Completion::Choices { .. })));
            assert_eq!(answer.model, "a");
        }
        let writes = house.journal.writes.lock().unwrap().clone();
        assert_eq!(writes.iter().map(Vec::len).collect::<Vec<_>>(), [2]);
        let attempt = &house.journal.attempts()[0];
        assert_eq!(
            (attempt.index, attempt.why, &*attempt.model, &*attempt.backend),
            (0, AttemptReason::Planned, "a", "scripted")
        );
        assert_eq!((attempt.finish, attempt.error.clone()), (Some(FinishReason::Stop), None));
        assert_eq!(attempt.ttft_us.is_some(), stream);
        assert!(attempt.latency_us >= attempt.ttft_us.unwrap_or(0));
        let outcome = house.journal.outcome();
        assert_eq!((outcome.status, &*outcome.served_by), (OutcomeStatus::Ok, "a"));
        assert_eq!((outcome.usage.prompt_tokens, outcome.usage.completion_tokens), (3, 3));
        assert!((outcome.cost_usd - (3.0 + 3e-6)).abs() < 1e-12, "{}", outcome.cost_usd);
        assert_eq!(outcome.answer_hash, None);
        let stamps: Vec<Micros> = house.journal.events().iter().map(|e| e.at).collect();
        assert!(stamps.is_sorted() && attempt.started <= stamps[0]);
    }
}

#[tokio::test]
async fn answers_are_hashed_alike_however_they_come() {
    let options = DispatchOptions { hash_bodies: true, ..quick() };
    let url = upstream::upstream(|_, received: upstream::Received, mut socket| async move {
        let answer = if received.body.contains("\"stream\":true") {
            upstream::events(upstream::TRANSCRIPT)
        } else {
            upstream::json("200 OK", "", r#"{"id":"u","choices":[{"message":{"content":"Grüße 漢🙂"}}]}"#)
        };
        let _ = socket.write_all(answer.as_bytes()).await;
    })
    .await;
    let remote: Arc<dyn Backend> = Arc::new(RemoteBackend::new(RemoteConfig::new("r", url)).unwrap());
    let local = scripted("s", serde_json::json!({"reply": {"text": "Grüße 漢🙂"}}));
    let house = house_of(vec![("r", remote), ("s", local)], options);
    for model in ["r", "s"] {
        for stream in [true, false] {
            drop(house.journal.writes.lock().unwrap().drain(..));
            if stream {
                house.stream(&decision(&[model], &[])).await.1.unwrap();
            } else {
                house.ask(&decision(&[model], &[]), false).await.map(|_| ()).unwrap();
            }
            assert_eq!(house.journal.outcome().answer_hash, Some(Hash::of("Grüße 漢🙂".as_bytes())));
        }
    }
}

#[tokio::test]
async fn failures_before_the_first_byte_are_retried_and_recorded_as_they_happen() {
    let house = house(&[("a", serde_json::json!({"fail": {"kind": "server_error", "times": 2}}))]);
    let (text, end) = house.stream(&decision(&["a"], &[])).await;
    end.unwrap();
    assert_eq!(text, "one two three");
    let attempts = house.journal.attempts();
    let told: Vec<_> = attempts.iter().map(|a| (a.index, a.why, a.error.as_deref())).collect();
    assert_eq!(
        told,
        [
            (0, AttemptReason::Planned, Some("server_error")),
            (1, AttemptReason::Retry, Some("server_error")),
            (2, AttemptReason::Retry, None)
        ]
    );
    let writes: Vec<usize> = house.journal.writes.lock().unwrap().iter().map(Vec::len).collect();
    assert_eq!(writes, [1, 1, 2]);
    assert_eq!(house.journal.outcome().status, OutcomeStatus::Ok);
}

#[tokio::test]
async fn a_stream_that_fails_before_its_first_piece_is_retried_too() {
    // A cut after no chunk at all: the backend has accepted the call, the client has seen nothing.
    let house = house(&[("a", serde_json::json!({"cut_after": 0})), ("b", serde_json::json!({}))]);
    let (text, end) = house.stream(&decision(&["a", "b"], &["cut"])).await;
    end.unwrap();
    assert_eq!(text, "one two three");
    let models: Vec<String> = house.journal.attempts().into_iter().map(|a| a.model).collect();
    assert_eq!(models, ["a", "a", "a", "b"]);
    assert_eq!(house.journal.outcome().served_by, "b");
}

#[tokio::test]
async fn fallback_answers_the_listed_kinds_only() {
    let rules = [("a", serde_json::json!({"fail": {"kind": "auth"}})), ("b", serde_json::json!({}))];
    let answered = house(&rules);
    let answer = answered.ask(&decision(&["a", "b"], &["timeout", "auth"]), false).await.unwrap();
    assert_eq!(answer.model, "b");
    assert_eq!(answered.journal.attempts()[1].why, AttemptReason::Fallback);

    let refused = house(&rules);
    let error = refused.ask(&decision(&["a", "b"], &["timeout"]), false).await.err().unwrap();
    assert_eq!(kind(&error), ErrorKind::Auth);
    assert!(matches!(&error, GatewayError::Backend { model, .. } if model == "a"));
    let outcome = refused.journal.outcome();
    assert_eq!(
        (outcome.status, &*outcome.served_by, outcome.error.as_deref()),
        (OutcomeStatus::Error, "", Some("auth"))
    );
    assert_eq!(refused.journal.writes.lock().unwrap().len(), 1, "the last attempt and the outcome are one write");
}

#[tokio::test]
async fn after_the_first_byte_a_failure_is_an_error_and_no_second_try() {
    let house = house(&[("a", serde_json::json!({"cut_after": 2})), ("b", serde_json::json!({}))]);
    let (text, end) = house.stream(&decision(&["a", "b"], &["cut"])).await;
    assert_eq!((&*text, kind(&end.unwrap_err())), ("one two", ErrorKind::Cut));
    let outcome = house.journal.outcome();
    assert_eq!((outcome.status, &*outcome.served_by, outcome.attempts), (OutcomeStatus::Error, "a", 1));
    assert_eq!((outcome.usage.source, outcome.usage.completion_tokens), (UsageSource::Estimated, 2));
    assert!(outcome.cost_usd > 0.0);
}

#[tokio::test]
async fn the_deadline_ends_what_hangs() {
    let limits = Limits { deadline: Some(300_000), ..Limits::default() };
    let hanging = |rule| house_of(vec![("a", scripted("a", rule))], DispatchOptions { limits, ..quick() });
    // Before the answer and in the middle of it.
    let before = hanging(serde_json::json!({"stall_after": 0}));
    let (_, end) = before.stream(&decision(&["a"], &[])).await;
    assert_eq!(kind(&end.unwrap_err()), ErrorKind::Timeout);
    assert_eq!(before.journal.attempts()[0].error.as_deref(), Some("timeout"));
    assert_eq!(before.journal.outcome().error.as_deref(), Some("timeout"));
    let amid = hanging(serde_json::json!({"stall_after": 1}));
    let (text, end) = amid.stream(&decision(&["a"], &[])).await;
    assert_eq!((&*text, kind(&end.unwrap_err())), ("one", ErrorKind::Timeout));
    assert_eq!(amid.journal.outcome().served_by, "a");
    assert_eq!(amid.dispatcher.states()["a"].running, 0);
}

#[tokio::test]
async fn a_client_that_leaves_is_recorded_wherever_it_leaves() {
    // In the middle of the stream.
    let amid = house(&[("a", serde_json::json!({"stall_after": 2}))]);
    let Ok(Dispatched { body: AnswerBody::Stream(mut chunks), .. }) = amid.ask(&decision(&["a"], &[]), true).await
    else {
        panic!("no stream")
    };
    chunks.next().await.unwrap().unwrap();
    chunks.next().await.unwrap().unwrap();
    drop(chunks);
    let outcome = amid.journal.settled().await;
    assert_eq!((outcome.status, outcome.usage.completion_tokens), (OutcomeStatus::Cancelled, 2));
    assert_eq!(amid.journal.attempts()[0].finish, Some(FinishReason::Cancelled));
    assert_eq!(amid.dispatcher.states()["a"].running, 0);

    // While the call is being made.
    let before = house(&[("a", serde_json::json!({"stall_after": 0}))]);
    {
        let decision = decision(&["a"], &[]);
        let asking = before.ask(&decision, true);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(5), asking).await.is_err());
    }
    let outcome = before.journal.settled().await;
    assert_eq!((outcome.status, &*outcome.served_by, outcome.attempts), (OutcomeStatus::Cancelled, "", 1));

    // Before the stream was ever read.
    let unread = house(&[("a", serde_json::json!({}))]);
    drop(unread.ask(&decision(&["a"], &[]), true).await.unwrap());
    assert_eq!(unread.journal.settled().await.status, OutcomeStatus::Cancelled);

    // After the end.
    let after = house(&[("a", serde_json::json!({}))]);
    after.stream(&decision(&["a"], &[])).await.1.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(after.journal.outcome().status, OutcomeStatus::Ok);
}

#[tokio::test]
async fn leaving_while_the_outcome_is_being_written_loses_and_doubles_nothing() {
    let house = house(&[("a", serde_json::json!({}))]);
    house.journal.held.store(true, Ordering::SeqCst);
    let Ok(Dispatched { body: AnswerBody::Stream(mut chunks), .. }) = house.ask(&decision(&["a"], &[]), true).await
    else {
        panic!("no stream")
    };
    while let Some(Some(item)) = futures_util::FutureExt::now_or_never(chunks.next()) {
        assert!(!matches!(item, Ok(Chunk::Usage(_))), "the end is held back until it is recorded");
    }
    drop(chunks);
    assert!(house.journal.outcomes().is_empty());
    house.journal.held.store(false, Ordering::SeqCst);
    // The guard's task may not wait yet; it is told until it has heard.
    let told = async {
        loop {
            house.journal.changed.notify_waiters();
            tokio::task::yield_now().await;
        }
    };
    let outcome = tokio::select! {
        outcome = house.journal.settled() => outcome,
        () = told => unreachable!(),
    };
    assert_eq!(outcome.status, OutcomeStatus::Ok);
}

#[tokio::test]
async fn what_cannot_be_recorded_is_not_given_out_as_a_good_end() {
    let house = house(&[("a", serde_json::json!({})), ("down", serde_json::json!({"fail": {"kind": "auth"}}))]);
    house.journal.broken.store(true, Ordering::SeqCst);
    let (text, end) = house.stream(&decision(&["a"], &[])).await;
    assert_eq!(text, "one two three");
    assert!(matches!(end, Err(GatewayError::NotRecorded(why)) if why == "the disk is full"));
    for model in ["a", "down"] {
        let error = house.ask(&decision(&[model], &[]), false).await.err().unwrap();
        assert!(matches!(error, GatewayError::NotRecorded(_)), "{error}");
    }
}

#[tokio::test]
async fn refusals_and_models_without_a_backend_are_recorded() {
    let house = house(&[("a", serde_json::json!({}))]);
    let error = house.ask(&decision(&[], &[]), true).await.err().unwrap();
    assert!(matches!(&error, GatewayError::Refused { reason, .. } if reason == "not from here"));
    assert_eq!(house.journal.outcome().status, OutcomeStatus::Refused);
    house.journal.writes.lock().unwrap().clear();
    let error = house.ask(&decision(&["ghost"], &[]), true).await.err().unwrap();
    assert_eq!(kind(&error), ErrorKind::Internal);
    assert!(error.to_string().contains("`ghost`"));
    assert_eq!(house.journal.outcome().status, OutcomeStatus::Error);
}

#[tokio::test]
async fn a_server_that_asks_for_patience_is_asked_again() {
    let url = upstream::upstream(|number, _, mut socket| async move {
        let answer = match number {
            0 => upstream::json("429 Too Many Requests", "retry-after-ms: 1\r\n", r#"{"error":{"message":"x"}}"#),
            _ => upstream::events(upstream::TRANSCRIPT),
        };
        let _ = socket.write_all(answer.as_bytes()).await;
    })
    .await;
    let remote: Arc<dyn Backend> = Arc::new(RemoteBackend::new(RemoteConfig::new("r", url)).unwrap());
    let house = house_of(vec![("r", remote)], quick());
    let (text, end) = house.stream(&decision(&["r"], &[])).await;
    end.unwrap();
    assert_eq!(text, "Grüße 漢🙂");
    let attempts = house.journal.attempts();
    assert_eq!(attempts.iter().map(|a| a.error.as_deref()).collect::<Vec<_>>(), [Some("rate_limited"), None]);
    assert_eq!(attempts[1].model_reported.as_deref(), Some("real-7b"));
    assert_eq!((attempts[1].usage.prompt_tokens, attempts[1].finish), (9, Some(FinishReason::Stop)));
    assert_eq!(attempts[1].sampling, Sampling::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_at_once_end_well_and_are_all_recorded() {
    let house = Arc::new(house(&[("a", serde_json::json!({"token_ms": 1, "reply": {"words": 10}}))]));
    let ask = |house: Arc<House>| async move {
        let Ok(Dispatched { body: AnswerBody::Stream(chunks), .. }) = house.ask(&decision(&["a"], &[]), true).await
        else {
            panic!("no stream")
        };
        chunks.map(Result::unwrap).collect::<Vec<_>>().await.len()
    };
    let all = futures_util::future::join_all((0..64).map(|_| tokio::spawn(ask(Arc::clone(&house))))).await;
    assert!(all.into_iter().all(|n| n.unwrap() == 12));
    let outcomes = house.journal.outcomes();
    assert_eq!(outcomes.len(), 64);
    assert!(outcomes.iter().all(|o| o.status == OutcomeStatus::Ok));
    assert_eq!(house.dispatcher.states()["a"].running, 0);
}
