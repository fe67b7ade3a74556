//! What a model must keep to reuse documents.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::Bound;

/// What a model in the process must keep to reuse documents that requests mark: its record (`weir kv calibrate`) is held against
/// this. Models without a record compute them where they stand.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ChunkReuseSection {
    /// `false`: no model does.
    pub enabled: Option<bool>,
    /// Largest divergence of the next token from the full computation's, nats per token; 0.1 otherwise.
    pub max_divergence: Option<f64>,
    /// Least share of answer tokens whose best is the same; 0.9 otherwise.
    pub min_top1: Option<f64>,
    /// Least F1 of the answers' words; 0.8 otherwise.
    pub min_f1: Option<f64>,
}

impl ChunkReuseSection {
    pub(super) fn bound(&self) -> Option<Bound> {
        self.enabled.unwrap_or(true).then(|| Bound {
            divergence: self.max_divergence.unwrap_or(0.1),
            top1: self.min_top1.unwrap_or(0.9),
            f1: self.min_f1.unwrap_or(0.8),
        })
    }
}
