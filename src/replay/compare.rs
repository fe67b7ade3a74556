//! Two reports of `weir replay --json` side by side, and conditions under which a change is not to go in.
//!
//! A condition is a CEL expression over the figures of one policy: `score < baseline.score - 0.01`. `baseline` has the same
//! figures from the first report; where the condition names one figure only, `baseline` alone is that figure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cel::{Context, Program, Value};
use serde::Serialize;

/// Figures of a policy by name.
pub type Figures = BTreeMap<&'static str, f64>;

/// Why reports cannot be compared.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GateError {
    #[error("{0}: is no report of `weir replay --json`: {1}")]
    Report(String, String),
    #[error("the condition `{condition}` {what}")]
    Condition { condition: String, what: String },
}

/// A policy in both reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    pub policy: String,
    pub baseline: Figures,
    pub now: Figures,
    /// Conditions that hold.
    pub failed: Vec<String>,
}

/// What became of all policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    pub pairs: Vec<Pair>,
    /// In one report only.
    pub gone: Vec<String>,
    pub new: Vec<String>,
}

impl Comparison {
    pub fn failed(&self) -> bool {
        self.pairs.iter().any(|p| !p.failed.is_empty())
    }
}

/// The figures of each policy in a report, over outcomes or from a log.
///
/// # Errors
/// When the text is no such report, or has no figures.
pub fn figures(file: &str, text: &str) -> Result<BTreeMap<String, Figures>, GateError> {
    let wrong = |what: String| GateError::Report(file.to_owned(), what);
    let report: serde_json::Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
    let policies = report["policies"].as_array().ok_or_else(|| wrong("it has no `policies`".to_owned()))?;
    let mut out = BTreeMap::new();
    for policy in policies {
        let name = policy["name"].as_str().or_else(|| policy["policy"].as_str());
        let name = name.ok_or_else(|| wrong("a policy has no name".to_owned()))?;
        let places = [
            ("score", "/mean_score"),
            ("cost_usd", "/mean_cost_usd"),
            ("gain", "/gain"),
            ("pgr", "/pgr"),
            ("refused", "/refused"),
            ("reward", "/estimates/dr/value"),
            ("reward_low", "/estimates/dr/interval/0"),
            ("reward_high", "/estimates/dr/interval/1"),
            ("effective", "/estimates/effective"),
            ("reward_by_session", "/by_session/reward/value"),
            ("cost_usd", "/measured/cost_usd/value"),
            ("joules", "/measured/joules/value"),
            ("p90_ms", "/latency_ms/p90"),
            ("p90_ms", "/measured/latency_ms/p90"),
            ("calibration", "/calibration/error"),
        ];
        let found = places.into_iter().filter_map(|(name, at)| Some((name, policy.pointer(at)?.as_f64()?)));
        let figures: Figures = found.collect();
        if figures.is_empty() {
            let why = policy["no_estimate"].as_str().unwrap_or("nothing was measured of it");
            return Err(wrong(format!("the policy {name} has no figures: {why}")));
        }
        if out.insert(name.to_owned(), figures).is_some() {
            return Err(wrong(format!("the policy {name} is in it twice")));
        }
    }
    Ok(out)
}

/// Compares `now` with `baseline`, policy by policy.
///
/// # Errors
/// When a condition is no CEL, names a figure that a report does not have, or is neither true nor false.
pub fn compare(
    baseline: &BTreeMap<String, Figures>,
    now: &BTreeMap<String, Figures>,
    conditions: &[String],
) -> Result<Comparison, GateError> {
    let missing = |of: &BTreeMap<String, Figures>, from: &BTreeMap<String, Figures>| -> Vec<String> {
        of.keys().filter(|name| !from.contains_key(*name)).cloned().collect()
    };
    let mut out = Comparison { pairs: Vec::new(), gone: missing(baseline, now), new: missing(now, baseline) };
    for (name, now) in now {
        let Some(before) = baseline.get(name) else { continue };
        let mut failed = Vec::new();
        for condition in conditions {
            if holds(condition, before, now)? {
                failed.push(condition.clone());
            }
        }
        out.pairs.push(Pair { policy: name.clone(), baseline: before.clone(), now: now.clone(), failed });
    }
    Ok(out)
}

