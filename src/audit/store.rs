//! What a store must do. Two do it: [`super::sqlite`] (embedded, the default) and [`super::postgres`]; one contract suite
//! (`tests/audit_contract.rs`) holds both to it.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;

use super::{
    postgres::PostgresStore,
    projection::Projected,
    query::{DecisionFilter, DecisionRow, DecisionView},
    record::{Beside, Logged, RecordError},
    sqlite::SqliteStore,
};
use crate::domain::{DecisionId, Hash, Micros, PolicyVersion, StateUpdate};

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or did not answer in time; trying again may help.
    #[error("the store does not answer: {0}")]
    Unavailable(String),
    #[error("the store refused: {0}")]
    Database(#[source] sqlx::Error),
    #[error("the store's tables cannot be brought up to date: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error("the store ends with event {have} of `{replica}` and was given event {given}; some are missing between")]
    Gap { replica: String, have: u64, given: u64 },
    #[error(
        "the store's event {seq} of `{replica}` is not the one in this log: two logs feed the store under one name; \
         give this weir another replica name, or the store that belongs to its data directory"
    )]
    Forked { replica: String, seq: u64 },
    #[error("there is no record yet at {}; `weir serve` with this data directory makes one", .0.display())]
    Absent(PathBuf),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("a row of the store cannot be read: {0}")]
    Row(String),
    #[error(transparent)]
    Log(#[from] super::log::LogError),
}

impl StoreError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            StoreError::Unavailable(_) => "unavailable",
            StoreError::Database(_) => "database",
            StoreError::Migrate(_) => "migrate",
            StoreError::Gap { .. } => "gap",
            StoreError::Forked { .. } => "forked",
            StoreError::Absent(_) => "absent",
            StoreError::Record(_) => "record",
            StoreError::Row(_) => "row",
            StoreError::Log(_) => "log",
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Tls(_) => {
                StoreError::Unavailable(error.to_string())
            }
            other => StoreError::Database(other),
        }
    }
}

/// An event as the store holds it, not yet believed: `hash`, `prev`, `kind`, `decision` and `at` are columns, which
/// [`super::verify`] compares with the record.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredEvent {
    pub replica: String,
    pub seq: u64,
    pub kind: String,
    pub decision: Option<DecisionId>,
    pub at: Micros,
    pub hash: Hash,
    pub prev: Hash,
    pub record: Vec<u8>,
    pub beside: Beside,
}

impl StoredEvent {
    /// Reads the record.
    ///
    /// # Errors
    /// When it is no event of this version.
    pub fn parse(self) -> Result<Logged, StoreError> {
        Ok(Logged::parse(self.record, self.beside)?)
    }
}

/// How far one replica's log has come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub replica: String,
    /// The last event.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
}

/// A decision that has no outcome, with what is known of its calls.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenDecision {
    pub id: DecisionId,
    pub at: Micros,
    pub attempts: u32,
    pub cost_usd: f64,
}

/// A policy's state after `state_seq` updates, as the learner wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub policy_hash: Hash,
    pub state_seq: u64,
    pub bytes: Vec<u8>,
}

/// The part of a batch that a store at event `have` with hash `head` does not have yet, once it is known to follow.
pub(super) fn not_yet<'a>(batch: &'a [Logged], have: u64, head: &[u8]) -> Result<&'a [Logged], StoreError> {
    let new = &batch[batch.partition_point(|logged| logged.seq <= have)..];
    if let Some(known) = batch.iter().find(|logged| logged.seq == have)
        && known.hash.0 != *head
    {
        return Err(StoreError::Forked { replica: known.replica.clone(), seq: have });
    }
    if let Some(first) = new.first() {
        if first.seq != have + 1 {
            return Err(StoreError::Gap { replica: first.replica.clone(), have, given: first.seq });
        }
        if first.prev.0 != *head {
            return Err(StoreError::Forked { replica: first.replica.clone(), seq: have });
        }
    }
    Ok(new)
}

/// Events as [`AuditStore::decision_events`] gives them, apart by decision.
pub fn by_decision(events: Vec<StoredEvent>) -> Vec<Vec<StoredEvent>> {
    let mut out: Vec<Vec<StoredEvent>> = Vec::new();
    for event in events {
        match out.last_mut() {
            Some(last) if last[0].decision == event.decision => last.push(event),
            _ => out.push(vec![event]),
        }
    }
    out
}

/// Where the events end up, to be asked for.
///
/// Contract: `ingest` takes events of one replica in their order, is one transaction that also moves the cursor, and
/// skips what it already has; an event that fits no projection is still kept. Every other method may be called while
/// it runs. `Unavailable` is worth another try, nothing else is.
#[async_trait]
pub trait AuditStore: Send + Sync {
    /// `sqlite` or `postgres`.
    fn kind(&self) -> &'static str;

    /// Takes events of one replica in.
    async fn ingest(&self, batch: &[Logged]) -> Result<(), StoreError>;

    /// The last event taken in of a replica; 0 when there is none.
    async fn cursor(&self, replica: &str) -> Result<u64, StoreError> {
        Ok(self.replicas().await?.into_iter().find(|c| c.replica == replica).map_or(0, |c| c.seq))
    }

    /// All replicas that have fed this store, by name.
    async fn replicas(&self) -> Result<Vec<Cursor>, StoreError>;

    /// Decisions that pass the filter, newest (greatest id) first unless the filter wants the oldest.
    async fn decisions(&self, filter: &DecisionFilter) -> Result<Vec<DecisionRow>, StoreError>;

    /// All events of decisions: by decision, in the order in which they happened.
    async fn decision_events(&self, ids: &[DecisionId]) -> Result<Vec<StoredEvent>, StoreError>;

