//! `weir replay` over outcomes: figures that can be had on paper.

use std::{path::Path, sync::Arc};

use serde_json::{Value, json};

use arrow::{
    array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray},
    datatypes::Float64Type,
};

use crate::{
    fit::{self, document, outcomes},
    support::weir,
};

fn close(got: &Value, want: f64) {
    assert!((got.as_f64().unwrap() - want).abs() < 1e-9, "{got} is not {want}");
}

fn write(dir: &Path, name: &str, rest: &str) -> String {
    let file = dir.join(format!("{name}.yaml"));
    let models = "models: {weak: {name: weak}, strong: {name: strong}}";
    std::fs::write(&file, format!("policy: {name}\n{models}\n{rest}")).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn policies_earn_over_outcomes_what_they_earn_on_paper() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("made.parquet");
    outcomes(&data, &["weak", "strong"], 0, 400);
    let even = write(dir.path(), "even", "select: {arms: [weak, strong], weighted: {weak: 1, strong: 1}}\n");
    let rule = write(
        dir.path(),
        "rule",
        "rules:\n  - {name: long, when: signals.tokens > 12, use: strong}\nselect: {arms: [weak, strong], static: weak}\n",
    );
    let bandit = write(
        dir.path(),
        "bandit",
        "select: {arms: [weak, strong], linucb: {alpha: 0.1, feature_ridge: 1}, features: [tokens, complexity]}\nreward: {quality: \
         {weight: 1, from: feedback.score}, cost_usd: {weight: -0.2, scale: 0.01}}\n",
    );
    let replay = |more: &[&str]| {
        let data = data.to_str().unwrap();
        weir::run(&[&["replay", "--data", data, "--seeds", "4", "--policy", &even, &rule, &bandit], more].concat())
    };
    let report = document(replay(&["--json"]));
    let [even, rule, bandit] = &report["policies"].as_array().unwrap()[..] else { panic!("{report}") };
    // A half of everything: on the line between the two models, wherever that is cut.
    close(&even["mean_score"], 0.75);
    close(&even["mean_cost_usd"], 0.0055);
    close(&even["pgr"], 0.5);
    close(&even["zero_router"], 0.75);
    close(&even["gain"], -0.25);
    close(&even["tasks"]["sums"], 0.5);
    close(&even["tasks"]["capitals"], 1.0);
    close(&even["shares"]["weak"], 0.5);
    close(&even["shares"]["strong"], 0.5);
    let (low, high) = (even["interval"][0].as_f64().unwrap(), even["interval"][1].as_f64().unwrap());
    assert!(low < -0.25 && -0.25 < high && high < 0.0, "{even}");
    // What is long is a sum.
    close(&rule["mean_score"], 1.0);
    close(&rule["mean_cost_usd"], 0.0055);
    close(&rule["pgr"], 1.0);
    // It finds out.
    assert!(bandit["mean_score"].as_f64() > Some(0.9) && bandit["gain"].as_f64() < Some(0.0), "{bandit}");
    assert!(bandit["deviation"].as_f64() > Some(0.0), "{bandit}");
    let baselines = report["baselines"].as_array().unwrap();
    let of = |name: &str| baselines.iter().find(|l| l["name"].as_str().unwrap().starts_with(name)).unwrap();
    close(&of("random")["pgr"], 0.5);
    close(&of("random")["zero_router"], 0.75);
    close(&of("always weak")["zero_router"], 0.5);
    close(&of("oracle")["mean_cost_usd"], 0.0055);
    close(&of("best model per task")["mean_score"], 1.0);
    // The same bytes again, and a table that says the same.
    assert_eq!(document(replay(&["--json"])), report);
    let (_, table, _) = replay(&[]);
    assert!(table.contains("400 queries, 2 models of made") && table.contains("0.7500"), "{table}");

    // Its files: the same figures, the same bytes every time, and nothing from elsewhere.
    let pages: Vec<String> = ["first", "second"]
        .map(|out| {
            let out = dir.path().join(out);
            let (code, _, errors) = replay(&["--out", out.to_str().unwrap()]);
            assert_eq!(code, 0, "{errors}");
            let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
            assert_eq!(serde_json::from_str::<Value>(&read("report.json")).unwrap(), report);
            assert!(read("report.md").contains("| even | ours | 0.7500 ("), "{}", read("report.md"));
            read("report.html") + &read("report.md") + &read("report.json")
        })
        .to_vec();
    assert!(pages[0] == pages[1], "two reports of the same differ");
    assert!(!pages[0].contains("http://") && !pages[0].contains("https://"), "a report asks for something");
    // What is mixed between two models at random recovers as much of the gap as it has strong calls.
    close(&even["pair"]["apgr"], 0.5);
    close(&even["pair"]["cpt_50"], 0.5);
    close(&even["pair"]["cpt_80"], 0.8);
    close(&of("random")["pair"]["apgr"], 0.5);
    close(&of("oracle")["pair"]["apgr"], 0.75);
    close(&of("oracle")["pair"]["cpt_50"], 0.25);
    close(&of("first-large")["shares"]["strong"], 0.4425);
    assert_eq!(report["zero_hull"].as_array().unwrap().len(), 2);
    // Whose they are, and whether what a policy expects is what comes.
    assert_eq!((&even["origin"], &of("random")["origin"]), (&json!("ours"), &json!("computed")));
    assert!(even["calibration"].is_null() && bandit["calibration"]["error"].as_f64() < Some(0.1), "{bandit}");
    assert_eq!(bandit["calibration"]["of"], "reward");
    let quoted = dir.path().join("quoted.jsonl");
    std::fs::write(&quoted, "{\"name\": \"theirs\", \"source\": \"a paper, table 2\", \"apgr\": 0.6}\n").unwrap();
    let (_, table, _) = replay(&["--quoted", quoted.to_str().unwrap()]);
    assert!(table.contains("quoted, not computed here (a paper, table 2): theirs: APGR 0.6"), "{table}");
    // The queries where they differ, explained by each.
    let differing = &report["differing"][0]["policies"];
    assert!(differing[0]["explanation"].as_str().unwrap().contains("weak    probability 0.5"), "{differing}");
    assert!(differing[1]["explanation"].as_str().unwrap().contains("rules"), "{differing}");

    // What if.
    let without = document(replay(&["--json", "--without", "strong"]));
    close(&without["policies"][0]["mean_score"], 0.5);
    close(&without["policies"][0]["shares"]["weak"], 1.0);
    close(&without["policies"][1]["refused"], 0.0);
    assert_eq!(without["what_if"], json!(["strong is not there"]));
    let cheaper = document(replay(&["--json", "--cost", "strong=0.5"]));
    close(&cheaper["policies"][0]["mean_cost_usd"], 0.003);
    let (code, out, errors) = replay(&["--cost", "stronger=0.5"]);
    assert!(code == 1 && out.is_empty() && errors.contains("no model stronger; there are strong, weak"), "{errors}");

    // A later report in which `even` has become worse.
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("before.json"), report.to_string()).unwrap();
    let mut later = report.clone();
    later["policies"][0]["mean_score"] = serde_json::json!(0.7);
    std::fs::write(at("after.json"), later.to_string()).unwrap();
    let diff =
        |condition: &str| weir::run(&["replay", "diff", &at("before.json"), &at("after.json"), "--fail-if", condition]);
    let (code, said, _) = diff("score < baseline - 0.01");
    assert!(code == 1 && said.contains("fails       score < baseline - 0.01") && said.contains("-0.050000"), "{said}");
    assert_eq!(said.matches("fails").count(), 1, "{said}");
    assert_eq!(diff("score < baseline - 0.1").0, 0);
    let (code, said, err) = diff("scroe < baseline");
    assert!(code == 1 && said.is_empty() && err.contains("names `scroe`"), "{err}");
    later["policies"].as_array_mut().unwrap().remove(0);
    std::fs::write(at("after.json"), later.to_string()).unwrap();
    let (code, said, _) = diff("false");
    assert!(code == 1 && said.contains("even\n  fails       it is not in the second report"), "{said}");
}

