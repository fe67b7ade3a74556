//! Turns the parts of a step into one batch of tokens, and runs the model on it.

use super::{
    model::{Batch, Llama, Piece, llama::Workspace},
    ops::Ops,
    scheduler::{Part, Scheduler},
};

/// A model with the buffers and threads that it runs on.
pub struct Runner {
    model: Llama,
    ops: Ops,
    workspace: Workspace,
    batch: Batch,
}

impl Runner {
    pub fn new(model: Llama, ops: Ops) -> Self {
        Self { model, ops, workspace: Workspace::default(), batch: Batch::default() }
    }

    /// Computes the parts. The logits of those that sample are then given by [`logits`](Self::logits), in order: after the last
    /// pending token, and after each guess.
    pub fn run(&mut self, scheduler: &mut Scheduler, parts: &[Part]) {
        let mut indices: Vec<usize> = parts.iter().map(|part| part.sequence).collect();
        indices.sort_unstable();
        let batch = &mut self.batch;
        batch.tokens.clear();
        batch.pieces.clear();
        batch.logits.clear();
        for part in parts {
            let row = batch.tokens.len();
            let sequence = &scheduler.running[part.sequence];
            batch.tokens.extend_from_slice(&sequence.pending()[..part.count - part.guesses]);
            batch.tokens.extend_from_slice(&sequence.guesses()[..part.guesses]);
            let cache = indices.partition_point(|index| *index < part.sequence);
            batch.pieces.push(Piece { cache, row, count: part.count });
            if part.samples {
                let end = row + part.count;
                batch.logits.extend(end - part.guesses - 1..end);
            }
        }
        self.model.forward(&self.ops, batch, &mut scheduler.caches(&indices), &mut self.workspace);
    }

    /// The n-th logits.
    pub fn logits(&self, n: usize) -> &[f32] {
        let vocabulary = self.model.config().vocabulary;
        &self.workspace.logits[n * vocabulary..][..vocabulary]
    }
}
