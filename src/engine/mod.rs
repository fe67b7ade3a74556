//! In-process inference, an island: models (GGUF, safetensors) of the llama, Qwen and Gemma architectures on the CPU, several
//! requests at once.
//!
//! A request goes [`template`] → [`tokenizer`] → queue → [`scheduler`] (which tokens next) → [`runner`] (one batch) →
//! [`model`] over [`ops`] (the arithmetic) → [`sampler`] → [`sequence`] (text, stop strings) → events. [`worker`] is the
//! loop around it, on a thread of its own; [`prefix_cache`] keeps the blocks of what was computed for who begins alike.
//! [`chunk_cache`] keeps marked documents for who has them anywhere; both lie in one store ([`kept`]).
//! What all models of a device share is in [`kv_cache`]; [`packed`] keeps their packed weights on disk, to be mapped. Other
//! architectures go through [`candle`], and share nothing. Nothing here knows of HTTP, policies or backends.

mod candle;
pub mod chunk_cache;
mod detokenizer;
pub mod disk_tier;
mod error;
pub mod fidelity;
pub mod gguf;
mod inspect;
pub mod kept;
pub mod kv_cache;
mod loaded;
pub mod model;
pub mod model_file;
pub mod ops;
mod packed;
pub mod prefix_cache;
mod runner;
mod safetensors;
pub mod sampler;
mod scheduler;
mod sequence;
mod template;
#[cfg(test)]
pub(crate) mod testing;
mod tokenizer;
mod worker;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

pub use chunk_cache::Reuse;
pub use error::EngineError;
pub use fidelity::record::{Bound, FidelityRecord};
pub use kv_cache::KvCache;
pub use ops::{Level, Precision, linear::Format};
pub use sampler::{Allowed, Choosing, TokenMask};

use crate::domain::{ChunkReuse, Counters, FinishReason, Message, TokenLogprob, Usage};
use chunk_cache::{ChunkCache, Layout};
use loaded::Loaded;
use model_file::ModelFile;
use scheduler::{Limits, Scheduler};
use template::Template;
use tokenizer::Tokenizer;
use worker::{Load, Worker};

/// Answers whose length nobody has bounded end after so many tokens.
pub const DEFAULT_MAX_TOKENS: usize = 1024;
/// Most alternatives that log-probabilities name, as in OpenAI's service.
pub const MOST_TOP_LOGPROBS: usize = 20;

/// How long a request is taken to wait where it has no deadline, or a later one.
const PATIENCE: Duration = Duration::from_secs(60);
/// How much earlier each step of priority makes it due.
const AHEAD_MS: i64 = 30_000;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Threads that compute; 0 takes the cores there are, at most 4.
    pub threads: usize,
    /// Choices that run at once.
    pub max_sequences: usize,
    /// Requests that wait behind them before the engine says that it is busy.
    pub max_waiting: usize,
    /// Bounds prompt plus answer below what the model was trained for.
    pub context: Option<u32>,
    /// Tokens of one step: more make long prompts faster, fewer keep streams smoother.
    pub step_tokens: usize,
    /// Tokens that are guessed ahead from what the prompt and the answer have said before, and checked in one step (prompt
    /// lookup): answers are the same, those that repeat come faster. 0: none; at most [`sequence::MOST_GUESSES`].
    pub prompt_lookup: usize,
    /// The memory of all models of the device for keys and values: of running sequences first, and what they leave of prompts
    /// and answers before, to be reused. Sequences that need more than there is give way to those that came earlier.
    pub kv_cache: KvCache,
    /// Bytes that this model may take of it; one whole context at least. `None`: all.
    pub cache_bytes: Option<usize>,
    /// How marked documents are reused.
    pub chunks: Chunks,
    /// A folder for the keys and values of documents, and how many bytes a model's may take there; `None`: they are in memory only.
    pub disk: Option<(PathBuf, u64)>,
    /// Folder for packed weights, to be mapped from there the next time; `None`: in memory only.
    pub packed: Option<PathBuf>,
    /// How weights are kept; [`Format::F32`] is the reference for tests.
    pub format: Format,
    /// Of how many bits activations are, see [`model::Llama::with_activations`].
    pub activations: Precision,
    /// Instruction set; `None` takes the processor's best.
    pub level: Option<Level>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            max_sequences: 16,
            max_waiting: 256,
            context: None,
            step_tokens: model::STEP,
            prompt_lookup: sequence::MOST_GUESSES,
            kv_cache: KvCache::default(),
            cache_bytes: None,
            chunks: Chunks::Off,
            disk: None,
            packed: None,
            format: Format::Native,
            activations: Precision::Sixteen,
            level: None,
        }
    }
}

