//! Plans of several calls: what the client gets, what the backends are asked, and what is in the record.

mod early;
mod now;
mod verify;

use serde_json::json;

use super::*;
use crate::audit::query::NoteView;
use crate::domain::{
    Aggregate, Bound, Condition, Note, RequestBounds, Stage,
    testing::{call, frugal, parallel},
};

/// Scripted models that say these texts, a token each this certain.
fn arena(models: &[(&str, &str, f64)]) -> House {
    let rules: Vec<_> = models
        .iter()
        .map(|(name, text, certainty)| (*name, json!({"reply": {"text": text}, "certainty": certainty})))
        .collect();
    house(&rules)
}

fn with(plan: Plan) -> Decision {
    Decision { plan: Some(plan), ..decision(&["unused"], &[]) }
}

fn hedged(call: &str, hedge: &str, after_ms: u32) -> Plan {
    Plan::Hedged { call: CallSpec::bare(call), hedge: CallSpec::bare(hedge), after_ms }
}

fn parallel_of(branches: Vec<Plan>, aggregate: Aggregate) -> Plan {
    Plan::Parallel { branches, aggregate }
}

impl House {
    fn noted(&self) -> Vec<NoteView> {
        let note = |event: Event| match event.body {
            EventBody::Note(note) => Some(NoteView { at: event.at, note }),
            _ => None,
        };
        self.journal.events().into_iter().filter_map(note).collect()
    }

    fn notes(&self) -> Vec<Note> {
        self.noted().into_iter().map(|noted| noted.note).collect()
    }

    fn reasons(&self) -> Vec<String> {
        let reason = |note: Note| serde_json::to_value(note).unwrap()["reason"].as_str().unwrap().to_owned();
        self.notes().into_iter().map(reason).collect()
    }

    /// The whole answer's text, and the model that it is said to be of.
    async fn whole(&self, decision: &Decision) -> (String, Dispatched) {
        let dispatched = self.ask(decision, false).await.unwrap();
        let AnswerBody::Whole(Completion::Choices { choices, .. }) = &dispatched.body else { panic!("not whole") };
        (choices[0].text.clone(), dispatched)
    }
}

#[tokio::test]
async fn a_sure_small_model_answers_and_an_unsure_one_escalates() {
    let house = arena(&[("small", "four", 0.9), ("large", "4", 0.9)]);
    let (text, dispatched) = house.whole(&with(frugal())).await;
    assert_eq!((&*text, &*dispatched.model), ("four", "small"));
    assert_eq!(house.reasons(), ["gate_holds", "accepted"]);
    assert_eq!(house.journal.outcome().served_by, "small");
    assert_eq!(house.journal.attempts()[0].at, [0]);
    let facts = house.journal.attempts()[0].facts.clone().unwrap();
    assert!((facts.score(Score::MeanLogprob).unwrap().value - f64::from(0.9f64.ln() as f32)).abs() < 1e-9);

    let house = arena(&[("small", "five", 0.55), ("large", "4", 0.9)]);
    let (text, dispatched) = house.whole(&with(frugal())).await;
    assert_eq!((&*text, &*dispatched.model), ("4", "large"));
    assert_eq!(house.reasons(), ["gate_fails", "escalated", "accepted"]);
    let outcome = house.journal.outcome();
    assert_eq!((&*outcome.served_by, outcome.attempts), ("large", 2));
    assert_eq!(outcome.usage.completion_tokens, 1, "of the call that answered");
    let attempts = house.journal.attempts();
    assert_eq!((attempts[1].why, &attempts[1].at[..]), (AttemptReason::Escalation, &[1][..]));
    // The rejected answer and why are in the record before the next call is made.
    let writes: Vec<usize> = house.journal.writes.lock().unwrap().iter().map(Vec::len).collect();
    assert_eq!(writes, [3, 3], "call, gate, escalation; call, acceptance, outcome");
}

