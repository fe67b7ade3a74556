//! Causal attention of some query tokens over a sequence's keys and values, with grouped heads.
//!
//! Scores are scaled dot products over all positions up to the query's own; their softmax is exact (two passes over the
//! whole row), then the values are added up position by position. Each query's arithmetic depends on its position only,
//! not on the tokens computed with it: a prompt in chunks gives the same bits as the prompt at once.

use std::{cell::RefCell, collections::BTreeMap};

use half::f16;

use super::{
    Ops, Shared,
    block_pool::Block,
    elementwise,
    number::{Element, Number},
    tile::{self, Tile, WIDTH, Wide},
};

/// Positions of a KV block.
pub const POSITIONS: usize = 32;
/// Query positions that one task computes.
const QUERIES: usize = 8;
/// Scores below which a job is not worth waking another thread for.
const ALONE_BELOW: usize = 1 << 20;

/// Sizes of the attention of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub queries: usize,
    /// Divides `queries`.
    pub keys: usize,
    /// A multiple of 16.
    pub size: usize,
}

impl Heads {
    /// Elements of one layer in a block: keys `[head][tile][element][16 positions]`, then values
    /// `[head][position][element]`.
    pub fn layer_elements(self) -> usize {
        2 * self.half()
    }

    fn half(self) -> usize {
        self.keys * self.size * POSITIONS
    }
}

/// Neighbouring positions of a sequence that lie side by side in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index into the sequence's blocks.
    pub block: usize,
    /// The first one's place in the block.
    pub from: usize,
    /// Places, 1 to [`POSITIONS`] less `from`.
    pub len: usize,
    /// Position in the sequence of the first.
    pub start: usize,
    /// By how many positions its keys stand farther in the sequence than where they were rotated to.
    pub offset: usize,
}

impl Span {
    /// Those of a sequence of this length that fills its blocks one after the other.
    pub fn dense(length: usize) -> Vec<Self> {
        let span = |block| {
            let start = block * POSITIONS;
            Self { block, from: 0, len: POSITIONS.min(length - start), start, offset: 0 }
        };
        (0..length.div_ceil(POSITIONS)).map(span).collect()
    }

    /// The position behind the last.
    pub fn end(&self) -> usize {
        self.start + self.len
    }
}

/// A sequence's keys and values as one layer sees them.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    pub blocks: &'a [Block],
    /// In the order of their positions, from 0 on and without gaps, to the last query's at least.
    pub spans: &'a [Span],
    pub layer: usize,
    /// What the blocks are made of.
    pub element: Element,
}

impl<'a> Cache<'a> {
    fn layer<T: Number>(&self, heads: Heads, block: usize) -> &'a [T] {
        &self.blocks[block].numbers()[self.layer * heads.layer_elements()..][..heads.layer_elements()]
    }

    /// Keys of a block, `[tile][element][16 positions]`.
    fn keys<T: Number>(&self, heads: Heads, head: usize, block: usize) -> &'a [T] {
        &self.layer(heads, block)[head * heads.size * POSITIONS..][..heads.size * POSITIONS]
    }

    /// Values of a block, `[position][element]`.
    fn values<T: Number>(&self, heads: Heads, head: usize, block: usize) -> &'a [T] {
        &self.layer(heads, block)[heads.half() + head * heads.size * POSITIONS..][..heads.size * POSITIONS]
    }
}

/// Cosines and sines of rotary angles, `[rotations][half a head]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Angles {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Angles {
    pub fn clear(&mut self) {
        self.cos.clear();
        self.sin.clear();
    }

    /// A rotation by so many positions, forwards or back; frequencies are radians per position. Angles are f64.
    pub fn push(&mut self, positions: i64, frequencies: &[f64]) {
        for frequency in frequencies {
            let (sin, cos) = (positions as f64 * frequency).sin_cos();
            self.cos.push(cos as f32);
            self.sin.push(sin as f32);
        }
    }
}

/// By each [`Span::offset`] but 0 the rotation back by it. As (R_i q)·(R_j k) with j = o + l equals (R_-o R_i q)·(R_l k), keys
/// that were rotated to place l of a document are attended to at o + l by turning the query, and stay as they are.
pub type Turns = BTreeMap<usize, Angles>;

