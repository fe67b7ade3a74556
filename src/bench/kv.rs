//! `weir bench kv`: what prompts of many documents take of memory, of tokens to compute and of time to the first token, by how
//! documents are reused. Straight on the model, without scheduler or text; documents have no meaning, as neither memory nor time
//! depends on it.
//!
//! - `full`: everything is computed;
//! - `prefix`: what prompts of the batch begin with alike is shared;
//! - `epic`: a copy of each document's keys and values per request, its first 16 tokens computed again (EPIC);
//! - `cacheblend`: the same, 15 % of its tokens computed again;
//! - `weir`: one copy for all, the first tokens computed again among the request's own;
//! - `disk`: the same, but the documents are read from disk first (from the system's cache of it, as they have just been written).
//!
//! Copies are copied from a store that is not counted (CacheBlend's may be elsewhere), and the time to turn their keys is not
//! either.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use serde::Serialize;

use super::{
    BenchError,
    report::{Machine, median},
};
use crate::{
    engine::{
        EngineError, Format, Level, Reuse,
        chunk_cache::Layout,
        disk_tier::DiskTier,
        model::{Config, Kv, Llama, llama::Workspace},
        model_file::ModelFile,
        ops::{
            Ops, Pool,
            attention::POSITIONS,
            block_pool::{Block, BlockPool},
        },
    },
    replay::metrics::SplitMix,
};

/// Before the documents, the same for all prompts, and after them.
const SYSTEM: usize = 32;
const QUESTION: usize = 24;

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub model: PathBuf,
    pub threads: usize,
    /// Tokens of a document.
    pub chunks: Vec<usize>,
    /// Documents of a prompt.
    pub per_prompt: Vec<usize>,
    /// Prompts at once.
    pub batches: Vec<usize>,
    /// Documents that there are; the r-th is drawn as often as 1/r^`skew`.
    pub documents: usize,
    pub skew: f64,
    /// First tokens of each that are computed again, and tokens that each was computed behind.
    pub recompute: usize,
    pub anchor: usize,
    /// Prompts of at most so many tokens are computed, too, to have the time; 0: none.
    pub timed: usize,
    pub repeats: usize,
}

/// How documents are reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Full,
    Prefix,
    Epic,
    CacheBlend,
    Weir,
    Disk,
}

impl Method {
    const ALL: [Self; 6] = [Self::Full, Self::Prefix, Self::Epic, Self::CacheBlend, Self::Weir, Self::Disk];

    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Prefix => "prefix",
            Self::Epic => "epic",
            Self::CacheBlend => "cacheblend",
            Self::Weir => "weir",
            Self::Disk => "disk",
        }
    }
}

/// One method on one kind of prompts.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub chunk: usize,
    pub per_prompt: usize,
    pub batch: usize,
    pub method: Method,
    /// Of all prompts of the batch at once, what they share counted once.
    pub kv_mib: f64,
    /// Of the whole batch, with all documents there.
    pub computed: usize,
    /// Until the last prompt of the batch has its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The full computation's divided by this one's.
    pub less_kv: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faster: Option<f64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Row>,
    pub plan: Plan,
    pub machine: Machine,
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "| tokens of a document | per prompt | batch | reuse | KV, MiB | less than full | tokens computed | first token | faster |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for r in &self.rows {
            let time = r.seconds.map_or("–".to_owned(), |s| format!("{s:.2} s"));
            let faster = r.faster.map_or("–".to_owned(), |f| format!("{f:.1}"));
            out += &format!(
                "| {} | {} | {} | {} | {:.0} | {:.1} | {} | {time} | {faster} |\n",
                r.chunk,
                r.per_prompt,
                r.batch,
                r.method.name(),
                r.kv_mib,
                r.less_kv,
                r.computed
            );
        }
        out
    }
}

/// A prompt's tokens, and where its documents are.
type Drawn = (Vec<u32>, Vec<Range<usize>>);

/// By what they are: their tokens, and their blocks.
type Store = HashMap<u128, (Vec<u32>, Vec<Block>)>;

struct Bench {
    model: Llama,
    ops: Ops,
    w: Workspace,
    pool: BlockPool,
    plan: Plan,
}

