//! What every store has to do, run against SQLite and PostgreSQL alike.

use std::{sync::Arc, time::Duration};

use weir::{
    audit::{
        DecisionFilter, EventLog, Feeder, FeederOptions, LogOptions, Snapshot, close_interrupted, open_store,
        record::Logged, stats::stats, testing, verify_chain,
    },
    domain::{DecidedBy, DecisionId, Event, EventBody, Fleet, Hash, Outcome, OutcomeStatus, PolicyVersion},
};

use crate::{
    contract,
    support::store::{Fixture, ids, triple},
};

contract!(
    events_come_back_as_they_were,
    ingesting_again_changes_nothing,
    a_gap_and_a_fork_are_refused,
    two_replicas_have_two_chains,
    one_decision_is_shown_whole,
    filters_restrict_as_they_say,
    pages_follow_each_other,
    nul_in_text_is_no_trouble,
    extreme_values_are_taken_in,
    decisions_without_an_outcome_are_found_and_closed,
    feedback_keys_are_remembered,
    learning_comes_back_in_order,
    the_feeder_brings_all_in_order_to_store_and_follower,
    figures_add_up,
    a_store_opens_again_with_what_it_held,
);

async fn events_come_back_as_they_were(f: Fixture) {
    let mut sent = Vec::new();
    for (i, id) in ids(40).into_iter().enumerate() {
        sent.extend(f.record(triple(id, 1_764_000_000_000_000 + i as i64)).await);
    }
    sent.extend(f.record(vec![testing::admin(7), testing::feedback(DecisionId::new(), 8, None)]).await);
    let back = f.store.events("r1", 1, 1000).await.unwrap();
    assert_eq!(back, sent);
    let some = f.store.events("r1", 5, 3).await.unwrap();
    assert_eq!(some, sent[4..7]);
    assert!(f.store.events("r1", 123, 10).await.unwrap().is_empty());
    assert!(f.store.events("another", 1, 10).await.unwrap().is_empty());
    assert_eq!(f.store.cursor("r1").await.unwrap(), 122);
    assert_eq!(f.store.cursor("another").await.unwrap(), 0);
    let cursors = f.store.replicas().await.unwrap();
    assert_eq!((cursors.len(), cursors[0].hash), (1, sent[121].hash));
    f.assert_passes().await;
}

async fn ingesting_again_changes_nothing(f: Fixture) {
    let all: Vec<Event> = ids(10).into_iter().enumerate().flat_map(|(i, id)| triple(id, i as i64)).collect();
    f.log.append(all).await.unwrap();
    let logged = f.read(1);
    f.store.ingest(&logged[..12]).await.unwrap();
    let rows = f.store.decisions(&DecisionFilter::default()).await.unwrap();
    // Prompt and answer of the one call.
    assert!(rows.iter().all(|row| row.tokens == Some(162)), "{rows:?}");
    f.store.ingest(&logged[..12]).await.unwrap();
    f.store.ingest(&logged[3..9]).await.unwrap();
    f.store.ingest(&[]).await.unwrap();
    assert_eq!(f.store.decisions(&DecisionFilter::default()).await.unwrap(), rows);
    assert_eq!(f.store.cursor("r1").await.unwrap(), 12);
    // Half known, half new.
    f.store.ingest(&logged[6..]).await.unwrap();
    assert_eq!(f.store.events("r1", 1, 100).await.unwrap(), logged);
    assert_eq!(f.store.decisions(&DecisionFilter::default()).await.unwrap().len(), 10);
    f.assert_passes().await;
}

