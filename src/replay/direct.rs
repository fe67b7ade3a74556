//! The reward model q̂ of the direct method: per arm a ridge regression of the reward on the request's features, fitted on
//! the log itself by cross-fitting (Chernozhukov et al., "Double/debiased machine learning", 2018, section 3): a row is
//! predicted by the fit that has not seen its session, so that q̂ is independent of the rewards that it is corrected by.

use crate::policy::linalg;

/// Parts of the log; a row of one is predicted by the others.
pub const PARTS: usize = 2;

/// Sums per part and arm.
#[derive(Clone, Debug)]
pub struct Direct {
    dimensions: usize,
    arms: usize,
    /// Parts x arms.
    sums: Vec<Sums>,
}

#[derive(Clone, Debug)]
struct Sums {
    a: Vec<f64>,
    b: Vec<f64>,
    count: f64,
    reward: f64,
}

/// Coefficients per part and arm.
#[derive(Clone, Debug)]
pub struct Fitted {
    arms: usize,
    /// Parts x arms; what a row of that part is predicted by.
    theta: Vec<Vec<f64>>,
}

impl Direct {
    /// For `arms` arms and features of `dimensions`, the first being the constant 1.
    pub fn new(dimensions: usize, arms: usize) -> Self {
        let empty =
            Sums { a: vec![0.0; linalg::packed_len(dimensions)], b: vec![0.0; dimensions], count: 0.0, reward: 0.0 };
        Self { dimensions, arms, sums: vec![empty; PARTS * arms] }
    }

    /// Takes a rewarded row.
    pub fn take(&mut self, part: usize, arm: usize, x: &[f64], reward: f64) {
        let sums = &mut self.sums[part * self.arms + arm];
        linalg::rank_one(&mut sums.a, x, 1.0);
        sums.b.iter_mut().zip(x).for_each(|(b, x)| *b += reward * x);
        sums.count += 1.0;
        sums.reward += reward;
    }

    /// Solves. Coefficients are shrunk towards the mean reward of the other parts, with a weak ridge on the constant, so an
    /// arm that was hardly taken is predicted as the average arm is.
    pub fn fit(&self) -> Fitted {
        let d = self.dimensions;
        let mut theta = Vec::with_capacity(PARTS * self.arms);
        for part in 0..PARTS {
            let others = || (0..PARTS).filter(move |p| *p != part);
            let total = |of: fn(&Sums) -> f64| -> f64 {
                others().flat_map(|p| &self.sums[p * self.arms..(p + 1) * self.arms]).map(of).sum()
            };
            let count = total(|s| s.count);
            let mean = if count > 0.0 { total(|s| s.reward) / count } else { 0.0 };
            for arm in 0..self.arms {
                let (mut a, mut b) = (vec![0.0; linalg::packed_len(d)], vec![0.0; d]);
                for sums in others().map(|p| &self.sums[p * self.arms + arm]) {
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
        Fitted { arms: self.arms, theta }
    }
}

impl Fitted {
    /// q̂(x, arm) for a row of `part`.
    pub fn predict(&self, part: usize, arm: usize, x: &[f64]) -> f64 {
        linalg::dot(&self.theta[part * self.arms + arm], x)
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
