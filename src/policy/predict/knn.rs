//! `knn`: the outcomes of the k fitted queries nearest by cosine (RouterBench, arXiv 2403.12031, section 5.1), weighted by
//! exp(sharpness x cosine).
//!
//! Every vector is kept three times: in single precision, as bytes with one scale, and as one bit per element, whether it
//! is above the mean. The bits are read first, all of them; of the nearest by these the bytes are read; of the nearest by
//! these the exact cosine decides. With a few hundred bits per vector that reads a twentieth of the memory and gives, but for
//! rare ties at the border, the same neighbours (the tests hold it to 99 %). Bits and bytes are compared in integers, so no
//! order of summation and no instruction set can show.

use super::{Seen, Shape, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// Candidates per wanted neighbour that are looked at exactly, and that are looked at as bytes.
const EXACT: usize = 4;
const BYTES: usize = 60;

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
    /// Queries x words.
    bits: Vec<u64>,
    /// What the elements of all vectors are on average.
    mean: Vec<f32>,
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
        let mut mean = vec![0.0f32; dimensions];
        for row in vectors.chunks_exact(dimensions.max(1)) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / n as f32);
        }
        let bits = vectors.chunks_exact(dimensions.max(1)).flat_map(|row| above(row, &mean)).collect();
        Self { dimensions, models: scores.len() / n.max(1), k, sharpness, vectors, bytes, bits, mean, scores }
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
        let (exact, bytes) = (self.k * EXACT, self.k * BYTES);
        if bytes * 2 >= n || query.len() != self.dimensions {
            return self.exact(query, 0..n);
        }
        let coarse = nearest_by_bits(&self.bits, &above(query, &self.mean), bytes);
        let q = quantised(query);
        let mut near = dots(&self.bytes, &q, &coarse);
        near.select_nth_unstable_by_key(exact, |(dot, i)| (std::cmp::Reverse(*dot), *i));
        near.truncate(exact);
        near.sort_unstable_by_key(|(_, i)| *i);
        let full = |i: u32| &self.vectors[i as usize * self.dimensions..(i as usize + 1) * self.dimensions];
        near.iter().for_each(|(_, i)| fetch(full(*i)));
        self.exact(query, near.into_iter().map(|(_, i)| i as usize))
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

/// One bit per element: whether it is above the mean.
fn above(row: &[f32], mean: &[f32]) -> Vec<u64> {
    let word = |(x, m): (&[f32], &[f32])| {
        x.iter().zip(m).enumerate().fold(0, |word, (i, (x, m))| word | u64::from(x > m) << i)
    };
    row.chunks(64).zip(mean.chunks(64)).map(word).collect()
}

/// The places of the `count` rows with the fewest different bits, in order; of the last ones that differ alike, the first.
fn nearest_by_bits(rows: &[u64], query: &[u64], count: usize) -> Vec<u32> {
    let apart = differences(rows, query);
    let mut histogram = vec![0usize; query.len() * 64 + 1];
    apart.iter().for_each(|d| histogram[usize::from(*d)] += 1);
    let mut below = 0;
    let limit = histogram.iter().position(|n| {
        below += n;
        below >= count
    });
    let limit = limit.unwrap_or(histogram.len());
    let mut ties = count - (below - histogram.get(limit).copied().unwrap_or(0)).min(count);
    let mut out = Vec::with_capacity(count);
    for (i, d) in apart.iter().enumerate() {
        let d = usize::from(*d);
        if d < limit {
            out.push(i as u32);
        } else if d == limit && ties > 0 {
            ties -= 1;
            out.push(i as u32);
        }
    }
    out
}

/// Per row, how many bits differ.
fn differences(rows: &[u64], query: &[u64]) -> Vec<u16> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("popcnt") {
        #[target_feature(enable = "popcnt")]
        fn counted(rows: &[u64], query: &[u64]) -> Vec<u16> {
            each_difference(rows, query)
        }
        // SAFETY: the processor has the instruction.
        return unsafe { counted(rows, query) };
    }
    each_difference(rows, query)
}

