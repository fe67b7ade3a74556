use std::time::{Duration, Instant};

use super::{
    model::Config,
    model_file::TensorType,
    testing::{CONTEXT, reference_logits, tiny},
    *,
};
use crate::domain::Role;

mod documents;

const GREEDY: Choosing = Choosing { temperature: 0.0, top_p: 1.0, seed: 0 };
const WARM: Choosing = Choosing { temperature: 1.0, top_p: 0.95, seed: 42 };

fn engine(options: EngineOptions) -> Engine {
    let dir = tempfile::tempdir().unwrap();
    Engine::load(&tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path()), options).unwrap()
}

fn prompt(n: usize, seed: u32) -> Prompt {
    Prompt::Tokens((0..n as u32).map(|i| 3 + (i * 37 + seed * 11) % 250).collect())
}

fn generate(prompt: Prompt, choosing: Choosing, max_tokens: u32) -> Generate {
    Generate {
        prompt,
        choosing,
        max_tokens: Some(max_tokens),
        stop: Vec::new(),
        n: 1,
        priority: 0,
        exact: false,
        keep: None,
        sharing: Vec::new(),
        deadline: None,
        logprobs: None,
        mask: None,
    }
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    texts: Vec<String>,
    logprobs: Vec<Vec<TokenLogprob>>,
    finish: Vec<Option<FinishReason>>,
    usage: Option<Usage>,
}

fn collect(mut events: UnboundedReceiver<GenerateEvent>, n: usize) -> Answer {
    let mut answer =
        Answer { texts: vec![String::new(); n], logprobs: vec![Vec::new(); n], finish: vec![None; n], usage: None };
    while let Some(event) = events.blocking_recv() {
        assert_eq!(answer.usage, None, "nothing comes after the usage");
        match event {
            GenerateEvent::Text { choice, text, logprobs } => {
                assert_eq!(answer.finish[choice as usize], None, "no text after the end");
                answer.texts[choice as usize].push_str(&text);
                answer.logprobs[choice as usize].extend(logprobs);
            }
            GenerateEvent::Finish { choice, reason } => answer.finish[choice as usize] = Some(reason),
            // What was there already depends on what was asked before; nothing else does.
            GenerateEvent::Usage(usage) => {
                answer.usage = Some(Usage { cached_tokens: 0, chunk_tokens: 0, recomputed_tokens: 0, ..usage });
                CACHED.set(usage.cached_tokens);
            }
            GenerateEvent::Failed(error) => panic!("{error}"),
        }
    }
    answer
}

thread_local! {
    /// Cached tokens of the last answer that this thread has collected.
    static CACHED: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

fn ask(engine: &Engine, g: Generate) -> Answer {
    let n = g.n as usize;
    collect(engine.generate(g).unwrap(), n)
}

#[test]
fn greedy_answers_are_the_references_best_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let path = tiny(TensorType::Q8_0, TensorType::F32).write(dir.path());
    let engine = Engine::load(&path, EngineOptions::default()).unwrap();
    let mut tokens: Vec<u32> = (0..30).map(|i| 3 + i * 8).collect();
    let g = Generate { logprobs: Some(3), ..generate(Prompt::Tokens(tokens.clone()), GREEDY, 12) };
    let answer = ask(&engine, g);
    assert!(answer.logprobs[0].len() == 12 || answer.finish[0] == Some(FinishReason::Stop));
    for logprob in &answer.logprobs[0] {
        let logits = reference_logits(&path, &tokens).pop().unwrap();
        let log = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        assert_eq!(engine.tokenizer.bytes(best as u32), logprob.bytes);
        assert!((f64::from(logprob.logprob) - (logits[best] - log)).abs() < 3e-3);
        assert_eq!(logprob.top.len(), 3);
        assert_eq!(logprob.top[0].logprob, logprob.logprob);
        tokens.push(best as u32);
    }
}

/// Four digits, then the end; or nothing at all.
#[derive(Debug)]
struct Digits {
    dead_end: bool,
}

