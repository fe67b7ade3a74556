//! Exact prefix reuse: blocks of keys and values that were computed before, found again by the tokens before and in them.
//!
//! One store for all models of a device; a model's [`PrefixCache`] is its view of it. A block's key is the hash of the key of
//! the block before it and of its own tokens, the first one's begins with the identity of the model's keys and values; a hit is
//! confirmed by the token ids, so a collision cannot give another prompt's block. Full blocks are never written again, and what
//! a sequence computes does not depend on how it was cut (see [`super::ops`]): a reused prefix gives the same bits.
//!
//! A block is only reached through those before it, so one goes that no other follows, by GreedyDual (Young 1994; with sizes,
//! Cao and Irani 1997): each use lifts a block to the present level plus what it costs to compute it again, per byte; the lowest
//! goes first, and the level rises to what went last. Of equal costs this is the least recently used; a block deep in a long
//! prompt, or of a large model, stays longer.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use super::ops::{attention::POSITIONS, block_pool::Block};

/// The chained hash of all tokens up to the end of a block.
type Key = u128;

/// Order of going: the level and cost at its last use, when that was, the farthest from the beginning first.
type Leaf = (u64, u64, Reverse<u32>, Key);

/// What keys and values of a model are, for all that share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of everything that they depend on.
    pub hash: u128,
    /// Operations to compute a block again by the bytes that it takes: of the first, and how many more for each block before it.
    pub cost: u64,
    pub cost_of_depth: u64,
}

struct Entry {
    /// Of the block before, or a model's identity.
    parent: Key,
    identity: Identity,
    tokens: [u32; POSITIONS],
    block: Block,
    /// Entries that follow it.
    children: u32,
    /// The level when it was used last, with its cost.
    rank: u64,
    /// Of the clock.
    used: u64,
    /// Blocks before it.
    depth: u32,
}

/// The blocks of all models of a device. Clones are the same store.
#[derive(Clone, Default)]
pub struct Kept(Arc<Shared>);

#[derive(Default)]
struct Shared {
    store: Mutex<Store>,
    keys: RwLock<HashSet<Key>>,
}

#[derive(Default)]
struct Store {
    entries: HashMap<Key, Entry>,
    /// Those without children.
    leaves: BTreeSet<Leaf>,
    clock: u64,
    level: u64,
    /// By identity: views, and entries.
    models: BTreeMap<u128, (usize, usize)>,
}

/// What a model's view of the store says to other threads. By hashes of 128 bits alone: what is said to be here is confirmed
/// when it is used.
#[derive(Clone)]
pub struct Known {
    kept: Kept,
    identity: u128,
}

impl Known {
    /// Blocks of the longest beginning of `tokens` that is here, at most `most`.
    pub fn count(&self, tokens: &[u32], most: usize) -> usize {
        let keys = self.kept.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        let mut parent = self.identity;
        let here = |tokens: &&[u32; POSITIONS]| {
            parent = key(parent, tokens);
            keys.contains(&parent)
        };
        chunks(tokens).iter().take(most).take_while(here).count()
    }
}

/// A model's blocks in the store, by the tokens that they hold. When the last view of an identity goes, so do its blocks.
pub struct PrefixCache {
    kept: Kept,
    identity: Identity,
}

fn key(parent: Key, tokens: &[u32; POSITIONS]) -> Key {
    let mut hash = blake3::Hasher::new();
    hash.update(&parent.to_le_bytes());
    tokens.iter().for_each(|token| _ = hash.update(&token.to_le_bytes()));
    let hash = hash.finalize();
    hash.as_bytes().first_chunk().map_or(0, |bytes: &[u8; 16]| u128::from_le_bytes(*bytes))
}

fn chunks(tokens: &[u32]) -> &[[u32; POSITIONS]] {
    tokens.as_chunks().0
}

impl Identity {
    fn cost(&self, depth: u32) -> u64 {
        self.cost.saturating_add(self.cost_of_depth.saturating_mul(depth.into()))
    }
}

impl Entry {
    fn leaf(&self, key: Key) -> Leaf {
        (self.rank, self.used, Reverse(self.depth), key)
    }

    fn is(&self, parent: Key, tokens: &[u32; POSITIONS]) -> bool {
        self.parent == parent && self.tokens == *tokens
    }
}

impl PrefixCache {
    /// A view of the blocks of this identity.
    pub fn new(kept: &Kept, identity: Identity) -> Self {
        kept.store().models.entry(identity.hash).or_default().0 += 1;
        Self { kept: kept.clone(), identity }
    }

