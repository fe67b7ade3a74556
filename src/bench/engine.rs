//! `weir bench engine`: tokens per second of the forward pass, and how much of the memory's bandwidth decoding uses. Straight
//! on the model, without scheduler, sampler or text; each figure is a median of runs that take turns, with those of a peer where one is asked for.

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use serde::Serialize;

use super::{
    BenchError,
    peer::{self, Peer},
    report::{Machine, median},
};
use crate::engine::{
    EngineError, Format, Level,
    model::{Batch, Config, Kv, Llama, Piece, llama::Workspace},
    model_file::ModelFile,
    ops::{Ops, Pool, Precision, block_pool::BlockPool},
};

/// Tokens that each sequence decodes.
const DECODED: usize = 32;
/// What the bandwidth is measured over: far more than caches hold.
const READ: usize = 512 << 20;

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub model: PathBuf,
    /// Eight or sixteen.
    pub activations: Precision,
    pub threads: Vec<usize>,
    pub repeats: usize,
    /// Lengths of prompts.
    pub prefill: Vec<usize>,
    /// Positions at which one sequence goes on.
    pub depths: Vec<usize>,
    /// Sequences that decode together, at no depth.
    pub batches: Vec<usize>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub what: String,
    pub threads: usize,
    pub tokens_per_s: f64,
    /// Weights that decoding reads per second, and their share of what these threads read at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gb_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_bandwidth: Option<f64>,
    /// The peer's figure with the format in which it is faster, which that is, and ours divided by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<peer::Figure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_peer: Option<f64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    /// Of reading memory, by number of threads.
    pub bandwidth_gb_per_s: BTreeMap<usize, f64>,
    pub weight_mib: f64,
    /// Most memory that the program has had, without what the bandwidth is measured over.
    pub peak_mib: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_peak_mib: Option<f64>,
    pub rows: Vec<Row>,
    pub plan: Plan,
    pub machine: Machine,
}

/// What one turn measures.
#[derive(Clone, Copy, Debug)]
enum Case {
    Prefill(usize),
    Depth(usize),
    Batch(usize),
}

impl Case {
    fn name(self) -> String {
        match self {
            Case::Prefill(n) => format!("prefill of {n}"),
            Case::Depth(n) => format!("decode at {n}"),
            Case::Batch(n) => format!("decode, batch of {n}"),
        }
    }
}

/// A model with what it runs on.
struct Bench {
    model: Llama,
    ops: Ops,
    workspace: Workspace,
    /// As in the engine: blocks are used again.
    pool: BlockPool,
}

impl Bench {
    /// Token ids of no meaning.
    fn token(&self, at: usize) -> u32 {
        (at * 7919 % (self.model.config().vocabulary - 1)) as u32
    }

    fn prefill(&mut self, kv: &mut Kv, count: usize) {
        let tokens: Vec<u32> = (0..count).map(|at| self.token(at)).collect();
        self.model.append(&self.ops, kv, &tokens, 1, &mut self.workspace);
    }

    fn decode(&mut self, sequences: &mut [Kv]) {
        let count = sequences.len();
        for step in 0..DECODED {
            let batch = Batch {
                tokens: (0..count).map(|i| self.token(step * count + i)).collect(),
                pieces: (0..count).map(|i| Piece { cache: i, row: i, count: 1 }).collect(),
                logits: (0..count).collect(),
            };
            let mut caches: Vec<&mut Kv> = sequences.iter_mut().collect();
            self.model.forward(&self.ops, &batch, &mut caches, &mut self.workspace);
        }
    }

    /// Tokens per second.
    fn once(&mut self, case: Case) -> f64 {
        let mut sequences = vec![Kv::new(&self.pool); if let Case::Batch(n) = case { n } else { 1 }];
        if let Case::Depth(n) = case {
            self.prefill(&mut sequences[0], n);
        }
        let begun = Instant::now();
        let tokens = match case {
            Case::Prefill(n) => {
                self.prefill(&mut sequences[0], n);
                n
            }
            Case::Depth(_) | Case::Batch(_) => {
                self.decode(&mut sequences);
                DECODED * sequences.len()
            }
        };
        tokens as f64 / begun.elapsed().as_secs_f64()
    }
}

