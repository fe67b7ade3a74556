//! An embedder over ONNX Runtime, loaded at run time: int8 BERT encoders such as bge-small and all-MiniLM.
//!
//! A dynamically quantised model scales its activations over the whole batch, so that a text embedded in company gets
//! other bits than alone (bge: cosine .995 to .998). Hence one text per run, always. Each session lives on its own OS
//! thread, apart from tokio's workers, and takes texts from one queue. ONNX Runtime does not spin while idle: it
//! would take the cores from everything else.
//!
//! Leaves to others: where the files come from (`assets`), how long to wait ([`super::embed_within`]).

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use async_trait::async_trait;
use ort::{environment::Environment, session::Session, value::Tensor};
use tokenizers::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use super::{
    embedder::{EmbedError, Embedder, Pooling},
    window::window_text,
};
use crate::domain::EmbedderIdentity;

/// What an [`OrtEmbedder`] is made of.
#[derive(Clone, Debug)]
pub struct EmbedderFiles {
    /// ONNX Runtime's shared library, 1.24 or later.
    pub onnxruntime: PathBuf,
    /// The encoder: inputs `input_ids`, `attention_mask` and perhaps `token_type_ids`, `[1, tokens]` of i64; first output
    /// `[1, tokens, dimensions]` of f32.
    pub model: PathBuf,
    /// `tokenizer.json`; its padding and truncation are switched off.
    pub tokenizer: PathBuf,
    /// The asset's name; the embedder's, too.
    pub name: String,
    /// SHA-256 of the weights in hexadecimal, as checked by whoever fetched them.
    pub weights_sha256: String,
    pub pooling: Pooling,
    /// Longest text in tokens, special tokens counted; 512 for BERT. A longer one keeps its two ends.
    pub window: usize,
    /// Texts embedded at once, at least 1. Each has an OS thread and a session (a copy of the weights) of its own and is
    /// computed on that thread alone: short texts gain little from more, and a pool that does not spin wakes slowly.
    pub threads: usize,
}

struct Job {
    text: String,
    reply: oneshot::Sender<Result<Arc<[f32]>, EmbedError>>,
}

/// See the module.
pub struct OrtEmbedder {
    identity: Arc<EmbedderIdentity>,
    tokenizer: Arc<Tokenizer>,
    /// `None` only while dropping.
    queue: Option<mpsc::Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
}

impl OrtEmbedder {
    /// Loads the library (once per process), the tokenizer and the weights, and embeds one word with each session to see
    /// that it works. Blocking: a quarter of a second or so per session.
    ///
    /// # Errors
    /// When a file is missing, damaged, or not what it should be; says which and what to do.
    pub fn load(files: &EmbedderFiles) -> Result<Self, EmbedError> {
        EmbedError::unless_file("the ONNX Runtime library", "onnxruntime", &files.onnxruntime)?;
        EmbedError::unless_file("the embedding model", &files.name, &files.model)?;
        EmbedError::unless_file("the tokenizer", &files.name, &files.tokenizer)?;
        let environment = environment(&files.onnxruntime)?;
        let tokenizer = Arc::new(load_tokenizer(files)?);

        let precision = precision(files)?;
        let threads = files.threads.max(1);
        let (queue, jobs) = mpsc::channel::<Job>(threads * 2);
        let jobs = Arc::new(Mutex::new(jobs));
        let mut workers = Vec::new();
        let mut dimensions = 0;
        for index in 0..threads {
            let mut encoder = Encoder::load(&environment, tokenizer.clone(), files)?;
            dimensions = encoder.embed("weir").map_err(|e| model_error(files, &e))?.len();
            let jobs = jobs.clone();
            let worker = std::thread::Builder::new()
                .name(format!("embed-{index}"))
                .spawn(move || work(&mut encoder, &jobs))
                .map_err(|e| EmbedError::Run(format!("no thread could be started: {e}")))?;
            workers.push(worker);
        }
        trim_heap();
        let half = (files.window.div_ceil(2), files.window / 2);
        let identity = EmbedderIdentity {
            name: files.name.clone(),
            weights: files.weights_sha256.clone(),
            precision: precision.into(),
            pooling: files.pooling.as_str().into(),
            window: format!("{}: first {} + last {}", files.window, half.0, half.1),
            dimensions: dimensions as u32,
        };
        Ok(Self { identity: Arc::new(identity), tokenizer, queue: Some(queue), workers })
    }
}

