//! The numbers that weights, keys and values are kept as, in memory that does not know of them.

use half::{bf16, f16};
use serde::Serialize;

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    F32,
    /// Half of the memory and of what attention reads; rounds to eleven bits.
    F16,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 => 2,
        }
    }
}

/// A number that may be kept: plain bits, of which each pattern is a number.
pub trait Number: Copy + Default + Send + Sync + 'static {
    /// Exact.
    fn wide(self) -> f32;

    /// The nearest, ties to even; what is too large becomes the largest, so that no infinity arises.
    fn narrow(wide: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        wide
    }
}

impl Number for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        let most = f16::MAX.to_f32();
        f16::from_f32(wide.clamp(-most, most))
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        bf16::from_f32(wide)
    }
}

/// A cache line of memory.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Line([u64; 8]);

impl Line {
    pub const BYTES: usize = 64;
}

/// Lines as numbers.
pub fn numbers<T: Number>(lines: &[Line]) -> &[T] {
    let count = size_of_val(lines) / size_of::<T>();
    // SAFETY: lines are plain bytes without padding, aligned for any `Number`, each pattern of which is one.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), count) }
}

/// Lines as numbers that may be written.
pub fn numbers_mut<T: Number>(lines: &mut [Line]) -> &mut [T] {
    let count = size_of_val(lines) / size_of::<T>();
    // SAFETY: as above; any `Number` leaves plain bytes.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), count) }
}

/// Lines as bytes.
pub fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: lines are plain bytes without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

/// Lines as bytes that may be written.
pub fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: as above; any bytes are lines.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_the_nearest_and_never_become_infinite() {
        assert_eq!(f16::narrow(1e9), f16::MAX);
        assert_eq!(f16::narrow(-1e9), f16::MIN);
        assert!(f16::narrow(f32::NAN).is_nan(), "damage stays visible");
        // Between two neighbours, 1 and 1 + 2^-10, to the even one.
        assert_eq!(f16::narrow(1.0 + 2f32.powi(-11)).wide(), 1.0);
        assert_eq!(f16::narrow(1.0 + 3.0 * 2f32.powi(-11)).wide(), 1.0 + 2f32.powi(-9));
    }

    #[test]
    fn one_memory_is_seen_as_either() {
        let mut lines = [Line::default(); 2];
        numbers_mut::<f16>(&mut lines)[63] = f16::ONE;
        assert_eq!(numbers::<f32>(&lines).len(), 32);
        assert_eq!(numbers::<f32>(&lines)[31].to_bits(), u32::from(f16::ONE.to_bits()) << 16);
    }
}
