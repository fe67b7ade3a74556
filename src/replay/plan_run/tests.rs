//! The driver against a machine that is run by hand, and what holds of every run.

use proptest::prelude::*;

use super::*;
use crate::{
    cascade::{Limits, RetryPolicy},
    domain::{
        Aggregate, BestBecause, Bound, Condition, Plan, Reading, Score, Scored, Stage, What,
        testing::{call, frugal, parallel},
    },
    replay::matrix::{Matrix, Query},
};

fn setup(plan: Plan) -> Setup {
    Setup { retry: RetryPolicy::default(), seed: 7, ..Setup::bare(plan) }
}

/// Recorded answers by model, the next one for each call of it.
#[derive(Clone, Debug, Default)]
struct Shelf {
    answers: Vec<(String, Recorded)>,
    taken: Vec<usize>,
}

impl Shelf {
    fn with(mut self, model: &str, ending: Ending, cost: u64, latency: i64) -> Self {
        let cost = Spend::usd(cost);
        let answer = self.answers.len();
        self.answers
            .push((model.to_owned(), Recorded { answer, ending, cost, first: None, known: Vec::new(), latency }));
        self
    }
}

impl Answers for Shelf {
    fn answer(&mut self, asked: &Asked<'_>) -> Option<Recorded> {
        let next =
            (0..self.answers.len()).find(|n| !self.taken.contains(n) && self.answers[*n].0 == asked.spec.model)?;
        self.taken.push(next);
        Some(self.answers[next].1.clone())
    }
}

fn says(form: u32, logprob: f64) -> Ending {
    let read = Ok(Scored { value: logprob, exact: true });
    Ending::Answers(Facts { form, scores: vec![Reading { score: Score::MeanLogprob, read }], ..Facts::default() })
}

fn fails(kind: ErrorKind) -> Ending {
    Ending::Fails { kind, retry_after: None, down: Vec::new() }
}

#[test]
fn a_rejected_answer_is_followed_by_the_next_recorded_one() {
    let shelf = || Shelf::default().with("small", says(0, -0.9), 3, 1_000).with("large", says(1, -0.1), 40, 5_000);
    let got = run(&setup(frugal()), 100, &mut shelf());
    assert_eq!(got.end, End::Answered { call: 1, answer: 1 });
    assert_eq!((got.cost.usd, got.latency, got.calls.len()), (43, 6_000, 2));
    assert_eq!((got.calls[1].why, &got.calls[1].at[..]), (AttemptReason::Escalation, &[1][..]));

    // The same by hand.
    let mut machine = Machine::new(setup(frugal()), 100);
    let mut notes = Vec::new();
    let mut drain = |machine: &mut Machine| {
        let commands: Vec<Command> = std::iter::from_fn(|| machine.poll()).collect();
        notes.extend(
            commands.iter().filter_map(|c| if let Command::Note(note) = c { Some(note.clone()) } else { None }),
        );
        commands.last().cloned()
    };
    for (n, (_, recorded)) in shelf().answers.into_iter().enumerate() {
        let call = n as u32;
        assert!(matches!(drain(&mut machine), Some(Command::Start { call: begun, .. }) if begun == call));
        let Ending::Answers(facts) = recorded.ending else { panic!("an error") };
        let answer = Arc::new(Answered { facts, cost: recorded.cost });
        machine.handle(Event::Done { call, answer }, 100 + recorded.latency * (n as i64 + 1));
    }
    assert_eq!(drain(&mut machine), Some(Command::Finish { call: 1 }));
    assert_eq!(got.notes, notes);
    assert_eq!(notes.len(), 3, "the gate, the escalation, the acceptance: {notes:?}");
}

#[test]
fn a_call_that_was_never_recorded_ends_the_run() {
    let mut shelf = Shelf::default().with("small", says(0, -0.9), 3, 1_000);
    let got = run(&setup(frugal()), 0, &mut shelf);
    assert_eq!(got.end, End::Missed { call: 1, model: "large".into() });
    assert_eq!((got.missed(), got.cost.usd, got.served()), (true, 3, None));
    let mut shelf = Shelf::default().with("small", says(0, -0.1), 3, 1_000);
    let got = run(&setup(frugal()), 0, &mut shelf);
    assert_eq!(got.served().map(|made| &*made.model), Some("small"), "nobody asks for the other");
}

