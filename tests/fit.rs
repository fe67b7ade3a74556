//! `weir policy fit` as a data scientist uses it: from a file of outcomes to a policy that decides by it.

use std::{path::Path, sync::Arc};

use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray},
    datatypes::{DataType, Field, Schema},
};
use serde_json::Value;

use crate::support::{test_home, weir};

/// Outcomes of models on questions of two kinds: `weak` knows capitals only, `strong` everything, at ten times the price.
pub(crate) fn outcomes(path: &Path, models: &[&str], from: usize, to: usize) {
    write(path, &batch(models, from, to));
}

/// A file of these rows.
pub(crate) fn write(path: &Path, rows: &RecordBatch) {
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, rows.schema(), None).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
}

/// The rows of such a file.
pub(crate) fn batch(models: &[&str], from: usize, to: usize) -> RecordBatch {
    let (mut ids, mut tasks, mut queries, mut names) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut scores, mut costs) = (Vec::new(), Vec::new());
    for n in from..to {
        let hard = n % 2 == 1;
        for model in models {
            ids.push(n.to_string());
            tasks.push(if hard { "sums" } else { "capitals" });
            queries.push(match hard {
                true => format!("What is {n} times {} plus {}? Show every step of the calculation.", n + 7, 3 * n),
                false => format!("Name the capital of country {n}."),
            });
            names.push((*model).to_owned());
            scores.push(if *model == "weak" && hard || *model == "counter" && !hard { 0.0 } else { 1.0 });
            costs.push(if *model == "strong" { 0.01 } else { 0.001 });
        }
    }
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    let number = |name: &str| Field::new(name, DataType::Float64, false);
    let schema = Schema::new(vec![
        text("query_id"),
        text("task"),
        text("query"),
        text("model"),
        number("score"),
        number("cost_usd"),
    ]);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(ids)),
        Arc::new(StringArray::from(tasks)),
        Arc::new(StringArray::from(queries)),
        Arc::new(StringArray::from(names)),
        Arc::new(Float64Array::from(scores)),
        Arc::new(Float64Array::from(costs)),
    ];
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

fn policy(args: &[&str]) -> (i32, String, String) {
    let home = test_home();
    weir::run(&[&["policy"], args, &["--data-dir", home.to_str().unwrap()]].concat())
}

pub(crate) fn document(out: (i32, String, String)) -> Value {
    assert_eq!(out.0, 0, "{}{}", out.1, out.2);
    serde_json::from_str(&out.1).unwrap_or_else(|e| panic!("{e}: {}", out.1))
}

/// The arm that a policy file takes for a prompt.
fn arm(file: &Path, prompt: &str) -> String {
    let explained = document(policy(&["explain", file.to_str().unwrap(), "--prompt", prompt, "--json"]));
    explained["decision"]["arm"].as_str().unwrap().to_owned()
}

const SUM: &str = "What is 1234 times 77 plus 12? Show every step of the calculation.";
const CAPITAL: &str = "Name the capital of country 900.";

#[test]
fn an_artifact_is_fitted_named_by_its_hash_and_decides() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    outcomes(&at("outcomes.parquet"), &["weak", "strong"], 0, 120);
    for selector in ["ridge", "graph"] {
        let artifact = at(&format!("{selector}.safetensors"));
        let (data, out) = (at("outcomes.parquet"), artifact.to_str().unwrap().to_owned());
        let fit =
            ["fit", "--selector", selector, "--data", data.to_str().unwrap(), "--out", &out, "--seeds", "2", "--json"];
        let fitted = document(policy(&fit));
        let metrics = &fitted["card"]["metrics"];
        assert!(metrics["aiq"].as_f64() > metrics["aiq_zero_router"].as_f64(), "{fitted}");
        assert!(metrics["aiq_gain_mean"].as_f64().unwrap() > 0.0, "{fitted}");
        let hash = fitted["hash"].as_str().unwrap();
        // The same outcomes and seed give the same bytes.
        assert_eq!(document(policy(&fit))["hash"], hash);
        let file = at("p.yaml");
        let text = format!(
            "policy: p\nmodels: {{weak: {{name: weak}}, strong: {{name: strong}}}}\nselect:\n  arms: [weak, strong]\n  \
             {selector}: {{artifact: {selector}.safetensors, hash: {hash}, cost_weight: 0.02, cost_scale: 0.001}}\n  \
             min_propensity: 0.001\n  no_embedding: strong\n"
        );
        std::fs::write(&file, &text).unwrap();
        assert_eq!((arm(&file, SUM), arm(&file, CAPITAL)), ("strong".into(), "weak".into()), "{selector}");
        // Another file under that name is noticed.
        std::fs::write(&file, text.replace(hash, &"0f".repeat(32))).unwrap();
        let (code, said, _) = policy(&["check", file.to_str().unwrap()]);
        assert!(code == 1 && said.contains("has the hash") && said.contains(hash), "{said}");
    }

    // A model enters the graph by some observations.
    outcomes(&at("few.parquet"), &["weak", "counter"], 200, 240);
    let (data, graph, grown) = (at("few.parquet"), at("graph.safetensors"), at("grown.safetensors"));
    let [data, graph, grown] = [data, graph, grown].map(|p| p.to_str().unwrap().to_owned());
    let extended = document(policy(&["fit", "--extend", &graph, "--data", &data, "--out", &grown, "--json"]));
    assert_eq!(extended["card"]["models"], serde_json::json!(["strong", "weak", "counter"]), "{extended}");
    let (code, _, err) = policy(&["fit", "--extend", &grown, "--data", &data, "--out", &grown]);
    assert!(code == 1 && err.contains("already"), "{err}");
}

