//! The record in SQLite: the embedded default, one file in the data directory, in WAL mode, so that the command line
//! reads beside a running weir. One connection writes, a few read.

mod ingest;
mod read;

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use sqlx::{
    Row, SqlSafeStr, SqlitePool,
    migrate::{Migration, MigrationType, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::{
    projection::{Projected, number},
    query::{DecisionFilter, DecisionRow},
    record::Logged,
    store::{AuditStore, Cursor, OpenDecision, Snapshot, StoreError, StoredEvent},
};
use crate::domain::{DecisionId, Hash, Micros, PolicyVersion, StateUpdate};

/// `position` = replica number * 2^44 + sequence number.
const REPLICA_SHIFT: u32 = 44;

fn position(replica: i64, seq: u64) -> i64 {
    (replica << REPLICA_SHIFT) | number(seq).min((1 << REPLICA_SHIFT) - 1)
}

fn migrator() -> Migrator {
    Migrator::with_migrations(vec![Migration::new(
        1,
        "record".into(),
        MigrationType::Simple,
        include_str!("../../migrations/sqlite/0001_record.sql").into_sql_str(),
        false,
    )])
}

/// The embedded store.
pub struct SqliteStore {
    write: SqlitePool,
    read: SqlitePool,
}

impl SqliteStore {
    /// Opens the file, making it where `create` says so, and brings its tables up to date.
    ///
    /// # Errors
    /// When it cannot be opened, is no SQLite file, or was written by a later weir.
    pub async fn open(path: &Path, create: bool) -> Result<Self, StoreError> {
        if let (true, Some(dir)) = (create, path.parent()) {
            std::fs::create_dir_all(dir)
                .map_err(|e| StoreError::Unavailable(format!("cannot create {}: {e}", dir.display())))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            // The log is the first hop: what a power cut takes from the store is fed again.
            .synchronous(SqliteSynchronous::Normal)
            .statement_cache_capacity(256)
            .foreign_keys(false)
            .busy_timeout(Duration::from_secs(10));
        let named = |error: sqlx::Error| StoreError::Unavailable(format!("{}: {error}", path.display()));
        let write = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await.map_err(named)?;
        migrator().run(&write).await?;
        let read = SqlitePoolOptions::new().max_connections(3).min_connections(0).connect_lazy_with(options);
        Ok(Self { write, read })
    }

    /// Number of a replica within this store; `None` when it has never fed it.
    async fn replica_number(&self, replica: &str) -> Result<Option<i64>, StoreError> {
        Ok(sqlx::query_scalar("SELECT number FROM feed_cursor WHERE replica = ?")
            .bind(replica)
            .fetch_optional(&self.read)
            .await?)
    }
}

#[async_trait]
impl AuditStore for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn ingest(&self, batch: &[Logged]) -> Result<(), StoreError> {
        ingest::ingest(&self.write, batch).await
    }

    async fn replicas(&self) -> Result<Vec<Cursor>, StoreError> {
        let rows =
            sqlx::query("SELECT replica, seq, hash FROM feed_cursor ORDER BY replica").fetch_all(&self.read).await?;
        rows.iter()
            .map(|row| {
                Ok(Cursor {
                    replica: row.try_get(0)?,
                    seq: row.try_get::<i64, _>(1)? as u64,
                    hash: read::hash(row, 2)?,
                })
            })
            .collect()
    }

    async fn decisions(&self, filter: &DecisionFilter) -> Result<Vec<DecisionRow>, StoreError> {
        read::decisions(&self.read, filter).await
    }

    async fn decision_events(&self, ids: &[DecisionId]) -> Result<Vec<StoredEvent>, StoreError> {
        read::decision_events(&self.read, ids).await
    }

    async fn ids_between(
        &self,
        first: DecisionId,
        last: DecisionId,
        limit: u32,
    ) -> Result<Vec<DecisionId>, StoreError> {
        let ids = sqlx::query_scalar("SELECT id FROM decisions WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?")
            .bind(first.0)
            .bind(last.0)
            .bind(limit)
            .fetch_all(&self.read)
            .await?;
        Ok(ids.into_iter().map(DecisionId).collect())
    }

    async fn stored_events(&self, replica: &str, from: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError> {
        let Some(replica) = self.replica_number(replica).await? else { return Ok(Vec::new()) };
        read::stored_events(&self.read, replica, from, limit).await
    }

    async fn projected(&self, replica: &str, from: u64, to: u64) -> Result<Vec<Projected>, StoreError> {
        let Some(replica) = self.replica_number(replica).await? else { return Ok(Vec::new()) };
        read::projected(&self.read, position(replica, from), position(replica, to)).await
    }

    async fn projected_rows(&self, replica: &str, to: u64) -> Result<Vec<(&'static str, u64)>, StoreError> {
        let Some(replica) = self.replica_number(replica).await? else { return Ok(Vec::new()) };
        read::projected_rows(&self.read, position(replica, 0), position(replica, to)).await
    }

    async fn policy_versions(&self, name: &str) -> Result<Vec<(Hash, Micros)>, StoreError> {
        let rows = sqlx::query("SELECT hash, at FROM policy_versions WHERE name = ? ORDER BY at DESC, hash")
            .bind(name)
            .fetch_all(&self.read)
            .await?;
        rows.iter().map(|row| Ok((read::hash(row, 0)?, row.try_get(1)?))).collect()
    }

    async fn policy_version(&self, hash: Hash) -> Result<Option<PolicyVersion>, StoreError> {
        let record: Option<Vec<u8>> = sqlx::query_scalar(
            "SELECT e.record FROM policy_versions v JOIN events e ON e.position = v.position WHERE v.hash = ?",
        )
        .bind(hash.0.as_slice())
        .fetch_optional(&self.read)
        .await?;
        record.map(super::query::policy_version).transpose()
    }

    async fn snapshot(&self, policy_hash: Hash, up_to: u64) -> Result<Option<Snapshot>, StoreError> {
        let row = sqlx::query(
            "SELECT state_seq, bytes FROM snapshots WHERE policy_hash = ? AND state_seq <= ? \
             ORDER BY state_seq DESC LIMIT 1",
        )
        .bind(policy_hash.0.as_slice())
        .bind(number(up_to))
        .fetch_optional(&self.read)
        .await?;
        row.map(|row| {
            let state_seq = row.try_get::<i64, _>(0)? as u64;
            Ok(Snapshot { policy_hash, state_seq, bytes: row.try_get(1)? })
        })
        .transpose()
    }

    async fn save_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO snapshots (policy_hash, state_seq, bytes) VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
            .bind(snapshot.policy_hash.0.as_slice())
            .bind(number(snapshot.state_seq))
            .bind(snapshot.bytes.as_slice())
            .execute(&self.write)
            .await?;
        Ok(())
    }

    async fn state_updates(&self, policy_hash: Hash, from: u64, limit: usize) -> Result<Vec<StateUpdate>, StoreError> {
        let records: Vec<Vec<u8>> = sqlx::query_scalar(
            "SELECT e.record FROM state_updates u JOIN events e ON e.position = u.position \
             WHERE u.policy_hash = ? AND u.seq >= ? ORDER BY u.seq LIMIT ?",
        )
        .bind(policy_hash.0.as_slice())
        .bind(number(from))
        .bind(number(limit as u64))
        .fetch_all(&self.read)
        .await?;
        records.into_iter().map(super::query::state_update).collect()
    }

    async fn untaught(&self, policy_hash: Hash) -> Result<Vec<DecisionId>, StoreError> {
        let ids: Vec<uuid::Uuid> = sqlx::query_scalar(
            "SELECT DISTINCT d.id FROM feedback f JOIN decisions d ON d.id = f.decision_id \
             WHERE d.policy_hash = ? AND d.decided_by = 'select' AND d.client_retry = 0 \
             AND NOT EXISTS (SELECT 1 FROM state_updates u WHERE u.decision_id = d.id) ORDER BY d.id",
        )
        .bind(policy_hash.0.as_slice())
        .fetch_all(&self.read)
        .await?;
        Ok(ids.into_iter().map(DecisionId).collect())
    }

    async fn has_feedback_key(&self, decision: DecisionId, key: &str) -> Result<bool, StoreError> {
        let found: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM feedback WHERE decision_id = ? AND idempotency_key = ? LIMIT 1")
                .bind(decision.0)
                .bind(super::projection::text(key).into_owned())
                .fetch_optional(&self.read)
                .await?;
        Ok(found.is_some())
    }

    async fn open_decisions(&self, replica: &str) -> Result<Vec<OpenDecision>, StoreError> {
        let rows = sqlx::query(
            "SELECT d.id, d.at, \
                    (SELECT count(*) FROM attempts a WHERE a.decision_id = d.id), \
                    (SELECT coalesce(sum(cost_usd), 0.0) FROM attempts a WHERE a.decision_id = d.id) \
             FROM open_decisions d JOIN feed_cursor c ON c.number = d.replica WHERE c.replica = ? ORDER BY d.id",
        )
        .bind(replica)
        .fetch_all(&self.read)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(OpenDecision {
                    id: DecisionId(row.try_get(0)?),
                    at: row.try_get(1)?,
                    attempts: row.try_get::<i64, _>(2)? as u32,
                    cost_usd: row.try_get(3)?,
                })
            })
            .collect()
    }

    async fn erase_context(&self, id: DecisionId, bodies: bool) -> Result<Vec<(String, u64)>, StoreError> {
        let mut connection = self.write.acquire().await?;
        // What is erased is to be gone from the file too, not only from the tables.
        sqlx::query("PRAGMA secure_delete = ON").execute(&mut *connection).await?;
        let positions: Vec<i64> = sqlx::query_scalar(
            "UPDATE events SET context = NULL, embedding = NULL, bodies = CASE WHEN ?2 THEN NULL ELSE bodies END \
             WHERE decision_id = ?1 \
               AND (context IS NOT NULL OR embedding IS NOT NULL OR (?2 AND bodies IS NOT NULL)) RETURNING position",
        )
        .bind(id.0)
        .bind(bodies)
        .fetch_all(&mut *connection)
        .await?;
        sqlx::query("PRAGMA secure_delete = OFF").execute(&mut *connection).await?;
        // The old pages are in the WAL file until a checkpoint has moved the new ones over.
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut *connection).await?;
        drop(connection);
        let mut erased = Vec::with_capacity(positions.len());
        for at in positions {
            let replica: String = sqlx::query_scalar("SELECT replica FROM feed_cursor WHERE number = ?")
                .bind(at >> REPLICA_SHIFT)
                .fetch_one(&self.read)
                .await?;
            erased.push((replica, (at & ((1 << REPLICA_SHIFT) - 1)) as u64));
        }
        erased.sort();
        Ok(erased)
    }

    async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }
}
