//! Parameters by out-of-fold predictions: each query is predicted by what was fitted on the other folds, and the setting
//! with the least squared error is taken. The area that its trade-off curve encloses (AIQ) is what a router is for, but on a
//! few thousand queries it differs more by luck than by setting; it decides only where the difference is large: which
//! members of an ensemble count.

use super::{
    Family, Task,
    algebra::{Gram, dot32},
};
use crate::{
    policy::{linalg, predict::Prediction},
    replay::{
        metrics::SplitMix,
        router::{Outcomes, choices},
    },
};

/// Folds within the queries that are fitted on.
const FOLDS: usize = 3;
/// Queries that are predicted out of fold; more would choose no better.
const JUDGED: usize = 3000;

/// The folds, and the queries on which settings are judged.
pub(super) struct Folds {
    /// Per query of the matrix; only those of the task mean something.
    of: Vec<usize>,
    judged: Vec<usize>,
}

impl Folds {
    pub fn of(task: &Task<'_>) -> Self {
        let of = task.matrix.folds(FOLDS, task.seed ^ 0x666f_6c64);
        let order = SplitMix(task.seed ^ 0x6a75_6467).order(task.places.len());
        let mut judged: Vec<usize> = order.into_iter().take(JUDGED).map(|i| task.places[i]).collect();
        judged.sort_unstable();
        Self { of, judged }
    }

    fn part(&self, task: &Task<'_>, fold: usize) -> Vec<usize> {
        task.places.iter().copied().filter(|q| self.of[*q] == fold).collect()
    }
}

/// The chosen setting and its out-of-fold predictions.
pub(super) struct Tuned {
    pub parameter: f64,
    pub second: f64,
    /// Judged queries x models; empty where nothing was tuned.
    quality: Vec<f64>,
}

impl Tuned {
    /// A fixed setting.
    pub fn untuned(parameter: f64) -> Self {
        Self { parameter, second: 0.0, quality: Vec::new() }
    }
}

/// The best of several regularisations of a linear map on `rows`.
pub(super) fn linear(task: &Task<'_>, folds: &Folds, rows: &[Vec<f64>], lambdas: &[f64]) -> Result<Tuned, String> {
    let models = task.matrix.models.len();
    let parts: Vec<Gram> = (0..FOLDS).map(|fold| Gram::of(rows, task.matrix, &folds.part(task, fold))).collect();
    let mut settings = Vec::new();
    for lambda in lambdas {
        let mut quality = vec![0.0; folds.judged.len() * models];
        for fold in 0..FOLDS {
            let mut others = parts.iter().enumerate().filter(|(i, _)| *i != fold).map(|(_, gram)| gram);
            let Some(mut gram) = others.next().cloned() else { continue };
            others.for_each(|other| gram.add(other));
            let weights = gram.solve(*lambda).ok_or("the queries' vectors cannot be solved for")?;
            let columns = weights.len() / models;
            for (i, q) in folds.judged.iter().enumerate().filter(|(_, q)| folds.of[**q] == fold) {
                for m in 0..models {
                    quality[i * models + m] = linalg::dot(&weights[m * columns..(m + 1) * columns], &rows[*q]);
                }
            }
        }
        settings.push(Tuned { parameter: *lambda, second: 0.0, quality });
    }
    Ok(best(task, folds, settings))
}

