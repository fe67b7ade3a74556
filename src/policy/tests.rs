//! What every decision must hold, on random contexts and states; and that learning is what it says.

mod budget;
mod calibrated;
mod laws;
mod learning;
mod plans;
mod price;
mod split;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{draw, *};
use crate::domain::{
    Capabilities, Context, DecidedBy, Decision, Elimination, Embedding, ModelState, Need, Plan, Price, RuleOutcome,
    canonical,
};

/// A policy that uses all of the language: two selectors' worth of arms, tags with several entries, restrictions of all
/// kinds, fallback, and an embedding.
const BANDIT: &str = r#"
policy: everything
models:
  small: {tag: small}
  large: {name: large-1}
  vault: {tag: on-prem}
examples: {refund: ["I want my money back"]}
plans:
  brief: {call: small, max_tokens: 100, temperature: 0}
rules:
  - {name: pii, when: signals.pii.count > 0, allow_models: [vault], if_none_left: refuse}
  - {name: batch, when: 'request.metadata.batch == "yes"', deny_models: [large], if_none_left: ignore, on_error: skip}
  - {name: team, when: 'request.metadata["team"].startsWith("x")', deny_models: [vault]}
  - {name: angry, when: signals.similarity.refund > 0.8 && session.turn >= 3, use: large}
  - {name: needs, when: 'request.needs.exists(n, n == "images")', use: vault}
select:
  arms: [brief, small, large, vault]
  linucb: {alpha: 0.7, half_life: 7d, min_pulls: 2}
  features: [tokens, complexity, {language: [en, de]}, {embedding: {project: 8}}]
  min_propensity: 0.02
  no_embedding: small
reward:
  quality: {weight: 1, from: feedback.score}
  cost_usd: {weight: -0.5, scale: 0.01}
fallback: {on: [transient], to: [large, vault, brief], retries: 1}
"#;

const PLAIN: &str = r#"
policy: plain
models: {a: {name: small-a}, b: {name: large-1}, c: {name: vault-1}}
select:
  arms: [a, b, c]
  linucb: {alpha: 0.1, ridge: 1, min_pulls: 5}
  features: [complexity]
  min_propensity: 0.02
reward: {quality: {weight: 1, from: feedback.score}}
"#;

fn card(name: &str, tags: &[&str], context: u32, images: bool) -> ModelCard {
    ModelCard {
        name: name.into(),
        tags: tags.iter().map(|t| (*t).to_owned()).collect(),
        context,
        price: Price::default(),
        energy: None,
        capabilities: Capabilities { images, ..Capabilities::default() },
    }
}

fn fleet() -> Fleet {
    Fleet::new([
        card("small-a", &["small"], 1000, false),
        card("small-b", &["small"], 4000, false),
        card("large-1", &["large"], 0, true),
        card("vault-1", &["on-prem"], 8000, true),
        card("vault-2", &["on-prem", "small"], 8000, false),
    ])
}

fn embedder() -> Arc<EmbedderIdentity> {
    Arc::new(EmbedderIdentity {
        name: "test".into(),
        weights: "0".into(),
        precision: "f32".into(),
        pooling: "cls".into(),
        window: "512".into(),
        dimensions: 16,
    })
}

fn unit_vector(salt: u64) -> Arc<[f32]> {
    let raw: Vec<f32> = (0..16).map(|i| draw::unit(salt, 99, i) as f32 - 0.5).collect();
    let norm = linalg::dot_f32(&raw, &raw).sqrt() as f32;
    raw.iter().map(|x| x / norm).collect()
}

fn build(yaml: &str) -> Policy {
    let spec = parse("test.yaml", yaml.as_bytes()).unwrap();
    let embedder = embedder();
    let examples = spec.examples().iter().map(|(k, v)| (k.clone(), (0..v.len() as u64).map(unit_vector).collect()));
    let inputs =
        Inputs { fleet: &fleet(), artifacts: Artifacts::new(), examples: examples.collect(), embedder: Some(embedder) };
    compile(&spec, &inputs).unwrap()
}