fn holds(condition: &str, baseline: &Figures, now: &Figures) -> Result<bool, GateError> {
    let wrong = |what: String| GateError::Condition { condition: condition.to_owned(), what };
    let program = Program::compile(condition).map_err(|e| wrong(format!("is no CEL: {e}")))?;
    let named: BTreeSet<String> = program.references().variables().into_iter().map(str::to_owned).collect();
    let known: Vec<&str> = now.keys().copied().collect();
    let figures: Vec<&String> = named.iter().filter(|n| *n != "baseline").collect();
    for name in &figures {
        if !now.contains_key(name.as_str()) {
            return Err(wrong(format!("names `{name}`; there are {} and baseline", known.join(", "))));
        }
    }
    let mut context = Context::default();
    for (name, figure) in now {
        context.add_variable_from_value(*name, *figure);
    }
    let members: HashMap<String, Value> = baseline.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
    match (condition.contains("baseline."), &figures[..]) {
        (true, _) => context.add_variable_from_value("baseline", members),
        (false, [one]) => match baseline.get(one.as_str()) {
            Some(figure) => context.add_variable_from_value("baseline", *figure),
            None => return Err(wrong(format!("names `{one}`, which the first report does not have"))),
        },
        (false, _) if named.contains("baseline") => {
            return Err(wrong("names several figures: say which of the baseline's, as in `baseline.score`".to_owned()));
        }
        (false, _) => {}
    }
    match program.execute(&context) {
        Ok(Value::Bool(holds)) => Ok(holds),
        Ok(other) => Err(wrong(format!("is {other:?}, true or false is expected"))),
        Err(e) => Err(wrong(format!("cannot be evaluated: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(score: f64, cost: f64) -> BTreeMap<String, Figures> {
        let text =
            serde_json::json!({"policies": [{"name": "p", "mean_score": score, "mean_cost_usd": cost}]}).to_string();
        figures("r.json", &text).unwrap()
    }

    #[test]
    fn conditions_are_about_a_policy_and_its_baseline() {
        let (before, now) = (report(0.8, 1e-3), report(0.78, 5e-4));
        let failed = |condition: &str| compare(&before, &now, &[condition.to_owned()]).map(|c| c.failed());
        assert_eq!(failed("score < baseline - 0.01"), Ok(true));
        assert_eq!(failed("score < baseline - 0.03"), Ok(false));
        assert_eq!(failed("score < baseline.score - 0.01 && cost_usd > baseline.cost_usd"), Ok(false));
        assert_eq!(failed("cost_usd > 0.0004"), Ok(true));
        let says = |condition: &str| failed(condition).unwrap_err().to_string();
        assert!(says("scroe < baseline").contains("names `scroe`; there are cost_usd, score and baseline"));
        assert!(says("score < baseline && cost_usd > 1.0").contains("say which of the baseline's"));
        assert!(says("score +").contains("is no CEL"));
        assert!(says("score - 0.1").contains("true or false is expected"));
        assert!(says("score < baseline.reward").contains("cannot be evaluated"));
    }

    #[test]
    fn reports_that_are_none_are_refused() {
        let says = |text: &str| figures("r.json", text).unwrap_err().to_string();
        assert!(says("{").starts_with("r.json: is no report"));
        assert!(says("{}").contains("no `policies`"));
        assert!(says(r#"{"policies": [{"policy": "p", "no_estimate": "no overlap"}]}"#).contains("no overlap"));
        assert!(says(r#"{"policies": [{"name": "p", "gain": 1}, {"name": "p", "gain": 1}]}"#).contains("twice"));
        let log = r#"{"policies": [{"policy": "p", "estimates": {"effective": 5, "dr": {"value": 0.5, "interval": [0.4, 0.6]}}}]}"#;
        assert_eq!(figures("r.json", log).unwrap()["p"]["reward_high"], 0.6);
    }
}