/// Bytes that the threads of a pool read per second.
fn bandwidth(pool: &Pool, memory: &[u64]) -> f64 {
    let parts = pool.threads() * 16;
    let part = memory.len() / parts;
    let begun = Instant::now();
    pool.run(parts, &|i| {
        let mut sums = [0u64; 8];
        let (chunks, _) = memory[i * part..(i + 1) * part].as_chunks::<8>();
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        }
        std::hint::black_box(sums);
    });
    (parts * part * 8) as f64 / begun.elapsed().as_secs_f64()
}

/// The most memory that this process has had, in MiB.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}

/// Measures, and the peer in turn with it.
///
/// # Errors
/// When the model cannot be loaded, no thread be started, the peer fails, or the plan asks for more than its context.
pub fn run(plan: Plan, peer: Option<&Peer>, tick: &dyn Fn()) -> Result<Report, BenchError> {
    let failed = |e: EngineError| BenchError::Start { what: "the model".to_owned(), reason: e.to_string() };
    let file = ModelFile::open(&plan.model).map_err(failed)?;
    let config = Config::read(&file).map_err(failed)?;
    let longest = plan.prefill.iter().chain(&plan.depths).max().copied().unwrap_or(0) + DECODED;
    if longest > config.context {
        return Err(BenchError::Usage(format!(
            "{longest} tokens are asked for, and the model's context has {}",
            config.context
        )));
    }
    let cases: Vec<Case> = plan
        .prefill
        .iter()
        .map(|n| Case::Prefill(*n))
        .chain(plan.depths.iter().map(|n| Case::Depth(*n)))
        .chain(plan.batches.iter().map(|n| Case::Batch(*n)))
        .collect();
    let model = Llama::load(&file, config, Format::Native).map_err(failed)?.with_activations(plan.activations);
    let mut bench = Bench {
        pool: model.config().block_pool(),
        model,
        ops: Ops { level: Level::detect(), pool: Pool::new(1).map_err(BenchError::io("a thread"))? },
        workspace: Workspace::default(),
    };
    let weights = bench.model.weight_bytes() as f64;
    let mut turns: Vec<peer::Turn> = Vec::new();
    let mut seen = Vec::new();
    for threads in &plan.threads {
        bench.ops.pool = Pool::new(*threads).map_err(BenchError::io("a thread"))?;
        let mut here = vec![Vec::new(); cases.len()];
        for _ in 0..plan.repeats.max(1) {
            for (case, here) in cases.iter().zip(&mut here) {
                here.push(bench.once(*case));
                tick();
            }
            if let Some(peer) = peer {
                turns.push(peer.turn(&plan, *threads)?);
            }
        }
        seen.push(here);
    }
    let peak_mib = peak_mib();
    let memory = vec![1u64; READ / 8];
    let mut rows = Vec::new();
    let mut best = BTreeMap::new();
    for (threads, seen) in plan.threads.iter().zip(seen) {
        let pool = Pool::new(*threads).map_err(BenchError::io("a thread"))?;
        let greatest = (0..plan.repeats.max(3)).map(|_| bandwidth(&pool, &memory)).fold(0.0, f64::max);
        best.insert(*threads, greatest / 1e9);
        for (case, seen) in cases.iter().zip(seen) {
            let tokens_per_s = median(seen.into_iter());
            let reads = match case {
                Case::Prefill(_) => None,
                Case::Depth(_) => Some(weights * tokens_per_s),
                Case::Batch(n) => Some(weights * tokens_per_s / *n as f64),
            };
            let peer = fastest(&turns, &case.name(), *threads);
            rows.push(Row {
                what: case.name(),
                threads: *threads,
                tokens_per_s,
                gb_per_s: reads.map(|r| r / 1e9),
                of_bandwidth: reads.map(|r| r / greatest),
                over_peer: peer.as_ref().map(|peer| tokens_per_s / peer.tokens_per_s),
                peer,
            });
        }
    }
    let figure = |row: &Row| (format!("{}.{}", row.what.replace([' ', ','], "_"), row.threads), row.tokens_per_s);
    let figures = rows.iter().map(figure).collect();
    let weight_mib = weights / f64::from(1 << 20);
    Ok(Report {
        bench: "engine",
        figures,
        bandwidth_gb_per_s: best,
        weight_mib,
        peak_mib,
        peer: turns.first().map(|turn| turn.peer.clone()),
        peer_peak_mib: turns.iter().map(|turn| turn.peak_kib as f64 / 1024.0).reduce(f64::max),
        rows,
        plan,
        machine: Machine::here(),
    })
}