/// A context that is a function of `n`, and that reaches into every branch.
fn context(policy: &Policy, n: u64) -> Context {
    let at = |k: u64| draw::unit(n, 50, k);
    let yes = |k: u64, p: f64| at(k) < p;
    let mut c = Context { seed: n.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..Context::default() };
    c.signals.tokens = (at(0) * 5000.0) as u32;
    c.signals.complexity = at(1) * 100.0;
    c.signals.language = ["en", "de", "fr", "und"][(at(2) * 4.0) as usize].into();
    c.signals.pii.count = u32::from(yes(3, 0.2));
    c.session.turn = 1 + (at(4) * 5.0) as u32;
    c.request.max_tokens = (at(5) * 3000.0) as u32;
    if yes(6, 0.3) {
        c.request.metadata.insert("batch".into(), if yes(7, 0.5) { "yes" } else { "no" }.into());
    }
    if yes(8, 0.4) {
        c.request.metadata.insert("team".into(), if yes(9, 0.5) { "xy" } else { "ab" }.into());
    }
    if yes(10, 0.2) {
        c.request.needs.push(Need::Images);
    }
    for (k, name) in ["small-a", "small-b", "large-1", "vault-1", "vault-2"].into_iter().enumerate() {
        if yes(20 + k as u64, 0.3) {
            let available = yes(30 + k as u64, 0.4);
            c.fleet.insert(name.into(), ModelState { available, running: 1, ..ModelState::default() });
        }
    }
    if yes(11, 0.8) {
        let vector = if yes(12, 0.2) { unit_vector(0) } else { unit_vector(n + 1) };
        c.signals.similarity = policy.similarities(&vector);
        c.signals.embedded = true;
        c.embedding = Some(Embedding { vector, embedder: embedder() });
    } else {
        c.signals.similarity.insert("refund".into(), -1.0);
    }
    c
}

/// A state after `updates` random updates.
fn learnt(policy: &Policy, updates: u64) -> State {
    let mut state = policy.initial_state();
    let arms = policy.arms();
    let mut taught = 0;
    for n in 0.. {
        if taught == updates {
            break;
        }
        let decision = policy.decide(&state, &context(policy, 1_000_000 + n));
        if decision.features.is_empty() {
            continue;
        }
        taught += 1;
        let arm = arms[(draw::unit(n, 60, 0) * arms.len() as f64) as usize];
        let reward = draw::unit(n, 60, 1);
        policy
            .fold(&mut state, &update(policy, taught, arm, decision.features, reward, n as i64 * 1_000_000_000))
            .unwrap();
    }
    state
}

fn update(policy: &Policy, seq: u64, arm: &str, features: Vec<f64>, reward: f64, decided: i64) -> StateUpdate {
    StateUpdate {
        policy: policy.name().into(),
        policy_hash: policy.hash(),
        seq,
        arm: arm.into(),
        features,
        reward,
        cost_usd: 0.0,
        propensity: 0.5,
        decided,
        set: None,
    }
}

/// Models that the restrictions forbid, worked out apart from the code under test.
fn forbidden(c: &Context, dropped: bool) -> BTreeSet<&'static str> {
    let mut out = BTreeSet::new();
    if c.signals.pii.count > 0 {
        out.extend(["small-a", "small-b", "large-1"]);
    }
    if c.request.metadata.get("batch").is_some_and(|b| b == "yes") && !dropped {
        out.insert("large-1");
    }
    // A missing key is an error, and a rule with restrictions then takes effect.
    if c.request.metadata.get("team").is_none_or(|t| t.starts_with('x')) {
        out.extend(["vault-1", "vault-2"]);
    }
    out
}

fn reachable(d: &Decision) -> Vec<&str> {
    let plan = d.plan.iter().flat_map(Plan::models);
    plan.chain(d.fallback.iter().map(|call| call.model.as_str())).collect()
}

