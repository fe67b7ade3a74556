//! The keys and values of one sequence: blocks of 32 positions, taken from a pool as the sequence grows, shared between
//! forks until one of them writes; and between them, blocks of documents that were computed on their own.
//!
//! A sequence's own positions lie densely in its own blocks, in their order. Attached documents stand between them in the
//! sequence and take nothing of them: [`Span`]s say where what is.

use std::sync::Arc;

use half::f16;

use super::Config;
use crate::engine::ops::{
    attention::{Cache, POSITIONS, Span, load, store},
    block_pool::{Block, BlockPool},
    number::{Element, Number},
};

/// A part of a document that a sequence reads where it was computed.
#[derive(Clone)]
pub struct Attached {
    /// Position in the sequence of the part's first token.
    pub at: usize,
    pub len: usize,
    /// The place of that token in the document's blocks.
    pub place: usize,
    /// By how many positions the part stands farther in the sequence than where it was computed.
    pub offset: usize,
    /// The document's blocks from the `place / POSITIONS`-th on.
    pub blocks: Vec<Block>,
}

/// A sequence's keys and values. Cloning shares all blocks; writing copies the block that is written.
#[derive(Clone)]
pub struct Kv {
    pool: BlockPool,
    /// Its own and those of documents, in the order in which they came.
    blocks: Vec<Block>,
    /// Indices of its own, in order.
    own: Vec<usize>,
    /// Positions in its own blocks.
    filled: usize,
    spans: Vec<Span>,
    /// What is attached when the positions before it are filled, the last first.
    planned: Vec<Attached>,
}

impl Kv {
    /// Of no positions yet.
    pub fn new(pool: &BlockPool) -> Self {
        Self::of(pool, Vec::new(), Vec::new())
    }

    /// Of full blocks that were computed before, and with what is to be attached, in order.
    ///
    /// # Panics
    /// Where the blocks reach beyond the beginning of something that follows without a position of its own.
    pub fn of(pool: &BlockPool, found: Vec<Block>, mut planned: Vec<Attached>) -> Self {
        planned.reverse();
        let count = found.len() * POSITIONS;
        let own = (0..found.len()).collect();
        let mut kv = Self { pool: pool.clone(), blocks: found, own, filled: 0, spans: Vec::new(), planned };
        kv.attach();
        kv.place(count);
        kv
    }

