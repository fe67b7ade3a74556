//! Which tokens the next step computes: decoding sequences first, one token each, then pieces of prompts, up to a bound on
//! tokens. So no request blocks another, and a long prompt delays the others' next token by one bounded step at a time.
//! Touches no tensor.
//!
//! A request is admitted when its choices fit the bound on sequences and its prompt fits the blocks that are free or kept for
//! nobody in particular ([`Blocks`]), with what those that run still need for their prompts and one block more for each. When blocks run out later, first what is kept
//! goes, then who ranks last gives way: its blocks are freed, it waits, and computes them again (recompute, as in vLLM;
//! Kwon et al. 2023, section 4.5). What it has said stays said, and as numbers do not depend on the batch, what follows is the
//! same. Who ranks first never gives way, so there is always progress. What is due earlier ranks first (earliest deadline first; Liu
//! and Layland 1973); whoever comes is due some time after that, so nobody waits for ever.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use super::{
    kv_cache::Blocks,
    model::Kv,
    ops::attention::POSITIONS,
    prefix_cache::Known,
    sequence::{Request, Sequence, Tally},
};

/// Sequences with which guessing pays.
const FEW: usize = 2;

/// Bounds of the scheduler. All above zero.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of one step.
    pub step_tokens: usize,
    /// Choices that run at once.
    pub sequences: usize,
    /// Tokens that are guessed ahead of a sequence; may be zero.
    pub guesses: usize,
    /// Whether sequences share blocks: with those that they fork from, and with those that came before them.
    pub shares: bool,
}

/// A part of the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the running sequence.
    pub sequence: usize,
    /// Of its pending tokens and then of its guesses, how many.
    pub count: usize,
    /// How many of them are guesses.
    pub guesses: usize,
    /// Whether all its pending tokens are computed, so that a token can be sampled.
    pub samples: bool,
}

/// Who goes first: the lowest. Choices of one request follow each other.
type Rank = (i64, u64, u32);

struct Ticket {
    /// Choices not finished yet, those not forked yet included.
    open: usize,
    tally: Tally,
}

enum Waiting {
    New(Arc<Request>),
    /// Had to give way.
    Again(Box<Sequence>),
}

/// The queue and the running sequences.
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    waiting: BTreeMap<Rank, Waiting>,
    /// In no order.
    pub running: Vec<Sequence>,
    tickets: BTreeMap<u64, Ticket>,
    next_ticket: u64,
    counts: Counts,
    /// Requests that have left the queue since [`take_left`](Self::take_left), and the tokens of their prompts.
    left: (usize, usize),
}

/// Since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of prompts that were there already.
    pub reused: u64,
    /// Tokens of prompts that were computed, the first time.
    pub prefilled: u64,
    /// Tokens that were computed again.
    pub recomputed: u64,
    /// Times that a sequence had to give way.
    pub preempted: u64,
    /// Tokens that were guessed.
    pub guessed: u64,
}