/// Writes one position's keys and values (`[head][element]` each) into a block's layer, at the place `within` it.
pub fn store<T: Number>(heads: Heads, layer: &mut [T], within: usize, keys: &[f32], values: &[f32]) {
    let (key_part, value_part) = layer.split_at_mut(heads.half());
    for (head, key) in keys.chunks_exact(heads.size).enumerate() {
        let tile = &mut key_part[(head * (POSITIONS / WIDTH) + within / WIDTH) * heads.size * WIDTH..];
        for (element, value) in key.iter().enumerate() {
            tile[element * WIDTH + within % WIDTH] = T::narrow(*value);
        }
    }
    for (head, value) in values.chunks_exact(heads.size).enumerate() {
        let out = &mut value_part[(head * POSITIONS + within) * heads.size..][..heads.size];
        out.iter_mut().zip(value).for_each(|(out, value)| *out = T::narrow(*value));
    }
}

/// Reads what [`store`] has written: one position's keys and values from a layer of a block.
pub fn load<T: Wide>(heads: Heads, block: &[T], layer: usize, within: usize) -> (Vec<f32>, Vec<f32>) {
    let layer = &block[layer * heads.layer_elements()..][..heads.layer_elements()];
    let (key_part, value_part) = layer.split_at(heads.half());
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for head in 0..heads.keys {
        let tile = &key_part[(head * (POSITIONS / WIDTH) + within / WIDTH) * heads.size * WIDTH..];
        keys.extend((0..heads.size).map(|element| tile[element * WIDTH + within % WIDTH].wide()));
        values.extend(value_part[(head * POSITIONS + within) * heads.size..][..heads.size].iter().map(|v| v.wide()));
    }
    (keys, values)
}

/// A run of neighbouring query tokens of one sequence.
pub struct Piece<'a> {
    /// Row of the first query in the batch.
    pub row: usize,
    pub count: usize,
    /// Position of the first query within its sequence; keys and values up to the last query's are stored.
    pub position: usize,
    /// Positions that a query sees, its own included; [`ALL`] where attention is not local.
    pub window: usize,
    pub cache: Cache<'a>,
}

/// The window of attention that sees everything before it.
pub const ALL: usize = usize::MAX;

