//! `weir bench`: measurements. Tables and JSON on stdout, progress on stderr.

mod cascade;
mod kv;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::{DataDir, policy::fit::InputArgs};
use crate::{
    app,
    assets::{self, Assets},
    bench::{
        BenchError, bandits, bare_proxy, decide, engine,
        gateway::Plan,
        kernels,
        load::Mode,
        mock_upstream, ope,
        peer::Peer,
        policies, replay,
        report::Report,
        subject::{self, Subject},
    },
    engine::Precision,
    fit::{Family, Inputs, embed},
    replay::matrix::{How, Matrix},
};

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

/// Where results go.
#[derive(Debug, Args)]
struct Output {
    /// Directory for the raw results and the table
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What weir costs in front of a server: latency, processor time, memory, beside a bare proxy
    Gateway(GatewayArgs),
    /// Fitted selectors on routing outcomes, beside what they must beat
    Policies(PoliciesArgs),
    /// Learning selectors online, on routing outcomes as a stream
    Bandits(BanditsArgs),
    /// Off-policy estimates against the truth, on routing outcomes
    Ope(OpeArgs),
    /// What one decision costs, selector by selector
    Decide(DecideArgs),
    /// How fast logged decisions are replayed, and in how much memory
    Replay(ReplayArgs),
    /// Tokens per second of an in-process model
    Engine(EngineArgs),
    /// Whether the kernels on an NVIDIA card compute what the processor does, and how fast
    Kernels(KernelsArgs),
    /// Memory, tokens and time of prompts of many documents, by how these are reused
    Kv(kv::KvArgs),
    /// How far answers are from the full computation when documents are computed apart
    KvFidelity(kv::KvFidelityArgs),
    /// What is computed again when memory is short, by which kept blocks go first
    KvEviction(kv::KvEvictionArgs),
    /// What gates of cascades are worth, over recorded answers
    Cascade(cascade::CascadeArgs),
    /// A server of fixed answers
    #[command(hide = true)]
    MockUpstream(ListenArgs),
    /// The least that a proxy does
    #[command(hide = true)]
    BareProxy {
        #[command(flatten)]
        listen: ListenArgs,
        /// The server behind it
        #[arg(long, value_name = "URL")]
        upstream: String,
    },
}

#[derive(Debug, Args)]
struct ListenArgs {
    /// Address on the loopback interface
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weir bench gateway
  weir bench gateway --seconds 10 --connections 64 --out eval/runs/today
  weir bench gateway --subjects mock,bare-proxy,pass-through --json

Everything runs on this machine over the loopback interface, each server in a process of its own. Use a release build and
an idle machine. Exit code 1: some answer was wrong.")]
struct GatewayArgs {
    #[command(flatten)]
    output: Output,
    /// Seconds of each run
    #[arg(long, value_name = "N", default_value_t = 2.0)]
    seconds: f64,
    /// End each run after this many requests, if that is earlier
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// Runs of each combination; the table shows medians
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Connections at once
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 64])]
    connections: Vec<usize>,
    /// What to compare [default: all but `policy`, which --policy adds]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    subjects: Vec<Subject>,
    /// Measure decisions of this policy, too; its models are `small` and `large`, by name or tag
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Only answers in one piece, or only streamed ones
    #[arg(long, value_enum)]
    mode: Option<ModeArg>,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench ope --data outcomes/ --out eval/runs/today")]
struct OpeArgs {
    /// A Parquet file of outcomes, or a directory of such files
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Logs that are drawn, per data set and way of logging
    #[arg(long, value_name = "N", default_value_t = 2000)]
    repetitions: usize,
    /// Decisions per log
    #[arg(long, value_name = "N", default_value_t = 2500)]
    decisions: usize,
    /// Bootstrap resamples per estimate
    #[arg(long, value_name = "N", default_value_t = 400)]
    resamples: usize,
    /// Prices of models whose outcomes have no cost
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench bandits --data outcomes/ --orders 20 --out eval/runs/today")]
struct BanditsArgs {
    /// A Parquet file of outcomes, or a directory of such files
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Random orders of the stream
    #[arg(long, value_name = "N", default_value_t = 20)]
    orders: u64,
    /// What the best single model's mean cost is worth in score
    #[arg(long, value_name = "W", default_value_t = 0.0)]
    cost_weight: f64,
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench replay --decisions 1000000 10000000 --out eval/runs/today")]
struct ReplayArgs {
    /// Lengths of made up logs; ten million take about 2 GiB of disk for a while
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1_000_000])]
    decisions: Vec<usize>,
    /// Times that each is replayed; the median is reported
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeats: usize,
    /// Also with embeddings of this embedder, which has to be there
    #[arg(long, value_name = "NAME")]
    embedder: Option<String>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  weir bench engine --threads 1 2 --out eval/runs/today
  weir bench engine --peer llama.cpp --repeats 3")]