/// A prompt under way: its keys and values as they are when its documents are there, and what is still to be computed.
struct Prompt {
    kv: Kv,
    tokens: Vec<u32>,
    /// Positions of the tokens, where they are not the next ones of `kv`.
    positions: Option<Vec<usize>>,
}

impl Bench {
    fn token(&self, of: u64) -> u32 {
        (of.wrapping_mul(7919) % (self.model.config().vocabulary as u64 - 1)) as u32
    }

    /// Prompts of so many documents; which these are.
    fn draw(&self, chunk: usize, per_prompt: usize, batch: usize) -> Vec<Drawn> {
        let mut rng = SplitMix(chunk as u64 + per_prompt as u64);
        let weights: Vec<f64> = (1..=self.plan.documents).map(|r| (r as f64).powf(-self.plan.skew)).collect();
        let total: f64 = weights.iter().sum();
        let mut document = || {
            let mut left = rng.unit() * total;
            weights.iter().position(|w| {
                left -= w;
                left < 0.0
            })
        };
        let mut prompts = Vec::new();
        for prompt in 0..batch as u64 {
            let mut tokens: Vec<u32> = (0..SYSTEM as u64).map(|i| self.token(i)).collect();
            let mut taken: Vec<usize> = Vec::new();
            while taken.len() < per_prompt {
                let drawn = document().unwrap_or(0);
                if !taken.contains(&drawn) {
                    taken.push(drawn);
                }
            }
            let mut documents = Vec::new();
            for drawn in taken {
                let begin = tokens.len();
                tokens.extend((0..chunk as u64).map(|i| self.token(1_000 + drawn as u64 * 100_003 + i)));
                documents.push(begin..tokens.len());
            }
            tokens.extend((0..QUESTION as u64).map(|i| self.token(900 + 31 * prompt + i)));
            prompts.push((tokens, documents));
        }
        prompts
    }

    /// A prompt by one method, ready to be computed, when those before it in its batch are there.
    fn prepare(&self, method: Method, before: &[Prompt], all: &[Drawn], store: &mut Store) -> Prompt {
        let (tokens, documents) = &all[before.len()];
        // Of a copy, what is not a document's, and these of each document.
        let copied = |again: &dyn Fn(usize, usize) -> bool| {
            let is = |position: &usize| match documents.iter().find(|d| d.contains(position)) {
                Some(document) => again(position - document.start, document.len()),
                None => true,
            };
            let positions: Vec<usize> = (0..tokens.len()).filter(is).collect();
            let mut kv = Kv::new(&self.pool);
            kv.reserve(tokens.len());
            Prompt {
                kv,
                tokens: positions.iter().map(|position| tokens[*position]).collect(),
                positions: Some(positions),
            }
        };
        match method {
            Method::Full => Prompt { kv: Kv::new(&self.pool), tokens: tokens.clone(), positions: None },
            Method::Prefix => {
                let alike = |other: &[u32]| other.iter().zip(tokens).take_while(|(a, b)| a == b).count();
                let best = (0..before.len()).max_by_key(|other| alike(&all[*other].0));
                let found = best.map_or_else(Vec::new, |other| {
                    let blocks = alike(&all[other].0).min(tokens.len() - 1) / POSITIONS;
                    before[other].kv.blocks().take(blocks).cloned().collect()
                });
                let tokens = tokens[found.len() * POSITIONS..].to_vec();
                Prompt { kv: Kv::of(&self.pool, found, Vec::new()), tokens, positions: None }
            }
            Method::Epic => copied(&|place, _| place < 16),
            // Which ones deviate most is not known beforehand; they are spread here.
            Method::CacheBlend => copied(&|place, _| place * 15 % 100 < 15),
            Method::Weir | Method::Disk => {
                let anchor: Arc<[u32]> = (0..self.plan.anchor as u64).map(|i| self.token(i)).collect();
                let reuse = Reuse { anchor, recompute: self.plan.recompute, ..Reuse::default() };
                let layout = Layout::new(tokens.clone(), documents, &reuse, 0, b"");
                let parts = layout.chunks.iter().map(|chunk| {
                    let new = || {
                        let blocks = (0..chunk.kept()).map(|_| Arc::new(self.pool.take())).collect();
                        (chunk.content(tokens).collect(), blocks)
                    };
                    let blocks = store.entry(chunk.key).or_insert_with(new).1.clone();
                    chunk.attach(blocks)
                });
                Prompt { kv: Kv::of(&self.pool, Vec::new(), parts.collect()), tokens: layout.own, positions: None }
            }
        }
    }

