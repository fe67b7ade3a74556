use super::*;
use crate::{
    domain::FinishReason,
    engine::{
        Choosing, Computed, Engine, EngineOptions, Generate, GenerateEvent, Prompt,
        model_file::{TensorType, Value as Meta},
        testing::{Goldens, Writer, numbers, tiny},
    },
};

const VOCABULARY: usize = 288;
const HIDDEN: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const FEED_FORWARD: usize = 96;

/// A file as `make.py`'s model of the same name, with the tiny model's tokens.
fn made(name: &str) -> Writer {
    let phi3 = name == "phi3";
    let keys = if phi3 { 2 } else { 4 };
    let mut w = tiny(TensorType::F32, TensorType::F32);
    w.tensors.clear();
    w.set("general.architecture", Meta::Text(name.into()));
    for (key, n) in [
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", FEED_FORWARD),
        ("context_length", 4096),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", keys),
        ("rope.dimension_count", if phi3 { 16 } else { 8 }),
    ] {
        w.set(&format!("{name}.{key}"), Meta::Unsigned(n as u64));
    }
    let epsilon = if phi3 { "layer_norm_rms_epsilon" } else { "layer_norm_epsilon" };
    w.set(&format!("{name}.attention.{epsilon}"), Meta::Float(1e-5));
    let mut made = Made { writer: w, seed: 1000 };
    made.matrix("token_embd.weight", VOCABULARY, HIDDEN, 0.25);
    let size = 2.0 / (HIDDEN as f64).sqrt();
    let qkv = HIDDEN + 2 * keys * HIDDEN / HEADS;
    for i in 0..LAYERS {
        let of = |part: &str| format!("blk.{i}.{part}");
        made.matrix(&of("attn_qkv.weight"), qkv, HIDDEN, size as f32);
        made.matrix(&of("attn_output.weight"), HIDDEN, HIDDEN, size as f32);
        made.matrix(&of("ffn_up.weight"), FEED_FORWARD * if phi3 { 2 } else { 1 }, HIDDEN, size as f32);
        made.matrix(&of("ffn_down.weight"), HIDDEN, FEED_FORWARD, size as f32);
        made.vector(&of("attn_norm.weight"), HIDDEN, 1.0, 0.25);
        if phi3 {
            made.vector(&of("ffn_norm.weight"), HIDDEN, 1.0, 0.25);
            continue;
        }
        made.vector(&of("attn_norm.bias"), HIDDEN, 0.0, 0.25);
        made.vector(&of("attn_qkv.bias"), qkv, 0.0, 0.5);
        made.vector(&of("attn_output.bias"), HIDDEN, 0.0, 0.5);
        made.vector(&of("ffn_up.bias"), FEED_FORWARD, 0.0, 0.5);
        made.vector(&of("ffn_down.bias"), HIDDEN, 0.0, 0.5);
    }
    made.vector("output_norm.weight", HIDDEN, 1.0, 0.25);
    made.matrix("output.weight", VOCABULARY, HIDDEN, 0.25);
    if !phi3 {
        made.vector("output_norm.bias", HIDDEN, 0.0, 0.25);
        made.vector("output.bias", VOCABULARY, 0.0, 0.5);
    }
    made.writer
}

/// Tensors in the order in which `make.py` draws them.
struct Made {
    writer: Writer,
    seed: u64,
}

impl Made {
    fn add(&mut self, name: &str, dimensions: &[u64], middle: f32, size: f32) {
        self.seed += 1;
        let n = dimensions.iter().product::<u64>() as usize;
        let values: Vec<f32> = numbers(n, self.seed).iter().map(|v| middle + v * size).collect();
        self.writer.tensor(name, TensorType::F32, dimensions, &values);
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize, size: f32) {
        self.add(name, &[columns as u64, rows as u64], 0.0, size);
    }

    fn vector(&mut self, name: &str, n: usize, middle: f32, size: f32) {
        self.add(name, &[n as u64], middle, size);
    }
}

#[test]
fn each_architecture_computes_what_transformers_does_in_chunks_of_any_size() {
    let goldens = Goldens::read();
    let (tokens, rows) = (goldens.tokens(), goldens.rows());
    let dir = tempfile::tempdir().unwrap();
    for name in ARCHITECTURES {
        let file = ModelFile::open(&made(name).write(dir.path())).unwrap();
        let config = Config::read(&file).unwrap().unwrap();
        let mut model = CandleModel::load(&file, &config, 64, 2).unwrap().fresh;
        let want = goldens.logits(&format!("{name} F32"));
        let mut begin = 0;
        for (row, want) in rows.iter().zip(want.chunks_exact(VOCABULARY)) {
            let got = model.forward(&tokens[begin..=*row], begin).unwrap();
            let apart = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{name} at {row}: {apart} from transformers' logits");
            begin = row + 1;
        }
    }
}

