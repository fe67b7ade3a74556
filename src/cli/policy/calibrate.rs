//! `weir policy fit --cascade`: a gate's calibration from answers that are known to be right or wrong.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::stages::{self, Search};
use crate::{
    cascade::calibration::{Calibration, Guarantee},
    domain::{Hash, Score},
    fit::gate::{self, Passed},
};

/// What of the answers counts, and what is said of the result.
#[derive(Debug, Args)]
pub(super) struct GateArgs {
    /// With --cascade: only answers of this model, as the fleet names it; may be given several times [default: all]
    #[arg(long = "model", value_name = "NAME", requires = "cascade")]
    models: Vec<String>,
    /// With --cascade: only answers that pass this gate, which stands before the calibrated one, e.g. "mean_margin > 0.2"; may be
    /// given several times
    #[arg(long, value_name = "CONDITION", requires = "cascade")]
    passed: Vec<Passed>,
    /// With --cascade: only answers that were drawn at this temperature, where the data has several of one question: answers that
    /// count have to be independent
    #[arg(long, value_name = "NUMBER", requires = "cascade")]
    temperature: Option<f64>,
    /// With --cascade: say what threshold spends at most so many USD an answer on average, for the --costs
    #[arg(long, value_name = "USD", requires = "cascade")]
    cost_cap: Option<f64>,
    /// With --cost-cap: find the thresholds of a cascade of these models, in this order, that answers best within the cap, from
    /// answers of each of them to the same questions (`task`); --out is the plan
    #[arg(long, value_name = "MODEL,MODEL…", value_delimiter = ',', requires = "cost_cap", conflicts_with_all = ["models", "passed"])]
    stages: Vec<String>,
    /// With --cost-cap: mean cost in USD of an answer of the stage's model, and of what it escalates to, e.g. 0.0004,0.01; with
    /// --stages of each stage, unless answers have a `cost_usd`
    #[arg(long, value_name = "USD,USD", value_delimiter = ',', requires = "cost_cap")]
    costs: Vec<f64>,
    /// With --cascade: say what threshold keeps this share of accepted answers wrong at most
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, requires = "cascade")]
    max_error: f64,
    /// With --cascade: the confidence of that, over draws of the answers
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, requires = "cascade")]
    confidence: f64,
}

pub(super) fn run(
    mut score: Score,
    data: &Path,
    out: &PathBuf,
    seed: u64,
    args: &GateArgs,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(data).with_context(|| format!("cannot read {}", data.display()))?;
    let mut answers = gate::read(&text).with_context(|| data.display().to_string())?;
    if let Some(temperature) = args.temperature {
        answers.retain(|answer| answer.temperature == Some(temperature));
        anyhow::ensure!(!answers.is_empty(), "{} has no answer at the temperature {temperature}", data.display());
    }
    if let (Some(cap), false) = (args.cost_cap, args.stages.is_empty()) {
        let search = Search { score, models: &args.stages, cap, costs: &args.costs, seed };
        return stages::run(&search, &answers, out, as_json);
    }
    // Whether a learned score looks at prompts.
    let mut prompts = false;
    if matches!(score, Score::Learned(_)) {
        answers.retain(|answer| args.models.is_empty() || args.models.contains(&answer.model));
        let scorer = gate::learn(&mut answers, seed)?;
        prompts = scorer.asks_prompt();
        score = Score::Learned(scorer);
    }
    let fitted = gate::calibrate(score, &answers, &args.models, &args.passed, seed)?;
    let guarantee = fitted.calibration.guaranteed(args.max_error, args.confidence)?;
    let capped = match (args.cost_cap, &args.costs[..]) {
        (Some(cap), &[own, next]) => Some(capped(&fitted.calibration, cap, own, next)?),
        (Some(_), _) => anyhow::bail!("--cost-cap wants --costs of two amounts, e.g. --costs 0.0004,0.01, or --stages"),
        (None, _) => None,
    };
    let bytes = serde_json::to_vec(&fitted.calibration)?;
    std::fs::write(out, &bytes).with_context(|| format!("cannot write {}", out.display()))?;
    let hash = Hash::of(&bytes);
    let wrong = fitted.calibration.points().iter().filter(|point| point.wrong).count();
    if as_json {
        let document = json!({
            "ok": true, "artifact": out, "hash": hash, "score": score.to_string(),
            "models": fitted.calibration.models(), "answers": fitted.calibration.points().len(), "wrong": wrong,
            "left_out": fitted.left_out, "prompts": prompts, "ece": fitted.calibration.ece(), "guarantee": guarantee, "cost_cap": capped,
        });
        say!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(ExitCode::SUCCESS);
    }
    let calibration = &fitted.calibration;
    say!(
        "{}: {score} of {}, {} answers, {wrong} of them wrong{}",
        out.display(),
        calibration.models().join(", "),
        calibration.points().len(),
        left_out(fitted.left_out)
    );
    if prompts {
        say!("learned from answers and their prompts' signals");
    } else if matches!(score, Score::Learned(_)) {
        say!("learned from answers alone: not each of them has the `signals` or the `query` of its prompt");
    }
    say!("calibration error {:.3}, of the raw score {:.3}", calibration.ece().after, calibration.ece().before);
    say!("{}", said(score, calibration, guarantee.as_ref(), args));
    if let Some(Capped { threshold, accepted, wrong, usd }) = &capped {
        say!(
            "{} {threshold:.6} an answer costs ${usd:.6} on average: {:.0} % of answers are accepted, {:.1} % of them wrong; in a policy \
             {{score: p_wrong, accepted: {accepted}, calibration: {}}}",
            if score.high_is_sure() { "above" } else { "below" },
            accepted * 100.0,
            wrong * 100.0,
            name(out)
        );
    }
    say!("\nIn a policy, beside it: {{score: p_wrong, max_error: {}, calibration: {}}}", args.max_error, name(out));
    Ok(ExitCode::SUCCESS)
}

