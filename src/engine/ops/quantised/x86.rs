//! The kernels for AVX-512 VNNI and AVX2: the scalar twin in [`super`] is what they compute.

use std::arch::x86_64::*;

use super::{BLOCK, Form, GROUP, HALVES, Tokens, WIDE, WIDTH};

pub type Wide = __m512;
pub type Narrow = __m256;

/// Scales of all sixteen rows: the twins of the functions of the same names.
pub mod wide {
    use super::*;

    /// # Safety
    /// 32 readable bytes at `at`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn halves(at: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    /// # Safety
    /// The scales of a [`Form`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn one(at: *const u8, _b: usize) -> ([__m512; 2], __m512) {
        // SAFETY: by the caller's promise.
        ([unsafe { halves(at) }; 2], _mm512_setzero_ps())
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn pair(at: *const u8, _b: usize) -> ([__m512; 2], __m512) {
        // SAFETY: by the caller's promise.
        unsafe { ([halves(at); 2], halves(at.add(HALVES))) }
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn shared(at: *const u8, b: usize) -> ([__m512; 2], __m512) {
        // SAFETY: by the caller's promise.
        unsafe {
            let own = at.add(2 * HALVES + b % GROUP * 2 * WIDTH);
            let bytes = |at: *const u8| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast())));
            let d = _mm512_mul_ps(halves(at), bytes(own));
            ([d; 2], _mm512_mul_ps(halves(at.add(HALVES)), bytes(own.add(WIDTH))))
        }
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn halved(at: *const u8, b: usize) -> ([__m512; 2], __m512) {
        // SAFETY: by the caller's promise.
        unsafe {
            let own = at.add(2 * HALVES + b % GROUP * 2 * WIDTH);
            let bytes = |at: *const u8| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())));
            let d = halves(at);
            ([_mm512_mul_ps(d, bytes(own)), _mm512_mul_ps(d, bytes(own.add(WIDTH)))], _mm512_setzero_ps())
        }
    }
}

/// Scales of eight rows.
pub mod narrow {
    use super::*;

    /// # Safety
    /// 16 readable bytes at `at`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn halves(at: *const u8) -> __m256 {
        // SAFETY: 16 readable bytes by the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    /// # Safety
    /// The scales of a [`Form`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn one(at: *const u8, _b: usize, half: usize) -> ([__m256; 2], __m256) {
        // SAFETY: by the caller's promise.
        ([unsafe { halves(at.add(half * 16)) }; 2], _mm256_setzero_ps())
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn pair(at: *const u8, _b: usize, half: usize) -> ([__m256; 2], __m256) {
        // SAFETY: by the caller's promise.
        unsafe { ([halves(at.add(half * 16)); 2], halves(at.add(HALVES + half * 16))) }
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn shared(at: *const u8, b: usize, half: usize) -> ([__m256; 2], __m256) {
        // SAFETY: by the caller's promise.
        unsafe {
            let own = at.add(2 * HALVES + b % GROUP * 2 * WIDTH + half * 8);
            let at = at.add(half * 16);
            let bytes = |at: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())));
            let d = _mm256_mul_ps(halves(at), bytes(own));
            ([d; 2], _mm256_mul_ps(halves(at.add(HALVES)), bytes(own.add(WIDTH))))
        }
    }

    /// # Safety
    /// As for [`one`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn halved(at: *const u8, b: usize, half: usize) -> ([__m256; 2], __m256) {
        // SAFETY: by the caller's promise.
        unsafe {
            let own = at.add(2 * HALVES + b % GROUP * 2 * WIDTH + half * 8);
            let bytes = |at: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())));
            let d = halves(at.add(half * 16));
            ([_mm256_mul_ps(d, bytes(own)), _mm256_mul_ps(d, bytes(own.add(WIDTH)))], _mm256_setzero_ps())
        }
    }
}

/// Bytes that are fetched ahead of those in use: the prefetchers of the processor stop at each page and each change of
/// stream, and one token's arithmetic is too short to wait for memory. Measured on Zen 5, from 0 to 64 KiB: a single
/// sequence decodes at 145, 205 (2 KiB), 236 (4), 260 (16), 244 (24), 217 (48) tokens per second; more no longer fits
/// the first cache beside what is in use.
const AHEAD: usize = 16 << 10;

/// Asks for `lines` cache lines from `at` on.
#[inline(always)]
fn fetch(at: *const u8, lines: usize) {
    for line in 0..lines {
        // SAFETY: any address may be asked for.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line * 64).cast()) };
    }
}

