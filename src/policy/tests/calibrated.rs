//! `p_wrong`: what a calibration makes of a gate, and what is wrong with one.

use super::*;
use crate::{
    cascade::calibration::{Calibration, Direction, Point},
    domain::{Bound, Condition, Score, Scorer},
};

const PLAN: &str = "policy: p\nmodels: {small: {name: s}, large: {name: l}}\nplans:\n  g:\n    cascade:\n      - {call: small, \
                    accept_when: [CONDITION]}\n      - {call: large}\nselect: {arms: [g], static: g}\n";

fn fleet() -> Fleet {
    Fleet::new(["s", "l"].map(|name| card(name, &[], 0, false)))
}

/// Entropies from 0 to 2, of which few below 1 and most above are wrong.
fn calibration(model: &str) -> Arc<Artifact> {
    let point = |i: u32| Point {
        score: f64::from(i) / 500.0,
        wrong: if i < 500 { i.is_multiple_of(50) } else { !i.is_multiple_of(4) },
    };
    let fitted =
        Calibration::fit("mean_token_entropy", Direction::LowIsSure, vec![model.into()], 1, (0..1000).map(point));
    Arc::new(Artifact::from_bytes(&serde_json::to_vec(&fitted.unwrap()).unwrap()).unwrap())
}

fn artifacts(model: &str) -> Artifacts {
    let mut artifacts = Artifacts::from([("c.json".to_owned(), Ok(calibration(model)))]);
    artifacts.insert("gone.json".to_owned(), Err("no such file".to_owned()));
    artifacts
}

fn checked(condition: &str, model: &str) -> Result<Policy, Diagnostics> {
    let yaml = PLAN.replace("CONDITION", condition);
    check_with("t.yaml", yaml.as_bytes(), |_| (fleet(), artifacts(model)))
}

fn gate(policy: &Policy) -> Condition {
    let decision = policy.decide(&policy.initial_state(), &Context::default());
    let Some(Plan::Cascade(stages)) = decision.plan else { panic!("no cascade") };
    stages[0].accept_when[0]
}

#[test]
fn a_guarantee_becomes_a_threshold_of_the_calibrated_score() {
    let policy = checked("{score: p_wrong, max_error: 0.1, calibration: c.json}", "s").unwrap();
    let condition = gate(&policy);
    assert_eq!((condition.score, condition.max_error), (Score::MeanTokenEntropy, Some(0.1)));
    assert_eq!(condition.calibration, Some(calibration("s").hash));
    let Bound::Below(threshold) = condition.bound else { panic!("low is sure") };
    assert!((0.7..1.3).contains(&threshold), "{threshold}");
    let [guaranteed] = policy.guarantees() else { panic!("one gate") };
    assert_eq!(guaranteed.at, "/plans/g/cascade/0/accept_when/0");
    assert_eq!((guaranteed.guarantee.threshold, guaranteed.guarantee.confidence), (threshold, 0.95));
    // Derived again from the record, with the calibration at hand and not without.
    let version = policy.version();
    assert_eq!(version.artifacts["c.json"], calibration("s").hash);
    assert_eq!(from_version(&version, artifacts("s")).unwrap().hash(), policy.hash());
    assert!(from_version(&version, Artifacts::new()).is_err());

    let likely = checked("{score: p_wrong, below: 0.3, calibration: c.json, if_unscored: accept}", "s").unwrap();
    let Bound::Below(threshold) = gate(&likely).bound else { panic!("low is sure") };
    assert!((0.9..1.1).contains(&threshold), "{threshold}");
    assert!(likely.guarantees().is_empty());
    // Of scores from 0 to 2, evenly, the surer quarter.
    let quarter = checked("{score: p_wrong, accepted: 0.25, calibration: c.json}", "s").unwrap();
    let Bound::Below(threshold) = gate(&quarter).bound else { panic!("low is sure") };
    assert!((threshold - 0.499).abs() < 1e-9, "{threshold}");
}

