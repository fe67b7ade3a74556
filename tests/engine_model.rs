//! The engine on the real default model, SmolLM2-135M-Instruct. Skipped, and said so, where the model is not installed.

use std::path::PathBuf;

use weir::{
    domain::{Message, Role},
    engine::{Choosing, Engine, EngineOptions, Generate, GenerateEvent, Prompt},
};

fn model() -> Option<PathBuf> {
    let home = match std::env::var_os("WEIR_TEST_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../weir-home"),
    };
    let dir = home.join("models/smollm2-135m-instruct");
    let file =
        std::fs::read_dir(dir).ok()?.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "gguf"));
    if file.is_none() {
        eprintln!("skipped: no smollm2-135m-instruct under {}", home.display());
    }
    file
}

fn ask(engine: &Engine, question: &str) -> String {
    let mut events = engine
        .generate(Generate {
            prompt: Prompt::Chat(vec![Message::text(Role::User, question)]),
            choosing: Choosing { temperature: 0.0, top_p: 1.0, seed: 0 },
            max_tokens: Some(40),
            stop: Vec::new(),
            n: 1,
            logprobs: None,
        })
        .unwrap();
    let mut out = String::new();
    while let Some(event) = events.blocking_recv() {
        if let GenerateEvent::Text { text, .. } = event {
            out.push_str(&text);
        }
    }
    out
}

#[test]
fn the_capital_of_france_is_paris() {
    let Some(path) = model() else { return };
    let engine = Engine::load(&path, EngineOptions::default()).unwrap();
    eprintln!("{:?}", engine.encode(&[Message::text(Role::User, "What is the capital of France?")]));
    eprintln!("{:?}", engine.info());
    let answer = ask(&engine, "What is the capital of France?");
    eprintln!("{answer}");
    assert!(answer.contains("Paris"), "{answer}");
}

/// Figures, by hand: `cargo test --release --test it engine_model::figures -- --ignored --nocapture`.
#[test]
#[ignore = "measures; its result is for a person"]
fn figures() {
    use std::time::Instant;
    let Some(path) = model() else { return };
    for threads in [1, 2] {
        let begun = Instant::now();
        let engine = Engine::load(&path, EngineOptions { threads, ..EngineOptions::default() }).unwrap();
        eprintln!("{threads} threads; loaded in {:?}", begun.elapsed());
        for (length, streams) in [(20u32, 1), (100, 1), (512, 1), (100, 8)] {
            let begun = Instant::now();
            let mut all: Vec<_> = (0..streams)
                .map(|i| {
                    let tokens = (0..length).map(|t| 1000 + (t * 7919 + i * 31) % 40_000).collect();
                    engine
                        .generate(Generate {
                            prompt: Prompt::Tokens(tokens),
                            choosing: Choosing { temperature: 1.0, top_p: 1.0, seed: 1 },
                            max_tokens: Some(65),
                            stop: Vec::new(),
                            n: 1,
                            logprobs: Some(0),
                        })
                        .unwrap()
                })
                .collect();
            let mut first = None;
            let mut tokens = 0;
            for events in &mut all {
                while let Some(event) = events.blocking_recv() {
                    if let GenerateEvent::Text { logprobs, .. } = event {
                        first.get_or_insert_with(|| begun.elapsed());
                        tokens += logprobs.len();
                    }
                }
            }
            let (first, whole) = (first.unwrap().as_secs_f64(), begun.elapsed().as_secs_f64());
            eprintln!(
                "  {streams} x {length}: first token {:.0} ms ({:.0} tokens/s), decode {:.0} tokens/s in all, {tokens} tokens",
                first * 1e3,
                f64::from(length) / first,
                (tokens as f64 - 1.0) / (whole - first),
            );
        }
    }
}
