//! What is decided while an answer comes: stages that are stopped, and reasoning steps.

use std::sync::Mutex;

use serde_json::Value;

use super::*;
use crate::domain::Steps;

/// A scripted model that keeps what it was asked.
struct Spy(Arc<dyn Backend>, Arc<Mutex<Vec<Arc<Request>>>>);

#[async_trait]
impl Backend for Spy {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    async fn start(&self, call: Call) -> Result<crate::backend::Reply, BackendError> {
        self.1.lock().unwrap().push(Arc::clone(&call.request));
        self.0.start(call).await
    }

    fn state(&self) -> ModelState {
        self.0.state()
    }
}

pub(super) type Asked = Arc<Mutex<Vec<Arc<Request>>>>;

pub(super) fn spied(models: &[(&'static str, Value)]) -> (House, Asked) {
    let asked = Asked::default();
    let spy = |(name, rule): &(&'static str, Value)| -> (&str, Arc<dyn Backend>) {
        (name, Arc::new(Spy(scripted(name, rule.clone()), Arc::clone(&asked))))
    };
    (house_of(models.iter().map(spy).collect(), quick()), asked)
}

fn early() -> Plan {
    let sure = Condition::new(Score::FirstTokenEntropy, Bound::Below(1.0));
    Plan::Cascade(vec![
        Stage { plan: call("small"), accept_when: vec![sure], stop_early: true },
        Stage { plan: call("large"), accept_when: Vec::new(), stop_early: false },
    ])
}

#[tokio::test]
async fn an_unsure_stage_is_stopped_at_its_first_token_and_a_sure_one_is_given_out_whole() {
    let small = |certainty: f64| json!({"reply": {"words": 40}, "certainty": certainty, "token_ms": 50});
    let models = |certainty| [("small", small(certainty)), ("large", json!({"reply": {"text": "4"}}))];
    for stream in [false, true] {
        let house = house(&models(0.4));
        let text = match stream {
            true => house.stream(&with(early())).await.0,
            false => house.whole(&with(early())).await.0,
        };
        assert_eq!(text, "4");
        assert_eq!(house.reasons(), ["gate_fails", "escalated", "accepted"]);
        let attempts = house.journal.attempts();
        assert_eq!(attempts[0].finish, Some(FinishReason::Cancelled));
        assert!(attempts[0].usage.completion_tokens < 40);
        assert_eq!(attempts[0].facts.as_ref().unwrap().scores[0].score, Score::FirstTokenEntropy);
        let again = house.again(&with(early()), &quick());
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
    }
    // Asked for in pieces, and put together for a client that wants it whole.
    let (house, asked) = spied(&[("small", json!({"reply": {"text": "it is four"}, "certainty": 0.9}))]);
    let (text, dispatched) = house.whole(&with(early())).await;
    assert_eq!((&*text, &*dispatched.model), ("it is four", "small"));
    assert!(asked.lock().unwrap()[0].stream);
    let AnswerBody::Whole(whole) = dispatched.body else { panic!("not whole") };
    assert_eq!(whole.usage().completion_tokens, 3);
}

fn steps() -> Plan {
    let [separator, open, close] = ["\n\n", "<think>\n", "</think>"].map(str::to_owned);
    let written = |model: &str| {
        let sampling = crate::domain::Sampling { stop: vec![separator.clone()], ..Default::default() };
        CallSpec { sampling, ..CallSpec::bare(model) }
    };
    let (small, large, answer) = (written("small"), written("large"), CallSpec::bare("answer"));
    let (tau, max_steps, max_tokens) = (1.0, 8, 100);
    Plan::Steps(Box::new(Steps { small, large, answer, tau, separator, open, close, max_steps, max_tokens }))
}

#[tokio::test]
async fn steps_are_continued_by_the_other_model_and_answered_from_all_of_them() {
    // By the number of the call: 0 small, 1 large (the small one was unsure), and so on.
    let small = json!({"reply": {"texts": ["Two and\n\ntwo.", "-", "two."]}, "certainty": 0.4});
    let large = json!({"reply": {"texts": ["-", "First two.\n\nThen", "-", "Then four.</think>", "-"]}});
    let answer = json!({"reply": {"text": "It is 4."}});
    for stream in [false, true] {
        let (house, asked) = spied(&[("small", small.clone()), ("large", large.clone()), ("answer", answer.clone())]);
        let text = match stream {
            true => house.stream(&with(steps())).await.0,
            false => house.whole(&with(steps())).await.0,
        };
        assert_eq!(text, "It is 4.");
        let reasons = ["glimpsed", "step_written", "glimpsed", "step_written", "reasoned"];
        assert_eq!(house.reasons(), reasons);
        let asked = std::mem::take(&mut *asked.lock().unwrap());
        let begun: Vec<&str> = asked.iter().map(|request| request.begun.as_deref().unwrap()).collect();
        let (none, one) = ("<think>\n", "<think>\nFirst two.\n\n");
        let all = "<think>\nFirst two.\n\nThen four.\n</think>\n\n";
        assert_eq!(begun, [none, none, one, one, all]);
        assert_eq!(asked.iter().map(|r| r.stream).collect::<Vec<_>>(), [true, false, true, false, stream]);
        // A server knows it by its last message.
        let body: Value = serde_json::from_slice(&asked[4].body).unwrap();
        let last = body["messages"].as_array().unwrap().last().unwrap();
        assert_eq!((&last["role"], &last["content"]), (&json!("assistant"), &json!(all)));
        assert_eq!((&body["continue_final_message"], &body["add_generation_prompt"]), (&json!(true), &json!(false)));
        let attempts = house.journal.attempts();
        let finishes: Vec<_> = attempts.iter().map(|attempt| (&*attempt.model, attempt.finish.unwrap())).collect();
        assert_eq!(finishes[0], ("small", FinishReason::Cancelled));
        assert_eq!(finishes[4], ("answer", FinishReason::Stop));
        assert_eq!(house.journal.outcome().served_by, "answer");
        let again = house.again(&with(steps()), &quick());
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
    }
}

#[tokio::test]
async fn what_the_client_says_of_its_answer_holds_for_no_step() {
    let small = json!({"reply": {"texts": ["Think.\n\n", "Done.</think>"]}, "certainty": 0.95});
    let (house, asked) = spied(&[("small", small), ("large", json!({})), ("answer", json!({"reply": {"text": "4"}}))]);
    let body = r#"{"model":"auto","messages":[{"role":"user","content":"2+2?"}],"temperature":0.2,"max_tokens":5,"stop":["4"],
        "response_format":{"type":"json_object"}}"#;
    let mut request = upstream::request(body, false);
    request.sampling.temperature = Some(0.2);
    request.sampling.max_tokens = Some(5);
    request.sampling.stop = vec!["x".to_owned()];
    let decision = with(steps());
    let ended =
        house.dispatcher.run(DecisionId::new(), &decision, Arc::new(request), &Caller::default()).await.unwrap();
    assert_eq!(ended.model, "answer");
    assert_eq!(house.reasons(), ["glimpsed", "step_written", "glimpsed", "step_written", "reasoned"]);
    let asked = asked.lock().unwrap();
    let step = &asked[0];
    assert_eq!((step.sampling.max_tokens, step.sampling.temperature), (None, Some(0.2)));
    assert!(step.sampling.stop.is_empty() && step.logprobs);
    let body: Value = serde_json::from_slice(&step.body).unwrap();
    let keys: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["model", "messages", "temperature", "continue_final_message", "add_generation_prompt"]);
    let answer: Value = serde_json::from_slice(&asked[2].body).unwrap();
    assert_eq!(answer["response_format"]["type"], "json_object");
    assert_eq!(asked[2].sampling.max_tokens, Some(5));
}
