//! `clusters`: the mean scores of the nearest cluster of fitted queries, by cosine to its centroid (Zhang et al., "Beyond
//! GPT-5: making LLMs cheaper and better via performance-efficiency optimized routing", Avengers-Pro, arXiv 2508.12631,
//! section 2). The means of the `nearest` few clusters are averaged, weighted by exp(sharpness x cosine); small clusters
//! are shrunk to the mean of all when they are fitted.

use super::{Seen, Shape, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// Centroids and what the models scored there.
#[derive(Debug)]
pub(in crate::policy) struct Clusters {
    dimensions: usize,
    models: usize,
    nearest: usize,
    sharpness: f64,
    /// Clusters x dimensions, of unit length.
    centroids: Vec<f32>,
    /// Clusters x models.
    scores: Vec<f64>,
}

impl Clusters {
    pub(super) fn of(artifact: &Artifact, shape: &Shape) -> Result<Self, ArtifactError> {
        let centroids = artifact.tensor("clusters.centroids", &[0, shape.dimensions])?;
        let n = centroids.shape[0];
        let scores = wide(artifact.tensor("clusters.scores", &[n, shape.models])?);
        let parameter = |name: &str, default: f64| artifact.card.parameters.get(name).copied().unwrap_or(default);
        Ok(Self {
            dimensions: shape.dimensions,
            models: shape.models,
            nearest: (parameter("clusters.nearest", 3.0) as usize).clamp(1, n.max(1)),
            sharpness: parameter("clusters.sharpness", 20.0),
            centroids: centroids.data.clone(),
            scores,
        })
    }

    pub(super) fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        let rows = self.centroids.chunks_exact(self.dimensions.max(1));
        let mut near: Vec<(f64, usize)> =
            rows.enumerate().map(|(i, row)| (linalg::dot_f32(row, seen.embedding), i)).collect();
        near.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        near.truncate(self.nearest);
        let top = near.first().map_or(0.0, |(cosine, _)| *cosine);
        let shares: Vec<f64> = near.iter().map(|(cosine, _)| libm::exp(self.sharpness * (cosine - top))).collect();
        let total: f64 = shares.iter().sum();
        for (share, (_, cluster)) in shares.iter().zip(&near) {
            let row = &self.scores[cluster * self.models..(cluster + 1) * self.models];
            for (into, score) in into.iter_mut().zip(row) {
                *into += weight * (share / total) * score;
            }
        }
    }
}
