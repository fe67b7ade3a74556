//! The record as an auditor needs it: nothing answered is missing, the chain verifies, decisions derive again.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::support::{
    postgres::{self, Server},
    weir::{self, Weir, chat},
};

/// Two scripted models and a policy that learns which of them to take.
const CONFIG: &str = r#"
fleet:
  - name: cheap
    scripted: {rules: [{reply: {text: "a short answer of six words"}}]}
  - name: dear
    price: {input: 1.0, output: 2.0}
    scripted: {rules: [{reply: {text: "a longer answer that takes some more words than the other"}}]}
policies: [learning.yaml]
embedder: {model: "off"}
"#;

const POLICY: &str = r#"
policy: learning
models: {cheap: {name: cheap}, dear: {name: dear}}
select:
  arms: [cheap, dear]
  linucb: {alpha: 1.0, ridge: 1.0}
  features: [tokens, complexity, turn]
  min_propensity: 0.05
reward:
  quality: {weight: 1.0, from: feedback.score, wait: 24h}
"#;

fn write_config(dir: &Path) -> std::path::PathBuf {
    std::fs::write(dir.join("learning.yaml"), POLICY).unwrap();
    weir::config(dir, CONFIG)
}

fn json_of(args: &[&str]) -> Value {
    let (code, out, err) = weir::run(args);
    assert_eq!(code, 0, "weir {args:?}: {err}\n{out}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("weir {args:?} printed no JSON ({e}): {out}"))
}

/// Sixty-four streams at once all end right, and every one is in the store.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_at_once_are_all_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let weir = Weir::start(&write_config(dir.path()), &data, &[]);
    let client = weir::client();
    let streams = (0..64).map(|i| {
        let mut body = chat("auto", &format!("question {i}"));
        body["stream"] = json!(true);
        let request = client.post(format!("{}/v1/chat/completions", weir.url)).json(&body);
        async move {
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 200);
            let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
            let text = response.text().await.unwrap();
            assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
            assert!(text.contains(&format!("chatcmpl-{id}")), "{text}");
            id
        }
    });
    let ids: Vec<String> = futures_util::future::join_all(streams).await;
    for id in ids {
        let (status, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
        assert_eq!(status, 200, "{view}");
        assert_eq!(view["outcome"]["status"], "ok", "{view}");
    }
}

/// Load until told to stop; gives the ids of all requests of which a byte was answered.
async fn load(url: String, workers: usize, stop: Arc<AtomicBool>) -> Vec<String> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let client = weir::client();
    let tasks = (0..workers).map(|worker| {
        let (url, stop, seen, client) = (url.clone(), Arc::clone(&stop), Arc::clone(&seen), client.clone());
        tokio::spawn(async move {
            let mut i = 0;
            while !stop.load(Ordering::Relaxed) {
                i += 1;
                let mut body = chat("auto", &format!("worker {worker} asks {i}"));
                body["stream"] = json!(worker % 2 == 0);
                let sent = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await;
                // The server may be dead already.
                let Ok(response) = sent else { return };
                if response.status() != 200 {
                    continue;
                }
                let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
                let mut bytes = response.bytes_stream();
                if let Some(Ok(_)) = bytes.next().await {
                    seen.lock().unwrap().push(id);
                }
                while let Some(Ok(_)) = bytes.next().await {}
            }
        })
    });
    futures_util::future::join_all(tasks).await;
    Arc::into_inner(seen).unwrap().into_inner().unwrap()
}

