//! A folder as the Hugging Face hub has it: `config.json`, `tokenizer.json`, `tokenizer_config.json` and the weights in one or more
//! safetensors files (BF16, F16 or F32). What they say is put into GGUF's keys and names, so that all else is as with a GGUF file.
//!
//! Three things differ from llama.cpp's own conversion. The rows of queries and keys are in two halves with all architectures
//! ([`HALVES`] says so), Llama 3's scaled rotary positions are computed from their parameters here, and by what Gemma's scores are
//! scaled is said ([`SCORE_SCALE`]).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Mutex,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value as Json;

use super::{
    EngineError,
    model::config::GEMMA3_EVERY,
    model_file::{ModelFile, TensorInfo, TensorType, Value},
    ops::linear::dequantise,
};

/// The metadata key that says that the rows of queries and keys are in two halves.
pub const HALVES: &str = "weir.rope.halves";
/// The metadata key that says by the root of what scores are divided, see [`super::model::Config`].
pub const SCORE_SCALE: &str = "weir.attention.score_scale";
/// `model_type` of Gemma 3 without images.
const GEMMA3: &str = "gemma3_text";
/// No real header is longer.
const MOST_HEADER: u64 = 100 << 20;

/// What is read of `config.json`.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_size: u64,
    num_hidden_layers: u64,
    intermediate_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    max_position_embeddings: u64,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    #[serde(alias = "rope_parameters")]
    rope_scaling: Option<Rope>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    /// Of Gemma 3.
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    layer_types: Option<Vec<String>>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    #[serde(default)]
    tie_word_embeddings: bool,
    eos_token_id: Option<Json>,
    bos_token_id: Option<Json>,
}

#[derive(Clone, Deserialize)]
struct Rope {
    #[serde(alias = "type", default)]
    rope_type: String,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    /// By kind of layer.
    full_attention: Option<Box<Rope>>,
    sliding_attention: Option<Box<Rope>>,
}

/// What is read of `tokenizer.json`.
#[derive(Deserialize)]
struct TokenizerFile {
    model: TokenizerModel,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    pre_tokenizer: Json,
    #[serde(default)]
    normalizer: Json,
}

#[derive(Deserialize)]
struct TokenizerModel {
    #[serde(rename = "type", default)]
    kind: String,
    vocab: BTreeMap<String, u64>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
}

/// What is read of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<Json>,
    add_bos_token: Option<bool>,
    bos_token: Option<Json>,
    eos_token: Option<Json>,
}

/// The folder being read.
struct Folder {
    dir: PathBuf,
}

/// Reads a folder, or the folder around a file of it.
///
/// # Errors
/// [`EngineError::Io`] when a file is missing or cannot be read, [`EngineError::Corrupt`] when one is damaged,
/// [`EngineError::UnsupportedModel`] for architectures, tokenizers and element types that are not read here.
pub fn open(path: &Path) -> Result<ModelFile, EngineError> {
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let folder = Folder { dir: dir.to_owned() };
    let mut config: Config = folder.json("config.json")?;
    let gemma3 = config.model_type == GEMMA3;
    let (mut files, mut tensors) = folder.weights(gemma3)?;
    if gemma3 {
        folder.norms(&mut files, &mut tensors)?;
    }
    // Gemma 3's rotary embeddings by kind of layer.
    if let Some(Rope { full_attention, sliding_attention, .. }) = &config.rope_scaling
        && (full_attention.is_some() || sliding_attention.is_some())
    {
        let (Some(full), Some(local)) = (full_attention.clone(), sliding_attention.clone()) else {
            return Err(folder.corrupt("config.json", "`rope_parameters` has one kind of layer and not the other"));
        };
        config.rope_local_base_freq = local.rope_theta.or(config.rope_local_base_freq);
        config.rope_scaling = Some(*full);
    }
    let mut metadata = folder.metadata(&config)?;
    if let Some(factors) = folder.rotary(&config, &mut metadata)? {
        let bytes: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        let info = TensorInfo {
            kind: TensorType::F32,
            dimensions: vec![factors.len() as u64],
            file: usize::MAX,
            offset: 0,
            bytes: bytes.len() as u64,
            made: Some(bytes),
        };
        tensors.insert("rope_freqs.weight".to_owned(), info);
    }
    if config.tie_word_embeddings {
        tensors.remove("output.weight");
    }
    let rows = tensors.get("token_embd.weight").and_then(|info| info.dimensions.get(1)).copied();
    let rows = rows.ok_or_else(|| folder.corrupt("config.json", "there is no tensor `model.embed_tokens.weight`"))?;
    folder.tokenizer(&config, rows, &mut metadata)?;
    Ok(ModelFile { path: dir.to_owned(), files, read: Mutex::default(), metadata, tensors })
}

