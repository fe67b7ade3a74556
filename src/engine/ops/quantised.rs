//! The integer micro-kernels: sixteen packed rows times up to eight quantised tokens.
//!
//! A tile holds sixteen rows. Its columns come in blocks of 32; within a block, byte `64 g + 4 r + c` belongs to row r
//! and column `4 g + c`, so that one load gives every row's next four weights, as `vpdpbusd` wants them. Weights of four bits
//! take 256 bytes a block, that of group g in the low half of a byte and that of group g + 4 in its high half; larger ones 512.
//! After all blocks come their scales, see [`Packing`].
//!
//! Activations are whole numbers `x = s v` with a scale per token and block: of eight bits ([`Precision::Eight`], as llama.cpp
//! has them), or of sixteen in two signed bytes, `v = 256 h + l`, so that one matrix takes two passes of byte products. A
//! block's part of a row's product is `d s (q . v) + m s (sum of v)`: the dot product of whole numbers is exact, then one
//! fused multiply-add each, blocks in order. So all versions give the same bits.

use super::{Level, tile::WIDTH};

/// Columns of a block.
pub const BLOCK: usize = 32;
/// Blocks of a group of the K formats.
pub const GROUP: usize = 8;
/// Bytes of sixteen f16.
const HALVES: usize = WIDTH * 2;
/// Bytes of a group's scales in the K formats: two times sixteen f16, then two times sixteen bytes for each block.
const BYTES_GROUP: usize = 2 * HALVES + GROUP * 2 * WIDTH;

/// How a tile is packed, after the GGUF format that it is exact for. d and m are f16 of each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// `w = d q + m`; four bits. Of each block sixteen d, then sixteen m.
    Q4,
    /// `w = d (q - 128)`; eight bits. Of each block sixteen d.
    Q8,
    /// `w = d a q + m b`; four bits. Of eight blocks together sixteen d and m, then of each of them sixteen bytes a and b.
    Q4K,
    /// As [`Packing::Q4K`], the weights in eight bits.
    Q5K,
    /// `w = d a (q - 32)`; eight bits. Of eight blocks together sixteen d (and as much unused), then of each of them sixteen signed
    /// bytes a for its first sixteen columns, and sixteen for the others.
    Q6K,
}

/// What is different between packings, for the kernels.
trait Form {
    /// Weights of four bits; else eight.
    const NIBBLES: bool;
    /// What was added to weights.
    const OFFSET: i32;
    /// Whether the two halves of a block have scales of their own.
    const HALVED: bool;
    /// Whether there are minima.
    const MINIMA: bool;
    /// Blocks that share scales, and the bytes of these.
    const TOGETHER: usize;
    const BYTES_SCALES: usize;

    /// Bytes of a block's weights.
    const BYTES: usize = if Self::NIBBLES { WIDTH * BLOCK / 2 } else { WIDTH * BLOCK };

    /// A row's scales of both halves, and its minimum, from those of its blocks.
    fn scales(at: &[u8], b: usize, row: usize) -> ([f32; 2], f32);

    /// Of all rows.
    ///
    /// # Safety
    /// [`BYTES_SCALES`](Self::BYTES_SCALES) readable bytes, and a processor with the features.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales512(at: *const u8, b: usize) -> ([x86::Wide; 2], x86::Wide);

    /// Of the eight rows of a half.
    ///
    /// # Safety
    /// As for [`scales512`](Self::scales512).
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales256(at: *const u8, b: usize, half: usize) -> ([x86::Narrow; 2], x86::Narrow);
}

struct Q4;
struct Q8;
struct Q4K;
struct Q5K;
struct Q6K;

/// Calls with the form of a packing.
macro_rules! with_form {
    ($packing:expr, $form:ident => $call:expr) => {
        match $packing {
            Packing::Q4 => {
                type $form = Q4;
                $call
            }
            Packing::Q8 => {
                type $form = Q8;
                $call
            }
            Packing::Q4K => {
                type $form = Q4K;
                $call
            }
            Packing::Q5K => {
                type $form = Q5K;
                $call
            }
            Packing::Q6K => {
                type $form = Q6K;
                $call
            }
        }
    };
}

impl Packing {
    /// Bytes of a tile of `blocks` blocks.
    pub fn tile_bytes(self, blocks: usize) -> usize {
        with_form!(self, F => blocks * F::BYTES + blocks.div_ceil(F::TOGETHER) * F::BYTES_SCALES)
    }

    /// Puts a row's weights of block `b` in; each as it is stored, with its offset.
    pub fn put_weights(self, tile: &mut [u8], b: usize, row: usize, weights: &[u8; BLOCK]) {
        with_form!(self, F => {
            let block = &mut tile[b * F::BYTES..][..F::BYTES];
            for (column, weight) in weights.iter().enumerate() {
                let at = column / 4 * 64 + row * 4 + column % 4;
                match F::NIBBLES {
                    true if column < 16 => block[at] |= weight,
                    true => block[at - 256] |= weight << 4,
                    false => block[at] = *weight,
                }
            }
        });
    }

