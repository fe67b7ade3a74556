//! What is decided while an answer comes: stages that are stopped, and reasoning steps.

use super::*;
use crate::domain::{BestBecause, Ends, Reading, Scored, StepFacts, Steps};

fn first(call: u32, entropy: Result<f64, Unscored>) -> Event {
    let read = entropy.map(|value| Scored { value, exact: true });
    Event::Early { call, readings: vec![Reading { score: Score::FirstTokenEntropy, read }] }
}

fn stopped(plans: [Plan; 2], condition: Condition) -> Setup {
    let Plan::Cascade(mut stages) = cascade(plans.to_vec(), &[condition]) else { panic!("no cascade") };
    stages[0].stop_early = true;
    of(Plan::Cascade(stages))
}

#[test]
fn a_stage_is_stopped_at_the_first_token_that_is_unsure() {
    let condition = condition(Score::FirstTokenEntropy, Bound::Below(0.9));
    let setup = stopped([call("s"), call("l")], condition);
    let (mut machine, _) = begin(setup.clone());
    assert_eq!(tell(&mut machine, first(0, Ok(0.8))), [], "sure so far");
    let (mut machine, _) = begin(setup.clone());
    let stopped = [
        note(&[0], What::GateFails { call: 0, condition, value: 1.5, exact: true }),
        Command::Cancel { call: 0 },
        note(&[], What::Escalated { from: 0, to: 1, call: 0 }),
        begins(1, "l", AttemptReason::Escalation, &[1]),
    ];
    assert_eq!(tell(&mut machine, first(0, Ok(1.5))), stopped);

    // Where nothing could follow, it goes on, and its answer has to do.
    let limits = Limits { max_calls: 1, ..setup.limits };
    let (mut machine, _) = begin(Setup { limits, ..setup });
    assert_eq!(tell(&mut machine, first(0, Ok(1.5))), []);
    let commands = tell(&mut machine, said(0, "x", Some(1.5)));
    assert_eq!(commands.last(), Some(&Command::Finish { call: 0 }));
}

#[test]
fn a_stage_that_is_not_to_be_stopped_runs_to_its_end() {
    let condition = condition(Score::FirstTokenEntropy, Bound::Below(0.9));
    let (mut machine, _) = begin(of(cascade(vec![call("s"), call("l")], &[condition])));
    assert_eq!(tell(&mut machine, first(0, Ok(1.5))), []);
}

fn steps(max_steps: u32, max_tokens: u32) -> Plan {
    let [separator, open, close] = ["\n\n", "<think>\n", "</think>"].map(str::to_owned);
    let [small, large, answer] = ["s", "l", "a"].map(spec);
    Plan::Steps(Box::new(Steps { small, large, answer, tau: 1.0, separator, open, close, max_steps, max_tokens }))
}

/// A step is written.
fn wrote(call: u32, entropy: f32, step: StepFacts) -> Event {
    let facts = Facts { step: Some(step), ..facts("a step", Some(entropy)) };
    Event::Done { call, answer: Arc::new(Answered { facts, cost: Spend::usd(10) }) }
}

fn of_tokens(tokens: u32) -> StepFacts {
    StepFacts { tokens, ..StepFacts::default() }
}

fn asks(call: u32, model: &str, why: AttemptReason, input: Input) -> Command {
    let at = match model {
        "s" => Steps::SMALL,
        "l" => Steps::LARGE,
        _ => Steps::ANSWER,
    };
    Command::Start { call, spec: spec(model), why, input, at: vec![at] }
}

fn glimpsed(step: u32, call: u32, value: f64, sure: bool) -> Command {
    note(&[], What::Glimpsed { step, call, value, tau: 1.0, exact: true, sure })
}

