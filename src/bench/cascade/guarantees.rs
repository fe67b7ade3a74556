//! Guaranteed gates over a population of known risk: all recorded answers, of which every one is known to be right or
//! wrong. Each draw takes a sample, with replacement, calibrates a gate with it as `weir policy fit --cascade` does, and asks
//! the whole population how many of the answers that the gate accepts are wrong.

use rayon::prelude::*;
use serde::Serialize;

use super::answers::Answer;
use crate::{
    cascade::calibration::{Calibration, CalibrationError, Direction, Point},
    domain::{Bound, Score},
    replay::metrics::SplitMix,
};

const SCORES: [Score; 3] = [Score::MeanTokenEntropy, Score::MeanLogprob, Score::LogprobQuantile(0.0)];
/// Shares of accepted answers that may be wrong. The population is wrong more often than not, so that less is seldom to be had.
const BOUNDS: [f64; 3] = [0.2, 0.3, 0.4];
const CONFIDENCE: f64 = 0.95;
/// Answers that a gate is calibrated with.
const SAMPLE: usize = 500;

/// One gate over all draws.
#[derive(Clone, Debug, Serialize)]
pub struct Guaranteed {
    pub score: String,
    pub max_error: f64,
    pub confidence: f64,
    pub draws: u64,
    /// In which a threshold kept the bound, by its calibration; in the others nothing is accepted.
    pub certified: u64,
    /// In which the bound holds of the population.
    pub held: u64,
    /// Means over the draws with a threshold: the shares of the population that are accepted, and of these that are wrong.
    pub accepted: f64,
    pub wrong: f64,
}

/// Every score that answers have, with every bound.
///
/// # Errors
/// Where a score of an answer is no number.
pub fn judge(answers: &[Answer], draws: u64, seed: u64) -> Result<Vec<Guaranteed>, CalibrationError> {
    let mut rows = Vec::new();
    for score in SCORES {
        let point = |answer: &Answer| Some(Point { score: answer.score(score)?, wrong: !answer.correct });
        let population: Vec<Point> = answers.iter().filter_map(point).collect();
        if population.is_empty() {
            continue;
        }
        for max_error in BOUNDS {
            let one = |draw: u64| accepted(score, &population, max_error, seed ^ (draw << 20));
            let drawn: Vec<Option<(f64, f64)>> = (0..draws).into_par_iter().map(one).collect::<Result<_, _>>()?;
            let certified: Vec<(f64, f64)> = drawn.iter().flatten().copied().collect();
            let mean =
                |of: fn(&(f64, f64)) -> f64| certified.iter().map(of).sum::<f64>() / certified.len().max(1) as f64;
            rows.push(Guaranteed {
                score: score.to_string(),
                max_error,
                confidence: CONFIDENCE,
                draws,
                certified: certified.len() as u64,
                held: drawn.iter().filter(|of| of.is_none_or(|(_, wrong)| wrong <= max_error)).count() as u64,
                accepted: mean(|of| of.0),
                wrong: mean(|of| of.1),
            });
        }
    }
    Ok(rows)
}

/// Of the population, the share that a gate accepts which was calibrated with one sample, and the share of these that is
/// wrong. `None` where no threshold keeps the bound.
fn accepted(score: Score, of: &[Point], max_error: f64, seed: u64) -> Result<Option<(f64, f64)>, CalibrationError> {
    let mut rng = SplitMix(seed);
    rng.next_u64();
    let sample: Vec<Point> = (0..SAMPLE).map(|_| of[rng.below(of.len())]).collect();
    let direction = if score.high_is_sure() { Direction::HighIsSure } else { Direction::LowIsSure };
    let calibration = Calibration::fit(score.to_string(), direction, Vec::new(), seed, sample)?;
    let Some(guarantee) = calibration.guaranteed(max_error, CONFIDENCE)? else { return Ok(None) };
    let threshold = guarantee.threshold;
    let bound = if score.high_is_sure() { Bound::Above(threshold) } else { Bound::Below(threshold) };
    let passed: Vec<&Point> = of.iter().filter(|point| bound.holds(point.score)).collect();
    let wrong = passed.iter().filter(|point| point.wrong).count() as f64 / passed.len().max(1) as f64;
    Ok(Some((passed.len() as f64 / of.len() as f64, wrong)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cascade::answers::tests::answer;

    #[test]
    fn bounds_are_held_over_draws_and_what_cannot_be_is_not_certified() {
        // Below 0.3 one in ten is wrong, above nine in ten.
        let of = |i: u32| {
            let entropy = f64::from(i % 100) / 100.0;
            let wrong = (entropy < 0.3) == (i / 100).is_multiple_of(10);
            answer(&format!("t-{i}"), 0.0, 0, if wrong { "5" } else { "4" }, entropy)
        };
        let answers: Vec<Answer> = (0..2000).map(of).collect();
        let rows = judge(&answers, 40, 3).unwrap();
        let entropy: Vec<&Guaranteed> = rows.iter().filter(|row| row.score == "mean_token_entropy").collect();
        assert_eq!(entropy.len(), BOUNDS.len());
        for row in entropy {
            assert!(row.held >= 36 && row.certified >= 30, "{row:?}");
            assert!(row.accepted > 0.15 && row.wrong <= row.max_error, "{row:?}");
        }
    }
}