    /// Decisions whole, by id.
    async fn whole(&self, ids: &[DecisionId]) -> Result<Vec<DecisionView>, StoreError> {
        let events = self.decision_events(ids).await?;
        by_decision(events).into_iter().filter_map(|events| DecisionView::of(events).transpose()).collect()
    }

    /// One decision whole.
    async fn decision(&self, id: DecisionId) -> Result<Option<DecisionView>, StoreError> {
        Ok(self.whole(&[id]).await?.pop())
    }

    /// Ids from `first` to `last`, both included; at most `limit`, in order.
    async fn ids_between(&self, first: DecisionId, last: DecisionId, limit: u32)
    -> Result<Vec<DecisionId>, StoreError>;

    /// At most `limit` events of a replica from `from` on, in order, as stored.
    async fn stored_events(&self, replica: &str, from: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError>;

    /// At most `limit` events of a replica from `from` on, in order.
    async fn events(&self, replica: &str, from: u64, limit: usize) -> Result<Vec<Logged>, StoreError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        self.stored_events(replica, from, limit).await?.into_iter().map(StoredEvent::parse).collect()
    }

    /// The projections of events `from` to `to` (both included) of a replica, for [`super::verify`]; by event number.
    async fn projected(&self, replica: &str, from: u64, to: u64) -> Result<Vec<Projected>, StoreError>;

    /// Rows of each projected table ([`super::projection::Columns::table`]) that say they are of events up to `to` of a
    /// replica, for [`super::verify`].
    async fn projected_rows(&self, replica: &str, to: u64) -> Result<Vec<(&'static str, u64)>, StoreError>;

    /// The recorded versions of the policy of that name: hash and first use, newest first.
    async fn policy_versions(&self, name: &str) -> Result<Vec<(Hash, Micros)>, StoreError>;

    /// A policy version by its hash.
    async fn policy_version(&self, hash: Hash) -> Result<Option<PolicyVersion>, StoreError>;

    /// The snapshot of a policy's state with the greatest `state_seq` not above `up_to`.
    async fn snapshot(&self, policy_hash: Hash, up_to: u64) -> Result<Option<Snapshot>, StoreError>;

    /// Keeps a snapshot; the first of a `state_seq` stays.
    async fn save_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError>;

    /// A policy's updates with `seq` at or above `from`, in order, at most `limit`.
    async fn state_updates(&self, policy_hash: Hash, from: u64, limit: usize) -> Result<Vec<StateUpdate>, StoreError>;

    /// Decisions drawn by this policy version's selector that were judged and have taught nothing, oldest first. Repeats
    /// by the client are left out.
    async fn untaught(&self, policy_hash: Hash) -> Result<Vec<DecisionId>, StoreError>;

    /// Whether feedback with this idempotency key has come for the decision.
    async fn has_feedback_key(&self, decision: DecisionId, key: &str) -> Result<bool, StoreError>;

    /// Decisions of a replica that have no outcome and wait for one (dry ones and shadows do not), oldest first.
    async fn open_decisions(&self, replica: &str) -> Result<Vec<OpenDecision>, StoreError>;

    /// Erases context and embedding of a decision, and bodies too if asked; the chain still verifies. Gives back the
    /// replica and numbers of the events that held any, for [`super::EventLog::erase`] on the replica's own log.
    async fn erase_context(&self, id: DecisionId, bodies: bool) -> Result<Vec<(String, u64)>, StoreError>;

    /// Waits for connections to end and lets go of files.
    async fn close(&self);
}

/// Which store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreTarget {
    /// The file.
    Sqlite(PathBuf),
    /// A connection URL.
    Postgres(String),
}

impl StoreTarget {
    /// PostgreSQL where a URL is given, else `weir.db` in the data directory.
    ///
    /// # Errors
    /// When the URL is not one of PostgreSQL.
    pub fn choose(database_url: Option<&str>, data_dir: &std::path::Path) -> Result<Self, StoreError> {
        match database_url {
            None | Some("") => Ok(StoreTarget::Sqlite(data_dir.join("weir.db"))),
            Some(url) if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                Ok(StoreTarget::Postgres(url.to_owned()))
            }
            Some(url) => {
                let scheme = url.split(':').next().unwrap_or_default();
                Err(StoreError::Unavailable(format!(
                    "`{scheme}:` is no database that weir knows; use postgres://USER:PASSWORD@HOST/DATABASE, or no URL at all \
                     for the embedded SQLite"
                )))
            }
        }
    }
}

/// Opens a store, making it and bringing its tables up to date.
///
/// # Errors
/// [`StoreError::Unavailable`] when PostgreSQL does not answer; others when the store is not ours to use.
pub async fn open_store(target: &StoreTarget) -> Result<Arc<dyn AuditStore>, StoreError> {
    match target {
        StoreTarget::Sqlite(path) => Ok(Arc::new(SqliteStore::open(path, true).await?)),
        StoreTarget::Postgres(url) => Ok(Arc::new(PostgresStore::open(url).await?)),
    }
}

/// Opens a store that must be there already; for reading.
///
/// # Errors
/// [`StoreError::Absent`], and as [`open_store`].
pub async fn open_existing(target: &StoreTarget) -> Result<Arc<dyn AuditStore>, StoreError> {
    match target {
        StoreTarget::Sqlite(path) if !path.exists() => Err(StoreError::Absent(path.clone())),
        StoreTarget::Sqlite(path) => Ok(Arc::new(SqliteStore::open(path, false).await?)),
        StoreTarget::Postgres(url) => Ok(Arc::new(PostgresStore::open(url).await?)),
    }
}