#[test]
fn steps_go_to_who_is_sure_and_the_answer_follows() {
    use AttemptReason::{Escalation, Planned};
    let (mut machine, commands) = begin(of(steps(8, 1000)));
    assert_eq!(commands, [asks(0, "s", Planned, Input::Step(vec![]))]);
    assert_eq!(tell(&mut machine, first(0, Ok(0.5))), [glimpsed(0, 0, 0.5, true)]);
    let written = |step, call, large, tokens| note(&[], What::StepWritten { step, call, large, tokens });
    let commands = tell(&mut machine, wrote(0, 0.5, of_tokens(7)));
    assert_eq!(commands, [written(0, 0, false, 7), asks(1, "s", Planned, Input::Step(vec![0]))]);
    // Unsure at the first token: stopped there.
    let commands = tell(&mut machine, first(1, Ok(1.0)));
    let large = asks(2, "l", Escalation, Input::Step(vec![0]));
    assert_eq!(commands, [glimpsed(1, 1, 1.0, false), Command::Cancel { call: 1 }, large]);
    let commands = tell(&mut machine, wrote(2, 3.0, of_tokens(9)));
    assert_eq!(commands, [written(1, 2, true, 9), asks(3, "s", Planned, Input::Step(vec![0, 2]))]);
    // An answer that comes whole is judged at its end.
    let commands = tell(&mut machine, wrote(3, 2.0, of_tokens(5)));
    assert_eq!(commands, [glimpsed(2, 3, 2.0, false), asks(4, "l", Escalation, Input::Step(vec![0, 2]))]);
    let ends = StepFacts { tokens: 4, closes: true, repeats: false };
    let commands = tell(&mut machine, wrote(4, 0.1, ends));
    let reasoned = note(&[], What::Reasoned { steps: 3, tokens: 20, because: Ends::Closed });
    assert_eq!(commands, [written(2, 4, true, 4), reasoned, asks(5, "a", Planned, Input::Reasoned(vec![0, 2, 4]))]);
    // Nothing can change it any more: it goes out as it comes.
    assert_eq!(tell(&mut machine, Event::Delta { call: 5 }), [Command::Forward { call: 5 }]);
    assert_eq!(tell(&mut machine, said(5, "42", None)), [Command::Finish { call: 5 }]);
}

#[test]
fn reasoning_ends_where_it_repeats_itself_or_may_be_no_longer() {
    let ends = |plan: Plan, facts: &dyn Fn(u32) -> StepFacts| {
        let (mut machine, _) = begin(of(plan));
        for call in 0.. {
            let commands = tell(&mut machine, wrote(call, 0.1, facts(call)));
            let ended = commands.iter().find_map(|command| match command {
                Command::Note(Note { what: What::Reasoned { steps, because, .. }, .. }) => Some((*steps, *because)),
                _ => None,
            });
            if let Some(ended) = ended {
                return ended;
            }
        }
        unreachable!()
    };
    assert_eq!(ends(steps(3, 1000), &|_| of_tokens(1)), (3, Ends::Steps));
    assert_eq!(ends(steps(9, 10), &|_| of_tokens(4)), (3, Ends::Tokens));
    let repeats = |call| StepFacts { repeats: call > 0, ..of_tokens(1) };
    assert_eq!(ends(steps(9, 1000), &repeats), (3, Ends::Repeats), "not before there are three");

    // The fourth call has to be the answer's.
    let setup = of(steps(9, 1000));
    let limits = Limits { max_calls: 4, ..setup.limits };
    let (mut machine, _) = begin(Setup { limits, ..setup });
    tell(&mut machine, wrote(0, 0.1, of_tokens(1)));
    tell(&mut machine, wrote(1, 0.1, of_tokens(1)));
    let commands = tell(&mut machine, wrote(2, 0.1, of_tokens(1)));
    let because = Ends::Masked { by: Mask::Calls };
    assert!(commands.contains(&note(&[], What::Reasoned { steps: 3, tokens: 3, because })), "{commands:?}");
}

