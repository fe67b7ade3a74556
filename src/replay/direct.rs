//! The reward model q̂ of the direct method: per arm a ridge regression of the reward on the request's features, fitted on
//! the log itself by cross-fitting (Chernozhukov et al., "Double/debiased machine learning", 2018, section 3): a row is
//! predicted by the fit that has not seen its session, so that q̂ is independent of the rewards that it is corrected by.

use serde::{Deserialize, Serialize};

use crate::policy::linalg;

/// Parts of the log; a row of one is predicted by the others.
pub const PARTS: usize = 2;

/// Sums per part and arm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Direct {
    dimensions: usize,
    /// Arms x parts.
    sums: Vec<Sums>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sums {
    a: Vec<f64>,
    b: Vec<f64>,
    count: f64,
    reward: f64,
}

/// Coefficients per part and arm.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// Arms x parts; what a row of that part is predicted by.
    theta: Vec<Vec<f64>>,
}

impl Direct {
    /// For `arms` arms and features of `dimensions`, the first being the constant 1.
    pub fn new(dimensions: usize, arms: usize) -> Self {
        let mut made = Self { dimensions, sums: Vec::new() };
        made.reach(arms);
        made
    }

    /// Makes room for as many arms.
    pub fn reach(&mut self, arms: usize) {
        let d = self.dimensions;
        let empty = || Sums { a: vec![0.0; linalg::packed_len(d)], b: vec![0.0; d], count: 0.0, reward: 0.0 };
        self.sums.resize_with(self.sums.len().max(PARTS * arms), empty);
    }

    /// Takes a rewarded row, of any arm.
    pub fn take(&mut self, part: usize, arm: usize, x: &[f64], reward: f64) {
        self.reach(arm + 1);
        let sums = &mut self.sums[arm * PARTS + part];
        linalg::rank_one(&mut sums.a, x, 1.0);
        sums.b.iter_mut().zip(x).for_each(|(b, x)| *b += reward * x);
        sums.count += 1.0;
        sums.reward += reward;
    }

    /// Solves. Coefficients are shrunk towards the mean reward of the other parts, with a weak ridge on the constant, so an
    /// arm that was hardly taken is predicted as the average arm is.
    pub fn fit(&self) -> Fitted {
        let d = self.dimensions;
        let arms = self.sums.chunks_exact(PARTS);
        let means: [f64; PARTS] = std::array::from_fn(|part| {
            let total = |of: fn(&Sums) -> f64| -> f64 { arms.clone().flat_map(|arm| others(arm, part)).map(of).sum() };
            let count = total(|s| s.count);
            if count > 0.0 { total(|s| s.reward) / count } else { 0.0 }
        });
        let mut theta = Vec::with_capacity(self.sums.len());
        for arm in arms {
            for (part, mean) in means.iter().enumerate() {
                let (mut a, mut b) = (vec![0.0; linalg::packed_len(d)], vec![0.0; d]);
                for sums in others(arm, part) {
                    a.iter_mut().zip(&sums.a).for_each(|(a, s)| *a += s);
                    b.iter_mut().zip(&sums.b).for_each(|(b, s)| *b += s);
                }
                // On rewards less the mean: b - mean Σ x, and Σ x is the column of the constant.
                for (i, b) in b.iter_mut().enumerate() {
                    *b -= mean * a[i * (i + 1) / 2];
                }
                let factor = linalg::cholesky(&a, d, |i| if i == 0 { 1.0 } else { 10.0 });
                let mut theta_of = factor.map_or_else(|| vec![0.0; d], |l| linalg::solve(&l, &b));
                if let Some(constant) = theta_of.first_mut() {
                    *constant += mean;
                }
                theta.push(theta_of);
            }
        }
        Fitted { theta }
    }
}

/// The sums of an arm's other parts.
fn others(arm: &[Sums], part: usize) -> impl Iterator<Item = &Sums> {
    arm.iter().enumerate().filter(move |(p, _)| *p != part).map(|(_, sums)| sums)
}

impl Fitted {
    /// q̂(x, arm) for a row of `part`.
    pub fn predict(&self, part: usize, arm: usize, x: &[f64]) -> f64 {
        linalg::dot(&self.theta[arm * PARTS + part], x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_predicted_by_the_other() {
        let mut direct = Direct::new(2, 2);
        for n in 0..2000 {
            let x = [1.0, f64::from(n % 10) / 10.0];
            direct.take(0, 0, &x, 0.2 + 0.5 * x[1]);
            direct.take(1, 0, &x, 0.9);
        }
        let fitted = direct.fit();
        assert!((fitted.predict(1, 0, &[1.0, 0.8]) - 0.6).abs() < 0.02);
        assert!((fitted.predict(0, 0, &[1.0, 0.8]) - 0.9).abs() < 0.02);
        // Never taken: the mean of what was.
        assert!((fitted.predict(0, 1, &[1.0, 0.3]) - 0.9).abs() < 1e-9);
    }
}
