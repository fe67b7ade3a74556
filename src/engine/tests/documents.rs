//! Documents that are computed once: the same answers whatever is kept, nothing shared with who may not, counted.

use super::{engine as engine_with, *};
use crate::{domain::DocumentKv, engine::ops::attention::POSITIONS};

/// A question about documents, each of a number of tokens and a seed of its own.
fn about(documents: &[(usize, u32)]) -> Encoded {
    let tokens = |n: usize, seed: u32| (0..n as u32).map(move |i| 3 + (i * 41 + seed * 17 + i * i * seed) % 250);
    let mut out = Encoded { tokens: tokens(9, 90).collect(), documents: Vec::new() };
    for (len, seed) in documents {
        let begin = out.tokens.len();
        out.tokens.extend(tokens(*len, *seed));
        out.documents.push(begin..begin + len);
        out.tokens.extend(tokens(3, 91));
    }
    out.tokens.extend(tokens(11, 92));
    out
}

fn reusing() -> EngineOptions {
    behind(&[])
}

/// Computing documents behind these tokens.
fn behind(anchor: &[u32]) -> EngineOptions {
    let reuse = Reuse { anchor: anchor.into(), recompute: 20, fewest: 30, most: 200 };
    EngineOptions { chunks: Chunks::As(reuse), ..EngineOptions::default() }
}

/// Anything but a special token, so that answers have all their tokens.
#[derive(Debug)]
struct Plain;

impl TokenMask for Plain {
    fn allow(&self, _: &[u32], allowed: &mut Allowed) {
        (3..200).for_each(|token| allowed.add(token));
    }
}

fn with_documents(prompt: &Encoded) -> Generate {
    let mask: Arc<dyn TokenMask> = Arc::new(Plain);
    Generate { logprobs: Some(2), mask: Some(mask), ..generate(Prompt::Encoded(prompt.clone()), WARM, 10) }
}

/// The whole usage too.
fn usage_of(engine: &Engine, g: Generate) -> Usage {
    let mut events = engine.generate(g).unwrap();
    while let Some(event) = events.blocking_recv() {
        if let GenerateEvent::Usage(usage) = event {
            return usage;
        }
    }
    panic!("no usage");
}

#[test]
fn answers_about_documents_do_not_depend_on_what_is_kept_or_what_runs_beside() {
    let prompts = [
        about(&[(50, 1), (70, 2)]),
        about(&[(70, 2), (50, 1)]),
        about(&[(50, 1), (50, 1)]),
        about(&[(33, 3), (29, 4)]),
    ];
    // Behind nothing, and behind more tokens than one step has.
    let anchor = prompts[0].tokens[..9].to_vec();
    for reusing in [|_: &[u32]| reusing(), behind] {
        independent(&prompts, &|| reusing(&anchor));
    }
}

fn independent(prompts: &[Encoded], reusing: &dyn Fn() -> EngineOptions) {
    let alone = |prompt: &Encoded| ask(&engine_with(reusing()), with_documents(prompt));
    let want: Vec<Answer> = prompts.iter().map(alone).collect();
    // All that was asked before is kept; then again, with nothing to be computed but the last tokens.
    let warm = engine_with(reusing());
    for _ in 0..2 {
        for (prompt, want) in prompts.iter().zip(&want) {
            assert_eq!(ask(&warm, with_documents(prompt)), *want);
        }
    }
    // All at once, in steps of few tokens, with so little memory that they give way to each other and what is kept goes.
    for step_tokens in [7, 64] {
        let cache_bytes = Some(9 * POSITIONS * warm.info().kv_bytes_per_token);
        let small = engine_with(EngineOptions { step_tokens, cache_bytes, context: Some(230), ..reusing() });
        for _ in 0..3 {
            let under_way: Vec<_> = prompts.iter().map(|p| small.generate(with_documents(p)).unwrap()).collect();
            for (events, want) in under_way.into_iter().zip(&want) {
                assert_eq!(collect(events, 1), *want, "steps of {step_tokens}");
            }
        }
        assert!(small.counters().attached > 0);
    }
    // Forks share what is attached.
    let forks = Generate { n: 3, ..with_documents(&prompts[0]) };
    let (cold, again) = (engine_with(reusing()), ask(&warm, forks.clone()));
    assert_eq!(ask(&cold, forks), again);
    assert_eq!(again.logprobs[0], want[0].logprobs[0]);
}