#[test]
fn where_one_model_fails_or_does_not_fit_the_other_writes() {
    let failed = |call| super::failed(call, ErrorKind::ServerError);
    let (mut machine, _) = begin(of(steps(8, 1000)));
    let error = ErrorKind::ServerError;
    let commands = tell(&mut machine, failed(0));
    let large = |call| asks(call, "l", AttemptReason::Escalation, Input::Step(vec![]));
    assert_eq!(commands, [note(&[], What::StepFailed { step: 0, error, call: 0 }), large(1)]);
    assert_eq!(tell(&mut machine, failed(1)), [Command::Fail { kind: error, call: Some(1) }]);

    let (mut machine, _) = begin(of(steps(8, 1000)));
    let why = Unscored::NoLogprobs;
    let commands = tell(&mut machine, first(0, Err(why)));
    let unscored = note(&[], What::GlimpseUnscored { step: 0, call: 0, why });
    assert_eq!(commands, [unscored, Command::Cancel { call: 0 }, large(1)]);

    // Room for the answer, but not for the large model beside it: the small one goes on.
    let setup = of(steps(8, 1000));
    let limits = Limits { max_calls: 2, ..setup.limits };
    let (mut machine, _) = begin(Setup { limits, ..setup });
    let masked = note(&[Steps::LARGE], What::Masked { by: Mask::Calls });
    assert_eq!(tell(&mut machine, first(0, Ok(1.5))), [glimpsed(0, 0, 1.5, false), masked]);
    let commands = tell(&mut machine, wrote(0, 1.5, of_tokens(2)));
    assert!(commands.contains(&asks(1, "a", AttemptReason::Planned, Input::Reasoned(vec![0]))), "{commands:?}");
}

#[test]
fn no_stage_is_escalated_to_that_would_begin_too_late() {
    let wait = |model: &str, seconds: i64| (model.to_owned(), seconds * 1_000_000);
    let setup = |limit| {
        let setup = of(cascade(vec![call("s"), call("l"), call("m")], &[SURE]));
        let limits = Limits { first_token: Some(limit), ..setup.limits };
        Setup { limits, waits: [wait("s", 9), wait("l", 3), wait("m", 1)].into(), ..setup }
    };
    let told = |limit, now| {
        let (mut machine, commands) = begin(setup(limit));
        assert_eq!(commands, [begins(0, "s", AttemptReason::Planned, &[0])], "whoever comes first is waited for");
        machine.handle(said(0, "x", Some(1.5)), now);
        drain(&mut machine)
    };
    let late = |stage| note(&[stage], What::Masked { by: Mask::FirstToken });
    // Two seconds of five are gone: three are left, and enough.
    let escalated = |to| note(&[], What::Escalated { from: 0, to, call: 0 });
    assert_eq!(told(5_000_000, 2_000_000)[1..], [escalated(1), begins(1, "l", AttemptReason::Escalation, &[1])]);
    let next = [late(1), escalated(2), begins(1, "m", AttemptReason::Escalation, &[2])];
    assert_eq!(told(5_000_000, 2_000_001)[1..], next);
    let because = BestBecause::Masked { by: Mask::FirstToken };
    let best = note(&[], What::BestSoFar { call: 0, because });
    let end = [late(1), late(2), best, Command::Emit { call: 0 }, Command::Finish { call: 0 }];
    assert_eq!(told(5_000_000, 4_500_000)[1..], end);
}

#[test]
fn what_waits_before_a_stage_is_known_as_of_the_last_answer() {
    let seconds = |model: &str, seconds: i64| (model.to_owned(), seconds * 1_000_000);
    let setup = |l| {
        let setup = of(cascade(vec![call("s"), call("l")], &[SURE]));
        let limits = Limits { first_token: Some(5_000_000), ..setup.limits };
        Setup { limits, waits: [seconds("s", 1), seconds("l", l)].into(), ..setup }
    };
    let told = |before, waits: &[(String, i64)]| {
        let (mut machine, _) = begin(setup(before));
        let facts = Facts { waits: waits.iter().cloned().collect(), ..facts("x", Some(1.5)) };
        tell(&mut machine, Event::Done { call: 0, answer: Arc::new(Answered { facts, cost: Spend::usd(10) }) })
    };
    let goes_on =
        [note(&[], What::Escalated { from: 0, to: 1, call: 0 }), begins(1, "l", AttemptReason::Escalation, &[1])];
    let late = note(&[1], What::Masked { by: Mask::FirstToken });
    assert_eq!(told(9, &[])[1], late, "nothing newer is known");
    assert_eq!(told(9, &[seconds("l", 0)])[1..], goes_on, "the queue has emptied");
    assert_eq!(told(0, &[])[1..], goes_on);
    assert_eq!(told(0, &[seconds("l", 9)])[1], late, "it has grown");
    assert_eq!(told(9, &[seconds("s", 0)])[1], late, "of another model");
}
