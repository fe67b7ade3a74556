//! Exact prefix reuse: blocks of keys and values that were computed before, found again by the tokens before and in them.
//!
//! A block's key is the hash of the key of the block before it and of its own tokens; a hit is confirmed by the token ids,
//! so a collision cannot give another prompt's block. A block is only reached through those before it, so what goes first
//! is the block that no other follows and that was not used for longest. Full blocks are never written again, and what a
//! sequence computes does not depend on how it was cut (see [`super::ops`]): a reused prefix gives the same bits.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use super::ops::{attention::POSITIONS, block_pool::Block};

/// The chained hash of all tokens up to the end of a block.
type Key = u128;

struct Entry {
    parent: Option<Key>,
    tokens: [u32; POSITIONS],
    block: Block,
    /// Entries that follow it.
    children: u32,
    /// Of the clock.
    used: u64,
    /// Blocks before it.
    depth: u32,
}

/// The keys of what is kept, for other threads to ask. By hashes of 128 bits alone: what is said to be here is confirmed when it
/// is used.
#[derive(Clone, Default)]
pub struct Known(Arc<RwLock<HashSet<Key>>>);

impl Known {
    /// Blocks of the longest beginning of `tokens` that is here, at most `most`.
    pub fn count(&self, tokens: &[u32], most: usize) -> usize {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut parent = None;
        let here = |tokens: &&[u32; POSITIONS]| {
            let key = key(parent, tokens);
            parent = Some(key);
            keys.contains(&key)
        };
        chunks(tokens).iter().take(most).take_while(here).count()
    }

    fn set(&self, key: Key, here: bool) {
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if here {
            keys.insert(key)
        } else {
            keys.remove(&key)
        };
    }
}

/// Blocks by the tokens that they hold.
#[derive(Default)]
pub struct PrefixCache {
    entries: HashMap<Key, Entry>,
    known: Known,
    /// Those without children: least used first; of those used together the farthest from the beginning.
    leaves: BTreeSet<(u64, Reverse<u32>, Key)>,
    clock: u64,
}

fn key(parent: Option<Key>, tokens: &[u32; POSITIONS]) -> Key {
    let mut hash = blake3::Hasher::new();
    hash.update(&parent.unwrap_or_default().to_le_bytes());
    tokens.iter().for_each(|token| _ = hash.update(&token.to_le_bytes()));
    let hash = hash.finalize();
    hash.as_bytes().first_chunk().map_or(0, |bytes: &[u8; 16]| u128::from_le_bytes(*bytes))
}

fn chunks(tokens: &[u32]) -> &[[u32; POSITIONS]] {
    tokens.as_chunks().0
}

impl Entry {
    fn leaf(&self, key: Key) -> (u64, Reverse<u32>, Key) {
        (self.used, Reverse(self.depth), key)
    }
}

impl PrefixCache {
    /// Blocks that are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn known(&self) -> Known {
        self.known.clone()
    }

    #[cfg(test)]
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.entries.values().map(|entry| &entry.block)
    }

    /// The blocks of the longest beginning of `tokens` that is here, at most `most` of them.
    pub fn find(&mut self, tokens: &[u32], most: usize) -> Vec<Block> {
        self.clock += 1;
        let mut blocks = Vec::new();
        let mut parent = None;
        for tokens in chunks(tokens).iter().take(most) {
            let key = key(parent, tokens);
            let Some(entry) = self.entries.get(&key).filter(|e| e.tokens == *tokens && e.parent == parent) else {
                break;
            };
            blocks.push(entry.block.clone());
            self.touch(key);
            parent = Some(key);
        }
        blocks
    }

    /// Keeps the full blocks of a sequence whose tokens up to `blocks`' end are these.
    pub fn keep(&mut self, tokens: &[u32], blocks: &[Block]) {
        self.clock += 1;
        let mut parent = None;
        for ((tokens, block), depth) in chunks(tokens).iter().zip(blocks).zip(0u32..) {
            let key = key(parent, tokens);
            match self.entries.get(&key) {
                Some(entry) if entry.tokens == *tokens && entry.parent == parent => self.touch(key),
                // Of two with one hash the first stays.
                Some(_) => return,
                None => {
                    if let Some(parent) = parent {
                        self.child(parent, true);
                    }
                    let entry =
                        Entry { parent, tokens: *tokens, block: block.clone(), children: 0, used: self.clock, depth };
                    self.leaves.insert(entry.leaf(key));
                    self.entries.insert(key, entry);
                    self.known.set(key, true);
                }
            }
            parent = Some(key);
        }
    }

    /// Lets go of the block that was not used for longest, of those that nobody else holds; false where there is none.
    pub fn evict(&mut self) -> bool {
        let unused = |(_, _, key): &&(u64, Reverse<u32>, Key)| {
            self.entries.get(key).is_some_and(|entry| Arc::strong_count(&entry.block) == 1)
        };
        let Some(leaf) = self.leaves.iter().find(unused).copied() else { return false };
        self.leaves.remove(&leaf);
        let Some(entry) = self.entries.remove(&leaf.2) else { return false };
        self.known.set(leaf.2, false);
        if let Some(parent) = entry.parent {
            self.child(parent, false);
        }
        true
    }

    fn touch(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let leaf = entry.children == 0 && self.leaves.remove(&entry.leaf(key));
        entry.used = self.clock;
        if leaf {
            self.leaves.insert(entry.leaf(key));
        }
    }

    /// One child more or less.
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
    use crate::engine::ops::block_pool::Memory;

    /// Xorshift (Marsaglia, 2003).
    struct Rng(u64);

    impl Rng {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as usize % n
        }
    }

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

    #[test]
    fn it_agrees_with_a_simple_model_over_100_000_operations() {
        let mut rng = Rng(5);
        let mut cache = PrefixCache::default();
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
                        assert!(cache.evict());
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
        while cache.evict() {}
        assert!(cache.entries.is_empty() && cache.leaves.is_empty());
    }

    #[test]
    fn what_somebody_holds_is_not_let_go() {
        let mut cache = PrefixCache::default();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let held = cache.find(&tokens, 2);
        assert!(!cache.evict());
        drop(held);
        assert!(cache.evict() && cache.evict() && !cache.evict());
    }

    #[test]
    fn a_hash_is_confirmed_by_its_tokens() {
        let mut cache = PrefixCache::default();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let first = key(None, &[1; POSITIONS]);
        // As if another prompt's block had the same hash.
        cache.entries.get_mut(&first).unwrap().tokens[3] = 7;
        assert_eq!(cache.find(&tokens, 9).len(), 0);
        cache.keep(&tokens, &[block(&[5]), block(&[6])]);
        assert_eq!(cache.find(&tokens, 9).len(), 0);
    }
}