async fn a_gap_and_a_fork_are_refused(f: Fixture) {
    let id = DecisionId::new();
    let logged = f.record(triple(id, 1)).await;
    f.log.append(triple(DecisionId::new(), 5)).await.unwrap();
    let later = f.read(4);
    assert_eq!(f.store.ingest(&later[1..]).await.unwrap_err().kind(), "gap");
    // Another log under the same name, whose first events are others.
    let other = tempfile::tempdir().unwrap();
    let options = LogOptions { replica: "r1".to_owned(), ..LogOptions::default() };
    let other = EventLog::open(other.path(), options).unwrap();
    other.append(triple(id, 2)).await.unwrap();
    other.append(triple(id, 9)).await.unwrap();
    let forked: Vec<Logged> = other.read_from(1).unwrap().collect::<Result<_, _>>().unwrap();
    assert_ne!(forked[2].hash, logged[2].hash);
    for part in [&forked[..3], &forked[2..], &forked[3..]] {
        assert_eq!(f.store.ingest(part).await.unwrap_err().kind(), "forked");
    }
    assert_eq!(f.store.cursor("r1").await.unwrap(), 3);
    f.store.ingest(&later).await.unwrap();
    f.assert_passes().await;
}

async fn two_replicas_have_two_chains(f: Fixture) {
    let other = tempfile::tempdir().unwrap();
    let options = LogOptions { replica: "r2".to_owned(), ..LogOptions::default() };
    let other = EventLog::open(other.path(), options).unwrap();
    let shared = DecisionId::new();
    f.record(triple(shared, 1)).await;
    other.append(vec![testing::feedback(shared, 3, Some("k"))]).await.unwrap();
    other.append(triple(DecisionId::new(), 5)).await.unwrap();
    let theirs: Vec<Logged> = other.read_from(1).unwrap().collect::<Result<_, _>>().unwrap();
    f.store.ingest(&theirs).await.unwrap();
    let names: Vec<(String, u64)> = f.store.replicas().await.unwrap().into_iter().map(|c| (c.replica, c.seq)).collect();
    assert_eq!(names, [("r1".to_owned(), 3), ("r2".to_owned(), 4)]);
    let view = f.store.decision(shared).await.unwrap().unwrap();
    assert_eq!((view.replica.as_str(), view.feedback.len(), view.attempts.len()), ("r1", 1, 1));
    let replicas: Vec<String> =
        f.store.decisions(&DecisionFilter::default()).await.unwrap().into_iter().map(|row| row.replica).collect();
    assert_eq!(replicas, ["r2", "r1"]);
    let report = verify_chain(&*f.store, None, 10).await.unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!((report.replicas, report.events), (2, 7));
}

async fn one_decision_is_shown_whole(f: Fixture) {
    let id = DecisionId::new();
    let decision = testing::decision(id, 1_764_000_000_000_000);
    let sent = f
        .record(vec![
            decision.clone(),
            testing::attempt(id, 1_764_000_000_200_000),
            testing::outcome(id, 1_764_000_000_201_000),
            testing::feedback(id, 1_764_000_009_000_000, Some("k1")),
            testing::state_update(id, 1_764_000_009_000_001, 1),
        ])
        .await;
    f.record(triple(DecisionId::new(), 5)).await;
    let view = f.store.decision(id).await.unwrap().unwrap();
    assert_eq!((view.id, view.seq, view.hash, view.at), (id, 1, sent[0].hash, decision.at));
    assert_eq!(view.record.as_bytes(), sent[0].record);
    assert_eq!(view.context_bytes, decision.context);
    assert_eq!(view.decision.context_hash, decision.context.as_deref().map(Hash::of));
    assert_eq!(view.embedding.as_ref().map(Vec::len), Some(384));
    assert_eq!(view.context.as_ref().unwrap().fleet.len(), 2);
    assert_eq!((view.attempts.len(), view.feedback.len(), view.state_updates.len()), (1, 1, 1));
    assert_eq!(view.outcome.as_ref().unwrap().status, OutcomeStatus::Ok);
    for part in [
        "2025-11-24T16:00:00.000Z",
        "team-a",
        "pii-stays-home",
        "did not match",
        "eliminated by capability: tools",
        "0.9300",
        "smollm2-135m",
        "score = 1 by user",
        &view.hash.to_string(),
    ] {
        assert!(view.explanation.contains(part), "{part} is not in:\n{}", view.explanation);
    }
    serde_json::to_string(&view).unwrap();
    assert!(f.store.decision(DecisionId::new()).await.unwrap().is_none());
}

