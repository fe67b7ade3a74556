//! Plans of several calls: what a file says of them, what may be called, and what they may cost.

mod beginnings;
mod budgets;
mod verify;

use super::*;
use crate::domain::{Aggregate, CallSpec, IfUnscored, Sampling, Score};

const HEAD: &str = "policy: trees\nmodels: {small: {tag: small}, large: {name: large-1}, vault: {name: vault-1}, mute: {name: \
                    mute}, any: {tag: any}}\n";

const TREES: &str = r#"
plans:
  frugal:
    cascade:
      - {call: small, temperature: 0, accept_when: [{score: mean_token_entropy, below: 0.9}, {score: logprob_quantile, q: 0.1, above: -3, if_unscored: accept}]}
      - {call: large}
  arena:
    parallel: [{call: small, temperature: 0.8, times: 3}, {call: large}]
    aggregate: {judge: {call: vault, temperature: 0, max_tokens: 8}}
  acar:
    cascade:
      - parallel: [{call: small, temperature: 0.8, times: 3}]
        aggregate: vote
        accept_when: [{score: disagreement, below: 0.4}]
      - plan: arena
  brief: {call: small, temperature: 0.7, max_tokens: 100}
"#;

const RULES: &str = r#"
rules:
  - {name: no-vault, when: request.metadata.no == "vault", deny_models: [vault], on_error: skip}
  - {name: no-large, when: request.metadata.no == "large", deny_models: [large], on_error: skip}
  - {name: wants-acar, when: request.metadata.want == "acar", use: acar}
select: {arms: [frugal, acar, small], static: frugal}
fallback: {on: [transient], to: [large, brief]}
"#;

fn cards() -> Fleet {
    let priced = |name: &str, tag: &str, context: u32, price: f64| ModelCard {
        price: Price { input: price, output: 2.0 * price, cached_input: None },
        ..card(name, &[tag, "any"], context, false)
    };
    let mute = ModelCard {
        capabilities: Capabilities { logprobs: false, tools: false, ..Capabilities::default() },
        ..card("mute", &["any"], 0, false)
    };
    Fleet::new([
        priced("small-a", "small", 1000, 1.0),
        priced("small-b", "small", 4000, 2.0),
        priced("large-1", "large", 0, 10.0),
        priced("vault-1", "vault", 2000, 5.0),
        mute,
    ])
}

fn checked(text: &str) -> Result<Policy, Diagnostics> {
    check("t.yaml", format!("{HEAD}{text}").as_bytes(), |_| cards())
}

fn trees() -> Policy {
    checked(&format!("{TREES}{RULES}")).unwrap()
}

/// Of plans alone: what is wrong, as `line:column path: message`, warnings marked.
fn said(plans: &str) -> Vec<String> {
    let text = format!("plans:\n{plans}select: {{arms: [small], static: small}}\n");
    let found = match checked(&text) {
        Ok(policy) => policy.warnings().clone(),
        Err(found) => found,
    };
    let mark = |d: &Diagnostic| if d.severity == Severity::Warning { "warning " } else { "" };
    found.0.iter().map(|d| format!("{}{}:{} {d}", mark(d), d.line, d.column)).collect()
}

fn decide(policy: &Policy, c: &Context) -> Decision {
    policy.decide(&policy.initial_state(), c)
}

fn pinned(policy: &Policy, name: &str, c: &Context) -> Decision {
    policy.pin(name, &policy.initial_state(), c).unwrap()
}

/// A context in which these entries are down.
fn without(down: &[&str]) -> Context {
    let mut c = Context::default();
    for name in down {
        c.fleet.insert((*name).to_owned(), ModelState::default());
    }
    c
}

fn forbidding(model: &str) -> Context {
    let mut c = Context::default();
    c.request.metadata.insert("no".into(), model.into());
    c
}