fn holds(policy: &Policy, c: &Context, d: &Decision) {
    let dropped = d.rules.iter().any(|r| r.outcome == RuleOutcome::Dropped);
    let forbidden = forbidden(c, dropped);
    for model in reachable(d) {
        assert!(!forbidden.contains(model), "{model} is forbidden: {d:?}");
        assert!(c.fleet.get(model).is_none_or(|s| s.available), "{model} is down: {d:?}");
        let card = &fleet().0[model];
        assert!(c.request.needs.iter().all(|n| card.capabilities.has(*n)), "{model} cannot: {d:?}");
        assert!(card.context == 0 || c.signals.tokens <= card.context, "{model} is too short: {d:?}");
    }
    match d.decided_by {
        DecidedBy::Select => {
            let sum: f64 = d.candidates.iter().map(|c| c.propensity).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
            for candidate in &d.candidates {
                match candidate.eliminated {
                    Some(_) => assert_eq!(candidate.propensity, 0.0),
                    None => assert!(candidate.propensity >= 0.02, "{candidate:?}"),
                }
            }
            let taken = d.candidates.iter().find(|c| c.arm == d.arm).unwrap();
            assert_eq!(taken.propensity.to_bits(), d.propensity.to_bits());
            assert!(d.propensity > 0.0 && d.plan.is_some());
        }
        DecidedBy::Rule | DecidedBy::Pinned if d.plan.is_some() => assert_eq!(d.propensity, 1.0),
        _ => assert!(d.plan.is_none() && d.refusal.is_some() && d.fallback.is_empty()),
    }
    assert_eq!(d.policy_hash, policy.hash());
}

#[test]
fn every_decision_holds_on_ten_thousand_contexts_and_is_the_same_again() {
    let policy = build(BANDIT);
    let again = from_version(&policy.version(), Artifacts::new()).unwrap();
    let state = learnt(&policy, 40);
    let through: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(state, through);
    let (mut by, mut dropped, mut refused, mut unembedded) = (BTreeSet::new(), 0, 0, 0);
    for n in 0..10_000 {
        let c = context(&policy, n);
        let d = policy.decide(&state, &c);
        holds(&policy, &c, &d);
        let bytes = canonical::to_bytes(&d).unwrap();
        assert_eq!(bytes, canonical::to_bytes(&again.decide(&through, &c)).unwrap(), "context {n}");
        by.insert(format!("{:?} {:?} {}", d.decided_by, d.rule, d.arm));
        dropped += usize::from(d.rules.iter().any(|r| r.outcome == RuleOutcome::Dropped));
        refused += usize::from(d.plan.is_none());
        unembedded += usize::from(d.no_embedding.is_some());
        for name in ["large", "brief", "small-a", "vault-2"] {
            let pinned = policy.pin(name, &state, &c).unwrap();
            assert_eq!(pinned.arm, name);
            holds(&policy, &c, &pinned);
        }
    }
    // The contexts must have reached what the assertions are about.
    assert!(
        by.len() >= 8 && dropped > 20 && refused > 100 && unembedded > 100,
        "{by:?} {dropped} {refused} {unembedded}"
    );
    assert!(policy.pin("nothing", &state, &Context::default()).is_none());
}

/// The decisions of this policy on a thousand contexts, as one hash: the same in debug and release, on every machine, in
/// every later version. A change here breaks `reproduce` for every record there is.
#[test]
fn decisions_are_pinned() {
    let policy = build(BANDIT);
    let state = learnt(&policy, 40);
    let mut hasher = blake3::Hasher::new();
    for n in 0..1000 {
        hasher.update(&canonical::to_bytes(&policy.decide(&state, &context(&policy, n))).unwrap());
    }
    insta::assert_snapshot!(hasher.finalize().to_hex().to_string());
}

