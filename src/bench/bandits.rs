//! `weir bench bandits`: the learning selectors online. Routing outcomes are a stream in seeded random orders; every
//! request is decided by the real policy, rewarded at once, and folded, as the learner would.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use serde::Serialize;

use super::report::Machine;
use crate::{
    domain::{Capabilities, Context, Embedding, Fleet, ModelCard, ModelState, Price, Signals, StateUpdate},
    fit::Inputs,
    policy::{self, Artifact, Inputs as Compile, Policy},
    replay::{matrix::Matrix, metrics::SplitMix},
};

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub orders: u64,
    /// Reward is score less this times the cost over the best single model's mean cost.
    pub cost_weight: f64,
}

/// A bandit on a data set: means and standard deviations over the orders.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub bandit: String,
    pub mean_reward: f64,
    /// Cumulative regret: what the other would have earned more, over the whole stream.
    pub regret_oracle: (f64, f64),
    pub regret_best_single: (f64, f64),
    pub regret_best_per_task: (f64, f64),
    pub regret_random: (f64, f64),
}

/// What became of an arm that appears, or changes.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    pub bandit: String,
    pub figures: BTreeMap<String, f64>,
}

/// A data set.
#[derive(Clone, Debug, Serialize)]
pub struct Set {
    pub name: String,
    pub queries: usize,
    pub models: usize,
    pub rows: Vec<Row>,
    /// The best arm is not there in the first half.
    pub added: Vec<Event>,
    /// An arm's quality collapses at half time and recovers at three quarters.
    pub collapse: Vec<Event>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Set>,
    pub plan: Plan,
    pub machine: Machine,
}

const RULES: [(&str, &str); 3] = [
    ("linucb", "linucb: {alpha: 0.3, min_pulls: 20"),
    ("thompson", "thompson: {noise: 0.3, min_pulls: 20"),
    ("epsilon_greedy", "epsilon_greedy: {epsilon: 0.2, decay: 0.998, min_pulls: 20"),
];

/// For streams that change: the exploration that policies have by default, and an ε that does not decay.
const CHANGING: [(&str, &str); 3] = [
    ("linucb", "linucb: {alpha: 0.5"),
    ("thompson", "thompson: {noise: 0.5"),
    ("epsilon_greedy", "epsilon_greedy: {epsilon: 0.2"),
];

/// Requests that a warm start counts as: the default of policies.
const PULLS: u32 = 50;

const CONTEXT: &str = "  features: [tokens, complexity, code_share, {embedding: {project: 12}}]\n  no_embedding: a0\n";

/// A policy over arms `a0`, `a1`, … with a selector and its features.
fn compiled(
    arms: usize,
    selector: &str,
    features: &str,
    inputs: &Inputs,
    reward: &str,
    warm: Option<Arc<Artifact>>,
) -> Result<Policy, String> {
    let names: Vec<String> = (0..arms).map(|i| format!("a{i}")).collect();
    let models: Vec<String> = names.iter().map(|n| format!("{n}: {{name: {n}}}")).collect();
    let yaml = format!(
        "policy: stream\nmodels: {{{}}}\nselect:\n  arms: [{}]\n  {selector}}}\n{features}{}  min_propensity: 0.005\n\
         reward: {{quality: {{weight: 1, from: feedback.score}}{reward}}}\n",
        models.join(", "),
        names.join(", "),
        warm.as_ref().map_or_else(String::new, |a| format!("  warm_start: {{artifact: x, hash: \"{}\"}}\n", a.hash))
    );
    let fleet = Fleet::new(names.iter().map(|name| ModelCard {
        name: name.clone(),
        tags: Vec::new(),
        context: 0,
        price: Price::default(),
        energy: None,
        capabilities: Capabilities::default(),
    }));
    let spec = policy::parse("stream.yaml", yaml.as_bytes()).map_err(|d| d.to_string())?;
    let mut given = Compile::unembedded(&fleet);
    given.embedder = Some(Arc::new(inputs.embedder.clone()));
    given.artifacts = warm.into_iter().map(|a| ("x".to_owned(), Ok(a))).collect();
    policy::compile(&spec, &given).map_err(|d| d.to_string())
}

