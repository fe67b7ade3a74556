//! What an administrator asks of the keys and values that models in the process keep, and what is said of them.

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use super::{ChunkReuse, Counters, Request};

/// What is asked of one model's keys and values.
#[derive(Clone, Debug)]
pub enum KvCommand {
    /// What is kept, in numbers.
    Stat,
    /// What is kept of a request's prompt.
    Lookup(Arc<Request>),
    /// Computes what a request's prompt misses, and keeps its documents before all that is not pinned.
    Pin(Arc<Request>, Duration),
    /// Lets go of a request's documents, or of all that is kept, on disk too.
    Clear(Option<Arc<Request>>),
}

/// The answer to a [`KvCommand`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum KvAnswer {
    Stat(KvStat),
    Prompt(PromptKv),
    Cleared(KvCleared),
}

/// What a model keeps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KvStat {
    /// Bytes that all models of the device have taken, and may take together.
    pub device_bytes: usize,
    pub device_bytes_most: usize,
    pub block_bytes: usize,
    /// Blocks of beginnings of prompts.
    pub prefix_blocks: usize,
    pub documents: usize,
    pub document_tokens: usize,
    pub document_blocks: usize,
    /// Documents that are pinned, and their blocks.
    pub pinned: usize,
    pub pinned_blocks: usize,
    /// `None` where there is no disk behind memory.
    pub disk: Option<KvDisk>,
    /// Whether documents are reused, how, and what that costs; or why not.
    pub chunk_reuse: String,
    pub counters: Counters,
}

/// What lies on disk of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KvDisk {
    pub documents: usize,
    pub bytes: u64,
    pub bytes_most: u64,
    /// Documents read and written since the start, and those that turned out damaged.
    pub read: u64,
    pub written: u64,
    pub damaged: u64,
}

/// What is kept of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptKv {
    pub tokens: usize,
    /// Tokens of its beginning that are in memory, documents between them not counted.
    pub prefix_tokens: usize,
    /// In the prompt's order.
    pub documents: Vec<DocumentKv>,
    /// Why documents are not reused, where they are not.
    pub chunk_reuse: Option<ChunkReuse>,
}

/// What is kept of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DocumentKv {
    pub tokens: usize,
    pub in_memory: bool,
    pub on_disk: bool,
    /// For how many seconds more it is pinned.
    pub pinned_s: Option<u64>,
}

/// What went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvCleared {
    /// Documents, or, where all was to go, blocks of prompts and documents. What is in use stays.
    pub entries: usize,
    pub on_disk: usize,
}
