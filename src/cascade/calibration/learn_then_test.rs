//! A threshold whose accepted answers are wrong with a rate of at most alpha, with confidence 1 - delta over the draw
//! of the points: "Learn then Test" (Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then Test: Calibrating Predictive
//! Algorithms to Achieve Risk Control", arXiv 2110.01052), with exact binomial p-values and split fixed-sequence
//! testing.
//!
//! Each threshold t has a hypothesis, "of answers accepted at t, more than alpha are wrong"; certifying t is rejecting
//! it.
//!
//! 1. A fifth of the points, drawn at random, proposes: thresholds between its distinct scores, at most [`GRID`],
//!    evenly spread over their ranks; and where among them to start.
//! 2. The others test, from the start to ever more coverage: with n of them accepted and k of those wrong, t is
//!    certified where P(Bin(n, alpha) <= k) <= delta, which is where Clopper and Pearson's upper bound is at most
//!    alpha. The first threshold that is not certified ends it; the one before is the answer.
//!
//! Why it holds. The proposing points are independent of the testing ones, so the sequence is fixed for these. Given
//! how many testing points lie below t, each of them is wrong independently with the rate at t: k is binomial, and the
//! p-value is valid at each t, however the risk goes with the score. To certify any threshold falsely, the sequence has
//! to pass the first false one in it, which has a probability of at most delta. Nothing is shared out among the
//! thresholds.
//!
//! What it assumes: points that are independent draws from the answers to come, and a seed chosen without looking. What
//! it does not: that risk rises with the score, or scores without ties; a threshold parts no equal scores.
//!
//! The start. At few accepted points no p-value can be small (below 29 for 0.1 and 0.95, even with none wrong), and
//! sure scores may be the wrong ones; a sequence from the most cautious threshold on would end at once. So the start is
//! the threshold whose p-value promises to be smallest: that of as many accepted and wrong points as the proposing part
//! has, scaled to the testing part. Its rate is (k + 1/2) / (n + 1), so that few points without a wrong one promise
//! little.
//!
//! Choices, measured (400 to 1500 samples each of 300, 500, 1000 and 2000 points from 9 populations with something to
//! certify, at 0.1 and 0.95; mean share of the largest coverage that is within alpha): a fifth proposing against 3/20,
//! 1/4 and 3/10 differs by at most 0.01, a half loses up to 0.08; 50 thresholds and 80 are the same, 10 lose up to
//! 0.04. The most cautious start gets less than half. A fifth of delta kept for a second start loses 0.01 to 0.02;
//! Bonferroni's correction over ten quantiles of all points, without a split, 0.05 to 0.08.

use serde::{Deserialize, Serialize};

use super::{
    binomial::{binomial_cdf, clopper_pearson_upper},
    draw::{Purpose, order},
    isotonic::{Labelled, between},
};

/// One of so many points proposes.
const PROPOSING: usize = 5;
/// Thresholds, at most.
const GRID: usize = 50;

/// A threshold that testing points certify.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guarantee {
    /// In the score's unit; it is not accepted itself.
    pub threshold: f64,
    /// The rate of wrong answers among accepted ones is at most this,
    pub max_error: f64,
    /// with this confidence.
    pub confidence: f64,
    /// Testing points that the threshold accepts, and how many of them were wrong.
    pub accepted: u64,
    pub wrong: u64,
    /// Upper bound of Clopper and Pearson at the threshold, at most `max_error`. What is guaranteed is `max_error`:
    /// below, the bound does not count that this threshold was chosen among several.
    pub upper_bound: f64,
    /// Testing points.
    pub of: u64,
    /// `accepted` / `of`.
    pub coverage: f64,
}

/// The threshold with the most coverage that points sorted by unsureness certify; here in unsureness. Both numbers lie
/// between 0 and 1.
pub(super) fn certify(sorted: &[Labelled], seed: u64, max_error: f64, confidence: f64) -> Option<Guarantee> {
    let (proposing, testing) = split(sorted, seed);
    let delta = 1.0 - confidence;
    let grid = grid(&proposing);
    let from = start(&grid, &proposing, testing.len(), max_error)?;
    let certified = |t: &&f64| testing.accepted(**t).p_value(max_error) <= delta;
    let threshold = *grid[from..].iter().take_while(certified).last()?;
    let Counts { accepted, wrong } = testing.accepted(threshold);
    let of = testing.len();
    Some(Guarantee {
        threshold,
        max_error,
        confidence,
        accepted,
        wrong,
        upper_bound: clopper_pearson_upper(wrong, accepted, confidence),
        of,
        coverage: accepted as f64 / of as f64,
    })
}

/// What a threshold accepts.
#[derive(Clone, Copy)]
struct Counts {
    accepted: u64,
    wrong: u64,
}

impl Counts {
    /// Of the hypothesis that more than `alpha` of what is accepted is wrong. 1 where nothing is accepted.
    fn p_value(self, alpha: f64) -> f64 {
        binomial_cdf(self.wrong, self.accepted, alpha)
    }
}

/// Points sorted by unsureness, with what lies below each.
struct Part {
    unsure: Vec<f64>,
    /// Wrong ones among the first 0, 1, 2, ... points.
    wrong: Vec<u64>,
}

impl Part {
    fn new(sorted: impl Iterator<Item = Labelled>) -> Self {
        let mut part = Self { unsure: Vec::new(), wrong: vec![0] };
        let mut wrong = 0;
        for point in sorted {
            wrong += u64::from(point.wrong);
            part.unsure.push(point.unsure);
            part.wrong.push(wrong);
        }
        part
    }

