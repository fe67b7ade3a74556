//! `weir bench policies`: fitted selectors on routing outcomes, against what they must beat. Five folds by query and
//! several seeds; every router is judged on queries that it was not fitted to, by the code that serves, and intervals
//! are paired: all routers on the same resamples of queries.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde::Serialize;

use super::report::Machine;
use crate::{
    domain::Hash,
    fit::{self, Family, Inputs, report::BUDGETS},
    policy::{Artifact, linalg, predict::Prediction},
    replay::{
        matrix::Matrix,
        metrics::{Frame, Hull, SplitMix, apgr},
        router::{Outcomes, choices},
    },
};

/// How much is done.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub folds: usize,
    pub seeds: u64,
    /// Resamples of the bootstrap.
    pub resamples: usize,
    #[serde(skip)]
    pub families: Vec<Family>,
}

/// A graph that was fitted without the best model, which it then takes in by few observations.
const NEWCOMER: &str = "graph, best model by 50 observations";
/// Names of the baselines.
const TFIDF: &str = "TF-IDF + ridge";
const RIDGE: &str = "embedding ridge";
const KNN: &str = "embedding kNN";
/// What ours are compared with, beside the zero router.
const BASELINES: [&str; 3] = [TFIDF, RIDGE, KNN];

/// AIQ or APGR, and the scores at the budgets.
type Figures = [f64; 1 + BUDGETS.len()];

/// A router on a data set.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub router: String,
    /// Mean score at [`BUDGETS`]; absent below the cheapest setting.
    pub scores: Vec<Option<f64>>,
    /// 95 % intervals of these scores' gains over the zero router's at the same budgets.
    pub score_gains: Vec<Option<(f64, f64)>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apgr: Option<f64>,
    /// 95 % interval of AIQ's (for a pair: APGR's) gain over the zero router, and over the best baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_zero: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_baseline: Option<(f64, f64)>,
}

/// A data set.
#[derive(Clone, Debug, Serialize)]
pub struct Set {
    pub name: String,
    pub data_hash: String,
    pub queries: usize,
    pub models: usize,
    pub best_single: String,
    pub best_single_score: f64,
    pub best_single_cost: f64,
    pub oracle_score: f64,
    pub best_baseline: String,
    pub rows: Vec<Row>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Set>,
    pub plan: Plan,
    pub embedder: String,
    pub machine: Machine,
}

/// A set for every file; a file with a pair of models is split by task (the part before `/`), where a task has enough
/// queries: that is how pairs are published.
pub fn sets(matrix: &Matrix, inputs: &Inputs) -> Vec<(Matrix, Inputs)> {
    const LEAST: usize = 1000;
    let mut tasks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, query) in matrix.queries.iter().enumerate() {
        tasks.entry(query.task.split('/').next().unwrap_or_default()).or_default().push(i);
    }
    tasks.retain(|_, places| places.len() >= LEAST);
    if matrix.models.len() != 2 || tasks.len() < 2 {
        return vec![(matrix.clone(), inputs.clone())];
    }
    let part = |(task, places): (&str, Vec<usize>)| {
        let name = format!("{} {task}", matrix.name);
        let mut part = matrix.subset(&places);
        part.name = name;
        (part, inputs.subset(&places))
    };
    tasks.into_iter().map(part).collect()
}

/// Runs the plan on one set. `tick` is told of each fold that is done.
///
/// # Errors
/// What fitting says.
pub fn run(matrix: &Matrix, inputs: &Inputs, plan: &Plan, tick: &(dyn Fn() + Sync)) -> Result<Set, String> {
    let text = tfidf(matrix);
    let jobs: Vec<(u64, usize)> = (0..plan.seeds).flat_map(|s| (0..plan.folds).map(move |f| (s, f))).collect();
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Done>> = Mutex::default();
    let failed: Mutex<Option<String>> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((seed, fold)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    match one_fold(matrix, inputs, &text, plan, seed, fold) {
                        Ok(found) => done.lock().unwrap_or_else(PoisonError::into_inner).push(found),
                        Err(error) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
                    }
                    tick();
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(format!("{}: {error}", matrix.name));
    }
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(judge(matrix, plan, &done))
}

/// What one fold gave: by router, the predictions for its queries.
struct Done {
    seed: u64,
    places: Vec<usize>,
    predictions: BTreeMap<String, Vec<Prediction>>,
}