fn ask(prompt: u32, length: u32, n: u32, max_tokens: u32) -> Generate {
    Generate {
        prompt: Prompt::Tokens((0..length).map(|i| 3 + (i * 37 + prompt * 11) % 250).collect()),
        choosing: Choosing { temperature: 1.0, top_p: 0.95, seed: 42 },
        max_tokens: Some(max_tokens),
        stop: Vec::new(),
        n,
        priority: 0,
        exact: false,
        keep: None,
        sharing: Vec::new(),
        deadline: None,
        logprobs: None,
        mask: None,
    }
}

type Events = tokio::sync::mpsc::UnboundedReceiver<GenerateEvent>;

/// The texts, and tokens of the prompt and of the answers.
fn collect(mut events: Events, n: u32) -> (Vec<String>, u32, u32) {
    let mut texts = vec![String::new(); n as usize];
    let mut ended = 0;
    while let Some(event) = events.blocking_recv() {
        match event {
            GenerateEvent::Text { choice, text, .. } => texts[choice as usize].push_str(&text),
            GenerateEvent::Finish { reason, .. } => {
                assert!(matches!(reason, FinishReason::Length | FinishReason::Stop));
                ended += 1;
            }
            GenerateEvent::Usage(usage) => {
                assert_eq!((ended, usage.cached_tokens), (n, 0));
                return (texts, usage.prompt_tokens, usage.completion_tokens);
            }
            GenerateEvent::Failed(error) => panic!("{error}"),
        }
    }
    panic!("no usage");
}

#[test]
fn several_at_once_and_with_little_memory_answer_as_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = made("phi3").write(dir.path());
    // Blocks for one sequence of the longest, so that others must give way.
    let cache_bytes = Some(1);
    let options = EngineOptions { context: Some(160), step_tokens: 32, cache_bytes, threads: 2, ..Default::default() };
    let engine = Engine::load(&path, options).unwrap();
    let info = engine.info();
    assert_eq!((info.computed_by, info.architecture.as_str(), info.context), (Computed::Candle, "phi3", 160));
    let asked = [(1, 50, 1), (2, 70, 3), (1, 50, 1), (3, 9, 2)];
    let alone: Vec<_> =
        asked.iter().map(|(p, l, n)| collect(engine.generate(ask(*p, *l, *n, 40)).unwrap(), *n)).collect();
    assert_eq!(alone[0], alone[2]);
    assert_eq!(alone[1].0.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "choices differ");
    let before = engine.counters();
    assert_eq!((before.reused, before.kept, before.guessed), (0, 0, 0));
    let together: Vec<Events> = asked.iter().map(|(p, l, n)| engine.generate(ask(*p, *l, *n, 40)).unwrap()).collect();
    let together: Vec<_> = together.into_iter().zip(&asked).map(|(events, (.., n))| collect(events, *n)).collect();
    assert_eq!(together, alone);
    assert!(engine.counters().preempted > before.preempted, "nobody had to give way");
    // A client that leaves frees its place, and the model still answers.
    drop(engine.generate(ask(4, 60, 1, 90)).unwrap());
    assert_eq!(collect(engine.generate(ask(1, 50, 1, 40)).unwrap(), 1), alone[0]);
}

#[test]
fn what_candle_would_compute_wrong_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, key: &str, value: Meta| {
        let mut writer = made(name);
        writer.set(&format!("{name}.{key}"), value);
        Engine::load(&writer.write(dir.path()), EngineOptions::default()).err().unwrap().to_string()
    };
    let said = refused("phi3", "rope.scaling.type", Meta::Text("longrope".into()));
    assert!(said.contains("its rotary embedding is scaled"), "{said}");
    let said = refused("phi3", "rope.freq_base", Meta::Float(250_000.0));
    assert!(said.contains("the base of its rotary embedding is not 10000"), "{said}");
    let said = refused("phi3", "rope.dimension_count", Meta::Unsigned(8));
    assert!(said.contains("only a part of each head is rotated"), "{said}");
    let said = refused("phi2", "attention.head_count_kv", Meta::Unsigned(2));
    assert!(said.contains("fewer key heads than heads"), "{said}");
    let mut writer = made("phi3");
    writer.tensors.retain(|(name, ..)| name != "blk.1.ffn_down.weight");
    let said = Engine::load(&writer.write(dir.path()), EngineOptions::default()).err().unwrap().to_string();
    assert!(said.contains("damaged") && said.contains("blk.1.ffn_down.weight"), "{said}");
    // As long as its window, and no longer.
    let mut writer = made("phi3");
    writer.set("phi3.attention.sliding_window", Meta::Unsigned(48));
    let engine = Engine::load(&writer.write(dir.path()), EngineOptions::default()).unwrap();
    assert_eq!(engine.info().context, 48);
}
