//! The architecture, sizes and constants of a model, read from GGUF metadata and checked for sense.

use crate::engine::{
    EngineError, candle,
    model_file::ModelFile,
    ops::{attention::Heads, block_pool::BlockPool, number::Element},
    safetensors,
};

/// What the forward pass knows. They differ in little: see [`super::llama`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, TinyLlama, Mistral.
    Llama,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: queries and keys are normalised head by head.
    Qwen3,
    /// Gemma 3 (text): as Qwen 3; five of six layers see a window only and have rotary angles of their own, blocks are normalised
    /// behind, too, the gate is GELU, embeddings are scaled by the root of their size.
    Gemma3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// As GGUF files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
        }
    }

    /// Whether query and key rows of GGUF files are in two halves, see [`Config::in_halves`].
    fn in_halves(self) -> bool {
        self != Self::Llama
    }
}

/// A model's sizes. All are above zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub name: String,
    pub architecture: Architecture,
    pub hidden: usize,
    pub layers: usize,
    pub feed_forward: usize,
    pub heads: Heads,
    pub vocabulary: usize,
    /// Longest sequence that the model was trained for, in tokens.
    pub context: usize,
    pub rms_epsilon: f32,
    pub rope_base: f64,
    /// Positions are divided by it (linear scaling); 1 without.
    pub rope_scale: f64,
    /// Of layers that see a window only.
    pub local: Option<Local>,
    /// Scores are divided by the root of it: a head's size, in most models.
    pub score_scale: f64,
    /// Whether the file's query and key rows are in two halves, of which the i-th of each are a pair that is rotated. In others
    /// the two of a pair are neighbours.
    pub in_halves: bool,
    /// What keys and values are kept as: f16, unless [`super::Llama::load`] is asked for the reference.
    pub kv: Element,
}

/// Layers whose attention is local, as in Gemma 3 (Gemma Team 2025, section 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Local {
    /// Positions that a query sees, its own included.
    pub window: usize,
    /// Of that many neighbouring layers, the last one sees everything.
    pub every: usize,
    pub rope_base: f64,
}

impl Local {
    /// Whether the layer is one of them.
    pub fn has(&self, layer: usize) -> bool {
        !(layer + 1).is_multiple_of(self.every)
    }
}

/// Gemma 3's pattern, and the base of its local layers' angles, neither of which GGUF files name.
pub(in crate::engine) const GEMMA3_EVERY: usize = 6;
const GEMMA3_LOCAL_BASE: f64 = 10_000.0;
/// The one Gemma 3 whose scores are not scaled by the size of a head, told by its layers (27B).
const GEMMA3_27B_LAYERS: usize = 62;

/// No real model comes near; a damaged file may.
const MOST: u64 = 1 << 24;

