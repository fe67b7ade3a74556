//! Weight matrices, packed at load for the kernels, and their product with a batch of tokens.
//!
//! Q4_0, Q4_1 and Q8_0 keep their bits (Q4_0 becomes `d q + m` with `m = -8 d`, which f16 holds exactly unless it
//! overflows or is subnormal; such a matrix is kept in f32) and are multiplied with activations quantised per block of
//! 32 to eight or sixteen bits ([`Precision`]). All else is kept in f32. [`Format::F32`] keeps everything in f32: the reference.

use half::f16;

use super::{
    Ops, Shared, elementwise, prefer_large_pages,
    quantised::{self, BLOCK, BYTES_Q4, BYTES_Q8, Packing, Precision, Tokens},
    tile::{self, Tile, WIDTH},
};
use crate::engine::gguf::TensorType;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F32,
    Packed(Packing),
}

/// A cache line, so that tiles begin at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix of `rows` x `columns`, packed into tiles of sixteen rows. `y = W x`.
pub struct Linear {
    rows: usize,
    columns: usize,
    kind: Kind,
    /// F32: `[tile][column][16]`.
    floats: Vec<f32>,
    /// Packed: tiles of `tile_lines` lines, see [`super::quantised`].
    lines: Vec<Line>,
    tile_lines: usize,
}

/// Scratch space for quantised activations.
#[derive(Default)]
pub struct Quantised {
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    totals: Vec<f32>,
}

impl Linear {
    /// Packs a matrix from a GGUF tensor's bytes: `rows` rows of `columns` elements of type `kind`, row after row.
    ///
    /// # Errors
    /// A reason, when the bytes cannot be decoded (only for types that candle decodes).
    ///
    /// # Panics
    /// When `raw` is not as long as shape and type say; [`crate::engine::gguf`] checks that.
    pub fn pack(
        kind: TensorType,
        raw: &[u8],
        rows: usize,
        columns: usize,
        format: Format,
    ) -> Result<Self, candle_core::Error> {
        let (elements, bytes) = kind.block();
        assert_eq!(raw.len() as u64 * elements, (rows * columns) as u64 * bytes, "matrix bytes do not fit its shape");
        if format == Format::Native {
            match kind {
                TensorType::Q4_1 => return Ok(Self::pack_q4(raw, rows, columns, false)),
                TensorType::Q4_0 if minima_fit(raw) => return Ok(Self::pack_q4(raw, rows, columns, true)),
                TensorType::Q8_0 => return Ok(Self::pack_q8(raw, rows, columns)),
                _ => {}
            }
        }
        Ok(Self::pack_f32(&dequantise(kind, raw, rows * columns)?, rows, columns))
    }

    fn pack_f32(values: &[f32], rows: usize, columns: usize) -> Self {
        let tiles = rows.div_ceil(WIDTH);
        let mut floats = vec![0.0; tiles * columns * WIDTH];
        for (row, values) in values.chunks_exact(columns).enumerate() {
            let tile = &mut floats[row / WIDTH * columns * WIDTH..];
            for (column, value) in values.iter().enumerate() {
                tile[column * WIDTH + row % WIDTH] = *value;
            }
        }
        Self { rows, columns, kind: Kind::F32, floats, lines: Vec::new(), tile_lines: 0 }
    }

    fn empty(packing: Packing, rows: usize, columns: usize) -> Self {
        let tile_lines = packing.tile_bytes(columns / BLOCK).div_ceil(64);
        let count = rows.div_ceil(WIDTH) * tile_lines;
        let mut lines = Vec::with_capacity(count);
        prefer_large_pages(lines.spare_capacity_mut());
        lines.resize(count, Line([0; 64]));
        Self { rows, columns, kind: Kind::Packed(packing), floats: Vec::new(), lines, tile_lines }
    }

    fn pack_q4(raw: &[u8], rows: usize, columns: usize, symmetric: bool) -> Self {
        let mut out = Self::empty(Packing::Q4, rows, columns);
        let blocks = columns / BLOCK;
        let header = if symmetric { 2 } else { 4 };
        for (index, block) in raw.chunks_exact(header + 16).enumerate() {
            let (row, b) = (index / blocks, index % blocks);
            let (lane, tile) = (row % WIDTH, out.tile_mut(row / WIDTH));
            let scale = [block[0], block[1]];
            let minimum = match symmetric {
                true => (f16::from_f32(-8.0 * f16::from_le_bytes(scale).to_f32())).to_le_bytes(),
                false => [block[2], block[3]],
            };
            let scales = blocks * BYTES_Q4 + (b * WIDTH + lane) * 2;
            tile[scales..][..2].copy_from_slice(&scale);
            tile[scales + blocks * WIDTH * 2..][..2].copy_from_slice(&minimum);
            // The file's byte i holds column i in its low half and column i + 16 in its high half: the same halves as
            // groups g and g + 4 of ours.
            for (i, byte) in block[header..].iter().enumerate() {
                tile[b * BYTES_Q4 + i / 4 * 64 + lane * 4 + i % 4] = *byte;
            }
        }
        out
    }