fn one_fold(
    matrix: &Matrix,
    inputs: &Inputs,
    text: &[Vec<(usize, f64)>],
    plan: &Plan,
    seed: u64,
    fold: usize,
) -> Result<Done, String> {
    let folds = matrix.folds(plan.folds, seed);
    let (places, train): (Vec<usize>, Vec<usize>) = (0..matrix.len()).partition(|q| folds[*q] == fold);
    let mut predictions = BTreeMap::new();
    for family in &plan.families {
        let fitted = fit::fit(*family, matrix, inputs, &train, seed)?;
        let predictor = fitted.predictor().map_err(|e| e.to_string())?;
        predictions.insert(family.as_str().to_owned(), fit::report::predictions(&predictor, inputs, &places));
    }
    if plan.families.contains(&Family::Graph) && matrix.models.len() > 2 {
        predictions.insert(NEWCOMER.to_owned(), newcomer(matrix, inputs, &train, &places, seed)?);
    }
    let cost: Vec<f64> = matrix.means(&train).iter().map(|p| p.cost).collect();
    let with_means = |quality: Vec<Vec<f64>>| -> Vec<Prediction> {
        quality.into_iter().map(|quality| Prediction { quality, cost: cost.clone() }).collect()
    };
    predictions
        .insert(TFIDF.to_owned(), with_means(ridge(matrix, &train, &places, TEXT_COLUMNS, &|q| text[q].clone())));
    let embedded = |q: usize| inputs.embeddings[q].iter().map(|x| f64::from(*x)).enumerate().collect();
    let dimensions = inputs.embedder.dimensions as usize;
    predictions.insert(RIDGE.to_owned(), with_means(ridge(matrix, &train, &places, dimensions, &embedded)));
    predictions.insert(KNN.to_owned(), with_means(neighbours(matrix, inputs, &train, &places)));
    Ok(Done { seed, places, predictions })
}

/// Fits a graph on all models but the best, and lets that one in by [`NEWCOMER`]'s few outcomes.
fn newcomer(
    matrix: &Matrix,
    inputs: &Inputs,
    train: &[usize],
    places: &[usize],
    seed: u64,
) -> Result<Vec<Prediction>, String> {
    const OBSERVED: usize = 50;
    let means = matrix.means(train);
    let best = (0..means.len()).max_by(|a, b| means[*a].score.total_cmp(&means[*b].score)).unwrap_or(0);
    let others: Vec<usize> = (0..matrix.models.len()).filter(|m| *m != best).collect();
    let mut known = inputs.clone();
    known.models = others.iter().map(|m| std::sync::Arc::clone(&inputs.models[*m])).collect();
    let fitted = fit::fit(Family::Graph, &matrix.with_models(&others), &known, train, seed)?;
    let artifact = Artifact { card: fitted.card, tensors: fitted.tensors, calibration: None, hash: Hash::ZERO };
    let few: Vec<usize> = SplitMix(seed).order(train.len()).into_iter().take(OBSERVED).map(|i| train[i]).collect();
    let grown = fit::extend(&artifact, &matrix.subset(&few), &inputs.subset(&few))?;
    let place = |m: &String| grown.card.models.iter().position(|g| g == m).unwrap_or(0);
    let order: Vec<usize> = matrix.models.iter().map(place).collect();
    let predictor = grown.predictor().map_err(|e| e.to_string())?;
    let sorted = |p: Prediction| Prediction {
        quality: order.iter().map(|m| p.quality[*m]).collect(),
        cost: order.iter().map(|m| p.cost[*m]).collect(),
    };
    Ok(fit::report::predictions(&predictor, inputs, places).into_iter().map(sorted).collect())
}

/// Ridge regression with a regularisation of 1 on sparse rows, as the baselines were published: no tuning, mean costs.
fn ridge(
    matrix: &Matrix,
    train: &[usize],
    places: &[usize],
    columns: usize,
    row: &dyn Fn(usize) -> Vec<(usize, f64)>,
) -> Vec<Vec<f64>> {
    let models = matrix.models.len();
    let means: Vec<f64> = matrix.means(train).iter().map(|p| p.score).collect();
    let mut a = vec![0.0; linalg::packed_len(columns)];
    let mut b = vec![vec![0.0; columns]; models];
    for q in train {
        let x = row(*q);
        for (i, xi) in &x {
            for (j, xj) in x.iter().take_while(|(j, _)| j <= i) {
                a[i * (i + 1) / 2 + j] += xi * xj;
            }
            for (m, b) in b.iter_mut().enumerate() {
                b[*i] += xi * (matrix.scores(*q)[m] - means[m]);
            }
        }
    }
    let Some(factor) = linalg::cholesky(&a, columns, |_| 1.0) else { return vec![means; places.len()] };
    let weights: Vec<Vec<f64>> = b.iter().map(|b| linalg::solve(&factor, b)).collect();
    let predict = |q: &usize| {
        let x = row(*q);
        let dot = |w: &Vec<f64>| x.iter().map(|(i, xi)| w[*i] * xi).sum::<f64>();
        weights.iter().zip(&means).map(|(w, mean)| mean + dot(w)).collect()
    };
    places.iter().map(predict).collect()
}

