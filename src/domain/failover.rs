//! What failover knows of the models that may answer in another's place. What it makes of that is `cascade/failover.rs`.

use serde::{Deserialize, Serialize};

use super::Micros;

/// Whether calls may be sent to a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Availability {
    #[default]
    Available,
    /// Its breaker lets one call at a time through.
    HalfOpen,
    /// Its breaker is open until then; later it counts as half open.
    BreakerOpen {
        until: Micros,
    },
    /// An in-process model that is not in memory.
    Unloaded,
    Down,
}

/// What is known of a candidate now. The default is a free, instant, perfect one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Expected cost of this call in USD.
    pub cost_usd: f64,
    /// Expected time to the first token in microseconds, and the usual one (0: not known).
    pub latency_us: i64,
    pub usual_us: i64,
    /// Share of its recent calls that succeeded, 0 to 1.
    pub reliability: f64,
    /// Share of its rate limit that is left, 0 to 1, where it is known.
    pub remaining: Option<f64>,
    /// The server asked not to be called before. Once past, `remaining` is of before and no longer counts.
    pub retry_at: Option<Micros>,
    pub availability: Availability,
}

impl Default for Health {
    fn default() -> Self {
        let availability = Availability::Available;
        Self {
            cost_usd: 0.0,
            latency_us: 0,
            usual_us: 0,
            reliability: 1.0,
            remaining: None,
            retry_at: None,
            availability,
        }
    }
}

/// How much each term counts. By default the policy's own order stands, unless a model is much worse off than the next: one place
/// outweighs ten cents, ten seconds, 63 % of calls failing, or a rate limit that is all but used up.
///
/// Each is finite and from 0 to a million; with all but `order` at 0 the order is exactly the policy's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FailoverWeights {
    /// Of a US cent of expected cost.
    pub cost: f64,
    /// Of a second to the first token.
    pub latency: f64,
    /// Of -ln(reliability): 0.1 where 90 % of the calls succeed, 0.7 where half of them do, 4.6 at most.
    pub errors: f64,
    /// Of a rate limit that is used up; in proportion before that.
    pub rate_limit: f64,
    /// Of one place further down the policy's list.
    pub order: f64,
}

impl Default for FailoverWeights {
    fn default() -> Self {
        Self { cost: 0.1, latency: 0.1, errors: 1.0, rate_limit: 1.0, order: 1.0 }
    }
}

/// `to` may be called once `after` has failed or is vetoed; without `after`, from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    #[serde(default)]
    pub after: Option<String>,
    pub to: String,
}

/// The failover graph of one request: with the decision's fallback, in its order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverGraph {
    pub weights: FailoverWeights,
    /// Empty: each may follow the planned call and every other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edges: Vec<Edge>,
    /// Of each call of the fallback, as it was known when the decision was made.
    pub health: Vec<Health>,
}