/// Asks for what comes [`AHEAD`] of a block, and for the next tile's scales: as many lines as are this block's part of them.
#[inline(always)]
fn fetch_ahead<F: Form>(weights: *const u8, scales: *const u8, b: usize, tile: usize) {
    fetch(weights.wrapping_add(AHEAD), F::BYTES / 64);
    fetch(scales.wrapping_add(tile + b % F::TOGETHER * F::BYTES_SCALES / F::TOGETHER), 1);
}

/// The dot products of eight registers of weights with a block's activations, added to `low`: of the whole block in the
/// first, or of its halves.
///
/// # Safety
/// 32 readable bytes at `values` for each plane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot512<const PLANES: usize, const HALVED: bool>(
    w: &[__m512i; 8],
    values: *const i8,
    low: [__m512i; 2],
) -> [__m512; 2] {
    let values: *const i32 = values.cast();
    let [mut low, mut low2] = low;
    let (mut high, mut high2) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    // Written out, so that it stays in registers at every level of optimisation.
    macro_rules! group {
        ($sum:ident $plane:literal: $($g:literal)*) => {$(
            // SAFETY: within the 32 bytes of the plane.
            let v = unsafe { values.add(8 * $plane + $g).read_unaligned() };
            $sum = _mm512_dpbusd_epi32($sum, w[$g], _mm512_set1_epi32(v));
        )*};
    }
    match (PLANES, HALVED) {
        (1, false) => {
            group!(low 0: 0 1 2 3 4 5 6 7);
        }
        (1, true) => {
            group!(low 0: 0 1 2 3);
            group!(low2 0: 4 5 6 7);
        }
        (_, false) => {
            group!(high 0: 0 1 2 3 4 5 6 7);
            group!(low 1: 0 1 2 3 4 5 6 7);
            low = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
        }
        (_, true) => {
            group!(high 0: 0 1 2 3);
            group!(high2 0: 4 5 6 7);
            group!(low 1: 0 1 2 3);
            group!(low2 1: 4 5 6 7);
            low = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
            low2 = _mm512_add_epi32(_mm512_slli_epi32::<8>(high2), low2);
        }
    }
    [_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(low2)]
}

/// # Safety
/// Lengths as [`super::multiply`] checks them, and a processor with the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn avx512<const T: usize, const PLANES: usize, F: Form>(
    tile: &[u8],
    tokens: Tokens<'_>,
    first: usize,
    ahead: bool,
    out: &mut [[f32; WIDTH]],
) {
    let blocks = tokens.blocks;
    let mut sums = [_mm512_setzero_ps(); T];
    let nibble = _mm512_set1_epi8(15);
    // SAFETY: all places are within the slices by the caller's promise.
    unsafe {
        let mut at = tile.as_ptr();
        let mut scales = at.add(blocks * F::BYTES);
        for b in 0..blocks {
            if ahead {
                fetch_ahead::<F>(at, scales, b, tile.len());
            }
            let load = |g: usize| _mm512_loadu_si512(at.add(g * 64).cast());
            let w = if F::NIBBLES {
                let both = [load(0), load(1), load(2), load(3)];
                [
                    _mm512_and_si512(both[0], nibble),
                    _mm512_and_si512(both[1], nibble),
                    _mm512_and_si512(both[2], nibble),
                    _mm512_and_si512(both[3], nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[0]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[1]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[2]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[3]), nibble),
                ]
            } else {
                [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)]
            };
            let (d, m) = F::scales512(scales, b);
            let mut block = first.wrapping_mul(blocks).wrapping_add(b);
            for sum in &mut sums {
                let values = tokens.values.as_ptr().add(block.wrapping_mul(BLOCK * PLANES));
                let mut start = [_mm512_setzero_si512(); 2];
                if F::OFFSET != 0 {
                    let [first, second] = *tokens.sums.as_ptr().add(block);
                    let less = |sum: i32| _mm512_set1_epi32(sum.wrapping_mul(-F::OFFSET));
                    start = match F::HALVED {
                        true => [less(first), less(second)],
                        false => [less(first.wrapping_add(second)), start[1]],
                    };
                }
                let s = _mm512_set1_ps(*tokens.scales.as_ptr().add(block));
                if F::HALVED {
                    let dot = dot512::<PLANES, true>(&w, values, start);
                    *sum = _mm512_fmadd_ps(dot[0], _mm512_mul_ps(d[0], s), *sum);
                    *sum = _mm512_fmadd_ps(dot[1], _mm512_mul_ps(d[1], s), *sum);
                } else {
                    let dot = dot512::<PLANES, false>(&w, values, start);
                    *sum = _mm512_fmadd_ps(dot[0], _mm512_mul_ps(d[0], s), *sum);
                }
                if F::MINIMA {
                    let total = _mm512_set1_ps(*tokens.totals.as_ptr().add(block));
                    *sum = _mm512_fmadd_ps(m, total, *sum);
                }
                block = block.wrapping_add(blocks);
            }
            at = at.add(F::BYTES);
            if b % F::TOGETHER == F::TOGETHER - 1 {
                scales = scales.add(F::BYTES_SCALES);
            }
        }
        for (sum, out) in sums.iter().zip(out) {
            _mm512_storeu_ps(out.as_mut_ptr(), *sum);
        }
    }
}