/// Mean scores of the 40 nearest queries (RouterBench's largest k), or of 200 for a pair (the larger training sets).
fn neighbours(matrix: &Matrix, inputs: &Inputs, train: &[usize], places: &[usize]) -> Vec<Vec<f64>> {
    use crate::policy::predict::knn::Knn;
    let k = if matrix.models.len() == 2 { 200 } else { 40 };
    let vectors: Vec<f32> = train.iter().flat_map(|q| inputs.embeddings[*q].iter().copied()).collect();
    let knn = Knn::new(vectors, Vec::new(), inputs.embedder.dimensions as usize, k, 0.0);
    let mean = |q: &usize| {
        let near = knn.nearest(&inputs.embeddings[*q]);
        let mut out = vec![0.0; matrix.models.len()];
        for (_, n) in &near {
            out.iter_mut().zip(matrix.scores(train[*n])).for_each(|(o, s)| *o += s / near.len() as f64);
        }
        out
    };
    places.iter().map(mean).collect()
}

/// Columns of the hashed text.
const TEXT_COLUMNS: usize = 1024;

/// Hashed TF-IDF of words and pairs of words, per query sorted by column and of length 1: 1 + log(count), times
/// log(n / queries that have it).
fn tfidf(matrix: &Matrix) -> Vec<Vec<(usize, f64)>> {
    let column = |words: &[&str]| {
        let mut hasher = blake3::Hasher::new();
        words.iter().for_each(|w| {
            hasher.update(w.as_bytes());
            hasher.update(b" ");
        });
        let bytes = hasher.finalize();
        usize::from(u16::from_le_bytes([bytes.as_bytes()[0], bytes.as_bytes()[1]])) % TEXT_COLUMNS
    };
    let counts: Vec<BTreeMap<usize, f64>> = matrix
        .queries
        .iter()
        .map(|query| {
            let lower = query.text.to_lowercase();
            let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
            let mut counts = BTreeMap::new();
            words.windows(1).chain(words.windows(2)).for_each(|w| *counts.entry(column(w)).or_insert(0.0) += 1.0);
            counts
        })
        .collect();
    let mut frequency = vec![0.0f64; TEXT_COLUMNS];
    counts.iter().flat_map(BTreeMap::keys).for_each(|c| frequency[*c] += 1.0);
    let n = counts.len() as f64;
    let weigh = |counts: BTreeMap<usize, f64>| -> Vec<(usize, f64)> {
        let row: Vec<(usize, f64)> =
            counts.into_iter().map(|(c, k)| (c, (1.0 + k.ln()) * (n / frequency[c].max(1.0)).ln())).collect();
        let norm = row.iter().map(|(_, x)| x * x).sum::<f64>().sqrt().max(1e-12);
        row.into_iter().map(|(c, x)| (c, x / norm)).collect()
    };
    counts.into_iter().map(weigh).collect()
}

/// Held-out outcomes of one router, whole sets of queries in the matrix's order.
struct Judged {
    name: String,
    outcomes: Outcomes,
    /// For a pair, per seed: predicted gain of the strong model.
    gains: Vec<Vec<f64>>,
}

