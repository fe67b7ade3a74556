//! The integer micro-kernels: sixteen packed rows times up to eight quantised tokens.
//!
//! A tile holds sixteen rows. Its columns come in blocks of 32; within a block, byte `64 g + 4 r + c` belongs to row r
//! and column `4 g + c`, so that one load gives every row's next four weights, as `vpdpbusd` wants them.
//!
//! * 4-bit tiles: per block 256 bytes, each with the weight of group g in its low half and that of group g + 4 in its
//!   high half; after all blocks, sixteen f16 scales d per block, then sixteen f16 minima m per block. `w = d q + m`.
//! * 8-bit tiles: per block 512 bytes of `q + 128`; after all blocks, sixteen f16 scales per block. `w = d q`.
//!
//! Activations are whole numbers of sixteen bits in two signed bytes, `x = s v`, `v = 256 h + l`, so that one matrix takes
//! two passes of byte products. (Eight bits, as llama.cpp has, are one pass; on SmolLM2-135M they move logits by 5 % of
//! their size, which turns near ties into other answers. Decoding waits for memory anyway.) A block's part of a row's
//! product is `d s (q . v) + m s (sum of v)`: the dot product of whole numbers is exact, then one fused multiply-add each,
//! blocks in order. So all versions give the same bits.

use super::{Level, tile::WIDTH};

/// Columns of a block.
pub const BLOCK: usize = 32;
/// Bytes of a block's activations.
pub const BYTES_VALUES: usize = 2 * BLOCK;
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

