//! Policies on a matrix of outcomes, where what every model would have answered to every query is known: nothing is
//! estimated, but for the spread over queries and orders.
//!
//! Plans of several calls are run by the machine that serves ([`super::plan_run`]): what they earn is the score of the answer
//! that is given out, and what they cost is the sum of their calls.
//!
//! Every query is decided by the policy that would serve it, with all models available, in the order of the file; what it
//! earns is weighed by the exact probabilities, so no draw adds noise. A policy that learns gets one draw per query, is
//! told that model's score as the feedback that it waits for, and goes over the queries in several shuffled orders.

mod measure;
mod quoted;
mod table;
mod walk;

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::Serialize;

pub use self::quoted::Quoted;
use self::{
    measure::Measure,
    walk::{Pass, Walk, Way},
};
use super::{
    Checkpoints, WhatIf,
    calibration::{Calibration, Reliability},
    matrix::Matrix,
    metrics::{Pair, Percentiles, Point},
};
use crate::{
    domain::Context,
    policy::{Policy, explain},
};

/// Queries that are shown, of those where policies differ most.
const SHOWN: usize = 12;

/// How a line came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A policy of ours, decided here; nothing of it was fitted on these outcomes.
    #[default]
    Ours,
    /// A policy with an artifact that was fitted on this very file: in distribution, and partly on what it was fitted to, so
    /// no forecast. The fit's own figures are on what was held out.
    InDistribution,
    /// Computed here from the outcomes.
    Computed,
}

impl Origin {
    /// For people.
    pub fn told(self) -> &'static str {
        match self {
            Origin::Ours => "ours",
            Origin::InDistribution => "ours, fitted on this file",
            Origin::Computed => "computed",
        }
    }
}

/// A policy, or something to compare it with.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub name: String,
    pub origin: Origin,
    /// Of a policy; absent for what it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    pub mean_score: f64,
    /// 95 % bootstrap interval over queries, as of the cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_interval: Option<(f64, f64)>,
    pub mean_cost_usd: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_interval: Option<(f64, f64)>,
    /// Mean score less the best single model's, with the paired 95 % bootstrap interval over queries, widened for the number
    /// of policies (Bonferroni).
    pub gain: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// What the per-query oracle scores more.
    pub gap_to_oracle: f64,
    /// What the zero router scores at the same mean cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_router: Option<f64>,
    /// Performance gap recovered between the cheapest model and the best single one (Ong et al., arXiv 2406.18665, section
    /// 3.3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgr: Option<f64>,
    /// Average improvement in quality of what can be had by mixing this with single models (Hu et al., arXiv 2403.12031,
    /// section 4); that of the zero router is beside it in the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq: Option<f64>,
    /// Between two models only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pair: Option<Recovered>,
    /// Where every outcome of the file has a latency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<Percentiles>,
    /// Mean probability of each model.
    pub shares: BTreeMap<String, f64>,
    /// Share of the queries that were refused; they score and cost nothing.
    pub refused: f64,
    /// Share of the queries for which a plan asks for an answer that there is not. They score nothing, so that the figures
    /// are lower bounds; what was paid until then counts.
    #[serde(skip_serializing_if = "is_zero")]
    pub missed: f64,
    /// Standard deviation of the mean score over orders, for a policy that learns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
    /// Whether what a policy expects of the models is what they score; over all models, whichever it would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Cumulative regret in score against the best single model after so many queries, in the order in which they were
    /// decided, mean over the orders; for policies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regret: Vec<(usize, f64)>,
    /// Mean score by task, where the file has tasks.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, f64>,
}

fn is_zero(share: &f64) -> bool {
    *share == 0.0
}

/// Between a weak and a strong model, at any share of calls of the strong one: what mixing the policy with either gives
/// (Ong et al., arXiv 2406.18665, section 3.3).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recovered {
    /// Share of the calls that go to the strong model.
    pub strong: f64,
    /// Area under the performance gap recovered, over shares of strong calls from 0 to 1: one half for a random mix.
    pub apgr: f64,
    /// Least share of strong calls (the call-performance threshold) at which a half, and four fifths, of the gap is
    /// recovered.
    pub cpt_50: Option<f64>,
    pub cpt_80: Option<f64>,
}

/// A query on which policies differ.
#[derive(Clone, Debug, Serialize)]
pub struct Differing {
    pub id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub task: String,
    /// Its first 400 characters.
    pub text: String,
    /// In the order of the policies.
    pub policies: Vec<Choice>,
}

