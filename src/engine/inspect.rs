//! What a model's engine keeps of keys and values, for administrators: in numbers, of one prompt, and to be let go.

use super::{Encoded, Engine, EngineError, chunk_cache::Layout, ops::attention::POSITIONS};
use crate::domain::{DocumentKv, KvCleared, KvStat, PromptKv};

impl Engine {
    /// What is kept, in numbers.
    pub fn kv_stat(&self) -> KvStat {
        let (device_bytes, device_bytes_most) = self.kv_cache.bytes();
        let mut stat = KvStat {
            device_bytes,
            device_bytes_most,
            block_bytes: self.info.kv_bytes_per_token * POSITIONS,
            prefix_blocks: 0,
            documents: 0,
            document_tokens: 0,
            document_blocks: 0,
            pinned: 0,
            pinned_blocks: 0,
            disk: None,
            chunk_reuse: self.info.chunk_reuse.clone(),
            counters: self.counters(),
        };
        self.chunks.stat(&mut stat);
        stat
    }

    /// What is kept of a prompt, for requests that share documents with `sharing`.
    pub fn kv_of(&self, prompt: &Encoded, sharing: &[u8]) -> PromptKv {
        let layout = self.layout(prompt.clone(), false, sharing);
        PromptKv {
            tokens: layout.tokens.len(),
            prefix_tokens: self.known_prefix(&layout),
            documents: layout.chunks.iter().map(|chunk| self.chunks.look(chunk)).collect::<Vec<DocumentKv>>(),
            chunk_reuse: self.reuse.as_ref().err().copied(),
        }
    }

    /// Own tokens of a prompt's beginning that are in memory.
    pub(super) fn known_prefix(&self, layout: &Layout) -> usize {
        let most = layout.own.len().saturating_sub(1) / POSITIONS;
        self.known.count(&layout.own, &layout.seams, most) * POSITIONS
    }

    /// Lets go of a prompt's documents, or of all that this model keeps, in memory and on disk. What is in use stays.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn kv_clear(&self, prompt: Option<&Encoded>, sharing: &[u8]) -> Result<KvCleared, EngineError> {
        let chunks = prompt.map(|prompt| self.layout(prompt.clone(), false, sharing).chunks);
        self.chunks.clear(chunks.as_deref()).map_err(|e| EngineError::io(&self.info.path, &e))
    }
}
