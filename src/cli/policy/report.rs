//! `weir policy check`: every finding of every file.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{Common, fancy, load};
use crate::{
    cascade::calibration::Guarantee,
    policy::{BOUNDS_TOKENS, Bounds, Diagnostic, Diagnostics, Guaranteed, Policy, Severity},
};

/// One file's result, for `--json`.
#[derive(Serialize)]
struct Checked {
    file: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
    diagnostics: Vec<Diagnostic>,
    /// Of the file's `plans`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    plans: Vec<Planned>,
    /// Of gates that keep a bound on what they accept wrongly.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    guarantees: Vec<Guaranteed>,
}

/// What a plan may come to.
#[derive(Serialize)]
struct Planned {
    name: String,
    plan: String,
    calls_at_most: u32,
    /// Absent without a fleet, as prices are the fleet's.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<Cost>,
}

#[derive(Serialize)]
struct Cost {
    at_most_usd: f64,
    /// Of the prompt, and of each answer that its plan does not bound.
    tokens: u32,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    files: Vec<Checked>,
}

pub(super) fn check(files: &[PathBuf], common: &Common) -> anyhow::Result<ExitCode> {
    let mut report = Report { ok: true, files: Vec::new() };
    for file in files {
        let mut checked = Checked {
            file: file.display().to_string(),
            ok: true,
            policy: None,
            hash: None,
            unreadable: None,
            diagnostics: Vec::new(),
            plans: Vec::new(),
            guarantees: Vec::new(),
        };
        match load(file, common) {
            Ok(Ok(policy)) => {
                checked.policy = Some(policy.name().to_owned());
                checked.hash = Some(policy.hash().to_string());
                checked.diagnostics.clone_from(&policy.warnings().0);
                checked.plans = planned(&policy, common.config.is_some());
                checked.guarantees = policy.guarantees().to_vec();
            }
            Ok(Err(Diagnostics(found))) => {
                checked.ok = false;
                checked.diagnostics = found;
            }
            // One file that cannot be read does not keep the others from being checked.
            Err(error) => {
                checked.ok = false;
                checked.unreadable = Some(format!("{error:#}"));
            }
        }
        report.ok &= checked.ok;
        report.files.push(checked);
    }
    if common.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(ExitCode::from(u8::from(!report.ok)))
}

fn planned(policy: &Policy, priced: bool) -> Vec<Planned> {
    let cost = |b: &Bounds| Cost { at_most_usd: b.cost_at_most_usd, tokens: BOUNDS_TOKENS };
    let of = |b: Bounds| Planned {
        cost: priced.then(|| cost(&b)),
        name: b.name,
        plan: b.plan,
        calls_at_most: b.calls_at_most,
    };
    policy.bounds().into_iter().map(of).collect()
}

fn print(report: &Report) {
    let fancy = fancy();
    for file in &report.files {
        let count = |severity| file.diagnostics.iter().filter(|d| d.severity == severity).count();
        let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
        if !file.diagnostics.is_empty() {
            say!("{}\n", Diagnostics(file.diagnostics.clone()).render(fancy));
        }
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        match (&file.unreadable, &file.policy) {
            (Some(error), _) => say!("{}: {error}", file.file),
            (None, Some(policy)) if warnings == 0 => say!("{}: fine (policy {policy})", file.file),
            (None, Some(policy)) => say!("{}: fine (policy {policy}), {}", file.file, plural(warnings, "warning")),
            (None, None) => say!("{}: {}", file.file, plural(errors, "error")),
        }
        let width = file.plans.iter().map(|p| p.name.chars().count()).max().unwrap_or(0);
        for p in &file.plans {
            let cost = p
                .cost
                .as_ref()
                .map_or_else(String::new, |c| format!(", ${:.6} for a prompt of {} tokens", c.at_most_usd, c.tokens));
            say!("  {:width$}  {}: at most {}{cost}", p.name, p.plan, plural(p.calls_at_most as usize, "call"));
        }
        for g in &file.guarantees {
            let Guarantee { max_error, confidence, accepted, wrong, of, coverage, .. } = &g.guarantee;
            say!(
                "  {}: {} keeps at most {} % of what it accepts wrong, with confidence {confidence}: it accepts {:.0} % of answers, \
                 {accepted} of the {of} that tested it, {wrong} of them wrong",
                g.at,
                g.condition,
                max_error * 100.0,
                coverage * 100.0
            );
        }
    }
}
