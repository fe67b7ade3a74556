//! What is kept of all models of a device to be used again: blocks of keys and values, of beginnings of prompts
//! ([`super::prefix_cache`]) and of documents ([`super::chunk_cache`]), in one store with one order of going.
//!
//! An entry goes that nobody uses and no other follows, by GreedyDual (Young 1994; with sizes, Cao and Irani 1997): each use
//! lifts it to the present level plus what it costs to compute it again, per byte; the lowest goes first, and the level rises to
//! what went last. Of equal costs this is the least recently used; a block deep in a long prompt, or of a large model, stays longer.
//! What is pinned goes after all that is not, the pin that ends soonest first: a pin holds against other prompts, and never keeps
//! a running request from its room.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Instant,
};

use super::ops::block_pool::Block;

/// The hash of all that an entry depends on.
pub type Key = u128;

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

/// What to keep.
pub struct Keep<'a> {
    /// Of the entry through which alone it is reached, or a model's identity.
    pub parent: Key,
    pub tokens: &'a [u32],
    /// What else confirms it.
    pub seam: u128,
    pub blocks: &'a [Block],
    /// Blocks before it, on average.
    pub depth: u32,
}

/// What is kept, as others see it.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub key: Key,
    pub seam: u128,
    pub tokens: usize,
    pub blocks: usize,
    pub pinned: Option<Instant>,
}

struct Entry {
    parent: Key,
    identity: Identity,
    tokens: Box<[u32]>,
    seam: u128,
    blocks: Box<[Block]>,
    /// Entries that follow it.
    children: u32,
    /// The level when it was used last, with its cost.
    rank: u64,
    /// Of the clock.
    used: u64,
    depth: u32,
    /// It goes last until then.
    pinned: Option<Instant>,
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
    /// By identity: views, and blocks.
    models: BTreeMap<u128, (usize, usize)>,
}

/// Hashes of parts.
pub fn key(parts: &[&[u8]], tokens: &[u32]) -> Key {
    let mut hash = blake3::Hasher::new();
    parts.iter().for_each(|part| _ = hash.update(part));
    tokens.iter().for_each(|token| _ = hash.update(&token.to_le_bytes()));
    let hash = hash.finalize();
    hash.as_bytes().first_chunk().map_or(0, |bytes: &[u8; 16]| u128::from_le_bytes(*bytes))
}

impl Identity {
    /// Of a model with so many weights in its layers, and elements of queries in all of them together, for blocks of `positions`
    /// tokens of `bytes` bytes each: two operations per weight and token, four per element of the queries and position before.
    pub fn of_model(hash: u128, weights: usize, queries: usize, bytes: usize, positions: usize) -> Self {
        // By bytes, a block's positions cancel out.
        Self { hash, cost: (2 * weights / bytes) as u64, cost_of_depth: (4 * queries * positions / bytes) as u64 }
    }

    /// Operations by the byte to compute a block again that so many are before.
    pub fn cost(&self, depth: u32) -> u64 {
        self.cost.saturating_add(self.cost_of_depth.saturating_mul(depth.into()))
    }
}

impl Entry {
    fn leaf(&self, key: Key) -> Leaf {
        (self.rank, self.used, Reverse(self.depth), key)
    }

    fn unused(&self) -> bool {
        self.blocks.iter().all(|block| Arc::strong_count(block) == 1)
    }

    fn view(&self, key: Key, now: Instant) -> View {
        let (seam, pinned) = (self.seam, self.pinned(now));
        View { key, seam, tokens: self.tokens.len(), blocks: self.blocks.len(), pinned }
    }

    fn pinned(&self, now: Instant) -> Option<Instant> {
        self.pinned.filter(|until| *until > now)
    }
}

impl Kept {
    /// A model begins to use it.
    pub fn enter(&self, identity: &Identity) {
        self.store().models.entry(identity.hash).or_default().0 += 1;
    }

    /// A model is gone. With the last one of an identity, so is what was kept of it.
    pub fn leave(&self, identity: &Identity) {
        let store = &mut *self.store();
        let Some((views, _)) = store.models.get_mut(&identity.hash) else { return };
        *views -= 1;
        if *views > 0 {
            return;
        }
        self.remove_all(store, |entry| entry.identity.hash == identity.hash);
        store.models.remove(&identity.hash);
    }

    /// Lets go of all of an identity that nobody holds, or of the entries of these keys; gives how many entries went.
    pub fn clear(&self, identity: &Identity, keys: Option<&[Key]>) -> usize {
        let store = &mut *self.store();
        let Some(keys) = keys else {
            return self.remove_all(store, |entry| entry.identity.hash == identity.hash && entry.unused());
        };
        let leaf = |key: &Key| {
            let entry = store.entries.get(key).filter(|entry| entry.children == 0 && entry.unused())?;
            Some(entry.leaf(*key))
        };
        let gone: BTreeSet<Leaf> = keys.iter().filter_map(leaf).collect();
        gone.iter().for_each(|leaf| self.remove(store, *leaf));
        gone.len()
    }

    /// All of an identity, in no order.
    pub fn view(&self, identity: &Identity) -> Vec<View> {
        let (store, now) = (self.store(), Instant::now());
        let of_model = store.entries.iter().filter(|(_, entry)| entry.identity.hash == identity.hash);
        of_model.map(|(key, entry)| entry.view(*key, now)).collect()
    }

