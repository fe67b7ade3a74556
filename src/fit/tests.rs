//! Every family on outcomes whose structure is known: two kinds of query, told apart by their vectors.

use std::sync::Arc;

use super::*;
use crate::{
    domain::{Capabilities, Context, Embedding, Fleet, ModelCard, Price},
    policy::{self, Policy, State},
    replay::{matrix::Query, router::Outcomes, router::choices},
};

const D: usize = 24;

fn embedder() -> EmbedderIdentity {
    EmbedderIdentity {
        name: "test".into(),
        weights: "0".into(),
        precision: "f32".into(),
        pooling: "cls".into(),
        window: "512".into(),
        dimensions: D as u32,
    }
}

/// Queries of two kinds in turn: `plain`, which every model answers, and `hard`, which only the strong ones do. A model of
/// the name `poet` answers only the hard ones.
fn outcomes(count: usize, models: &[&str], seed: u64) -> (Matrix, Inputs) {
    let mut rng = SplitMix(seed);
    let mut vector = |towards: Option<usize>| -> Arc<[f32]> {
        let mut raw: Vec<f32> = (0..D).map(|_| rng.normal() as f32 * 0.25).collect();
        towards.into_iter().for_each(|i| raw[i] += 1.0);
        let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
        raw.iter().map(|x| x / norm).collect()
    };
    let embeddings: Vec<Arc<[f32]>> = (0..count).map(|q| vector(Some(q % 2))).collect();
    let names: Vec<Arc<[f32]>> = models.iter().map(|_| vector(None)).collect();
    let mut rng = SplitMix(seed ^ 1);
    let (mut queries, mut scores, mut costs) = (Vec::new(), Vec::new(), Vec::new());
    for q in 0..count {
        let hard = q % 2 == 1;
        let task = if hard { "hard" } else { "plain" };
        queries.push(Query { id: q.to_string(), task: task.into(), text: format!("{task} question number {q}") });
        for model in models {
            let (chance, cost) = match (*model, hard) {
                ("weak", true) => (0.1, 1.0),
                ("weak", false) => (0.9, 1.0),
                ("poet", true) => (0.9, 2.0),
                ("poet", false) => (0.1, 2.0),
                _ => (0.95, 10.0),
            };
            scores.push(if rng.unit() < chance { 1.0 } else { 0.0 });
            costs.push(cost / 1000.0);
        }
    }
    let matrix = Matrix::of("made", models.iter().map(|m| (*m).to_owned()).collect(), queries, scores, costs);
    let features = (0..count).map(|q| {
        let s = embed::measured(&matrix.queries[q].text);
        FEATURES.iter().filter_map(|f| policy::query_feature(f, &s)).collect()
    });
    let inputs = Inputs { embedder: embedder(), embeddings, features: features.collect(), models: names };
    (matrix, inputs)
}

/// AIQ of a fit, and of a random mix of the models, on queries that it has not seen.
fn judged(fitted: &Fitted, matrix: &Matrix, inputs: &Inputs, places: &[usize]) -> (f64, f64) {
    let predictions = report::predictions(&fitted.predictor().unwrap(), inputs, places);
    let outcomes = Outcomes::of(matrix, places, &choices(&predictions));
    let frame = matrix.frame(places).unwrap();
    let all: Vec<usize> = (0..places.len()).collect();
    (frame.aiq(&outcomes.hull(&all)), frame.aiq(&frame.zero))
}

#[test]
fn every_family_learns_who_can_answer_what() {
    let (matrix, inputs) = outcomes(900, &["weak", "strong"], 5);
    let (train, test) = split(&matrix, 0.4, 1);
    for family in Family::ALL {
        let fitted = fit(family, &matrix, &inputs, &train, 3).unwrap();
        let (aiq, zero) = judged(&fitted, &matrix, &inputs, &test);
        // A random mix has .70; to know the kind of every query would be .85.
        assert!(aiq > zero + 0.07, "{}: {aiq} over {zero}", family.as_str());
        let bytes = fitted.to_bytes().unwrap();
        let back = Artifact::from_bytes(&bytes).unwrap();
        assert_eq!((&back.card, &back.tensors), (&fitted.card, &fitted.tensors));
        let again = fit(family, &matrix, &inputs, &train, 3).unwrap();
        assert_eq!(again.to_bytes().unwrap(), bytes, "{}", family.as_str());
    }
    assert!(fit(Family::Ridge, &matrix, &inputs, &train[..19], 0).unwrap_err().contains("at least 20"));
}

