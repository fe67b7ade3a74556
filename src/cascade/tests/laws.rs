//! What holds of every plan, whatever the world does: random trees, random outcomes, 10,000 cases.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::domain::{Aggregate, Bound, Condition, Reading, Score, Scored, Stage, StepFacts, Steps, Unscored, Verified};

const MODELS: usize = 6;

/// Most that one call of model `m<i>` costs.
/// Three tokens for each millionth.
fn spend(usd: u64) -> Spend {
    Spend { usd, tokens: 3 * usd }
}

fn worst_of(model: usize) -> u64 {
    1 << model
}

fn model() -> impl Strategy<Value = CallSpec> {
    (0..MODELS).prop_map(|m| spec(&format!("m{m}")))
}

fn condition() -> impl Strategy<Value = Condition> {
    let score = prop_oneof![
        3 => Just(Score::MeanTokenEntropy),
        1 => Just(Score::FirstTokenEntropy),
        1 => Just(Score::LogprobQuantile(0.5)),
        2 => Just(Score::Disagreement),
        2 => Just(Score::Verified),
    ];
    (score, any::<bool>(), 0.0..1.5f64).prop_map(|(score, below, at)| {
        let bound = if below { Bound::Below(at) } else { Bound::Above(at - 1.0) };
        Condition::new(score, bound)
    })
}

/// A call, hedged or not.
fn leaf() -> impl Strategy<Value = Plan> {
    let hedged =
        (model(), model(), 0u32..10_000).prop_map(|(call, hedge, after_ms)| Plan::Hedged { call, hedge, after_ms });
    prop_oneof![3 => model().prop_map(Plan::Call), 1 => hedged]
}

/// Trees of up to three levels of nodes above their calls.
fn plan() -> BoxedStrategy<Plan> {
    (0..3).fold(leaf().boxed(), |inner, _| level(inner).boxed())
}

/// A call, or a node over trees of the level below.
fn level(inner: BoxedStrategy<Plan>) -> impl Strategy<Value = Plan> {
    let gates = proptest::collection::vec(condition(), 0..3);
    let stages = proptest::collection::vec((inner.clone(), gates, any::<bool>()), 1..4).prop_map(|stages| {
        let last = stages.len() - 1;
        let stage = |(i, (plan, gate, stop_early)): (usize, (Plan, Vec<Condition>, bool))| {
            let accept_when = if i == last { Vec::new() } else { gate };
            Stage { plan, accept_when, stop_early }
        };
        Plan::Cascade(stages.into_iter().enumerate().map(stage).collect())
    });
    let verified = (inner.clone(), model(), 1u32..4)
        .prop_map(|(plan, by, times)| Plan::Verified(Box::new(Verified { plan, by, times })));
    let branches = proptest::collection::vec((inner, 0.0..3.0f64), 1..4);
    let parallel = (branches, 0u8..5, model()).prop_map(|(branches, aggregate, call)| {
        let (branches, weights) = branches.into_iter().unzip();
        let aggregate = match aggregate {
            0 => Aggregate::First,
            1 => Aggregate::Vote,
            2 => Aggregate::WeightedVote { weights },
            3 => Aggregate::Judge { call },
            _ => Aggregate::Refine { call },
        };
        Plan::Parallel { branches, aggregate }
    });
    let steps = ((model(), model(), model()), 0.0..1.5f64, 1u32..4, 1u32..12).prop_map(
        |(models, tau, max_steps, max_tokens)| {
            let (small, large, answer) = models;
            let [separator, open, close] = ["\n\n", "<think>", "</think>"].map(str::to_owned);
            Plan::Steps(Box::new(Steps { small, large, answer, tau, separator, open, close, max_steps, max_tokens }))
        },
    );
    // A verified answer matters to a stage that asks.
    let asked = (verified, condition(), model()).prop_map(|(plan, condition, last)| {
        let first = Stage { plan, accept_when: vec![condition], stop_early: false };
        Plan::Cascade(vec![first, Stage { plan: Plan::Call(last), accept_when: Vec::new(), stop_early: false }])
    });
    prop_oneof![2 => leaf(), 4 => stages, 4 => parallel, 1 => steps, 1 => asked]
}

