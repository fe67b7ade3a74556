//! `thompson`: linear Thompson sampling with the true posterior (Agrawal, Goyal, "Thompson sampling for contextual bandits
//! with linear payoffs", ICML 2013). With reward noise σ and a normal prior of variance σ²/λ, an arm's estimate at x is
//! normal with mean θ·x and standard deviation σ sqrt(xᵀ (A + λI)⁻¹ x). (GreenServ's code, arXiv 2601.17551, carries one
//! σ² more and explores too little; ALGORITHMS.md, section 1.)
//!
//! An arm's probability is that of its draw being the greatest, by one-dimensional quadrature over the independent
//! estimates and not by sampling, so that what is recorded is what the draw is made from:
//! P(i) = ∫ φᵢ(t) ∏_{j≠i} Φⱼ(t) dt.

use super::Belief;

/// Parameters, with defaults filled in.
#[derive(Debug)]
pub(in crate::policy) struct Thompson {
    /// Standard deviation of the reward, given x.
    pub noise: f64,
}

impl Thompson {
    pub fn shares(&self, beliefs: &[Belief]) -> Vec<f64> {
        let normals: Vec<(f64, f64)> = beliefs.iter().map(|b| (b.mean - b.price, self.noise * b.width)).collect();
        probabilities_of_greatest(&normals)
    }
}

/// Nodes and weights of the Gauss-Legendre rule of six points on [-1, 1].
const GAUSS: [(f64, f64); 3] = [
    (0.238_619_186_083_196_93, 0.467_913_934_572_691_04),
    (0.661_209_386_466_264_5, 0.360_761_573_048_138_6),
    (0.932_469_514_203_152, 0.171_324_492_379_170_36),
];

/// Where the pieces of the integral begin and end, in standard deviations from each mean: dense where a normal
/// distribution bends.
const KNOTS: [f64; 13] = [-8.0, -5.0, -3.5, -2.5, -1.5, -0.75, 0.0, 0.75, 1.5, 2.5, 3.5, 5.0, 8.0];

/// Probability of each of independent normal variables `(mean, deviation)` to be the greatest. Piecewise quadrature, the
/// pieces being cut at fixed distances from every mean; absolute error below 1e-6 (tested). A variable without spread
/// counts as one of a very small one.
fn probabilities_of_greatest(normals: &[(f64, f64)]) -> Vec<f64> {
    let n = normals.len();
    if n == 1 {
        return vec![1.0];
    }
    let scale = normals.iter().map(|(m, s)| m.abs() + s).fold(1e-12, f64::max);
    let normals: Vec<(f64, f64)> = normals.iter().map(|(m, s)| (*m, s.max(scale * 1e-9))).collect();
    // Below this at least one variable is all but certain to be above: nothing left to integrate.
    let floor = normals.iter().map(|(m, s)| m - 8.0 * s).fold(f64::NEG_INFINITY, f64::max);
    let mut cuts: Vec<f64> = normals
        .iter()
        .flat_map(|(m, s)| KNOTS.iter().map(move |k| m + k * s))
        .filter(|t| t.is_finite() && *t >= floor)
        .collect();
    cuts.sort_by(f64::total_cmp);
    let mut out = vec![0.0; n];
    let (mut density, mut below, mut above) = (vec![0.0; n], vec![0.0; n], vec![1.0; n + 1]);
    for piece in cuts.windows(2) {
        let (middle, half) = (0.5 * (piece[0] + piece[1]), 0.5 * (piece[1] - piece[0]));
        if half <= 0.0 {
            continue;
        }
        for (node, weight) in GAUSS.iter().flat_map(|(x, w)| [(-*x, *w), (*x, *w)]) {
            let t = middle + half * node;
            for (i, (mean, deviation)) in normals.iter().enumerate() {
                let z = (t - mean) / deviation;
                density[i] = libm::exp(-0.5 * z * z) / (deviation * (2.0 * std::f64::consts::PI).sqrt());
                below[i] = 0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2);
            }
            // Products over all others, from both ends: dividing by a vanishing factor would lose them.
            for i in (0..n).rev() {
                above[i] = above[i + 1] * below[i];
            }
            let mut before = 1.0;
            for i in 0..n {
                out[i] += half * weight * density[i] * before * above[i + 1];
                before *= below[i];
            }
        }
    }
    let total: f64 = out.iter().sum();
    if total > 0.0 && total.is_finite() {
        out.iter_mut().for_each(|p| *p /= total);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(got: &[f64], want: &[f64], by: f64) {
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < by, "{got:?} {want:?}");
        }
    }

    #[test]
    fn two_normals_have_the_closed_form() {
        for (a, b) in [((0.3, 0.2), (0.5, 0.1)), ((0.0, 1.0), (0.0, 1e-4)), ((1.0, 0.01), (0.98, 0.5))] {
            let z: f64 = (a.0 - b.0) / libm::sqrt(a.1 * a.1 + b.1 * b.1);
            let first = 0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2);
            close(&probabilities_of_greatest(&[a, b]), &[first, 1.0 - first], 1e-6);
        }
    }

    #[test]
    fn equals_share_and_certainty_is_certain() {
        close(&probabilities_of_greatest(&[(0.4, 0.3); 5]), &[0.2; 5], 1e-9);
        close(&probabilities_of_greatest(&[(0.9, 0.0), (0.1, 0.0)]), &[1.0, 0.0], 1e-9);
        assert_eq!(probabilities_of_greatest(&[(3.0, 2.0)]), [1.0]);
    }

    #[test]
    fn agrees_with_sampling() {
        let normals = [(0.5, 0.2), (0.6, 0.05), (0.2, 0.5), (0.55, 0.1)];
        let mut wins = [0.0; 4];
        let n = 200_000u64;
        for i in 0..n {
            let draw = |k: usize| {
                // Box and Muller, from two of our own numbers.
                let (u, v) = (crate::policy::draw::unit(i, 7, k as u64), crate::policy::draw::unit(i, 8, k as u64));
                normals[k].0
                    + normals[k].1 * libm::sqrt(-2.0 * libm::log(1.0 - u)) * libm::cos(2.0 * std::f64::consts::PI * v)
            };
            let draws = [draw(0), draw(1), draw(2), draw(3)];
            let best = (0..4).max_by(|a, b| draws[*a].total_cmp(&draws[*b])).unwrap_or(0);
            wins[best] += 1.0 / n as f64;
        }
        close(&probabilities_of_greatest(&normals), &wins, 0.005);
    }

    proptest! {
        #[test]
        fn they_add_up_and_follow_the_means(
            normals in prop::collection::vec((-3.0f64..3.0, 1e-6f64..2.0), 2..9),
        ) {
            let p = probabilities_of_greatest(&normals);
            prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(p.iter().all(|p| (0.0..=1.0).contains(p)));
            // Lifting one mean never lowers its probability (but for the quadrature's error).
            let mut lifted = normals.clone();
            lifted[0].0 += 0.5;
            prop_assert!(probabilities_of_greatest(&lifted)[0] >= p[0] - 1e-6);
        }

        /// Any two variables: the quadrature against the closed form, however different their spreads are.
        #[test]
        fn pairs_are_exact(a in -2.0f64..2.0, sa in 1e-5f64..2.0, b in -2.0f64..2.0, sb in 1e-5f64..2.0) {
            let z: f64 = (a - b) / libm::sqrt(sa * sa + sb * sb);
            let first = 0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2);
            let got = probabilities_of_greatest(&[(a, sa), (b, sb)]);
            prop_assert!((got[0] - first).abs() < 1e-6, "{} {}", got[0], first);
        }
    }
}