#[async_trait]
impl Embedder for OrtEmbedder {
    fn identity(&self) -> Arc<EmbedderIdentity> {
        self.identity.clone()
    }

    async fn embed(&self, text: &str) -> Result<Arc<[f32]>, EmbedError> {
        let (reply, answer) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(EmbedError::Stopped)?;
        queue.send(Job { text: text.to_owned(), reply }).await.map_err(|_| EmbedError::Stopped)?;
        answer.await.map_err(|_| EmbedError::Stopped)?
    }

    fn count_tokens(&self, text: &str) -> usize {
        self.tokenizer.encode_fast(text, true).map_or(0, |encoding| encoding.len())
    }
}

impl Drop for OrtEmbedder {
    fn drop(&mut self) {
        // The process may be about to end, and ONNX Runtime's destructors must not meet a thread that is still inside it.
        self.queue = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Takes texts until the queue closes. Whoever holds the lock waits for the next text; the others wait for the lock.
fn work(encoder: &mut Encoder, jobs: &Mutex<mpsc::Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(job) = job else { return };
        // Nobody waits any more (deadline, client gone): the time is better spent on the next.
        if !job.reply.is_closed() {
            let _ = job.reply.send(encoder.embed(&job.text));
        }
    }
}

/// One session and how to ask it.
struct Encoder {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    window: usize,
    token_types: bool,
    pooling: Pooling,
}

impl Encoder {
    fn load(environment: &Environment, tokenizer: Arc<Tokenizer>, files: &EmbedderFiles) -> Result<Self, EmbedError> {
        let session =
            session(environment, &files.model).map_err(|message| model_error(files, &EmbedError::Run(message)))?;
        let has = |name: &str| session.inputs().iter().any(|input| input.name() == name);
        if !has("input_ids") || !has("attention_mask") {
            let message = "it has no inputs `input_ids` and `attention_mask`, so it is no text encoder";
            return Err(model_error(files, &EmbedError::Run(message.into())));
        }
        let token_types = has("token_type_ids");
        Ok(Self { session, tokenizer, window: files.window, token_types, pooling: files.pooling })
    }

    /// The unit vector of one text.
    fn embed(&mut self, text: &str) -> Result<Arc<[f32]>, EmbedError> {
        let ids = window_text(&self.tokenizer, text, self.window).map_err(|e| EmbedError::Run(e.to_string()))?;
        let run = |e: ort::Error| EmbedError::Run(e.to_string());
        let tokens = ids.len();
        let tensor = |values: Vec<i64>| Tensor::from_array(([1, tokens], values)).map_err(run);
        let mut inputs = vec![
            ("input_ids", tensor(ids.iter().map(|id| i64::from(*id)).collect())?),
            ("attention_mask", tensor(vec![1; tokens])?),
        ];
        if self.token_types {
            inputs.push(("token_type_ids", tensor(vec![0; tokens])?));
        }
        let outputs = self.session.run(inputs).map_err(run)?;
        let first = outputs.values().next().ok_or_else(|| EmbedError::Run("it has no output".into()))?;
        let (shape, hidden) = first.try_extract_tensor::<f32>().map_err(run)?;
        match shape[..] {
            [1, rows, dimensions] if rows as usize == tokens && dimensions > 0 => {
                unit(pool(hidden, dimensions as usize, self.pooling))
            }
            _ => Err(EmbedError::Run(format!(
                "its output has the shape {:?}, not [1, {tokens}, dimensions]",
                &shape[..]
            ))),
        }
    }
}

/// `hidden` is `[tokens, dimensions]`, rows contiguous; sums are f64 in order of tokens.
fn pool(hidden: &[f32], dimensions: usize, pooling: Pooling) -> Vec<f64> {
    match pooling {
        Pooling::Cls => hidden[..dimensions].iter().map(|x| f64::from(*x)).collect(),
        Pooling::Mean => {
            let mut sum = vec![0.0; dimensions];
            for row in hidden.chunks_exact(dimensions) {
                for (s, x) in sum.iter_mut().zip(row) {
                    *s += f64::from(*x);
                }
            }
            // Dividing by the number of tokens would only scale what is normalised next.
            sum
        }
    }
}

fn unit(vector: Vec<f64>) -> Result<Arc<[f32]>, EmbedError> {
    let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    if !length.is_finite() {
        return Err(EmbedError::BadVector("is not finite"));
    }
    if length < 1e-12 {
        return Err(EmbedError::BadVector("is zero"));
    }
    Ok(vector.iter().map(|x| (x / length) as f32).collect())
}

fn session(environment: &Environment, model: &Path) -> Result<Session, String> {
    let builder = Session::builder(environment).map_err(|e| e.to_string())?;
    let builder = builder.with_intra_threads(1).map_err(|e| e.to_string())?;
    let builder = builder.with_inter_threads(1).map_err(|e| e.to_string())?;
    let builder = builder.with_intra_op_spinning(false).map_err(|e| e.to_string())?;
    let builder = builder.with_inter_op_spinning(false).map_err(|e| e.to_string())?;
    // A memory pattern is kept per input shape, and every length is a shape.
    let mut builder = builder.with_memory_pattern(false).map_err(|e| e.to_string())?;
    builder.commit_from_file(model).map_err(|e| e.to_string())
}

/// `int8` when the graph holds the operators of dynamic quantisation, else `f32`. ONNX Runtime does not tell; the names of
/// operators stand in the file as they are.
fn precision(files: &EmbedderFiles) -> Result<&'static str, EmbedError> {
    let bytes = std::fs::read(&files.model).map_err(|e| model_error(files, &EmbedError::Run(e.to_string())))?;
    let quantised = regex::bytes::Regex::new("DynamicQuantize|MatMulInteger").expect("a constant pattern");
    Ok(if quantised.is_match(&bytes) { "int8" } else { "f32" })
}

