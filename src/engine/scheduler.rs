//! Which tokens the next step computes: decoding sequences first, one token each, then pieces of prompts, up to a bound on
//! tokens. So no request blocks another, and a long prompt delays the others' next token by one bounded step at a time.
//! Touches no tensor.
//!
//! A request whose documents are not here computes them first, each alone; one that another sequence computes already is waited
//! for.
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
    chunk_cache::Layout,
    kv_cache::Blocks,
    model::Kv,
    ops::attention::POSITIONS,
    prefix_cache::Known,
    sequence::{Gather, Request, Sequence, Tally},
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
    /// Of a document that it computes (index into [`Gather::builds`]) the next tokens, and not of its own.
    pub build: Option<usize>,
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
    /// Tokens of prompts that were there already, those of documents included.
    pub reused: u64,
    /// Those of documents.
    pub attached: u64,
    /// Of those, the ones that were read from disk.
    pub loaded: u64,
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
        let left = |sequence: &Sequence| {
            let own = sequence.own().len().saturating_sub(sequence.kv.filled() + 1);
            let Some(gather) = &sequence.gather else { return own };
            let chunks = gather.there.iter().zip(&sequence.request.prompt.chunks).filter(|(there, _)| there.is_none());
            let built: usize = gather.under_way().map(|(_, kv)| kv.len()).sum();
            own - gather.found.len() * POSITIONS + chunks.map(|(_, chunk)| chunk.length()).sum::<usize>() - built
        };
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
        (self.blocks.prefixes.count() * POSITIONS) as u64
    }

    /// Drops what nobody listens to any more; gives the number of running sequences dropped.
    pub fn drop_abandoned(&mut self) -> usize {
        let mut gone = Vec::new();
        self.waiting.retain(|_, waiting| match waiting {
            Waiting::New(request) => {
                if request.events.is_closed() {
                    self.left = (self.left.0 + 1, self.left.1 + request.prompt.tokens.len());
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
        let mut later = Vec::new();
        self.admit_but(&mut later);
        self.waiting.extend(later);
    }

    /// [`Scheduler::admit`]; `later` is who has a reason of its own to wait, and keeps nobody else from being admitted.
    fn admit_but(&mut self, later: &mut Vec<(Rank, Waiting)>) {
        while let Some((rank, waiting)) = self.waiting.pop_first() {
            let (request, own, choices) = match &waiting {
                Waiting::New(request) => (request, &request.prompt.own[..], request.choices as usize),
                Waiting::Again(sequence) => (&sequence.request, sequence.own(), self.choices(sequence)),
            };
            let prompt = &request.prompt;
            // The last token is computed in any case: its logits are what is sampled from.
            let found = match self.limits.shares {
                true => self.blocks.prefixes.find(own, &prompt.seams, (own.len() - 1) / POSITIONS),
                false => Vec::new(),
            };
            if matches!(waiting, Waiting::New(_)) && self.is_under_way(prompt, found.len()) {
                later.push((rank, waiting));
                continue;
            }
            let mut there: Vec<_> = prompt.chunks.iter().map(|c| self.blocks.chunks.find(c, &prompt.tokens)).collect();
            let missing = prompt.chunks.iter().zip(&there).filter(|(_, there)| there.is_none());
            let missing: usize = missing.map(|(chunk, _)| chunk.taken()).sum();
            let whole = (own.len() + 1).div_ceil(POSITIONS);
            let wanted = if self.limits.shares { whole - found.len() + choices - 1 + missing } else { whole * choices };
            let running: usize = self.running.iter().map(|sequence| self.choices(sequence)).sum();
            // Alone it runs in any case: the engine has checked that a sequence fits the context.
            let owed: usize = self.running.iter().map(Sequence::owed).sum();
            // Nothing is let go in vain.
            let held: HashSet<_> = self
                .running
                .iter()
                .flat_map(Sequence::held)
                .chain(&found)
                .chain(there.iter().flatten().flatten())
                .map(Arc::as_ptr)
                .collect();
            let fits = running + choices <= self.limits.sequences
                && held.len() + wanted + owed <= self.blocks.pool.capacity()
                && self.blocks.make_room(wanted + owed);
            if !fits && !self.running.is_empty() {
                self.waiting.insert(rank, waiting);
                return;
            }
            for (chunk, there) in prompt.chunks.iter().zip(&mut there).filter(|(_, there)| there.is_none()) {
                *there = self.blocks.load(chunk, &prompt.tokens);
                self.counts.loaded += there.as_ref().map_or(0, |_| chunk.attached.len() as u64);
            }
            let reused = found.len() * POSITIONS;
            let mut sequence = match waiting {
                Waiting::New(request) => {
                    self.left = (self.left.0 + 1, self.left.1 + request.prompt.tokens.len());
                    self.counts.reused += reused as u64;
                    let mut tally = Tally { reused: reused as u32, ..Tally::default() };
                    for (chunk, _) in request.prompt.chunks.iter().zip(&there).filter(|(_, there)| there.is_some()) {
                        tally.attached += chunk.attached.len() as u32;
                        tally.recomputed += (chunk.tokens.len() - chunk.attached.len()) as u32;
                    }
                    self.counts.reused += u64::from(tally.attached);
                    self.counts.attached += u64::from(tally.attached);
                    self.tickets.insert(rank.1, Ticket { open: choices, tally });
                    let mut sequence = Sequence::new(request, rank.1, 0, Kv::new(&self.blocks.pool));
                    sequence.once = reused;
                    sequence
                }
                Waiting::Again(mut sequence) => {
                    // Others may have computed what this one had not come to.
                    let more = reused.saturating_sub(sequence.once);
                    self.counts.reused += more as u64;
                    let of_prompt = reused.min(sequence.request.prompt.own.len()).saturating_sub(sequence.once);
                    if let Some(ticket) = self.tickets.get_mut(&sequence.ticket) {
                        ticket.tally.reused += of_prompt as u32;
                    }
                    sequence.once += more;
                    *sequence
                }
            };
            sequence.gather = Some(Gather { found, there, builds: Vec::new() });
            self.gather(&mut sequence);
            self.running.push(sequence);
        }
    }

    /// Whether a running sequence computes what a prompt begins with, beyond the `here` blocks of it that are here: as with
    /// the probes of a vote, which come together and say the same. To wait for it is worth it where that is at least half of
    /// what it computes.
    fn is_under_way(&self, prompt: &Layout, here: usize) -> bool {
        let of_use = |sequence: &Sequence| {
            let theirs = &sequence.request.prompt;
            let common = theirs.own.iter().zip(&prompt.own).take_while(|(a, b)| a == b).count();
            let blocks = common.min(prompt.own.len() - 1) / POSITIONS;
            blocks > here && 2 * common >= theirs.own.len() && theirs.seams == prompt.seams
        };
        self.limits.shares && self.running.iter().any(|sequence| sequence.generated() == 0 && of_use(sequence))
    }

    /// Takes the documents that are here by now, and begins once all are.
    fn gather(&self, sequence: &mut Sequence) {
        let Some(gather) = &mut sequence.gather else { return };
        let prompt = &sequence.request.prompt;
        for (index, (chunk, there)) in prompt.chunks.iter().zip(&mut gather.there).enumerate() {
            if there.is_none() {
                *there = self.blocks.chunks.find(chunk, &prompt.tokens);
            }
            if there.is_some() {
                gather.builds.retain(|(build, _)| *build != index);
            }
        }
        if !gather.is_missing() {
            if let Some(until) = sequence.request.keep_until {
                prompt.chunks.iter().for_each(|chunk| self.blocks.chunks.pin(chunk, until));
            }
            sequence.begin(&self.blocks.pool);
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
        let blocks: Vec<_> = sequence.kv.blocks().cloned().collect();
        self.blocks.prefixes.keep(sequence.computed(), &sequence.request.prompt.seams, &blocks);
    }

    /// The parts of the next step, for which there are blocks: at least one when anything runs.
    pub fn plan(&mut self) -> Vec<Part> {
        // With more sequences than these the arithmetic, not reading the weights, takes the time.
        let guesses = if self.running.len() <= FEW { self.limits.guesses } else { 0 };
        self.running.iter_mut().for_each(|sequence| sequence.guess(guesses));
        let mut running = std::mem::take(&mut self.running);
        running.iter_mut().for_each(|sequence| self.gather(sequence));
        self.running = running;
        loop {
            let parts = self.parts();
            let wanted = parts.iter().map(|part| self.cache(part).map_or(0, |kv| kv.wanted(part.count))).sum();
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
            if self.running[index].gather.is_some() {
                self.build(index, &mut left, &mut parts);
                continue;
            }
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
            parts.push(Part {
                sequence: index,
                build: None,
                count: count + guesses,
                guesses,
                samples: count == pending,
            });
        }
        parts
    }

    /// Parts of the documents that a sequence misses and nobody computes already.
    fn build(&mut self, index: usize, left: &mut usize, parts: &mut Vec<Part>) {
        let request = Arc::clone(&self.running[index].request);
        let chunks = &request.prompt.chunks;
        let mut others: HashSet<_> = HashSet::new();
        for sequence in self.running.iter().enumerate().filter(|(i, _)| *i != index).map(|(_, sequence)| sequence) {
            let builds = sequence.gather.iter().flat_map(|gather| &gather.builds);
            others.extend(builds.map(|(chunk, _)| sequence.request.prompt.chunks[*chunk].key));
        }
        let Some(gather) = &mut self.running[index].gather else { return };
        for (number, chunk) in chunks.iter().enumerate().filter(|(number, _)| gather.there[*number].is_none()) {
            if *left == 0 {
                return;
            }
            let build = match gather.builds.iter().position(|(of, _)| *of == number) {
                Some(build) => build,
                // The same document may stand in a prompt more than once.
                None if !others.insert(chunk.key)
                    || gather.builds.iter().any(|(of, _)| chunks[*of].key == chunk.key) =>
                {
                    continue;
                }
                None => {
                    // Where its anchor is not here, that is computed first.
                    let anchor = self.blocks.chunks.find_anchor(&chunk.anchor);
                    let begin = |anchor| chunk.begin(&self.blocks.pool, anchor);
                    let kv = anchor.map_or_else(|| Kv::new(&self.blocks.pool), begin);
                    gather.builds.push((number, kv));
                    gather.builds.len() - 1
                }
            };
            let done = gather.builds[build].1.len();
            let until = if done < chunk.anchor.len() { chunk.anchor.len() } else { chunk.length() };
            let count = (until - done).min(*left);
            *left -= count;
            parts.push(Part { sequence: index, build: Some(build), count, guesses: 0, samples: false });
        }
    }

    /// The cache that a part is written to.
    fn cache(&self, part: &Part) -> Option<&Kv> {
        let sequence = &self.running[part.sequence];
        match part.build {
            None => Some(&sequence.kv),
            Some(build) => sequence.gather.as_ref()?.builds.get(build).map(|(_, kv)| kv),
        }
    }

    /// The tokens of a part, without its guesses.
    pub fn tokens(&self, part: &Part) -> Vec<u32> {
        let sequence = &self.running[part.sequence];
        let build = part.build.zip(sequence.gather.as_ref()).map(|(build, gather)| &gather.builds[build]);
        match build {
            None => sequence.pending()[..part.count - part.guesses].to_vec(),
            Some((number, kv)) => {
                let prompt = &sequence.request.prompt;
                prompt.chunks[*number].content(&prompt.tokens).skip(kv.len()).take(part.count).collect()
            }
        }
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
        sequence.release();
        self.waiting.insert(rank, Waiting::Again(Box::new(sequence)));
    }

    /// Counts what a part has computed, after the step, and keeps a document that is whole now.
    pub fn count(&mut self, part: &Part) {
        let sequence = &mut self.running[part.sequence];
        if let Some((build, gather)) = part.build.zip(sequence.gather.as_mut()) {
            self.counts.prefilled += part.count as u64;
            let (number, kv) = &mut gather.builds[build];
            let prompt = &sequence.request.prompt;
            let chunk = &prompt.chunks[*number];
            if kv.len() == chunk.anchor.len() {
                let blocks: Vec<_> = kv.blocks().cloned().collect();
                self.blocks.chunks.keep_anchor(&chunk.anchor, &blocks);
                *kv = chunk.begin(&self.blocks.pool, blocks);
            } else if kv.len() == chunk.length() {
                let blocks: Vec<_> = kv.blocks().cloned().collect();
                gather.there[*number] = Some(self.blocks.chunks.keep(chunk, &prompt.tokens, &blocks));
            }
            return;
        }
        let (end, prompt) = (sequence.kv.filled() - part.guesses, sequence.request.prompt.own.len());
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
        sequence.release();
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

    /// The caches that parts are written to, each with the sequence and the document that it is of, in ascending order.
    pub fn caches(&mut self, parts: &[Part]) -> Vec<((usize, Option<usize>), &mut Kv)> {
        let mut out = Vec::with_capacity(parts.len());
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let has = |build| parts.iter().any(|part| (part.sequence, part.build) == (index, build));
            if has(None) {
                out.push(((index, None), &mut sequence.kv));
            }
            let builds = sequence.gather.iter_mut().flat_map(|gather| &mut gather.builds).enumerate();
            out.extend(builds.filter(|(n, _)| has(Some(*n))).map(|(n, (_, kv))| ((index, Some(n)), kv)));
        }
        out
    }
}

#[cfg(test)]
mod tests;
