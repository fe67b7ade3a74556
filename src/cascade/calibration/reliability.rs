//! Expected calibration error (Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
//! binning", AAAI 2015) over bins of equal mass (Nixon et al., "Measuring calibration in deep learning", 2019): the
//! mean over points of the distance between their bin's mean prediction and the share of it that was wrong.
//!
//! Equal predictions are never in two bins, else the order among them would decide; a bin may then be larger than a
//! tenth.

use serde::{Deserialize, Serialize};

use super::{
    Direction, Point,
    draw::{Purpose, order},
    isotonic::{Isotonic, Labelled},
};

const BINS: usize = 10;
const FOLDS: usize = 5;

/// Expected calibration errors, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ece {
    /// Of the raw score taken for a probability: its unsureness, stretched from 0 for the surest point to 1 for the
    /// least sure one.
    pub before: f64,
    /// Of the isotonic regression, each point's probability being that of a fit to the four fifths without it.
    pub after: f64,
}

impl Ece {
    /// Of points whose score is high where the answer was unsure. `seed` deals them to the folds.
    pub fn of(points: impl IntoIterator<Item = Point>, seed: u64) -> Self {
        let labelled = |p: Point| Labelled { unsure: p.score, wrong: p.wrong };
        let mut sorted: Vec<Labelled> = points.into_iter().map(labelled).collect();
        sorted.sort_by(|a, b| a.unsure.total_cmp(&b.unsure).then(a.wrong.cmp(&b.wrong)));
        measure(&sorted, seed)
    }
}

/// Both errors of points sorted by unsureness.
pub(super) fn measure(sorted: &[Labelled], seed: u64) -> Ece {
    Ece { before: ece(raw(sorted)), after: ece(out_of_fold(sorted, seed)) }
}

/// A prediction, and whether the answer was wrong.
type Predicted = (f64, bool);

fn raw(sorted: &[Labelled]) -> Vec<Predicted> {
    let least = sorted.first().map_or(0.0, |p| p.unsure);
    let width = sorted.last().map_or(0.0, |p| p.unsure) - least;
    // Scores that are all the same say nothing.
    let stretched = |p: &Labelled| if width > 0.0 { (p.unsure - least) / width } else { 0.5 };
    sorted.iter().map(|p| (stretched(p), p.wrong)).collect()
}

fn out_of_fold(sorted: &[Labelled], seed: u64) -> Vec<Predicted> {
    let mut fold = vec![0; sorted.len()];
    for (place, point) in order(sorted, seed, Purpose::Fold).into_iter().enumerate() {
        fold[point] = place % FOLDS;
    }
    let mut predicted = Vec::with_capacity(sorted.len());
    for left_out in 0..FOLDS {
        let (held, others): (Vec<_>, Vec<_>) = sorted.iter().zip(&fold).partition(|(_, fold)| **fold == left_out);
        let others: Vec<Labelled> = others.into_iter().map(|(p, _)| *p).collect();
        let fitted = Isotonic::fit(&others);
        predicted.extend(held.iter().map(|(p, _)| (fitted.p_wrong(p.unsure, Direction::LowIsSure), p.wrong)));
    }
    predicted
}

/// 0 without predictions.
fn ece(mut predicted: Vec<Predicted>) -> f64 {
    predicted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all = predicted.len();
    let (mut off, mut seen, mut closed) = (0.0, 0, 0);
    let (mut sum, mut wrong) = (0.0, 0.0);
    for same in predicted.chunk_by(|a, b| a.0 == b.0) {
        seen += same.len();
        sum += same[0].0 * same.len() as f64;
        wrong += same.iter().filter(|p| p.1).count() as f64;
        // How many tenths are full.
        let full = seen * BINS / all;
        if full > closed {
            off += f64::abs(sum - wrong);
            (closed, sum, wrong) = (full, 0.0, 0.0);
        }
    }
    off / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_on_average_within_every_tenth_is_no_error() {
        // 10 predictions of 100 points each, as often wrong as predicted.
        let points: Vec<_> = (0..1000).map(|i| (f64::from(i / 100) / 10.0, i % 100 < i / 100 * 10)).collect();
        assert!(ece(points.clone()) < 1e-12);
        // All too high by 0.05; then the surest tenth alone is off by 1.
        assert!((ece(points.iter().map(|(p, w)| (p + 0.05, *w)).collect()) - 0.05).abs() < 1e-12);
        let bold = points.iter().enumerate().map(|(i, (p, w))| (*p, i < 100 || *w)).collect();
        assert!((ece(bold) - 0.1).abs() < 1e-12);
        assert_eq!(ece(Vec::new()), 0.0);
    }

    #[test]
    fn the_order_among_equal_predictions_does_not_matter() {
        let mut points: Vec<_> = (0..200).map(|i| (0.3, i < 60)).collect();
        assert!(ece(points.clone()) < 1e-12);
        points.reverse();
        assert!(ece(points) < 1e-12);
    }

    #[test]
    fn errors_are_of_points_that_a_fit_has_not_seen() {
        // Wrong by chance: a fit finds steps in its own points that do not hold for others.
        let chance: Vec<_> = (0..400u64)
            .map(|i| Labelled { unsure: i as f64, wrong: i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 1 })
            .collect();
        let fitted = Isotonic::fit(&chance);
        let own = ece(chance.iter().map(|p| (fitted.p_wrong(p.unsure, Direction::LowIsSure), p.wrong)).collect());
        let measured = measure(&chance, 1);
        assert!(measured.after > own, "{} {own}", measured.after);
        // The raw score runs from 0 to 1 while a half is wrong everywhere: off by a quarter on average.
        assert!((measured.before - 0.25).abs() < 0.06, "{}", measured.before);
        assert!(measured.after < 0.1, "{}", measured.after);
    }
}
