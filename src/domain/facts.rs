//! What gates, votes and judges know of a complete answer. It is recorded with the call, so that a run can be derived again,
//! and other thresholds be tried, without the answer's text.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Score, StepFacts, Unscored};

/// What is known of a complete answer, of its first choice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Answers of one request with the same number say the same; counted from 0 in the order of their coming. It tells
    /// nothing of what they say.
    pub form: u32,
    /// Of answers that a gate may ask about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<Reading>,
    /// Of a judge's answer: which of the answers that it was shown it names, from 0; absent where it names none, or several.
    /// Of a verifying one: 1 where it says that the answer is right, 0 where it says that it is wrong, absent where neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<u32>,
    /// Of a reasoning step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<StepFacts>,
    /// Where the request bounds the time to its first token: the microseconds to it that were expected of a call of each model of
    /// the plan when this answer was complete, by fleet name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub waits: BTreeMap<String, i64>,
}

impl Facts {
    /// The value of a score.
    ///
    /// # Errors
    /// What the answer lacks for it.
    pub fn score(&self, score: Score) -> Result<Scored, Unscored> {
        let reading = self.scores.iter().find(|reading| reading.score == score);
        reading.map_or(Err(Unscored::NotComputed), |reading| reading.read)
    }
}

/// A score, and whether it was computed from whole distributions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// In the score's unit.
    pub value: f64,
    pub exact: bool,
}

/// A score of one answer, or why it has none. Written as `{score, value}`, with `exact: false` where it is not, or as
/// `{score, unscored}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Reading {
    pub score: Score,
    pub read: Result<Scored, Unscored>,
}

#[derive(Serialize, Deserialize)]
struct Written {
    score: Score,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<f64>,
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    exact: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unscored: Option<Unscored>,
}

fn yes() -> bool {
    true
}

impl From<Written> for Reading {
    fn from(written: Written) -> Self {
        let Written { score, value, exact, unscored } = written;
        let read = value.map(|value| Scored { value, exact }).ok_or(unscored.unwrap_or(Unscored::NotComputed));
        Self { score, read }
    }
}

impl From<Reading> for Written {
    fn from(Reading { score, read }: Reading) -> Self {
        Self {
            score,
            value: read.ok().map(|scored| scored.value),
            exact: read.is_ok_and(|scored| scored.exact) || read.is_err(),
            unscored: read.err(),
        }
    }
}
