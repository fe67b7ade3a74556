//! `weir bench decide`: what one decision costs, selector by selector, with 16 arms and an embedding of 384 dimensions. Run
//! under `valgrind --tool=callgrind` by `eval/bench/decide-instructions.sh` it also gives counts of instructions, which
//! do not depend on what else the machine does.

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Instant};

use serde::Serialize;

use super::report::Machine;
use crate::{
    domain::{
        Capabilities, Context, EmbedderIdentity, Embedding, Fleet, Hash, ModelCard, Price, StateUpdate, canonical,
    },
    policy::{
        self, Artifact, Inputs, Policy, State,
        artifact::{Card, Tensor},
        explain,
        predict::knn::Knn,
    },
    replay::metrics::SplitMix,
};

const ARMS: usize = 16;
const DIMENSIONS: usize = 384;

/// One line: microseconds per decision, median over the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub selector: String,
    pub median_us: f64,
    pub p90_us: f64,
    /// What we mean to stay under, where something is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aim_us: Option<f64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Row>,
    pub machine: Machine,
}

/// A unit vector at random.
pub fn unit_vector(rng: &mut SplitMix, dimensions: usize) -> Vec<f32> {
    let raw: Vec<f32> = (0..dimensions).map(|_| rng.normal() as f32).collect();
    let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
    raw.iter().map(|x| x / norm).collect()
}

fn embedder() -> EmbedderIdentity {
    EmbedderIdentity {
        name: "bench".into(),
        weights: String::new(),
        precision: "f32".into(),
        pooling: "cls".into(),
        window: "512".into(),
        dimensions: DIMENSIONS as u32,
    }
}

/// A fitted artifact of random numbers, of the shapes that `weir policy fit` writes.
fn artifact(selector: &str, rng: &mut SplitMix, examples: usize) -> Result<Arc<Artifact>, String> {
    let mut card = Card::new(selector, (0..ARMS).map(|i| format!("a{i}")).collect());
    card.embedder = Some(embedder());
    card.features = vec!["tokens".into(), "complexity".into()];
    let inputs = 1 + DIMENSIONS + card.features.len();
    let mut random = |shape: &[usize]| Tensor {
        shape: shape.to_vec(),
        data: (0..shape.iter().product()).map(|_| rng.normal() as f32 * 0.1).collect(),
    };
    let mut range = random(&[ARMS, 3]);
    range.data.chunks_exact_mut(3).for_each(|row| row.sort_by(f32::total_cmp));
    let mut tensors = BTreeMap::from([("cost.range".to_owned(), range)]);
    match selector {
        "graph" => {
            tensors.insert("graph.query".into(), random(&[32, inputs]));
            tensors.insert("graph.models".into(), random(&[ARMS, 32]));
            tensors.insert("graph.bias".into(), random(&[ARMS]));
        }
        "knn" => {
            tensors.insert("knn.scores".into(), random(&[examples, ARMS]));
            let data = (0..examples).flat_map(|_| unit_vector(rng, DIMENSIONS)).collect();
            tensors.insert("knn.vectors".into(), Tensor { shape: vec![examples, DIMENSIONS], data });
        }
        _ => {
            tensors.insert(format!("{selector}.w"), random(&[ARMS, inputs]));
        }
    }
    let bytes = Artifact::to_bytes(&card, &tensors).map_err(|e| e.to_string())?;
    Artifact::from_bytes(&bytes).map(Arc::new).map_err(|e| e.to_string())
}

/// A policy of 16 arms with one selector, and its artifact where it needs one.
fn compiled(selector: &str, artifact: Option<Arc<Artifact>>) -> Result<Policy, String> {
    let names: Vec<String> = (0..ARMS).map(|i| format!("a{i}")).collect();
    let models: Vec<String> = names.iter().map(|n| format!("{n}: {{name: {n}}}")).collect();
    let yaml = format!(
        "policy: bench\nmodels: {{{}}}\nrules:\n  - {{name: tools, when: signals.tools, deny_models: [a1]}}\n  - {{name: long, \
         when: signals.tokens > 100000, use: a2}}\nselect:\n  arms: [{}]\n{selector}  no_embedding: a0\nreward: \
         {{quality: {{weight: 1, from: feedback.score}}}}\n",
        models.join(", "),
        names.join(", ")
    );
    let fleet = Fleet::new(names.iter().map(|name| ModelCard {
        name: name.clone(),
        tags: Vec::new(),
        context: 0,
        price: Price { input: 1.0, output: 2.0, cached_input: None },
        energy: None,
        capabilities: Capabilities::default(),
    }));
    let spec = policy::parse("bench.yaml", yaml.as_bytes()).map_err(|d| d.to_string())?;
    let mut given = Inputs::unembedded(&fleet);
    given.embedder = Some(Arc::new(embedder()));
    for (path, _) in spec.artifacts() {
        given.artifacts.insert(path.to_owned(), artifact.clone().ok_or_else(|| "no artifact".to_owned()));
    }
    policy::compile(&spec, &given).map_err(|d| d.to_string())
}

