//! `weir replay estimate`: off-policy estimates from a file of logged decisions, of weir or of any other router.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use serde::Deserialize;

use crate::replay::estimate::{Asked, Estimate, Estimates, Estimator, Row, session};

#[derive(Debug, clap::Args)]
#[command(after_help = "Each line is an object:
  {\"session\": \"s1\", \"propensity\": 0.25, \"target\": 0.9, \"reward\": 0.5}
  propensity    probability of the arm that was taken, as logged; above 0
  target        probability that the other policy gives to that arm
  reward        what came of it; absent or null where nobody said
  session       rows of one session are drawn together; by default every row is its own
  observed      probability that such a row's reward is seen; 1 by default
  model_taken   a reward model's value of the arm that was taken,
  model_target  and its mean under the other policy; both or none

Example:
  weir replay estimate decisions.jsonl --rewards 0..1 --max-weight 20")]
pub struct EstimateArgs {
    /// A file of JSON lines
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Least and greatest reward that there can be
    #[arg(long, value_name = "LOW..HIGH", default_value = "0..1", value_parser = range, allow_hyphen_values = true)]
    rewards: (f64, f64),
    /// Greatest weight that any arm can have, e.g. 1 / min_propensity: with it, IPS has a Bernstein interval
    #[arg(long, value_name = "W")]
    max_weight: Option<f64>,
    /// Greatest weight of clipped IPS
    #[arg(long, value_name = "W", default_value_t = 10.0)]
    clip: f64,
    /// Weight above which switch-DR trusts the model
    #[arg(long, value_name = "W", default_value_t = 10.0)]
    switch: f64,
    /// Bootstrap resamples; 0 for no intervals
    #[arg(long, value_name = "N", default_value_t = 2000)]
    resamples: usize,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

fn range(text: &str) -> Result<(f64, f64), String> {
    let numbers = text.split_once("..").and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
    match numbers {
        Some((low, high)) if low < high && f64::is_finite(low) && f64::is_finite(high) => Ok((low, high)),
        _ => Err("two numbers are expected, the lower first, e.g. 0..1".to_owned()),
    }
}

/// A line as users write it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    session: Option<String>,
    propensity: f64,
    target: f64,
    #[serde(default)]
    reward: Option<f64>,
    observed: Option<f64>,
    model_taken: Option<f64>,
    model_target: Option<f64>,
}

impl Line {
    /// As the estimators need it; `number` counts from 1.
    fn row(&self, number: u64) -> Result<(Row, bool), String> {
        let Line { propensity, target, .. } = *self;
        if !(propensity > 0.0 && propensity <= 1.0) {
            return Err(format!(
                "`propensity` is {propensity}; what was taken had a probability above 0 and at most 1"
            ));
        }
        if !(0.0..=1.0).contains(&target) {
            return Err(format!("`target` is {target}; a probability is expected"));
        }
        if self.model_taken.is_some() != self.model_target.is_some() {
            return Err("`model_taken` and `model_target` come together".to_owned());
        }
        let session = self.session.as_deref().map_or(number, session);
        let row = Row {
            session,
            weight: target / propensity,
            reward: self.reward,
            observed: self.observed.unwrap_or(1.0),
            model_taken: self.model_taken.unwrap_or(0.0),
            model_target: self.model_target.unwrap_or(0.0),
        };
        Ok((row, self.model_taken.is_some()))
    }
}

pub fn run(args: &EstimateArgs) -> anyhow::Result<ExitCode> {
    let name = args.file.display();
    let asked = Asked {
        clip: args.clip,
        switch: args.switch,
        rewards: args.rewards,
        max_weight: args.max_weight.unwrap_or(f64::INFINITY),
        resamples: args.resamples,
        ..Asked::default()
    };
    let mut estimator = Estimator::new(asked);
    let file = BufReader::new(File::open(&args.file).with_context(|| name.to_string())?);
    // Whether there is a model; every row must agree with the first.
    let mut model = None;
    for (line, number) in file.lines().zip(1u64..) {
        let line = line.with_context(|| format!("{name}: line {number}"))?;
        if line.trim().is_empty() {
            continue;
        }
        let parsed: Line = serde_json::from_str(&line).map_err(|e| anyhow::anyhow!("{name}: line {number}: {e}"))?;
        let (row, modelled) = parsed.row(number).map_err(|e| anyhow::anyhow!("{name}: line {number}: {e}"))?;
        anyhow::ensure!(
            *model.get_or_insert(modelled) == modelled,
            "{name}: line {number}: some rows have `model_taken` and others have not; a model says something of all or of none"
        );
        if let Some(limit) = args.max_weight.filter(|limit| row.weight > *limit) {
            anyhow::bail!("{name}: line {number}: its weight {} is above --max-weight {limit}", row.weight);
        }
        estimator.take(&row).map_err(|e| match e {
            crate::replay::estimate::EstimateError::Row { what, .. } => {
                anyhow::anyhow!("{name}: line {number}: {what}; say --rewards LOW..HIGH if rewards have another range")
            }
            other => anyhow::anyhow!("{name}: {other}"),
        })?;
    }
    let model = model.with_context(|| format!("{name}: is empty"))?;
    let estimates = estimator.finish().with_context(|| name.to_string())?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&estimates)?);
    } else {
        say!("{}", table(&estimates, model).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// The estimates for people; those by a reward model where there is one.
pub fn table(e: &Estimates, model: bool) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let _ = writeln!(out, "{} decisions, {} with a reward", e.rows, e.rewarded);
    let _ = writeln!(
        out,
        "effective sample size {:.0}, mean weight {:.3}, greatest {:.2}\n",
        e.effective, e.overlap, e.greatest_weight
    );
    let mut line = |name: &str, of: Estimate| {
        let interval = of.interval.map_or_else(String::new, |(low, high)| format!("  {low:.4} to {high:.4}"));
        let _ = writeln!(out, "{name:<12}{:>8.4}{interval}", of.value);
    };
    line("IPS", e.ips);
    line("clipped IPS", e.clipped);
    line("SNIPS", e.snips);
    if model {
        line("DM", e.dm);
        line("DR", e.dr);
        line("switch-DR", e.switch_dr);
    }
    if let Some((low, high)) = e.bernstein {
        let _ = writeln!(out, "{:<12}{:>8}  {low:.4} to {high:.4}  (IPS, holds at every size)", "Bernstein", "");
    }
    if e.effective < 200.0 {
        let _ = writeln!(
            out,
            "\nThe log is worth {:.0} decisions of the other policy only: bootstrap intervals may be too narrow.",
            e.effective
        );
    }
    if (e.overlap - 1.0).abs() > 0.2 {
        let _ = writeln!(
            out,
            "\nThe mean weight should be about 1: either propensities are not exact, or the log lacks what the other policy does."
        );
    }
    out
}
