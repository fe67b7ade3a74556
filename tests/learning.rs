//! What a policy learns from feedback, as its operator sees it, carries it over and compares it; and budgets.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::weir::{self, Weir, chat};

const CONFIG: &str = r#"
fleet:
  - name: cheap
    scripted: {rules: [{reply: {text: "short"}}]}
    price: {input: 1, output: 1}
  - name: dear
    scripted: {rules: [{reply: {text: "long"}}]}
    price: {input: 1000, output: 1000}
policies: [learner.yaml]
embedder: {model: "off"}
"#;

const LEARNER: &str = r#"
policy: learner
models: {cheap: {name: cheap}, dear: {name: dear}}
select:
  arms: [cheap, dear]
  linucb: {alpha: 0.1, min_pulls: 2}
  features: [tokens]
  min_propensity: 0.1
reward: {quality: {weight: 1, from: feedback.score}}
"#;

fn start(dir: &Path, policy: &str) -> Weir {
    std::fs::write(dir.join("learner.yaml"), policy).unwrap();
    Weir::start(&weir::config(dir, CONFIG), &dir.join("data"), &[])
}

/// Asks, and says that the answer of `dear` is good and that of `cheap` is not.
async fn ask(weir: &Weir) -> String {
    let (status, answer) = weir.post("/v1/chat/completions", &chat("auto", "Hello?")).await;
    assert_eq!(status, 200, "{answer}");
    let id = answer["id"].as_str().unwrap().to_owned();
    let value = if answer["choices"][0]["message"]["content"] == "long" { 1 } else { 0 };
    let (status, said) = weir.post("/v1/feedback", &json!({"id": id, "name": "score", "value": value})).await;
    assert_eq!(status, 200, "{said}");
    id
}

fn stop(mut weir: Weir) {
    assert!(weir.stop().success(), "{}", weir.stderr());
}

fn state(dir: &Path, verb: &[&str]) -> (i32, String, String) {
    let data = dir.join("data");
    weir::run(&[&["policy", "state"], verb, &["--data-dir", data.to_str().unwrap()]].concat())
}