/// The models of a decision's plan, one per call.
fn called(d: &Decision) -> Vec<String> {
    d.plan.iter().flat_map(Plan::calls).map(|call| call.model.clone()).collect()
}

#[test]
fn a_plan_of_plans_becomes_one_tree() {
    let policy = trees();
    let d = pinned(&policy, "acar", &Context::default());
    assert_eq!((d.decided_by, d.arm.as_str()), (DecidedBy::Pinned, "acar"));
    let plan = d.plan.unwrap();
    let text = "cascade(vote(small-a, small-a, small-a) if disagreement < 0.4, else judge(small-a, small-a, small-a, large-1; by \
                vault-1))";
    assert_eq!(plan.to_string(), text);
    assert_eq!(plan.check(), Ok(()));
    let firm: Vec<bool> = plan.calls().iter().map(|call| call.firm).collect();
    assert_eq!(
        firm,
        [true, true, true, true, true, true, false, false],
        "probes, but no branch that sets nothing, no judge"
    );
    let judge = plan.calls().pop().unwrap();
    assert_eq!((judge.sampling.temperature, judge.sampling.max_tokens), (Some(0.0), Some(8)));
    let Some(Plan::Cascade(stages)) = pinned(&policy, "frugal", &Context::default()).plan else { panic!() };
    let conditions = &stages[0].accept_when;
    assert_eq!(conditions[1].score, Score::LogprobQuantile(0.1));
    let unscored: Vec<IfUnscored> = conditions.iter().map(|c| c.if_unscored).collect();
    assert_eq!(unscored, [IfUnscored::Escalate, IfUnscored::Accept]);
    assert!(!stages[0].plan.calls()[0].firm && stages[1].accept_when.is_empty());
    assert!(policy.pin("small", &policy.initial_state(), &Context::default()).unwrap().plan.unwrap().check().is_ok());
}

#[test]
fn weights_are_of_entries_and_given_to_each_of_their_branches() {
    let plans = "plans:\n  w: {parallel: [{call: small, temperature: 1, times: 2}, {call: large}], aggregate: {weighted_vote: [1, \
                 2.5]}}\n  r: {parallel: [{call: small}, {call: large}], aggregate: {refine: large}}\n  f: {parallel: [{plan: w}, \
                 {call: large}], aggregate: first}\n  again: {plan: w}\nselect: {arms: [w], static: w}\n";
    let policy = checked(plans).unwrap();
    let aggregate = |name| match pinned(&policy, name, &Context::default()).plan {
        Some(Plan::Parallel { aggregate, .. }) => aggregate,
        other => panic!("{other:?}"),
    };
    assert_eq!(aggregate("w"), Aggregate::WeightedVote { weights: vec![1.0, 1.0, 2.5] });
    assert_eq!(aggregate("again"), aggregate("w"));
    assert!(matches!(aggregate("r"), Aggregate::Refine { call } if call.model == "large-1"));
    assert_eq!(aggregate("f"), Aggregate::First);
}

#[test]
fn restrictions_bind_every_call_and_name_the_model() {
    let policy = trees();
    let d = decide(&policy, &forbidding("vault"));
    assert_eq!((d.arm.as_str(), d.candidates[1].model.as_deref()), ("frugal", Some("vault-1")));
    assert_eq!(d.candidates[1].eliminated, Some(Elimination::Restriction("no-vault".into())));
    let d = decide(&policy, &forbidding("large"));
    assert_eq!((d.arm.as_str(), called(&d)), ("small", vec!["small-a".to_owned()]));
    assert!(d.fallback.iter().all(|call| call.model != "large-1"));
    let refused = pinned(&policy, "arena", &forbidding("vault"));
    let why = "`arena` was asked for by name, but the rule `no-vault` forbids vault-1";
    assert_eq!((refused.refusal.as_deref(), refused.rule.as_deref()), (Some(why), Some("no-vault")));
    let mut c = forbidding("vault");
    c.request.metadata.insert("want".into(), "acar".into());
    assert_eq!(decide(&policy, &c).rules[2].outcome, RuleOutcome::NotUsable);
    c.request.metadata.insert("no".into(), String::new());
    assert_eq!((decide(&policy, &c).arm.as_str(), decide(&policy, &c).rule.as_deref()), ("acar", Some("wants-acar")));
}

