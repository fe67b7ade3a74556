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

/// `own` costs twice as much to be shown a prompt as `other`, and a quarter of that for what it has already.
const CACHED: &str = r#"
policy: thrifty
models: {own: {name: own}, other: {name: other}}
plans:
  checked: {cascade: [{call: own, accept_when: [{score: mean_token_entropy, below: 1}]}, {call: own}]}
select: {arms: [own, other], cheapest: {}}
"#;

fn cached(yaml: &str) -> Policy {
    let price = |input, cached_input| Price { input, output: 1.0, cached_input };
    let fleet = Fleet::new([
        ModelCard { price: price(2.0, Some(0.5)), ..card("own", &[], 0, false) },
        ModelCard { price: price(1.0, None), ..card("other", &[], 0, false) },
    ]);
    check("t.yaml", yaml.as_bytes(), |_| fleet).unwrap()
}

/// A thousand tokens of prompt in a session whose last turn this model answered.
fn turn(last_model: &str, last_tokens: u32) -> Context {
    let mut c = Context::default();
    c.signals.tokens = 1000;
    c.request.max_tokens = 10;
    c.session.last_model = last_model.to_owned();
    c.session.last_tokens = last_tokens;
    c
}

#[test]
fn leaving_a_sessions_model_costs_what_it_forfeits_there() {
    let policy = cached(CACHED);
    // 1.5 USD per million are saved of what it has, and 1000 tokens cost a thousand times 1 USD per million less elsewhere.
    assert_eq!(arm(&policy, &turn("own", 666)), "other");
    assert_eq!(arm(&policy, &turn("own", 667)), "own");
    assert_eq!(arm(&policy, &turn("other", 667)), "other", "the dear one has nothing");
    assert_eq!(arm(&policy, &turn("", 667)), "other");
    let score = |c: &Context| policy.decide(&policy.initial_state(), c).candidates[0].score.unwrap();
    let close = |x: f64, y: f64| (x - y).abs() < 1e-12;
    assert!(close(score(&turn("own", 400)), -(2.0 * 600.0 + 0.5 * 400.0 + 10.0) / 1e6));
    assert!(close(score(&turn("own", 5000)), -(0.5 * 1000.0 + 10.0) / 1e6), "no more than the prompt");

    // Of several calls each is reckoned so.
    let several = cached(&CACHED.replace("arms: [own,", "arms: [checked,"));
    let twice = several.decide(&several.initial_state(), &turn("own", 400)).candidates[0].score.unwrap();
    assert!(close(twice, 2.0 * score(&turn("own", 400))), "{twice}");
}

#[test]
fn what_a_model_in_the_process_has_is_known_and_not_guessed() {
    let policy = cached(CACHED);
    let with = |resident_tokens, last_tokens| {
        let mut c = turn("own", last_tokens);
        let state = ModelState { available: true, prompt_tokens: 2000, resident_tokens, ..ModelState::default() };
        c.fleet.insert("own".into(), state);
        c
    };
    assert_eq!(arm(&policy, &with(1334, 0)), "own", "667 of a thousand");
    assert_eq!(arm(&policy, &with(1332, 0)), "other");
    assert_eq!(arm(&policy, &with(0, 1000)), "other", "it was given away meanwhile");
    assert!(policy.needs_residency());
    assert!(!compiled(CHEAPEST).needs_residency(), "no price depends on it");
    assert!(!cached(&CACHED.replace("cheapest: {}", "fastest: {}")).needs_residency());
}

#[test]
fn budgets_reckon_with_the_full_price() {
    // 1000 tokens at 2 USD and 10 at 1 USD per million.
    let budget = |usd: &str| cached(&format!("{CACHED}budget: [{{per: request, usd: {usd}}}]\n"));
    assert_eq!(arm(&budget("0.002009"), &turn("own", 1000)), "other");
    assert_eq!(arm(&budget("0.00201"), &turn("own", 1000)), "own");
}