impl Folder {
    fn corrupt(&self, file: &str, reason: impl Into<String>) -> EngineError {
        EngineError::Corrupt { path: self.dir.join(file), reason: reason.into() }
    }

    fn unsupported(&self, reason: impl Into<String>) -> EngineError {
        EngineError::UnsupportedModel { path: self.dir.clone(), reason: reason.into() }
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, EngineError> {
        let path = self.dir.join(name);
        let bytes = std::fs::read(&path).map_err(|e| EngineError::io(&path, &e))?;
        serde_json::from_slice(&bytes).map_err(|e| self.corrupt(name, e.to_string()))
    }

    /// The safetensors files, and where each tensor is.
    fn weights(&self, gemma3: bool) -> Result<(Vec<File>, BTreeMap<String, TensorInfo>), EngineError> {
        let failed = |e: std::io::Error| EngineError::io(&self.dir, &e);
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&self.dir)
            .map_err(failed)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        paths.sort();
        if paths.is_empty() {
            return Err(self.corrupt("", "it holds no file `*.safetensors`"));
        }
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for path in paths {
            let mut file = File::open(&path).map_err(|e| EngineError::io(&path, &e))?;
            self.header(&path, &mut file, files.len(), gemma3, &mut tensors)?;
            files.push(file);
        }
        Ok((files, tensors))
    }

