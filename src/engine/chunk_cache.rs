//! Documents that are computed once, wherever they stand in whoever's prompt.
//!
//! A document ("chunk") is a run of a prompt's tokens that the client has marked and that was tokenised apart. Its keys and values
//! are computed alone, as if it were the whole prompt, and kept by its content; a sequence attends to them where the document
//! stands by turning its queries ([`super::ops::attention::Turns`]), so one copy serves all places. What a document's tokens
//! would have seen before them is missing from them, most of all in the first ones, which take what attention has to spare (EPIC,
//! Hu et al. 2024). Against that there are two means, and a model's record says which it takes ([`Reuse`]): the first tokens are
//! computed again in each request, among its own, as in MEPIC (2512.16822), and blocks that only hold those are not kept; or the
//! document is computed behind a few tokens with which prompts begin ("anchor"), which take that attention then as they do in a
//! prompt. The anchor lies in a block of its own, the same for all documents, and takes no room in theirs.
//!
//! A sequence's tokens are the same whether its documents are here or not, and a document that is not is computed alone all the
//! same: answers do not depend on what is kept. Tenants share no documents: the salt is part of the key.

use std::{ops::Range, sync::Arc, time::Instant};

use super::{
    disk_tier::DiskWriter,
    kept::{Identity, Keep, Kept, Key, key},
    model::{Kv, kv::Attached},
    ops::{
        attention::POSITIONS,
        block_pool::{Block, BlockPool, Memory},
    },
    prefix_cache::Seam,
};
use crate::domain::{DocumentKv, KvCleared, KvStat};

/// How documents are reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// Tokens behind which each is computed, as if they began the prompt: what takes the attention that has nowhere else to go.
    pub anchor: Arc<[u32]>,
    /// First tokens of each that are computed in each request.
    pub recompute: usize,
    /// Documents of fewer tokens, or more, are computed where they stand.
    pub fewest: usize,
    pub most: usize,
}

impl Default for Reuse {
    fn default() -> Self {
        Self { anchor: Arc::default(), recompute: POSITIONS, fewest: 2 * POSITIONS, most: 8192 }
    }
}

/// A document in a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Of its tokens, the salt and how it is kept.
    pub key: Key,
    /// What it is computed behind.
    pub anchor: Arc<[u32]>,
    /// Its place in the prompt.
    pub tokens: Range<usize>,
    /// The part of it that is attended to where it was computed.
    pub attached: Range<usize>,
}

impl Chunk {
    /// Tokens that are computed to have it.
    pub fn length(&self) -> usize {
        self.anchor.len() + self.tokens.len()
    }

    /// Those tokens, from the prompt's.
    pub fn content<'a>(&'a self, prompt: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        self.anchor.iter().chain(&prompt[self.tokens.clone()]).copied()
    }

    /// Blocks of its tokens.
    pub fn blocks(&self) -> usize {
        self.tokens.len().div_ceil(POSITIONS)
    }

    /// The place of its first attached token in its blocks.
    pub fn place(&self) -> usize {
        self.attached.start - self.tokens.start
    }

    /// Blocks that computing it takes at most, with those of its anchor.
    pub fn taken(&self) -> usize {
        self.blocks() + self.anchor.len().div_ceil(POSITIONS)
    }

    /// What computes it: behind its anchor, whose blocks these are. Its own blocks are then the document's.
    pub fn begin(&self, pool: &BlockPool, anchor: Vec<Block>) -> Kv {
        let anchor = Attached { at: 0, len: self.anchor.len(), place: 0, offset: 0, blocks: anchor };
        Kv::of(pool, Vec::new(), if self.anchor.is_empty() { Vec::new() } else { vec![anchor] })
    }

    /// What a sequence attaches, with the kept blocks.
    pub fn attach(&self, blocks: Vec<Block>) -> Attached {
        let (at, place) = (self.attached.start, self.place());
        Attached { at, len: self.attached.len(), place, offset: at - place - self.anchor.len(), blocks }
    }

    /// Blocks of it that are kept.
    pub fn kept(&self) -> usize {
        self.blocks() - self.first()
    }

    /// Blocks at its beginning that are not kept.
    pub fn first(&self) -> usize {
        self.place() / POSITIONS
    }
}