/// Attention of all pieces: `q` and `out` are `[rows][query heads][size]`.
///
/// # Panics
/// When a rotation is missing from `turns`.
pub fn attend(ops: &Ops, heads: Heads, q: &[f32], pieces: &[Piece<'_>], turns: &Turns, out: &mut [f32]) {
    let mut tasks: Vec<(&Piece<'_>, usize, usize)> = Vec::new();
    let mut work = 0;
    for piece in pieces {
        work += piece.count * (piece.position + piece.count).min(piece.window) * heads.queries * heads.size;
        for start in (0..piece.count).step_by(QUERIES) {
            tasks.extend((0..heads.keys).map(|head| (piece, head, start)));
        }
    }
    let out = Shared::new(out);
    let run = |task: usize| {
        let (piece, head, start) = &tasks[task];
        SCRATCH.with_borrow_mut(|scratch| match piece.cache.element {
            Element::F32 => one::<f32>(ops, heads, q, piece, turns, *head, *start, scratch, out),
            Element::F16 => one::<f16>(ops, heads, q, piece, turns, *head, *start, scratch, out),
        });
    };
    if work < ALONE_BELOW { (0..tasks.len()).for_each(run) } else { ops.pool.run(tasks.len(), &run) }
}

/// Buffers of one task, kept between tasks.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    /// Queries turned back by the offset of the spans at hand.
    turned: Vec<f32>,
    /// Scores of a span that does not begin with a tile.
    aside: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    out: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Up to [`QUERIES`] queries of a piece against one key head, with all query heads that share it.
#[expect(clippy::too_many_arguments, reason = "the one inner step of `attend`, apart to be readable")]
fn one<T: Wide>(
    ops: &Ops,
    heads: Heads,
    q: &[f32],
    piece: &Piece<'_>,
    turns: &Turns,
    head: usize,
    start: usize,
    scratch: &mut Scratch,
    out: Shared<f32>,
) {
    let size = heads.size;
    let group = heads.queries / heads.keys;
    let count = QUERIES.min(piece.count - start);
    let rows = count * group;
    let row_width = heads.queries * size;
    let first = piece.row + start;

    // Queries, scaled, as rows [query][member of the group].
    scratch.queries.clear();
    for t in 0..count {
        scratch.queries.extend_from_slice(&q[(first + t) * row_width + head * group * size..][..group * size]);
    }
    elementwise::scale(ops.level, &mut scratch.queries, 1.0 / (size as f32).sqrt());

    // Spans that none of these queries sees are left out; scores begin with the first that is seen.
    let since = |query: usize| (piece.position + query + 1).saturating_sub(piece.window);
    let longest = piece.position + start + count;
    let spans = piece.cache.spans;
    let spans = &spans[spans.partition_point(|span| span.end() <= since(start))..];
    let spans = &spans[..spans.partition_point(|span| span.start < longest)];
    let base = spans.first().map_or(longest, |span| span.start);
    // Whole tiles are written, the next span's over what a span does not fill.
    let stride = (longest - base + WIDTH - 1).next_multiple_of(WIDTH);
    scratch.scores.resize(rows * stride, 0.0);
    let scores = &mut scratch.scores[..rows * stride];
    let mut offset = 0;
    for span in spans {
        if span.offset != 0 && span.offset != offset {
            offset = span.offset;
            scratch.turned.clear();
            scratch.turned.extend_from_slice(&scratch.queries);
            let turn = &turns[&offset];
            elementwise::rope(ops.level, &mut scratch.turned, &turn.cos, &turn.sin);
        }
        let (begin, len) = (span.start - base, span.len.min(longest - span.start));
        let (tile, skip) = (span.from / WIDTH, span.from % WIDTH);
        let tile = Tile {
            a: if span.offset == 0 { &scratch.queries } else { &scratch.turned },
            a_stride: size,
            b: &piece.cache.keys::<T>(heads, head, span.block)[tile * size * WIDTH..],
            b_stride: WIDTH,
            b_tile: size * WIDTH,
            tiles: (skip + len).div_ceil(WIDTH),
            depth: size,
        };
        if skip == 0 {
            tile::multiply(ops.level, rows, tile, &mut scores[begin..], stride, false);
        } else {
            scratch.aside.resize(rows * POSITIONS, 0.0);
            tile::multiply(ops.level, rows, tile, &mut scratch.aside, POSITIONS, false);
            for (row, aside) in scratch.aside.chunks_exact(POSITIONS).take(rows).enumerate() {
                scores[row * stride + begin..][..len].copy_from_slice(&aside[skip..][..len]);
            }
        }
    }

    scratch.sums.clear();
    for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
        let query = start + row / group;
        let (seen, later) = scores.split_at_mut(piece.position + query + 1 - base);
        let (earlier, seen) = seen.split_at_mut(since(query).saturating_sub(base));
        let mut sum = [0.0];
        elementwise::softmax_weights(ops.level, seen, &mut sum);
        scratch.sums.push(sum[0]);
        earlier.fill(0.0);
        later.fill(0.0);
    }

    scratch.out.clear();
    scratch.out.resize(rows * size, 0.0);
    for span in spans {
        let tile = Tile {
            a: &scores[span.start - base..],
            a_stride: stride,
            b: &piece.cache.values::<T>(heads, head, span.block)[span.from * size..],
            b_stride: size,
            b_tile: WIDTH,
            tiles: size / WIDTH,
            depth: span.len.min(longest - span.start),
        };
        tile::multiply(ops.level, rows, tile, &mut scratch.out, size, true);
    }
    for (row, values) in scratch.out.chunks_exact_mut(size).enumerate() {
        elementwise::scale(ops.level, values, 1.0 / scratch.sums[row]);
        let (t, member) = (row / group, row % group);
        // SAFETY: this query row and these heads belong to this task alone.
        let out = unsafe { out.slice((first + t) * row_width + (head * group + member) * size, size) };
        out.copy_from_slice(values);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::{
        ops::{Level, Pool, block_pool::Memory},
        testing::numbers,
    };

    /// Attention in f64, as one would write it on a blackboard.
    fn reference(heads: Heads, q: &[f32], k: &[f32], v: &[f32], position: usize, window: usize) -> Vec<f64> {
        let (width, kv) = (heads.queries * heads.size, heads.keys * heads.size);
        let mut out = vec![0.0; q.len()];
        for t in 0..q.len() / width {
            for h in 0..heads.queries {
                let key_head = h / (heads.queries / heads.keys);
                let seen = position + t + 1;
                let dot = |j: usize| -> f64 {
                    (0..heads.size)
                        .map(|e| {
                            f64::from(q[t * width + h * heads.size + e])
                                * f64::from(k[j * kv + key_head * heads.size + e])
                        })
                        .sum::<f64>()
                        / (heads.size as f64).sqrt()
                };
                let since = seen.saturating_sub(window);
                let weights: Vec<f64> = (since..seen).map(|j| dot(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (j, weight) in (since..).zip(&weights) {
                    for e in 0..heads.size {
                        out[t * width + h * heads.size + e] +=
                            weight / sum * f64::from(v[j * kv + key_head * heads.size + e]);
                    }
                }
            }
        }
        out
    }

    #[derive(Clone, Copy)]
    struct Case<'a> {
        heads: Heads,
        window: usize,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
    }

    fn run<T: Wide>(level: Level, case: Case<'_>, parts: &[usize]) -> Vec<f32> {
        let Case { heads, window, q, k, v } = case;
        let (width, kv) = (heads.queries * heads.size, heads.keys * heads.size);
        let total: usize = k.len() / kv;
        let mut blocks = vec![vec![T::default(); heads.layer_elements() * 2]; total.div_ceil(POSITIONS)];
        for p in 0..total {
            let layer = &mut blocks[p / POSITIONS][heads.layer_elements()..];
            store(heads, layer, p % POSITIONS, &k[p * kv..][..kv], &v[p * kv..][..kv]);
        }
        let blocks: Vec<Block> = blocks.iter().map(|numbers| Arc::new(Memory::of(numbers))).collect();
        let ops = Ops { level, pool: Pool::new(2).unwrap() };
        let mut out = vec![0.0; q.len()];
        let mut done = total - q.len() / width;
        let spans = Span::dense(total);
        let mut row = 0;
        for count in parts {
            let cache = Cache {
                blocks: &blocks,
                spans: &spans,
                layer: 1,
                element: if size_of::<T>() == 2 { Element::F16 } else { Element::F32 },
            };
            let piece = Piece { row, count: *count, position: done, window, cache };
            attend(&ops, heads, q, &[piece], &Turns::default(), &mut out);
            row += count;
            done += count;
        }
        out
    }

    #[test]
    fn agrees_with_the_blackboard_and_does_not_depend_on_chunks_or_levels() {
        check::<f32>();
        check::<f16>();
    }

    fn check<T: Wide>() {
        let heads = Heads { queries: 6, keys: 2, size: 16 };
        let sizes = [(1, 1), (16, 16), (47, 47), (70, 33), (100, 1)];
        for ((total, fresh), window) in sizes.into_iter().flat_map(|size| [ALL, 40, 32, 5, 1].map(|w| (size, w))) {
            // What can be kept, so that nothing but the arithmetic is compared.
            let kept = |numbers: Vec<f32>| numbers.into_iter().map(|n| T::narrow(n).wide()).collect::<Vec<_>>();
            let q = numbers(fresh * 96, 1);
            let k = kept(numbers(total * 32, 2));
            let v = kept(numbers(total * 32, 3));
            let case = Case { heads, window, q: &q, k: &k, v: &v };
            let whole = run::<T>(Level::Scalar, case, &[fresh]);
            for (got, want) in whole.iter().zip(reference(heads, &q, &k, &v, total - fresh, window)) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} against {want}");
            }
            for level in Level::available() {
                assert_eq!(run::<T>(level, case, &[fresh]), whole, "{level:?}");
                assert_eq!(run::<T>(level, case, &vec![1; fresh]), whole, "one by one");
                assert_eq!(run::<T>(level, case, &[fresh / 2, fresh - fresh / 2]), whole, "two chunks");
            }
        }
    }

    /// Frequencies of a head of 64 elements, in radians per position, of all forms of rotary embedding that there are.
    fn forms() -> Vec<(&'static str, Vec<f64>)> {
        let plain = |base: f64| (0..32).map(|i| base.powf(-f64::from(i) / 32.0)).collect::<Vec<f64>>();
        // Llama 3's factors: long waves are eight times as long, those between get there smoothly.
        let llama3 = |frequency: &f64| {
            let wave = std::f64::consts::TAU / frequency;
            let smooth = ((8192.0 / wave - 1.0) / 3.0).clamp(0.0, 1.0);
            frequency * ((1.0 - smooth) / 8.0 + smooth)
        };
        vec![
            ("llama", plain(10_000.0)),
            ("qwen", plain(1_000_000.0)),
            ("llama3", plain(500_000.0).iter().map(llama3).collect()),
            ("linear", plain(1_000_000.0).iter().map(|f| f / 8.0).collect()),
        ]
    }

    /// `x` turned as if it stood at this position, in f64.
    fn turned(x: &[f32], position: usize, frequencies: &[f64]) -> Vec<f64> {
        let head = |head: &[f32]| -> Vec<f64> {
            let pairs = head.chunks(2).zip(frequencies).map(|(pair, frequency)| {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
                [a * cos - b * sin, a * sin + b * cos]
            });
            pairs.flatten().collect()
        };
        x.chunks(2 * frequencies.len()).flat_map(head).collect()
    }

    #[test]
    fn a_document_elsewhere_is_attended_to_as_if_its_keys_were_turned_to_where_it_stands() {
        let heads = Heads { queries: 2, keys: 1, size: 64 };
        // A document whose first twenty tokens are computed again, at odd places of its blocks and of others'.
        let (len, skipped, behind) = (75, 20, 7);
        for (form, frequencies) in forms() {
            for at in [1, 16, 33, 4_000, 131_072 - len - behind] {
                let (q, k, v) =
                    (numbers(128 * behind, 4), numbers(64 * (len + behind), 5), numbers(64 * (len + behind), 6));
                let own = skipped + behind;
                let mut blocks = vec![vec![0f32; heads.layer_elements()]; 1 + len.div_ceil(POSITIONS)];
                let mut spans = Vec::new();
                let mut push = |block, from, len, offset| {
                    let start = spans.last().map_or(at, Span::end);
                    spans.push(Span { block, from, len, start, offset });
                };
                push(0, 0, skipped, 0);
                push(1, skipped, POSITIONS - skipped, at);
                push(2, 0, POSITIONS, at);
                push(3, 0, len - 2 * POSITIONS, at);
                push(0, skipped, own - skipped, 0);
                for position in at..at + len + behind {
                    let span = spans.iter().find(|span| span.end() > position).unwrap();
                    let within = span.from + position - span.start;
                    let (k, v) = (&k[64 * (position - at)..][..64], &v[64 * (position - at)..][..64]);
                    let mut angles = Angles::default();
                    angles.push((position - span.offset) as i64, &frequencies);
                    let mut k = k.to_vec();
                    elementwise::rope(Level::detect(), &mut k, &angles.cos, &angles.sin);
                    store(heads, &mut blocks[span.block], within, &k, v);
                }
                // Nothing is before the document: the same for both, and positions count from where it stands.
                spans.iter_mut().for_each(|span| span.start -= at);
                let (mut turned_q, mut angles) = (q.clone(), Angles::default());
                for (row, q) in turned_q.chunks_exact_mut(128).enumerate() {
                    angles.clear();
                    angles.push((at + len + row) as i64, &frequencies);
                    elementwise::rope(Level::detect(), q, &angles.cos, &angles.sin);
                }
                angles.clear();
                angles.push(-(at as i64), &frequencies);
                let turns = Turns::from([(at, angles)]);
                let blocks: Vec<Block> = blocks.iter().map(|numbers| Arc::new(Memory::of(numbers))).collect();
                let cache = Cache { blocks: &blocks, spans: &spans, layer: 0, element: Element::F32 };
                let ops = Ops { level: Level::detect(), pool: Pool::new(1).unwrap() };
                let mut got = vec![0.0; q.len()];
                let piece = Piece { row: 0, count: behind, position: len, window: ALL, cache };
                attend(&ops, heads, &turned_q, &[piece], &turns, &mut got);

                let keys: Vec<Vec<f64>> =
                    (0..len + behind).map(|p| turned(&k[64 * p..][..64], at + p, &frequencies)).collect();
                for (row, (q, got)) in q.chunks(64).zip(got.chunks(64)).enumerate() {
                    let seen = len + row / 2 + 1;
                    let q = turned(q, at + len + row / 2, &frequencies);
                    let dot = |k: &Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / 8.0;
                    let weights: Vec<f64> = keys[..seen].iter().map(|k| dot(k).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    let want: Vec<f64> = (0..64)
                        .map(|e| weights.iter().enumerate().map(|(p, w)| w / sum * f64::from(v[64 * p + e])).sum())
                        .collect();
                    let size = want.iter().map(|w| w * w).sum::<f64>().sqrt();
                    let apart = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
                    assert!(apart < 1e-4 * size, "{form} at {at}, row {row}: {:.1e}", apart / size);
                }
            }
        }
    }
}