#[test]
fn missing_quality_teaches_nothing() {
    let policy = build(BANDIT);
    let mut seen = Observed {
        feedback: BTreeMap::new(),
        cost_usd: 0.02,
        tokens: 0,
        calls: 1,
        joules: None,
        latency_us: 1_000_000,
        ttft_us: None,
        status: OutcomeStatus::Ok,
    };
    assert_eq!(policy.reward(&seen), None);
    seen.feedback.insert("score".into(), 0.9);
    assert!((policy.reward(&seen).unwrap() - (0.9 - 1.0)).abs() < 1e-12);
    for status in [OutcomeStatus::Error, OutcomeStatus::Cancelled, OutcomeStatus::Interrupted] {
        assert_eq!(policy.reward(&Observed { status, ..seen.clone() }), None);
    }
    assert_eq!(policy.awaits_feedback(), Some(("score", 86_400_000_000)));
}

#[test]
fn the_hash_covers_all_that_compiling_was_handed() {
    let policy = build(BANDIT);
    assert_eq!(build(BANDIT).hash(), policy.hash());
    assert_ne!(build(&format!("{BANDIT}\n# a comment")).hash(), policy.hash());
    let mut version = policy.version();
    assert_eq!(from_version(&version, Artifacts::new()).unwrap().hash(), policy.hash());
    version.fleet.0.get_mut("large-1").unwrap().price.input = 1.0;
    assert!(from_version(&version, Artifacts::new()).unwrap_err().to_string().contains("altered"));
    let mut version = policy.version();
    version.embedder.as_mut().unwrap().weights = "1".into();
    assert!(from_version(&version, Artifacts::new()).is_err());
    let mut version = policy.version();
    version.examples.get_mut("refund").unwrap()[0] = canonical::vector_to_base64(&unit_vector(7));
    assert!(from_version(&version, Artifacts::new()).is_err());
}

#[test]
fn another_embedder_is_another_policy() {
    let policy = build(BANDIT);
    let mut c = Context::default();
    c.request.metadata.insert("team".into(), "ab".into());
    let other = EmbedderIdentity { weights: "other".into(), ..(*embedder()).clone() };
    c.embedding = Some(Embedding { vector: unit_vector(1), embedder: Arc::new(other) });
    let d = policy.decide(&policy.initial_state(), &c);
    assert!(d.no_embedding.is_some() && d.features.is_empty(), "{d:?}");
    assert!(d.candidates[1].propensity > 0.9);
}

#[test]
fn the_nearest_set_that_is_near_enough_decides() {
    let policy = build(
        r#"
policy: near
models: {a: {name: small-a}, b: {name: large-1}, c: {name: vault-1}}
examples: {refund: ["money back"], greeting: ["hello"]}
select:
  arms: [a, b, c]
  similarity: {sets: {refund: {arm: b, above: 0.8}, greeting: {arm: c}}, default: a}
  no_embedding: c
"#,
    );
    let mut c =
        Context { embedding: Some(Embedding { vector: unit_vector(1), embedder: embedder() }), ..Context::default() };
    let mut arm = |refund: f64, greeting: f64| {
        c.signals.similarity = BTreeMap::from([("refund".into(), refund), ("greeting".into(), greeting)]);
        policy.decide(&policy.initial_state(), &c).arm
    };
    assert_eq!(arm(0.79, 0.2), "a");
    assert_eq!(arm(0.81, 0.2), "b");
    assert_eq!(arm(0.81, 0.9), "c");
    assert_eq!(arm(0.9, 0.9), "c", "equally near: the first by name");
    assert!(policy.needs_embedding());
    assert_eq!(policy.decide(&policy.initial_state(), &Context::default()).arm, "c");
}

