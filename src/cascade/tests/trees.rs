//! Trees, case by case: what is asked, what is held back, what is noted.

mod down;
mod early;
mod verified;

use super::*;
use crate::domain::{Aggregate, Bound, Condition, IfUnscored, Left, Score, Stage, Unscored};

fn call(model: &str) -> Plan {
    Plan::Call(spec(model))
}

const SURE: Condition = condition(Score::MeanTokenEntropy, Bound::Below(0.9));
const AGREED: Condition = condition(Score::Disagreement, Bound::Below(0.4));

const fn condition(score: Score, bound: Bound) -> Condition {
    Condition { score, bound, calibration: None, max_error: None, if_unscored: IfUnscored::Escalate }
}

/// A cascade of these plans, all but the last behind these conditions.
fn cascade(plans: Vec<Plan>, accept_when: &[Condition]) -> Plan {
    let last = plans.len() - 1;
    let gate = |i| if i < last { accept_when.to_vec() } else { Vec::new() };
    Plan::Cascade(
        plans
            .into_iter()
            .enumerate()
            .map(|(i, plan)| Stage { plan, accept_when: gate(i), stop_early: false })
            .collect(),
    )
}

fn parallel(models: &[&str], aggregate: Aggregate) -> Plan {
    Plan::Parallel { branches: models.iter().map(|m| call(m)).collect(), aggregate }
}

fn of(plan: Plan) -> Setup {
    let mut setup = setup(&["unused"], &[]);
    setup.plan = plan;
    setup.retry = RetryPolicy::never();
    setup
}

fn begin(setup: Setup) -> (Machine, Vec<Command>) {
    let mut machine = Machine::new(setup, 0);
    let commands = drain(&mut machine);
    (machine, commands)
}

fn tell(machine: &mut Machine, event: Event) -> Vec<Command> {
    machine.handle(event, 10);
    drain(machine)
}

/// A complete answer of one token with this entropy that costs 10.
fn said(call: u32, text: &str, entropy: Option<f32>) -> Event {
    Event::Done { call, answer: Arc::new(Answered { facts: facts(text, entropy), cost: Spend::usd(10) }) }
}

fn begins(call: u32, model: &str, why: AttemptReason, at: &[u32]) -> Command {
    Command::Start { call, spec: spec(model), why, input: Input::Request, at: at.to_vec() }
}

fn note(at: &[u32], what: What) -> Command {
    Command::Note(Note { at: at.to_vec(), what })
}

fn gate(call: u32, value: f64) -> What {
    match SURE.bound.holds(value) {
        true => What::GateHolds { call, condition: SURE, value, exact: true },
        false => What::GateFails { call, condition: SURE, value, exact: true },
    }
}

#[test]
fn a_gated_stage_is_held_back_and_emitted_when_accepted() {
    let (mut machine, commands) = begin(of(cascade(vec![call("s"), call("l")], &[SURE])));
    assert_eq!(commands, [begins(0, "s", AttemptReason::Planned, &[0])]);
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), []);
    let commands = tell(&mut machine, said(0, "yes", Some(0.5)));
    let expected = [
        note(&[0], gate(0, 0.5)),
        note(&[], What::Accepted { stage: 0, call: 0 }),
        Command::Emit { call: 0 },
        Command::Finish { call: 0 },
    ];
    assert_eq!(commands, expected);
}

#[test]
fn a_rejected_answer_escalates_and_the_last_stage_is_forwarded() {
    let (mut machine, _) = begin(of(cascade(vec![call("s"), call("l")], &[SURE])));
    let commands = tell(&mut machine, said(0, "yes", Some(1.5)));
    let expected = [
        note(&[0], gate(0, 1.5)),
        note(&[], What::Escalated { from: 0, to: 1, call: 0 }),
        begins(1, "l", AttemptReason::Escalation, &[1]),
    ];
    assert_eq!(commands, expected);
    assert_eq!(tell(&mut machine, Event::Delta { call: 1 }), [Command::Forward { call: 1 }]);
    let commands = tell(&mut machine, said(1, "no", None));
    assert_eq!(commands, [note(&[], What::Accepted { stage: 1, call: 1 }), Command::Finish { call: 1 }]);
}

