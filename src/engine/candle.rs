//! Architectures that our own forward pass does not have, computed by `candle-transformers` behind the same handle.
//!
//! Each sequence goes through the model by itself, and candle keeps its keys and values: none are shared between sequences, and
//! none are found again by a later one. The scheduler counts them in blocks as it does elsewhere, so that requests wait, give
//! way and are computed again by the same rules. Weights are shared by all sequences.
//!
//! Only what has been compared with PyTorch's `transformers` is in the list ([`ARCHITECTURES`]); candle 0.11 has more, some of
//! which compute another model than the file holds (its Gemma 3 from GGUF has the gate of Llama).

use std::collections::HashMap;

use candle_core::{
    Device, Tensor,
    quantized::gguf_file::{Content, Value},
};
use candle_transformers::models::{quantized_phi, quantized_phi3};

use super::{
    EngineError,
    model_file::ModelFile,
    scheduler::{Part, Scheduler},
};

/// What runs here, as GGUF files name it: Phi 1, 1.5 and 2, and Phi 3 up to 4096 tokens.
pub const ARCHITECTURES: [&str; 2] = ["phi2", "phi3"];

/// candle's tables of rotary angles for Phi 2 end there, and its base is not read from the file.
const PHI2_CONTEXT: u64 = 4096;
const ROPE_BASE: f64 = 10_000.0;

/// What a file says about its model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub name: String,
    pub architecture: &'static str,
    pub context: usize,
    pub vocabulary: usize,
    pub layers: usize,
    /// Elements of the keys of one position and layer, which are f32.
    pub keys: usize,
}

impl Config {
    /// `None` where the file's architecture is not one of [`ARCHITECTURES`].
    ///
    /// # Errors
    /// [`EngineError::UnsupportedModel`] for what candle would compute wrong, [`EngineError::Corrupt`] for metadata that is
    /// missing or makes no sense.
    pub fn read(file: &ModelFile) -> Result<Option<Self>, EngineError> {
        let named = file.text("general.architecture")?;
        let Some(architecture) = ARCHITECTURES.into_iter().find(|known| Some(*known) == named) else {
            return Ok(None);
        };
        let key = |rest: &str| format!("{architecture}.{rest}");
        let size = |rest: &str| -> Result<usize, EngineError> {
            match file.need_u64(&key(rest))? {
                n @ 1..=0xff_ffff => Ok(n as usize),
                n => Err(file.corrupt(format!("metadata `{}` is {n}", key(rest)))),
            }
        };
        let (hidden, layers, heads) = (size("embedding_length")?, size("block_count")?, size("attention.head_count")?);
        let keys = size("attention.head_count_kv")?;
        let rotated = size("rope.dimension_count")?;
        if heads % keys != 0 || hidden % heads != 0 {
            return Err(file.corrupt(format!("{heads} heads over {keys} key heads and {hidden} elements")));
        }
        let head = hidden / heads;
        if file.text(&key("rope.scaling.type"))?.is_some_and(|kind| kind != "none")
            || file.tensors.keys().any(|name| name.starts_with("rope_factors"))
        {
            return Err(file.unsupported("its rotary embedding is scaled, which candle does otherwise than the model"));
        }
        if file.f64(&key("rope.freq_base"))?.is_some_and(|base| base != ROPE_BASE) {
            return Err(file.unsupported(format!("the base of its rotary embedding is not {ROPE_BASE}")));
        }
        let most = match architecture {
            "phi2" if keys != heads => return Err(file.unsupported("it has fewer key heads than heads")),
            "phi3" if rotated != head => return Err(file.unsupported("only a part of each head is rotated")),
            "phi2" => PHI2_CONTEXT,
            // Up to its window it is like any other.
            _ => file.u64(&key("attention.sliding_window"))?.filter(|n| *n > 0).unwrap_or(u64::MAX),
        };
        let vocabulary = match file.tensors.get("token_embd.weight").map(|info| &info.dimensions[..]) {
            Some([columns, rows]) if *columns == hidden as u64 && *rows <= 1 << 24 => *rows as usize,
            other => return Err(file.corrupt(format!("tensor `token_embd.weight` has the shape {other:?}"))),
        };
        Ok(Some(Self {
            name: file.text("general.name")?.unwrap_or_default().to_owned(),
            architecture,
            context: size("context_length")?.min(usize::try_from(most).unwrap_or(usize::MAX)),
            vocabulary,
            layers,
            keys: keys * head,
        }))
    }

    /// Bytes of keys and values per token.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.layers * self.keys * size_of::<f32>()
    }
}