/// A state in which every arm has learnt.
fn learnt(policy: &Policy, contexts: &[Context]) -> Result<State, String> {
    let mut state = policy.initial_state();
    for (n, context) in contexts.iter().cycle().take(320).enumerate() {
        let decision = policy.decide(&state, context);
        let update = StateUpdate {
            arm: format!("a{}", n % ARMS),
            propensity: 1.0,
            ..StateUpdate::of(&decision, state.seq, (n % 7) as f64 / 7.0, 0.0, n as i64)
        };
        policy.fold(&mut state, &update).map_err(|e| e.to_string())?;
    }
    Ok(state)
}

/// Contexts at random, the same for the same seed.
pub fn contexts(count: usize, seed: u64) -> Vec<Context> {
    let mut rng = SplitMix(seed);
    let identity = Arc::new(embedder());
    (0..count)
        .map(|_| {
            let mut context = Context { seed: rng.next_u64(), now: 1, ..Context::default() };
            context.signals.tokens = rng.below(4000) as u32;
            context.signals.query_tokens = rng.below(300) as u32;
            context.signals.complexity = rng.unit() * 100.0;
            context.signals.code_share = rng.unit();
            context.signals.tools = rng.below(4) == 0;
            let vector = unit_vector(&mut rng, DIMENSIONS);
            context.embedding = Some(Embedding { vector: vector.into(), embedder: Arc::clone(&identity) });
            context
        })
        .collect()
}

const BANDIT: &str = "  features: [tokens, complexity, {embedding: {project: 32}}]\n";

fn fitted(selector: &str, artifact: &Artifact) -> String {
    format!("  {selector}: {{artifact: x, hash: {}, cost_weight: 0.1}}\n", artifact.hash)
}

/// A search for the nearest of a vector.
type Search<'a> = &'a dyn Fn(&[f32]) -> Vec<(f64, usize)>;

/// What is measured.
struct Subject {
    name: String,
    policy: Policy,
    state: State,
    /// What is promised, in microseconds.
    aim_us: Option<f64>,
}

fn subjects(contexts: &[Context], examples: usize) -> Result<Vec<Subject>, String> {
    let mut out = Vec::new();
    let mut rng = SplitMix(3);
    for (name, yaml, aim) in [
        ("static", "  static: a3\n".to_owned(), None),
        ("cheapest", "  cheapest: {}\n".to_owned(), None),
        ("linucb, 32-d projection", format!("  linucb: {{}}\n{BANDIT}"), Some(20.0)),
        ("thompson, 32-d projection", format!("  thompson: {{}}\n{BANDIT}"), None),
        ("epsilon_greedy, 32-d projection", format!("  epsilon_greedy: {{}}\n{BANDIT}"), None),
    ] {
        let policy = compiled(&yaml, None)?;
        let state = if policy.learns() { learnt(&policy, contexts)? } else { policy.initial_state() };
        out.push(Subject { name: name.to_owned(), policy, state, aim_us: aim });
    }
    for (selector, aim) in [("ridge", None), ("graph", Some(50.0)), ("knn", Some(1000.0))] {
        let artifact = artifact(selector, &mut rng, examples)?;
        let policy = compiled(&fitted(selector, &artifact), Some(Arc::clone(&artifact)))?;
        let name = if selector == "knn" { format!("knn, {examples} examples") } else { selector.to_owned() };
        let state = policy.initial_state();
        out.push(Subject { name, policy, state, aim_us: aim });
    }
    Ok(out)
}