    /// Blocks of this identity.
    pub fn len(&self) -> usize {
        self.kept.store().models.get(&self.identity.hash).map_or(0, |(_, entries)| *entries)
    }

    pub fn known(&self) -> Known {
        Known { kept: self.kept.clone(), identity: self.identity.hash }
    }

    /// The blocks of the longest beginning of `tokens` that is here, at most `most` of them.
    pub fn find(&self, tokens: &[u32], most: usize) -> Vec<Block> {
        let store = &mut *self.kept.store();
        store.clock += 1;
        let mut blocks = Vec::new();
        let mut parent = self.identity.hash;
        for tokens in chunks(tokens).iter().take(most) {
            let key = key(parent, tokens);
            let Some(entry) = store.entries.get(&key).filter(|e| e.is(parent, tokens)) else { break };
            blocks.push(entry.block.clone());
            store.touch(key);
            parent = key;
        }
        blocks
    }

    /// Keeps the full blocks of a sequence whose tokens up to `blocks`' end are these.
    pub fn keep(&self, tokens: &[u32], blocks: &[Block]) {
        let store = &mut *self.kept.store();
        store.clock += 1;
        let mut parent = self.identity.hash;
        for ((tokens, block), depth) in chunks(tokens).iter().zip(blocks).zip(0u32..) {
            let key = key(parent, tokens);
            match store.entries.get(&key) {
                Some(entry) if entry.is(parent, tokens) => store.touch(key),
                // Of two with one hash the first stays.
                Some(_) => return,
                None => {
                    store.child(parent, true);
                    let entry = Entry {
                        parent,
                        identity: self.identity,
                        tokens: *tokens,
                        block: block.clone(),
                        children: 0,
                        rank: store.level.saturating_add(self.identity.cost(depth)),
                        used: store.clock,
                        depth,
                    };
                    store.leaves.insert(entry.leaf(key));
                    store.entries.insert(key, entry);
                    store.models.entry(self.identity.hash).or_default().1 += 1;
                    self.kept.known(key, true);
                }
            }
            parent = key;
        }
    }

    /// Lets go of the block that ranks lowest, of those that nobody else holds, of this model or of all; false where there is
    /// none.
    pub fn evict(&self, of_all: bool) -> bool {
        let store = &mut *self.kept.store();
        let unused = |(_, _, _, key): &&Leaf| {
            store.entries.get(key).is_some_and(|entry| {
                Arc::strong_count(&entry.block) == 1 && (of_all || entry.identity.hash == self.identity.hash)
            })
        };
        let Some(leaf) = store.leaves.iter().find(unused).copied() else { return false };
        store.level = store.level.max(leaf.0);
        self.kept.remove(store, leaf);
        true
    }

    #[cfg(test)]
    pub fn blocks(&self) -> Vec<Block> {
        self.kept.store().entries.values().map(|entry| entry.block.clone()).collect()
    }
}

impl Drop for PrefixCache {
    fn drop(&mut self) {
        let mut store = self.kept.store();
        let Some((views, _)) = store.models.get_mut(&self.identity.hash) else { return };
        *views -= 1;
        if *views > 0 {
            return;
        }
        loop {
            let of_model =
                |leaf: &&Leaf| store.entries.get(&leaf.3).is_some_and(|e| e.identity.hash == self.identity.hash);
            // Leaf by leaf; their parents become leaves.
            let gone: Vec<Leaf> = store.leaves.iter().filter(of_model).copied().collect();
            if gone.is_empty() {
                break;
            }
            gone.into_iter().for_each(|leaf| self.kept.remove(&mut store, leaf));
        }
        store.models.remove(&self.identity.hash);
    }
}

impl Kept {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.0.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, key: Key, here: bool) {
        let mut keys = self.0.keys.write().unwrap_or_else(PoisonError::into_inner);
        if here {
            keys.insert(key)
        } else {
            keys.remove(&key)
        };
    }

    fn remove(&self, store: &mut Store, leaf: Leaf) {
        store.leaves.remove(&leaf);
        let Some(entry) = store.entries.remove(&leaf.3) else { return };
        self.known(leaf.3, false);
        store.child(entry.parent, false);
        if let Some((_, entries)) = store.models.get_mut(&entry.identity.hash) {
            *entries -= 1;
        }
    }
}

impl Store {
    fn touch(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let leaf = entry.children == 0 && self.leaves.remove(&entry.leaf(key));
        entry.used = self.clock;
        entry.rank = self.level.saturating_add(entry.identity.cost(entry.depth));
        if leaf {
            self.leaves.insert(entry.leaf(key));
        }
    }

