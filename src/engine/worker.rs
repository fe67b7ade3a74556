//! The engine's thread: take requests, schedule, run, sample, give out; sleep when there is nothing to do.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    mpsc::{Receiver, TryRecvError},
};

use super::{
    EngineError, GenerateEvent,
    runner::Runner,
    sampler::sample,
    scheduler::{Part, Scheduler},
    sequence::Request,
    tokenizer::Tokenizer,
};
use crate::domain::FinishReason;

/// What the handle and the thread both see.
#[derive(Default)]
pub struct Load {
    /// Sequences that run.
    pub running: AtomicUsize,
    /// Requests accepted and not yet admitted.
    pub waiting: AtomicUsize,
    pub stop: AtomicBool,
    /// What [`super::Counters`] gives out.
    pub prefilled: AtomicU64,
    pub reused: AtomicU64,
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
        self.load.waiting.fetch_sub(self.scheduler.take_left(), Ordering::Relaxed);
        let counts = self.scheduler.counts();
        for (shown, count) in [
            (&self.load.prefilled, counts.prefilled),
            (&self.load.reused, counts.reused),
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
        self.runner.run(&mut self.scheduler, &parts);
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
            let Some(sampled) = sample(logits, request.choosing, sequence.choice, position, request.logprobs) else {
                sequence.send(GenerateEvent::Failed(EngineError::NotFinite));
                break Some(FinishReason::Cancelled);
            };
            let token = sampled.token;
            if let Some(reason) = sequence.accept(token, sampled.logprobs, &self.tokenizer) {
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