#[test]
fn what_cannot_be_replayed_over_outcomes_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("made.parquet");
    outcomes(&data, &["weak", "counter"], 0, 20);
    let data = data.to_str().unwrap();
    let one = write(dir.path(), "one", "select: {arms: [weak, strong], static: weak}\n");
    let says = |args: &[&str], what: &str| {
        let (code, out, err) = weir::run(&[&["replay", "--data"], args].concat());
        assert!(code != 0 && out.is_empty() && err.contains(what), "{out}{err}");
    };
    says(&[data], "give --policy");
    says(&[data, "--policy", &one], "the policy one can reach the model strong, of which made has no outcomes");
    says(&[data, "--policy", &one, &one], "a second policy with the name one");
    let broken = dir.path().join("broken.parquet");
    let bytes = std::fs::read(data).unwrap();
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    says(&[broken.to_str().unwrap(), "--policy", &one], "is no Parquet file, or not all of one");
}

/// The rows with one column replaced, or taken away.
fn with(rows: &RecordBatch, name: &str, column: Option<ArrayRef>) -> RecordBatch {
    let schema = rows.schema();
    let others = schema.fields().iter().zip(rows.columns()).filter(|(field, _)| field.name() != name);
    let mut columns: Vec<(String, ArrayRef)> = others.map(|(f, c)| (f.name().clone(), c.clone())).collect();
    columns.extend(column.map(|c| (name.to_owned(), c)));
    RecordBatch::try_from_iter(columns).unwrap()
}

