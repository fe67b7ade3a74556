//! What the models of a device have in common for keys and values: one [`Reservation`] of memory, and one store of the blocks
//! that are kept to be reused.
//!
//! Models of the same weights and settings have one identity and share blocks, too. When the reservation is spent, kept blocks
//! go, of whichever model; what runs gives way only within its own model, and each can always run one sequence.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{
    chunk_cache::{Chunk, ChunkCache},
    disk_tier::{DiskTier, DiskWriter},
    kept::{Identity, Kept},
    model::Config,
    ops::{
        block_pool::{Block, BlockPool, Ready},
        number::Element,
        superblocks::Reservation,
    },
    prefix_cache::PrefixCache,
};

/// What there is where nothing else is said.
pub const DEFAULT_BYTES: usize = 2 << 30;

/// The memory of a device for keys and values. Clones are the same memory.
#[derive(Clone)]
pub struct KvCache {
    reservation: Reservation,
    kept: Kept,
    /// Files of documents, by the identity of the model: models of one identity have one.
    disks: Arc<Mutex<BTreeMap<u128, Weak<DiskWriter>>>>,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (owned, most) = self.bytes();
        f.debug_struct("KvCache").field("owned", &owned).field("most", &most).finish_non_exhaustive()
    }
}

impl Default for KvCache {
    fn default() -> Self {
        Self::new(DEFAULT_BYTES)
    }
}

impl KvCache {
    /// Of so many bytes, or what the models' longest sequences need, if that is more.
    pub fn new(bytes: usize) -> Self {
        Self { reservation: Reservation::new(bytes), kept: Kept::default(), disks: Arc::default() }
    }

    #[cfg(test)]
    pub fn of(reservation: Reservation) -> Self {
        Self { reservation, kept: Kept::default(), disks: Arc::default() }
    }

    /// Bytes that models have taken, and that they may take together.
    pub fn bytes(&self) -> (usize, usize) {
        self.reservation.bytes()
    }

    /// Blocks that only count what is kept elsewhere, no more than `most`, for a model that shares none.
    pub(super) fn counting(most: usize) -> Blocks {
        let alone = Self::default();
        let pool = BlockPool::within(&alone.reservation, 1, Element::F32, 0, most);
        Blocks::new(pool, &alone.kept, Identity { hash: 0, cost: 0, cost_of_depth: 0 })
    }

    /// A model's part, of which it is promised `promised` blocks and gets no more than `most`.
    pub(super) fn enter(&self, config: &Config, identity: Identity, promised: usize, most: usize) -> Blocks {
        let pool = BlockPool::within(&self.reservation, config.block_elements(), config.kv, promised, most);
        Blocks::new(pool, &self.kept, identity)
    }

    /// The file of a model's documents in a folder, of at most so many bytes.
    ///
    /// # Errors
    /// When the file cannot be opened, made or read.
    pub(super) fn disk(
        &self,
        config: &Config,
        identity: Identity,
        dir: &Path,
        bytes: u64,
    ) -> std::io::Result<Arc<DiskWriter>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = disks.get(&identity.hash).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let path = dir.join(format!("{:032x}.slab", identity.hash));
        let layer = config.heads.layer_elements() * config.kv.bytes();
        let disk = Arc::new(DiskWriter::new(DiskTier::open(&path, layer, config.layers, bytes)?)?);
        disks.insert(identity.hash, Arc::downgrade(&disk));
        Ok(disk)
    }
}

/// The blocks of a model: of its running sequences, and those that are kept.
pub struct Blocks {
    pub pool: BlockPool,
    pub prefixes: PrefixCache,
    pub chunks: ChunkCache,
}

impl Blocks {
    pub fn new(pool: BlockPool, kept: &Kept, identity: Identity) -> Self {
        Self { pool, prefixes: PrefixCache::new(kept, identity), chunks: ChunkCache::new(kept, identity) }
    }

    /// Reads a document that is on disk; `None` where it is not, or there is no room.
    pub fn load(&self, chunk: &Chunk, prompt: &[u32]) -> Option<Vec<Block>> {
        if !self.chunks.is_on_disk(chunk) || !self.make_room(chunk.kept()) {
            return None;
        }
        self.chunks.load(chunk, prompt, (0..chunk.kept()).map(|_| self.pool.take()).collect())
    }

