//! What verification finds, in either store, and what it leaves alone.

use std::time::Duration;

use weir::{
    audit::{
        DecisionFilter, EventLog, Feeder, FeederOptions, LogOptions,
        export::{export_jsonl, export_parquet},
        testing, verify_chain,
    },
    domain::{DecisionId, EventBody, Hash, OutcomeStatus},
};

use crate::{
    contract,
    support::store::{Fixture, ids, triple},
};

contract!(
    tampering_is_found,
    a_forged_row_is_found,
    a_chain_with_events_moved_or_missing_is_found,
    erasing_a_context_keeps_the_chain,
    a_second_outcome_does_not_hold_up_the_rest,
    a_log_behind_its_store_goes_on_after_it,
    the_json_lines_export_verifies_by_itself,
);

/// Each way of changing the record is found, at the place where it was changed.
async fn tampering_is_found(f: Fixture) {
    for (i, id) in ids(4).into_iter().enumerate() {
        f.record(triple(id, 1_764_000_000_000_000 + i as i64)).await;
    }
    f.assert_passes().await;

    f.tamper(
        "UPDATE decisions SET arm = 'careful' WHERE position & 17592186044415 = 4",
        "UPDATE decisions SET arm = 'careful' WHERE seq = 4",
    )
    .await;
    assert_eq!(f.problems().await, [(4, "the columns of this decision are not what its record says".to_owned())]);
    f.tamper("UPDATE decisions SET arm = 'quick'", "UPDATE decisions SET arm = 'quick'").await;

    f.tamper("DELETE FROM outcomes WHERE position & 17592186044415 = 6", "DELETE FROM outcomes WHERE seq = 6").await;
    assert_eq!(f.problems().await, [(6, "this outcome has no row in its table".to_owned())]);

    f.tamper(
        "UPDATE events SET context = X'7B7D' WHERE position & 17592186044415 = 7",
        r"UPDATE events SET context = '\x7b7d' WHERE seq = 7",
    )
    .await;
    let problems = f.problems().await;
    assert_eq!(problems[1], (7, "the context is not the one that was recorded".to_owned()));

    // A record changed by one character: its hash no longer matches, nor the link of the one after it.
    f.tamper(
        "UPDATE events SET record = CAST(replace(CAST(record AS TEXT), 'smollm2', 'smollm3') AS BLOB) \
         WHERE position & 17592186044415 = 8",
        "UPDATE events SET record = convert_to(replace(convert_from(record, 'UTF8'), 'smollm2', 'smollm3'), 'UTF8') \
         WHERE seq = 8",
    )
    .await;
    let problems = f.problems().await;
    let at = |seq: u64| problems.iter().filter(|(s, _)| *s == seq).map(|(_, what)| what.as_str()).collect::<Vec<_>>();
    assert!(at(8)[0].contains("the hash beside the record"), "{problems:?}");
    assert!(at(9)[0].starts_with("links to"), "{problems:?}");
}

/// A row that no event ever made.
async fn a_forged_row_is_found(f: Fixture) {
    f.record(triple(DecisionId::new(), 1)).await;
    f.tamper(
        "INSERT INTO feedback SELECT position + 1, decision_id, at, 'user', 'score', 1.0, NULL FROM outcomes",
        "INSERT INTO feedback SELECT replica, seq - 1, decision_id, at, 'user', 'score', 1.0, NULL FROM outcomes",
    )
    .await;
    f.record(triple(DecisionId::new(), 5)).await;
    let problems = f.problems().await;
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].1.contains("1 rows of table feedback belong to no event"), "{problems:?}");
}

/// An event taken out of the middle, two that changed places, and a record cut off at its end.
async fn a_chain_with_events_moved_or_missing_is_found(f: Fixture) {
    for (i, id) in ids(4).into_iter().enumerate() {
        f.record(triple(id, i as i64)).await;
    }
    f.assert_passes().await;
    f.tamper("DELETE FROM events WHERE position & 17592186044415 = 12", "DELETE FROM events WHERE seq = 12").await;
    let problems = f.problems().await;
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].1.contains("1 rows of table outcomes belong to no event"), "{problems:?}");
    assert!(problems[1].1.contains("ends with event 11"), "{problems:?}");

    f.tamper("DELETE FROM events WHERE position & 17592186044415 = 9", "DELETE FROM events WHERE seq = 9").await;
    let problems = f.problems().await;
    assert_eq!(problems[0], (9, "missing; the record here is event 10".to_owned()));
    assert!(problems[1].0 == 10 && problems[1].1.starts_with("links to"), "{problems:?}");

    for (from, to) in [(2, 900), (3, 2), (900, 3)] {
        let (sqlite, postgres) = MOVES[&(from, to)];
        f.tamper(sqlite, postgres).await;
    }
    let problems = f.problems().await;
    assert_eq!(problems[0], (2, "missing; the record here is event 3".to_owned()));
    assert!(problems.iter().any(|(seq, what)| *seq == 2 && what.starts_with("links to")), "{problems:?}");
}

