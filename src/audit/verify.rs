//! Is the record whole and unchanged? Walks every chain of a store from its first event: numbers without gaps, links
//! from record to record, hashes of records and of what lies beside them, and the columns against the records.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use super::{
    log::LogError,
    projection::{Projected, instant},
    reader::LogReader,
    record::{Beside, Head, Logged},
    store::{AuditStore, StoreError, StoredEvent},
};
use crate::domain::{EventBody, Hash};

/// Events asked of the store at once.
const PAGE: u32 = 500;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub replica: String,
    pub seq: u64,
    pub what: String,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Chains walked.
    pub replicas: usize,
    /// Events whose record and place were checked.
    pub events: u64,
    /// Contexts and embeddings that were checked against their hash. (The hashes of bodies are those of the request and the
    /// answer as they were, which a redacted body does not have.)
    pub beside: u64,
    /// Contexts and embeddings that were erased; their hashes stand.
    pub erased: u64,
    /// Events of the log that the store does not have yet; checked against the store's end.
    pub not_ingested: u64,
    /// All problems.
    pub problem_count: u64,
    /// The first problems, as many as were asked for.
    pub problems: Vec<Problem>,
    #[serde(skip)]
    keep: usize,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn passed(&self) -> bool {
        self.problem_count == 0
    }

    fn problem(&mut self, replica: &str, seq: u64, what: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < self.keep {
            self.problems.push(Problem { replica: replica.to_owned(), seq, what: what.into() });
        }
    }

    /// Checks one event's place in the chain and its hashes; gives back the event where its record can be read.
    fn check(&mut self, replica: &str, place: &mut (u64, Hash), record: Vec<u8>, beside: Beside) -> Option<Logged> {
        let expected = place.0 + 1;
        self.events += 1;
        let hash = Hash::of(&record);
        let head = match Head::parse(&record) {
            Ok(head) => head,
            Err(error) => {
                self.problem(replica, expected, format!("the record cannot be read: {error}"));
                *place = (expected, hash);
                return None;
            }
        };
        if head.replica != replica {
            self.problem(replica, head.seq, format!("the record is one of `{}`", head.replica));
        }
        if head.seq != expected {
            self.problem(replica, expected, format!("missing; the record here is event {}", head.seq));
        }
        if head.prev != place.1 {
            self.problem(
                replica,
                head.seq,
                format!("links to {}, but the record before it hashes to {}", head.prev.short(), place.1.short()),
            );
        }
        *place = (head.seq, hash);
        match Logged::parse(record, beside) {
            Ok(logged) => {
                self.check_beside(&logged);
                Some(logged)
            }
            Err(error) => {
                self.problem(replica, head.seq, error.to_string());
                None
            }
        }
    }

    fn check_beside(&mut self, logged: &Logged) {
        let event = &logged.event;
        let (context, embedding) = match &event.body {
            EventBody::Decision(record) => (record.context_hash, record.embedding_hash),
            _ => (None, None),
        };
        self.check_part(logged, "context", context, event.context.as_deref());
        self.check_part(logged, "embedding", embedding, event.embedding.as_deref());
    }

    fn check_part(&mut self, logged: &Logged, name: &str, hash: Option<Hash>, bytes: Option<&[u8]>) {
        match (hash, bytes) {
            (Some(hash), Some(bytes)) => {
                self.beside += 1;
                if Hash::of(bytes) != hash {
                    self.problem(&logged.replica, logged.seq, format!("the {name} is not the one that was recorded"));
                }
            }
            (Some(_), None) => self.erased += 1,
            (None, Some(_)) => {
                self.problem(&logged.replica, logged.seq, format!("the {name} has no hash in its record"));
            }
            (None, None) => {}
        }
    }

    fn check_columns(&mut self, stored: &StoredEvent, logged: &Logged) {
        let wrong = [
            (stored.seq != logged.seq, "sequence number"),
            (stored.hash != logged.hash, "hash"),
            (stored.prev != logged.prev, "link"),
            (stored.kind != logged.event.kind().as_str(), "kind"),
            (stored.decision != logged.event.decision, "decision id"),
            (stored.at != instant(logged.event.at), "time"),
        ];
        for (_, name) in wrong.iter().filter(|(wrong, _)| *wrong) {
            self.problem(&stored.replica, stored.seq, format!("the {name} beside the record is not the record's"));
        }
    }
}

/// Verifies every chain of a store. With `log_dir`, events of that log which the store does not have yet are verified
/// as its continuation. At most `keep` problems are listed; all are counted.
///
/// # Errors
/// When the store or the log cannot be read; damage to the log is a problem in the report.
pub async fn verify_chain(
    store: &dyn AuditStore,
    log_dir: Option<&Path>,
    keep: usize,
) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport { keep, ..VerifyReport::default() };
    let cursors = store.replicas().await?;
    let mut ends = Vec::new();
    for cursor in &cursors {
        report.replicas += 1;
        let end = verify_replica(store, &cursor.replica, cursor.seq, &mut report).await?;
        if end != (cursor.seq, cursor.hash) {
            let what = format!(
                "the store says that its last event is {} ({}), and ends with event {} ({})",
                cursor.seq,
                cursor.hash.short(),
                end.0,
                end.1.short()
            );
            report.problem(&cursor.replica, cursor.seq, what);
        }
        ends.push((cursor.replica.clone(), end));
    }
    if let Some(dir) = log_dir {
        verify_tail(store, dir, &ends, &mut report).await?;
    }
    Ok(report)
}