fn document(out: &(i32, String, String)) -> Value {
    assert_eq!(out.0, 0, "{}{}", out.1, out.2);
    serde_json::from_str(&out.1).unwrap_or_else(|e| panic!("{e}: {}", out.1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_shown_exported_carried_over_and_forgotten_and_all_of_it_derives_again() {
    let dir = tempfile::tempdir().unwrap();
    let weir = start(dir.path(), LEARNER);
    for _ in 0..30 {
        ask(&weir).await;
    }
    // The log has one writer.
    let (code, _, err) = state(dir.path(), &["reset", "learner"]);
    assert!(code == 1 && err.contains("another weir"), "{code} {err}");
    stop(weir);

    let shown = document(&state(dir.path(), &["show", "learner", "--json"]));
    assert_eq!((&shown["updates"], &shown["learns"]), (&json!(30), &json!(true)), "{shown}");
    assert!(shown["arms"]["dear"]["pulls"].as_u64().unwrap() > 15, "{shown}");
    let (code, exported, err) = state(dir.path(), &["export", "learner"]);
    assert_eq!(code, 0, "{err}");
    let file = dir.path().join("state.json");
    std::fs::write(&file, &exported).unwrap();

    // An edit is another version, which begins with nothing until it is given what the one before has learnt.
    let edited = format!("{LEARNER}# an edit\n");
    let weir = start(dir.path(), &edited);
    ask(&weir).await;
    stop(weir);
    let shown = document(&state(dir.path(), &["show", "learner", "--json"]));
    assert_eq!(shown["updates"], 1, "{shown}");
    let (code, out, err) = state(dir.path(), &["import", "learner", file.to_str().unwrap()]);
    assert!(code == 0 && out.contains("after 2 updates"), "{out}{err}");
    let weir = start(dir.path(), &edited);
    let id = ask(&weir).await;
    let (_, view) = weir.get(&format!("/v1/audit/decisions/{}", id.trim_start_matches("chatcmpl-"))).await;
    let decision = &view["decision"];
    assert_eq!((&decision["state_seq"], &decision["candidates"][1]["propensity"]), (&json!(2), &json!(0.9)), "{view}");
    stop(weir);
    let (code, out, err) = state(dir.path(), &["reset", "learner"]);
    assert!(code == 0 && out.contains("after 4 updates"), "{out}{err}");
    let weir = start(dir.path(), &edited);
    let id = ask(&weir).await;
    let (_, view) = weir.get(&format!("/v1/audit/decisions/{}", id.trim_start_matches("chatcmpl-"))).await;
    assert_eq!(view["decision"]["candidates"][1]["propensity"], 0.5, "{view}");
    stop(weir);

    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    let report = document(&weir::run(&["audit", "reproduce", "--last", "1000", "--data-dir", data, "--json"]));
    assert_eq!(report["same"], 33, "{report}");
    let (code, out, err) = weir::run(&["audit", "verify", "--data-dir", data]);
    assert_eq!(code, 0, "{out}{err}");

    // What is refused is named.
    let (code, _, err) = state(dir.path(), &["show", "teacher"]);
    assert!(code == 1 && err.contains("no policy `teacher`"), "{err}");
    let (code, _, err) = state(dir.path(), &["show", "learner", "--hash", "zz"]);
    assert!(code == 1 && err.contains("has no version zz; there are: "), "{err}");
    std::fs::write(&file, exported.replace("\"dimensions\":2", "\"dimensions\":3")).unwrap();
    let (code, _, err) = state(dir.path(), &["import", "learner", file.to_str().unwrap()]);
    assert!(code == 1 && err.contains("it has 3 features, the policy 2"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diff_says_what_would_move_and_what_it_would_be_worth() {
    let dir = tempfile::tempdir().unwrap();
    let weir = start(dir.path(), LEARNER);
    for _ in 0..40 {
        ask(&weir).await;
    }
    let (_, listed) = weir.get("/v1/audit/decisions?limit=40").await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(40), "{listed}");
    stop(weir);
    let old = dir.path().join("old.yaml");
    let new = dir.path().join("new.yaml");
    let fixed = |split: &str| {
        LEARNER
            .replace("  linucb: {alpha: 0.1, min_pulls: 2}\n  features: [tokens]\n", &format!("  weighted: {split}\n"))
            .replace("min_propensity: 0.1", "min_propensity: 0")
    };
    std::fs::write(&old, fixed("{cheap: 1, dear: 1}")).unwrap();
    std::fs::write(&new, fixed("{cheap: 1, dear: 3}")).unwrap();
    let data = dir.path().join("data");
    let args = |new: &Path| {
        let files = [old.to_str().unwrap(), new.to_str().unwrap()].map(str::to_owned);
        let args = ["policy", "diff", &files[0], &files[1], "--data-dir", data.to_str().unwrap(), "--json"];
        document(&weir::run(&args))
    };
    let report = args(&new)["report"].take();
    assert_eq!((&report["compared"], &report["decisions"]), (&json!(40), &json!(40)), "{report}");
    assert!((report["moved"].as_f64().unwrap() - 0.25).abs() < 1e-9, "{report}");
    assert_eq!(report["flows"][0]["from"], "cheap");
    let effect = &report["effect"];
    let [was, is, by] = ["old", "new", "difference"].map(|k| effect[k].as_f64().unwrap());
    // `dear` is always worth 1 and `cheap` nothing: a weighted share of `dear`, by the probabilities that were logged.
    let share = |cheap: f64, dear: f64| {
        let (mut all, mut liked) = (0.0, 0.0);
        for row in listed["data"].as_array().unwrap() {
            let is_dear = row["arm"] == "dear";
            let weight = if is_dear { dear } else { cheap } / row["propensity"].as_f64().unwrap();
            all += weight;
            liked += if is_dear { weight } else { 0.0 };
        }
        liked / all
    };
    for (got, want) in [(was, share(0.5, 0.5)), (is, share(0.25, 0.75)), (by, is - was)] {
        assert!((got - want).abs() < 1e-9, "{effect}");
    }
    // The policy that made the log against itself: nothing moves.
    let same = args(&old)["report"].take();
    assert_eq!((&same["moved"], &same["effect"]["difference"]), (&json!(0.0), &json!(0.0)), "{same}");
    // The learner as it stands, by its file.
    let own = args(&dir.path().join("learner.yaml"));
    assert!(own["report"]["shares"]["dear"][1].as_f64().unwrap() > 0.8, "{own}");
    assert_eq!(own["notes"], json!([]), "{own}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spent_budget_is_said_and_outlives_a_restart() {
    const FRUGAL: &str = "policy: frugal\nmodels: {dear: {name: dear}}\nselect: {arms: [dear], static: dear}\nbudget: [{per: \
                          session, usd: 0.4, every: 30d}]\n";
    let dir = tempfile::tempdir().unwrap();
    let weir = start(dir.path(), FRUGAL);
    let mut body = chat("auto", "Hello?");
    body["max_tokens"] = json!(100);
    body["user"] = json!("u1");
    body["metadata"] = json!({"session_id": "s1"});
    let (status, answer) = weir.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let mut refused = None;
    for _ in 0..400 {
        let (status, answer) = weir.post("/v1/chat/completions", &body).await;
        if status != 200 {
            refused = Some((status, answer));
            break;
        }
    }
    let (status, answer) = refused.expect("the budget was never spent");
    assert_eq!((status, &answer["error"]["code"]), (429, &json!("insufficient_quota")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("the budget of $0.4 per session"), "{answer}");
    stop(weir);
    let weir = start(dir.path(), FRUGAL);
    let (status, answer) = weir.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 429, "what was spent before the restart is forgotten: {answer}");
    // Another session has its own.
    body["metadata"] = json!({"session_id": "s2"});
    assert_eq!(weir.post("/v1/chat/completions", &body).await.0, 200);
    stop(weir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_calls_are_used_up_is_refused_and_so_is_one_without_tokens() {
    // `probes` makes two calls for an answer, and all of their tokens count.
    const COUNTED: &str = "policy: counted\nmodels: {dear: {name: dear}}\nplans: {probes: {parallel: [{call: dear}, {call: dear}], \
                           aggregate: vote}}\nselect: {arms: [probes], static: probes}\nbudget: [{per: session, calls: 4, tokens: 90, \
                           every: 30d}]\n";
    let dir = tempfile::tempdir().unwrap();
    let weir = start(dir.path(), COUNTED);
    let asked = |session: &str, max_tokens: u32| {
        let mut body = chat("auto", "Hello?");
        (body["user"], body["max_tokens"]) = (json!("u1"), json!(max_tokens));
        body["metadata"] = json!({"session_id": session});
        body
    };
    // What was used is seen soon after an answer, not at once.
    let until_refused = async |weir: &Weir, body: &Value| {
        for answered in 0..400 {
            let (status, answer) = weir.post("/v1/chat/completions", body).await;
            if status != 200 {
                return (answered, status, answer);
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("the budget was never spent");
    };
    let (answered, status, answer) = until_refused(&weir, &asked("s1", 1)).await;
    assert_eq!((status, &answer["error"]["code"]), (429, &json!("insufficient_quota")), "{answer}");
    let said = answer["error"]["message"].as_str().unwrap();
    assert!(said.contains("the budget of 4 calls per session has left, none"), "{said}");
    assert!(answered >= 2, "two answers of two calls are within it: {answered}");
    // What may take more than there is is not begun.
    let (status, answer) = weir.post("/v1/chat/completions", &asked("s2", 100)).await;
    assert_eq!((status, &answer["error"]["code"]), (429, &json!("insufficient_quota")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("the budget of 90 tokens per session"), "{answer}");
    stop(weir);
    // From the store, too.
    let weir = start(dir.path(), COUNTED);
    let (status, answer) = weir.post("/v1/chat/completions", &asked("s1", 1)).await;
    assert_eq!(status, 429, "what was used before the restart is forgotten: {answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("4 calls per session has left, none"), "{answer}");
    stop(weir);
}
