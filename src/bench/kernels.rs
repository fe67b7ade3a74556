//! `weir bench kernels`: decode attention on an NVIDIA card against its CPU twin on the same keys, values and queries, for every
//! kernel that there is, and how fast it reads its memory beside a plain copy on the same card.

use serde::Serialize;

use super::BenchError;

/// Farthest from the twin that a result may be, relative to the largest number of its row: sums are f32 in another order.
pub const TOLERANCE: f64 = 1e-4;

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: std::collections::BTreeMap<String, f64>,
    pub card: String,
    /// Whether each case is within [`TOLERANCE`].
    pub agrees: bool,
    pub tolerance: f64,
    /// Bytes read and written per second by copying within the card's memory.
    pub copy_gb_per_s: f64,
    pub cases: Vec<Case>,
    pub rows: Vec<Row>,
    pub machine: super::report::Machine,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    pub queries: usize,
    pub keys: usize,
    pub size: usize,
    pub sequences: usize,
    pub longest: usize,
    pub splits: usize,
    /// The largest difference, relative to the largest number of the row.
    pub apart: f64,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub what: String,
    pub sequences: usize,
    pub length: usize,
    pub splits: usize,
    pub micros: f64,
    /// Keys and values read per second.
    pub gb_per_s: f64,
    /// Of what a copy moves.
    pub of_copy: f64,
    pub apart: f64,
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let worst = self.cases.iter().map(|case| case.apart).fold(0.0, f64::max);
        let mut out = format!(
            "{}: {} cases of decode attention, farthest from the CPU twin {worst:.1e} (may be {:.0e}): {}.\nA copy moves {:.0} GB/s, \
             read and written.\n\n",
            self.card,
            self.cases.len(),
            self.tolerance,
            if self.agrees { "the same" } else { "NOT the same" },
            self.copy_gb_per_s
        );
        out += "| heads | sequences | positions | splits | µs | GB/s of keys and values | of a copy | apart |\n";
        out += "|---|---|---|---|---|---|---|---|\n";
        for r in &self.rows {
            out += &format!(
                "| {} | {} | {} | {} | {:.1} | {:.0} | {:.0} % | {:.1e} |\n",
                r.what,
                r.sequences,
                r.length,
                r.splits,
                r.micros,
                r.gb_per_s,
                100.0 * r.of_copy,
                r.apart
            );
        }
        out
    }
}

/// Compares and measures.
///
/// # Errors
/// [`BenchError::Start`] when weir was built without kernels, there is no card, or it fails.
#[cfg(not(feature = "cuda"))]
pub fn run(_card: usize, _repeats: usize) -> Result<Report, BenchError> {
    Err(BenchError::Start {
        what: "the kernels".to_owned(),
        reason: "this weir was built without them; build it with `kernels/fetch-nvcc && cargo build --release --features cuda`"
            .to_owned(),
    })
}

#[cfg(feature = "cuda")]
pub use with_card::run;

#[cfg(feature = "cuda")]
mod with_card {
    use std::sync::Arc;

    use half::f16;

    use super::*;
    use crate::{
        bench::report::{Machine, median},
        engine::{
            Level,
            ops::{
                Ops, Pool,
                attention::{self, Heads, POSITIONS},
                block_pool::{Block, BlockPool},
                cuda::{Buffer, CudaError, Decode, Device, HEAD_SIZES, Layout, MOST_GROUPED},
                number::Element,
            },
        },
    };

    /// Xorshift (Marsaglia, 2003).
    struct Rng(u64);

    impl Rng {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, n: usize) -> usize {
            ((self.next() >> 11) % n as u64) as usize
        }

