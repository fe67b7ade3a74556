//! The machine's rules for a bare call with its fallback, over cases and over random outcomes. Trees: [`trees`] for cases,
//! [`laws`] for what holds of all.

mod forms;
mod gates;
mod laws;
mod trees;
mod votes;

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::domain::{CallSpec, Facts, Hash, Note, Spend};

fn spec(model: &str) -> CallSpec {
    CallSpec::bare(model)
}

fn setup(models: &[&str], on: &[ErrorKind]) -> Setup {
    Setup {
        plan: Plan::Call(spec(models[0])),
        fallback: models[1..].iter().map(|m| spec(m)).collect(),
        failover: None,
        fallback_on: on.to_vec(),
        retry: RetryPolicy::default(),
        limits: Limits::default(),
        worst: Default::default(),
        waits: Default::default(),
        seed: 7,
    }
}

fn drain(machine: &mut Machine) -> Vec<Command> {
    std::iter::from_fn(|| machine.poll()).collect()
}

fn failed(call: u32, kind: ErrorKind) -> Event {
    Event::Failed { call, kind, retry_after: None, cost: Spend::default(), down: Vec::new() }
}

fn done(call: u32) -> Event {
    Event::Done { call, answer: Arc::new(Answered::default()) }
}

/// What is known of an answer of one token. Its form's number is drawn from the form, so that no registry is needed.
fn facts(text: &str, entropy: Option<f32>) -> Facts {
    let [a, b, c, d, ..] = Hash::of(format!("{:?}", canonical::form(text)).as_bytes()).0;
    let scores = readings(&[gates::token(-0.1, &[], entropy)], []);
    Facts {
        form: u32::from_le_bytes([a, b, c, d]),
        scores,
        verdict: vote::verdict(text, 3).map(|n| n as u32),
        step: None,
        waits: Default::default(),
    }
}

fn start(call: u32, model: &str, why: AttemptReason) -> Command {
    Command::Start { call, spec: spec(model), why, input: Input::Request, at: Vec::new() }
}

fn timer_at(commands: &[Command]) -> Micros {
    match commands {
        [Command::SetTimer { timer: Timer::Backoff { .. }, at }] => *at,
        other => panic!("not a wait: {other:?}"),
    }
}

#[test]
fn an_answer_is_forwarded_then_finished() {
    let mut machine = Machine::new(setup(&["a"], &[]), 0);
    assert_eq!(drain(&mut machine), [start(0, "a", AttemptReason::Planned)]);
    machine.handle(Event::Started { call: 0 }, 1);
    assert_eq!(drain(&mut machine), []);
    machine.handle(Event::Delta { call: 0 }, 2);
    assert_eq!(drain(&mut machine), [Command::Forward { call: 0 }]);
    machine.handle(Event::Delta { call: 0 }, 3);
    assert_eq!(drain(&mut machine), []);
    machine.handle(done(0), 4);
    assert_eq!(drain(&mut machine), [Command::Finish { call: 0 }]);
    machine.handle(failed(0, ErrorKind::Cut), 5);
    assert_eq!(drain(&mut machine), []);
}

#[test]
fn a_retryable_failure_is_retried_then_falls_back_then_fails() {
    let mut setup = setup(&["a", "a", "b"], &[ErrorKind::ServerError]);
    setup.retry.max_retries = 1;
    let mut machine = Machine::new(setup, 1000);
    drain(&mut machine);
    machine.handle(failed(0, ErrorKind::ServerError), 1000);
    let at = timer_at(&drain(&mut machine));
    assert!((101_000..=201_000).contains(&at), "{at}");
    machine.handle(Event::Timer(Timer::Backoff { call: 0 }), at);
    assert_eq!(drain(&mut machine), [start(1, "a", AttemptReason::Retry)]);
    // The first fallback names the model that has just failed: it is passed over.
    machine.handle(failed(1, ErrorKind::ServerError), at);
    assert_eq!(drain(&mut machine), [start(2, "b", AttemptReason::Fallback)]);
    machine.handle(failed(2, ErrorKind::BadRequest), at);
    assert_eq!(drain(&mut machine), [Command::Fail { kind: ErrorKind::BadRequest, call: Some(2) }]);
}

