//! What is known of models while a plan runs: queues that have changed since the decision, and models that went down.

use std::sync::atomic::AtomicU32;

use super::*;
use crate::backend::Reply;

/// What a model's state is made to say.
#[derive(Default)]
struct Pool {
    waiting: AtomicU32,
    down: AtomicBool,
}

/// A scripted model with a state of its own, a second to its first token per call that waits.
struct Pooled(Arc<dyn Backend>, Arc<Pool>, Arc<dyn Fn() + Send + Sync>);

#[async_trait]
impl Backend for Pooled {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        (self.2)();
        self.0.start(call).await
    }

    fn state(&self) -> ModelState {
        ModelState {
            available: !self.1.down.load(Ordering::SeqCst),
            ttft_ms: 1000.0,
            waiting: self.1.waiting.load(Ordering::SeqCst),
            ..self.0.state()
        }
    }
}

/// `small` with this rule, during whose calls `changes` happens, and `large` and `other`, whose states these are.
fn pools(small: serde_json::Value, changes: fn(&[Arc<Pool>; 2])) -> (House, [Arc<Pool>; 2]) {
    let pools = [Arc::new(Pool::default()), Arc::new(Pool::default())];
    let change = {
        let pools = pools.clone();
        Arc::new(move || changes(&pools)) as Arc<dyn Fn() + Send + Sync>
    };
    let nothing: Arc<dyn Fn() + Send + Sync> = Arc::new(|| ());
    let pooled = |name: &str, rule, pool: &Arc<Pool>, change| -> Arc<dyn Backend> {
        Arc::new(Pooled(scripted(name, rule), Arc::clone(pool), change))
    };
    let says = |text: &str| json!({"reply": {"text": text}});
    let house = house_of(
        vec![
            ("small", pooled("small", small, &Arc::default(), change)),
            ("large", pooled("large", says("4"), &pools[0], Arc::clone(&nothing))),
            ("other", pooled("other", says("four"), &pools[1], nothing)),
        ],
        quick(),
    );
    (house, pools)
}

/// Two seconds and a half to the first token; `large` is expected to take so many at the decision.
fn bounded(large: i64) -> Decision {
    let waits = [("small".to_owned(), 1_000_000), ("large".to_owned(), large * 1_000_000)].into();
    let bounds = RequestBounds { first_token_us: Some(2_500_000), waits, ..RequestBounds::default() };
    Decision { bounds: Some(Box::new(bounds)), ..with(frugal()) }
}

impl House {
    /// The record gives the same run again, and would not without what `forget` takes out of it.
    fn needs(&self, decision: &Decision, forget: impl Fn(&mut Attempt)) {
        let again = self.again(decision, &quick());
        assert!(again.same, "{}\n{}", again.recorded.json(), again.derived.json());
        for event in self.journal.writes.lock().unwrap().iter_mut().flatten() {
            if let EventBody::Attempt(attempt) = &mut event.body {
                forget(attempt);
            }
        }
        assert!(!self.again(decision, &quick()).same);
    }
}

#[tokio::test]
async fn a_stage_is_not_escalated_to_whose_queue_has_grown_meanwhile() {
    let unsure = json!({"reply": {"text": "five"}, "certainty": 0.55});
    let forget = |attempt: &mut Attempt| attempt.facts.iter_mut().for_each(|facts| facts.waits.clear());
    for stream in [false, true] {
        let (house, _) = pools(unsure.clone(), |pools| pools[0].waiting.store(9, Ordering::SeqCst));
        let text = match stream {
            true => house.stream(&bounded(1)).await.0,
            false => house.whole(&bounded(1)).await.0,
        };
        assert_eq!(text, "five", "rejected, but there");
        assert_eq!(house.reasons(), ["gate_fails", "masked", "best_so_far"]);
        let waits = house.journal.attempts()[0].facts.clone().unwrap().waits;
        assert_eq!(waits, [("large".to_owned(), 10_000_000), ("small".to_owned(), 1_000_000)].into());
        house.needs(&bounded(1), forget);
    }

    let (house, pools) = pools(unsure, |pools| pools[0].waiting.store(0, Ordering::SeqCst));
    pools[0].waiting.store(9, Ordering::SeqCst);
    assert_eq!(house.whole(&bounded(10)).await.0, "4", "the queue of ten seconds has emptied");
    assert_eq!(house.reasons(), ["gate_fails", "escalated", "accepted"]);
    house.needs(&bounded(10), forget);

    // Nobody asks where nothing bounds the wait.
    let (house, _) = self::pools(json!({"reply": {"text": "five"}, "certainty": 0.55}), |_| ());
    house.whole(&with(frugal())).await;
    assert!(house.journal.attempts().iter().all(|attempt| attempt.facts.iter().all(|facts| facts.waits.is_empty())));
}

#[tokio::test]
async fn an_error_is_not_answered_by_a_model_that_went_down_meanwhile() {
    let broken = json!({"fail": {"kind": "bad_request"}});
    let forget = |attempt: &mut Attempt| attempt.down.clear();
    let goes_down = |pools: &[Arc<Pool>; 2]| pools[0].down.store(true, Ordering::SeqCst);
    let stage = |model: &str| Stage { plan: call(model), accept_when: Vec::new(), stop_early: false };
    let plan = |models: &[&str]| Plan::Cascade(models.iter().map(|model| stage(model)).collect());

    // A stage of the plan.
    let (house, _) = pools(broken.clone(), goes_down);
    let decision = with(plan(&["small", "large", "other"]));
    assert_eq!(house.whole(&decision).await.0, "four");
    assert_eq!(house.reasons(), ["down", "rerouted", "accepted"]);
    assert_eq!(house.journal.attempts()[0].down, ["large"]);
    house.needs(&decision, forget);

    // The request's fallback, in order and by the graph.
    for (failover, reasons) in
        [(None, ["stages_failed", "fallback_down"]), (Some(Box::default()), ["stages_failed", "failed_over"])]
    {
        let (house, _) = pools(broken.clone(), goes_down);
        let decision = Decision {
            fallback: ["large", "other"].map(CallSpec::bare).to_vec(),
            fallback_on: vec!["bad_request".to_owned()],
            failover,
            ..with(plan(&["small"]))
        };
        assert_eq!(house.whole(&decision).await.0, "four");
        assert_eq!(house.reasons(), reasons);
        house.needs(&decision, forget);
    }

    // Nobody is left.
    let (house, _) = pools(broken, |pools| pools.iter().for_each(|pool| pool.down.store(true, Ordering::SeqCst)));
    let error = house.ask(&decision_of_all(), false).await.err().unwrap();
    assert_eq!(kind(&error), ErrorKind::BadRequest, "and not that of a model that was never asked");
    assert_eq!(house.journal.attempts()[0].down, ["large", "other"]);
}

fn decision_of_all() -> Decision {
    decision(&["small", "large", "other"], &["bad_request"])
}
