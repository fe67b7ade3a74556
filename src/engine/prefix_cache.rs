//! Exact prefix reuse: blocks of keys and values that were computed before, found again by the tokens before and in them.
//!
//! A block's key is the hash of the key of the block before it and of its own tokens, the first one's begins with the identity
//! of the model's keys and values; a hit is confirmed by the token ids, so a collision cannot give another prompt's block. Full
//! blocks are never written again, and what a sequence computes does not depend on how it was cut (see [`super::ops`]): a
//! reused prefix gives the same bits.
//!
//! Where a sequence attends to documents that were computed apart ([`super::chunk_cache`]), its own blocks depend on them: their
//! keys say where which document stands ([`Seam`]). So they are found again by the same prompt only, and never by one that reads
//! no documents.

use super::{
    kept::{Identity, Keep, Kept, Key, key},
    ops::{attention::POSITIONS, block_pool::Block},
};

/// Where a document stands among a sequence's own tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seam {
    /// How many of its own tokens are before it.
    pub at: usize,
    /// Of the document, and of which part of it is attended to.
    pub key: Key,
}

/// What a model's view of the store says to other threads. By hashes of 128 bits alone: what is said to be here is confirmed
/// when it is used.
#[derive(Clone)]
pub struct Known {
    kept: Kept,
    identity: u128,
}

impl Known {
    /// Of the model's keys and values.
    pub fn identity(&self) -> u128 {
        self.identity
    }

    /// Blocks of the longest beginning of `tokens` that is here, at most `most`.
    pub fn count(&self, tokens: &[u32], seams: &[Seam], most: usize) -> usize {
        self.kept.count_known(links(self.identity, tokens, seams).take(most).map(|link| link.key))
    }

    /// Whether there is something of this key.
    pub fn has(&self, key: Key) -> bool {
        self.kept.count_known(std::iter::once(key)) == 1
    }
}

/// A model's blocks in the store, by the tokens that they hold. When the last view of an identity goes, so do its blocks.
pub struct PrefixCache {
    kept: Kept,
    identity: Identity,
}

/// A block's tokens with its key and what confirms it.
struct Link<'a> {
    key: Key,
    parent: Key,
    tokens: &'a [u32; POSITIONS],
    seam: u128,
}

fn links<'a>(identity: u128, tokens: &'a [u32], seams: &'a [Seam]) -> impl Iterator<Item = Link<'a>> {
    let mut parent = identity;
    let mut rest = seams;
    tokens.as_chunks().0.iter().zip(1..).map(move |(tokens, blocks)| {
        let here = rest.partition_point(|seam| seam.at < blocks * POSITIONS);
        let (now, later) = rest.split_at(here);
        rest = later;
        let seam = now.iter().fold(0u128, |before, seam| {
            key(&[&before.to_le_bytes(), &(seam.at as u64).to_le_bytes(), &seam.key.to_le_bytes()], &[])
        });
        let of_seam = seam.to_le_bytes();
        let key = key(&[&parent.to_le_bytes(), if seam == 0 { &[] } else { &of_seam }], tokens);
        Link { key, parent: std::mem::replace(&mut parent, key), tokens, seam }
    })
}

impl PrefixCache {
    /// A view of the blocks of this identity.
    pub fn new(kept: &Kept, identity: Identity) -> Self {
        kept.enter(&identity);
        Self { kept: kept.clone(), identity }
    }

    /// Blocks of this identity, those of documents included.
    pub fn count(&self) -> usize {
        self.kept.count(&self.identity)
    }

    pub fn known(&self) -> Known {
        Known { kept: self.kept.clone(), identity: self.identity.hash }
    }

    /// The blocks of the longest beginning of `tokens` that is here, at most `most` of them.
    pub fn find(&self, tokens: &[u32], seams: &[Seam], most: usize) -> Vec<Block> {
        let links = links(self.identity.hash, tokens, seams).take(most);
        self.kept.find(links.map(|link| (link.key, link.parent, &link.tokens[..], link.seam)))
    }

