//! Policies on a matrix of outcomes, where what every model would have answered to every query is known: nothing is
//! estimated, but for the spread over queries and orders.
//!
//! Every query is decided by the policy that would serve it, with all models available, in the order of the file; what it
//! earns is weighed by the exact probabilities, so no draw adds noise. A policy that learns gets one draw per query, is
//! told that model's score as the feedback that it waits for, and goes over the queries in several shuffled orders.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    matrix::Matrix,
    metrics::{Hull, Point, SplitMix, bootstrap_within},
};
use crate::{
    domain::{Context, DecidedBy, Micros, ModelState, StateUpdate},
    policy::Policy,
};

/// Resamples of the intervals.
const RESAMPLES: usize = 2000;
/// Time between two queries, for policies that forget by time.
const APART: Micros = 1_000_000;

/// A policy, or something to compare it with.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub name: String,
    /// Of a policy; absent for what it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    pub mean_score: f64,
    pub mean_cost_usd: f64,
    /// Mean score less the best single model's, with the paired 95 % bootstrap interval over queries, widened for the number
    /// of policies (Bonferroni).
    pub gain: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// What the zero router scores at the same mean cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_router: Option<f64>,
    /// Performance gap recovered between the cheapest model and the best single one (Ong et al., arXiv 2406.18665, section
    /// 3.3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgr: Option<f64>,
    /// Mean probability of each model.
    pub shares: BTreeMap<String, f64>,
    /// Share of the queries that were refused; they score and cost nothing.
    pub refused: f64,
    /// Standard deviation of the mean score over orders, for a policy that learns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
    /// Mean score by task, where the file has tasks.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, f64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct OutcomesReport {
    pub outcomes: String,
    /// BLAKE3 of the file.
    pub hash: String,
    pub queries: usize,
    pub models: Vec<String>,
    pub policies: Vec<Line>,
    pub baselines: Vec<Line>,
}

/// Per query: expected score and cost, and the chance of each model.
struct Walk {
    score: Vec<f64>,
    cost: Vec<f64>,
    shares: Vec<f64>,
    refused: f64,
}

impl Walk {
    fn new(queries: usize, models: usize) -> Self {
        Self { score: vec![0.0; queries], cost: vec![0.0; queries], shares: vec![0.0; models], refused: 0.0 }
    }

    /// Query `q` goes to model `m` with probability `p`.
    fn add(&mut self, matrix: &Matrix, q: usize, m: usize, p: f64) {
        self.score[q] += p * matrix.scores(q)[m];
        self.cost[q] += p * matrix.costs(q)[m];
        self.shares[m] += p / matrix.len().max(1) as f64;
    }
}

