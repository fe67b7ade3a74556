//! For tests only: a writer of GGUF files, a tiny llama with random weights, and its forward pass in f64 written as
//! plainly as possible.

use std::path::{Path, PathBuf};

use half::f16;

use super::model_file::{ModelFile, TensorType, Value};

/// Reproducible draws: xorshift (Marsaglia, 2003). The state is not zero.
pub struct Rng(pub u64);

impl Rng {
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() >> 11) as usize % n
    }
}

/// `n` reproducible numbers between -1 and 1.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1);
    let mut rng = Rng(state);
    (0..n).map(|_| (rng.draw() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// Q4_0 blocks as llama.cpp writes them.
pub fn quantise_q4_0(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    for block in values.chunks_exact(32) {
        let most = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        let d = f16::from_f32(most / -8.0);
        let q = |x: f32| if d.to_f32() == 0.0 { 8 } else { (x / d.to_f32() + 8.5).clamp(0.0, 15.0) as u8 };
        out.extend(d.to_le_bytes());
        out.extend((0..16).map(|i| q(block[i]) | q(block[i + 16]) << 4));
    }
    out
}

/// Q4_1 blocks.
pub fn quantise_q4_1(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    for block in values.chunks_exact(32) {
        let least = block.iter().copied().fold(f32::INFINITY, f32::min);
        let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (d, m) = (f16::from_f32((most - least) / 15.0), f16::from_f32(least));
        let q = |x: f32| {
            if d.to_f32() == 0.0 { 0 } else { ((x - m.to_f32()) / d.to_f32() + 0.5).clamp(0.0, 15.0) as u8 }
        };
        out.extend(d.to_le_bytes());
        out.extend(m.to_le_bytes());
        out.extend((0..16).map(|i| q(block[i]) | q(block[i + 16]) << 4));
    }
    out
}

/// Q8_0 blocks.
pub fn quantise_q8_0(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    for block in values.chunks_exact(32) {
        let most = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let d = f16::from_f32(most / 127.0);
        out.extend(d.to_le_bytes());
        out.extend(
            block
                .iter()
                .map(|x| if d.to_f32() == 0.0 { 0 } else { (x / d.to_f32()).round().clamp(-127.0, 127.0) as i8 as u8 }),
        );
    }
    out
}

/// A GGUF file being put together.
#[derive(Clone, Default)]
pub struct Writer {
    pub metadata: Vec<(String, Value)>,
    /// Name, type code, dimensions (innermost first), bytes.
    pub tensors: Vec<(String, u32, Vec<u64>, Vec<u8>)>,
}

impl Writer {
    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub fn tensor(&mut self, name: &str, kind: TensorType, dimensions: &[u64], values: &[f32]) {
        let (code, bytes) = match kind {
            TensorType::F32 => (0, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            TensorType::Q4_0 => (2, quantise_q4_0(values)),
            TensorType::Q4_1 => (3, quantise_q4_1(values)),
            TensorType::Q8_0 => (8, quantise_q8_0(values)),
            other => panic!("no writer for {other:?}"),
        };
        self.tensors.push((name.to_owned(), code, dimensions.to_vec(), bytes));
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            out.extend(code(value).to_le_bytes());
            put(&mut out, value);
        }
        let mut offset = 0u64;
        for (name, kind, dimensions, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).div_ceil(32) * 32;
        }
        out.resize(out.len().div_ceil(32) * 32, 0);
        for (_, _, _, bytes) in &self.tensors {
            out.extend(bytes);
            out.resize(out.len().div_ceil(32) * 32, 0);
        }
        out
    }

    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn code(value: &Value) -> u32 {
    match value {
        Value::Unsigned(_) => 10,
        Value::Signed(_) => 5,
        Value::Float(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::List(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Unsigned(n) => out.extend(n.to_le_bytes()),
        Value::Signed(n) => out.extend((*n as i32).to_le_bytes()),
        Value::Float(x) => out.extend((*x as f32).to_le_bytes()),
        Value::Bool(b) => out.push(u8::from(*b)),
        Value::Text(t) => text(out, t),
        Value::List(list) => {
            out.extend(list.first().map_or(4, code).to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|v| put(out, v));
        }
    }
}

/// Sizes of the tiny model.
pub const HIDDEN: usize = 64;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KEY_HEADS: usize = 2;
pub const HEAD: usize = 16;
pub const FEED_FORWARD: usize = 96;
pub const CONTEXT: usize = 160;
pub const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The 256 characters that stand for bytes, in the order of the bytes.
pub fn byte_characters() -> Vec<String> {
    let mut next = 0x100;
    (0u32..256)
        .map(|byte| {
            let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let c = if printable { byte } else { next };
            next += u32::from(!printable);
            char::from_u32(c).unwrap().to_string()
        })
        .collect()
}

/// A tiny llama: three special tokens, the 256 bytes, and a few merges; matrices of `kind`, embedding of `embedding`.
pub fn tiny(kind: TensorType, embedding: TensorType) -> Writer {
    let mut w = Writer::default();
    let merges = ["t h", "th e", "Ġ the", "h e", "l l", "o Ġ"];
    let mut tokens: Vec<String> = SPECIAL.iter().map(|s| (*s).to_owned()).chain(byte_characters()).collect();
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    while !tokens.len().is_multiple_of(32) {
        tokens.push(format!("[unused{}]", tokens.len()));
    }
    let vocabulary = tokens.len();
    let list = |texts: Vec<String>| Value::List(texts.into_iter().map(Value::Text).collect());
    w.set("general.architecture", Value::Text("llama".into()));
    w.set("general.name", Value::Text("tiny".into()));
    for (key, n) in [
        ("llama.embedding_length", HIDDEN),
        ("llama.block_count", LAYERS),
        ("llama.feed_forward_length", FEED_FORWARD),
        ("llama.context_length", CONTEXT),
        ("llama.attention.head_count", HEADS),
        ("llama.attention.head_count_kv", KEY_HEADS),
        ("llama.rope.dimension_count", HEAD),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ] {
        w.set(key, Value::Unsigned(n as u64));
    }
    w.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    w.set("llama.rope.freq_base", Value::Float(10_000.0));
    w.set("tokenizer.ggml.model", Value::Text("gpt2".into()));
    w.set("tokenizer.ggml.pre", Value::Text("smollm".into()));
    let types = (0..vocabulary).map(|i| Value::Signed(if i < SPECIAL.len() { 3 } else { 1 })).collect();
    w.set("tokenizer.ggml.token_type", Value::List(types));
    w.set("tokenizer.ggml.tokens", list(tokens));
    w.set("tokenizer.ggml.merges", list(merges.iter().map(|m| (*m).to_owned()).collect()));

    let mut seed = 100;
    let mut matrix = |w: &mut Writer, name: &str, kind: TensorType, rows: usize, columns: usize, size: f32| {
        seed += 1;
        let values: Vec<f32> = numbers(rows * columns, seed).iter().map(|v| v * size).collect();
        w.tensor(name, kind, &[columns as u64, rows as u64], &values);
    };
    let kv = KEY_HEADS * HEAD;
    // Small, so that logits are mild and sampling has a choice.
    matrix(&mut w, "token_embd.weight", embedding, vocabulary, HIDDEN, 0.25);
    for i in 0..LAYERS {
        let size = 2.0 / (HIDDEN as f32).sqrt();
        for (part, rows, columns) in [
            ("attn_q", HEADS * HEAD, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HEADS * HEAD),
            ("ffn_gate", FEED_FORWARD, HIDDEN),
            ("ffn_up", FEED_FORWARD, HIDDEN),
            ("ffn_down", HIDDEN, FEED_FORWARD),
        ] {
            matrix(&mut w, &format!("blk.{i}.{part}.weight"), kind, rows, columns, size);
        }
        for part in ["attn_norm", "ffn_norm"] {
            let values: Vec<f32> = numbers(HIDDEN, i as u64 + 7).iter().map(|v| 1.0 + v / 4.0).collect();
            w.tensor(&format!("blk.{i}.{part}.weight"), TensorType::F32, &[HIDDEN as u64], &values);
        }
    }
    let norm: Vec<f32> = numbers(HIDDEN, 9).iter().map(|v| 1.0 + v / 4.0).collect();
    w.tensor("output_norm.weight", TensorType::F32, &[HIDDEN as u64], &norm);
    w
}

/// Logits of every position of the tiny model, in f64, read from the file again: `[position][vocabulary]`.
pub fn reference_logits(path: &Path, tokens: &[u32]) -> Vec<Vec<f64>> {
    let file = ModelFile::open(path).unwrap();
    let load = |name: &str| -> Vec<f64> {
        let info = &file.tensors[name];
        let raw = file.read(name).unwrap().unwrap();
        let values = super::ops::linear::dequantise(info.kind, &raw, info.elements() as usize).unwrap();
        values.into_iter().map(f64::from).collect()
    };
    let product = |w: &[f64], x: &[f64]| -> Vec<f64> {
        w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |x: &[f64], weight: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(v, w)| v / (mean + 1e-5).sqrt() * w).collect()
    };
    let rotate = |x: &mut [f64], position: usize| {
        for head in x.chunks_mut(HEAD) {
            for i in 0..HEAD / 2 {
                let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / HEAD as f64);
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                head[2 * i] = a * angle.cos() - b * angle.sin();
                head[2 * i + 1] = a * angle.sin() + b * angle.cos();
            }
        }
    };
    let embedding = load("token_embd.weight");
    let mut hidden: Vec<Vec<f64>> =
        tokens.iter().map(|t| embedding[*t as usize * HIDDEN..][..HIDDEN].to_vec()).collect();
    for layer in 0..LAYERS {
        let w = |part: &str| load(&format!("blk.{layer}.{part}.weight"));
        let (wq, wk, wv, wo) = (w("attn_q"), w("attn_k"), w("attn_v"), w("attn_output"));
        let (gate, up, down) = (w("ffn_gate"), w("ffn_up"), w("ffn_down"));
        let (attention_norm, feed_norm) = (w("attn_norm"), w("ffn_norm"));
        let mut keys: Vec<Vec<f64>> = Vec::new();
        let mut values: Vec<Vec<f64>> = Vec::new();
        for (position, x) in hidden.iter_mut().enumerate() {
            let normed = norm(x, &attention_norm);
            let mut q = product(&wq, &normed);
            let mut k = product(&wk, &normed);
            rotate(&mut q, position);
            rotate(&mut k, position);
            keys.push(k);
            values.push(product(&wv, &normed));
            let mut attended = vec![0.0; HEADS * HEAD];
            for h in 0..HEADS {
                let kv = h / (HEADS / KEY_HEADS) * HEAD;
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|k| (0..HEAD).map(|e| q[h * HEAD + e] * k[kv + e]).sum::<f64>() / (HEAD as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let total: f64 = scores.iter().sum();
                for (score, v) in scores.iter().zip(&values) {
                    for e in 0..HEAD {
                        attended[h * HEAD + e] += score / total * v[kv + e];
                    }
                }
            }
            x.iter_mut().zip(product(&wo, &attended)).for_each(|(x, y)| *x += y);
        }
        for x in &mut hidden {
            let normed = norm(x, &feed_norm);
            let gated: Vec<f64> = product(&gate, &normed)
                .iter()
                .zip(product(&up, &normed))
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            x.iter_mut().zip(product(&down, &gated)).for_each(|(x, y)| *x += y);
        }
    }
    let last = load("output_norm.weight");
    hidden.iter().map(|x| product(&embedding, &norm(x, &last))).collect()
}

/// What `model/goldens/make.py` has written: logits of PyTorch's `transformers` for made models.
pub struct Goldens(serde_json::Value);

impl Goldens {
    pub fn read() -> Self {
        Self(serde_json::from_str(include_str!("model/goldens/logits.json")).unwrap())
    }

    pub fn tokens(&self) -> Vec<u32> {
        serde_json::from_value(self.0["tokens"].clone()).unwrap()
    }

    /// Positions of which there are logits.
    pub fn rows(&self) -> Vec<usize> {
        serde_json::from_value(self.0["rows"].clone()).unwrap()
    }

    /// Architecture and format of each.
    pub fn cases(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.as_object().unwrap().keys().filter_map(|case| case.split_once(' '))
    }

    /// `[rows][vocabulary]`.
    pub fn logits(&self, case: &str) -> Vec<f32> {
        use base64::Engine as _;
        let raw = base64::engine::general_purpose::STANDARD.decode(self.0[case]["logits"].as_str().unwrap()).unwrap();
        raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// By how much the frequencies of its rotary positions are divided, where they are.
    pub fn factors(&self, case: &str) -> Option<Vec<f32>> {
        self.0[case].get("factors").map(|factors| serde_json::from_value(factors.clone()).unwrap())
    }
}
