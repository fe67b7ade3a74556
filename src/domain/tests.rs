//! Plans and notes as they are recorded, and what can be said of a plan before it runs.

use serde_json::json;

use super::*;

fn frugal() -> Plan {
    let condition = Condition::new(Score::MeanTokenEntropy, Bound::Below(0.9));
    let quantile = Condition::new(Score::LogprobQuantile(0.1), Bound::Above(-2.0));
    let small =
        Stage { plan: Plan::Call(CallSpec::bare("small")), accept_when: vec![condition, quantile], stop_early: false };
    let branches = ["a", "b", "small"].map(|m| Plan::Call(CallSpec::bare(m))).to_vec();
    let aggregate = Aggregate::Judge { call: CallSpec::bare("large") };
    Plan::Cascade(vec![
        small,
        Stage { plan: Plan::Parallel { branches, aggregate }, accept_when: Vec::new(), stop_early: false },
    ])
}

#[test]
fn a_bare_call_is_recorded_as_ever() {
    let mut call = CallSpec::bare("m");
    assert_eq!(serde_json::to_string(&Plan::Call(call.clone())).unwrap(), r#"{"call":{"model":"m"}}"#);
    call.sampling.max_tokens = Some(5);
    call.system = Some("s".to_owned());
    let text = r#"{"call":{"model":"m","sampling":{"max_tokens":5},"system":"s"}}"#;
    assert_eq!(serde_json::to_string(&Plan::Call(call.clone())).unwrap(), text);
    assert_eq!(serde_json::from_str::<Plan>(text).unwrap(), Plan::Call(call));
}

#[test]
fn trees_are_recorded_and_read_back() {
    let plan = frugal();
    let value = serde_json::to_value(&plan).unwrap();
    let expected = json!({"cascade": [
        {"call": {"model": "small"}, "accept_when": [
            {"score": "mean_token_entropy", "below": 0.9},
            {"score": {"logprob_quantile": 0.1}, "above": -2.0},
        ]},
        {"parallel": {
            "branches": [{"call": {"model": "a"}}, {"call": {"model": "b"}}, {"call": {"model": "small"}}],
            "aggregate": {"judge": {"call": {"model": "large"}}},
        }},
    ]});
    assert_eq!(value, expected);
    assert_eq!(serde_json::from_value::<Plan>(value).unwrap(), plan);
    let bytes = canonical::to_bytes(&plan).unwrap();
    assert_eq!(serde_json::from_slice::<Plan>(&bytes).unwrap(), plan);
    for aggregate in [Aggregate::First, Aggregate::Vote, Aggregate::WeightedVote { weights: vec![0.1, 2.0] }] {
        let plan = Plan::Parallel { branches: vec![frugal(), frugal()], aggregate };
        assert_eq!(serde_json::from_slice::<Plan>(&canonical::to_bytes(&plan).unwrap()).unwrap(), plan);
    }
}

#[test]
fn a_plan_tells_its_bounds() {
    let plan = frugal();
    assert_eq!(plan.models(), ["small", "a", "b", "large"]);
    assert_eq!(plan.most_calls(), 5);
    let worst = |call: &CallSpec| if call.model == "large" { 100 } else { 7 };
    assert_eq!(plan.worst_cost(&worst), 128);
    assert_eq!(plan.worst_cost(&|_| u64::MAX), u64::MAX);
    let text =
        "cascade(small if mean_token_entropy < 0.9 and logprob_quantile 0.1 > -2, else judge(a, b, small; by large))";
    assert_eq!(plan.to_string(), text);
    let quorums = |aggregate: Aggregate| [1, 2, 3, 4].map(|n| aggregate.quorum(n));
    assert_eq!(quorums(Aggregate::Vote), [1, 2, 2, 3]);
    assert_eq!(quorums(Aggregate::First), [1; 4]);
}

#[test]
fn gates_ask_log_probabilities_of_every_call_but_a_judges() {
    let gated = |aggregate| {
        let branches = vec![Plan::Call(CallSpec::bare("a")), frugal()];
        let gate = vec![Condition::new(Score::MeanLogprob, Bound::Above(-1.0))];
        let last = Stage { plan: Plan::Call(CallSpec::bare("b")), accept_when: Vec::new(), stop_early: false };
        Plan::Cascade(vec![
            Stage { plan: Plan::Parallel { branches, aggregate }, accept_when: gate, stop_early: false },
            last,
        ])
    };
    let judged = gated(Aggregate::Judge { call: CallSpec::bare("large") });
    let asked = |plan: &Plan, at: &[u32]| plan.scores_at(at).iter().filter_map(Score::logprobs).max();
    assert_eq!(asked(&judged, &[0, 0]), Some(0));
    assert_eq!(asked(&judged, &[0, 1, 0]), Some(20), "the inner gate asks more");
    assert_eq!(asked(&judged, &[0, 1, 1, 2]), Some(0));
    assert_eq!(asked(&judged, &[0, 1, 1, 3]), None, "the inner judge");
    assert_eq!((asked(&judged, &[0, 2]), asked(&judged, &[1])), (None, None));
    let refined = gated(Aggregate::Refine { call: CallSpec::bare("large") });
    assert_eq!(asked(&refined, &[0, 2]), Some(0));
    let names = |plan: &mut Plan| plan.calls_mut().into_iter().map(|c| c.model.clone()).collect::<Vec<_>>();
    assert_eq!(names(&mut refined.clone()), refined.calls().iter().map(|c| c.model.clone()).collect::<Vec<_>>());
}

#[test]
fn plans_that_make_no_sense_are_named() {
    let call = || Plan::Call(CallSpec::bare("m"));
    let stage = |condition: Option<(Score, Bound)>| Stage {
        plan: call(),
        accept_when: condition.map(|(score, bound)| Condition::new(score, bound)).into_iter().collect(),
        stop_early: false,
    };
    let sure = Some((Score::MeanLogprob, Bound::Above(-1.0)));
    let weighted = |weights| Plan::Parallel { branches: vec![call()], aggregate: Aggregate::WeightedVote { weights } };
    let nan = Some((Score::MeanLogprob, Bound::Above(f64::NAN)));
    let beyond = Some((Score::LogprobQuantile(1.5), Bound::Above(-1.0)));
    for (plan, expected) in [
        (frugal(), Ok(())),
        (Plan::Cascade(vec![stage(sure), stage(None)]), Ok(())),
        (Plan::Cascade(Vec::new()), Err(PlanError::NoStages)),
        (Plan::Cascade(vec![stage(sure)]), Err(PlanError::LastStageGated)),
        (Plan::Cascade(vec![stage(nan), stage(None)]), Err(PlanError::Number)),
        (Plan::Cascade(vec![stage(beyond), stage(None)]), Err(PlanError::Number)),
        (Plan::Parallel { branches: Vec::new(), aggregate: Aggregate::Vote }, Err(PlanError::NoBranches)),
        (weighted(vec![1.0]), Ok(())),
        (weighted(vec![]), Err(PlanError::Weights)),
        (weighted(vec![-1.0]), Err(PlanError::Number)),
        (
            Plan::Parallel { branches: vec![call(), Plan::Cascade(Vec::new())], aggregate: Aggregate::First },
            Err(PlanError::NoStages),
        ),
    ] {
        assert_eq!(plan.check(), expected, "{plan}");
    }
}

#[test]
fn notes_are_recorded_with_their_reason() {
    let (score, bound) = (Score::LogprobQuantile(0.25), Bound::Below(0.5));
    let gate = What::GateFails { call: 1, condition: Condition::new(score, bound), value: 0.75, exact: false };
    let note = Note { at: vec![0, 2], what: gate };
    let expected = json!({
        "at": [0, 2], "reason": "gate_fails", "call": 1, "score": {"logprob_quantile": 0.25},
        "below": 0.5, "value": 0.75, "exact": false,
    });
    assert_eq!(serde_json::to_value(&note).unwrap(), expected);
    let whats = [
        gate,
        What::GateUnscored { call: 0, condition: Condition::new(score, bound), why: Unscored::NoLogprobs },
        What::Masked { by: Mask::Budget },
        What::RetryDenied { call: 2 },
        What::HedgeLeft { call: 0, failed: 1, error: ErrorKind::Timeout },
        What::Rerouted { from: 0, to: 1, error: ErrorKind::Cut, call: 0 },
        What::BranchLeftOut { branch: 1, left: Left::Failed { error: ErrorKind::Timeout, call: 3 } },
        What::BranchLeftOut { branch: 1, left: Left::Masked { by: Mask::Calls } },
        What::Voted { branch: 0, call: 0, answers: 3, distinct: 2, share: 2.0 / 3.0, tie: false, early: true },
        What::Stopped { by: Abort::Deadline },
        What::BestSoFar { call: 0, because: BestBecause::Stopped { by: Abort::Deadline } },
    ];
    for what in whats {
        let note = Note { at: Vec::new(), what };
        let bytes = canonical::to_bytes(&note).unwrap();
        assert_eq!(serde_json::from_slice::<Note>(&bytes).unwrap(), note);
    }
}

#[test]
fn kinds_of_error_are_recorded_by_their_labels() {
    for kind in ErrorKind::ALL {
        assert_eq!(serde_json::to_value(kind).unwrap(), json!(kind.as_str()));
    }
}

#[test]
fn the_client_counts_and_the_plan_fills_in_and_bounds_unless_it_is_firm() {
    let plan = Sampling { max_tokens: Some(64), temperature: Some(0.5), stop: vec!["a".into()], ..Sampling::default() };
    let client =
        Sampling { max_tokens: Some(100), temperature: Some(0.0), stop: vec!["b".into()], ..Sampling::default() };
    let call = CallSpec { sampling: plan, ..CallSpec::bare("m") };
    let both = call.sampling_for(&client);
    assert_eq!((both.max_tokens, both.temperature), (Some(64), Some(0.0)));
    assert_eq!(both.stop, ["b", "a"]);
    let silent = call.sampling_for(&Sampling::default());
    assert_eq!((silent.max_tokens, silent.temperature), (Some(64), Some(0.5)));
    assert_eq!(CallSpec::bare("m").sampling_for(&client).max_tokens, Some(100));
    let firm = CallSpec { firm: true, ..call }.sampling_for(&client);
    assert_eq!((firm.max_tokens, firm.temperature), (Some(64), Some(0.5)));
}
