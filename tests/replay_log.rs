//! `weir replay` over a made log, every arm of which was taken with a quarter: figures that can be had another way, budgets
//! that are simulated, and a replay that is stopped.

use std::{collections::BTreeMap, fs::File, path::Path, time::Duration};

use ::weir::{
    audit::DecisionFilter,
    bench::replay::write_log,
    domain::{Capabilities, Fleet, ModelCard, Price},
    policy::{self, Per, Policy},
    replay::{
        Checkpoints, Export, Page, ReplayError, ReplayReport, Setting, Source, WhatIf,
        estimate::{Asked, Row, estimate, session},
        replay_log,
    },
};
use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{Float64Type, Int64Type},
};
use async_trait::async_trait;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::support::weir;

/// Newest first in an export; 20,000 fill ten row groups.
const DECISIONS: usize = 20_000;
const REWARD: &str = "reward: {quality: {weight: 1, from: feedback.score}, cost_usd: {weight: -0.1, scale: 0.01}}";

fn made(name: &str, rest: &str) -> Policy {
    let price = |usd| Price { input: usd, ..Price::default() };
    let card = |(name, usd): (&str, f64)| ModelCard {
        name: name.to_owned(),
        tags: Vec::new(),
        context: 0,
        price: price(usd),
        energy: None,
        capabilities: Capabilities::default(),
    };
    let models = [("small", 1.0), ("medium", 2.0), ("large", 4.0), ("remote", 8.0)];
    let aliases: Vec<String> = models.iter().map(|(m, _)| format!("{m}: {{name: {m}}}")).collect();
    let yaml = format!("policy: {name}\nmodels: {{{}}}\n{rest}\n{REWARD}\n", aliases.join(", "));
    policy::check(name, yaml.as_bytes(), |_| Fleet::new(models.map(card))).unwrap()
}

async fn replay(
    source: &mut dyn Source,
    policies: &[Policy],
    resume: Option<&Path>,
) -> Result<ReplayReport, ReplayError> {
    let what_if = WhatIf::default();
    let checkpoints = resume.map(|dir| Checkpoints::open(dir, Duration::ZERO)).transpose()?;
    let setting = Setting { store: None, own: &[], what_if: &what_if, checkpoints };
    replay_log(setting, source, policies, &|_| {}).await
}

fn open(log: &Path) -> Export {
    Export::open(log, &DecisionFilter::default(), None).unwrap()
}

/// A log that cannot be read any more after some pages.
struct Broken {
    log: Export,
    left: usize,
}

