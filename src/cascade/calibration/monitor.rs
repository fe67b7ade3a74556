//! Whether the rate of wrong answers among accepted ones is still at most m in production, from feedback that comes one
//! by one: a test that may be looked at after each answer, for ever, with a probability of at most alpha of any false
//! alarm.
//!
//! Betting against the hypothesis (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
//! arXiv 2010.09686, on capital processes). A bet d > 0 multiplies its capital by the likelihood ratio of a rate with d
//! more log-odds than m:
//!
//! ```text
//! wrong: e^d / z      right: 1 / z      z = 1 - m + m e^d
//! ```
//!
//! At a rate of m the mean factor is 1, below less, whatever came before: capital does not grow on average. Several
//! bets share the money, small ones for small excesses.
//!
//! A gate that was fine for long has lost all capital, and would need as long to win it back. So money is held back for
//! later starts: 1 / (n (n + 1)) joins before the n-th answer, which is 1 in all (starts are summed as by the
//! Shiryaev-Roberts e-detector of Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change
//! detection", arXiv 2203.03532, but with weights). Bets and what is held back together are the e-value: a
//! supermartingale from 1, which ever reaches 1 / alpha with a probability of at most alpha (Ville, 1939). An alarm
//! after a change at answer n takes about ln(n^2 / alpha) of evidence, instead of all that the n answers spoke for.
//!
//! What it assumes: feedback that says nothing about which answers it comes for. Where only complaints come back, their
//! rate is not that of the answers.

use libm::exp;
use serde::{Deserialize, Serialize};

use super::{CalibrationError, open_unit};

/// Log-odds by which bets exceed the bound.
const BETS: [f64; 7] = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2];

/// What the feedback so far says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing speaks clearly against the bound.
    Fine,
    /// The bound did not hold; from then on for good. A new calibration gets a new monitor.
    Violated,
}

/// A test of one bound, and its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "State")]
pub struct Monitor {
    max_error: f64,
    false_alarm: f64,
    seen: u64,
    wrong: u64,
    /// Of the bets, without what is held back; stays as it was at the alarm.
    capital: [f64; BETS.len()],
    e_value: f64,
    /// How many answers had been seen at the alarm.
    violated_at: Option<u64>,
}

/// A [`Monitor`] as it is read.
#[derive(Deserialize)]
struct State {
    max_error: f64,
    false_alarm: f64,
    seen: u64,
    wrong: u64,
    capital: [f64; BETS.len()],
    e_value: f64,
    violated_at: Option<u64>,
}

impl TryFrom<State> for Monitor {
    type Error = CalibrationError;

    fn try_from(state: State) -> Result<Self, CalibrationError> {
        let fresh = Self::new(state.max_error, state.false_alarm)?;
        let amounts = state.capital.iter().chain([&state.e_value]).all(|c| c.is_finite() && *c >= 0.0);
        let alarm = state.violated_at.is_some();
        let counts = state.wrong <= state.seen && state.violated_at.is_none_or(|at| at <= state.seen);
        if !(amounts && counts && alarm == (state.e_value >= 1.0 / state.false_alarm)) {
            return Err(CalibrationError::NotAState);
        }
        let State { seen, wrong, capital, e_value, violated_at, .. } = state;
        Ok(Self { seen, wrong, capital, e_value, violated_at, ..fresh })
    }
}

impl Monitor {
    /// Watches that the rate is at most `max_error`; the probability that it is and the monitor ever says otherwise is
    /// at most `false_alarm` (0.05 is customary).
    ///
    /// # Errors
    /// [`CalibrationError::OutOfRange`] where an argument is not between 0 and 1.
    pub fn new(max_error: f64, false_alarm: f64) -> Result<Self, CalibrationError> {
        open_unit("max_error", max_error)?;
        open_unit("false_alarm", false_alarm)?;
        let capital = [0.0; BETS.len()];
        Ok(Self { max_error, false_alarm, seen: 0, wrong: 0, capital, e_value: 1.0, violated_at: None })
    }

    /// Feedback on one more accepted answer.
    pub fn observe(&mut self, wrong: bool) -> Verdict {
        self.seen += 1;
        self.wrong += u64::from(wrong);
        if self.violated_at.is_none() {
            self.bet(wrong);
        }
        self.verdict()
    }

    pub fn verdict(&self) -> Verdict {
        if self.violated_at.is_some() { Verdict::Violated } else { Verdict::Fine }
    }

    /// The bound.
    pub fn max_error(&self) -> f64 {
        self.max_error
    }

    /// Answers with feedback.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// How many of them were wrong.
    pub fn wrong(&self) -> u64 {
        self.wrong
    }

    /// Evidence against the bound: 1 at first, an alarm from 1 / `false_alarm` on, and then no longer moved.
    pub fn e_value(&self) -> f64 {
        self.e_value
    }

    /// How many answers had been seen when the alarm came.
    pub fn violated_at(&self) -> Option<u64> {
        self.violated_at
    }

    fn bet(&mut self, wrong: bool) {
        let n = self.seen as f64;
        let joins = 1.0 / (n * (n + 1.0));
        let mut capital = 0.0;
        for (own, d) in self.capital.iter_mut().zip(BETS) {
            *own = (*own + joins) * factor(self.max_error, d, wrong);
            capital += *own;
        }
        self.e_value = capital / BETS.len() as f64 + 1.0 / (n + 1.0);
        if self.e_value >= 1.0 / self.false_alarm {
            self.violated_at = Some(self.seen);
        }
    }
}

