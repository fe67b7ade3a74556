//! `weir audit` as a user runs it, while another process holds the log.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;
use weir::{
    audit::{EventLog, LogOptions, StoreTarget, open_store, record::Logged, testing},
    domain::DecisionId,
};

use crate::support::store::{ids, triple};

fn weir(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("audit")
        .args(args)
        .env("WEIR_HOME", dir)
        .env_remove("DATABASE_URL")
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}

/// Three decisions in the store, one more in the log only. The log stays open, as a running weir has it.
async fn record(dir: &Path) -> (EventLog, Vec<DecisionId>) {
    let log = EventLog::open(&dir.join("log"), LogOptions::default()).unwrap();
    let ids = ids(3);
    for (i, &id) in ids.iter().enumerate() {
        log.append(triple(id, 1_764_000_000_000_000 + i as i64)).await.unwrap();
    }
    let logged: Vec<Logged> = log.read_from(1).unwrap().collect::<Result<_, _>>().unwrap();
    let store = open_store(&StoreTarget::Sqlite(dir.join("weir.db"))).await.unwrap();
    store.ingest(&logged).await.unwrap();
    log.append(vec![testing::decision(DecisionId::new(), 9)]).await.unwrap();
    (log, ids)
}

#[tokio::test]
async fn the_verbs_answer_beside_a_running_weir() {
    let dir = tempfile::tempdir().unwrap();
    let (_log, ids) = record(dir.path()).await;
    let weir = |args: &[&str]| weir(dir.path(), args);

    let list = weir(&["list"]);
    assert!(String::from_utf8_lossy(&list.stderr).contains("1 events are in the log and not yet in the store"));
    let lines = text(&list);
    assert_eq!(lines.lines().count(), 4, "{lines}");
    assert!(lines.lines().nth(1).unwrap().starts_with(&ids[2].to_string()), "{lines}");
    let list = json(&weir(&["list", "--json", "--limit", "2", "--status", "ok"]));
    assert_eq!(list["decisions"].as_array().unwrap().len(), 2);
    assert_eq!(list["decisions"][0]["served_by"], "smollm2-135m");
    assert_eq!(json(&weir(&["list", "--json", "--arm", "careful"]))["decisions"], Value::Array(Vec::new()));

    let id = ids[1].to_string();
    for name in [&id, &ids[1].completion_id(), &id[..35], &id.replace('-', "")] {
        let shown = text(&weir(&["show", name]));
        assert!(shown.starts_with(&format!("decision  {id}")), "{name}: {shown}");
    }
    let shown = json(&weir(&["show", &id, "--json"]));
    assert_eq!((&shown["id"], &shown["decision"]["arm"]), (&Value::from(id), &Value::from("quick")));
    assert_eq!(shown["attempts"][0]["model"], "smollm2-135m");

    let report = json(&weir(&["verify", "--json"]));
    assert_eq!((&report["passed"], &report["events"], &report["not_ingested"]), (&true.into(), &10.into(), &1.into()));
    assert_eq!(json(&weir(&["verify", "--from-log", "--json"]))["events"], 10);
    assert!(text(&weir(&["verify"])).contains("whole and unchanged"));

    assert_eq!(json(&weir(&["stats", "--json"]))["total"]["decisions"], 3);
    assert!(text(&weir(&["stats"])).contains("quick"));

    let jsonl = text(&weir(&["export", "--jsonl", "-"]));
    assert_eq!(jsonl.lines().count(), 9);
    let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("b.parquet"));
    let report = json(&weir(&["export", "--json", "--jsonl", a.to_str().unwrap(), "--parquet", b.to_str().unwrap()]));
    assert_eq!((&report["jsonl"]["events"], &report["parquet"]["decisions"]), (&9.into(), &3.into()));
    assert_eq!(std::fs::read_to_string(&a).unwrap(), jsonl);
}

#[tokio::test]
async fn what_is_not_there_is_said_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |args: &[&str]| {
        let output = weir(dir.path(), args);
        assert!(!output.status.success());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = fails(&["list"]);
    assert!(code == Some(1) && said.contains("there is no record yet at") && said.contains("weir serve"), "{said}");
    let (_log, ids) = record(dir.path()).await;
    let (code, said) = fails(&["show", "ffffffff"]);
    assert!(code == Some(1) && said.contains("no decision begins with `ffffffff`"), "{said}");
    let (_, said) = fails(&["show", "nonsense"]);
    assert!(said.contains("no decision id"), "{said}");
    let (_, said) = fails(&["show", "0"]);
    assert!(said.contains("several decisions begin with `0`") && said.contains(&ids[0].to_string()), "{said}");
    assert_eq!(fails(&["list", "--status", "fine"]).0, Some(2));
    assert_eq!(fails(&["list", "--since", "yesterday"]).0, Some(2));
    assert_eq!(fails(&["export"]).0, Some(2));
    let (_, said) = fails(&["list", "--database-url", "mysql://x"]);
    assert!(said.contains("postgres://"), "{said}");

    // A record that was changed: the verb says where, and its exit code that something is wrong.
    let mut db =
        sqlx::ConnectOptions::connect(&sqlx::sqlite::SqliteConnectOptions::new().filename(dir.path().join("weir.db")))
            .await
            .unwrap();
    sqlx::query("UPDATE decisions SET propensity = 1.0").execute(&mut db).await.unwrap();
    let output = weir(dir.path(), &["verify"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(1) && said.contains("event 1: the columns of this decision"), "{said}");
}
