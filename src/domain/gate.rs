//! What a stage of a cascade asks of an answer before it accepts it: a score and the side of a threshold on which it has to
//! lie. How a score is computed is `cascade/gate.rs`; here is only what can be named.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{Hash, Signals};

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
    /// Which share of the verifying calls say that the answer is right, of those that say it is right or wrong, 0 to 1.
    Verified,
    /// How probably the answer is right, 0 to 1, by a fit to answers that were known to be right or wrong.
    Learned(Scorer),
}

/// A logistic regression over [`Score::STANDARD`], the logarithm of one more than the answer's tokens, and the prompt's
/// signals: FrugalGPT's scoring function (arXiv 2305.05176, section 3), which is one of query and answer, in its smallest form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scorer {
    pub bias: f64,
    /// Of the standard scores in their order, and of the length.
    pub weights: [f64; Self::FEATURES],
    /// Of the prompt's signals ([`Signals::FEATURES`]). A decision knows these, and makes them a part of its plan's bias
    /// ([`Scorer::told`]).
    #[serde(default, skip_serializing_if = "none")]
    pub signals: [f64; Signals::FEATURES.len()],
}

fn none(weights: &[f64; Signals::FEATURES.len()]) -> bool {
    weights.iter().all(|weight| *weight == 0.0)
}

impl Scorer {
    pub const FEATURES: usize = 8;

    /// Whether the prompt matters to it.
    pub fn asks_prompt(&self) -> bool {
        !none(&self.signals)
    }

    /// The scorer of answers to this prompt.
    pub fn told(&self, signals: &Signals) -> Self {
        let mut bias = self.bias;
        for (weight, feature) in self.signals.iter().zip(signals.features()) {
            bias += weight * feature;
        }
        Self { bias, signals: Default::default(), ..*self }
    }
}

const _: () = assert!(Scorer::FEATURES == Score::STANDARD.len() + 1);

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

/// What follows where an answer carries too little for a score: the substitute that its author has named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IfUnscored {
    /// The condition does not hold.
    #[default]
    Escalate,
    /// It holds.
    Accept,
}

/// One condition of a stage: `{score: mean_token_entropy, below: 0.9}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    pub score: Score,
    #[serde(flatten)]
    pub bound: Bound,
    /// The artifact that the threshold was calibrated with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Hash>,
    /// The share of accepted answers that may be wrong, where the calibration guarantees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_error: Option<f64>,
    #[serde(default, skip_serializing_if = "escalates")]
    pub if_unscored: IfUnscored,
}

fn escalates(if_unscored: &IfUnscored) -> bool {
    *if_unscored == IfUnscored::Escalate
}

impl Condition {
    /// A condition whose threshold somebody chose; an answer without the score is escalated.
    pub fn new(score: Score, bound: Bound) -> Self {
        Self { score, bound, calibration: None, max_error: None, if_unscored: IfUnscored::Escalate }
    }

    /// Whether it can be said before the end of an answer that the condition will not hold: the first token's entropy is
    /// known with the first token, and the least likely token can only become less likely.
    pub fn is_early(&self) -> bool {
        match self.bound {
            _ if self.score == Score::FirstTokenEntropy => true,
            Bound::Above(_) => self.score == Score::LogprobQuantile(0.0),
            Bound::Below(_) => false,
        }
    }
}

impl Score {
    /// What is always computed where a gate asks about an answer, so that other gates can be tried on the record.
    pub const STANDARD: [Score; 7] = [
        Score::MeanTokenEntropy,
        Score::FirstTokenEntropy,
        Score::MeanMargin,
        Score::MeanLogprob,
        Score::LogprobQuantile(0.0),
        Score::LogprobQuantile(0.1),
        Score::LogprobQuantile(0.5),
    ];

    /// The text that [`Score::from_str`] reads; the displayed one but for a learned score, whose weights it has.
    pub fn name(&self) -> String {
        match self {
            Score::Learned(scorer) => format!("{self} {}", serde_json::to_string(scorer).unwrap_or_default()),
            _ => self.to_string(),
        }
    }

    /// Whether a high value speaks for an answer.
    pub fn high_is_sure(&self) -> bool {
        match self {
            Score::MeanMargin | Score::MeanLogprob | Score::LogprobQuantile(_) => true,
            Score::Verified | Score::Learned(_) => true,
            Score::MeanTokenEntropy | Score::FirstTokenEntropy | Score::Disagreement => false,
        }
    }

    /// What a backend has to give with its answer for this score: `None` nothing, else log-probabilities with that many
    /// alternatives per token. 20 is the most that OpenAI's API gives; engines of ours give whole distributions' entropy.
    pub fn logprobs(&self) -> Option<u8> {
        match self {
            Score::MeanTokenEntropy | Score::FirstTokenEntropy | Score::MeanMargin | Score::Learned(_) => Some(20),
            Score::MeanLogprob | Score::LogprobQuantile(_) => Some(0),
            Score::Disagreement | Score::Verified => None,
        }
    }
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
            Score::Verified => "verified",
            Score::Learned(_) => "learned",
        })
    }
}

/// As [`Score::name`] says it. `learned` alone is a learned score that knows nothing yet.
impl FromStr for Score {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "mean_token_entropy" => Score::MeanTokenEntropy,
            "first_token_entropy" => Score::FirstTokenEntropy,
            "mean_margin" => Score::MeanMargin,
            "mean_logprob" => Score::MeanLogprob,
            "disagreement" => Score::Disagreement,
            "verified" => Score::Verified,
            "learned" => Score::Learned(Scorer::default()),
            _ => {
                if let Some(json) = text.strip_prefix("learned ") {
                    let scorer =
                        serde_json::from_str(json).map_err(|e| format!("a learned score without weights: {e}"));
                    return scorer.map(Score::Learned);
                }
                let q = text.strip_prefix("logprob_quantile ").and_then(|q| q.parse().ok());
                Score::LogprobQuantile(q.ok_or_else(|| format!("there is no score `{text}`"))?)
            }
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