    /// Puts what a row's block has for itself among the scales: f16 for [`Packing::Q4`] and [`Packing::Q8`], bytes for the others.
    pub fn put_scales(self, tile: &mut [u8], blocks: usize, b: usize, row: usize, first: &[u8], second: &[u8]) {
        with_form!(self, F => {
            let shared = if F::TOGETHER > 1 { 2 * HALVES } else { 0 };
            let (size, own) = (first.len(), shared + among::<F>(b) * 2 * WIDTH);
            let at = blocks * F::BYTES + b / F::TOGETHER * F::BYTES_SCALES + own;
            tile[at + row * size..][..size].copy_from_slice(first);
            if !second.is_empty() {
                tile[at + (WIDTH + row) * size..][..size].copy_from_slice(second);
            }
        });
    }

    /// Puts what eight blocks of a row share: d and m of the K formats.
    pub fn put_shared(self, tile: &mut [u8], blocks: usize, group: usize, row: usize, d: [u8; 2], m: [u8; 2]) {
        with_form!(self, F => {
            let at = blocks * F::BYTES + group * F::BYTES_SCALES;
            tile[at + row * 2..][..2].copy_from_slice(&d);
            tile[at + HALVES + row * 2..][..2].copy_from_slice(&m);
        });
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
    /// The sums of each block's values, of its first and of its other sixteen.
    pub sums: &'a [[i32; 2]],
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
    with_form!(packing, F => {
        let mut done = 0;
        while done < count {
            let rest = &mut out[done..];
            let ahead = done == 0;
            done += match count - done {
                n if n >= 8 => some::<8, F>(level, tile, tokens, first + done, ahead, rest),
                n if n >= 4 => some::<4, F>(level, tile, tokens, first + done, ahead, rest),
                n if n >= 2 => some::<2, F>(level, tile, tokens, first + done, ahead, rest),
                _ => some::<1, F>(level, tile, tokens, first + done, ahead, rest),
            }
        }
    });
}

/// `T` tokens; gives their number.
#[inline(always)]
fn some<const T: usize, F: Form>(
    level: Level,
    tile: &[u8],
    tokens: Tokens<'_>,
    first: usize,
    ahead: bool,
    out: &mut [[f32; WIDTH]],
) -> usize {
    match level {
        // SAFETY: the level says that the processor has the features; `multiply` has checked the lengths.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe {
            match tokens.precision {
                Precision::Eight => x86::avx512::<T, 1, F>(tile, tokens, first, ahead, out),
                Precision::Sixteen => x86::avx512::<T, 2, F>(tile, tokens, first, ahead, out),
            }
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe {
            match tokens.precision {
                Precision::Eight => x86::avx2::<T, 1, F>(tile, tokens, first, ahead, out),
                Precision::Sixteen => x86::avx2::<T, 2, F>(tile, tokens, first, ahead, out),
            }
        },
        _ => scalar::<F>(tile, tokens, first, &mut out[..T]),
    }
    let _ = ahead;
    T
}

fn f16_at(bytes: &[u8], index: usize) -> f32 {
    half::f16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).to_f32()
}

/// Row `row` of a tile as numbers.
pub fn dequantise_row(packing: Packing, tile: &[u8], row: usize, out: &mut [f32]) {
    let blocks = out.len() / BLOCK;
    with_form!(packing, F => {
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let (d, m) = F::scales(scales_of::<F>(tile, blocks, b), b, row);
            for (column, out) in out.iter_mut().enumerate() {
                *out = ((weight_of::<F>(tile, b, row, column) - F::OFFSET) as f32).mul_add(d[column / 16], m);
            }
        }
    });
}

/// Which of the blocks that share scales a block is.
fn among<F: Form>(b: usize) -> usize {
    b % F::TOGETHER
}

/// The scales of a block and of those that share them.
#[inline(always)]
fn scales_of<F: Form>(tile: &[u8], blocks: usize, b: usize) -> &[u8] {
    &tile[blocks * F::BYTES + b / F::TOGETHER * F::BYTES_SCALES..][..F::BYTES_SCALES]
}

/// A weight as it is stored: of a row's column within block `b`.
#[inline(always)]
fn weight_of<F: Form>(tile: &[u8], b: usize, row: usize, column: usize) -> i32 {
    let (group, c) = (column / 4, column % 4);
    let block = &tile[b * F::BYTES..][..F::BYTES];
    if F::NIBBLES {
        let byte = block[(group % 4) * 64 + row * 4 + c];
        i32::from(if group < 4 { byte & 15 } else { byte >> 4 })
    } else {
        i32::from(block[group * 64 + row * 4 + c])
    }
}

