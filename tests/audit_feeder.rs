//! The feeder against stores that fail: for a while, in the middle, at the start.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use weir::{
    audit::{
        AuditStore, DecisionFilter, DecisionRow, EventLog, Feeder, FeederOptions, LogOptions, OpenDecision, Snapshot,
        StoreError, StoreTarget, StoredEvent, open_store, projection::Projected, record::Logged, store::Cursor,
        testing, verify_chain,
    },
    domain::{DecisionId, Event, Hash, Micros, PolicyVersion, StateUpdate},
};

use crate::support::postgres::Server;

/// A store that fails so many times, whatever it is asked, and then does as the one behind it.
struct Flaky {
    store: Arc<dyn AuditStore>,
    failures: AtomicU32,
    calls: AtomicU32,
}

impl Flaky {
    fn pass(&self) -> Result<&dyn AuditStore, StoreError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let left = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match left {
            Ok(_) => Err(StoreError::Unavailable("out for lunch".to_owned())),
            Err(_) => Ok(&*self.store),
        }
    }
}

#[async_trait]
impl AuditStore for Flaky {
    fn kind(&self) -> &'static str {
        "flaky"
    }
    async fn ingest(&self, batch: &[Logged]) -> Result<(), StoreError> {
        self.pass()?.ingest(batch).await
    }
    async fn replicas(&self) -> Result<Vec<Cursor>, StoreError> {
        self.pass()?.replicas().await
    }
    async fn decisions(&self, filter: &DecisionFilter) -> Result<Vec<DecisionRow>, StoreError> {
        self.pass()?.decisions(filter).await
    }
    async fn decision_events(&self, ids: &[DecisionId]) -> Result<Vec<StoredEvent>, StoreError> {
        self.pass()?.decision_events(ids).await
    }
    async fn ids_between(&self, a: DecisionId, b: DecisionId, n: u32) -> Result<Vec<DecisionId>, StoreError> {
        self.pass()?.ids_between(a, b, n).await
    }
    async fn stored_events(&self, replica: &str, from: u64, n: u32) -> Result<Vec<StoredEvent>, StoreError> {
        self.pass()?.stored_events(replica, from, n).await
    }
    async fn projected(&self, replica: &str, from: u64, to: u64) -> Result<Vec<Projected>, StoreError> {
        self.pass()?.projected(replica, from, to).await
    }
    async fn projected_rows(&self, replica: &str, to: u64) -> Result<Vec<(&'static str, u64)>, StoreError> {
        self.pass()?.projected_rows(replica, to).await
    }
    async fn policy_versions(&self, name: &str) -> Result<Vec<(Hash, Micros)>, StoreError> {
        self.pass()?.policy_versions(name).await
    }

    async fn policy_version(&self, hash: Hash) -> Result<Option<PolicyVersion>, StoreError> {
        self.pass()?.policy_version(hash).await
    }
    async fn snapshot(&self, policy_hash: Hash, up_to: u64) -> Result<Option<Snapshot>, StoreError> {
        self.pass()?.snapshot(policy_hash, up_to).await
    }
    async fn save_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.pass()?.save_snapshot(snapshot).await
    }
    async fn state_updates(&self, policy: Hash, from: u64, n: usize) -> Result<Vec<StateUpdate>, StoreError> {
        self.pass()?.state_updates(policy, from, n).await
    }
    async fn untaught(&self, policy: Hash) -> Result<Vec<DecisionId>, StoreError> {
        self.pass()?.untaught(policy).await
    }
    async fn has_feedback_key(&self, id: DecisionId, key: &str) -> Result<bool, StoreError> {
        self.pass()?.has_feedback_key(id, key).await
    }
    async fn open_decisions(&self, replica: &str) -> Result<Vec<OpenDecision>, StoreError> {
        self.pass()?.open_decisions(replica).await
    }
    async fn erase_context(&self, id: DecisionId, bodies: bool) -> Result<Vec<(String, u64)>, StoreError> {
        self.pass()?.erase_context(id, bodies).await
    }
    async fn close(&self) {
        self.store.close().await;
    }
}

fn triple() -> Vec<Event> {
    let id = DecisionId::new();
    vec![testing::decision(id, 1), testing::attempt(id, 2), testing::outcome(id, 3)]
}

fn log(dir: &std::path::Path) -> EventLog {
    let options = LogOptions { replica: "r1".to_owned(), ..LogOptions::default() };
    EventLog::open(&dir.join("log"), options).unwrap()
}

fn quick() -> FeederOptions {
    FeederOptions {
        max_events: 7,
        backoff: Duration::from_millis(2),
        max_backoff: Duration::from_millis(20),
        ..FeederOptions::default()
    }
}

