//! Which tokens the next step computes: decoding sequences first, one token each, then pieces of prompts in the order
//! in which requests came, up to a bound on tokens. So no request blocks another, and a long prompt delays the others'
//! next token by one bounded step at a time. Touches no tensor.
//!
//! A request is admitted when its choices fit the bound on sequences and all positions that it may ever fill fit the
//! bound on the cache: an admitted request never has to give way. Admission is first come, first served. What the bound
//! leaves keeps the blocks of prompts and answers before ([`PrefixCache`]), with which a request begins as far as they go.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::{
    model::Kv,
    ops::attention::POSITIONS,
    prefix_cache::PrefixCache,
    sequence::{Request, Sequence, Tally},
};

/// Bounds of the scheduler. All above zero.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of one step.
    pub step_tokens: usize,
    /// Choices that run at once.
    pub sequences: usize,
    /// Positions in all caches together.
    pub positions: usize,
}

/// A part of the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the running sequence.
    pub sequence: usize,
    /// Of its pending tokens, how many.
    pub count: usize,
    /// Whether all its pending tokens are computed, so that a token can be sampled.
    pub samples: bool,
}

struct Ticket {
    /// Choices not finished yet, those not forked yet included.
    open: usize,
    positions: usize,
    tally: Tally,
}

/// The queue and the running sequences.
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Arc<Request>>,
    pub running: Vec<Sequence>,
    tickets: BTreeMap<u64, Ticket>,
    next_ticket: u64,
    prefixes: PrefixCache,
    /// Tokens of prompts that were there already, since the start.
    reused: u64,
    /// Requests that have left the queue since [`take_left`](Self::take_left).
    left: usize,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            prefixes: PrefixCache::default(),
            reused: 0,
            left: 0,
        }
    }

    /// Puts a request at the end of the queue.
    pub fn push(&mut self, request: Arc<Request>) {
        self.waiting.push_back(request);
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How many requests have left the queue, admitted or abandoned, since this was last asked.
    pub fn take_left(&mut self) -> usize {
        std::mem::take(&mut self.left)
    }

    /// Drops what nobody listens to any more; gives the number of running sequences dropped.
    pub fn drop_abandoned(&mut self) -> usize {
        let queued = self.waiting.len();
        self.waiting.retain(|request| !request.events.is_closed());
        self.left += queued - self.waiting.len();
        let before = self.running.len();
        let mut gone = Vec::new();
        for index in 0..before {
            if self.running[index].abandoned() {
                gone.push(self.running[index].ticket);
                self.keep(index);
            }
        }
        self.running.retain(|sequence| !sequence.abandoned());
        for ticket in gone {
            self.tickets.remove(&ticket);
        }
        before - self.running.len()
    }

    /// Admits what fits, in order.
    pub fn admit(&mut self) {
        while let Some(request) = self.waiting.front() {
            let (sequences, positions) = self
                .tickets
                .values()
                .fold((0, 0), |(sequences, positions), t| (sequences + t.open, positions + t.positions));
            let (choices, wanted) = (request.choices as usize, request.reservation());
            let fits = sequences + choices <= self.limits.sequences && positions + wanted <= self.limits.positions;
            // Alone it runs in any case: the engine has checked that a request fits the context.
            if !fits && !self.tickets.is_empty() {
                return;
            }
            let Some(request) = self.waiting.pop_front() else { return };
            self.left += 1;
            let ticket = self.next_ticket;
            self.next_ticket += 1;
            // The last token is computed in any case: its logits are what is sampled from.
            let most = (request.prompt.len() - 1) / POSITIONS;
            let mut sequence = Sequence::new(request, ticket, 0);
            sequence.kv = Kv::of(self.prefixes.find(&sequence.request.prompt, most));
            let tally = Tally { reused: sequence.kv.len() as u32, ..Tally::default() };
            self.reused += u64::from(tally.reused);
            self.tickets.insert(ticket, Ticket { open: choices, positions: wanted, tally });
            self.running.push(sequence);
            self.make_room();
        }
    }

    /// Keeps what a running sequence has computed, for those that begin alike.
    pub fn keep(&mut self, index: usize) {
        let sequence = &self.running[index];
        self.prefixes.keep(&sequence.computed(), sequence.kv.blocks());
        self.make_room();
    }

    /// What is kept may take what the running requests leave.
    fn make_room(&mut self) {
        let running: usize = self.tickets.values().map(|ticket| ticket.positions.next_multiple_of(POSITIONS)).sum();
        self.prefixes.shrink(self.limits.positions.saturating_sub(running) / POSITIONS);
    }

    /// Tokens of prompts that were there already, since the start, and tokens that are kept now.
    pub fn reuse(&self) -> (u64, u64) {
        (self.reused, (self.prefixes.len() * POSITIONS) as u64)
    }

    /// How many tokens of a prompt a part computes.
    pub fn prefills(&self, part: &Part) -> usize {
        let sequence = &self.running[part.sequence];
        part.count.min(sequence.request.prompt.len().saturating_sub(sequence.kv.len()))
    }

    /// The parts of the next step: at least one when anything runs.
    pub fn plan(&self) -> Vec<Part> {
        let mut left = self.limits.step_tokens;
        let mut parts = Vec::new();
        for prefill in [false, true] {
            for (index, sequence) in self.running.iter().enumerate() {
                if left == 0 || sequence.prefilling() != prefill {
                    continue;
                }
                let pending = sequence.pending().len();
                let count = pending.min(left);
                left -= count;
                parts.push(Part { sequence: index, count, samples: count == pending });
            }
        }
        parts
    }

    /// Adds the other choices of a sequence whose prompt has just been computed; gives their indices.
    pub fn fork(&mut self, index: usize) -> std::ops::Range<usize> {
        let begin = self.running.len();
        for choice in 1..self.running[index].request.choices {
            let fork = self.running[index].fork(choice);
            self.running.push(fork);
        }
        begin..self.running.len()
    }

    /// Counts a finished choice; gives its request's tally when it was the last.
    pub fn finished(&mut self, index: usize) -> Option<Tally> {
        self.keep(index);
        let sequence = &mut self.running[index];
        // Its cache is free at once, its place in `running` after the step.
        sequence.kv = Kv::default();
        let ticket = sequence.ticket;
        let entry = self.tickets.get_mut(&ticket)?;
        entry.open -= 1;
        entry.tally.finished += 1;
        entry.tally.completion_tokens += sequence.generated.len() as u32;
        match entry.open {
            0 => self.tickets.remove(&ticket).map(|t| t.tally),
            _ => None,
        }
    }

    /// Takes out the sequences of these indices.
    pub fn remove(&mut self, finished: &[usize]) {
        let mut index = 0;
        self.running.retain(|_| {
            index += 1;
            !finished.contains(&(index - 1))
        });
    }

    /// The caches of some running sequences, in the order of their indices, which must ascend.
    pub fn caches(&mut self, indices: &[usize]) -> Vec<&mut Kv> {
        self.running
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| indices.contains(index))
            .map(|(_, sequence)| &mut sequence.kv)
            .collect()
    }
}

#[cfg(test)]
mod tests;
