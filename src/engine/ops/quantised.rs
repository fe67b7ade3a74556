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
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// For AVX2 and weights of eight bits, see [`widen`]; empty otherwise.
    pub wide: &'a [[i32; WIDE]],
    pub blocks: usize,
}

/// Pairs of a block's values.
pub const WIDE: usize = BLOCK / 2;

/// The values of blocks as AVX2 multiplies them with bytes: in sixteen bits, two in a word, of each group of four columns the
/// first and the third, then the second and the fourth. Once for all tiles, and not again in each.
pub fn widen(precision: Precision, values: &[i8], out: &mut Vec<[i32; WIDE]>) {
    out.clear();
    out.extend(values.chunks_exact(BLOCK * precision.planes()).map(|block| {
        let value = |column: usize| match precision {
            Precision::Eight => i16::from(block[column]),
            Precision::Sixteen => (i16::from(block[column]) << 8).wrapping_add(block[BLOCK + column].into()),
        };
        std::array::from_fn(|i| {
            let column = i / 2 * 4 + i % 2;
            i32::from(value(column + 2)) << 16 | i32::from(value(column) as u16)
        })
    }));
}

/// Whether a product needs [`widen`].
pub fn needs_wide(level: Level, packing: Packing) -> bool {
    level == Level::Avx2 && with_form!(packing, F => !F::NIBBLES)
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
    assert!(
        !needs_wide(level, packing) || tokens.wide.len() >= (first + count) * tokens.blocks,
        "too few widened values"
    );
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
mod x86;
