//! No failure is silent: a weir in front of servers that stall, cut, refuse, talk nonsense and lie answers every request or
//! ends it with a proper error, and its record says the same as its clients saw.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use ::weir::domain::ErrorKind;
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};

use crate::support::{
    faulty::{Character, Conduct, Faulty, answer_to},
    weir::{self, Weir, chat},
};

/// Unless `WEIR_TEST_REQUESTS` says how many.
const REQUESTS: usize = 2000;
const AT_ONCE: usize = 50;
/// After so many requests everything that is kept is there, and memory is to stay where it is.
const WARM: usize = 500;
/// Far below what 1,500 requests' answers, or their garbage, would take together; above what the allocator moves by.
const GROWTH_KIB: u64 = 48 << 10;
/// Nothing takes that long: what does has hung.
const PATIENCE: Duration = Duration::from_secs(180);

/// Which of them fails is drawn from here.
const SEED: u64 = 7;

/// Mostly good, but for what ails it.
const FLEET: [Character; 5] = [
    Character {
        name: "steady",
        conducts: &[(86, Conduct::Good), (8, Conduct::Drip), (3, Conduct::Failure), (3, Conduct::TooMany)],
        ill: 0..0,
    },
    Character {
        name: "cutter",
        conducts: &[
            (56, Conduct::Good),
            (3, Conduct::StallBeforeHead),
            (3, Conduct::StallWithin),
            (6, Conduct::CutHead),
            (14, Conduct::CutBody),
            (6, Conduct::CutCharacter),
            (6, Conduct::CutField),
            (6, Conduct::BrokenChunks),
        ],
        ill: 0..0,
    },
    Character {
        name: "garbler",
        conducts: &[
            (50, Conduct::Good),
            (6, Conduct::NotJson),
            (6, Conduct::WrongShape),
            (6, Conduct::NoChoice),
            (6, Conduct::ErrorInside),
            (4, Conduct::Empty),
            (6, Conduct::HugeLine),
            (4, Conduct::LongLength),
            (4, Conduct::ShortLength),
            (4, Conduct::Surplus),
            (4, Conduct::DoneAlone),
        ],
        ill: 0..0,
    },
    Character {
        name: "liar",
        conducts: &[(70, Conduct::LyingUsage), (10, Conduct::Good), (10, Conduct::Failure), (10, Conduct::TooMany)],
        ill: 0..0,
    },
    Character { name: SICK, conducts: &[(1, Conduct::Good)], ill: 60..100 },
];

/// The one that fails every call for a while.
const SICK: &str = "sick";

/// Plans of one call. Those of several calls get a text of their own here, and a test of their own below: what
/// [`Record::every_call_has_a_reason`] asks holds of single calls only, all the rest of any plan.
const SINGLE_CALLS: &str = "
policy: faults
models: {steady: {name: steady}, cutter: {name: cutter}, garbler: {name: garbler}, liar: {name: liar}, sick: {name: sick}}
select:
  arms: [steady, cutter, garbler, liar, sick]
  weighted: {steady: 1, cutter: 1, garbler: 1, liar: 1, sick: 1}
fallback: {on: [timeout, rate_limited, server_error, cut, garbage], to: [cutter, liar], retries: 1}
";

/// Plans of several calls: votes, races, stages, hedges.
const COMPOSED: &str = "
policy: faults
models: {steady: {name: steady}, cutter: {name: cutter}, garbler: {name: garbler}, liar: {name: liar}, sick: {name: sick}}
plans:
  voted: {parallel: [{call: steady}, {call: cutter}, {call: liar}], aggregate: vote}
  raced: {parallel: [{call: steady}, {call: garbler}], aggregate: first}
  staged:
    cascade:
      - parallel: [{call: garbler}, {call: cutter}, {call: steady}]
        aggregate: vote
        # These servers say nothing of their tokens.
        accept_when: [{score: mean_logprob, above: -1, if_unscored: escalate}]
      - {call: liar, hedge: {after_ms: 50, call: cutter}}
      - {call: steady}
  hedged: {call: cutter, hedge: {after_ms: 100, call: steady}}
