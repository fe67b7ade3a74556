//! The binomial distribution, exactly: what the tests of a calibration are made of.
//!
//! A probability at one count comes from Stirling's series and the deviance (Loader, "Fast and Accurate Computation of
//! Binomial Probabilities", 2000), so that nothing large cancels; a tail is the sum of such terms outwards from its
//! largest, each from the one before by their ratio. All terms are positive, so the sum loses nothing either. Relative
//! errors stay below 1e-12 for a million trials. `exp` and `log` are libm's, so that every machine gives the same bits.

use libm::{exp, log, log1p, sqrt};

/// Half the logarithm of 2 pi.
const HALF_LOG_TWO_PI: f64 = 0.918_938_533_204_672_8;
/// Terms smaller than this share of the sum change none of its bits.
const NEGLIGIBLE: f64 = 1e-18;

/// P(X <= k) for X the number of successes in `n` trials of probability `p` each. `p` is clamped to [0, 1]; NaN gives
/// 1, which rejects nothing.
///
/// Takes time in proportion to the square root of `n`.
pub fn binomial_cdf(k: u64, n: u64, p: f64) -> f64 {
    if k >= n || p.is_nan() || p <= 0.0 {
        return 1.0;
    }
    if p >= 1.0 {
        return 0.0;
    }
    let odds = p / (1.0 - p);
    // The tail that does not hold the mode is summed: its terms fall from the first on.
    if (k as f64) < (n + 1) as f64 * p {
        let ratio = |j: u64| j as f64 / ((n - j + 1) as f64 * odds);
        let first = pmf(k, n, p);
        (first * tail((1..=k).rev().map(ratio))).min(1.0)
    } else {
        let ratio = |j: u64| (n - j) as f64 * odds / (j + 1) as f64;
        let first = pmf(k + 1, n, p);
        (1.0 - first * tail((k + 1..n).map(ratio))).max(0.0)
    }
}

/// The upper bound of Clopper and Pearson ("The use of confidence or fiducial limits illustrated in the case of the
/// binomial", Biometrika 26, 1934): the least rate p at which `wrong` or fewer of `n` have a probability of at most
/// 1 - `confidence`. So the bound is at most p exactly where [`binomial_cdf`] at p is at most 1 - `confidence`.
///
/// 1 where nothing bounds the rate: without points, where all were wrong, and for a confidence outside of (0, 1).
pub fn clopper_pearson_upper(wrong: u64, n: u64, confidence: f64) -> f64 {
    if wrong >= n || !(confidence > 0.0 && confidence < 1.0) {
        return 1.0;
    }
    let level = 1.0 - confidence;
    let (mut below, mut bound) = (0.0, 1.0);
    // Halved until no number lies between.
    loop {
        let middle = below + 0.5 * (bound - below);
        if middle <= below || middle >= bound {
            return bound;
        }
        if binomial_cdf(wrong, n, middle) <= level {
            bound = middle;
        } else {
            below = middle;
        }
    }
}

/// 1 + r1 + r1 r2 + ..., until a term no longer counts. The ratios fall.
fn tail(ratios: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut term) = (1.0, 1.0);
    for ratio in ratios {
        term *= ratio;
        sum += term;
        if term < NEGLIGIBLE * sum {
            break;
        }
    }
    sum
}

/// P(X = k), 0 < p < 1, k <= n.
fn pmf(k: u64, n: u64, p: f64) -> f64 {
    let (x, all) = (k as f64, n as f64);
    if k == 0 {
        return exp(all * log1p(-p));
    }
    if k == n {
        return exp(all * log(p));
    }
    let rest = all - x;
    let log_shape = stirling_error(n) - stirling_error(k) - stirling_error(n - k);
    let off = deviance(x, all * p) + deviance(rest, all * (1.0 - p));
    exp(log_shape - off - HALF_LOG_TWO_PI) * sqrt(all / x / rest)
}

/// ln n! less Stirling's formula, n >= 1.
fn stirling_error(n: u64) -> f64 {
    let x = n as f64;
    if n <= 16 {
        // 16! has no more than 53 significant bits.
        let factorial: f64 = (2..=n).map(|i| i as f64).product();
        return log(factorial) - (x + 0.5) * log(x) + x - HALF_LOG_TWO_PI;
    }
    let s = 1.0 / (x * x);
    (1.0 / 12.0 - s * (1.0 / 360.0 - s * (1.0 / 1260.0 - s * (1.0 / 1680.0 - s / 1188.0)))) / x
}

