//! `split`: sticky, met over many, and recorded as it is.

use super::*;

const CANARY: &str = r#"
policy: canary
models: {a: {name: small-a}, b: {name: large-1}, c: {name: vault-1}}
select: {arms: [a, b, c], weighted: {a: 3, b: 1}, min_propensity: 0.02}
split:
  - {name: canary, share: 0.2, by: session, use: c}
  - {name: half-of-tenants, share: 0.5, by: tenant, use: b}
"#;

fn of_session(id: u64, seed: u64) -> Context {
    let mut c = Context { seed, ..Context::default() };
    c.session.id = format!("s{id}");
    c
}

#[test]
fn a_session_stays_in_its_share_and_the_share_is_met() {
    let policy = build(CANARY);
    let state = policy.initial_state();
    let mut inside = 0.0;
    for id in 0..2000 {
        let first = policy.decide(&state, &of_session(id, 1));
        for seed in 2..5 {
            let again = policy.decide(&state, &of_session(id, seed));
            let canary = |d: &Decision| d.split.as_deref() == Some("canary");
            assert_eq!(canary(&again), canary(&first));
            if canary(&first) {
                assert_eq!(again.arm, "c");
            }
        }
        inside += f64::from(u8::from(first.split.as_deref() == Some("canary"))) / 2000.0;
    }
    assert!((inside - 0.2).abs() < 0.03, "{inside}");
}

#[test]
fn what_is_recorded_is_how_often_arms_are_taken() {
    let policy = build(CANARY);
    let state = policy.initial_state();
    let n = 20_000;
    let mut taken = BTreeMap::new();
    for id in 0..n {
        let d = policy.decide(&state, &of_session(id, draw::unit(id, 3, 3).to_bits()));
        *taken.entry(d.arm.clone()).or_insert(0.0) += 1.0 / n as f64;
        let p: f64 = d.candidates.iter().map(|c| c.propensity).sum();
        assert!((p - 1.0).abs() < 1e-12);
        assert!(d.candidates.iter().all(|c| c.propensity >= 0.02 - 1e-12), "{:?}", d.candidates);
    }
    let d = policy.decide(&state, &of_session(0, 0));
    for c in d.candidates {
        assert!((taken[&c.arm] - c.propensity).abs() < 0.015, "{} {} {}", c.arm, taken[&c.arm], c.propensity);
    }
}

#[test]
fn a_split_whose_arm_cannot_serve_gives_its_share_back() {
    let policy = build(CANARY);
    let mut c = of_session(1, 7);
    c.fleet.insert("vault-1".into(), ModelState::default());
    for id in 0..200 {
        c.session.id = format!("s{id}");
        let d = policy.decide(&policy.initial_state(), &c);
        assert_ne!(d.arm, "c");
        assert_eq!(d.candidates[2].propensity, 0.0);
        assert!((d.candidates.iter().map(|c| c.propensity).sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
