//! The integer micro-kernels: sixteen packed rows times up to eight quantised tokens.
//!
//! A tile holds sixteen rows. Its columns come in blocks of 32; within a block, byte `64 g + 4 r + c` belongs to row r
//! and column `4 g + c`, so that one load gives every row's next four weights, as `vpdpbusd` wants them.
//!
//! * 4-bit tiles: per block 256 bytes, each with the weight of group g in its low half and that of group g + 4 in its
//!   high half; after all blocks, sixteen f16 scales d per block, then sixteen f16 minima m per block. `w = d q + m`.
//! * 8-bit tiles: per block 512 bytes of `q + 128`; after all blocks, sixteen f16 scales per block. `w = d q`.
//!
//! Activations are whole numbers `x = s v` with a scale per token and block: of eight bits ([`Precision::Eight`], as llama.cpp
//! has them), or of sixteen in two signed bytes, `v = 256 h + l`, so that one matrix takes two passes of byte products. A
//! block's part of a row's product is `d s (q . v) + m s (sum of v)`: the dot product of whole numbers is exact, then one
//! fused multiply-add each, blocks in order. So all versions give the same bits.

use super::{Level, tile::WIDTH};

/// Columns of a block.
pub const BLOCK: usize = 32;
/// Bytes of a block's weights.
pub const BYTES_Q4: usize = WIDTH * BLOCK / 2;
pub const BYTES_Q8: usize = WIDTH * BLOCK;
/// Bytes of sixteen f16.
pub const BYTES_SCALES: usize = WIDTH * 2;

/// How a tile is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Q4,
    Q8,
}

impl Packing {
    /// Bytes of a tile of `blocks` blocks.
    pub fn tile_bytes(self, blocks: usize) -> usize {
        match self {
            Packing::Q4 => blocks * (BYTES_Q4 + 2 * BYTES_SCALES),
            Packing::Q8 => blocks * (BYTES_Q8 + BYTES_SCALES),
        }
    }
}

/// Of how many bits activations are. Eight are half of the work; which products bear them is a matter of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    Eight,
    /// f32 for all that a model can tell.
    Sixteen,
}

impl Precision {
    /// By the number of bits; `None` unless eight or sixteen.
    pub fn of_bits(bits: u8) -> Option<Self> {
        match bits {
            8 => Some(Precision::Eight),
            16 => Some(Precision::Sixteen),
            _ => None,
        }
    }

    /// Bytes of a value.
    pub fn planes(self) -> usize {
        match self {
            Precision::Eight => 1,
            Precision::Sixteen => 2,
        }
    }
}

/// Activations of some tokens: values `[token][block][32]`, of sixteen bits `[token][block][32 high, 32 low]`; the others
/// `[token][blocks]`.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    pub precision: Precision,
    pub values: &'a [i8],
    pub scales: &'a [f32],
    /// The sum of each block's values.
    pub sums: &'a [i32],
    /// The sum of each block's activations: `scale * sum`.
    pub totals: &'a [f32],
    pub blocks: usize,
}

/// Computes sixteen rows for tokens `first..first + count`; `out` gets `[count][16]`.
pub fn multiply(
    level: Level,
    packing: Packing,
    tile: &[u8],
    tokens: Tokens<'_>,
    first: usize,
    out: &mut [[f32; WIDTH]],
) {
    let count = out.len();
    assert!(tile.len() >= packing.tile_bytes(tokens.blocks), "tile is too short");
    assert!(
        tokens.values.len() >= (first + count) * tokens.blocks * BLOCK * tokens.precision.planes(),
        "too few values"
    );
    assert!(tokens.scales.len() >= (first + count) * tokens.blocks, "too few scales");
    assert!(tokens.sums.len() >= (first + count) * tokens.blocks, "too few sums");
    assert!(tokens.totals.len() >= (first + count) * tokens.blocks, "too few totals");
    let mut done = 0;
    while done < count {
        let rest = &mut out[done..];
        match count - done {
            n if n >= 8 => some::<8>(level, packing, tile, tokens, first + done, done == 0, rest),
            n if n >= 4 => some::<4>(level, packing, tile, tokens, first + done, done == 0, rest),
            n if n >= 2 => some::<2>(level, packing, tile, tokens, first + done, done == 0, rest),
            _ => some::<1>(level, packing, tile, tokens, first + done, done == 0, rest),
        }
        done += match count - done {
            n if n >= 8 => 8,
            n if n >= 4 => 4,
            n if n >= 2 => 2,
            _ => 1,
        };
    }
}

