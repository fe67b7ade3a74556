//! Spherical k-means (Dhillon, Modha, "Concept decompositions for large sparse text data using clustering", 2001).

use super::{Inputs, algebra::dot32};
use crate::replay::{matrix::Matrix, metrics::SplitMix};

/// Rounds of assignment and averaging, and queries that are looked at: enough for centroids that stand for regions.
const ROUNDS: usize = 8;
const SAMPLE: usize = 4000;
/// Queries' worth of the overall mean that a cluster's mean is mixed with.
const SHRINK: f64 = 10.0;

/// At most `count` centroids of unit length, one after the other; clusters that become empty are dropped.
pub(super) fn centroids(inputs: &Inputs, places: &[usize], count: usize, seed: u64) -> Vec<f32> {
    let order = SplitMix(seed ^ 0x6b6d_6561_6e73).order(places.len());
    let sample: Vec<&[f32]> = order.iter().take(SAMPLE).map(|i| &*inputs.embeddings[places[*i]]).collect();
    let dimensions = sample.first().map_or(0, |v| v.len());
    let mut centroids: Vec<f32> = sample.iter().take(count).flat_map(|v| v.iter().copied()).collect();
    for _ in 0..ROUNDS {
        let mut sums = vec![0.0f32; centroids.len()];
        for v in &sample {
            let c = nearest(&centroids, dimensions, v);
            sums[c * dimensions..(c + 1) * dimensions].iter_mut().zip(*v).for_each(|(s, x)| *s += x);
        }
        centroids = sums
            .chunks_exact(dimensions.max(1))
            .filter_map(|sum| {
                let norm = dot32(sum, sum).sqrt();
                (norm > 1e-6).then(|| sum.iter().map(move |x| x / norm))
            })
            .flatten()
            .collect();
    }
    centroids
}

/// Mean scores per cluster, clusters x models, shrunk to the mean of all.
pub(super) fn means(matrix: &Matrix, inputs: &Inputs, places: &[usize], centroids: &[f32]) -> Vec<f64> {
    let dimensions = inputs.embedder.dimensions as usize;
    let (k, models) = (centroids.len() / dimensions.max(1), matrix.models.len());
    let overall: Vec<f64> = matrix.means(places).iter().map(|p| p.score).collect();
    let mut sums: Vec<f64> = (0..k).flat_map(|_| overall.iter().map(|mean| mean * SHRINK)).collect();
    let mut counts = vec![SHRINK; k];
    for q in places {
        let c = nearest(centroids, dimensions, &inputs.embeddings[*q]);
        counts[c] += 1.0;
        sums[c * models..(c + 1) * models].iter_mut().zip(matrix.scores(*q)).for_each(|(s, x)| *s += x);
    }
    sums.chunks_exact_mut(models).zip(&counts).for_each(|(row, n)| row.iter_mut().for_each(|s| *s /= n));
    sums
}

fn nearest(centroids: &[f32], dimensions: usize, v: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, c) in centroids.chunks_exact(dimensions.max(1)).enumerate() {
        let cosine = dot32(c, v);
        if cosine > best.0 {
            best = (cosine, i);
        }
    }
    best.1
}
