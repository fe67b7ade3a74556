//! The wall clock, for stamps in records. Durations are measured with `Instant`; what decides gets its time as an argument.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::domain::Micros;

/// Now, in microseconds since the Unix epoch.
pub fn now_micros() -> Micros {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