select:
  arms: [voted, raced, staged, hedged, sick]
  weighted: {voted: 1, raced: 1, staged: 1, hedged: 1, sick: 1}
fallback: {on: [timeout, rate_limited, server_error, cut, garbage], to: [cutter, liar], retries: 1}
";

/// How a request ended, as its client saw it.
#[derive(Debug)]
struct Seen {
    id: String,
    stream: bool,
    /// The error's code; `None` where the answer is whole.
    error: Option<String>,
    /// What is wrong with how it ended.
    wrong: Option<String>,
}

fn config(dir: &Path, policy: &str, fleet: &[Faulty]) -> std::path::PathBuf {
    std::fs::write(dir.join("faults.yaml"), policy).unwrap();
    let entry = |server: &Faulty| {
        let (name, url) = (server.name, &server.url);
        format!(
            "  - name: {name}\n    context: 8192\n    price: {{input: 1.0, output: 2.0}}\n    \
             remote: {{url: \"{url}\", first_byte_timeout_s: 1.5, idle_timeout_s: 1.5}}\n"
        )
    };
    let fleet: String = fleet.iter().map(entry).collect();
    weir::config(
        dir,
        &format!(
            "fleet:\n{fleet}policies: [faults.yaml]\nembedder: {{model: \"off\"}}\n\
             breaker: {{calls: 20, failed_share: 0.7, open_s: 0.2, most_open_s: 0.2}}\n"
        ),
    )
}

/// Asks, and looks whether the answer is whole, this request's own, or a proper error.
async fn ask(client: &reqwest::Client, url: &str, model: &str, number: usize) -> Seen {
    let question = format!("question {number}");
    let mut body = chat(model, &question);
    let stream = number.is_multiple_of(2);
    body["stream"] = json!(stream);
    let asks_usage = number.is_multiple_of(4);
    if asks_usage {
        body["stream_options"] = json!({"include_usage": true});
    }
    let asking = async {
        let response = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let (id, kind) = (header("x-request-id"), header("content-type").unwrap_or_default());
        let bytes = response.bytes().await.unwrap_or_else(|e| panic!("{question}, {id:?}: a broken body: {e}"));
        let wanted = answer_to(&question);
        let named = id.is_some();
        let id = id.unwrap_or_default();
        let end = match std::str::from_utf8(&bytes) {
            Err(error) => Err(error.to_string()),
            Ok(_) if !named => Err("nothing says which decision it was".to_owned()),
            Ok(text) if status != 200 => end_of_error(text, status, &kind),
            Ok(text) if stream => end_of_stream(text, &kind, &id, &wanted, asks_usage),
            Ok(text) => end_of_whole(text, &kind, &id, &wanted),
        };
        let text = || String::from_utf8_lossy(&bytes[..bytes.len().min(10_000)]).into_owned();
        let wrong = end.as_ref().err().map(|what| format!("{what}: {question}, {id}, {status} {kind}\n{}\n", text()));
        Seen { id, stream, error: end.unwrap_or(None), wrong }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("question {number} hangs"))
}

type End = Result<Option<String>, String>;

fn parsed(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))
}

/// The code of an error object that has all that clients read.
fn code_of(body: &Value) -> End {
    let word = |name: &str| body["error"][name].as_str().filter(|word| !word.is_empty());
    match (word("message"), word("type"), word("code")) {
        (Some(_), Some(_), Some(code)) => Ok(Some(code.to_owned())),
        _ => Err("not a proper error".to_owned()),
    }
}

fn end_of_error(text: &str, status: u16, kind: &str) -> End {
    if status < 400 || kind != "application/json" {
        return Err("neither an answer nor an error".to_owned());
    }
    code_of(&parsed(text)?)
}

fn end_of_whole(text: &str, kind: &str, id: &str, wanted: &str) -> End {
    let body = parsed(text)?;
    let choice = &body["choices"][0];
    match () {
        () if kind != "application/json" => Err("the type is wrong".to_owned()),
        () if body["id"] != format!("chatcmpl-{id}") => Err("the id is wrong".to_owned()),
        () if choice["message"]["content"] != wanted => Err("not the answer".to_owned()),
        () if choice["finish_reason"] != "stop" => Err("no reason why it ends".to_owned()),
        () => Ok(None),
    }
}