/// One pass: what each request earned, and the probability of each arm.
struct Pass {
    earned: Vec<f64>,
    propensities: Vec<Vec<f64>>,
}

/// A stream of outcomes.
struct Stream<'a> {
    inputs: &'a Inputs,
    signals: &'a [Signals],
    arms: usize,
    /// Reward of an arm for the n-th request, which is query `q`.
    reward: &'a dyn Fn(usize, usize, usize) -> f64,
    /// Whether an arm is there for the n-th request.
    there: &'a dyn Fn(usize, usize) -> bool,
}

impl Stream<'_> {
    fn pass(&self, policy: &Policy, order: &[usize], seed: u64) -> Result<Pass, String> {
        let embedder = Arc::new(self.inputs.embedder.clone());
        let mut rng = SplitMix(seed);
        let mut state = policy.initial_state();
        let mut out = Pass { earned: Vec::with_capacity(order.len()), propensities: Vec::new() };
        for (n, q) in order.iter().enumerate() {
            let state_of = |arm: usize| ModelState { available: (self.there)(n, arm), ..ModelState::default() };
            let context = Context {
                now: n as i64 * 1_000_000,
                seed: rng.next_u64(),
                signals: self.signals[*q].clone(),
                fleet: (0..self.arms).map(|arm| (format!("a{arm}"), state_of(arm))).collect(),
                embedding: Some(Embedding {
                    vector: Arc::clone(&self.inputs.embeddings[*q]),
                    embedder: Arc::clone(&embedder),
                }),
                ..Context::default()
            };
            let decision = policy.decide(&state, &context);
            let arm = decision.arm.strip_prefix('a').and_then(|n| n.parse().ok()).unwrap_or(0);
            let reward = (self.reward)(n, *q, arm);
            out.earned.push(reward);
            out.propensities.push(decision.candidates.iter().map(|c| c.propensity).collect());
            let update = StateUpdate::of(&decision, state.seq, reward, 0.0, context.now);
            policy.fold(&mut state, &update).map_err(|e| e.to_string())?;
        }
        Ok(out)
    }
}

