//! What a server says of its rate limits in the heads of its answers, errors too: how much of them is used. The forms that are
//! understood:
//!
//! - `x-ratelimit-limit-requests`, `-remaining-requests`, `-reset-requests` and the same of `-tokens` (OpenAI and most others);
//! - `anthropic-ratelimit-requests-limit`, `-remaining`, `-reset`, and of `-tokens`;
//! - `ratelimit-limit`, `-remaining`, `-reset` (IETF draft-ietf-httpapi-ratelimit-headers up to 07), with `x-` or without.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hyper::HeaderMap;
use tokio::time::Instant;

/// How long it counts where the server does not say when the limit is full again: most are per minute.
const USUAL: Duration = Duration::from_secs(60);

/// Limits that a server may have side by side, and how their headers are called; `*`: what is said of it.
const LIMITS: [[&str; 2]; 3] = [
    ["x-ratelimit-*-requests", "anthropic-ratelimit-requests-*"],
    ["x-ratelimit-*-tokens", "anthropic-ratelimit-tokens-*"],
    ["ratelimit-*", "x-ratelimit-*"],
];

/// The latest of each of [`LIMITS`].
#[derive(Debug, Default)]
pub(super) struct RateLimits(Mutex<[Option<Seen>; LIMITS.len()]>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    /// 0 to 1.
    used: f64,
    until: Instant,
}

impl RateLimits {
    /// Takes in what an answer says. What it says nothing of stays as it was.
    pub(super) fn read(&self, headers: &HeaderMap, now: Instant) {
        for (at, names) in LIMITS.iter().enumerate() {
            if let Some(seen) = names.iter().find_map(|name| seen(name, headers, now)) {
                let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                all[at] = Some(seen);
            }
        }
    }

    /// The share that is used of the limit that is nearest to its end; 0 where none is known, or all are full again.
    pub(super) fn used(&self, now: Instant) -> f64 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().flatten().filter(|seen| seen.until > now).fold(0.0, |most, seen| seen.used.max(most))
    }
}

fn seen(name: &str, headers: &HeaderMap, now: Instant) -> Option<Seen> {
    let text = |what: &str| headers.get(name.replace('*', what))?.to_str().ok().map(str::trim);
    // The draft lets a limit be followed by its window: `100, 100;w=60`.
    let number = |what: &str| text(what)?.split([',', ';']).next()?.trim().parse::<f64>().ok();
    let (limit, remaining) = (number("limit")?, number("remaining")?);
    if !(limit > 0.0 && limit.is_finite() && remaining.is_finite()) {
        return None;
    }
    let wait = text("reset").and_then(reset).unwrap_or(USUAL);
    Some(Seen { used: (1.0 - remaining / limit).clamp(0.0, 1.0), until: now.checked_add(wait)? })
}