#[test]
fn errors_are_retried_after_waits_and_rerouted() {
    let mut shelf = Shelf::default()
        .with("small", fails(ErrorKind::ServerError), 1, 10)
        .with("small", fails(ErrorKind::BadRequest), 0, 10)
        .with("large", says(0, -0.1), 40, 100);
    let got = run(&setup(frugal()), 0, &mut shelf);
    let whys: Vec<AttemptReason> = got.calls.iter().map(|made| made.why).collect();
    assert_eq!(whys, [AttemptReason::Planned, AttemptReason::Retry, AttemptReason::Fallback]);
    assert!(got.latency > 120 + 100_000, "half of the wait at least: {}", got.latency);
    assert_eq!((got.cost.usd, got.end), (41, End::Answered { call: 2, answer: 2 }));
}

#[test]
fn votes_end_early_and_pay_for_what_they_cancel() {
    let shelf = || {
        let empty = Shelf::default();
        empty.with("a", says(4, 0.0), 1, 30).with("b", says(4, 0.0), 2, 20).with("c", says(5, 0.0), 4, 50)
    };
    let got = run(&setup(parallel(&["a", "b", "c"], Aggregate::Vote)), 0, &mut shelf());
    assert_eq!((got.latency, got.cost.usd, got.calls[2].cancelled), (30, 7, true));
    let got = run(&setup(parallel(&["a", "b", "c"], Aggregate::First)), 0, &mut shelf());
    assert_eq!((got.end, got.latency), (End::Answered { call: 1, answer: 1 }, 20));
}

#[test]
fn the_deadline_gives_out_the_best_so_far_and_an_open_record_none() {
    let shelf = || Shelf::default().with("small", says(0, -0.9), 3, 1_000).with("large", Ending::Never, 0, 0);
    let limits = Limits { deadline: Some(5_000), ..Limits::default() };
    let got = run(&Setup { limits, ..setup(frugal()) }, 0, &mut shelf());
    assert_eq!((got.end.clone(), got.latency), (End::Answered { call: 0, answer: 0 }, 5_000));
    assert!(
        got.notes.iter().any(|note| matches!(note.what, What::BestSoFar { because: BestBecause::Stopped { .. }, .. }))
    );
    assert_eq!(run(&setup(frugal()), 0, &mut shelf()).end, End::Open);
}

