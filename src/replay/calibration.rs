//! Whether what a selector expects is what comes: reliability (Murphy, Winkler, "Reliability of subjective probability
//! forecasts", 1977) over groups of as many predictions each, and the mean distance (adaptive calibration error; Nixon et
//! al., "Measuring calibration in deep learning", 2019, section 3).

use serde::{Deserialize, Serialize};

use crate::policy::Expects;

/// Cells that predictions are gathered in, from [`FROM`] on, [`WIDTH`] wide; what is outside counts to the outermost.
const CELLS: usize = 600;
const FROM: f64 = -1.0;
const WIDTH: f64 = 0.005;
/// Groups that are told, at most.
const GROUPS: usize = 10;

/// Predictions beside what came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    pub of: Expects,
    pub predictions: u64,
    /// Mean over predictions of the distance between their group's mean prediction and its mean outcome.
    pub error: f64,
    /// By rising prediction.
    pub groups: Vec<Group>,
}

/// Predictions that are near each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub predictions: u64,
    /// Means.
    pub predicted: f64,
    pub came: f64,
}

impl Group {
    fn add(&mut self, other: &Self) {
        self.predictions += other.predictions;
        self.predicted += other.predicted;
        self.came += other.came;
    }
}

/// Takes predictions one by one; memory does not grow with their number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reliability(Vec<Group>);

impl Default for Reliability {
    fn default() -> Self {
        Self(vec![Group::default(); CELLS])
    }
}

impl Reliability {
    /// Numbers that are not finite are left out.
    pub fn take(&mut self, predicted: f64, came: f64) {
        if predicted.is_finite() && came.is_finite() {
            let cell = ((predicted - FROM) / WIDTH).clamp(0.0, (CELLS - 1) as f64) as usize;
            self.add(cell, Group { predictions: 1, predicted, came });
        }
    }

    /// Sums here.
    fn add(&mut self, cell: usize, of: Group) {
        self.0[cell].add(&of);
    }

    pub fn merge(&mut self, other: &Self) {
        other.0.iter().enumerate().filter(|(_, g)| g.predictions > 0).for_each(|(cell, group)| self.add(cell, *group));
    }

    /// `None` where there was no prediction.
    pub fn finish(&self, of: Expects) -> Option<Calibration> {
        let predictions: u64 = self.0.iter().map(|g| g.predictions).sum();
        let share = (predictions as f64 / GROUPS as f64).max(1.0);
        // Sums; a group ends where it has its share, and what is left in the end goes to the last.
        let mut groups: Vec<Group> = Vec::new();
        for cell in self.0.iter().filter(|cell| cell.predictions > 0) {
            match groups.last_mut() {
                Some(last) if (last.predictions as f64) < share => last.add(cell),
                _ => groups.push(*cell),
            }
        }
        if let [.., before, last] = &mut groups[..]
            && (last.predictions as f64) < 0.5 * share
        {
            before.add(last);
            groups.pop();
        }
        for g in &mut groups {
            let n = g.predictions as f64;
            *g = Group { predicted: g.predicted / n, came: g.came / n, ..*g };
        }
        let off: f64 = groups.iter().map(|g| g.predictions as f64 * (g.predicted - g.came).abs()).sum();
        (predictions > 0).then(|| Calibration { of, predictions, error: off / predictions as f64, groups })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::metrics::SplitMix;

    #[test]
    fn what_is_right_on_average_is_calibrated() {
        let mut rng = SplitMix(3);
        let (mut right, mut bold) = (Reliability::default(), Reliability::default());
        for _ in 0..100_000 {
            let p = rng.unit();
            let came = f64::from(u8::from(rng.unit() < p));
            right.take(p, came);
            // As sure as if all were nearly known.
            bold.take(if p > 0.5 { 0.99 } else { 0.01 }, came);
        }
        right.take(f64::NAN, 1.0);
        // A few that are far off are not a group of their own.
        (0..5).for_each(|_| bold.take(1.9, 0.0));
        let right = right.finish(Expects::Quality).unwrap();
        assert_eq!((right.predictions, right.groups.len()), (100_000, 10));
        assert!(right.error < 0.01, "{}", right.error);
        let bold = bold.finish(Expects::Quality).unwrap();
        assert_eq!(bold.groups.len(), 2);
        assert!((bold.error - 0.24).abs() < 0.01, "{}", bold.error);
        assert_eq!(bold.groups.iter().map(|g| g.predictions).sum::<u64>(), 100_005);
        assert_eq!(Reliability::default().finish(Expects::Reward), None);
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let values: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i) / 16.0 - 1.0, f64::from(i % 3))).collect();
        let of = |some: &[(f64, f64)]| {
            let mut made = Reliability::default();
            some.iter().for_each(|(p, c)| made.take(*p, *c));
            made
        };
        let mut parts = of(&values[..20]);
        parts.merge(&of(&values[20..]));
        assert_eq!(parts.finish(Expects::Reward), of(&values).finish(Expects::Reward));
    }
}
