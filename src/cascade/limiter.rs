//! How many calls one backend is given at once, found out by trying: additive increase, multiplicative decrease (Jacobson, "Congestion
//! avoidance and control", SIGCOMM 1988, section 3; Chiu & Jain, "Analysis of the increase and decrease algorithms", 1989, who show that
//! of the linear rules this one becomes fair; for services, Netflix's concurrency-limits).
//!
//! A full limit of successes raises the limit by a step, provided that it was in use. A call that was refused for load, or timed out,
//! lowers it by a factor, and so may an answer much slower than the best of late. Of the calls that were begun before it was last
//! lowered none counts, as they tell of the load that was: so it is lowered at most once in a round trip.
//!
//! It says nothing of waiting: a call that is not admitted is the caller's to queue or refuse. Pure: time is an argument, in
//! microseconds, and nothing is drawn.

mod lowest;
#[cfg(test)]
mod tests;

use lowest::Lowest;

use crate::domain::{ErrorKind, Micros};

/// How a limit moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LimiterPolicy {
    /// Calls at once: at first, at least (1 or more) and at most.
    pub initial: u32,
    pub min: u32,
    pub max: u32,
    /// Added when as many calls as the limit have succeeded; 1 or more.
    pub increase: u32,
    /// The limit is multiplied by this when there is congestion and rounded down; above 0 and below 1.
    pub backoff_ratio: f64,
    /// A time to the first token above so many times the best of late counts as congestion; above 1. Only of use where calls are alike:
    /// a long prompt is slow on an idle server, too.
    pub slow_factor: Option<f64>,
    /// The best of late is that of one to two such times, in microseconds; above 0.
    pub window: i64,
}

impl Default for LimiterPolicy {
    fn default() -> Self {
        Self { initial: 8, min: 1, max: 256, increase: 1, backoff_ratio: 0.7, slow_factor: None, window: 60_000_000 }
    }
}

/// What is wrong with a policy.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum LimiterError {
    #[error("`min` is {min}, `initial` {initial}, `max` {max}; expected them in this order, from 1")]
    Bounds { min: u32, initial: u32, max: u32 },
    #[error("increase is 0; expected 1 or more")]
    Increase,
    #[error("`backoff_ratio` is {0}; expected a number above 0 and below 1")]
    BackoffRatio(f64),
    #[error("`slow_factor` is {0}; expected a finite number above 1")]
    SlowFactor(f64),
    #[error("window is {0} microseconds; expected more than 0")]
    Window(i64),
}

impl LimiterError {
    /// A fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bounds { .. } => "bounds",
            Self::Increase => "increase",
            Self::BackoffRatio(_) => "backoff_ratio",
            Self::SlowFactor(_) => "slow_factor",
            Self::Window(_) => "window",
        }
    }
}

impl LimiterPolicy {
    /// # Errors
    /// The first bound that does not hold. What is not a number holds none.
    pub fn check(&self) -> Result<(), LimiterError> {
        let Self { initial, min, max, increase, backoff_ratio, slow_factor, window } = *self;
        if !(1 <= min && min <= initial && initial <= max) {
            return Err(LimiterError::Bounds { min, initial, max });
        }
        if increase == 0 {
            return Err(LimiterError::Increase);
        }
        let share = backoff_ratio > 0.0 && backoff_ratio < 1.0;
        if !share {
            return Err(LimiterError::BackoffRatio(backoff_ratio));
        }
        if let Some(factor) = slow_factor.filter(|factor| !(factor.is_finite() && *factor > 1.0)) {
            return Err(LimiterError::SlowFactor(factor));
        }
        if window <= 0 {
            return Err(LimiterError::Window(window));
        }
        Ok(())
    }
}

/// How a call ended, as far as the server's load goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Success,
    /// Refused for load, or not answered in time.
    Congested,
    /// It says nothing of load: a client that left, a request that was wrong, a server that could not be reached.
    Neutral,
}

