//! Conditions: what is accepted, what it evaluates to, and that the table of variables is the context's JSON form.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Evaluator, Names, Program, check, variables};
use crate::domain::{Context, KeyView, ModelState, Need};

fn names() -> Names<'static> {
    Names { examples: vec!["refund"], fleet: vec!["gpt-4.1", "small"] }
}

fn context() -> Context {
    let mut c = Context::default();
    c.request.model = "gpt-4.1-mini".into();
    c.request.needs = vec![Need::Tools, Need::Images];
    c.request.metadata = BTreeMap::from([("team".into(), "grün".into())]);
    c.signals.tokens = 120;
    c.signals.code_share = 0.25;
    c.signals.similarity.insert("refund".into(), 0.9);
    c.key.tier = "gold".into();
    c.fleet.insert("small".into(), ModelState { available: false, running: 2, waiting: 1, ..ModelState::default() });
    c
}

fn eval(text: &str) -> Result<bool, String> {
    let mut program = Program::default();
    let condition = check(text, &names(), &mut program).unwrap_or_else(|p| panic!("{text}: {p:?}"));
    Evaluator::new().with(&program, &context(), |eval| eval(&condition))
}

#[test]
fn conditions_evaluate_as_cel_says() {
    for (text, expected) in [
        ("signals.tokens > 100", true),
        ("signals.tokens > 100.5 && signals.code_share == 0.25", true),
        ("double(signals.tokens) * 2.0 == 240.0", true),
        ("signals.tokens / 7 == 17 && signals.tokens % 7 == 1", true),
        ("!request.stream && (key.tier == 'gold' || key.tier == 'silver')", true),
        ("key.tier in ['gold', 'silver']", true),
        ("key.tier in []", false),
        ("'tools' in request.needs && size(request.needs) == 2", true),
        ("request.needs.exists(n, n == 'images')", true),
        ("request.needs.all(n, n.startsWith('t'))", false),
        ("request.needs.exists_one(n, n.endsWith('s') && n != 'tools')", true),
        ("request.needs.filter(n, n.contains('mag')).size() == 1", true),
        ("request.needs.map(n, n + '!')[0] == 'tools!'", true),
        ("has(request.metadata.team) && request.metadata.team == 'grün'", true),
        ("request.metadata['team'].size() == 4", true),
        ("has(request.metadata.other)", false),
        ("has(request.metadata.other) && request.metadata.other == 'x'", false),
        ("'team' in request.metadata && size(request.metadata) == 1", true),
        ("has(key.tier)", true),
        ("signals.similarity.refund > 0.8", true),
        ("fleet.small.available || fleet.small.running > 1", true),
        ("fleet['gpt-4.1'].available && fleet['gpt-4.1'].waiting == 0", true),
        ("request.model.matches('^gpt-[0-9.]+')", true),
        ("!request.model.matches('^gpt$')", true),
        ("(signals.turn > 3 ? 'a' : 'b') == 'b'", true),
        ("string(signals.tokens) == '120' && int('7') == 7", true),
        ("request.needs.exists(signals, signals == 'tools')", true),
        ("true || 1 / 0 == 1", true),
        ("-signals.tokens < 0", true),
    ] {
        assert_eq!(eval(text), Ok(expected), "{text}");
    }
}

#[test]
fn what_fails_to_evaluate_says_why() {
    for (text, why) in [
        ("request.metadata.other == 'x'", "the request has no request.metadata[\"other\"]"),
        ("request.metadata[key.id] == 'x'", "key"),
        ("request.needs[7] == 'x'", "outside"),
        ("signals.tokens / signals.turn > 1", "division by zero"),
        ("9223372036854775807 + signals.tokens > 1", "too large"),
        ("int(key.tier) > 1", "int"),
    ] {
        let error = eval(text).expect_err(text);
        assert!(error.contains(why), "{text}: {error}");
    }
}

#[test]
fn the_table_is_the_context_as_json() {
    let mut c = context();
    c.signals.similarity.clear();
    // What is 0 is left out of the form.
    (c.session.spent_usd, c.session.spent_tokens, c.session.spent_calls, c.session.spent_s) = (1.0, 1.0, 1.0, 1.0);
    c.key = KeyView::whole();
    (c.session.last_model, c.session.last_tokens) = ("small".into(), 1);
    let mut leaves = BTreeSet::new();
    fn walk(at: &str, value: &Value, out: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) if !map.is_empty() && at != "request.metadata" => {
                for (key, value) in map {
                    walk(&if at.is_empty() { key.clone() } else { format!("{at}.{key}") }, value, out);
                }
            }
            _ => {
                out.insert(at.to_owned());
            }
        }
    }
    c.fleet = BTreeMap::from([("NAME".into(), ModelState::whole())]);
    walk("", &serde_json::to_value(&c).unwrap(), &mut leaves);
    leaves.remove("signals.similarity");
    // Time and seed are for the policy, not for its author: a rule on them could not be tested.
    leaves.remove("now");
    leaves.remove("seed");
    leaves.insert("signals.similarity.NAME".into());
    let documented: BTreeSet<String> = variables::reference().into_iter().map(|d| d.name).collect();
    assert_eq!(documented, leaves);
}

#[test]
fn slots_are_shared_and_only_what_is_used_is_there() {
    let mut program = Program::default();
    for text in ["signals.tokens > 1 && signals.tokens < 9", "signals.tokens == 5"] {
        check(text, &names(), &mut program).unwrap();
    }
    assert_eq!(program.slots.len(), 1);
    assert!(!program.uses_similarity());
    check("signals.similarity.refund > 0.5", &names(), &mut program).unwrap();
    assert!(program.uses_similarity());
    assert!(!program.uses_residency());
    check("fleet.small.waiting > 2", &names(), &mut program).unwrap();
    assert!(!program.uses_residency());
    check("fleet.small.resident_tokens * 2 > fleet.small.prompt_tokens", &names(), &mut program).unwrap();
    assert!(program.uses_residency());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_expression_panics(text in "[a-z0-9_.()\\[\\]{}?:&|!=<>+*/%\"' ,é-]{0,60}") {
        let mut program = Program::default();
        if let Ok(condition) = check(&text, &names(), &mut program) {
            let _ = Evaluator::new().with(&program, &context(), |eval| eval(&condition));
        }
    }

    /// Expressions made of the language's own words, which get further than noise does.
    #[test]
    fn no_sentence_panics(words in proptest::collection::vec(proptest::sample::select(vec![
        "signals.tokens", "request.needs", "request.metadata", "key.tier", "fleet.small", "has(request.metadata.x)",
        "true", "1", "2.5", "'a'", "[1, 2]", "[]", "&&", "||", "!", "+", "-", "*", "/", "%", "==", ">", "in", "?", ":",
        "(", ")", ".exists(x, x", ".size()", "[0]", "['team']", "size(", "int(", ".matches('a+')", "null", "x", "{}",
    ]), 0..12)) {
        let mut program = Program::default();
        if let Ok(condition) = check(&words.join(" "), &names(), &mut program) {
            let _ = Evaluator::new().with(&program, &context(), |eval| eval(&condition));
        }
    }
}
