//! P(wrong | score) as the monotone step function nearest to the labels: isotonic regression by pooling adjacent
//! violators (Barlow, Bartholomew, Bremner, Brunk, "Statistical Inference under Order Restrictions", 1972, section 1.2;
//! as a calibration: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability
//! estimates", KDD 2002).
//!
//! Equal scores are one group from the start. A group that is wrong at least as often as the next less sure one is
//! pooled with it, until rates rise strictly; they are compared as fractions of whole numbers, so rounding never
//! decides.
//!
//! A step ends halfway between its last score and the next step's first. Steps and not lines between them: each value
//! is then the share of wrong answers among points that one can count, and a threshold at a step's end accepts exactly
//! the steps before. The last step ends next to the least sure score that was seen: beyond, nothing is known, and no
//! threshold lies there.

use serde::{Deserialize, Serialize};

use super::Direction;

/// A point by its unsureness: low is sure, whatever the score's direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Labelled {
    pub(super) unsure: f64,
    pub(super) wrong: bool,
}

/// Scores that are equally often wrong.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Where it ends, in the score's unit: scores on the sure side of this and of no earlier step belong to it.
    pub until: f64,
    /// Points in it, and how many of them were wrong.
    pub points: u64,
    pub wrong: u64,
}

impl Step {
    /// The share that was wrong.
    pub fn p_wrong(&self) -> f64 {
        self.wrong as f64 / self.points as f64
    }

    /// Whether this is wrong at least as often as `next`.
    fn violates(&self, next: &Self) -> bool {
        u128::from(self.wrong) * u128::from(next.points) >= u128::from(next.wrong) * u128::from(self.points)
    }
}

/// A step function that rises from sure scores to unsure ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Isotonic {
    /// The surest first.
    steps: Vec<Step>,
}

impl Isotonic {
    /// Fits to points sorted by unsureness.
    pub(super) fn fit(sorted: &[Labelled]) -> Self {
        Self { steps: pool(groups(sorted)) }
    }

    /// The surest first; shares that were wrong rise strictly.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// From unsureness to scores.
    pub(super) fn turned(mut self, direction: Direction) -> Self {
        self.steps.iter_mut().for_each(|step| step.until = direction.turned(step.until));
        self
    }

    /// That of the step that `score` lies in; beyond the last one, the last one's. 1 for NaN and without steps.
    pub(super) fn p_wrong(&self, score: f64, direction: Direction) -> f64 {
        if score.is_nan() {
            return 1.0;
        }
        let at = self.steps.partition_point(|step| !direction.accepts(score, step.until));
        self.steps.get(at).or(self.steps.last()).map_or(1.0, Step::p_wrong)
    }

    /// The end of the last step that is wrong with at most `p`.
    pub(super) fn threshold_at(&self, p: f64) -> Option<f64> {
        let qualify = self.steps.partition_point(|step| step.p_wrong() <= p);
        Some(self.steps.get(qualify.checked_sub(1)?)?.until)
    }
}

/// Halfway between two scores, above the first.
pub(super) fn between(a: f64, b: f64) -> f64 {
    let middle = 0.5 * a + 0.5 * b;
    // Neighbouring numbers have none between.
    if a < middle && middle < b { middle } else { b }
}

/// One step per distinct score.
fn groups(sorted: &[Labelled]) -> Vec<Step> {
    let mut groups: Vec<Step> = Vec::new();
    for same in sorted.chunk_by(|a, b| a.unsure == b.unsure) {
        let unsure = same[0].unsure;
        if let Some(before) = groups.last_mut() {
            before.until = between(before.until, unsure);
        }
        let wrong = same.iter().filter(|p| p.wrong).count() as u64;
        groups.push(Step { until: unsure, points: same.len() as u64, wrong });
    }
    if let Some(last) = groups.last_mut() {
        last.until = last.until.next_up();
    }
    groups
}