async fn verify_replica(
    store: &dyn AuditStore,
    replica: &str,
    last: u64,
    report: &mut VerifyReport,
) -> Result<(u64, Hash), StoreError> {
    let mut place = (0, Hash::ZERO);
    let mut from = 1;
    let mut matched: BTreeMap<&'static str, u64> = BTreeMap::new();
    loop {
        // Not beyond the cursor as it was: a running weir goes on appending, and its projections come with its events.
        let page = store.stored_events(replica, from, PAGE).await?;
        let page: Vec<StoredEvent> = page.into_iter().take_while(|event| event.seq <= last).collect();
        let Some(to) = page.last().map(|event| event.seq) else { break };
        let mut projected = store.projected(replica, from, to).await?.into_iter().peekable();
        from = to + 1;
        for mut stored in page {
            let record = std::mem::take(&mut stored.record);
            let logged = report.check(replica, &mut place, record, std::mem::take(&mut stored.beside));
            let mut columns = None;
            while let Some(row) = projected.next_if(|row| row.seq <= stored.seq) {
                *matched.entry(row.columns.table()).or_default() += 1;
                columns = Some(row);
            }
            let Some(logged) = logged else { continue };
            report.check_columns(&stored, &logged);
            check_projection(store, &logged, columns, report).await?;
        }
    }
    for (table, rows) in store.projected_rows(replica, last).await? {
        let of_events = matched.get(table).copied().unwrap_or(0);
        if rows > of_events {
            report.problem(replica, last, format!("{} rows of table {table} belong to no event", rows - of_events));
        }
    }
    Ok(place)
}

/// Compares an event's columns with its record. An event without columns is in order when another event of the same
/// key came first (a second outcome, a policy version recorded again): the first one stays.
async fn check_projection(
    store: &dyn AuditStore,
    logged: &Logged,
    columns: Option<Projected>,
    report: &mut VerifyReport,
) -> Result<(), StoreError> {
    let Some(expected) = Projected::expected(logged) else { return Ok(()) };
    match columns {
        Some(columns) if columns == expected => {}
        Some(_) => report.problem(
            &logged.replica,
            logged.seq,
            format!("the columns of this {} are not what its record says", logged.event.kind().as_str()),
        ),
        None => {
            let superseded = match (&logged.event.body, logged.event.decision) {
                (EventBody::StateUpdate(update), _) => {
                    let first = store.state_updates(update.policy_hash, update.seq, 1).await?;
                    first.first().is_some_and(|found| found.seq == update.seq)
                }
                (body, Some(id)) => {
                    let events = store.decision_events(&[id]).await?;
                    events.into_iter().filter(|e| e.replica != logged.replica || e.seq != logged.seq).any(|event| {
                        event.parse().is_ok_and(|other| match (&other.event.body, body) {
                            (EventBody::Attempt(a), EventBody::Attempt(b)) => a.index == b.index,
                            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
                        })
                    })
                }
                _ => false,
            };
            if !superseded {
                let what = format!("this {} has no row in its table", logged.event.kind().as_str());
                report.problem(&logged.replica, logged.seq, what);
            }
        }
    }
    Ok(())
}

async fn verify_tail(
    store: &dyn AuditStore,
    dir: &Path,
    ends: &[(String, (u64, Hash))],
    report: &mut VerifyReport,
) -> Result<(), StoreError> {
    // Whose log it is, its first event tells.
    let Some(first) = LogReader::at_rest(dir, 1)?.next() else { return Ok(()) };
    let replica = match first {
        Ok(logged) => logged.replica,
        Err(error) => return corrupt(error, "log", 0, report),
    };
    let mut place = ends.iter().find(|(name, _)| *name == replica).map_or((0, Hash::ZERO), |(_, end)| *end);
    for logged in LogReader::at_rest(dir, place.0 + 1)? {
        match logged {
            Ok(logged) => {
                if report.not_ingested == 0
                    && logged.seq > place.0 + 1
                    && store.cursor(&replica).await? >= logged.seq - 1
                {
                    // A running weir has fed these events and removed their segments while the store was walked.
                    place = (logged.seq - 1, logged.prev);
                }
                report.not_ingested += 1;
                let beside = beside(&logged);
                report.check(&replica, &mut place, logged.record, beside);
            }
            Err(error) => return corrupt(error, &replica, place.0 + 1, report),
        }
    }
    Ok(())
}

fn corrupt(error: LogError, replica: &str, seq: u64, report: &mut VerifyReport) -> Result<(), StoreError> {
    match error {
        LogError::Corrupt { .. } => {
            report.problem(replica, seq, error.to_string());
            Ok(())
        }
        other => Err(other.into()),
    }
}

fn beside(logged: &Logged) -> Beside {
    let event = &logged.event;
    Beside { context: event.context.clone(), embedding: event.embedding.clone(), bodies: event.bodies.clone() }
}

/// Verifies the log's files alone: from the first segment that is still there to the last whole event.
///
/// # Errors
/// When the directory cannot be read.
pub fn verify_log(dir: &Path, keep: usize) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport { keep, ..VerifyReport::default() };
    let mut place: Option<(u64, Hash)> = None;
    for logged in LogReader::at_rest(dir, 1)? {
        match logged {
            Ok(logged) => {
                // Segments before the first one were ingested and removed; what it links to is in the store.
                let mut here = place.unwrap_or((logged.seq - 1, logged.prev));
                report.replicas = 1;
                let beside = beside(&logged);
                report.check(&logged.replica, &mut here, logged.record, beside);
                place = Some(here);
            }
            Err(error) => {
                corrupt(error, "log", place.map_or(1, |(seq, _)| seq + 1), &mut report)?;
                break;
            }
        }
    }
    Ok(report)
}
