//! How many retries all requests together may make: a token bucket (Finagle's `RetryBudget`; likewise linkerd's and Envoy's retry
//! budgets). Each call adds a share of a token, so does time, and each retry takes one: while few calls fail there is room to repeat
//! them; when a fleet fails, retries run out instead of doubling its load.
//!
//! In any stretch of time there are at most `ratio` retries a call, `min_per_s` a second, and what had been saved before. Tokens are
//! counted in millionths, so that nothing is rounded as they add up. Pure: time is an argument, in microseconds.

#[cfg(test)]
mod tests;

use crate::domain::Micros;

const TOKEN: u64 = 1_000_000;
/// At most as much is saved as comes in so many seconds without a call, and at least so many retries.
const SAVED: u64 = 10;

/// How many retries there may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudgetPolicy {
    /// Retries a call, 0 to 1. What is out of range is clipped, what is not a number counts as 0.
    pub ratio: f64,
    /// Retries a second, however few calls there are.
    pub min_per_s: u32,
}

impl Default for RetryBudgetPolicy {
    fn default() -> Self {
        Self { ratio: 0.2, min_per_s: 10 }
    }
}

/// The budget of one weir. All saved up at first.
#[derive(Clone, Debug)]
pub struct RetryBudget {
    millionths: u64,
    cap: u64,
    per_call: u64,
    /// Tokens a second are millionths a microsecond.
    per_micro: u64,
    last: Micros,
}

impl RetryBudget {
    pub fn new(policy: RetryBudgetPolicy, now: Micros) -> Self {
        let per_micro = u64::from(policy.min_per_s);
        let cap = SAVED * per_micro.max(1) * TOKEN;
        // The conversion takes what is not a number to 0.
        let per_call = (policy.ratio.clamp(0.0, 1.0) * TOKEN as f64).round() as u64;
        Self { millionths: cap, cap, per_call, per_micro, last: now }
    }

    /// A call is made that is no retry.
    pub fn call(&mut self, now: Micros) {
        self.refill(now);
        self.add(self.per_call);
    }

    /// Whether a call may be repeated; if so, it is paid for.
    pub fn take(&mut self, now: Micros) -> bool {
        self.refill(now);
        let left = self.millionths.checked_sub(TOKEN);
        self.millionths = left.unwrap_or(self.millionths);
        left.is_some()
    }

    /// One that was paid for was not made.
    pub fn give_back(&mut self) {
        self.add(TOKEN);
    }

    /// Whole retries that are left.
    pub fn left(&self) -> u64 {
        self.millionths / TOKEN
    }

    /// What time has added. An instant before the last one counts as the last one.
    fn refill(&mut self, now: Micros) {
        let passed = u64::try_from(now.saturating_sub(self.last)).unwrap_or(0);
        self.last = self.last.max(now);
        self.add(passed.saturating_mul(self.per_micro));
    }

    fn add(&mut self, millionths: u64) {
        self.millionths = self.millionths.saturating_add(millionths).min(self.cap);
    }
}
