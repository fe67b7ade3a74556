//! The engine's thread: take requests, schedule, run, sample, give out; sleep when there is nothing to do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

use super::{
    EngineError, GenerateEvent,
    runner::Runner,
    sampler::{Allowed, choose, logprobs, masked},
    scheduler::{Part, Scheduler},
    sequence::{MOST_GUESSES, Request},
    tokenizer::Tokenizer,
};
use crate::domain::FinishReason;

/// Weight of the newest step in the rates.
const NEWEST: f64 = 0.05;

/// What the handle and the thread both see.
#[derive(Default)]
pub struct Load {
    /// Sequences that run.
    pub running: AtomicUsize,
    /// Requests accepted and not yet admitted.
    pub waiting: AtomicUsize,
    /// Tokens of their prompts.
    pub waiting_tokens: AtomicUsize,
    /// Tokens of prompts that are to be computed of those that run.
    pub pending: AtomicUsize,
    /// Tokens per second, as bits of an f64: see [`super::Pace`].
    pub prefill_rate: AtomicU64,
    pub decode_rate: AtomicU64,
    pub stop: AtomicBool,
    /// What [`super::Counters`] gives out.
    pub prefilled: AtomicU64,
    pub reused: AtomicU64,
    pub attached: AtomicU64,
    pub loaded: AtomicU64,
    pub decoded: AtomicU64,
    pub kept: AtomicU64,
    pub recomputed: AtomicU64,
    pub preempted: AtomicU64,
    pub guessed: AtomicU64,
    pub guessed_right: AtomicU64,
}

/// The state of the engine's thread.
pub struct Worker {
    pub requests: Receiver<Arc<Request>>,
    pub scheduler: Scheduler,
    pub runner: Runner,
    pub tokenizer: Arc<Tokenizer>,
    pub load: Arc<Load>,
}

impl Worker {
    /// Works until the handle is gone.
    pub fn run(mut self) {
        loop {
            if !self.receive() || self.load.stop.load(Ordering::Relaxed) {
                return;
            }
            self.scheduler.drop_abandoned();
            self.scheduler.admit();
            self.runner.keep_running(&self.scheduler);
            self.publish();
            if !self.scheduler.running.is_empty() {
                self.step();
                self.publish();
            }
        }
    }

    /// Takes what has come; waits when there is nothing else to do. False when the handle is gone.
    fn receive(&mut self) -> bool {
        if self.scheduler.is_idle() {
            match self.requests.recv() {
                Ok(request) => self.scheduler.push(request),
                Err(_) => return false,
            }
        }
        loop {
            match self.requests.try_recv() {
                Ok(request) => self.scheduler.push(request),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.scheduler.is_idle(),
            }
        }
    }

    fn publish(&mut self) {
        self.load.running.store(self.scheduler.running.len(), Ordering::Relaxed);
        let (left, tokens) = self.scheduler.take_left();
        self.load.waiting.fetch_sub(left, Ordering::Relaxed);
        self.load.waiting_tokens.fetch_sub(tokens, Ordering::Relaxed);
        self.load.pending.store(self.scheduler.pending(), Ordering::Relaxed);
        let counts = self.scheduler.counts();
        for (shown, count) in [
            (&self.load.prefilled, counts.prefilled),
            (&self.load.reused, counts.reused),
            (&self.load.attached, counts.attached),
            (&self.load.loaded, counts.loaded),
            (&self.load.recomputed, counts.recomputed),
            (&self.load.preempted, counts.preempted),
            (&self.load.guessed, counts.guessed),
            (&self.load.kept, self.scheduler.kept()),
        ] {
            shown.store(count, Ordering::Relaxed);
        }
    }

    fn step(&mut self) {
        let parts = self.scheduler.plan();
        let begun = Instant::now();
        if let Err(error) = self.runner.run(&mut self.scheduler, &parts) {
            return self.failed(&parts, &error);
        }
        self.measured(&parts, begun.elapsed().as_secs_f64());
        parts.iter().for_each(|part| self.scheduler.count(part));
        // Before any of what follows is seen.
        self.publish();
        let mut finished = Vec::new();
        let mut row = 0;
        for part in parts.iter().filter(|part| part.samples) {
            self.sample(row, part, &mut finished);
            row += 1 + part.guesses;
        }
        self.scheduler.remove(&finished);
        self.runner.keep_running(&self.scheduler);
    }

