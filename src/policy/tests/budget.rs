//! `budget`: what is left, who it is for, and what happens when nothing is.

use super::*;

const FRUGAL: &str = r#"
policy: frugal
models: {dear: {name: dear}, cheap: {name: cheap}, own: {name: own}}
rules:
  - {name: hard, when: signals.complexity > 50, use: dear}
select: {arms: [dear, cheap, own], static: dear}
budget:
  - {per: request, usd: 0.01}
  - {per: session, usd: 0.02, when_spent: cheapest}
  - {per: key, usd: 1, every: 7d}
  - {per: tenant, usd: 5, every: 30d}
"#;

fn priced() -> Fleet {
    let at = |name: &str, price: f64| ModelCard {
        price: Price { input: price, output: price, cached_input: None },
        ..card(name, &[], 0, false)
    };
    Fleet::new([at("dear", 10.0), at("cheap", 1.0), at("own", 0.0)])
}

fn compiled(yaml: &str) -> Policy {
    check("t.yaml", yaml.as_bytes(), |_| priced()).unwrap()
}

fn asked(tokens: u32) -> Context {
    let mut c = Context::default();
    c.signals.tokens = tokens;
    c.request.max_tokens = 100;
    c
}

fn decide(policy: &Policy, c: &Context) -> Decision {
    policy.decide(&policy.initial_state(), c)
}

#[test]
fn a_call_that_may_cost_too_much_is_not_made_by_selector_or_rule() {
    let policy = compiled(FRUGAL);
    // 900 + 100 tokens at 10 USD per million are exactly one cent.
    assert_eq!(decide(&policy, &asked(900)).arm, "dear");
    let d = decide(&policy, &asked(901));
    assert_eq!(d.arm, "cheap");
    let said = "a call of dear may cost $0.010010, and the budget of $0.01 per request has $0.010000 left";
    assert_eq!(d.candidates[0].eliminated, Some(Elimination::Budget(said.into())));
    let mut c = asked(901);
    c.signals.complexity = 80.0;
    let d = decide(&policy, &c);
    assert_eq!((d.arm.as_str(), d.rules[0].outcome), ("cheap", RuleOutcome::NotUsable));
    // What costs nothing is within any budget.
    assert_eq!(decide(&policy, &asked(2_000_000)).arm, "own");
}

#[test]
fn what_was_spent_is_taken_off_where_there_is_somebody() {
    let policy = compiled(&FRUGAL.replace(", own: {name: own}", "").replace("cheap, own]", "cheap]"));
    let mut c = asked(800);
    c.key.spent_usd = 0.995;
    // Nobody's key: the budget is for nobody.
    assert_eq!(decide(&policy, &c).arm, "dear");
    c.key.id = "team".into();
    assert_eq!(decide(&policy, &c).arm, "cheap");
    c.key.spent_usd = 2.0;
    let d = decide(&policy, &c);
    assert_eq!((d.decided_by, d.plan.is_none()), (DecidedBy::Refused, true));
    assert!(d.refusal.unwrap().contains("the budget of $1 per key has $0.000000 left"));
    let seen: Vec<_> = policy.spending().collect();
    assert_eq!(
        seen,
        [(Per::Session, 86_400_000_000), (Per::Key, 7 * 86_400_000_000), (Per::Tenant, 30 * 86_400_000_000)]
    );
}

#[test]
fn when_spent_the_cheapest_answers_unless_a_stricter_budget_is_spent_too() {
    let policy = compiled(&FRUGAL.replace(", own: {name: own}", "").replace("cheap, own]", "cheap]"));
    let mut c = asked(500);
    c.session.id = "s".into();
    c.session.spent_usd = 0.03;
    let d = decide(&policy, &c);
    assert_eq!((d.arm.as_str(), d.propensity), ("cheap", 1.0));
    assert!(matches!(d.candidates[0].eliminated, Some(Elimination::Budget(_))));
    c.key.tenant = "acme".into();
    c.key.tenant_spent_usd = 5.0;
    assert!(decide(&policy, &c).plan.is_none());
}

/// `dear` and `cheap` under these budgets.
fn two(budget: &str) -> Policy {
    compiled(&format!(
        "policy: two\nmodels: {{dear: {{name: dear}}, cheap: {{name: cheap}}}}\nselect: {{arms: [dear, cheap], static: dear}}\n\
         budget: [{budget}]\n"
    ))
}

/// Of a key with a session and a tenant: 900 tokens of prompt, at most 100 of answer.
fn known() -> Context {
    let mut c = asked(900);
    (c.session.id, c.key.id, c.key.tenant) = ("s".into(), "k".into(), "t".into());
    c
}