/// What a cap on the mean cost leaves.
#[derive(Debug, serde::Serialize)]
struct Capped {
    /// In the score's unit.
    threshold: f64,
    /// Share of the calibration's answers, as the policy says it, and the share of these that is wrong.
    accepted: f64,
    wrong: f64,
    /// Mean cost of an answer.
    usd: f64,
}

/// The fewest answers, the surest, that may be accepted where each costs `own`, and `next` more where it is escalated: what is
/// escalated is better answered, so that the cap is used up.
fn capped(calibration: &Calibration, cap: f64, own: f64, next: f64) -> anyhow::Result<Capped> {
    anyhow::ensure!(own >= 0.0 && next > 0.0 && cap.is_finite(), "costs are amounts of USD, the second more than 0");
    let escalated = (cap - own) / next;
    anyhow::ensure!(
        escalated > 0.0,
        "the stage alone costs ${own} an answer, and the cap of ${cap} leaves nothing for more"
    );
    anyhow::ensure!(escalated < 1.0, "${cap} an answer is enough to escalate every one");
    let accepted = ((1.0 - escalated) * 1e4).ceil() / 1e4;
    let threshold = calibration.threshold_accepting(accepted)?;
    let sure = |score: f64| calibration.direction().accepts(score, threshold);
    let passed: Vec<_> = calibration.points().iter().filter(|point| sure(point.score)).collect();
    let share = passed.len() as f64 / calibration.points().len() as f64;
    let wrong = passed.iter().filter(|point| point.wrong).count() as f64 / passed.len().max(1) as f64;
    Ok(Capped { threshold, accepted, wrong, usd: own + (1.0 - share) * next })
}

fn left_out(n: usize) -> String {
    if n == 0 { String::new() } else { format!("; {n} left out, as they have no such score or did not pass") }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn said(score: Score, calibration: &Calibration, guarantee: Option<&Guarantee>, args: &GateArgs) -> String {
    let side = if score.high_is_sure() { "above" } else { "below" };
    let (share, confidence) = (args.max_error * 100.0, args.confidence);
    match guarantee {
        Some(g) => format!(
            "{side} {:.6} at most {share} % are wrong, with confidence {confidence}: {:.0} % of answers are accepted; of the {} that \
             tested it {}, of which {} were wrong (at most {:.1} %)",
            g.threshold,
            g.coverage * 100.0,
            g.of,
            g.accepted,
            g.wrong,
            g.upper_bound * 100.0
        ),
        None => format!(
            "no threshold keeps {share} % with confidence {confidence} by {} answers: calibrate with more, or allow more errors",
            calibration.points().len()
        ),
    }
}