#[test]
fn a_retry_that_is_denied_is_noted_and_the_failure_answered_at_once() {
    let denied = |call| Command::Note(Note { at: Vec::new(), what: What::RetryDenied { call } });
    let mut setup = setup(&["a", "b"], &[ErrorKind::ServerError]);
    setup.retry.budget = 1;
    let mut machine = Machine::new(setup, 0);
    drain(&mut machine);
    machine.handle(failed(0, ErrorKind::ServerError), 10);
    let at = timer_at(&drain(&mut machine));
    machine.handle(Event::RetryDenied { call: 0 }, 10);
    assert_eq!(drain(&mut machine), [denied(0), start(1, "b", AttemptReason::Fallback)]);
    // Its timer may ring all the same. What was not made is still there for the next.
    machine.handle(Event::Timer(Timer::Backoff { call: 0 }), at);
    machine.handle(Event::RetryDenied { call: 1 }, at);
    assert_eq!(drain(&mut machine), []);
    machine.handle(failed(1, ErrorKind::ServerError), at);
    timer_at(&drain(&mut machine));
    machine.handle(Event::RetryDenied { call: 1 }, at);
    assert_eq!(drain(&mut machine), [denied(1), Command::Fail { kind: ErrorKind::ServerError, call: Some(1) }]);
}

#[test]
fn nothing_is_repeated_after_the_first_byte() {
    let mut machine = Machine::new(setup(&["a", "b"], &ErrorKind::ALL), 0);
    machine.handle(Event::Delta { call: 0 }, 1);
    drain(&mut machine);
    machine.handle(failed(0, ErrorKind::Cut), 2);
    assert_eq!(drain(&mut machine), [Command::Fail { kind: ErrorKind::Cut, call: Some(0) }]);
}

#[test]
fn the_servers_wish_is_a_lower_bound_up_to_the_cap() {
    let policy = RetryPolicy::default();
    let wait = policy.wait(ErrorKind::RateLimited, 0, Some(3_000_000), 1).unwrap();
    assert!((3_000_000..=3_100_000).contains(&wait), "{wait}");
    assert_eq!(policy.wait(ErrorKind::RateLimited, 0, Some(10_000_001), 1), None);
    assert_eq!(policy.wait(ErrorKind::BadRequest, 0, None, 1), None);
}

#[test]
fn waits_grow_are_capped_and_differ_by_seed() {
    let policy = RetryPolicy { max_retries: 100, ..RetryPolicy::default() };
    for retry in 0..100 {
        let full = (200_000i64 << retry.min(20)).min(5_000_000);
        let wait = policy.wait(ErrorKind::Cut, retry, None, u64::from(retry)).unwrap();
        assert!(((full - full / 2)..=full).contains(&wait), "{retry}: {wait}");
    }
    let of = |seed| policy.wait(ErrorKind::Cut, 3, None, seed).unwrap();
    assert_ne!(of(1), of(2));
    assert_eq!(of(1), of(1));
}

#[test]
fn the_deadline_cancels_the_call_and_no_retry_is_planned_beyond_it() {
    let mut with_deadline = setup(&["a"], &[]);
    with_deadline.limits.deadline = Some(50_000);
    let mut machine = Machine::new(with_deadline.clone(), 100);
    assert_eq!(drain(&mut machine)[0], Command::SetTimer { timer: Timer::Deadline, at: 50_100 });
    machine.handle(Event::Timer(Timer::Deadline), 50_100);
    assert_eq!(
        drain(&mut machine),
        [Command::Cancel { call: 0 }, Command::Fail { kind: ErrorKind::Timeout, call: Some(0) }]
    );

    let mut machine = Machine::new(with_deadline, 100);
    drain(&mut machine);
    machine.handle(failed(0, ErrorKind::ServerError), 200);
    assert_eq!(drain(&mut machine), [Command::Fail { kind: ErrorKind::ServerError, call: Some(0) }]);
}