impl TokenMask for Digits {
    fn allow(&self, answer: &[u32], allowed: &mut Allowed) {
        match answer.len() {
            // The tiny model's tokens: three special ones, then the bytes.
            0..4 => (b'0'..=b'9').for_each(|digit| allowed.add(3 + u32::from(digit))),
            _ if self.dead_end => {}
            _ => allowed.add(2),
        }
    }
}

#[test]
fn a_mask_decides_what_may_come_and_log_probabilities_stay_the_models_own() {
    let engine = engine(EngineOptions::default());
    for choosing in [GREEDY, WARM] {
        let g = |dead_end| Generate {
            n: 2,
            logprobs: Some(1),
            mask: Some(Arc::new(Digits { dead_end })),
            ..generate(prompt(40, 2), choosing, 30)
        };
        let answer = ask(&engine, g(false));
        for (text, logprobs) in answer.texts.iter().zip(&answer.logprobs) {
            assert!(text.len() == 4 && text.bytes().all(|b| b.is_ascii_digit()), "{text:?}");
            // Ten digits of 288 tokens would have a tenth each if log-probabilities were of what is allowed.
            let sum: f64 = logprobs.iter().map(|l| f64::from(l.logprob)).sum();
            assert!(sum < 4.0 * 0.05f64.ln(), "{sum}");
            assert!(logprobs.iter().all(|l| l.entropy.is_some_and(|h| h > 1.0 && h < 288f32.ln())));
        }
        assert_eq!(answer.finish, [Some(FinishReason::Stop); 2]);
        let mut events = engine.generate(g(true)).unwrap();
        let mut failed = 0;
        while let Some(event) = events.blocking_recv() {
            assert!(!matches!(event, GenerateEvent::Usage(_)));
            failed += u32::from(matches!(event, GenerateEvent::Failed(EngineError::NothingAllowed)));
        }
        assert_eq!(failed, 2);
    }
    wait_until("the engine is idle", || engine.load_state() == (0, 0));
}

#[test]
fn eight_requests_at_once_answer_as_each_does_alone() {
    let alone = engine(EngineOptions { threads: 1, ..EngineOptions::default() });
    let together = engine(EngineOptions { threads: 2, step_tokens: 24, ..EngineOptions::default() });
    let requests: Vec<Generate> =
        (0..8).map(|i| generate(prompt(5 + 12 * i, i as u32), if i % 2 == 0 { GREEDY } else { WARM }, 20)).collect();
    let want: Vec<Answer> = requests.iter().map(|g| ask(&alone, g.clone())).collect();
    let running: Vec<_> = requests.iter().map(|g| together.generate(g.clone()).unwrap()).collect();
    for (events, want) in running.into_iter().zip(want) {
        assert_eq!(collect(events, 1), want);
    }
    wait_until("the engine is idle", || together.load_state() == (0, 0));
}

#[test]
fn choices_of_one_request_are_those_of_their_own_streams() {
    let engine = engine(EngineOptions::default());
    let g = Generate { n: 3, logprobs: Some(0), ..generate(prompt(40, 1), WARM, 16) };
    let answer = ask(&engine, g.clone());
    assert_eq!(ask(&engine, g.clone()), answer);
    assert!(answer.texts[0] != answer.texts[1] && answer.texts[1] != answer.texts[2]);
    let one = ask(&engine, Generate { n: 1, ..g });
    assert_eq!(one.texts[0], answer.texts[0]);
    let usage = answer.usage.unwrap();
    assert_eq!(usage.prompt_tokens, 40);
    // An answer that ended by itself has one more token than it shows.
    let shown: usize = answer.logprobs.iter().map(Vec::len).sum();
    let ended = answer.finish.iter().filter(|f| **f == Some(FinishReason::Stop)).count();
    assert_eq!(usage.completion_tokens as usize, shown + ended);
}