/// The median of the peer's turns, with the weights with which that is greatest.
fn fastest(turns: &[peer::Turn], what: &str, threads: usize) -> Option<peer::Figure> {
    let mut by_weights: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for figure in turns.iter().flat_map(|turn| &turn.rows).filter(|f| f.what == what && f.threads == threads) {
        by_weights.entry(&figure.weights).or_default().push(figure.tokens_per_s);
    }
    by_weights
        .into_iter()
        .map(|(weights, seen)| peer::Figure {
            weights: weights.to_owned(),
            what: what.to_owned(),
            threads,
            tokens_per_s: median(seen.into_iter()),
        })
        .max_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s))
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let mut out = format!(
            "{:.0} MiB of packed weights, activations of {} bits; at most {:.0} MiB of memory in all.\n\n",
            self.weight_mib,
            8 * self.plan.activations.planes(),
            self.peak_mib
        );
        for (threads, read) in &self.bandwidth_gb_per_s {
            out += &format!("{threads} threads read {read:.1} GB/s at most.\n");
        }
        if let (Some(peer), Some(peak)) = (&self.peer, self.peer_peak_mib) {
            out += &format!("\nIn turn with {peer}, which had {peak:.0} MiB at most.\n");
        }
        out +=
            "\n| what | threads | tokens/s | weights, GB/s | of the bandwidth | peer, better format | weir / peer |\n";
        out += "|---|---|---|---|---|---|---|\n";
        let none = || "–".to_owned();
        for r in &self.rows {
            let read = r.gb_per_s.map_or_else(none, |read| format!("{read:.1}"));
            let share = r.of_bandwidth.map_or_else(none, |share| format!("{:.0} %", 100.0 * share));
            let peer = r.peer.as_ref().map_or_else(none, |p| format!("{:.0} ({})", p.tokens_per_s, p.weights));
            let over = r.over_peer.map_or_else(none, |over| format!("{over:.2}"));
            out += &format!(
                "| {} | {} | {:.0} | {read} | {share} | {peer} | {over} |\n",
                r.what, r.threads, r.tokens_per_s
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{model_file::TensorType, testing::tiny};

    #[test]
    fn every_case_is_measured_and_what_does_not_fit_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path());
        let activations = Precision::Eight;
        let plan = Plan {
            model,
            activations,
            threads: vec![1, 2],
            repeats: 1,
            prefill: vec![100],
            depths: vec![0, 64],
            batches: vec![4],
        };
        let report = run(plan.clone(), None, &|| {}).unwrap();
        assert_eq!(report.rows.len(), 8);
        assert!(report.rows.iter().all(|r| r.tokens_per_s > 0.0));
        assert!(report.markdown().contains("| decode at 64 | 2 |"), "{}", report.markdown());
        let error = run(Plan { prefill: vec![4000], ..plan }, None, &|| {}).unwrap_err().to_string();
        assert!(error.contains("4032 tokens are asked for"), "{error}");
    }
}