#[test]
fn an_answer_without_log_probabilities_escalates_with_its_reason() {
    let (mut machine, _) = begin(of(cascade(vec![call("s"), call("l")], &[SURE, AGREED])));
    let without = Facts { scores: readings(&[], []), ..Facts::default() };
    let commands = tell(
        &mut machine,
        Event::Done { call: 0, answer: Arc::new(Answered { facts: without, cost: Spend::default() }) },
    );
    let unscored = |c: Condition, why| What::GateUnscored { call: 0, condition: c, why };
    assert_eq!(commands[0], note(&[0], unscored(SURE, Unscored::NoLogprobs)));
    assert_eq!(commands[1], note(&[0], unscored(AGREED, Unscored::NoVote)));
    assert_eq!(commands[3], begins(1, "l", AttemptReason::Escalation, &[1]));
}

#[test]
fn a_failed_stage_is_rerouted_then_the_fallback_then_the_best_so_far() {
    let mut setup = of(cascade(vec![call("a"), call("b"), call("c")], &[SURE]));
    setup.fallback = vec![spec("b"), spec("f")];
    setup.fallback_on = vec![ErrorKind::ServerError];
    let (mut machine, _) = begin(setup);
    let commands = tell(&mut machine, failed(0, ErrorKind::Timeout));
    let rerouted = What::Rerouted { from: 0, to: 1, error: ErrorKind::Timeout, call: 0 };
    assert_eq!(commands, [note(&[], rerouted), begins(1, "b", AttemptReason::Fallback, &[1])]);
    tell(&mut machine, said(1, "held", Some(2.0)));
    let commands = tell(&mut machine, failed(2, ErrorKind::ServerError));
    let lost = What::StagesFailed { stage: 2, error: ErrorKind::ServerError, call: 2 };
    // `b` was called in the plan.
    assert_eq!(commands, [note(&[], lost), begins(3, "f", AttemptReason::Fallback, &[])]);
    let commands = tell(&mut machine, failed(3, ErrorKind::ServerError));
    let because = BestBecause::Failed { error: ErrorKind::ServerError };
    let best = What::BestSoFar { call: 1, because };
    assert_eq!(commands, [note(&[], best), Command::Emit { call: 1 }, Command::Finish { call: 1 }]);
}

#[test]
fn a_stage_without_a_gate_streams_and_the_next_is_for_its_failure() {
    let plan = cascade(vec![call("a"), call("b")], &[]);
    let (mut machine, _) = begin(of(plan.clone()));
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), [Command::Forward { call: 0 }]);
    let commands = tell(&mut machine, failed(0, ErrorKind::Cut));
    let lost = What::StagesFailed { stage: 0, error: ErrorKind::Cut, call: 0 };
    assert_eq!(commands, [note(&[], lost), Command::Fail { kind: ErrorKind::Cut, call: Some(0) }]);
    let (mut machine, _) = begin(of(plan));
    let commands = tell(&mut machine, failed(0, ErrorKind::Cut));
    assert_eq!(commands[1], begins(1, "b", AttemptReason::Fallback, &[1]));
}

#[test]
fn a_vote_ends_as_soon_as_it_is_decided() {
    let (mut machine, commands) = begin(of(parallel(&["a", "b", "c"], Aggregate::Vote)));
    let planned = |n, model| begins(n, model, AttemptReason::Planned, &[n]);
    assert_eq!(commands, [planned(0, "a"), planned(1, "b"), planned(2, "c")]);
    assert_eq!(tell(&mut machine, said(2, "The answer is 42.", None)), []);
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), []);
    let commands = tell(&mut machine, said(1, "42.0", None));
    let voted = What::Voted { branch: 1, call: 1, answers: 2, distinct: 1, share: 1.0, tie: false, early: true };
    let expected =
        [Command::Cancel { call: 0 }, note(&[], voted), Command::Emit { call: 1 }, Command::Finish { call: 1 }];
    assert_eq!(commands, expected);
}

