//! Orders that look random and are a function of the points: SplitMix64 (Steele, Lea, Flood, "Fast splittable
//! pseudorandom number generators", OOPSLA 2014), keyed by the seed, a purpose and all points.
//!
//! Why the points: the guarantee needs a split that is independent of them and uniform. Were it a function of the seed
//! alone, the same ranks would propose thresholds in every sample, and the counts between thresholds would not vary as
//! the binomial test supposes. With the points in the key, each sample is split in its own way.

use super::isotonic::Labelled;

/// What an order is for. The values are part of the format: never renumber.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// Which points propose and which test.
    Split = 1,
    /// Which fold a point is in.
    Fold = 2,
}

/// An order of 0..n for the n `points` (Fisher and Yates).
pub(super) fn order(points: &[Labelled], seed: u64, purpose: Purpose) -> Vec<usize> {
    let mut state = mix(seed ^ mix(purpose as u64));
    for point in points {
        state = mix(state ^ point.unsure.to_bits()).wrapping_add(u64::from(point.wrong));
    }
    let mut order: Vec<usize> = (0..points.len()).collect();
    for i in (1..order.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let j = (u128::from(mix(state)) * (i as u128 + 1)) >> 64;
        order.swap(i, j as usize);
    }
    order
}

/// SplitMix64's output function after its step.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(n: usize) -> Vec<Labelled> {
        (0..n).map(|i| Labelled { unsure: i as f64, wrong: i % 3 == 0 }).collect()
    }

    #[test]
    fn an_order_is_one_of_all_places() {
        for n in [0, 1, 2, 200] {
            let mut order = order(&points(n), 7, Purpose::Split);
            order.sort_unstable();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seed_purpose_score_and_label_each_change_it() {
        let base = order(&points(200), 7, Purpose::Split);
        let (mut moved, mut relabelled) = (points(200), points(200));
        moved[100].unsure += 0.5;
        relabelled[199].wrong ^= true;
        assert_eq!(base, order(&points(200), 7, Purpose::Split));
        assert_ne!(base, order(&points(200), 8, Purpose::Split));
        assert_ne!(base, order(&points(200), 7, Purpose::Fold));
        assert_ne!(base, order(&moved, 7, Purpose::Split));
        assert_ne!(base, order(&relabelled, 7, Purpose::Split));
    }

    #[test]
    fn every_place_comes_first_about_as_often() {
        let mut first = [0u32; 10];
        for seed in 0..10_000 {
            first[order(&points(10), seed, Purpose::Split)[0]] += 1;
        }
        // 1000 each, standard deviation 30.
        assert!(first.iter().all(|n| (850..1150).contains(n)), "{first:?}");
    }
}