#[inline(always)]
fn some<const T: usize>(
    level: Level,
    packing: Packing,
    tile: &[u8],
    tokens: Tokens<'_>,
    first: usize,
    ahead: bool,
    out: &mut [[f32; WIDTH]],
) {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! kernel {
            ($name:ident) => {
                // SAFETY: the level says that the processor has the features; `multiply` has checked the lengths.
                unsafe {
                    match tokens.precision {
                        Precision::Eight => x86::$name::<T, 1>(tile, tokens, first, ahead, out),
                        Precision::Sixteen => x86::$name::<T, 2>(tile, tokens, first, ahead, out),
                    }
                }
            };
        }
        match (level, packing) {
            (Level::Avx512, Packing::Q4) => return kernel!(q4_avx512),
            (Level::Avx512, Packing::Q8) => return kernel!(q8_avx512),
            (Level::Avx2, Packing::Q4) => return kernel!(q4_avx2),
            (Level::Avx2, Packing::Q8) => return kernel!(q8_avx2),
            (Level::Scalar, _) => {}
        }
    }
    let _ = (level, ahead);
    scalar(packing, tile, tokens, first, &mut out[..T]);
}

fn f16_at(bytes: &[u8], index: usize) -> f32 {
    half::f16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).to_f32()
}

/// Row `row` of a tile as numbers.
pub fn dequantise_row(packing: Packing, tile: &[u8], row: usize, out: &mut [f32]) {
    let blocks = out.len() / BLOCK;
    for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let (d, m) = scale_of(packing, tile, blocks, b, row);
        for (column, out) in out.iter_mut().enumerate() {
            *out = (weight_of(packing, tile, b, row, column) as f32).mul_add(d, m);
        }
    }
}

/// Scale and minimum of a row's block.
#[inline(always)]
fn scale_of(packing: Packing, tile: &[u8], blocks: usize, b: usize, row: usize) -> (f32, f32) {
    match packing {
        Packing::Q4 => {
            let scales = &tile[blocks * BYTES_Q4..];
            (f16_at(scales, b * WIDTH + row), f16_at(scales, (blocks + b) * WIDTH + row))
        }
        Packing::Q8 => (f16_at(&tile[blocks * BYTES_Q8..], b * WIDTH + row), 0.0),
    }
}

/// The whole number of a row's column within block `b`.
#[inline(always)]
fn weight_of(packing: Packing, tile: &[u8], b: usize, row: usize, column: usize) -> i32 {
    let (group, c) = (column / 4, column % 4);
    match packing {
        Packing::Q4 => {
            let byte = tile[b * BYTES_Q4 + (group % 4) * 64 + row * 4 + c];
            i32::from(if group < 4 { byte & 15 } else { byte >> 4 })
        }
        Packing::Q8 => i32::from(tile[b * BYTES_Q8 + group * 64 + row * 4 + c]) - 128,
    }
}