/// Pools neighbours until shares rise strictly.
fn pool(groups: Vec<Step>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for mut step in groups {
        while let Some(before) = steps.pop_if(|before| before.violates(&step)) {
            step.points += before.points;
            step.wrong += before.wrong;
        }
        steps.push(step);
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(mut points: Vec<(f64, bool)>) -> Vec<Labelled> {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.into_iter().map(|(unsure, wrong)| Labelled { unsure, wrong }).collect()
    }

    /// Few distinct scores, so that many are tied.
    fn any_points() -> impl Strategy<Value = Vec<Labelled>> {
        prop::collection::vec(((-20i8..20).prop_map(|s| f64::from(s) / 7.0), any::<bool>()), 1..150).prop_map(sorted)
    }

    fn value(fitted: &Isotonic, score: f64) -> f64 {
        fitted.p_wrong(score, Direction::LowIsSure)
    }

    proptest! {
        #[test]
        fn shares_rise_and_the_whole_is_kept(points in any_points()) {
            let fitted = Isotonic::fit(&points);
            let steps = fitted.steps();
            prop_assert!(steps.windows(2).all(|w| w[0].p_wrong() < w[1].p_wrong() && w[0].until < w[1].until));
            prop_assert_eq!(steps.iter().map(|s| s.points).sum::<u64>(), points.len() as u64);
            let wrong = points.iter().filter(|p| p.wrong).count() as u64;
            prop_assert_eq!(steps.iter().map(|s| s.wrong).sum::<u64>(), wrong);
            // The mean of the values at the points is that of the labels.
            let fit: f64 = points.iter().map(|p| value(&fitted, p.unsure)).sum();
            let labels: f64 = points.iter().map(|p| f64::from(u8::from(p.wrong))).sum();
            prop_assert!((fit - labels).abs() < 1e-9);
        }

        #[test]
        fn pooling_what_is_pooled_changes_nothing(points in any_points()) {
            let once = pool(groups(&points));
            prop_assert_eq!(pool(once.clone()), once);
        }

        /// The regression has a closed form without pooling: the largest, over starts up to a point, of the smallest
        /// mean over ends from it on.
        #[test]
        fn values_are_those_of_the_max_min_formula(points in any_points()) {
            let (fitted, groups) = (Isotonic::fit(&points), groups(&points));
            let mean = |some: &[Step]| {
                let (wrong, all) = some.iter().fold((0, 0), |(w, n), s| (w + s.wrong, n + s.points));
                wrong as f64 / all as f64
            };
            let mut distinct: Vec<f64> = points.iter().map(|p| p.unsure).collect();
            distinct.dedup();
            for (i, score) in distinct.iter().enumerate() {
                let smallest = |a: usize| (i..groups.len()).map(|b| mean(&groups[a..=b])).fold(1.0, f64::min);
                let expected = (0..=i).map(smallest).fold(0.0, f64::max);
                prop_assert!((value(&fitted, *score) - expected).abs() < 1e-12);
            }
        }

        #[test]
        fn a_threshold_accepts_what_is_wrong_at_most_so_often_and_no_less(points in any_points(), p in 0.0..1.0f64) {
            let fitted = Isotonic::fit(&points);
            let threshold = fitted.threshold_at(p).unwrap_or(f64::NEG_INFINITY);
            for point in &points {
                prop_assert_eq!(point.unsure < threshold, value(&fitted, point.unsure) <= p);
            }
        }
    }

    #[test]
    fn steps_end_halfway_and_belong_to_the_next_there() {
        let points = sorted(vec![(0.0, false), (1.0, false), (3.0, true), (3.0, false), (5.0, false), (9.0, true)]);
        let fitted = Isotonic::fit(&points);
        let shares: Vec<_> = fitted.steps().iter().map(|s| (s.until, s.points, s.wrong)).collect();
        assert_eq!(shares, [(2.0, 2, 0), (7.0, 3, 1), (9.0f64.next_up(), 1, 1)]);
        let at = [-5.0, 1.999, 2.0, 6.9, 7.0, 9.0, 50.0].map(|s| value(&fitted, s));
        assert_eq!(at, [0.0, 0.0, 1.0 / 3.0, 1.0 / 3.0, 1.0, 1.0, 1.0]);
        assert_eq!(fitted.threshold_at(0.2), Some(2.0));
        assert_eq!(fitted.threshold_at(1.0), Some(9.0f64.next_up()));
        assert_eq!(fitted.threshold_at(-0.1), None);
        assert_eq!(fitted.threshold_at(f64::NAN), None);
    }

    #[test]
    fn neighbouring_numbers_are_kept_apart() {
        let (a, b) = (1.0, 1.0f64.next_up());
        let fitted = Isotonic::fit(&sorted(vec![(a, false), (b, true)]));
        assert_eq!((value(&fitted, a), value(&fitted, b)), (0.0, 1.0));
        assert_eq!(between(-1e300, 1e300), 0.0);
    }
}