    /// Positions that are there, attached ones included.
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, Span::end)
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Positions of its own.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Its own blocks.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &Block> {
        self.own.iter().map(|index| &self.blocks[*index])
    }

    /// All blocks that it holds, those of documents included.
    pub fn held(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().chain(self.planned.iter().flat_map(|part| &part.blocks))
    }

    /// What one layer's attention reads.
    pub fn layer(&self, layer: usize) -> Cache<'_> {
        Cache { blocks: &self.blocks, spans: &self.spans, layer, element: self.pool.element() }
    }

    /// By how many positions documents have been moved, once for each that is attached.
    pub fn offsets(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().map(|span| span.offset).filter(|offset| *offset != 0)
    }

    /// Lets all blocks go, and forgets what was to be attached.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.own.clear();
        self.spans.clear();
        self.planned.clear();
        self.filled = 0;
    }

    /// Blocks that `count` more positions of its own take from the pool: those behind the last, and a copy of the last one
    /// where others hold it too.
    pub fn wanted(&self, count: usize) -> usize {
        if count == 0 {
            return 0;
        }
        let behind = (self.filled + count).div_ceil(POSITIONS).saturating_sub(self.own.len());
        let written = self.own.get(self.filled / POSITIONS).map(|index| &self.blocks[*index]);
        behind + usize::from(written.is_some_and(|block| Arc::strong_count(block) > 1))
    }

    /// Makes room for `count` more positions of its own, in blocks that are this sequence's own, and attaches what comes between and
    /// right behind them. Gives the runs of neighbouring positions, as where they begin and how many they are.
    pub fn reserve(&mut self, count: usize) -> Vec<(usize, usize)> {
        if count == 0 {
            return Vec::new();
        }
        if let Some(index) = self.own.get(self.filled / POSITIONS)
            && let block = &mut self.blocks[*index]
            && Arc::get_mut(block).is_none()
        {
            let mut copy = self.pool.take();
            copy.copy_from(block);
            *block = Arc::new(copy);
        }
        let wanted = (self.filled + count).div_ceil(POSITIONS);
        while self.own.len() < wanted {
            self.own.push(self.blocks.len());
            self.blocks.push(Arc::new(self.pool.take()));
        }
        self.place(count)
    }

    /// Gives the next places in its own blocks to the next positions that are its own.
    fn place(&mut self, count: usize) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut left = count;
        while left > 0 {
            let start = self.len();
            let from = self.filled % POSITIONS;
            let until = self.planned.last().map_or(usize::MAX, |part| part.at - start);
            let len = left.min(POSITIONS - from).min(until);
            let block = self.own[self.filled / POSITIONS];
            match self.spans.last_mut() {
                Some(last) if last.block == block && last.offset == 0 && last.from + last.len == from => {
                    last.len += len
                }
                _ => self.spans.push(Span { block, from, len, start, offset: 0 }),
            }
            match runs.last_mut() {
                Some((begin, count)) if *begin + *count == start => *count += len,
                _ => runs.push((start, len)),
            }
            self.filled += len;
            left -= len;
            self.attach();
        }
        runs
    }

    /// Attaches what comes next.
    fn attach(&mut self) {
        while let Some(part) = self.planned.pop_if(|part| part.at == self.spans.last().map_or(0, Span::end)) {
            let (offset, end) = (part.offset, part.at + part.len);
            let (mut start, mut place) = (part.at, part.place);
            for block in part.blocks {
                let from = place % POSITIONS;
                let len = (POSITIONS - from).min(end - start);
                self.spans.push(Span { block: self.blocks.len(), from, len, start, offset });
                self.blocks.push(block);
                start += len;
                place += len;
            }
        }
    }

    /// Writes keys and values (`[positions][kv elements]` each) of one layer at the neighbouring positions from `position` on.
    ///
    /// # Panics
    /// Unless they are reserved and this sequence's own.
    pub fn write(&mut self, config: &Config, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        match self.pool.element() {
            Element::F32 => self.write_as::<f32>(config, layer, position, keys, values),
            Element::F16 => self.write_as::<f16>(config, layer, position, keys, values),
        }
    }

    fn write_as<T: Number>(&mut self, config: &Config, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let width = config.heads.keys * config.heads.size;
        let per_layer = config.heads.layer_elements();
        let mut at = self.spans.partition_point(|span| span.end() <= position);
        for (position, (keys, values)) in (position..).zip(keys.chunks_exact(width).zip(values.chunks_exact(width))) {
            if self.spans[at].end() <= position {
                at += 1;
            }
            let span = self.spans[at];
            let Some(block) = Arc::get_mut(&mut self.blocks[span.block]) else {
                unreachable!("room is reserved in blocks of its own")
            };
            let layer = &mut block.numbers_mut::<T>()[layer * per_layer..][..per_layer];
            store(config.heads, layer, span.from + position - span.start, keys, values);
        }
    }

    /// The keys and values (`[kv elements]` each) of a position in a layer.
    ///
    /// # Panics
    /// When it is not there.
    pub fn read(&self, config: &Config, layer: usize, position: usize) -> (Vec<f32>, Vec<f32>) {
        let span = self.spans[self.spans.partition_point(|span| span.end() <= position)];
        let within = span.from + position - span.start;
        match self.pool.element() {
            Element::F32 => load::<f32>(config.heads, self.blocks[span.block].numbers(), layer, within),
            Element::F16 => load::<f16>(config.heads, self.blocks[span.block].numbers(), layer, within),
        }
    }

    /// Forgets the positions behind the first `length`, all of which must be its own.
    pub fn truncate(&mut self, length: usize) {
        while let Some(last) = self.spans.last_mut()
            && last.end() > length
        {
            let gone = (last.end() - length).min(last.len);
            last.len -= gone;
            self.filled -= gone;
            if last.len == 0 {
                self.spans.pop();
            }
        }
        while self.own.len() > self.filled.div_ceil(POSITIONS) {
            // It came last.
            self.own.pop();
            self.blocks.pop();
        }
    }
}
