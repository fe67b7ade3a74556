//! The f32 micro-kernel: up to eight rows times sixteen columns.
//!
//! `c[r][0..16] (+)= sum over i of a[r][i] * b[i][0..16]`, one fused multiply-add per term, in the order of i. Packed
//! matrices, attention scores and the weighting of values are all made of it. AVX2 and AVX-512 give the scalar twin's
//! bits, since fused multiply-add is exactly defined.

use super::Level;

/// Columns of a tile.
pub const WIDTH: usize = 16;
/// Most rows that are computed at once.
pub const ROWS: usize = 8;

/// Operands of a tile product. Strides are in elements.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// Row r begins at `r * a_stride` and has `depth` elements.
    pub a: &'a [f32],
    pub a_stride: usize,
    /// Row i begins at `i * b_stride` and has 16 elements.
    pub b: &'a [f32],
    pub b_stride: usize,
    pub depth: usize,
}

/// Computes `rows` rows of sixteen; row r of the result begins at `c[r * c_stride]`. With `accumulate`, adds to what is
/// there.
pub fn multiply(level: Level, rows: usize, t: Tile<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    if rows == 0 {
        return;
    }
    assert!(t.depth == 0 || t.a.len() >= (rows - 1) * t.a_stride + t.depth, "tile: rows of a");
    assert!(t.depth == 0 || t.b.len() >= (t.depth - 1) * t.b_stride + WIDTH, "tile: rows of b");
    assert!(c.len() >= (rows - 1) * c_stride + WIDTH, "tile: rows of c");
    let mut done = 0;
    while done < rows {
        let now = match rows - done {
            n if n >= 8 => 8,
            n if n >= 4 => 4,
            n if n >= 2 => 2,
            _ => 1,
        };
        let part = Tile { a: &t.a[done * t.a_stride..], ..t };
        let c = &mut c[done * c_stride..];
        match now {
            8 => some::<8>(level, part, c, c_stride, accumulate),
            4 => some::<4>(level, part, c, c_stride, accumulate),
            2 => some::<2>(level, part, c, c_stride, accumulate),
            _ => some::<1>(level, part, c, c_stride, accumulate),
        }
        done += now;
    }
}

#[inline(always)]
fn some<const R: usize>(level: Level, t: Tile<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level says that the processor has the features; `multiply` has checked the lengths.
        Level::Avx512 => unsafe { x86::avx512::<R>(t, c, c_stride, accumulate) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::avx2::<R>(t, c, c_stride, accumulate) },
        _ => scalar::<R>(t, c, c_stride, accumulate),
    }
}

fn scalar<const R: usize>(t: Tile<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    for r in 0..R {
        let out = &mut c[r * c_stride..][..WIDTH];
        let mut sums = [0f32; WIDTH];
        if accumulate {
            sums.copy_from_slice(out);
        }
        for i in 0..t.depth {
            let a = t.a[r * t.a_stride + i];
            for (sum, b) in sums.iter_mut().zip(&t.b[i * t.b_stride..][..WIDTH]) {
                *sum = a.mul_add(*b, *sum);
            }
        }
        out.copy_from_slice(&sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::Tile;

    /// # Safety
    /// The lengths must be as [`super::multiply`] checks them, and the processor must have the features.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512<const R: usize>(t: Tile<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
        let mut sums = [_mm512_setzero_ps(); R];
        let (a, b, c) = (t.a.as_ptr(), t.b.as_ptr(), c.as_mut_ptr());
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            if accumulate {
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(r * c_stride));
                }
            }
            for i in 0..t.depth {
                let b = _mm512_loadu_ps(b.add(i * t.b_stride));
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(r * t.a_stride + i)), b, *sum);
                }
            }
            for (r, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * c_stride), *sum);
            }
        }
    }

    /// # Safety
    /// As for [`avx512`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const R: usize>(t: Tile<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
        // Two halves of eight columns, one after the other, so that eight rows fit into sixteen registers.
        for half in [0, 8] {
            let mut sums = [_mm256_setzero_ps(); R];
            let (a, c) = (t.a.as_ptr(), c.as_mut_ptr());
            // SAFETY: as above; both halves are within the sixteen columns.
            unsafe {
                let b = t.b.as_ptr().add(half);
                let c = c.add(half);
                if accumulate {
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_loadu_ps(c.add(r * c_stride));
                    }
                }
                for i in 0..t.depth {
                    let b = _mm256_loadu_ps(b.add(i * t.b_stride));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_fmadd_ps(_mm256_set1_ps(*a.add(r * t.a_stride + i)), b, *sum);
                    }
                }
                for (r, sum) in sums.iter().enumerate() {
                    _mm256_storeu_ps(c.add(r * c_stride), *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_levels_give_the_twins_bits_and_the_right_numbers() {
        let a = crate::engine::testing::numbers(11 * 40, 3);
        let b = crate::engine::testing::numbers(37 * 24, 4);
        let tile = Tile { a: &a, a_stride: 40, b: &b, b_stride: 24, depth: 37 };
        let run = |level| {
            let mut c = vec![0.5; 11 * 20];
            multiply(level, 11, tile, &mut c, 20, true);
            c
        };
        let want = run(Level::Scalar);
        for r in 0..11 {
            for col in 0..WIDTH {
                let exact: f64 =
                    0.5 + (0..37).map(|i| f64::from(a[r * 40 + i]) * f64::from(b[i * 24 + col])).sum::<f64>();
                assert!((f64::from(want[r * 20 + col]) - exact).abs() < 1e-4);
            }
            assert_eq!(want[r * 20 + 16.min(19)], 0.5, "nothing is written beyond the tile");
        }
        for level in Level::available() {
            assert_eq!(run(level), want, "{level:?}");
        }
    }
}
