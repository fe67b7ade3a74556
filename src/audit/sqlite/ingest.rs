//! Taking a batch of events in: one transaction, a handful of many-row inserts.
//!
//! Every statement is a round trip to the connection's thread, so rows go in by 256, 64, 16, 4 and 1: few statements
//! for a batch of any size, and few enough shapes that all stay prepared.

use std::sync::{Arc, OnceLock};

use sqlx::{Sqlite, SqliteConnection, SqlitePool, query::Query, sqlite::SqliteArguments};

use super::position;
use crate::{
    audit::{
        projection::{Batch, decided_by, eliminated, instant, number, text},
        record::Logged,
        store::StoreError,
    },
    domain::Hash,
};

type Bound<'q> = Query<'q, Sqlite, SqliteArguments>;

const SHAPES: [usize; 5] = [256, 64, 16, 4, 1];

/// An insert of many rows. The parts are constants, so the statements put together from them are too.
struct Insert {
    head: &'static str,
    row: &'static str,
    statements: OnceLock<[Arc<str>; SHAPES.len()]>,
}

impl Insert {
    const fn new(head: &'static str, row: &'static str) -> Self {
        Self { head, row, statements: OnceLock::new() }
    }

    fn statement(&self, shape: usize) -> Arc<str> {
        let statements = self.statements.get_or_init(|| {
            SHAPES.map(|rows| {
                let values = vec![self.row; rows].join(", ");
                Arc::from([self.head, " VALUES ", values.as_str(), " ON CONFLICT DO NOTHING"].concat())
            })
        });
        statements[shape].clone()
    }

    async fn run<T>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[T],
        bind: impl for<'q> Fn(Bound<'q>, &T) -> Bound<'q>,
    ) -> Result<(), StoreError> {
        let mut rest = rows;
        for (shape, &size) in SHAPES.iter().enumerate() {
            while rest.len() >= size {
                let (now, later) = rest.split_at(size);
                let query = sqlx::query(sqlx::AssertSqlSafe(self.statement(shape)));
                now.iter().fold(query, &bind).execute(&mut *connection).await?;
                rest = later;
            }
        }
        Ok(())
    }
}

static EVENTS: Insert = Insert::new(
    "INSERT INTO events (position, kind, decision_id, at, hash, prev, record, context, embedding, bodies)",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
);
static DECISIONS: Insert = Insert::new(
    "INSERT INTO decisions (id, position, at, policy, policy_hash, state_seq, decided_by, rule, arm, propensity, \
     model_requested, stream, key, tenant, session, client_retry, dry)",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
);
static CANDIDATES: Insert = Insert::new(
    "INSERT INTO candidates (decision_id, place, arm, score, propensity, eliminated)",
    "(?, ?, ?, ?, ?, ?)",
);
static ATTEMPTS: Insert = Insert::new(
    "INSERT INTO attempts (decision_id, place, position, why, model, model_reported, backend, started, ttft_us, \
     latency_us, prompt_tokens, cached_tokens, completion_tokens, cost_usd, error)",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
);
static OUTCOMES: Insert = Insert::new(
    "INSERT INTO outcomes (decision_id, position, at, status, served_by, attempts, cost_usd, latency_us, ttft_us, \
     prompt_tokens, completion_tokens, error)",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
);
static FEEDBACK: Insert = Insert::new(
    "INSERT INTO feedback (position, decision_id, at, source, name, value, idempotency_key)",
    "(?, ?, ?, ?, ?, ?, ?)",
);
static UPDATES: Insert = Insert::new(
    "INSERT INTO state_updates (policy_hash, seq, position, decision_id, arm, reward, propensity, decided)",
    "(?, ?, ?, ?, ?, ?, ?, ?)",
);
static OPENED: Insert = Insert::new("INSERT INTO open_decisions (id, replica, at)", "(?, ?, ?)");

fn optional(value: &Option<String>) -> Option<String> {
    value.as_deref().map(|v| text(v).into_owned())
}

fn owned(value: &str) -> String {
    text(value).into_owned()
}