fn rank(request: &Request, ticket: u64, choice: u32) -> Rank {
    (request.due, ticket, choice)
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: Blocks) -> Self {
        Self {
            limits,
            blocks,
            waiting: BTreeMap::new(),
            running: Vec::new(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            counts: Counts::default(),
            left: (0, 0),
        }
    }

    /// Queues a request.
    pub fn push(&mut self, request: Arc<Request>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.insert(rank(&request, ticket, 0), Waiting::New(request));
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What is kept, for others to ask.
    pub fn known(&self) -> Known {
        self.blocks.prefixes.known()
    }

    /// Tokens that are to be computed of sequences that run or had to give way, beyond the last one of each.
    pub fn pending(&self) -> usize {
        // With guesses, more than its tokens may be in the cache.
        let left = |sequence: &Sequence| sequence.tokens().len().saturating_sub(sequence.kv.len() + 1);
        let again = self.waiting.values().map(|waiting| match waiting {
            Waiting::New(_) => 0,
            Waiting::Again(sequence) => left(sequence),
        });
        self.running.iter().map(left).chain(again).sum()
    }

    /// How many requests have left the queue, admitted or abandoned, since this was last asked, and how many tokens their prompts
    /// have.
    pub fn take_left(&mut self) -> (usize, usize) {
        std::mem::take(&mut self.left)
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Tokens whose keys and values are kept.
    pub fn kept(&self) -> u64 {
        (self.blocks.prefixes.len() * POSITIONS) as u64
    }

    /// Drops what nobody listens to any more; gives the number of running sequences dropped.
    pub fn drop_abandoned(&mut self) -> usize {
        let mut gone = Vec::new();
        self.waiting.retain(|_, waiting| match waiting {
            Waiting::New(request) => {
                if request.events.is_closed() {
                    self.left = (self.left.0 + 1, self.left.1 + request.prompt.len());
                }
                !request.events.is_closed()
            }
            Waiting::Again(sequence) => {
                gone.extend(sequence.abandoned().then_some(sequence.ticket));
                !sequence.abandoned()
            }
        });
        let before = self.running.len();
        for index in (0..before).rev().filter(|index| self.running[*index].abandoned()).collect::<Vec<_>>() {
            gone.push(self.running[index].ticket);
            self.keep(index);
            self.running.remove(index);
        }
        for ticket in gone {
            self.tickets.remove(&ticket);
        }
        before - self.running.len()
    }

    /// Admits what fits, in order of rank.
    pub fn admit(&mut self) {
        while let Some((rank, waiting)) = self.waiting.pop_first() {
            let (tokens, choices) = match &waiting {
                Waiting::New(request) => (&request.prompt[..], request.choices as usize),
                Waiting::Again(sequence) => (sequence.tokens(), self.choices(sequence)),
            };
            // The last token is computed in any case: its logits are what is sampled from.
            let found = match self.limits.shares {
                true => self.blocks.prefixes.find(tokens, (tokens.len() - 1) / POSITIONS),
                false => Vec::new(),
            };
            let whole = (tokens.len() + 1).div_ceil(POSITIONS);
            let wanted = if self.limits.shares { whole - found.len() + choices - 1 } else { whole * choices };
            let running: usize = self.running.iter().map(|sequence| self.choices(sequence)).sum();
            // Alone it runs in any case: the engine has checked that a sequence fits the context.
            let owed: usize =
                self.running.iter().map(|sequence| sequence.kv.wanted(sequence.pending().len()) + 1).sum();
            // Nothing is let go in vain.
            let held: HashSet<_> =
                self.running.iter().flat_map(|sequence| sequence.kv.blocks()).chain(&found).map(Arc::as_ptr).collect();
            let fits = running + choices <= self.limits.sequences
                && held.len() + wanted + owed <= self.blocks.pool.capacity()
                && self.blocks.make_room(wanted + owed);
            if !fits && !self.running.is_empty() {
                self.waiting.insert(rank, waiting);
                return;
            }
            let kv = Kv::of(&self.blocks.pool, found);
            let sequence = match waiting {
                Waiting::New(request) => {
                    self.left = (self.left.0 + 1, self.left.1 + request.prompt.len());
                    self.counts.reused += kv.len() as u64;
                    let tally = Tally { reused: kv.len() as u32, ..Tally::default() };
                    self.tickets.insert(rank.1, Ticket { open: choices, tally });
                    Sequence::new(request, rank.1, 0, kv)
                }
                Waiting::Again(mut sequence) => {
                    // Others may have computed what this one had not come to.
                    let more = kv.len().saturating_sub(sequence.once);
                    self.counts.reused += more as u64;
                    let of_prompt = kv.len().min(sequence.request.prompt.len()).saturating_sub(sequence.once);
                    if let Some(ticket) = self.tickets.get_mut(&sequence.ticket) {
                        ticket.tally.reused += of_prompt as u32;
                    }
                    sequence.once += more;
                    sequence.kv = kv;
                    *sequence
                }
            };
            self.running.push(sequence);
        }
    }

    /// Choices that a sequence stands for: those that fork from it later, too.
    fn choices(&self, sequence: &Sequence) -> usize {
        if sequence.generated() == 0 { sequence.request.choices as usize } else { 1 }
    }

    /// Keeps what a running sequence has computed, for those that begin alike.
    pub fn keep(&mut self, index: usize) {
        if !self.limits.shares {
            return;
        }
        let sequence = &self.running[index];
        self.blocks.prefixes.keep(sequence.computed(), sequence.kv.blocks());
    }

    /// The parts of the next step, for which there are blocks: at least one when anything runs.
    pub fn plan(&mut self) -> Vec<Part> {
        // With more sequences than these the arithmetic, not reading the weights, takes the time.
        let guesses = if self.running.len() <= FEW { self.limits.guesses } else { 0 };
        self.running.iter_mut().for_each(|sequence| sequence.guess(guesses));
        loop {
            let parts = self.parts();
            let wanted = parts.iter().map(|part| self.running[part.sequence].kv.wanted(part.count)).sum();
            // What is kept goes for a single sequence, too; it has nobody else to give way.
            if self.blocks.make_room(wanted) || self.running.len() < 2 {
                return parts;
            }
            self.preempt();
        }
    }

    fn parts(&mut self) -> Vec<Part> {
        let mut order: Vec<usize> = (0..self.running.len()).collect();
        order.sort_unstable_by_key(|index| (self.running[*index].prefilling(), self.rank(*index)));
        let mut left = self.limits.step_tokens;
        let mut parts = Vec::new();
        for index in order {
            let pending = self.running[index].pending().len();
            let count = pending.min(left);
            if count == 0 {
                break;
            }
            left -= count;
            let mut guesses = self.running[index].guesses().len();
            if guesses > left || count < pending {
                self.running[index].forget_guesses();
                guesses = 0;
            }
            left -= guesses;
            parts.push(Part { sequence: index, count: count + guesses, guesses, samples: count == pending });
        }
        parts
    }

    fn rank(&self, index: usize) -> Rank {
        let sequence = &self.running[index];
        rank(&sequence.request, sequence.ticket, sequence.choice)
    }

    /// Who ranks last gives way.
    fn preempt(&mut self) {
        let Some(index) = (0..self.running.len()).max_by_key(|index| self.rank(*index)) else { return };
        self.keep(index);
        self.counts.preempted += 1;
        let rank = self.rank(index);
        let mut sequence = self.running.remove(index);
        sequence.kv.clear();
        self.waiting.insert(rank, Waiting::Again(Box::new(sequence)));
    }

    /// Counts what a part has computed, after the step.
    pub fn count(&mut self, part: &Part) {
        let sequence = &mut self.running[part.sequence];
        let (end, prompt) = (sequence.kv.len() - part.guesses, sequence.request.prompt.len());
        let begin = end + part.guesses - part.count;
        self.counts.guessed += part.guesses as u64;
        let again = sequence.once.min(end).saturating_sub(begin);
        self.counts.recomputed += again as u64;
        self.counts.prefilled += end.min(prompt).saturating_sub(begin + again) as u64;
        sequence.once = sequence.once.max(end);
    }

    /// Adds the other choices of a sequence whose prompt has just been computed; gives their indices.
    pub fn fork(&mut self, index: usize) -> std::ops::Range<usize> {
        let begin = self.running.len();
        for choice in 1..self.running[index].request.choices {
            let from = &self.running[index];
            let fork = match self.limits.shares {
                true => from.fork(choice),
                // Computes the prompt again.
                false => Sequence::new(Arc::clone(&from.request), from.ticket, choice, Kv::new(&self.blocks.pool)),
            };
            self.running.push(fork);
        }
        begin..self.running.len()
    }

    /// Counts a finished choice; gives its request's tally when it was the last.
    pub fn finished(&mut self, index: usize) -> Option<Tally> {
        self.keep(index);
        let sequence = &mut self.running[index];
        // Its cache is free at once, its place in `running` after the step.
        sequence.kv.clear();
        let ticket = sequence.ticket;
        let generated = sequence.generated();
        let entry = self.tickets.get_mut(&ticket)?;
        entry.open -= 1;
        entry.tally.finished += 1;
        entry.tally.completion_tokens += generated as u32;
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
