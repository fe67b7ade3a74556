//! What else than rewards a policy's decisions would have come to: cost, energy and time, each from what was logged, by
//! self-normalised weights.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::Entry;
use crate::{
    domain::OutcomeStatus,
    replay::{
        estimate::{Asked, Estimate, Estimator, Row},
        metrics::{Histogram, Percentiles},
    },
};

/// Means per decision, and percentiles of what was answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Decisions whose end is known.
    pub ended: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<Estimate>,
    /// Where the energy of all calls is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub joules: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<Percentiles>,
}

/// What one decision came to; NaN where it is not known.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub session: u64,
    pub cost_usd: f64,
    pub joules: f64,
    pub latency_ms: f64,
    pub ttft_ms: f64,
}

impl End {
    /// `None` where it has none yet.
    pub(super) fn of(entry: &Entry) -> Option<Self> {
        let observed = entry.observed.as_ref()?;
        // What failed fast is not an answer that came soon.
        let ms = |us: Option<i64>| match us {
            Some(us) if observed.status == OutcomeStatus::Ok => us as f64 / 1e3,
            _ => f64::NAN,
        };
        Some(Self {
            session: entry.session,
            cost_usd: observed.cost_usd,
            joules: observed.joules.unwrap_or(f64::NAN),
            latency_ms: ms(Some(observed.latency_us)),
            ttft_ms: ms(observed.ttft_us),
        })
    }
}

/// Sums over decisions, each with a weight; memory does not grow with their number.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Measures {
    ended: u64,
    cost_usd: Estimator,
    joules: Estimator,
    latency_ms: Histogram,
    ttft_ms: Histogram,
}

impl Measures {
    pub(super) fn new() -> Self {
        let estimator = || Estimator::new(Asked::any_reward());
        Self {
            ended: 0,
            cost_usd: estimator(),
            joules: estimator(),
            latency_ms: Histogram::default(),
            ttft_ms: Histogram::default(),
        }
    }

    pub(super) fn take(&mut self, weight: f64, end: &End) {
        self.ended += 1;
        for (estimator, value) in [(&mut self.cost_usd, end.cost_usd), (&mut self.joules, end.joules)] {
            if value.is_finite() {
                // A weight that is no number is said by the estimates of the reward.
                let _ = estimator.take(&Row::plain(end.session, weight, value));
            }
        }
        self.latency_ms.add(weight, end.latency_ms);
        self.ttft_ms.add(weight, end.ttft_ms);
    }

    pub(super) fn finish(&self) -> Measured {
        let means: Vec<Option<Estimate>> =
            [&self.cost_usd, &self.joules].into_par_iter().map(|e| Some(e.finish().ok()?.snips)).collect();
        Measured {
            ended: self.ended,
            cost_usd: means[0],
            joules: means[1],
            latency_ms: self.latency_ms.percentiles(),
            ttft_ms: self.ttft_ms.percentiles(),
        }
    }
}