/// The best number of neighbours and sharpness.
pub(super) fn knn(task: &Task<'_>, folds: &Folds) -> Tuned {
    const K: [usize; 3] = [50, 100, 200];
    const SHARPNESS: [f64; 2] = [0.0, 10.0];
    let models = task.matrix.models.len();
    let most = K[K.len() - 1];
    let embedding = |q: usize| &*task.inputs.embeddings[q];
    let near: Vec<Vec<(f32, usize)>> = folds
        .judged
        .iter()
        .map(|q| {
            let others = task.places.iter().filter(|o| folds.of[**o] != folds.of[*q]);
            let mut near: Vec<(f32, usize)> = others.map(|o| (dot32(embedding(*o), embedding(*q)), *o)).collect();
            let by = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if near.len() > most {
                near.select_nth_unstable_by(most, by);
                near.truncate(most);
            }
            near.sort_by(by);
            near
        })
        .collect();
    let mut settings = Vec::new();
    for k in K.into_iter().filter(|k| *k == K[0] || k * 4 <= task.places.len()) {
        for sharpness in SHARPNESS {
            let mut quality = vec![0.0; folds.judged.len() * models];
            for (i, near) in near.iter().enumerate() {
                let near = &near[..near.len().min(k)];
                let shares: Vec<f64> = near.iter().map(|(c, _)| (sharpness * f64::from(*c)).exp()).collect();
                let total: f64 = shares.iter().sum();
                for (share, (_, q)) in shares.iter().zip(near) {
                    let scores = task.matrix.scores(*q);
                    (0..models).for_each(|m| quality[i * models + m] += share / total * scores[m]);
                }
            }
            settings.push(Tuned { parameter: k as f64, second: sharpness, quality });
        }
    }
    best(task, folds, settings)
}

/// Weights of an ensemble's members. Equal ones, unless some other mixture encloses clearly more.
pub(super) fn mix(task: &Task<'_>, folds: &Folds, members: &[(Family, Tuned)]) -> Vec<f64> {
    /// What another mixture must win, in AIQ, to be taken for more than luck.
    const MARGIN: f64 = 0.01;
    let n = members.len();
    let even = vec![1.0 / n as f64; n];
    let mut candidates = vec![even.clone()];
    for i in 0..n {
        candidates.push((0..n).map(|j| if i == j { 1.0 } else { 0.0 }).collect());
        candidates.push((0..n).map(|j| if i == j { 0.0 } else { 1.0 / (n - 1) as f64 }).collect());
    }
    let worth = |weights: &[f64]| {
        let mut quality = vec![0.0; folds.judged.len() * task.matrix.models.len()];
        for ((_, tuned), weight) in members.iter().zip(weights) {
            quality.iter_mut().zip(&tuned.quality).for_each(|(q, x)| *q += weight * x);
        }
        aiq(task, folds, &quality)
    };
    let base = worth(&even);
    let mut best = (base + MARGIN, even);
    for weights in candidates {
        let worth = worth(&weights);
        if worth > best.0 {
            best = (worth, weights);
        }
    }
    best.1
}

fn best(task: &Task<'_>, folds: &Folds, settings: Vec<Tuned>) -> Tuned {
    let mut best: Option<(f64, Tuned)> = None;
    for setting in settings {
        let error = squared_error(task, folds, &setting.quality);
        if best.as_ref().is_none_or(|(before, _)| error < *before) {
            best = Some((error, setting));
        }
    }
    best.map_or_else(|| Tuned::untuned(0.0), |(_, tuned)| tuned)
}

/// Summed over models and judged queries.
fn squared_error(task: &Task<'_>, folds: &Folds, quality: &[f64]) -> f64 {
    let models = task.matrix.models.len().max(1);
    let error = |(q, quality): (&usize, &[f64])| {
        task.matrix.scores(*q).iter().zip(quality).map(|(s, p)| (p - s).powi(2)).sum::<f64>()
    };
    folds.judged.iter().zip(quality.chunks_exact(models)).map(error).sum()
}

/// AIQ of out-of-fold qualities, at the models' mean costs; minus infinity where there is nothing to route.
fn aiq(task: &Task<'_>, folds: &Folds, quality: &[f64]) -> f64 {
    let models = task.matrix.models.len();
    let cost: Vec<f64> = task.matrix.means(task.places).iter().map(|p| p.cost).collect();
    let predictions: Vec<Prediction> =
        quality.chunks_exact(models).map(|q| Prediction { quality: q.to_vec(), cost: cost.clone() }).collect();
    let outcomes = Outcomes::of(task.matrix, &folds.judged, &choices(&predictions));
    let all: Vec<usize> = (0..folds.judged.len()).collect();
    let Some(frame) = task.matrix.frame(&folds.judged) else {
        // One model is both the cheapest and the best: the closest predictions are the best.
        return -squared_error(task, folds, quality);
    };
    frame.aiq(&outcomes.hull(&all))
}
