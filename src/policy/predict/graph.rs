//! `graph`: the edge predictor of a graph of tasks, queries and models (Feng, Shen, You, "GraphRouter: a graph-based router
//! for LLM selections", ICLR 2025, arXiv 2410.03834). The query's side is not propagated through the graph, so the models'
//! vectors are computed when the graph is fitted, and a request costs one linear map and K dot products:
//! score(q, m) = logistic(mean over d of x_q[d] x_m[d] + bias[m]).

use super::{Seen, Shape, linear::inputs, wide};
use crate::policy::{
    artifact::{Artifact, ArtifactError},
    linalg,
};

/// The query's map and the models' vectors.
#[derive(Debug)]
pub(in crate::policy) struct Graph {
    hidden: usize,
    /// Hidden x (1 + inputs).
    query: Vec<f64>,
    /// Models x hidden.
    models: Vec<f64>,
    bias: Vec<f64>,
}

impl Graph {
    pub(super) fn of(artifact: &Artifact, shape: &Shape) -> Result<Self, ArtifactError> {
        let columns = 1 + shape.inputs;
        let query = artifact.tensor("graph.query", &[0, columns])?;
        let hidden = query.shape[0];
        let models = wide(artifact.tensor("graph.models", &[shape.models, hidden])?);
        let bias = wide(artifact.tensor("graph.bias", &[shape.models])?);
        Ok(Self { hidden, query: wide(query), models, bias })
    }

    pub(super) fn add(&self, seen: &Seen<'_>, weight: f64, into: &mut [f64]) {
        let x = inputs(seen);
        let mut h = vec![0.0; self.hidden];
        linalg::matvec(&self.query, &x, &mut h);
        for ((row, bias), into) in self.models.chunks_exact(self.hidden.max(1)).zip(&self.bias).zip(into) {
            let z = linalg::dot(row, &h) / self.hidden as f64 + bias;
            *into += weight / (1.0 + libm::exp(-z));
        }
    }
}