/// Whether marked documents are computed once and reused wherever they stand.
#[derive(Clone, Debug, PartialEq)]
pub enum Chunks {
    /// They are computed where they stand.
    Off,
    /// As the model's record in this folder says, if it has one that keeps the bound.
    Measured { dir: PathBuf, bound: Bound },
    /// In any case.
    As(Reuse),
}

/// Whose arithmetic a model runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Computed {
    /// Our own.
    Weir,
    /// candle's: slower, and no keys and values are shared or found again.
    Candle,
}

impl Computed {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Weir => "weir",
            Self::Candle => "candle",
        }
    }
}

/// What a model file is.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub path: PathBuf,
    /// As the file names itself; may be empty.
    pub name: String,
    pub architecture: String,
    pub computed_by: Computed,
    pub parameters: u64,
    /// The most frequent element type of its matrices, as llama.cpp names it.
    pub quantisation: String,
    /// Longest prompt plus answer that this engine takes, in tokens.
    pub context: usize,
    pub vocabulary: usize,
    /// Bytes of packed weights in memory.
    pub weight_bytes: usize,
    /// Bytes of keys and values per token of a sequence.
    pub kv_bytes_per_token: usize,
    /// Whether marked documents are reused, how, and what that costs; or why not.
    pub chunk_reuse: String,
}

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Rendered by the model's own chat template. Only text parts are read.
    Chat(Vec<Message>),
    /// Likewise, of which the answer has begun with this text and is continued.
    Begun(Vec<Message>, String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// With documents.
    Encoded(Encoded),
}

/// A prompt's token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    /// The places of marked documents, in order.
    pub documents: Vec<Range<usize>>,
}

impl From<Vec<u32>> for Encoded {
    /// Of ids without documents.
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens, documents: Vec::new() }
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Generate {
    pub prompt: Prompt,
    pub choosing: Choosing,
    /// Longest answer in tokens; `None`: [`DEFAULT_MAX_TOKENS`], or what the context leaves if that is less.
    pub max_tokens: Option<u32>,
    pub stop: Vec<String>,
    /// Number of choices, at least 1.
    pub n: u32,
    /// Higher ones go first, each step as if it had come half a minute earlier; 0 otherwise.
    pub priority: i32,
    /// When nobody waits for the answer any more. Among what waits, the more urgent goes first; nothing is cancelled by it.
    pub deadline: Option<Instant>,
    /// Computes marked documents where they stand, and reads nothing that depends on reused ones.
    pub exact: bool,
    /// Documents are shared among requests with the same.
    pub sharing: Vec<u8>,
    /// For how long from now its documents are kept before all that is not pinned.
    pub keep: Option<Duration>,
    /// Log-probabilities with so many alternatives per token, and each token's entropy.
    pub logprobs: Option<u8>,
    /// Which tokens may come next, where not all may.
    pub mask: Option<Arc<dyn TokenMask>>,
}

/// What comes back while a request runs. The last event of a request that went right is `Usage`; one that failed ends
/// with `Failed`; one whose engine has gone ends without either.
#[derive(Clone, Debug)]
pub enum GenerateEvent {
    /// New text of a choice; never half a character, never a part of a stop string.
    Text {
        choice: u32,
        text: String,
        logprobs: Vec<TokenLogprob>,
    },
    Finish {
        choice: u32,
        reason: FinishReason,
    },
    Usage(Usage),
    Failed(EngineError),
}

/// How much an engine has to do, and how fast it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Tokens of prompts that are still to be computed, of sequences that run and of requests that wait.
    pub pending: usize,
    /// Recent rates: of computing prompts, and of each sequence that goes on. 0 before there was any.
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
}

