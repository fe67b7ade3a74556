//! Calibrates a gate of a cascade: from answers of a cheap model, each with a score and known to be wrong or right, how
//! often an answer with a given score is wrong, and a threshold whose accepted answers are wrong no more often than
//! somebody allows. No I/O, no clock; the same points in any order give the same bytes on any machine.
//!
//! Everything inside is in terms of unsureness: the score itself where low is sure, its negative where high is. A gate
//! accepts strictly on the sure side of its threshold, as `domain::Bound` does.
//!
//! - `isotonic`: P(wrong | score), rising with unsureness.
//! - `reliability`: how far such probabilities are from what happened.
//! - `learn_then_test`: a threshold with a guarantee, for as long as answers come from where the points came from.
//! - `monitor`: whether that still holds in production.
//! - `binomial`: the distribution that the guarantee rests on.

mod binomial;
mod draw;
mod isotonic;
mod learn_then_test;
mod monitor;
mod reliability;

pub use binomial::{binomial_cdf, clopper_pearson_upper};
pub use isotonic::{Isotonic, Step};
pub use learn_then_test::Guarantee;
pub use monitor::{Monitor, Verdict};
pub use reliability::Ece;

use serde::{Deserialize, Serialize};

use self::isotonic::Labelled;

/// Version of the artifact `*.calibration.json`; an artifact of another one is not read.
pub const FORMAT: u32 = 1;
/// Points that a calibration needs.
pub const MIN_POINTS: usize = 200;
/// Scores further from 0 than this count as not finite, so that no threshold beside them is infinite.
const LARGEST: f64 = 1e300;

/// An answer with a score, and whether it was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// In the score's unit.
    pub score: f64,
    pub wrong: bool,
}

/// Which scores speak for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    LowIsSure,
    HighIsSure,
}

impl Direction {
    /// Whether a gate with this threshold accepts: the score lies on the sure side; the threshold itself does not. NaN
    /// never does.
    pub fn accepts(self, score: f64, threshold: f64) -> bool {
        self.turned(score) < self.turned(threshold)
    }

    /// From a score to its unsureness and back. Zero has one sign.
    fn turned(self, x: f64) -> f64 {
        match self {
            Direction::LowIsSure => x + 0.0,
            Direction::HighIsSure => 0.0 - x,
        }
    }
}

/// What cannot be calibrated, or read as a calibration.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    #[error("{found} points are too few to calibrate with: {needed} are needed")]
    TooFew { found: usize, needed: usize },
    #[error("the score of point {index} is not a finite number of at most 1e300")]
    NotFinite { index: usize },
    #[error("{name} has to lie between 0 and 1 and is {value}")]
    OutOfRange { name: &'static str, value: f64 },
    #[error("a calibration of format {found} cannot be read: this is format {FORMAT}")]
    Format { found: u32 },
    #[error("the calibration is not what its own points give")]
    NotItsPoints,
    #[error("the monitor's state is none that observations lead to")]
    NotAState,
}

impl CalibrationError {
    /// Fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TooFew { .. } => "too_few",
            Self::NotFinite { .. } => "not_finite",
            Self::OutOfRange { .. } => "out_of_range",
            Self::Format { .. } => "format",
            Self::NotItsPoints => "not_its_points",
            Self::NotAState => "not_a_state",
        }
    }
}

/// The body of an artifact `*.calibration.json`. Reading one fits its points again and refuses what differs, so an
/// artifact that was edited by hand is not served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct Calibration {
    format: u32,
    score: String,
    direction: Direction,
    models: Vec<String>,
    seed: u64,
    ece: Ece,
    isotonic: Isotonic,
    points: Vec<Point>,
}

/// A [`Calibration`] as it is read, before anything is believed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    score: String,
    direction: Direction,
    models: Vec<String>,
    seed: u64,
    ece: Ece,
    isotonic: Isotonic,
    points: Vec<Point>,
}

impl TryFrom<Stored> for Calibration {
    type Error = CalibrationError;

    fn try_from(stored: Stored) -> Result<Self, CalibrationError> {
        let Stored { format, score, direction, models, seed, ece, isotonic, points } = stored;
        if format != FORMAT {
            return Err(CalibrationError::Format { found: format });
        }
        let read = Self { format, score, direction, models, seed, ece, isotonic, points };
        let fitted = Self::fit(read.score.clone(), direction, read.models.clone(), seed, read.points.iter().copied())?;
        if fitted == read { Ok(read) } else { Err(CalibrationError::NotItsPoints) }
    }
}