async fn filters_restrict_as_they_say(f: Fixture) {
    let start = 1_764_000_000_000_000;
    let all = ids(60);
    for (i, &id) in all.iter().enumerate() {
        let decision = testing::decision_with(id, start + i as i64 * 1_000_000, |record| {
            record.decision.policy = format!("policy-{}", i % 3);
            record.decision.arm = format!("arm-{}", i % 4);
            record.tenant = ["acme", "globex"][i % 2].to_owned();
            record.session = if i % 5 == 0 { String::new() } else { format!("session-{}", i % 5) };
            record.decision.decided_by = [DecidedBy::Select, DecidedBy::Rule, DecidedBy::Pinned][i % 3];
            record.dry = i % 20 == 19;
        });
        let mut events = vec![decision];
        let status = [OutcomeStatus::Ok, OutcomeStatus::Error, OutcomeStatus::Cancelled, OutcomeStatus::Refused][i % 4];
        if i % 20 < 16 {
            let mut outcome = testing::outcome(id, start + i as i64 * 1_000_000 + 5);
            if let EventBody::Outcome(body) = &mut outcome.body {
                body.status = status;
                body.served_by = format!("model-{}", i % 7);
                body.ttft_us = (i % 2 == 0).then_some(i as i64);
            }
            events.push(outcome);
        }
        f.record(events).await;
    }
    let text = |s: &str| Some(s.to_owned());
    let all_of = DecisionFilter { limit: Some(1000), ..DecisionFilter::default() };
    let everything = f.store.decisions(&all_of).await.unwrap();
    assert_eq!(everything.iter().map(|row| row.id).collect::<Vec<_>>(), all.iter().rev().copied().collect::<Vec<_>>());
    let row = &everything[59 - 7];
    assert_eq!(
        (row.policy.as_str(), row.arm.as_str(), row.tenant.as_str(), row.status.as_deref(), row.served_by.as_deref()),
        ("policy-1", "arm-3", "globex", Some("refused"), Some("model-0"))
    );
    assert_eq!((row.at, row.ttft_us, row.attempts, row.prompt_tokens), (start + 7_000_000, None, Some(1), Some(120)));
    type Keep = fn(usize) -> bool;
    let cases: Vec<(DecisionFilter, Keep)> = vec![
        (DecisionFilter { policy: text("policy-1"), ..all_of.clone() }, |i| i % 3 == 1),
        (DecisionFilter { arm: text("arm-2"), ..all_of.clone() }, |i| i % 4 == 2),
        (DecisionFilter { tenant: text("acme"), ..all_of.clone() }, |i| i % 2 == 0),
        (DecisionFilter { session: text("session-3"), ..all_of.clone() }, |i| i % 5 == 3),
        (DecisionFilter { decided_by: text("rule"), ..all_of.clone() }, |i| i % 3 == 1),
        (DecisionFilter { status: text("error"), ..all_of.clone() }, |i| i % 4 == 1 && i % 20 < 16),
        (DecisionFilter { status: text("open"), ..all_of.clone() }, |i| (16..19).contains(&(i % 20))),
        (DecisionFilter { model: text("model-3"), ..all_of.clone() }, |i| i % 7 == 3 && i % 20 < 16),
        (DecisionFilter { since: Some(start + 30_000_000), ..all_of.clone() }, |i| i >= 30),
        (DecisionFilter { until: Some(start + 30_000_000), ..all_of.clone() }, |i| i < 30),
        (DecisionFilter { before: Some(all[20]), ..all_of.clone() }, |i| i < 20),
        (DecisionFilter { after: Some(all[50]), ..all_of.clone() }, |i| i > 50),
        (
            DecisionFilter { policy: text("policy-0"), tenant: text("globex"), after: Some(all[9]), ..all_of.clone() },
            |i| i % 3 == 0 && i % 2 == 1 && i > 9,
        ),
        (DecisionFilter { policy: text("' OR 1=1 --"), ..all_of.clone() }, |_| false),
    ];
    for (filter, keep) in cases {
        let expected: Vec<DecisionId> = (0..60).rev().filter(|i| keep(*i)).map(|i| all[i]).collect();
        let found: Vec<DecisionId> = f.store.decisions(&filter).await.unwrap().iter().map(|row| row.id).collect();
        assert_eq!(found, expected, "{filter:?}");
    }
}