fn judge(matrix: &Matrix, plan: &Plan, done: &[Done]) -> Set {
    let all: Vec<usize> = (0..matrix.len()).collect();
    let means = matrix.means(&all);
    let single = (0..means.len()).max_by(|a, b| means[*a].score.total_cmp(&means[*b].score)).unwrap_or(0);
    let pair = matrix.models.len() == 2;
    let names: Vec<String> = done.first().map(|d| d.predictions.keys().cloned().collect()).unwrap_or_default();
    let judged: Vec<Judged> = names.iter().map(|name| gather(matrix, plan, done, name, single)).collect();
    let frame = Frame::of(means.clone());
    let oracle =
        all.iter().map(|q| matrix.scores(*q).iter().copied().fold(0.0, f64::max)).sum::<f64>() / all.len() as f64;
    // Per router, and last of all for the zero router, on a sample of queries: AIQ or APGR, and the scores at the budgets.
    let (weak, strong) = (usize::from(single == 0), single);
    let folds: Vec<Vec<usize>> = (0..plan.seeds).map(|seed| matrix.folds(plan.folds, seed)).collect();
    let figures = |sample: &[usize]| -> Vec<Figures> {
        let frame = matrix.frame(sample);
        let sampled = matrix.means(sample);
        let top = sampled.iter().fold((f64::MIN, 0.0), |t, p| if p.score > t.0 { (p.score, p.cost) } else { t }).1;
        let column = |m: usize| sample.iter().map(|q| matrix.scores(*q)[m]).collect::<Vec<f64>>();
        let pair = pair.then(|| (column(weak), column(strong)));
        // Predictions of different folds come from different fits, and are not compared with each other.
        let by_fold: Vec<Vec<usize>> = match &pair {
            Some(_) => folds
                .iter()
                .flat_map(|of| (0..plan.folds).map(|f| (0..sample.len()).filter(|i| of[sample[*i]] == f).collect()))
                .collect(),
            None => Vec::new(),
        };
        let of = |hull: &Hull, gains: Option<&[Vec<f64>]>| {
            let mut out = [f64::NAN; 1 + BUDGETS.len()];
            out[0] = match (&pair, gains, &frame) {
                (Some((weak, strong)), Some(gains), _) => {
                    let each = by_fold.iter().zip(gains.iter().flat_map(|g| std::iter::repeat_n(g, plan.folds)));
                    let figures: Vec<f64> = each
                        .filter_map(|(places, gain)| {
                            let gain: Vec<f64> = places.iter().map(|i| gain[sample[*i]]).collect();
                            let at = |of: &[f64]| places.iter().map(|i| of[*i]).collect::<Vec<f64>>();
                            apgr(&gain, &at(weak), &at(strong))
                        })
                        .collect();
                    figures.iter().sum::<f64>() / figures.len() as f64
                }
                (Some(_), None, _) => 0.5,
                (None, _, Some(frame)) => frame.aiq(hull),
                (None, _, None) => f64::NAN,
            };
            for (out, budget) in out[1..].iter_mut().zip(BUDGETS) {
                *out = hull.score_at(budget * top * (1.0 + 1e-9)).unwrap_or(f64::NAN);
            }
            out
        };
        let mut out: Vec<Figures> =
            judged.iter().map(|j| of(&j.outcomes.hull(sample), Some(j.gains.as_slice()))).collect();
        out.push(of(&Hull::of(sampled), None));
        out
    };
    let whole = figures(&all);
    let best_baseline = (0..judged.len())
        .filter(|i| BASELINES.contains(&judged[*i].name.as_str()))
        .max_by(|a, b| whole[*a][0].total_cmp(&whole[*b][0]))
        .unwrap_or(0);
    let mut rng = SplitMix(0x626f_6f74);
    let mut sample = vec![0; matrix.len()];
    let resampled: Vec<Vec<Figures>> = (0..plan.resamples)
        .map(|_| {
            sample.iter_mut().for_each(|s| *s = rng.below(matrix.len()));
            figures(&sample)
        })
        .collect();
    let zero = judged.len();
    let interval = |of: usize, over: usize, figure: usize| {
        let gain = |r: &Vec<Figures>| r[of][figure] - r[over][figure];
        let mut gains: Vec<f64> = resampled.iter().map(gain).filter(|g| g.is_finite()).collect();
        gains.sort_by(f64::total_cmp);
        let at = |q: f64| gains.get(((gains.len().max(1) - 1) as f64 * q).round() as usize).copied();
        Some((at(0.025)?, at(0.975)?))
    };
    let top = means[single].cost;
    let row = |name: &str, hull: &Hull, figure: f64| Row {
        router: name.to_owned(),
        scores: BUDGETS.iter().map(|b| hull.score_at(b * top * (1.0 + 1e-9))).collect(),
        aiq: (!pair && figure.is_finite()).then_some(figure),
        apgr: (pair && figure.is_finite()).then_some(figure),
        score_gains: Vec::new(),
        over_zero: None,
        over_baseline: None,
    };
    let mut rows = vec![row("zero router", &Hull::of(means.iter().copied()), whole[zero][0])];
    let truth: Vec<Prediction> = all
        .iter()
        .map(|q| Prediction { quality: matrix.scores(*q).to_vec(), cost: matrix.costs(*q).to_vec() })
        .collect();
    let perfect = Outcomes::of(matrix, &all, &choices(&truth)).hull(&all);
    let perfect_figure = match (&frame, pair) {
        (Some(frame), false) => frame.aiq(&perfect),
        _ => f64::NAN,
    };
    rows.push(row("oracle", &perfect, perfect_figure));
    for (i, j) in judged.iter().enumerate() {
        let mut row = row(&j.name, &j.outcomes.hull(&all), whole[i][0]);
        row.score_gains = (1..=BUDGETS.len()).map(|figure| interval(i, zero, figure)).collect();
        row.over_zero = interval(i, zero, 0);
        row.over_baseline = (i != best_baseline).then(|| interval(i, best_baseline, 0)).flatten();
        rows.push(row);
    }
    Set {
        name: matrix.name.clone(),
        data_hash: matrix.hash.clone(),
        queries: matrix.len(),
        models: matrix.models.len(),
        best_single: matrix.models[single].clone(),
        best_single_score: means[single].score,
        best_single_cost: top,
        oracle_score: oracle,
        best_baseline: judged.get(best_baseline).map(|j| j.name.clone()).unwrap_or_default(),
        rows,
    }
}