async fn erasing_a_context_keeps_the_chain(f: Fixture) {
    let id = DecisionId::new();
    f.record(triple(id, 1)).await;
    f.record(triple(DecisionId::new(), 5)).await;
    let erased = f.store.erase_context(id, true).await.unwrap();
    assert_eq!(erased, [("r1".to_owned(), 1)]);
    assert_eq!(f.log.erase(&[1]).unwrap(), 1);
    assert!(f.store.erase_context(id, true).await.unwrap().is_empty());
    let view = f.store.decision(id).await.unwrap().unwrap();
    assert_eq!((view.context, view.embedding), (None, None));
    assert!(view.decision.context_hash.is_some());
    assert!(view.explanation.contains("erased"), "{}", view.explanation);
    assert!(f.store.events("r1", 4, 1).await.unwrap()[0].event.context.is_some());
    let report = verify_chain(&*f.store, Some(&f.dir.path().join("log")), 10).await.unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!((report.erased, report.beside), (2, 2));
}

async fn a_second_outcome_does_not_hold_up_the_rest(f: Fixture) {
    let id = DecisionId::new();
    let mut events = triple(id, 1);
    let mut again = testing::outcome(id, 9);
    if let EventBody::Outcome(body) = &mut again.body {
        body.status = OutcomeStatus::Error;
    }
    events.extend([again, testing::attempt(id, 10), testing::decision(id, 11)]);
    f.record(events).await;
    f.record(vec![testing::outcome(id, 12)]).await;
    let rows = f.store.decisions(&DecisionFilter::default()).await.unwrap();
    assert_eq!((rows.len(), rows[0].status.as_deref()), (1, Some("ok")));
    f.assert_passes().await;
}

async fn a_log_behind_its_store_goes_on_after_it(f: Fixture) {
    f.record(triple(DecisionId::new(), 1)).await;
    let Fixture { dir, log, store, .. } = f;
    drop(log);
    // The log was deleted, the store was not.
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    let options = LogOptions { replica: "r1".to_owned(), ..LogOptions::default() };
    let log = EventLog::open(&dir.path().join("log"), options).unwrap();
    let feeder = Feeder::start(log.clone(), store.clone(), None, FeederOptions::default()).await.unwrap();
    assert_eq!(log.last_seq(), 3);
    log.append(triple(DecisionId::new(), 5)).await.unwrap();
    feeder.flush(6, Duration::from_secs(30)).await.unwrap();
    let report = verify_chain(&*store, None, 10).await.unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.events, 6);
}

async fn the_json_lines_export_verifies_by_itself(f: Fixture) {
    for (i, id) in ids(3).into_iter().enumerate() {
        f.record(triple(id, i as i64)).await;
    }
    let mut out = Vec::new();
    assert_eq!(export_jsonl(&*f.store, &mut out).await.unwrap(), 9);
    #[derive(serde::Deserialize)]
    struct Line<'a> {
        hash: Hash,
        #[serde(borrow)]
        record: &'a serde_json::value::RawValue,
        embedding: Option<String>,
    }
    let mut prev = Hash::ZERO;
    for line in std::str::from_utf8(&out).unwrap().lines() {
        let line: Line = serde_json::from_str(line).unwrap();
        let record = line.record.get();
        assert_eq!(Hash::of(record.as_bytes()), line.hash);
        assert!(record.contains(&format!("\"prev\":\"{prev}\"")));
        assert_eq!(line.embedding.is_some(), record.contains("\"kind\":\"decision\""));
        prev = line.hash;
    }

    let file = f.dir.path().join("out.parquet");
    let out = std::fs::File::create(&file).unwrap();
    assert_eq!(export_parquet(&*f.store, &DecisionFilter::default(), out).await.unwrap(), 3);
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(&file).unwrap());
    let batches: Vec<_> = reader.unwrap().build().unwrap().map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(|b| b.num_rows()).sum::<usize>(), 3);
    let propensity = batches[0].column_by_name("propensity").unwrap();
    let propensity = propensity.as_any().downcast_ref::<arrow::array::Float64Array>().unwrap();
    assert_eq!(propensity.value(0), 0.93);
    let features = batches[0].column_by_name("features").unwrap();
    let features = features.as_any().downcast_ref::<arrow::array::ListArray>().unwrap();
    assert_eq!(features.value(0).len(), 8);
}

type Move = (&'static str, &'static str);

static MOVES: std::sync::LazyLock<std::collections::BTreeMap<(u64, u64), Move>> = std::sync::LazyLock::new(|| {
    [
        (
            (2, 900),
            (
                "UPDATE events SET position = position + 898 WHERE position & 17592186044415 = 2",
                "UPDATE events SET seq = 900 WHERE seq = 2",
            ),
        ),
        (
            (3, 2),
            (
                "UPDATE events SET position = position - 1 WHERE position & 17592186044415 = 3",
                "UPDATE events SET seq = 2 WHERE seq = 3",
            ),
        ),
        (
            (900, 3),
            (
                "UPDATE events SET position = position - 897 WHERE position & 17592186044415 = 900",
                "UPDATE events SET seq = 3 WHERE seq = 900",
            ),
        ),
    ]
    .into()
});
