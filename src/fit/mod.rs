//! Floor 3: artifacts fitted to outcomes offline. Serving needs nothing of this: an artifact is read by
//! [`policy::predict`](crate::policy::predict), and so it is judged here.
//!
//! Parameters are chosen on out-of-fold predictions within the queries that are fitted on. The same outcomes, embedder and seed give the same artifact
//! on the same machine.

mod algebra;
mod cluster;
pub mod embed;
pub mod gate;
mod graph;
pub mod report;
mod scale;
pub mod stages;
mod tune;
mod warm;

pub use graph::extend;
pub use warm::{Warm, context, warm_start};

use std::collections::BTreeMap;

use self::{
    algebra::Gram,
    scale::Scale,
    tune::{Folds, Tuned},
};
use crate::{
    domain::{EmbedderIdentity, Hash},
    policy::{
        artifact::{Artifact, ArtifactError, Card, Tensor},
        predict::{FAMILIES, Predictor, Seen, kernel::expanded},
    },
    replay::{matrix::Matrix, metrics::SplitMix},
};

/// Query features that predictors see beside the embedding, as `policy::query_feature` scales them.
pub const FEATURES: [&str; 4] = ["tokens", "query_tokens", "complexity", "code_share"];

/// What can be fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Family {
    Ridge,
    Logistic,
    Kernel,
    Knn,
    Clusters,
    Graph,
    /// Ridge, kernel and k nearest neighbours together.
    Ensemble,
}

impl Family {
    pub const ALL: [Family; 7] = [
        Family::Ridge,
        Family::Logistic,
        Family::Kernel,
        Family::Knn,
        Family::Clusters,
        Family::Graph,
        Family::Ensemble,
    ];

    /// As it is written in a policy.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::Ridge => "ridge",
            Family::Logistic => "logistic",
            Family::Kernel => "kernel",
            Family::Knn => "knn",
            Family::Clusters => "clusters",
            Family::Graph => "graph",
            Family::Ensemble => "ensemble",
        }
    }
}

/// What predictors see of a matrix's queries, in its order.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub embedder: EmbedderIdentity,
    /// Unit vectors.
    pub embeddings: Vec<std::sync::Arc<[f32]>>,
    /// [`FEATURES`] of each.
    pub features: Vec<Vec<f64>>,
    /// Unit vectors of the models' names or descriptions.
    pub models: Vec<std::sync::Arc<[f32]>>,
}

impl Inputs {
    pub fn seen(&self, query: usize) -> Seen<'_> {
        Seen { embedding: &self.embeddings[query], features: &self.features[query] }
    }

    /// The inputs of the queries at these places.
    pub fn subset(&self, places: &[usize]) -> Self {
        Self {
            embedder: self.embedder.clone(),
            embeddings: places.iter().map(|q| std::sync::Arc::clone(&self.embeddings[*q])).collect(),
            features: places.iter().map(|q| self.features[*q].clone()).collect(),
            models: self.models.clone(),
        }
    }
}

/// An artifact that has not been written yet.
#[derive(Clone, Debug)]
pub struct Fitted {
    pub card: Card,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Fitted {
    /// # Errors
    /// As for [`Artifact::to_bytes`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, ArtifactError> {
        Artifact::to_bytes(&self.card, &self.tensors)
    }

    /// What serves.
    ///
    /// # Errors
    /// Never for what was fitted; as for [`Predictor::of`].
    pub fn predictor(&self) -> Result<Predictor, ArtifactError> {
        Predictor::of(&Artifact {
            card: self.card.clone(),
            tensors: self.tensors.clone(),
            calibration: None,
            hash: Hash::ZERO,
        })
    }
}

/// What is fitted on: the matrix, what predictors see of its queries, and which of them may be used.
#[derive(Clone, Copy)]
struct Task<'a> {
    matrix: &'a Matrix,
    inputs: &'a Inputs,
    places: &'a [usize],
    seed: u64,
}

