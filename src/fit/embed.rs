//! What predictors see of outcomes' queries: embeddings and signals. Embedding is what takes long, so vectors are kept on
//! disk, one file per embedder, by the hash of the text.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{FEATURES, Inputs};
use crate::{
    domain::{EmbedderIdentity, Message, Request, Role, Sampling, Signals, canonical},
    policy::query_feature,
    replay::matrix::Matrix,
    signals::{self, Embedder},
};

/// Why queries have no vectors.
#[derive(Debug, thiserror::Error)]
pub enum EmbedCacheError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Embed(#[from] signals::EmbedError),
}

/// Vectors by text, for one embedder.
pub struct Cache {
    path: PathBuf,
    dimensions: usize,
    known: BTreeMap<[u8; 16], Arc<[f32]>>,
    /// What has been added since the file was read.
    fresh: Vec<u8>,
}

impl Cache {
    /// The cache of an embedder below `dir`; empty where there is none yet. A file that was cut short is read up to there.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(dir: &Path, embedder: &EmbedderIdentity) -> Result<Self, EmbedCacheError> {
        let identity = canonical::to_bytes(embedder).unwrap_or_default();
        let path = dir.join(format!("{}.f32", &blake3::hash(&identity).to_hex()[..16]));
        let dimensions = embedder.dimensions as usize;
        let mut bytes = Vec::new();
        match fs::File::open(&path) {
            Ok(mut file) => {
                file.read_to_end(&mut bytes).map_err(|source| EmbedCacheError::File { path: path.clone(), source })?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(EmbedCacheError::File { path, source }),
        }
        let mut known = BTreeMap::new();
        for entry in bytes.chunks_exact(16 + dimensions * 4) {
            let (key, numbers) = entry.split_at(16);
            let vector = numbers.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if let Ok(key) = key.try_into() {
                known.insert(key, vector);
            }
        }
        Ok(Self { path, dimensions, known, fresh: Vec::new() })
    }

    fn key(text: &str) -> [u8; 16] {
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
        key
    }

    async fn get(&mut self, text: &str, embedder: &dyn Embedder) -> Result<Arc<[f32]>, EmbedCacheError> {
        let key = Self::key(text);
        if let Some(vector) = self.known.get(&key) {
            return Ok(Arc::clone(vector));
        }
        let vector = embedder.embed(text).await?;
        if vector.len() == self.dimensions {
            self.fresh.extend(key);
            vector.iter().for_each(|x| self.fresh.extend(x.to_le_bytes()));
            self.known.insert(key, Arc::clone(&vector));
        }
        Ok(vector)
    }

    /// Appends what is new to the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&mut self) -> Result<(), EmbedCacheError> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let wrong = |source| EmbedCacheError::File { path: self.path.clone(), source };
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir).map_err(wrong)?;
        }
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&self.path).map_err(wrong)?;
        // A file that was cut short would put everything after it out of step.
        let entry = (16 + self.dimensions * 4) as u64;
        let length = file.metadata().map_err(wrong)?.len();
        file.set_len(length - length % entry).map_err(wrong)?;
        file.write_all(&self.fresh).map_err(wrong)?;
        self.fresh.clear();
        Ok(())
    }
}

/// Embeds and measures every query of a matrix, and the names of its models; `tick` is called after each query.
///
/// # Errors
/// When the embedder fails, or the cache cannot be written.
pub async fn inputs(
    matrix: &Matrix,
    embedder: &dyn Embedder,
    cache: &mut Cache,
    mut tick: impl FnMut(),
) -> Result<Inputs, EmbedCacheError> {
    /// Vectors that a crash may lose.
    const SAVE_EVERY: usize = 2000;
    let mut embeddings = Vec::with_capacity(matrix.len());
    let mut features = Vec::with_capacity(matrix.len());
    for (i, query) in matrix.queries.iter().enumerate() {
        embeddings.push(cache.get(&query.text, embedder).await?);
        let signals = measured(&query.text);
        features.push(FEATURES.iter().filter_map(|name| query_feature(name, &signals)).collect());
        if i % SAVE_EVERY == SAVE_EVERY - 1 {
            cache.save()?;
        }
        tick();
    }
    let mut models = Vec::with_capacity(matrix.models.len());
    for name in &matrix.models {
        models.push(cache.get(name, embedder).await?);
    }
    cache.save()?;
    Ok(Inputs { embedder: EmbedderIdentity::clone(&embedder.identity()), embeddings, features, models })
}

/// The signals of a text as the only message.
pub fn measured(text: &str) -> Signals {
    measured_chat(vec![Message::text(Role::User, text)])
}

/// The signals of a conversation.
pub fn measured_chat(messages: Vec<Message>) -> Signals {
    signals::measure(&request(messages))
}

/// A request of these messages, as a client would send it.
fn request(messages: Vec<Message>) -> Request {
    Request {
        model: String::new(),
        messages: messages.into(),
        sampling: Sampling::default(),
        n: 1,
        logprobs: false,
        top_logprobs: 0,
        stream: false,
        include_usage: false,
        needs: Vec::new(),
        metadata: BTreeMap::new(),
        user: None,
        session: None,
        client_retry: 0,
        priority: 0,
        exact: false,
        keep: None,
        sharing: String::new(),
        begun: None,
        body: bytes::Bytes::new(),
    }
}