/// Whole, with a reason and `[DONE]`; or with an error event and without it.
fn end_of_stream(text: &str, kind: &str, id: &str, wanted: &str, asks_usage: bool) -> End {
    if !kind.starts_with("text/event-stream") {
        return Err("the type is wrong".to_owned());
    }
    let events = text.strip_suffix("\n\n").ok_or("an event without an end")?;
    let events = events.split("\n\n").filter(|event| !event.starts_with(':'));
    let events: Vec<&str> =
        events.map(|e| e.strip_prefix("data: ")).collect::<Option<_>>().ok_or("an event without data")?;
    let (last, chunks) = events.split_last().ok_or("nothing came")?;
    let (mut content, mut finished) = (String::new(), false);
    for chunk in chunks {
        let chunk = parsed(chunk)?;
        if chunk["id"] != format!("chatcmpl-{id}") || !chunk["choices"].is_array() || chunk.get("error").is_some() {
            return Err(format!("no chunk of this answer: {chunk}"));
        }
        if !asks_usage && chunk["choices"] == json!([]) && !chunk["usage"].is_null() {
            return Err(format!("usage that was not asked for: {chunk}"));
        }
        content += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        finished |= chunk["choices"][0]["finish_reason"] == "stop";
    }
    match *last {
        "[DONE]" if finished && content == wanted => Ok(None),
        "[DONE]" => Err("a good end of what is not whole".to_owned()),
        _ if !wanted.starts_with(&content) => Err("not the beginning of the answer".to_owned()),
        error => code_of(&parsed(error)?),
    }
}

/// What a run left in the record.
struct Record {
    /// By request, in the order of the calls.
    attempts: BTreeMap<String, Vec<Value>>,
    outcomes: BTreeMap<String, Value>,
    decisions: BTreeSet<String>,
    /// What its breaker became, by model, in order.
    breakers: BTreeMap<String, Vec<String>>,
}