/// What a policy does with a query.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// The likeliest model, with its probability; of a policy that learns over all orders.
    pub model: String,
    pub probability: f64,
    pub score: f64,
    pub cost_usd: f64,
    /// Of the decision; of a policy that learns, of the one in the first order.
    pub explanation: String,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct OutcomesReport {
    pub outcomes: String,
    /// BLAKE3 of the file.
    pub hash: String,
    pub queries: usize,
    /// Rows and queries of the file that could not be used, by reason; nothing is made up for them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub left_out: BTreeMap<String, usize>,
    /// What was taken to be other than it was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what_if: Vec<String>,
    pub models: Vec<String>,
    /// Shuffled orders, for policies that learn.
    pub orders: u64,
    /// Each model's mean cost and score, in the order of `models`.
    pub points: Vec<Point>,
    pub best: String,
    pub cheapest: String,
    /// The zero router's: models drawn at random, whatever the query says.
    pub zero_hull: Vec<Point>,
    /// The same of the models and the policies together.
    pub hull: Vec<Point>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq_zero: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq: Option<f64>,
    pub policies: Vec<Line>,
    pub baselines: Vec<Line>,
    /// What others have published.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quoted: Vec<Quoted>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<Pair>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differing: Vec<Differing>,
}

/// What outcomes are replayed with.
pub struct OutcomesSetting<'a> {
    /// With the costs that are asked for already.
    pub matrix: &'a Matrix,
    pub policies: &'a [Policy],
    /// The query's signals and its embedding, and what of them depends on the policy.
    pub context: &'a (dyn Fn(&Policy, usize) -> Context + Sync),
    /// For policies that learn.
    pub orders: u64,
    pub what_if: &'a WhatIf,
    /// Where what is done is kept, and gone on from.
    pub checkpoints: Option<&'a Checkpoints>,
}

/// Replays policies over a matrix on all cores. `tick` hears of every order that is through.
///
/// # Errors
/// When a policy can reach a model without outcomes, an update does not fold, or what is done cannot be kept.
pub fn replay_outcomes(setting: &OutcomesSetting<'_>, tick: &(dyn Fn() + Sync)) -> Result<OutcomesReport, String> {
    let OutcomesSetting { matrix, policies, context, orders, what_if, checkpoints } = *setting;
    let way = |policy| Way::new(policy, matrix, context, &what_if.without);
    let ways: Vec<Way<'_>> = policies.iter().map(way).collect::<Result<_, _>>()?;
    let measure = Measure::new(matrix);
    let done = checkpoints.map(|kept| Done { kept, about: about(matrix, what_if) });
    let mut walks = Vec::new();
    let mut lines = Vec::new();
    for way in &ways {
        let Over { walk, scores, regret, reliability } = over(way, &measure, orders, done.as_ref(), tick)?;
        let mut line = measure.line(way.policy.name().to_owned(), &walk, 0.05 / policies.len() as f64);
        line.hash = Some(way.policy.hash().short());
        line.deviation = deviation(&scores);
        line.origin = Origin::Ours;
        line.regret = regret;
        line.calibration = way.policy.expects().and_then(|of| reliability.finish(of));
        lines.push(line);
        walks.push(walk);
    }
    let baselines = measure.baselines();
    let oracle = measure.oracle_score();
    let hull = measure.hull(lines.iter().map(|l| Point { cost: l.mean_cost_usd, score: l.mean_score }));
    let mut report = OutcomesReport {
        outcomes: matrix.name.clone(),
        hash: matrix.hash.clone(),
        queries: matrix.len(),
        left_out: matrix.left_out.clone(),
        what_if: what_if.told(),
        models: matrix.models.clone(),
        orders,
        points: measure.means.clone(),
        best: matrix.models[measure.best].clone(),
        cheapest: matrix.models[measure.cheapest].clone(),
        zero_hull: measure.zero.points().to_vec(),
        aiq_zero: measure.aiq(&measure.zero),
        aiq: measure.aiq(&hull),
        hull: hull.points().to_vec(),
        policies: lines,
        baselines,
        quoted: Vec::new(),
        pairs: measure.pairs(policies, &walks),
        differing: differing(&measure, &ways, &walks)?,
    };
    if let Some(kept) = checkpoints {
        let names = policies.iter().flat_map(|p| seeds(p, orders).into_iter().map(|seed| Done::name(p, seed)));
        kept.done(names);
    }
    report.policies.iter_mut().chain(&mut report.baselines).for_each(|l| l.gap_to_oracle = oracle - l.mean_score);
    Ok(report)
}

/// All orders: their mean, the mean score of each, the mean regret, and what was expected in all of them.
struct Over {
    walk: Walk,
    scores: Vec<f64>,
    regret: Vec<(usize, f64)>,
    reliability: Reliability,
}

/// What is done of the orders.
struct Done<'a> {
    kept: &'a Checkpoints,
    about: String,
}

impl Done<'_> {
    fn name(policy: &Policy, seed: Option<u64>) -> String {
        let order = seed.map_or_else(|| "file".to_owned(), |seed| seed.to_string());
        format!("order-{}-{order}.json", policy.hash())
    }

    /// The pass, as it was, or as it is now.
    fn or(&self, way: &Way<'_>, seed: Option<u64>) -> Result<Pass, String> {
        let name = Self::name(way.policy, seed);
        if let Some(pass) = self.kept.kept(&name, &self.about).map_err(|e| e.to_string())? {
            return Ok(pass);
        }
        let pass = way.pass(seed, None)?;
        self.kept.keep(&name, &self.about, &pass).map_err(|e| e.to_string())?;
        Ok(pass)
    }
}