/// A prompt as a sequence computes it: its own tokens, and the documents between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Those that are not attached.
    pub own: Vec<u32>,
    pub chunks: Vec<Chunk>,
    pub seams: Vec<Seam>,
}

impl Layout {
    /// Of a prompt without documents.
    pub fn plain(tokens: Vec<u32>) -> Self {
        Self { own: tokens.clone(), tokens, ..Self::default() }
    }

    /// Of a prompt with these documents in it, which are in order and apart, for a model of this identity.
    pub fn new(tokens: Vec<u32>, documents: &[Range<usize>], reuse: &Reuse, identity: u128, salt: &[u8]) -> Self {
        let mut layout = Self { own: Vec::with_capacity(tokens.len()), ..Self::default() };
        let mut done = 0;
        for document in documents {
            let len = document.len();
            // The prompt's last token is computed in any case: what comes after it is sampled from it.
            let end = document.end.min(tokens.len() - 1);
            let attached = document.start + reuse.recompute..end;
            // One that stands before where it would be computed is not moved back.
            let early = document.start < reuse.anchor.len();
            if len < reuse.fewest || len > reuse.most || attached.is_empty() || early {
                continue;
            }
            let mut chunk = Chunk { key: 0, anchor: Arc::clone(&reuse.anchor), tokens: document.clone(), attached };
            let sizes = [chunk.first(), reuse.anchor.len(), salt.len()].map(|n| (n as u64).to_le_bytes()).concat();
            let content: Vec<u32> = chunk.content(&tokens).collect();
            chunk.key = key(&[b"document", &identity.to_le_bytes(), &sizes, salt], &content);
            layout.own.extend_from_slice(&tokens[done..chunk.attached.start]);
            done = chunk.attached.end;
            let part = [chunk.place(), chunk.attached.len()].map(|n| (n as u64).to_le_bytes()).concat();
            layout.seams.push(Seam { at: layout.own.len(), key: key(&[&chunk.key.to_le_bytes(), &part], &[]) });
            layout.chunks.push(chunk);
        }
        layout.own.extend_from_slice(&tokens[done..]);
        layout.tokens = tokens;
        layout
    }
}

/// What confirms entries of the store: that they are documents, or anchors.
const DOCUMENT: u128 = 1;
const ANCHOR: u128 = 2;

/// A model's documents in the store, and on disk.
#[derive(Clone)]
pub struct ChunkCache {
    kept: Kept,
    identity: Identity,
    disk: Option<Arc<DiskWriter>>,
}

impl ChunkCache {
    pub fn new(kept: &Kept, identity: Identity) -> Self {
        Self { kept: kept.clone(), identity, disk: None }
    }

    /// Puts a disk behind it.
    pub fn set_disk(&mut self, disk: Arc<DiskWriter>) {
        self.disk = Some(disk);
    }

    /// The kept blocks of a document.
    pub fn find(&self, chunk: &Chunk, prompt: &[u32]) -> Option<Vec<Block>> {
        let tokens: Vec<u32> = chunk.content(prompt).collect();
        let found = self.kept.find(std::iter::once((chunk.key, self.identity.hash, &tokens[..], DOCUMENT)));
        (found.len() == chunk.kept()).then_some(found)
    }

    /// The blocks of an anchor.
    pub fn find_anchor(&self, anchor: &[u32]) -> Option<Vec<Block>> {
        let found = self.kept.find(std::iter::once((self.anchor_key(anchor), self.identity.hash, anchor, ANCHOR)));
        (found.len() == anchor.len().div_ceil(POSITIONS)).then_some(found)
    }

    /// Keeps an anchor.
    pub fn keep_anchor(&self, anchor: &[u32], blocks: &[Block]) {
        let new = Keep { parent: self.identity.hash, tokens: anchor, seam: ANCHOR, blocks, depth: 0 };
        self.kept.keep(self.identity, std::iter::once((self.anchor_key(anchor), new)));
    }

