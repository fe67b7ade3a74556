//! Stages whose answers are verified.

use super::*;
use crate::domain::{Bound, Condition, Stage, Verified};

const VERIFIED: &str = r#"
plans:
  careful:
    cascade:
      - call: small
        verify: {times: 4}
        accept_when: [{score: verified, above: 0.6}]
      - {call: large}
rules: [{name: no-vault, when: request.metadata.no == "vault", deny_models: [vault], on_error: skip}]
select: {arms: [careful], static: careful}
"#;

#[test]
fn the_stages_own_model_verifies_unless_another_is_named() {
    let policy = checked(VERIFIED).unwrap();
    let plan = pinned(&policy, "careful", &Context::default()).plan.unwrap();
    let text = "cascade(small-a verified 4 x by small-a if verified > 0.6, else large-1)";
    assert_eq!((plan.to_string().as_str(), plan.most_calls()), (text, 6));
    let Plan::Cascade(stages) = &plan else { panic!("no cascade") };
    let gate = vec![Condition::new(Score::Verified, Bound::Above(0.6))];
    let sampling = Sampling { temperature: Some(1.0), max_tokens: Some(16), ..Sampling::default() };
    let by = CallSpec { sampling, firm: true, ..CallSpec::bare("small-a") };
    let first = Plan::Verified(Box::new(Verified { plan: Plan::Call(CallSpec::bare("small-a")), by, times: 4 }));
    assert_eq!(stages[0], Stage { plan: first, accept_when: gate, stop_early: false });

    let other = VERIFIED.replace("{times: 4}", "{call: vault, times: 1, max_tokens: 3, system: Be strict.}");
    let policy = checked(&other).unwrap();
    let d = pinned(&policy, "careful", &Context::default());
    assert_eq!(called(&d), ["small-a", "vault-1", "large-1"]);
    let plan = d.plan.unwrap();
    let by = plan.calls()[1];
    assert_eq!((by.sampling.temperature, by.sampling.max_tokens), (Some(0.0), Some(3)));
    assert_eq!(by.system.as_deref(), Some("Be strict."));
    // What binds every call binds these.
    assert!(policy.pin("careful", &policy.initial_state(), &forbidding("vault")).unwrap().plan.is_none());
}

#[test]
fn a_bound_on_cost_knows_the_verifying_calls_with_the_answer_that_they_are_shown() {
    let policy = checked(VERIFIED).unwrap();
    let bounds = policy.bounds();
    let careful = bounds.iter().find(|bounds| bounds.name == "careful").unwrap();
    // 1,000 tokens each way of the dearer small entry, four times prompt, answer, question and 16 tokens, then the large one.
    let (small, large) = (2.0, 10.0);
    let answer = 1000.0 * (small + 2.0 * small);
    let verify = 4.0 * (2064.0 * small + 16.0 * 2.0 * small);
    let expected = (answer + verify + 1000.0 * (large + 2.0 * large)) / 1e6;
    assert!((careful.cost_at_most_usd - expected).abs() < 1e-12, "{} {expected}", careful.cost_at_most_usd);
    assert_eq!(careful.calls_at_most, 6);
}

#[test]
fn what_cannot_be_verified_or_is_for_nothing_is_an_error_with_its_place() {
    let found = said(
        "  a: {cascade: [{call: small, verify: {times: 3}}, {call: large}]}\n  b: {cascade: [{call: small, accept_when: [{score: \
         verified, above: 0.5}]}, {call: large}]}\n  c: {cascade: [{parallel: [{call: small}, {call: large}], aggregate: first, \
         verify: {times: 3}, accept_when: [{score: verified, above: 0.5}]}, {call: large}]}\n  d: {cascade: [{call: small, verify: \
         {call: smal}, accept_when: [{score: verified, above: 0.5}]}, {call: large}]}\n  e: {cascade: [{call: small, verify: {times: \
         3, temperature: 0}, accept_when: [{score: verified, above: 1.5}]}, {call: large}]}\n  f: {cascade: [{call: small, verify: \
         {times: 63}, accept_when: [{score: verified, above: 0.5}]}, {call: large}]}\n",
    );
    let expected = [
        "warning 4:17 plans.a.cascade[0]: without `accept_when` this stage's answer is always taken",
        "4:31 plans.a.cascade[0].verify: this stage's answer is verified, and no condition asks what came of it",
        "5:53 plans.b.cascade[0].accept_when[0].score: nobody verifies this stage's answer",
        "6:86 plans.c.cascade[0].verify: this stage is not one call, whose model could verify its own answer",
        "7:46 plans.d.cascade[0].verify.call: there is no model `smal`",
        "warning 8:47 plans.e.cascade[0].verify.times: these 3 calls ask the same, and nothing makes what they say differ",
        "8:106 plans.e.cascade[0].accept_when[0].above: 1.5 is outside the range of `verified`",
        "9:6 plans.f: this plan can make 65 calls",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_verifying_call_reserves_what_it_can_use_and_nothing_for_the_stage() {
    let text = VERIFIED
        .replace("call: small\n", "call: small\n        max_tokens: 64\n")
        .replace("times: 4", "max_tokens: 256");
    let policy = checked(&format!("{text}budget: [{{per: request, tokens: 800}}]\n")).unwrap();
    let mut c = Context::default();
    (c.signals.tokens, c.request.max_tokens) = (600, 40);
    let d = decide(&policy, &c);
    let tokens: Vec<u64> = d.plan.unwrap().calls().iter().map(|call| call.worst.unwrap().tokens).collect();
    // The client bounds its own answer, not what is said of it.
    assert_eq!(tokens, [640, 600 + 40 + 64 + 256, 640]);
    assert_eq!(d.bounds.unwrap().tokens, Some(800));
}

#[test]
fn what_a_model_has_of_the_request_does_not_help_it_to_verify() {
    let yaml = "policy: p\nmodels: {own: {name: own}, other: {name: other}}\nplans:\n  checked: {cascade: [{call: own, max_tokens: 1, verify: \
                {times: 8}, accept_when: [{score: verified, above: 0.5}]}, {call: own, max_tokens: 1}]}\n  plain: {call: other, max_tokens: 1}\n\
                select: {arms: [checked, plain], cheapest: {}}\n";
    let priced = |name: &str, input: f64, cached: Option<f64>| ModelCard {
        price: Price { input, output: 0.0, cached_input: cached },
        ..card(name, &[], 0, false)
    };
    let policy =
        check("t.yaml", yaml.as_bytes(), |_| Fleet::new([priced("own", 2.0, Some(0.1)), priced("other", 15.0, None)]));
    let mut c = Context::default();
    c.signals.tokens = 5000;
    (c.session.id, c.session.last_model, c.session.last_tokens) = ("s".into(), "own".into(), 5000);
    // 2 x $0.0005 and 8 x $0.01 and a little, against $0.075.
    assert_eq!(decide(&policy.unwrap(), &c).arm, "plain");
}
