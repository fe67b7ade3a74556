//! Budgets of plans of several calls: what they begin with is decided, the rest is for the machine to mask.

use super::*;
use crate::domain::Spend;

#[test]
fn budgets_bind_what_a_plan_begins_with_and_the_rest_is_for_the_machine_to_mask() {
    let budget = "budget: [{per: request, usd: 0.013}, {per: session, usd: 1, when_spent: cheapest}]\n";
    let policy = checked(&format!("{TREES}{RULES}{budget}")).unwrap();
    let mut c = Context::default();
    c.signals.tokens = 500;
    c.request.max_tokens = 200;
    // 500 x 1 + 200 x 2 and 500 x 10 + 200 x 20, per million.
    assert_eq!(decide(&policy, &c).arm, "frugal");
    let d = decide(&policy, &c);
    let bounds = d.bounds.as_ref().unwrap();
    assert_eq!((bounds.usd, bounds.tokens, bounds.calls), (Some(13_000), None, None));
    let worst: Vec<Option<Spend>> = d.plan.as_ref().unwrap().calls().iter().map(|call| call.worst).collect();
    assert_eq!(worst, [(900, 700), (9_000, 700)].map(|(usd, tokens)| Some(Spend { usd, tokens })));
    assert_eq!(d.candidates[1].eliminated, None, "three probes are within it");
    let tight = checked(&format!(
        "{TREES}{RULES}budget: [{{per: request, usd: 0.0008, tokens: 900, calls: 3, seconds: 2.5}}]\n"
    ));
    let d = decide(&tight.unwrap(), &c);
    let why = "what frugal begins with may cost more than the budget of $0.0008 per request has left, $0.000800";
    assert_eq!((&d.plan, &d.candidates[0].eliminated), (&None, &Some(Elimination::Budget(why.into()))));
    let limits = checked(&format!("{TREES}{RULES}budget: [{{per: request, tokens: 900, calls: 3, seconds: 2.5}}]\n"));
    let bounds = decide(&limits.unwrap(), &c).bounds.unwrap();
    assert_eq!((bounds.usd, bounds.tokens, bounds.calls, bounds.time_us), (None, Some(900), Some(3), Some(2_500_000)));
    // All spent: the arm that may cost least, all its calls counted.
    c.session.id = "s".into();
    c.session.spent_usd = 1.0;
    assert_eq!(decide(&policy, &c).arm, "small");
    let policy = checked(&format!("{TREES}{}{budget}", RULES.replace(", acar, small]", ", acar]"))).unwrap();
    c.signals.tokens = 500;
    let d = decide(&policy, &c);
    assert_eq!((&*d.arm, d.bounds.unwrap().usd), ("frugal", Some(13_000)), "only the stricter budget bounds it");
    let spent = checked(&format!(
        "{TREES}{}{}",
        RULES.replace(", acar, small]", ", acar]"),
        "budget: [{per: session, usd: 1, when_spent: cheapest}]\n"
    ));
    let d = decide(&spent.unwrap(), &c);
    assert_eq!((&*d.arm, d.bounds), ("frugal", None), "taken although it is spent, and whole");
    c.signals.tokens = 13_000;
    assert!(decide(&policy, &c).plan.is_none(), "the stricter budget is overrun, too");
}

#[test]
fn a_plan_begins_within_what_is_left_of_tokens_and_calls() {
    let plans = format!("{TREES}  probes: {{parallel: [{{call: small, times: 3}}], aggregate: vote}}\n");
    let arms = "select: {arms: [frugal, probes], static: frugal}";
    let with = |budget: &str| checked(&format!("{plans}{arms}\nbudget: [{budget}]\n")).unwrap();
    let mut c = Context::default();
    c.signals.tokens = 500;
    c.request.max_tokens = 200;
    c.key.id = "k".into();
    (c.key.spent_tokens, c.key.spent_calls) = (1000.0, 8.0);
    let why = |budget: &str, arm: usize| match decide(&with(budget), &c).candidates[arm].eliminated.clone() {
        Some(Elimination::Budget(why)) => Some(why),
        _ => None,
    };
    // The first stage takes 700 tokens and one call, two of three probes 1,400 and two.
    let [tokens, calls] = ["{per: key, tokens: 1700}", "{per: key, calls: 9}"];
    assert_eq!((why(tokens, 0), why(calls, 0)), (None, None));
    let said = "what probes begins with may take more tokens than the budget of 1700 tokens per key has left, 700";
    assert_eq!(why(tokens, 1).unwrap(), said);
    let said = "what probes begins with makes more calls than the budget of 9 calls per key has left, 1";
    assert_eq!(why(calls, 1).unwrap(), said);
    assert_eq!((why("{per: key, tokens: 2400}", 1), why("{per: key, calls: 10}", 1)), (None, None));
    assert!(why("{per: key, tokens: 1699}", 0).unwrap().ends_with("has left, 699"));
    assert!(why("{per: key, calls: 8}", 0).unwrap().ends_with("has left, none"));
    let bounds = decide(&with("{per: key, tokens: 1800, calls: 10, usd: 2}"), &c).bounds.unwrap();
    assert_eq!((bounds.usd, bounds.tokens, bounds.calls, bounds.time_us), (Some(2_000_000), Some(800), Some(2), None));
}

#[test]
fn a_plan_is_begun_only_where_all_budgets_together_let_it() {
    let plans = "plans: {c: {cascade: [{call: large, max_tokens: 10, accept_when: [{score: mean_margin, above: 0.5}]}, {call: small}]}}\n";
    let with =
        |budget: &str| checked(&format!("{plans}select: {{arms: [c], static: c}}\nbudget: [{budget}]\n")).unwrap();
    let mut c = Context::default();
    c.signals.tokens = 500;
    c.request.max_tokens = 400;
    // The first stage is too dear (5,200 millionths), the second too long (900 tokens).
    let d = decide(&with("{per: request, usd: 0.005, tokens: 600}"), &c);
    let said = "what c begins with may use more than the budgets together have left";
    assert_eq!(d.candidates[0].eliminated, Some(Elimination::Budget(said.into())));
    for one in ["{per: request, usd: 0.005}", "{per: request, tokens: 600}"] {
        assert!(decide(&with(one), &c).plan.is_some(), "{one}");
    }
    // Where one of them may be overrun, the other still binds.
    c.session.id = "s".into();
    let d = decide(&with("{per: request, usd: 0.005}, {per: session, tokens: 600, when_spent: cheapest}"), &c);
    let bounds = d.bounds.unwrap();
    assert_eq!((d.arm.as_str(), bounds.usd, bounds.tokens), ("c", Some(5_000), None));
}
