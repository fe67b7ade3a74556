//! The keys and values of one sequence: blocks of 32 positions, taken from a pool as the sequence grows, shared between
//! forks until one of them writes.

use std::sync::Arc;

use half::f16;

use super::Config;
use crate::engine::ops::{
    attention::{Cache, POSITIONS, store},
    block_pool::{Block, BlockPool},
    number::{Element, Number},
};

/// A sequence's keys and values. Cloning shares all blocks; writing copies the block that is written.
#[derive(Clone)]
pub struct Kv {
    pool: BlockPool,
    blocks: Vec<Block>,
    length: usize,
}

impl Kv {
    /// Of no positions yet.
    pub fn new(pool: &BlockPool) -> Self {
        Self::of(pool, Vec::new())
    }

    /// Of full blocks that were computed before.
    pub fn of(pool: &BlockPool, blocks: Vec<Block>) -> Self {
        Self { pool: pool.clone(), length: blocks.len() * POSITIONS, blocks }
    }

    /// Positions that are filled in all layers.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What one layer's attention reads.
    pub fn layer(&self, layer: usize) -> Cache<'_> {
        Cache { blocks: &self.blocks, layer, element: self.pool.element() }
    }

    /// Lets all blocks go.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.length = 0;
    }

    /// Blocks that `count` more positions take from the pool: those behind the last, and a copy of the last one where
    /// others hold it too.
    pub fn wanted(&self, count: usize) -> usize {
        if count == 0 {
            return 0;
        }
        let behind = (self.length + count).div_ceil(POSITIONS).saturating_sub(self.blocks.len());
        let written = self.blocks.get(self.length / POSITIONS);
        behind + usize::from(written.is_some_and(|block| Arc::strong_count(block) > 1))
    }

    /// Makes room for `count` more positions, in blocks that are this sequence's own.
    pub fn reserve(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        if let Some(block) = self.blocks.get_mut(self.length / POSITIONS)
            && Arc::get_mut(block).is_none()
        {
            let mut copy = self.pool.take();
            copy.copy_from(block);
            *block = Arc::new(copy);
        }
        let wanted = (self.length + count).div_ceil(POSITIONS);
        let pool = &self.pool;
        self.blocks.resize_with(wanted.max(self.blocks.len()), || Arc::new(pool.take()));
    }

    /// Writes keys and values (`[positions][kv elements]` each) of one layer behind what is filled.
    ///
    /// # Panics
    /// Unless room is reserved.
    pub fn write(&mut self, config: &Config, layer: usize, keys: &[f32], values: &[f32]) {
        match self.pool.element() {
            Element::F32 => self.write_as::<f32>(config, layer, keys, values),
            Element::F16 => self.write_as::<f16>(config, layer, keys, values),
        }
    }

    fn write_as<T: Number>(&mut self, config: &Config, layer: usize, keys: &[f32], values: &[f32]) {
        let width = config.heads.keys * config.heads.size;
        let per_layer = config.heads.layer_elements();
        for (i, (keys, values)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let position = self.length + i;
            let Some(block) = Arc::get_mut(&mut self.blocks[position / POSITIONS]) else {
                unreachable!("room is reserved in blocks of its own")
            };
            let layer = &mut block.numbers_mut::<T>()[layer * per_layer..][..per_layer];
            store(config.heads, layer, position, keys, values);
        }
    }

    /// Forgets the positions behind the first `length`.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.length = length;
            self.blocks.truncate(length.div_ceil(POSITIONS));
        }
    }

    /// Counts `count` positions as filled, once all layers have written them.
    pub fn advance(&mut self, count: usize) {
        self.length += count;
    }
}
