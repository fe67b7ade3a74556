//! Fitted predictors: from a query's embedding and features to what each model of an artifact would score and cost. One
//! file per family; `weir policy fit` writes the artifacts, and what judges a fit calls this code, so that what is
//! measured is what serves.

pub mod clusters;
pub mod graph;
pub mod kernel;
pub mod knn;
pub mod linear;

use super::artifact::{Artifact, ArtifactError, Tensor};

/// What is expected of each model of the artifact, in its order.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// 0 to 1, but not held to it.
    pub quality: Vec<f64>,
    /// USD per query; at least 0.
    pub cost: Vec<f64>,
}

/// A query as predictors see it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// A unit vector.
    pub embedding: &'a [f32],
    /// The artifact's query features, in its order, without a constant.
    pub features: &'a [f64],
}

/// The families.
#[derive(Debug)]
enum Quality {
    Linear(linear::Linear),
    Kernel(kernel::Kernel),
    Knn(knn::Knn),
    Clusters(clusters::Clusters),
    Graph(graph::Graph),
}

impl Quality {
    /// Adds `weight` times the prediction to `into`.
    fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        match self {
            Quality::Linear(f) => f.add(seen, weight, into),
            Quality::Kernel(f) => f.add(seen, weight, into),
            Quality::Knn(f) => f.add(seen, weight, into),
            Quality::Clusters(f) => f.add(seen, weight, into),
            Quality::Graph(f) => f.add(seen, weight, into),
        }
    }
}

/// What an artifact says, ready to be asked.
#[derive(Debug)]
pub struct Predictor {
    models: usize,
    /// Members of the ensemble with their weights; one of weight 1 otherwise.
    parts: Vec<(f64, Quality)>,
    /// Linear maps to the logarithm of the cost; where there are none, the mean costs.
    cost: Option<linear::Linear>,
    /// Per model: mean, least and greatest cost of the fitted queries.
    costs: Vec<[f64; 3]>,
}

impl Predictor {
    /// Reads the tensors of an artifact. An artifact of the selector `ensemble` holds the tensors of its members, and
    /// `ensemble.weights` in the order of [`FAMILIES`], 0 for what is not a member.
    ///
    /// # Errors
    /// When a tensor is missing or of a shape that does not fit the card.
    pub fn of(artifact: &Artifact) -> Result<Self, ArtifactError> {
        let models = artifact.card.models.len();
        let dimensions = artifact.card.embedder.as_ref().map_or(0, |e| e.dimensions as usize);
        let inputs = dimensions + artifact.card.features.len();
        let shape = Shape { models, dimensions, inputs };
        let mut parts = Vec::new();
        match artifact.card.selector.as_str() {
            "ensemble" => {
                let weights = artifact.tensor("ensemble.weights", &[FAMILIES.len()])?;
                for (family, weight) in FAMILIES.iter().zip(&weights.data).filter(|(_, w)| **w != 0.0) {
                    parts.push((f64::from(*weight), shape.family(artifact, family)?));
                }
            }
            family => parts.push((1.0, shape.family(artifact, family)?)),
        }
        let cost = match artifact.tensors.contains_key("cost.w") {
            true => Some(linear::Linear::of(artifact, "cost", &shape)?),
            false => None,
        };
        let costs = artifact.tensor("cost.range", &[models, 3])?;
        let (rows, _) = costs.data.as_chunks::<3>();
        let costs: Vec<[f64; 3]> = rows.iter().map(|row| row.map(f64::from)).collect();
        if costs.iter().any(|[_, least, most]| least > most) {
            let what = "has a least cost above the greatest".to_owned();
            return Err(ArtifactError::Tensor { name: "cost.range".to_owned(), what });
        }
        Ok(Self { models, parts, cost, costs })
    }

    /// Quality and cost per model. Inputs of other lengths than the artifact's give predictions that mean nothing; the
    /// caller has compared embedder and features before.
    pub fn predict(&self, seen: &Seen<'_>) -> Prediction {
        let mut quality = vec![0.0; self.models];
        for (weight, part) in &self.parts {
            part.add(seen, *weight, &mut quality);
        }
        let mut cost: Vec<f64> = self.costs.iter().map(|[mean, ..]| *mean).collect();
        if let Some(linear) = &self.cost {
            let mut logs = vec![0.0; self.models];
            linear.add(seen, 1.0, &mut logs);
            for ((cost, log), [_, least, most]) in cost.iter_mut().zip(logs).zip(&self.costs) {
                *cost = libm::exp(log).clamp(*least, *most);
            }
        }
        Prediction { quality, cost }
    }
}

/// The place of the greatest quality less `weight` times the cost in units of `unit` USD; ties to the first.
pub fn best(prediction: &Prediction, weight: f64, unit: f64) -> usize {
    let mut best: Option<(f64, usize)> = None;
    for (i, (quality, cost)) in prediction.quality.iter().zip(&prediction.cost).enumerate() {
        let score = quality - weight * (cost / unit);
        if best.is_none_or(|(before, _)| score > before) {
            best = Some((score, i));
        }
    }
    best.map_or(0, |(_, i)| i)
}

/// The families that can be members of an ensemble, in the order of its weights.
pub const FAMILIES: [&str; 6] = ["ridge", "logistic", "kernel", "knn", "clusters", "graph"];

/// The lengths that tensors must have.
pub(in crate::policy) struct Shape {
    pub models: usize,
    pub dimensions: usize,
    /// Embedding and features together.
    pub inputs: usize,
}

impl Shape {
    fn family(&self, artifact: &Artifact, family: &str) -> Result<Quality, ArtifactError> {
        Ok(match family {
            "ridge" | "logistic" => Quality::Linear(linear::Linear::of(artifact, family, self)?),
            "kernel" => Quality::Kernel(kernel::Kernel::of(artifact, self)?),
            "knn" => Quality::Knn(knn::Knn::of(artifact, self)?),
            "clusters" => Quality::Clusters(clusters::Clusters::of(artifact, self)?),
            "graph" => Quality::Graph(graph::Graph::of(artifact, self)?),
            other => {
                let what = format!("cannot be had: there is no predictor `{other}`");
                return Err(ArtifactError::Tensor { name: "w".to_owned(), what });
            }
        })
    }
}

/// A tensor's numbers in double precision.
fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.data.iter().map(|x| f64::from(*x)).collect()
}