/// # Safety
/// As for [`avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn avx2<const T: usize, const PLANES: usize, F: Form>(
    tile: &[u8],
    tokens: Tokens<'_>,
    first: usize,
    ahead: bool,
    out: &mut [[f32; WIDTH]],
) {
    if T == 1
        && let Some(out) = out.first_mut()
    {
        // SAFETY: by the caller's promise.
        return unsafe { single256::<PLANES, F>(tile, tokens, first, ahead, out) };
    }
    let blocks = tokens.blocks;
    // Two halves of eight rows, one after the other: they share cache lines.
    for half in [0, 1] {
        let mut sums = [_mm256_setzero_ps(); T];
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            let scales = tile.as_ptr().add(blocks * F::BYTES);
            for b in 0..blocks {
                let at = tile.as_ptr().add(b * F::BYTES + half * 32);
                let scales = scales.add(b / F::TOGETHER * F::BYTES_SCALES);
                if ahead && half == 0 {
                    fetch_ahead::<F>(at, scales, b, tile.len());
                }
                let (d, m) = F::scales256(scales, b, half);
                let mut w = [_mm256_setzero_si256(); 8];
                if F::NIBBLES {
                    let nibble = _mm256_set1_epi8(15);
                    for g in 0..4 {
                        let both = _mm256_loadu_si256(at.add(g * 64).cast());
                        w[g] = _mm256_and_si256(both, nibble);
                        w[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
                    }
                }
                for (t, total) in sums.iter_mut().enumerate() {
                    let block = (first + t) * blocks + b;
                    let values: *const i32 = tokens.values.as_ptr().add(block * BLOCK * PLANES).cast();
                    let s = _mm256_set1_ps(*tokens.scales.as_ptr().add(block));
                    let [less, less2] = (*tokens.sums.as_ptr().add(block)).map(|sum| sum.wrapping_mul(-F::OFFSET));
                    if F::NIBBLES {
                        let dot = nibbles256::<PLANES>(&w, values);
                        *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[0], s), *total);
                    } else if F::HALVED {
                        let wide = tokens.wide.get_unchecked(block);
                        let dot = bytes256(at, wide, 0..4, less);
                        *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[0], s), *total);
                        let dot = bytes256(at, wide, 4..8, less2);
                        *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[1], s), *total);
                    } else {
                        let dot = bytes256(at, tokens.wide.get_unchecked(block), 0..8, less.wrapping_add(less2));
                        *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[0], s), *total);
                    }
                    if F::MINIMA {
                        let part = _mm256_set1_ps(*tokens.totals.as_ptr().add(block));
                        *total = _mm256_fmadd_ps(m, part, *total);
                    }
                }
            }
            for (total, out) in sums.iter().zip(out.iter_mut()) {
                _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), *total);
            }
        }
    }
}

/// The dot products of weights of four bits with a block's activations.
///
/// # Safety
/// 32 readable bytes at `values` for each plane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles256<const PLANES: usize>(w: &[__m256i; 8], values: *const i32) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    // Each 16-bit sum is at most 8 groups * 2 * 15 * 128 = 30,720: no saturation.
    let (mut first, mut second) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    for (g, w) in w.iter().enumerate() {
        // SAFETY: within the planes.
        let v = _mm256_set1_epi32(unsafe { values.add(g).read_unaligned() });
        first = _mm256_add_epi16(first, _mm256_maddubs_epi16(*w, v));
        if PLANES == 2 {
            // SAFETY: within the planes.
            let v = _mm256_set1_epi32(unsafe { values.add(8 + g).read_unaligned() });
            second = _mm256_add_epi16(second, _mm256_maddubs_epi16(*w, v));
        }
    }
    let dot = _mm256_madd_epi16(first, ones);
    match PLANES {
        1 => dot,
        _ => _mm256_add_epi32(_mm256_slli_epi32::<8>(dot), _mm256_madd_epi16(second, ones)),
    }
}

