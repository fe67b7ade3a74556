//! How weir spares servers that are overloaded.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::cascade::{breaker::BreakerPolicy, limiter::LimiterPolicy, retry_budget::RetryBudgetPolicy};

/// How many calls at once a server is given, found out by trying: one more after as many successes as the limit, a share of it after
/// a refusal (429, 503, 504, 529) or a timeout. Calls beyond it wait in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdaptiveConcurrency {
    /// Calls at once at first, at least and at most; 8, 1 and 256 otherwise.
    #[schemars(range(min = 1))]
    pub initial: Option<u32>,
    #[schemars(range(min = 1))]
    pub min: Option<u32>,
    #[schemars(range(min = 1))]
    pub max: Option<u32>,
    /// What is left of the limit after congestion; 0.7 otherwise.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub backoff_ratio: Option<f64>,
    /// A stream whose first token takes more than so many times the best of the last minute counts as congestion; without it none
    /// does. For servers whose calls are alike, as a long prompt is slow on an idle server, too.
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub slow_factor: Option<f64>,
    /// Calls that may wait for a place, each for at most `first_byte_timeout_s`; 1024 otherwise. More are refused as `rate_limited`.
    pub max_waiting: Option<u32>,
}

impl AdaptiveConcurrency {
    /// What was typed, with the defaults; a bound that was left out gives way to the others.
    pub fn policy(&self) -> LimiterPolicy {
        let default = LimiterPolicy::default();
        let min = self.min.unwrap_or(default.min);
        let initial = self.initial.unwrap_or_else(|| default.initial.max(min).min(self.max.unwrap_or(u32::MAX)));
        LimiterPolicy {
            initial,
            min,
            max: self.max.unwrap_or(default.max.max(initial)),
            backoff_ratio: self.backoff_ratio.unwrap_or(default.backoff_ratio),
            slow_factor: self.slow_factor,
            ..default
        }
    }
}

/// How many retries all requests together may make: so many a call and so many a second. What is beyond goes on as after a last try,
/// to the fallback.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RetryBudgetSection {
    /// `false`: any number.
    pub enabled: Option<bool>,
    /// Retries a call; 0.2 otherwise.
    #[schemars(range(min = 0, max = 1))]
    pub ratio: Option<f64>,
    /// Retries a second, however few calls there are; 10 otherwise.
    pub min_per_s: Option<u32>,
}

impl RetryBudgetSection {
    pub(super) fn policy(&self) -> Option<RetryBudgetPolicy> {
        let default = RetryBudgetPolicy::default();
        self.enabled.unwrap_or(true).then(|| RetryBudgetPolicy {
            ratio: self.ratio.unwrap_or(default.ratio),
            min_per_s: self.min_per_s.unwrap_or(default.min_per_s),
        })
    }
}

/// When a server whose calls keep failing is left alone for a while.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerSection {
    /// `false`: never. Otherwise servers are, where the fleet has other models.
    pub enabled: Option<bool>,
    /// Calls that are looked back at; 20 otherwise. Five of them must have ended at least, or all where there are fewer.
    #[schemars(range(min = 1))]
    pub calls: Option<usize>,
    /// The share of them that must have failed; 0.5 otherwise.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub failed_share: Option<f64>,
    /// Seconds that it is left alone at first, twice as many each further time, and at most; 5 and 120 otherwise.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub open_s: Option<f64>,
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub most_open_s: Option<f64>,
}

impl BreakerSection {
    /// # Errors
    /// Where the longest time is shorter than the first.
    pub(super) fn policy(&self) -> Result<BreakerPolicy, String> {
        let default = BreakerPolicy::default();
        let window = self.calls.unwrap_or(default.window);
        let micros = |seconds: Option<f64>, or: i64| seconds.map_or(or, |seconds| (seconds * 1e6) as i64);
        let open = micros(self.open_s, default.open);
        let most_open = micros(self.most_open_s, default.most_open.max(open));
        if most_open < open {
            return Err("breaker: `most_open_s` must be at least `open_s`".to_owned());
        }
        let share = self.failed_share.unwrap_or(default.share);
        Ok(BreakerPolicy { window, least: default.least.min(window), share, open, most_open, ..default })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_that_are_left_out_give_way() {
        let of = |initial, min, max| {
            let typed = AdaptiveConcurrency { initial, min, max, ..AdaptiveConcurrency::default() };
            let policy = typed.policy();
            assert_eq!(policy.check(), Ok(()), "{typed:?}");
            (policy.initial, policy.min, policy.max)
        };
        assert_eq!(of(None, None, None), (8, 1, 256));
        assert_eq!(of(None, None, Some(4)), (4, 1, 4));
        assert_eq!(of(None, Some(16), None), (16, 16, 256));
        assert_eq!(of(Some(300), None, None), (300, 1, 300));
        let wrong = AdaptiveConcurrency { min: Some(5), max: Some(4), ..AdaptiveConcurrency::default() };
        assert!(wrong.policy().check().is_err());
    }
}
