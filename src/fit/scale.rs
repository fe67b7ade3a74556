//! Query features on one scale. Beside an embedding of unit length, whose elements hardly vary, a feature's own scale decides
//! how much the regularisation leaves of it; so every feature is fitted at a fixed standard deviation, and the scale is
//! folded into the weights afterwards: what serves sees features as they are.

use super::Task;

/// Standard deviation at which features are fitted: a few times that of an embedding's principal directions.
const DEVIATION: f64 = 0.3;

/// Mean and factor per feature; features begin at column `from`.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    from: usize,
    features: Vec<(f64, f64)>,
}

impl Scale {
    /// Of the queries that are fitted on. A feature that never varies gets the factor 0.
    pub fn of(task: &Task<'_>) -> Self {
        let n = task.places.len().max(1) as f64;
        let count = task.places.first().map_or(0, |q| task.inputs.features[*q].len());
        let features = (0..count).map(|f| {
            let values = || task.places.iter().map(|q| task.inputs.features[*q][f]);
            let mean = values().sum::<f64>() / n;
            let deviation = (values().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
            (mean, if deviation > 1e-9 { DEVIATION / deviation } else { 0.0 })
        });
        Self { from: 1 + task.inputs.embedder.dimensions as usize, features: features.collect() }
    }

    /// A row of [1, embedding, features, …] with its features scaled.
    pub fn apply(&self, row: &mut [f64]) {
        for (x, (mean, factor)) in row[self.from..].iter_mut().zip(&self.features) {
            *x = (*x - mean) * factor;
        }
    }

    /// Weights that were fitted to scaled rows, for so many outputs one after the other, as weights of rows as they are.
    pub fn fold(&self, weights: &mut [f64], outputs: usize) {
        let columns = (weights.len() / outputs.max(1)).max(1);
        for w in weights.chunks_exact_mut(columns) {
            for (i, (mean, factor)) in self.features.iter().enumerate() {
                w[self.from + i] *= factor;
                w[0] -= w[self.from + i] * mean;
            }
        }
    }
}
