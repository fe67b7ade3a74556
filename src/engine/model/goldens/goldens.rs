//! Logits against PyTorch's `transformers`, for every architecture and every format of weights: `make.py` says how.

use std::path::{Path, PathBuf};

use half::f16;
use serde_json::{Value as Json, json};

use super::*;
use crate::engine::{
    candle::ARCHITECTURES,
    model::kv::Attached,
    model_file::Value,
    ops::{Level, Pool},
    testing::{Goldens, Writer, numbers},
};

const VOCABULARY: usize = 288;

/// Sizes of a made model.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    layers: usize,
    heads: usize,
    keys: usize,
    head: usize,
    feed_forward: usize,
}

const SMALL: Sizes = Sizes { hidden: 64, layers: 2, heads: 4, keys: 2, head: 16, feed_forward: 96 };
const WIDE: Sizes = Sizes { hidden: 256, layers: 1, heads: 4, keys: 2, head: 64, feed_forward: 256 };

fn sizes_of(name: &str) -> Sizes {
    match name {
        "qwen3" => Sizes { head: 32, ..SMALL },
        "gemma3" => Sizes { head: 32, layers: 7, ..SMALL },
        _ => SMALL,
    }
}

/// Type code, elements and bytes of a block, and where in it f16 numbers stand that are this part of the size.
type Form = (u32, usize, usize, &'static [(usize, f64)]);

fn form(kind: &str) -> Form {
    match kind {
        "F32" => (0, 1, 4, &[]),
        "F16" => (1, 1, 2, &[]),
        "BF16" => (30, 1, 2, &[]),
        "Q4_0" => (2, 32, 18, &[(0, 1.0 / 8.0)]),
        "Q4_1" => (3, 32, 20, &[(0, 1.0 / 8.0), (2, -1.0)]),
        "Q5_0" => (6, 32, 22, &[(0, 1.0 / 16.0)]),
        "Q8_0" => (8, 32, 34, &[(0, 1.0 / 128.0)]),
        "Q4_K" => (12, 256, 144, &[(0, 1.0 / 400.0), (2, 1.0 / 60.0)]),
        "Q6_K" => (14, 256, 210, &[(208, 1.0 / 2000.0)]),
        other => panic!("no form {other}"),
    }
}

/// The tensors in the order in which `make.py` makes them.
struct Made {
    writer: Writer,
    seed: u64,
}

impl Made {
    fn matrix(&mut self, name: &str, kind: &str, rows: usize, columns: usize, size: f64) {
        self.seed += 1;
        let n = rows * columns;
        let (code, elements, length, heads) = form(kind);
        let plain = || numbers(n, self.seed).into_iter().map(|v| v * size as f32);
        let bytes: Vec<u8> = match kind {
            "F32" => plain().flat_map(f32::to_le_bytes).collect(),
            "F16" => plain().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
            "BF16" => plain().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
            _ => {
                // The lowest byte of what `numbers` draws.
                let byte = |v: f32| ((v + 1.0) * (1u32 << 23) as f32) as u32 as u8;
                let mut bytes: Vec<u8> = numbers(n / elements * length, self.seed).into_iter().map(byte).collect();
                for block in bytes.chunks_exact_mut(length) {
                    for (at, part) in heads {
                        block[*at..at + 2].copy_from_slice(&f16::from_f64(size * part).to_le_bytes());
                    }
                }
                bytes
            }
        };
        self.writer.tensors.push((name.to_owned(), code, vec![columns as u64, rows as u64], bytes));
    }

    fn vector(&mut self, name: &str, n: usize, middle: f32, size: f32) {
        self.seed += 1;
        let values: Vec<f32> = numbers(n, self.seed).iter().map(|v| middle + v * size).collect();
        self.writer.tensor(name, TensorType::F32, &[n as u64], &values);
    }
}

/// A file as `make.py`'s model of the same name.
fn made(name: &str, kind: &str, s: Sizes, factors: Option<Vec<f32>>) -> Writer {
    let architecture = if name.starts_with("qwen") || name == "gemma3" { name } else { "llama" };
    let mut made = Made { writer: Writer::default(), seed: 1000 };
    let w = &mut made.writer;
    w.set("general.architecture", Value::Text(architecture.into()));
    for (key, n) in [
        ("embedding_length", s.hidden),
        ("block_count", s.layers),
        ("feed_forward_length", s.feed_forward),
        ("context_length", 4096),
        ("attention.head_count", s.heads),
        ("attention.head_count_kv", s.keys),
        ("attention.key_length", s.head),
        ("attention.value_length", s.head),
    ] {
        w.set(&format!("{architecture}.{key}"), Value::Unsigned(n as u64));
    }
    w.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::Float(1e-5));
    let base = if name == "llama" { 10_000.0 } else { 500_000.0 };
    w.set(&format!("{architecture}.rope.freq_base"), Value::Float(base));
    if name == "gemma3" {
        w.set("gemma3.attention.sliding_window", Value::Unsigned(7));
        // Not the size of a head, as with the largest Gemma.
        w.set(crate::engine::safetensors::SCORE_SCALE, Value::Float(48.0));
        w.set("gemma3.rope.scaling.type", Value::Text("linear".into()));
        w.set("gemma3.rope.scaling.factor", Value::Float(8.0));
    }
    if let Some(factors) = factors {
        w.tensor("rope_freqs.weight", TensorType::F32, &[factors.len() as u64], &factors);
    }
    let (q, kv) = (s.heads * s.head, s.keys * s.head);
    made.matrix("token_embd.weight", if kind == "F32" { "F32" } else { "Q8_0" }, VOCABULARY, s.hidden, 0.25);
    let size = 2.0 / (s.hidden as f64).sqrt();
    for i in 0..s.layers {
        let of = |part: &str| format!("blk.{i}.{part}");
        for (part, rows, columns) in [
            ("attn_q.weight", q, s.hidden),
            ("attn_k.weight", kv, s.hidden),
            ("attn_v.weight", kv, s.hidden),
            ("attn_output.weight", s.hidden, q),
            ("ffn_gate.weight", s.feed_forward, s.hidden),
            ("ffn_up.weight", s.feed_forward, s.hidden),
            ("ffn_down.weight", s.hidden, s.feed_forward),
        ] {
            made.matrix(&of(part), kind, rows, columns, size);
        }
        made.vector(&of("attn_norm.weight"), s.hidden, 1.0, 0.25);
        made.vector(&of("ffn_norm.weight"), s.hidden, 1.0, 0.25);
        if name == "qwen2" {
            [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)]
                .iter()
                .for_each(|(part, n)| made.vector(&of(part), *n, 0.0, 0.5));
        }
        if matches!(name, "qwen3" | "gemma3") {
            ["attn_q_norm.weight", "attn_k_norm.weight"]
                .iter()
                .for_each(|part| made.vector(&of(part), s.head, 1.0, 0.25));
        }
        if name == "gemma3" {
            ["post_attention_norm.weight", "post_ffw_norm.weight"]
                .iter()
                .for_each(|part| made.vector(&of(part), s.hidden, 1.0, 0.25));
        }
    }
    made.vector("output_norm.weight", s.hidden, 1.0, 0.25);
    if ["llama3", "mistral", "qwen3"].contains(&name) {
        made.matrix("output.weight", kind, VOCABULARY, s.hidden, 0.25);
    }
    made.writer
}

