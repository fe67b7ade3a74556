//! The f32 micro-kernel: up to eight rows times one to four tiles of sixteen columns.
//!
//! `c[r][0..16] (+)= sum over i of a[r][i] * b[i][0..16]`, one fused multiply-add per term, in the order of i. With few rows
//! several tiles at once keep the processor busy while each sum waits for its own last term. Packed
//! matrices, attention scores and the weighting of values are all made of it. AVX2 and AVX-512 give the scalar twin's
//! bits, since fused multiply-add is exactly defined. The columns are f32, or f16 or bf16 that are widened as it is read ([`Number`]).

use half::{bf16, f16};

use super::{Level, number::Number};

/// Columns of a tile.
pub const WIDTH: usize = 16;

/// Operands of a product of rows with `tiles` tiles. Strides are in elements.
#[derive(Clone, Copy)]
pub struct Tile<'a, B> {
    /// Row r begins at `r * a_stride` and has `depth` elements.
    pub a: &'a [f32],
    pub a_stride: usize,
    /// Row i of tile n begins at `n * b_tile + i * b_stride` and has 16 elements.
    pub b: &'a [B],
    pub b_stride: usize,
    pub b_tile: usize,
    pub tiles: usize,
    pub depth: usize,
}

/// Computes `rows` rows of `16 * tiles`; row r of the result begins at `c[r * c_stride]`. With `accumulate`, adds to what is
/// there.
pub fn multiply<B: Wide>(level: Level, rows: usize, t: Tile<'_, B>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    if rows == 0 || t.tiles == 0 {
        return;
    }
    assert!(t.depth == 0 || t.a.len() >= (rows - 1) * t.a_stride + t.depth, "tile: rows of a");
    let b = (t.tiles - 1) * t.b_tile + WIDTH;
    assert!(t.depth == 0 || t.b.len() >= (t.depth - 1) * t.b_stride + b, "tile: rows of b");
    assert!(c.len() >= (rows - 1) * c_stride + t.tiles * WIDTH, "tile: rows of c");
    let mut done = 0;
    while done < rows {
        let part = Tile { a: &t.a[done * t.a_stride..], ..t };
        let c = &mut c[done * c_stride..];
        macro_rules! some {
            ($($rows:literal $tiles:literal),*) => {
                match (rows - done).min(8) {
                    $($rows => tiles::<$rows, $tiles, B>(level, part, c, c_stride, accumulate),)*
                    _ => tiles::<8, 2, B>(level, part, c, c_stride, accumulate),
                }
            };
        }
        some!(1 4, 2 4, 3 4, 4 4, 5 4, 6 2, 7 2);
        done += 8;
    }
}

/// `R` rows, `N` tiles at once as long as there are so many.
#[inline(always)]
fn tiles<const R: usize, const N: usize, B: Wide>(
    level: Level,
    t: Tile<'_, B>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let mut done = 0;
    while done < t.tiles {
        let part = Tile { b: &t.b[done * t.b_tile..], ..t };
        let c = &mut c[done * WIDTH..];
        if t.tiles - done >= N {
            some::<R, N, B>(level, part, c, c_stride, accumulate);
            done += N;
        } else {
            some::<R, 1, B>(level, part, c, c_stride, accumulate);
            done += 1;
        }
    }
}

#[inline(always)]
fn some<const R: usize, const N: usize, B: Wide>(
    level: Level,
    t: Tile<'_, B>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level says that the processor has the features; `multiply` has checked the lengths.
        Level::Avx512 => unsafe { x86::avx512::<R, N, B>(t, c, c_stride, accumulate) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::avx2::<R, N, B>(t, c, c_stride, accumulate) },
        _ => (0..N).for_each(|n| {
            let part = Tile { b: &t.b[n * t.b_tile..], ..t };
            scalar::<R, B>(part, &mut c[n * WIDTH..], c_stride, accumulate);
        }),
    }
}

fn scalar<const R: usize, B: Wide>(t: Tile<'_, B>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    for r in 0..R {
        let out = &mut c[r * c_stride..][..WIDTH];
        let mut sums = [0f32; WIDTH];
        if accumulate {
            sums.copy_from_slice(out);
        }
        for i in 0..t.depth {
            let a = t.a[r * t.a_stride + i];
            for (sum, b) in sums.iter_mut().zip(&t.b[i * t.b_stride..][..WIDTH]) {
                *sum = a.mul_add(b.wide(), *sum);
            }
        }
        out.copy_from_slice(&sums);
    }
}

/// What the columns of a tile may be made of.
pub trait Wide: Number {
    /// Sixteen neighbours.
    ///
    /// # Safety
    /// They must be there, and the processor must have the features.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512;