/// Fits one family on the queries at `places`.
///
/// # Errors
/// With fewer than 20 queries, or where the numbers cannot be solved for.
pub fn fit(family: Family, matrix: &Matrix, inputs: &Inputs, places: &[usize], seed: u64) -> Result<Fitted, String> {
    if places.len() < 20 {
        return Err(format!("{} queries are too few to fit on; at least 20", places.len()));
    }
    let task = Task { matrix, inputs, places, seed };
    let mut card = Card::new(family.as_str(), matrix.models.clone());
    card.embedder = Some(inputs.embedder.clone());
    card.features = FEATURES.iter().map(|f| (*f).to_owned()).collect();
    card.seed = seed;
    card.data.file.clone_from(&matrix.name);
    card.data.hash.clone_from(&matrix.hash);
    card.data.queries = matrix.len();
    card.data.fitted_on = places.len();
    let mut fitted = Fitted { card, tensors: BTreeMap::new() };
    costs(&task, &mut fitted)?;
    let folds = Folds::of(&task);
    match family {
        Family::Ensemble => {
            let members = [Family::Ridge, Family::Kernel, Family::Knn];
            let tuned = members
                .iter()
                .map(|member| Ok((*member, one(*member, &task, &folds, &mut fitted)?)))
                .collect::<Result<Vec<(Family, Tuned)>, String>>()?;
            let weights = tune::mix(&task, &folds, &tuned);
            let mut row = vec![0.0; FAMILIES.len()];
            for ((member, _), weight) in tuned.iter().zip(weights) {
                if let Some(place) = FAMILIES.iter().position(|f| *f == member.as_str()) {
                    row[place] = weight as f32;
                }
                fitted.card.parameters.insert(format!("weight.{}", member.as_str()), weight);
            }
            fitted.tensors.insert("ensemble.weights".into(), Tensor { shape: vec![FAMILIES.len()], data: row });
        }
        family => {
            one(family, &task, &folds, &mut fitted)?;
        }
    }
    Ok(fitted)
}

/// Fits one family into `fitted`, with its parameters chosen out of fold.
fn one(family: Family, task: &Task<'_>, folds: &Folds, fitted: &mut Fitted) -> Result<Tuned, String> {
    let models = task.matrix.models.len();
    let dimensions = task.inputs.embedder.dimensions as usize;
    let tensor = |shape: Vec<usize>, data: Vec<f64>| Tensor { shape, data: data.iter().map(|x| *x as f32).collect() };
    let singular = || "the queries' vectors cannot be solved for; are all of them the same?".to_owned();
    let scale = Scale::of(task);
    match family {
        Family::Ridge => {
            let rows = rows(task, &scale, &|seen| expanded(seen, &[], 0, 0.0));
            let tuned = tune::linear(task, folds, &rows, &[3.0, 10.0, 30.0, 100.0])?;
            let mut weights = Gram::of(&rows, task.matrix, task.places).solve(tuned.parameter).ok_or_else(singular)?;
            scale.fold(&mut weights, models);
            fitted.card.parameters.insert("ridge.lambda".into(), tuned.parameter);
            let shape = vec![models, weights.len() / models];
            fitted.tensors.insert("ridge.w".into(), tensor(shape, weights));
            Ok(tuned)
        }
        Family::Logistic => {
            let rows = rows(task, &scale, &|seen| expanded(seen, &[], 0, 0.0));
            let lambda = 3.0;
            let mut weights =
                algebra::logistic(&rows, task.matrix.models.len(), task.places, &|q| task.matrix.scores(q), lambda)
                    .ok_or_else(singular)?;
            scale.fold(&mut weights, models);
            fitted.card.parameters.insert("logistic.lambda".into(), lambda);
            let shape = vec![models, weights.len() / models];
            fitted.tensors.insert("logistic.w".into(), tensor(shape, weights));
            Ok(Tuned::untuned(lambda))
        }
        Family::Kernel => {
            let (count, gamma) = (256.min(task.places.len() / 4).max(1), 10.0);
            let landmarks = cluster::centroids(task.inputs, task.places, count, task.seed);
            let rows = rows(task, &scale, &|seen| expanded(seen, &landmarks, dimensions, gamma));
            let tuned = tune::linear(task, folds, &rows, &[3.0, 10.0, 30.0, 100.0])?;
            let mut weights = Gram::of(&rows, task.matrix, task.places).solve(tuned.parameter).ok_or_else(singular)?;
            scale.fold(&mut weights, models);
            fitted.card.parameters.insert("kernel.lambda".into(), tuned.parameter);
            fitted.card.parameters.insert("kernel.gamma".into(), gamma);
            let shape = vec![models, weights.len() / models];
            fitted.tensors.insert("kernel.w".into(), tensor(shape, weights));
            let shape = vec![landmarks.len() / dimensions.max(1), dimensions];
            fitted.tensors.insert("kernel.landmarks".into(), Tensor { shape, data: landmarks });
            Ok(tuned)
        }
        Family::Knn => {
            let tuned = tune::knn(task, folds);
            let sharpness = tuned.second;
            fitted.card.parameters.insert("knn.k".into(), tuned.parameter);
            fitted.card.parameters.insert("knn.sharpness".into(), sharpness);
            let vectors: Vec<f32> =
                task.places.iter().flat_map(|q| task.inputs.embeddings[*q].iter().copied()).collect();
            let scores: Vec<f64> = task.places.iter().flat_map(|q| task.matrix.scores(*q)).copied().collect();
            fitted
                .tensors
                .insert("knn.vectors".into(), Tensor { shape: vec![task.places.len(), dimensions], data: vectors });
            fitted.tensors.insert("knn.scores".into(), tensor(vec![task.places.len(), models], scores));
            Ok(tuned)
        }
        Family::Clusters => {
            let count = 60.min(task.places.len() / 10).max(1);
            let centroids = cluster::centroids(task.inputs, task.places, count, task.seed);
            let scores = cluster::means(task.matrix, task.inputs, task.places, &centroids);
            let count = centroids.len() / dimensions.max(1);
            fitted.card.parameters.insert("clusters.nearest".into(), 3.0);
            fitted.card.parameters.insert("clusters.sharpness".into(), 20.0);
            fitted
                .tensors
                .insert("clusters.centroids".into(), Tensor { shape: vec![count, dimensions], data: centroids });
            fitted.tensors.insert("clusters.scores".into(), tensor(vec![count, models], scores));
            Ok(Tuned::untuned(count as f64))
        }
        Family::Graph => {
            graph::train(task, fitted)?;
            Ok(Tuned::untuned(0.0))
        }
        Family::Ensemble => Err("an ensemble is no member of one".to_owned()),
    }
}

