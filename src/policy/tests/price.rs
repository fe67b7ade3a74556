//! `cheapest`, `fastest`, `weighted`, and the conditions of arms.

use super::*;

const CHEAPEST: &str = r#"
policy: thrifty
models: {a: {name: dear}, b: {name: cheap}}
plans: {brief: {call: a, max_tokens: 10}}
select:
  arms: [a, b, brief]
  only_if: {b: signals.complexity < 50}
  cheapest: {}
"#;

fn priced() -> Fleet {
    let price = |input, output| Price { input, output, cached_input: None };
    Fleet::new([
        ModelCard { price: price(2.0, 10.0), ..card("dear", &[], 0, false) },
        ModelCard { price: price(1.0, 1.0), ..card("cheap", &[], 0, false) },
    ])
}

fn compiled(yaml: &str) -> Policy {
    check("t.yaml", yaml.as_bytes(), |_| priced()).unwrap()
}

fn arm(policy: &Policy, c: &Context) -> String {
    policy.decide(&policy.initial_state(), c).arm
}

#[test]
fn the_cheapest_call_is_the_one_that_costs_least_here() {
    let policy = compiled(CHEAPEST);
    let mut c = Context::default();
    c.signals.tokens = 200;
    assert_eq!(arm(&policy, &c), "b");
    let d = policy.decide(&policy.initial_state(), &c);
    // 200 tokens at 1 and 256 at 1 USD per million.
    assert_eq!(d.candidates[1].score, Some(-0.000_456));
    // The plan's own limit makes the dear model the cheaper call for short prompts.
    c.signals.tokens = 10;
    assert_eq!(arm(&policy, &c), "brief");
}

#[test]
fn an_arms_own_condition_takes_it_out_and_says_so() {
    let policy = compiled(CHEAPEST);
    let mut c = Context::default();
    c.signals.tokens = 100;
    c.signals.complexity = 80.0;
    let d = policy.decide(&policy.initial_state(), &c);
    assert_eq!(d.arm, "brief");
    assert_eq!(d.candidates[1].eliminated, Some(Elimination::Condition("its condition does not hold".into())));
}

#[test]
fn the_fastest_is_measured_and_the_unmeasured_is_tried() {
    let policy = compiled(&CHEAPEST.replace("cheapest", "fastest").replace("arms: [a, b, brief]", "arms: [a, b]"));
    let mut c = Context::default();
    let state = |ttft_ms, tokens_per_s, waiting| ModelState {
        available: true,
        ttft_ms,
        tokens_per_s,
        waiting,
        ..ModelState::default()
    };
    c.fleet.insert("dear".into(), state(300.0, 100.0, 0));
    assert_eq!(arm(&policy, &c), "b", "not measured yet");
    c.fleet.insert("cheap".into(), state(100.0, 20.0, 0));
    assert_eq!(arm(&policy, &c), "a", "2.9 s against 12.9 s");
    c.request.max_tokens = 2;
    assert_eq!(arm(&policy, &c), "b", "0.32 s against 0.2 s");
    c.fleet.insert("cheap".into(), state(100.0, 20.0, 4));
    assert_eq!(arm(&policy, &c), "a", "four calls wait there");
}

#[test]
fn weights_are_probabilities() {
    let policy = compiled(
        &CHEAPEST
            .replace("cheapest: {}", "weighted: {a: 1, b: 3}")
            .replace("  only_if: {b: signals.complexity < 50}\n", ""),
    );
    let d = policy.decide(&policy.initial_state(), &Context::default());
    let p: Vec<f64> = d.candidates.iter().map(|c| c.propensity).collect();
    assert_eq!(p, [0.25, 0.75, 0.0]);
}
