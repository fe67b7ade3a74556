//! Weight matrices, packed at load for the kernels, and their product with a batch of tokens.
//!
//! Q4_0, Q4_1, Q4_K, Q5_0, Q5_K, Q6_K, Q3_K and Q8_0 keep their values exactly (Q4_0 becomes `d q + m` with `m = -8 d`, which f16
//! holds unless it overflows or is subnormal; such a matrix is kept in f32) and are multiplied with activations quantised per
//! block of 32 to eight or sixteen bits ([`Precision`]). F16 and BF16 stay as they are and meet f32. All else (Q5_1, Q2_K) is kept
//! in f32. [`Format::F32`] keeps everything in f32: the reference.

use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::{
    Ops, Shared, elementwise,
    number::{self, Line, Number, numbers, numbers_mut},
    prefer_large_pages,
    quantised::{self, BLOCK, GROUP, Packing, Precision, Tokens},
    tile::{self, Tile, WIDTH, Wide},
};
use crate::engine::model_file::TensorType;

/// Tokens times weights below which a product is not worth waking another thread for (about 20 microseconds).
const ALONE_BELOW: usize = 1 << 20;
/// Tokens of which a task computes all its tiles before the next: they stay in the second-level cache.
const TOKENS_AT_ONCE: usize = 64;

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As in the file where there is a kernel for it, else f32.
    #[default]
    Native,
    /// Dequantised to f32: the reference for tests, four to eight times larger.
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    F32,
    F16,
    Bf16,
    Packed(Packing),
}

/// Sizes of a matrix and how it is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    rows: usize,
    columns: usize,
    kind: Kind,
}

impl Shape {
    fn tile_lines(self) -> usize {
        let bytes = match self.kind {
            Kind::F32 => self.columns.saturating_mul(WIDTH * 4),
            Kind::F16 | Kind::Bf16 => self.columns.saturating_mul(WIDTH * 2),
            Kind::Packed(packing) => packing.tile_bytes(self.columns / BLOCK),
        };
        bytes.div_ceil(Line::BYTES)
    }

    /// Bytes that it takes.
    pub fn bytes(self) -> usize {
        self.rows.div_ceil(WIDTH).saturating_mul(self.tile_lines()).saturating_mul(Line::BYTES)
    }
}

/// Where a matrix lies.
enum Lines {
    Own(Vec<Line>),
    /// From a byte of a mapped file.
    Mapped(Arc<Mmap>, usize),
}

/// A matrix of `rows` x `columns`, packed into tiles of sixteen rows. `y = W x`.
pub struct Linear {
    rows: usize,
    columns: usize,
    kind: Kind,
    /// Tiles of `tile_lines` lines: `[column][16]` numbers, or see [`super::quantised`].
    lines: Lines,
    tile_lines: usize,
}

/// Scratch space for quantised activations.
#[derive(Default)]
pub struct Quantised {
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<[i32; 2]>,
    totals: Vec<f32>,
    wide: Vec<[i32; quantised::WIDE]>,
}

impl Linear {
    /// Packs a matrix from a GGUF tensor's bytes: `rows` rows of `columns` elements of type `kind`, row after row.
    ///
    /// # Errors
    /// A reason, when the bytes cannot be decoded (only for types that candle decodes).
    ///
    /// # Panics
    /// When `raw` is not as long as shape and type say; [`crate::engine::model_file`] checks that.
    pub fn pack(
        kind: TensorType,
        raw: &[u8],
        rows: usize,
        columns: usize,
        format: Format,
    ) -> Result<Self, candle_core::Error> {
        let (elements, bytes) = kind.block();
        assert_eq!(raw.len() as u64 * elements, (rows * columns) as u64 * bytes, "matrix bytes do not fit its shape");
        let matrix = |kind| Self::empty(kind, rows, columns);
        if format == Format::Native {
            let packed = |packing| Self::empty(Kind::Packed(packing), rows, columns);
            match kind {
                TensorType::F16 => return Ok(matrix(Kind::F16).fill(raw, f16::from_le_bytes)),
                TensorType::Bf16 => return Ok(matrix(Kind::Bf16).fill(raw, bf16::from_le_bytes)),
                TensorType::Q4_1 => return Ok(packed(Packing::Q4).pack_q4(raw, false)),
                TensorType::Q4_0 if minima_fit(raw) => return Ok(packed(Packing::Q4).pack_q4(raw, true)),
                TensorType::Q8_0 => return Ok(packed(Packing::Q8).pack_q8(raw)),
                TensorType::Q5_0 => return Ok(packed(Packing::Q8).pack_q5(raw)),
                TensorType::Q3K => return Ok(packed(Packing::Q6K).pack_q3_k(raw)),
                TensorType::Q4K => return Ok(packed(Packing::Q4K).pack_k(raw, false)),
                TensorType::Q5K => return Ok(packed(Packing::Q5K).pack_k(raw, true)),
                TensorType::Q6K => return Ok(packed(Packing::Q6K).pack_q6_k(raw)),
                TensorType::F32 | TensorType::Q4_0 | TensorType::Q5_1 | TensorType::Q2K => {}
            }
        }
        let values = dequantise(kind, raw, rows * columns)?;
        let mut out = matrix(Kind::F32);
        out.fill_with(values.into_iter());
        Ok(out)
    }