#[async_trait]
impl Source for Broken {
    async fn next(&mut self) -> Result<Option<Vec<Page>>, ReplayError> {
        if self.left == 0 {
            return Err(ReplayError::Order("the plug was pulled".to_owned()));
        }
        self.left -= 1;
        let pages = self.log.next().await?;
        // One at a time, so that there are as many stops as row groups.
        Ok(pages.map(|mut pages| {
            let rest = pages.split_off(1).len();
            let before: usize = self.log.place().parse().unwrap();
            self.log.go_to(&(before + rest).to_string()).unwrap();
            pages
        }))
    }
    fn about(&self) -> Result<String, ReplayError> {
        self.log.about()
    }
    fn place(&self) -> String {
        self.log.place()
    }
    fn go_to(&mut self, place: &str) -> Result<(), ReplayError> {
        self.log.go_to(place)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_was_stopped_goes_on_and_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made.parquet");
    write_log(&log, DECISIONS, None, &|_| {}).unwrap();
    let arms = "arms: [small, medium, large, remote]";
    let policies = || {
        vec![
            made("even", &format!("select: {{{arms}, weighted: {{small: 1, medium: 1, large: 2, remote: 1}}}}")),
            made("learns", &format!("select: {{{arms}, linucb: {{window: 300}}, features: [tokens, complexity]}}")),
            made(
                "spends",
                &format!("budget: [{{per: tenant, usd: 5, when_spent: cheapest}}]\nselect: {{{arms}, static: large}}"),
            ),
        ]
    };
    let text = |report: &ReplayReport| serde_json::to_string(report).unwrap();
    let whole = text(&replay(&mut open(&log), &policies(), None).await.unwrap());
    let kept = dir.path().join("kept");
    // The first is stopped before anything was done, the next goes on from where the last one was.
    for left in [0, 1, 4, 2] {
        let stopped = replay(&mut Broken { log: open(&log), left }, &policies(), Some(&kept)).await;
        assert!(matches!(stopped, Err(ReplayError::Order(_))));
    }
    let done: serde_json::Value = serde_json::from_slice(&std::fs::read(kept.join("replay.json")).unwrap()).unwrap();
    assert_eq!(done[1]["decisions"], 14_000);
    let others =
        policies()[..2].iter().map(|_| made("even", "select: {arms: [small], static: small}")).collect::<Vec<_>>();
    let refused = replay(&mut open(&log), &others, Some(&kept)).await.unwrap_err().to_string();
    assert!(refused.contains("the middle of another replay"), "{refused}");
    let ended = text(&replay(&mut open(&log), &policies(), Some(&kept)).await.unwrap());
    assert!(whole == ended, "a stopped replay ended otherwise");
    assert!(!kept.exists(), "what was kept is of no use any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_measured_is_what_weights_make_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made.parquet");
    write_log(&log, DECISIONS, None, &|_| {}).unwrap();
    let arms = "arms: [small, medium, large, remote]";
    let policies = [
        made("large", &format!("select: {{{arms}, static: large}}")),
        made("half", &format!("select: {{{arms}, weighted: {{medium: 1, large: 1}}}}")),
    ];
    let report = replay(&mut open(&log), &policies, None).await.unwrap();

    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&log).unwrap()).unwrap().build().unwrap();
    let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
    // Arm, session, cost, milliseconds, oldest first.
    let mut rows: Vec<(String, String, f64, f64)> = Vec::new();
    for batch in &batches {
        let text = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
        let cost = batch.column_by_name("cost_usd").unwrap().as_primitive::<Float64Type>();
        let latency = batch.column_by_name("latency_us").unwrap().as_primitive::<Int64Type>();
        let (arm, of) = (text("arm"), text("session"));
        rows.extend(
            (0..batch.num_rows()).map(|i| {
                (arm.value(i).to_owned(), of.value(i).to_owned(), cost.value(i), latency.value(i) as f64 / 1e3)
            }),
        );
    }
    rows.reverse();
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-9, "{got} is not {want}");
    let mean = |of: &dyn Fn(&str) -> bool| {
        let costs: Vec<f64> = rows.iter().filter(|r| of(&r.0)).map(|r| r.2).collect();
        costs.iter().sum::<f64>() / costs.len() as f64
    };
    close(report.logged.cost_usd.unwrap().value, mean(&|_| true));
    close(report.policies[0].measured.cost_usd.unwrap().value, mean(&|arm| arm == "large"));
    close(report.policies[1].measured.cost_usd.unwrap().value, mean(&|arm| arm == "medium" || arm == "large"));
    let mut times: Vec<f64> = rows.iter().filter(|r| r.0 == "large").map(|r| r.3).collect();
    times.sort_by(f64::total_cmp);
    let p90 = report.policies[0].measured.latency_ms.unwrap().p90;
    assert!((p90 / times[times.len() * 9 / 10] - 1.0).abs() < 0.006, "{p90}");
    assert_eq!(report.logged.joules, None);

    // Whole sessions: the product of the weights up to each turn. Rewards are those of the report's own rows: cost parts only
    // differ by arm, so the sum over judged rows is what the estimator sees; here the weights are what is checked.
    let mut products: BTreeMap<&str, f64> = BTreeMap::new();
    let weighed: Vec<Row> = rows
        .iter()
        .map(|(arm, of, cost, _)| {
            let product = products.entry(of).or_insert(1.0);
            *product *= if arm == "large" || arm == "medium" { 2.0 } else { 0.0 };
            Row::plain(session(of), *product, *cost)
        })
        .collect();
    let expected = estimate(&weighed, Asked::any_reward()).unwrap();
    let whole = report.policies[1].by_session.unwrap();
    assert_eq!(whole.longest, 3);
    // Half of the rows are judged, whatever they are.
    assert!((whole.effective / (expected.effective / 2.0) - 1.0).abs() < 0.1, "{whole:?} {}", expected.effective);
    let single = report.policies[1].estimates.as_ref().unwrap();
    assert!(whole.effective < single.effective);
    // Turns change nothing here, so both ways tell the same.
    let apart = (whole.reward.value - single.snips.value).abs();
    let (low, high) = whole.reward.interval.unwrap();
    assert!(apart < high - low, "{whole:?} {single:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_is_spent_by_the_policy_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made.parquet");
    write_log(&log, DECISIONS, None, &|_| {}).unwrap();
    let spends = |name: &str, when: &str| {
        let budget = format!("budget: [{{per: tenant, usd: 2, every: 1d, when_spent: {when}}}]");
        made(name, &format!("{budget}\nselect: {{arms: [small, large], weighted: {{small: 0, large: 1}}}}"))
    };
    let mut policies = vec![spends("cheapest", "cheapest"), spends("refuse", "refuse"), spends("more", "cheapest")];
    assert!(policies[2].rebudget(Per::Tenant, 8.0));
    assert!(!policies[2].rebudget(Per::Key, 8.0));
    let report = replay(&mut open(&log), &policies, None).await.unwrap();
    let arms = |i: usize, arm: &str| report.policies[i].arms.get(arm).copied().unwrap_or(0);
    // Five tenants with 2 USD each; a call of `large` costs .008 on average, one of `small` a quarter of it, all on one day.
    let (large, more) = (arms(0, "large"), arms(2, "large"));
    assert!((1000..1600).contains(&large), "{large}");
    assert!((4000..6000).contains(&more), "{more}");
    assert_eq!(arms(0, "small"), DECISIONS - large);
    // Refusals cost nothing, so what is small still fits now and then.
    let (large, refused) = (arms(1, "large"), arms(1, ""));
    assert!(large > 1000 && refused > 10_000 && large + arms(1, "small") + refused == DECISIONS, "{large} {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_seconds_and_tokens_are_spent_by_the_policy_that_has_a_budget_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made.parquet");
    write_log(&log, DECISIONS, None, &|_| {}).unwrap();
    let spends = |name: &str, budget: &str| {
        let budget = format!("budget: [{{per: tenant, {budget}, every: 1d, when_spent: cheapest}}]");
        made(name, &format!("{budget}\nselect: {{arms: [small, large], weighted: {{small: 0, large: 1}}}}"))
    };
    let policies =
        [spends("calls", "calls: 250"), spends("seconds", "seconds: 80.1"), spends("tokens", "tokens: 100000")];
    let report = replay(&mut open(&log), &policies, None).await.unwrap();
    let large = |i: usize| report.policies[i].arms.get("large").copied().unwrap_or(0);
    // Five tenants, all on one day; a decision is a call, and takes 0.4 to 0.401 seconds.
    // Of the very first one nothing is known where the log took another arm.
    assert!((1250..=1251).contains(&large(0)), "{}", large(0));
    assert!((1000..=1006).contains(&large(1)), "{}", large(1));
    // And 2,000 tokens on average.
    assert!((230..=270).contains(&large(2)), "{}", large(2));
}

