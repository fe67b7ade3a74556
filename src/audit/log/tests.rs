//! The log against crashes, full disks, second openers and time.

use std::{fs, os::unix::fs::FileExt};

use proptest::prelude::*;

use super::*;
use crate::{
    audit::{testing, verify_log},
    domain::DecisionId,
};

fn options() -> LogOptions {
    LogOptions { replica: "r1".to_owned(), ..LogOptions::default() }
}

fn open(dir: &Path) -> EventLog {
    EventLog::open(dir, options()).unwrap()
}

fn triple(at: i64) -> Vec<Event> {
    let id = DecisionId::new();
    vec![testing::decision(id, at), testing::attempt(id, at + 1), testing::outcome(id, at + 2)]
}

fn all(log: &EventLog) -> Vec<Logged> {
    log.read_from(1).unwrap().collect::<Result<_, _>>().unwrap()
}

fn only_segment(dir: &Path) -> PathBuf {
    let segments = segment::list(dir).unwrap();
    assert_eq!(segments.len(), 1);
    segments[0].path.clone()
}

fn assert_chain(events: &[Logged]) {
    let mut prev = Hash::ZERO;
    for (i, event) in events.iter().enumerate() {
        assert_eq!((event.seq, event.prev), (i as u64 + 1, prev));
        assert_eq!(event.hash, Hash::of(&event.record));
        prev = event.hash;
    }
}

#[tokio::test]
async fn events_come_back_in_order_chained_and_whole_across_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let sent: Vec<Event> = (0..5).flat_map(|i| triple(i * 10)).collect();
    let log = open(dir.path());
    assert_eq!(log.append(sent[..6].to_vec()).await.unwrap(), 6);
    // No close: dropping is what a kill leaves of the process's own state.
    drop(log);
    let log = open(dir.path());
    assert_eq!((log.last_seq(), log.recovery()), (6, None));
    assert_eq!(log.append(sent[6..].to_vec()).await.unwrap(), 15);
    let events = all(&log);
    assert_chain(&events);
    for (event, sent) in events.iter().zip(&sent) {
        assert_eq!((event.event.at, event.event.kind()), (sent.at, sent.kind()));
        assert_eq!((&event.event.context, &event.event.embedding), (&sent.context, &sent.embedding));
    }
    assert_eq!(log.append(Vec::new()).await.unwrap(), 15);
}

#[tokio::test]
async fn a_tail_torn_at_any_byte_is_cut_and_the_chain_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    let path = only_segment(dir.path());
    let good = fs::metadata(&path).unwrap().len();
    log.append(vec![testing::outcome(DecisionId::new(), 9)]).await.unwrap();
    drop(log);
    let whole = fs::read(&path).unwrap();
    for cut in good..whole.len() as u64 {
        fs::write(&path, &whole[..cut as usize]).unwrap();
        let log = open(dir.path());
        assert_eq!(log.last_seq(), 3, "cut at {cut}");
        match log.recovery() {
            None => assert_eq!(cut, good),
            Some(found) => {
                assert_eq!((found.offset, found.dropped), (good, cut - good));
                assert_eq!(fs::read(&found.kept).unwrap(), whole[good as usize..cut as usize]);
            }
        }
        log.append(vec![testing::admin(10)]).await.unwrap();
        let events = all(&log);
        assert_eq!(events.len(), 4, "cut at {cut}");
        assert_chain(&events);
    }
}

#[tokio::test]
async fn a_damaged_byte_anywhere_in_the_last_event_is_cut_too() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    let path = only_segment(dir.path());
    let good = fs::metadata(&path).unwrap().len() as usize;
    log.append(vec![testing::admin(9)]).await.unwrap();
    drop(log);
    let whole = fs::read(&path).unwrap();
    for at in good..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(open(dir.path()).last_seq(), 3, "byte {at}");
    }
}

