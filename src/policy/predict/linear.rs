//! `ridge` and `logistic`: one linear map from [1, embedding, features] to a number per model (Hoerl, Kennard, "Ridge
//! regression", Technometrics 1970; RouterBench, arXiv 2403.12031, and RouteLLM, arXiv 2406.18665, use such predictors as
//! baselines). `logistic` puts the number through the logistic function. A request costs K dot products.

use super::{Seen, Shape, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// Weights, models x (1 + inputs), row-major.
#[derive(Debug)]
pub(in crate::policy) struct Linear {
    weights: Vec<f64>,
    columns: usize,
    logistic: bool,
}

/// [1, embedding, features].
pub(super) fn inputs(seen: &Seen<'_>) -> Vec<f64> {
    let mut x = Vec::with_capacity(1 + seen.embedding.len() + seen.features.len());
    x.push(1.0);
    x.extend(seen.embedding.iter().map(|v| f64::from(*v)));
    x.extend(seen.features);
    x
}

impl Linear {
    pub(super) fn of(artifact: &Artifact, name: &str, shape: &Shape) -> Result<Self, ArtifactError> {
        let columns = 1 + shape.inputs;
        let tensor = artifact.tensor(&format!("{name}.w"), &[shape.models, columns])?;
        Ok(Self { weights: wide(tensor), columns, logistic: name == "logistic" })
    }

    pub(super) fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        let x = inputs(seen);
        for (row, into) in self.weights.chunks_exact(self.columns).zip(into) {
            let z = linalg::dot(row, &x);
            *into += weight * if self.logistic { 1.0 / (1.0 + libm::exp(-z)) } else { z };
        }
    }
}