#[test]
fn acars_probes_are_all_waited_for_where_the_gate_asks_for_their_disagreement() {
    let probes = parallel(&["p", "p", "p"], Aggregate::Vote);
    let (mut machine, _) = begin(of(cascade(vec![probes.clone(), call("l")], &[AGREED])));
    tell(&mut machine, said(0, "1", None));
    assert_eq!(tell(&mut machine, said(1, "1", None)), [], "decided, but sigma is not known");
    let commands = tell(&mut machine, said(2, "2", None));
    let share = 2.0 / 3.0;
    let voted = What::Voted { branch: 0, call: 0, answers: 3, distinct: 2, share, tie: false, early: false };
    let fails = What::GateFails { call: 0, condition: AGREED, value: 0.5, exact: true };
    let expected = [
        note(&[0], voted),
        note(&[0], fails),
        note(&[], What::Escalated { from: 0, to: 1, call: 0 }),
        begins(3, "l", AttemptReason::Escalation, &[1]),
    ];
    assert_eq!(commands, expected);
}

#[test]
fn a_branch_is_left_out_while_a_quorum_remains() {
    let (mut machine, _) = begin(of(parallel(&["a", "b", "c"], Aggregate::Vote)));
    let left = |branch, call, error| What::BranchLeftOut { branch, left: Left::Failed { error, call } };
    let commands = tell(&mut machine, failed(0, ErrorKind::Cut));
    assert_eq!(commands, [note(&[], left(0, 0, ErrorKind::Cut))]);
    let commands = tell(&mut machine, failed(1, ErrorKind::Timeout));
    let lost = What::QuorumLost { needed: 2, could: 1, error: ErrorKind::Timeout, call: 1 };
    let expected = [
        note(&[], left(1, 1, ErrorKind::Timeout)),
        Command::Cancel { call: 2 },
        note(&[], lost),
        Command::Fail { kind: ErrorKind::Timeout, call: Some(1) },
    ];
    assert_eq!(commands, expected);
}

#[test]
fn the_first_branch_ends_the_others() {
    let (mut machine, _) = begin(of(parallel(&["a", "b"], Aggregate::First)));
    let commands = tell(&mut machine, said(1, "x", None));
    let first = What::First { branch: 1, call: 1 };
    let expected =
        [Command::Cancel { call: 0 }, note(&[], first), Command::Emit { call: 1 }, Command::Finish { call: 1 }];
    assert_eq!(commands, expected);
}

#[test]
fn a_judge_is_shown_the_answers_and_names_one() {
    let plan = parallel(&["a", "b", "c"], Aggregate::Judge { call: spec("j") });
    let to_the_judge = || {
        let (mut machine, _) = begin(of(plan.clone()));
        tell(&mut machine, said(0, "x", None));
        tell(&mut machine, failed(1, ErrorKind::Cut));
        let commands = tell(&mut machine, said(2, "y", None));
        let (input, at) = (Input::Judge(vec![0, 2]), vec![3]);
        let asked = Command::Start { call: 3, spec: spec("j"), why: AttemptReason::Planned, input, at };
        assert_eq!(commands, [asked]);
        machine
    };
    let ends = |call| [Command::Emit { call }, Command::Finish { call }];
    let mut machine = to_the_judge();
    assert_eq!(tell(&mut machine, Event::Delta { call: 3 }), [], "a verdict is no answer");
    let commands = tell(&mut machine, said(3, "2", None));
    assert_eq!(commands[0], note(&[], What::Judged { branch: 2, call: 2, judge: 3 }));
    assert_eq!(commands[1..], ends(2));
    let commands = tell(&mut to_the_judge(), said(3, "both", None));
    assert_eq!(commands[0], note(&[], What::JudgeUnclear { branch: 0, call: 0, judge: 3 }));
    assert_eq!(commands[1..], ends(0));
    let commands = tell(&mut to_the_judge(), failed(3, ErrorKind::Auth));
    assert_eq!(commands[0], note(&[], What::AggregateFailed { branch: 0, call: 0, error: ErrorKind::Auth }));
    assert_eq!(commands[1..], ends(0));
}