/// Replays `policies` over `matrix`. `context` has the query's signals and its embedding, and what of them depends on the
/// policy; `orders` is for those that learn.
///
/// # Errors
/// When a policy can reach a model without outcomes, or an update does not fold.
pub fn replay_outcomes(
    matrix: &Matrix,
    policies: &[Policy],
    context: &dyn Fn(&Policy, usize) -> Context,
    orders: u64,
    tick: &dyn Fn(),
) -> Result<OutcomesReport, String> {
    let n = matrix.len();
    let every: Vec<usize> = (0..n).collect();
    let means = matrix.means(&every);
    let frame = matrix.frame(&every);
    let zero = Hull::of(means.iter().copied());
    let pick = |by: &dyn Fn(&Point) -> f64| {
        (0..means.len()).max_by(|a, b| by(&means[*a]).total_cmp(&by(&means[*b])).then(b.cmp(a))).unwrap_or(0)
    };
    let (best, cheapest) = (frame.as_ref().map_or_else(|| pick(&|p| p.score), |f| f.best), pick(&|p| -p.cost));
    let mut tasks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    matrix.queries.iter().enumerate().for_each(|(q, query)| tasks.entry(&query.task).or_default().push(q));
    let by_task = tasks.keys().any(|t| !t.is_empty());
    let line = |name: String, walk: &Walk, alpha: f64| {
        let mean = |of: &[f64]| of.iter().sum::<f64>() / n.max(1) as f64;
        let over: Vec<f64> = every.iter().map(|q| walk.score[*q] - matrix.scores(*q)[best]).collect();
        let mean_of = |sample: &[usize]| sample.iter().map(|i| over[*i]).sum::<f64>() / n.max(1) as f64;
        let interval = bootstrap_within(n, RESAMPLES, 0x6f75_7463, 1.0 - alpha, mean_of);
        let point = Point { cost: mean(&walk.cost), score: mean(&walk.score) };
        let (weak, strong) = (means[cheapest].score, means[best].score);
        Line {
            name,
            hash: None,
            mean_score: point.score,
            mean_cost_usd: point.cost,
            gain: mean(&over),
            interval,
            // A single model's own cost is a sum in another order.
            zero_router: zero.score_at(point.cost * (1.0 + 1e-9)),
            pgr: (strong > weak).then(|| (1e9 * (point.score - weak) / (strong - weak)).round() / 1e9 + 0.0),
            shares: matrix.models.iter().cloned().zip(walk.shares.iter().copied()).filter(|(_, s)| *s > 0.0).collect(),
            refused: walk.refused / n.max(1) as f64,
            deviation: None,
            tasks: match by_task {
                true => tasks
                    .iter()
                    .map(|(task, of)| {
                        let sum: f64 = of.iter().map(|q| walk.score[*q]).sum();
                        ((*task).to_owned(), sum / of.len() as f64)
                    })
                    .collect(),
                false => BTreeMap::new(),
            },
        }
    };
    let mut lines = Vec::new();
    for policy in policies {
        let columns = columns(policy, matrix)?;
        let passes = if policy.learns() { orders.max(1) } else { 1 };
        let mut all = Walk::new(n, matrix.models.len());
        let mut scores = Vec::new();
        for seed in 0..passes {
            let walk = pass(policy, matrix, &columns, context, policy.learns().then_some(seed))?;
            let share = 1.0 / passes as f64;
            for q in 0..n {
                all.score[q] += share * walk.score[q];
                all.cost[q] += share * walk.cost[q];
            }
            all.shares.iter_mut().zip(&walk.shares).for_each(|(a, s)| *a += share * s);
            all.refused += share * walk.refused;
            scores.push(walk.score.iter().sum::<f64>() / n.max(1) as f64);
            tick();
        }
        let mut made = line(policy.name().to_owned(), &all, 0.05 / policies.len() as f64);
        made.hash = Some(policy.hash().short());
        if policy.learns() && scores.len() > 1 {
            let mean = scores.iter().sum::<f64>() / scores.len() as f64;
            let squares: f64 = scores.iter().map(|s| (s - mean).powi(2)).sum();
            made.deviation = Some((squares / (scores.len() - 1) as f64).sqrt());
        }
        lines.push(made);
    }
    let always = |choose: &dyn Fn(usize) -> Vec<(usize, f64)>| {
        let mut walk = Walk::new(n, matrix.models.len());
        every.iter().for_each(|q| choose(*q).into_iter().for_each(|(m, p)| walk.add(matrix, *q, m, p)));
        walk
    };
    let k = matrix.models.len();
    let best_for = |of: &[usize]| {
        let sum = |m: usize| of.iter().map(|q| matrix.scores(*q)[m]).sum::<f64>();
        (0..k).max_by(|a, b| sum(*a).total_cmp(&sum(*b)).then(b.cmp(a))).unwrap_or(0)
    };
    let per_task: BTreeMap<&str, usize> = tasks.iter().map(|(task, of)| (*task, best_for(of))).collect();
    let oracle = |q: usize| {
        let (scores, costs) = (matrix.scores(q), matrix.costs(q));
        let better = |a: &usize, b: &usize| scores[*a].total_cmp(&scores[*b]).then(costs[*b].total_cmp(&costs[*a]));
        (0..k).max_by(|a, b| better(a, b).then(b.cmp(a))).unwrap_or(0)
    };
    let mut baselines = vec![
        line(format!("always {}", matrix.models[best]), &always(&|_| vec![(best, 1.0)]), 0.05),
        line(format!("always {}", matrix.models[cheapest]), &always(&|_| vec![(cheapest, 1.0)]), 0.05),
        line("random".to_owned(), &always(&|_| (0..k).map(|m| (m, 1.0 / k as f64)).collect()), 0.05),
        line("oracle (best model per query)".to_owned(), &always(&|q| vec![(oracle(q), 1.0)]), 0.05),
    ];
    if by_task && tasks.len() > 1 {
        let walk = always(&|q| vec![(per_task[matrix.queries[q].task.as_str()], 1.0)]);
        baselines.insert(3, line("best model per task".to_owned(), &walk, 0.05));
    }
    Ok(OutcomesReport {
        outcomes: matrix.name.clone(),
        hash: matrix.hash.clone(),
        queries: n,
        models: matrix.models.clone(),
        policies: lines,
        baselines,
    })
}