#[tokio::test]
async fn a_held_answer_is_streamed_whole_and_the_last_stage_as_it_comes() {
    let house = arena(&[("small", "one two three four", 0.9), ("large", "5 6 7", 0.9)]);
    let (text, end) = house.stream(&with(frugal())).await;
    end.unwrap();
    assert_eq!(text, "one two three four");
    assert!(house.journal.outcome().ttft_us.is_some());

    let house = arena(&[("small", "one two three four", 0.6), ("large", "5 6 7", 0.9)]);
    let (text, end) = house.stream(&with(frugal())).await;
    end.unwrap();
    assert_eq!(text, "5 6 7", "nothing of the rejected answer");
    assert_eq!(house.journal.outcome().served_by, "large");
}

#[tokio::test]
async fn a_failed_stage_is_rerouted_and_a_dead_end_answers_with_the_best_so_far() {
    let house =
        house(&[("small", json!({"fail": {"kind": "bad_request"}})), ("large", json!({"reply": {"text": "4"}}))]);
    assert_eq!(house.whole(&with(frugal())).await.0, "4");
    assert_eq!(house.reasons(), ["rerouted", "accepted"]);

    let house = house_of(
        vec![
            ("small", scripted("small", json!({"reply": {"text": "unsure"}, "certainty": 0.5}))),
            ("large", scripted("large", json!({"fail": {"kind": "auth"}}))),
        ],
        quick(),
    );
    let (text, dispatched) = house.whole(&with(frugal())).await;
    assert_eq!((&*text, &*dispatched.model), ("unsure", "small"));
    assert_eq!(dispatched.because, Some(BestBecause::Failed { error: ErrorKind::Auth }));
    assert_eq!(house.reasons(), ["gate_fails", "escalated", "stages_failed", "best_so_far"]);
    let outcome = house.journal.outcome();
    assert_eq!((outcome.status, &*outcome.served_by), (OutcomeStatus::Ok, "small"));
}

#[tokio::test]
async fn a_vote_is_over_what_answers_say() {
    let house = arena(&[("a", "The answer is 41.", 0.9), ("b", "42", 0.9), ("c", "So the answer is 42.0", 0.9)]);
    let (text, _) = house.whole(&with(parallel(&["a", "b", "c"], Aggregate::Vote))).await;
    assert_eq!(text, "42");
    let forms: Vec<u32> = house.journal.attempts().into_iter().map(|a| a.facts.unwrap().form).collect();
    assert!(forms[0] != forms[1] && forms[1] == forms[2], "{forms:?}");
    assert_eq!(house.reasons(), ["voted"]);
}

#[tokio::test]
async fn the_first_answer_wins_and_the_others_are_cancelled_and_paid_for() {
    let house = house(&[
        ("slow", json!({"reply": {"text": "a b c"}, "token_ms": 60_000})),
        ("fast", json!({"reply": {"text": "now"}, "first_token_ms": 30})),
    ]);
    let (text, end) = house.stream(&with(parallel(&["slow", "fast"], Aggregate::First))).await;
    end.unwrap();
    assert_eq!(text, "now");
    let attempts = house.journal.attempts();
    let slow = attempts.iter().find(|a| a.model == "slow").unwrap();
    assert_eq!((slow.finish, slow.error.as_deref()), (Some(FinishReason::Cancelled), None));
    assert_eq!(slow.usage.completion_tokens, 1, "what had come of it");
    assert_eq!(house.journal.outcome().served_by, "fast");
    assert_eq!(house.dispatcher.states()["slow"].running, 0);
}