#[test]
fn an_export_has_no_prices_for_a_budget() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made.parquet");
    write_log(&log, 2000, None, &|_| {}).unwrap();
    let at = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let log = log.to_str().unwrap();
    let spends = at(
        "spends.yaml",
        &format!(
            "policy: spends\nmodels: {{large: {{name: large}}, small: {{name: small}}}}\nbudget: [{{per: tenant, usd: 1, when_spent: \
             cheapest}}]\nselect: {{arms: [small, large], static: large}}\n{REWARD}\n"
        ),
    );
    let run = |more: &[&str]| weir::run(&[&["replay", "--data", log, "--json", "--policy", &spends], more].concat());
    let refused = |more: &[&str]| {
        let (code, out, errors) = run(more);
        assert!(code == 1 && out.is_empty(), "{out}{errors}");
        errors
    };
    assert!(refused(&[]).contains("the policy spends has a budget, and an export does not say what models ask"));
    let config = at(
        "weir.yaml",
        "fleet:\n  - {name: small, price: {input: 1, output: 0}, scripted: {rules: [{reply: {text: small}}]}}\n  - {name: large, price: \
         {input: 4, output: 0}, scripted: {rules: [{reply: {text: large}}]}}\n",
    );
    let large = |more: &[&str]| {
        let (code, out, errors) = run(&[&["--config", &config], more].concat());
        assert_eq!(code, 0, "{errors}");
        let report: serde_json::Value = serde_json::from_str(&out).unwrap();
        report["policies"][0]["arms"]["large"].as_u64().unwrap()
    };
    let (one, two) = (large(&[]), large(&["--budget", "tenant=2"]));
    assert!(one > 300 && two as f64 > 1.6 * one as f64 && two < 2000, "{one} {two}");
    assert!(refused(&["--config", &config, "--budget", "key=2"]).contains("no policy here has a budget per key"));
    assert!(
        refused(&["--config", &config, "--budget", "key"]).contains("--budget key: request, session, key or tenant")
    );
}