impl Calibration {
    /// Fits to `points`, in any order. `score` names what was measured, `models` whose answers; `seed` decides which
    /// points propose thresholds and which test them ([`Calibration::guaranteed`]): choose it before seeing any result,
    /// and only once.
    ///
    /// # Errors
    /// [`CalibrationError::NotFinite`] with the place of the first such score, else [`CalibrationError::TooFew`] below
    /// [`MIN_POINTS`].
    pub fn fit(
        score: impl Into<String>,
        direction: Direction,
        mut models: Vec<String>,
        seed: u64,
        points: impl IntoIterator<Item = Point>,
    ) -> Result<Self, CalibrationError> {
        let mut sorted = Vec::new();
        for (index, point) in points.into_iter().enumerate() {
            // NaN is not.
            let finite = point.score.abs() <= LARGEST;
            if !finite {
                return Err(CalibrationError::NotFinite { index });
            }
            sorted.push(Labelled { unsure: direction.turned(point.score), wrong: point.wrong });
        }
        if sorted.len() < MIN_POINTS {
            return Err(CalibrationError::TooFew { found: sorted.len(), needed: MIN_POINTS });
        }
        sorted.sort_by(|a, b| a.unsure.total_cmp(&b.unsure).then(a.wrong.cmp(&b.wrong)));
        models.sort();
        models.dedup();
        let points = sorted.iter().map(|p| Point { score: direction.turned(p.unsure), wrong: p.wrong }).collect();
        Ok(Self {
            format: FORMAT,
            score: score.into(),
            direction,
            models,
            seed,
            ece: reliability::measure(&sorted, seed),
            isotonic: Isotonic::fit(&sorted).turned(direction),
            points,
        })
    }

    /// The score's name.
    pub fn score(&self) -> &str {
        &self.score
    }

    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Whose answers were measured, by name.
    pub fn models(&self) -> &[String] {
        &self.models
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// All points, the surest first; of equal scores, those that were right.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// How far probabilities are from what happened, before and after calibration.
    pub fn ece(&self) -> Ece {
        self.ece
    }

    pub fn isotonic(&self) -> &Isotonic {
        &self.isotonic
    }

    /// Probability that an answer with this score is wrong. 1 for NaN.
    pub fn p_wrong(&self, score: f64) -> f64 {
        self.isotonic.p_wrong(score, self.direction)
    }

    /// The threshold, in the score's unit, that accepts the most answers of which each is wrong with a probability of
    /// at most `p`: all that it accepts have [`Calibration::p_wrong`] <= `p`. An estimate without a guarantee. `None`
    /// where nothing qualifies.
    pub fn threshold_at(&self, p: f64) -> Option<f64> {
        self.isotonic.threshold_at(p)
    }

    /// The threshold, in the score's unit, that accepts at least this share of the points, the surest, and no more of them than
    /// those with the same score.
    ///
    /// # Errors
    /// [`CalibrationError::OutOfRange`] where the share is not between 0 and 1.
    pub fn threshold_accepting(&self, share: f64) -> Result<f64, CalibrationError> {
        open_unit("accepted", share)?;
        let labelled = self.labelled();
        let wanted = ((share * labelled.len() as f64).ceil() as usize).max(1);
        let last = labelled[wanted.min(labelled.len()) - 1].unsure;
        let next = labelled.iter().map(|p| p.unsure).find(|unsure| *unsure > last);
        Ok(self.direction.turned(next.map_or(last + 1.0, |next| isotonic::between(last, next))))
    }

    /// A threshold below which (above, where high is sure) the answers of the points' source are wrong with a rate of
    /// at most `max_error`, unless the points are of the unluckiest 1 - `confidence` of all such samples. `None` where
    /// the points certify none. How, and what it assumes: the head of `learn_then_test.rs`. The guarantee is for
    /// one call: of several with different bounds, each alone holds with its confidence.
    ///
    /// # Errors
    /// [`CalibrationError::OutOfRange`] where an argument is not between 0 and 1.
    pub fn guaranteed(&self, max_error: f64, confidence: f64) -> Result<Option<Guarantee>, CalibrationError> {
        open_unit("max_error", max_error)?;
        open_unit("confidence", confidence)?;
        let certified = learn_then_test::certify(&self.labelled(), self.seed, max_error, confidence);
        Ok(certified.map(|g| Guarantee { threshold: self.direction.turned(g.threshold), ..g }))
    }

    fn labelled(&self) -> Vec<Labelled> {
        let of = |p: &Point| Labelled { unsure: self.direction.turned(p.score), wrong: p.wrong };
        self.points.iter().map(of).collect()
    }
}

/// Strictly between 0 and 1.
fn open_unit(name: &'static str, value: f64) -> Result<(), CalibrationError> {
    if value > 0.0 && value < 1.0 { Ok(()) } else { Err(CalibrationError::OutOfRange { name, value }) }
}

#[cfg(test)]
mod tests;