async fn pages_follow_each_other(f: Fixture) {
    let all = ids(130);
    f.record(all.iter().enumerate().flat_map(|(i, &id)| triple(id, i as i64)).collect()).await;
    assert_eq!(f.store.decisions(&DecisionFilter::default()).await.unwrap().len(), 50);
    let mut filter = DecisionFilter { limit: Some(40), ..DecisionFilter::default() };
    let mut seen = Vec::new();
    loop {
        let page = f.store.decisions(&filter).await.unwrap();
        let Some(last) = page.last() else { break };
        filter.before = Some(last.id);
        seen.extend(page.iter().map(|row| row.id));
    }
    assert_eq!(seen, all.iter().rev().copied().collect::<Vec<_>>());
    assert_eq!(f.store.ids_between(all[3], all[7], 3).await.unwrap(), all[3..6]);
    assert_eq!(f.store.ids_between(all[3], all[4], 10).await.unwrap(), all[3..5]);
}

async fn nul_in_text_is_no_trouble(f: Fixture) {
    let id = DecisionId::new();
    let decision = testing::decision_with(id, 1, |record| {
        record.model_requested = "a\0b".to_owned();
        record.decision.policy = "p\0".to_owned();
        record.tenant = "\0".to_owned();
        record.session = "\\u0000".to_owned();
        record.decision.candidates[0].arm = "arm\0".to_owned();
    });
    let mut attempt = testing::attempt(id, 2);
    if let EventBody::Attempt(body) = &mut attempt.body {
        body.error = Some("garbage\0".to_owned());
        body.error_detail = Some("said \0\0".to_owned());
    }
    let sent = f.record(vec![decision, attempt, testing::feedback(id, 3, Some("k\0"))]).await;
    assert_eq!(f.store.events("r1", 1, 10).await.unwrap(), sent);
    let view = f.store.decision(id).await.unwrap().unwrap();
    assert_eq!(view.decision.model_requested, "a\0b");
    let rows = f.store.decisions(&DecisionFilter::default()).await.unwrap();
    assert_eq!((rows[0].model_requested.as_str(), rows[0].session.as_str()), ("a\u{fffd}b", "\\u0000"));
    // Asked for as it was written, and as it is shown.
    for policy in ["p\0", "p\u{fffd}"] {
        let filter = DecisionFilter { policy: Some(policy.to_owned()), ..DecisionFilter::default() };
        assert_eq!(f.store.decisions(&filter).await.unwrap().len(), 1, "{policy:?}");
    }
    assert!(f.store.has_feedback_key(id, "k\0").await.unwrap());
    f.assert_passes().await;
}

async fn extreme_values_are_taken_in(f: Fixture) {
    let odd = DecisionId(uuid::Uuid::from_u128(0x1234_5678_9abc_4def_8000_0000_0000_0001));
    let max = DecisionId(uuid::Uuid::max());
    let mut outcome = testing::outcome(odd, i64::MAX);
    if let EventBody::Outcome(body) = &mut outcome.body {
        body.latency_us = i64::MIN >> 11;
        body.cost_usd = f64::MAX;
        body.usage.prompt_tokens = u32::MAX;
        body.error = Some("𝄞 \u{10ffff} \"\\ \n".to_owned());
    }
    let long = testing::decision_with(max, -1, |record| record.tenant = "x".repeat(300_000));
    let sent = f.record(vec![testing::decision(odd, i64::MIN >> 11), outcome, long, testing::admin(0)]).await;
    assert_eq!(f.store.events("r1", 1, 10).await.unwrap().len(), sent.len());
    let rows = f.store.decisions(&DecisionFilter::default()).await.unwrap();
    assert_eq!((rows[0].id, rows[1].id), (max, odd));
    assert_eq!((rows[1].prompt_tokens, rows[1].cost_usd), (Some(u32::MAX), Some(f64::MAX)));
    f.assert_passes().await;
}