#[test]
fn capabilities_and_context_bind_every_call() {
    let plans =
        "plans: {c: {cascade: [{call: large, accept_when: [{score: mean_margin, above: 0.5}]}, {call: mute}]}}\n";
    let policy = checked(&format!("{plans}select: {{arms: [c, large], static: c}}\n")).unwrap();
    let mut c = Context::default();
    c.request.needs.push(Need::Tools);
    let d = decide(&policy, &c);
    assert_eq!((d.arm.as_str(), d.candidates[0].model.as_deref()), ("large", Some("mute")));
    assert_eq!(d.candidates[0].eliminated, Some(Elimination::Capability("tools".into())));

    let policy = trees();
    let mut c = Context::default();
    c.signals.tokens = 900;
    assert_eq!(called(&pinned(&policy, "acar", &c))[0], "small-a");
    c.signals.tokens = 1500;
    assert_eq!(called(&pinned(&policy, "acar", &c))[0], "small-b", "the first has too little room");
    // Four answers of at most 200 tokens are shown to the judge beside 1,200 of the prompt; its own has 8.
    c.signals.tokens = 1200;
    c.request.max_tokens = 200;
    let d = pinned(&policy, "arena", &c);
    let detail = "vault-1: 2000 prompt and 8 answer tokens, 2000 at most";
    assert_eq!(d.candidates[0].eliminated, Some(Elimination::Context(detail.into())));
    c.signals.tokens = 1192;
    assert_eq!(called(&pinned(&policy, "arena", &c)).len(), 5);
}

#[test]
fn a_plan_stands_while_it_can_still_answer() {
    let policy = trees();
    let down = |down: &[&str], plan| {
        let d = pinned(&policy, plan, &without(down));
        match d.candidates.first().and_then(|c| c.eliminated.clone()) {
            Some(Elimination::Unavailable(model)) => Err(model),
            other => {
                assert_eq!(other, None);
                Ok(called(&d).join(" "))
            }
        }
    };
    assert_eq!(down(&["small-a"], "frugal"), Ok("small-b large-1".into()), "the tag's next");
    assert_eq!(down(&["small-a", "small-b"], "frugal"), Ok("small-a large-1".into()), "left in place");
    assert_eq!(down(&["large-1"], "frugal"), Ok("small-a large-1".into()));
    assert_eq!(down(&["small-a", "small-b", "large-1"], "frugal"), Err("small-a".into()));
    assert_eq!(down(&["vault-1", "small-a", "small-b"], "arena"), Ok("small-a small-a small-a large-1 vault-1".into()));
    assert_eq!(down(&["small-a", "small-b"], "acar").map(|_| ()), Ok(()), "the arena is left");
    assert_eq!(down(&["small-a", "small-b", "large-1"], "acar"), Err("small-a".into()));
    let two = "plans: {v: {parallel: [{call: small}, {call: large}, {call: vault}], aggregate: vote}}\n";
    let policy = checked(&format!("{two}select: {{arms: [v], static: v}}\n")).unwrap();
    assert!(decide(&policy, &without(&["large-1"])).plan.is_some(), "two of three are a quorum");
    assert!(decide(&policy, &without(&["large-1", "vault-1"])).plan.is_none());
}

#[test]
fn a_model_that_is_down_is_no_way_around_a_restriction() {
    let policy = trees();
    let mut c = forbidding("large");
    c.fleet.insert("large-1".into(), ModelState::default());
    let d = pinned(&policy, "frugal", &c);
    assert_eq!(d.candidates[0].eliminated, Some(Elimination::Restriction("no-large".into())));
}

