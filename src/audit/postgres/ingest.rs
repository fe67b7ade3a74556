//! Taking a batch of events in: one transaction, one insert per table, columns as arrays.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::months::Month;
use crate::{
    audit::{
        projection::{Batch, decided_by, eliminated, instant, jsonb, number, text},
        record::Logged,
        store::{StoreError, not_yet},
    },
    domain::Hash,
};

/// One column of a batch.
fn column<T, C>(rows: &[T], get: impl Fn(&T) -> C) -> Vec<C> {
    rows.iter().map(get).collect()
}

fn owned(value: &str) -> String {
    text(value).into_owned()
}

fn optional(value: &Option<String>) -> Option<String> {
    value.as_deref().map(owned)
}

/// Takes the events in that the store does not have yet.
pub(super) async fn ingest(pool: &PgPool, months: &Mutex<BTreeSet<Month>>, batch: &[Logged]) -> Result<(), StoreError> {
    let Some(first) = batch.first() else { return Ok(()) };
    let mut tx = pool.begin().await?;
    sqlx::query("INSERT INTO feed_cursor (replica, seq, hash) VALUES ($1, 0, $2) ON CONFLICT DO NOTHING")
        .bind(first.replica.as_str())
        .bind(Hash::ZERO.0.as_slice())
        .execute(&mut *tx)
        .await?;
    // The row's lock keeps two feeders of one replica in turn; the later one then finds its events taken in.
    let (have, head): (i64, Vec<u8>) =
        sqlx::query_as("SELECT seq, hash FROM feed_cursor WHERE replica = $1 FOR UPDATE")
            .bind(first.replica.as_str())
            .fetch_one(&mut *tx)
            .await?;
    let new = not_yet(batch, have as u64, &head)?;
    let Some(last) = new.last() else { return Ok(()) };
    let made = make_months(&mut tx, months, new).await?;
    write(&mut tx, &first.replica, &Batch::new(new)).await?;
    sqlx::query("UPDATE feed_cursor SET seq = $2, hash = $3 WHERE replica = $1")
        .bind(first.replica.as_str())
        .bind(number(last.seq))
        .bind(last.hash.0.as_slice())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    months.lock().unwrap_or_else(PoisonError::into_inner).extend(made);
    Ok(())
}

/// Makes the partitions that these events need, and tells which they are.
async fn make_months(
    tx: &mut PgConnection,
    known: &Mutex<BTreeSet<Month>>,
    events: &[Logged],
) -> Result<BTreeSet<Month>, StoreError> {
    let mut needed: BTreeSet<Month> =
        events.iter().filter_map(|logged| logged.event.decision).filter_map(|id| Month::of(id.0)).collect();
    {
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        needed.retain(|month| !known.contains(month));
    }
    for month in &needed {
        let (first, past) = month.range();
        sqlx::query("SELECT weir_make_month($1, $2, $3)")
            .bind(month.name())
            .bind(first)
            .bind(past)
            .execute(&mut *tx)
            .await?;
    }
    Ok(needed)
}