    fn pack_q8(raw: &[u8], rows: usize, columns: usize) -> Self {
        let mut out = Self::empty(Packing::Q8, rows, columns);
        let blocks = columns / BLOCK;
        for (index, block) in raw.chunks_exact(34).enumerate() {
            let (row, b) = (index / blocks, index % blocks);
            let (lane, tile) = (row % WIDTH, out.tile_mut(row / WIDTH));
            tile[blocks * BYTES_Q8 + (b * WIDTH + lane) * 2..][..2].copy_from_slice(&block[..2]);
            for (i, byte) in block[2..].iter().enumerate() {
                tile[b * BYTES_Q8 + i / 4 * 64 + lane * 4 + i % 4] = byte ^ 128;
            }
        }
        out
    }

    fn tile_mut(&mut self, tile: usize) -> &mut [u8] {
        let lines = &mut self.lines[tile * self.tile_lines..][..self.tile_lines];
        // SAFETY: a line is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64) }
    }

    fn tile(&self, tile: usize) -> &[u8] {
        let lines = &self.lines[tile * self.tile_lines..][..self.tile_lines];
        // SAFETY: a line is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 64) }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.floats.len() * 4 + self.lines.len() * 64
    }

    /// Row `row` as numbers (a token's embedding); `out` has `columns` elements.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match self.kind {
            Kind::F32 => {
                let tile = &self.floats[row / WIDTH * self.columns * WIDTH..];
                for (column, out) in out.iter_mut().enumerate() {
                    *out = tile[column * WIDTH + row % WIDTH];
                }
            }
            Kind::Packed(packing) => quantised::dequantise_row(packing, self.tile(row / WIDTH), row % WIDTH, out),
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
    if jobs.iter().any(|(w, _)| w.kind != Kind::F32) {
        scratch.values.resize(tokens * columns * precision.planes(), 0);
        scratch.scales.resize(tokens * blocks, 0.0);
        scratch.sums.resize(tokens * blocks, 0);
        scratch.totals.resize(tokens * blocks, 0.0);
        let Quantised { values, scales, sums, totals } = scratch;
        match precision {
            Precision::Eight => elementwise::quantise8(ops.level, x, values, scales, sums, totals),
            Precision::Sixteen => elementwise::quantise16(ops.level, x, values, scales, sums, totals),
        }
    }
    let Quantised { values, scales, sums, totals } = scratch;
    let quantised = Tokens { precision, values, scales, sums, totals, blocks };

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
    match w.kind {
        Kind::Packed(packing) => {
            quantised::multiply(ops.level, packing, w.tile(index), quantised, start, result);
        }
        Kind::F32 => {
            let tile = Tile {
                a: &x[start * w.columns..],
                a_stride: w.columns,
                b: &w.floats[index * w.columns * WIDTH..][..w.columns * WIDTH],
                b_stride: WIDTH,
                b_tile: 0,
                tiles: 1,
                depth: w.columns,
            };
            tile::multiply(ops.level, count, tile, result.as_flattened_mut(), WIDTH, false);
        }
    }
    for (t, result) in result.iter().enumerate() {
        // SAFETY: these rows of the result belong to this tile, and each tile to one task.
        let out = unsafe { out.slice((start + t) * w.rows + row, width) };
        out.copy_from_slice(&result[..width]);
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
        TensorType::Other(6) => GgmlDType::Q5_0,
        TensorType::Other(7) => GgmlDType::Q5_1,
        TensorType::Other(10) => GgmlDType::Q2K,
        TensorType::Other(11) => GgmlDType::Q3K,
        TensorType::Other(12) => GgmlDType::Q4K,
        TensorType::Other(13) => GgmlDType::Q5K,
        TensorType::Other(_) => GgmlDType::Q6K,
    };
    let device = candle_core::Device::Cpu;
    qtensor_from_ggml(wide, raw, vec![elements], &device)?.dequantize(&device)?.to_vec1::<f32>()
}

#[cfg(test)]
mod tests;