#[test]
fn cheapest_counts_all_calls_and_fastest_the_longest_branch() {
    let plans = "plans:\n  c: {cascade: [{call: small, accept_when: [{score: mean_margin, above: 0.5}]}, {call: small, \
                 max_tokens: 10}]}\n  p: {parallel: [{call: small}, {call: vault}], aggregate: first}\n";
    let with =
        |selector: &str| checked(&format!("{plans}select: {{arms: [p, c, vault], {selector}: {{}}}}\n")).unwrap();
    let mut c = Context::default();
    c.signals.tokens = 100;
    c.request.max_tokens = 100;
    let d = decide(&with("cheapest"), &c);
    // In millionths: a sum of two calls is not the decimal number that it looks like.
    let scores: Vec<f64> = d.candidates.iter().map(|c| (c.score.unwrap() * 1e6).round()).collect();
    assert_eq!((d.arm.as_str(), scores), ("c", vec![-1800.0, -420.0, -1500.0]));
    for (name, ttft_ms) in [("small-a", 100.0), ("vault-1", 150.0)] {
        c.fleet.insert(name.into(), ModelState { available: true, ttft_ms, ..ModelState::default() });
    }
    let d = decide(&with("fastest"), &c);
    let scores: Vec<f64> = d.candidates.iter().map(|c| c.score.unwrap()).collect();
    assert_eq!((d.arm.as_str(), scores), ("p", vec![-0.15, -0.2, -0.15]));
}

#[test]
fn bounds_are_of_the_dearest_entries_and_count_what_a_judge_is_shown() {
    let bounds = trees().bounds();
    let names: Vec<&str> = bounds.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(names, ["acar", "arena", "brief", "frugal"]);
    let of = |name: &str| bounds.iter().find(|b| b.name == name).unwrap();
    assert_eq!((of("acar").calls_at_most, of("frugal").calls_at_most, of("brief").calls_at_most), (8, 2, 1));
    // small-b: 1,000 x 2 + 1,000 x 4; large: 10,000 + 20,000; the judge: 5,064 x 5 + 8 x 10.
    assert!((of("frugal").cost_at_most_usd - 0.036).abs() < 1e-12);
    assert!((of("arena").cost_at_most_usd - (0.018 + 0.03 + 0.025_4)).abs() < 1e-12);
    assert!((of("brief").cost_at_most_usd - 0.002_4).abs() < 1e-12);
    assert_eq!(
        of("frugal").plan,
        "cascade(small if mean_token_entropy < 0.9 and logprob_quantile 0.1 > -3, else large)"
    );
}

const HEDGED: &str = "plans:\n  quick: {call: small, temperature: 0.5, hedge: {after_ms: 300, call: large}}\n  twice: {call: large, \
                      max_tokens: 10, hedge: {after_ms: 50}}\n  sure:\n    cascade:\n      - {plan: quick, accept_when: [{score: \
                      mean_margin, above: 0.5}]}\n      - {call: vault}\n";

