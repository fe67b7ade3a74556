//! The laws of every decision, for every selector and with everything that changes probabilities.

use super::*;
use crate::policy::{
    artifact::{Card, Tensor},
    predict::FAMILIES,
};

const SELECTOR: &str = "linucb: {alpha: 0.7, half_life: 7d, min_pulls: 2}\n  features: [tokens, complexity, {language: \
                        [en, de]}, {embedding: {project: 8}}]";

/// What else may be said beside a selector.
const MODIFIED: &str = "  session: {switch_cost: 0.3, mix: 0.4, bias: 1.5}\n  tenants: {acme: {weights: {small: 3, vault: \
                        0}}}\n  only_if: {large: signals.complexity < 80}\n";
const AFTER: &str = "split: [{name: canary, share: 0.1, by: session, use: vault}]\nbudget: [{per: request, usd: 0.01}, \
                     {per: session, usd: 0.05, when_spent: cheapest}, {per: key, tokens: 9000, calls: 20}]\n";

/// An artifact of random numbers with all that its family reads.
fn artifact(selector: &str) -> Arc<Artifact> {
    let (models, d, inputs) = (4, 16, 18);
    let mut card = Card::new(selector, ["brief", "small", "large", "vault"].map(str::to_owned).to_vec());
    card.embedder = Some((*embedder()).clone());
    card.features = vec!["tokens".into(), "complexity".into()];
    let mut salt = 0;
    let mut random = |shape: &[usize]| {
        salt += 1;
        let n = shape.iter().product::<usize>() as u64;
        Tensor { shape: shape.to_vec(), data: (0..n).map(|i| draw::unit(salt, 77, i) as f32 - 0.5).collect() }
    };
    let mut tensors = BTreeMap::new();
    for (name, shape) in [
        ("cost.w", &[models, 1 + inputs][..]),
        ("ridge.w", &[models, 1 + inputs]),
        ("logistic.w", &[models, 1 + inputs]),
        ("kernel.landmarks", &[5, d]),
        ("kernel.w", &[models, 1 + inputs + 5]),
        ("knn.vectors", &[60, d]),
        ("knn.scores", &[60, models]),
        ("clusters.centroids", &[6, d]),
        ("clusters.scores", &[6, models]),
        ("graph.query", &[8, 1 + inputs]),
        ("graph.models", &[models, 8]),
        ("graph.bias", &[models]),
        ("ensemble.weights", &[FAMILIES.len()]),
    ] {
        tensors.insert(name.to_owned(), random(shape));
    }
    let costs = [[0.002, 0.001, 0.004], [0.001, 0.0, 0.002], [0.02, 0.01, 0.05], [0.003, 0.003, 0.003]].concat();
    tensors.insert("cost.range".to_owned(), Tensor { shape: vec![models, 3], data: costs });
    Arc::new(Artifact::from_bytes(&Artifact::to_bytes(&card, &tensors).unwrap()).unwrap())
}

/// A policy with everything, and a selector that may need an artifact.
fn variant(selector: &str, fitted: Option<&str>) -> Policy {
    let artifact = fitted.map(artifact);
    let selector = match (&artifact, fitted) {
        (Some(artifact), Some(name)) => format!("{name}: {{artifact: x, hash: {}, {selector}}}", artifact.hash),
        _ => selector.to_owned(),
    };
    let yaml = BANDIT.replace(SELECTOR, &selector).replace("reward:\n", &format!("{AFTER}reward:\n"));
    let yaml = yaml.replace("  no_embedding: small\n", &format!("  no_embedding: small\n{MODIFIED}"));
    assert!(yaml.contains("canary") && yaml.contains("acme") && yaml.contains(&selector));
    let spec = parse("test.yaml", yaml.as_bytes()).unwrap();
    let examples = spec.examples().iter().map(|(k, v)| (k.clone(), (0..v.len() as u64).map(unit_vector).collect()));
    let inputs = Inputs {
        fleet: &priced(),
        artifacts: artifact.into_iter().map(|a| ("x".to_owned(), Ok(a))).collect(),
        examples: examples.collect(),
        embedder: Some(embedder()),
    };
    compile(&spec, &inputs).unwrap_or_else(|d| panic!("{selector}: {d}"))
}

fn priced() -> Fleet {
    Fleet::new(fleet().0.into_values().map(|card| {
        let dear = if card.name.starts_with("large") { 10.0 } else { 1.0 };
        ModelCard { price: Price { input: dear, output: 2.0 * dear, cached_input: Some(dear / 10.0) }, ..card }
    }))
}

