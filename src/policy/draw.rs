//! Random numbers that are a function of what they are for: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as
//! easy as 1, 2, 3", SC 2011), keyed by the context's seed, one substream per purpose, a counter within it. No state, so
//! that asking for one number more never moves another.

/// What a number is drawn for. The values are part of the record: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Purpose {
    /// The draw of the arm.
    Arm = 1,
    /// Signs of the random projection.
    Projection = 2,
    /// Who is in a split's share.
    Split = 3,
}

/// One block of Philox-4x32 with ten rounds: 128 bits of counter and 64 of key to 128 bits.
fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = 0xD251_1F53u64 * u64::from(c[0]);
        let p1 = 0xCD9E_8D57u64 * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// 128 bits at `counter` of the substream `purpose` under `seed`.
pub(super) fn block(seed: u64, purpose: u32, counter: u64) -> [u32; 4] {
    philox([counter as u32, (counter >> 32) as u32, purpose, 0], [seed as u32, (seed >> 32) as u32])
}

/// A number in [0, 1): the upper 53 bits of the block's first 64, times 2^-53.
pub(super) fn unit(seed: u64, purpose: u32, counter: u64) -> f64 {
    let b = block(seed, purpose, counter);
    let bits = u64::from(b[0]) << 32 | u64::from(b[1]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The index that `u` in [0, 1) falls on in a vector of probabilities; the last possible one where rounding leaves the
/// sum a little below `u`. `None` when nothing is possible.
pub(super) fn pick(probabilities: &[f64], u: f64) -> Option<usize> {
    let mut sum = 0.0;
    let mut last = None;
    for (i, p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        sum += p;
        last = Some(i);
        if u < sum {
            return last;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_answers_as_published() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn numbers_are_pinned() {
        let bits: Vec<u64> = (0..3).map(|n| unit(42, Purpose::Arm as u32, n).to_bits()).collect();
        insta::assert_debug_snapshot!(bits);
    }

    #[test]
    fn numbers_are_even() {
        let n = 20_000;
        let mean = (0..n).map(|i| unit(i, Purpose::Arm as u32, 0)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let substreams = (0..n).filter(|i| unit(*i, 1, 0) == unit(*i, 2, 0)).count();
        assert_eq!(substreams, 0);
    }

    #[test]
    fn a_pick_never_lands_on_the_impossible() {
        assert_eq!(pick(&[0.0, 1.0, 0.0], 0.0), Some(1));
        assert_eq!(pick(&[0.5, 0.5, 0.0], 0.999_999_999_999_999_9), Some(1));
        assert_eq!(pick(&[0.5, 0.499_999_999, 0.0], 0.999_999_999_9), Some(1));
        assert_eq!(pick(&[0.0, 0.0], 0.3), None);
    }
}
