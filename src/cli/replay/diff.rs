//! `weir replay diff`: two reports side by side, for pull requests.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;

use crate::replay::compare::{Comparison, compare, figures};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  weir replay --data outcomes.parquet --policy policies/*.yaml --json > after.json
  weir replay diff before.json after.json --fail-if 'score < baseline - 0.01'

Figures over outcomes: score, cost_usd, gain, pgr, refused; from a log: reward, reward_low, reward_high, effective,
reward_by_session, cost_usd, joules; from either, where there are times or expectations: p90_ms, calibration. With
several in one condition, say baseline.score and so on. Ends with 1 where a condition holds or a policy is gone.")]
pub struct DiffArgs {
    /// The report to compare with
    #[arg(value_name = "BASELINE")]
    baseline: PathBuf,
    /// The report of the change
    #[arg(value_name = "NOW")]
    now: PathBuf,
    /// A CEL condition under which the change is not to go in; may be given several times
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<String>,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: &DiffArgs) -> anyhow::Result<ExitCode> {
    let read = |path: &Path| -> anyhow::Result<_> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(figures(&path.display().to_string(), &text)?)
    };
    let comparison = compare(&read(&args.baseline)?, &read(&args.now)?, &args.fail_if)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print(&comparison);
    }
    Ok(ExitCode::from(u8::from(comparison.failed() || !comparison.gone.is_empty())))
}

fn print(comparison: &Comparison) {
    for pair in &comparison.pairs {
        say!("{}", pair.policy);
        for (name, now) in &pair.now {
            match pair.baseline.get(name) {
                Some(before) => say!("  {name:<12}{before:>12.6} -> {now:>12.6}  {:+.6}", now - before),
                None => say!("  {name:<12}{:>12} -> {now:>12.6}", "-"),
            }
        }
        for condition in &pair.failed {
            say!("  fails       {condition}");
        }
    }
    for name in &comparison.gone {
        say!("{name}\n  fails       it is not in the second report");
    }
    for name in &comparison.new {
        say!("{name}\n  is new");
    }
}