fn ending() -> impl Strategy<Value = Ending> {
    prop_oneof![
        6 => (0u32..3, -1.0..0.0f64).prop_map(|(form, logprob)| says(form, logprob)),
        2 => (0..ErrorKind::ALL.len()).prop_map(|n| fails(ErrorKind::ALL[n])),
        1 => Just(Ending::Never),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let model = || prop_oneof![Just("a"), Just("b"), Just("c")].prop_map(call);
    let branches = proptest::collection::vec(model(), 1..4);
    let parallel = (branches, any::<bool>()).prop_map(|(branches, vote)| {
        let aggregate = if vote { Aggregate::Vote } else { Aggregate::First };
        Plan::Parallel { branches, aggregate }
    });
    let part = prop_oneof![model(), parallel];
    let stage = (part, -1.0..0.0f64, any::<bool>()).prop_map(|(plan, at, disagree)| {
        let condition = match disagree {
            true => Condition::new(Score::Disagreement, Bound::Below(-at)),
            false => Condition::new(Score::MeanLogprob, Bound::Above(at)),
        };
        Stage { plan, accept_when: vec![condition], stop_early: false }
    });
    proptest::collection::vec(stage, 1..4).prop_map(|mut stages| {
        stages.last_mut().unwrap().accept_when.clear();
        Plan::Cascade(stages)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn runs_are_the_same_again_and_cost_the_sum_of_their_calls(
        plan in plan(),
        answers in proptest::collection::vec((0usize..3, ending(), 0u64..100, 0i64..1_000_000), 0..12),
    ) {
        let names = ["a", "b", "c"];
        let shelf = answers.iter().fold(Shelf::default(), |shelf, (model, ending, cost, latency)| {
            shelf.with(names[*model], ending.clone(), *cost, *latency)
        });
        let (mut one, mut two) = (shelf.clone(), shelf.clone());
        let got = run(&setup(plan.clone()), 5, &mut one);
        prop_assert_eq!(&got, &run(&setup(plan), 5, &mut two));
        prop_assert_eq!(got.cost.usd, got.calls.iter().map(|made| made.cost.usd).sum::<u64>());
        let given: Vec<usize> = got.calls.iter().map(|made| made.answer).collect();
        prop_assert_eq!(&given, &one.taken, "what was taken is what was made");
        for made in &got.calls {
            prop_assert_eq!(&shelf.answers[made.answer].0, &made.model);
        }
        if let Some(served) = got.served() {
            prop_assert!(matches!(shelf.answers[served.answer].1.ending, Ending::Answers(_)) && !served.cancelled);
        }
    }
}

fn table() -> Matrix {
    let query = |i: usize| Query { id: i.to_string(), task: String::new(), text: format!("question {i}") };
    let models = ["a", "b", "c"].map(str::to_owned).to_vec();
    let scores = vec![0.0, 1.0, 1.0, 0.0, 0.0, 1.0];
    let costs = vec![0.001, 0.002, 0.1, 0.001, 0.002, 0.1];
    let said = ["41", "42", "The answer is 42.", "7", "7.0", "8"].map(|text| Some(text.to_owned()));
    Matrix::of("made", models, (0..2).map(query).collect(), scores, costs).with_responses(&said)
}

#[test]
fn plans_run_over_the_answers_of_a_matrix() {
    let table = table();
    let over = |plan: &Plan, q| outcomes::over(plan, &table, q).unwrap();
    let vote = over(&parallel(&["a", "b", "c"], Aggregate::Vote), 0);
    assert_eq!((vote.served, vote.score, vote.calls), (Some(1), 1.0, 3), "the first branch that says 42");
    assert!((vote.cost_usd - 0.103).abs() < 1e-12);

    // Two cheap models, and the dear one where they disagree.
    let agree = Condition::new(Score::Disagreement, Bound::Below(0.5));
    let cascade = Plan::Cascade(vec![
        Stage { plan: parallel(&["a", "b"], Aggregate::Vote), accept_when: vec![agree], stop_early: false },
        Stage { plan: call("c"), accept_when: Vec::new(), stop_early: false },
    ]);
    let (first, second) = (over(&cascade, 0), over(&cascade, 1));
    assert_eq!((first.served, first.calls), (Some(2), 3));
    assert_eq!((second.served, second.calls, second.score), (Some(0), 2, 0.0), "both say 7, and are wrong");
    assert!((second.cost_usd - 0.003).abs() < 1e-12);

    let thrice = over(&parallel(&["a", "a", "a"], Aggregate::Vote), 0);
    assert_eq!((thrice.missed, thrice.served, thrice.calls), (true, None, 1), "there is one answer of each");
    let judge = over(&parallel(&["a", "b"], Aggregate::Judge { call: CallSpec::bare("c") }), 0);
    assert!(judge.missed, "nobody knows what it would have said");

    // Without log-probabilities a gate on them never holds.
    let gated = Stage {
        plan: call("a"),
        accept_when: vec![Condition::new(Score::MeanLogprob, Bound::Above(-9.0))],
        stop_early: false,
    };
    let came =
        over(&Plan::Cascade(vec![gated, Stage { plan: call("b"), accept_when: Vec::new(), stop_early: false }]), 1);
    assert_eq!(came.served, Some(1));
}

#[test]
fn what_a_plan_decides_by_has_to_be_there() {
    let mut table = table();
    let error = outcomes::over(&parallel(&["a", "b"], Aggregate::First), &table, 0).unwrap_err();
    assert!(error.contains("first(a, b)") && error.contains("latency_ms"), "{error}");
    table = table.with_responses(&[]);
    let error = outcomes::over(&parallel(&["a", "b"], Aggregate::Vote), &table, 0).unwrap_err();
    assert!(error.contains("vote(a, b)") && error.contains("response"), "{error}");
}