/// Takes the events in that the store does not have yet.
pub(super) async fn ingest(pool: &SqlitePool, batch: &[Logged]) -> Result<(), StoreError> {
    let Some(first) = batch.first() else { return Ok(()) };
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let cursor: Option<(i64, i64, Vec<u8>)> =
        sqlx::query_as("SELECT number, seq, hash FROM feed_cursor WHERE replica = ?")
            .bind(first.replica.as_str())
            .fetch_optional(&mut *tx)
            .await?;
    let (replica, have, head) = match cursor {
        Some((replica, have, hash)) => (replica, have as u64, hash),
        None => {
            let replica =
                sqlx::query_scalar("INSERT INTO feed_cursor (replica, seq, hash) VALUES (?, 0, ?) RETURNING number")
                    .bind(first.replica.as_str())
                    .bind(Hash::ZERO.0.as_slice())
                    .fetch_one(&mut *tx)
                    .await?;
            (replica, 0, Hash::ZERO.0.to_vec())
        }
    };
    let new = crate::audit::store::not_yet(batch, have, &head)?;
    let Some(last) = new.last() else { return Ok(()) };
    write(&mut tx, replica, &Batch::new(new)).await?;
    sqlx::query("UPDATE feed_cursor SET seq = ?, hash = ? WHERE number = ?")
        .bind(number(last.seq))
        .bind(last.hash.0.as_slice())
        .bind(replica)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

async fn write(tx: &mut SqliteConnection, replica: i64, batch: &Batch<'_>) -> Result<(), StoreError> {
    let place = |seq: u64| position(replica, seq);
    EVENTS
        .run(tx, &batch.events, |query, logged| {
            query
                .bind(place(logged.seq))
                .bind(logged.event.kind().as_str())
                .bind(logged.event.decision.map(|id| id.0))
                .bind(instant(logged.event.at))
                .bind(logged.hash.0.to_vec())
                .bind(logged.prev.0.to_vec())
                .bind(logged.record.clone())
                .bind(logged.event.context.clone())
                .bind(logged.event.embedding.clone())
                .bind(logged.event.bodies.clone())
        })
        .await?;
    DECISIONS
        .run(tx, &batch.decisions, |query, row| {
            let (record, decision) = (row.body, &row.body.decision);
            query
                .bind(row.id.0)
                .bind(place(row.seq))
                .bind(row.at)
                .bind(owned(&decision.policy))
                .bind(decision.policy_hash.0.to_vec())
                .bind(number(decision.state_seq))
                .bind(decided_by(decision.decided_by))
                .bind(optional(&decision.rule))
                .bind(owned(&decision.arm))
                .bind(decision.propensity)
                .bind(owned(&record.model_requested))
                .bind(record.stream)
                .bind(owned(&record.key))
                .bind(owned(&record.tenant))
                .bind(owned(&record.session))
                .bind(record.client_retry)
                .bind(record.dry)
        })
        .await?;
    let candidates: Vec<_> = batch
        .decisions
        .iter()
        .flat_map(|row| row.body.decision.candidates.iter().enumerate().map(|(i, c)| (row.id, i as i64, c)))
        .collect();
    CANDIDATES
        .run(tx, &candidates, |query, (id, place, candidate)| {
            query
                .bind(id.0)
                .bind(*place)
                .bind(owned(&candidate.arm))
                .bind(candidate.score)
                .bind(candidate.propensity)
                .bind(candidate.eliminated.as_ref().map(eliminated))
        })
        .await?;
    ATTEMPTS
        .run(tx, &batch.attempts, |query, row| {
            let attempt = row.body;
            query
                .bind(row.id.0)
                .bind(attempt.index)
                .bind(place(row.seq))
                .bind(attempt.why.as_str())
                .bind(owned(&attempt.model))
                .bind(optional(&attempt.model_reported))
                .bind(owned(&attempt.backend))
                .bind(instant(attempt.started))
                .bind(attempt.ttft_us)
                .bind(attempt.latency_us)
                .bind(attempt.usage.prompt_tokens)
                .bind(attempt.usage.cached_tokens)
                .bind(attempt.usage.completion_tokens)
                .bind(attempt.cost_usd)
                .bind(optional(&attempt.error))
        })
        .await?;
    OUTCOMES
        .run(tx, &batch.outcomes, |query, row| {
            let outcome = row.body;
            query
                .bind(row.id.0)
                .bind(place(row.seq))
                .bind(row.at)
                .bind(outcome.status.as_str())
                .bind(owned(&outcome.served_by))
                .bind(outcome.attempts)
                .bind(outcome.cost_usd)
                .bind(outcome.latency_us)
                .bind(outcome.ttft_us)
                .bind(outcome.usage.prompt_tokens)
                .bind(outcome.usage.completion_tokens)
                .bind(optional(&outcome.error))
        })
        .await?;
    FEEDBACK
        .run(tx, &batch.feedback, |query, row| {
            query
                .bind(place(row.seq))
                .bind(row.id.0)
                .bind(row.at)
                .bind(owned(&row.body.source))
                .bind(owned(&row.body.name))
                .bind(row.body.value)
                .bind(optional(&row.body.idempotency_key))
        })
        .await?;
    UPDATES
        .run(tx, &batch.state_updates, |query, (seq, id, update)| {
            query
                .bind(update.policy_hash.0.to_vec())
                .bind(number(update.seq))
                .bind(place(*seq))
                .bind(id.map(|id| id.0))
                .bind(owned(&update.arm))
                .bind(update.reward)
                .bind(update.propensity)
                .bind(instant(update.decided))
        })
        .await?;
    for (seq, at, version) in &batch.policy_versions {
        sqlx::query(
            "INSERT INTO policy_versions (hash, position, at, name, file) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(version.hash.0.as_slice())
        .bind(place(*seq))
        .bind(*at)
        .bind(owned(&version.name))
        .bind(owned(&version.file))
        .execute(&mut *tx)
        .await?;
    }
    OPENED.run(tx, &batch.opened, |query, (id, at)| query.bind(id.0).bind(replica).bind(*at)).await?;
    for id in &batch.closed {
        sqlx::query("DELETE FROM open_decisions WHERE id = ?").bind(id.0).execute(&mut *tx).await?;
    }
    Ok(())
}