/// What tells these outcomes from others.
fn about(matrix: &Matrix, what_if: &WhatIf) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(matrix.hash.as_bytes());
    for q in 0..matrix.len() {
        for number in matrix.scores(q).iter().chain(matrix.costs(q)) {
            hash.update(&number.to_le_bytes());
        }
    }
    let version = env!("CARGO_PKG_VERSION");
    format!("weir {version}; outcomes {}; {}", hash.finalize().to_hex(), what_if.told().join(", "))
}

fn seeds(policy: &Policy, orders: u64) -> Vec<Option<u64>> {
    if policy.learns() { (0..orders.max(1)).map(Some).collect() } else { vec![None] }
}

fn over(
    way: &Way<'_>,
    measure: &Measure<'_>,
    orders: u64,
    done: Option<&Done<'_>>,
    tick: &(dyn Fn() + Sync),
) -> Result<Over, String> {
    let seeds = seeds(way.policy, orders);
    let mut all = Walk::new(measure.matrix.len(), measure.matrix.models.len());
    let mut scores = Vec::new();
    let mut regret: Vec<(usize, f64)> = Vec::new();
    let mut reliability = Reliability::default();
    // As many orders as cores are in memory; they are added in their own order, so that the sums are the same everywhere.
    for some in seeds.chunks(rayon::current_num_threads().max(1)) {
        let passes: Vec<Pass> = some
            .par_iter()
            .map(|seed| {
                let pass = done.map_or_else(|| way.pass(*seed, None), |done| done.or(way, *seed));
                tick();
                pass
            })
            .collect::<Result<_, String>>()?;
        for Pass { walk, order, reliability: of_pass } in passes {
            reliability.merge(&of_pass);
            all.add(&walk, 1.0 / seeds.len() as f64);
            let per_query = walk.scores(measure.matrix);
            scores.push(per_query.iter().sum::<f64>() / per_query.len().max(1) as f64);
            let curve = measure.regret(&order, &per_query);
            regret.resize(curve.len(), (0, 0.0));
            for (sum, (at, value)) in regret.iter_mut().zip(curve) {
                *sum = (at, sum.1 + value / seeds.len() as f64);
            }
        }
    }
    Ok(Over { walk: all, scores, regret, reliability })
}

/// Sample standard deviation; nothing of a single value.
fn deviation(values: &[f64]) -> Option<f64> {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n.max(1) as f64;
    (n > 1).then(|| (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt())
}

/// The queries on which the expected scores of policies are furthest apart, then the probabilities; with explanations.
fn differing(measure: &Measure<'_>, ways: &[Way<'_>], walks: &[Walk]) -> Result<Vec<Differing>, String> {
    let matrix = measure.matrix;
    let apart = |q: usize| {
        let scores = walks.iter().map(|w| w.score(matrix, q));
        let (low, high) = scores.fold((f64::MAX, f64::MIN), |(l, h), s| (l.min(s), h.max(s)));
        let moved = walks.iter().map(|w| w.moved(&walks[0], q)).fold(0.0, f64::max);
        (high - low, moved)
    };
    if walks.len() < 2 {
        return Ok(Vec::new());
    }
    let mut found: Vec<(usize, (f64, f64))> =
        (0..matrix.len()).map(|q| (q, apart(q))).filter(|(_, (_, moved))| *moved > 1e-9).collect();
    found.sort_by(|(a, x), (b, y)| y.0.total_cmp(&x.0).then(y.1.total_cmp(&x.1)).then(a.cmp(b)));
    found.truncate(SHOWN);
    let watched: BTreeSet<usize> = found.iter().map(|(q, _)| *q).collect();
    let mut told: Vec<BTreeMap<usize, String>> = Vec::new();
    for way in ways {
        let mut texts = BTreeMap::new();
        let mut hear = |q: usize, decision: &_, context: &_| {
            texts.insert(q, explain::text(decision, context));
        };
        way.pass(way.policy.learns().then_some(0), Some((&watched, &mut hear)))?;
        told.push(texts);
    }
    let show = |q: usize| {
        let query = &matrix.queries[q];
        let choice = |(walk, texts): (&Walk, &BTreeMap<usize, String>)| {
            let (model, probability) = walk.likeliest(q);
            Choice {
                model: matrix.models.get(model).cloned().unwrap_or_default(),
                probability,
                score: walk.score(matrix, q),
                cost_usd: walk.cost(matrix, q),
                explanation: texts.get(&q).cloned().unwrap_or_default(),
            }
        };
        Differing {
            id: query.id.clone(),
            task: query.task.clone(),
            text: query.text.chars().take(400).collect(),
            policies: walks.iter().zip(&told).map(choice).collect(),
        }
    };
    Ok(found.into_iter().map(|(q, _)| show(q)).collect())
}