#[tokio::test]
async fn a_slow_call_is_hedged_and_the_first_to_begin_is_forwarded() {
    for (hedge_ms, served, reasons) in
        [(0, "fast", ["hedged", "hedge_won"]), (60_000, "slow", ["hedged", "hedge_lost"])]
    {
        let house = house(&[
            ("slow", json!({"reply": {"text": "one two three"}, "first_token_ms": 60, "token_ms": 2})),
            ("fast", json!({"reply": {"text": "four five six"}, "first_token_ms": hedge_ms, "token_ms": 2})),
        ]);
        let decision = with(hedged("slow", "fast", 20));
        let (text, end) = house.stream(&decision).await;
        end.unwrap();
        assert_eq!(text, if served == "fast" { "four five six" } else { "one two three" });
        assert_eq!(house.reasons(), reasons);
        let mut attempts = house.journal.attempts();
        attempts.sort_by_key(|attempt| attempt.index);
        let whys: Vec<_> = attempts.iter().map(|a| (a.why, a.finish == Some(FinishReason::Cancelled))).collect();
        assert_eq!(whys, [(AttemptReason::Planned, served == "fast"), (AttemptReason::Hedge, served == "slow")]);
        assert_eq!(house.journal.outcome().served_by, served);
        let states = house.dispatcher.states();
        assert_eq!((states["slow"].running, states["fast"].running), (0, 0), "the other is cancelled");
        let again = house.again(&decision, &quick());
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
    }
    // In time, and of a whole answer.
    let house = house(&[("a", json!({"reply": {"text": "now"}})), ("b", json!({}))]);
    let decision = with(hedged("a", "b", 60_000));
    assert_eq!(house.whole(&decision).await.0, "now");
    assert_eq!((house.journal.attempts().len(), house.reasons().len()), (1, 0));
    assert!(house.again(&decision, &quick()).same);
}

#[tokio::test]
async fn bounds_mask_a_hedge_and_the_record_tells_it_again() {
    let house = house(&[("slow", json!({"reply": {"text": "one"}, "first_token_ms": 30})), ("fast", json!({}))]);
    let bounds = RequestBounds { calls: Some(1), ..RequestBounds::default() };
    let decision = Decision { bounds: Some(Box::new(bounds)), ..with(hedged("slow", "fast", 5)) };
    assert_eq!(house.whole(&decision).await.0, "one");
    assert_eq!(house.reasons(), ["hedge_masked"]);
    assert!(house.again(&decision, &quick()).same);
}

#[tokio::test]
async fn a_judge_is_shown_the_answers_and_names_one() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let url = {
        let seen = Arc::clone(&seen);
        upstream::upstream(move |_, received, mut socket| {
            let seen = Arc::clone(&seen);
            async move {
                seen.lock().unwrap().push(received.body);
                let answer =
                    upstream::json("200 OK", "", r#"{"id":"u","choices":[{"message":{"content":"Answer 2."}}]}"#);
                let _ = socket.write_all(answer.as_bytes()).await;
            }
        })
        .await
    };
    let judge: Arc<dyn Backend> = Arc::new(RemoteBackend::new(RemoteConfig::new("judge", url)).unwrap());
    let say = |name: &'static str| (name, scripted(name, json!({"reply": {"text": format!("{name} says so")}})));
    let house = house_of(vec![say("a"), say("b"), ("judge", judge)], quick());
    let plan = parallel(&["a", "b"], Aggregate::Judge { call: CallSpec::bare("judge") });
    for stream in [false, true] {
        house.journal.writes.lock().unwrap().clear();
        let text = match stream {
            true => house.stream(&with(plan.clone())).await.0,
            false => house.whole(&with(plan.clone())).await.0,
        };
        assert_eq!(text, "b says so");
        assert_eq!(house.reasons(), ["judged"]);
        assert_eq!(house.journal.attempts()[2].facts.as_ref().unwrap().verdict, Some(1));
        let body: serde_json::Value = serde_json::from_str(&seen.lock().unwrap().pop().unwrap()).unwrap();
        let prompt = body["messages"][0]["content"].as_str().unwrap();
        assert!(prompt.contains("one two three") && prompt.contains("# Answer 2\n\nb says so"), "{prompt}");
        assert_eq!((body["temperature"].as_f64(), body["stream"].as_bool()), (Some(0.0), None), "{body}");
    }
}