    /// Ends the requests of a step that went wrong.
    fn failed(&mut self, parts: &[Part], error: &EngineError) {
        tracing::error!(%error, "a step failed");
        let mut indices: Vec<usize> = parts.iter().map(|part| part.sequence).collect();
        // A sequence may have several parts.
        indices.sort_unstable();
        indices.dedup();
        for index in &indices {
            self.scheduler.running[*index].send(GenerateEvent::Failed(error.clone()));
            self.scheduler.finished(*index);
        }
        self.scheduler.remove(&indices);
    }

    /// Keeps the rates up to date. A step that computes more of prompts than anything else says how fast that is; one that
    /// computes nothing of them, how fast answers go on.
    fn measured(&self, parts: &[Part], seconds: f64) {
        let whole: usize = parts.iter().map(|part| part.count).sum();
        let prompts: usize = parts.iter().map(|part| part.count).filter(|count| *count > 1 + MOST_GUESSES).sum();
        let mix = |rate: &AtomicU64, new: f64| {
            let old = f64::from_bits(rate.load(Ordering::Relaxed));
            let mean = if old == 0.0 { new } else { old + NEWEST * (new - old) };
            rate.store(mean.to_bits(), Ordering::Relaxed);
        };
        if seconds <= 0.0 || whole == 0 {
        } else if prompts == 0 {
            mix(&self.load.decode_rate, 1.0 / seconds);
        } else if 2 * prompts > whole {
            mix(&self.load.prefill_rate, whole as f64 / seconds);
        }
    }

    /// Samples for a part, and for the choices that fork from it when its prompt has just ended.
    fn sample(&mut self, row: usize, part: &Part, finished: &mut Vec<usize>) {
        let forks = match self.scheduler.running[part.sequence].generated() == 0 {
            true => {
                // Whoever comes with the same prompt while this one is answered need not wait for the end.
                self.scheduler.keep(part.sequence);
                self.scheduler.fork(part.sequence)
            }
            false => 0..0,
        };
        for index in std::iter::once(part.sequence).chain(forks) {
            let ended = self.next(row, part, index);
            if ended {
                finished.push(index);
            }
        }
    }

    /// Samples what comes next in a sequence, as far as its guesses are right; says whether that was its end.
    fn next(&mut self, row: usize, part: &Part, index: usize) -> bool {
        let sequence = &mut self.scheduler.running[index];
        let request = Arc::clone(&sequence.request);
        let mut right = 0;
        let reason = loop {
            self.load.decoded.fetch_add(1, Ordering::Relaxed);
            let logits = self.runner.logits(row + right);
            let position = sequence.tokens().len();
            // Log-probabilities are the model's own, whatever is allowed.
            let mut left = None;
            if let Some(mask) = &request.mask {
                let mut allowed = Allowed::none(logits.len());
                mask.allow(sequence.answer(), &mut allowed);
                left = masked(logits, &allowed);
                if left.is_none() {
                    sequence.send(GenerateEvent::Failed(EngineError::NothingAllowed));
                    break Some(FinishReason::Cancelled);
                }
            }
            let from = left.as_deref().unwrap_or(logits);
            let Some(token) = choose(from, request.choosing, sequence.choice, position) else {
                sequence.send(GenerateEvent::Failed(EngineError::NotFinite));
                break Some(FinishReason::Cancelled);
            };
            let known = request.logprobs.map(|top| logprobs(logits, token, top));
            if let Some(reason) = sequence.accept(token, known, &self.tokenizer) {
                break Some(reason);
            }
            if right == part.guesses || sequence.guesses()[right] != token {
                break None;
            }
            right += 1;
        };
        self.load.guessed_right.fetch_add(right as u64, Ordering::Relaxed);
        sequence.checked(right);
        let Some(reason) = reason else { return false };
        let failed = reason == FinishReason::Cancelled;
        if !failed {
            sequence.send(GenerateEvent::Finish { choice: sequence.choice, reason });
        }
        if let Some(tally) = self.scheduler.finished(index)
            && !failed
        {
            let sequence = &self.scheduler.running[index];
            sequence.send(GenerateEvent::Usage(sequence.usage(&tally)));
        }
        true
    }
}