/// A loaded model and the thread that runs it. Dropping it ends the thread; what runs is cut.
pub struct Engine {
    info: ModelInfo,
    tokenizer: Arc<Tokenizer>,
    template: Template,
    limits: Limits,
    max_waiting: usize,
    load: Arc<Load>,
    kv_cache: KvCache,
    known: prefix_cache::Known,
    chunks: ChunkCache,
    /// Or why not.
    reuse: Result<Reuse, ChunkReuse>,
    started: Instant,
    requests: Option<mpsc::Sender<Arc<sequence::Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Loads a model file and starts its thread. Blocks while it reads.
    ///
    /// # Errors
    /// Whatever is wrong with the file or the options, with what to do about it.
    pub fn load(path: &Path, options: EngineOptions) -> Result<Self, EngineError> {
        for (name, value) in [("max_sequences", options.max_sequences), ("step_tokens", options.step_tokens)] {
            if value == 0 {
                return Err(EngineError::Options(format!("{name} must be at least 1")));
            }
        }
        let file = ModelFile::open(path)?;
        let threads = if options.threads == 0 { default_threads() } else { options.threads };
        let Loaded { info, runner, blocks, limits } = Loaded::read(&file, &options, threads)?;
        let tokenizer = Arc::new(Tokenizer::read(&file, info.vocabulary)?);
        let template = Template::compile(file.text("tokenizer.chat_template")?).map_err(|e| file.unsupported(e))?;
        let (sender, requests) = mpsc::channel();
        let load = Arc::new(Load::default());
        let chunks = blocks.chunks.clone();
        let scheduler = Scheduler::new(limits, blocks);
        let known = scheduler.known();
        let (reuse, chunk_reuse) = match limits.shares {
            true => reuse(&options.chunks, known.identity(), &template, &tokenizer)?,
            false => (Err(ChunkReuse::Unsupported), "off: candle computes it".to_owned()),
        };
        let info = ModelInfo { chunk_reuse, ..info };
        let worker = Worker { requests, scheduler, runner, tokenizer: Arc::clone(&tokenizer), load: Arc::clone(&load) };
        let thread =
            std::thread::Builder::new().name("weir-engine".to_owned()).spawn(|| worker.run()).map_err(no_thread)?;
        Ok(Self {
            info,
            tokenizer,
            template,
            limits,
            max_waiting: options.max_waiting,
            load,
            kv_cache: options.kv_cache,
            known,
            chunks,
            reuse,
            started: Instant::now(),
            requests: Some(sender),
            thread: Some(thread),
        })
    }

    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Sequences that run and requests that wait, at this moment.
    pub fn load_state(&self) -> (usize, usize) {
        (self.load.running.load(Ordering::Relaxed), self.load.waiting.load(Ordering::Relaxed))
    }

    /// How long it takes here at the moment.
    pub fn pace(&self) -> Pace {
        let rate = |bits: &AtomicU64| f64::from_bits(bits.load(Ordering::Relaxed));
        Pace {
            pending: self.load.pending.load(Ordering::Relaxed) + self.load.waiting_tokens.load(Ordering::Relaxed),
            prefill_tokens_per_s: rate(&self.load.prefill_rate),
            decode_tokens_per_s: rate(&self.load.decode_rate),
        }
    }

    /// A prompt as a sequence of this model computes it.
    fn layout(&self, prompt: Encoded, exact: bool, sharing: &[u8]) -> Layout {
        match &self.reuse {
            Ok(reuse) if !exact && !prompt.documents.is_empty() => {
                Layout::new(prompt.tokens, &prompt.documents, reuse, self.known.identity(), sharing)
            }
            _ => Layout::plain(prompt.tokens),
        }
    }

    /// How many of a prompt's tokens are in memory already, so that they need not be computed if it comes now: of its beginning, and
    /// of documents, if they may be reused.
    pub fn resident(&self, prompt: &Encoded, exact: bool, sharing: &[u8]) -> usize {
        let layout = self.layout(prompt.clone(), exact, sharing);
        let own = self.known_prefix(&layout);
        let documents = layout.chunks.iter().filter(|chunk| self.known.has(chunk.key));
        own + documents.map(|chunk| chunk.attached.len()).sum::<usize>()
    }