#[test]
fn outcomes_come_in_either_format_under_any_names() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fit::batch(&["weak", "strong"], 0, 40);
    let lines = (0..rows.num_rows()).map(|n| {
        let schema = rows.schema();
        let cell = |(at, column): (usize, &ArrayRef)| {
            let value = match column.as_string_opt::<i32>() {
                Some(texts) => json!(texts.value(n)),
                None => json!(column.as_primitive::<Float64Type>().value(n)),
            };
            (schema.field(at).name().replace("score", "quality"), value)
        };
        Value::Object(rows.columns().iter().enumerate().map(cell).collect()).to_string()
    });
    let lines: Vec<String> = lines.collect();
    let (parquet, jsonl) = (dir.path().join("made.parquet"), dir.path().join("made.jsonl"));
    fit::write(&parquet, &rows);
    std::fs::write(&jsonl, lines.join("\n")).unwrap();
    let one = write(dir.path(), "one", "select: {arms: [weak, strong], weighted: {weak: 3, strong: 1}}\n");
    let replay = |data: &Path, more: &[&str]| {
        weir::run(&[&["replay", "--json", "--policy", &one, "--data", data.to_str().unwrap()], more].concat())
    };
    let mut reports = [replay(&parquet, &[]), replay(&jsonl, &["--column", "score=quality"])].map(document);
    for report in &mut reports {
        report["hash"].take();
    }
    assert_eq!(reports[0], reports[1]);
    // What is left out is said.
    std::fs::write(&jsonl, lines[1..].join("\n")).unwrap();
    let less = document(replay(&jsonl, &["--column", "score=quality"]));
    assert_eq!(less["left_out"], json!({"queries without an outcome of every model": 1}));
    assert_eq!(less["queries"], json!(39));
    let (code, out, err) = replay(&jsonl, &[]);
    assert!(
        code == 1 && out.is_empty() && err.contains("made.jsonl: line 1 has no column `score`, but cost_usd, "),
        "{err}"
    );
}

