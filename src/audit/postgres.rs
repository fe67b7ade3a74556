//! The record in PostgreSQL: for production, and for several weirs beside each other.
//!
//! Opening does not connect: a weir must come up while its database is down (the log takes the events meanwhile). The
//! first call that gets through brings the tables up to date.

mod ingest;
mod months;
mod read;

use std::{collections::BTreeSet, str::FromStr, sync::Mutex, time::Duration};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, PgPool, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::sync::OnceCell;

use super::{
    projection::{Projected, number},
    query::{DecisionFilter, DecisionRow},
    record::Logged,
    store::{AuditStore, Cursor, OpenDecision, Snapshot, StoreError, StoredEvent},
};
use crate::domain::{DecisionId, Hash, Micros, PolicyVersion, StateUpdate};

fn migrator() -> Migrator {
    Migrator::with_migrations(vec![Migration::new(
        1,
        "record".into(),
        MigrationType::Simple,
        include_str!("../../migrations/postgres/0001_record.sql").into_sql_str(),
        false,
    )])
}

/// The store of production.
pub struct PostgresStore {
    pool: PgPool,
    ready: OnceCell<()>,
    /// Months whose partitions this process knows to be there.
    months: Mutex<BTreeSet<months::Month>>,
}

impl PostgresStore {
    /// Makes a store of a connection URL; connects when it is first used.
    ///
    /// # Errors
    /// When the URL is none.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|e| StoreError::Unavailable(format!("the database URL is not one: {e}")))?
            .application_name("weir")
            .disable_statement_logging();
        let pool =
            PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(5)).connect_lazy_with(options);
        Ok(Self { pool, ready: OnceCell::new(), months: Mutex::default() })
    }

    /// The pool, once the tables are as this weir needs them.
    async fn pool(&self) -> Result<&PgPool, StoreError> {
        self.ready.get_or_try_init(|| async { migrator().run(&self.pool).await.map_err(StoreError::from) }).await?;
        Ok(&self.pool)
    }
}

