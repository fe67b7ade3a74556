//! `kernel`: a ridge regression on [1, embedding, features] and on the query's closeness to landmarks,
//! exp(gamma (cosine - 1)), the centroids of the fitted queries: kernel ridge regression by Nyström's method (Williams,
//! Seeger, "Using the Nyström method to speed up kernel machines", NIPS 2000), with the linear part kept. It bends where
//! `ridge` cannot, and costs as many dot products as there are landmarks, not queries.

use super::{Seen, Shape, linear::inputs, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// Landmarks and weights.
#[derive(Debug)]
pub(in crate::policy) struct Kernel {
    dimensions: usize,
    gamma: f64,
    /// Landmarks x dimensions, of unit length.
    landmarks: Vec<f32>,
    /// Models x (1 + inputs + landmarks).
    weights: Vec<f64>,
    columns: usize,
}

impl Kernel {
    pub(super) fn of(artifact: &Artifact, shape: &Shape) -> Result<Self, ArtifactError> {
        let landmarks = artifact.tensor("kernel.landmarks", &[0, shape.dimensions])?;
        let columns = 1 + shape.inputs + landmarks.shape[0];
        let weights = artifact.tensor("kernel.w", &[shape.models, columns])?;
        Ok(Self {
            dimensions: shape.dimensions,
            gamma: artifact.card.parameters.get("kernel.gamma").copied().unwrap_or(10.0),
            landmarks: landmarks.data.clone(),
            weights: wide(weights),
            columns,
        })
    }

    pub(super) fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        let x = expanded(seen, &self.landmarks, self.dimensions, self.gamma);
        for (row, into) in self.weights.chunks_exact(self.columns).zip(into) {
            *into += weight * linalg::dot(row, &x);
        }
    }
}

/// [1, embedding, features, closeness to each landmark].
pub fn expanded(seen: &Seen<'_>, landmarks: &[f32], dimensions: usize, gamma: f64) -> Vec<f64> {
    let mut x = inputs(seen);
    let close = |row: &[f32]| libm::exp(gamma * (linalg::dot_f32(row, seen.embedding) - 1.0));
    x.extend(landmarks.chunks_exact(dimensions.max(1)).map(close));
    x
}
