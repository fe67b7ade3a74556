//! `weir kv calibrate`: what reusing documents costs a model, measured and recorded.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use crate::cli::{bench::model_file, serve::ConfigArgs};
use crate::{
    bench::{kv_fidelity, questions},
    engine::{EngineOptions, FidelityRecord, Precision, fidelity::Variant},
};

/// Fewer questions say little of others.
const FEW: usize = 20;

pub(super) const EXAMPLE: &str = "\
Example:
  weir kv calibrate smollm2-135m-instruct --data questions.jsonl

Each line of the file is {\"question\": TEXT, \"chunks\": [TEXT, …]}; a Parquet file with these columns will do, too. Take questions
and documents like those that the model is to be asked. The ways of reuse are tried on all of them (`weir bench kv-fidelity --help`
says what they are), and the cheapest that keeps the configured bound (`chunk_reuse` in weir.yaml) is recorded; where none does, the
one of least divergence, and the model goes on computing documents where they stand. A weir that runs reads records when it loads a
model. Exit code 1: no way keeps the bound.";

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// A local model of the configuration, an asset, or a model file
    model: String,
    /// Questions about documents
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Questions that are taken, evenly over the file
    #[arg(long, value_name = "N", default_value_t = 60)]
    questions: usize,
    /// Ways of reuse that the engine may take
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = reusable,
          default_values = ["anchor-0", "anchor-16", "first-16", "first-32", "first-64"])]
    variants: Vec<Variant>,
    /// Tokens of each answer that are compared
    #[arg(long, value_name = "N", default_value_t = 32)]
    answer: usize,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

fn reusable(name: &str) -> Result<Variant, String> {
    let variant = Variant::of_name(name)?;
    match variant.reuse(&[]) {
        Some(_) => Ok(variant),
        None => Err(format!("`{name}` is for comparison only; the engine does not have it")),
    }
}

pub(super) fn run(args: &CalibrateArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.questions > 0 && args.answer > 0, "at least 1 question and 1 token of its answer");
    let config = args.config.assemble(None)?;
    let bound = config.chunk_reuse.context("chunk_reuse is switched off in the configuration")?;
    let mut options = EngineOptions { packed: Some(config.data_dir.join("packed")), ..EngineOptions::default() };
    let entry = config.fleet.iter().find(|entry| entry.name == args.model);
    let local = entry.and_then(|entry| entry.local.as_ref());
    if let Some(precision) = local.and_then(|local| local.activation_bits).and_then(Precision::of_bits) {
        options.activations = precision;
    }
    options.threads = local.and_then(|local| local.threads).unwrap_or(0);
    let model = local.map_or(args.model.as_str(), |local| local.model.as_str());
    let model = model_file(model, &config.data_dir)?;
    let (data, taken) = questions::take(&args.data, args.questions).map_err(anyhow::Error::msg)?;
    let plan = kv_fidelity::Plan { model, options, variants: args.variants.clone(), answer: args.answer };
    let bar = crate::cli::policy::fit::bar("comparing", taken.len());
    let report = kv_fidelity::run(&plan, &taken, &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report?;

    let mut rows = report.rows.clone();
    rows.sort_by(|a, b| a.computed.total_cmp(&b.computed));
    let kept = rows.iter().find(|row| bound.holds(row));
    let least = rows.iter().min_by(|a, b| a.divergence.mean.total_cmp(&b.divergence.mean));
    let fidelity = kept.or(least).context("no question has a document that may be reused")?.clone();
    let identity = u128::from_str_radix(&report.identity, 16)?;
    let record = FidelityRecord {
        identity: report.identity.clone(),
        model: args.model.clone(),
        fidelity,
        answer_tokens: args.answer,
        data,
        weir: crate::BUILD.to_owned(),
        measured_at: jiff::Timestamp::now().to_string(),
    };
    let path = record.write(&config.data_dir.join("fidelity"), identity).context("the record cannot be written")?;
    if record.fidelity.questions < FEW {
        let n = record.fidelity.questions;
        eprintln!(
            "weir: {n} questions say little of others; take {FEW} or more, like those to come (--questions, --data)"
        );
    }
    if args.json {
        say!(
            "{}",
            json!({"record": record, "path": path, "keeps_bound": kept.is_some(), "bound": bound, "rows": report.rows})
        );
    } else {
        say!("{}", report.markdown());
        let verdict = match kept {
            Some(row) => format!("`{}` is the cheapest that keeps the bound", row.variant),
            None => "none keeps the bound; documents are computed where they stand".to_owned(),
        };
        let (d, t, f) = (bound.divergence, bound.top1, bound.f1);
        say!(
            "Bound: divergence at most {d}, same best token at least {t}, F1 at least {f}: {verdict}.\n{}",
            path.display()
        );
    }
    Ok(ExitCode::from(u8::from(kept.is_none())))
}