    /// What has been computed and reused since the start.
    pub fn counters(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Load {
            prefilled,
            reused,
            attached,
            loaded,
            decoded,
            kept,
            recomputed,
            preempted,
            guessed,
            guessed_right,
            ..
        } = &*self.load;
        Counters {
            prefilled: of(prefilled),
            reused: of(reused),
            attached: of(attached),
            loaded: of(loaded),
            decoded: of(decoded),
            kept: of(kept),
            recomputed: of(recomputed),
            preempted: of(preempted),
            guessed: of(guessed),
            guessed_right: of(guessed_right),
        }
    }

    /// Whether the engine's thread lives.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// The token ids of a conversation as the model's template renders it, with the places of marked documents.
    ///
    /// # Errors
    /// [`EngineError::Template`], [`EngineError::Tokenizer`], and [`EngineError::PromptTooLong`] for text so long that it
    /// cannot fit the context whatever its tokens are.
    pub fn encode(&self, messages: &[Message]) -> Result<Encoded, EngineError> {
        let bytes: usize = messages.iter().map(|m| m.joined_text().len()).sum();
        let fewest = self.tokenizer.fewest(bytes);
        if fewest >= self.info.context {
            return Err(EngineError::PromptTooLong { prompt: fewest, exact: false, context: self.info.context });
        }
        self.template.encode(messages, &self.tokenizer)
    }

