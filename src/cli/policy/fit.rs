//! `weir policy fit`: an artifact from measured outcomes.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::calibrate::{self, GateArgs};
use crate::{
    app,
    cli::DataDir,
    domain::Score,
    fit::{self, Family, embed, report::Report},
    policy::{self, Artifact},
    replay::matrix::{Columns, How, Matrix, Prices},
};

/// What outcomes are read and seen with.
#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// The embedder; a policy that uses a fitted artifact needs the same
    #[arg(long, value_name = "NAME", default_value = "bge-small-en")]
    pub embedder: String,
    /// Prices of models whose outcomes have no cost: JSON {"tokens_per_call": N, "usd_per_million": {MODEL: USD}}
    #[arg(long, value_name = "FILE")]
    pub prices: Option<PathBuf>,
    /// What a column of the outcomes is called there, e.g. score=quality; may be given several times
    #[arg(long = "column", value_name = "NAME=THEIRS")]
    pub columns: Vec<String>,
    #[command(flatten)]
    pub data_dir: DataDir,
}

impl InputArgs {
    /// How outcomes are read.
    pub fn how(&self) -> anyhow::Result<How> {
        let columns = Columns::of(&self.columns).map_err(|e| anyhow::anyhow!("--column {e}"))?;
        Ok(How { prices: Some(prices(self.prices.as_deref())?), columns })
    }
}