/// A context with a session, a tenant and spending.
fn busy(policy: &Policy, n: u64) -> Context {
    let mut c = context(policy, n);
    let at = |k: u64| draw::unit(n, 51, k);
    if at(0) < 0.7 {
        c.session.id = format!("s{}", n % 97);
        c.session.last_arm = ["brief", "small", "large", "vault"][(at(1) * 4.0) as usize].to_owned();
        c.session.last_model = ["small-a", "large-1", "gone"][(at(6) * 3.0) as usize].to_owned();
        c.session.last_tokens = (at(7) * 5000.0) as u32;
        c.session.shares = BTreeMap::from([("brief".to_owned(), at(2)), ("vault".to_owned(), 1.0 - at(2))]);
        c.session.judged = BTreeMap::from([("large".to_owned(), at(3) - 0.5)]);
        c.session.spent_usd = at(4) * 0.06;
    }
    if at(5) < 0.3 {
        c.key.tenant = "acme".to_owned();
    }
    if at(6) < 0.2 {
        c.key.id = "team".to_owned();
        (c.key.spent_tokens, c.key.spent_calls) = ((at(7) * 10_000.0).floor(), (at(8) * 21.0).floor());
    }
    c
}

fn hold(name: &str, policy: &Policy) {
    let state = if policy.learns() { learnt(policy, 60) } else { policy.initial_state() };
    let back: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    let mut drawn = BTreeSet::new();
    for n in 0..1500 {
        let c = busy(policy, n);
        let d = policy.decide(&state, &c);
        holds(policy, &c, &d);
        if let (Some(_), "team") = (&d.plan, c.key.id.as_str()) {
            // What runs is bounded by what the key has left, and fits in that.
            let bounds = d.bounds.as_ref().unwrap();
            assert_eq!(bounds.tokens.unwrap() + c.key.spent_tokens as u64, 9000, "{name} {n}");
            assert_eq!(bounds.calls.unwrap() + c.key.spent_calls as u32, 20, "{name} {n}");
            let worst = d.plan.iter().flat_map(Plan::calls).map(|call| call.worst.unwrap().tokens);
            worst.for_each(|tokens| assert!(tokens <= bounds.tokens.unwrap(), "{name} {n}: {d:?}"));
        }
        if let Some(Plan::Call(call)) = &d.plan
            && c.session.id.is_empty()
        {
            // No budget but the one per request applies, and it lets nobody over.
            let tokens = |n: u32, price: f64| f64::from(n) * price / 1e6;
            let price = priced().0[&call.model].price;
            let answer = match (c.request.max_tokens, call.sampling.max_tokens) {
                (0, limit) => limit.unwrap_or(256),
                (asked, limit) => asked.min(limit.unwrap_or(asked)),
            };
            assert!(tokens(c.signals.tokens, price.input) + tokens(answer, price.output) <= 0.01, "{name} {n}: {d:?}");
        }
        assert_eq!(canonical::to_bytes(&d).unwrap(), canonical::to_bytes(&policy.decide(&back, &c)).unwrap());
        drawn.insert(d.arm);
    }
    assert!(drawn.len() >= 4, "{name}: {drawn:?}");
}

#[test]
fn every_selector_gives_probabilities_that_hold() {
    for selector in [
        "static: {small: 1, large: 2, vault: 1}",
        "weighted: {small: 1, large: 2, vault: 1}",
        "cheapest: {}",
        "fastest: {}",
        "similarity: {sets: {refund: {arm: large, above: 0.2}}, default: brief}",
        SELECTOR,
        "thompson: {noise: 0.4, window: 50}\n  features: [tokens, complexity]",
        "epsilon_greedy: {epsilon: 0.3, decay: 0.99}\n  features: [complexity]",
        "linucb: {pacing: {usd_per_request: 0.001}}\n  features: [complexity]",
    ] {
        hold(selector, &variant(selector, None));
    }
    for family in FAMILIES.into_iter().chain(["ensemble"]) {
        hold(family, &variant("cost_weight: 0.1, temperature: 0.2", Some(family)));
        hold(family, &variant("cost_weight: 0.1", Some(family)));
    }
}

#[test]
fn an_explanation_changes_nothing() {
    let policy = variant("cost_weight: 0.1, temperature: 0.2", Some("graph"));
    let state = policy.initial_state();
    for n in 0..200 {
        let c = busy(&policy, n);
        let before = canonical::to_bytes(&policy.decide(&state, &c)).unwrap();
        let decision = policy.decide(&state, &c);
        assert!(!explain::text(&decision, &c).is_empty());
        assert_eq!(canonical::to_bytes(&policy.decide(&state, &c)).unwrap(), before);
    }
}