/// The same weights as a folder of the hub has them.
fn as_folder(writer: &Writer, name: &str, s: Sizes, dir: &Path) -> PathBuf {
    let dir = dir.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let number = |key: &str| match &writer.metadata.iter().find(|(k, _)| k.ends_with(key)).unwrap().1 {
        Value::Unsigned(n) => json!(n),
        Value::Float(x) => json!(x),
        other => panic!("{other:?}"),
    };
    let mut config = json!({
        "model_type": match name {
            "llama3" => "llama",
            "gemma3" => "gemma3_text",
            other => other,
        },
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "intermediate_size": s.feed_forward,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.keys,
        "head_dim": s.head,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": number("rope.freq_base"),
        "tie_word_embeddings": !["llama3", "mistral", "qwen3"].contains(&name),
    });
    if name == "llama3" {
        config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 64});
    }
    if name == "gemma3" {
        config["sliding_window"] = json!(7);
        config["query_pre_attn_scalar"] = json!(48);
        config["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        });
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let vocab: serde_json::Map<String, Json> =
        crate::engine::testing::byte_characters().into_iter().zip(0..).map(|(c, id)| (c, json!(id))).collect();
    let tokenizer =
        json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tensors: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = writer
        .tensors
        .iter()
        .filter(|(tensor, ..)| tensor != "rope_freqs.weight")
        .map(|(tensor, code, dimensions, bytes)| {
            let dtype = match code {
                0 => safetensors::Dtype::F32,
                1 => safetensors::Dtype::F16,
                _ => safetensors::Dtype::BF16,
            };
            let shape: Vec<usize> = dimensions.iter().rev().map(|n| *n as usize).collect();
            let turned = !name.starts_with("qwen")
                && name != "gemma3"
                && (tensor.contains("attn_q.") || tensor.contains("attn_k."));
            let bytes = if turned { in_halves(bytes, shape[0], s.head) } else { bytes.clone() };
            let bytes = match name == "gemma3" && tensor.ends_with("norm.weight") {
                // The hub's are less by one.
                true => {
                    bytes.as_chunks::<4>().0.iter().flat_map(|b| (f32::from_le_bytes(*b) - 1.0).to_le_bytes()).collect()
                }
                false => bytes,
            };
            (hub_name(tensor, name == "gemma3"), dtype, shape, bytes)
        })
        .collect();
    // In two files, as large models are.
    for (n, part) in tensors.chunks(tensors.len() / 2 + 1).enumerate() {
        let views = part.iter().map(|(name, dtype, shape, bytes)| {
            (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let file = dir.join(format!("model-{n}.safetensors"));
        std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
    }
    dir
}

/// Rows whose pairs are neighbours, with the first of all pairs of a head before the second.
fn in_halves(bytes: &[u8], rows: usize, head: usize) -> Vec<u8> {
    let row = bytes.len() / rows;
    let of = |head: &[u8]| {
        let rows: Vec<&[u8]> = head.chunks_exact(row).collect();
        let half = |from: usize| rows.iter().skip(from).step_by(2).copied().collect::<Vec<_>>().concat();
        [half(0), half(1)].concat()
    };
    bytes.chunks_exact(head * row).flat_map(of).collect()
}

fn hub_name(name: &str, gemma3: bool) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let parts: Vec<&str> = name.split('.').collect();
    let part = match parts[2] {
        "attn_norm" => "input_layernorm",
        "ffn_norm" if gemma3 => "pre_feedforward_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("{other}"),
    };
    format!("model.layers.{}.{part}.{}", parts[1], parts[3])
}

/// Safetensors hold no Q8_0, so the embedding is what that is in f32.
fn without_q8(mut writer: Writer) -> Writer {
    for (name, code, dimensions, bytes) in &mut writer.tensors {
        if *code == 8 && name == "token_embd.weight" {
            let values = dequantise(TensorType::Q8_0, bytes, dimensions.iter().product::<u64>() as usize).unwrap();
            (*code, *bytes) = (0, values.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
    }
    writer
}

#[test]
fn a_folder_of_safetensors_computes_what_transformers_does() {
    let goldens = Goldens::read();
    let (tokens, rows) = (goldens.tokens(), goldens.rows());
    let dir = tempfile::tempdir().unwrap();
    for case in
        ["llama F32", "llama3 F32", "mistral F32", "qwen2 F32", "qwen3 F32", "gemma3 F32", "llama F16", "llama BF16"]
    {
        let (name, kind) = case.split_once(' ').unwrap();
        let sizes = sizes_of(name);
        // Llama 3's factors are computed from the folder's parameters.
        let writer = without_q8(made(name, kind, sizes, None));
        let folder = as_folder(&writer, name, sizes, dir.path());
        let want = goldens.logits(case);
        let got = logits(&load(&folder, Format::F32).unwrap(), &tokens, &rows);
        let apart = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{case}: {apart} from transformers' logits");
        // One of its files names the folder, too.
        let native = load(&folder.join("model-0.safetensors"), Format::Native).unwrap();
        let close = logits(&native, &tokens, &rows).iter().zip(&got).all(|(a, b)| (a - b).abs() < 0.02);
        assert!(close, "{case}: native far from f32");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

fn load(path: &Path, format: Format) -> Result<Llama, EngineError> {
    let file = ModelFile::open(path)?;
    let config = Config::read(&file)?;
    Llama::load(&file, config, format)
}

fn logits(model: &Llama, tokens: &[u32], rows: &[usize]) -> Vec<f32> {
    let ops = Ops { level: Level::detect(), pool: Pool::new(2).unwrap() };
    let (mut kv, mut w) = (Kv::new(&model.config().block_pool()), Workspace::default());
    let pieces = vec![Piece { cache: 0, row: 0, count: tokens.len() }];
    let batch = Batch { tokens: tokens.to_vec(), pieces, logits: rows.to_vec() };
    model.forward(&ops, &batch, &mut [&mut kv], &mut w);
    w.logits
}

/// What the keys and values of a model's first layer are depends on nothing before: documents that were computed apart, and are
/// attended to where they stand, give what the whole prompt gives. So this is the rotation and the order of all architectures.
#[test]
fn in_one_layer_documents_computed_apart_are_the_same_as_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let goldens = Goldens::read();
    for case in ["llama F32", "llama3 F32", "mistral F32", "qwen2 F32", "qwen3 F32", "gemma3 F32"] {
        let (name, kind) = case.split_once(' ').unwrap();
        let sizes = Sizes { layers: 1, ..sizes_of(name) };
        let model = load(&made(name, kind, sizes, goldens.factors(case)).write(dir.path()), Format::F32).unwrap();
        let prompt: Vec<u32> = (0..700).map(|i| 3 + (i * 37 + i * i % 19) % 250).collect();
        let rows: Vec<usize> = (640..700).collect();
        let want = logits(&model, &prompt, &rows);

        let ops = Ops { level: Level::detect(), pool: Pool::new(2).unwrap() };
        let pool = model.config().block_pool();
        let mut w = Workspace::default();
        let mut forward = |kv: &mut Kv, tokens: &[u32], wanted: usize| {
            let pieces = vec![Piece { cache: 0, row: 0, count: tokens.len() }];
            let logits = (tokens.len() - wanted..tokens.len()).collect();
            model.forward(&ops, &Batch { tokens: tokens.to_vec(), pieces, logits }, &mut [kv], &mut w);
            w.logits.clone()
        };
        // The first tokens of the second are its own, at a place that is none of a tile.
        let documents = [(300..420, 0), (431..560, 21)];
        let attached = documents.clone().map(|(document, skipped)| {
            let mut alone = Kv::new(&pool);
            forward(&mut alone, &prompt[document.clone()], 0);
            let blocks = alone.blocks().skip(skipped / 32).cloned().collect();
            let (at, len) = (document.start + skipped, document.len() - skipped);
            Attached { at, len, place: skipped, offset: document.start, blocks }
        });
        let own: Vec<u32> = [&prompt[..300], &prompt[420..452], &prompt[560..]].concat();
        for chunks in [&[own.len()][..], &[100, 200, 20, 40, 2, own.len() - 362]] {
            let mut kv = Kv::of(&pool, Vec::new(), attached.to_vec());
            let (mut done, mut got) = (0, Vec::new());
            for count in chunks {
                let wanted = if done + count == own.len() { 60 } else { 0 };
                got = forward(&mut kv, &own[done..done + count], wanted);
                done += count;
            }
            assert_eq!((kv.len(), kv.filled()), (prompt.len(), own.len()));
            let apart = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{case}: {apart} apart");
        }
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - greatest).exp()).sum();
    logits.iter().map(|l| f64::from(l - greatest) - sum.ln()).collect()
}

#[test]
fn every_architecture_and_format_computes_what_transformers_does() {
    let goldens = Goldens::read();
    let (tokens, rows) = (goldens.tokens(), goldens.rows());
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (name, kind) in goldens.cases().filter(|(name, _)| !ARCHITECTURES.contains(name)) {
        let case = &format!("{name} {kind}");
        seen += 1;
        let sizes = if matches!(kind, "Q4_K" | "Q6_K") { WIDE } else { sizes_of(name) };
        let path: PathBuf = made(name, kind, sizes, goldens.factors(case)).write(dir.path());
        let want = goldens.logits(case);
        assert_eq!(want.len(), rows.len() * VOCABULARY);
        let exact = logits(&load(&path, Format::F32).unwrap(), &tokens, &rows);
        let apart = exact.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{case}: {apart} from transformers' logits");
        let native = logits(&load(&path, Format::Native).unwrap(), &tokens, &rows);
        for (got, want) in native.chunks_exact(VOCABULARY).zip(want.chunks_exact(VOCABULARY)) {
            let (p, q) = (log_softmax(want), log_softmax(got));
            let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
            assert!(divergence < 1e-3, "{case}: a divergence of {divergence}");
            let best = |of: &[f64]| (0..of.len()).max_by(|a, b| of[*a].total_cmp(&of[*b])).unwrap();
            assert_eq!(best(&p), best(&q), "{case}");
        }
    }
    assert_eq!(seen, 15);
}

#[test]
fn what_an_architecture_needs_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, part: &str| {
        let mut writer = made(name, "F32", SMALL, None);
        writer.tensors.retain(|(tensor, ..)| tensor != part);
        load(&writer.write(dir.path()), Format::F32).err().unwrap().to_string()
    };
    assert!(refused("qwen2", "blk.1.attn_k.bias").contains("tensor `blk.1.attn_k.bias` is missing"));
    assert!(refused("qwen3", "blk.0.attn_q_norm.weight").contains("tensor `blk.0.attn_q_norm.weight` is missing"));
    let gemma3 = refused("gemma3", "blk.1.post_ffw_norm.weight");
    assert!(gemma3.contains("tensor `blk.1.post_ffw_norm.weight` is missing"), "{gemma3}");
    let mut scaled = made("gemma3", "F32", sizes_of("gemma3"), None);
    scaled.set(crate::engine::safetensors::SCORE_SCALE, Value::Float(0.0));
    let said = load(&scaled.write(dir.path()), Format::F32).err().unwrap().to_string();
    assert!(said.contains("its scores are scaled by the root of 0"), "{said}");
    let mut other = made("llama", "F32", SMALL, None);
    other.set("general.architecture", Value::Text("gemma4".into()));
    let said = load(&other.write(dir.path()), Format::F32).err().unwrap().to_string();
    let known =
        "its architecture is `gemma4`, and there are llama, qwen2, qwen3, gemma3, and through candle phi2, phi3";
    assert!(said.contains(known), "{said}");
}