#[test]
fn restrictions_bind_whatever_rule_stands_above_them() {
    let policy = build(
        r#"
policy: order
models: {a: {name: small-a}, b: {name: large-1}, c: {name: vault-1}}
rules:
  - {name: wants-b, when: "true", use: b}
  - {name: never-b, when: signals.pii.count > 0, deny_models: [b]}
select: {arms: [a, b, c], static: b}
fallback: {on: [any], to: [b, c]}
"#,
    );
    let mut c = Context::default();
    assert_eq!(policy.decide(&policy.initial_state(), &c).arm, "b");
    c.signals.pii.count = 1;
    let d = policy.decide(&policy.initial_state(), &c);
    assert_eq!(d.arm, "a", "the first arm in order when the selector's is out");
    assert_eq!(d.fallback.iter().map(|f| f.model.as_str()).collect::<Vec<_>>(), ["vault-1"]);
    assert_eq!(d.rules[0].outcome, RuleOutcome::NotUsable);
    assert_eq!(d.candidates[1].eliminated, Some(Elimination::Restriction("never-b".into())));
    let pinned = policy.pin("b", &policy.initial_state(), &c).unwrap();
    assert_eq!((pinned.decided_by, pinned.plan), (DecidedBy::Pinned, None));
}

#[test]
fn failover_knows_how_much_of_a_rate_limit_is_left() {
    let policy = build(
        "policy: limits\nmodels: {a: {name: small-a}, b: {name: large-1}, c: {name: vault-1}}\nselect: {arms: [a], static: a}\n\
         fallback: {on: [any], to: [b, c], weights: {}}\n",
    );
    let mut c = Context::default();
    let state = ModelState { available: true, limit_used: 0.75, ..ModelState::default() };
    c.fleet.insert("large-1".into(), state);
    let graph = policy.decide(&policy.initial_state(), &c).failover.unwrap();
    let left: Vec<Option<f64>> = graph.health.iter().map(|health| health.remaining).collect();
    assert_eq!(left, [Some(0.25), None], "of the other nothing is known");
}

#[test]
fn a_tag_goes_to_the_first_entry_that_nothing_eliminates() {
    let policy = build(BANDIT);
    let mut c = context(&policy, 3);
    c = Context { request: crate::domain::RequestView::default(), fleet: BTreeMap::new(), ..c };
    c.request.metadata.insert("team".into(), "ab".into());
    c.signals.pii.count = 0;
    let mut model = |tokens: u32, max_tokens: u32| {
        c.signals.tokens = tokens;
        c.request.max_tokens = max_tokens;
        let d = policy.pin("brief", &policy.initial_state(), &c).unwrap();
        d.plan.map(|p| p.models()[0].to_owned())
    };
    assert_eq!(model(900, 0).as_deref(), Some("small-a"), "the plan's own limit of 100 is what it may write");
    assert_eq!(model(950, 0).as_deref(), Some("small-b"));
    assert_eq!(model(950, 20).as_deref(), Some("small-a"));
    assert_eq!(model(7000, 9000).as_deref(), Some("vault-2"));
    assert_eq!(model(9000, 1), None);
}

#[test]
fn warnings_say_when_a_log_supports_no_replay() {
    let certain = "policy: x\nmodels: {a: {name: small-a}, b: {name: large-1}}\nselect: {arms: [a, b], static: a}\n";
    assert_eq!(build(certain).warnings().kind(), "replay");
    let floor = certain.replace("static: a", "static: a, min_propensity: 0.1");
    assert!(build(&floor).warnings().0.is_empty());
}