    fn empty(kind: Kind, rows: usize, columns: usize) -> Self {
        let tile_lines = Shape { rows, columns, kind }.tile_lines();
        let count = rows.div_ceil(WIDTH) * tile_lines;
        let mut lines = Vec::with_capacity(count);
        prefer_large_pages(lines.spare_capacity_mut());
        lines.resize(count, Line::default());
        Self { rows, columns, kind, lines: Lines::Own(lines), tile_lines }
    }

    /// What lies packed in a mapped file from this byte on; `None` unless it is whole there, at a cache line.
    pub fn mapped(shape: Shape, map: &Arc<Mmap>, at: usize) -> Option<Self> {
        let Shape { rows, columns, kind } = shape;
        let bytes = map.get(at..at.checked_add(shape.bytes())?)?;
        (bytes.as_ptr() as usize).is_multiple_of(Line::BYTES).then(|| {
            let lines = Lines::Mapped(Arc::clone(map), at);
            Self { rows, columns, kind, lines, tile_lines: shape.tile_lines() }
        })
    }

    pub fn shape(&self) -> Shape {
        Shape { rows: self.rows, columns: self.columns, kind: self.kind }
    }

    /// As it lies in memory.
    pub fn as_bytes(&self) -> &[u8] {
        number::bytes(self.lines())
    }

    fn lines(&self) -> &[Line] {
        match &self.lines {
            Lines::Own(lines) => lines,
            Lines::Mapped(map, at) => {
                let count = self.rows.div_ceil(WIDTH) * self.tile_lines;
                // SAFETY: `mapped` has checked length and alignment; lines are plain bytes, and nobody writes them.
                unsafe { std::slice::from_raw_parts(map.as_ptr().add(*at).cast(), count) }
            }
        }
    }

    /// Of plain numbers of two bytes.
    fn fill<T: Number>(mut self, raw: &[u8], read: impl Fn([u8; 2]) -> T) -> Self {
        self.fill_with(raw.as_chunks::<2>().0.iter().map(|bytes| read(*bytes)));
        self
    }

    fn fill_with<T: Number>(&mut self, mut values: impl Iterator<Item = T>) {
        let (rows, columns) = (self.rows, self.columns);
        for row in 0..rows {
            let tile = numbers_mut::<T>(self.tile_lines_mut(row / WIDTH));
            for (column, value) in (0..columns).zip(&mut values) {
                tile[column * WIDTH + row % WIDTH] = value;
            }
        }
    }

    /// Rows of blocks of a file: the packing, a row's tile, its place in it, which block, and its bytes.
    fn each_block(
        &mut self,
        raw: &[u8],
        bytes: usize,
        columns: usize,
        mut put: impl FnMut(Packing, &mut [u8], usize, usize, &[u8]),
    ) {
        let Kind::Packed(packing) = self.kind else { return };
        let per_row = self.columns / columns;
        for (index, block) in raw.chunks_exact(bytes).enumerate() {
            let (row, b) = (index / per_row, index % per_row);
            put(packing, self.tile_mut(row / WIDTH), row % WIDTH, b, block);
        }
    }

    fn pack_q4(mut self, raw: &[u8], symmetric: bool) -> Self {
        let blocks = self.columns / BLOCK;
        let header = if symmetric { 2 } else { 4 };
        self.each_block(raw, header + 16, BLOCK, |packing, tile, row, b, block| {
            let scale = [block[0], block[1]];
            let minimum = match symmetric {
                true => (f16::from_f32(-8.0 * f16::from_le_bytes(scale).to_f32())).to_le_bytes(),
                false => [block[2], block[3]],
            };
            packing.put_scales(tile, blocks, b, row, &scale, &minimum);
            packing.put_weights(tile, b, row, &nibbles(&block[header..]));
        });
        self
    }

