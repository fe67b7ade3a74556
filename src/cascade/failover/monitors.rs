//! What is known of a candidate, the monitors that read it, and the weights that make one number of it.
//!
//! Monitors have a fixed rank (Bholani, "Graph-based self-healing tool routing", arXiv 2603.01548: monitors emit a signal and a
//! priority, the greatest wins). One may veto a candidate, or add to its weight. A veto outranks every addition; of several vetoes the
//! highest monitor's is the reason. Additions add up: were a high one to silence a low one, a model that got worse could look better.
//!
//! Numbers that were measured are clipped, never refused, as a strange one must not cost the client its fallback: below the range
//! counts as the range's end, and so does infinity; what is not a number counts as the worst.

use serde::{Deserialize, Serialize};

use crate::domain::{Availability, ErrorKind, Health, Micros};

/// The dearest call that weighs more than a cheaper one, in USD.
const MOST_USD: f64 = 10_000.0;
/// The slowest answer that weighs more than a faster one, in microseconds: a day.
const MOST_US: i64 = 86_400_000_000;
/// A model weighs as if at least so many of its calls succeeded (the paper's bound), so that no logarithm is infinite.
const LEAST_RELIABILITY: f64 = 0.01;
/// A half-open breaker counts like ten times the failures: ln 10 more, as the weights are logarithms.
const HALF_OPEN: f64 = std::f64::consts::LN_10;
/// With less than this share left, a rate limit weighs `SCARCE_ADDS` more.
const SCARCE: f64 = 0.1;
const SCARCE_ADDS: f64 = 1.0;
/// Latency above so many times the usual is degraded; what is above the usual counts once more.
const DEGRADED: i64 = 2;

impl Health {
    fn usd(&self) -> f64 {
        clipped(self.cost_usd, 0.0, MOST_USD, MOST_USD)
    }

    fn us(&self) -> i64 {
        self.latency_us.clamp(0, MOST_US)
    }

    fn unreliability(&self) -> f64 {
        0.0 - libm::log(clipped(self.reliability, LEAST_RELIABILITY, 1.0, LEAST_RELIABILITY))
    }

    fn left(&self, now: Micros) -> Option<f64> {
        let known = self.remaining.filter(|_| self.retry_at.is_none_or(|at| at > now));
        known.map(|share| clipped(share, 0.0, 1.0, 0.0))
    }
}

fn clipped(x: f64, least: f64, most: f64, worst: f64) -> f64 {
    // Plus 0: there is no -0 among the results, which is less than 0 in a total order.
    if x.is_nan() { worst } else { x.clamp(least, most) + 0.0 }
}

/// What the request still has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Room {
    pub now: Micros,
    /// Microseconds to the deadline, where there is one.
    pub time_left: Option<i64>,
    /// USD that calls may yet cost, where there is a budget. What is not a number counts as nothing.
    pub usd_left: Option<f64>,
}

/// The monitors, highest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Monitor {
    /// The first token would come too late.
    Deadline,
    /// It would cost more than is left.
    Budget,
    /// Breaker, unloaded, down.
    Availability,
    RateLimit,
    /// Slower than usual.
    Latency,
}

/// Why a candidate is not tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Why {
    Failed {
        kind: ErrorKind,
    },
    /// Given out, and not known to have failed.
    UnderWay,
    /// Microseconds.
    TooLate {
        expected_us: i64,
        left_us: i64,
    },
    TooDear {
        expected_usd: f64,
        left_usd: f64,
    },
    BreakerOpen {
        until: Micros,
    },
    Unloaded,
    Down,
    /// Until then, where that is known.
    RateLimited {
        until: Option<Micros>,
    },
    /// It only follows these, and none of them has failed.
    OnlyAfter {
        models: Vec<String>,
    },
    /// As many candidates as are allowed have been tried.
    HopsSpent {
        most: usize,
    },
}

impl Why {
    /// The monitor whose veto it is.
    pub fn monitor(&self) -> Option<Monitor> {
        match self {
            Self::TooLate { .. } => Some(Monitor::Deadline),
            Self::TooDear { .. } => Some(Monitor::Budget),
            Self::BreakerOpen { .. } | Self::Unloaded | Self::Down => Some(Monitor::Availability),
            Self::RateLimited { .. } => Some(Monitor::RateLimit),
            Self::Failed { .. } | Self::UnderWay | Self::OnlyAfter { .. } | Self::HopsSpent { .. } => None,
        }
    }