#[inline(always)]
fn each_difference(rows: &[u64], query: &[u64]) -> Vec<u16> {
    let count = |row: &[u64]| row.iter().zip(query).map(|(a, b)| (a ^ b).count_ones() as u16).sum();
    rows.chunks_exact(query.len().max(1)).map(count).collect()
}

/// The dot products of a query with the rows at these places.
fn dots(rows: &[i8], query: &[i8], places: &[u32]) -> Vec<(i32, u32)> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide(rows: &[i8], query: &[i8], places: &[u32]) -> Vec<(i32, u32)> {
            each_dot(rows, query, places)
        }
        // SAFETY: the processor has the instructions.
        return unsafe { wide(rows, query, places) };
    }
    each_dot(rows, query, places)
}

#[inline(always)]
fn each_dot(rows: &[i8], query: &[i8], places: &[u32]) -> Vec<(i32, u32)> {
    let row = |i: u32| &rows[i as usize * query.len()..(i as usize + 1) * query.len()];
    let dot = |(n, i): (usize, &u32)| {
        places.get(n + AHEAD).into_iter().for_each(|next| fetch(row(*next)));
        (row(*i).iter().zip(query).map(|(x, y)| i32::from(*x) * i32::from(*y)).sum(), *i)
    };
    places.iter().enumerate().map(dot).collect()
}

/// Rows that are asked of memory before they are needed: they lie apart, and one after the other each would be waited for.
const AHEAD: usize = 8;

/// Asks memory for a row. Changes nothing but when it comes.
#[inline(always)]
fn fetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const LINE: usize = 64;
        let begin = row.as_ptr().cast::<i8>();
        for at in (0..size_of_val(row)).step_by(LINE) {
            // SAFETY: the address is within the row; a prefetch reads nothing that the program could see.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(begin.add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
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
        let (n, dimensions, k) = (6000, 192, 20);
        // As texts are: around some centres.
        let near = |i: u64| -> Vec<f32> {
            let (centre, noise) = (unit(1_000_000 + i % 60, dimensions), unit(i, dimensions));
            let raw: Vec<f32> = centre.iter().zip(&noise).map(|(c, n)| c + 0.7 * n).collect();
            let norm = linalg::dot_f32(&raw, &raw).sqrt() as f32;
            raw.iter().map(|x| x / norm).collect()
        };
        let vectors: Vec<f32> = (0..n).flat_map(near).collect();
        let knn = Knn::new(vectors, vec![0.0; n as usize], dimensions, k, 0.0);
        let (mut found, mut wanted) = (0, 0);
        for q in 0..50 {
            let query = near(100_000 + q);
            let exact: Vec<usize> = knn.exact(&query, 0..n as usize).into_iter().map(|(_, i)| i).collect();
            let near: Vec<usize> = knn.nearest(&query).into_iter().map(|(_, i)| i).collect();
            wanted += exact.len();
            found += exact.iter().filter(|i| near.contains(i)).count();
        }
        assert!(found as f64 >= 0.99 * wanted as f64, "{found} of {wanted}");
    }

    #[test]
    fn the_nearest_by_bits_are_those_with_the_fewest_differences() {
        let rows: Vec<u64> = vec![0b1111, 0b0001, 0b0000, 0b0011, 0b1000, u64::MAX];
        assert_eq!(nearest_by_bits(&rows, &[0], 1), [2]);
        // Of the two that differ in one bit, the first.
        assert_eq!(nearest_by_bits(&rows, &[0], 2), [1, 2]);
        assert_eq!(nearest_by_bits(&rows, &[0], 4), [1, 2, 3, 4]);
        assert_eq!(nearest_by_bits(&rows, &[0], 9).len(), 6);
        assert_eq!(differences(&rows, &[0]), each_difference(&rows, &[0]));
        let bytes: Vec<i8> = (0..200).map(|i| (i * 37 % 255 - 127) as i8).collect();
        assert_eq!(dots(&bytes, &bytes[3..53], &[0, 2, 3]), each_dot(&bytes, &bytes[3..53], &[0, 2, 3]));
        assert_eq!(above(&[0.5, -0.5, 0.2], &[0.1, 0.1, 0.2]), [0b001]);
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