#[test]
fn the_schema_is_one() {
    assert!(jsonschema::validator_for(schema()).is_ok());
    assert!(schema()["properties"]["rules"]["items"]["properties"]["when"].is_object());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = check("x.yaml", &bytes, |_| fleet());
    }

    #[test]
    fn no_yaml_makes_the_reader_panic(text in "[a-z:{}\\[\\]*&!|>\"' \n\t,.#-]{0,120}") {
        let _ = check("x.yaml", text.as_bytes(), |_| fleet());
    }

    /// A real policy with a piece cut out and another put in: deep into the compiler.
    #[test]
    fn no_damage_makes_the_compiler_panic(at in 0..BANDIT.len(), cut in 0..40usize, put in "[a-z0-9:{}\\[\\], .&*\"-]{0,8}") {
        let end = (at + cut).min(BANDIT.len());
        let text = format!("{}{put}{}", &BANDIT[..at], &BANDIT[end..]);
        if let Ok(policy) = check("x.yaml", text.as_bytes(), |_| fleet()) {
            let d = policy.decide(&policy.initial_state(), &Context::default());
            prop_assert_eq!(d.policy_hash, policy.hash());
        }
    }

    /// Weights, floors and outages: always a distribution that respects the floor, or a refusal.
    #[test]
    fn fixed_weights_make_a_distribution(
        weights in proptest::collection::vec(0.0..10.0f64, 3),
        floor in 0.0..0.33f64,
        down in proptest::collection::vec(any::<bool>(), 3),
        seed in any::<u64>(),
    ) {
        prop_assume!(weights.iter().sum::<f64>() > 0.0);
        let yaml = format!(
            "policy: w\nmodels: {{a: {{name: small-a}}, b: {{name: large-1}}, c: {{name: vault-1}}}}\nselect:\n  arms: [a, b, c]\n  static: {{a: {:?}, b: {:?}, c: {:?}}}\n  min_propensity: {floor:?}\n",
            weights[0], weights[1], weights[2]
        );
        let policy = build(&yaml);
        let mut c = Context { seed, ..Context::default() };
        for (name, down) in ["small-a", "large-1", "vault-1"].into_iter().zip(&down) {
            c.fleet.insert(name.into(), ModelState { available: !down, ..ModelState::default() });
        }
        let d = policy.decide(&policy.initial_state(), &c);
        if down.iter().all(|d| *d) {
            prop_assert_eq!(d.decided_by, DecidedBy::Refused);
        } else {
            let sum: f64 = d.candidates.iter().map(|c| c.propensity).sum();
            prop_assert!((sum - 1.0).abs() < 1e-12);
            for (candidate, down) in d.candidates.iter().zip(&down) {
                let holds = if *down { candidate.propensity == 0.0 } else { candidate.propensity >= floor };
                prop_assert!(holds, "{:?}", candidate);
            }
        }
    }
}

/// `cargo test --lib policy::tests::time -- --ignored --nocapture`: what a decision costs, apart from the embedding.
#[test]
#[ignore = "a measurement, not a check"]
fn time() {
    let names: Vec<String> = (0..16).map(|n| format!("a{n}")).collect();
    let plans: String = names.iter().map(|n| format!("  {n}: {{call: small, temperature: 0.5}}\n")).collect();
    let wide = format!(
        "policy: wide\nmodels: {{small: {{name: large-1}}}}\nplans:\n{plans}select:\n  arms: [{}]\n  linucb: {{}}\n  features: [tokens, complexity, {{embedding: {{project: 32}}}}]\n  no_embedding: a0\nreward: {{quality: {{weight: 1, from: feedback.score}}}}\n",
        names.join(", ")
    );
    for (name, yaml) in [
        ("plain linucb, 3 arms", PLAIN),
        ("5 rules, linucb, 4 arms", BANDIT),
        ("linucb, 16 arms, 35 features", wide.as_str()),
    ] {
        let policy = build(yaml);
        let state = match policy.needs_embedding() {
            true => learnt(&policy, 200),
            false => policy.initial_state(),
        };
        let contexts: Vec<Context> = (0..1000).map(|n| context(&policy, n)).collect();
        let start = std::time::Instant::now();
        let mut taken = 0;
        for _ in 0..20 {
            for c in &contexts {
                taken += policy.decide(&state, c).arm.len();
            }
        }
        println!("{name}: {:.2} µs per decision ({taken})", start.elapsed().as_secs_f64() * 1e6 / 20_000.0);
    }
}