    fn anchor_key(&self, anchor: &[u32]) -> Key {
        key(&[b"anchor", &self.identity.hash.to_le_bytes()], anchor)
    }

    /// Whether a document is on disk.
    pub fn is_on_disk(&self, chunk: &Chunk) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.tier.has(chunk.key))
    }

    /// What is known of a document.
    pub fn look(&self, chunk: &Chunk) -> DocumentKv {
        let here = self.kept.look(chunk.key);
        let pinned = here.and_then(|view| view.pinned);
        DocumentKv {
            tokens: chunk.tokens.len(),
            in_memory: here.is_some(),
            on_disk: self.is_on_disk(chunk),
            pinned_s: pinned.map(|until| until.saturating_duration_since(Instant::now()).as_secs()),
        }
    }

    /// Keeps a document before all that is not pinned, until then or longer.
    pub fn pin(&self, chunk: &Chunk, until: Instant) {
        self.kept.pin(chunk.key, until);
    }

    /// Fills in what there is of this model.
    pub fn stat(&self, stat: &mut KvStat) {
        for view in self.kept.view(&self.identity) {
            if view.seam != DOCUMENT {
                stat.prefix_blocks += view.blocks;
                continue;
            }
            stat.documents += 1;
            stat.document_tokens += view.tokens;
            stat.document_blocks += view.blocks;
            if view.pinned.is_some() {
                stat.pinned += 1;
                stat.pinned_blocks += view.blocks;
            }
        }
        stat.disk = self.disk.as_ref().map(|disk| disk.tier.stat());
    }

    /// Lets go of these documents, or of all that is kept of this model, but for what is in use.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn clear(&self, chunks: Option<&[Chunk]>) -> std::io::Result<KvCleared> {
        let keys: Option<Vec<Key>> = chunks.map(|chunks| chunks.iter().map(|chunk| chunk.key).collect());
        let entries = self.kept.clear(&self.identity, keys.as_deref());
        let on_disk = self.disk.as_ref().map_or(Ok(0), |disk| disk.clear(keys.as_deref()))?;
        Ok(KvCleared { entries, on_disk })
    }

    /// Reads a document from disk into memory for as many blocks as are kept of it, and keeps it.
    pub fn load(&self, chunk: &Chunk, prompt: &[u32], mut memory: Vec<Memory>) -> Option<Vec<Block>> {
        let tokens: Vec<u32> = chunk.content(prompt).collect();
        let disk = self.disk.as_ref()?;
        if !disk.tier.read(chunk.key, &tokens, &mut memory) {
            return None;
        }
        let blocks: Vec<Block> = memory.into_iter().map(Arc::new).collect();
        Some(self.keep_these(chunk, prompt, &tokens, &blocks))
    }

    /// Keeps a document that was computed alone; `blocks` are all of it. Gives those that are kept: an earlier copy's, if there is
    /// one.
    pub fn keep(&self, chunk: &Chunk, prompt: &[u32], blocks: &[Block]) -> Vec<Block> {
        let tokens: Vec<u32> = chunk.content(prompt).collect();
        let kept = self.keep_these(chunk, prompt, &tokens, &blocks[chunk.first()..]);
        if let Some(disk) = &self.disk {
            disk.offer(chunk.key, tokens, kept.clone());
        }
        kept
    }

    fn keep_these(&self, chunk: &Chunk, prompt: &[u32], tokens: &[u32], blocks: &[Block]) -> Vec<Block> {
        // Each position of it sees half of it, on average.
        let depth = (chunk.blocks() / 2) as u32;
        let new = Keep { parent: self.identity.hash, tokens, seam: DOCUMENT, blocks, depth };
        self.kept.keep(self.identity, std::iter::once((chunk.key, new)));
        self.find(chunk, prompt).unwrap_or_else(|| blocks.to_vec())
    }
}