    fn pack_q8(mut self, raw: &[u8]) -> Self {
        let blocks = self.columns / BLOCK;
        self.each_block(raw, 34, BLOCK, |packing, tile, row, b, block| {
            packing.put_scales(tile, blocks, b, row, &block[..2], &[]);
            packing.put_weights(tile, b, row, &std::array::from_fn(|i| block[2 + i] ^ 128));
        });
        self
    }

    /// `w = d (q - 16)`, the fifth bits of all columns in a word.
    fn pack_q5(mut self, raw: &[u8]) -> Self {
        let blocks = self.columns / BLOCK;
        self.each_block(raw, 22, BLOCK, |packing, tile, row, b, block| {
            packing.put_scales(tile, blocks, b, row, &block[..2], &[]);
            let low = nibbles(&block[6..]);
            packing.put_weights(
                tile,
                b,
                row,
                &std::array::from_fn(|i| (low[i] | (block[2 + i / 8] >> (i % 8) & 1) << 4) + 128 - 16),
            );
        });
        self
    }

    /// Q4_K and Q5_K: `w = d a q - m b`.
    fn pack_k(mut self, raw: &[u8], five: bool) -> Self {
        let blocks = self.columns / BLOCK;
        let (bytes, quants) = if five { (176, 48) } else { (144, 16) };
        self.each_block(raw, bytes, BLOCK * GROUP, |packing, tile, row, group, block| {
            let minimum = -f16::from_le_bytes([block[2], block[3]]);
            packing.put_shared(tile, blocks, group, row, [block[0], block[1]], minimum.to_le_bytes());
            for j in 0..GROUP {
                let (scale, least) = six_bits(&block[4..16], j);
                packing.put_scales(tile, blocks, group * GROUP + j, row, &[scale], &[least]);
                // Two blocks share 32 bytes, the first in their low halves; bit j of `high` is the fifth.
                let low = &block[quants + j / 2 * 32..][..32];
                let high = &block[16..48];
                let weights = std::array::from_fn(|i| {
                    let fifth = if five { (high[i] >> j & 1) << 4 } else { 0 };
                    (low[i] >> (j % 2 * 4) & 15) | fifth
                });
                packing.put_weights(tile, group * GROUP + j, row, &weights);
            }
        });
        self
    }

    /// `w = d a (q - 32)`, a of sixteen columns.
    fn pack_q6_k(mut self, raw: &[u8]) -> Self {
        let blocks = self.columns / BLOCK;
        self.each_block(raw, 210, BLOCK * GROUP, |packing, tile, row, group, block| {
            packing.put_shared(tile, blocks, group, row, [block[208], block[209]], [0; 2]);
            for j in 0..GROUP {
                packing.put_scales(tile, blocks, group * GROUP + j, row, &[block[192 + 2 * j]], &[block[193 + 2 * j]]);
                // Halves of 128 columns: low four bits in 64 bytes, each for a column and that 64 later; high two bits in 32
                // bytes, each for four columns that are 32 apart.
                let (half, part) = (j / 4, j % 4);
                let low = &block[half * 64 + part % 2 * 32..][..32];
                let high = &block[128 + half * 32..][..32];
                let weights =
                    std::array::from_fn(|i| (low[i] >> (part / 2 * 4) & 15) | (high[i] >> (2 * part) & 3) << 4);
                packing.put_weights(tile, group * GROUP + j, row, &weights);
            }
        });
        self
    }

    /// `w = d (a - 32) (q - 4)`, a of sixteen columns: as Q6_K.
    fn pack_q3_k(mut self, raw: &[u8]) -> Self {
        let blocks = self.columns / BLOCK;
        self.each_block(raw, 110, BLOCK * GROUP, |packing, tile, row, group, block| {
            packing.put_shared(tile, blocks, group, row, [block[108], block[109]], [0; 2]);
            let packed = &block[96..108];
            // Sixteen scales of six bits: the low four in eight bytes, the high two in four.
            let scale = |i: usize| {
                let low = packed[i % 8] >> (i / 8 * 4) & 15;
                let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
                (low | high << 4).wrapping_sub(32)
            };
            for j in 0..GROUP {
                packing.put_scales(tile, blocks, group * GROUP + j, row, &[scale(2 * j)], &[scale(2 * j + 1)]);
                let low = &block[32 + j / 4 * 32..][..32];
                let weights = std::array::from_fn(|i| (low[i] >> (j % 4 * 2) & 3) + (block[i] >> j & 1) * 4 + 32 - 4);
                packing.put_weights(tile, group * GROUP + j, row, &weights);
            }
        });
        self
    }