/// x ln(x / m) + m - x, at least 0. Where x is near m, with v = (x - m) / (x + m) and ln(x / m) = 2 artanh v, it is
/// v (x - m) + 2 x (v^3 / 3 + v^5 / 5 + ...), which does not cancel.
fn deviance(x: f64, m: f64) -> f64 {
    let v = (x - m) / (x + m);
    if v.abs() > 0.1 {
        return x * log(x / m) + m - x;
    }
    let mut sum = v * (x - m);
    let mut power = 2.0 * x * v;
    for odd in (3..).step_by(2) {
        power *= v * v;
        let next = sum + power / f64::from(odd);
        if next == sum {
            break;
        }
        sum = next;
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn near(found: f64, expected: f64, relative: f64) {
        assert!((found - expected).abs() <= relative * expected.abs(), "{found:e} {expected:e}");
    }

    /// Each probability from Pascal's rule, without logarithms.
    fn direct(n: u64, p: f64) -> Vec<f64> {
        let mut row = vec![1.0];
        for _ in 0..n {
            let mut next = vec![0.0; row.len() + 1];
            for (k, mass) in row.iter().enumerate() {
                next[k] += mass * (1.0 - p);
                next[k + 1] += mass * p;
            }
            row = next;
        }
        row
    }

    /// Computed with 50 digits.
    #[test]
    fn known_probabilities() {
        for (k, n, p, expected) in [
            (0, 29, 0.1, 0.047_101_286_972_462_44),
            (3, 10, 0.5, 0.171_875),
            (5, 100, 0.1, 0.057_576_886_487_033_79),
            (80, 1000, 0.1, 0.017_611_574_675_836_062),
            (1900, 20_000, 0.1, 0.009_144_143_718_242_115),
            (2, 2000, 0.01, 4.196_449_275_828_931_3e-7),
            (50, 60, 0.9, 0.073_065_510_083_698_95),
            (99_000, 1_000_000, 0.1, 0.000_424_696_738_117_518_3),
            (99_500, 1_000_000, 0.1, 0.047_877_638_462_615_79),
            (99_000, 1_000_000, 0.101, 1.418_716_298_918_596_8e-11),
            (10, 1_000_000, 3e-5, 2.234_420_799_299_749e-5),
        ] {
            near(binomial_cdf(k, n, p), expected, 1e-11);
        }
    }

    #[test]
    fn every_count_agrees_with_direct_summation() {
        for (n, p) in [(1, 0.3), (2, 0.999), (17, 0.05), (40, 0.5), (300, 0.1), (300, 0.93)] {
            let mut sum = 0.0;
            for (k, mass) in direct(n, p).into_iter().enumerate() {
                sum += mass;
                // Below, numbers have fewer digits.
                if sum > 1e-290 {
                    near(binomial_cdf(k as u64, n, p), sum, 1e-11);
                }
            }
        }
    }

    #[test]
    fn certain_and_impossible_counts() {
        assert_eq!(binomial_cdf(5, 5, 0.3), 1.0);
        assert_eq!(binomial_cdf(9, 5, 0.3), 1.0);
        assert_eq!(binomial_cdf(0, 0, 0.3), 1.0);
        assert_eq!(binomial_cdf(2, 5, 0.0), 1.0);
        assert_eq!(binomial_cdf(2, 5, 1.0), 0.0);
        assert_eq!(binomial_cdf(2, 5, f64::NAN), 1.0);
    }

    #[test]
    fn known_upper_bounds() {
        for (wrong, n, confidence, expected) in [
            (0, 10, 0.95, 0.258_865_550_893_052_24),
            (1, 20, 0.95, 0.216_106_164_206_847_3),
            (5, 100, 0.95, 0.102_253_377_643_274_5),
            (9, 10, 0.975, 0.997_471_421_455_538_2),
            (3, 50, 0.975, 0.165_481_946_603_772_88),
        ] {
            near(clopper_pearson_upper(wrong, n, confidence), expected, 1e-12);
        }
        // None wrong: the bound has a closed form.
        near(clopper_pearson_upper(0, 1_000_000, 0.95), 1.0 - libm::pow(0.05, 1e-6), 1e-9);
        for (wrong, n, confidence) in [(0, 0, 0.95), (7, 7, 0.95), (1, 7, 1.0), (1, 7, 0.0), (1, 7, f64::NAN)] {
            assert_eq!(clopper_pearson_upper(wrong, n, confidence), 1.0);
        }
    }

    proptest! {
        #[test]
        fn a_count_and_the_rest_mirror_each_other(n in 1..5000u64, share in 0.0..1.0f64, p in 0.001..0.999f64) {
            let k = (n as f64 * share) as u64;
            // X <= k is n - X >= n - k, of the other outcome.
            let other = 1.0 - if k < n { binomial_cdf(n - k - 1, n, 1.0 - p) } else { 0.0 };
            prop_assert!((binomial_cdf(k, n, p) - other).abs() < 1e-11);
        }

        #[test]
        fn rising_with_the_count_falling_with_the_rate(n in 1..5000u64, share in 0.0..1.0f64, p in 0.001..0.998f64) {
            let k = (n as f64 * share) as u64;
            let here = binomial_cdf(k, n, p);
            prop_assert!((0.0..=1.0).contains(&here));
            prop_assert!(binomial_cdf(k + 1, n, p) >= here - 1e-13);
            prop_assert!(binomial_cdf(k, n, p + 0.001) <= here + 1e-13);
        }

        #[test]
        fn a_bound_is_where_the_test_turns(n in 1..3000u64, share in 0.0..1.0f64, confidence in 0.5..0.999f64) {
            let wrong = (n as f64 * share) as u64;
            let bound = clopper_pearson_upper(wrong, n, confidence);
            prop_assert!(bound > wrong as f64 / n as f64 || wrong == n);
            if wrong < n {
                prop_assert!(binomial_cdf(wrong, n, bound) <= 1.0 - confidence);
                prop_assert!(binomial_cdf(wrong, n, bound * (1.0 - 1e-9)) > 1.0 - confidence);
            }
        }
    }
}
