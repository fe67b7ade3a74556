//! `weir bench gateway` as a user runs it, on the two servers that need no model: every answer right, one JSON document.

use std::process::Command;

fn weir(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_weir")).args(args).output().unwrap()
}

#[test]
fn the_bare_proxy_beside_the_mock() {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().display().to_string();
    let common = ["bench", "gateway", "--subjects", "mock,bare-proxy", "--connections", "1,4", "--repeat", "1"];
    let bounds = ["--seconds", "20", "--requests", "50", "--json", "--out", &dir];
    let output = weir(&[&common[..], &bounds[..]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["bench"], "gateway");
    let rows = report["rows"].as_array().unwrap();
    // Two modes, two numbers of connections, two subjects.
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!((row["requests"].as_u64(), row["errors"].as_u64()), (Some(50), Some(0)), "{row}");
        assert!(row["cpu_s_per_1000"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["rss_mib"].as_f64().unwrap() > 1.0, "{row}");
        // Events come one by one, not gathered.
        let frames = row["frames"].as_f64().unwrap();
        assert!(if row["mode"] == "sse" { frames > 10.0 } else { frames < 3.0 }, "{row}");
    }
    assert!(report["figures"]["json.4.bare_proxy.added_p50_us"].is_number());
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 2);
}

#[test]
fn wrong_numbers_are_wrong_usage() {
    for wrong in [["--connections", "0"], ["--seconds", "inf"], ["--repeat", "0"], ["--subjects", "policy"]] {
        let output = weir(&[&["bench", "gateway"][..], &wrong[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_server_that_does_not_start_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.yaml").display().to_string();
    let output = weir(&["bench", "gateway", "--subjects", "policy", "--policy", &missing]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&missing));
}

/// Two small files: answers of which every second greedy one is wrong and unsure, and outcomes of three models.
fn recorded(dir: &std::path::Path) -> (String, String) {
    let mut answers = String::new();
    let mut outcomes = String::new();
    for i in 0..40 {
        let sure = i % 2 == 0;
        for (temperature, samples) in [(0.0, 1), (0.3, 3), (0.7, 5)] {
            for sample in 0..samples {
                let right = sure || (temperature > 0.0 && sample != 1);
                let answer = serde_json::json!({
                    "task": format!("arithmetic-{i:03}"), "kind": "arithmetic", "model": "small", "prompt": "0", "reference": "4",
                    "temperature": temperature, "sample": sample, "text": if right { "4" } else { "5" }, "correct": right,
                    "prompt_tokens": 20, "completion_tokens": 1,
                    "scores": [{"score": "mean_token_entropy", "value": if sure { 0.1 } else { 0.9 }}],
                });
                answers += &format!("{answer}\n");
            }
        }
        for (model, right, cost) in [("a", i % 4 != 0, 0.001), ("b", i % 4 != 1, 0.001), ("dear", true, 0.1)] {
            let outcome = serde_json::json!({
                "query": format!("question {i}"), "model": model, "score": f64::from(u8::from(right)), "cost_usd": cost,
                "response": if right { "4" } else { "5" },
            });
            outcomes += &format!("{outcome}\n");
        }
    }
    let (first, second) = (dir.join("answers.jsonl"), dir.join("made.jsonl"));
    std::fs::write(&first, answers).unwrap();
    std::fs::write(&second, outcomes).unwrap();
    (first.display().to_string(), second.display().to_string())
}

#[test]
fn cascades_are_judged_over_recorded_answers() {
    let out = tempfile::tempdir().unwrap();
    let (answers, outcomes) = recorded(out.path());
    let dir = out.path().join("out").display().to_string();
    let args = ["--answers", &answers, "--data", &outcomes, "--splits", "2", "--json", "--out", &dir];
    let output = weir(&[&["bench", "cascade"][..], &args].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["bench"].as_str(), report["asked"]["questions"].as_u64()), (Some("cascade"), Some(40)));
    // Eight gates and two learned ones before two last stages; nobody was asked to verify these answers.
    assert_eq!(report["rows"].as_array().unwrap().len(), 20);
    assert!(report["figures"]["mean_token_entropy.vote_of_5.gain"].as_f64().unwrap() > 0.9, "{report}");
    assert!(report["figures"]["made.best_gain"].as_f64().unwrap() > 0.0, "{report}");
    assert!(std::fs::read_to_string(out.path().join("out/cascade.md")).unwrap().contains("| mean_token_entropy |"));

    std::fs::write(&answers, "{}\n").unwrap();
    let output = weir(&["bench", "cascade", "--answers", &answers]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("line 1"));
}
