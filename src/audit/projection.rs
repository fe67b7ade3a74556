//! From records to the rows of a store. Both stores write exactly these values, and `verify` makes them again from the
//! records and compares. Text loses U+0000 on the way (PostgreSQL has no such character); the record keeps it.

use std::{borrow::Cow, collections::HashSet};

use super::record::Logged;
use crate::domain::{
    Attempt, DecidedBy, DecisionId, DecisionRecord, Elimination, EventBody, Feedback, Hash, Micros, Outcome,
    PolicyVersion, StateUpdate,
};

/// Text as a store can hold it: U+FFFD for U+0000.
pub fn text(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// A time as a store can hold it: from 1970 to 2255, beyond which PostgreSQL would count it out in inexact doubles.
pub fn instant(at: Micros) -> Micros {
    at.clamp(0, 1 << 53)
}

/// A number as a store can hold it.
pub fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// What eliminated a candidate, as `capability: tools`.
pub fn eliminated(elimination: &Elimination) -> String {
    let (by, detail) = match elimination {
        Elimination::Restriction(detail) => ("restriction", detail),
        Elimination::Capability(detail) => ("capability", detail),
        Elimination::Context(detail) => ("context", detail),
        Elimination::Unavailable(detail) => ("unavailable", detail),
        Elimination::Condition(detail) => ("condition", detail),
        Elimination::Budget(detail) => ("budget", detail),
    };
    text(&format!("{by}: {detail}")).into_owned()
}

/// The word for what decided.
pub fn decided_by(decided_by: DecidedBy) -> &'static str {
    match decided_by {
        DecidedBy::Rule => "rule",
        DecidedBy::Select => "select",
        DecidedBy::Pinned => "pinned",
        DecidedBy::Shadow => "shadow",
        DecidedBy::Refused => "refused",
    }
}

/// A projected event: its place, and the part of its body that has columns.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a, T> {
    pub seq: u64,
    pub at: Micros,
    pub id: DecisionId,
    pub body: &'a T,
}

/// A batch taken apart by table, in order. An event that lacks what its table needs (an attempt without a decision) has
/// no projection; its record is kept all the same.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    pub events: Vec<&'a Logged>,
    pub decisions: Vec<Row<'a, DecisionRecord>>,
    pub attempts: Vec<Row<'a, Attempt>>,
    pub outcomes: Vec<Row<'a, Outcome>>,
    pub feedback: Vec<Row<'a, Feedback>>,
    pub state_updates: Vec<(u64, Option<DecisionId>, &'a StateUpdate)>,
    pub policy_versions: Vec<(u64, Micros, &'a PolicyVersion)>,
    /// Decisions of this batch that wait for an outcome which is not in it.
    pub opened: Vec<(DecisionId, Micros)>,
    /// Outcomes of this batch whose decision is not in it.
    pub closed: Vec<DecisionId>,
}

impl<'a> Batch<'a> {
    /// Takes events apart.
    pub fn new(events: impl IntoIterator<Item = &'a Logged>) -> Self {
        let mut batch = Self::default();
        for logged in events {
            batch.events.push(logged);
            let (seq, at) = (logged.seq, instant(logged.event.at));
            match (&logged.event.body, logged.event.decision) {
                (EventBody::Decision(body), Some(id)) => batch.decisions.push(Row { seq, at, id, body }),
                (EventBody::Attempt(body), Some(id)) => batch.attempts.push(Row { seq, at, id, body }),
                (EventBody::Outcome(body), Some(id)) => batch.outcomes.push(Row { seq, at, id, body }),
                (EventBody::Feedback(body), Some(id)) => batch.feedback.push(Row { seq, at, id, body }),
                (EventBody::StateUpdate(body), id) => batch.state_updates.push((seq, id, body)),
                (EventBody::PolicyVersion(body), _) => batch.policy_versions.push((seq, at, body)),
                _ => {}
            }
        }
        let ended: HashSet<DecisionId> = batch.outcomes.iter().map(|row| row.id).collect();
        let begun: HashSet<DecisionId> = batch.decisions.iter().map(|row| row.id).collect();
        let waits = |row: &&Row<'a, DecisionRecord>| {
            !row.body.dry && row.body.decision.decided_by != DecidedBy::Shadow && !ended.contains(&row.id)
        };
        batch.opened = batch.decisions.iter().filter(waits).map(|row| (row.id, row.at)).collect();
        batch.closed = ended.into_iter().filter(|id| !begun.contains(id)).collect();
        batch.closed.sort_unstable();
        batch
    }
}

/// What a store's columns say of one event: those of its projection that queries rely on.
#[derive(Clone, Debug, PartialEq)]
pub struct Projected {
    pub seq: u64,
    pub id: Option<DecisionId>,
    pub columns: Columns,
}

/// By table.
#[derive(Clone, Debug, PartialEq)]
pub enum Columns {
    Decision {
        at: Micros,
        policy: String,
        policy_hash: Hash,
        state_seq: u64,
        decided_by: String,
        rule: Option<String>,
        arm: String,
        propensity: f64,
        model_requested: String,
        key: String,
        tenant: String,
        session: String,
        dry: bool,
    },
    Attempt {
        index: u32,
        why: String,
        model: String,
        latency_us: i64,
        cost_usd: f64,
        error: Option<String>,
    },
    Outcome {
        at: Micros,
        status: String,
        served_by: String,
        attempts: u32,
        latency_us: i64,
        cost_usd: f64,
        error: Option<String>,
    },
    Feedback {
        source: String,
        name: String,
        value: f64,
    },
    StateUpdate {
        policy_hash: Hash,
        update_seq: u64,
        arm: String,
        reward: f64,
    },
}