#[tokio::test]
async fn a_segment_without_a_whole_head_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    drop(log);
    fs::write(segment::path(dir.path(), 4), b"WEIRLO").unwrap();
    let log = open(dir.path());
    assert_eq!(log.last_seq(), 3);
    assert_eq!(log.recovery().unwrap().dropped, 6);
    log.append(triple(5)).await.unwrap();
    assert_chain(&all(&log));
}

#[test]
fn a_second_opener_is_told_who_was_first_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let error = EventLog::open(dir.path(), options()).unwrap_err();
    assert_eq!(error.kind(), "locked");
    let message = error.to_string();
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    assert!(message.contains("--data-dir"), "{message}");
    drop(log);
    open(dir.path());
}

#[tokio::test]
async fn a_failed_write_leaves_no_trace_and_the_next_goes_right() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    let path = only_segment(dir.path());
    // A handle that cannot write, and a torn end that could not be cut off.
    let good = log.disk().replace_file(fs::File::open(&path).unwrap());
    let size = fs::metadata(&path).unwrap().len();
    let error = log.append(triple(10)).await.unwrap_err();
    assert_eq!(error.kind(), "io");
    good.write_all_at(b"half a frame, longer than what is written next? no matter", size).unwrap();
    assert_eq!((log.last_seq(), all(&log).len()), (3, 3));
    log.disk().replace_file(good.try_clone().unwrap());
    assert_eq!(log.append(triple(20)).await.unwrap(), 6);
    assert_chain(&all(&log));
    drop((log, good));
    let log = open(dir.path());
    assert_eq!((log.last_seq(), log.recovery()), (6, None));
}

#[tokio::test]
async fn segments_follow_each_other_and_a_reader_follows_them_alive() {
    let dir = tempfile::tempdir().unwrap();
    let log = EventLog::open(dir.path(), LogOptions { segment_bytes: 16 << 10, ..options() }).unwrap();
    let mut reader = log.read_from(1).unwrap();
    let mut read = Vec::new();
    for i in 0..40 {
        assert!(reader.read().unwrap().is_none());
        log.append(triple(i)).await.unwrap();
        while let Some(logged) = reader.read().unwrap() {
            read.push(logged);
        }
        assert_eq!(read.len() as u64, log.last_seq());
    }
    assert_chain(&read);
    assert!(segment::list(dir.path()).unwrap().len() > 5);
    for from in [1, 2, 60, 119, 120] {
        assert_eq!(log.read_from(from).unwrap().next().unwrap().unwrap().seq, from);
    }
    assert!(log.read_from(121).unwrap().next().is_none());
    assert_eq!(LogReader::at_rest(dir.path(), 7).unwrap().count(), 114);
    let report = verify_log(dir.path(), 10).unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.events, 120);
    drop(log);
    let log = open(dir.path());
    assert_eq!(log.last_seq(), 120);
}

#[tokio::test]
async fn old_segments_go_once_ingested_and_the_newest_stay() {
    let dir = tempfile::tempdir().unwrap();
    let small = LogOptions { segment_bytes: 16 << 10, keep_segments: 2, ..options() };
    let log = EventLog::open(dir.path(), small).unwrap();
    for i in 0..40 {
        log.append(triple(i)).await.unwrap();
    }
    let before = segment::list(dir.path()).unwrap();
    assert_eq!(log.remove_ingested(before[3].first - 2).unwrap(), 2);
    assert_eq!(log.remove_ingested(before[3].first - 1).unwrap(), 1);
    assert_eq!(segment::list(dir.path()).unwrap()[0].first, before[3].first);
    log.remove_ingested(log.last_seq()).unwrap();
    assert_eq!(segment::list(dir.path()).unwrap(), before[before.len() - 2..]);
    assert!(verify_log(dir.path(), 10).unwrap().passed());
}

#[tokio::test]
async fn a_log_behind_its_store_goes_on_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    assert!(log.fast_forward(3, Hash::ZERO).is_err());
    let head = Hash::of(b"event 10 of the store");
    log.fast_forward(10, head).unwrap();
    assert_eq!(log.head(), (10, head));
    assert_eq!(log.append(triple(2)).await.unwrap(), 13);
    let after: Vec<Logged> = log.read_from(11).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!((after.len(), after[0].seq, after[0].prev), (3, 11, head));
    drop(log);
    assert_eq!(open(dir.path()).last_seq(), 13);
}