/// What the world makes of one call, and when.
#[derive(Clone, Debug)]
struct Fate {
    /// Microseconds from its start.
    after: i64,
    streams: bool,
    end: End,
    /// Of its worst case, in tenths.
    cost: u64,
    /// Other requests have used up the retries.
    denied: bool,
    /// Models that cannot be called when it fails.
    down: Vec<String>,
    /// What waits before models when it has answered.
    waits: BTreeMap<String, i64>,
}

#[derive(Clone, Debug)]
enum End {
    /// Text (also a verdict) and entropy.
    Answers(u8, Option<f32>),
    Fails(ErrorKind, Option<i64>),
    Hangs,
}

fn fate() -> impl Strategy<Value = Fate> {
    let end = prop_oneof![
        6 => (1u8..4, proptest::option::weighted(0.8, 0.0..1.5f32)).prop_map(|(text, h)| End::Answers(text, h)),
        3 => (super::kind(), proptest::option::of(0i64..20_000_000)).prop_map(|(kind, wait)| End::Fails(kind, wait)),
        1 => Just(End::Hangs),
    ];
    let name = |m: usize| format!("m{m}");
    let down = proptest::collection::vec((0..MODELS).prop_map(name), 0..3);
    let waits = proptest::collection::btree_map((0..MODELS).prop_map(name), 0i64..20_000_000, 0..3);
    let cost = prop_oneof![Just(10u64), 0u64..=10];
    ((0i64..8_000_000, any::<bool>(), end, cost), proptest::bool::weighted(0.2), down, waits).prop_map(
        |((after, streams, end, cost), denied, down, waits)| Fate { after, streams, end, cost, denied, down, waits },
    )
}

prop_compose! {
    fn any_tree()(
        plan in plan(),
        fallback in proptest::collection::vec(model(), 0..3),
        fallback_on in proptest::collection::vec(super::kind(), 0..13),
        retry_on in proptest::collection::vec(super::kind(), 0..13),
        (max_retries, budget) in (0u32..3, 0u32..4),
        max_calls in prop_oneof![Just(64u32), 0u32..12],
        money in proptest::option::of(0u64..120),
        tokens in proptest::option::of(0u64..360),
        deadline in 1i64..60_000_000,
        first_token in proptest::option::weighted(0.3, 0i64..30_000_000),
        seed in any::<u64>(),
    ) -> Setup {
        Setup {
            plan,
            fallback,
            failover: None,
            fallback_on,
            retry: RetryPolicy { max_retries, budget, on: retry_on, ..RetryPolicy::default() },
            limits: Limits { deadline: Some(deadline), max_calls, budget: money, tokens, first_token },
            worst: (0..MODELS).map(|m| (format!("m{m}"), spend(worst_of(m)))).collect(),
            waits: (1..MODELS).map(|m| (format!("m{m}"), 2_000_000 * m as i64)).collect(),
            seed,
        }
    }
}

/// One thing that happened (the start, for the first) and the commands that followed.
type Turn = (Option<Event>, Micros, Vec<Command>);