#[test]
fn a_judge_is_not_asked_about_one_answer() {
    let (mut machine, _) = begin(of(parallel(&["a", "b"], Aggregate::Judge { call: spec("j") })));
    tell(&mut machine, said(0, "Yes", None));
    let commands = tell(&mut machine, said(1, "yes.", None));
    assert_eq!(commands[0], note(&[], What::Agreed { branch: 0, call: 0, answers: 2 }));
    assert_eq!(commands[1..], [Command::Emit { call: 0 }, Command::Finish { call: 0 }]);
}

#[test]
fn a_refining_call_streams() {
    let (mut machine, _) = begin(of(parallel(&["a", "b"], Aggregate::Refine { call: spec("r") })));
    tell(&mut machine, said(0, "x", None));
    let commands = tell(&mut machine, said(1, "x", None));
    assert!(matches!(&commands[..], [Command::Start { call: 2, input: Input::Refine(of), .. }] if *of == [0, 1]));
    assert_eq!(tell(&mut machine, Event::Delta { call: 2 }), [Command::Forward { call: 2 }]);
    let commands = tell(&mut machine, said(2, "xx", None));
    assert_eq!(commands, [note(&[], What::Refined { call: 2, answers: 2 }), Command::Finish { call: 2 }]);
}

#[test]
fn the_budget_masks_an_escalation_and_the_answer_so_far_has_to_do() {
    let mut setup = of(cascade(vec![call("s"), call("l"), call("m")], &[SURE]));
    setup.limits.budget = Some(100);
    setup.worst = [("s", 30), ("l", 91), ("m", 90)].map(|(m, c)| (m.to_owned(), Spend::usd(c))).into();
    let (mut machine, _) = begin(setup.clone());
    // 10 of the 100 are spent: `l` does not fit, `m` just does.
    let commands = tell(&mut machine, said(0, "x", Some(2.0)));
    assert_eq!(commands[1], note(&[1], What::Masked { by: Mask::Budget }));
    assert_eq!(commands[2], note(&[], What::Escalated { from: 0, to: 2, call: 0 }));
    assert_eq!(commands[3], begins(1, "m", AttemptReason::Escalation, &[2]));

    setup.limits.budget = Some(99);
    let (mut machine, _) = begin(setup.clone());
    let commands = tell(&mut machine, said(0, "x", Some(2.0)));
    let best = What::BestSoFar { call: 0, because: BestBecause::Masked { by: Mask::Budget } };
    assert_eq!(commands[3..], [note(&[], best), Command::Emit { call: 0 }, Command::Finish { call: 0 }]);

    setup.limits.budget = Some(29);
    let (_, commands) = begin(setup);
    let fails = Command::Fail { kind: ErrorKind::RateLimited, call: None };
    assert_eq!(commands, [note(&[], What::Masked { by: Mask::Budget }), fails]);
}

#[test]
fn the_call_bound_leaves_branches_out_but_no_quorum_without_enough() {
    let mut setup = of(parallel(&["a", "b", "c"], Aggregate::Vote));
    setup.limits.max_calls = 2;
    let (_, commands) = begin(setup.clone());
    let left = What::BranchLeftOut { branch: 2, left: Left::Masked { by: Mask::Calls } };
    assert_eq!(commands[2..], [note(&[], left)]);
    setup.limits.max_calls = 1;
    let (_, commands) = begin(setup);
    let fails = Command::Fail { kind: ErrorKind::RateLimited, call: None };
    assert_eq!(commands, [note(&[], What::Masked { by: Mask::Calls }), fails]);
}