/// The weights, shared by clones, with the keys and values of one sequence.
#[derive(Clone)]
enum Model {
    Phi2(quantized_phi::ModelWeights),
    Phi3(quantized_phi3::ModelWeights),
}

impl Model {
    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Vec<f32>, candle_core::Error> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Phi2(model) => model.forward(&tokens, position)?,
            Self::Phi3(model) => model.forward(&tokens, position)?,
        };
        logits.flatten_all()?.to_vec1()
    }
}

struct State {
    model: Model,
    /// Positions in its cache.
    length: usize,
}

/// A model with the threads that it runs on and the sequences under way.
pub struct CandleModel {
    /// Of no sequence.
    fresh: Model,
    states: HashMap<(u64, u32), State>,
    pool: rayon::ThreadPool,
    vocabulary: usize,
    logits: Vec<f32>,
}

impl CandleModel {
    /// Reads the weights; sequences may be `context` tokens long.
    ///
    /// # Errors
    /// [`EngineError::UnsupportedModel`] for safetensors, [`EngineError::Corrupt`] for tensors that are missing or of another shape,
    /// [`EngineError::Options`] when no threads can be started.
    pub fn load(file: &ModelFile, config: &Config, context: usize, threads: usize) -> Result<Self, EngineError> {
        let [weights] = file.files() else {
            return Err(file.unsupported("models that candle runs are read from one GGUF file"));
        };
        let mut reader = std::io::BufReader::new(weights);
        let failed = |e: candle_core::Error| file.corrupt(format!("candle cannot read it: {}", reason(&e)));
        // Our own reader has been through the header, and found every tensor within the file.
        std::io::Seek::rewind(&mut reader).map_err(|e| EngineError::io(file.path(), &e))?;
        let mut content = Content::read(&mut reader).map_err(failed)?;
        content.metadata.values_mut().for_each(|value| {
            // It takes sizes of 32 bits only.
            if let Value::U64(n) = value
                && let Ok(n) = u32::try_from(*n)
            {
                *value = Value::U32(n);
            }
        });
        // candle makes tables, and the caches of each sequence, of this length.
        content.metadata.insert(format!("{}.context_length", config.architecture), Value::U32(context as u32));
        let device = Device::Cpu;
        let fresh = match config.architecture {
            "phi2" => quantized_phi::ModelWeights::from_gguf(content, &mut reader, &device).map(Model::Phi2),
            _ => quantized_phi3::ModelWeights::from_gguf(false, content, &mut reader, &device).map(Model::Phi3),
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("weir-candle-{i}"))
            .build()
            .map_err(|e| EngineError::Options(format!("no thread could be started: {e}")))?;
        Ok(Self {
            fresh: fresh.map_err(failed)?,
            states: HashMap::new(),
            pool,
            vocabulary: config.vocabulary,
            logits: Vec::new(),
        })
    }

    /// Computes the parts, one after the other; logits of those that sample are kept, in order.
    ///
    /// # Errors
    /// [`EngineError::Candle`] when candle cannot.
    pub fn run(&mut self, scheduler: &mut Scheduler, parts: &[Part]) -> Result<(), EngineError> {
        self.logits.clear();
        for part in parts {
            let sequence = &mut scheduler.running[part.sequence];
            let begin = sequence.kv.len();
            let state = self.states.entry((sequence.ticket, sequence.choice));
            let state = state.or_insert_with(|| State { model: self.fresh.clone(), length: 0 });
            if state.length != begin {
                *state = State { model: self.fresh.clone(), length: 0 };
            }
            let tokens = &sequence.tokens()[state.length..begin + part.count];
            let logits = self.pool.install(|| state.model.forward(tokens, state.length));
            state.length += tokens.len();
            sequence.kv.reserve(part.count);
            let logits = logits.map_err(|e| EngineError::Candle(reason(&e)))?;
            if logits.len() != self.vocabulary {
                return Err(EngineError::Candle(format!("{} logits instead of {}", logits.len(), self.vocabulary)));
            }
            if part.samples {
                self.logits.extend_from_slice(&logits);
            }
        }
        Ok(())
    }

    /// Lets go of sequences that run no more.
    pub fn keep_running(&mut self, scheduler: &Scheduler) {
        self.states.retain(|key, _| scheduler.running.iter().any(|s| (s.ticket, s.choice) == *key));
    }

    /// The n-th logits.
    pub fn logits(&self, n: usize) -> &[f32] {
        &self.logits[n * self.vocabulary..][..self.vocabulary]
    }
}

/// What candle says, without the backtrace that it may add.
fn reason(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