    /// For people, as the end of a sentence that begins with the model's name.
    pub(super) fn text(&self, now: Micros) -> String {
        let seconds = |us: i64| us as f64 / 1e6;
        let more = |until: &Micros| format!("for {:.1} s more", seconds(until.saturating_sub(now)));
        match self {
            Self::Failed { kind } => format!("failed ({})", kind.as_str()),
            Self::UnderWay => "is being tried already".to_owned(),
            Self::TooLate { expected_us, left_us } => {
                format!("would take {:.1} s with {:.1} s left", seconds(*expected_us), seconds(*left_us))
            }
            Self::TooDear { expected_usd, left_usd } => {
                format!("would cost {expected_usd:.6} USD with {left_usd:.6} USD left")
            }
            Self::BreakerOpen { until } => format!("is left alone {}, as its calls kept failing", more(until)),
            Self::Unloaded => "is not loaded".to_owned(),
            Self::Down => "is not available".to_owned(),
            Self::RateLimited { until: Some(until) } => format!("is rate limited {}", more(until)),
            Self::RateLimited { until: None } => "has used up its rate limit".to_owned(),
            Self::OnlyAfter { models } if models.is_empty() => "follows no other model".to_owned(),
            Self::OnlyAfter { models } => format!("only follows a failure of `{}`", models.join("` or `")),
            Self::HopsSpent { most } => format!("was not tried, as at most {most} may be"),
        }
    }
}

/// What a monitor says of a candidate.
enum Says {
    Veto(Why),
    /// Adds so much, in the units of its own term.
    Adds(f64),
}

impl Monitor {
    /// All, highest first.
    pub const ALL: [Self; 5] = [Self::Deadline, Self::Budget, Self::Availability, Self::RateLimit, Self::Latency];

    fn says(self, health: &Health, room: &Room) -> Option<Says> {
        match self {
            Self::Deadline => too_late(health, room),
            Self::Budget => too_dear(health, room),
            Self::Availability => unavailable(health, room.now),
            Self::RateLimit => rate_limited(health, room.now),
            Self::Latency => degraded(health),
        }
    }
}

fn too_late(health: &Health, room: &Room) -> Option<Says> {
    let (expected_us, left_us) = (health.us(), room.time_left?);
    (expected_us >= left_us).then_some(Says::Veto(Why::TooLate { expected_us, left_us }))
}

fn too_dear(health: &Health, room: &Room) -> Option<Says> {
    let left = clipped(room.usd_left?, 0.0, f64::MAX, 0.0);
    // Not clipped: no budget holds an infinite cost, nor one that is not a number.
    let fits = health.cost_usd <= left;
    (!fits).then(|| Says::Veto(Why::TooDear { expected_usd: health.usd(), left_usd: left }))
}

fn unavailable(health: &Health, now: Micros) -> Option<Says> {
    match health.availability {
        Availability::Available => None,
        Availability::BreakerOpen { until } if until > now => Some(Says::Veto(Why::BreakerOpen { until })),
        Availability::HalfOpen | Availability::BreakerOpen { .. } => Some(Says::Adds(HALF_OPEN)),
        Availability::Unloaded => Some(Says::Veto(Why::Unloaded)),
        Availability::Down => Some(Says::Veto(Why::Down)),
    }
}

fn rate_limited(health: &Health, now: Micros) -> Option<Says> {
    match (health.retry_at, health.left(now)) {
        (Some(at), _) if at > now => Some(Says::Veto(Why::RateLimited { until: Some(at) })),
        (_, Some(left)) if left <= 0.0 => Some(Says::Veto(Why::RateLimited { until: None })),
        (_, Some(left)) if left < SCARCE => Some(Says::Adds(SCARCE_ADDS)),
        _ => None,
    }
}

fn degraded(health: &Health) -> Option<Says> {
    let (latency, usual) = (health.us(), health.usual_us.clamp(0, MOST_US));
    let slow = usual > 0 && latency > DEGRADED * usual;
    slow.then(|| Says::Adds((latency - usual) as f64 / 1e6))
}

/// The highest monitor's veto, if there is one.
pub(super) fn veto(health: &Health, room: &Room) -> Option<Why> {
    Monitor::ALL.into_iter().find_map(|monitor| match monitor.says(health, room) {
        Some(Says::Veto(why)) => Some(why),
        _ => None,
    })
}

/// What each monitor adds, highest first, in the units of its own term.
pub(super) fn additions(health: &Health, room: &Room) -> Vec<(Monitor, f64)> {
    let adds = |monitor: Monitor| match monitor.says(health, room) {
        Some(Says::Adds(by)) => Some((monitor, by)),
        _ => None,
    };
    Monitor::ALL.into_iter().filter_map(adds).collect()
}

/// The terms of a weight before they are weighed: cents, seconds, -ln of the reliability, share of the rate limit that is used.
pub(super) struct Terms {
    pub cents: f64,
    pub seconds: f64,
    pub unreliability: f64,
    pub used: f64,
}

impl Terms {
    pub(super) fn of(health: &Health, now: Micros) -> Self {
        Self {
            cents: health.usd() * 100.0,
            seconds: health.us() as f64 / 1e6,
            unreliability: health.unreliability(),
            used: health.left(now).map_or(0.0, |left| 1.0 - left),
        }
    }
}