/// Loading parses and repacks the weights in the C heap, which keeps the freed pages: 27 MiB for bge-small.
fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointer and may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn load_tokenizer(files: &EmbedderFiles) -> Result<Tokenizer, EmbedError> {
    let mut tokenizer = Tokenizer::from_file(&files.tokenizer).map_err(|e| tokenizer_error(files, &e))?;
    // all-MiniLM's pads every text to 128 tokens, and a tokenizer that truncates would hide the end from the window.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| tokenizer_error(files, &e))?;
    Ok(tokenizer)
}

fn tokenizer_error(files: &EmbedderFiles, error: &tokenizers::Error) -> EmbedError {
    EmbedError::Tokenizer { asset: files.name.clone(), path: files.tokenizer.clone(), message: error.to_string() }
}

fn model_error(files: &EmbedderFiles, error: &EmbedError) -> EmbedError {
    let message = match error {
        EmbedError::Run(message) => message.clone(),
        other => other.to_string(),
    };
    EmbedError::Model { asset: files.name.clone(), path: files.model.clone(), message }
}

/// ONNX Runtime allows one environment per process and `ort` keeps only a weak reference to it, so it is held here for good.
static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

/// The process's environment; loads the library at the first call. `ort` panics when its library is used before one has
/// been loaded, so nothing of it is touched before `init_from` has said yes.
fn environment(library: &Path) -> Result<Environment, EmbedError> {
    let library_error = |message: String| EmbedError::Library { path: library.to_owned(), message };
    let path = library.canonicalize().map_err(|e| library_error(e.to_string()))?;
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((from, environment)) = &*loaded {
        if *from != path {
            return Err(EmbedError::OtherLibrary { loaded: from.clone(), path });
        }
        return Ok(environment.clone());
    }
    let builder = ort::init_from(&path).map_err(|e| library_error(e.to_string()))?;
    let environment =
        builder.with_name("weir").with_telemetry(false).build().map_err(|e| library_error(e.to_string()))?;
    *loaded = Some((path, environment.clone()));
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooled_vector_is_a_direction_or_an_error() {
        let hidden = [3.0, 4.0, 1.0, -4.0];
        assert_eq!(pool(&hidden, 2, Pooling::Cls), [3.0, 4.0]);
        assert_eq!(pool(&hidden, 2, Pooling::Mean), [4.0, 0.0]);
        assert_eq!(*unit(vec![3.0, 4.0]).unwrap(), [0.6, 0.8]);
        assert_eq!(unit(vec![0.0, 0.0]).unwrap_err().to_string(), EmbedError::BadVector("is zero").to_string());
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(unit(vec![bad, 0.0]).unwrap_err().kind(), "bad_vector");
        }
    }
}