        /// Between -1 and 1.
        fn numbers(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
        }
    }

    /// The same sequences on the card and for the twin.
    struct Setup {
        layout: Layout,
        layer: usize,
        lengths: Vec<usize>,
        queries: Vec<f32>,
        /// Of the twin, by sequence.
        twin: Vec<Vec<Block>>,
        blocks: Buffer<f16>,
        tables: Buffer<i32>,
        counts: Buffer<i32>,
        stride: usize,
        q: Buffer<f32>,
        partial: Buffer<f32>,
        out: Buffer<f32>,
    }

    impl Setup {
        fn new(
            device: &Device,
            heads: Heads,
            layers: usize,
            lengths: Vec<usize>,
            rng: &mut Rng,
        ) -> Result<Self, CudaError> {
            let layout = Layout { heads, layers };
            let layer = layers - 1;
            let pool = BlockPool::new(layout.block_elements(), Element::F16);
            let stride = lengths.iter().max().map_or(0, |n| n.div_ceil(POSITIONS));
            let total: usize = lengths.iter().map(|n| n.div_ceil(POSITIONS)).sum();
            // A block's place says nothing about whose it is.
            let mut places: Vec<usize> = (0..total).collect();
            (1..total).for_each(|i| places.swap(i, rng.below(i + 1)));
            let per_block = layout.block_elements();
            // What lies behind a sequence's end is no number: whoever reads it shows it.
            let mut memory = vec![f16::NAN; total * per_block];
            let mut tables = vec![-1i32; lengths.len() * stride];
            let mut twin = Vec::new();
            let mut places = places.into_iter();
            let width = heads.keys * heads.size;
            for (sequence, length) in lengths.iter().enumerate() {
                let mut mine = Vec::new();
                for (b, place) in (0..length.div_ceil(POSITIONS)).zip(&mut places) {
                    tables[sequence * stride + b] = place as i32;
                    let mut block = pool.take();
                    for position in b * POSITIONS..(*length).min((b + 1) * POSITIONS) {
                        let (keys, values) = (rng.numbers(width), rng.numbers(width));
                        layout.store(&mut memory[place * per_block..][..per_block], layer, position, &keys, &values);
                        let elements = heads.layer_elements();
                        let layer = &mut block.numbers_mut::<f16>()[layer * elements..][..elements];
                        attention::store(heads, layer, position % POSITIONS, &keys, &values);
                    }
                    mine.push(Arc::new(block));
                }
                twin.push(mine);
            }
            // Four times as large as keys, so that softmax has something to choose.
            let queries: Vec<f32> =
                rng.numbers(lengths.len() * heads.queries * heads.size).iter().map(|q| q * 4.0).collect();
            let counts: Vec<i32> = lengths.iter().map(|n| *n as i32).collect();
            Ok(Self {
                blocks: device.upload(&memory)?,
                tables: device.upload(&tables)?,
                counts: device.upload(&counts)?,
                q: device.upload(&queries)?,
                partial: device.zeros(1)?,
                out: device.zeros(queries.len())?,
                layout,
                layer,
                lengths,
                queries,
                twin,
                stride,
            })
        }

        fn longest(&self) -> usize {
            self.lengths.iter().copied().max().unwrap_or(0)
        }

        fn splits(&self, device: &Device) -> usize {
            device.splits(self.lengths.len(), self.layout.heads, self.longest().div_ceil(POSITIONS))
        }

        fn launch(&mut self, device: &Device) -> Result<(), CudaError> {
            let decode = Decode {
                layout: self.layout,
                layer: self.layer,
                blocks: &self.blocks,
                tables: &self.tables,
                stride: self.stride,
                lengths: &self.counts,
                longest: self.lengths.iter().copied().max().unwrap_or(0),
            };
            device.decode(&decode, &self.q, &mut self.partial, &mut self.out)
        }

        /// How far the card's result is from the twin's.
        fn apart(&mut self, device: &Device, ops: &Ops) -> Result<f64, CudaError> {
            self.launch(device)?;
            let got = device.download(&self.out)?;
            let heads = self.layout.heads;
            let spans: Vec<_> = self.lengths.iter().map(|length| attention::Span::dense(*length)).collect();
            let pieces: Vec<attention::Piece<'_>> = self
                .twin
                .iter()
                .zip(&self.lengths)
                .enumerate()
                .map(|(row, (blocks, length))| attention::Piece {
                    window: attention::ALL,
                    row,
                    count: 1,
                    position: length - 1,
                    cache: attention::Cache { blocks, spans: &spans[row], layer: self.layer, element: Element::F16 },
                })
                .collect();
            let mut want = vec![0.0; got.len()];
            attention::attend(ops, heads, &self.queries, &pieces, &attention::Turns::default(), &mut want);
            let rows = got.chunks_exact(heads.size).zip(want.chunks_exact(heads.size));
            Ok(rows
                .map(|(got, want)| {
                    let largest = want.iter().fold(0f32, |most, w| most.max(w.abs()));
                    let apart = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs())).fold(0.0, f64::max);
                    // Also where something is no number.
                    if got.iter().all(|g| g.is_finite()) { apart / f64::from(largest) } else { f64::INFINITY }
                })
                .fold(0.0, f64::max))
        }
    }

    fn failed(e: CudaError) -> BenchError {
        BenchError::Start { what: "the kernels".to_owned(), reason: e.to_string() }
    }

    /// Compares and measures.
    ///
    /// # Errors
    /// [`BenchError::Start`] when weir was built without kernels, there is no card, or it fails.
    pub fn run(card: usize, repeats: usize) -> Result<Report, BenchError> {
        let device = Device::open(card).map_err(failed)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let ops = Ops { level: Level::detect(), pool: Pool::new(threads).map_err(BenchError::io("a thread"))? };
        let mut rng = Rng(0x5eed);
        let cases = compare(&device, &ops, &mut rng).map_err(failed)?;
        let copy = copied(&device, repeats).map_err(failed)?;
        let rows = measure(&device, &ops, repeats, copy, &mut rng).map_err(failed)?;
        let apart = cases.iter().map(|case| case.apart).chain(rows.iter().map(|row| row.apart)).fold(0.0, f64::max);
        let figures = rows.iter().map(|r| (format!("{}.{}.{}", r.what, r.sequences, r.length), r.gb_per_s)).collect();
        Ok(Report {
            bench: "kernels",
            figures,
            card: device.name().map_err(failed)?,
            agrees: apart <= TOLERANCE,
            tolerance: TOLERANCE,
            copy_gb_per_s: copy / 1e9,
            cases,
            rows,
            machine: Machine::here(),
        })
    }

    /// Every kernel on sequences of all sorts of lengths.
    fn compare(device: &Device, ops: &Ops, rng: &mut Rng) -> Result<Vec<Case>, CudaError> {
        let mut cases = Vec::new();
        for size in HEAD_SIZES {
            for group in 1..=MOST_GROUPED {
                let ragged: Vec<usize> = (0..6).map(|_| 1 + rng.below(400)).collect();
                for lengths in [vec![1], vec![32], vec![33, 31, 64], ragged, vec![3000 + rng.below(3000)]] {
                    let keys = 1 + rng.below(3);
                    let heads = Heads { queries: keys * group, keys, size };
                    let mut setup = Setup::new(device, heads, 1 + rng.below(2), lengths, rng)?;
                    cases.push(Case {
                        queries: heads.queries,
                        keys,
                        size,
                        sequences: setup.lengths.len(),
                        longest: setup.longest(),
                        splits: setup.splits(device),
                        apart: setup.apart(device, ops)?,
                    });
                }
            }
        }
        Ok(cases)
    }

    /// Bytes that copying reads and writes per second.
    fn copied(device: &Device, repeats: usize) -> Result<f64, CudaError> {
        const BYTES: usize = 1 << 30;
        let from = device.zeros::<u8>(BYTES)?;
        let mut to = device.zeros::<u8>(BYTES)?;
        let mut seen = Vec::new();
        for _ in 0..repeats.max(1) {
            seen.push(device.timed(|| device.copy(&from, &mut to, 0..BYTES))?);
        }
        Ok(2.0 * BYTES as f64 / median(seen.into_iter()))
    }

    fn measure(device: &Device, ops: &Ops, repeats: usize, copy: f64, rng: &mut Rng) -> Result<Vec<Row>, CudaError> {
        let mut rows = Vec::new();
        for (what, heads) in [
            ("SmolLM2-135M: 9 over 3 of 64", Heads { queries: 9, keys: 3, size: 64 }),
            ("Qwen2.5-7B: 28 over 4 of 128", Heads { queries: 28, keys: 4, size: 128 }),
            ("Llama-3-8B: 32 over 8 of 128", Heads { queries: 32, keys: 8, size: 128 }),
        ] {
            for (sequences, length) in [(1, 2048), (1, 32_768), (16, 4096), (64, 1024)] {
                let mut setup = Setup::new(device, heads, 1, vec![length; sequences], rng)?;
                let apart = setup.apart(device, ops)?;
                let mut seen = Vec::new();
                for _ in 0..repeats.max(1) {
                    // Several at once, so that launching does not count.
                    const TIMES: usize = 20;
                    let all = device.timed(|| (0..TIMES).try_for_each(|_| setup.launch(device)))?;
                    seen.push(all / TIMES as f64);
                }
                let seconds = median(seen.into_iter());
                let bytes = (sequences * length * 2 * heads.keys * heads.size * size_of::<f16>()) as f64;
                rows.push(Row {
                    what: what.to_owned(),
                    sequences,
                    length,
                    splits: setup.splits(device),
                    micros: seconds * 1e6,
                    gb_per_s: bytes / seconds / 1e9,
                    of_copy: bytes / seconds / copy,
                    apart,
                });
            }
        }
        Ok(rows)
    }
}