/// What the bet `d` against a rate of `m` pays for one that was staked.
fn factor(m: f64, d: f64, wrong: bool) -> f64 {
    let ratio = exp(d);
    (if wrong { ratio } else { 1.0 }) / (1.0 - m + m * ratio)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cascade::calibration::tests::Rng;

    /// The alarms of so many streams of `length` answers; the rate may change with the place.
    fn alarms(streams: u64, length: u64, bound: f64, rate: impl Fn(u64) -> f64) -> Vec<Option<u64>> {
        let watch = |seed| {
            let mut rng = Rng(seed * 1_000_003);
            let mut monitor = Monitor::new(bound, 0.05).unwrap();
            for i in 0..length {
                monitor.observe(rng.unit() < rate(i));
            }
            monitor.violated_at()
        };
        (0..streams).map(watch).collect()
    }

    #[test]
    fn bets_are_fair_at_the_bound_and_lose_below_it() {
        for m in [0.001, 0.1, 0.5, 0.99] {
            for d in BETS {
                let mean = |rate: f64| rate * factor(m, d, true) + (1.0 - rate) * factor(m, d, false);
                assert!((mean(m) - 1.0).abs() < 1e-12, "{m} {d}");
                assert!(mean(0.9 * m) < 1.0 && mean(m + 0.1 * (1.0 - m)) > 1.0, "{m} {d}");
            }
        }
    }

    /// All ways that eight answers can go: the mean of the e-value at the bound is 1 after each of them.
    #[test]
    fn the_e_value_has_a_mean_of_one_at_the_bound() {
        let m = 0.3;
        for length in 0..=8u32 {
            let mut mean = 0.0;
            for way in 0..1u32 << length {
                let mut monitor = Monitor::new(m, 1e-9).unwrap();
                for i in 0..length {
                    monitor.observe(way >> i & 1 == 1);
                }
                let wrong = way.count_ones() as i32;
                mean += m.powi(wrong) * (1.0 - m).powi(length as i32 - wrong) * monitor.e_value();
            }
            assert!((mean - 1.0).abs() < 1e-12, "{length} {mean}");
        }
    }

    #[test]
    fn false_alarms_at_the_bound_are_rare() {
        for (bound, length) in [(0.1, 3000), (0.02, 3000), (0.4, 1000)] {
            let found = alarms(1000, length, bound, |_| bound);
            let count = found.iter().flatten().count();
            assert!(count <= 50, "{bound}: {count} of 1000");
        }
    }

    #[test]
    fn twice_the_bound_is_found() {
        let found = alarms(200, 600, 0.1, |_| 0.2);
        assert!(found.iter().flatten().count() >= 196, "{found:?}");
        let mut at: Vec<u64> = found.into_iter().flatten().collect();
        at.sort_unstable();
        assert!(at[at.len() / 2] < 180, "{}", at[at.len() / 2]);
    }

    #[test]
    fn a_change_is_found_after_ten_thousand_answers_that_were_fine() {
        let found = alarms(100, 11_000, 0.1, |i| if i < 10_000 { 0.05 } else { 0.2 });
        assert!(found.iter().all(|at| at.is_some_and(|at| at > 10_000)), "{found:?}");
    }

    #[test]
    fn an_alarm_stays_and_counts_go_on() {
        let mut monitor = Monitor::new(0.1, 0.05).unwrap();
        let first = (1..).find(|_| monitor.observe(true) == Verdict::Violated).unwrap();
        let e_value = monitor.e_value();
        assert!(e_value >= 20.0);
        assert!((0..1000).all(|_| monitor.observe(false) == Verdict::Violated));
        assert_eq!((monitor.seen(), monitor.wrong(), monitor.violated_at()), (first + 1000, first, Some(first)));
        assert_eq!(monitor.e_value(), e_value);
    }

    #[test]
    fn state_survives_being_written_at_any_time() {
        let mut rng = Rng(4);
        let mut kept = Monitor::new(0.1, 0.05).unwrap();
        let mut written = kept.clone();
        for _ in 0..300 {
            let wrong = rng.unit() < 0.15;
            assert_eq!(kept.observe(wrong), written.observe(wrong));
            written = serde_json::from_str(&serde_json::to_string(&written).unwrap()).unwrap();
            assert_eq!(kept, written);
        }
        let text = serde_json::to_string(&Monitor::new(0.1, 0.05).unwrap()).unwrap();
        for (from, to) in
            [("\"seen\":0", "\"seen\":0,\"x\":1"), ("\"wrong\":0", "\"wrong\":5"), ("1.0", "50.0"), ("0.1", "1.5")]
        {
            let altered = text.replacen(from, to, 1);
            assert_ne!(altered, text);
            let read = serde_json::from_str::<Monitor>(&altered);
            assert_eq!(read.is_err(), from != "\"seen\":0", "{altered}");
        }
    }

    #[test]
    fn bounds_outside_of_zero_and_one_are_refused() {
        for bad in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(Monitor::new(bad, 0.05).is_err() && Monitor::new(0.1, bad).is_err(), "{bad}");
        }
    }
}
