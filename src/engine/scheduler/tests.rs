use proptest::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::engine::{GenerateEvent, sampler::Choosing};

const LIMITS: Limits = Limits { step_tokens: 16, sequences: 4, positions: 200 };

fn request(prompt: usize, max_tokens: usize, choices: u32) -> (Arc<Request>, UnboundedReceiver<GenerateEvent>) {
    let (events, receiver) = unbounded_channel();
    let request = Request {
        prompt: vec![1; prompt],
        choosing: Choosing { temperature: 0.0, top_p: 1.0, seed: 0 },
        max_tokens,
        stop: Vec::new(),
        logprobs: None,
        choices,
        events,
    };
    (Arc::new(request), receiver)
}

/// Does what runner and worker do, without a model; gives the parts that were run.
fn step(scheduler: &mut Scheduler) -> Vec<Part> {
    scheduler.admit();
    let parts = scheduler.plan();
    let mut finished = Vec::new();
    for part in &parts {
        scheduler.running[part.sequence].kv.advance(part.count);
    }
    for part in parts.iter().filter(|p| p.samples) {
        let forks = match scheduler.running[part.sequence].generated.is_empty() {
            true => scheduler.fork(part.sequence),
            false => 0..0,
        };
        for index in std::iter::once(part.sequence).chain(forks) {
            scheduler.running[index].generated.push(7);
            if scheduler.running[index].generated.len() == scheduler.running[index].request.max_tokens {
                finished.push(index);
                scheduler.finished(index);
            }
        }
    }
    scheduler.remove(&finished);
    parts
}

#[test]
fn decoding_goes_before_prefill_and_prompts_share_what_is_left() {
    let mut scheduler = Scheduler::new(LIMITS);
    let (short, _a) = request(3, 10, 1);
    let (long, _b) = request(40, 10, 1);
    scheduler.push(short);
    scheduler.push(long);
    let part = |sequence, count, samples| Part { sequence, count, samples };
    assert_eq!(step(&mut scheduler), [part(0, 3, true), part(1, 13, false)]);
    assert_eq!(step(&mut scheduler), [part(0, 1, true), part(1, 15, false)]);
    assert_eq!(step(&mut scheduler), [part(0, 1, true), part(1, 12, true)]);
    assert_eq!(step(&mut scheduler), [part(0, 1, true), part(1, 1, true)]);
}

#[test]
fn admission_keeps_order_and_bounds() {
    let mut scheduler = Scheduler::new(LIMITS);
    let (a, _a) = request(10, 90, 1);
    let (b, _b) = request(10, 100, 1);
    let (c, _c) = request(5, 5, 1);
    scheduler.push(a);
    scheduler.push(b);
    scheduler.push(c);
    scheduler.admit();
    // 100 positions run; 110 more do not fit, and the small one does not overtake.
    assert_eq!(scheduler.running.len(), 1);
    assert_eq!(scheduler.take_left(), 1);
    drop(_a);
    assert_eq!(scheduler.drop_abandoned(), 1);
    scheduler.admit();
    assert_eq!(scheduler.running.len(), 2);
    assert_eq!(scheduler.take_left(), 2);
    assert!(!scheduler.is_idle());
}

#[test]
fn abandoned_requests_leave_the_queue_too() {
    let mut scheduler = Scheduler::new(Limits { sequences: 1, ..LIMITS });
    let (a, _a) = request(1, 1, 1);
    let (b, b_events) = request(1, 1, 1);
    scheduler.push(a);
    scheduler.push(b);
    scheduler.admit();
    drop(b_events);
    scheduler.drop_abandoned();
    assert_eq!(scheduler.take_left(), 2);
    assert_eq!(step(&mut scheduler).len(), 1);
    assert!(scheduler.is_idle());
}

#[test]
fn a_request_larger_than_the_bound_runs_alone() {
    let mut scheduler = Scheduler::new(LIMITS);
    let (big, _big) = request(150, 100, 2);
    scheduler.push(big);
    scheduler.admit();
    assert_eq!(scheduler.running.len(), 1);
}

proptest! {
    #[test]
    fn every_request_ends_with_its_tokens_and_no_step_exceeds_its_bound(
        requests in prop::collection::vec((1usize..60, 1usize..12, 1u32..4), 1..12),
    ) {
        let mut scheduler = Scheduler::new(LIMITS);
        let mut receivers = Vec::new();
        let mut wanted = 0;
        for (prompt, max_tokens, choices) in requests {
            let (request, events) = request(prompt, max_tokens, choices);
            // All prompt tokens once, all generated ones but each choice's last.
            wanted += prompt + (max_tokens - 1) * choices as usize;
            scheduler.push(request);
            receivers.push(events);
        }
        let mut computed = 0;
        for _ in 0..5_000 {
            if scheduler.is_idle() {
                break;
            }
            let parts = step(&mut scheduler);
            let tokens: usize = parts.iter().map(|p| p.count).sum();
            prop_assert!((1..=LIMITS.step_tokens).contains(&tokens));
            prop_assert!(scheduler.running.len() <= LIMITS.sequences);
            computed += tokens;
        }
        prop_assert!(scheduler.is_idle());
        prop_assert_eq!(computed, wanted);
    }
}