struct EngineArgs {
    /// An in-process model of `weir models list`, or a GGUF file
    #[arg(long, value_name = "NAME|FILE", default_value = "smollm2-135m-instruct")]
    model: String,
    /// Another engine to run in turn with weir: `llama.cpp`, built once from its Python package's source (ten minutes)
    #[arg(long, value_name = "NAME", value_parser = ["llama.cpp"])]
    peer: Option<String>,
    /// Of how many bits activations are: 8 or 16
    #[arg(long, value_name = "N", default_value_t = 16)]
    activation_bits: u8,
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1, 2])]
    threads: Vec<usize>,
    /// Times that each is measured, in turn; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,
    /// Lengths of prompts
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [512, 2048])]
    prefill: Vec<usize>,
    /// Positions at which one sequence goes on
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [0, 512, 2048])]
    depths: Vec<usize>,
    /// Sequences that go on together
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1, 4, 16])]
    batches: Vec<usize>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  kernels/fetch-nvcc && cargo run --release --features cuda -- bench kernels --out eval/runs/today

Exit code 1: a kernel's result is too far from its CPU twin's.")]
struct KernelsArgs {
    /// Number of the card
    #[arg(long, value_name = "N", default_value_t = 0)]
    card: usize,
    /// Times that each is measured; the median is reported
    #[arg(long, value_name = "N", default_value_t = 20)]
    repeats: usize,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weir bench decide
  weir bench decide --verify 10000      one hash over that many decisions per selector: the same in every build")]
struct DecideArgs {
    #[command(flatten)]
    output: Output,
    /// Times over the same 200 contexts
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: usize,
    /// Fitted queries of the nearest-neighbour selector
    #[arg(long, value_name = "N", default_value_t = 50_000)]
    examples: usize,
    /// Only selectors whose name begins so
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Decide on this many random contexts and print the hash of all decisions
    #[arg(long, value_name = "N")]
    verify: Option<usize>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weir bench policies --data outcomes/ --out eval/runs/today
  weir bench policies --data outcomes/support.parquet --seeds 1 --json

Outcomes are Parquet files with query_id, query, model, score (0 to 1) and cost_usd. Folds are by query; every router is judged
on queries that it was not fitted to. Embeddings are kept in the data directory.")]
struct PoliciesArgs {
    /// A Parquet file of outcomes, or a directory of such files
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Folds by query
    #[arg(long, value_name = "N", default_value_t = 5)]
    folds: usize,
    /// Seeds of the folds and fits
    #[arg(long, value_name = "N", default_value_t = 5)]
    seeds: u64,
    /// Resamples of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 500)]
    resamples: usize,
    /// What to fit [default: all]
    #[arg(long, value_enum, value_name = "NAME,…", value_delimiter = ',')]
    selectors: Vec<Family>,
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ModeArg {
    Json,
    Sse,
}

pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let result = match args.what {
        What::Gateway(args) => return gateway(args),
        What::Policies(args) => return judge_policies(&args),
        What::Bandits(args) => return play_bandits(&args),
        What::Ope(args) => return estimate_often(&args),
        What::Decide(args) => return decide_often(&args),
        What::Replay(args) => return replay_much(args),
        What::Engine(args) => return run_engine(args),
        What::Kernels(args) => return run_kernels(&args),
        What::Kv(args) => return kv::run(args),
        What::KvFidelity(args) => return kv::run_fidelity(args),
        What::KvEviction(args) => return kv::run_eviction(args),
        What::Cascade(args) => return cascade::run(args),
        What::MockUpstream(args) => {
            let listen = subject::loopback(args.listen)?;
            super::runtime()?.block_on(mock_upstream::serve(listen))
        }
        What::BareProxy { listen, upstream } => {
            let listen = subject::loopback(listen.listen)?;
            super::runtime()?.block_on(bare_proxy::serve(listen, &upstream))
        }
    };
    result?;
    Ok(ExitCode::SUCCESS)
}

/// Resolves when this process is told to end.
async fn stopped() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            result = tokio::signal::ctrl_c() => result,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// The outcomes of a file or a directory with their embedded queries; a file with a pair of models by task.
fn outcomes(data: &std::path::Path, with: &InputArgs) -> anyhow::Result<Vec<(Matrix, Inputs)>> {
    let matrices = Matrix::read_all(data, &with.how()?)?;
    let data_dir = with.data_dir.path();
    let mut sets = Vec::new();
    super::runtime()?.block_on(async {
        let embedder = app::offline_embedder(&data_dir, &with.embedder).await?;
        let mut cache = embed::Cache::open(&data_dir.join("embeddings"), &embedder.identity())?;
        for matrix in &matrices {
            let bar = super::policy::fit::bar(&format!("embedding {}", matrix.name), matrix.len());
            let inputs = embed::inputs(matrix, embedder.as_ref(), &mut cache, || bar.inc(1)).await?;
            bar.finish_and_clear();
            sets.extend(policies::sets(matrix, &inputs));
        }
        anyhow::Ok(())
    })?;
    Ok(sets)
}

/// Writes `NAME.json` and `NAME.md`, where a directory is given, and prints one of the two.
fn publish(report: &impl serde::Serialize, text: &str, name: &str, output: &Output) -> anyhow::Result<ExitCode> {
    if let Some(dir) = &output.out {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(report)?)?;
        std::fs::write(dir.join(format!("{name}.md")), text)?;
    }
    match output.json {
        true => say!("{}", serde_json::to_string_pretty(report)?),
        false => say!("{}", text.trim_end()),
    }
    Ok(ExitCode::SUCCESS)
}

fn play_bandits(args: &BanditsArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.orders >= 1, "at least 1 order");
    let sets = outcomes(&args.data, &args.inputs)?;
    let plan = bandits::Plan { orders: args.orders, cost_weight: args.cost_weight };
    let mut rows = Vec::new();
    for (matrix, inputs) in &sets {
        let bar = super::policy::fit::bar(&format!("streaming {}", matrix.name), args.orders as usize * 18);
        rows.push(bandits::run(matrix, inputs, &plan, &|| bar.inc(1)).map_err(anyhow::Error::msg)?);
        bar.finish_and_clear();
    }
    let report = bandits::Report::of(rows, plan);
    publish(&report, &report.markdown(), "bandits", &args.output)
}

