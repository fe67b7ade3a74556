//! The keys and values of one sequence: blocks of 32 positions, taken as the sequence grows, shared between forks until
//! one of them writes.

use std::sync::Arc;

use super::Config;
use crate::engine::ops::attention::{Block, POSITIONS, store};

/// A sequence's keys and values. Cloning shares all blocks; writing copies the block that is written.
#[derive(Clone, Default)]
pub struct Kv {
    blocks: Vec<Block>,
    length: usize,
}

impl Kv {
    /// Of full blocks that were computed before.
    pub fn of(blocks: Vec<Block>) -> Self {
        Self { length: blocks.len() * POSITIONS, blocks }
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

    /// Makes room for `count` more positions.
    pub fn reserve(&mut self, config: &Config, count: usize) {
        let wanted = (self.length + count).div_ceil(POSITIONS);
        let elements = config.heads.layer_elements() * config.layers;
        self.blocks.resize_with(wanted.max(self.blocks.len()), || Arc::new(vec![0.0; elements]));
    }

    /// Writes keys and values (`[positions][kv elements]` each) of one layer behind what is filled; room must be reserved.
    pub fn write(&mut self, config: &Config, layer: usize, keys: &[f32], values: &[f32]) {
        let width = config.heads.keys * config.heads.size;
        let per_layer = config.heads.layer_elements();
        for (i, (keys, values)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let position = self.length + i;
            let block = Arc::make_mut(&mut self.blocks[position / POSITIONS]);
            store(config.heads, &mut block[layer * per_layer..][..per_layer], position, keys, values);
        }
    }

    /// Counts `count` positions as filled, once all layers have written them.
    pub fn advance(&mut self, count: usize) {
        self.length += count;
    }
}