#[test]
fn a_hedge_is_a_call_of_its_plan() {
    let rules = RULES.replace("[frugal, acar, small], static: frugal", "[quick, twice, sure, small], static: quick");
    let rules = rules.replace("use: acar", "use: sure");
    let policy = checked(&format!("{HEDGED}{rules}").replace("[large, brief]", "[large]")).unwrap();
    let bounds = policy.bounds();
    let of = |name: &str| bounds.iter().find(|b| b.name == name).unwrap();
    assert_eq!((of("quick").calls_at_most, of("twice").calls_at_most, of("sure").calls_at_most), (2, 2, 3));
    // small-b: 1,000 x 2 + 1,000 x 4; large: 10,000 + 20,000, and twice 10,000 + 10 x 20; vault: 5,000 + 10,000.
    assert!((of("quick").cost_at_most_usd - 0.036).abs() < 1e-12);
    assert!((of("twice").cost_at_most_usd - 0.020_4).abs() < 1e-12);
    assert!((of("sure").cost_at_most_usd - 0.051).abs() < 1e-12);
    assert_eq!(of("sure").plan, "cascade(small hedged by large after 300 ms if mean_margin > 0.5, else vault)");
    let sampling = Sampling { temperature: Some(0.5), ..Sampling::default() };
    let call = |model: &str| CallSpec { sampling: sampling.clone(), ..CallSpec::bare(model) };
    let c = Context::default();
    let d = decide(&policy, &c);
    assert_eq!(d.plan, Some(Plan::Hedged { call: call("small-a"), hedge: call("large-1"), after_ms: 300 }));
    let text = explain::text(&d, &c);
    let shown = "  plan        2 calls at most\n              small-a with temperature 0.5, after 300 ms beside it large-1 with";
    assert!(text.contains(shown), "{text}");
    assert_eq!(serde_json::from_slice::<Decision>(&canonical::to_bytes(&d).unwrap()).unwrap(), d);
    // What may not be called may not hedge.
    for arm in ["quick", "twice", "sure"] {
        assert_eq!(pinned(&policy, arm, &forbidding("large")).plan, None, "{arm}");
    }
}