fn estimate_often(args: &OpeArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.repetitions >= 1 && args.decisions >= 2, "at least 1 repetition of 2 decisions");
    let how = How { prices: Some(super::policy::fit::prices(args.prices.as_deref())?), ..How::default() };
    let plan = ope::Plan { repetitions: args.repetitions, decisions: args.decisions, resamples: args.resamples };
    let mut rows = Vec::new();
    for matrix in Matrix::read_all(&args.data, &how)? {
        anyhow::ensure!(matrix.models.len() > 1, "{}: one model only, there is nothing to choose", matrix.name);
        let bar = super::policy::fit::bar(&format!("logging {}", matrix.name), args.repetitions * 4);
        rows.extend(ope::run(&matrix, &plan, &|| bar.inc(1)));
        bar.finish_and_clear();
    }
    let report = ope::Report::of(rows, plan);
    publish(&report, &report.markdown(), "ope", &args.output)
}

fn decide_often(args: &DecideArgs) -> anyhow::Result<ExitCode> {
    if let Some(count) = args.verify {
        let hash = decide::verify(count, args.examples.min(1000)).map_err(anyhow::Error::msg)?;
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        match args.output.json {
            true => say!("{}", serde_json::json!({"ok": true, "decisions": hash, "build": build})),
            false => say!("{hash}  {count} contexts, {build} build"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let report = decide::run(args.rounds.max(1), args.examples, args.only.as_deref()).map_err(anyhow::Error::msg)?;
    publish(&report, &report.markdown(), "decide", &args.output)
}

fn replay_much(args: ReplayArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.decisions.iter().all(|n| *n >= 1000), "at least 1,000 decisions");
    let data_dir = args.data_dir.path();
    let embedder = match &args.embedder {
        Some(name) => {
            Some(super::runtime()?.block_on(crate::app::offline_embedder(&data_dir, name))?.identity().as_ref().clone())
        }
        None => None,
    };
    let bar = super::policy::fit::bar("making up decisions", args.decisions.iter().sum());
    let plan = replay::Plan { decisions: args.decisions, repeats: args.repeats, embedder, data_dir };
    let report = replay::run(plan, &|step| bar.suspend(|| eprintln!("{step}")), &|n| bar.inc(n));
    bar.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "replay", &args.output)
}

/// The file of a model that has been fetched, or a path.
pub(super) fn model_file(model: &str, data_dir: &Path) -> anyhow::Result<PathBuf> {
    match PathBuf::from(model) {
        file if file.exists() => Ok(file),
        _ => {
            let assets = Assets::new(data_dir, assets::Options { offline: true, ..assets::Options::from_env() });
            let files = assets.ensure(model)?.files;
            files.get("model").cloned().with_context(|| format!("{model} is no in-process model"))
        }
    }
}

fn run_engine(args: EngineArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.threads.iter().chain(&args.batches).all(|n| *n > 0), "at least 1 thread and 1 sequence");
    let model = model_file(&args.model, &args.data_dir.path())?;
    let peer = match &args.peer {
        Some(name) => {
            tracing::info!("building {name} below {}, unless it is there", args.data_dir.path().display());
            Some(Peer::ensure(&args.data_dir.path())?)
        }
        None => None,
    };
    let cases = args.prefill.len() + args.depths.len() + args.batches.len();
    let bar = super::policy::fit::bar("measuring", cases * args.threads.len() * args.repeats.max(1));
    let plan = engine::Plan {
        model,
        activations: Precision::of_bits(args.activation_bits).context("--activation-bits is 8 or 16")?,
        threads: args.threads,
        repeats: args.repeats,
        prefill: args.prefill,
        depths: args.depths,
        batches: args.batches,
    };
    let report = engine::run(plan, peer.as_ref(), &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "engine", &args.output)
}