impl Record {
    /// Reads all events that `weir audit export` knows of.
    fn read(data: &Path) -> Self {
        let (code, out, err) = weir::run(&["audit", "export", "--jsonl", "-", "--data-dir", data.to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        let mut record = Self {
            attempts: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            decisions: BTreeSet::new(),
            breakers: BTreeMap::new(),
        };
        for line in out.lines() {
            let mut line: Value = serde_json::from_str(line).unwrap();
            let mut event = line["record"].take();
            let (id, body) = (event["decision"].as_str().unwrap_or_default().to_owned(), event["body"].take());
            match event["kind"].as_str().unwrap() {
                "decision" => assert!(record.decisions.insert(id.clone()), "{id} was decided twice"),
                "attempt" => record.attempts.entry(id).or_default().push(body),
                "outcome" => {
                    let before = record.outcomes.insert(id.clone(), body);
                    assert!(before.is_none(), "{id} ended twice");
                }
                "admin" => {
                    if let Some(state) = body["action"].as_str().unwrap().strip_prefix("breaker_") {
                        let model = body["detail"].as_str().unwrap().split_once(": ").unwrap().0;
                        record.breakers.entry(model.to_owned()).or_default().push(state.to_owned());
                    }
                }
                _ => {}
            }
        }
        record.attempts.values_mut().for_each(|all| all.sort_by_key(|attempt| attempt["index"].as_u64()));
        record
    }

    fn attempts_of(&self, id: &str) -> &[Value] {
        self.attempts.get(id).map(Vec::as_slice).unwrap_or_default()
    }

    /// One decision and one outcome of each request and of nothing else, which says what the client saw.
    fn says_what_was_seen(&self, seen: &[Seen]) {
        let ids: BTreeSet<&String> = seen.iter().map(|seen| &seen.id).collect();
        assert_eq!(ids.len(), seen.len(), "an id was given twice");
        assert_eq!(self.decisions.iter().collect::<BTreeSet<_>>(), ids);
        assert_eq!(self.outcomes.keys().collect::<BTreeSet<_>>(), ids);
        for Seen { id, error, stream, .. } in seen {
            let (outcome, attempts) = (&self.outcomes[id], self.attempts_of(id));
            let place = || format!("{id}, stream: {stream}, seen: {error:?}\n{outcome}\n{}", json!(attempts));
            assert_eq!(outcome["attempts"], json!(attempts.len()), "{}", place());
            let indices: Vec<u64> = attempts.iter().map(|attempt| attempt["index"].as_u64().unwrap()).collect();
            assert_eq!(indices, (0..attempts.len() as u64).collect::<Vec<_>>(), "{}", place());
            let known = |error: &Value| ErrorKind::ALL.iter().any(|kind| error == kind.as_str());
            assert!(attempts.iter().all(|a| a["error"].is_null() || known(&a["error"])), "{}", place());
            let cost: f64 = attempts.iter().map(|attempt| attempt["cost_usd"].as_f64().unwrap()).sum();
            assert!((outcome["cost_usd"].as_f64().unwrap() - cost).abs() < 1e-9, "{}", place());
            // A hundred thousand tokens at most are believed, whatever the server says it counted.
            assert!(cost <= 0.2 * attempts.len() as f64, "{}", place());
            let word = match outcome["error"].as_str() {
                None => None,
                Some("rate_limited") => Some("rate_limit_exceeded"),
                Some("breaker_open" | "refused") => Some("model_unavailable"),
                Some(kind) => Some(kind),
            };
            assert_eq!(word, error.as_deref(), "{}", place());
            let status = match outcome["error"].as_str() {
                None => "ok",
                Some("refused") => "refused",
                Some(_) => "error",
            };
            assert_eq!(outcome["status"], status, "{}", place());
        }
    }

    /// A failed call is followed by a retry of the same model, a fallback to another, or the request's end with that very
    /// error; a good one by a good end.
    fn every_call_has_a_reason(&self) {
        for (id, outcome) in &self.outcomes {
            let attempts = self.attempts_of(id);
            let place = || format!("{id}\n{outcome}\n{}", json!(attempts));
            let Some((last, first)) = attempts.last().zip(attempts.first()) else {
                // Every model was left alone: nobody could be asked.
                assert_eq!(outcome["status"], "refused", "{}", place());
                continue;
            };
            assert_eq!(first["why"], "planned", "{}", place());
            for pair in attempts.windows(2) {
                let (failed, next) = (&pair[0], &pair[1]);
                assert!(failed["error"].is_string(), "{}", place());
                match next["why"].as_str() {
                    Some("retry") => assert_eq!(next["model"], failed["model"], "{}", place()),
                    Some("fallback") => assert_ne!(next["model"], failed["model"], "{}", place()),
                    _ => panic!("{}", place()),
                }
            }
            assert_eq!(outcome["error"], last["error"], "{}", place());
            if last["error"].is_null() {
                assert_eq!(outcome["served_by"], last["model"], "{}", place());
            }
        }
    }

    /// Every breaker went from state to state as breakers do.
    fn breakers_are_told_in_order(&self) {
        for (model, states) in &self.breakers {
            let mut before = "closed";
            for state in states {
                let may = match before {
                    "closed" => &["open"][..],
                    "open" => &["half_open"],
                    _ => &["open", "closed"],
                };
                assert!(may.contains(&state.as_str()), "{model}: {states:?}");
                before = state;
            }
        }
    }

    /// How often each value of a field of the attempts occurs.
    fn count(&self, field: &str) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for value in self.attempts.values().flatten().filter_map(|attempt| attempt[field].as_str()) {
            *counts.entry(value).or_default() += 1;
        }
        counts
    }
}

/// What `weir models running` says of a model.
fn running(url: &str, model: &str) -> String {
    let (code, out, err) = weir::run(&["models", "running", "--url", url]);
    assert_eq!(code, 0, "{err}");
    out.lines().find(|line| line.starts_with(model)).unwrap().to_owned()
}

/// Puts a policy in front of the fleet and asks, while memory is watched; then until the one that was ill is trusted again.
/// What was seen, and what is in the record.
async fn run(policy: &str, requests: usize) -> (Vec<Seen>, Record) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut fleet = Vec::new();
    for character in FLEET {
        fleet.push(Faulty::start(character, SEED).await);
    }
    let mut weir = Weir::start(&config(dir.path(), policy, &fleet), &data, &[]);
    let client = weir::client();
    let mut asking =
        stream::iter(0..requests).map(|number| ask(&client, &weir.url, "auto", number)).buffer_unordered(AT_ONCE);
    let mut seen: Vec<Seen> = Vec::new();
    let (mut memory, mut told_open) = (Vec::new(), false);
    while let Some(one) = asking.next().await {
        seen.push(one);
        if seen.len().is_multiple_of(WARM) {
            memory.push(weir.memory());
        }
    }
    drop(asking);
    println!("memory now and at most, KiB, every {WARM} requests: {memory:?}");