    /// Computes a prompt to its first token.
    fn compute(&mut self, prompt: &mut Prompt) {
        let Prompt { kv, tokens, positions } = prompt;
        match positions {
            None => self.model.append(&self.ops, kv, tokens, 1, &mut self.w),
            Some(positions) => self.model.revise(&self.ops, kv, tokens, positions, &mut self.w),
        }
    }

    /// Bytes of blocks that prompts hold, each once.
    fn bytes(&self, prompts: &[Prompt]) -> usize {
        let held: BTreeSet<_> = prompts.iter().flat_map(|prompt| prompt.kv.held()).map(Arc::as_ptr).collect();
        held.len() * self.pool.block_bytes()
    }

    fn case(&mut self, chunk: usize, per_prompt: usize, batch: usize, tick: &dyn Fn()) -> Result<Vec<Row>, BenchError> {
        let drawn = self.draw(chunk, per_prompt, batch);
        let timed = drawn.iter().map(|(tokens, _)| tokens.len()).sum::<usize>() <= self.plan.timed;
        let repeats = if timed { self.plan.repeats.max(1) } else { 1 };
        let mut seen: BTreeMap<Method, (usize, usize, Vec<f64>)> = BTreeMap::new();
        for _ in 0..repeats {
            for method in Method::ALL {
                let (mut prompts, mut store, mut seconds) = (Vec::new(), Store::new(), 0.0);
                if timed && method == Method::Disk {
                    for _ in &drawn {
                        let prompt = self.prepare(method, &prompts, &drawn, &mut store);
                        prompts.push(prompt);
                    }
                    prompts.clear();
                    seconds += self.read_back(&store)?;
                }
                let mut computed = 0;
                for _ in &drawn {
                    let mut prompt = self.prepare(method, &prompts, &drawn, &mut store);
                    computed += prompt.tokens.len();
                    if timed {
                        let begun = Instant::now();
                        self.compute(&mut prompt);
                        seconds += begun.elapsed().as_secs_f64();
                    } else if prompt.positions.is_none() {
                        prompt.kv.reserve(prompt.tokens.len());
                    }
                    prompts.push(prompt);
                }
                let entry = seen.entry(method).or_insert((self.bytes(&prompts), computed, Vec::new()));
                entry.2.extend(timed.then_some(seconds));
                tick();
            }
        }
        let time = |method: Method| {
            let seconds = &seen[&method].2;
            (!seconds.is_empty()).then(|| median(seconds.iter().copied()))
        };
        let full = (seen[&Method::Full].0 as f64, time(Method::Full));
        let rows = seen.iter().map(|(method, (bytes, computed, _))| {
            let seconds = time(*method);
            Row {
                chunk,
                per_prompt,
                batch,
                method: *method,
                kv_mib: *bytes as f64 / f64::from(1 << 20),
                computed: *computed,
                seconds,
                less_kv: full.0 / *bytes as f64,
                faster: full.1.zip(seconds).map(|(full, this)| full / this),
            }
        });
        Ok(rows.collect())
    }