#[test]
fn a_client_that_leaves_cancels_also_while_waiting() {
    let mut machine = Machine::new(setup(&["a", "b"], &ErrorKind::ALL), 0);
    drain(&mut machine);
    machine.handle(failed(0, ErrorKind::Cut), 0);
    drain(&mut machine);
    machine.handle(Event::ClientGone, 1);
    assert_eq!(drain(&mut machine), [Command::Fail { kind: ErrorKind::Cancelled, call: Some(0) }]);
    machine.handle(Event::Timer(Timer::Backoff { call: 0 }), 2);
    assert_eq!(drain(&mut machine), []);
}

/// What the world answers to one call, and noise that must not matter.
#[derive(Clone, Debug)]
enum Answer {
    Whole,
    Streamed,
    Fails(ErrorKind, Option<i64>),
    CutAfterDelta(ErrorKind),
    /// Nothing comes until the deadline.
    Hangs,
    ClientLeaves,
}

fn kind() -> impl Strategy<Value = ErrorKind> {
    proptest::sample::select(ErrorKind::ALL.to_vec())
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        2 => Just(Answer::Whole),
        2 => Just(Answer::Streamed),
        8 => (kind(), proptest::option::of(0i64..20_000_000)).prop_map(|(k, r)| Answer::Fails(k, r)),
        2 => kind().prop_map(Answer::CutAfterDelta),
        1 => Just(Answer::Hangs),
        1 => Just(Answer::ClientLeaves),
    ]
}

prop_compose! {
    fn any_setup()(
        models in proptest::collection::vec(0u8..5, 1..6),
        fallback_on in proptest::collection::vec(kind(), 0..13),
        retry_on in proptest::collection::vec(kind(), 0..13),
        max_retries in 0u32..4,
        budget in 0u32..6,
        max_calls in 0u32..12,
        seed in any::<u64>(),
    ) -> Setup {
        let names: Vec<String> = models.iter().map(|m| format!("m{m}")).collect();
        Setup {
            plan: Plan::Call(spec(&names[0])),
            fallback: names[1..].iter().map(|m| spec(m)).collect(),
            failover: None,
            fallback_on,
            retry: RetryPolicy { max_retries, budget, on: retry_on, ..RetryPolicy::default() },
            limits: Limits { deadline: Some(60_000_000), max_calls, budget: None, tokens: None, first_token: None },
            worst: Default::default(),
            waits: Default::default(),
            seed,
        }
    }
}

/// A run as it can be journalled: the events with their instants, and all commands.
fn run(setup: &Setup, answers: &[Answer]) -> (Vec<(Event, Micros)>, Vec<Command>) {
    let mut now = 5_000;
    let mut machine = Machine::new(setup.clone(), now);
    let mut journal = Vec::new();
    let mut commands = Vec::new();
    let mut deadline = now;
    let mut answers = answers.iter().cycle();
    let mut steps = 0;
    loop {
        steps += 1;
        assert!(steps < 1000, "does not end");
        let Some(command) = machine.poll() else {
            assert!(machine.ended(), "neither a command nor an end: {commands:?}");
            return (journal, commands);
        };
        commands.push(command.clone());
        let mut tell = |event, now| {
            journal.push((Event::clone(&event), now));
            machine.handle(event, now);
        };
        match command {
            Command::SetTimer { timer: Timer::Deadline, at } => deadline = at,
            Command::SetTimer { timer: timer @ Timer::Backoff { .. }, at } => {
                assert!(at >= now && at < deadline);
                now = at;
                tell(Event::Timer(timer), now);
            }
            Command::SetTimer { timer: Timer::Hedge { .. }, .. } => panic!("a bare call is not hedged"),
            Command::Start { call, .. } => {
                now += 10;
                // An event of another call is noise.
                tell(done(call + 100), now);
                match answers.next().unwrap() {
                    Answer::Whole => tell(done(call), now),
                    Answer::Streamed => {
                        tell(Event::Started { call }, now);
                        tell(Event::Delta { call }, now);
                        tell(done(call), now + 1);
                    }
                    Answer::Fails(kind, retry_after) => {
                        tell(
                            Event::Failed {
                                call,
                                kind: *kind,
                                retry_after: *retry_after,
                                cost: Spend::default(),
                                down: Vec::new(),
                            },
                            now,
                        );
                    }
                    Answer::CutAfterDelta(kind) => {
                        tell(Event::Delta { call }, now);
                        tell(failed(call, *kind), now + 1);
                    }
                    Answer::Hangs => {
                        now = deadline;
                        tell(Event::Timer(Timer::Deadline), now);
                    }
                    Answer::ClientLeaves => tell(Event::ClientGone, now),
                }
            }
            Command::Emit { .. } => panic!("a bare call holds nothing back"),
            Command::Note(note) => assert!(matches!(note.what, What::FallbackMasked { .. })),
            Command::Cancel { .. } | Command::Forward { .. } | Command::Finish { .. } | Command::Fail { .. } => {}
        }
    }
}