/// Which column of the matrix each model of the policy is.
fn columns(policy: &Policy, matrix: &Matrix) -> Result<BTreeMap<String, usize>, String> {
    let of = |model: &str| {
        matrix.models.iter().position(|m| m == model).map(|at| (model.to_owned(), at)).ok_or_else(|| {
            format!(
                "the policy {} can reach the model {model}, of which {} has no outcomes; it has those of {}",
                policy.name(),
                matrix.name,
                matrix.models.join(", ")
            )
        })
    };
    policy.models().into_iter().map(of).collect()
}

fn pass(
    policy: &Policy,
    matrix: &Matrix,
    columns: &BTreeMap<String, usize>,
    context: &dyn Fn(&Policy, usize) -> Context,
    seed: Option<u64>,
) -> Result<Walk, String> {
    let mut walk = Walk::new(matrix.len(), matrix.models.len());
    let mut rng = SplitMix(seed.unwrap_or(0) ^ 0x7265_706c);
    let order = seed.map_or_else(|| (0..matrix.len()).collect(), |_| rng.order(matrix.len()));
    let mut state = policy.initial_state();
    let fleet: BTreeMap<String, ModelState> =
        columns.keys().map(|m| (m.clone(), ModelState { available: true, ..ModelState::default() })).collect();
    let column = |model: &str| columns.get(model).copied().ok_or_else(|| format!("no outcomes of {model}"));
    for (step, q) in (0i64..).zip(order) {
        let context = Context { now: step * APART, seed: rng.next_u64(), fleet: fleet.clone(), ..context(policy, q) };
        let decision = policy.decide(&state, &context);
        let Some(plan) = &decision.plan else {
            walk.refused += 1.0;
            continue;
        };
        let taken = column(plan.models().first().copied().unwrap_or_default())?;
        if decision.decided_by == DecidedBy::Select {
            for c in decision.candidates.iter().filter(|c| c.propensity > 0.0) {
                let m = match c.arm == decision.arm {
                    true => taken,
                    false => column(policy.first_model(&c.arm).unwrap_or_default())?,
                };
                walk.add(matrix, q, m, c.propensity);
            }
        } else {
            walk.add(matrix, q, taken, 1.0);
        }
        if policy.learns() && decision.decided_by == DecidedBy::Select {
            let (score, cost_usd) = (matrix.scores(q)[taken], matrix.costs(q)[taken]);
            if let Some(reward) = policy.reward(&policy.outcome(score, cost_usd)) {
                let update = StateUpdate::of(&decision, state.seq, reward, cost_usd, context.now);
                policy.fold(&mut state, &update).map_err(|e| e.to_string())?;
            }
        }
    }
    Ok(walk)
}

impl OutcomesReport {
    /// As a table for people.
    pub fn table(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        let all = || self.policies.iter().chain(&self.baselines);
        let width = all().map(|l| l.name.chars().count()).max().unwrap_or(0);
        let _ = writeln!(out, "{} queries, {} models of {}\n", self.queries, self.models.len(), self.outcomes);
        let _ = writeln!(
            out,
            "{:width$}  {:>7}  {:>10}  {:>7}  {:>7}  {:>25}  shares",
            "", "score", "USD", "mix", "PGR", "gain over the best model"
        );
        for l in all() {
            let optional = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
            let gain = l.interval.map_or_else(
                || format!("{:+.4}", l.gain),
                |(low, high)| format!("{:+.4} ({low:+.3} to {high:+.3})", l.gain),
            );
            let mut shares: Vec<(&String, &f64)> = l.shares.iter().collect();
            shares.sort_by(|a, b| b.1.total_cmp(a.1));
            let shares: Vec<String> = shares.iter().take(3).map(|(m, s)| format!("{m} {:.0} %", 100.0 * **s)).collect();
            let refused = if l.refused > 0.0 { format!(", refused {:.1} %", 100.0 * l.refused) } else { String::new() };
            let _ = writeln!(
                out,
                "{:width$}  {:>7.4}  {:>10.3e}  {:>7}  {:>7}  {gain:>25}  {}{refused}",
                l.name,
                l.mean_score,
                l.mean_cost_usd,
                optional(l.zero_router),
                optional(l.pgr),
                shares.join(", ")
            );
        }
        let _ = writeln!(
            out,
            "\nmix: what models drawn at random score at that cost. The oracle picks by the very answers that are scored: where \
             an answer\nis one draw of many, part of its lead is luck that no router can have."
        );
        out
    }
}