/// The tables whose rows are compared with records.
pub const TABLES: [&str; 5] = ["decisions", "attempts", "outcomes", "feedback", "state_updates"];

impl Columns {
    /// The table's name, one of [`TABLES`].
    pub fn table(&self) -> &'static str {
        match self {
            Columns::Decision { .. } => "decisions",
            Columns::Attempt { .. } => "attempts",
            Columns::Outcome { .. } => "outcomes",
            Columns::Feedback { .. } => "feedback",
            Columns::StateUpdate { .. } => "state_updates",
        }
    }
}

impl Projected {
    /// What the columns of `logged` have to be; `None` for events that are not compared.
    pub fn expected(logged: &Logged) -> Option<Self> {
        let owned = |value: &str| text(value).into_owned();
        let optional = |value: &Option<String>| value.as_deref().map(|v| text(v).into_owned());
        let at = instant(logged.event.at);
        let columns = match &logged.event.body {
            EventBody::Decision(record) => Columns::Decision {
                at,
                policy: owned(&record.decision.policy),
                policy_hash: record.decision.policy_hash,
                state_seq: record.decision.state_seq,
                decided_by: decided_by(record.decision.decided_by).to_owned(),
                rule: optional(&record.decision.rule),
                arm: owned(&record.decision.arm),
                propensity: record.decision.propensity,
                model_requested: owned(&record.model_requested),
                key: owned(&record.key),
                tenant: owned(&record.tenant),
                session: owned(&record.session),
                dry: record.dry,
            },
            EventBody::Attempt(attempt) => Columns::Attempt {
                index: attempt.index,
                why: attempt.why.as_str().to_owned(),
                model: owned(&attempt.model),
                latency_us: attempt.latency_us,
                cost_usd: attempt.cost_usd,
                error: optional(&attempt.error),
            },
            EventBody::Outcome(outcome) => Columns::Outcome {
                at,
                status: outcome.status.as_str().to_owned(),
                served_by: owned(&outcome.served_by),
                attempts: outcome.attempts,
                latency_us: outcome.latency_us,
                cost_usd: outcome.cost_usd,
                error: optional(&outcome.error),
            },
            EventBody::Feedback(feedback) => Columns::Feedback {
                source: owned(&feedback.source),
                name: owned(&feedback.name),
                value: feedback.value,
            },
            EventBody::StateUpdate(update) => Columns::StateUpdate {
                policy_hash: update.policy_hash,
                update_seq: update.seq,
                arm: owned(&update.arm),
                reward: update.reward,
            },
            EventBody::Note(_) | EventBody::PolicyVersion(_) | EventBody::Admin(_) => return None,
        };
        let has_row = logged.event.decision.is_some() || matches!(columns, Columns::StateUpdate { .. });
        has_row.then_some(Self { seq: logged.seq, id: logged.event.decision, columns })
    }
}

/// A record's JSON as PostgreSQL's jsonb takes it: the escape of U+0000 becomes that of U+FFFD.
pub fn jsonb(record: &[u8]) -> Cow<'_, str> {
    let text = String::from_utf8_lossy(record);
    if !text.contains("\\u0000") {
        return text;
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] != b'\\' {
            out.push(bytes[i]);
            i += 1;
        } else if bytes[i..].starts_with(b"\\u0000") {
            out.extend_from_slice(b"\\ufffd");
            i += 6;
        } else {
            // An escaped backslash is skipped whole, so that `\\u0000` (a backslash and five characters) stays.
            out.extend_from_slice(&bytes[i..(i + 2).min(bytes.len())]);
            i += 2;
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{record::Draft, testing};

    fn logged(events: Vec<crate::domain::Event>) -> Vec<Logged> {
        let mut prev = Hash::ZERO;
        let place = |(i, event)| {
            let logged = Draft::new(event).unwrap().place("r", b"\"r\"", i as u64 + 1, prev);
            prev = logged.hash;
            logged
        };
        events.into_iter().enumerate().map(place).collect()
    }

    #[test]
    fn decisions_and_outcomes_of_one_batch_cancel_out() {
        let [a, b, c, d] = [(); 4].map(|()| DecisionId::new());
        let events = logged(vec![
            testing::decision(a, 1),
            testing::outcome(a, 2),
            testing::decision(b, 3),
            testing::outcome(c, 4),
            testing::decision_with(d, 5, |record| record.dry = true),
        ]);
        let batch = Batch::new(&events);
        assert_eq!(batch.opened, [(b, 3)]);
        assert_eq!(batch.closed, [c]);
        assert_eq!((batch.events.len(), batch.decisions.len(), batch.outcomes.len()), (5, 3, 2));
    }

    #[test]
    fn jsonb_loses_nul_and_nothing_that_looks_like_it() {
        assert_eq!(
            jsonb(br#"{"a":"x\u0000y","b":"\\u0000","c":"\\\u0000"}"#),
            r#"{"a":"x\ufffdy","b":"\\u0000","c":"\\\ufffd"}"#
        );
        assert!(matches!(jsonb(b"{}"), Cow::Borrowed(_)));
        assert_eq!(text("a\0b"), "a\u{fffd}b");
    }
}
