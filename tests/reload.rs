//! Policies that change while weir runs, and policies that decide beside others.

use std::{path::Path, time::Duration};

use serde_json::Value;

use crate::support::weir::{self, Weir, chat};

const CONFIG: &str = r#"
fleet:
  - name: cheap
    scripted: {rules: [{reply: {text: "short"}}]}
  - name: dear
    scripted: {rules: [{reply: {text: "long"}}]}
policies: [first.yaml, second.yaml]
embedder: {model: "off"}
"#;

const FIRST: &str = r#"
policy: first
models: {cheap: {name: cheap}, dear: {name: dear}}
select:
  arms: [cheap, dear]
  static: cheap
shadow_decide: [second]
"#;

const SECOND: &str = r#"
policy: second
models: {cheap: {name: cheap}, dear: {name: dear}}
select:
  arms: [cheap, dear]
  linucb: {}
  features: [tokens]
reward: {quality: {weight: 1, from: feedback.score}}
"#;

fn start(dir: &Path) -> Weir {
    std::fs::write(dir.join("first.yaml"), FIRST).unwrap();
    std::fs::write(dir.join("second.yaml"), SECOND).unwrap();
    Weir::start(&weir::config(dir, CONFIG), &dir.join("data"), &[])
}

async fn ask(weir: &Weir) -> Value {
    let (status, answer) = weir.post("/v1/chat/completions", &chat("auto", "Hello?")).await;
    assert_eq!(status, 200, "{answer}");
    let id = answer["id"].as_str().unwrap().trim_start_matches("chatcmpl-").to_owned();
    let (status, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
    assert_eq!(status, 200, "{view}");
    view
}

fn arm(view: &Value) -> String {
    view["decision"]["arm"].as_str().unwrap().to_owned()
}

/// Asks until the arm is the one that is wanted.
async fn until(weir: &Weir, wanted: &str) -> Value {
    for _ in 0..100 {
        let view = ask(weir).await;
        if arm(&view) == wanted {
            return view;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("`{wanted}` was never taken");
}

fn admin(data: &Path) -> String {
    let (code, out, err) = weir::run(&["audit", "export", "--jsonl", "-", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    out.lines().filter(|l| l.contains("\"admin\"")).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_policy_is_used_at_once_and_a_broken_one_never() {
    let dir = tempfile::tempdir().unwrap();
    let mut weir = start(dir.path());
    let before = ask(&weir).await;
    assert_eq!(arm(&before), "cheap");

    // As editors do: a new file, renamed over the old one.
    let fresh = dir.path().join("first.yaml.new");
    std::fs::write(&fresh, FIRST.replace("static: cheap", "static: dear")).unwrap();
    std::fs::rename(&fresh, dir.path().join("first.yaml")).unwrap();
    let after = until(&weir, "dear").await;
    assert_ne!(after["decision"]["policy_hash"], before["decision"]["policy_hash"]);

    std::fs::write(dir.path().join("first.yaml"), FIRST.replace("static: cheap", "static: chep")).unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let still = ask(&weir).await;
    assert_eq!(still["decision"]["policy_hash"], after["decision"]["policy_hash"]);

    std::fs::write(dir.path().join("first.yaml"), FIRST).unwrap();
    let again = until(&weir, "cheap").await;
    assert_eq!(again["decision"]["policy_hash"], before["decision"]["policy_hash"]);
    assert!(weir.stop().success(), "{}", weir.stderr());

    let data = dir.path().join("data");
    let events = admin(&data);
    assert_eq!(events.matches("policy_reloaded").count(), 2, "{events}");
    assert_eq!(events.matches("policy_rejected").count(), 1, "{events}");
    assert!(events.contains("did you mean `cheap`?"), "{events}");
    // Decisions of all three versions derive again.
    let (code, out, err) =
        weir::run(&["audit", "reproduce", "--last", "1000", "--data-dir", data.to_str().unwrap(), "--json"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_decides_beside_and_nothing_is_called_or_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let mut weir = start(dir.path());
    let view = ask(&weir).await;
    let id = view["id"].as_str().unwrap().to_owned();
    let (status, listed) = weir.get("/v1/audit/decisions?limit=10").await;
    assert_eq!(status, 200);
    let rows = listed["data"].as_array().unwrap();
    let shadow = rows.iter().find(|r| r["decided_by"] == "shadow").unwrap_or_else(|| panic!("{listed}"));
    assert_eq!(shadow["policy"], "second");
    let (_, shadow) = weir.get(&format!("/v1/audit/decisions/{}", shadow["id"].as_str().unwrap())).await;
    assert_eq!(shadow["decision"]["shadow_of"], id.as_str());
    assert!(shadow["attempts"].as_array().is_none_or(Vec::is_empty), "{shadow}");
    assert_eq!(shadow["decision"]["candidates"][0]["propensity"], 0.5);
    assert!(weir.stop().success(), "{}", weir.stderr());
    let data = dir.path().join("data");
    let (code, out, err) =
        weir::run(&["audit", "reproduce", "--last", "10", "--data-dir", data.to_str().unwrap(), "--json"]);
    assert_eq!(code, 0, "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["same"], 2, "{report}");
}

#[test]
fn a_shadow_that_is_not_there_is_an_error_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("first.yaml"), FIRST.replace("[second]", "[third]")).unwrap();
    std::fs::write(dir.path().join("second.yaml"), SECOND).unwrap();
    let config = weir::config(dir.path(), CONFIG);
    let (code, out, err) = weir::run(&["check", "--config", config.to_str().unwrap()]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(format!("{out}{err}").contains("there is no policy `third`"), "{out}{err}");
}
