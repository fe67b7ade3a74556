//! What comes of seeking a path: the next call and why it, or that nothing is left and why.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Parts, Why};
use crate::domain::{ErrorKind, Micros};

/// One candidate of a path and what makes up its weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leg {
    /// Place in the policy's list, from 0.
    pub index: usize,
    pub model: String,
    pub parts: Parts,
}

/// A candidate that is not tried, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Left {
    pub index: usize,
    pub model: String,
    #[serde(flatten)]
    pub why: Why,
}

/// What to try next. Its text is for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hop {
    /// Place of the model to call.
    pub index: usize,
    /// Of the whole path: [`Parts::call`] of each leg, and [`Parts::answer`] of the last.
    pub weight: f64,
    /// The model to call, and those that would follow its failure. Never empty.
    pub path: Vec<Leg>,
    /// Candidates that could not be chosen.
    pub passed_over: Vec<Left>,
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, leg) in self.path.iter().enumerate() {
            write!(f, "{}`{}` ({})", if i > 0 { ", then " } else { "" }, leg.model, leg.parts)?;
        }
        write!(f, ": weight {:.2}", self.weight)
    }
}

/// Nothing is left to try. Names every candidate once, in the policy's order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub struct NoPath {
    pub now: Micros,
    /// Calls of other models that failed before, in order.
    pub planned: Vec<(String, ErrorKind)>,
    pub candidates: Vec<Left>,
}

impl NoPath {
    /// A fixed label.
    pub fn kind(&self) -> &'static str {
        "no_path"
    }
}

impl fmt::Display for NoPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let planned = self.planned.iter().map(|(model, kind)| format!("`{model}` failed ({})", kind.as_str()));
        let candidates = self.candidates.iter().map(|left| format!("`{}` {}", left.model, left.why.text(self.now)));
        let all: Vec<String> = planned.chain(candidates).collect();
        match all.is_empty() {
            true => write!(f, "no model is left to fall back to: the policy names none"),
            false => write!(f, "no model is left to fall back to: {}", all.join("; ")),
        }
    }
}