#[test]
fn outcomes_that_cannot_be_right_are_named_by_file_row_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fit::batch(&["weak", "strong"], 0, 20);
    let one = write(dir.path(), "one", "select: {arms: [weak, strong], static: weak}\n");
    let path = dir.path().join("bad.parquet");
    let says = |rows: &RecordBatch, what: &str| {
        fit::write(&path, rows);
        let (code, out, err) = weir::run(&["replay", "--policy", &one, "--data", path.to_str().unwrap()]);
        assert!(
            code == 1 && out.is_empty() && err.contains("bad.parquet: ") && err.contains(what),
            "{what}: {out}{err}"
        );
    };
    let scores = |at: usize, value: f64| -> ArrayRef {
        let change = |(n, s): (usize, f64)| if n == at { value } else { s };
        let column = rows.column_by_name("score").unwrap().as_primitive::<Float64Type>().values();
        Arc::new(Float64Array::from_iter_values(column.iter().copied().enumerate().map(change)))
    };
    says(&with(&rows, "score", Some(scores(7, f64::NAN))), "row 7, column `score`: NaN is not between 0 and 1");
    says(&with(&rows, "score", Some(scores(0, -0.1))), "row 0, column `score`: -0.1 is not between 0 and 1");
    says(&with(&rows, "cost_usd", Some(scores(3, f64::INFINITY))), "row 3, column `cost_usd`: inf is not 0 or more");
    let texts = |at: usize, text: &str, name: &str| -> ArrayRef {
        let column = rows.column_by_name(name).unwrap().as_string::<i32>();
        let change = |(n, old): (usize, Option<&str>)| if n == at { text.to_owned() } else { old.unwrap().to_owned() };
        Arc::new(StringArray::from_iter_values(column.iter().enumerate().map(change)))
    };
    says(&with(&rows, "score", Some(texts(5, "good", "model"))), "row 0, column `score`: `weak` is no number");
    says(
        &with(&rows, "model", Some(texts(5, "weak", "model"))),
        "row 5, column `query_id`: 2 has an outcome of weak already, in row 4",
    );
    says(
        &with(&rows, "query", Some(texts(9, "another", "query"))),
        "row 9, column `query`: the query of 4 is another than in row 8",
    );
    says(
        &with(&rows, "task", Some(texts(9, "another", "task"))),
        "row 9, column `task`: the task of 4 is another than in row 8",
    );
    says(&with(&rows, "model", Some(texts(2, "", "model"))), "row 2, column `model`: is empty");
    says(&with(&rows, "score", None), "has no column `score`, but query_id, task, query, model, cost_usd");
    says(&rows.slice(0, 0), "holds no outcomes");
    std::fs::write(&path, "").unwrap();
    let (code, _, err) = weir::run(&["replay", "--policy", &one, "--data", path.to_str().unwrap()]);
    assert!(code == 1 && err.contains("bad.parquet: is empty"), "{err}");
}

#[test]
fn orders_that_are_done_are_not_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("made.parquet");
    outcomes(&data, &["weak", "strong"], 0, 4000);
    let bandit = write(
        dir.path(),
        "bandit",
        "select: {arms: [weak, strong], thompson: {}, features: [tokens, complexity]}\nreward: {quality: {weight: 1, from: \
         feedback.score}}\n",
    );
    let kept = dir.path().join("kept");
    let plain = ["replay", "--data", data.to_str().unwrap(), "--seeds", "12", "--policy", &bandit, "--json"];
    let resumed = [&plain[..], &["--resume", kept.to_str().unwrap()]].concat();
    let mut stopped = weir::program().args(&resumed).spawn().unwrap();
    let files = || -> Vec<std::path::PathBuf> {
        let of = std::fs::read_dir(&kept).into_iter().flatten().map(|entry| entry.unwrap().path());
        of.filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
    };
    while files().len() < 2 && stopped.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    stopped.kill().unwrap();
    stopped.wait().unwrap();
    let done = files();
    assert!((2..12).contains(&done.len()), "{} orders were done when it was stopped", done.len());
    let text = std::fs::read_to_string(&done[0]).unwrap();
    // It is read: as another replay's, it is not taken.
    std::fs::write(&done[0], text.replacen("weir", "another", 1)).unwrap();
    let (code, out, errors) = weir::run(&resumed);
    assert!(code == 1 && out.is_empty() && errors.contains("the middle of another replay"), "{errors}");
    std::fs::write(&done[0], &text).unwrap();
    let whole = document(weir::run(&plain));
    assert_eq!(document(weir::run(&resumed)), whole);
    assert!(!kept.exists());
}