#[tokio::test]
async fn what_is_erased_is_gone_from_the_files_and_the_chain_stands() {
    let dir = tempfile::tempdir().unwrap();
    let log = EventLog::open(dir.path(), LogOptions { segment_bytes: 16 << 10, ..options() }).unwrap();
    for i in 0..20 {
        log.append(triple(i)).await.unwrap();
    }
    let before = all(&log);
    assert_eq!(log.erase(&[1, 31, 999]).unwrap(), 2);
    let after = all(&log);
    for (old, new) in before.iter().zip(&after) {
        assert_eq!((old.seq, &old.record, old.hash), (new.seq, &new.record, new.hash));
        let gone = [1, 31].contains(&new.seq);
        assert_eq!(new.event.context.is_none(), gone || old.event.context.is_none());
    }
    let embedding = before[0].event.embedding.clone().unwrap();
    for here in segment::list(dir.path()).unwrap().iter().take(1) {
        let bytes = fs::read(&here.path).unwrap();
        let found = bytes.windows(embedding.len()).filter(|window| *window == embedding).count();
        let kept = after.iter().filter(|e| e.event.embedding.is_some()).count();
        assert!(found < kept);
    }
    let report = verify_log(dir.path(), 10).unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.erased, 4);
    drop(log);
    assert_eq!(open(dir.path()).recovery(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_appends_are_contiguous_and_strict_ones_share_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let log = EventLog::open(dir.path(), LogOptions { durability: Durability::Strict, ..options() }).unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|i| {
            let log = log.clone();
            tokio::spawn(async move {
                for j in 0..5 {
                    let last = log.append(triple(i * 100 + j)).await.unwrap();
                    let ids: Vec<_> =
                        log.read_from(last - 2).unwrap().take(3).map(|e| e.unwrap().event.decision).collect();
                    assert_eq!(ids[0], ids[2], "the events of one call are not contiguous");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let events = all(&log);
    assert_eq!(events.len(), 240);
    assert_chain(&events);
}

#[tokio::test]
async fn an_event_that_is_no_json_is_refused_and_nothing_else_happens() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let bad = testing::decision_with(DecisionId::new(), 1, |record| record.decision.propensity = f64::NAN);
    assert_eq!(log.append(vec![testing::admin(1), bad]).await.unwrap_err().kind(), "record");
    assert_eq!(log.append(triple(1)).await.unwrap(), 3);
    assert_chain(&all(&log));
}

#[tokio::test]
async fn the_memory_of_recent_events_gives_each_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    log.keep_recent();
    assert!(log.take_recent(1, 10).is_none());
    log.append(triple(2)).await.unwrap();
    log.append(triple(3)).await.unwrap();
    assert!(log.take_recent(3, 10).is_none(), "event 3 came before");
    let seqs = |events: Vec<Logged>| events.iter().map(|e| e.seq).collect::<Vec<_>>();
    assert_eq!(seqs(log.take_recent(4, 2).unwrap()), [4, 5]);
    assert_eq!(seqs(log.take_recent(8, 10).unwrap()), [8, 9]);
    assert!(log.take_recent(10, 10).is_none());
}

#[derive(Clone, Debug)]
enum Step {
    Append(u8),
    Reopen,
    /// Reopen with so many bytes gone from the last write, at most.
    Tear(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1u8..6).prop_map(Step::Append),
        1 => Just(Step::Reopen),
        1 => (1u16..4000).prop_map(Step::Tear),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is appended, and however often the process dies in the middle of its last write, the log holds exactly
    /// the events before the torn one.
    #[test]
    fn reopening_restores_every_whole_event(steps in steps(), segment_bytes in 4_000u64..40_000) {
        let dir = tempfile::tempdir().unwrap();
        let options = || LogOptions { segment_bytes, ..options() };
        let mut log = Some(EventLog::open(dir.path(), options()).unwrap());
        let mut model: Vec<Hash> = Vec::new();
        for (i, step) in steps.into_iter().enumerate() {
            match step {
                Step::Append(count) => {
                    let events = (0..count).map(|j| {
                        let id = DecisionId::new();
                        if j % 2 == 0 { testing::decision(id, i as i64) } else { testing::outcome(id, i as i64) }
                    });
                    let log = log.as_ref().unwrap();
                    let first = log.last_seq() + 1;
                    log.write(events.collect()).unwrap();
                    model.extend(log.read_from(first).unwrap().map(|e| e.unwrap().hash));
                }
                Step::Reopen => {
                    drop(log.take());
                    log = Some(EventLog::open(dir.path(), options()).unwrap());
                }
                Step::Tear(bytes) => {
                    drop(log.take());
                    let last = segment::list(dir.path()).unwrap().pop().unwrap();
                    let size = fs::metadata(&last.path).unwrap().len();
                    let left = size.saturating_sub(bytes.into()).max(segment::HEADER as u64);
                    fs::OpenOptions::new().write(true).open(&last.path).unwrap().set_len(left).unwrap();
                    let opened = EventLog::open(dir.path(), options()).unwrap();
                    prop_assert!(opened.last_seq() <= model.len() as u64);
                    prop_assert!(opened.last_seq() + 1 >= last.first);
                    model.truncate(opened.last_seq() as usize);
                    log = Some(opened);
                }
            }
            let log = log.as_ref().unwrap();
            let found: Vec<Hash> = log.read_from(1).unwrap().map(|e| e.unwrap().hash).collect();
            prop_assert_eq!(&found, &model);
        }
        prop_assert!(verify_log(dir.path(), 5).unwrap().passed());
    }
}

/// Not a check but a figure: `cargo test --lib measure_appends -- --ignored --nocapture`.
#[test]
#[ignore = "prints a figure"]
fn measure_appends() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.keep_recent();
    type Make = fn(DecisionId, i64) -> Event;
    let kinds: [(&str, Make); 4] = [
        ("decision", testing::decision),
        ("pass-through decision", testing::pass_through),
        ("attempt", testing::attempt),
        ("outcome", testing::outcome),
    ];
    for (name, make) in kinds {
        let events: Vec<Event> = (0..5000).map(|i| make(DecisionId::new(), i)).collect();
        let drafts = events.clone();
        let start = std::time::Instant::now();
        let mut bytes = 0;
        for event in drafts {
            bytes += Draft::new(event).unwrap().place("r1", b"\"r1\"", 1, Hash::ZERO).record.len();
        }
        let record = start.elapsed();
        let oracle = std::time::Instant::now();
        for event in &events {
            std::hint::black_box(serde_json_canonicalizer::to_vec(event).unwrap());
        }
        let oracle = oracle.elapsed();
        let start = std::time::Instant::now();
        for event in events {
            log.write(vec![event]).unwrap();
        }
        let append = start.elapsed();
        let us = |d: std::time::Duration| d.as_secs_f64() * 1e6 / 5000.0;
        println!(
            "{name}: {} byte record; record and hash {:.2} µs (serde_json_canonicalizer alone {:.2}); append {:.2} µs",
            bytes / 5000,
            us(record),
            us(oracle),
            us(append)
        );
    }
}

#[tokio::test]
async fn a_whole_event_that_does_not_belong_is_never_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.append(triple(1)).await.unwrap();
    let path = only_segment(dir.path());
    drop(log);
    let mut bytes = fs::read(&path).unwrap();
    // As a later version of weir might leave it: whole, but not event 4 of this chain.
    let odd = Draft::new(testing::admin(1)).unwrap().place("r1", b"\"r1\"", 9, Hash::ZERO);
    frame::encode(&mut bytes, &odd);
    fs::write(&path, &bytes).unwrap();
    let error = EventLog::open(dir.path(), options()).unwrap_err();
    assert_eq!(error.kind(), "corrupt");
    assert!(error.to_string().contains("moved away"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}
