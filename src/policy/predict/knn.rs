//! `knn`: the outcomes of the k fitted queries nearest by cosine (RouterBench, arXiv 2403.12031, section 5.1), weighted by
//! exp(sharpness x cosine).
//!
//! Every vector is kept twice: in single precision, and as bytes with one scale. The bytes are read first; of the
//! nearest by them, eight times as many as are wanted, the exact cosine decides. Where that is less than a quarter of all,
//! this is several times faster than reading all vectors and gives, but for rare ties at the border, the same neighbours
//! (the tests hold it to 99 %). It is a fixed sequence of operations like everything that decides.

use super::{Seen, Shape, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// Candidates per wanted neighbour that are looked at exactly.
const CANDIDATES: usize = 8;

/// Fitted queries and their outcomes.
#[derive(Debug)]
pub struct Knn {
    dimensions: usize,
    models: usize,
    k: usize,
    sharpness: f64,
    /// Queries x dimensions, of unit length.
    vectors: Vec<f32>,
    bytes: Vec<i8>,
    /// Queries x models.
    scores: Vec<f64>,
}

impl Knn {
    pub(super) fn of(artifact: &Artifact, shape: &Shape) -> Result<Self, ArtifactError> {
        let vectors = artifact.tensor("knn.vectors", &[0, shape.dimensions])?;
        let n = vectors.shape[0];
        let scores = wide(artifact.tensor("knn.scores", &[n, shape.models])?);
        let parameter = |name: &str, default: f64| artifact.card.parameters.get(name).copied().unwrap_or(default);
        let k = (parameter("knn.k", 50.0) as usize).clamp(1, n.max(1));
        Ok(Self::new(vectors.data.clone(), scores, shape.dimensions, k, parameter("knn.sharpness", 0.0)))
    }

    /// `vectors`: queries x dimensions; `scores`: queries x models.
    pub fn new(vectors: Vec<f32>, scores: Vec<f64>, dimensions: usize, k: usize, sharpness: f64) -> Self {
        let n = vectors.len() / dimensions.max(1);
        let bytes = quantised(&vectors);
        Self { dimensions, models: scores.len() / n.max(1), k, sharpness, vectors, bytes, scores }
    }

    pub(super) fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        let near = self.nearest(seen.embedding);
        let top = near.first().map_or(0.0, |(cosine, _)| *cosine);
        let shares: Vec<f64> = near.iter().map(|(cosine, _)| libm::exp(self.sharpness * (cosine - top))).collect();
        let total: f64 = shares.iter().sum();
        for (share, (_, query)) in shares.iter().zip(&near) {
            let row = &self.scores[query * self.models..(query + 1) * self.models];
            for (into, score) in into.iter_mut().zip(row) {
                *into += weight * (share / total) * score;
            }
        }
    }

    /// The k nearest as (cosine, place), nearest first; ties to the lower place.
    pub fn nearest(&self, query: &[f32]) -> Vec<(f64, usize)> {
        let n = self.vectors.len() / self.dimensions.max(1);
        let wanted = self.k * CANDIDATES;
        if wanted * 4 >= n || query.len() != self.dimensions {
            return self.exact(query, 0..n);
        }
        let q = quantised(query);
        let dots: Vec<i32> = self.bytes.chunks_exact(self.dimensions).map(|row| dot_i8(row, &q)).collect();
        let mut order: Vec<u32> = (0..n as u32).collect();
        let key = |i: &u32| (std::cmp::Reverse(dots[*i as usize]), *i);
        order.select_nth_unstable_by_key(wanted, key);
        order.truncate(wanted);
        order.sort_unstable();
        self.exact(query, order.into_iter().map(|i| i as usize))
    }

    /// The k nearest of `places`, by the cosines themselves.
    pub fn exact(&self, query: &[f32], places: impl Iterator<Item = usize>) -> Vec<(f64, usize)> {
        let row = |i: usize| &self.vectors[i * self.dimensions..(i + 1) * self.dimensions];
        let mut near: Vec<(f64, usize)> = places.map(|i| (linalg::dot_f32(row(i), query), i)).collect();
        let by = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if near.len() > self.k {
            near.select_nth_unstable_by(self.k, by);
            near.truncate(self.k);
        }
        near.sort_by(by);
        near
    }
}

/// Bytes of vectors of unit length, all on one scale: no element is above 1, and those of real embeddings are below 0.5.
fn quantised(vectors: &[f32]) -> Vec<i8> {
    vectors.iter().map(|x| (x * 254.0).round().clamp(-127.0, 127.0) as i8).collect()
}

/// Exact in integers, so that no order of summation can show.
fn dot_i8(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(x, y)| i32::from(*x) * i32::from(*y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::draw;

    fn unit(salt: u64, dimensions: usize) -> Vec<f32> {
        let raw: Vec<f32> = (0..dimensions).map(|i| draw::unit(salt, 21, i as u64) as f32 - 0.5).collect();
        let norm = linalg::dot_f32(&raw, &raw).sqrt() as f32;
        raw.iter().map(|x| x / norm).collect()
    }

    #[test]
    fn the_prefilter_finds_the_same_neighbours() {
        let (n, dimensions, k) = (4000, 64, 20);
        let vectors: Vec<f32> = (0..n).flat_map(|i| unit(i, dimensions)).collect();
        let knn = Knn::new(vectors, vec![0.0; n as usize], dimensions, k, 0.0);
        let (mut found, mut wanted) = (0, 0);
        for q in 0..50 {
            let query = unit(100_000 + q, dimensions);
            let exact: Vec<usize> = knn.exact(&query, 0..n as usize).into_iter().map(|(_, i)| i).collect();
            let near: Vec<usize> = knn.nearest(&query).into_iter().map(|(_, i)| i).collect();
            wanted += exact.len();
            found += exact.iter().filter(|i| near.contains(i)).count();
        }
        assert!(found as f64 >= 0.99 * wanted as f64, "{found} of {wanted}");
    }

    #[test]
    fn near_queries_count_more_with_sharpness() {
        let vectors = vec![1.0, 0.0, 0.6, 0.8];
        let mut seen = Vec::new();
        for sharpness in [0.0, 5.0] {
            let knn = Knn::new(vectors.clone(), vec![1.0, 0.0], 2, 2, sharpness);
            let mut out = [0.0];
            knn.add(&Seen { embedding: &[1.0, 0.0], features: &[] }, 1.0, &mut out);
            seen.push(out[0]);
        }
        let want = 1.0 / (1.0 + (-2.0f64).exp());
        assert!((seen[0] - 0.5).abs() < 1e-12 && (seen[1] - want).abs() < 1e-6, "{seen:?}");
    }
}
