//! When a failed call is made again, and after how long: exponential backoff with jitter, drawn from a seed.

use crate::domain::ErrorKind;

/// Retries of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Further tries of one call, after the first.
    pub max_retries: u32,
    /// Further tries in one request, over all of its calls.
    pub budget: u32,
    /// The kinds of error after which another try of the same model makes sense.
    pub on: Vec<ErrorKind>,
    /// Wait before the first retry, in microseconds; doubled for each further one.
    pub base: i64,
    /// Longest wait that we choose ourselves, in microseconds.
    pub max: i64,
    /// Longest wait that a server may ask for, in microseconds. Where it asks for more, the call is not repeated.
    pub retry_after_cap: i64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_retries: 2,
            budget: 4,
            on: vec![ErrorKind::RateLimited, ErrorKind::ServerError, ErrorKind::Unreachable, ErrorKind::Cut],
            base: 200_000,
            max: 5_000_000,
            retry_after_cap: 10_000_000,
        }
    }
}

impl RetryPolicy {
    /// No call is made twice.
    pub fn never() -> Self {
        Self { max_retries: 0, budget: 0, ..Self::default() }
    }

    /// The wait before retry number `retry` (from 0) in microseconds, or `None` when there is to be none.
    ///
    /// Half of `base · 2^retry` (at most `max`) is fixed, half is drawn: retries of many requests spread, and none comes
    /// at once. What the server asks for is a lower bound; the drawn half is added to it, so that the clients that were
    /// told the same instant do not all return at it.
    pub fn wait(&self, kind: ErrorKind, retry: u32, retry_after: Option<i64>, seed: u64) -> Option<i64> {
        if retry >= self.max_retries || !self.on.contains(&kind) {
            return None;
        }
        if retry_after.is_some_and(|asked| asked > self.retry_after_cap) {
            return None;
        }
        let full = self.base.saturating_mul(1 << retry.min(62)).clamp(0, self.max.max(0));
        let half = full / 2;
        let drawn = (u128::from(mix(seed)) * (half as u128 + 1)) >> 64;
        let fixed = retry_after.map_or(full - half, |asked| asked.max(full - half));
        Some(fixed.saturating_add(drawn as i64))
    }
}

/// SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): 64 bits to 64
/// bits that look independent of them.
pub(super) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