#[test]
fn documents_are_counted_and_shared_only_with_who_may() {
    let engine = engine_with(reusing());
    let (first, moved) = (about(&[(50, 1), (70, 2)]), about(&[(70, 2), (50, 1)]));
    let ask = |prompt: &Encoded, sharing: &[u8], exact| {
        let usage = usage_of(&engine, Generate { sharing: sharing.to_vec(), exact, ..with_documents(prompt) });
        (usage.cached_tokens, usage.chunk_tokens, usage.recomputed_tokens)
    };
    assert_eq!(ask(&first, b"a", false), (0, 0, 0));
    // The same again: its own tokens are 9 + 20 + 3 + 20 + 3 + 11, two whole blocks.
    assert_eq!(ask(&first, b"a", false), (64 + 30 + 50, 30 + 50, 40));
    assert_eq!(engine.resident(&moved, false, b"a"), 80);
    let before = engine.counters();
    assert_eq!(ask(&moved, b"a", false), (80, 80, 40));
    let after = engine.counters();
    assert_eq!((after.prefilled - before.prefilled, after.attached - before.attached), (66, 80));
    // Another tenant finds neither the documents nor what was computed after them.
    assert_eq!(engine.resident(&moved, false, b"b"), 0);
    assert_eq!(ask(&moved, b"b", false), (0, 0, 0));
    assert_eq!(engine.counters().prefilled - after.prefilled, 66 + 120);
    // Who wants it exact reads nothing that depends on them.
    assert_eq!(engine.resident(&moved, true, b"a"), 0);
    assert_eq!(ask(&moved, b"a", true), (0, 0, 0));
    assert_eq!(ask(&moved, b"a", true), (128, 0, 0), "but its own beginning");
}

#[test]
fn documents_are_computed_beforehand_pinned_and_let_go() {
    let engine = engine_with(behind(&[7, 8]));
    let prompt = about(&[(40, 1), (29, 3), (33, 2)]);
    let state = |sharing: &[u8]| {
        let said = engine.kv_of(&prompt, sharing);
        let here = |d: &DocumentKv| (d.tokens, d.in_memory, d.pinned_s.is_some());
        (said.prefix_tokens, said.documents.iter().map(here).collect::<Vec<_>>())
    };
    assert_eq!(state(b"a"), (0, vec![(40, false, false), (33, false, false)]), "one is too short");
    let keep = Some(Duration::from_secs(900));
    usage_of(&engine, Generate { sharing: b"a".to_vec(), keep, ..with_documents(&prompt) });
    assert_eq!(state(b"a"), (96, vec![(40, true, true), (33, true, true)]));
    assert_eq!(state(b"b"), (0, vec![(40, false, false), (33, false, false)]), "another's");
    let left = engine.kv_of(&prompt, b"a").documents[0].pinned_s.unwrap();
    assert!((800..=900).contains(&left), "{left}");
    let stat = engine.kv_stat();
    // Two blocks each; the anchor's is a beginning's.
    assert_eq!((stat.documents, stat.document_blocks, stat.pinned, stat.pinned_blocks), (2, 4, 2, 4));
    assert!(stat.prefix_blocks >= 3 && stat.disk.is_none() && stat.device_bytes > 0);
    // A shorter pin does not end a longer one.
    usage_of(&engine, Generate { sharing: b"a".to_vec(), keep: Some(Duration::ZERO), ..with_documents(&prompt) });
    assert!(engine.kv_of(&prompt, b"a").documents[0].pinned_s.unwrap() > 700);
    let one = Encoded { documents: prompt.documents[..1].to_vec(), ..prompt.clone() };
    assert_eq!(engine.kv_clear(Some(&one), b"b").unwrap().entries, 0);
    assert_eq!(engine.kv_clear(Some(&one), b"a").unwrap().entries, 1);
    assert_eq!(state(b"a").1, [(40, false, false), (33, true, true)]);
    assert!(engine.kv_clear(None, b"").unwrap().entries > 3);
    assert_eq!(state(b"a"), (0, vec![(40, false, false), (33, false, false)]));
    assert_eq!(engine.kv_stat().prefix_blocks + engine.kv_stat().document_blocks, 0);
}

#[test]
fn without_reuse_documents_are_computed_where_they_stand() {
    let plain = engine_with(EngineOptions::default());
    let prompt = about(&[(50, 1), (70, 2)]);
    let ask = |engine: &Engine, g: Generate| {
        let answer = ask(engine, g);
        (answer.texts, answer.logprobs)
    };
    let want = ask(&plain, with_documents(&prompt));
    let unmarked = Generate { prompt: Prompt::Tokens(prompt.tokens.clone()), ..with_documents(&prompt) };
    assert_eq!(ask(&engine_with(reusing()), unmarked), want);
    let reusing = engine_with(reusing());
    let reused = ask(&reusing, with_documents(&prompt));
    assert_ne!(reused.1, want.1, "what the documents do not see of each other shows");
    assert_eq!(ask(&reusing, Generate { exact: true, ..with_documents(&prompt) }), want);
    // Too short, and too long.
    let sizes = Reuse { recompute: 0, fewest: 30, most: 69, ..Reuse::default() };
    let choosy = engine_with(EngineOptions { chunks: Chunks::As(sizes), ..EngineOptions::default() });
    let short = about(&[(29, 1), (70, 2)]);
    assert_eq!(ask(&choosy, with_documents(&short)), ask(&plain, with_documents(&short)));
    let overlapping = Encoded { documents: vec![3..40, 39..60], ..prompt };
    let error = reusing.generate(with_documents(&overlapping)).unwrap_err();
    assert!(error.to_string().contains("overlap"), "{error}");
}