/// Activations of some tokens: values `[token][block][32 high, 32 low]`, the others `[token][blocks]`.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    pub values: &'a [i8],
    pub scales: &'a [f32],
    /// The sum of each block's values.
    pub sums: &'a [i32],
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
    assert!(tokens.values.len() >= (first + count) * tokens.blocks * BYTES_VALUES, "too few values");
    assert!(tokens.scales.len() >= (first + count) * tokens.blocks, "too few scales");
    assert!(tokens.sums.len() >= (first + count) * tokens.blocks, "too few sums");
    let mut done = 0;
    while done < count {
        let rest = &mut out[done..];
        match count - done {
            n if n >= 8 => some::<8>(level, packing, tile, tokens, first + done, rest),
            n if n >= 4 => some::<4>(level, packing, tile, tokens, first + done, rest),
            n if n >= 2 => some::<2>(level, packing, tile, tokens, first + done, rest),
            _ => some::<1>(level, packing, tile, tokens, first + done, rest),
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
    out: &mut [[f32; WIDTH]],
) {
    match (level, packing) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level says that the processor has the features; `multiply` has checked the lengths.
        (Level::Avx512, Packing::Q4) => unsafe { x86::q4_avx512::<T>(tile, tokens, first, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx512, Packing::Q8) => unsafe { x86::q8_avx512::<T>(tile, tokens, first, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx2, Packing::Q4) => unsafe { x86::q4_avx2::<T>(tile, tokens, first, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx2, Packing::Q8) => unsafe { x86::q8_avx2::<T>(tile, tokens, first, out) },
        _ => scalar(packing, tile, tokens, first, &mut out[..T]),
    }
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
            let (high, low) = tokens.values[at * BYTES_VALUES..][..BYTES_VALUES].split_at(BLOCK);
            let (s, sum) = (tokens.scales[at], tokens.sums[at]);
            for (row, out) in out.iter_mut().enumerate() {
                let (d, m) = scale_of(packing, tile, blocks, b, row);
                let mut dot = 0;
                for (column, (high, low)) in high.iter().zip(low).enumerate() {
                    let value = 256 * i32::from(*high) + i32::from(*low);
                    dot += weight_of(packing, tile, b, row, column) * value;
                }
                *out = (dot as f32).mul_add(d * s, *out);
                if packing == Packing::Q4 {
                    *out = m.mul_add(s * sum as f32, *out);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BYTES_Q4, BYTES_Q8, BYTES_SCALES, BYTES_VALUES, Tokens, WIDTH};

    /// # Safety
    /// 32 readable bytes at `at`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales512(at: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    /// # Safety
    /// Lengths as [`super::multiply`] checks them, and a processor with the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn q4_avx512<const T: usize>(tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
        let blocks = tokens.blocks;
        let mut sums = [_mm512_setzero_ps(); T];
        let nibble = _mm512_set1_epi8(15);
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            let scales = tile.as_ptr().add(blocks * BYTES_Q4);
            let minima = scales.add(blocks * BYTES_SCALES);
            for b in 0..blocks {
                let at = tile.as_ptr().add(b * BYTES_Q4);
                let mut w = [_mm512_setzero_si512(); 8];
                for g in 0..4 {
                    let both = _mm512_loadu_si512(at.add(g * 64).cast());
                    w[g] = _mm512_and_si512(both, nibble);
                    w[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
                }
                let d = scales512(scales.add(b * BYTES_SCALES));
                let m = scales512(minima.add(b * BYTES_SCALES));
                for (t, total) in sums.iter_mut().enumerate() {
                    let block = (first + t) * blocks + b;
                    let values: *const i32 = tokens.values.as_ptr().add(block * BYTES_VALUES).cast();
                    let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                    for (g, w) in w.iter().enumerate() {
                        high = _mm512_dpbusd_epi32(high, *w, _mm512_set1_epi32(values.add(g).read_unaligned()));
                        low = _mm512_dpbusd_epi32(low, *w, _mm512_set1_epi32(values.add(8 + g).read_unaligned()));
                    }
                    let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low));
                    let s = *tokens.scales.as_ptr().add(block);
                    let sum = *tokens.sums.as_ptr().add(block) as f32;
                    *total = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, _mm512_set1_ps(s)), *total);
                    *total = _mm512_fmadd_ps(m, _mm512_set1_ps(s * sum), *total);
                }
            }
            for (total, out) in sums.iter().zip(out) {
                _mm512_storeu_ps(out.as_mut_ptr(), *total);
            }
        }
    }

    /// # Safety
    /// As for [`q4_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn q8_avx512<const T: usize>(tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
        let blocks = tokens.blocks;
        let mut sums = [_mm512_setzero_ps(); T];
        // SAFETY: all places are within the slices by the caller's promise.
        unsafe {
            let scales = tile.as_ptr().add(blocks * BYTES_Q8);
            for b in 0..blocks {
                let at = tile.as_ptr().add(b * BYTES_Q8);
                let mut w = [_mm512_setzero_si512(); 8];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = _mm512_loadu_si512(at.add(g * 64).cast());
                }
                let d = scales512(scales.add(b * BYTES_SCALES));
                for (t, total) in sums.iter_mut().enumerate() {
                    let block = (first + t) * blocks + b;
                    let values: *const i32 = tokens.values.as_ptr().add(block * BYTES_VALUES).cast();
                    // Weights are stored with 128 added.
                    let mut high = _mm512_setzero_si512();
                    let mut low = _mm512_set1_epi32(-128 * *tokens.sums.as_ptr().add(block));
                    for (g, w) in w.iter().enumerate() {
                        high = _mm512_dpbusd_epi32(high, *w, _mm512_set1_epi32(values.add(g).read_unaligned()));
                        low = _mm512_dpbusd_epi32(low, *w, _mm512_set1_epi32(values.add(8 + g).read_unaligned()));
                    }
                    let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low));
                    let s = _mm512_set1_ps(*tokens.scales.as_ptr().add(block));
                    *total = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, s), *total);
                }
            }
            for (total, out) in sums.iter().zip(out) {
                _mm512_storeu_ps(out.as_mut_ptr(), *total);
            }
        }
    }

    /// # Safety
    /// As for [`q4_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn q4_avx2<const T: usize>(tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
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
                        let values: *const i32 = tokens.values.as_ptr().add(block * BYTES_VALUES).cast();
                        // Each 16-bit sum is at most 8 groups * 2 * 15 * 128 = 30,720: no saturation.
                        let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                        for (g, w) in w.iter().enumerate() {
                            let h = _mm256_set1_epi32(values.add(g).read_unaligned());
                            let l = _mm256_set1_epi32(values.add(8 + g).read_unaligned());
                            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(*w, h));
                            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(*w, l));
                        }
                        let high = _mm256_slli_epi32::<8>(_mm256_madd_epi16(high, ones));
                        let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_madd_epi16(low, ones)));
                        let s = *tokens.scales.as_ptr().add(block);
                        let sum = *tokens.sums.as_ptr().add(block) as f32;
                        *total = _mm256_fmadd_ps(dot, _mm256_mul_ps(d, _mm256_set1_ps(s)), *total);
                        *total = _mm256_fmadd_ps(m, _mm256_set1_ps(s * sum), *total);
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
    pub unsafe fn q8_avx2<const T: usize>(tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
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
                        let values: *const i32 = tokens.values.as_ptr().add(block * BYTES_VALUES).cast();
                        let mut dot = _mm256_set1_epi32(-128 * *tokens.sums.as_ptr().add(block));
                        // `maddubs` would saturate with weights up to 255: widen the even and the odd bytes instead, and
                        // put the activations' halves together to sixteen bits first.
                        for g in 0..8 {
                            let w = _mm256_loadu_si256(at.add(g * 64).cast());
                            let h = _mm256_set1_epi32(values.add(g).read_unaligned());
                            let l = _mm256_set1_epi32(values.add(8 + g).read_unaligned());
                            let (w_even, w_odd) = (_mm256_and_si256(w, bytes), _mm256_srli_epi16::<8>(w));
                            let l_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(l));
                            let x_even = _mm256_add_epi16(_mm256_slli_epi16::<8>(h), l_even);
                            let h_odd = _mm256_andnot_si256(bytes, h);
                            let x_odd = _mm256_add_epi16(h_odd, _mm256_srai_epi16::<8>(l));
                            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_even, x_even));
                            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_odd, x_odd));
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