async fn decisions_without_an_outcome_are_found_and_closed(f: Fixture) {
    let [done, cut, later, dry, shadow] = [(); 5].map(|()| DecisionId::new());
    f.record(triple(done, 1)).await;
    f.record(vec![testing::decision(cut, 2), testing::attempt(cut, 3), testing::decision(later, 4)]).await;
    f.record(vec![
        testing::decision_with(dry, 5, |record| record.dry = true),
        testing::decision_with(shadow, 5, |record| record.decision.decided_by = DecidedBy::Shadow),
    ])
    .await;
    f.record(vec![testing::outcome(later, 6)]).await;
    let open = f.store.open_decisions("r1").await.unwrap();
    assert_eq!(open.iter().map(|d| (d.id, d.at, d.attempts)).collect::<Vec<_>>(), [(cut, 2, 1)]);
    assert!((open[0].cost_usd - 0.000123).abs() < 1e-12);
    assert!(f.store.open_decisions("r2").await.unwrap().is_empty());
    let before = f.log.last_seq();
    assert_eq!(close_interrupted(&f.log, &*f.store, 99).await.unwrap(), 1);
    f.store.ingest(&f.read(before + 1)).await.unwrap();
    assert!(f.store.open_decisions("r1").await.unwrap().is_empty());
    let view = f.store.decision(cut).await.unwrap().unwrap();
    let Outcome { status, attempts, .. } = view.outcome.unwrap();
    assert_eq!((status, attempts), (OutcomeStatus::Interrupted, 1));
    assert_eq!(close_interrupted(&f.log, &*f.store, 100).await.unwrap(), 0);
    f.assert_passes().await;
}

async fn feedback_keys_are_remembered(f: Fixture) {
    let [a, b] = [(); 2].map(|()| DecisionId::new());
    f.record(vec![testing::decision(a, 1), testing::feedback(a, 2, Some("key-1")), testing::feedback(a, 3, None)])
        .await;
    assert!(f.store.has_feedback_key(a, "key-1").await.unwrap());
    assert!(!f.store.has_feedback_key(a, "key-2").await.unwrap());
    assert!(!f.store.has_feedback_key(b, "key-1").await.unwrap());
}

async fn learning_comes_back_in_order(f: Fixture) {
    let (policy, other) = (Hash::of(b"policy"), Hash::of(b"other"));
    let id = DecisionId::new();
    let updates: Vec<Event> = (1..=30).map(|seq| testing::state_update(id, seq as i64 + 10, seq)).collect();
    f.record(updates[..20].to_vec()).await;
    f.record(updates[20..].to_vec()).await;
    let seqs = |found: Vec<weir::domain::StateUpdate>| found.iter().map(|u| u.seq).collect::<Vec<_>>();
    assert_eq!(seqs(f.store.state_updates(policy, 1, 1000).await.unwrap()), (1..=30).collect::<Vec<_>>());
    let some = f.store.state_updates(policy, 18, 5).await.unwrap();
    let EventBody::StateUpdate(expected) = &updates[17].body else { unreachable!() };
    assert_eq!(&some[0], expected);
    assert_eq!(seqs(some), [18, 19, 20, 21, 22]);
    assert!(f.store.state_updates(other, 1, 10).await.unwrap().is_empty());

    for state_seq in [10, 20] {
        let snapshot = Snapshot { policy_hash: policy, state_seq, bytes: vec![0, 1, state_seq as u8] };
        f.store.save_snapshot(&snapshot).await.unwrap();
        f.store.save_snapshot(&Snapshot { bytes: vec![9], ..snapshot }).await.unwrap();
    }
    for (up_to, expected) in [(9, None), (10, Some(10)), (19, Some(10)), (u64::MAX, Some(20))] {
        let found = f.store.snapshot(policy, up_to).await.unwrap();
        assert_eq!(found.as_ref().map(|s| s.state_seq), expected);
        assert!(found.is_none_or(|s| s.bytes[2] == s.state_seq as u8));
    }
    assert!(f.store.snapshot(other, 100).await.unwrap().is_none());

    let version = PolicyVersion {
        artifacts: Default::default(),
        name: "support".to_owned(),
        hash: policy,
        file: "support.yaml".to_owned(),
        yaml: "policy: support\n".to_owned(),
        fleet: Fleet::default(),
        examples: Default::default(),
        embedder: None,
    };
    let event = |at| Event::new(at, None, EventBody::PolicyVersion(Box::new(version.clone())));
    f.record(vec![event(1)]).await;
    f.record(vec![event(2)]).await;
    let name = version.name.clone();
    assert_eq!(f.store.policy_version(policy).await.unwrap(), Some(version));
    assert_eq!(f.store.policy_version(other).await.unwrap(), None);
    let versions = f.store.policy_versions(&name).await.unwrap();
    assert_eq!(versions.iter().map(|(hash, _)| *hash).collect::<Vec<_>>(), [policy]);
    assert_eq!(f.store.policy_versions("no such policy").await.unwrap(), []);
    f.assert_passes().await;
}