#[async_trait]
impl AuditStore for PostgresStore {
    fn kind(&self) -> &'static str {
        "postgres"
    }

    async fn ingest(&self, batch: &[Logged]) -> Result<(), StoreError> {
        ingest::ingest(self.pool().await?, &self.months, batch).await
    }

    async fn replicas(&self) -> Result<Vec<Cursor>, StoreError> {
        let rows = sqlx::query("SELECT replica, seq, hash FROM feed_cursor ORDER BY replica COLLATE \"C\"")
            .fetch_all(self.pool().await?)
            .await?;
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
        read::decisions(self.pool().await?, filter).await
    }

    async fn decision_events(&self, ids: &[DecisionId]) -> Result<Vec<StoredEvent>, StoreError> {
        read::decision_events(self.pool().await?, ids).await
    }

    async fn ids_between(
        &self,
        first: DecisionId,
        last: DecisionId,
        limit: u32,
    ) -> Result<Vec<DecisionId>, StoreError> {
        let ids = sqlx::query_scalar("SELECT id FROM decisions WHERE id BETWEEN $1 AND $2 ORDER BY id LIMIT $3")
            .bind(first.0)
            .bind(last.0)
            .bind(i64::from(limit))
            .fetch_all(self.pool().await?)
            .await?;
        Ok(ids.into_iter().map(DecisionId).collect())
    }

    async fn stored_events(&self, replica: &str, from: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError> {
        read::stored_events(self.pool().await?, replica, from, limit).await
    }

    async fn projected(&self, replica: &str, from: u64, to: u64) -> Result<Vec<Projected>, StoreError> {
        read::projected(self.pool().await?, replica, number(from), number(to)).await
    }

    async fn projected_rows(&self, replica: &str, to: u64) -> Result<Vec<(&'static str, u64)>, StoreError> {
        read::projected_rows(self.pool().await?, replica, number(to)).await
    }

    async fn policy_versions(&self, name: &str) -> Result<Vec<(Hash, Micros)>, StoreError> {
        let rows = sqlx::query(
            "SELECT hash, (extract(epoch FROM at) * 1000000)::bigint FROM policy_versions WHERE name = $1 \
             ORDER BY at DESC, hash",
        )
        .bind(name)
        .fetch_all(self.pool().await?)
        .await?;
        rows.iter().map(|row| Ok((read::hash(row, 0)?, row.try_get(1)?))).collect()
    }

    async fn policy_version(&self, hash: Hash) -> Result<Option<PolicyVersion>, StoreError> {
        let record: Option<Vec<u8>> = sqlx::query_scalar(
            "SELECT e.record FROM policy_versions v JOIN events e ON e.replica = v.replica AND e.seq = v.seq \
             WHERE v.hash = $1",
        )
        .bind(hash.0.as_slice())
        .fetch_optional(self.pool().await?)
        .await?;
        record.map(super::query::policy_version).transpose()
    }

    async fn snapshot(&self, policy_hash: Hash, up_to: u64) -> Result<Option<Snapshot>, StoreError> {
        let row = sqlx::query(
            "SELECT state_seq, bytes FROM snapshots WHERE policy_hash = $1 AND state_seq <= $2 \
             ORDER BY state_seq DESC LIMIT 1",
        )
        .bind(policy_hash.0.as_slice())
        .bind(number(up_to))
        .fetch_optional(self.pool().await?)
        .await?;
        row.map(|row| {
            let state_seq = row.try_get::<i64, _>(0)? as u64;
            Ok(Snapshot { policy_hash, state_seq, bytes: row.try_get(1)? })
        })
        .transpose()
    }

    async fn save_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO snapshots (policy_hash, state_seq, bytes) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING")
            .bind(snapshot.policy_hash.0.as_slice())
            .bind(number(snapshot.state_seq))
            .bind(snapshot.bytes.as_slice())
            .execute(self.pool().await?)
            .await?;
        Ok(())
    }

    async fn state_updates(&self, policy_hash: Hash, from: u64, limit: usize) -> Result<Vec<StateUpdate>, StoreError> {
        let records: Vec<Vec<u8>> = sqlx::query_scalar(
            "SELECT e.record FROM state_updates u JOIN events e ON e.replica = u.replica AND e.seq = u.event_seq \
             WHERE u.policy_hash = $1 AND u.seq >= $2 ORDER BY u.seq LIMIT $3",
        )
        .bind(policy_hash.0.as_slice())
        .bind(number(from))
        .bind(number(limit as u64))
        .fetch_all(self.pool().await?)
        .await?;
        records.into_iter().map(super::query::state_update).collect()
    }

    async fn untaught(&self, policy_hash: Hash) -> Result<Vec<DecisionId>, StoreError> {
        let ids: Vec<uuid::Uuid> = sqlx::query_scalar(
            "SELECT DISTINCT d.id FROM feedback f JOIN decisions d ON d.id = f.decision_id \
             WHERE d.policy_hash = $1 AND d.decided_by = 'select' AND d.client_retry = 0 \
             AND NOT EXISTS (SELECT 1 FROM state_updates u WHERE u.decision_id = d.id) ORDER BY d.id",
        )
        .bind(policy_hash.0.as_slice())
        .fetch_all(self.pool().await?)
        .await?;
        Ok(ids.into_iter().map(DecisionId).collect())
    }

    async fn has_feedback_key(&self, decision: DecisionId, key: &str) -> Result<bool, StoreError> {
        let found: Option<i32> =
            sqlx::query_scalar("SELECT 1 FROM feedback WHERE decision_id = $1 AND idempotency_key = $2 LIMIT 1")
                .bind(decision.0)
                .bind(super::projection::text(key).into_owned())
                .fetch_optional(self.pool().await?)
                .await?;
        Ok(found.is_some())
    }

    async fn open_decisions(&self, replica: &str) -> Result<Vec<OpenDecision>, StoreError> {
        let rows = sqlx::query(
            "SELECT d.id, (extract(epoch FROM d.at) * 1000000)::bigint, \
                    (SELECT count(*) FROM attempts a WHERE a.decision_id = d.id), \
                    (SELECT coalesce(sum(cost_usd), 0) FROM attempts a WHERE a.decision_id = d.id) \
             FROM open_decisions d WHERE d.replica = $1 ORDER BY d.id",
        )
        .bind(replica)
        .fetch_all(self.pool().await?)
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
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "UPDATE events SET context = NULL, embedding = NULL, bodies = CASE WHEN $2 THEN NULL ELSE bodies END \
             WHERE decision_id = $1 \
               AND (context IS NOT NULL OR embedding IS NOT NULL OR ($2 AND bodies IS NOT NULL)) \
             RETURNING replica, seq",
        )
        .bind(id.0)
        .bind(bodies)
        .fetch_all(self.pool().await?)
        .await?;
        let mut erased: Vec<(String, u64)> = rows.into_iter().map(|(replica, seq)| (replica, seq as u64)).collect();
        erased.sort();
        Ok(erased)
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}
