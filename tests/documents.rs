//! Documents that are computed once, in a real weir with the real model: measured first, reused wherever they stand, pinned, on disk.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{
    data_dir, model_file,
    weir::{self, Weir, chat},
};

const HARBOUR: &str = "The harbour of Orlen was built in 1874 by a guild of salt traders. ";
const LIGHTHOUSE: &str = "The lighthouse keeper wrote down the wind, the tide and each ship by name. ";

/// One model `m` that reuses documents whatever it costs, once that was measured; with more in its policy.
fn config(dir: &Path, more: &str) -> PathBuf {
    let policy = dir.join("one.yaml");
    let yaml = "policy: one\nmodels: {m: {name: m}}\nselect: {arms: [m], static: {m: 1}}\n".to_owned() + more;
    std::fs::write(&policy, yaml).unwrap();
    let fleet = json!([{"name": "m", "local": {"model": model_file(), "threads": 2}}]);
    let lax = json!({"max_divergence": 50, "min_top1": 0, "min_f1": 0});
    let settings = json!({"fleet": fleet, "policies": [policy], "chunk_reuse": lax, "kv_disk_mib": 256});
    weir::config(dir, &settings.to_string())
}

/// Measures, and gives what was said.
fn calibrate(config: &Path, data: &Path, documents: &[String]) -> Value {
    let questions = data.join("questions.jsonl");
    let question = json!({"question": "Who wrote down the wind?", "chunks": documents});
    std::fs::write(&questions, question.to_string()).unwrap();
    let (questions, place) = (questions.to_str().unwrap(), data.to_str().unwrap());
    let calibrate = ["kv", "calibrate", "m", "--data", questions, "--answer", "4", "--variants", "head-0", "--json"];
    let config_args = ["--config", config.to_str().unwrap(), "--data-dir", place];
    let (code, out, err) = weir::run(&[&calibrate[..], &config_args[..]].concat());
    assert_eq!(code, 0, "{out}{err}");
    serde_json::from_str(&out).unwrap()
}

