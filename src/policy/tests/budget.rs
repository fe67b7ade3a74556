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