    fn len(&self) -> u64 {
        self.unsure.len() as u64
    }

    fn accepted(&self, threshold: f64) -> Counts {
        let accepted = self.unsure.partition_point(|u| *u < threshold);
        Counts { accepted: accepted as u64, wrong: self.wrong[accepted] }
    }
}

/// The points that propose and those that test, both still sorted.
fn split(sorted: &[Labelled], seed: u64) -> (Part, Part) {
    let mut proposes = vec![false; sorted.len()];
    for place in order(sorted, seed, Purpose::Split).into_iter().take(sorted.len() / PROPOSING) {
        proposes[place] = true;
    }
    let of = |which: bool| sorted.iter().zip(&proposes).filter(move |(_, p)| **p == which).map(|(point, _)| *point);
    (Part::new(of(true)), Part::new(of(false)))
}

/// Thresholds by rising coverage: between distinct scores, and the last one above them all.
fn grid(proposing: &Part) -> Vec<f64> {
    let mut distinct = proposing.unsure.clone();
    distinct.dedup();
    let mut all: Vec<f64> = distinct.windows(2).map(|w| between(w[0], w[1])).collect();
    all.extend(distinct.last().map(|last| last.next_up()));
    let n = all.len();
    if n <= GRID { all } else { (1..=GRID).map(|j| all[(j * n).div_ceil(GRID) - 1]).collect() }
}

/// Where in the grid the least p-value is promised; of equal ones the most cautious. `None` for an empty grid.
fn start(grid: &[f64], proposing: &Part, testing: u64, alpha: f64) -> Option<usize> {
    let promised = |t: &f64| {
        let seen = proposing.accepted(*t);
        let accepted = seen.accepted * testing / proposing.len().max(1);
        let rate = (seen.wrong as f64 + 0.5) / (seen.accepted as f64 + 1.0);
        Counts { accepted, wrong: (accepted as f64 * rate).ceil() as u64 }.p_value(alpha)
    };
    let promises = grid.iter().map(promised).enumerate();
    promises.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many wrong ones, spread evenly, in each of these blocks of points.
    fn blocks(of: &[(usize, usize)]) -> Vec<Labelled> {
        let mut points = Vec::new();
        for (n, wrong) in of {
            for i in 0..*n {
                let wrong = (i + 1) * wrong / n > i * wrong / n;
                points.push(Labelled { unsure: points.len() as f64, wrong });
            }
        }
        points
    }

    #[test]
    fn a_fifth_proposes_and_no_point_is_lost() {
        let points = blocks(&[(1003, 300)]);
        let (proposing, testing) = split(&points, 5);
        assert_eq!((proposing.len(), testing.len()), (200, 803));
        assert_eq!(proposing.accepted(2000.0).wrong + testing.accepted(2000.0).wrong, 300);
        let mut both = [proposing.unsure, testing.unsure].concat();
        both.sort_by(f64::total_cmp);
        assert_eq!(both, points.iter().map(|p| p.unsure).collect::<Vec<_>>());
    }

    #[test]
    fn a_grid_rises_to_all_points_and_parts_no_equal_scores() {
        let many = Part::new(blocks(&[(1000, 0)]).into_iter());
        let thresholds = grid(&many);
        assert_eq!(thresholds.len(), GRID);
        assert!(thresholds.windows(2).all(|w| many.accepted(w[1]).accepted - many.accepted(w[0]).accepted == 20));
        assert_eq!(many.accepted(thresholds[GRID - 1]).accepted, 1000);
        let tied = Part::new((0..90).map(|i| Labelled { unsure: f64::from(i / 30), wrong: false }));
        assert_eq!(grid(&tied), [0.5, 1.5, 2.0f64.next_up()]);
    }

    #[test]
    fn the_start_passes_by_sure_scores_that_are_wrong_and_counts_that_cannot_certify() {
        let wrong_first = Part::new(blocks(&[(20, 10), (100, 2), (80, 60)]).into_iter());
        let thresholds = grid(&wrong_first);
        let from = start(&thresholds, &wrong_first, 800, 0.2).unwrap();
        assert!((100..=125).contains(&wrong_first.accepted(thresholds[from]).accepted));
        // One point right, the others wrong: nothing promises anything, and the first threshold accepts too few.
        let none = Part::new(blocks(&[(1, 0), (199, 199)]).into_iter());
        let from = start(&grid(&none), &none, 800, 0.1).unwrap();
        assert!(none.accepted(grid(&none)[from]).accepted < 29);
    }

    #[test]
    fn what_is_certified_is_the_last_in_an_unbroken_sequence() {
        let points = blocks(&[(400, 4), (200, 20), (400, 300)]);
        let found = certify(&points, 1, 0.1, 0.95).unwrap();
        let (proposing, testing) = split(&points, 1);
        let grid = grid(&proposing);
        let at = grid.iter().position(|t| *t == found.threshold).unwrap();
        assert!(testing.accepted(grid[at]).p_value(0.1) <= 0.05);
        assert!(testing.accepted(grid[at + 1]).p_value(0.1) > 0.05);
        assert!(found.upper_bound <= 0.1 && found.upper_bound > found.wrong as f64 / found.accepted as f64);
        assert_eq!(found.of, 800);
        assert!(found.coverage > 0.55 && found.coverage < 0.7, "{}", found.coverage);
    }
}