/// Runs the plan on one set.
///
/// # Errors
/// Where a policy does not compile or an update does not fold; neither can be.
pub fn run(matrix: &Matrix, inputs: &Inputs, plan: &Plan, tick: &dyn Fn()) -> Result<Set, String> {
    let arms = matrix.models.len();
    // A tenth is what a warm start has seen; nobody is judged on it.
    let (all, known) = crate::fit::split(matrix, 0.1, 0x7761_726d);
    let means = matrix.means(&all);
    let top = means.iter().fold((f64::MIN, 0.0), |best, p| if p.score > best.0 { (p.score, p.cost) } else { best }).1;
    let value = |q: usize, arm: usize| matrix.scores(q)[arm] - plan.cost_weight * matrix.costs(q)[arm] / top.max(1e-12);
    let signals: Vec<Signals> = matrix.queries.iter().map(|q| crate::fit::embed::measured(&q.text)).collect();
    let sum = |places: &[usize], arm: usize| places.iter().map(|q| value(*q, arm)).sum::<f64>();
    let best_of = |places: &[usize]| (0..arms).map(|arm| sum(places, arm)).fold(f64::MIN, f64::max);
    let mut tasks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    all.iter().for_each(|q| tasks.entry(&matrix.queries[*q].task).or_default().push(*q));
    let (single, per_task) = (best_of(&all), tasks.values().map(|t| best_of(t)).sum::<f64>());
    let random = (0..arms).map(|arm| sum(&all, arm)).sum::<f64>() / arms as f64;
    let oracle: f64 = all.iter().map(|q| (0..arms).map(|arm| value(*q, arm)).fold(f64::MIN, f64::max)).sum();
    let reward = |_: usize, q: usize, arm: usize| value(q, arm);
    let always = |_: usize, _: usize| true;
    let stream = Stream { inputs, signals: &signals, arms, reward: &reward, there: &always };
    let shuffled = |seed| SplitMix(seed ^ 0x6f72_6465).order(all.len()).into_iter().map(|i| all[i]).collect();
    let orders: Vec<Vec<usize>> = (0..plan.orders).map(shuffled).collect();
    let paid = match plan.cost_weight > 0.0 {
        true => format!(", cost_usd: {{weight: -{}, scale: {}}}", plan.cost_weight, top.max(1e-12)),
        false => String::new(),
    };
    let mut rows = Vec::new();
    for (name, rule) in RULES {
        let cold = compiled(arms, rule, CONTEXT, inputs, &paid, None)?;
        let mut named = matrix.clone();
        named.models = (0..arms).map(|arm| format!("a{arm}")).collect();
        let fitted = crate::fit::warm_start(&cold, &named, inputs, &known, PULLS)?.fitted;
        let warm = Artifact::from_bytes(&fitted.to_bytes().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        for (kind, policy) in [
            ("context-free", compiled(arms, rule, "", inputs, &paid, None)?),
            ("contextual", cold),
            ("contextual, warm start", compiled(arms, rule, CONTEXT, inputs, &paid, Some(Arc::new(warm)))?),
        ] {
            let mut earned = Vec::new();
            for (seed, order) in orders.iter().enumerate() {
                earned.push(stream.pass(&policy, order, seed as u64)?.earned.iter().sum::<f64>());
                tick();
            }
            let regret = |of: f64| spread(&earned.iter().map(|e| of - e).collect::<Vec<f64>>());
            rows.push(Row {
                bandit: format!("{name}, {kind}"),
                mean_reward: spread(&earned).0 / all.len() as f64,
                regret_oracle: regret(oracle),
                regret_best_single: regret(single),
                regret_best_per_task: regret(per_task),
                regret_random: regret(random),
            });
        }
    }
    let added = added(&stream, &orders, &|arm| sum(&all, arm), tick)?;
    let collapse = collapse(matrix, inputs, &signals, &orders, tick)?;
    Ok(Set { name: matrix.name.clone(), queries: matrix.len(), models: arms, rows, added, collapse })
}

/// The best arm comes at half time: its mean probability in the last tenth, the orders in which that is more than a half,
/// and what it earns more per request than the second.
fn added(
    stream: &Stream<'_>,
    orders: &[Vec<usize>],
    worth: &dyn Fn(usize) -> f64,
    tick: &dyn Fn(),
) -> Result<Vec<Event>, String> {
    let best = (0..stream.arms).max_by(|a, b| worth(*a).total_cmp(&worth(*b))).unwrap_or(0);
    let half = orders.first().map_or(0, Vec::len) / 2;
    let there = |n: usize, arm: usize| arm != best || n >= half;
    let stream = Stream { there: &there, ..*stream };
    let mut out = Vec::new();
    let runner_up = (0..stream.arms).filter(|arm| *arm != best).map(worth).fold(f64::MIN, f64::max);
    for (name, rule) in CHANGING {
        let rule = format!("{rule}, min_pulls: 50");
        let policy = compiled(stream.arms, &rule, "", stream.inputs, "", None)?;
        let mut shares = Vec::new();
        for (seed, order) in orders.iter().enumerate() {
            let pass = stream.pass(&policy, order, seed as u64)?;
            let last = &pass.propensities[order.len() - order.len() / 10..];
            shares.push(last.iter().map(|p| p[best]).sum::<f64>() / last.len().max(1) as f64);
            tick();
        }
        let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
        let figures = BTreeMap::from([
            ("mean share in the last tenth".to_owned(), spread(&shares).0),
            ("least share in the last tenth".to_owned(), least),
            ("found in orders".to_owned(), shares.iter().filter(|s| **s > 0.5).count() as f64),
            ("gap to the second".to_owned(), (worth(best) - runner_up) / (2 * half).max(1) as f64),
        ]);
        out.push(Event { bandit: name.to_owned(), figures });
    }
    Ok(out)
}

/// GPT-4 of March and of June 2023 as one arm (Chen, Zaharia, Zou, "How is ChatGPT's behavior changing over time?", arXiv
/// 2307.09009), beside GPT-3.5 of June: how many requests pass until the arm has less than a fifth of the traffic after its
/// collapse, and more than half after its recovery. Nothing for sets without these models.
fn collapse(
    matrix: &Matrix,
    inputs: &Inputs,
    signals: &[Signals],
    orders: &[Vec<usize>],
    tick: &dyn Fn(),
) -> Result<Vec<Event>, String> {
    let place = |name: &str| matrix.models.iter().position(|m| m == name);
    let (Some(march), Some(june), Some(other)) =
        (place("gpt-4-0314"), place("gpt-4-0613"), place("gpt-3.5-turbo-0613"))
    else {
        return Ok(Vec::new());
    };
    let n = orders.first().map_or(0, Vec::len);
    let (falls, recovers) = (n / 2, n * 3 / 4);
    let reward = |at: usize, q: usize, arm: usize| match (arm, (falls..recovers).contains(&at)) {
        (0, false) => matrix.scores(q)[march],
        (0, true) => matrix.scores(q)[june],
        _ => matrix.scores(q)[other],
    };
    let always = |_: usize, _: usize| true;
    let stream = Stream { inputs, signals, arms: 2, reward: &reward, there: &always };
    let mut out = Vec::new();
    for (name, rule) in CHANGING {
        // Within a window an arm that is left would soon count as new again.
        let rule = format!("{rule}, min_pulls: 5");
        for forgetting in ["window: 80", "half_life: 40s", ""] {
            let comma = if forgetting.is_empty() { "" } else { ", " };
            let policy = compiled(2, &format!("{rule}{comma}{forgetting}"), "", inputs, "", None)?;
            let (mut left, mut found) = (Vec::new(), Vec::new());
            for (seed, order) in orders.iter().enumerate() {
                let pass = stream.pass(&policy, order, seed as u64)?;
                // The mean of the newest 25 probabilities: what the traffic shows.
                let share = |at: usize| pass.propensities[at - 24..=at].iter().map(|p| p[0]).sum::<f64>() / 25.0;
                let until = |from: usize, to: usize, holds: &dyn Fn(f64) -> bool| {
                    (from + 24..to).find(|at| holds(share(*at))).map_or((to - from) as f64, |at| (at - from + 1) as f64)
                };
                left.push(until(falls, recovers, &|s| s < 0.2));
                found.push(until(recovers, n, &|s| s > 0.5));
                tick();
            }
            let most = |of: &[f64]| of.iter().copied().fold(0.0, f64::max);
            let figures = BTreeMap::from([
                ("requests until left, median".to_owned(), median(&mut left)),
                ("requests until left, most".to_owned(), most(&left)),
                ("requests until found again, median".to_owned(), median(&mut found)),
                ("requests until found again, most".to_owned(), most(&found)),
            ]);
            let kind = if forgetting.is_empty() { "never forgets" } else { forgetting };
            out.push(Event { bandit: format!("{name}, {kind}"), figures });
        }
    }
    Ok(out)
}

/// Mean and standard deviation.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Report {
    /// Collects sets into the document that all benches print.
    pub fn of(rows: Vec<Set>, plan: Plan) -> Self {
        let mut figures = BTreeMap::new();
        for set in &rows {
            for row in &set.rows {
                figures.insert(
                    format!("{}.{}.regret_oracle", set.name, row.bandit).replace(' ', "_"),
                    row.regret_oracle.0,
                );
            }
            for event in set.added.iter().chain(&set.collapse) {
                for (name, figure) in &event.figures {
                    figures.insert(format!("{}.{}.{name}", set.name, event.bandit).replace(' ', "_"), *figure);
                }
            }
        }
        Self { bench: "bandits", figures, rows, plan, machine: Machine::here() }
    }

    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for set in &self.rows {
            let _ = writeln!(
                out,
                "### {} ({} queries, {} arms, {} orders)\n",
                set.name, set.queries, set.models, self.plan.orders
            );
            let _ = writeln!(out, "Cumulative regret, mean ± standard deviation; negative: the bandit earned more.\n");
            let _ =
                writeln!(out, "| bandit | mean reward | against the oracle | best single | best per task | random |");
            let _ = writeln!(out, "|---|---|---|---|---|---|");
            for r in &set.rows {
                let pm = |(mean, sd): (f64, f64)| format!("{mean:.0} ± {sd:.0}");
                let _ = writeln!(
                    out,
                    "| {} | {:.4} | {} | {} | {} | {} |",
                    r.bandit,
                    r.mean_reward,
                    pm(r.regret_oracle),
                    pm(r.regret_best_single),
                    pm(r.regret_best_per_task),
                    pm(r.regret_random)
                );
            }
            for (title, events) in [
                ("The best arm is added at half time", &set.added),
                ("An arm collapses at half time and recovers at three quarters", &set.collapse),
            ] {
                let Some(first) = events.first() else { continue };
                let names: Vec<&str> = first.figures.keys().map(String::as_str).collect();
                let _ = writeln!(out, "\n{title}:\n\n| bandit | {} |", names.join(" | "));
                let _ = writeln!(out, "|{}", "---|".repeat(names.len() + 1));
                for e in events {
                    let figures: Vec<String> = e.figures.values().map(|f| format!("{f:.3}")).collect();
                    let _ = writeln!(out, "| {} | {} |", e.bandit, figures.join(" | "));
                }
            }
            let _ = writeln!(out);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{domain::EmbedderIdentity, replay::matrix::Query};

    #[test]
    fn a_small_plan_runs_and_contexts_help() {
        let n = 400;
        let queries = (0..n)
            .map(|i| Query { id: i.to_string(), task: (i % 2).to_string(), text: format!("question {i}") })
            .collect();
        // Each model answers one kind of question.
        let scores = (0..n).flat_map(|i| if i % 2 == 0 { [1.0, 0.0] } else { [0.0, 1.0] }).collect();
        let matrix = Matrix::of("made", vec!["a".into(), "b".into()], queries, scores, vec![0.001; 2 * n]);
        let vector =
            |i: usize| -> Arc<[f32]> { if i.is_multiple_of(2) { [1.0, 0.0].into() } else { [0.0, 1.0].into() } };
        let embedder = EmbedderIdentity {
            name: "test".into(),
            weights: String::new(),
            precision: "f32".into(),
            pooling: "cls".into(),
            window: "512".into(),
            dimensions: 2,
        };
        let inputs = Inputs {
            embedder,
            embeddings: (0..n).map(vector).collect(),
            features: vec![vec![0.0; 4]; n],
            models: vec![vector(0), vector(1)],
        };
        let set = run(&matrix, &inputs, &Plan { orders: 2, cost_weight: 0.0 }, &|| {}).unwrap();
        assert_eq!((set.rows.len(), set.added.len(), set.collapse.len()), (9, 3, 0));
        for rows in set.rows.chunks(3) {
            assert!(rows[1].regret_oracle.0 < rows[0].regret_oracle.0 / 2.0, "{rows:?}");
            assert!(rows[2].regret_oracle.0 < rows[1].regret_oracle.0, "{rows:?}");
        }
    }
}