    /// Lets go of what is kept until so many blocks can be taken; false where that is not enough.
    pub fn make_room(&self, blocks: usize) -> bool {
        loop {
            let of_all = match self.pool.ready(blocks) {
                Ready::Yes => return true,
                Ready::OwnSpent => false,
                Ready::Spent => true,
            };
            if !self.prefixes.evict(of_all) {
                return false;
            }
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.pool.retire();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::engine::ops::{attention::POSITIONS, number::Line};

    /// Blocks of a number of lines; costs are by byte.
    fn model(memory: &KvCache, hash: u128, lines: usize, cost: u64, promised: usize) -> Blocks {
        let pool = BlockPool::within(&memory.reservation, lines * 16, Element::F32, promised, usize::MAX);
        let identity = Identity { hash, cost, cost_of_depth: 0 };
        Blocks::new(pool, &memory.kept, identity)
    }

    /// Computes a prompt of this one token, and keeps it.
    fn keep(model: &Blocks, token: u32, blocks: usize) {
        assert!(model.make_room(blocks));
        let fresh: Vec<Block> = (0..blocks).map(|_| Arc::new(model.pool.take())).collect();
        model.prefixes.keep(&vec![token; blocks * POSITIONS], &[], &fresh);
    }

    fn kept(model: &Blocks, token: u32) -> usize {
        model.prefixes.known().count(&vec![token; 64 * POSITIONS], &[], 64)
    }

    #[test]
    fn models_share_what_there_is_and_the_cheapest_by_the_byte_goes_first() {
        let memory = KvCache::of(Reservation::of(8, 4 * Line::BYTES));
        let (cheap, dear) = (model(&memory, 1, 1, 2, 0), model(&memory, 2, 2, 10, 0));
        keep(&dear, 1, 4);
        keep(&cheap, 1, 8);
        keep(&cheap, 2, 8);
        assert_eq!((kept(&dear, 1), kept(&cheap, 1), kept(&cheap, 2)), (4, 8, 8));
        // Eight more of the cheap model's need two superblocks: two are free; then its own go, not the older ones that cost more.
        keep(&cheap, 3, 8);
        keep(&cheap, 4, 4);
        assert_eq!((kept(&dear, 1), kept(&cheap, 1), kept(&cheap, 4)), (4, 4, 4));
        // The dear one takes what the other has kept, and what one holds in use stays.
        let held = cheap.prefixes.find(&[4; 4 * POSITIONS], &[], 4);
        keep(&dear, 2, 8);
        assert_eq!((kept(&dear, 1), kept(&dear, 2)), (4, 8));
        assert_eq!((kept(&cheap, 1), kept(&cheap, 4)), (0, 4));
        assert!(!dear.make_room(17), "there are no more than sixteen, and two are in use by the other");
        drop(held);
        let (owned, most) = memory.bytes();
        assert!(owned <= most && most == 8 * 4 * Line::BYTES);
    }

    #[test]
    fn what_is_pinned_goes_last_and_the_pin_that_ends_soonest_first() {
        let memory = KvCache::of(Reservation::of(4, 4 * Line::BYTES));
        let model = model(&memory, 1, 1, 2, 0);
        (1..=4).for_each(|token| keep(&model, token, 4));
        let pin = |token: u32, seconds: u64| {
            let until = Instant::now() + Duration::from_secs(seconds);
            let chain = model.prefixes.keys(&[token; 4 * POSITIONS]);
            chain.into_iter().for_each(|key| memory.kept.pin(key, until));
        };
        pin(1, 900);
        pin(2, 100);
        keep(&model, 5, 8);
        assert_eq!([1, 2, 3, 4].map(|token| kept(&model, token)), [4, 4, 0, 0], "the oldest are pinned");
        keep(&model, 6, 12);
        assert_eq!([1, 2, 5].map(|token| kept(&model, token)), [4, 0, 0], "what runs needs the room");
        assert_eq!(memory.kept.clear(&Identity { hash: 1, cost: 2, cost_of_depth: 0 }, None), 16, "pinned or not");
        assert_eq!((kept(&model, 1), model.prefixes.count()), (0, 0));
    }

    #[test]
    fn what_is_not_used_ages_whatever_it_costs() {
        let memory = KvCache::of(Reservation::of(4, 4 * Line::BYTES));
        let (cheap, dear) = (model(&memory, 1, 1, 2, 0), model(&memory, 2, 1, 10, 0));
        keep(&dear, 1, 4);
        (0..40).for_each(|token| keep(&cheap, token, 4));
        assert_eq!(kept(&dear, 1), 0, "the level has risen above it");
    }

    #[test]
    fn models_of_one_identity_find_each_others_blocks_and_others_do_not() {
        let memory = KvCache::of(Reservation::of(4, 4 * Line::BYTES));
        let (a, b, other) = (model(&memory, 1, 1, 2, 1), model(&memory, 1, 1, 2, 1), model(&memory, 2, 1, 2, 1));
        keep(&a, 7, 2);
        assert_eq!((kept(&a, 7), kept(&b, 7), kept(&other, 7)), (2, 2, 0));
        drop(a);
        let found = b.prefixes.find(&[7; 2 * POSITIONS], &[], 2);
        assert_eq!(found.len(), 2, "b is there still");
        drop(b);
        assert_eq!(memory.bytes().0, 4 * Line::BYTES, "a's memory lives as long as it is held");
        drop(found);
        assert_eq!(memory.bytes().0, 0);
        let again = model(&memory, 1, 1, 2, 1);
        assert_eq!(kept(&again, 7), 0, "who goes takes along what is kept");
        drop((again, other));
    }
}