    /// An entry.
    pub fn look(&self, key: Key) -> Option<View> {
        self.store().entries.get(&key).map(|entry| entry.view(key, Instant::now()))
    }

    /// Pins an entry until then, or longer where it is; nothing, where it is not here.
    pub fn pin(&self, key: Key, until: Instant) {
        if let Some(entry) = self.store().entries.get_mut(&key) {
            entry.pinned = entry.pinned.max(Some(until));
        }
    }

    /// Blocks of an identity.
    pub fn count(&self, identity: &Identity) -> usize {
        self.store().models.get(&identity.hash).map_or(0, |(_, blocks)| *blocks)
    }

    /// How many of these hashes, one after the other, something has: by the hash alone, so that it must be confirmed when it is used.
    pub fn count_known(&self, keys: impl Iterator<Item = Key>) -> usize {
        let known = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.take_while(|key| known.contains(key)).count()
    }

    /// The blocks of each of these entries, as far as one after the other is here and confirmed.
    pub fn find<'a>(&self, wanted: impl Iterator<Item = (Key, Key, &'a [u32], u128)>) -> Vec<Block> {
        let store = &mut *self.store();
        store.clock += 1;
        let mut out = Vec::new();
        for (key, parent, tokens, seam) in wanted {
            let is = |e: &&Entry| e.parent == parent && *e.tokens == *tokens && e.seam == seam;
            let Some(entry) = store.entries.get(&key).filter(is) else { break };
            out.extend_from_slice(&entry.blocks);
            store.touch(key);
        }
        out
    }

    /// Keeps entries, each the parent of the next or not, or counts them as used where they are here; ends at one whose hash another
    /// has: of two with one hash the first stays.
    pub fn keep<'a>(&self, identity: Identity, new: impl Iterator<Item = (Key, Keep<'a>)>) {
        let store = &mut *self.store();
        store.clock += 1;
        for (key, new) in new {
            match store.entries.get(&key) {
                Some(e) if e.parent == new.parent && *e.tokens == *new.tokens && e.seam == new.seam => store.touch(key),
                Some(_) => return,
                None => {
                    store.child(new.parent, true);
                    let entry = Entry {
                        parent: new.parent,
                        identity,
                        tokens: new.tokens.into(),
                        seam: new.seam,
                        blocks: new.blocks.into(),
                        children: 0,
                        rank: store.level.saturating_add(identity.cost(new.depth)),
                        used: store.clock,
                        depth: new.depth,
                        pinned: None,
                    };
                    store.models.entry(identity.hash).or_default().1 += entry.blocks.len();
                    store.leaves.insert(entry.leaf(key));
                    store.entries.insert(key, entry);
                    self.known(key, true);
                }
            }
        }
    }

    /// Lets go of the entry that ranks lowest, of those that nobody else holds, of this identity or of all; false where there is
    /// none.
    pub fn evict(&self, of: Option<&Identity>) -> bool {
        let (store, now) = (&mut *self.store(), Instant::now());
        let goes = |leaf: &&Leaf| {
            let of_model = |e: &Entry| of.is_none_or(|identity| e.identity.hash == identity.hash);
            store.entries.get(&leaf.3).is_some_and(|entry| of_model(entry) && entry.unused())
        };
        let pinned = |leaf: &Leaf| store.entries.get(&leaf.3).and_then(|entry| entry.pinned(now));
        let free = store.leaves.iter().filter(goes).find(|leaf| pinned(leaf).is_none());
        let leaf = free.or_else(|| store.leaves.iter().filter(goes).min_by_key(|leaf| pinned(leaf)));
        let Some(leaf) = leaf.copied() else { return false };
        store.level = store.level.max(leaf.0);
        self.remove(store, leaf);
        true
    }

    #[cfg(test)]
    pub fn blocks(&self) -> Vec<Block> {
        self.store().entries.values().flat_map(|entry| entry.blocks.to_vec()).collect()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        let store = self.store();
        store.entries.is_empty() && store.leaves.is_empty()
    }

    /// As if another's tokens had the hash of this entry.
    #[cfg(test)]
    pub fn forge(&self, key: Key) {
        self.store().entries.get_mut(&key).unwrap().tokens[3] = 7;
    }

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

    /// Leaf by leaf, as their parents become leaves; gives how many went.
    fn remove_all(&self, store: &mut Store, goes: impl Fn(&Entry) -> bool) -> usize {
        let mut count = 0;
        loop {
            let goes = |leaf: &&Leaf| store.entries.get(&leaf.3).is_some_and(&goes);
            let gone: Vec<Leaf> = store.leaves.iter().filter(goes).copied().collect();
            if gone.is_empty() {
                return count;
            }
            count += gone.len();
            gone.into_iter().for_each(|leaf| self.remove(store, leaf));
        }
    }

    fn remove(&self, store: &mut Store, leaf: Leaf) {
        store.leaves.remove(&leaf);
        let Some(entry) = store.entries.remove(&leaf.3) else { return };
        self.known(leaf.3, false);
        store.child(entry.parent, false);
        if let Some((_, blocks)) = store.models.get_mut(&entry.identity.hash) {
            *blocks -= entry.blocks.len();
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