    /// One child more or less of an entry; nothing, where the parent is a model's identity.
    fn child(&mut self, key: Key, more: bool) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if more {
            if entry.children == 0 {
                self.leaves.remove(&entry.leaf(key));
            }
            entry.children += 1;
        } else {
            entry.children -= 1;
            if entry.children == 0 {
                self.leaves.insert(entry.leaf(key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::engine::{ops::block_pool::Memory, testing::Rng};

    fn tokens(rng: &mut Rng) -> Vec<u32> {
        // Few beginnings, so that prompts share them.
        let blocks = 1 + rng.below(6);
        let mut out = Vec::new();
        for _ in 0..blocks {
            let kind = rng.below(3) as u32;
            out.extend([kind; POSITIONS]);
        }
        out.extend(vec![9; rng.below(POSITIONS)]);
        out
    }

    /// A block that says which prefix it is of.
    fn block(prefix: &[u32]) -> Block {
        Arc::new(Memory::of(&prefix.iter().map(|t| *t as f32).collect::<Vec<f32>>()))
    }

    const ONE: Identity = Identity { hash: 1, cost: 5, cost_of_depth: 0 };

    fn cache() -> PrefixCache {
        PrefixCache::new(&Kept::default(), ONE)
    }

    #[test]
    fn it_agrees_with_a_simple_model_over_100_000_operations() {
        let mut rng = Rng(5);
        let cache = cache();
        // By prefix: when it was last used.
        let mut model: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
        let mut clock = 0;
        let full = |tokens: &[u32]| tokens.len() / POSITIONS;
        let longest = |model: &BTreeMap<Vec<u32>, u64>, tokens: &[u32]| {
            (1..=full(tokens)).take_while(|n| model.contains_key(&tokens[..n * POSITIONS])).count()
        };
        for _ in 0..100_000 {
            let tokens = tokens(&mut rng);
            clock += 1;
            match rng.below(8) {
                0..4 => {
                    let most = rng.below(7);
                    let want = longest(&model, &tokens);
                    assert_eq!(cache.known().count(&tokens, most), want.min(most));
                    let found = cache.find(&tokens, most);
                    assert_eq!(found.len(), want.min(most));
                    for (n, found) in (1..).zip(&found) {
                        let prefix = &tokens[..n * POSITIONS];
                        assert_eq!(found.numbers::<f32>(), block(prefix).numbers::<f32>(), "another prefix's block");
                        model.insert(prefix.to_vec(), clock);
                    }
                }
                4..7 => {
                    let blocks: Vec<Block> = (1..=full(&tokens)).map(|n| block(&tokens[..n * POSITIONS])).collect();
                    cache.keep(&tokens, &blocks);
                    (1..=blocks.len()).for_each(|n| _ = model.insert(tokens[..n * POSITIONS].to_vec(), clock));
                }
                _ => {
                    let most = rng.below(60);
                    while cache.len() > most {
                        assert!(cache.evict(true));
                    }
                    while model.len() > most {
                        let leaf = |p: &Vec<u32>| !model.keys().any(|q| q.len() > p.len() && q.starts_with(p));
                        let oldest = model
                            .iter()
                            .filter(|(prefix, _)| leaf(prefix))
                            .min_by_key(|(prefix, used)| (**used, Reverse(prefix.len())));
                        let gone = oldest.unwrap().0.clone();
                        model.remove(&gone);
                    }
                }
            }
            assert_eq!(cache.len(), model.len());
        }
        while cache.evict(true) {}
        let store = cache.kept.store();
        assert!(store.entries.is_empty() && store.leaves.is_empty());
    }

    #[test]
    fn what_somebody_holds_is_not_let_go() {
        let cache = cache();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let held = cache.find(&tokens, 2);
        assert!(!cache.evict(true));
        drop(held);
        assert!(cache.evict(true) && cache.evict(true) && !cache.evict(true));
    }

    #[test]
    fn a_hash_is_confirmed_by_its_tokens() {
        let cache = cache();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let first = key(ONE.hash, &[1; POSITIONS]);
        // As if another prompt's block had the same hash.
        cache.kept.store().entries.get_mut(&first).unwrap().tokens[3] = 7;
        assert_eq!(cache.find(&tokens, 9).len(), 0);
        cache.keep(&tokens, &[block(&[5]), block(&[6])]);
        assert_eq!(cache.find(&tokens, 9).len(), 0);
    }
}