#[test]
fn a_bandit_is_warmed_up_by_outcomes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    outcomes(&at("outcomes.parquet"), &["weak", "strong"], 0, 120);
    let cold = "policy: p\nmodels: {weak: {name: weak}, strong: {name: strong}}\nselect:\n  arms: [weak, strong]\n  linucb: \
                {alpha: 0.05, feature_ridge: 1}\n  features: [tokens, complexity]\nreward:\n  quality: {weight: 1, from: feedback.score}\n  \
                cost_usd: {weight: -0.2, scale: 0.01}\n";
    let file = at("p.yaml");
    std::fs::write(&file, cold).unwrap();
    let (data, out, yaml) = (at("outcomes.parquet"), at("warm.safetensors"), file.to_str().unwrap().to_owned());
    let fit =
        ["fit", "--warm-start", &yaml, "--data", data.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json"];
    let fitted = document(policy(&fit));
    let hash = fitted["hash"].as_str().unwrap();
    let warm = cold.replace(
        "reward:",
        &format!("  warm_start: {{artifact: warm.safetensors, hash: {hash}, pulls: 5000}}\nreward:"),
    );
    std::fs::write(&file, &warm).unwrap();
    let likely = |prompt: &str| {
        let explained = document(policy(&["explain", &yaml, "--prompt", prompt, "--json"]));
        let candidates = explained["decision"]["candidates"].as_array().unwrap().clone();
        candidates.iter().find(|c| c["propensity"].as_f64() > Some(0.9)).map(|c| c["arm"].as_str().unwrap().to_owned())
    };
    assert_eq!((likely(SUM), likely(CAPITAL)), (Some("strong".into()), Some("weak".into())));
    // It can be fitted again by the policy that uses it, and not with other features.
    assert_eq!(document(policy(&fit))["hash"], hash);
    std::fs::write(&file, warm.replace("[tokens, complexity]", "[tokens]")).unwrap();
    let (code, said, _) = policy(&["check", &yaml]);
    assert!(code == 1 && said.contains("fitted with the features tokens, complexity"), "{said}");
}

#[test]
fn outcomes_that_cannot_be_used_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("o.parquet");
    outcomes(&data, &["weak", "strong"], 0, 12);
    let args =
        |data: &Path| policy(&["fit", "--selector", "ridge", "--data", data.to_str().unwrap(), "--out", "/dev/null"]);
    let (code, _, err) = args(&data);
    assert!(code == 1 && err.contains("too few to fit on"), "{err}");
    std::fs::write(&data, "query,model\n").unwrap();
    let (code, _, err) = args(&data);
    assert!(code == 1 && err.contains("is neither Parquet nor JSON lines"), "{err}");
    let (code, _, err) = args(&dir.path().join("none.parquet"));
    assert!(code == 1 && err.contains("cannot be read"), "{err}");
    assert_eq!(weir::run(&["policy", "fit", "--data", "x", "--out", "y"]).0, 2);
}

#[test]
fn a_cascade_is_fitted_under_a_cap_on_its_cost_and_is_a_plan_as_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, out, file) = (at("answers.jsonl"), at("fitted.yaml"), at("policy.yaml"));
    let mut lines = String::new();
    for task in 0..300 {
        // The small model shows of what it is wrong, the large one is always right.
        for (model, right, cost) in [("small", task % 3 > 0, 0.001), ("large", true, 0.01)] {
            let entropy = if right { 0.1 } else { 1.5 } + f64::from(task) * 1e-4;
            let scores = serde_json::json!([{"score": "mean_token_entropy", "value": entropy}]);
            lines += &serde_json::json!({"model": model, "task": task.to_string(), "correct": right, "cost_usd": cost,
                "scores": scores})
            .to_string();
            lines.push('\n');
        }
    }
    std::fs::write(&data, lines).unwrap();
    let fit = |score: &str, cap: &str| {
        let args = ["fit", "--cascade", score, "--stages", "small,large", "--cost-cap", cap, "--data", &data, "--out"];
        policy(&[&args[..], &[&out, "--json"]].concat())
    };
    let fitted = document(fit("mean_token_entropy", "0.005"));
    let cascade = &fitted["cascade"];
    assert_eq!((cascade["right"].as_f64(), fitted["questions"].as_u64()), (Some(1.0), Some(300)));
    assert!(cascade["usd"].as_f64() < Some(0.005) && cascade["right_held_out"].as_f64() > Some(0.95), "{cascade}");
    let plan = std::fs::read_to_string(&out).unwrap();
    let yaml = format!(
        "policy: p\nmodels: {{small: {{name: s}}, large: {{name: l}}}}\n{plan}select: {{arms: [fitted], static: fitted}}\n"
    );
    std::fs::write(&file, yaml).unwrap();
    let (code, said, err) = policy(&["check", &file]);
    assert!(code == 0 && said.contains("cascade(small if mean_token_entropy < "), "{said}{err}");
    // Less money than half of the questions need, and than any.
    let spent = document(fit("mean_token_entropy", "0.003"))["cascade"]["usd"].as_f64().unwrap();
    assert!(spent <= 0.003, "{spent}");
    let (code, _, err) = fit("mean_token_entropy", "0.0005");
    assert!(code == 1 && err.contains("even the cheapest of small, large costs more"), "{err}");
    let (code, _, err) = fit("learned", "0.005");
    assert!(code == 1 && err.contains("wants a score that each stage's answer has"), "{err}");
}