/// The dot products of some groups of a block's weights of eight bits with its activations, added to `start`.
///
/// # Safety
/// The block's bytes at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bytes256(at: *const u8, wide: &[i32; WIDE], groups: std::ops::Range<usize>, start: i32) -> __m256i {
    let mut dot = _mm256_set1_epi32(start);
    for g in groups {
        // SAFETY: within the block.
        let w = unsafe { _mm256_loadu_si256(at.add(g * 64).cast()) };
        dot = group256(dot, w, _mm256_set1_epi32(wide[2 * g]), _mm256_set1_epi32(wide[2 * g + 1]));
    }
    dot
}

/// Adds the products of 32 bytes with the widened values of their group. `maddubs` would saturate with weights up to 255: the
/// even and the odd bytes are widened instead.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn group256(dot: __m256i, w: __m256i, even: __m256i, odd: __m256i) -> __m256i {
    let dot = _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), even));
    _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), odd))
}

/// One token: both halves of the rows together, which share its values.
///
/// # Safety
/// As for [`avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn single256<const PLANES: usize, F: Form>(
    tile: &[u8],
    tokens: Tokens<'_>,
    token: usize,
    ahead: bool,
    out: &mut [f32; WIDTH],
) {
    let blocks = tokens.blocks;
    let mut sums = [_mm256_setzero_ps(); 2];
    // SAFETY: all places are within the slices by the caller's promise.
    unsafe {
        let scales = tile.as_ptr().add(blocks * F::BYTES);
        for b in 0..blocks {
            let at = tile.as_ptr().add(b * F::BYTES);
            let scales = scales.add(b / F::TOGETHER * F::BYTES_SCALES);
            if ahead {
                fetch_ahead::<F>(at, scales, b, tile.len());
            }
            let block = token * blocks + b;
            let load = |g: usize, half: usize| _mm256_loadu_si256(at.add(g * 64 + half * 32).cast());
            // Of both halves of the rows: of the whole block in the first, or of its halves.
            let mut dots = [[_mm256_setzero_si256(); 2]; 2];
            if F::NIBBLES {
                let values: *const i32 = tokens.values.as_ptr().add(block * BLOCK * PLANES).cast();
                let value = |i: usize| _mm256_set1_epi32(values.add(i).read_unaligned());
                let (nibble, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
                // As in `nibbles256`, no sum of sixteen bits saturates.
                let mut planes = [[_mm256_setzero_si256(); PLANES]; 2];
                for g in 0..4 {
                    for (half, planes) in planes.iter_mut().enumerate() {
                        let both = load(g, half);
                        let low = _mm256_and_si256(both, nibble);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
                        for (p, sum) in planes.iter_mut().enumerate() {
                            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(low, value(8 * p + g)));
                            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(high, value(8 * p + g + 4)));
                        }
                    }
                }
                for (dots, planes) in dots.iter_mut().zip(&planes) {
                    dots[0] = _mm256_madd_epi16(planes[0], ones);
                    if let Some(low) = planes.get(1) {
                        dots[0] = _mm256_add_epi32(_mm256_slli_epi32::<8>(dots[0]), _mm256_madd_epi16(*low, ones));
                    }
                }
            } else {
                let wide = tokens.wide.get_unchecked(block);
                let [less, less2] = (*tokens.sums.as_ptr().add(block)).map(|sum| sum.wrapping_mul(-F::OFFSET));
                let start = if F::HALVED { [less, less2] } else { [less.wrapping_add(less2), 0] };
                dots = [start.map(|start| _mm256_set1_epi32(start)); 2];
                for g in 0..8 {
                    let part = if F::HALVED { g / 4 } else { 0 };
                    let (even, odd) = (_mm256_set1_epi32(wide[2 * g]), _mm256_set1_epi32(wide[2 * g + 1]));
                    for (half, dots) in dots.iter_mut().enumerate() {
                        dots[part] = group256(dots[part], load(g, half), even, odd);
                    }
                }
            }
            let s = _mm256_set1_ps(*tokens.scales.as_ptr().add(block));
            let part = _mm256_set1_ps(*tokens.totals.as_ptr().add(block));
            for (half, sum) in sums.iter_mut().enumerate() {
                let (d, m) = F::scales256(scales, b, half);
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half][0]), _mm256_mul_ps(d[0], s), *sum);
                if F::HALVED {
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half][1]), _mm256_mul_ps(d[1], s), *sum);
                }
                if F::MINIMA {
                    *sum = _mm256_fmadd_ps(m, part, *sum);
                }
            }
        }
        for (half, sum) in sums.iter().enumerate() {
            _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), *sum);
        }
    }
}