#[test]
fn the_deadline_answers_with_the_best_so_far() {
    // Of a later stage that has not voted yet, its first answer; not the rejected one of the first stage.
    let plan = cascade(vec![call("s"), parallel(&["a", "b", "c"], Aggregate::Vote)], &[SURE]);
    let mut setup = of(plan);
    setup.limits.deadline = Some(1000);
    let (mut machine, _) = begin(setup);
    tell(&mut machine, said(0, "x", Some(2.0)));
    tell(&mut machine, said(2, "y", None));
    machine.handle(Event::Timer(Timer::Deadline), 1000);
    let because = BestBecause::Stopped { by: Abort::Deadline };
    let expected = [
        Command::Cancel { call: 1 },
        Command::Cancel { call: 3 },
        note(&[], What::Stopped { by: Abort::Deadline }),
        note(&[], What::BestSoFar { call: 2, because }),
        Command::Emit { call: 2 },
        Command::Finish { call: 2 },
    ];
    assert_eq!(drain(&mut machine), expected);
}

#[test]
fn an_answer_that_comes_at_the_deadline_starts_nothing() {
    let mut setup = of(cascade(vec![call("s"), call("l")], &[SURE]));
    setup.limits.deadline = Some(1000);
    let (mut machine, _) = begin(setup);
    machine.handle(said(0, "x", Some(2.0)), 1000);
    let commands = drain(&mut machine);
    assert_eq!(commands[1], note(&[1], What::Masked { by: Mask::Deadline }));
    assert_eq!(commands.last(), Some(&Command::Finish { call: 0 }));
}

#[test]
fn a_client_that_leaves_cancels_every_branch() {
    let (mut machine, _) = begin(of(parallel(&["a", "b", "c"], Aggregate::Vote)));
    tell(&mut machine, said(1, "x", None));
    let expected = [
        Command::Cancel { call: 0 },
        Command::Cancel { call: 2 },
        note(&[], What::Stopped { by: Abort::ClientGone }),
        Command::Fail { kind: ErrorKind::Cancelled, call: Some(0) },
    ];
    assert_eq!(tell(&mut machine, Event::ClientGone), expected);
}

#[test]
fn branches_wait_for_their_retries_apart() {
    let mut setup = of(parallel(&["a", "b"], Aggregate::Judge { call: spec("j") }));
    setup.retry = RetryPolicy::default();
    let (mut machine, _) = begin(setup);
    let waits = |commands: Vec<Command>| match &commands[..] {
        [Command::SetTimer { timer: Timer::Backoff { call }, .. }] => *call,
        other => panic!("not a wait: {other:?}"),
    };
    assert_eq!(waits(tell(&mut machine, failed(1, ErrorKind::Cut))), 1);
    assert_eq!(waits(tell(&mut machine, failed(0, ErrorKind::Cut))), 0);
    let commands = tell(&mut machine, Event::Timer(Timer::Backoff { call: 0 }));
    assert_eq!(commands, [begins(2, "a", AttemptReason::Retry, &[0])]);
    let commands = tell(&mut machine, Event::Timer(Timer::Backoff { call: 1 }));
    assert_eq!(commands, [begins(3, "b", AttemptReason::Retry, &[1])]);
}

#[test]
fn a_plan_that_makes_no_sense_fails_without_a_call() {
    for plan in [Plan::Cascade(Vec::new()), parallel(&[], Aggregate::First)] {
        let (_, commands) = begin(of(plan));
        assert_eq!(commands, [Command::Fail { kind: ErrorKind::Internal, call: None }]);
    }
}