/// Measures; `only` names one subject, for counting instructions.
///
/// # Errors
/// Where a policy of the bench does not compile; none should.
pub fn run(rounds: usize, examples: usize, only: Option<&str>) -> Result<Report, String> {
    let contexts = contexts(200, 11);
    let mut rows = Vec::new();
    for Subject { name, policy, state, aim_us } in subjects(&contexts, examples)? {
        if only.is_some_and(|only| !name.starts_with(only)) {
            continue;
        }
        let slow = name.starts_with("knn");
        let times = (0..rounds).flat_map(|_| contexts.iter().take(if slow { 20 } else { 200 })).map(|context| {
            let begun = Instant::now();
            black_box(policy.decide(black_box(&state), black_box(context)));
            begun.elapsed().as_secs_f64() * 1e6
        });
        rows.push(row(name, times.collect(), aim_us));
    }
    if only.is_none() {
        let mut rng = SplitMix(5);
        let vectors: Vec<f32> = (0..examples).flat_map(|_| unit_vector(&mut rng, DIMENSIONS)).collect();
        let knn = Knn::new(vectors, Vec::new(), DIMENSIONS, 50, 0.0);
        let queries: Vec<Vec<f32>> = (0..40).map(|_| unit_vector(&mut rng, DIMENSIONS)).collect();
        let timed = |search: Search<'_>| {
            let time = |query: &Vec<f32>| {
                let begun = Instant::now();
                black_box(search(query));
                begun.elapsed().as_secs_f64() * 1e6
            };
            (0..rounds.min(5)).flat_map(|_| &queries).map(time).collect::<Vec<f64>>()
        };
        let exact = timed(&|query| knn.exact(query, 0..examples));
        let near = timed(&|query| knn.nearest(query));
        rows.push(row(format!("exact kNN search, {examples} examples"), exact, Some(10_000.0)));
        rows.push(row(format!("kNN search by bytes and re-rank, {examples} examples"), near, Some(1000.0)));
    }
    let mut figures: BTreeMap<String, f64> =
        rows.iter().map(|r| (format!("{}.median_us", r.selector).replace(' ', "_"), r.median_us)).collect();
    if only.is_none() {
        figures.insert("knn.recall".to_owned(), recall(examples));
    }
    Ok(Report { bench: "decide", figures, rows, machine: Machine::here() })
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let mut out = "| selector | median µs | p90 µs | aim |\n|---|---|---|---|\n".to_owned();
        for row in &self.rows {
            let aim = row.aim_us.map_or_else(|| "–".to_owned(), |us| format!("< {us:.0}"));
            out += &format!("| {} | {:.2} | {:.2} | {aim} |\n", row.selector, row.median_us, row.p90_us);
        }
        if let Some(recall) = self.figures.get("knn.recall") {
            out += &format!("\nRecall of the kNN search by bytes and re-rank: {recall:.4}\n");
        }
        out
    }
}

fn row(selector: String, mut times: Vec<f64>, aim_us: Option<f64>) -> Row {
    times.sort_by(f64::total_cmp);
    let at = |q: f64| times.get((times.len() as f64 * q) as usize).copied().unwrap_or(f64::NAN);
    Row { selector, median_us: at(0.5), p90_us: at(0.9), aim_us }
}

/// Share of the true 50 nearest that the prefilter keeps, on clustered vectors, which are harder than random ones.
fn recall(examples: usize) -> f64 {
    let mut rng = SplitMix(9);
    let centres: Vec<Vec<f32>> = (0..100).map(|_| unit_vector(&mut rng, DIMENSIONS)).collect();
    let near = |rng: &mut SplitMix| -> Vec<f32> {
        let centre = &centres[rng.below(centres.len())];
        let noise = unit_vector(rng, DIMENSIONS);
        let raw: Vec<f32> = centre.iter().zip(&noise).map(|(c, n)| c + 0.5 * n).collect();
        let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
        raw.iter().map(|x| x / norm).collect()
    };
    let vectors: Vec<f32> = (0..examples).flat_map(|_| near(&mut rng)).collect();
    let knn = Knn::new(vectors, Vec::new(), DIMENSIONS, 50, 0.0);
    let (mut found, mut wanted) = (0usize, 0usize);
    for _ in 0..100 {
        let query = near(&mut rng);
        let got = knn.nearest(&query);
        for (_, place) in knn.exact(&query, 0..examples) {
            wanted += 1;
            found += usize::from(got.iter().any(|(_, g)| *g == place));
        }
    }
    found as f64 / wanted.max(1) as f64
}

/// One hash over the decisions of every subject on `count` random contexts: the same in any build, on any machine, with
/// the state as it was learnt and as it comes back from JSON, and whether or not each is explained.
///
/// # Errors
/// When one of these differs, which it must not.
pub fn verify(count: usize, examples: usize) -> Result<Hash, String> {
    let contexts = contexts(count, 23);
    let mut all = blake3::Hasher::new();
    for Subject { name, policy, state, .. } in subjects(&contexts[..200.min(count)], examples)? {
        let stored = serde_json::to_vec(&state).map_err(|e| e.to_string())?;
        let back: State = serde_json::from_slice(&stored).map_err(|e| e.to_string())?;
        for context in &contexts {
            let decision = policy.decide(&state, context);
            let bytes = canonical::to_bytes(&decision).map_err(|e| e.to_string())?;
            let explained = explain::text(&decision, context);
            let again = canonical::to_bytes(&policy.decide(&back, context)).map_err(|e| e.to_string())?;
            if again != bytes || explained.is_empty() {
                return Err(format!("{name}: a decision differs after export and import, or after it was explained"));
            }
            all.update(&bytes);
        }
    }
    Ok(Hash(*all.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same on every machine and in every build: `weir bench decide --verify` prints the release build's.
    #[test]
    fn ten_thousand_decisions_are_pinned() {
        insta::assert_snapshot!(verify(10_000, 300).unwrap().to_string());
    }
}