    // However fast the run was, the ill one's trial comes to its end.
    for number in requests.. {
        let said = running(&weir.url, SICK);
        if !said.contains("left alone") {
            break;
        }
        told_open |= said.contains("not available, left alone as its calls kept failing");
        assert!(number < requests + 1000, "{SICK} is never trusted again: {said}");
        seen.push(ask(&client, &weir.url, SICK, number).await);
    }
    println!("shown open: {told_open}");
    if let [(warm, _), .., (last, _)] = *memory {
        assert!(last < warm + GROWTH_KIB, "memory grows: {memory:?}");
    }
    assert!(weir.stop().success());
    let said = weir.stderr();
    assert!(!said.contains("panicked"), "{said}");

    let (code, out, err) = weir::run(&["audit", "verify", "--json", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
    let verified: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&verified["passed"], &verified["not_ingested"]), (&json!(true), &json!(0)), "{verified}");

    // Each run of a plan of several calls, from what its calls came to, gives the same decisions again.
    let (code, out, err) = weir::run(&["audit", "reproduce", "--last", "100000", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
    println!("{out}");

    let record = Record::read(&data);
    for server in &fleet {
        // A call that never left (its breaker was open, the connection broke before) is an attempt, too.
        let recorded = record.attempts.values().flatten().filter(|a| a["model"] == server.name).count() as u64;
        assert!(server.requests() <= recorded, "{}: {} > {recorded}", server.name, server.requests());
        println!("{}: {} requests, {recorded} attempts: {:?}", server.name, server.requests(), server.conducts());
        let untried = server.untried();
        assert!(untried.is_empty(), "{}: of {} requests none got {untried:?}", server.name, server.requests());
    }
    (seen, record)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_requests_to_faulty_servers_all_end_properly() {
    let requests = std::env::var("WEIR_TEST_REQUESTS").map_or(REQUESTS, |n| n.parse().unwrap());
    let (seen, record) = run(SINGLE_CALLS, requests).await;
    let mut ends: BTreeMap<(bool, &str), usize> = BTreeMap::new();
    for one in &seen {
        *ends.entry((one.stream, one.error.as_deref().unwrap_or("ok"))).or_default() += 1;
    }
    println!("{} requests, (stream, end): {ends:?}", seen.len());
    println!("attempts: why {:?}, errors {:?}", record.count("why"), record.count("error"));
    let changes: BTreeMap<&str, usize> = record.breakers.iter().map(|(model, all)| (&**model, all.len())).collect();
    println!("changes of breakers: {changes:?}; {SICK}: {:?}", record.breakers.get(SICK));

    let wrong: Vec<&str> = seen.iter().filter_map(|one| one.wrong.as_deref()).collect();
    assert!(wrong.is_empty(), "{} requests ended wrongly:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    record.says_what_was_seen(&seen);
    record.every_call_has_a_reason();
    record.breakers_are_told_in_order();
    let sick = record.breakers.get(SICK).map(Vec::as_slice).unwrap_or_default();
    for state in ["open", "half_open", "closed"] {
        assert!(sick.iter().any(|was| was == state), "{SICK}: {sick:?}");
    }
    assert_eq!(sick.last().map(String::as_str), Some("closed"));
    // The run is worth nothing where nothing went wrong, or everything.
    let good = seen.iter().filter(|one| one.error.is_none()).count();
    assert!(good > requests / 2 && good < seen.len(), "{good} of {}", seen.len());
    let why = record.count("why");
    assert!(why.contains_key("retry") && why.contains_key("fallback"), "{why:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_of_several_calls_over_faulty_servers_all_end_properly() {
    let (seen, record) = run(COMPOSED, 1000).await;
    let wrong: Vec<&str> = seen.iter().filter_map(|one| one.wrong.as_deref()).collect();
    assert!(wrong.is_empty(), "{} requests ended wrongly:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    record.says_what_was_seen(&seen);
    record.breakers_are_told_in_order();
    let why = record.count("why");
    println!("{} requests; attempts: why {why:?}, ends {:?}", seen.len(), record.count("finish"));
    for reason in ["planned", "retry", "fallback", "escalation", "hedge"] {
        assert!(why.contains_key(reason), "{reason}: {why:?}");
    }
    let good = seen.iter().filter(|one| one.error.is_none()).count();
    assert!(good > seen.len() / 2 && good < seen.len(), "{good} of {}", seen.len());
}

/// The limit that `weir models running` shows of a model.
fn limit(url: &str, model: &str) -> u32 {
    let said = running(url, model);
    let shown = said.split(" of ").nth(1).and_then(|rest| rest.split_once(" at most")?.0.parse().ok());
    shown.unwrap_or_else(|| panic!("no limit: {said}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_given_as_many_calls_as_it_bears() {
    let dir = tempfile::tempdir().unwrap();
    let small = Character { name: "small", conducts: &[(1, Conduct::Good)], ill: 0..0 };
    let server = Faulty::start_small(small, SEED, 6, Duration::from_millis(10)).await;
    let yaml = format!(
        "fleet:\n  - name: small\n    context: 8192\n    remote: {{url: \"{}\", adaptive_concurrency: {{initial: 40, max: 64}}}}\n\
         embedder: {{model: \"off\"}}\npolicies: [p.yaml]\n",
        server.url
    );
    std::fs::write(
        dir.path().join("p.yaml"),
        "policy: p\nmodels: {small: {name: small}}\nselect: {arms: [small], static: small}\n",
    )
    .unwrap();
    let weir = Weir::start(&weir::config(dir.path(), &yaml), &dir.path().join("data"), &[]);
    assert_eq!(limit(&weir.url, "small"), 40);
    let client = weir::client();
    // Fifty at a time, so that some always wait.
    let mut asking =
        stream::iter(0..).map(|number| ask(&client, &weir.url, "small", number)).buffer_unordered(50).boxed();
    let mut seen = Vec::new();
    for (places, low, high) in [(6, 3, 7), (25, 13, 26), (3, 1, 4)] {
        server.grow_to(places);
        let before = seen.len();
        while !(low..=high).contains(&limit(&weir.url, "small")) {
            seen.extend((&mut asking).take(50).collect::<Vec<_>>().await);
            assert!(seen.len() < before + 10_000, "{} for {places} places", limit(&weir.url, "small"));
        }
        // There it stays, about: answers that were under way when it fell still let it rise.
        for _ in 0..10 {
            seen.extend((&mut asking).take(50).collect::<Vec<_>>().await);
            let shown = limit(&weir.url, "small");
            assert!((low / 2..=high * 2).contains(&shown), "{shown} for {places} places");
        }
        let metrics = client.get(format!("{}/metrics", weir.url)).send().await.unwrap().text().await.unwrap();
        assert!(metrics.contains("weir_concurrency_limit{gen_ai_request_model=\"small\"} "), "{metrics}");
    }
    let wrong: Vec<&str> = seen.iter().filter_map(|one| one.wrong.as_deref()).collect();
    assert!(wrong.is_empty(), "{}", wrong[0]);
    // What was refused was asked again, and few were refused more than twice.
    let failed = seen.iter().filter(|one| one.error.is_some()).count();
    assert!(failed < seen.len() / 10, "{failed} of {}", seen.len());
}