proptest! {
    #[test]
    fn every_run_ends_within_its_bounds(setup in any_setup(), answers in proptest::collection::vec(answer(), 1..8)) {
        let (journal, commands) = run(&setup, &answers);

        let starts: Vec<(u32, String, AttemptReason)> = commands.iter().filter_map(|c| match c {
            Command::Start { call, spec, why, .. } => Some((*call, spec.model.clone(), *why)),
            _ => None,
        }).collect();
        let retries = starts.iter().filter(|s| s.2 == AttemptReason::Retry).count() as u32;
        let per_model = |m: &str| starts.iter().filter(|s| s.1 == m).count() as u32;

        // Bounds, and only allowed models, each of them begun once.
        prop_assert!(starts.len() as u32 <= setup.limits.max_calls.max(1));
        prop_assert!(retries <= setup.retry.budget);
        let mut allowed: Vec<&str> = setup.plan.models();
        allowed.extend(setup.fallback.iter().map(|c| c.model.as_str()));
        for (i, (call, model, why)) in starts.iter().enumerate() {
            prop_assert_eq!(*call as usize, i);
            prop_assert!(allowed.contains(&model.as_str()));
            prop_assert!(per_model(model) <= 1 + setup.retry.max_retries);
            prop_assert_eq!(*why == AttemptReason::Planned, i == 0);
            if *why == AttemptReason::Fallback {
                prop_assert!(starts[..i].iter().all(|s| s.1 != *model));
            }
        }

        // Exactly one end, at the end; at most one forward.
        let is_end = |c: &Command| matches!(c, Command::Finish { .. } | Command::Fail { .. });
        prop_assert_eq!(commands.iter().filter(|c| is_end(c)).count(), 1);
        prop_assert!(is_end(commands.last().unwrap()));
        let forwards = commands.iter().filter(|c| matches!(c, Command::Forward { .. })).count();
        prop_assert!(forwards <= 1);

        // Every failure is followed by a retry, a fallback or the client's error.
        let failures = journal.iter().filter(|(e, _)| matches!(e, Event::Failed { .. })).count();
        let later = starts.len() - 1;
        let ends_by_failure = match commands.last().unwrap() {
            Command::Fail { kind, .. } => match journal.last().unwrap().0 {
                Event::Failed { kind: last, .. } => { prop_assert_eq!(*kind, last); 1 }
                Event::ClientGone => { prop_assert_eq!(*kind, ErrorKind::Cancelled); 0 }
                _ => { prop_assert_eq!(*kind, ErrorKind::Timeout); 0 }
            },
            _ => 0,
        };
        prop_assert_eq!(failures, later + ends_by_failure);

        // The journal alone gives the same run.
        let mut again = Machine::new(setup.clone(), 5_000);
        let mut repeated = drain(&mut again);
        for (event, at) in &journal {
            again.handle(event.clone(), *at);
            repeated.extend(drain(&mut again));
        }
        prop_assert_eq!(repeated, commands);
    }
}