/// In how long a limit is full again: `6m0s`, `250ms`, seconds, a moment in Unix seconds or milliseconds, or an RFC 3339 one.
fn reset(text: &str) -> Option<Duration> {
    let until = |at: jiff::Timestamp| {
        Duration::try_from_secs_f64(at.duration_since(jiff::Timestamp::now()).as_secs_f64().max(0.0)).ok()
    };
    if let Ok(number) = text.parse::<f64>() {
        return match number {
            n if n >= 1e11 => until(jiff::Timestamp::from_millisecond(n as i64).ok()?),
            n if n >= 1e9 => until(jiff::Timestamp::from_second(n as i64).ok()?),
            n => Duration::try_from_secs_f64(n.max(0.0)).ok(),
        };
    }
    if text.contains('T') {
        return until(text.parse().ok()?);
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, unit) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let end = unit.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(unit.len());
        seconds += number.parse::<f64>().ok()?
            * match &unit[..end] {
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = &unit[end..];
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|_| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (hyper::header::HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn the_limit_that_is_nearest_to_its_end_counts_until_it_is_full_again() {
        let (limits, now) = (RateLimits::default(), Instant::now());
        let later = |seconds: f64| now + Duration::from_secs_f64(seconds);
        assert_eq!(limits.used(now), 0.0);
        limits.read(
            &head(&[
                ("x-ratelimit-limit-requests", "60"),
                ("x-ratelimit-remaining-requests", "45"),
                ("x-ratelimit-reset-requests", "1m0s"),
                ("x-ratelimit-limit-tokens", "10000"),
                ("x-ratelimit-remaining-tokens", "1000"),
                ("x-ratelimit-reset-tokens", "250ms"),
            ]),
            now,
        );
        assert_eq!((limits.used(now), limits.used(later(0.24))), (0.9, 0.9));
        assert_eq!((limits.used(later(0.26)), limits.used(later(59.0)), limits.used(later(61.0))), (0.25, 0.25, 0.0));
        // What comes next counts instead; what it says nothing of stays.
        limits.read(&head(&[("x-ratelimit-limit-tokens", "100"), ("x-ratelimit-remaining-tokens", "80")]), later(1.0));
        assert_eq!(limits.used(later(1.0)), 0.25);
        limits
            .read(&head(&[("x-ratelimit-limit-requests", "60"), ("x-ratelimit-remaining-requests", "60")]), later(2.0));
        assert_eq!(limits.used(later(2.0)), 1.0 - 0.8);
        assert_eq!(limits.used(later(61.5)), 0.0, "a minute where the server does not say");
    }

    #[test]
    fn the_usual_forms_are_understood_and_what_makes_no_sense_is_not() {
        let used = |lines: &[(&'static str, &str)]| {
            let (limits, now) = (RateLimits::default(), Instant::now());
            limits.read(&head(lines), now);
            limits.used(now)
        };
        let anthropic = [
            ("anthropic-ratelimit-tokens-limit", "1000"),
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "2190-01-01T00:00:00Z"),
        ];
        assert_eq!(used(&anthropic), 1.0);
        let draft = [("ratelimit-limit", "100, 100;w=60"), ("ratelimit-remaining", "25"), ("ratelimit-reset", "30")];
        assert_eq!(used(&draft), 0.75);
        assert_eq!(
            used(&[("x-ratelimit-limit", "8"), ("x-ratelimit-remaining", "6"), ("x-ratelimit-reset", "9e12")]),
            0.25
        );
        let past = ("anthropic-ratelimit-tokens-reset", "2020-01-01T00:00:00Z");
        assert_eq!(used(&[anthropic[0], anthropic[1], past]), 0.0);
        for (limit, remaining) in [("0", "0"), ("-5", "1"), ("many", "1"), ("inf", "1"), ("10", "NaN"), ("", "")] {
            assert_eq!(used(&[("ratelimit-limit", limit), ("ratelimit-remaining", remaining)]), 0.0, "{limit}");
        }
        for (remaining, share) in [("20", 0.0), ("-3", 1.0)] {
            assert_eq!(used(&[("ratelimit-limit", "10"), ("ratelimit-remaining", remaining)]), share);
        }
        assert_eq!(used(&[("ratelimit-limit", "10")]), 0.0);
    }

    #[test]
    fn resets_are_read_in_the_forms_that_servers_use() {
        let ms = |text: &str| reset(text).map(|d| d.as_millis());
        for (text, expected) in [
            ("1s", 1000),
            ("6m0s", 360_000),
            ("250ms", 250),
            ("2m59.5s", 179_500),
            ("1h0m1s", 3_601_000),
            ("1d", 86_400_000),
            ("30", 30_000),
            ("0.5", 500),
            ("-1", 0),
        ] {
            assert_eq!(ms(text), Some(expected), "{text}");
        }
        for text in ["", "soon", "5x", "s", "1.2.3s", "5m3", "1e400s", "Tuesday"] {
            assert_eq!(ms(text), None, "{text}");
        }
    }
}
