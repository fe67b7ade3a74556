//! Queries over more than one table, and rows turned into values.

use sqlx::{QueryBuilder, Row, Sqlite, SqlitePool, sqlite::SqliteRow};

use super::{REPLICA_SHIFT, position};
use crate::{
    audit::{
        projection::{Columns, Projected, TABLES, text},
        query::{DecisionFilter, DecisionRow},
        record::Beside,
        store::{StoreError, StoredEvent},
    },
    domain::{DecisionId, Hash},
};

const SEQ_MASK: i64 = (1 << REPLICA_SHIFT) - 1;

pub(super) fn hash(row: &SqliteRow, column: usize) -> Result<Hash, StoreError> {
    let bytes: &[u8] = row.try_get(column)?;
    bytes.try_into().map(Hash).map_err(|_| StoreError::Row(format!("a hash of {} bytes", bytes.len())))
}

fn seq(row: &SqliteRow, column: usize) -> Result<u64, StoreError> {
    Ok((row.try_get::<i64, _>(column)? & SEQ_MASK) as u64)
}

pub(super) async fn decisions(pool: &SqlitePool, filter: &DecisionFilter) -> Result<Vec<DecisionRow>, StoreError> {
    let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
        "SELECT d.id, d.position, d.at, c.replica, d.policy, d.policy_hash, d.state_seq, d.decided_by, d.rule, d.arm, \
         d.propensity, d.model_requested, d.stream, d.key, d.tenant, d.session, d.client_retry, d.dry, o.status, \
         o.served_by, o.attempts, o.cost_usd, o.latency_us, o.ttft_us, o.prompt_tokens, o.completion_tokens, o.error, \
         (SELECT sum(a.prompt_tokens + a.completion_tokens) FROM attempts a WHERE a.decision_id = d.id) \
         FROM decisions d JOIN feed_cursor c ON c.number = d.position >> 44 \
         LEFT JOIN outcomes o ON o.decision_id = d.id WHERE TRUE",
    );
    if let Some(id) = filter.before {
        query.push(" AND d.id < ").push_bind(id.0);
    }
    if let Some(id) = filter.after {
        query.push(" AND d.id > ").push_bind(id.0);
    }
    if let Some(at) = filter.since {
        query.push(" AND d.at >= ").push_bind(at);
    }
    if let Some(at) = filter.until {
        query.push(" AND d.at < ").push_bind(at);
    }
    for (column, value) in [
        (" AND d.policy = ", &filter.policy),
        (" AND d.arm = ", &filter.arm),
        (" AND o.served_by = ", &filter.model),
        (" AND d.session = ", &filter.session),
        (" AND d.tenant = ", &filter.tenant),
        (" AND d.decided_by = ", &filter.decided_by),
    ] {
        if let Some(value) = value {
            query.push(column).push_bind(text(value).into_owned());
        }
    }
    match filter.status.as_deref() {
        None => {}
        Some("open") => {
            query.push(" AND o.status IS NULL AND NOT d.dry AND d.decided_by <> 'shadow'");
        }
        Some(status) => {
            query.push(" AND o.status = ").push_bind(text(status).into_owned());
        }
    }
    query
        .push(if filter.oldest_first { " ORDER BY d.id LIMIT " } else { " ORDER BY d.id DESC LIMIT " })
        .push_bind(filter.rows());
    let rows = query.build().fetch_all(pool).await?;
    rows.iter()
        .map(|row| {
            Ok(DecisionRow {
                id: DecisionId(row.try_get(0)?),
                seq: seq(row, 1)?,
                at: row.try_get(2)?,
                replica: row.try_get(3)?,
                policy: row.try_get(4)?,
                policy_hash: hash(row, 5)?,
                state_seq: row.try_get::<i64, _>(6)? as u64,
                decided_by: row.try_get(7)?,
                rule: row.try_get(8)?,
                arm: row.try_get(9)?,
                propensity: row.try_get(10)?,
                model_requested: row.try_get(11)?,
                stream: row.try_get(12)?,
                key: row.try_get(13)?,
                tenant: row.try_get(14)?,
                session: row.try_get(15)?,
                client_retry: row.try_get(16)?,
                dry: row.try_get(17)?,
                status: row.try_get(18)?,
                served_by: row.try_get(19)?,
                attempts: row.try_get(20)?,
                cost_usd: row.try_get(21)?,
                latency_us: row.try_get(22)?,
                ttft_us: row.try_get(23)?,
                prompt_tokens: row.try_get(24)?,
                completion_tokens: row.try_get(25)?,
                error: row.try_get(26)?,
                tokens: row.try_get::<Option<i64>, _>(27)?.map(|tokens| tokens as u64),
            })
        })
        .collect()
}