#[test]
fn a_model_enters_a_graph_by_a_few_observations() {
    let (matrix, inputs) = outcomes(900, &["weak", "strong", "middling"], 7);
    let (train, test) = split(&matrix, 0.4, 1);
    let fitted = fit(Family::Graph, &matrix, &inputs, &train, 3).unwrap();
    let artifact = Artifact::from_bytes(&fitted.to_bytes().unwrap()).unwrap();
    let (few, seen) = outcomes(60, &["weak", "poet"], 11);
    let grown = extend(&artifact, &few, &seen).unwrap();
    assert_eq!(grown.card.models, ["weak", "strong", "middling", "poet"]);
    let predictor = grown.predictor().unwrap();
    let before = fitted.predictor().unwrap();
    let (mut plain, mut hard) = (0.0, 0.0);
    for q in &test {
        let now = predictor.predict(&inputs.seen(*q));
        assert_eq!(now.quality[..3], before.predict(&inputs.seen(*q)).quality[..]);
        *(if q % 2 == 0 { &mut plain } else { &mut hard }) += now.quality[3] / (test.len() as f64 / 2.0);
    }
    assert!(hard > plain + 0.1, "{plain} {hard}");
    assert!(extend(&artifact, &matrix, &inputs).unwrap_err().contains("already"));
    let ridge = fit(Family::Ridge, &matrix, &inputs, &train, 3).unwrap();
    let ridge = Artifact::from_bytes(&ridge.to_bytes().unwrap()).unwrap();
    assert!(extend(&ridge, &few, &seen).unwrap_err().contains("only a graph"));
}

const BANDIT: &str = "policy: p\nmodels: {weak: {name: weak}, strong: {name: strong}, fresh: {name: fresh}}\nselect:\n  arms: \
                      [weak, strong, fresh]\n  linucb: {feature_ridge: 1, alpha: 0.1}\n  features: [complexity, {embedding: {project: \
                      24}}]\n  no_embedding: strong\n  min_propensity: 0.02\nreward: {quality: {weight: 1, from: \
                      feedback.score}, cost_usd: {weight: -0.2, scale: 0.01}}\n";

fn compiled(yaml: &str, artifact: Option<Arc<Artifact>>) -> Result<Policy, String> {
    let fleet = Fleet::new(["weak", "strong", "fresh"].map(|name| ModelCard {
        name: name.to_owned(),
        tags: Vec::new(),
        context: 0,
        price: Price::default(),
        energy: None,
        capabilities: Capabilities::default(),
    }));
    let spec = policy::parse("p.yaml", yaml.as_bytes()).unwrap();
    let mut given = policy::Inputs::unembedded(&fleet);
    given.embedder = Some(Arc::new(embedder()));
    given.artifacts = artifact.into_iter().map(|a| ("warm".to_owned(), Ok(a))).collect();
    policy::compile(&spec, &given).map_err(|d| d.to_string())
}

#[test]
fn a_bandit_starts_with_what_outcomes_say() {
    let (matrix, inputs) = outcomes(600, &["weak", "strong"], 9);
    let cold = compiled(BANDIT, None).unwrap();
    let all: Vec<usize> = (0..matrix.len()).collect();
    let warm = warm_start(&cold, &matrix, &inputs, &all, 50).unwrap();
    let artifact = Arc::new(Artifact::from_bytes(&warm.fitted.to_bytes().unwrap()).unwrap());
    let hash = artifact.hash;
    let yaml =
        BANDIT.replace("  no_embedding", &format!("  warm_start: {{artifact: warm, hash: {hash}}}\n  no_embedding"));
    let policy = compiled(&yaml, Some(Arc::clone(&artifact))).unwrap();
    let state = policy.initial_state();
    assert_eq!(state.pulls(), BTreeMap::from([("strong", 50), ("weak", 50)]));
    let back: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(back, state);
    let mut right = 0;
    for q in 0..200 {
        let context = Context {
            signals: embed::measured(&matrix.queries[q].text),
            embedding: Some(Embedding { vector: Arc::clone(&inputs.embeddings[q]), embedder: Arc::new(embedder()) }),
            ..Context::default()
        };
        let d = policy.decide(&state, &context);
        // The arm that outcomes know nothing of is cold, and gets its fair share.
        assert!(d.candidates[2].propensity > 0.3, "{:?}", d.candidates);
        let (weak, strong) = (d.candidates[0].propensity, d.candidates[1].propensity);
        right += usize::from((weak > strong) == (q % 2 == 0));
    }
    assert!(right > 150, "{right}");
    let other = compiled(&yaml.replace("[complexity, {", "[tokens, {"), Some(artifact)).unwrap_err();
    assert!(other.contains("fitted with the features complexity, embedding 24"), "{other}");
    assert!(warm_start(&compiled(STATIC, None).unwrap(), &matrix, &inputs, &all, 50).is_err());
}

const STATIC: &str = "policy: p\nmodels: {weak: {name: weak}}\nselect: {arms: [weak], static: weak}\n";