#[tokio::test]
async fn a_refining_call_sees_the_conversation_with_the_answers_behind_it() {
    let house =
        house(&[("a", json!({"reply": {"text": "red"}})), ("b", json!({"reply": {"text": "blue"}})), ("r", json!({}))]);
    let plan = parallel(&["a", "b"], Aggregate::Refine { call: CallSpec::bare("r") });
    // `r` echoes what it was shown.
    let (text, end) = house.stream(&with(plan)).await;
    end.unwrap();
    assert!(text.starts_with("one two three") && text.ends_with("# Answer 1\n\nred\n\n# Answer 2\n\nblue\n"), "{text}");
    assert_eq!(house.reasons(), ["refined"]);
}

#[tokio::test]
async fn probes_keep_their_temperature_and_draw_apart() {
    let probe = CallSpec {
        firm: true,
        sampling: Sampling { temperature: Some(0.8), ..Sampling::default() },
        ..CallSpec::bare("w")
    };
    let plan = Plan::Parallel { branches: vec![Plan::Call(probe); 3], aggregate: Aggregate::Vote };
    let house = house(&[("w", json!({"reply": {"words": 5}}))]);
    let mut request = upstream::request(BODY, false);
    request.sampling = Sampling { seed: Some(7), temperature: Some(0.0), ..Sampling::default() };
    house.dispatcher.run(DecisionId::new(), &with(plan), Arc::new(request), &Caller::default()).await.unwrap();
    let mut attempts = house.journal.attempts();
    attempts.sort_by_key(|attempt| attempt.index);
    let drawn: Vec<_> = attempts.iter().map(|a| (a.sampling.temperature, a.sampling.seed)).collect();
    assert_eq!(drawn, [(Some(0.8), Some(7)), (Some(0.8), Some(8)), (Some(0.8), Some(9))]);
    let forms: std::collections::BTreeSet<u32> = attempts.iter().map(|a| a.facts.as_ref().unwrap().form).collect();
    assert!(forms.len() > 1, "the same words thrice");
}