/// Columns: position, replica, kind, decision_id, at, hash, prev, record, context, embedding, bodies.
fn stored_event(row: &SqliteRow) -> Result<StoredEvent, StoreError> {
    Ok(StoredEvent {
        seq: seq(row, 0)?,
        replica: row.try_get(1)?,
        kind: row.try_get(2)?,
        decision: row.try_get::<Option<_>, _>(3)?.map(DecisionId),
        at: row.try_get(4)?,
        hash: hash(row, 5)?,
        prev: hash(row, 6)?,
        record: row.try_get(7)?,
        beside: Beside { context: row.try_get(8)?, embedding: row.try_get(9)?, bodies: row.try_get(10)? },
    })
}

pub(super) async fn decision_events(pool: &SqlitePool, ids: &[DecisionId]) -> Result<Vec<StoredEvent>, StoreError> {
    let mut out = Vec::new();
    // A statement has at most 32,766 values.
    for ids in ids.chunks(1000) {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
            "SELECT e.position, c.replica, e.kind, e.decision_id, e.at, e.hash, e.prev, e.record, e.context, e.embedding, \
         e.bodies FROM events e JOIN feed_cursor c ON c.number = e.position >> 44 WHERE e.decision_id IN (",
        );
        let mut list = query.separated(", ");
        ids.iter().for_each(|id| _ = list.push_bind(id.0));
        query.push(") ORDER BY e.decision_id, e.at, c.replica, e.position");
        let rows = query.build().fetch_all(pool).await?;
        rows.iter().try_for_each(|row| stored_event(row).map(|event| out.push(event)))?;
    }
    Ok(out)
}

pub(super) async fn stored_events(
    pool: &SqlitePool,
    replica: i64,
    from: u64,
    limit: u32,
) -> Result<Vec<StoredEvent>, StoreError> {
    let rows = sqlx::query(
        "SELECT e.position, c.replica, e.kind, e.decision_id, e.at, e.hash, e.prev, e.record, e.context, e.embedding, \
         e.bodies FROM events e JOIN feed_cursor c ON c.number = ?1 \
         WHERE e.position BETWEEN ?2 AND ?3 ORDER BY e.position LIMIT ?4",
    )
    .bind(replica)
    .bind(position(replica, from))
    .bind(position(replica, u64::MAX))
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter().map(stored_event).collect()
}