fn scalar(packing: Packing, tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
    let blocks = tokens.blocks;
    for (t, out) in out.iter_mut().enumerate() {
        *out = [0.0; WIDTH];
        for b in 0..blocks {
            let at = (first + t) * blocks + b;
            let planes = tokens.precision.planes();
            let values = &tokens.values[at * BLOCK * planes..][..BLOCK * planes];
            let value = |column: usize| match tokens.precision {
                Precision::Eight => i32::from(values[column]),
                Precision::Sixteen => 256 * i32::from(values[column]) + i32::from(values[BLOCK + column]),
            };
            let (s, total) = (tokens.scales[at], tokens.totals[at]);
            for (row, out) in out.iter_mut().enumerate() {
                let (d, m) = scale_of(packing, tile, blocks, b, row);
                let mut dot = 0;
                for column in 0..BLOCK {
                    dot += weight_of(packing, tile, b, row, column) * value(column);
                }
                *out = (dot as f32).mul_add(d * s, *out);
                if packing == Packing::Q4 {
                    *out = m.mul_add(total, *out);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, BYTES_Q4, BYTES_Q8, BYTES_SCALES, Tokens, WIDTH};

    /// # Safety
    /// 32 readable bytes at `at`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales512(at: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    /// Bytes that are fetched ahead of those in use: the prefetchers of the processor stop at each page and each change of
    /// stream, and one token's arithmetic is too short to wait for memory. Measured on Zen 5, from 0 to 64 KiB: a single
    /// sequence decodes at 145, 205 (2 KiB), 236 (4), 260 (16), 244 (24), 217 (48) tokens per second; more no longer fits
    /// the first cache beside what is in use.
    const AHEAD: usize = 16 << 10;

    /// Asks for `lines` cache lines from `at` on; any address may be asked for.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fetch(at: *const u8, lines: usize) {
        for line in 0..lines {
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line * 64).cast());
        }
    }

    /// The dot products of eight registers of weights with a block's activations, added to `low`.
    ///
    /// # Safety
    /// 32 readable bytes at `values` for each plane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn dot512<const PLANES: usize>(w: &[__m512i; 8], values: *const i8, low: __m512i) -> __m512 {
        let values: *const i32 = values.cast();
        let (mut high, mut low) = (_mm512_setzero_si512(), low);
        // Written out, so that it stays in registers at every level of optimisation.
        macro_rules! group {
            ($sum:ident $plane:literal: $($g:literal)*) => {$(
                // SAFETY: within the 32 bytes of the plane.
                let v = unsafe { values.add(8 * $plane + $g).read_unaligned() };
                $sum = _mm512_dpbusd_epi32($sum, w[$g], _mm512_set1_epi32(v));
            )*};
        }
        if PLANES == 1 {
            group!(low 0: 0 1 2 3 4 5 6 7);
        } else {
            group!(high 0: 0 1 2 3 4 5 6 7);
            group!(low 1: 0 1 2 3 4 5 6 7);
            low = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
        }
        _mm512_cvtepi32_ps(low)
    }

    /// # Safety
    /// Lengths as [`super::multiply`] checks them, and a processor with the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn q4_avx512<const T: usize, const PLANES: usize>(
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
            let mut scales = at.add(blocks * BYTES_Q4);
            let mut minima = scales.add(blocks * BYTES_SCALES);
            let next = tile.len();
            for b in 0..blocks {
                if ahead {
                    fetch(at.wrapping_add(AHEAD), 4);
                    fetch(scales.wrapping_add(next), 1);
                    fetch(minima.wrapping_add(next), 1);
                }
                let both = [
                    _mm512_loadu_si512(at.cast()),
                    _mm512_loadu_si512(at.add(64).cast()),
                    _mm512_loadu_si512(at.add(128).cast()),
                    _mm512_loadu_si512(at.add(192).cast()),
                ];
                let w = [
                    _mm512_and_si512(both[0], nibble),
                    _mm512_and_si512(both[1], nibble),
                    _mm512_and_si512(both[2], nibble),
                    _mm512_and_si512(both[3], nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[0]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[1]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[2]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(both[3]), nibble),
                ];
                let (d, m) = (scales512(scales), scales512(minima));
                let mut block = first.wrapping_mul(blocks).wrapping_add(b);
                for sum in &mut sums {
                    let values = tokens.values.as_ptr().add(block.wrapping_mul(BLOCK * PLANES));
                    let dot = dot512::<PLANES>(&w, values, _mm512_setzero_si512());
                    let s = _mm512_set1_ps(*tokens.scales.as_ptr().add(block));
                    let total = _mm512_set1_ps(*tokens.totals.as_ptr().add(block));
                    *sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, s), *sum);
                    *sum = _mm512_fmadd_ps(m, total, *sum);
                    block = block.wrapping_add(blocks);
                }
                at = at.add(BYTES_Q4);
                scales = scales.add(BYTES_SCALES);
                minima = minima.add(BYTES_SCALES);
            }
            for (sum, out) in sums.iter().zip(out) {
                _mm512_storeu_ps(out.as_mut_ptr(), *sum);
            }
        }
    }

    /// # Safety
    /// As for [`q4_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn q8_avx512<const T: usize, const PLANES: usize>(
        tile: &[u8],
        tokens: Tokens<'_>,
        first: usize,
        ahead: bool,
        out: &mut [[f32; WIDTH]],
    ) {
        let blocks = tokens.blocks;
        let mut sums = [_mm512_setzero_ps(); T];
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            let mut at = tile.as_ptr();
            let mut scales = at.add(blocks * BYTES_Q8);
            let next = tile.len();
            for b in 0..blocks {
                if ahead {
                    fetch(at.wrapping_add(AHEAD), 8);
                    fetch(scales.wrapping_add(next), 1);
                }
                let w = [
                    _mm512_loadu_si512(at.cast()),
                    _mm512_loadu_si512(at.add(64).cast()),
                    _mm512_loadu_si512(at.add(128).cast()),
                    _mm512_loadu_si512(at.add(192).cast()),
                    _mm512_loadu_si512(at.add(256).cast()),
                    _mm512_loadu_si512(at.add(320).cast()),
                    _mm512_loadu_si512(at.add(384).cast()),
                    _mm512_loadu_si512(at.add(448).cast()),
                ];
                let d = scales512(scales);
                let mut block = first.wrapping_mul(blocks).wrapping_add(b);
                for sum in &mut sums {
                    let values = tokens.values.as_ptr().add(block.wrapping_mul(BLOCK * PLANES));
                    // Weights are stored with 128 added.
                    let offset = _mm512_set1_epi32((*tokens.sums.as_ptr().add(block)).wrapping_mul(-128));
                    let dot = dot512::<PLANES>(&w, values, offset);
                    let s = _mm512_set1_ps(*tokens.scales.as_ptr().add(block));
                    *sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, s), *sum);
                    block = block.wrapping_add(blocks);
                }
                at = at.add(BYTES_Q8);
                scales = scales.add(BYTES_SCALES);
            }
            for (sum, out) in sums.iter().zip(out) {
                _mm512_storeu_ps(out.as_mut_ptr(), *sum);
            }
        }
    }

    /// # Safety
    /// As for [`q4_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn q4_avx2<const T: usize, const PLANES: usize>(
        tile: &[u8],
        tokens: Tokens<'_>,
        first: usize,
        _ahead: bool,
        out: &mut [[f32; WIDTH]],
    ) {
        let blocks = tokens.blocks;
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        // Two halves of eight rows, one after the other.
        for half in [0, 1] {
            let mut sums = [_mm256_setzero_ps(); T];
            // SAFETY: all places are within the slices by the caller's promise.
            unsafe {
                let scales = tile.as_ptr().add(blocks * BYTES_Q4 + half * 16);
                let minima = scales.add(blocks * BYTES_SCALES);
                for b in 0..blocks {
                    let at = tile.as_ptr().add(b * BYTES_Q4 + half * 32);
                    let mut w = [_mm256_setzero_si256(); 8];
                    for g in 0..4 {
                        let both = _mm256_loadu_si256(at.add(g * 64).cast());
                        w[g] = _mm256_and_si256(both, nibble);
                        w[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
                    }
                    let d = _mm256_cvtph_ps(_mm_loadu_si128(scales.add(b * BYTES_SCALES).cast()));
                    let m = _mm256_cvtph_ps(_mm_loadu_si128(minima.add(b * BYTES_SCALES).cast()));
                    for (t, total) in sums.iter_mut().enumerate() {
                        let block = (first + t) * blocks + b;
                        let values: *const i32 = tokens.values.as_ptr().add(block * BLOCK * PLANES).cast();
                        // Each 16-bit sum is at most 8 groups * 2 * 15 * 128 = 30,720: no saturation.
                        let (mut first, mut second) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                        for (g, w) in w.iter().enumerate() {
                            let v = _mm256_set1_epi32(values.add(g).read_unaligned());
                            first = _mm256_add_epi16(first, _mm256_maddubs_epi16(*w, v));
                            if PLANES == 2 {
                                let v = _mm256_set1_epi32(values.add(8 + g).read_unaligned());
                                second = _mm256_add_epi16(second, _mm256_maddubs_epi16(*w, v));
                            }
                        }
                        let mut dot = _mm256_madd_epi16(first, ones);
                        if PLANES == 2 {
                            dot = _mm256_add_epi32(_mm256_slli_epi32::<8>(dot), _mm256_madd_epi16(second, ones));
                        }
                        let dot = _mm256_cvtepi32_ps(dot);
                        let s = *tokens.scales.as_ptr().add(block);
                        let part = _mm256_set1_ps(*tokens.totals.as_ptr().add(block));
                        *total = _mm256_fmadd_ps(dot, _mm256_mul_ps(d, _mm256_set1_ps(s)), *total);
                        *total = _mm256_fmadd_ps(m, part, *total);
                    }
                }
                for (total, out) in sums.iter().zip(out.iter_mut()) {
                    _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), *total);
                }
            }
        }
    }

    /// # Safety
    /// As for [`q4_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn q8_avx2<const T: usize, const PLANES: usize>(
        tile: &[u8],
        tokens: Tokens<'_>,
        first: usize,
        _ahead: bool,
        out: &mut [[f32; WIDTH]],
    ) {
        let blocks = tokens.blocks;
        let bytes = _mm256_set1_epi16(255);
        for half in [0, 1] {
            let mut sums = [_mm256_setzero_ps(); T];
            // SAFETY: all places are within the slices by the caller's promise.
            unsafe {
                let scales = tile.as_ptr().add(blocks * BYTES_Q8 + half * 16);
                for b in 0..blocks {
                    let at = tile.as_ptr().add(b * BYTES_Q8 + half * 32);
                    let d = _mm256_cvtph_ps(_mm_loadu_si128(scales.add(b * BYTES_SCALES).cast()));
                    for (t, total) in sums.iter_mut().enumerate() {
                        let block = (first + t) * blocks + b;
                        let values: *const i32 = tokens.values.as_ptr().add(block * BLOCK * PLANES).cast();
                        let mut dot = _mm256_set1_epi32(-128 * *tokens.sums.as_ptr().add(block));
                        // `maddubs` would saturate with weights up to 255: widen the even and the odd bytes instead.
                        for g in 0..8 {
                            let w = _mm256_loadu_si256(at.add(g * 64).cast());
                            let v = _mm256_set1_epi32(values.add(g).read_unaligned());
                            let (w_even, w_odd) = (_mm256_and_si256(w, bytes), _mm256_srli_epi16::<8>(w));
                            let widened =
                                |v| (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)), _mm256_srai_epi16::<8>(v));
                            let (mut v_even, mut v_odd) = widened(v);
                            if PLANES == 2 {
                                // The halves put together to sixteen bits first.
                                let low = widened(_mm256_set1_epi32(values.add(8 + g).read_unaligned()));
                                v_even = _mm256_add_epi16(_mm256_slli_epi16::<8>(v_even), low.0);
                                v_odd = _mm256_add_epi16(_mm256_slli_epi16::<8>(v_odd), low.1);
                            }
                            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_even, v_even));
                            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_odd, v_odd));
                        }
                        let s = _mm256_set1_ps(*tokens.scales.as_ptr().add(block));
                        *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d, s), *total);
                    }
                }
                for (total, out) in sums.iter().zip(out.iter_mut()) {
                    _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), *total);
                }
            }
        }
    }
}