#[tokio::test]
async fn log_probabilities_that_only_a_gate_wanted_are_not_given_out() {
    let url = upstream::upstream(|_, received, mut socket| async move {
        assert!(received.body.contains(r#""logprobs":true"#) && received.body.contains(r#""top_logprobs":20"#));
        let token = |token: &str| {
            json!({"token": token, "logprob": -0.01, "bytes": null,
                   "top_logprobs": [{"token": token, "logprob": -0.01}, {"token": "x", "logprob": -4.7}]})
        };
        let chunk = |text: &str| {
            json!({"id": "u", "object": "chat.completion.chunk", "model": "real", "choices": [
                {"index": 0, "delta": {"content": text}, "logprobs": {"content": [token(text)]}, "finish_reason": null}]})
        };
        let answer = match received.body.contains("\"stream\":true") {
            true => {
                let end = json!({"id": "u", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
                upstream::events(&format!("data: {}\n\ndata: {}\n\ndata: {end}\n\ndata: [DONE]\n\n", chunk("4"), chunk("2")))
            }
            false => {
                let choice = json!({"index": 0, "message": {"content": "42"}, "finish_reason": "stop",
                                    "logprobs": {"content": [token("4"), token("2")]}});
                upstream::json("200 OK", "", &json!({"id": "u", "choices": [choice]}).to_string())
            }
        };
        let _ = socket.write_all(answer.as_bytes()).await;
    })
    .await;
    let remote: Arc<dyn Backend> = Arc::new(RemoteBackend::new(RemoteConfig::new("small", url)).unwrap());
    let house = house_of(vec![("small", remote), ("large", scripted("large", json!({})))], quick());
    let sure = Condition::new(Score::MeanTokenEntropy, Bound::Below(0.2));
    let plan = Plan::Cascade(vec![
        Stage { plan: call("small"), accept_when: vec![sure], stop_early: false },
        Stage { plan: call("large"), accept_when: Vec::new(), stop_early: false },
    ]);
    let whole = house.ask(&with(plan.clone()), false).await.unwrap();
    let AnswerBody::Whole(Completion::Wire { body, .. }) = whole.body else { panic!("not the server's own") };
    let body = String::from_utf8(body.to_vec()).unwrap();
    assert!(body.contains(r#""content":"42""#) && body.contains(r#""logprobs":null"#), "{body}");
    let notes = house.notes();
    assert!(
        matches!(notes[0].what, What::GateHolds { exact: false, value, .. } if (0.04..0.08).contains(&value)),
        "{notes:?}"
    );

    let Ok(Dispatched { body: AnswerBody::Stream(chunks), .. }) = house.ask(&with(plan), true).await else {
        panic!("no stream")
    };
    let chunks: Vec<Chunk> = chunks.map(Result::unwrap).collect().await;
    let wires: Vec<String> = chunks
        .iter()
        .filter_map(|chunk| match chunk {
            Chunk::Wire(json) => Some(String::from_utf8(json.to_vec()).unwrap()),
            _ => None,
        })
        .collect();
    assert!(wires.len() >= 2 && wires.iter().all(|json| !json.contains("top_logprobs")), "{wires:?}");
}

#[tokio::test]
async fn the_deadline_gives_out_what_there_is_and_says_so() {
    let limits = Limits { deadline: Some(300_000), ..Limits::default() };
    let house = house_of(
        vec![
            ("small", scripted("small", json!({"reply": {"text": "unsure"}, "certainty": 0.5}))),
            ("large", scripted("large", json!({"stall_after": 0}))),
        ],
        DispatchOptions { limits, ..quick() },
    );
    let (text, dispatched) = house.whole(&with(frugal())).await;
    assert_eq!(text, "unsure");
    assert_eq!(dispatched.because.unwrap().to_string(), "the deadline passed");
    assert_eq!(house.reasons(), ["gate_fails", "escalated", "stopped", "best_so_far"]);
    assert_eq!(house.journal.attempts()[1].error.as_deref(), Some("timeout"));
}

#[tokio::test]
async fn a_client_that_leaves_cancels_every_call() {
    let stalls = json!({"stall_after": 0});
    let house = house(&[("a", stalls.clone()), ("b", stalls)]);
    {
        let decision = with(parallel(&["a", "b"], Aggregate::Vote));
        let asking = house.ask(&decision, true);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), asking).await.is_err());
    }
    let outcome = house.journal.settled().await;
    assert_eq!((outcome.status, outcome.attempts), (OutcomeStatus::Cancelled, 2));
    let states = house.dispatcher.states();
    assert_eq!((states["a"].running, states["b"].running), (0, 0));
}

#[tokio::test]
async fn what_the_policy_bounds_is_masked_and_the_answer_so_far_has_to_do() {
    // Each of one token of answer and three of prompt, at a dollar a token of answer.
    let worst = |model: &str| (model.to_owned(), crate::domain::Spend { usd: 1_000_100, tokens: 4 });
    let bounds = RequestBounds { worst: ["small", "large"].map(worst).into(), ..RequestBounds::default() };
    for (bounds, because) in [
        (RequestBounds { usd: Some(1_900_000), ..bounds.clone() }, "more would overrun the budget"),
        (RequestBounds { tokens: Some(7), ..bounds.clone() }, "more would overrun the bound on tokens"),
        (RequestBounds { calls: Some(1), ..bounds }, "more would overrun the bound on calls"),
    ] {
        let house = arena(&[("small", "five", 0.55), ("large", "4", 0.9)]);
        let decision = Decision { bounds: Some(Box::new(bounds)), ..with(frugal()) };
        let (text, dispatched) = house.whole(&decision).await;
        assert_eq!((&*text, dispatched.because.unwrap().to_string()), ("five", because.to_owned()));
        assert_eq!(house.reasons(), ["gate_fails", "masked", "best_so_far"]);
    }
}

#[tokio::test]
async fn a_plan_of_many_calls_has_room_for_all_of_them() {
    let house = arena(&[("a", "42", 0.9)]);
    let plan = parallel(&["a"; 12], Aggregate::Vote);
    house.whole(&with(plan)).await;
    assert!(house.notes().iter().all(|note| !matches!(note.what, What::BranchLeftOut { .. })));
    assert!(house.journal.outcome().attempts >= 7, "more than half decide a vote");
}

impl House {
    /// Runs what is recorded of the only request again.
    fn again(&self, decision: &Decision, options: &DispatchOptions) -> crate::replay::plan_run::journal::Again {
        let events = self.journal.events();
        let (id, at) = events.iter().find_map(|event| Some((event.decision?, event.at))).unwrap();
        let setup = Setup::of(id, decision, &options.retry, options.limits).unwrap();
        let mut attempts = self.journal.attempts();
        attempts.sort_by_key(|attempt| attempt.index);
        let outcome = self.journal.outcome();
        crate::replay::plan_run::journal::run_again(&setup, at, &attempts, &self.noted(), &outcome)
    }
}

#[tokio::test]
async fn what_is_recorded_of_a_run_gives_the_same_run_again() {
    let wait = |ms: u64, text: &str| json!({"reply": {"text": text}, "first_token_ms": ms, "certainty": 0.6});
    let fail = |kind: &str, after: u64| json!({"fail": {"kind": kind}, "first_token_ms": after});
    let plans = [
        frugal(),
        parallel(&["small", "large", "other"], Aggregate::Vote),
        parallel(&["small", "large", "other"], Aggregate::First),
        parallel(&["small", "large"], Aggregate::Judge { call: CallSpec::bare("other") }),
        parallel(&["small", "large", "broken"], Aggregate::Refine { call: CallSpec::bare("other") }),
        parallel(&["broken", "unsteady", "small"], Aggregate::Vote),
        Plan::Cascade(vec![
            Stage {
                plan: parallel(&["small", "large", "other"], Aggregate::Vote),
                accept_when: vec![Condition::new(Score::Disagreement, Bound::Below(0.1))],
                stop_early: false,
            },
            Stage { plan: call("unsteady"), accept_when: Vec::new(), stop_early: false },
        ]),
        hedged("small", "large", 5),
        hedged("large", "small", 1),
        hedged("unsteady", "other", 0),
        parallel_of(vec![hedged("small", "large", 3), call("other"), hedged("other", "broken", 2)], Aggregate::Vote),
        Plan::Cascade(vec![
            Stage {
                plan: hedged("small", "other", 10),
                accept_when: vec![Condition::new(Score::MeanLogprob, Bound::Above(-0.4))],
                stop_early: false,
            },
            Stage { plan: hedged("broken", "large", 1), accept_when: Vec::new(), stop_early: false },
            Stage { plan: hedged("other", "large", 60_000), accept_when: Vec::new(), stop_early: false },
        ]),
    ];
    for (n, plan) in plans.into_iter().enumerate() {
        for stream in [false, true] {
            let house = house(&[
                ("small", wait(20, "41")),
                ("large", wait(5, "42")),
                ("other", wait(10, "The answer is 42.")),
                ("broken", fail("bad_request", 0)),
                ("unsteady", fail("rate_limited", 0)),
            ]);
            let decision = with(plan.clone());
            let ended = match stream {
                true => house.stream(&decision).await.1.is_ok(),
                false => house.ask(&decision, false).await.is_ok(),
            };
            let again = house.again(&decision, &quick());
            assert!(again.same, "{n}, {stream}, {ended}:\n{}\n{}", again.recorded.json(), again.derived.json());
            // Nothing need be decided of a single hedged call.
            assert!((7..=9).contains(&n) || !again.derived.notes.is_empty());
        }
    }
}

#[tokio::test]
async fn retries_are_denied_once_all_requests_have_used_them_up_and_the_record_tells_it_again() {
    let retry_budget = Some(RetryBudgetPolicy { ratio: 0.5, min_per_s: 0 });
    let retry = RetryPolicy { max_retries: 4, ..quick().retry };
    let options = DispatchOptions { retry, retry_budget, ..quick() };
    let broken = scripted("broken", json!({"fail": {"kind": "server_error"}}));
    let house = house_of(vec![("broken", broken), ("large", scripted("large", json!({})))], options.clone());
    // Ten are saved up at first, and each call adds a half.
    let mut retries = Vec::new();
    for _ in 0..6 {
        house.journal.writes.lock().unwrap().clear();
        let decision =
            with(Plan::Cascade(vec![Stage { plan: call("broken"), accept_when: Vec::new(), stop_early: false }]));
        assert!(house.ask(&decision, false).await.is_err());
        retries.push(house.journal.attempts().len() - 1);
        let denied = house.reasons().iter().filter(|reason| *reason == "retry_denied").count();
        assert_eq!(denied, usize::from(retries[retries.len() - 1] < 4), "{:?}", house.reasons());
        let again = house.again(&decision, &options);
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
    }
    assert_eq!(retries, [4, 4, 3, 0, 1, 0]);
    // A call that is denied its retry fails like any other.
    house.journal.writes.lock().unwrap().clear();
    let decision = with(Plan::Cascade(vec![
        Stage { plan: call("broken"), accept_when: Vec::new(), stop_early: false },
        Stage { plan: call("large"), accept_when: Vec::new(), stop_early: false },
    ]));
    assert_eq!(house.whole(&decision).await.1.model, "large");
    let again = house.again(&decision, &options);
    assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
}

#[tokio::test]
async fn hedges_are_denied_like_retries() {
    let retry_budget = Some(RetryBudgetPolicy { ratio: 0.0, min_per_s: 0 });
    let options = DispatchOptions { retry_budget, ..quick() };
    let slow = scripted("slow", json!({"reply": {"text": "late"}, "first_token_ms": 400}));
    let house = house_of(vec![("slow", slow), ("large", scripted("large", json!({})))], options.clone());
    let decision = with(hedged("slow", "large", 5));
    let mut denied = Vec::new();
    for _ in 0..12 {
        house.journal.writes.lock().unwrap().clear();
        house.whole(&decision).await;
        denied.push(house.reasons() == ["hedge_denied"]);
        assert_eq!(house.journal.attempts().len(), if denied[denied.len() - 1] { 1 } else { 2 });
        let again = house.again(&decision, &options);
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
    }
    // Ten are saved up at first.
    assert_eq!(denied, [[false; 10].as_slice(), &[true; 2]].concat());
}

#[tokio::test]
async fn a_run_that_was_stopped_gives_the_same_run_again_as_far_as_it_went() {
    let slow = || {
        vec![
            ("small", scripted("small", json!({"reply": {"text": "unsure"}, "certainty": 0.5}))),
            ("large", scripted("large", json!({"reply": {"text": "late"}, "first_token_ms": 60_000}))),
        ]
    };
    let limits = Limits { deadline: Some(50_000), ..Limits::default() };
    let options = DispatchOptions { limits, ..quick() };
    let house = house_of(slow(), options.clone());
    let decision = with(frugal());
    assert_eq!(house.whole(&decision).await.0, "unsure");
    let again = house.again(&decision, &options);
    assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());

    // The client leaves while the second stage runs.
    let house = house_of(slow(), quick());
    let gone = tokio::time::timeout(std::time::Duration::from_millis(50), house.ask(&decision, false)).await;
    assert!(gone.is_err());
    assert_eq!(house.journal.settled().await.status, OutcomeStatus::Cancelled);
    let again = house.again(&decision, &quick());
    assert!(again.same && again.recorded.notes.len() == 2, "{}\n{}", again.recorded.json(), again.derived.json());
}
