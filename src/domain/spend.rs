//! What calls use of a request's budget.

use serde::{Deserialize, Serialize};

use super::Usage;

/// Whole millionths of a US dollar. Sums saturate, so that the largest value means "more than can be said".
pub type MicroUsd = u64;

/// What a call, or several, cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spend {
    pub usd: MicroUsd,
    /// Of prompt and answer together.
    #[serde(default)]
    pub tokens: u64,
}

impl Spend {
    /// More than any budget.
    pub const MAX: Spend = Spend { usd: MicroUsd::MAX, tokens: u64::MAX };

    /// Money alone.
    pub fn usd(usd: MicroUsd) -> Self {
        Self { usd, tokens: 0 }
    }

    /// What a call has used, with its price rounded up.
    pub fn of(cost_usd: f64, usage: &Usage) -> Self {
        Self { usd: (cost_usd * 1e6).ceil() as MicroUsd, tokens: usage.total() }
    }

    pub fn saturating_add(self, other: Self) -> Self {
        Self { usd: self.usd.saturating_add(other.usd), tokens: self.tokens.saturating_add(other.tokens) }
    }
}