#[derive(Debug, Args)]
pub(super) struct FitArgs {
    /// What to fit
    #[arg(long, value_enum, required_unless_present_any = ["warm_start", "extend", "cascade"], conflicts_with_all = ["warm_start", "extend", "cascade"])]
    selector: Option<Family>,
    /// Calibrate a gate on this score of answers, e.g. mean_token_entropy or "logprob_quantile 0.1", or `learned`, which is
    /// fitted to a third of the answers first; --data is JSON lines with model, scores ([{score, value}]) and correct, for `verified`
    /// with verified ({said: [true, false, null]})
    #[arg(long, value_name = "SCORE", conflicts_with_all = ["warm_start", "extend", "test", "seeds"])]
    cascade: Option<Score>,
    #[command(flatten)]
    gate: GateArgs,
    /// Fit what the bandit of this policy begins with
    #[arg(long, value_name = "POLICY", conflicts_with = "extend")]
    warm_start: Option<PathBuf>,
    /// Add models to this graph by a few observed outcomes, without fitting it again
    #[arg(long, value_name = "ARTIFACT")]
    extend: Option<PathBuf>,
    /// Outcomes: Parquet with query_id, query, model, score (0 to 1), cost_usd
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Judge on these outcomes, and fit on all of --data [default: a share of --data is held out]
    #[arg(long, value_name = "FILE")]
    test: Option<PathBuf>,
    /// Share of the queries that are held out and judged on
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    hold_out: f64,
    /// Where to write the artifact; its card goes beside it, as FILE.json
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Seed of the split and of the fit
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Judge the selector on this many further splits, too
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with_all = ["test", "warm_start", "extend"])]
    seeds: u64,
    #[command(flatten)]
    inputs: InputArgs,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &FitArgs) -> anyhow::Result<ExitCode> {
    if let Some(score) = args.cascade {
        return calibrate::run(score, &args.data, &args.out, args.seed, &args.gate, args.json);
    }
    anyhow::ensure!((0.05..=0.9).contains(&args.hold_out), "--hold-out is a share between 0.05 and 0.9");
    let how = args.inputs.how()?;
    let matrix = Matrix::read(&args.data, &how)?;
    let mut wanted = vec![matrix];
    if let Some(test) = &args.test {
        let test = Matrix::read(test, &how)?;
        anyhow::ensure!(
            test.models == wanted[0].models,
            "{} has outcomes of {}, {} of {}: an artifact is judged on the models that it was fitted to",
            args.data.display(),
            wanted[0].models.join(", "),
            test.name,
            test.models.join(", ")
        );
        wanted.push(test);
    }
    let data_dir = args.inputs.data_dir.path();
    let (inputs, bandit) = crate::cli::runtime()?.block_on(async {
        let embedder = app::offline_embedder(&data_dir, &args.inputs.embedder).await?;
        let mut cache = embed::Cache::open(&data_dir.join("embeddings"), &embedder.identity())?;
        let mut inputs = Vec::new();
        for matrix in &wanted {
            let bar = bar("embedding queries", matrix.len());
            inputs.push(embed::inputs(matrix, embedder.as_ref(), &mut cache, || bar.inc(1)).await?);
            bar.finish_and_clear();
        }
        let bandit = match &args.warm_start {
            Some(file) => {
                let yaml = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
                let spec = policy::parse(&file.display().to_string(), &yaml)?.cold();
                Some(app::compile_with(&spec, &super::implied_fleet(&spec), &embedder).await?)
            }
            None => None,
        };
        anyhow::Ok((inputs, bandit))
    })?;
    let matrix = &wanted[0];
    let (train, held_out) = match (&args.extend, wanted.len()) {
        (None, 1) => fit::split(matrix, args.hold_out, args.seed),
        _ => ((0..matrix.len()).collect(), Vec::new()),
    };
    let what = args.selector.map_or("a policy's models", Family::as_str);
    let bar = ProgressBar::new_spinner().with_message(format!("fitting {what}"));
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    let (judged, judged_inputs, places) = match (wanted.get(1), inputs.get(1)) {
        (Some(matrix), Some(inputs)) => (matrix, inputs, (0..matrix.len()).collect()),
        _ => (matrix, &inputs[0], held_out),
    };
    let (mut fitted, predictions) = match (&bandit, &args.extend, args.selector) {
        (Some(policy), ..) => {
            const PULLS: u32 = 50;
            let warm = fit::warm_start(policy, matrix, &inputs[0], &train, PULLS).map_err(anyhow::Error::msg)?;
            let predictions = warm.predictions(policy, judged, judged_inputs, &places);
            (warm.fitted, predictions)
        }
        (None, Some(file), _) => {
            let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            let artifact = Artifact::from_bytes(&bytes).with_context(|| file.display().to_string())?;
            (fit::extend(&artifact, matrix, &inputs[0]).map_err(anyhow::Error::msg)?, Vec::new())
        }
        (None, None, Some(selector)) => {
            let fitted = fit::fit(selector, matrix, &inputs[0], &train, args.seed).map_err(anyhow::Error::msg)?;
            let predictions = fit::report::predictions(&fitted.predictor()?, judged_inputs, &places);
            (fitted, predictions)
        }
        (None, None, None) => anyhow::bail!("give --selector, --warm-start or --extend"),
    };
    bar.finish_and_clear();
    let report = (!places.is_empty() && args.extend.is_none()).then(|| Report::of(judged, &places, &predictions));
    fitted.card.data.held_out = places.len();
    if let Some(report) = &report {
        for (name, figure) in [("aiq", report.aiq), ("aiq_zero_router", report.aiq_zero)] {
            figure.map(|f| fitted.card.metrics.insert(name.to_owned(), f));
        }
    }
    let spread = args.selector.filter(|_| args.seeds > 0).map(|family| spread(family, args, matrix, &inputs[0]));
    let spread = spread.transpose()?;
    if let Some(spread) = &spread {
        fitted.card.metrics.insert("aiq_gain_mean".to_owned(), spread.mean);
        fitted.card.metrics.insert("aiq_gain_sd".to_owned(), spread.sd);
    }
    let bytes = fitted.to_bytes()?;
    let hash = Artifact::from_bytes(&bytes)?.hash;
    std::fs::write(&args.out, &bytes).with_context(|| format!("cannot write {}", args.out.display()))?;
    let card = PathBuf::from(format!("{}.json", args.out.display()));
    let text = serde_json::to_string_pretty(&json!({"hash": hash, "card": fitted.card}))?;
    std::fs::write(&card, text + "\n").with_context(|| format!("cannot write {}", card.display()))?;
    if args.json {
        let document = json!({"ok": true, "artifact": args.out, "hash": hash, "card": fitted.card, "report": report});
        say!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(report) = &report {
        say!("{}\n", report.table().trim_end());
    }
    if let Some(Spread { splits, mean, sd }) = spread {
        say!("over {splits} other splits: AIQ {mean:+.4} against the zero router, standard deviation {sd:.4}\n");
    }
    let file = args.out.display();
    match args.extend {
        Some(_) => say!("wrote {file} ({} bytes) with the models {}", bytes.len(), fitted.card.models.join(", ")),
        None => {
            say!("wrote {file} ({} bytes, fitted on {} queries) and {}", bytes.len(), train.len(), card.display());
        }
    }
    match &bandit {
        Some(_) => say!("in the policy, under `select:`\n  warm_start: {{artifact: {file}, hash: {hash}}}"),
        None => {
            let scale = report.map_or(0.01, |r| r.cost_scale);
            say!("in a policy, with the cost weight of your budget:");
            let selector = &fitted.card.selector;
            say!("  {selector}: {{artifact: {file}, hash: {hash}, cost_weight: 0.1, cost_scale: {scale:.6}}}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// AIQ less the zero router's, over several splits.
struct Spread {
    splits: usize,
    mean: f64,
    sd: f64,
}

fn spread(family: Family, args: &FitArgs, matrix: &Matrix, inputs: &fit::Inputs) -> anyhow::Result<Spread> {
    let bar = bar("other splits", args.seeds as usize);
    let mut gains = Vec::new();
    for seed in (1..=args.seeds).map(|n| args.seed.wrapping_add(n)) {
        let (train, test) = fit::split(matrix, args.hold_out, seed);
        let fitted = fit::fit(family, matrix, inputs, &train, seed).map_err(anyhow::Error::msg)?;
        let predictions = fit::report::predictions(&fitted.predictor()?, inputs, &test);
        let report = Report::of(matrix, &test, &predictions);
        gains.extend(report.aiq.zip(report.aiq_zero).map(|(aiq, zero)| aiq - zero));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let n = gains.len().max(1) as f64;
    let mean = gains.iter().sum::<f64>() / n;
    let sd = (gains.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    Ok(Spread { splits: gains.len(), mean, sd })
}

/// The price list given, else the one that comes with weir.
pub(crate) fn prices(file: Option<&std::path::Path>) -> anyhow::Result<Prices> {
    let Some(file) = file else { return Prices::builtin().map_err(anyhow::Error::msg) };
    let shown = file.display();
    let text = std::fs::read(file).with_context(|| format!("cannot read {shown}"))?;
    serde_json::from_slice(&text).with_context(|| format!("{shown} is no price list"))
}

/// A bar on stderr, where that is a terminal.
pub(crate) fn bar(what: &str, length: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} eta {eta}");
    let bar = ProgressBar::new(length as u64).with_message(what.to_owned());
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar
}