#[test]
fn a_beginning_that_was_computed_is_reused_and_changes_nothing() {
    let fresh = || engine(EngineOptions::default());
    let one = fresh();
    let Prompt::Tokens(first) = prompt(70, 3) else { panic!() };
    let g =
        |tokens: &[u32], n| Generate { n, logprobs: Some(2), ..generate(Prompt::Tokens(tokens.to_vec()), WARM, 12) };
    let answer = ask(&one, g(&first, 1));
    assert_eq!((CACHED.get(), one.counters().prefilled), (0, 70));
    // Who asks beforehand is told what the next one finds.
    let resident = |tokens: &[u32]| one.resident(&tokens.to_vec().into(), false, b"");
    assert_eq!((resident(&first), resident(&first[..64]), resident(&first[1..])), (64, 32, 0));
    let pace = one.pace();
    assert!(pace.prefill_tokens_per_s > 0.0 && pace.decode_tokens_per_s > 0.0, "{pace:?}");
    wait_until("nothing is to be computed", || one.pace().pending == 0);
    // Two blocks of 32 are whole; the same bits come out.
    assert_eq!(ask(&one, g(&first, 1)), answer);
    assert_eq!((CACHED.get(), one.counters().prefilled), (64, 76));
    assert_eq!(one.counters().reused, 64);
    // A conversation that goes on, after an answer; and one that begins alike.
    let mut next = first.clone();
    next.extend((0..40).map(|i| 7 + i % 90));
    let mut other = first[..40].to_vec();
    other.extend((0..40).map(|i| 9 + i % 80));
    for (tokens, cached) in [(&next, 64), (&other, 32)] {
        let want = ask(&fresh(), g(tokens, 2));
        assert_eq!(CACHED.get(), 0);
        assert_eq!(ask(&one, g(tokens, 2)), want);
        assert_eq!(CACHED.get(), cached);
    }
    // A prompt of whole blocks: the last is computed all the same.
    ask(&one, g(&next[..96], 1));
    ask(&one, g(&next[..96], 1));
    assert_eq!(CACHED.get(), 64);
}

#[test]
fn five_samples_cost_one_prefill() {
    let engine = engine(EngineOptions::default());
    ask(&engine, Generate { n: 5, ..generate(prompt(100, 8), WARM, 10) });
    let counters = engine.counters();
    assert_eq!((counters.prefilled, counters.reused), (100, 0));
    assert!(counters.decoded <= 50);
}

/// What was guessed and found right or wrong leaves no trace: the same answers, greedy and drawn, with log-probabilities.
#[test]
fn guesses_change_no_answer() {
    let with = engine(EngineOptions::default());
    let without = engine(EngineOptions { prompt_lookup: 0, ..EngineOptions::default() });
    for i in 0..30u32 {
        // A prompt that repeats itself, and small temperatures: much to guess.
        let tokens = (0..40).map(|t| 3 + (t % 7 + i) * 5 % 90).collect();
        let choosing = Choosing { temperature: f64::from(i % 3) * 0.4, top_p: 1.0, seed: u64::from(i) };
        let g = Generate { logprobs: Some(2), n: 1 + i % 2, ..generate(Prompt::Tokens(tokens), choosing, 60) };
        assert_eq!(ask(&with, g.clone()), ask(&without, g), "request {i}");
    }
    let counters = with.counters();
    assert!(counters.guessed_right > 20 && counters.guessed_right < counters.guessed, "{counters:?}");
    let without = without.counters();
    assert_eq!((without.guessed, without.decoded), (0, counters.decoded));
}

/// Whole contexts compete for one: constant preemption. Every answer is, to the bit, what it is alone.
#[test]
fn answers_do_not_depend_on_who_had_to_give_way() {
    let narrow = engine(EngineOptions { cache_bytes: Some(0), step_tokens: 40, ..EngineOptions::default() });
    let wide = engine(EngineOptions { max_sequences: 1, ..EngineOptions::default() });
    let requests: Vec<Generate> = (0..12)
        .map(|i| {
            let choosing = Choosing { seed: u64::from(i), ..if i % 2 == 0 { GREEDY } else { WARM } };
            let n = 1 + u32::from(i % 4 == 3);
            Generate { n, priority: i as i32 % 3, ..generate(prompt(10 + 2 * i as usize, i), choosing, 80) }
        })
        .collect();
    let running: Vec<_> = requests.iter().map(|g| narrow.generate(g.clone()).unwrap()).collect();
    for (events, g) in running.into_iter().zip(&requests) {
        let one = |n: u32| Generate { n, ..g.clone() };
        let got = collect(events, g.n as usize);
        let want = ask(&engine(EngineOptions::default()), one(g.n));
        assert_eq!(got.texts, want.texts);
        assert_eq!(ask(&wide, one(1)).texts[0], want.texts[0]);
    }
    let counters = narrow.counters();
    assert!(counters.preempted > 0 && counters.recomputed > 0, "{counters:?}");
}