fn scalar<F: Form>(tile: &[u8], tokens: Tokens<'_>, first: usize, out: &mut [[f32; WIDTH]]) {
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
            let scales = scales_of::<F>(tile, blocks, b);
            for (row, out) in out.iter_mut().enumerate() {
                let (d, m) = F::scales(scales, b, row);
                let dot = |columns: std::ops::Range<usize>| -> i32 {
                    columns.map(|column| (weight_of::<F>(tile, b, row, column) - F::OFFSET) * value(column)).sum()
                };
                if F::HALVED {
                    *out = (dot(0..16) as f32).mul_add(d[0] * s, *out);
                    *out = (dot(16..32) as f32).mul_add(d[1] * s, *out);
                } else {
                    *out = (dot(0..32) as f32).mul_add(d[0] * s, *out);
                }
                if F::MINIMA {
                    *out = m.mul_add(total, *out);
                }
            }
        }
    }
}

/// Two readings of sixteen f16 or bytes: see [`Packing`].
macro_rules! forms {
    ($($name:ident: $nibbles:literal, $offset:literal, $halved:literal, $minima:literal, $together:expr, $bytes:expr, $scales:ident;)*) => {$(
        impl Form for $name {
            const NIBBLES: bool = $nibbles;
            const OFFSET: i32 = $offset;
            const HALVED: bool = $halved;
            const MINIMA: bool = $minima;
            const TOGETHER: usize = $together;
            const BYTES_SCALES: usize = $bytes;

            #[inline(always)]
            fn scales(at: &[u8], b: usize, row: usize) -> ([f32; 2], f32) {
                $scales(at, b, row)
            }

            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
            unsafe fn scales512(at: *const u8, b: usize) -> ([x86::Wide; 2], x86::Wide) {
                // SAFETY: by the caller's promise.
                unsafe { x86::wide::$scales(at, b) }
            }

            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn scales256(at: *const u8, b: usize, half: usize) -> ([x86::Narrow; 2], x86::Narrow) {
                // SAFETY: by the caller's promise.
                unsafe { x86::narrow::$scales(at, b, half) }
            }
        }
    )*};
}

forms! {
    Q4: true, 0, false, true, 1, 2 * HALVES, pair;
    Q8: false, 128, false, false, 1, HALVES, one;
    Q4K: true, 0, false, true, GROUP, BYTES_GROUP, shared;
    Q5K: false, 0, false, true, GROUP, BYTES_GROUP, shared;
    Q6K: false, 32, true, false, GROUP, BYTES_GROUP, halved;
}

#[inline(always)]
fn one(at: &[u8], _b: usize, row: usize) -> ([f32; 2], f32) {
    ([f16_at(at, row); 2], 0.0)
}

#[inline(always)]
fn pair(at: &[u8], _b: usize, row: usize) -> ([f32; 2], f32) {
    ([f16_at(at, row); 2], f16_at(at, WIDTH + row))
}

#[inline(always)]
fn shared(at: &[u8], b: usize, row: usize) -> ([f32; 2], f32) {
    let own = &at[2 * HALVES + b % GROUP * 2 * WIDTH..];
    let (d, m) = (f16_at(at, row) * f32::from(own[row]), f16_at(at, WIDTH + row) * f32::from(own[WIDTH + row]));
    ([d; 2], m)
}

#[inline(always)]
fn halved(at: &[u8], b: usize, row: usize) -> ([f32; 2], f32) {
    let own = &at[2 * HALVES + b % GROUP * 2 * WIDTH..];
    let d = f16_at(at, row);
    ([row, WIDTH + row].map(|place| d * f32::from(own[place] as i8)), 0.0)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Form, GROUP, HALVES, Tokens, WIDTH};

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
                            let dot = bytes256::<PLANES>(at, values, 0..4, less);
                            *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[0], s), *total);
                            let dot = bytes256::<PLANES>(at, values, 4..8, less2);
                            *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d[1], s), *total);
                        } else {
                            let dot = bytes256::<PLANES>(at, values, 0..8, less.wrapping_add(less2));
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
    /// The block's bytes at `at`, and 32 readable bytes at `values` for each plane.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes256<const PLANES: usize>(
        at: *const u8,
        values: *const i32,
        groups: std::ops::Range<usize>,
        start: i32,
    ) -> __m256i {
        let bytes = _mm256_set1_epi16(255);
        let mut dot = _mm256_set1_epi32(start);
        let widened = |v| (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)), _mm256_srai_epi16::<8>(v));
        // `maddubs` would saturate with weights up to 255: widen the even and the odd bytes instead.
        for g in groups {
            // SAFETY: within the block and the planes.
            let (w, v) = unsafe {
                (_mm256_loadu_si256(at.add(g * 64).cast()), _mm256_set1_epi32(values.add(g).read_unaligned()))
            };
            let (w_even, w_odd) = (_mm256_and_si256(w, bytes), _mm256_srli_epi16::<8>(w));
            let (mut v_even, mut v_odd) = widened(v);
            if PLANES == 2 {
                // The halves put together to sixteen bits first.
                // SAFETY: within the planes.
                let low = widened(_mm256_set1_epi32(unsafe { values.add(8 + g).read_unaligned() }));
                v_even = _mm256_add_epi16(_mm256_slli_epi16::<8>(v_even), low.0);
                v_odd = _mm256_add_epi16(_mm256_slli_epi16::<8>(v_odd), low.1);
            }
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_even, v_even));
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w_odd, v_odd));
        }
        dot
    }
}