async fn write(tx: &mut PgConnection, replica: &str, batch: &Batch<'_>) -> Result<(), StoreError> {
    let events = &batch.events;
    sqlx::query(
        "INSERT INTO events (replica, seq, kind, decision_id, at, hash, prev, record, context, embedding, bodies) \
         SELECT $1, seq, kind, decision_id, 'epoch'::timestamptz + at * interval '1 microsecond', hash, prev, record, \
                context, embedding, bodies \
         FROM UNNEST($2::bigint[], $3::text[], $4::uuid[], $5::bigint[], $6::bytea[], $7::bytea[], $8::bytea[], \
                     $9::bytea[], $10::bytea[], $11::bytea[]) \
              AS e (seq, kind, decision_id, at, hash, prev, record, context, embedding, bodies) \
         ON CONFLICT DO NOTHING",
    )
    .bind(replica)
    .bind(column(events, |e| number(e.seq)))
    .bind(column(events, |e| e.event.kind().as_str()))
    .bind(column(events, |e| e.event.decision.map(|id| id.0)))
    .bind(column(events, |e| instant(e.event.at)))
    .bind(column(events, |e| e.hash.0.as_slice()))
    .bind(column(events, |e| e.prev.0.as_slice()))
    .bind(column(events, |e| e.record.as_slice()))
    .bind(column(events, |e| e.event.context.as_deref()))
    .bind(column(events, |e| e.event.embedding.as_deref()))
    .bind(column(events, |e| e.event.bodies.as_deref()))
    .execute(&mut *tx)
    .await?;
    decisions(tx, replica, batch).await?;
    calls(tx, replica, batch).await?;
    learning(tx, replica, batch).await?;
    if !batch.opened.is_empty() {
        sqlx::query(
            "INSERT INTO open_decisions (id, replica, at) \
             SELECT id, $1, 'epoch'::timestamptz + at * interval '1 microsecond' \
             FROM UNNEST($2::uuid[], $3::bigint[]) AS o (id, at) ON CONFLICT DO NOTHING",
        )
        .bind(replica)
        .bind(column(&batch.opened, |(id, _)| id.0))
        .bind(column(&batch.opened, |(_, at)| *at))
        .execute(&mut *tx)
        .await?;
    }
    if !batch.closed.is_empty() {
        sqlx::query("DELETE FROM open_decisions WHERE id = ANY ($1::uuid[])")
            .bind(column(&batch.closed, |id| id.0))
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

async fn decisions(tx: &mut PgConnection, replica: &str, batch: &Batch<'_>) -> Result<(), StoreError> {
    let rows = &batch.decisions;
    if rows.is_empty() {
        return Ok(());
    }
    let records: std::collections::BTreeMap<u64, &Logged> =
        batch.events.iter().map(|logged| (logged.seq, *logged)).collect();
    sqlx::query(
        "INSERT INTO decisions (id, replica, seq, at, policy, policy_hash, state_seq, decided_by, rule, arm, \
                                propensity, model_requested, stream, key, tenant, session, client_retry, dry, body) \
         SELECT id, $1, seq, 'epoch'::timestamptz + at * interval '1 microsecond', policy, policy_hash, state_seq, \
                decided_by, rule, arm, propensity, model_requested, stream, key, tenant, session, client_retry, dry, \
                body::jsonb -> 'body' \
         FROM UNNEST($2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6::bytea[], $7::bigint[], $8::text[], \
                     $9::text[], $10::text[], $11::float8[], $12::text[], $13::bool[], $14::text[], $15::text[], \
                     $16::text[], $17::bigint[], $18::bool[], $19::text[]) \
              AS d (id, seq, at, policy, policy_hash, state_seq, decided_by, rule, arm, propensity, model_requested, \
                    stream, key, tenant, session, client_retry, dry, body) \
         ON CONFLICT DO NOTHING",
    )
    .bind(replica)
    .bind(column(rows, |r| r.id.0))
    .bind(column(rows, |r| number(r.seq)))
    .bind(column(rows, |r| r.at))
    .bind(column(rows, |r| owned(&r.body.decision.policy)))
    .bind(column(rows, |r| r.body.decision.policy_hash.0.to_vec()))
    .bind(column(rows, |r| number(r.body.decision.state_seq)))
    .bind(column(rows, |r| decided_by(r.body.decision.decided_by)))
    .bind(column(rows, |r| optional(&r.body.decision.rule)))
    .bind(column(rows, |r| owned(&r.body.decision.arm)))
    .bind(column(rows, |r| r.body.decision.propensity))
    .bind(column(rows, |r| owned(&r.body.model_requested)))
    .bind(column(rows, |r| r.body.stream))
    .bind(column(rows, |r| owned(&r.body.key)))
    .bind(column(rows, |r| owned(&r.body.tenant)))
    .bind(column(rows, |r| owned(&r.body.session)))
    .bind(column(rows, |r| i64::from(r.body.client_retry)))
    .bind(column(rows, |r| r.body.dry))
    .bind(column(rows, |r| records.get(&r.seq).map(|logged| jsonb(&logged.record).into_owned())))
    .execute(&mut *tx)
    .await?;

    let candidates: Vec<_> = rows
        .iter()
        .flat_map(|row| row.body.decision.candidates.iter().enumerate().map(|(i, c)| (row.id.0, i as i64, c)))
        .collect();
    if candidates.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO candidates (decision_id, place, arm, score, propensity, eliminated) \
         SELECT * FROM UNNEST($1::uuid[], $2::bigint[], $3::text[], $4::float8[], $5::float8[], $6::text[]) \
         ON CONFLICT DO NOTHING",
    )
    .bind(column(&candidates, |(id, _, _)| *id))
    .bind(column(&candidates, |(_, place, _)| *place))
    .bind(column(&candidates, |(_, _, c)| owned(&c.arm)))
    .bind(column(&candidates, |(_, _, c)| c.score))
    .bind(column(&candidates, |(_, _, c)| c.propensity))
    .bind(column(&candidates, |(_, _, c)| c.eliminated.as_ref().map(eliminated)))
    .execute(&mut *tx)
    .await?;
    Ok(())
}

async fn calls(tx: &mut PgConnection, replica: &str, batch: &Batch<'_>) -> Result<(), StoreError> {
    let rows = &batch.attempts;
    if !rows.is_empty() {
        sqlx::query(
            "INSERT INTO attempts (replica, decision_id, place, seq, why, model, model_reported, backend, started, \
                                   ttft_us, latency_us, prompt_tokens, cached_tokens, completion_tokens, cost_usd, \
                                   error) \
             SELECT $1, decision_id, place, seq, why, model, model_reported, backend, \
                    'epoch'::timestamptz + started * interval '1 microsecond', ttft_us, latency_us, prompt_tokens, \
                    cached_tokens, completion_tokens, cost_usd, error \
             FROM UNNEST($2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::text[], \
                         $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], \
                         $15::float8[], $16::text[]) \
                  AS a (decision_id, place, seq, why, model, model_reported, backend, started, ttft_us, latency_us, \
                        prompt_tokens, cached_tokens, completion_tokens, cost_usd, error) \
             ON CONFLICT DO NOTHING",
        )
        .bind(replica)
        .bind(column(rows, |r| r.id.0))
        .bind(column(rows, |r| i64::from(r.body.index)))
        .bind(column(rows, |r| number(r.seq)))
        .bind(column(rows, |r| r.body.why.as_str()))
        .bind(column(rows, |r| owned(&r.body.model)))
        .bind(column(rows, |r| optional(&r.body.model_reported)))
        .bind(column(rows, |r| owned(&r.body.backend)))
        .bind(column(rows, |r| instant(r.body.started)))
        .bind(column(rows, |r| r.body.ttft_us))
        .bind(column(rows, |r| r.body.latency_us))
        .bind(column(rows, |r| i64::from(r.body.usage.prompt_tokens)))
        .bind(column(rows, |r| i64::from(r.body.usage.cached_tokens)))
        .bind(column(rows, |r| i64::from(r.body.usage.completion_tokens)))
        .bind(column(rows, |r| r.body.cost_usd))
        .bind(column(rows, |r| optional(&r.body.error)))
        .execute(&mut *tx)
        .await?;
    }
    let rows = &batch.outcomes;
    if !rows.is_empty() {
        sqlx::query(
            "INSERT INTO outcomes (replica, decision_id, seq, at, status, served_by, attempts, cost_usd, latency_us, \
                                   ttft_us, prompt_tokens, completion_tokens, error) \
             SELECT $1, decision_id, seq, 'epoch'::timestamptz + at * interval '1 microsecond', status, served_by, \
                    attempts, cost_usd, latency_us, ttft_us, prompt_tokens, completion_tokens, error \
             FROM UNNEST($2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::bigint[], $8::float8[], \
                         $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::text[]) \
                  AS o (decision_id, seq, at, status, served_by, attempts, cost_usd, latency_us, ttft_us, \
                        prompt_tokens, completion_tokens, error) \
             ON CONFLICT DO NOTHING",
        )
        .bind(replica)
        .bind(column(rows, |r| r.id.0))
        .bind(column(rows, |r| number(r.seq)))
        .bind(column(rows, |r| r.at))
        .bind(column(rows, |r| r.body.status.as_str()))
        .bind(column(rows, |r| owned(&r.body.served_by)))
        .bind(column(rows, |r| i64::from(r.body.attempts)))
        .bind(column(rows, |r| r.body.cost_usd))
        .bind(column(rows, |r| r.body.latency_us))
        .bind(column(rows, |r| r.body.ttft_us))
        .bind(column(rows, |r| i64::from(r.body.usage.prompt_tokens)))
        .bind(column(rows, |r| i64::from(r.body.usage.completion_tokens)))
        .bind(column(rows, |r| optional(&r.body.error)))
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

async fn learning(tx: &mut PgConnection, replica: &str, batch: &Batch<'_>) -> Result<(), StoreError> {
    let rows = &batch.feedback;
    if !rows.is_empty() {
        sqlx::query(
            "INSERT INTO feedback (replica, seq, decision_id, at, source, name, value, idempotency_key) \
             SELECT $1, seq, decision_id, 'epoch'::timestamptz + at * interval '1 microsecond', source, name, value, \
                    idempotency_key \
             FROM UNNEST($2::bigint[], $3::uuid[], $4::bigint[], $5::text[], $6::text[], $7::float8[], $8::text[]) \
                  AS f (seq, decision_id, at, source, name, value, idempotency_key) \
             ON CONFLICT DO NOTHING",
        )
        .bind(replica)
        .bind(column(rows, |r| number(r.seq)))
        .bind(column(rows, |r| r.id.0))
        .bind(column(rows, |r| r.at))
        .bind(column(rows, |r| owned(&r.body.source)))
        .bind(column(rows, |r| owned(&r.body.name)))
        .bind(column(rows, |r| r.body.value))
        .bind(column(rows, |r| optional(&r.body.idempotency_key)))
        .execute(&mut *tx)
        .await?;
    }
    let rows = &batch.state_updates;
    if !rows.is_empty() {
        let ids: Vec<Option<Uuid>> = column(rows, |(_, id, _)| id.map(|id| id.0));
        sqlx::query(
            "INSERT INTO state_updates (replica, policy_hash, seq, event_seq, decision_id, arm, reward, propensity, \
                                        decided) \
             SELECT $1, policy_hash, seq, event_seq, decision_id, arm, reward, propensity, \
                    'epoch'::timestamptz + decided * interval '1 microsecond' \
             FROM UNNEST($2::bytea[], $3::bigint[], $4::bigint[], $5::uuid[], $6::text[], $7::float8[], $8::float8[], \
                         $9::bigint[]) \
                  AS u (policy_hash, seq, event_seq, decision_id, arm, reward, propensity, decided) \
             ON CONFLICT DO NOTHING",
        )
        .bind(replica)
        .bind(column(rows, |(_, _, u)| u.policy_hash.0.to_vec()))
        .bind(column(rows, |(_, _, u)| number(u.seq)))
        .bind(column(rows, |(seq, _, _)| number(*seq)))
        .bind(ids)
        .bind(column(rows, |(_, _, u)| owned(&u.arm)))
        .bind(column(rows, |(_, _, u)| u.reward))
        .bind(column(rows, |(_, _, u)| u.propensity))
        .bind(column(rows, |(_, _, u)| instant(u.decided)))
        .execute(&mut *tx)
        .await?;
    }
    for (seq, at, version) in &batch.policy_versions {
        sqlx::query(
            "INSERT INTO policy_versions (hash, replica, seq, at, name, file) \
             VALUES ($1, $2, $3, 'epoch'::timestamptz + $4::bigint * interval '1 microsecond', $5, $6) \
             ON CONFLICT DO NOTHING",
        )
        .bind(version.hash.0.as_slice())
        .bind(replica)
        .bind(number(*seq))
        .bind(*at)
        .bind(owned(&version.name))
        .bind(owned(&version.file))
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}