#[test]
fn the_failover_graph_names_what_follows_and_says_when_nothing_can() {
    use crate::domain::{FailoverGraph, FailoverWeights, Health};
    let mut setup = of(call("planned"));
    setup.fallback = ["dear", "slow", "good"].map(spec).to_vec();
    setup.fallback_on = vec![ErrorKind::ServerError, ErrorKind::Timeout];
    let health = [
        Health { cost_usd: 1.0, ..Health::default() },
        Health { latency_us: 60_000_000, ..Health::default() },
        Health::default(),
    ];
    let weights = FailoverWeights { order: 0.1, ..FailoverWeights::default() };
    setup.failover = Some(FailoverGraph { weights, edges: Vec::new(), health: health.to_vec() });
    let (mut machine, _) = begin(setup.clone());
    let follows = |commands: &[Command]| match commands {
        [Command::Note(Note { what: What::FailedOver { index, .. }, .. }), Command::Start { spec, why, .. }] => {
            assert_eq!(*why, AttemptReason::Fallback);
            (*index, spec.model.clone())
        }
        other => panic!("{other:?}"),
    };
    let commands = tell(&mut machine, failed(0, ErrorKind::ServerError));
    assert_eq!(follows(&commands), (2, "good".to_owned()), "neither dear nor slow");
    let commands = tell(&mut machine, failed(1, ErrorKind::Timeout));
    assert_eq!(follows(&commands), (1, "slow".to_owned()), "a minute weighs less than a dollar");
    let commands = tell(&mut machine, failed(2, ErrorKind::Timeout));
    assert_eq!(follows(&commands), (0, "dear".to_owned()));
    let commands = tell(&mut machine, failed(3, ErrorKind::ServerError));
    let fails = Command::Fail { kind: ErrorKind::ServerError, call: Some(3) };
    assert_eq!(commands, [note(&[], What::NoPath { models: 3 }), fails]);
    let said = machine.no_path().unwrap().to_string();
    for words in ["`planned` failed (server_error)", "`good` failed (timeout)", "`dear` failed (server_error)"] {
        assert!(said.contains(words), "{said}");
    }
    // With order alone it is the policy's order.
    let order = FailoverWeights { cost: 0.0, latency: 0.0, errors: 0.0, rate_limit: 0.0, order: 1.0 };
    setup.failover = Some(FailoverGraph { weights: order, ..setup.failover.unwrap() });
    let (mut machine, _) = begin(setup);
    assert_eq!(follows(&tell(&mut machine, failed(0, ErrorKind::ServerError))).1, "dear");
}

fn hedged(call: &str, hedge: &str) -> Plan {
    Plan::Hedged { call: spec(call), hedge: spec(hedge), after_ms: 200 }
}

/// A hedged call that has begun, and is hedged.
fn with_hedge(setup: Setup) -> Machine {
    let (mut machine, commands) = begin(setup);
    let timer = Command::SetTimer { timer: Timer::Hedge { call: 0 }, at: 200_000 };
    assert_eq!(commands, [begins(0, "a", AttemptReason::Planned, &[]), timer]);
    let commands = tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 }));
    let hedged = note(&[], What::Hedged { call: 0, hedge: 1 });
    assert_eq!(commands, [begins(1, "b", AttemptReason::Hedge, &[]), hedged]);
    assert_eq!(tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 })), [], "once");
    machine
}

#[test]
fn a_call_that_begins_in_time_is_not_hedged() {
    let (mut machine, _) = begin(of(hedged("a", "b")));
    assert_eq!(tell(&mut machine, Event::Started { call: 0 }), []);
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), [Command::Forward { call: 0 }]);
    assert_eq!(tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 })), []);
    assert_eq!(tell(&mut machine, done(0)), [Command::Finish { call: 0 }]);
}

#[test]
fn whichever_of_a_call_and_its_hedge_begins_first_answers() {
    for (winner, other) in [(0, 1), (1, 0)] {
        let what = match winner {
            0 => What::HedgeLost { call: 0, hedge: 1 },
            _ => What::HedgeWon { call: 0, hedge: 1 },
        };
        let mut machine = with_hedge(of(hedged("a", "b")));
        let commands = tell(&mut machine, Event::Delta { call: winner });
        let expected = [Command::Cancel { call: other }, note(&[], what), Command::Forward { call: winner }];
        assert_eq!(commands, expected);
        assert_eq!(tell(&mut machine, Event::Delta { call: other }), []);
        assert_eq!(tell(&mut machine, done(other)), []);
        assert_eq!(tell(&mut machine, done(winner)), [Command::Finish { call: winner }]);
        // Of whole answers the end is the beginning.
        let mut machine = with_hedge(of(hedged("a", "b")));
        let commands = tell(&mut machine, done(winner));
        assert_eq!(commands, [Command::Cancel { call: other }, note(&[], what), Command::Finish { call: winner }]);
    }
}

