//! `weir policy fit --cascade SCORE --stages …`: the thresholds of a whole cascade under a cap on its cost.

use std::{fmt::Write as _, path::Path, process::ExitCode};

use anyhow::Context as _;
use serde_json::json;

use crate::{
    domain::Score,
    fit::{
        gate::Answer,
        stages::{self, Cascade},
    },
};

/// What is searched.
pub(super) struct Search<'a> {
    pub score: Score,
    pub models: &'a [String],
    pub cap: f64,
    pub costs: &'a [f64],
    pub seed: u64,
}

pub(super) fn run(search: &Search<'_>, answers: &[Answer], out: &Path, as_json: bool) -> anyhow::Result<ExitCode> {
    let Search { score, models, cap, costs, seed } = *search;
    anyhow::ensure!(
        !matches!(score, Score::Learned(_) | Score::Disagreement),
        "--stages wants a score that each stage's answer has, such as mean_logprob; `{score}` is none"
    );
    anyhow::ensure!(costs.is_empty() || costs.len() == models.len(), "--costs wants one amount per stage");
    let questions = stages::questions(answers, models, score, costs)?;
    let found = stages::fit(&questions, models, score, cap, seed)?;
    let yaml = plan(&found, score);
    std::fs::write(out, &yaml).with_context(|| format!("cannot write {}", out.display()))?;
    let alone = stages::alone(&questions, models);
    if as_json {
        let alone: Vec<_> =
            alone.iter().map(|(model, right, usd)| json!({"model": model, "right": right, "usd": usd})).collect();
        let document = json!({
            "ok": true, "out": out, "score": score.to_string(), "questions": questions.len(), "cost_cap": cap,
            "cascade": found, "alone": alone,
        });
        say!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(ExitCode::SUCCESS);
    }
    say!("{} questions; at most ${cap} an answer, by {score}:\n\n{yaml}", questions.len());
    for (stage, share) in found.stages.iter().zip(&found.answered) {
        say!("{} answers {:.1} %", stage.model, share * 100.0);
    }
    say!(
        "\n{:.1} % right at ${:.6} an answer; judged on questions that had no part in it {:.1} % at ${:.6}",
        found.right * 100.0,
        found.usd,
        found.right_held_out * 100.0,
        found.usd_held_out
    );
    for (model, right, usd) in alone {
        say!("{model} alone: {:.1} % at ${usd:.6}", right * 100.0);
    }
    Ok(ExitCode::SUCCESS)
}

/// The plan as a policy has it.
fn plan(found: &Cascade, score: Score) -> String {
    let (name, q) = match score {
        Score::LogprobQuantile(q) => ("logprob_quantile".to_owned(), format!(", q: {q}")),
        other => (other.to_string(), String::new()),
    };
    let side = if score.high_is_sure() { "above" } else { "below" };
    let quoted = |model: &str| json!(model).to_string();
    if let [only] = &found.stages[..] {
        return format!("plans:\n  fitted: {{call: {}}}\n", quoted(&only.model));
    }
    let mut out = "plans:\n  fitted:\n    cascade:\n".to_owned();
    for stage in &found.stages {
        let gate =
            stage.threshold.map(|threshold| format!(", accept_when: [{{score: {name}{q}, {side}: {threshold}}}]"));
        let _ = writeln!(out, "      - {{call: {}{}}}", quoted(&stage.model), gate.unwrap_or_default());
    }
    out
}
