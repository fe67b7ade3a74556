//! What makes up the weight of a candidate: a sum of terms, each weighed by the policy's author.
//!
//! The paper multiplies its factors. We add: a weight of 0 then switches a term off, and each term's part can be shown. Unreliability is
//! -ln of the share of calls that succeed, which is the paper's factor 1/reliability as a sum.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    FailoverError,
    monitors::{Monitor, Room, Terms, additions},
};
use crate::domain::{FailoverWeights, Health};

/// Greatest weight, so that sums keep their small parts.
const MOST_WEIGHT: f64 = 1e6;

impl FailoverWeights {
    /// # Errors
    /// The first that is not a number from 0 to a million.
    pub fn check(&self) -> Result<(), FailoverError> {
        let all = [
            ("cost", self.cost),
            ("latency", self.latency),
            ("errors", self.errors),
            ("rate_limit", self.rate_limit),
            ("order", self.order),
        ];
        match all.into_iter().find(|(_, value)| !(0.0..=MOST_WEIGHT).contains(value)) {
            Some((name, value)) => Err(FailoverError::Weight { name, value }),
            None => Ok(()),
        }
    }

    fn of(&self, monitor: Monitor) -> f64 {
        match monitor {
            Monitor::Deadline | Monitor::Latency => self.latency,
            Monitor::Budget => self.cost,
            Monitor::Availability => self.errors,
            Monitor::RateLimit => self.rate_limit,
        }
    }
}

/// What a monitor added to a weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Added {
    pub by: Monitor,
    pub weight: f64,
}

/// The parts of one candidate's weight, weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    pub order: f64,
    pub cost: f64,
    pub latency: f64,
    pub rate_limit: f64,
    pub errors: f64,
    /// By monitors, the highest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added: Vec<Added>,
}

impl Parts {
    pub(super) fn of(place: usize, health: &Health, weights: &FailoverWeights, room: &Room) -> Self {
        let terms = Terms::of(health, room.now);
        let added = additions(health, room).into_iter();
        Self {
            order: weights.order * place as f64,
            cost: weights.cost * terms.cents,
            latency: weights.latency * terms.seconds,
            rate_limit: weights.rate_limit * terms.used,
            errors: weights.errors * terms.unreliability,
            added: added.map(|(by, units)| Added { by, weight: weights.of(by) * units }).collect(),
        }
    }

    /// Of the edges into the candidate: what calling it takes.
    pub fn call(&self) -> f64 {
        self.order + self.cost + self.latency + self.rate_limit + self.sum(|by| by != Monitor::Availability)
    }

    /// Of the edge from the candidate to the end: how little it can be relied upon to answer.
    pub fn answer(&self) -> f64 {
        self.errors + self.sum(|by| by == Monitor::Availability)
    }

    fn sum(&self, which: impl Fn(Monitor) -> bool) -> f64 {
        self.added.iter().filter(|added| which(added.by)).fold(0.0, |sum, added| sum + added.weight)
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { order, cost, latency, rate_limit, errors, added } = self;
        write!(f, "order {order:.2} + cost {cost:.2} + latency {latency:.2} + rate limit {rate_limit:.2}")?;
        write!(f, " + errors {errors:.2}")?;
        added.iter().try_for_each(|Added { by, weight }| match by {
            Monitor::Availability => write!(f, " + half open {weight:.2}"),
            Monitor::RateLimit => write!(f, " + rate limit scarce {weight:.2}"),
            Monitor::Latency => write!(f, " + slower than usual {weight:.2}"),
            Monitor::Deadline | Monitor::Budget => write!(f, " + {by:?} {weight:.2}"),
        })
    }
}
