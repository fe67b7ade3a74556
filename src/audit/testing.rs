//! Sample events, for the tests and measurements of this crate.

use std::collections::BTreeMap;

use crate::domain::{
    Admin, Attempt, AttemptReason, CallSpec, Candidate, Context, DecidedBy, Decision, DecisionId, DecisionRecord,
    Elimination, Event, EventBody, Feedback, FinishReason, Hash, Micros, ModelState, Outcome, OutcomeStatus, Plan,
    RuleOutcome, RuleTrace, Sampling, StateUpdate, Usage, UsageSource, canonical,
};

/// What a store would show of a decision with these events.
#[cfg(test)]
pub(crate) fn view(events: Vec<Event>) -> super::query::DecisionView {
    let mut prev = Hash::ZERO;
    let place = |(i, event)| {
        let logged = super::record::Draft::new(event).unwrap().place("r", b"\"r\"", i as u64 + 1, prev);
        prev = logged.hash;
        logged
    };
    super::query::DecisionView::new(events.into_iter().enumerate().map(place).collect()).unwrap()
}

/// A typical learned decision: two arms and one eliminated, 8 features, context and a 384-d embedding beside it.
pub fn decision(id: DecisionId, at: Micros) -> Event {
    let decision = Decision {
        policy: "default".to_owned(),
        policy_hash: Hash::of(b"policy"),
        state_seq: 17,
        decided_by: DecidedBy::Select,
        rule: None,
        arm: "quick".to_owned(),
        plan: Some(Plan::Call(CallSpec::bare("smollm2-135m"))),
        fallback: vec![CallSpec::bare("gpt-4.1-mini")],
        retries: None,
        fallback_on: vec!["timeout".to_owned(), "server_error".to_owned()],
        propensity: 0.93,
        candidates: vec![
            Candidate { arm: "quick".to_owned(), score: Some(0.8123), propensity: 0.93, eliminated: None, model: None },
            Candidate {
                arm: "careful".to_owned(),
                score: Some(0.712),
                propensity: 0.07,
                eliminated: None,
                model: None,
            },
            Candidate {
                arm: "remote".to_owned(),
                score: None,
                propensity: 0.0,
                eliminated: Some(Elimination::Capability("tools".to_owned())),
                model: None,
            },
        ],
        features: vec![1.0, 0.25, 0.125, 0.3333333333333333, -0.625, 0.0, 1.0, 0.5],
        rules: vec![RuleTrace { rule: "pii-stays-home".to_owned(), outcome: RuleOutcome::NoMatch, error: None }],
        refusal: None,
        no_embedding: None,
        split: None,
        bounds: None,
        failover: None,
    };
    let record = DecisionRecord {
        decision,
        model_requested: "auto".to_owned(),
        stream: true,
        key: "team-a".to_owned(),
        tenant: "acme".to_owned(),
        session: "9f86d081884c7d65".to_owned(),
        client_retry: 0,
        dry: false,
        shadow_of: None,
        build: "0.1.0 (test)".to_owned(),
        embedder: None,
        context_hash: None,
        embedding_hash: None,
        request_hash: None,
    };
    let context = Context {
        now: at,
        seed: 0x0123_4567_89ab_cdef,
        fleet: BTreeMap::from([
            (
                "gpt-4.1-mini".to_owned(),
                ModelState {
                    available: true,
                    running: 3,
                    ttft_ms: 212.5,
                    tokens_per_s: 41.25,
                    ..ModelState::default()
                },
            ),
            (
                "smollm2-135m".to_owned(),
                ModelState { available: true, running: 1, waiting: 2, ..ModelState::default() },
            ),
        ]),
        ..Context::default()
    };
    let mut event = Event::new(at, Some(id), EventBody::Decision(Box::new(record)));
    event.context = canonical::to_bytes(&context).ok();
    let vector: Vec<f32> = (0..384).map(|i| ((i * 7919) % 1000) as f32 / 1000.0).collect();
    event.embedding = Some(canonical::vector_to_bytes(&vector));
    event
}

/// A decision of a policy that passes everything through: one arm, no features, no embedding.
pub fn pass_through(id: DecisionId, at: Micros) -> Event {
    let mut event = decision(id, at);
    event.embedding = None;
    if let EventBody::Decision(record) = &mut event.body {
        record.decision.decided_by = DecidedBy::Pinned;
        record.decision.candidates.clear();
        record.decision.features.clear();
        record.decision.rules.clear();
        record.decision.fallback.clear();
        record.decision.fallback_on.clear();
        record.decision.propensity = 1.0;
    }
    event
}

/// A decision edited before it is recorded.
pub fn decision_with(id: DecisionId, at: Micros, edit: impl FnOnce(&mut DecisionRecord)) -> Event {
    let mut event = decision(id, at);
    if let EventBody::Decision(record) = &mut event.body {
        edit(record);
    }
    event
}

/// The call that the decision led to.
pub fn attempt(id: DecisionId, at: Micros) -> Event {
    let attempt = Attempt {
        index: 0,
        why: AttemptReason::Planned,
        at: Vec::new(),
        model: "smollm2-135m".to_owned(),
        model_reported: None,
        backend: "local".to_owned(),
        sampling: Sampling { max_tokens: Some(64), temperature: Some(0.0), ..Sampling::default() },
        started: at - 200_000,
        ttft_us: Some(40_000),
        latency_us: 200_000,
        usage: usage(),
        cost_usd: 0.000123,
        joules: None,
        finish: Some(FinishReason::Stop),
        error: None,
        error_detail: None,
        retry_after_us: None,
        down: Vec::new(),
        facts: None,
    };
    Event::new(at, Some(id), EventBody::Attempt(Box::new(attempt)))
}

/// A good end.
pub fn outcome(id: DecisionId, at: Micros) -> Event {
    let outcome = Outcome {
        status: OutcomeStatus::Ok,
        served_by: "smollm2-135m".to_owned(),
        attempts: 1,
        cost_usd: 0.000123,
        joules: None,
        latency_us: 201_000,
        ttft_us: Some(41_000),
        usage: usage(),
        error: None,
        answer_hash: None,
    };
    Event::new(at, Some(id), EventBody::Outcome(outcome))
}

/// A score of 1 by the user.
pub fn feedback(id: DecisionId, at: Micros, key: Option<&str>) -> Event {
    let feedback = Feedback {
        source: "user".to_owned(),
        name: "score".to_owned(),
        value: 1.0,
        idempotency_key: key.map(str::to_owned),
    };
    Event::new(at, Some(id), EventBody::Feedback(feedback))
}

/// The `seq`th step of the sample policy's learning.
pub fn state_update(id: DecisionId, at: Micros, seq: u64) -> Event {
    let update = StateUpdate {
        policy: "default".to_owned(),
        policy_hash: Hash::of(b"policy"),
        seq,
        arm: "quick".to_owned(),
        features: vec![1.0, 0.25, 0.1],
        reward: 0.7,
        cost_usd: 0.0004,
        propensity: 0.93,
        decided: at - 5,
        set: None,
    };
    Event::new(at, Some(id), EventBody::StateUpdate(update))
}

/// An event of the whole weir.
pub fn admin(at: Micros) -> Event {
    Event::new(at, None, EventBody::Admin(Admin { action: "start".to_owned(), detail: "a test".to_owned() }))
}

fn usage() -> Usage {
    Usage {
        prompt_tokens: 120,
        cached_tokens: 20,
        completion_tokens: 42,
        source: UsageSource::Reported,
        ..Usage::default()
    }
}