async fn survives_kill(rounds: usize, database_url: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let config = write_config(dir.path());
    let more: Vec<&str> = database_url.map_or(vec![], |url| vec!["--database-url", url]);
    let mut answered = Vec::new();
    for round in 0..rounds {
        let mut weir = Weir::start(&config, &data, &more);
        let stop = Arc::new(AtomicBool::new(false));
        let running = tokio::spawn(load(weir.url.clone(), 8, Arc::clone(&stop)));
        // Another moment of the load each time; what is asserted does not depend on how far it came.
        tokio::time::sleep(Duration::from_millis(150 + 37 * round as u64)).await;
        weir.kill();
        stop.store(true, Ordering::Relaxed);
        answered.extend(running.await.unwrap());
    }
    assert!(answered.len() > rounds, "the load did not get going: {} answers", answered.len());

    let weir = Weir::start(&config, &data, &more);
    let client = weir::client();
    for id in &answered {
        let response = client.get(format!("{}/v1/audit/decisions/{id}", weir.url)).send().await.unwrap();
        let status = response.status();
        let view: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "an answered request is not in the record: {id}: {view}");
        assert!(view["outcome"]["status"].is_string(), "no outcome after the restart: {view}");
    }
    drop(weir);
    let data = data.to_str().unwrap();
    let mut args = vec!["audit", "verify", "--json", "--data-dir", data];
    args.extend(&more);
    let report = json_of(&args);
    assert_eq!(report["passed"], json!(true), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_lost_by_kill_9_sqlite() {
    survives_kill(20, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_lost_by_kill_9_postgres() {
    let database = postgres::database().await;
    survives_kill(20, Some(&database)).await;
}

/// PostgreSQL goes away for a while under load: no request fails, all records arrive, in order.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_stop_for_a_while() {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let database = server.database().await;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let weir = Weir::start(&write_config(dir.path()), &data, &["--database-url", &database]);
    let stop = Arc::new(AtomicBool::new(false));
    let (url, flag) = (weir.url.clone(), Arc::clone(&stop));
    let running = tokio::spawn(async move {
        let client = weir::client();
        let mut ids = Vec::new();
        while !flag.load(Ordering::Relaxed) {
            let body = chat("auto", "does this still work?");
            let response = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
            assert_eq!(response.status(), 200, "a request failed while the database was away");
            ids.push(response.headers()["x-request-id"].to_str().unwrap().to_owned());
            let _ = response.bytes().await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        ids
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.stop();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let server = tokio::task::spawn_blocking(move || {
        server.resume();
        server
    })
    .await
    .unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let ids = running.await.unwrap();
    // The feeder's next try may be some seconds away.
    for _ in 0..60 {
        let (status, _) = weir.get(&format!("/v1/audit/decisions/{}", ids[ids.len() - 1])).await;
        if status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    for id in &ids {
        let (status, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
        assert_eq!(status, 200, "{id}: {view}");
    }
    drop(weir);
    let report =
        json_of(&["audit", "verify", "--json", "--data-dir", data.to_str().unwrap(), "--database-url", &database]);
    assert_eq!(report["passed"], json!(true), "{report}");
    drop(server);
}

/// Feedback changes later decisions; a thousand of them derive again, across a restart, to the same bytes. More, with
/// `WEIR_TEST_DECISIONS`.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_learning_decisions_derive_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let config = write_config(dir.path());
    let mut taken = Vec::new();
    let total: usize = std::env::var("WEIR_TEST_DECISIONS").map_or(1000, |n| n.parse().unwrap());
    for part in 0..2 {
        let mut weir = Weir::start(&config, &data, &[]);
        for i in 0..total / 2 {
            let (status, answer) = weir.post("/v1/chat/completions", &chat("auto", &format!("part {part}, {i}"))).await;
            assert_eq!(status, 200, "{answer}");
            let model = answer["model"].as_str().unwrap().to_owned();
            if i % 3 == 0 {
                // Only `dear` is ever liked.
                let value = f64::from(u8::from(model == "dear"));
                let feedback = json!({"id": answer["id"], "name": "score", "value": value});
                let (status, said) = weir.post("/v1/feedback", &feedback).await;
                assert!(status == 200 || status == 202, "{said}");
            }
            taken.push(model);
        }
        assert!(weir.stop().success());
    }
    let late = taken[total - 200..].iter().filter(|m| *m == "dear").count();
    assert!(late > 170, "200 late decisions took the liked arm only {late} times: it did not learn");

    let data = data.to_str().unwrap();
    let report = json_of(&["audit", "verify", "--json", "--data-dir", data]);
    assert_eq!((&report["passed"], &report["not_ingested"]), (&json!(true), &json!(0)), "a stop left events: {report}");
    let report = json_of(&["audit", "reproduce", "--last", &total.to_string(), "--json", "--data-dir", data]);
    assert_eq!(report["same"], json!(total), "{report}");
    assert_eq!(report["differences"], json!([]), "{report}");

    let replayed = json_of(&["replay", "--data", data, "--json"]);
    assert_eq!(replayed["policies"][0]["made_the_log"], json!(true));
    assert_eq!(replayed["policies"][0]["agreed"], json!(total), "{replayed}");
    assert_eq!(replayed["policies"][0]["decisions"], json!(total), "{replayed}");

    let other = dir.path().join("other.yaml");
    std::fs::write(&other, "policy: other\nmodels: {cheap: {name: cheap}}\nselect: {arms: [cheap], static: cheap}\n")
        .unwrap();
    let replayed = json_of(&["replay", "--data", data, "--json", "--policy", other.to_str().unwrap()]);
    assert_eq!(replayed["policies"][0]["arms"], json!({"cheap": total}), "{replayed}");
    assert!(replayed["policies"][0]["no_estimate"].as_str().unwrap().contains("reward:"), "{replayed}");

    // What always taking one arm would have earned, from a log that mostly took the other: only `dear` was ever liked.
    let always = |arm: &str, text: &str| {
        let file = dir.path().join(format!("{arm}.yaml"));
        std::fs::write(&file, text.replace("ARM", arm)).unwrap();
        json_of(&["replay", "--data", data, "--json", "--policy", file.to_str().unwrap()])["policies"][0].clone()
    };
    let one = "policy: one\nmodels: {ARM: {name: ARM}}\nselect: {arms: [ARM], static: ARM}\n\
               reward: {quality: {weight: 1, from: feedback.score}}\n";
    for (arm, truth) in [("cheap", 0.0), ("dear", 1.0)] {
        let replayed = always(arm, one);
        let estimates = &replayed["estimates"];
        assert_eq!(estimates["rows"], json!(total), "{replayed}");
        assert_eq!(estimates["rewarded"], json!(2 * (total / 2).div_ceil(3)), "{replayed}");
        assert!((estimates["snips"]["value"].as_f64().unwrap() - truth).abs() < 1e-9, "{replayed}");
        let interval = |name: &str| {
            let of = &estimates[name]["interval"];
            (of[0].as_f64().unwrap(), of[1].as_f64().unwrap())
        };
        for name in ["ips", "dr"] {
            let (low, high) = interval(name);
            assert!(low - 0.05 <= truth && truth <= high + 0.05, "{name}: {replayed}");
        }
    }
    // The same from an export, in every figure; and its page.
    let export = dir.path().join("decisions.parquet");
    let exported = export.to_str().unwrap();
    json_of(&["audit", "export", "--parquet", exported, "--json", "--data-dir", data]);
    let file = dir.path().join("dear.yaml");
    let policy = ["--policy", file.to_str().unwrap()];
    let of = |from: &str, more: &[&str]| json_of(&[&["replay", "--data", from, "--json"], &policy[..], more].concat());
    let mut recorded = of(data, &[]);
    let mut found = of(exported, &["--out", dir.path().join("page").to_str().unwrap()]);
    // The versions differ: an export has no fleet.
    for report in [&mut recorded, &mut found] {
        assert!(report["policies"][0]["hash"].take().is_string());
        for d in report["policies"][0]["differing"].as_array_mut().unwrap() {
            d["explanation"].take();
        }
    }
    assert_eq!(recorded, found);
    let page = std::fs::read_to_string(dir.path().join("page/report.html")).unwrap();
    assert!(page.contains("Reward per decision, doubly robust") && page.contains("instead of cheap"), "{page}");
    assert_eq!(
        of(exported, &["--last", "100"])["policies"][0]["choices"],
        of(data, &["--last", "100"])["policies"][0]["choices"]
    );
    assert_eq!(of(exported, &["--made-by", "learning"])["decisions"], json!(total));
    let refused = |from: &str, more: &[&str]| {
        let (code, out, err) = weir::run(&[&["replay", "--data", from], more].concat());
        assert!(code == 1 && out.is_empty(), "{out}{err}");
        err
    };
    assert!(refused(exported, &[]).contains("an export does not hold the policies"));
    assert!(refused(exported, &[&policy[..], &["--tenant", "nobody"]].concat()).contains("no such decisions"));
    assert!(refused(exported, &["--policy", policy[1], policy[1]]).contains("a second policy with the name one"));
    let bytes = std::fs::read(&export).unwrap();
    let cut = dir.path().join("cut.parquet");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    assert!(refused(cut.to_str().unwrap(), &policy).contains("cut.parquet: is no Parquet file"));
    // An arm that the log never had.
    let unknown = always("stranger", &one.replace("{name: ARM}", "{name: cheap}"));
    assert!(unknown["no_estimate"].as_str().unwrap().starts_with("100.0 % of what it would do"), "{unknown}");
    assert!(unknown["no_estimate"].as_str().unwrap().contains("of such traffic would then tell to ±0.01"), "{unknown}");
    // What if: both arms are the policy's, and one model is not there, or dear.
    let both = dir.path().join("both.yaml");
    let reward = "reward: {quality: {weight: 1, from: feedback.score}, cost_usd: {weight: -1000}}";
    let text = "policy: both\nmodels: {cheap: {name: cheap}, dear: {name: dear}}\nselect: {arms: [cheap, dear], weighted: {cheap: 1, dear: 9}}";
    std::fs::write(&both, format!("{text}\n{reward}\n")).unwrap();
    let what_if = |from: &str, more: &[&str]| {
        json_of(&[&["replay", "--json", "--data", from, "--policy", both.to_str().unwrap()], more].concat())["policies"]
            [0]
        .clone()
    };
    for from in [data, exported] {
        assert_eq!(what_if(from, &["--without", "dear"])["arms"], json!({"cheap": total}));
        let (as_it_was, ten_times) = (what_if(from, &[]), what_if(from, &["--cost", "dear=10"]));
        let reward = |of: &Value| of["estimates"]["snips"]["value"].as_f64().unwrap();
        assert!(reward(&ten_times) < reward(&as_it_was) - 0.01, "{as_it_was} {ten_times}");
    }
    assert!(refused(data, &["--without", "dear"]).contains("give the policies that would have decided then"));
    assert!(refused(data, &["--without", "stranger"]).contains("there is no model stranger; there are cheap, dear"));
    let (code, out, _) = weir::run(&["replay", "--data", data, "--policy", other.to_str().unwrap()]);
    assert!(code == 0 && out.contains("no estimate"), "{out}");
    let made_by = json_of(&["replay", "--data", data, "--json", "--made-by", "learning", "--last", "10"]);
    assert_eq!(made_by["decisions"], json!(10), "{made_by}");
    for filter in [["--tenant", "nobody"], ["--until", "2020-01-01T00:00:00Z"], ["--made-by", "another"]] {
        let (code, out, err) = weir::run(&[&["replay", "--data", data], &filter[..]].concat());
        assert!(code == 1 && out.is_empty() && err.contains("no such decisions"), "{filter:?} {out}{err}");
    }
}