/// Documents that a request marks are reused wherever they stand, once what that costs the model is on record; until then the
/// record of each request says why they are not.
#[tokio::test(flavor = "multi_thread")]
async fn marked_documents_are_reused_elsewhere_once_that_was_measured() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let documents = [HARBOUR.repeat(6), LIGHTHOUSE.repeat(6)];
    let config = config(dir.path(), "");
    let ask = async |weir: &Weir, order: [usize; 2], more: Value| {
        let part = |i: usize| json!({"type": "text", "text": documents[i], "cache_control": {"type": "ephemeral"}});
        let mut body = chat("m", "");
        let question = json!({"type": "text", "text": "When was the harbour built?"});
        body["messages"][0]["content"] = json!([part(order[0]), part(order[1]), question]);
        body["max_tokens"] = json!(4);
        body["temperature"] = json!(0);
        body["weir"] = more;
        let (status, answer) = weir.post("/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let details = |answer: &Value| {
        let details = &answer["usage"]["prompt_tokens_details"];
        (details["chunk_tokens"].as_u64(), details["cached_tokens"].as_u64().unwrap())
    };
    let shown = |answer: &Value| {
        let id = answer["id"].as_str().unwrap();
        let (code, out, err) = weir::run(&["audit", "show", id, "--data-dir", data.to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        out
    };

    let mut weir = Weir::start(&config, &data, &[]);
    let first = ask(&weir, [0, 1], json!({})).await;
    assert_eq!(details(&first).0, None);
    assert!(weir.stop().success());
    let said = shown(&first);
    assert!(said.contains("documents not reused: no_fidelity_record"), "{said}");

    let measured = calibrate(&config, &data, &documents);
    assert_eq!((&measured["record"]["variant"], &measured["keeps_bound"]), (&json!("head-0"), &json!(true)));

    let mut weir = Weir::start(&config, &data, &[]);
    assert_eq!(details(&ask(&weir, [0, 1], json!({})).await).0, None, "nothing is there yet");
    let again = ask(&weir, [1, 0], json!({})).await;
    let (chunks, cached) = details(&again);
    assert!(chunks.is_some_and(|chunks| chunks > 150 && chunks <= cached), "{again}");
    let exact = ask(&weir, [1, 0], json!({"exact": true})).await;
    assert_eq!(details(&exact).0, None);
    let (code, fleet, err) = weir::run(&["models", "running", "--url", &weir.url]);
    assert!(code == 0 && fleet.contains("reuse of documents head-0 (divergence"), "{fleet}{err}");
    assert!(weir.stop().success());
    let (said, exact) = (shown(&again), shown(&exact));
    assert!(said.contains("of documents, 0 computed again"), "{said}");
    assert!(exact.contains("documents not reused: asked_exact"), "{exact}");
}

/// A question about documents that nobody has marked, but the policy does.
fn about(documents: &[String]) -> Value {
    let passages: Vec<String> = documents.iter().map(|text| format!("<doc>\n{text}\n</doc>")).collect();
    let mut body = chat("one", &format!("{}\nWhen was the harbour built?", passages.join("\n")));
    body["max_tokens"] = json!(6);
    body["temperature"] = json!(0);
    body["logprobs"] = json!(true);
    body
}

const MARKED_BY_LINES: &str = "chunks: {between: {begin: '<doc', end: '</doc'}}\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_pins_documents_and_lets_them_go_and_a_policy_marks_them() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let documents = [HARBOUR.repeat(6), LIGHTHOUSE.repeat(6)];
    let config = config(dir.path(), MARKED_BY_LINES);
    calibrate(&config, &data, &documents);
    let weir = Weir::start(&config, &data, &[]);
    let files: Vec<String> = (0..2)
        .map(|n| {
            let path = dir.path().join(format!("{n}.txt"));
            std::fs::write(&path, &documents[n]).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let kv = |verb: &str, more: &[&str]| {
        let (code, out, err) = weir::run(&[&["kv", verb, "--url", &weir.url], more].concat());
        assert_eq!(code, 0, "{out}{err}");
        out
    };
    let (first, second) = (files[0].as_str(), files[1].as_str());
    let said = kv("lookup", &["m", first, second]);
    assert!(said.lines().take(2).all(|line| line.ends_with("tokens, not kept")), "{said}");
    let said = kv("pin", &["m", first, "--ttl", "8h"]);
    assert!(said.contains("in memory, pinned for") && said.contains("hours more"), "{said}");
    let said = kv("stat", &[]);
    assert!(said.contains("documents: 1, of") && said.contains("; 1 of them pinned"), "{said}");
    // What the policy marks are these documents, and one was there.
    let (status, answer) = weir.post("/v1/chat/completions", &about(&documents)).await;
    assert_eq!(status, 200, "{answer}");
    let chunks = answer["usage"]["prompt_tokens_details"]["chunk_tokens"].as_u64().unwrap();
    assert!(chunks > 80 && chunks < 130, "{answer}");
    let said = kv("lookup", &["m", first, second]);
    assert!(said.lines().take(2).all(|line| line.contains("in memory")), "{said}");
    assert_eq!(kv("lookup", &["m", first, "--tenant", "other"]).matches("not kept").count(), 1);
    assert!(kv("clear", &["m", second]).starts_with("gone: 1 from memory"));
    kv("clear", &["m", "--all"]);
    let said = kv("stat", &[]);
    assert!(said.contains("documents: 0, of") && said.contains("on disk: 0 documents"), "{said}");
    let (code, _, err) = weir::run(&["kv", "pin", "m", "--url", &weir.url]);
    assert!(code == 1 && err.contains("name the documents"), "{err}");
    std::fs::write(&files[0], "short").unwrap();
    let (code, _, err) = weir::run(&["kv", "pin", "m", first, "--url", &weir.url]);
    assert!(code == 1 && err.contains("no marked document of a size"), "{err}");
}

/// How often it is killed.
const TURNS: usize = 3;

/// kill -9 while documents are written, again and again: what is on disk then is the document or a miss, and answers stay the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_weir_that_is_killed_while_it_writes_documents_finds_them_or_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let document = |n: usize| format!("Report {n} of the harbour master. ") + &[HARBOUR, LIGHTHOUSE][n % 2].repeat(20);
    let config = config(dir.path(), MARKED_BY_LINES);
    calibrate(&config, &data, &[document(0)]);
    let ask = async |weir: &Weir, n: usize| {
        let (status, answer) = weir.post("/v1/chat/completions", &about(&[document(n)])).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"].clone()
    };
    let slab = || {
        let files = std::fs::read_dir(data.join("kv")).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|e| e == "slab")).collect::<Vec<_>>()
    };
    let mut weir = Weir::start(&config, &data, &[]);
    let mut want = Vec::new();
    for n in 0..TURNS {
        want.push(ask(&weir, n).await);
    }
    assert!(weir.stop().success());
    slab().iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let size = || slab().first().map_or(0, |path| std::fs::metadata(path).unwrap().len());
    let (mut read, mut torn) = (0, 0);
    for turn in 0..TURNS {
        let mut weir = Weir::start(&config, &data, &[]);
        for (n, want) in want[..turn].iter().enumerate() {
            assert_eq!(ask(&weir, n).await, *want, "{turn}");
        }
        let before = weir.get("/v1/kv").await.1["data"][0]["kv"]["disk"].clone();
        read += before["read"].as_u64().unwrap();
        // A new one, long enough; the end comes when the first of it reaches the file.
        let (url, body, was) = (format!("{}/v1/chat/completions", weir.url), about(&[document(turn)]), size());
        let asked = tokio::spawn(async move { _ = weir::client().post(url).json(&body).send().await });
        while size() == was && !asked.is_finished() {
            tokio::task::yield_now().await;
        }
        weir.kill();
        let weir = Weir::start(&config, &data, &[]);
        let after = weir.get("/v1/kv").await.1["data"][0]["kv"]["disk"].clone();
        torn += usize::from(size() > was && after["documents"] == before["documents"]);
    }
    // Whether the end came in the middle is a matter of luck.
    println!("{read} documents read, {torn} torn");
    assert!(read > 0, "nothing was ever read");
    let mut weir = Weir::start(&config, &data, &[]);
    for (n, want) in want.iter().enumerate() {
        assert_eq!(ask(&weir, n).await, *want);
    }
    assert!(weir.stop().success());
    assert!(slab().len() == 1);
}