    fn tile_lines_mut(&mut self, tile: usize) -> &mut [Line] {
        let Lines::Own(lines) = &mut self.lines else { unreachable!("what is mapped is not packed again") };
        &mut lines[tile * self.tile_lines..][..self.tile_lines]
    }

    fn tile_mut(&mut self, tile: usize) -> &mut [u8] {
        number::bytes_mut(self.tile_lines_mut(tile))
    }

    fn tile(&self, tile: usize) -> &[Line] {
        &self.lines()[tile * self.tile_lines..][..self.tile_lines]
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.lines().len() * Line::BYTES
    }

    /// Row `row` as numbers (a token's embedding); `out` has `columns` elements.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        fn plain<T: Number>(tile: &[Line], row: usize, out: &mut [f32]) {
            let tile = numbers::<T>(tile);
            out.iter_mut().enumerate().for_each(|(column, out)| *out = tile[column * WIDTH + row].wide());
        }
        let (tile, row) = (self.tile(row / WIDTH), row % WIDTH);
        match self.kind {
            Kind::F32 => plain::<f32>(tile, row, out),
            Kind::F16 => plain::<f16>(tile, row, out),
            Kind::Bf16 => plain::<bf16>(tile, row, out),
            Kind::Packed(packing) => quantised::dequantise_row(packing, number::bytes(tile), row, out),
        }
    }
}

/// `out = W x` for each matrix and token: `x` is `[tokens][columns]`, each `out` `[tokens][rows]`. All matrices have
/// the same number of columns and share the quantised activations, and their tiles are one pool of work.
///
/// # Panics
/// When a buffer does not fit.
pub fn multiply(
    ops: &Ops,
    x: &[f32],
    tokens: usize,
    precision: Precision,
    scratch: &mut Quantised,
    jobs: &mut [(&Linear, &mut [f32])],
) {
    let Some(columns) = jobs.first().map(|(w, _)| w.columns) else { return };
    assert_eq!(x.len(), tokens * columns, "activations do not fit");
    for (w, out) in jobs.iter() {
        assert!(w.columns == columns && out.len() == tokens * w.rows, "matrices do not fit");
    }
    let blocks = columns / BLOCK;
    if jobs.iter().any(|(w, _)| matches!(w.kind, Kind::Packed(_))) {
        scratch.values.resize(tokens * columns * precision.planes(), 0);
        scratch.scales.resize(tokens * blocks, 0.0);
        scratch.sums.resize(tokens * blocks, [0; 2]);
        scratch.totals.resize(tokens * blocks, 0.0);
        let Quantised { values, scales, sums, totals, wide } = scratch;
        match precision {
            Precision::Eight => elementwise::quantise8(ops.level, x, values, scales, sums, totals),
            Precision::Sixteen => elementwise::quantise16(ops.level, x, values, scales, sums, totals),
        }
        let wanted = |w: &Linear| matches!(w.kind, Kind::Packed(packing) if quantised::needs_wide(ops.level, packing));
        if jobs.iter().any(|(w, _)| wanted(w)) {
            quantised::widen(precision, values, wide);
        }
    }
    let Quantised { values, scales, sums, totals, wide } = scratch;
    let quantised = Tokens { precision, values, scales, sums, totals, wide, blocks };

    // One list of tiles over all matrices: (matrix, its first tile in the list).
    let mut tiles = 0;
    let mut parts: Vec<(&Linear, Shared<f32>, usize)> = Vec::with_capacity(jobs.len());
    for (w, out) in jobs.iter_mut() {
        parts.push((w, Shared::new(out), tiles));
        tiles += w.rows.div_ceil(WIDTH);
    }
    let work = tiles * WIDTH * columns * tokens;
    let threads = ops.pool.threads();
    let tasks = if work < ALONE_BELOW || threads == 1 { 1 } else { (threads * 4).min(tiles) };
    let run = |task: usize| {
        let range = task * tiles / tasks..(task + 1) * tiles / tasks;
        for start in (0..tokens).step_by(TOKENS_AT_ONCE) {
            let count = TOKENS_AT_ONCE.min(tokens - start);
            for index in range.clone() {
                let Some((w, out, begin)) = parts.iter().rev().find(|(_, _, begin)| *begin <= index) else { continue };
                one_tile(ops, w, index - begin, x, quantised, start, count, *out);
            }
        }
    };
    if tasks == 1 { run(0) } else { ops.pool.run(tasks, &run) }
}