#[test]
fn what_is_wrong_with_a_calibrated_gate_is_named_with_its_place() {
    let cases = [
        ("{score: p_wrong, max_error: 0.1}", "needs a `calibration`"),
        ("{score: p_wrong, max_error: 0.1, calibration: gone.json}", "gone.json cannot be used: no such file"),
        ("{score: p_wrong, calibration: c.json}", "exactly one of `below`, `max_error` and `accepted`"),
        (
            "{score: p_wrong, below: 0.2, max_error: 0.1, calibration: c.json}",
            "exactly one of `below`, `max_error` and `accepted`",
        ),
        ("{score: p_wrong, below: 0.2, confidence: 0.9, calibration: c.json}", "`confidence` only beside `max_error`"),
        ("{score: p_wrong, below: 0.2, accepted: 0.5, calibration: c.json}", "exactly one of `below`, `max_error`"),
        ("{score: p_wrong, accepted: 1, calibration: c.json}", "less than 1"),
        ("{score: mean_margin, above: 0.2, accepted: 0.5}", "`accepted` is of `p_wrong` alone"),
        ("{score: p_wrong, above: 0.2, calibration: c.json}", "`p_wrong` has no `above`"),
        ("{score: p_wrong, below: 1.5, calibration: c.json}", "1.5 is no probability"),
        (
            "{score: p_wrong, max_error: 0.001, calibration: c.json}",
            "no threshold of `mean_token_entropy` keeps 0.001 wrong",
        ),
        ("{score: mean_margin, above: 0.2, calibration: c.json}", "`calibration` is of `p_wrong` alone"),
    ];
    for (condition, words) in cases {
        let found = checked(condition, "s").unwrap_err();
        assert!(found.to_string().contains(words), "{condition}: {found}");
        assert!(found.0.iter().all(|d| d.pointer.starts_with("/plans/g/cascade/0/accept_when/0")), "{found}");
    }
    let found = checked("{score: p_wrong, max_error: 0.1, calibration: c.json}", "other").unwrap_err();
    assert!(found.to_string().contains("says nothing of answers of `s`"), "{found}");
}

#[test]
fn a_learned_gate_is_told_of_the_prompt_when_the_plan_is_decided_on() {
    let mut scorer = Scorer { bias: 0.5, ..Scorer::default() };
    (scorer.weights[3], scorer.signals[2], scorer.signals[5]) = (2.0, -4.0, 1.0);
    let points = (0..400u32).map(|i| Point { score: f64::from(i) / 400.0, wrong: i < 200 });
    let learned = Score::Learned(scorer).name();
    let fitted = Calibration::fit(learned, Direction::HighIsSure, vec!["s".into()], 1, points).unwrap();
    let bytes = serde_json::to_vec(&fitted).unwrap();
    let artifact = || Artifacts::from([("c.json".to_owned(), Ok(Arc::new(Artifact::from_bytes(&bytes).unwrap())))]);
    let yaml = PLAN.replace("CONDITION", "{score: p_wrong, below: 0.3, calibration: c.json}");
    let policy = check_with("t.yaml", yaml.as_bytes(), |_| (fleet(), artifact())).unwrap();
    assert!(policy.measures_pinned());
    let told = |complexity: f64, tools: bool| {
        let mut c = Context::default();
        (c.signals.complexity, c.signals.tools) = (complexity, tools);
        let pinned = policy.pin("g", &policy.initial_state(), &c).unwrap();
        let decided = policy.decide(&policy.initial_state(), &c);
        assert_eq!(pinned.plan, decided.plan);
        let Some(Plan::Cascade(stages)) = decided.plan else { panic!("no cascade") };
        let Score::Learned(told) = stages[0].accept_when[0].score else { panic!("not learned") };
        assert_eq!((told.weights, told.asks_prompt()), (scorer.weights, false));
        told.bias
    };
    assert_eq!((told(0.0, false), told(50.0, false), told(50.0, true)), (0.5, -1.5, -0.5));
}