    /// Keeps the full blocks of a sequence whose own tokens up to `blocks`' end are these.
    pub fn keep(&self, tokens: &[u32], seams: &[Seam], blocks: &[Block]) {
        let new = links(self.identity.hash, tokens, seams).zip(blocks).zip(0u32..).map(|((link, block), depth)| {
            let Link { key, parent, tokens, seam } = link;
            (key, Keep { parent, tokens, seam, blocks: std::slice::from_ref(block), depth })
        });
        self.kept.keep(self.identity, new);
    }

    /// Lets go of the entry that ranks lowest, of those that nobody else holds, of this model or of all; false where there is
    /// none.
    pub fn evict(&self, of_all: bool) -> bool {
        self.kept.evict((!of_all).then_some(&self.identity))
    }

    #[cfg(test)]
    pub fn keys(&self, tokens: &[u32]) -> Vec<Key> {
        links(self.identity.hash, tokens, &[]).map(|link| link.key).collect()
    }

    #[cfg(test)]
    pub fn blocks(&self) -> Vec<Block> {
        self.kept.blocks()
    }
}

impl Drop for PrefixCache {
    fn drop(&mut self) {
        self.kept.leave(&self.identity);
    }
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

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
                    assert_eq!(cache.known().count(&tokens, &[], most), want.min(most));
                    let found = cache.find(&tokens, &[], most);
                    assert_eq!(found.len(), want.min(most));
                    for (n, found) in (1..).zip(&found) {
                        let prefix = &tokens[..n * POSITIONS];
                        assert_eq!(found.numbers::<f32>(), block(prefix).numbers::<f32>(), "another prefix's block");
                        model.insert(prefix.to_vec(), clock);
                    }
                }
                4..7 => {
                    let blocks: Vec<Block> = (1..=full(&tokens)).map(|n| block(&tokens[..n * POSITIONS])).collect();
                    cache.keep(&tokens, &[], &blocks);
                    (1..=blocks.len()).for_each(|n| _ = model.insert(tokens[..n * POSITIONS].to_vec(), clock));
                }
                _ => {
                    let most = rng.below(60);
                    while cache.count() > most {
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
            assert_eq!(cache.count(), model.len());
        }
        while cache.evict(true) {}
        assert!(cache.kept.is_empty());
    }

    #[test]
    fn what_somebody_holds_is_not_let_go() {
        let cache = cache();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[], &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let held = cache.find(&tokens, &[], 2);
        assert!(!cache.evict(true));
        drop(held);
        assert!(cache.evict(true) && cache.evict(true) && !cache.evict(true));
    }

    #[test]
    fn a_hash_is_confirmed_by_its_tokens() {
        let cache = cache();
        let tokens = [1; 2 * POSITIONS];
        cache.keep(&tokens, &[], &[block(&tokens[..POSITIONS]), block(&tokens)]);
        let first = links(ONE.hash, &tokens, &[]).next().unwrap().key;
        // As if another prompt's block had the same hash.
        cache.kept.forge(first);
        assert_eq!(cache.find(&tokens, &[], 9).len(), 0);
        cache.keep(&tokens, &[], &[block(&[5]), block(&[6])]);
        assert_eq!(cache.find(&tokens, &[], 9).len(), 0);
    }

    #[test]
    fn what_comes_behind_a_document_is_known_by_it() {
        let cache = cache();
        let tokens = [1; 3 * POSITIONS];
        let of = |seams: &[Seam], most| cache.find(&tokens, seams, most).len();
        let blocks: Vec<Block> = (0..3).map(|n| block(&[n])).collect();
        cache.keep(&tokens, &[Seam { at: POSITIONS + 4, key: 5 }], &blocks);
        assert_eq!(of(&[Seam { at: POSITIONS + 4, key: 5 }], 9), 3);
        // Before the document it is as without; whoever reads no documents does not get what depends on one.
        assert_eq!(of(&[], 9), 1);
        assert_eq!(of(&[Seam { at: POSITIONS + 4, key: 6 }], 9), 1);
        assert_eq!(of(&[Seam { at: POSITIONS + 5, key: 5 }], 9), 1);
        assert_eq!(of(&[Seam { at: POSITIONS, key: 5 }], 9), 1);
        assert_eq!(of(&[Seam { at: 3, key: 5 }], 9), 0);
    }
}
