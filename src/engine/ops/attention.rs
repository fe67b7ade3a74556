//! Causal attention of some query tokens over a sequence's keys and values, with grouped heads.
//!
//! Scores are scaled dot products over all positions up to the query's own; their softmax is exact (two passes over the
//! whole row), then the values are added up position by position. Each query's arithmetic depends on its position only,
//! not on the tokens computed with it: a prompt in chunks gives the same bits as the prompt at once.

use std::cell::RefCell;

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

/// A sequence's blocks as one layer sees them.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    pub blocks: &'a [Block],
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

/// Writes one position's keys and values (`[head][element]` each) into a block's layer.
pub fn store<T: Number>(heads: Heads, layer: &mut [T], position: usize, keys: &[f32], values: &[f32]) {
    let within = position % POSITIONS;
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
pub fn attend(ops: &Ops, heads: Heads, q: &[f32], pieces: &[Piece<'_>], out: &mut [f32]) {
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
            Element::F32 => one::<f32>(ops, heads, q, piece, *head, *start, scratch, out),
            Element::F16 => one::<f16>(ops, heads, q, piece, *head, *start, scratch, out),
        });
    };
    if work < ALONE_BELOW { (0..tasks.len()).for_each(run) } else { ops.pool.run(tasks.len(), &run) }
}

/// Buffers of one task, kept between tasks.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
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

    // Blocks that none of these queries sees are left out; scores begin with the first that is seen.
    let since = |query: usize| (piece.position + query + 1).saturating_sub(piece.window);
    let base = since(start) / POSITIONS * POSITIONS;
    let longest = piece.position + start + count;
    let blocks = base / POSITIONS..longest.div_ceil(POSITIONS);
    let stride = (longest - base).next_multiple_of(WIDTH);
    scratch.scores.resize(rows * stride, 0.0);
    let scores = &mut scratch.scores[..rows * stride];
    for block in blocks.clone() {
        let begin = block * POSITIONS - base;
        let tile = Tile {
            a: &scratch.queries,
            a_stride: size,
            b: piece.cache.keys::<T>(heads, head, block),
            b_stride: WIDTH,
            b_tile: size * WIDTH,
            tiles: (stride - begin).min(POSITIONS) / WIDTH,
            depth: size,
        };
        tile::multiply(ops.level, rows, tile, &mut scores[begin..], stride, false);
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
    for block in blocks {
        let begin = block * POSITIONS - base;
        let tile = Tile {
            a: &scores[begin..],
            a_stride: stride,
            b: piece.cache.values::<T>(heads, head, block),
            b_stride: size,
            b_tile: WIDTH,
            tiles: size / WIDTH,
            depth: POSITIONS.min(longest - base - begin),
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
            store(heads, layer, p, &k[p * kv..][..kv], &v[p * kv..][..kv]);
        }
        let blocks: Vec<Block> = blocks.iter().map(|numbers| Arc::new(Memory::of(numbers))).collect();
        let ops = Ops { level, pool: Pool::new(2).unwrap() };
        let mut out = vec![0.0; q.len()];
        let mut done = total - q.len() / width;
        let mut row = 0;
        for count in parts {
            let cache = Cache {
                blocks: &blocks,
                layer: 1,
                element: if size_of::<T>() == 2 { Element::F16 } else { Element::F32 },
            };
            attend(&ops, heads, q, &[Piece { row, count: *count, position: done, window, cache }], &mut out);
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
}