/// Runs a machine in a world of events that come in the order of their instants.
fn play(setup: &Setup, fates: &[Fate], leaves: Option<i64>, lag: i64) -> Vec<Turn> {
    const BEGIN: Micros = 5_000;
    let mut machine = Machine::new(setup.clone(), BEGIN);
    let mut now = BEGIN;
    let mut coming: BTreeMap<(Micros, u32), Event> = BTreeMap::new();
    let mut sequence = 0;
    let mut expect = |coming: &mut BTreeMap<(Micros, u32), Event>, at: Micros, event| {
        coming.insert((at, sequence), event);
        sequence += 1;
    };
    if let Some(after) = leaves {
        expect(&mut coming, BEGIN + after, Event::ClientGone);
    }
    let mut turns = Vec::new();
    let mut event = None;
    loop {
        let commands = drain(&mut machine);
        for command in &commands {
            match command {
                Command::Start { call, spec, .. } => {
                    let fate = &fates[*call as usize % fates.len()];
                    let worst = setup.worst[&spec.model].usd;
                    let (call, cost) = (*call, spend(worst * fate.cost / 10));
                    let at = now + fate.after;
                    // An event of a call that never was.
                    expect(&mut coming, now, done(call + 1000));
                    expect(&mut coming, now, Event::Started { call });
                    if fate.streams {
                        expect(&mut coming, now + fate.after / 2, Event::Delta { call });
                        let readings = match fate.end {
                            End::Answers(text, entropy) => facts(&text.to_string(), entropy).scores,
                            End::Fails(..) | End::Hangs => vec![Reading {
                                score: Score::FirstTokenEntropy,
                                read: match fate.cost % 3 {
                                    0 => Err(Unscored::NoLogprobs),
                                    n => Ok(Scored { value: n as f64 / 2.0, exact: false }),
                                },
                            }],
                        };
                        expect(&mut coming, now + fate.after / 2, Event::Early { call, readings });
                    }
                    match fate.end {
                        End::Answers(text, entropy) => {
                            let step = StepFacts { tokens: u32::from(text), closes: text == 3, repeats: text == 2 };
                            let facts = Facts {
                                step: Some(step),
                                waits: fate.waits.clone(),
                                ..facts(&text.to_string(), entropy)
                            };
                            let answer = Arc::new(Answered { facts, cost });
                            expect(&mut coming, at, Event::Done { call, answer });
                        }
                        End::Fails(kind, retry_after) => {
                            let down = fate.down.clone();
                            expect(&mut coming, at, Event::Failed { call, kind, retry_after, cost, down });
                        }
                        End::Hangs => {}
                    }
                }
                Command::SetTimer { timer: Timer::Backoff { call }, .. }
                    if fates[*call as usize % fates.len()].denied =>
                {
                    expect(&mut coming, now, Event::RetryDenied { call: *call });
                }
                Command::SetTimer { timer: Timer::Hedge { call }, at }
                    if fates[*call as usize % fates.len()].denied =>
                {
                    expect(&mut coming, *at + lag, Event::HedgeDenied { call: *call });
                }
                // Timers may ring late.
                Command::SetTimer { timer, at } => expect(&mut coming, *at + lag, Event::Timer(*timer)),
                // What a cancelled call still had to say comes all the same: it must not matter.
                _ => {}
            }
        }
        turns.push((event, now, commands));
        let Some((key, next)) = coming.pop_first() else {
            assert!(machine.ended(), "nothing more will happen, and no end: {turns:?}");
            return turns;
        };
        assert!(turns.len() < 2000, "does not end");
        now = now.max(key.0);
        machine.handle(next.clone(), now);
        event = Some(next);
    }
}

/// Whether the call at this place may be streamed: nothing above it is gated or chooses among answers.
fn may_stream(plan: &Plan, at: &[u32]) -> bool {
    let Some((&child, rest)) = at.split_first() else { return true };
    match plan {
        Plan::Call(_) | Plan::Hedged { .. } => false,
        Plan::Cascade(stages) => {
            let stage = &stages[child as usize];
            stage.accept_when.is_empty() && may_stream(&stage.plan, rest)
        }
        Plan::Parallel { branches, aggregate } => {
            child as usize == branches.len() && matches!(aggregate, Aggregate::Refine { .. })
        }
        Plan::Steps(_) => child == Steps::ANSWER,
        Plan::Verified(_) => false,
    }
}