/// The folds of every seed put together, and the mean over the seeds.
fn gather(matrix: &Matrix, plan: &Plan, done: &[Done], name: &str, strong: usize) -> Judged {
    let all: Vec<usize> = (0..matrix.len()).collect();
    let mut gains = Vec::new();
    let mut runs = Vec::new();
    for seed in 0..plan.seeds {
        let mut predictions: Vec<Prediction> = vec![Prediction { quality: Vec::new(), cost: Vec::new() }; matrix.len()];
        for fold in done.iter().filter(|d| d.seed == seed) {
            for (q, p) in fold.places.iter().zip(&fold.predictions[name]) {
                predictions[*q] = p.clone();
            }
        }
        if matrix.models.len() == 2 {
            let weak = usize::from(strong == 0);
            gains.push(predictions.iter().map(|p| p.quality[strong] - p.quality[weak]).collect());
        }
        runs.push(Outcomes::of(matrix, &all, &choices(&predictions)));
    }
    let outcomes = Outcomes::mean(&runs).unwrap_or_else(|| Outcomes::of(matrix, &all, &[]));
    Judged { name: name.to_owned(), outcomes, gains }
}

impl Report {
    /// Collects sets into the document that all benches print.
    pub fn of(rows: Vec<Set>, plan: Plan, embedder: String) -> Self {
        let mut figures = BTreeMap::new();
        for set in &rows {
            for row in &set.rows {
                let key = format!("{}.{}", set.name, row.router).replace(' ', "_");
                row.aiq.map(|x| figures.insert(format!("{key}.aiq"), x));
                row.apgr.map(|x| figures.insert(format!("{key}.apgr"), x));
            }
        }
        Self { bench: "policies", figures, rows, plan, embedder, machine: Machine::here() }
    }

    /// One table per set.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for set in &self.rows {
            let _ = writeln!(
                out,
                "### {}\n\n{} queries, {} models; best single {} ({:.4} at ${:.6} a query), oracle {:.4}. Intervals are of the \
                 gain over the zero router, and over the best baseline ({}); a score with + or - has its interval above or below \
                 the zero router's.\n",
                set.name,
                set.queries,
                set.models,
                set.best_single,
                set.best_single_score,
                set.best_single_cost,
                set.oracle_score,
                set.best_baseline
            );
            let figure = if set.models == 2 { "APGR" } else { "AIQ" };
            let _ =
                writeln!(out, "| router | 10 % | 25 % | 50 % | 75 % | 100 % | {figure} | over zero | over baseline |");
            let _ = writeln!(out, "|---|---|---|---|---|---|---|---|---|");
            for row in &set.rows {
                let number = |x: Option<f64>| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.4}"));
                let range =
                    |r: Option<(f64, f64)>| r.map_or_else(|| "–".to_owned(), |(a, b)| format!("{a:+.4} … {b:+.4}"));
                let mark = |gain: Option<&Option<(f64, f64)>>| match gain.copied().flatten() {
                    Some((low, _)) if low > 0.0 => " +",
                    Some((_, high)) if high < 0.0 => " -",
                    _ => "",
                };
                let scores: Vec<String> =
                    row.scores.iter().enumerate().map(|(i, s)| number(*s) + mark(row.score_gains.get(i))).collect();
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {} |",
                    row.router,
                    scores.join(" | "),
                    number(row.aiq.or(row.apgr)),
                    range(row.over_zero),
                    range(row.over_baseline)
                );
            }
            let _ = writeln!(out);
        }
        out
    }
}
