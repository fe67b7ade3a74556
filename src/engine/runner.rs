//! Turns the parts of a step into one batch of tokens, and runs the model on it.

use super::{
    EngineError,
    candle::CandleModel,
    model::{Batch, Kv, Llama, Piece, llama::Workspace},
    ops::Ops,
    scheduler::{Part, Scheduler},
};

/// A model with the buffers and threads that it runs on.
pub enum Runner {
    Own(Box<OwnModel>),
    Candle(Box<CandleModel>),
}

/// A model that the forward pass of our own computes.
pub struct OwnModel {
    model: Llama,
    ops: Ops,
    workspace: Workspace,
    batch: Batch,
}

impl Runner {
    pub fn new(model: Llama, ops: Ops) -> Self {
        Self::Own(Box::new(OwnModel { model, ops, workspace: Workspace::default(), batch: Batch::default() }))
    }

    /// Computes the parts. The logits of those that sample are then given by [`logits`](Self::logits), in order: after the last
    /// pending token, and after each guess.
    ///
    /// # Errors
    /// As [`CandleModel::run`]; our own model has none.
    pub fn run(&mut self, scheduler: &mut Scheduler, parts: &[Part]) -> Result<(), EngineError> {
        match self {
            Self::Own(own) => own.run(scheduler, parts),
            Self::Candle(candle) => return candle.run(scheduler, parts),
        }
        Ok(())
    }

    /// The n-th logits.
    pub fn logits(&self, n: usize) -> &[f32] {
        match self {
            Self::Own(own) => {
                let vocabulary = own.model.config().vocabulary;
                &own.workspace.logits[n * vocabulary..][..vocabulary]
            }
            Self::Candle(candle) => candle.logits(n),
        }
    }

    /// Lets go of what it holds for sequences that run no more.
    pub fn keep_running(&mut self, scheduler: &Scheduler) {
        if let Self::Candle(candle) = self {
            candle.keep_running(scheduler);
        }
    }
}

impl OwnModel {
    fn run(&mut self, scheduler: &mut Scheduler, parts: &[Part]) {
        let batch = &mut self.batch;
        batch.tokens.clear();
        batch.pieces.clear();
        batch.logits.clear();
        let mut order: Vec<_> = parts.iter().map(|part| (part.sequence, part.build)).collect();
        order.sort_unstable();
        for part in parts {
            let row = batch.tokens.len();
            batch.tokens.extend(scheduler.tokens(part));
            batch.tokens.extend_from_slice(&scheduler.running[part.sequence].guesses()[..part.guesses]);
            let cache = order.partition_point(|of| *of < (part.sequence, part.build));
            batch.pieces.push(Piece { cache, row, count: part.count });
            if part.samples {
                let end = row + part.count;
                batch.logits.extend(end - part.guesses - 1..end);
            }
        }
        let caches = scheduler.caches(parts);
        debug_assert!(caches.iter().map(|(of, _)| *of).eq(order));
        let mut caches: Vec<&mut Kv> = caches.into_iter().map(|(_, kv)| kv).collect();
        self.model.forward(&self.ops, batch, &mut caches, &mut self.workspace);
    }
}