/// The design: one row per query of the matrix that is fitted on, empty for the others.
fn rows(task: &Task<'_>, scale: &Scale, expand: &dyn Fn(&Seen<'_>) -> Vec<f64>) -> Vec<Vec<f64>> {
    let mut rows = vec![Vec::new(); task.matrix.len()];
    for q in task.places {
        rows[*q] = expand(&task.inputs.seen(*q));
        scale.apply(&mut rows[*q]);
    }
    rows
}

/// A ridge regression of the logarithm of each model's cost, and the range that predictions are held to. Where a model
/// costs the same for every query, that is what is predicted.
fn costs(task: &Task<'_>, fitted: &mut Fitted) -> Result<(), String> {
    let models = task.matrix.models.len();
    let n = task.places.len() as f64;
    let mut range = Vec::with_capacity(models * 3);
    for m in 0..models {
        let costs = task.places.iter().map(|q| task.matrix.costs(*q)[m]);
        let mean = costs.clone().sum::<f64>() / n;
        let (least, most) = costs.fold((f64::INFINITY, 0.0f64), |(a, b), c| (a.min(c), b.max(c)));
        range.extend([mean as f32, least as f32, most as f32]);
    }
    fitted.tensors.insert("cost.range".into(), Tensor { shape: vec![models, 3], data: range });
    let scale = Scale::of(task);
    let rows = rows(task, &scale, &|seen| expanded(seen, &[], 0, 0.0));
    let log = |q: usize, m: usize| task.matrix.costs(q)[m].max(1e-9).ln();
    let gram = Gram::with(&rows, models, task.places, &log);
    if let Some(mut weights) = gram.solve(3.0) {
        scale.fold(&mut weights, models);
        let shape = vec![models, weights.len() / models];
        let data = weights.iter().map(|x| *x as f32).collect();
        fitted.tensors.insert("cost.w".into(), Tensor { shape, data });
    }
    Ok(())
}

/// Train and test places: a share of the queries at random under `seed`, equal texts on one side.
pub fn split(matrix: &Matrix, test_share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let parts = 100;
    let folds = matrix.folds(parts, SplitMix(seed).next_u64());
    let limit = (test_share * parts as f64).round() as usize;
    (0..matrix.len()).partition(|q| folds[*q] >= limit)
}

#[cfg(test)]
mod tests;
