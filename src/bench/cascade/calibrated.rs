//! How well a score tells wrong answers from right ones, whatever the threshold: the area under the ROC curve, and how far
//! the probabilities of being wrong that isotonic regression makes of it are from what happened.

use crate::cascade::calibration::{Ece, Point};

/// An answer: its unsureness (the score, or its negative where high is sure), and whether it was wrong.
pub type Seen = (f64, bool);

/// Probability that a wrong answer is less sure than a right one, ties counting a half (Hanley and McNeil, "The meaning and
/// use of the area under a receiver operating characteristic (ROC) curve", Radiology 143, 1982). `None` where all answers
/// are right, or all wrong.
pub fn auroc(seen: &[Seen]) -> Option<f64> {
    let wrong: Vec<f64> = seen.iter().filter(|s| s.1).map(|s| s.0).collect();
    let right: Vec<f64> = seen.iter().filter(|s| !s.1).map(|s| s.0).collect();
    let pairs = wrong.len() * right.len();
    let beats = |w: f64| -> f64 {
        right.iter().map(|r| if w > *r { 1.0 } else { f64::from(u8::from((w - r).abs() == 0.0)) / 2.0 }).sum()
    };
    (pairs > 0).then(|| wrong.iter().map(|w| beats(*w)).sum::<f64>() / pairs as f64)
}

/// Expected calibration error of isotonic regression, each answer's probability being that of a fit without it
/// ([`Ece::after`]). 0 without answers.
pub fn calibration_error(seen: &[Seen], seed: u64) -> f64 {
    Ece::of(seen.iter().map(|(unsure, wrong)| Point { score: *unsure, wrong: *wrong }), seed).after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::metrics::SplitMix;

    #[test]
    fn areas_are_those_on_paper() {
        let seen = [(0.1, false), (0.2, true), (0.3, false), (0.4, true)];
        assert_eq!(auroc(&seen), Some(0.75));
        assert_eq!(auroc(&[(1.0, true), (1.0, false)]), Some(0.5));
        assert_eq!(auroc(&seen[..1]), None);
    }

    #[test]
    fn probabilities_that_hold_have_hardly_an_error() {
        let mut rng = SplitMix(3);
        let mut draw = |p: &dyn Fn(f64) -> f64| -> Vec<Seen> {
            (0..4000).map(|_| rng.unit()).map(|x| (x, rng_below(&mut SplitMix(x.to_bits()), p(x)))).collect()
        };
        let seen = draw(&|x| x);
        assert!(calibration_error(&seen, 1) < 0.03, "{}", calibration_error(&seen, 1));
        // A score that says nothing: its probability is the rate of all.
        let seen = draw(&|_| 0.3);
        assert!(calibration_error(&seen, 1) < 0.05);
        assert!((auroc(&seen).unwrap() - 0.5).abs() < 0.05);
        assert_eq!(calibration_error(&[], 1), 0.0);
    }

    fn rng_below(rng: &mut SplitMix, p: f64) -> bool {
        rng.next_u64();
        rng.unit() < p
    }
}