#[test]
fn a_hedge_stands_beside_a_call_and_names_a_model() {
    let found = said(
        "  a: {plan: b, hedge: {after_ms: 5}}\n  b: {call: small, hedge: {after_ms: 5, call: smal}}\n  c: {call: small, hedge: {call: \
         large}}\n",
    );
    let expected = [
        "4:16 plans.a.hedge: `hedge` is of a call, and this is none",
        "5:47 plans.b.hedge.call: there is no model `smal`",
        "6:27 plans.c.hedge.after_ms: this key is missing",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_score_that_a_model_cannot_give_is_an_error_with_remedies() {
    let gate = "accept_when: [{score: mean_margin, above: 0.5}]";
    let wrong = |plans: &str| {
        let text = format!("plans:\n{plans}select: {{arms: [small], static: small}}\n");
        checked(&text).map(|_| ()).map_err(|d| (d.0[0].to_string(), d.0[0].help.clone().unwrap(), d.0[0].line))
    };
    let direct = format!("  p: {{cascade: [{{call: mute, {gate}}}, {{call: large}}]}}\n");
    let (message, help, line) = wrong(&direct).unwrap_err();
    let said =
        "plans.p.cascade[0].accept_when[0]: `mute` gives no log-probabilities, from which `mean_margin` is computed";
    assert_eq!((message.as_str(), line), (said, 4));
    assert!(
        help.contains("if_unscored: accept") && help.contains("if_unscored: escalate") && help.contains("disagreement")
    );
    for named in ["accept", "escalate"] {
        assert_eq!(wrong(&direct.replace("above: 0.5", &format!("above: 0.5, if_unscored: {named}"))), Ok(()));
    }
    // Every entry of a tag counts, and every call whose answer may be the stage's.
    assert!(wrong(&direct.replace("call: mute", "call: any")).is_err());
    let nested =
        "  q: {plan: r}\n  r: {cascade: [{call: large}, {parallel: [{call: large}, {call: mute}], aggregate: vote}]}\n";
    assert!(wrong(&format!("{nested}{}", direct.replace("call: mute", "plan: q"))).is_err());
    let asked = |aggregate| {
        let stage = format!("parallel: [{{call: large}}, {{call: vault}}], aggregate: {{{aggregate}: mute}}");
        wrong(&direct.replace("call: mute", &stage))
    };
    assert_eq!(asked("judge"), Ok(()), "a judge's answer is never the stage's");
    assert!(asked("refine").is_err());
    let last = "  p: {cascade: [{call: large, accept_when: [{score: mean_margin, above: 0.5}]}, {call: mute}]}\n";
    assert_eq!(wrong(last), Ok(()));
    let votes = "  p: {cascade: [{parallel: [{call: mute, temperature: 1, times: 2}], aggregate: vote, accept_when: [{score: \
                 disagreement, below: 0.5}]}, {call: large}]}\n";
    assert_eq!(wrong(votes), Ok(()));
}

#[test]
fn what_will_surprise_is_a_warning_with_its_place() {
    let found = said(
        "  a: {parallel: [{call: small, times: 3}], aggregate: vote}\n  b: {parallel: [{call: small, temperature: 1, seed: 4, times: \
         2}], aggregate: vote}\n  c: {parallel: [{call: small, temperature: 0.1, times: 2}], aggregate: vote}\n  d: {cascade: \
         [{call: small}]}\n  e: {parallel: [{call: small}], aggregate: first}\n  f: {cascade: [{call: small}, {call: large}]}\n  g: \
         {cascade: [{call: small, accept_when: [{score: mean_token_entropy, above: 2}]}, {call: large}]}\n",
    );
    let expected = [
        "warning 4:39 plans.a.parallel[0].times: these 3 branches make the same calls, and nothing makes their answers differ",
        "warning 5:64 plans.b.parallel[0].times: these 2 branches make the same calls, and nothing makes their answers differ",
        "warning 7:7 plans.d.cascade: a cascade of one stage is that stage",
        "warning 8:7 plans.e.parallel: a parallel plan of one branch is that branch",
        "warning 9:17 plans.f.cascade[0]: without `accept_when` this stage's answer is always taken",
        "warning 10:73 plans.g.cascade[0].accept_when[0].above: this accepts what is unsure: `mean_token_entropy` is 0 to 13.8 nats, \
         and low where it is sure",
    ];
    assert_eq!(found, expected);
}

#[test]
fn plans_are_bounded_whatever_their_names() {
    let chain = |n: usize, reverse: bool| -> String {
        let name = |i: usize| format!("p{:02}", if reverse { n - i } else { i });
        let link = |i: usize| format!("  {}: {{plan: {}}}\n", name(i), name(i + 1));
        (0..n).map(link).collect::<String>() + &format!("  {}: {{call: small}}\n", name(n))
    };
    for reverse in [false, true] {
        assert_eq!(said(&chain(8, reverse)), [""; 0]);
        let found = said(&chain(9, reverse));
        assert!(found.len() == 1 && found[0].ends_with("this is the 9th plan by name inside others"), "{found:?}");
        assert!(!said(&chain(400, reverse)).is_empty());
    }
    let nested = |n: usize| {
        let inner = (0..n).fold("{call: small}".to_owned(), |inner, _| {
            format!("{{parallel: [{inner}, {{call: large}}], aggregate: first}}")
        });
        format!("  a: {inner}\n")
    };
    assert_eq!(said(&nested(8)), [""; 0]);
    let found = said(&nested(9));
    assert!(
        found.len() == 1 && found[0].ends_with("this is the 9th cascade or parallel plan inside others"),
        "{found:?}"
    );
    let by_name = format!("{}  b: {{parallel: [{{plan: a}}, {{call: large}}], aggregate: first}}\n", nested(8));
    assert_eq!(said(&by_name).len(), 1);
    // Each doubles the one before it.
    let doubling: String = (1..9)
        .map(|i| format!("  p{i}: {{parallel: [{{plan: p{0}}}, {{plan: p{0}}}], aggregate: first}}\n", i - 1))
        .collect();
    let found = said(&format!("  p0: {{call: small}}\n{doubling}"));
    assert_eq!(found, ["11:7 plans.p7: this plan can make 128 calls"]);
}

#[test]
fn a_way_round_is_named() {
    let found = said(
        "  a: {parallel: [{plan: b}, {call: small}], aggregate: first}\n  b: {cascade: [{call: large, accept_when: [{score: mean_margin, \
         above: 0.5}]}, {plan: c}]}\n  c: {plan: a}\n  d: {plan: d}\n",
    );
    let expected = [
        "6:13 plans.c.plan: this leads back to where it came from: `a` -> `b` -> `c` -> `a`",
        "7:13 plans.d.plan: this leads back to where it came from: `d` -> `d`",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_fallback_is_one_call() {
    let found = checked(&format!("{TREES}{}", RULES.replace("to: [large, brief]", "to: [brief, acar]"))).unwrap_err();
    let said: Vec<String> = found.0.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["fallback.to[1]: `acar` makes several calls, and what follows an error is one"]);
    let d = decide(&trees(), &Context::default());
    assert_eq!(d.fallback.iter().map(|call| call.model.as_str()).collect::<Vec<_>>(), ["large-1", "small-a"]);
    assert!(!d.fallback[1].firm);
}

#[test]
fn decisions_of_trees_are_derived_again() {
    let policy = trees();
    let again = from_version(&policy.version(), Artifacts::new()).unwrap();
    for n in 0..500 {
        let mut c = context(&policy, n);
        c.request.needs.clear();
        let no = ["vault", "large", ""][(n % 3) as usize];
        c.request.metadata.insert("no".into(), no.into());
        let d = policy.decide(&policy.initial_state(), &c);
        let bytes = canonical::to_bytes(&d).unwrap();
        assert_eq!(bytes, canonical::to_bytes(&again.decide(&again.initial_state(), &c)).unwrap());
        assert_eq!(serde_json::from_slice::<Decision>(&bytes).unwrap(), d);
    }
}

#[test]
fn an_explanation_shows_the_tree() {
    let policy = checked(&format!("{TREES}{}", RULES.replace("static: frugal", "static: acar"))).unwrap();
    let c = Context::default();
    let text = explain::text(&decide(&policy, &c), &c);
    let shown = "  plan        8 calls at most
              cascade
                1. parallel, answered by a vote
                     - 3 x small-a with temperature 0.8
                     accepted if disagreement < 0.4
                2. parallel, answered by a judge, vault-1 with temperature 0, max_tokens 8
                     - 3 x small-a with temperature 0.8
                     - large-1
";
    assert!(text.contains(shown), "{text}");
    let d = pinned(&policy, "frugal", &c);
    let text = explain::text(&d, &c);
    assert!(text.contains("and logprob_quantile 0.1 > -3, or without a score\n"), "{text}");
    let c = forbidding("vault");
    let text = explain::text(&decide(&policy, &c), &c);
    assert!(text.contains("out: the rule `no-vault` forbids vault-1"), "{text}");
}

#[test]
fn outcomes_of_single_models_are_told_apart_from_plans() {
    let policy = trees();
    assert_eq!(policy.composed(), Some("frugal"));
    assert_eq!((policy.first_model("frugal"), policy.first_model("small")), (None, Some("small-a")));
    assert_eq!(build(BANDIT).composed(), None);
    assert!(policy.models().contains("vault-1"));
}

/// A node in flow style, a function of the seed.
fn node(seed: u64, k: &mut u64, room: usize, stage: Option<bool>) -> String {
    let mut pick = |n: u64| {
        *k += 1;
        (draw::unit(seed, 91, *k) * n as f64) as u64
    };
    let model = ["small", "large", "vault", "any"][pick(4) as usize];
    let sampling = ["", ", temperature: 0.7", ", temperature: 0, max_tokens: 50"][pick(3) as usize];
    let kind = if room == 0 { 0 } else { pick(4) };
    let votes = kind == 2;
    let gates =
        ["mean_margin, above: 0.3, if_unscored: accept", "logprob_quantile, q: 0.2, above: -2, if_unscored: escalate"];
    let gate = match (stage, votes && pick(2) == 0) {
        (Some(true), true) => ", accept_when: [{score: disagreement, below: 0.7}]".to_owned(),
        (Some(true), false) => format!(", accept_when: [{{score: {}}}]", gates[pick(2) as usize]),
        _ => String::new(),
    };
    let children = 2 + pick(2);
    let aggregate = ["vote", "{weighted_vote: [1, 2, 3]}", "{judge: large}", "{refine: {call: any, max_tokens: 20}}"]
        [pick(4) as usize];
    let times = if stage.is_none() && pick(3) == 0 { ", times: 2" } else { "" };
    match kind {
        0 => {
            let hedge = ["", "", ", hedge: {after_ms: 100}", ", hedge: {after_ms: 100, call: any}"][pick(4) as usize];
            format!("{{call: {model}{sampling}{hedge}{gate}{times}}}")
        }
        3 => format!("{{plan: leaf{gate}{times}}}"),
        1 => {
            let stages: Vec<String> = (0..children).map(|i| node(seed, k, room - 1, Some(i + 1 < children))).collect();
            format!("{{cascade: [{}]{gate}{times}}}", stages.join(", "))
        }
        _ => {
            let children = if aggregate.contains("weighted") { 3 } else { children };
            let branches: Vec<String> = (0..children).map(|_| node(seed, k, room - 1, None)).collect();
            format!("{{parallel: [{}], aggregate: {aggregate}{gate}{times}}}", branches.join(", "))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plans_make_sense_and_reach_only_what_is_allowed(seed in any::<u64>(), n in any::<u64>(), denied in 0..16u8, down in 0..32u8) {
        let tree = node(seed, &mut 0, 3, Some(false));
        let names = ["small", "large", "vault", "mute"];
        let deny: Vec<&str> = (0..4).filter(|i| denied >> i & 1 == 1).map(|i| names[i]).collect();
        let rules = if deny.is_empty() {
            String::new()
        } else {
            format!("rules: [{{name: no, when: signals.tokens >= 0, deny_models: [{}]}}]\n", deny.join(", "))
        };
        let text = format!("plans:\n  tree: {tree}\n  leaf: {{call: small, temperature: 0.2}}\n{rules}select: {{arms: [tree], static: tree}}\n");
        let policy = match checked(&text) {
            Ok(policy) => policy,
            Err(found) => {
                // Large ones only.
                prop_assert!(found.to_string().contains("this plan can make"), "{text}\n{found}");
                return Ok(());
            }
        };
        let mut c = context(&policy, n);
        c.request.needs.clear();
        c.fleet.clear();
        let cards = cards();
        for (i, name) in cards.0.keys().enumerate() {
            c.fleet.insert(name.clone(), ModelState { available: down >> i & 1 == 0, ..ModelState::default() });
        }
        let d = decide(&policy, &c);
        prop_assert_eq!(canonical::to_bytes(&d).unwrap(), canonical::to_bytes(&decide(&policy, &c)).unwrap());
        prop_assert!(!explain::text(&d, &c).is_empty());
        let Some(plan) = d.plan else { return Ok(()) };
        prop_assert_eq!(plan.check(), Ok(()));
        prop_assert_eq!(plan.most_calls(), policy.bounds().into_iter().find(|b| b.name == "tree").unwrap().calls_at_most);
        let forbidden: Vec<&str> = deny.iter().flat_map(|name| match *name {
            "small" => vec!["small-a", "small-b"],
            "large" => vec!["large-1"],
            "vault" => vec!["vault-1"],
            _ => vec!["mute"],
        }).collect();
        for model in plan.models() {
            prop_assert!(!forbidden.contains(&model), "{model} is denied");
            let card = cards.get(model).unwrap();
            prop_assert!(card.context == 0 || c.signals.tokens <= card.context, "{model} is too short");
        }
        // Something of it is up.
        prop_assert!(plan.models().iter().any(|m| c.fleet[*m].available));
    }
}