/// Whether a command tells what followed a failure.
fn answers_a_failure(command: &Command) -> bool {
    match command {
        Command::SetTimer { timer: Timer::Backoff { .. }, .. } | Command::Fail { .. } => true,
        Command::Start { why, .. } => *why == AttemptReason::Fallback,
        Command::Note(note) => matches!(
            note.what,
            What::Rerouted { .. }
                | What::StagesFailed { .. }
                | What::BranchLeftOut { .. }
                | What::AggregateFailed { .. }
                | What::StepFailed { .. }
                | What::VerifierFailed { .. }
                | What::HedgeLeft { .. }
                | What::BestSoFar { .. }
        ),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn every_tree_keeps_the_rules(
        setup in any_tree(),
        fates in proptest::collection::vec(fate(), 1..12),
        leaves in proptest::option::weighted(0.2, 0i64..20_000_000),
        lag in prop_oneof![Just(0i64), 0i64..3_000_000],
    ) {
        prop_assert_eq!(setup.plan.check(), Ok(()));
        let turns = play(&setup, &fates, leaves, lag);
        let commands: Vec<&Command> = turns.iter().flat_map(|(_, _, commands)| commands).collect();
        let deadline = 5_000 + setup.limits.deadline.unwrap();
        let single = matches!(setup.plan, Plan::Call(_));

        // Exactly one last command, and nothing after it.
        let is_end = |c: &Command| matches!(c, Command::Finish { .. } | Command::Fail { .. });
        prop_assert_eq!(commands.iter().filter(|c| is_end(c)).count(), 1);
        let last = commands[commands.len() - 1];
        prop_assert!(is_end(last));

        let mut running = BTreeSet::new();
        let mut answers = BTreeSet::new();
        let mut starts = Vec::new();
        let mut actual = Spend::default();
        let mut forwarded = None;
        let mut emitted = None;
        let mut stopped = false;
        let mut unavailable = Vec::new();
        for (event, now, commands) in &turns {
            let mut relevant = false;
            match event {
                Some(Event::Done { call, answer }) if running.remove(call) => {
                    actual = actual.saturating_add(answer.cost);
                    answers.insert(*call);
                }
                Some(Event::Failed { call, cost, down, .. }) if running.remove(call) => {
                    unavailable.clone_from(down);
                    actual = actual.saturating_add(*cost);
                    relevant = true;
                }
                Some(Event::RetryDenied { .. }) => {
                    let noted = |c: &Command| matches!(c, Command::Note(Note { what: What::RetryDenied { .. }, .. }));
                    relevant = commands.iter().any(noted);
                }
                Some(Event::ClientGone | Event::Timer(Timer::Deadline)) => stopped = true,
                _ => {}
            }
            // No failure is silent.
            if relevant {
                prop_assert!(commands.iter().any(answers_a_failure), "{:?} {:?}", event, commands);
            }
            for command in commands {
                match command {
                    Command::Start { call, spec, why, input, at } => {
                        // Nothing is begun after the end of time or without the client.
                        prop_assert!(!stopped && *now < deadline);
                        // An error is not answered with who cannot answer.
                        let instead = *why == AttemptReason::Fallback && at.is_empty();
                        prop_assert!(!instead || !unavailable.contains(&spec.model), "{:?}", unavailable);
                        prop_assert_eq!(*call as usize, starts.len());
                        running.insert(*call);
                        starts.push((spec.model.as_str(), *why, at.clone()));
                        if let Input::Judge(of) | Input::Refine(of) = input {
                            prop_assert!(of.iter().all(|shown| answers.contains(shown)) && !of.is_empty());
                        }
                    }
                    Command::Cancel { call } => {
                        prop_assert!(running.remove(call));
                        actual = actual.saturating_add(setup.worst[starts[*call as usize].0]);
                    }
                    Command::Forward { call } => {
                        prop_assert!(running.contains(call));
                        prop_assert_eq!(forwarded.replace(*call), None, "at most one forward");
                        let (_, _, at) = &starts[*call as usize];
                        prop_assert!(may_stream(&setup.plan, at), "a gated stage was forwarded");
                    }
                    Command::Emit { call } => {
                        prop_assert!(answers.contains(call) && forwarded.is_none());
                        prop_assert_eq!(emitted.replace(*call), None);
                    }
                    Command::Finish { call } => {
                        prop_assert!(answers.contains(call));
                        prop_assert!(forwarded.or(emitted).unwrap_or(*call) == *call);
                        let (_, _, at) = &starts[*call as usize];
                        prop_assert!(emitted.is_some() || may_stream(&setup.plan, at));
                    }
                    Command::Fail { kind, call } => {
                        prop_assert!(emitted.is_none());
                        prop_assert!(call.is_none_or(|call| (call as usize) < starts.len()));
                        // An answer that is there is not thrown away for an error.
                        let gone = *kind == ErrorKind::Cancelled && stopped;
                        let any = answers.iter().any(|a| is_answer(&setup.plan, &starts[*a as usize].2));
                        prop_assert!(gone || forwarded.is_some() || !any, "{:?}", answers);
                    }
                    Command::SetTimer { timer: Timer::Backoff { .. }, at } => prop_assert!(at >= now && *at < deadline),
                    Command::Note(Note { at, what: What::Voted { answers, early, .. } }) => {
                        prop_assert!(*early || *answers as usize >= quorum(&setup.plan, at));
                    }
                    Command::SetTimer { .. } | Command::Note(_) => {}
                }
            }
        }
        // Whoever ends the request, no call is left running.
        prop_assert!(running.is_empty(), "{:?}", running);

        // Calls within the compiled bound, retries within theirs, fallback once per model, and all within the limit.
        let retries = starts.iter().filter(|s| s.1 == AttemptReason::Retry).count() as u64;
        prop_assert!(retries <= u64::from(setup.retry.budget));
        let instead = |s: &&(&str, AttemptReason, Vec<u32>)| s.1 == AttemptReason::Fallback && s.2.is_empty();
        let fallbacks = starts.iter().filter(instead).count();
        let planned = starts.len() - retries as usize - fallbacks;
        prop_assert!(planned <= setup.plan.most_calls() as usize);
        prop_assert!(starts.len() <= setup.limits.max_calls.max(1) as usize);
        let hedge = |s: &&(&str, AttemptReason, Vec<u32>)| s.1 == AttemptReason::Hedge;
        let first = |s: &&(&str, AttemptReason, Vec<u32>)| s.1 != AttemptReason::Retry && !hedge(s) && !instead(s);
        let places: Vec<_> = starts.iter().filter(first).map(|s| &s.2).collect();
        for at in places.iter().collect::<BTreeSet<_>>() {
            let made = places.iter().filter(|place| *place == at).count();
            prop_assert!(made <= times(&setup.plan, at), "only calls of steps and verifying ones are made twice");
        }
        let hedged: Vec<_> = starts.iter().filter(hedge).map(|s| &s.2).collect();
        prop_assert_eq!(hedged.iter().collect::<BTreeSet<_>>().len(), hedged.len(), "no call is hedged twice");
        prop_assert!(hedged.iter().all(|at| places.contains(at)));
        if single {
            prop_assert!(places.len() <= 1);
        }

        // Cost likewise.
        let dearest = worst_of(MODELS - 1);
        let worst = |spec: &CallSpec| setup.worst[&spec.model].usd;
        let bound = setup.plan.worst_cost(&worst)
            + retries * dearest
            + setup.fallback.iter().map(worst).sum::<u64>();
        prop_assert!(actual.usd <= bound, "{:?} > {}", actual, bound);
        if let Some(budget) = setup.limits.budget {
            prop_assert!(actual.usd <= budget, "{:?} > {}", actual, budget);
        }
        if let Some(tokens) = setup.limits.tokens {
            prop_assert!(actual.tokens <= tokens, "{:?} > {}", actual, tokens);
        }

        // Restrictions bind: only models that the plan or the fallback names.
        let mut allowed: Vec<&str> = setup.plan.models();
        allowed.extend(setup.fallback.iter().map(|c| c.model.as_str()));
        prop_assert!(starts.iter().all(|s| allowed.contains(&s.0)));

        // The journal alone gives the same run.
        let mut again = Machine::new(setup.clone(), 5_000);
        for (event, at, commands) in &turns {
            if let Some(event) = event {
                again.handle(event.clone(), *at);
            }
            prop_assert_eq!(&drain(&mut again), commands);
        }
    }
}

/// Whether what the call at this place says can be the plan's answer: no judge's, no verifying call's, no reasoning step.
fn is_answer(plan: &Plan, at: &[u32]) -> bool {
    match (plan, at.split_first()) {
        (Plan::Cascade(stages), Some((child, rest))) => is_answer(&stages[*child as usize].plan, rest),
        (Plan::Parallel { branches, aggregate }, Some((child, rest))) => match branches.get(*child as usize) {
            Some(branch) => is_answer(branch, rest),
            None => !matches!(aggregate, Aggregate::Judge { .. }),
        },
        (Plan::Steps(_), Some((child, _))) => *child == Steps::ANSWER,
        (Plan::Verified(verified), Some((child, rest))) => *child == Verified::PLAN && is_answer(&verified.plan, rest),
        (_, None) | (Plan::Call(_) | Plan::Hedged { .. }, _) => true,
    }
}

/// How often the call at this place is made at most.
fn times(plan: &Plan, at: &[u32]) -> usize {
    match (plan, at.split_first()) {
        (Plan::Cascade(stages), Some((child, rest))) => times(&stages[*child as usize].plan, rest),
        (Plan::Parallel { branches, .. }, Some((child, rest))) => {
            branches.get(*child as usize).map_or(1, |branch| times(branch, rest))
        }
        (Plan::Steps(steps), Some((child, _))) => steps.times()[*child as usize].1 as usize,
        (Plan::Verified(verified), Some((&Verified::PLAN, rest))) => times(&verified.plan, rest),
        (Plan::Verified(verified), Some(_)) => verified.times as usize,
        (_, None) | (Plan::Call(_) | Plan::Hedged { .. }, _) => 1,
    }
}

/// How many branches the parallel node at this place needs.
fn quorum(plan: &Plan, at: &[u32]) -> usize {
    match (plan, at.split_first()) {
        (Plan::Cascade(stages), Some((child, rest))) => quorum(&stages[*child as usize].plan, rest),
        (Plan::Parallel { branches, .. }, Some((child, rest))) => quorum(&branches[*child as usize], rest),
        (Plan::Parallel { branches, aggregate }, None) => aggregate.quorum(branches.len()),
        (Plan::Verified(verified), Some((_, rest))) => quorum(&verified.plan, rest),
        (Plan::Cascade(_) | Plan::Verified(_), None) | (Plan::Call(_) | Plan::Hedged { .. } | Plan::Steps(_), _) => {
            panic!("no parallel node at {at:?}")
        }
    }
}

/// The laws would hold of worlds in which nothing happens: every reason has to occur in this one.
#[test]
fn every_reason_occurs() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let world = (any_tree(), proptest::collection::vec(fate(), 1..12));
    let mut reasons = BTreeMap::new();
    for n in 0..4000 {
        let (setup, fates) = world.new_tree(&mut runner).unwrap().current();
        let leaves = (n % 10 == 0).then_some(n * 1000);
        for (_, _, commands) in play(&setup, &fates, leaves, n * 100) {
            for command in commands {
                let reason = match command {
                    Command::Note(note) => {
                        serde_json::to_value(note.what).unwrap()["reason"].as_str().unwrap().to_owned()
                    }
                    Command::Forward { .. } => "(forward)".to_owned(),
                    Command::Emit { .. } => "(emit)".to_owned(),
                    _ => continue,
                };
                *reasons.entry(reason).or_insert(0) += 1;
            }
        }
    }
    // Two commands and the 38 reasons.
    assert_eq!(reasons.len(), 2 + 38, "{reasons:?}");
}