#[test]
fn tokens_calls_and_seconds_run_out_like_money() {
    let refusal = |budget: &str, c: &Context| {
        let d = decide(&two(budget), c);
        assert_eq!(d.plan.is_none(), d.decided_by == DecidedBy::Refused);
        match &d.candidates[0].eliminated {
            Some(Elimination::Budget(why)) => Some(why.clone()),
            _ => None,
        }
    };
    let mut c = known();
    (c.key.spent_tokens, c.session.spent_calls, c.key.tenant_spent_s) = (4000.0, 9.0, 59.9);
    for (within, beyond, why) in [
        (
            "{per: key, tokens: 5000}",
            "{per: key, tokens: 4999}",
            "a call of dear may take 1000 tokens, and the budget of 4999 tokens per key has 999 left",
        ),
        (
            "{per: session, calls: 10}",
            "{per: session, calls: 9}",
            "a call of dear would be one more, and the budget of 9 calls per session has none left",
        ),
        (
            "{per: tenant, seconds: 60}",
            "{per: tenant, seconds: 59.9}",
            "a call of dear takes time, and the budget of 59.9 seconds per tenant has none left",
        ),
        (
            "{per: request, tokens: 1000}",
            "{per: request, tokens: 999}",
            "a call of dear may take 1000 tokens, and the budget of 999 tokens per request has 999 left",
        ),
    ] {
        assert_eq!(refusal(within, &c), None, "{within}");
        assert_eq!(refusal(beyond, &c).as_deref(), Some(why));
        // What somebody else has used is not in this context.
        let nobody = asked(900);
        assert_eq!(refusal(beyond, &nobody).is_some(), beyond.contains("request"), "{beyond}");
    }
    // Each unit on its own: what one budget bounds is nothing to another.
    assert_eq!(refusal("{per: key, calls: 1, seconds: 1}", &c), None);
}

#[test]
fn what_is_left_bounds_a_request_as_it_runs() {
    let bounds = |budget: &str, c: &Context| decide(&two(budget), c).bounds.map(|b| *b);
    let mut c = known();
    (c.key.spent_tokens, c.key.spent_calls, c.key.spent_s, c.key.spent_usd) = (3000.0, 7.0, 57.5, 0.5);
    let all = bounds("{per: key, tokens: 5000, calls: 10, seconds: 60, usd: 1}", &c).unwrap();
    assert_eq!((all.tokens, all.calls, all.time_us), (Some(2000), Some(3), Some(2_500_000)));
    // Of one call the cost is known beforehand.
    assert_eq!(all.usd, None);
    let plan = decide(&two("{per: key, tokens: 5000, calls: 10, seconds: 60, usd: 1}"), &c).plan.unwrap();
    assert_eq!(plan.calls()[0].worst.unwrap().tokens, 1000);
    // The least of what several leave, unit by unit.
    let more = "{per: request, calls: 2, tokens: 4000, seconds: 9}, {per: key, tokens: 5000, calls: 10, seconds: 60}";
    let least = bounds(more, &c).unwrap();
    assert_eq!((least.tokens, least.calls, least.time_us), (Some(2000), Some(2), Some(2_500_000)));
    // A budget in USD bounds no single call as it runs, and one of nobody bounds nothing.
    assert_eq!(bounds("{per: key, usd: 1}", &c), None);
    assert_eq!(bounds("{per: key, tokens: 5000, calls: 10, seconds: 60}", &asked(900)), None);
}

#[test]
fn when_calls_are_spent_the_cheapest_answers_and_is_not_bounded_by_them() {
    let mut c = known();
    (c.session.spent_calls, c.session.spent_s, c.key.spent_tokens) = (10.0, 58.0, 6000.0);
    let session = "{per: session, calls: 10, seconds: 60, when_spent: cheapest}";
    let d = decide(&two(session), &c);
    assert_eq!((d.arm.as_str(), d.bounds), ("cheap", None));
    // A stricter budget that is not spent bounds it all the same; one that is spent refuses, in whatever unit.
    let d = decide(&two(&format!("{session}, {{per: key, tokens: 7000}}")), &c);
    assert_eq!(
        (d.arm.as_str(), d.bounds.map(|b| (b.tokens, b.calls, b.time_us))),
        ("cheap", Some((Some(1000), None, None)))
    );
    for spent in ["{per: key, tokens: 6500}", "{per: request, tokens: 900}"] {
        assert!(decide(&two(&format!("{session}, {spent}")), &c).plan.is_none(), "{spent}");
    }
    // The time of a request is never spent before it begins.
    let request = "{per: request, tokens: 900, seconds: 3, when_spent: cheapest}";
    let bounds = decide(&two(request), &c).bounds.unwrap();
    assert_eq!((bounds.tokens, bounds.time_us), (None, Some(3_000_000)));
}

#[test]
fn the_time_to_a_first_token_is_of_one_request() {
    let yaml = FRUGAL.replace("usd: 1, every", "first_token_seconds: 2, every");
    let said = check("t.yaml", yaml.as_bytes(), |_| priced()).unwrap_err();
    assert_eq!(said.0.len(), 1, "{said}");
    assert_eq!(said.0[0].kind, DiagnosticKind::Conflict);
    assert!(said.to_string().contains("this budget is per key"), "{said}");
}
