//! `weir bench kv-eviction`: a trace's prompts through the store of kept blocks ([`crate::engine::kept`]), with less room than they
//! would take: what is computed again when the lowest cost by the byte goes first, and when the least recently used does. The
//! same store does both: of blocks that cost nothing, the least recently used goes.
//!
//! No model runs. A trace says which blocks of 512 tokens a prompt is made of, each known by all that is before it (Mooncake, Qin
//! et al. 2024); what one costs follows from the model's shape and how deep it lies. With several models in one memory, a
//! conversation is one model's, by what follows the first block.

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
};

use arrow::{
    array::{Array, AsArray},
    compute::cast,
    datatypes::{DataType, Field, Int64Type},
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use super::{BenchError, report::Machine};
use crate::engine::{
    kept::{Identity, Kept},
    ops::{
        attention::POSITIONS,
        block_pool::{Block, BlockPool},
        number::Element,
    },
    prefix_cache::PrefixCache,
};

/// Tokens of a block of the trace.
const BLOCK: usize = 512;

/// What of a model decides what keys and values cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    pub name: &'static str,
    pub layers: usize,
    pub queries: usize,
    pub keys: usize,
    pub size: usize,
    pub hidden: usize,
    pub feed_forward: usize,
}

/// As these models' published configurations say.
pub const SHAPES: [Shape; 3] = [
    Shape { name: "smollm2-135m", layers: 30, queries: 9, keys: 3, size: 64, hidden: 576, feed_forward: 1536 },
    Shape { name: "smollm2-1.7b", layers: 24, queries: 32, keys: 32, size: 64, hidden: 2048, feed_forward: 8192 },
    Shape { name: "qwen2.5-7b", layers: 28, queries: 28, keys: 4, size: 128, hidden: 3584, feed_forward: 18944 },
];

impl Shape {
    /// Bytes of keys and values per token, in 16 bits.
    fn kv_bytes(&self) -> usize {
        2 * 2 * self.layers * self.keys * self.size
    }

    /// Of blocks of [`BLOCK`] tokens.
    fn identity(&self, hash: u128) -> Identity {
        let attention = 2 * (self.queries + self.keys) * self.size * self.hidden;
        let weights = self.layers * (attention + 3 * self.hidden * self.feed_forward);
        Identity::of_model(hash, weights, self.layers * self.queries * self.size, self.kv_bytes(), BLOCK)
    }
}

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub trace: PathBuf,
    /// Models that share the memory.
    pub models: Vec<Shape>,
    /// Room, as shares of what all blocks of the trace would take.
    pub room: Vec<f64>,
}

/// One order of going in one room.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub room: f64,
    /// Shares of all tokens and of all operations of prompts that need not be computed.
    pub tokens_reused: f64,
    pub operations_saved: f64,
    /// The same where the least recently used goes.
    pub lru_tokens_reused: f64,
    pub lru_operations_saved: f64,
    /// Operations that are computed, as a share of those with the least recently used.
    pub computed: f64,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub requests: usize,
    pub blocks: usize,
    /// With room for all.
    pub most_tokens_reused: f64,
    pub most_operations_saved: f64,
    pub rows: Vec<Row>,
    pub plan: Plan,
    pub machine: Machine,
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let names: Vec<&str> = self.plan.models.iter().map(|shape| shape.name).collect();
        let mut out = format!(
            "{} requests, {} blocks of {BLOCK} tokens, {}; with room for all {:.1} % of the tokens are reused, {:.1} % of the operations \
             saved.\n\n| room | tokens reused | by LRU | operations saved | by LRU | computed, of LRU's |\n|---|---|---|---|---|---|\n",
            self.requests,
            self.blocks,
            names.join(" and "),
            100.0 * self.most_tokens_reused,
            100.0 * self.most_operations_saved
        );
        for r in &self.rows {
            out += &format!(
                "| {:.0} % | {:.1} % | {:.1} % | {:.1} % | {:.1} % | {:.3} |\n",
                100.0 * r.room,
                100.0 * r.tokens_reused,
                100.0 * r.lru_tokens_reused,
                100.0 * r.operations_saved,
                100.0 * r.lru_operations_saved,
                r.computed
            );
        }
        out
    }
}

/// The blocks of each prompt of a trace.
fn read(path: &Path) -> Result<Vec<Vec<i64>>, BenchError> {
    let wrong = |what: String| BenchError::Usage(format!("{}: {what}", path.display()));
    let file = File::open(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.build());
    let lists = DataType::List(Field::new("element", DataType::Int64, true).into());
    let mut out = Vec::new();
    for batch in reader.map_err(|e| wrong(format!("is no Parquet file: {e}")))? {
        let batch = batch.map_err(|e| wrong(e.to_string()))?;
        let column = batch.column_by_name("hash_ids").ok_or_else(|| wrong("has no column `hash_ids`".to_owned()))?;
        let column = cast(column, &lists).map_err(|e| wrong(format!("column `hash_ids`: {e}")))?;
        let column = column.as_list::<i32>();
        for row in 0..column.len() {
            out.push(column.value(row).as_primitive::<Int64Type>().values().to_vec());
        }
    }
    Ok(out)
}

