//! A store with the log that feeds it, and one suite of tests for both kinds of store.

use std::sync::Arc;

use weir::{
    audit::{AuditStore, EventLog, LogOptions, StoreTarget, open_store, record::Logged, testing, verify_chain},
    domain::{DecisionId, Event},
};

/// A store, the log that feeds it, and a way to tamper with it.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub log: EventLog,
    pub store: Arc<dyn AuditStore>,
    pub target: StoreTarget,
}

impl Fixture {
    pub async fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let target = StoreTarget::Sqlite(dir.path().join("weir.db"));
        Self::new(dir, target).await
    }

    pub async fn postgres() -> Self {
        Self::new(tempfile::tempdir().unwrap(), StoreTarget::Postgres(crate::support::postgres::database().await)).await
    }

    pub async fn new(dir: tempfile::TempDir, target: StoreTarget) -> Self {
        let options = LogOptions { replica: "r1".to_owned(), ..LogOptions::default() };
        let log = EventLog::open(&dir.path().join("log"), options).unwrap();
        let store = open_store(&target).await.unwrap();
        Self { dir, log, store, target }
    }

    /// Appends, and takes all that is new into the store.
    pub async fn record(&self, events: Vec<Event>) -> Vec<Logged> {
        let from = self.log.last_seq() + 1;
        self.log.append(events).await.unwrap();
        let logged = self.read(from);
        self.store.ingest(&logged).await.unwrap();
        logged
    }

    pub fn read(&self, from: u64) -> Vec<Logged> {
        self.log.read_from(from).unwrap().collect::<Result<_, _>>().unwrap()
    }

    /// Runs the statement of this store, behind its back.
    pub async fn tamper(&self, sqlite: &'static str, postgres: &'static str) {
        let changed = match &self.target {
            StoreTarget::Sqlite(path) => {
                let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
                let mut db = sqlx::ConnectOptions::connect(&options).await.unwrap();
                sqlx::query(sqlite).execute(&mut db).await.unwrap().rows_affected()
            }
            StoreTarget::Postgres(url) => {
                let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
                let mut db = sqlx::ConnectOptions::connect(&options).await.unwrap();
                sqlx::query(postgres).execute(&mut db).await.unwrap().rows_affected()
            }
        };
        assert!(changed > 0, "nothing was tampered with");
    }

    pub async fn problems(&self) -> Vec<(u64, String)> {
        let report = verify_chain(&*self.store, None, 100).await.unwrap();
        assert_eq!(report.problem_count as usize, report.problems.len());
        report.problems.into_iter().map(|problem| (problem.seq, problem.what)).collect()
    }

    pub async fn assert_passes(&self) {
        let report = verify_chain(&*self.store, Some(&self.dir.path().join("log")), 10).await.unwrap();
        assert!(report.passed(), "{report:?}");
    }
}

/// Makes two tests of each named function, one with a fixture of either store.
#[macro_export]
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name($crate::support::store::Fixture::sqlite().await).await })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name($crate::support::store::Fixture::postgres().await).await })*
        }
    };
}

/// A decision, its call and its end.
pub fn triple(id: DecisionId, at: i64) -> Vec<Event> {
    vec![testing::decision(id, at), testing::attempt(id, at + 1), testing::outcome(id, at + 2)]
}

/// So many fresh ids, in order.
pub fn ids(count: usize) -> Vec<DecisionId> {
    let mut ids: Vec<DecisionId> = (0..count).map(|_| DecisionId::new()).collect();
    ids.sort_unstable();
    ids
}
