//! What an embedder is: the trait, its errors, and how long anyone waits for one. The implementation over ONNX Runtime is
//! [`super::ort_embedder`]; which text is embedded is said by [`crate::domain::Request::query`].

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;

use crate::domain::{EmbedderIdentity, Embedding};

/// Turns a text into a unit vector.
///
/// Contract: the same text gives the same bits on the same machine, whatever else runs; the vector is finite, of Euclidean
/// length 1 and of [`EmbedderIdentity::dimensions`] elements, else it is an error. May be called from many tasks at once;
/// queues. Dropping the future gives up its place in the queue (a text already being embedded is finished, unseen).
#[async_trait]
pub trait Embedder: Send + Sync {
    /// Which embedder this is; part of a policy's hash and of every record.
    fn identity(&self) -> Arc<EmbedderIdentity>;

    /// Embeds one text. Longer ones are cut to the window that the identity describes.
    async fn embed(&self, text: &str) -> Result<Arc<[f32]>, EmbedError>;

    /// Tokens of `text` by this embedder's tokenizer before the window cuts, special tokens included.
    fn count_tokens(&self, text: &str) -> usize;
}

/// How the token vectors of the last layer become one vector. It is divided by its Euclidean length afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's (bge).
    Cls,
    /// Their mean (all-MiniLM).
    Mean,
}

impl Pooling {
    /// The words of [`EmbedderIdentity::pooling`].
    pub fn as_str(self) -> &'static str {
        match self {
            Pooling::Cls => "cls, l2",
            Pooling::Mean => "mean, l2",
        }
    }
}

/// Why there is no vector. Never holds the text.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EmbedError {
    /// A file that the embedder needs is not there.
    #[error("{what} is missing at {}: run `weir models fetch {asset}`, or correct the path", path.display())]
    Missing { what: &'static str, asset: String, path: PathBuf },
    /// The ONNX Runtime library does not load.
    #[error(
        "the ONNX Runtime library {} does not load: {message}. Run `weir models verify onnxruntime`; version 1.24 or later \
         for this platform is needed", path.display()
    )]
    Library { path: PathBuf, message: String },
    /// A process can hold only one ONNX Runtime.
    #[error(
        "ONNX Runtime is already loaded from {}, so that {} cannot be loaded: restart weir to change it",
        loaded.display(), path.display()
    )]
    OtherLibrary { loaded: PathBuf, path: PathBuf },
    /// The weights do not load, or are no text encoder.
    #[error(
        "the embedding model {} cannot be used: {message}. Run `weir models verify {asset}` and fetch it again",
        path.display()
    )]
    Model { asset: String, path: PathBuf, message: String },
    /// The tokenizer does not load.
    #[error(
        "the tokenizer {} cannot be used: {message}. Run `weir models verify {asset}` and fetch it again", path.display()
    )]
    Tokenizer { asset: String, path: PathBuf, message: String },
    /// The model failed on a text.
    #[error("the embedding model failed: {0}")]
    Run(String),
    /// The model gave something that is no direction.
    #[error("the embedding model gave a vector that {0}; it is not used")]
    BadVector(&'static str),
    /// The embedder's threads have ended.
    #[error("the embedder has stopped")]
    Stopped,
}

impl EmbedError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            EmbedError::Missing { .. } => "missing",
            EmbedError::Library { .. } | EmbedError::OtherLibrary { .. } => "library",
            EmbedError::Model { .. } => "model",
            EmbedError::Tokenizer { .. } => "tokenizer",
            EmbedError::Run(_) => "run",
            EmbedError::BadVector(_) => "bad_vector",
            EmbedError::Stopped => "stopped",
        }
    }

    /// `Missing` unless `path` is a file.
    pub(super) fn unless_file(what: &'static str, asset: &str, path: &Path) -> Result<(), EmbedError> {
        if path.is_file() {
            return Ok(());
        }
        Err(EmbedError::Missing { what, asset: asset.to_owned(), path: path.to_owned() })
    }
}

/// The query's embedding, or the reason that goes into the record as `no_embedding`: there is no embedder, nothing to
/// embed, the deadline (queueing included) has passed, or the embedder failed. Reasons never hold the text.
pub async fn embed_within(
    embedder: Option<&Arc<dyn Embedder>>,
    text: &str,
    deadline: Duration,
) -> Result<Embedding, String> {
    let Some(embedder) = embedder else { return Err("no embedder is loaded".into()) };
    if text.trim().is_empty() {
        return Err("the request has no user text to embed".into());
    }
    match tokio::time::timeout(deadline, embedder.embed(text)).await {
        Ok(Ok(vector)) => Ok(Embedding { vector, embedder: embedder.identity() }),
        Ok(Err(error)) => Err(format!("{}: {error}", error.kind())),
        Err(_) => Err(format!("the embedding took longer than {} ms", deadline.as_millis())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Slow(Duration);

    #[async_trait]
    impl Embedder for Slow {
        fn identity(&self) -> Arc<EmbedderIdentity> {
            Arc::new(EmbedderIdentity {
                name: "slow".into(),
                weights: "0".into(),
                precision: "f32".into(),
                pooling: "none".into(),
                window: "any".into(),
                dimensions: 2,
            })
        }

        async fn embed(&self, text: &str) -> Result<Arc<[f32]>, EmbedError> {
            tokio::time::sleep(self.0).await;
            if text == "bad" { Err(EmbedError::BadVector("is zero")) } else { Ok(Arc::from([0.6, 0.8])) }
        }

        fn count_tokens(&self, text: &str) -> usize {
            text.split_whitespace().count()
        }
    }

    fn slow(ms: u64) -> Arc<dyn Embedder> {
        Arc::new(Slow(Duration::from_millis(ms)))
    }

    #[tokio::test]
    async fn every_way_to_have_no_embedding_has_its_reason() {
        let second = Duration::from_secs(1);
        let e = embed_within(None, "hello", second).await.unwrap_err();
        assert_eq!(e, "no embedder is loaded");
        let e = embed_within(Some(&slow(0)), " \n", second).await.unwrap_err();
        assert_eq!(e, "the request has no user text to embed");
        let e = embed_within(Some(&slow(5_000)), "hello", Duration::from_millis(5)).await.unwrap_err();
        assert_eq!(e, "the embedding took longer than 5 ms");
        let e = embed_within(Some(&slow(0)), "bad", second).await.unwrap_err();
        assert!(e.starts_with("bad_vector: "), "{e}");
    }

    #[tokio::test]
    async fn in_time_the_vector_comes_with_its_embedder() {
        let found = embed_within(Some(&slow(0)), "hello", Duration::from_secs(1)).await.unwrap();
        assert_eq!(*found.vector, [0.6, 0.8]);
        assert_eq!(found.embedder.name, "slow");
    }
}