impl Verdict {
    /// Of a failed call, with the status that the server gave. `rate_limited` must come from the server, not from a queue of our own.
    pub fn of(kind: ErrorKind, status: Option<u16>) -> Self {
        match kind {
            ErrorKind::RateLimited | ErrorKind::Timeout => Self::Congested,
            // Unavailable, a gateway's timeout, and what some call overloaded.
            ErrorKind::ServerError if matches!(status, Some(503 | 504 | 529)) => Self::Congested,
            ErrorKind::ServerError
            | ErrorKind::Unreachable
            | ErrorKind::Cut
            | ErrorKind::Garbage
            | ErrorKind::Auth
            | ErrorKind::ContextTooLong
            | ErrorKind::BadRequest
            | ErrorKind::ModelNotFound
            | ErrorKind::Unsupported
            | ErrorKind::BreakerOpen
            | ErrorKind::Cancelled
            | ErrorKind::Internal => Self::Neutral,
        }
    }
}

/// A call under way. It must end ([`Limiter::ended`]), or its place is never free again.
#[derive(Debug)]
#[must_use = "its place is only given back by `ended`"]
pub struct Permit {
    /// How often the limit had been lowered when the call began.
    epoch: u64,
}

/// Why a limit moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Because {
    /// A full limit of calls succeeded.
    Succeeded,
    Congested,
    /// The answer came, but much later than the best of late.
    Slow,
}

impl Because {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Congested => "congested",
            Self::Slow => "slow",
        }
    }
}

/// A limit that has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    pub from: u32,
    pub to: u32,
    pub because: Because,
}

/// The limit of one backend.
#[derive(Debug)]
pub struct Limiter {
    policy: LimiterPolicy,
    limit: u32,
    in_flight: u32,
    /// Successes that count towards the next step.
    successes: u32,
    /// How often the limit was lowered, or would have been but for its least.
    epoch: u64,
    lowest: Lowest,
}

impl Limiter {
    /// # Errors
    /// What [`LimiterPolicy::check`] finds.
    pub fn new(policy: LimiterPolicy) -> Result<Self, LimiterError> {
        policy.check()?;
        let lowest = Lowest::new(policy.window);
        Ok(Self { policy, limit: policy.initial, in_flight: 0, successes: 0, epoch: 0, lowest })
    }

    /// Calls that may be under way at once, now.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Calls that are under way. More than the limit after it was lowered.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// A place for one call, if there is one.
    pub fn admit(&mut self) -> Option<Permit> {
        let free = self.in_flight < self.limit;
        free.then(|| {
            self.in_flight += 1;
            Permit { epoch: self.epoch }
        })
    }

    /// A call has ended. `ttft_us` is its time to the first token in microseconds, where there was one; matters of successes only, and
    /// what is not above 0 counts as not measured. Returns how the limit has moved, if it has.
    pub fn ended(&mut self, permit: Permit, verdict: Verdict, ttft_us: Option<i64>, now: Micros) -> Option<Moved> {
        let used = u64::from(self.in_flight) * 2 >= u64::from(self.limit);
        self.in_flight = self.in_flight.saturating_sub(1);
        let slow = verdict == Verdict::Success && self.slow(ttft_us, now);
        if permit.epoch != self.epoch {
            return None;
        }
        match verdict {
            Verdict::Success if slow => self.lower(Because::Slow),
            Verdict::Success if used => self.count(),
            Verdict::Success | Verdict::Neutral => None,
            Verdict::Congested => self.lower(Because::Congested),
        }
    }

    fn slow(&mut self, ttft_us: Option<i64>, now: Micros) -> bool {
        let Some(ttft) = ttft_us.filter(|ttft| *ttft > 0) else { return false };
        let best = self.lowest.with(ttft, now);
        self.policy.slow_factor.is_some_and(|factor| ttft as f64 > factor * best as f64)
    }

    fn count(&mut self) -> Option<Moved> {
        self.successes += 1;
        if self.successes < self.limit {
            return None;
        }
        self.successes = 0;
        self.turn(self.limit.saturating_add(self.policy.increase), Because::Succeeded)
    }

    fn lower(&mut self, because: Because) -> Option<Moved> {
        (self.epoch, self.successes) = (self.epoch + 1, 0);
        // Below the limit, whatever the factor: an integer of 32 bits times a number below 1 never rounds back to it.
        let product = (f64::from(self.limit) * self.policy.backoff_ratio) as u32;
        self.turn(product, because)
    }

    fn turn(&mut self, to: u32, because: Because) -> Option<Moved> {
        let (from, to) = (self.limit, to.clamp(self.policy.min, self.policy.max));
        self.limit = to;
        (from != to).then_some(Moved { from, to, because })
    }
}
