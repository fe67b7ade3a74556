//! What follows an error where some models cannot be called any more.

use super::*;
use crate::domain::{Edge, FailoverGraph, FailoverWeights, Health};

/// The call fails while these cannot be called.
fn fails(call: u32, down: &[&str]) -> Event {
    let down = down.iter().map(|model| (*model).to_owned()).collect();
    Event::Failed { call, kind: ErrorKind::ServerError, retry_after: None, cost: Spend::default(), down }
}

fn instead(call: u32, model: &str) -> Command {
    begins(call, model, AttemptReason::Fallback, &[])
}

fn with_fallback(models: &[&str]) -> Setup {
    let mut setup = of(call("planned"));
    setup.fallback = models.iter().map(|model| spec(model)).collect();
    setup.fallback_on = vec![ErrorKind::ServerError];
    setup
}

#[test]
fn a_fallback_in_order_passes_over_who_is_down_now() {
    let setup = with_fallback(&["a", "b", "c"]);
    let down = |index| note(&[], What::FallbackDown { index });
    let (mut machine, _) = begin(setup.clone());
    assert_eq!(tell(&mut machine, fails(0, &["a", "c"])), [down(0), instead(1, "b")]);
    // What could not be called then may be called now.
    assert_eq!(tell(&mut machine, fails(1, &[])), [instead(2, "c")]);

    let (mut machine, _) = begin(setup);
    let fail = Command::Fail { kind: ErrorKind::ServerError, call: Some(0) };
    assert_eq!(tell(&mut machine, fails(0, &["a", "b", "c"])), [down(0), down(1), down(2), fail]);
}

#[test]
fn the_failover_graph_vetoes_who_is_down_now_and_goes_on_behind() {
    let graph = |edges: &[(Option<&str>, &str)]| {
        let edge = |(after, to): &(Option<&str>, &str)| Edge { after: after.map(str::to_owned), to: (*to).to_owned() };
        let weights = FailoverWeights::default();
        Some(FailoverGraph { weights, edges: edges.iter().map(edge).collect(), health: vec![Health::default(); 2] })
    };
    let follows = |commands: Vec<Command>| match &commands[..] {
        [Command::Note(Note { what: What::FailedOver { index, .. }, .. }), Command::Start { spec, .. }] => {
            (*index, spec.model.clone())
        }
        other => panic!("{other:?}"),
    };
    let setup = Setup { failover: graph(&[]), ..with_fallback(&["a", "b"]) };
    let (mut machine, _) = begin(setup.clone());
    assert_eq!(follows(tell(&mut machine, fails(0, &["a"]))), (1, "b".to_owned()));
    assert_eq!(follows(tell(&mut machine, fails(1, &[]))), (0, "a".to_owned()), "it is there again");

    let (mut machine, _) = begin(setup.clone());
    let fail = Command::Fail { kind: ErrorKind::ServerError, call: Some(0) };
    assert_eq!(tell(&mut machine, fails(0, &["a", "b"])), [note(&[], What::NoPath { models: 2 }), fail]);
    let said = machine.no_path().unwrap().to_string();
    assert!(said.contains("`a` is not available; `b` is not available"), "{said}");

    // What only follows a failure of `a` may follow where `a` is down.
    let setup = Setup { failover: graph(&[(None, "a"), (Some("a"), "b")]), ..setup };
    let (mut machine, _) = begin(setup);
    assert_eq!(follows(tell(&mut machine, fails(0, &["a"]))), (1, "b".to_owned()));
}

#[test]
fn a_failed_stage_is_not_followed_by_one_that_nobody_could_begin() {
    let rerouted = |to| note(&[], What::Rerouted { from: 0, to, error: ErrorKind::ServerError, call: 0 });
    let plan = || cascade(vec![call("s"), parallel(&["a", "b"], Aggregate::Vote), call("l")], &[SURE]);
    let (mut machine, _) = begin(of(plan()));
    let last = [note(&[1], What::Down), rerouted(2), begins(1, "l", AttemptReason::Fallback, &[2])];
    assert_eq!(tell(&mut machine, fails(0, &["a", "b"])), last);
    let (mut machine, _) = begin(of(plan()));
    assert_eq!(tell(&mut machine, fails(0, &["a", "l"]))[0], rerouted(1), "one branch can answer");

    // A cascade within begins with its second stage.
    let within = cascade(vec![call("a"), call("b")], &[SURE]);
    let (mut machine, _) = begin(of(cascade(vec![call("s"), within], &[SURE])));
    assert_eq!(tell(&mut machine, fails(0, &["a"]))[0], rerouted(1));

    // Nobody is left: the cascade fails, and the request's fallback answers.
    let mut setup = of(cascade(vec![call("s"), call("l")], &[SURE]));
    setup.fallback = vec![spec("f")];
    setup.fallback_on = vec![ErrorKind::ServerError];
    let (mut machine, _) = begin(setup);
    let failed = note(&[], What::StagesFailed { stage: 0, error: ErrorKind::ServerError, call: 0 });
    assert_eq!(tell(&mut machine, fails(0, &["l"])), [note(&[1], What::Down), failed, instead(1, "f")]);
}
