//! What a request was worth: a weighted sum of named parts, or nothing where a part is not known.

use super::Observed;
use crate::domain::{Micros, OutcomeStatus};

/// A measured quantity's part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scaled {
    pub weight: f64,
    pub scale: f64,
}

impl Scaled {
    fn of(&self, value: f64) -> f64 {
        self.weight * (value / self.scale)
    }
}

/// Feedback as quality.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Quality {
    pub weight: f64,
    /// Name of the feedback.
    pub from: String,
    pub wait: Micros,
}

/// The parts of the reward.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reward {
    pub quality: Option<Quality>,
    pub cost_usd: Option<Scaled>,
    pub latency_s: Option<Scaled>,
    pub joules: Option<Scaled>,
}

impl Reward {
    /// `None` where nothing may be learnt: the request did not end with an answer (an arm that fails fast would look
    /// cheap), the feedback that counts as quality is not there, or a number is not finite.
    pub fn of(&self, observed: &Observed) -> Option<f64> {
        if observed.status != OutcomeStatus::Ok {
            return None;
        }
        let mut sum = 0.0;
        if let Some(quality) = &self.quality {
            sum += quality.weight * observed.feedback.get(&quality.from)?;
        }
        if let Some(cost) = &self.cost_usd {
            sum += cost.of(observed.cost_usd);
        }
        if let Some(latency) = &self.latency_s {
            sum += latency.of(observed.latency_us as f64 / 1e6);
        }
        if let Some(joules) = &self.joules {
            sum += joules.of(observed.joules?);
        }
        sum.is_finite().then_some(sum)
    }
}