/// Sixteen rows for tokens `start..start + count`.
#[expect(clippy::too_many_arguments, reason = "the one inner step of `multiply`, apart to be readable")]
fn one_tile(
    ops: &Ops,
    w: &Linear,
    index: usize,
    x: &[f32],
    quantised: Tokens<'_>,
    start: usize,
    count: usize,
    out: Shared<f32>,
) {
    let row = index * WIDTH;
    let width = WIDTH.min(w.rows - row);
    let mut result = [[0f32; WIDTH]; TOKENS_AT_ONCE];
    let result = &mut result[..count];
    let tile = w.tile(index);
    let rows = &x[start * w.columns..][..count * w.columns];
    match w.kind {
        Kind::Packed(packing) => {
            quantised::multiply(ops.level, packing, number::bytes(tile), quantised, start, result);
        }
        Kind::F32 => plain::<f32>(ops, tile, w.columns, rows, result),
        Kind::F16 => plain::<f16>(ops, tile, w.columns, rows, result),
        Kind::Bf16 => plain::<bf16>(ops, tile, w.columns, rows, result),
    }
    for (t, result) in result.iter().enumerate() {
        // SAFETY: these rows of the result belong to this tile, and each tile to one task.
        let out = unsafe { out.slice((start + t) * w.rows + row, width) };
        out.copy_from_slice(&result[..width]);
    }
}

/// Sixteen rows of plain numbers for some tokens.
fn plain<T: Wide>(ops: &Ops, tile: &[Line], columns: usize, x: &[f32], out: &mut [[f32; WIDTH]]) {
    let tile = Tile {
        a: x,
        a_stride: columns,
        b: &numbers::<T>(tile)[..columns * WIDTH],
        b_stride: WIDTH,
        b_tile: 0,
        tiles: 1,
        depth: columns,
    };
    tile::multiply(ops.level, out.len(), tile, out.as_flattened_mut(), WIDTH, false);
}

/// Sixteen bytes as 32 weights of four bits: byte i holds columns i and i + 16.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// Scale and minimum j of eight each, of six bits, packed in twelve bytes as Q4_K and Q5_K have them.
fn six_bits(packed: &[u8], j: usize) -> (u8, u8) {
    match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4),
    }
}

/// Whether every block's `-8 d` is an f16: true of all real files, since their scales are small and normal.
fn minima_fit(raw: &[u8]) -> bool {
    raw.chunks_exact(18).all(|block| {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        f16::from_f32(-8.0 * d).to_f32() == -8.0 * d
    })
}

/// A tensor's bytes as numbers.
///
/// # Errors
/// When candle cannot decode them.
pub fn dequantise(kind: TensorType, raw: &[u8], elements: usize) -> Result<Vec<f32>, candle_core::Error> {
    use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
    let wide = match kind {
        TensorType::F32 => {
            let (words, _) = raw.as_chunks::<4>();
            return Ok(words.iter().map(|b| f32::from_le_bytes(*b)).collect());
        }
        TensorType::F16 => GgmlDType::F16,
        TensorType::Bf16 => GgmlDType::BF16,
        TensorType::Q4_0 => GgmlDType::Q4_0,
        TensorType::Q4_1 => GgmlDType::Q4_1,
        TensorType::Q8_0 => GgmlDType::Q8_0,
        TensorType::Q5_0 => GgmlDType::Q5_0,
        TensorType::Q5_1 => GgmlDType::Q5_1,
        TensorType::Q2K => GgmlDType::Q2K,
        TensorType::Q3K => GgmlDType::Q3K,
        TensorType::Q4K => GgmlDType::Q4K,
        TensorType::Q5K => GgmlDType::Q5K,
        TensorType::Q6K => GgmlDType::Q6K,
    };
    let device = candle_core::Device::Cpu;
    qtensor_from_ggml(wide, raw, vec![elements], &device)?.dequantize(&device)?.to_vec1::<f32>()
}

#[cfg(test)]
mod tests;