#[test]
fn what_is_kept_makes_way_for_what_runs() {
    let config = {
        let dir = tempfile::tempdir().unwrap();
        Config::read(&ModelFile::open(&tiny(TensorType::F32, TensorType::F32).write(dir.path())).unwrap()).unwrap()
    };
    // Room for one context, and a block.
    let bytes = CONTEXT * config.kv_bytes_per_token();
    let small = engine(EngineOptions { cache_bytes: Some(bytes), ..EngineOptions::default() });
    let large = engine(EngineOptions::default());
    for round in 0..40u32 {
        let g = generate(prompt(60 + (round as usize * 13) % 60, round % 2), GREEDY, 20);
        assert_eq!(ask(&small, g.clone()), ask(&large, g), "round {round}");
        assert!(small.counters().kept as usize <= CONTEXT + 32, "{:?}", small.counters());
    }
    assert!(small.counters().reused > 0, "nothing was reused");
    assert!(small.counters().reused < large.counters().reused, "nothing had to go");
}

#[test]
fn stop_strings_cut_the_text_and_its_logprobs() {
    let engine = engine(EngineOptions::default());
    let g = Generate { logprobs: Some(0), ..generate(prompt(20, 4), WARM, 40) };
    let whole = ask(&engine, g.clone());
    let text = &whole.texts[0];
    let middle: Vec<usize> = text.char_indices().map(|(i, _)| i).skip(8).take(4).collect();
    let stop = &text[middle[0]..middle[3]];
    let cut = ask(&engine, Generate { stop: vec![stop.to_owned(), "never seen".to_owned()], ..g });
    assert_eq!(cut.finish[0], Some(FinishReason::Stop));
    assert_eq!(cut.texts[0], text[..text.find(stop).unwrap()]);
    assert!(cut.logprobs[0].len() < whole.logprobs[0].len());
    assert_eq!(cut.logprobs[0], whole.logprobs[0][..cut.logprobs[0].len()]);
    assert!(cut.usage.unwrap().completion_tokens < 40);
}

