//! `weir bench kv`, `kv-fidelity` and `kv-eviction`: documents that are computed once, and what is kept.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{Output, model_file, publish};
use crate::{
    bench::{
        kv,
        kv_eviction::{self, SHAPES, Shape},
        kv_fidelity, questions,
    },
    cli::DataDir,
    engine::{EngineOptions, fidelity::Variant},
};

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench kv --out eval/runs/today

full: everything is computed; prefix: what prompts of a batch begin with alike is shared; epic, cacheblend: a copy of each document
per request, its first 16 tokens or 15 % of them computed again; weir: one copy for all, the first tokens computed again;
disk: the same, the documents read from disk first.")]
pub(super) struct KvArgs {
    /// An in-process model of `weir models list`, or a model file
    #[arg(long, value_name = "NAME|FILE", default_value = "smollm2-135m-instruct")]
    model: String,
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: usize,
    /// Tokens of a document
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [256, 512])]
    chunks: Vec<usize>,
    /// Documents of a prompt
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [8, 16])]
    per_prompt: Vec<usize>,
    /// Prompts at once
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1, 8])]
    batches: Vec<usize>,
    /// Documents that there are
    #[arg(long, value_name = "N", default_value_t = 64)]
    documents: usize,
    /// The r-th document is drawn as often as 1/r^SKEW
    #[arg(long, value_name = "SKEW", default_value_t = 1.0)]
    skew: f64,
    /// First tokens of a document that are computed again by weir
    #[arg(long, value_name = "N", default_value_t = 0)]
    recompute: usize,
    /// Tokens that each document was computed behind
    #[arg(long, value_name = "N", default_value_t = 1)]
    anchor: usize,
    /// Batches of at most so many tokens are computed, too; of others only memory and tokens are counted
    #[arg(long, value_name = "N", default_value_t = 9000)]
    timed: usize,
    /// Times that each is measured, in turn; the median is reported
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeats: usize,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench kv-fidelity --data multidoc_chunks.parquet --questions 60 --out eval/runs/today

Ways of reuse: none (documents as they were computed alone), first-N (their first N tokens computed in place: 16 and 32 are EPIC's,
32 is MEPIC's first block here), anchor-N (the same, computed alone behind a prompt's first token), head-N (behind what the
template puts before a user's text), deviation-N (CacheBlend's N percent).")]
pub(super) struct KvFidelityArgs {
    /// An in-process model of `weir models list`, or a model file
    #[arg(long, value_name = "NAME|FILE", default_value = "smollm2-135m-instruct")]
    model: String,
    /// Questions about documents: Parquet or JSON lines with `question` and `chunks`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Questions that are taken, evenly over the file
    #[arg(long, value_name = "N", default_value_t = 60)]
    questions: usize,
    /// Ways of reuse
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = Variant::of_name,
          default_values = ["none", "first-16", "first-32", "first-64", "anchor-0", "anchor-32", "head-0", "head-32", "deviation-15"])]
    variants: Vec<Variant>,
    /// Tokens of each answer that are compared
    #[arg(long, value_name = "N", default_value_t = 32)]
    answer: usize,
    /// Threads; 0 takes the cores there are
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench kv-eviction --trace mooncake_conversation.parquet --models smollm2-135m qwen2.5-7b

The trace's column hash_ids says which blocks of 512 tokens each prompt is made of, each known by all before it.")]
pub(super) struct KvEvictionArgs {
    /// Prompts as blocks: Parquet with a column hash_ids
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Models that share the memory, by their shape: smollm2-135m, smollm2-1.7b, qwen2.5-7b
    #[arg(long, value_name = "NAME", num_args = 1.., default_values = ["smollm2-135m"], value_parser = shape)]
    models: Vec<Shape>,
    /// Room, as shares of what all blocks of the trace would take
    #[arg(long, value_name = "SHARE", num_args = 1.., default_values_t = [0.02, 0.05, 0.1, 0.2, 0.4])]
    room: Vec<f64>,
    #[command(flatten)]
    output: Output,
}

fn shape(name: &str) -> Result<Shape, String> {
    let known = SHAPES.iter().map(|shape| shape.name).collect::<Vec<_>>().join(", ");
    SHAPES.into_iter().find(|shape| shape.name == name).ok_or(format!("known are {known}"))
}

pub(super) fn run(args: KvArgs) -> anyhow::Result<ExitCode> {
    let all = args.chunks.iter().chain(&args.per_prompt).chain(&args.batches);
    anyhow::ensure!(all.clone().all(|n| *n > 0), "at least 1 token, 1 document and 1 prompt");
    let plan = kv::Plan {
        model: model_file(&args.model, &args.data_dir.path())?,
        threads: args.threads,
        chunks: args.chunks,
        per_prompt: args.per_prompt,
        batches: args.batches,
        documents: args.documents,
        skew: args.skew,
        recompute: args.recompute,
        anchor: args.anchor,
        timed: args.timed,
        repeats: args.repeats,
    };
    let spinner = indicatif::ProgressBar::new_spinner().with_message("computing prompts");
    let report = kv::run(plan, &|| spinner.inc(1));
    spinner.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "kv", &args.output)
}

pub(super) fn run_fidelity(args: KvFidelityArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.questions > 0 && args.answer > 0, "at least 1 question and 1 token of its answer");
    let (_, taken) = questions::take(&args.data, args.questions).map_err(anyhow::Error::msg)?;
    let plan = kv_fidelity::Plan {
        model: model_file(&args.model, &args.data_dir.path())?,
        options: EngineOptions { threads: args.threads, ..EngineOptions::default() },
        variants: args.variants,
        answer: args.answer,
    };
    let bar = crate::cli::policy::fit::bar("comparing", taken.len());
    let report = kv_fidelity::run(&plan, &taken, &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "kv-fidelity", &args.output)
}

pub(super) fn run_eviction(args: KvEvictionArgs) -> anyhow::Result<ExitCode> {
    let bar = crate::cli::policy::fit::bar("replaying", args.room.len() + 1);
    let plan = kv_eviction::Plan { trace: args.trace, models: args.models, room: args.room };
    let report = kv_eviction::run(plan, &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "kv-eviction", &args.output)
}