    /// Adds the tensors of one file.
    fn header(
        &self,
        path: &Path,
        file: &mut File,
        index: usize,
        gemma3: bool,
        tensors: &mut BTreeMap<String, TensorInfo>,
    ) -> Result<(), EngineError> {
        let io = |e: std::io::Error| EngineError::io(path, &e);
        let corrupt = |reason: String| EngineError::Corrupt { path: path.to_owned(), reason };
        let whole = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MOST_HEADER || length + 8 > whole {
            return Err(corrupt(format!("its header is said to have {length} bytes, and the file has {whole}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: safetensors::tensor::Metadata =
            serde_json::from_slice(&header).map_err(|e| corrupt(format!("its header is wrong: {e}")))?;
        for (name, info) in metadata.tensors() {
            let Some(name) = gguf_name(&name, gemma3) else {
                return Err(
                    self.unsupported(format!("it has a tensor `{name}`, which its architecture does not have here"))
                );
            };
            let kind = match info.dtype {
                safetensors::Dtype::F32 => TensorType::F32,
                safetensors::Dtype::F16 => TensorType::F16,
                safetensors::Dtype::BF16 => TensorType::Bf16,
                other => return Err(self.unsupported(format!("tensor `{name}` has the element type {other:?}"))),
            };
            let place = |offset: usize| (offset as u64).saturating_add(8 + length);
            let (begin, end) = (place(info.data_offsets.0), place(info.data_offsets.1));
            if end > whole {
                return Err(corrupt(format!(
                    "tensor `{name}` should end at byte {end}, but the file has {whole} bytes: it is cut short"
                )));
            }
            let info = TensorInfo {
                kind,
                dimensions: info.shape.iter().rev().map(|n| *n as u64).collect(),
                file: index,
                offset: begin,
                bytes: end.saturating_sub(begin),
                made: None,
            };
            let elements = info.dimensions.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
            if elements.and_then(|n| n.checked_mul(info.kind.block().1)) != end.checked_sub(begin) {
                return Err(corrupt(format!("tensor `{name}` has the shape {:?} and other bytes", info.dimensions)));
            }
            tensors.insert(name, info);
        }
        Ok(())
    }

    /// Weights of Gemma's norms with the one that is added to them, as GGUF files have them.
    fn norms(&self, files: &mut [File], tensors: &mut BTreeMap<String, TensorInfo>) -> Result<(), EngineError> {
        for (name, info) in tensors.iter_mut().filter(|(name, _)| name.ends_with("norm.weight")) {
            let Some(file) = files.get_mut(info.file) else { continue };
            let mut raw = vec![0; info.bytes as usize];
            let read = file.seek(SeekFrom::Start(info.offset)).and_then(|_| file.read_exact(&mut raw));
            read.map_err(|e| EngineError::io(&self.dir, &e))?;
            let values = dequantise(info.kind, &raw, info.elements() as usize)
                .map_err(|e| self.corrupt("", format!("tensor `{name}` cannot be decoded: {e}")))?;
            let made: Vec<u8> = values.iter().flat_map(|v| (v + 1.0).to_le_bytes()).collect();
            let bytes = made.len() as u64;
            *info = TensorInfo {
                kind: TensorType::F32,
                file: usize::MAX,
                offset: 0,
                bytes,
                made: Some(made),
                ..info.clone()
            };
        }
        Ok(())
    }

    /// The model's sizes.
    fn metadata(&self, config: &Config) -> Result<BTreeMap<String, Value>, EngineError> {
        let architecture = match config.model_type.as_str() {
            "llama" | "mistral" => "llama",
            known @ ("qwen2" | "qwen3") => known,
            GEMMA3 => "gemma3",
            other => {
                return Err(self.unsupported(format!(
                    "its `model_type` is `{other}`, and there are llama, mistral, qwen2, qwen3, {GEMMA3}"
                )));
            }
        };
        if config.attn_logit_softcapping.or(config.final_logit_softcapping).is_some() {
            return Err(self.unsupported("its logits are capped"));
        }
        let mut out = BTreeMap::new();
        let name = self.dir.file_name().map(|name| name.to_string_lossy().into_owned());
        out.insert("general.architecture".to_owned(), Value::Text(architecture.to_owned()));
        out.insert("general.name".to_owned(), Value::Text(name.unwrap_or_default()));
        out.insert(HALVES.to_owned(), Value::Bool(true));
        let window = config.sliding_window.filter(|_| config.use_sliding_window != Some(false));
        for (key, value) in [
            ("embedding_length", Some(config.hidden_size)),
            ("block_count", Some(config.num_hidden_layers)),
            ("feed_forward_length", Some(config.intermediate_size)),
            ("context_length", Some(config.max_position_embeddings)),
            ("attention.head_count", Some(config.num_attention_heads)),
            ("attention.head_count_kv", config.num_key_value_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("attention.sliding_window", window),
        ] {
            if let Some(value) = value {
                out.insert(format!("{architecture}.{key}"), Value::Unsigned(value));
            }
        }
        let theta = config.rope_theta.or(config.rope_scaling.as_ref().and_then(|rope| rope.rope_theta));
        out.insert(format!("{architecture}.rope.freq_base"), Value::Float(theta.unwrap_or(10_000.0)));
        out.insert(format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::Float(config.rms_norm_eps));
        if architecture == "gemma3" {
            let every =
                |(i, kind): (usize, &String)| (kind == "full_attention") == (i + 1).is_multiple_of(GEMMA3_EVERY);
            if !config.layer_types.iter().flatten().enumerate().all(every) {
                return Err(self.unsupported("its `layer_types` are not five local ones and one that is not, by turns"));
            }
            let base = config.rope_local_base_freq.unwrap_or(10_000.0);
            out.insert(format!("{architecture}.rope.local_freq_base"), Value::Float(base));
            if let Some(scale) = config.query_pre_attn_scalar {
                out.insert(SCORE_SCALE.to_owned(), Value::Float(scale));
            }
        }
        Ok(out)
    }

    /// The rotary positions' scaling: linear as metadata, Llama 3's as factors by which frequencies are divided.
    fn rotary(&self, config: &Config, metadata: &mut BTreeMap<String, Value>) -> Result<Option<Vec<f32>>, EngineError> {
        let Some(rope) = &config.rope_scaling else { return Ok(None) };
        let need = |name: &str, value: Option<f64>| {
            value
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| self.corrupt("config.json", format!("`rope_scaling.{name}` is missing or not above 0")))
        };
        match rope.rope_type.as_str() {
            "" | "default" => Ok(None),
            "linear" => {
                let key = |rest: &str| match metadata.get("general.architecture") {
                    Some(Value::Text(architecture)) => format!("{architecture}.rope.scaling.{rest}"),
                    _ => String::new(),
                };
                let (kind, factor) = (key("type"), key("factor"));
                metadata.insert(kind, Value::Text("linear".to_owned()));
                metadata.insert(factor, Value::Float(need("factor", rope.factor)?));
                Ok(None)
            }
            "llama3" => {
                let factor = need("factor", rope.factor)?;
                let low = need("low_freq_factor", rope.low_freq_factor)?;
                let high = need("high_freq_factor", rope.high_freq_factor)?;
                let trained = need("original_max_position_embeddings", rope.original_max_position_embeddings)?;
                let head = config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads.max(1));
                let theta = config.rope_theta.or(rope.rope_theta).unwrap_or(10_000.0);
                // Dubey et al. 2024: wavelengths beyond the trained context are stretched, short ones stay, between them the
                // two are mixed.
                let of = |i: u64| {
                    let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head as f64);
                    let turns = trained / wavelength;
                    let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 / ((1.0 - share) / factor + share)) as f32
                };
                Ok(Some((0..head / 2).map(of).collect()))
            }
            other => Err(self.unsupported(format!("its rotary embedding is scaled by `{other}`"))),
        }
    }

    /// The vocabulary, filled up to the embedding's rows, and the chat template.
    fn tokenizer(&self, config: &Config, rows: u64, metadata: &mut BTreeMap<String, Value>) -> Result<(), EngineError> {
        let file: TokenizerFile = self.json("tokenizer.json")?;
        let settings: TokenizerConfig = match self.dir.join("tokenizer_config.json").exists() {
            true => self.json("tokenizer_config.json")?,
            false => TokenizerConfig::default(),
        };
        if file.model.kind != "BPE" && !file.model.kind.is_empty() {
            return Err(self.unsupported(format!("its tokenizer is of the kind `{}`, not BPE", file.model.kind)));
        }
        let wrong = |reason: String| self.corrupt("tokenizer.json", reason);
        let mut tokens: Vec<Option<String>> = vec![None; rows as usize];
        let mut types = vec![UNUSED; rows as usize];
        let added =
            file.added_tokens.iter().map(|t| (&t.content, t.id, if t.special { CONTROL } else { USER_DEFINED }));
        let plain = file.model.vocab.iter().map(|(content, id)| (content, *id, NORMAL));
        for (content, id, kind) in plain.chain(added) {
            let Some(place) = tokens.get_mut(id as usize) else {
                return Err(wrong(format!("token `{content}` has the id {id}, and the embedding has {rows} rows")));
            };
            *place = Some(content.clone());
            let byte = file.model.byte_fallback && content.len() == 6 && content.starts_with("<0x");
            let unknown = file.model.unk_token.as_ref() == Some(content);
            types[id as usize] = match (byte, unknown) {
                (true, _) => BYTE,
                (_, true) => UNKNOWN,
                _ => kind,
            };
        }
        let merges: Vec<(String, String)> = file
            .model
            .merges
            .into_iter()
            .filter_map(|merge| match merge {
                Merge::Pair(a, b) => Some((a, b)),
                Merge::Text(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
            })
            .collect();
        let mut set = |key: &str, value: Value| _ = metadata.insert(format!("tokenizer.{key}"), value);
        if file.model.byte_fallback {
            // The order of merges is that of SentencePiece's scores.
            let mut scores = vec![0.0; rows as usize];
            for (n, (a, b)) in merges.iter().enumerate().rev() {
                if let Some(id) = file.model.vocab.get(&format!("{a}{b}")) {
                    scores[*id as usize] = -(n as f64) - 1.0;
                }
            }
            set("ggml.model", Value::Text("llama".to_owned()));
            set("ggml.scores", Value::List(scores.into_iter().map(Value::Float).collect()));
            set("ggml.add_space_prefix", Value::Bool(prefixed(&file.normalizer, &file.pre_tokenizer)));
        } else {
            let pre = splitting(&file.pre_tokenizer).map_err(|reason| self.unsupported(reason))?;
            set("ggml.model", Value::Text("gpt2".to_owned()));
            set("ggml.pre", Value::Text(pre.to_owned()));
            set("ggml.merges", Value::List(merges.iter().map(|(a, b)| Value::Text(format!("{a} {b}"))).collect()));
        }
        let id = |content: &Option<Json>| {
            let text = match content {
                Some(Json::String(text)) => text.as_str(),
                Some(Json::Object(token)) => token.get("content")?.as_str()?,
                _ => return None,
            };
            tokens.iter().position(|token| token.as_deref() == Some(text)).map(|id| id as u64)
        };
        let first = |ids: &Option<Json>| match ids {
            Some(Json::Array(ids)) => ids.iter().find_map(Json::as_u64),
            Some(id) => id.as_u64(),
            None => None,
        };
        if let Some(bos) = id(&settings.bos_token).or(first(&config.bos_token_id)) {
            set("ggml.bos_token_id", Value::Unsigned(bos));
        }
        if let Some(eos) = id(&settings.eos_token).or(first(&config.eos_token_id)) {
            set("ggml.eos_token_id", Value::Unsigned(eos));
        }
        if let Some(add) = settings.add_bos_token {
            set("ggml.add_bos_token", Value::Bool(add));
        }
        let template = match &settings.chat_template {
            Some(Json::String(template)) => Some(template.clone()),
            // Several by name: the default one.
            Some(Json::Array(named)) => named
                .iter()
                .find(|entry| entry["name"] == "default")
                .and_then(|entry| Some(entry["template"].as_str()?.to_owned())),
            _ => std::fs::read_to_string(self.dir.join("chat_template.jinja")).ok(),
        };
        if let Some(template) = template {
            set("chat_template", Value::Text(template));
        }
        let name =
            |(id, token): (usize, Option<String>)| Value::Text(token.unwrap_or_else(|| format!("[unused {id}]")));
        set("ggml.tokens", Value::List(tokens.into_iter().enumerate().map(name).collect()));
        set("ggml.token_type", Value::List(types.into_iter().map(Value::Unsigned).collect()));
        Ok(())
    }
}

/// GGUF's kinds of tokens.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// What GGUF calls a tensor; `None` for what its architectures do not have.
fn gguf_name(name: &str, gemma3: bool) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, end) = rest.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if gemma3 => "post_attention_norm",
        "pre_feedforward_layernorm" if gemma3 => "ffn_norm",
        "post_feedforward_layernorm" if gemma3 => "post_ffw_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    layer.parse::<u32>().ok()?;
    Some(format!("blk.{layer}.{part}.{end}"))
}

/// Whether a SentencePiece vocabulary puts a space before a text.
fn prefixed(normalizer: &Json, pre_tokenizer: &Json) -> bool {
    let space = pre_tokenizer.to_string();
    let by_splitting = space.contains("\"Metaspace\"")
        && !space.contains("\"prepend_scheme\":\"never\"")
        && !space.contains("\"add_prefix_space\":false");
    normalizer.to_string().contains("\"Prepend\"") || by_splitting
}

/// How text is cut into words, by the name that llama.cpp gives it, recognised by what the pre-tokenizer's parts say.
fn splitting(pre: &Json) -> Result<&'static str, String> {
    let said = pre.to_string();
    if said.contains("\\\\p{N}{1,3}") {
        Ok("llama-bpe")
    } else if said.contains("\\\\p{N}|") {
        Ok("qwen2")
    } else if said.contains("\"Digits\"") && said.contains("\"ByteLevel\"") {
        Ok("smollm")
    } else if said.contains("\"ByteLevel\"") && !said.contains("\"Split\"") {
        Ok("gpt-2")
    } else {
        Err(format!("its tokenizer splits text in a way that is not known here: {said}"))
    }
}

#[cfg(test)]
mod tests;
