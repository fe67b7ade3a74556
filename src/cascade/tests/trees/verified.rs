//! Answers that are verified before a gate asks what came of it.

use super::*;
use crate::domain::Verified;

const RIGHT: Condition = condition(Score::Verified, Bound::Above(0.5));

/// `s`, whose answer `v` is asked about so often, before `l`.
fn verified(times: u32) -> Plan {
    let plan = Plan::Verified(Box::new(Verified { plan: call("s"), by: spec("v"), times }));
    cascade(vec![plan, call("l")], &[RIGHT])
}

fn asks(call: u32) -> Command {
    let (why, input, at) = (AttemptReason::Planned, Input::Verify(0), vec![0, 1]);
    Command::Start { call, spec: spec("v"), why, input, at }
}

/// What a verifying call says: that the answer is right, wrong, or neither.
fn says(call: u32, verdict: Option<bool>) -> Event {
    let facts = Facts { verdict: verdict.map(u32::from), ..facts("x", None) };
    Event::Done { call, answer: Arc::new(Answered { facts, cost: Spend::usd(1) }) }
}

/// Up to where the verifying calls are under way.
fn asked(setup: Setup, times: u32) -> Machine {
    let (mut machine, commands) = begin(setup);
    assert_eq!(commands, [begins(0, "s", AttemptReason::Planned, &[0, 0])]);
    assert_eq!(tell(&mut machine, Event::Delta { call: 0 }), [], "held back");
    let commands = tell(&mut machine, said(0, "42", None));
    assert_eq!(commands, (1..=times).map(asks).collect::<Vec<_>>());
    machine
}

#[test]
fn an_answer_that_most_say_is_right_is_accepted() {
    let mut machine = asked(of(verified(4)), 4);
    assert_eq!(tell(&mut machine, says(2, Some(true))), []);
    assert_eq!(tell(&mut machine, says(1, None)), []);
    assert_eq!(tell(&mut machine, says(4, Some(false))), []);
    let commands = tell(&mut machine, says(3, Some(true)));
    let counted = What::Verified { call: 0, right: 2, wrong: 1, unclear: 1 };
    let holds = What::GateHolds { call: 0, condition: RIGHT, value: 2.0 / 3.0, exact: true };
    let expected = [
        note(&[0], counted),
        note(&[0], holds),
        note(&[], What::Accepted { stage: 0, call: 0 }),
        Command::Emit { call: 0 },
        Command::Finish { call: 0 },
    ];
    assert_eq!(commands, expected);
}

#[test]
fn an_answer_that_half_say_is_wrong_is_escalated() {
    let mut machine = asked(of(verified(2)), 2);
    tell(&mut machine, says(1, Some(false)));
    let commands = tell(&mut machine, says(2, Some(true)));
    let fails = What::GateFails { call: 0, condition: RIGHT, value: 0.5, exact: true };
    assert_eq!(commands[1], note(&[0], fails));
    assert_eq!(commands[3], begins(3, "l", AttemptReason::Escalation, &[1]));
}

#[test]
fn who_fails_says_nothing() {
    let mut machine = asked(of(verified(2)), 2);
    let gone = |verifier| What::VerifierFailed { call: 0, verifier, error: ErrorKind::Cut };
    assert_eq!(tell(&mut machine, failed(1, ErrorKind::Cut)), [note(&[0], gone(1))]);
    let commands = tell(&mut machine, says(2, Some(true)));
    assert_eq!(commands[0], note(&[0], What::Verified { call: 0, right: 1, wrong: 0, unclear: 0 }));
    assert_eq!(commands[2], note(&[], What::Accepted { stage: 0, call: 0 }));

    let mut machine = asked(of(verified(1)), 1);
    let commands = tell(&mut machine, failed(1, ErrorKind::Cut));
    let unscored = What::GateUnscored { call: 0, condition: RIGHT, why: Unscored::NoVerdict };
    assert_eq!(commands[..2], [note(&[0], gone(1)), note(&[0], unscored)]);
}

#[test]
fn what_a_budget_does_not_hold_is_not_asked_and_the_answer_stays() {
    let mut setup = of(verified(3));
    setup.limits.budget = Some(25);
    setup.worst = [("s", 10), ("v", 10), ("l", 100)].map(|(m, usd)| (m.to_owned(), Spend::usd(usd))).into();
    let (mut machine, _) = begin(setup);
    let commands = tell(&mut machine, said(0, "42", None));
    let masked = What::VerifierMasked { call: 0, by: Mask::Budget };
    assert_eq!(commands, [asks(1), note(&[0], masked)]);
    let commands = tell(&mut machine, says(1, Some(false)));
    let because = BestBecause::Masked { by: Mask::Budget };
    assert!(commands.contains(&note(&[], What::BestSoFar { call: 0, because })), "{commands:?}");
    assert_eq!(commands[commands.len() - 1], Command::Finish { call: 0 });
}

#[test]
fn a_client_that_leaves_ends_them_all() {
    let mut machine = asked(of(verified(2)), 2);
    tell(&mut machine, says(1, Some(true)));
    let commands = tell(&mut machine, Event::ClientGone);
    assert!(commands.contains(&Command::Cancel { call: 2 }), "{commands:?}");
    assert!(!commands.contains(&Command::Cancel { call: 1 }), "{commands:?}");
}
