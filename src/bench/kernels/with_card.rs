//! The comparison and the measurement, where there is a card.

use std::sync::Arc;

use half::f16;

use super::*;
use crate::{
    bench::report::{Machine, median},
    engine::{
        Level,
        ops::{
            Ops, Pool,
            attention::{self, ALL, Angles, Heads, POSITIONS, Span, Turns},
            block_pool::{Block, BlockPool},
            cuda::{Buffer, CudaError, Decode, Device, HEAD_SIZES, Layout, MOST_GROUPED, Spans},
            number::Element,
            span_table::{Sequence, SpanError, SpanTable},
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

/// What a prompt is made of.
#[derive(Clone, Copy)]
enum Part {
    /// Tokens of its own.
    Own(usize),
    /// The document of this number, whose first tokens are computed again.
    Document { number: usize, again: usize },
}

struct Prompts {
    /// Tokens of each.
    documents: Vec<usize>,
    prompts: Vec<Vec<Part>>,
    window: usize,
}

impl Prompts {
    fn dense(lengths: Vec<usize>) -> Self {
        let prompts = lengths.into_iter().map(|length| vec![Part::Own(length)]).collect();
        Self { documents: Vec::new(), prompts, window: ALL }
    }

    /// Prompts of some of these documents, with something of their own before, between and behind them.
    fn mixed(documents: Vec<usize>, prompts: usize, each: usize, rng: &mut Rng) -> Self {
        let prompt = |_| {
            let mut parts = Vec::new();
            for _ in 0..each {
                if rng.below(2) == 0 {
                    parts.push(Part::Own(1 + rng.below(70)));
                }
                let number = rng.below(documents.len());
                let again = rng.below(2) * rng.below(documents[number]);
                parts.push(Part::Document { number, again });
            }
            parts.push(Part::Own(1 + rng.below(40)));
            parts
        };
        Self { prompts: (0..prompts).map(prompt).collect(), documents, window: ALL }
    }

    /// So many prompts of 4096 positions, nearly all of them documents: the same twelve in another order each time, or of
    /// each prompt its own.
    fn documents(prompts: usize, shared: bool) -> Self {
        const EACH: usize = 12;
        let prompt = |prompt: usize| {
            let number = |i| if shared { (i + prompt) % EACH } else { prompt * EACH + i };
            let documents = (0..EACH).map(|i| Part::Document { number: number(i), again: 20 });
            [Part::Own(64)].into_iter().chain(documents).chain([Part::Own(72)]).collect()
        };
        let documents = if shared { EACH } else { prompts * EACH };
        Self { documents: vec![330; documents], prompts: (0..prompts).map(prompt).collect(), window: ALL }
    }

    fn seen_through(self, window: usize) -> Self {
        Self { window, ..self }
    }
}

/// Where keys and values of prompts lie.
struct Places {
    /// By block: how many of its places are taken.
    taken: Vec<usize>,
    /// By prompt: its blocks and spans.
    tables: Vec<Vec<u32>>,
    spans: Vec<Vec<Span>>,
}

impl Places {
    fn of(prompts: &Prompts, rng: &mut Rng) -> Self {
        let mut taken = Vec::new();
        let mut documents: Vec<Vec<u32>> = Vec::new();
        for length in &prompts.documents {
            let first = taken.len();
            taken.extend(Span::dense(*length).iter().map(|span| span.len));
            documents.push((first..taken.len()).map(|block| block as u32).collect());
        }
        let mut places = Self { taken, tables: Vec::new(), spans: Vec::new() };
        for parts in &prompts.prompts {
            let (mut table, mut spans, mut own) = (Vec::new(), Vec::new(), None);
            for part in parts {
                match *part {
                    Part::Own(count) => places.own(count, &mut own, &mut table, &mut spans),
                    Part::Document { number, again } => {
                        let offset = end(&spans);
                        places.own(again, &mut own, &mut table, &mut spans);
                        for whole in Span::dense(prompts.documents[number]) {
                            let from = again.saturating_sub(whole.start);
                            if from < whole.len {
                                let (block, start) = (table.len(), end(&spans));
                                table.push(documents[number][whole.block]);
                                spans.push(Span { block, from, len: whole.len - from, start, offset });
                            }
                        }
                    }
                }
            }
            places.tables.push(table);
            places.spans.push(spans);
        }
        places.shuffle(rng);
        places
    }

    /// Tokens of a prompt's own go on in the block that its last ones are in.
    fn own(&mut self, count: usize, own: &mut Option<usize>, table: &mut Vec<u32>, spans: &mut Vec<Span>) {
        let mut left = count;
        while left > 0 {
            let block = match *own {
                Some(block) if self.taken[table[block] as usize] < POSITIONS => block,
                _ => {
                    table.push(self.taken.len() as u32);
                    self.taken.push(0);
                    *own.insert(table.len() - 1)
                }
            };
            let taken = &mut self.taken[table[block] as usize];
            let len = left.min(POSITIONS - *taken);
            spans.push(Span { block, from: *taken, len, start: end(spans), offset: 0 });
            *taken += len;
            left -= len;
        }
    }

    /// A block's number says nothing about whose it is.
    fn shuffle(&mut self, rng: &mut Rng) {
        let mut numbers: Vec<usize> = (0..self.taken.len()).collect();
        (1..numbers.len()).for_each(|i| numbers.swap(i, rng.below(i + 1)));
        let mut taken = vec![0; numbers.len()];
        numbers.iter().zip(&self.taken).for_each(|(number, count)| taken[*number] = *count);
        self.taken = taken;
        self.tables.iter_mut().flatten().for_each(|block| *block = numbers[*block as usize] as u32);
    }
}

fn end(spans: &[Span]) -> usize {
    spans.last().map_or(0, Span::end)
}

/// The rotations back by all offsets of these spans.
fn turns_of(size: usize, spans: &[Vec<Span>]) -> Turns {
    let frequencies: Vec<f64> = (0..size / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / size as f64)).collect();
    let mut turns = Turns::new();
    for offset in spans.iter().flatten().map(|span| span.offset).filter(|offset| *offset != 0) {
        turns.entry(offset).or_insert_with(|| {
            let mut angles = Angles::default();
            angles.push(-(offset as i64), &frequencies);
            angles
        });
    }
    turns
}

/// The same sequences on the card and for the twin.
struct Setup {
    layout: Layout,
    layer: usize,
    lengths: Vec<usize>,
    window: usize,
    queries: Vec<f32>,
    turns: Turns,
    /// Of the twin, by sequence.
    twin: Vec<Vec<Block>>,
    spans: Vec<Vec<Span>>,
    blocks: Buffer<f16>,
    table: Spans,
    q: Buffer<f32>,
    partial: Buffer<f32>,
    out: Buffer<f32>,
}

impl Setup {
    fn new(
        device: &Device,
        heads: Heads,
        layers: usize,
        prompts: &Prompts,
        rng: &mut Rng,
    ) -> Result<Self, KernelsError> {
        let layout = Layout { heads, layers };
        let layer = layers - 1;
        let Places { taken, tables, spans } = Places::of(prompts, rng);
        let pool = BlockPool::new(layout.block_elements(), Element::F16);
        let elements = layout.block_elements();
        // Where nothing was written is no number: whoever reads it shows it.
        let mut memory = vec![f16::NAN; taken.len() * elements];
        let width = heads.keys * heads.size;
        let mut twins: Vec<Block> = Vec::new();
        for (taken, memory) in taken.iter().zip(memory.chunks_exact_mut(elements)) {
            let mut block = pool.take();
            let part = layer * heads.layer_elements()..layers * heads.layer_elements();
            let twin = &mut block.numbers_mut::<f16>()[part];
            for place in 0..*taken {
                let (keys, values) = (rng.numbers(width), rng.numbers(width));
                layout.store(memory, layer, place, &keys, &values);
                attention::store(heads, twin, place, &keys, &values);
            }
            twins.push(Arc::new(block));
        }
        let twin = tables.iter().map(|table| table.iter().map(|block| twins[*block as usize].clone()).collect());
        let turns = turns_of(heads.size, &spans);
        let lengths: Vec<usize> = spans.iter().map(|spans| end(spans)).collect();
        let sequences: Vec<Sequence<'_>> =
            (0..lengths.len()).map(|i| Sequence { table: &tables[i], spans: &spans[i], length: lengths[i] }).collect();
        let table = SpanTable::pack(heads.size, prompts.window, &turns, &sequences)?;
        // Four times as large as keys, so that softmax has something to choose.
        let queries: Vec<f32> =
            rng.numbers(lengths.len() * heads.queries * heads.size).iter().map(|q| q * 4.0).collect();
        Ok(Self {
            blocks: device.upload(&memory)?,
            table: device.upload_spans(&table)?,
            q: device.upload(&queries)?,
            partial: device.zeros(1)?,
            out: device.zeros(queries.len())?,
            twin: twin.collect(),
            window: prompts.window,
            layout,
            layer,
            lengths,
            queries,
            turns,
            spans,
        })
    }

    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Positions that the sequences see.
    fn seen(&self) -> usize {
        self.lengths.iter().map(|length| self.window.min(*length)).sum()
    }

    fn splits(&self, device: &Device) -> usize {
        device.splits(self.layout.heads, &self.table)
    }

    fn launch(&mut self, device: &Device) -> Result<(), CudaError> {
        let decode = Decode { layout: self.layout, layer: self.layer, blocks: &self.blocks, spans: &self.table };
        device.decode(&decode, &self.q, &mut self.partial, &mut self.out)
    }

    /// How far the card's result is from the twin's.
    fn apart(&mut self, device: &Device, ops: &Ops) -> Result<f64, CudaError> {
        self.launch(device)?;
        let got = device.download(&self.out)?;
        let heads = self.layout.heads;
        let pieces: Vec<attention::Piece<'_>> = self
            .twin
            .iter()
            .zip(&self.lengths)
            .enumerate()
            .map(|(row, (blocks, length))| attention::Piece {
                window: self.window,
                row,
                count: 1,
                position: length - 1,
                cache: attention::Cache { blocks, spans: &self.spans[row], layer: self.layer, element: Element::F16 },
            })
            .collect();
        let mut want = vec![0.0; got.len()];
        attention::attend(ops, heads, &self.queries, &pieces, &self.turns, &mut want);
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

/// What can go wrong here.
#[derive(Debug, thiserror::Error)]
enum KernelsError {
    #[error(transparent)]
    Card(#[from] CudaError),
    #[error(transparent)]
    Spans(#[from] SpanError),
}

fn failed(e: impl Into<KernelsError>) -> BenchError {
    BenchError::Start { what: "the kernels".to_owned(), reason: e.into().to_string() }
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

/// Every kernel on sequences of all sorts of lengths, documents and windows.
fn compare(device: &Device, ops: &Ops, rng: &mut Rng) -> Result<Vec<Case>, KernelsError> {
    let mut cases = Vec::new();
    for size in HEAD_SIZES {
        for group in 1..=MOST_GROUPED {
            let ragged = |rng: &mut Rng| (0..6).map(|_| 1 + rng.below(400)).collect::<Vec<usize>>();
            let mut all: Vec<(&'static str, Prompts)> =
                [vec![1], vec![32], vec![33, 31, 64], ragged(rng), vec![3000 + rng.below(3000)]]
                    .into_iter()
                    .map(|lengths| ("dense", Prompts::dense(lengths)))
                    .collect();
            let window = 1 + rng.below(200);
            all.push(("dense, window", Prompts::dense(ragged(rng)).seen_through(window)));
            // Of one token, of whole blocks, and whatever comes.
            let documents = |rng: &mut Rng| vec![1, 64, 1 + rng.below(200), 1 + rng.below(200)];
            all.push(("documents", Prompts::mixed(documents(rng), 5, 3, rng)));
            all.push(("documents, window", Prompts::mixed(documents(rng), 5, 3, rng).seen_through(window)));
            all.push(("documents, long", Prompts::mixed(documents(rng), 1, 40, rng)));
            for (what, prompts) in all {
                let keys = 1 + rng.below(3);
                let heads = Heads { queries: keys * group, keys, size };
                let mut setup = Setup::new(device, heads, 1 + rng.below(2), &prompts, rng)?;
                cases.push(Case {
                    what,
                    queries: heads.queries,
                    keys,
                    size,
                    sequences: setup.lengths.len(),
                    longest: setup.longest(),
                    window: (setup.window != ALL).then_some(setup.window),
                    spans: setup.spans.iter().map(Vec::len).sum(),
                    partial: setup.spans.iter().flatten().filter(|span| span.len < POSITIONS).count(),
                    turns: setup.turns.len(),
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

fn measure(device: &Device, ops: &Ops, repeats: usize, copy: f64, rng: &mut Rng) -> Result<Vec<Row>, KernelsError> {
    let mut rows = Vec::new();
    for (what, heads) in [
        ("SmolLM2-135M: 9 over 3 of 64", Heads { queries: 9, keys: 3, size: 64 }),
        ("Qwen2.5-7B: 28 over 4 of 128", Heads { queries: 28, keys: 4, size: 128 }),
        ("Llama-3-8B: 32 over 8 of 128", Heads { queries: 32, keys: 8, size: 128 }),
    ] {
        let dense = [(1, 2048), (1, 32_768), (16, 4096), (64, 1024)]
            .map(|(sequences, length)| ("", Prompts::dense(vec![length; sequences])));
        // To be read beside the dense 16 of 4096.
        let others = [
            (", window of 1024", Prompts::dense(vec![4096; 16]).seen_through(1024)),
            (", documents", Prompts::documents(16, false)),
            (", shared documents", Prompts::documents(16, true)),
        ];
        for (sort, prompts) in dense.into_iter().chain(others) {
            let mut setup = Setup::new(device, heads, 1, &prompts, rng)?;
            let apart = setup.apart(device, ops)?;
            let mut seen = Vec::new();
            for _ in 0..repeats.max(1) {
                // Several at once, so that launching does not count.
                const TIMES: usize = 20;
                let all = device.timed(|| (0..TIMES).try_for_each(|_| setup.launch(device)))?;
                seen.push(all / TIMES as f64);
            }
            let seconds = median(seen.into_iter());
            let bytes = (setup.seen() * 2 * heads.keys * heads.size * size_of::<f16>()) as f64;
            rows.push(Row {
                what: format!("{what}{sort}"),
                sequences: setup.lengths.len(),
                length: setup.longest(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_lie_where_something_is_written_and_their_tables_can_be_packed() {
        let rng = &mut Rng(0x5eed);
        let mut all = vec![
            (Prompts::dense(vec![1, 32, 95]), vec![1, 32, 95]),
            (Prompts::documents(3, true), vec![4096; 3]),
            (Prompts::documents(3, false).seen_through(1000), vec![4096; 3]),
        ];
        for _ in 0..50 {
            let documents = vec![1, 64, 1 + rng.below(200)];
            let prompts = Prompts::mixed(documents.clone(), 4, 3, rng);
            let length = |part: &Part| match part {
                Part::Own(count) => *count,
                Part::Document { number, .. } => documents[*number],
            };
            let lengths = prompts.prompts.iter().map(|parts| parts.iter().map(length).sum()).collect();
            all.push((prompts, lengths));
        }
        for (prompts, lengths) in all {
            let Places { taken, tables, spans } = Places::of(&prompts, rng);
            let mut own = vec![0; taken.len()];
            let mut sequences = Vec::new();
            for ((table, spans), length) in tables.iter().zip(&spans).zip(&lengths) {
                assert_eq!(end(spans), *length);
                for span in spans {
                    let block = table[span.block] as usize;
                    assert!(span.from + span.len <= taken[block]);
                    own[block] += span.len;
                }
                sequences.push(Sequence { table, spans, length: *length });
            }
            if prompts.documents.is_empty() {
                assert_eq!(own, taken, "every place is of one sequence");
            }
            SpanTable::pack(64, prompts.window, &turns_of(64, &spans), &sequences).unwrap();
        }
    }
}