#[test]
fn a_document_right_behind_what_it_was_computed_behind_is_exact() {
    let prompt = about(&[(90, 1)]);
    let anchor = prompt.tokens[..9].to_vec();
    let reuse = Reuse { anchor: anchor.as_slice().into(), recompute: 0, fewest: 30, most: 200 };
    let engine = engine_with(EngineOptions { chunks: Chunks::As(reuse), ..EngineOptions::default() });
    let exact = ask(&engine, Generate { exact: true, ..with_documents(&prompt) });
    for _ in 0..2 {
        let usage = usage_of(&engine, with_documents(&prompt));
        assert_eq!(usage.chunk_reuse, Some(ChunkReuse::Reused));
        assert_eq!(ask(&engine, with_documents(&prompt)).logprobs, exact.logprobs);
    }
    // Elsewhere it is not, and does not depend on what is kept either.
    let moved = about(&[(34, 2), (80, 1)]);
    let want = ask(&engine, with_documents(&moved));
    assert_ne!(want.logprobs, ask(&engine, Generate { exact: true, ..with_documents(&moved) }).logprobs);
    let cold = engine_with(behind(&anchor));
    let (first, again) = (ask(&cold, with_documents(&moved)), ask(&cold, with_documents(&moved)));
    assert_eq!(first, again);
}

#[test]
fn without_a_record_that_keeps_the_bound_documents_are_not_reused() {
    let dir = tempfile::tempdir().unwrap();
    let bound = Bound { divergence: 0.1, top1: 0.9, f1: 0.8 };
    let options =
        || EngineOptions { chunks: Chunks::Measured { dir: dir.path().to_owned(), bound }, ..EngineOptions::default() };
    let prompt = about(&[(90, 1)]);
    let why = |engine: &Engine, g: Generate| usage_of(engine, g).chunk_reuse;
    let unmeasured = engine_with(options());
    assert_eq!(why(&unmeasured, with_documents(&prompt)), Some(ChunkReuse::NoFidelityRecord));
    assert_eq!(why(&unmeasured, generate(Prompt::Tokens(prompt.tokens.clone()), GREEDY, 1)), None);
    assert!(unmeasured.info().chunk_reuse.contains("weir kv calibrate"));

    let identity = unmeasured.known.identity();
    let mean = |mean| fidelity::record::Mean { mean, low: mean, high: mean };
    let record = |divergence| FidelityRecord {
        identity: format!("{identity:032x}"),
        model: "tiny".into(),
        fidelity: fidelity::record::Fidelity {
            variant: "head-0".into(),
            questions: 3,
            divergence: mean(divergence),
            top1: mean(0.95),
            f1: mean(0.9),
            computed: 0.1,
        },
        answer_tokens: 32,
        data: String::new(),
        weir: String::new(),
        measured_at: String::new(),
    };
    record(0.2).write(dir.path(), identity).unwrap();
    let bad = engine_with(options());
    assert_eq!(why(&bad, with_documents(&prompt)), Some(ChunkReuse::BelowBound));
    let path = record(0.02).write(dir.path(), identity).unwrap();
    let good = engine_with(options());
    assert_eq!(why(&good, with_documents(&prompt)), Some(ChunkReuse::Reused));
    assert_eq!(why(&good, Generate { exact: true, ..with_documents(&prompt) }), Some(ChunkReuse::AskedExact));
    assert_eq!(why(&good, with_documents(&about(&[(40, 1)]))), Some(ChunkReuse::OutOfSize));
    std::fs::write(&path, "{").unwrap();
    let dir_of = tempfile::tempdir().unwrap();
    let file = tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir_of.path());
    let error = Engine::load(&file, options()).err().unwrap().to_string();
    assert!(error.contains(".json") && error.contains("weir kv calibrate"), "{error}");
}

#[test]
fn documents_come_back_from_disk_after_a_start_and_a_damaged_file_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path());
    let load = || {
        let disk = Some((dir.path().join("kv"), 1 << 20));
        Engine::load(&model, EngineOptions { disk, ..reusing() }).unwrap()
    };
    let prompt = about(&[(50, 1), (70, 2)]);
    let want = ask(&load(), with_documents(&prompt));
    // The writer has ended with the engine.
    let again = load();
    assert_eq!(ask(&again, with_documents(&prompt)), want);
    let counters = again.counters();
    assert_eq!((counters.loaded, counters.attached), (80, 80));
    drop(again);
    let slab = std::fs::read_dir(dir.path().join("kv")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&slab).unwrap();
    bytes.iter_mut().step_by(101).for_each(|byte| *byte ^= 16);
    std::fs::write(&slab, bytes).unwrap();
    let damaged = load();
    assert_eq!(ask(&damaged, with_documents(&prompt)), want);
    assert_eq!(damaged.counters().loaded, 0);
}