impl Config {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`EngineError::UnsupportedModel`] for other architectures and features, [`EngineError::Corrupt`] for metadata
    /// that is missing or makes no sense.
    pub fn read(file: &ModelFile) -> Result<Self, EngineError> {
        let architecture = file
            .text("general.architecture")?
            .ok_or_else(|| file.corrupt("metadata `general.architecture` is missing"))?;
        let known = Architecture::ALL.into_iter().find(|known| known.name() == architecture);
        let Some(architecture) = known else {
            let names = Architecture::ALL.map(Architecture::name).join(", ");
            let foreign = candle::ARCHITECTURES.join(", ");
            return Err(file.unsupported(format!(
                "its architecture is `{architecture}`, and there are {names}, and through candle {foreign}"
            )));
        };
        let key = |rest: &str| format!("{}.{rest}", architecture.name());
        if file.u64(&key("expert_count"))?.is_some_and(|n| n > 0) {
            return Err(file.unsupported("it is a mixture of experts"));
        }
        let size = |rest: &str| -> Result<usize, EngineError> {
            let key = key(rest);
            match file.need_u64(&key)? {
                n if n == 0 || n > MOST => Err(file.corrupt(format!("metadata `{key}` is {n}"))),
                n => Ok(n as usize),
            }
        };
        let hidden = size("embedding_length")?;
        let layers = size("block_count")?;
        let feed_forward = size("feed_forward_length")?;
        // Beyond its window a model that slides one sees less than all; up to there it is like any other.
        let window = file.u64(&key("attention.sliding_window"))?.filter(|n| *n > 0).unwrap_or(u64::MAX);
        let window = usize::try_from(window).unwrap_or(usize::MAX);
        let trained = size("context_length")?;
        let (context, local) = match architecture {
            Architecture::Gemma3 => {
                let rope_base = file.f64(&key("rope.local_freq_base"))?.unwrap_or(GEMMA3_LOCAL_BASE);
                (trained, Some(Local { window, every: GEMMA3_EVERY, rope_base }))
            }
            _ => (trained.min(window), None),
        };
        let queries = size("attention.head_count")?;
        let keys = match file.u64(&key("attention.head_count_kv"))? {
            Some(_) => size("attention.head_count_kv")?,
            None => queries,
        };
        let head = match file.u64(&key("attention.key_length"))? {
            Some(_) => size("attention.key_length")?,
            None => hidden / queries,
        };
        let value_head = file.u64(&key("attention.value_length"))?.unwrap_or(head as u64);
        if value_head != head as u64 {
            return Err(file.unsupported(format!("its keys have {head} elements and its values {value_head}")));
        }
        if queries % keys != 0 || head == 0 {
            return Err(file.corrupt(format!("{queries} heads over {keys} key heads of {head} elements")));
        }
        if head % 16 != 0 {
            return Err(file.unsupported(format!("its heads have {head} elements, not a multiple of 16")));
        }
        if file.u64(&key("rope.dimension_count"))?.is_some_and(|n| n != head as u64) {
            return Err(file.unsupported("only a part of each head is rotated"));
        }
        let rope_scale = match file.text(&key("rope.scaling.type"))? {
            None | Some("none") => 1.0,
            Some("linear") => file.f64(&key("rope.scaling.factor"))?.unwrap_or(1.0),
            Some(other) => return Err(file.unsupported(format!("its rotary embedding is scaled by `{other}`"))),
        };
        let rope_base = file.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let rms_epsilon = file.f64(&key("attention.layer_norm_rms_epsilon"))?.ok_or_else(|| {
            file.corrupt(format!("metadata `{}` is missing", key("attention.layer_norm_rms_epsilon")))
        })?;
        let score_scale = match (architecture, file.f64(safetensors::SCORE_SCALE)?) {
            (Architecture::Gemma3, Some(scale)) if scale > 0.0 => scale,
            (Architecture::Gemma3, Some(scale)) => {
                return Err(file.corrupt(format!("its scores are scaled by the root of {scale}")));
            }
            (Architecture::Gemma3, None) if layers == GEMMA3_27B_LAYERS => hidden as f64 / queries as f64,
            _ => head as f64,
        };
        if local.is_some_and(|local| local.rope_base <= 0.0)
            || rope_base <= 0.0
            || rope_scale <= 0.0
            || rms_epsilon < 0.0
        {
            return Err(file.corrupt(format!(
                "rotary base {rope_base}, its scale {rope_scale} or the norms' epsilon {rms_epsilon} is out of range"
            )));
        }
        let embedding = file
            .tensors
            .get("token_embd.weight")
            .ok_or_else(|| file.corrupt("tensor `token_embd.weight` is missing"))?;
        let vocabulary = match embedding.dimensions[..] {
            [columns, rows] if columns == hidden as u64 && rows <= MOST => rows as usize,
            _ => {
                return Err(file.corrupt(format!(
                    "tensor `token_embd.weight` has the shape {:?}, whose first size should be {hidden}",
                    embedding.dimensions
                )));
            }
        };
        Ok(Self {
            name: file.text("general.name")?.unwrap_or_default().to_owned(),
            architecture,
            hidden,
            layers,
            feed_forward,
            heads: Heads { queries, keys, size: head },
            vocabulary,
            context,
            rms_epsilon: rms_epsilon as f32,
            rope_base,
            rope_scale,
            local,
            score_scale,
            in_halves: file.bool(safetensors::HALVES)?.unwrap_or(architecture.in_halves()),
            kv: Element::F16,
        })
    }

    /// Numbers of a block of keys and values.
    pub fn block_elements(&self) -> usize {
        self.heads.layer_elements() * self.layers
    }

    /// A pool of blocks for keys and values of this model, of its own.
    pub fn block_pool(&self) -> BlockPool {
        BlockPool::new(self.block_elements(), self.kv)
    }

    /// Bytes of keys and values per token.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.layers * self.heads.keys * self.heads.size * self.kv.bytes()
    }
}