#[test]
fn prompts_and_bounds_are_checked_with_numbers() {
    let engine = engine(EngineOptions::default());
    let fail = |g: Generate| engine.generate(g).err().unwrap();
    let error = fail(generate(prompt(CONTEXT, 0), GREEDY, 1));
    assert!(matches!(error, EngineError::PromptTooLong { prompt: CONTEXT, exact: true, context: CONTEXT }), "{error}");
    // One token less fits, and leaves room for exactly one.
    let answer = ask(&engine, Generate { max_tokens: None, ..generate(prompt(CONTEXT - 1, 0), GREEDY, 1) });
    assert_eq!(answer.usage.unwrap().completion_tokens, 1);
    for g in [
        Generate { n: 0, ..generate(prompt(3, 0), GREEDY, 1) },
        Generate { n: 1000, ..generate(prompt(3, 0), GREEDY, 1) },
        generate(prompt(3, 0), GREEDY, 0),
        generate(prompt(3, 0), Choosing { temperature: -1.0, ..GREEDY }, 1),
        generate(prompt(3, 0), Choosing { temperature: f64::NAN, ..GREEDY }, 1),
        generate(prompt(3, 0), Choosing { top_p: 1.5, ..GREEDY }, 1),
        Generate { logprobs: Some(21), ..generate(prompt(3, 0), GREEDY, 1) },
        generate(Prompt::Tokens(vec![1, 1 << 20]), GREEDY, 1),
        generate(Prompt::Tokens(Vec::new()), GREEDY, 1),
    ] {
        let error = fail(g);
        assert!(matches!(error, EngineError::BadRequest(_)), "{error}");
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(10), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_dropped_receiver_frees_the_place() {
    // One place: the second waits for the first, and both are given up.
    let engine = engine(EngineOptions { max_sequences: 1, ..EngineOptions::default() });
    let long = || generate(prompt(3, 1), WARM, 150);
    let mut first = engine.generate(long()).unwrap();
    let second = engine.generate(long()).unwrap();
    assert!(first.blocking_recv().is_some());
    drop((first, second));
    wait_until("the engine is idle", || engine.load_state() == (0, 0));
    assert!(ask(&engine, generate(prompt(3, 2), GREEDY, 4)).usage.is_some());
}

#[test]
fn dropping_the_engine_ends_its_streams() {
    let engine = engine(EngineOptions::default());
    let mut events = engine.generate(generate(prompt(3, 1), WARM, 150)).unwrap();
    drop(engine);
    while events.blocking_recv().is_some() {}
}

#[test]
fn seeds_decide_and_nothing_else_does() {
    let engine = engine(EngineOptions::default());
    let with = |seed| ask(&engine, generate(prompt(30, 2), Choosing { seed, ..WARM }, 24)).texts;
    assert_eq!(with(1), with(1));
    assert_ne!(with(1), with(2));
}

#[test]
fn chat_prompts_go_through_the_template() {
    let engine = engine(EngineOptions::default());
    let messages = vec![Message::text(Role::User, "the <|im_end|>")];
    let ids = engine.encode(&messages).unwrap();
    assert_eq!(ids.tokens.iter().filter(|id| **id < 3).copied().collect::<Vec<_>>(), [1, 2, 1]);
    let chat = ask(&engine, generate(Prompt::Chat(messages), GREEDY, 8));
    assert_eq!(chat, ask(&engine, generate(Prompt::Encoded(ids), GREEDY, 8)));
}

#[test]
fn an_answer_that_has_begun_is_continued_behind_the_template() {
    let engine = engine(EngineOptions::default());
    let messages = vec![Message::text(Role::User, "the")];
    let mut ids = engine.encode(&messages).unwrap();
    ids.tokens.extend(engine.encode_text("the <|im_end|>").unwrap());
    let begun = ask(&engine, generate(Prompt::Begun(messages, "the <|im_end|>".to_owned()), GREEDY, 8));
    assert_eq!(begun, ask(&engine, generate(Prompt::Encoded(ids), GREEDY, 8)), "nothing in it is special");
}

#[test]
fn weights_that_give_no_numbers_end_in_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = tiny(TensorType::F32, TensorType::F32);
    let (_, _, _, bytes) = writer.tensors.iter_mut().find(|(name, ..)| name == "blk.1.ffn_down.weight").unwrap();
    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let engine = Engine::load(&writer.write(dir.path()), EngineOptions::default()).unwrap();
    let mut events = engine.generate(generate(prompt(3, 1), GREEDY, 4)).unwrap();
    assert!(matches!(events.blocking_recv(), Some(GenerateEvent::Failed(EngineError::NotFinite))));
    assert!(events.blocking_recv().is_none());
    wait_until("the place is free", || engine.load_state() == (0, 0));
}

#[test]
fn the_file_is_described() {
    let engine = engine(EngineOptions { context: Some(64), ..EngineOptions::default() });
    let info = engine.info();
    assert_eq!((info.context, info.quantisation.as_str(), info.name.as_str()), (64, "Q4_1", "tiny"));
    assert_eq!(info.kv_bytes_per_token, 2 * 2 * 32 * 2);
    assert!(info.parameters > 30_000);
}

#[test]
fn what_is_urgent_is_due_earlier_and_no_deadline_makes_anybody_wait_longer() {
    let engine = engine(EngineOptions::default());
    let soon = |seconds| Some(Instant::now() + Duration::from_secs(seconds));
    let (urgent, plain) = (engine.due(soon(2), 0), engine.due(None, 0));
    assert!(urgent + 50_000 < plain, "{urgent} {plain}");
    // A deadline farther than a minute off makes no difference, but for the time between the two calls.
    let far = engine.due(soon(600), 0);
    assert!((plain..plain + 10_000).contains(&far), "{far} {plain}");
    assert!(engine.due(None, 1) < plain && engine.due(None, -1) > far, "a priority");
    let past = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
    assert!(engine.due(Some(past), 0) <= urgent, "what is late already");
}