struct Seen(std::sync::Mutex<Vec<u64>>);

#[async_trait::async_trait]
impl weir::audit::Follower for Seen {
    async fn follow(&self, batch: &[Logged]) {
        self.0.lock().unwrap().extend(batch.iter().map(|logged| logged.seq));
    }
}

async fn the_feeder_brings_all_in_order_to_store_and_follower(f: Fixture) {
    // Some before it starts, most while it runs.
    f.log.append(triple(DecisionId::new(), 1)).await.unwrap();
    let seen = Arc::new(Seen(std::sync::Mutex::default()));
    let options = FeederOptions { max_events: 64, ..FeederOptions::default() };
    let feeder = Feeder::start(f.log.clone(), f.store.clone(), Some(seen.clone()), options).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let log = f.log.clone();
            tokio::spawn(async move {
                for i in 0..50 {
                    let id = DecisionId::new();
                    for event in triple(id, i) {
                        log.append(vec![event]).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let last = f.log.last_seq();
    assert_eq!(last, 1203);
    feeder.flush(last, Duration::from_secs(30)).await.unwrap();
    assert_eq!((feeder.lag(), feeder.last_error()), (0, None));
    assert_eq!(*seen.0.lock().unwrap(), (1..=last).collect::<Vec<_>>());
    assert_eq!(f.store.cursor("r1").await.unwrap(), last);
    assert!(f.store.open_decisions("r1").await.unwrap().is_empty());
    f.log.append(triple(DecisionId::new(), 2)).await.unwrap();
    feeder.stop(Duration::from_secs(30)).await.unwrap();
    assert_eq!(f.store.cursor("r1").await.unwrap(), last + 3);
    f.assert_passes().await;
}

async fn figures_add_up(f: Fixture) {
    for (i, id) in ids(10).into_iter().enumerate() {
        f.record(triple(id, i as i64)).await;
    }
    f.record(vec![testing::decision(DecisionId::new(), 77)]).await;
    let figures = stats(&*f.store, &DecisionFilter { limit: Some(1), ..DecisionFilter::default() }).await.unwrap();
    assert_eq!((figures.total.decisions, figures.total.status["ok"], figures.total.status["open"]), (11, 10, 1));
    assert_eq!((figures.total.latency_p50_us, figures.total.prompt_tokens), (Some(201_000), 1200));
    assert_eq!((figures.first, figures.last), (Some(0), Some(77)));
    assert_eq!(figures.policies["default"]["quick"].decisions, 11);
}

async fn a_store_opens_again_with_what_it_held(f: Fixture) {
    f.record(triple(DecisionId::new(), 1)).await;
    f.store.close().await;
    let again = open_store(&f.target).await.unwrap();
    assert_eq!(again.cursor("r1").await.unwrap(), 3);
    assert_eq!(again.decisions(&DecisionFilter::default()).await.unwrap().len(), 1);
}