fn run_kernels(args: &KernelsArgs) -> anyhow::Result<ExitCode> {
    let report = kernels::run(args.card, args.repeats)?;
    let code = publish(&report, &report.markdown(), "kernels", &args.output)?;
    Ok(if report.agrees { code } else { ExitCode::from(1) })
}

fn judge_policies(args: &PoliciesArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.folds >= 2 && args.seeds >= 1, "at least 2 folds and 1 seed");
    let sets = outcomes(&args.data, &args.inputs)?;
    let families = if args.selectors.is_empty() { Family::ALL.to_vec() } else { args.selectors.clone() };
    let plan = policies::Plan { folds: args.folds, seeds: args.seeds, resamples: args.resamples, families };
    let mut rows = Vec::new();
    for (matrix, inputs) in &sets {
        let bar = super::policy::fit::bar(&format!("fitting {}", matrix.name), plan.folds * plan.seeds as usize);
        let set = policies::run(matrix, inputs, &plan, &|| bar.inc(1)).map_err(anyhow::Error::msg)?;
        bar.finish_and_clear();
        rows.push(set);
    }
    let report = policies::Report::of(rows, plan, args.inputs.embedder.clone());
    publish(&report, &report.markdown(), "policies", &args.output)
}

fn gateway(args: GatewayArgs) -> anyhow::Result<ExitCode> {
    let mut subjects = args.subjects;
    if subjects.is_empty() {
        subjects = vec![
            Subject::Mock,
            Subject::BareProxy,
            Subject::PassThrough,
            Subject::Decision,
            Subject::DecisionEmbedding,
        ];
        if args.policy.is_some() {
            subjects.push(Subject::Policy);
        }
    }
    subjects.sort();
    subjects.dedup();
    let plan = Plan {
        subjects,
        modes: match args.mode {
            None => vec![Mode::Json, Mode::Sse],
            Some(ModeArg::Json) => vec![Mode::Json],
            Some(ModeArg::Sse) => vec![Mode::Sse],
        },
        connections: args.connections,
        repeat: args.repeat,
        seconds: args.seconds,
        requests: args.requests,
        policy: args.policy,
        models_of: args.data_dir.path(),
    };
    if let Err(error @ BenchError::Usage(_)) = plan.check() {
        eprintln!("weir: {error}");
        return Ok(ExitCode::from(2));
    }
    let runs = super::runtime()?.block_on(async {
        tokio::select! {
            runs = plan.run(|step| eprintln!("{step}")) => Ok(runs?),
            // Dropping the plan's future ends the servers and removes their files.
            result = stopped() => {
                result?;
                anyhow::bail!("stopped by a signal; nothing is reported")
            }
        }
    })?;
    let report = Report::of(&runs);
    if let Some(dir) = &args.output.out {
        report.write(&runs, dir)?;
    }
    if args.output.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        say!("{}", report.table().trim_end());
    }
    for run in runs.iter().filter(|run| run.errors > 0) {
        let reason = run.error.as_deref().unwrap_or_default();
        eprintln!("{}, {}: {} wrong answers; the first: {reason}", run.subject.title(), run.mode.as_str(), run.errors);
    }
    Ok(if report.errors() == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
