//! `weir bench cascade`: gates of cascades over recorded answers.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{Output, model_file, publish};
use crate::{
    bench::cascade::{self, PROBE, VOTE, VOTES, answers, ask, tasks},
    cli::DataDir,
    engine::EngineOptions,
    replay::matrix::{How, Matrix},
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weir bench cascade --out eval/runs/today
  weir bench cascade --data outcomes/support.parquet
  weir bench cascade --generate --model smollm2-135m-instruct --answers answers.jsonl
  weir bench cascade --verify --answers answers.jsonl

Plans are run over answers that are kept in a file, by the machine that serves; no model is called. With --generate one is
asked first, and its answers written there; with --verify it is asked whether its greedy answers are right.")]
pub(super) struct CascadeArgs {
    /// Answers: JSON lines, as --generate writes them
    #[arg(long, value_name = "FILE", default_value = "eval/datasets/cascade/smollm2-135m-instruct.jsonl")]
    answers: PathBuf,
    /// Outcomes with responses, for plans that need no log-probabilities: Parquet or JSON lines
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Prices of models whose outcomes have no cost
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    /// Random halves: thresholds are taken from one and judged on the other
    #[arg(long, value_name = "N", default_value_t = 20)]
    splits: u64,
    /// Ask a model first, and write its answers
    #[arg(long)]
    generate: bool,
    /// Ask the model whether its answers at temperature 0 are right, 8 times each, and write that beside them
    #[arg(long)]
    verify: bool,
    /// Whom to ask: an in-process model of `weir models list`, or a model file
    #[arg(long, value_name = "NAME|FILE", default_value = "smollm2-135m-instruct")]
    model: String,
    /// Questions
    #[arg(long, value_name = "N", default_value_t = 500)]
    tasks: usize,
    /// Threads that compute answers; 0 takes the cores there are
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Of the questions, the simulated model, and the halves of outcomes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data_dir: DataDir,
}

/// Longest answer in tokens.
const LONGEST: u32 = 48;

pub(super) fn run(args: CascadeArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.splits > 0 && args.tasks > 0, "at least 1 half and 1 question");
    let tasks = tasks::make(args.tasks, args.seed);
    let ask = || -> anyhow::Result<ask::Plan> {
        Ok(ask::Plan {
            name: args.model.clone(),
            model: model_file(&args.model, &args.data_dir.path())?,
            options: EngineOptions { threads: args.threads, ..EngineOptions::default() },
            samples: vec![(0.0, 1), (PROBE, 3), (VOTE, VOTES as u32)],
            max_tokens: LONGEST,
        })
    };
    if args.generate {
        let plan = ask()?;
        let bar = crate::cli::policy::fit::bar("asking", tasks.len());
        let said = ask::ask(&plan, &tasks, &|| bar.inc(1));
        bar.finish_and_clear();
        answers::write(&args.answers, &said?)?;
    }
    if args.verify {
        let plan = ask()?;
        let mut answers = answers::read(&args.answers)?;
        let bar = crate::cli::policy::fit::bar("verifying", tasks.len());
        let said = ask::verify(&plan, &tasks, &mut answers, &|| bar.inc(1));
        bar.finish_and_clear();
        said?;
        answers::write(&args.answers, &answers)?;
    }
    let how = How { prices: Some(crate::cli::policy::fit::prices(args.prices.as_deref())?), ..How::default() };
    let matrices: Vec<Matrix> = args.data.iter().map(|file| Matrix::read(file, &how)).collect::<Result<_, _>>()?;
    let bar = crate::cli::policy::fit::bar("replaying", 22 + 2 * matrices.len());
    let plan = cascade::Plan { answers: args.answers, splits: args.splits, steps: 20, seed: args.seed };
    let report = cascade::run(plan, &matrices, &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report?;
    publish(&report, &report.markdown(), "cascade", &args.output)
}
