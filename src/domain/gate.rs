//! What a stage of a cascade asks of an answer before it accepts it: a score and the side of a threshold on which it has to
//! lie. How a score is computed is `cascade/gate.rs`; here is only what can be named.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number that says how sure a model was of its answer, or several models of theirs. Computed after the answer, from
/// what came with it; never from the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Mean over the answer's tokens of the entropy of the distribution that each was drawn from, in nats.
    MeanTokenEntropy,
    /// Entropy of the distribution that the first token was drawn from, in nats.
    FirstTokenEntropy,
    /// Mean over the tokens of the difference between the two largest probabilities, 0 to 1.
    MeanMargin,
    /// Mean log-probability of the answer's tokens (natural logarithm): that of the text, normalised by its length.
    MeanLogprob,
    /// A quantile of the tokens' log-probabilities (natural logarithm): 0 is the least likely token, 0.5 the median.
    LogprobQuantile(f64),
    /// How far the branches of a parallel stage disagree: 0 when all answers are the same, 1 when no two are.
    Disagreement,
}

/// The side of a threshold on which a score has to lie; the threshold itself lies on neither.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    Below(f64),
    Above(f64),
}

impl Bound {
    /// Whether `value` lies on the right side. NaN lies on none.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Bound::Below(threshold) => value < threshold,
            Bound::Above(threshold) => value > threshold,
        }
    }

    /// The threshold, in the score's unit.
    pub fn threshold(self) -> f64 {
        match self {
            Bound::Below(threshold) | Bound::Above(threshold) => threshold,
        }
    }
}

/// One condition of a stage: `{score: mean_token_entropy, below: 0.9}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    pub score: Score,
    #[serde(flatten)]
    pub bound: Bound,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Score::MeanTokenEntropy => "mean_token_entropy",
            Score::FirstTokenEntropy => "first_token_entropy",
            Score::MeanMargin => "mean_margin",
            Score::MeanLogprob => "mean_logprob",
            Score::LogprobQuantile(q) => return write!(f, "logprob_quantile {q}"),
            Score::Disagreement => "disagreement",
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bound {
            Bound::Below(threshold) => write!(f, "{} < {threshold}", self.score),
            Bound::Above(threshold) => write!(f, "{} > {threshold}", self.score),
        }
    }
}
