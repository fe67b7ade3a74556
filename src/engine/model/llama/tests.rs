use std::path::Path;

use super::*;
use crate::engine::{
    ops::{Level, Pool},
    testing::{reference_logits, tiny},
};

fn load(path: &Path, format: Format) -> Llama {
    let file = ModelFile::open(path).unwrap();
    let config = Config::read(&file).unwrap();
    Llama::load(&file, config, format).unwrap()
}

/// Logits of all positions, the tokens given in chunks of these sizes.
fn run(model: &Llama, level: Level, tokens: &[u32], chunks: &[usize]) -> Vec<f32> {
    let ops = Ops { level, pool: Pool::new(2).unwrap() };
    let (mut kv, mut w) = (Kv::new(&model.config().block_pool()), Workspace::default());
    let mut out = Vec::new();
    let mut rest = tokens;
    for count in chunks {
        let (now, later) = rest.split_at(*count);
        let batch = Batch {
            tokens: now.to_vec(),
            pieces: vec![Piece { cache: 0, row: 0, count: *count }],
            logits: (0..*count).collect(),
        };
        model.forward(&ops, &batch, &mut [&mut kv], &mut w);
        out.extend_from_slice(&w.logits);
        rest = later;
    }
    out
}

fn prompt(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| 3 + (i * 37 + seed * 11) % 250).collect()
}

#[test]
fn logits_agree_with_the_reference_in_f64() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = prompt(70, 1);
    for (kind, embedding) in [
        (TensorType::F32, TensorType::F32),
        (TensorType::Q4_1, TensorType::Q8_0),
        (TensorType::Q4_0, TensorType::Q4_0),
        (TensorType::Q8_0, TensorType::Q8_0),
    ] {
        let path = tiny(kind, embedding).write(dir.path());
        let want: Vec<f64> = reference_logits(&path, &tokens).concat();
        let size = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
        // The f32 path is the file's model; the native one also rounds activations, keys and values.
        let both = [Precision::Sixteen, Precision::Eight];
        let cases = [(Format::F32, both[0], 2e-5), (Format::Native, both[0], 1e-3), (Format::Native, both[1], 4e-2)];
        for (format, activations, tolerance) in cases {
            let model = load(&path, format).with_activations(activations);
            let got = run(&model, Level::detect(), &tokens, &[70]);
            let error = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>();
            let error = (error / want.len() as f64).sqrt() / size;
            assert!(error < tolerance, "{kind:?} {format:?}: relative error {error}");
        }
    }
}

#[test]
fn chunks_and_levels_do_not_change_a_bit() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = prompt(75, 2);
    for kind in [TensorType::F32, TensorType::Q4_1] {
        let model = load(&tiny(kind, TensorType::Q8_0).write(dir.path()), Format::Native);
        let whole = run(&model, Level::detect(), &tokens, &[75]);
        for chunks in [&[1; 75][..], &[30, 45], &[7, 1, 33, 34]] {
            assert_eq!(run(&model, Level::detect(), &tokens, chunks), whole, "{chunks:?}");
        }
        for level in Level::available() {
            assert_eq!(run(&model, level, &tokens, &[75]), whole, "{level:?}");
        }
    }
}

#[test]
fn a_sequence_in_a_batch_gives_the_bits_that_it_gives_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = load(&tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path()), Format::Native);
    let vocabulary = model.config().vocabulary;
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| prompt(20 + 9 * i, i as u32)).collect();
    let alone: Vec<Vec<f32>> =
        prompts.iter().map(|tokens| run(&model, Level::detect(), tokens, &[tokens.len()])).collect();

    // Three steps: each sequence computes a third of its prompt, all in one batch.
    let ops = Ops { level: Level::detect(), pool: Pool::new(2).unwrap() };
    let mut caches: Vec<Kv> = vec![Kv::new(&model.config().block_pool()); prompts.len()];
    let mut w = Workspace::default();
    for third in 0..3 {
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for (i, tokens) in prompts.iter().enumerate() {
            let (begin, end) = (tokens.len() * third / 3, tokens.len() * (third + 1) / 3);
            let row = batch.tokens.len();
            batch.tokens.extend(&tokens[begin..end]);
            batch.pieces.push(Piece { cache: i, row, count: end - begin });
            batch.logits.push(batch.tokens.len() - 1);
            expected.push(&alone[i][(end - 1) * vocabulary..end * vocabulary]);
        }
        model.forward(&ops, &batch, &mut caches.iter_mut().collect::<Vec<_>>(), &mut w);
        for (got, want) in w.logits.chunks(vocabulary).zip(expected) {
            assert_eq!(got, want);
        }
    }
}

#[test]
fn a_fork_shares_and_then_parts() {
    let dir = tempfile::tempdir().unwrap();
    let model = load(&tiny(TensorType::Q8_0, TensorType::Q8_0).write(dir.path()), Format::Native);
    let ops = Ops { level: Level::detect(), pool: Pool::new(1).unwrap() };
    let mut w = Workspace::default();
    let mut step = |kv: &mut Kv, tokens: &[u32]| {
        let batch = Batch {
            tokens: tokens.to_vec(),
            pieces: vec![Piece { cache: 0, row: 0, count: tokens.len() }],
            logits: vec![tokens.len() - 1],
        };
        model.forward(&ops, &batch, &mut [kv], &mut w);
        w.logits.clone()
    };
    let mut first = Kv::new(&model.config().block_pool());
    step(&mut first, &prompt(40, 3));
    let mut second = first.clone();
    let before = step(&mut second, &[9, 8]);
    step(&mut first, &[100, 101]);
    // What the first wrote has not touched the second.
    let mut fresh = Kv::new(&model.config().block_pool());
    step(&mut fresh, &prompt(40, 3));
    assert_eq!(step(&mut fresh, &[9, 8]), before);
    assert_eq!(step(&mut fresh, &[5]), step(&mut second, &[5]));
}

#[test]
fn missing_tensors_and_wrong_shapes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let whole = tiny(TensorType::F32, TensorType::F32);
    let fail = |w: &crate::engine::testing::Writer| {
        let file = ModelFile::open(&w.write(dir.path())).unwrap();
        let config = Config::read(&file);
        config.and_then(|c| Llama::load(&file, c, Format::Native)).err().unwrap().to_string()
    };
    let mut w = whole.clone();
    w.tensors.retain(|(name, ..)| name != "blk.1.ffn_up.weight");
    assert!(fail(&w).contains("tensor `blk.1.ffn_up.weight` is missing"));
    let mut w = whole.clone();
    w.tensors.retain(|(name, ..)| name != "blk.0.attn_k.weight");
    w.tensor("blk.0.attn_k.weight", TensorType::F32, &[64, 16], &[0.0; 1024]);
    assert!(fail(&w).contains("has the shape [64, 16] instead of [64, 32]"));
    let mut w = whole.clone();
    w.tensor("blk.0.attn_output.bias", TensorType::F32, &[64], &[0.0; 64]);
    assert!(fail(&w).contains("it has biases (`blk.0.attn_output.bias`)"));
    let mut w = whole;
    w.tensors.retain(|(name, ..)| name != "output_norm.weight");
    w.tensor("output_norm.weight", TensorType::F32, &[64], &[f32::NAN; 64]);
    assert!(fail(&w).contains("not finite"));
}