/// Each table is reached by its key, from the events of the stretch.
pub(super) async fn projected(pool: &SqlitePool, first: i64, last: i64) -> Result<Vec<Projected>, StoreError> {
    let mut out = Vec::new();
    let rows = sqlx::query(
        "SELECT d.position, d.id, d.at, d.policy, d.policy_hash, d.state_seq, d.decided_by, d.rule, d.arm, d.propensity, \
         d.model_requested, d.key, d.tenant, d.session, d.dry FROM events e \
         JOIN decisions d ON d.id = e.decision_id AND d.position = e.position WHERE e.position BETWEEN ? AND ? \
         AND e.kind = 'decision'",
    )
    .bind(first)
    .bind(last)
    .fetch_all(pool)
    .await?;
    for row in &rows {
        let columns = Columns::Decision {
            at: row.try_get(2)?,
            policy: row.try_get(3)?,
            policy_hash: hash(row, 4)?,
            state_seq: row.try_get::<i64, _>(5)? as u64,
            decided_by: row.try_get(6)?,
            rule: row.try_get(7)?,
            arm: row.try_get(8)?,
            propensity: row.try_get(9)?,
            model_requested: row.try_get(10)?,
            key: row.try_get(11)?,
            tenant: row.try_get(12)?,
            session: row.try_get(13)?,
            dry: row.try_get(14)?,
        };
        out.push(Projected { seq: seq(row, 0)?, id: Some(DecisionId(row.try_get(1)?)), columns });
    }
    let rows = sqlx::query(
        "SELECT a.position, a.decision_id, a.place, a.why, a.model, a.latency_us, a.cost_usd, a.error FROM events e \
         JOIN attempts a ON a.decision_id = e.decision_id AND a.position = e.position WHERE e.position BETWEEN ? AND ? \
         AND e.kind = 'attempt'",
    )
    .bind(first)
    .bind(last)
    .fetch_all(pool)
    .await?;
    for row in &rows {
        let columns = Columns::Attempt {
            index: row.try_get(2)?,
            why: row.try_get(3)?,
            model: row.try_get(4)?,
            latency_us: row.try_get(5)?,
            cost_usd: row.try_get(6)?,
            error: row.try_get(7)?,
        };
        out.push(Projected { seq: seq(row, 0)?, id: Some(DecisionId(row.try_get(1)?)), columns });
    }
    let rows = sqlx::query(
        "SELECT o.position, o.decision_id, o.at, o.status, o.served_by, o.attempts, o.latency_us, o.cost_usd, o.error \
         FROM events e JOIN outcomes o ON o.decision_id = e.decision_id AND o.position = e.position \
         WHERE e.position BETWEEN ? AND ? \
         AND e.kind = 'outcome'",
    )
    .bind(first)
    .bind(last)
    .fetch_all(pool)
    .await?;
    for row in &rows {
        let columns = Columns::Outcome {
            at: row.try_get(2)?,
            status: row.try_get(3)?,
            served_by: row.try_get(4)?,
            attempts: row.try_get(5)?,
            latency_us: row.try_get(6)?,
            cost_usd: row.try_get(7)?,
            error: row.try_get(8)?,
        };
        out.push(Projected { seq: seq(row, 0)?, id: Some(DecisionId(row.try_get(1)?)), columns });
    }
    let rows = sqlx::query(
        "SELECT f.position, f.decision_id, f.source, f.name, f.value \
         FROM feedback f JOIN events e ON e.position = f.position AND e.kind = 'feedback' \
         WHERE f.position BETWEEN ? AND ?",
    )
    .bind(first)
    .bind(last)
    .fetch_all(pool)
    .await?;
    for row in &rows {
        let columns = Columns::Feedback { source: row.try_get(2)?, name: row.try_get(3)?, value: row.try_get(4)? };
        out.push(Projected { seq: seq(row, 0)?, id: Some(DecisionId(row.try_get(1)?)), columns });
    }
    let rows = sqlx::query(
        "SELECT u.position, u.decision_id, u.policy_hash, u.seq, u.arm, u.reward \
         FROM state_updates u JOIN events e ON e.position = u.position AND e.kind = 'state_update' \
         WHERE u.position BETWEEN ? AND ?",
    )
    .bind(first)
    .bind(last)
    .fetch_all(pool)
    .await?;
    for row in &rows {
        let columns = Columns::StateUpdate {
            policy_hash: hash(row, 2)?,
            update_seq: row.try_get::<i64, _>(3)? as u64,
            arm: row.try_get(4)?,
            reward: row.try_get(5)?,
        };
        let id = row.try_get::<Option<_>, _>(1)?.map(DecisionId);
        out.push(Projected { seq: seq(row, 0)?, id, columns });
    }
    out.sort_by_key(|projected| projected.seq);
    Ok(out)
}

/// In the order of [`TABLES`].
pub(super) async fn projected_rows(
    pool: &SqlitePool,
    first: i64,
    last: i64,
) -> Result<Vec<(&'static str, u64)>, StoreError> {
    // One row: the branches of a UNION come in any order once a planner runs them side by side.
    let counts: (i64, i64, i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM decisions WHERE position BETWEEN ?1 AND ?2), \
         (SELECT count(*) FROM attempts WHERE position BETWEEN ?1 AND ?2), \
         (SELECT count(*) FROM outcomes WHERE position BETWEEN ?1 AND ?2), \
         (SELECT count(*) FROM feedback WHERE position BETWEEN ?1 AND ?2), \
         (SELECT count(*) FROM state_updates WHERE position BETWEEN ?1 AND ?2)",
    )
    .bind(first)
    .bind(last)
    .fetch_one(pool)
    .await?;
    let counts = [counts.0, counts.1, counts.2, counts.3, counts.4];
    Ok(TABLES.into_iter().zip(counts.map(|count| count as u64)).collect())
}
