//! `weir policy fit --cascade`: a gate's calibration from answers that are known to be right or wrong.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

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
    /// With --cascade: say what threshold keeps this share of accepted answers wrong at most
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, requires = "cascade")]
    max_error: f64,
    /// With --cascade: the confidence of that, over draws of the answers
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, requires = "cascade")]
    confidence: f64,
}

pub(super) fn run(
    score: Score,
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
    let fitted = gate::calibrate(score, &answers, &args.models, &args.passed, seed)?;
    let guarantee = fitted.calibration.guaranteed(args.max_error, args.confidence)?;
    let bytes = serde_json::to_vec(&fitted.calibration)?;
    std::fs::write(out, &bytes).with_context(|| format!("cannot write {}", out.display()))?;
    let hash = Hash::of(&bytes);
    let wrong = fitted.calibration.points().iter().filter(|point| point.wrong).count();
    if as_json {
        let document = json!({
            "ok": true, "artifact": out, "hash": hash, "score": score.to_string(),
            "models": fitted.calibration.models(), "answers": fitted.calibration.points().len(), "wrong": wrong,
            "left_out": fitted.left_out, "ece": fitted.calibration.ece(), "guarantee": guarantee,
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
    say!("calibration error {:.3}, of the raw score {:.3}", calibration.ece().after, calibration.ece().before);
    say!("{}", said(score, calibration, guarantee.as_ref(), args));
    say!("\nIn a policy, beside it: {{score: p_wrong, max_error: {}, calibration: {}}}", args.max_error, name(out));
    Ok(ExitCode::SUCCESS)
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
