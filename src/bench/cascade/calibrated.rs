//! How well a score tells wrong answers from right ones, whatever the threshold: the area under the ROC curve, and how far
//! the probabilities of being wrong that isotonic regression makes of it are from what happened.
//!
//! To be replaced by the module of calibrations once that is there; it has the same regression and the same error.

use crate::replay::metrics::SplitMix;

const FOLDS: usize = 5;
const BINS: usize = 10;

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

/// Steps of P(wrong), by rising unsureness: where each begins, and its share of wrong answers (pooling adjacent violators:
/// Barlow et al., "Statistical Inference under Order Restrictions", 1972, section 1.2).
pub fn isotonic(seen: &[Seen]) -> Vec<(f64, f64)> {
    let mut sorted = seen.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Begin, answers, of which wrong.
    let mut steps: Vec<(f64, f64, f64)> = Vec::new();
    for same in sorted.chunk_by(|a, b| a.0 == b.0) {
        let mut step = (same[0].0, same.len() as f64, same.iter().filter(|s| s.1).count() as f64);
        while let Some(before) = steps.pop_if(|before| before.2 * step.1 >= step.2 * before.1) {
            step = (before.0, before.1 + step.1, before.2 + step.2);
        }
        steps.push(step);
    }
    steps.into_iter().map(|(from, all, wrong)| (from, wrong / all)).collect()
}

/// Expected calibration error over ten bins of equal mass (Naeini et al., AAAI 2015; Nixon et al., 2019) of isotonic
/// regression, each answer's probability being that of a fit to the four fifths without it. 0 without answers.
pub fn calibration_error(seen: &[Seen], seed: u64) -> f64 {
    let order = SplitMix(seed).order(seen.len());
    let mut predicted: Vec<Seen> = Vec::with_capacity(seen.len());
    for fold in 0..FOLDS {
        let of = |held: bool| order.iter().enumerate().filter(move |(n, _)| (n % FOLDS == fold) == held);
        let others: Vec<Seen> = of(false).map(|(_, i)| seen[*i]).collect();
        let steps = isotonic(&others);
        let p = |unsure: f64| {
            let at = steps.partition_point(|(from, _)| *from <= unsure);
            steps.get(at.saturating_sub(1)).map_or(1.0, |step| step.1)
        };
        predicted.extend(of(true).map(|(_, i)| (p(seen[*i].0), seen[*i].1)));
    }
    predicted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n = predicted.len();
    let (mut off, mut begun, mut closed) = (0.0, 0, 0);
    for end in 1..=n {
        // Equal predictions are never in two bins.
        let same = end < n && predicted[end].0 == predicted[end - 1].0;
        let full = end * BINS / n;
        if !same && full > closed {
            let bin = &predicted[begun..end];
            off += bin.iter().map(|(p, wrong)| p - f64::from(u8::from(*wrong))).sum::<f64>().abs();
            (begun, closed) = (end, full);
        }
    }
    off / n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_and_steps_are_those_on_paper() {
        let seen = [(0.1, false), (0.2, true), (0.3, false), (0.4, true)];
        assert_eq!(auroc(&seen), Some(0.75));
        assert_eq!(isotonic(&seen), [(0.1, 0.0), (0.2, 0.5), (0.4, 1.0)]);
        assert_eq!(auroc(&[(1.0, true), (1.0, false)]), Some(0.5));
        assert_eq!(auroc(&seen[..1]), None);
        assert_eq!(isotonic(&[(1.0, true), (2.0, false)]), [(1.0, 0.5)]);
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