#[tokio::test]
async fn a_store_that_fails_is_tried_until_it_works_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&StoreTarget::Sqlite(dir.path().join("weir.db"))).await.unwrap();
    let log = log(dir.path());
    for _ in 0..10 {
        log.append(triple()).await.unwrap();
    }
    let flaky = Arc::new(Flaky { store: store.clone(), failures: AtomicU32::new(6), calls: AtomicU32::new(0) });
    let feeder = Feeder::start(log.clone(), flaky.clone(), None, quick()).await.unwrap();
    feeder.flush(30, Duration::from_secs(10)).await.unwrap();
    assert_eq!((feeder.lag(), feeder.last_error()), (0, None));

    flaky.failures.store(u32::MAX, Ordering::SeqCst);
    log.append(triple()).await.unwrap();
    let error = feeder.flush(33, Duration::from_millis(300)).await.unwrap_err();
    assert_eq!((error.wanted, error.have), (33, 30));
    assert!(error.to_string().contains("out for lunch"), "{error}");
    assert_eq!(feeder.lag(), 3);
    assert!(feeder.last_error().unwrap().contains("out for lunch"));
    // The log takes on as if nothing were wrong, more than fits into memory by the event.
    for _ in 0..2000 {
        log.append(triple()).await.unwrap();
    }
    let before = flaky.calls.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let tried = flaky.calls.load(Ordering::SeqCst) - before;
    assert!((1..=20).contains(&tried), "{tried} tries in 100 ms: no backing off");
    flaky.failures.store(0, Ordering::SeqCst);
    feeder.flush(6033, Duration::from_secs(60)).await.unwrap();
    assert_eq!((feeder.lag(), feeder.last_error()), (0, None));
    let report = verify_chain(&*store, Some(&dir.path().join("log")), 10).await.unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.events, 6033);
}

#[tokio::test]
async fn a_feeder_that_dies_is_followed_by_one_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&StoreTarget::Sqlite(dir.path().join("weir.db"))).await.unwrap();
    let log = log(dir.path());
    for round in 1..=5u64 {
        let feeder = Feeder::start(log.clone(), store.clone(), None, quick()).await.unwrap();
        for _ in 0..20 {
            log.append(triple()).await.unwrap();
        }
        if round == 5 {
            feeder.stop(Duration::from_secs(30)).await.unwrap();
        }
    }
    assert_eq!(store.cursor("r1").await.unwrap(), 300);
    assert!(verify_chain(&*store, None, 10).await.unwrap().passed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_may_be_down_at_the_start_and_go_away_in_the_middle() {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let url = server.database().await;
    server.stop();

    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path());
    let store = open_store(&StoreTarget::Postgres(url)).await.unwrap();
    let feeder = Feeder::start(log.clone(), store.clone(), None, quick()).await.unwrap();
    log.append(triple()).await.unwrap();
    assert!(feeder.flush(3, Duration::from_millis(200)).await.is_err());
    assert!(feeder.last_error().is_some());

    let server = tokio::task::spawn_blocking(move || {
        server.resume();
        server
    });
    let server = server.await.unwrap();
    feeder.flush(3, Duration::from_secs(30)).await.unwrap();
    assert_eq!(feeder.last_error(), None);

    let server = tokio::task::spawn_blocking(move || {
        server.stop();
        server
    });
    let server = server.await.unwrap();
    for _ in 0..100 {
        log.append(triple()).await.unwrap();
    }
    assert!(feeder.flush(303, Duration::from_millis(200)).await.is_err());
    assert!(store.decisions(&DecisionFilter::default()).await.is_err());
    let server = tokio::task::spawn_blocking(move || {
        server.resume();
        server
    });
    let _server = server.await.unwrap();
    feeder.flush(303, Duration::from_secs(30)).await.unwrap();
    let report = verify_chain(&*store, Some(&dir.path().join("log")), 10).await.unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.events, 303);
}

/// Not a check but figures: `cargo test --test it measure_ingest -- --ignored --nocapture --test-threads 1`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn measure_ingest() {
    let dir = tempfile::tempdir().unwrap();
    let targets = [
        StoreTarget::Sqlite(dir.path().join("weir.db")),
        StoreTarget::Postgres(crate::support::postgres::database().await),
    ];
    for (name, make) in
        [("learned", testing::decision as fn(DecisionId, i64) -> Event), ("pass-through", testing::pass_through)]
    {
        for (i, target) in targets.iter().enumerate() {
            let options = LogOptions { replica: format!("{name}-{i}"), ..LogOptions::default() };
            let log = EventLog::open(&dir.path().join(format!("log-{name}-{i}")), options).unwrap();
            let store = open_store(target).await.unwrap();
            let triples = 170 * 60;
            for at in 0..triples {
                let id = DecisionId::new();
                log.append(vec![make(id, at), testing::attempt(id, at + 1), testing::outcome(id, at + 2)])
                    .await
                    .unwrap();
            }
            let events: Vec<Logged> = log.read_from(1).unwrap().collect::<Result<_, _>>().unwrap();
            store.ingest(&events[..510]).await.unwrap();
            let (cpu, wall) = (cpu_us(), std::time::Instant::now());
            for batch in events[510..].chunks(510) {
                store.ingest(batch).await.unwrap();
            }
            let done = (triples - 170) as f64;
            println!(
                "{} {name}: {:.1} µs CPU of this process, {:.1} µs wall per decision + attempt + outcome (batches of 510 events)",
                store.kind(),
                (cpu_us() - cpu) / done,
                wall.elapsed().as_secs_f64() * 1e6 / done
            );
        }
    }
}

/// CPU time of this process, all threads, user and system.
fn cpu_us() -> f64 {
    // SAFETY: all-zero bytes are a valid `rusage`, and the call writes nothing else.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let us = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    us(usage.ru_utime) + us(usage.ru_stime)
}