    /// Eight neighbours.
    ///
    /// # Safety
    /// As for [`load16`](Self::load16).
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256;
}

impl Wide for f32 {
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: by the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: by the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Wide for f16 {
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps};
        // SAFETY: by the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps};
        // SAFETY: by the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

impl Wide for bf16 {
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_slli_epi32};
        // SAFETY: by the caller's promise.
        let halves = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32};
        // SAFETY: by the caller's promise.
        let halves = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{Tile, Wide};

    /// # Safety
    /// The lengths must be as [`super::multiply`] checks them, and the processor must have the features.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512<const R: usize, const N: usize, B: Wide>(
        t: Tile<'_, B>,
        c: &mut [f32],
        c_stride: usize,
        accumulate: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); N]; R];
        let (a, b, c) = (t.a.as_ptr(), t.b.as_ptr(), c.as_mut_ptr());
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            if accumulate {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(c.add(r * c_stride + n * 16));
                    }
                }
            }
            let mut b = b;
            for i in 0..t.depth {
                let mut row = [_mm512_setzero_ps(); N];
                for (n, row) in row.iter_mut().enumerate() {
                    *row = B::load16(b.add(n * t.b_tile));
                }
                let mut at = i;
                for sums in &mut sums {
                    let a = _mm512_set1_ps(*a.add(at));
                    for (sum, row) in sums.iter_mut().zip(&row) {
                        *sum = _mm512_fmadd_ps(a, *row, *sum);
                    }
                    at = at.wrapping_add(t.a_stride);
                }
                b = b.wrapping_add(t.b_stride);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(c.add(r * c_stride + n * 16), *sum);
                }
            }
        }
    }

    /// # Safety
    /// As for [`avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn avx2<const R: usize, const N: usize, B: Wide>(
        t: Tile<'_, B>,
        c: &mut [f32],
        c_stride: usize,
        accumulate: bool,
    ) {
        // Halves of eight columns, one after the other, so that eight rows fit into sixteen registers.
        for half in 0..2 * N {
            let mut sums = [_mm256_setzero_ps(); R];
            let (a, c) = (t.a.as_ptr(), c.as_mut_ptr());
            // SAFETY: as above; both halves are within the sixteen columns.
            unsafe {
                let mut b = t.b.as_ptr().add(half / 2 * t.b_tile + half % 2 * 8);
                let c = c.add(half * 8);
                if accumulate {
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_loadu_ps(c.add(r * c_stride));
                    }
                }
                for i in 0..t.depth {
                    let row = B::load8(b);
                    let mut at = i;
                    for sum in &mut sums {
                        *sum = _mm256_fmadd_ps(_mm256_set1_ps(*a.add(at)), row, *sum);
                        at = at.wrapping_add(t.a_stride);
                    }
                    b = b.wrapping_add(t.b_stride);
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
        let b = crate::engine::testing::numbers(7 * 37 * 24, 4);
        check(&b);
        check(&b.iter().map(|b| f16::from_f32(*b)).collect::<Vec<_>>());
        check(&b.iter().map(|b| bf16::from_f32(*b)).collect::<Vec<_>>());
    }

    fn check<B: Wide>(b: &[B]) {
        let a = crate::engine::testing::numbers(11 * 40, 3);
        // Every number of rows and of tiles, and so every kernel.
        for (rows, tiles) in (1..=19).flat_map(|rows| (1..=7).map(move |tiles| (rows, tiles))) {
            let (stride, width) = (16 * 7 + 4, 16 * tiles);
            let a = &a[..(rows - 1) % 11 * 40 + 40].repeat(2);
            let rows = rows.min(a.len() / 40);
            let tile = Tile { a, a_stride: 40, b, b_stride: 24, b_tile: 37 * 24, tiles, depth: 37 };
            let run = |level| {
                let mut c = vec![0.5; rows * stride];
                multiply(level, rows, tile, &mut c, stride, true);
                c
            };
            let want = run(Level::Scalar);
            for r in 0..rows {
                for col in 0..width {
                    let b = |i: usize| f64::from(b[col / 16 * 37 * 24 + i * 24 + col % 16].wide());
                    let exact: f64 = 0.5 + (0..37).map(|i| f64::from(a[r * 40 + i]) * b(i)).sum::<f64>();
                    assert!((f64::from(want[r * stride + col]) - exact).abs() < 1e-4);
                }
                assert_eq!(want[r * stride + width], 0.5, "nothing is written beyond the tiles");
            }
            for level in Level::available() {
                assert_eq!(run(level), want, "{level:?}, {rows} rows, {tiles} tiles");
            }
        }
    }
}