/// What is reused and saved, in tokens and operations, and all there are.
#[derive(Clone, Copy, Default)]
struct Sums {
    reused: f64,
    tokens: f64,
    saved: f64,
    operations: f64,
}

/// Runs the prompts through a store of so many bytes.
fn play(prompts: &[Vec<i64>], models: &[Shape], bytes: f64, by_cost: bool) -> Sums {
    let kept = Kept::default();
    let pool = BlockPool::new(1, Element::F32);
    let free = |identity: Identity| Identity { cost: 0, cost_of_depth: 0, ..identity };
    let identities: Vec<Identity> = models.iter().zip(1..).map(|(shape, hash)| shape.identity(hash)).collect();
    let caches: Vec<PrefixCache> =
        identities.iter().map(|i| PrefixCache::new(&kept, if by_cost { *i } else { free(*i) })).collect();
    let size = |model: usize| (models[model].kv_bytes() * BLOCK) as f64;
    let mut sums = Sums::default();
    for prompt in prompts {
        let model = model_of(prompt, models.len());
        // A block of the trace stands for one of ours.
        let tokens: Vec<u32> = prompt.iter().flat_map(|id| [*id as u32; POSITIONS]).collect();
        let mut blocks = caches[model].find(&tokens, &[], prompt.len());
        let there = blocks.len();
        blocks.extend((there..prompt.len()).map(|_| Block::new(pool.take())));
        caches[model].keep(&tokens, &[], &blocks);
        drop(blocks);
        for depth in 0..prompt.len() {
            let operations = identities[model].cost(depth as u32) as f64 * size(model);
            sums.tokens += 1.0;
            sums.operations += operations;
            if depth < there {
                sums.reused += 1.0;
                sums.saved += operations;
            }
        }
        while caches.iter().enumerate().map(|(model, cache)| cache.count() as f64 * size(model)).sum::<f64>() > bytes {
            if !caches[model].evict(true) {
                break;
            }
        }
    }
    sums
}

fn model_of(prompt: &[i64], models: usize) -> usize {
    let root = prompt.get(1).or(prompt.first()).copied().unwrap_or(0);
    (root as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize % models
}

/// Measures.
///
/// # Errors
/// When the trace cannot be read, or the plan makes no sense.
pub fn run(plan: Plan, tick: &dyn Fn()) -> Result<Report, BenchError> {
    if plan.models.is_empty() || plan.room.iter().any(|share| !(*share > 0.0 && *share <= 1.0)) {
        return Err(BenchError::Usage("at least one model, and rooms above 0 and at most 1".to_owned()));
    }
    let prompts = read(&plan.trace)?;
    let mut all: HashSet<(usize, i64)> = HashSet::new();
    for prompt in &prompts {
        all.extend(prompt.iter().map(|id| (model_of(prompt, plan.models.len()), *id)));
    }
    let whole: f64 = all.iter().map(|(model, _)| (plan.models[*model].kv_bytes() * BLOCK) as f64).sum();
    let share = |sums: Sums| (sums.reused / sums.tokens, sums.saved / sums.operations);
    let (most_tokens_reused, most_operations_saved) = share(play(&prompts, &plan.models, f64::INFINITY, true));
    tick();
    let mut rows = Vec::new();
    for room in &plan.room {
        let of = |by_cost| play(&prompts, &plan.models, room * whole, by_cost);
        let (ours, lru) = (of(true), of(false));
        let ((tokens_reused, operations_saved), (lru_tokens_reused, lru_operations_saved)) = (share(ours), share(lru));
        rows.push(Row {
            room: *room,
            tokens_reused,
            operations_saved,
            lru_tokens_reused,
            lru_operations_saved,
            computed: (1.0 - operations_saved) / (1.0 - lru_operations_saved),
        });
        tick();
    }
    let blocks = all.len();
    let requests = prompts.len();
    let machine = Machine::here();
    Ok(Report {
        bench: "kv-eviction",
        requests,
        blocks,
        most_tokens_reused,
        most_operations_saved,
        rows,
        plan,
        machine,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_room_for_all_both_orders_reuse_all_and_with_less_they_differ() {
        // Conversations of several turns, with strangers between.
        let mut prompts = Vec::new();
        for turn in 1..12i64 {
            for conversation in 0..6i64 {
                prompts.push((0..=turn).map(|n| conversation * 1000 + n).collect::<Vec<i64>>());
            }
            prompts.extend((0..20i64).map(|stranger| vec![100_000 + turn * 100 + stranger]));
        }
        let models = &SHAPES[..1];
        let size = (models[0].kv_bytes() * BLOCK) as f64;
        let all = play(&prompts, models, f64::INFINITY, true);
        // All but what is new in each turn.
        assert_eq!(all.tokens - all.reused, 6.0 * 12.0 + 11.0 * 20.0);
        let of = |by_cost| play(&prompts, models, 60.0 * size, by_cost);
        let (ours, lru) = (of(true), of(false));
        assert_eq!((ours.tokens, ours.operations), (lru.tokens, lru.operations));
        assert!(ours.saved > lru.saved && lru.saved > 0.0 && ours.saved < all.saved, "{} {}", ours.saved, lru.saved);
    }
}