#[test]
fn one_of_two_may_fail_and_a_retry_is_of_the_one_that_failed_last() {
    for (first, last, model) in [(0, 1, "b"), (1, 0, "a")] {
        let mut setup = of(hedged("a", "b"));
        setup.retry = RetryPolicy::default();
        setup.fallback = vec![spec("c")];
        setup.fallback_on = vec![ErrorKind::ServerError];
        let mut machine = with_hedge(setup);
        let error = ErrorKind::ServerError;
        let left = What::HedgeLeft { call: last, failed: first, error };
        assert_eq!(tell(&mut machine, failed(first, error)), [note(&[], left)]);
        timer_at(&tell(&mut machine, failed(last, error)));
        let commands = tell(&mut machine, Event::Timer(Timer::Backoff { call: last }));
        assert_eq!(commands, [begins(2, model, AttemptReason::Retry, &[])], "with no hedge of its own");
        assert_eq!(
            tell(&mut machine, failed(2, ErrorKind::BadRequest)),
            [Command::Fail { kind: ErrorKind::BadRequest, call: Some(2) }]
        );
    }
    // One that fails before its time is hedged when it is made again.
    let mut setup = of(hedged("a", "b"));
    setup.retry = RetryPolicy::default();
    let (mut machine, _) = begin(setup);
    timer_at(&tell(&mut machine, failed(0, ErrorKind::Cut)));
    let commands = tell(&mut machine, Event::Timer(Timer::Backoff { call: 0 }));
    let timer = Command::SetTimer { timer: Timer::Hedge { call: 1 }, at: 200_010 };
    assert_eq!(commands, [begins(1, "a", AttemptReason::Retry, &[]), timer]);
    assert_eq!(tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 })), []);
    assert_eq!(tell(&mut machine, Event::Timer(Timer::Hedge { call: 1 })).len(), 2);
    let commands = tell(&mut machine, Event::ClientGone);
    assert_eq!(commands[..2], [Command::Cancel { call: 1 }, Command::Cancel { call: 2 }]);
}

#[test]
fn bounds_mask_a_hedge_and_the_call_goes_on() {
    let mut setup = of(hedged("a", "b"));
    setup.limits.max_calls = 1;
    let (mut machine, _) = begin(setup);
    let commands = tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 }));
    assert_eq!(commands, [note(&[], What::HedgeMasked { call: 0, by: Mask::Calls })]);
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), [Command::Forward { call: 0 }]);
}

#[test]
fn a_hedge_below_a_gate_or_a_vote_is_held_back_like_its_call() {
    let plan = cascade(vec![hedged("a", "b"), call("l")], &[SURE]);
    let (mut machine, _) = begin(of(plan));
    let commands = tell(&mut machine, Event::Timer(Timer::Hedge { call: 0 }));
    assert_eq!(commands[0], begins(1, "b", AttemptReason::Hedge, &[0]));
    let won = note(&[0], What::HedgeWon { call: 0, hedge: 1 });
    assert_eq!(tell(&mut machine, Event::Delta { call: 1 }), [Command::Cancel { call: 0 }, won]);
    let commands = tell(&mut machine, said(1, "yes", Some(0.5)));
    let expected = [
        note(&[0], gate(1, 0.5)),
        note(&[], What::Accepted { stage: 0, call: 1 }),
        Command::Emit { call: 1 },
        Command::Finish { call: 1 },
    ];
    assert_eq!(commands, expected);
}