    /// Seconds to read documents from a file that they have just been written to.
    fn read_back(&self, store: &Store) -> Result<f64, BenchError> {
        let (_dir, disk) = self.disk(store).map_err(BenchError::io("the documents on disk"))?;
        let begun = Instant::now();
        for (key, (tokens, blocks)) in store {
            let mut memory: Vec<_> = blocks.iter().map(|_| self.pool.take()).collect();
            if !disk.read(*key, tokens, &mut memory) {
                let reason = "a document came back from disk damaged".to_owned();
                return Err(BenchError::Start { what: "the disk tier".to_owned(), reason });
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// The documents in a file of their own.
    fn disk(&self, store: &Store) -> std::io::Result<(Scratch, DiskTier)> {
        let scratch = Scratch(std::env::temp_dir().join(format!("weir-bench-kv-{}", std::process::id())));
        let config = self.model.config();
        let layer = config.heads.layer_elements() * config.kv.bytes();
        let disk = DiskTier::open(&scratch.0.join("documents.slab"), layer, config.layers, u64::MAX)?;
        for (key, (tokens, blocks)) in store {
            disk.write(*key, tokens, blocks)?;
        }
        Ok((scratch, disk))
    }
}

/// A folder that goes with this.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures.
///
/// # Errors
/// When the model cannot be loaded or no thread be started, or the plan makes no sense.
pub fn run(plan: Plan, tick: &dyn Fn()) -> Result<Report, BenchError> {
    let failed = |e: EngineError| BenchError::Start { what: "the model".to_owned(), reason: e.to_string() };
    let most = plan.per_prompt.iter().max().copied().unwrap_or(0);
    if most > plan.documents {
        return Err(BenchError::Usage(format!("{most} documents per prompt, and there are {}", plan.documents)));
    }
    if plan.anchor > SYSTEM {
        return Err(BenchError::Usage(format!("documents stand behind {SYSTEM} tokens, not {}", plan.anchor)));
    }
    let file = ModelFile::open(&plan.model).map_err(failed)?;
    let model = Llama::load(&file, Config::read(&file).map_err(failed)?, Format::Native).map_err(failed)?;
    let pool = Pool::new(plan.threads.max(1)).map_err(BenchError::io("a thread"))?;
    let mut bench = Bench {
        pool: model.config().block_pool(),
        model,
        ops: Ops { level: Level::detect(), pool },
        w: Workspace::default(),
        plan: plan.clone(),
    };
    let mut rows = Vec::new();
    for chunk in &plan.chunks {
        for per_prompt in &plan.per_prompt {
            for batch in &plan.batches {
                rows.extend(bench.case(*chunk, *per_prompt, *batch, tick)?);
            }
        }
    }
    let mut figures = BTreeMap::new();
    for r in &rows {
        let name = format!("{}x{}.batch_{}.{}", r.per_prompt, r.chunk, r.batch, r.method.name());
        figures.insert(format!("{name}.kv_mib"), r.kv_mib);
        figures.insert(format!("{name}.computed"), r.computed as f64);
        if let Some(seconds) = r.seconds {
            figures.insert(format!("{name}.seconds"), seconds);
        }
    }
    Ok(Report { bench: "kv", figures, rows, plan, machine: Machine::here() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{model_file::TensorType, testing::tiny};

    #[test]
    fn prompts_of_the_same_documents_hold_them_once() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan {
            model: tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path()),
            threads: 1,
            chunks: vec![64],
            per_prompt: vec![2],
            batches: vec![1, 3],
            documents: 2,
            skew: 1.0,
            recompute: 0,
            anchor: 0,
            timed: 1000,
            repeats: 1,
        };
        let report = run(plan.clone(), &|| {}).unwrap();
        let row = |batch, method| report.rows.iter().find(|r| (r.batch, r.method) == (batch, method)).unwrap();
        // Six blocks for each prompt in full; two for its own tokens, and four for the documents of all.
        let less = |batch, method| row(batch, method).less_kv;
        assert_eq!([Method::Epic, Method::CacheBlend].map(|method| less(3, method)), [1.0, 1.0]);
        assert!((less(1, Method::Weir) - 1.0).abs() < 1e-9 && (less(3, Method::Weir) - 1.8).abs() < 1e-9);
        let computed = [Method::Full, Method::Epic, Method::Weir].map(|method| row(3, method).computed);
        assert_eq!(computed, [3 * 184, 3 * (56 + 32), 3 * 56]);
        assert!(report.rows.iter().all(|row| row.seconds.is_some()));
        // One of the others has the same documents in the same order, one but the system's text.
        assert_eq!((row(3, Method::Prefix).computed, row(1, Method::Prefix).computed), (3 * 184 - 160 - 32, 184));
        let error = run(Plan { per_prompt: vec![3], ..plan }, &|| {}).err().unwrap().to_string();
        assert!(error.contains("3 documents per prompt, and there are 2"), "{error}");
    }
}