    /// The token ids of plain text, in which nothing is special.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`].
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let mut ids = Vec::new();
        self.tokenizer.encode_text(text, &mut ids)?;
        Ok(ids)
    }

    /// Queues a request. Tokenises on the calling thread (about 0.3 ms per thousand characters), then returns at once.
    /// Dropping the receiver cancels the request and frees its place.
    ///
    /// # Errors
    /// [`EngineError::BadRequest`], [`EngineError::Template`], [`EngineError::PromptTooLong`], [`EngineError::Busy`] when
    /// too many wait already, [`EngineError::Stopped`].
    pub fn generate(&self, g: Generate) -> Result<UnboundedReceiver<GenerateEvent>, EngineError> {
        self.check(&g)?;
        let prompt = match g.prompt {
            Prompt::Chat(messages) => self.encode(&messages)?,
            Prompt::Begun(messages, begun) => {
                let mut prompt = self.encode(&messages)?;
                self.template.encode_begun(&begun, &self.tokenizer, &mut prompt.tokens)?;
                prompt
            }
            Prompt::Tokens(tokens) => tokens.into(),
            Prompt::Encoded(prompt) => prompt,
        };
        if let Some(id) = prompt.tokens.iter().find(|id| **id as usize >= self.info.vocabulary) {
            return Err(EngineError::BadRequest(format!("token id {id} is not of this model's vocabulary")));
        }
        if prompt.tokens.is_empty() {
            return Err(EngineError::BadRequest("the prompt is empty".to_owned()));
        }
        let mut end = 0;
        for document in &prompt.documents {
            if document.start < end || document.end > prompt.tokens.len() || document.is_empty() {
                return Err(EngineError::BadRequest("documents of the prompt overlap or are empty".to_owned()));
            }
            end = document.end;
        }
        let (context, length) = (self.info.context, prompt.tokens.len());
        if length + 1 > context {
            return Err(EngineError::PromptTooLong { prompt: length, exact: true, context });
        }
        let left = context - length;
        let has_documents = !prompt.documents.is_empty();
        let prompt = self.layout(prompt, g.exact, &g.sharing);
        let chunk_reuse = match self.reuse {
            Err(why) => why,
            Ok(_) if g.exact => ChunkReuse::AskedExact,
            Ok(_) if prompt.chunks.is_empty() => ChunkReuse::OutOfSize,
            Ok(_) => ChunkReuse::Reused,
        };
        let (running, _) = self.load_state();
        let max_waiting = self.max_waiting;
        self.load
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max_waiting).then_some(n + 1))
            .map_err(|waiting| EngineError::Busy { running, waiting, max_waiting })?;
        let (events, receiver) = unbounded_channel();
        let request = sequence::Request {
            prompt,
            chunk_reuse: has_documents.then_some(chunk_reuse),
            choosing: g.choosing,
            max_tokens: g.max_tokens.map_or(DEFAULT_MAX_TOKENS, |n| n as usize).min(left),
            stop: g.stop,
            logprobs: g.logprobs.map(usize::from),
            mask: g.mask,
            choices: g.n,
            keep_until: g.keep.map(|keep| Instant::now() + keep),
            due: self.due(g.deadline, g.priority),
            events,
        };
        self.load.waiting_tokens.fetch_add(length, Ordering::Relaxed);
        let sender = self.requests.as_ref().ok_or(EngineError::Stopped)?;
        sender.send(Arc::new(request)).map_err(|_| EngineError::Stopped)?;
        Ok(receiver)
    }

    /// When a request that comes now is due, in milliseconds of this engine: at its deadline, or after [`PATIENCE`] if that is
    /// earlier, so that whoever waits is overtaken only by those that come soon after.
    fn due(&self, deadline: Option<Instant>, priority: i32) -> i64 {
        let now = Instant::now();
        let patience = deadline.map_or(PATIENCE, |at| at.saturating_duration_since(now).min(PATIENCE));
        let at = (now.saturating_duration_since(self.started) + patience).as_millis();
        i64::try_from(at).unwrap_or(i64::MAX) - i64::from(priority) * AHEAD_MS
    }

    fn check(&self, g: &Generate) -> Result<(), EngineError> {
        let bad = |message: String| Err(EngineError::BadRequest(message));
        let choosing = g.choosing;
        if g.n == 0 || g.n as usize > self.limits.sequences {
            return bad(format!("n is {}, and must be from 1 to {} for this model", g.n, self.limits.sequences));
        }
        if g.max_tokens == Some(0) {
            return bad("max_tokens must be at least 1".to_owned());
        }
        if !(choosing.temperature.is_finite() && choosing.temperature >= 0.0) {
            return bad(format!("temperature is {}, and must be a number of at least 0", choosing.temperature));
        }
        if !(0.0..=1.0).contains(&choosing.top_p) {
            return bad(format!("top_p is {}, and must be from 0 to 1", choosing.top_p));
        }
        if g.logprobs.is_some_and(|n| usize::from(n) > MOST_TOP_LOGPROBS) {
            return bad(format!("top_logprobs must be at most {MOST_TOP_LOGPROBS}"));
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.load.stop.store(true, Ordering::Relaxed);
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// How documents are reused, or why not; for people, too.
fn reuse(
    chunks: &Chunks,
    identity: u128,
    template: &Template,
    tokenizer: &Tokenizer,
) -> Result<(Result<Reuse, ChunkReuse>, String), EngineError> {
    let (dir, bound) = match chunks {
        Chunks::Off => return Ok((Err(ChunkReuse::Off), "off".to_owned())),
        Chunks::As(reuse) => return Ok((Ok(reuse.clone()), "on, whatever it costs".to_owned())),
        Chunks::Measured { dir, bound } => (dir, bound),
    };
    let Some((record, variant)) = FidelityRecord::read(dir, identity).map_err(EngineError::Options)? else {
        let said = "off: what it costs was never measured; `weir kv calibrate` does".to_owned();
        return Ok((Err(ChunkReuse::NoFidelityRecord), said));
    };
    let f = &record.fidelity;
    let costs = format!(
        "{} (divergence {:.4}, same best token {:.1} %, F1 {:.2} on {} questions)",
        f.variant,
        f.divergence.mean,
        100.0 * f.top1.mean,
        f.f1.mean,
        f.questions
    );
    let reuse = variant.reuse(&template.head(tokenizer)?);
    Ok(match reuse {
        Some(reuse) if bound.holds(f) => (Ok(reuse), costs),
        _ => (Err(ChunkReuse::BelowBound), format!("off: {costs} is worse than what is configured")),
    })
}

/// The cores there are, at most 4.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(4)
}

fn no_thread(error: std::io::Error) -> EngineError {
    EngineError::Options(format!("no thread could be started: {error}"))
}

#[cfg(test)]
mod tests;
