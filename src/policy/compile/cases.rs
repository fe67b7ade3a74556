//! `tests:` checked: that every name in a case exists, before any case is run.

use std::collections::BTreeSet;

use super::{
    super::{
        diagnostic::{DiagnosticKind as Kind, suggest},
        source::step,
        spec::ExpectSpec,
        testing::unknown_overrides,
    },
    Compiler,
};

impl Compiler<'_> {
    pub(super) fn tests(&mut self, arms: &[String]) {
        let mut seen = BTreeSet::new();
        for (i, test) in self.spec.tests.iter().enumerate() {
            let at = format!("/tests/{i}");
            if !seen.insert(test.name.as_str()) {
                let message = format!("another test is named `{}` already", test.name);
                self.wrong(&step(&at, "name"), Kind::Conflict, message, None);
            }
            let messages = test.request.as_ref().is_some_and(|r| r.contains_key("messages"));
            if test.prompt.is_some() == messages {
                let message = match messages {
                    true => format!("the test `{}` has both a `prompt` and a request with `messages`", test.name),
                    false => format!("the test `{}` has neither a `prompt` nor a request with `messages`", test.name),
                };
                self.wrong(&at, Kind::Conflict, message, Some("give one of the two".into()));
            }
            for (pointer, message) in unknown_overrides(test, &self.spec.examples, arms) {
                let d = self.source.key(&format!("{at}{pointer}"), Kind::UnknownKey, message.0);
                self.findings.push(d.maybe_help(message.1));
            }
            for name in test.fleet.keys().filter(|n| !self.cards.contains(&n.as_str())).collect::<Vec<_>>() {
                let help = suggest("fleet entries", name, self.cards.iter().copied());
                let d = self.source.key(
                    &step(&step(&at, "fleet"), name),
                    Kind::UnknownName,
                    format!("there is no fleet entry `{name}`"),
                );
                self.findings.push(d.maybe_help(help));
            }
            for (n, learnt) in test.learnt.iter().enumerate() {
                let at = step(&step(&at, "learnt"), &n.to_string());
                let _ = self.arm(&step(&at, "arm"), &learnt.arm, arms);
            }
            if !test.learnt.is_empty() && !self.is_bandit() {
                let message = "this policy's selector does not learn";
                self.wrong(&step(&at, "learnt"), Kind::Conflict, message, Some("remove `learnt`".into()));
            }
            self.expectation(&step(&at, "expect"), &test.expect, arms);
        }
    }

    pub(super) fn expectation(&mut self, at: &str, expect: &ExpectSpec, arms: &[String]) {
        let says_something = expect.plan.is_some()
            || expect.arm.is_some()
            || expect.model.is_some()
            || expect.rule.is_some()
            || expect.refused.is_some()
            || !expect.propensity.is_empty()
            || !expect.shares.is_empty();
        if !says_something {
            self.wrong(at, Kind::Value, "this test expects nothing", Some("e.g. `expect: {plan: NAME}`".into()));
        }
        for (key, name) in [("plan", &expect.plan), ("arm", &expect.arm)] {
            if let Some(name) = name {
                let _ = self.target(&step(at, key), name);
            }
        }
        if let Some(model) = &expect.model
            && !self.cards.contains(&model.as_str())
        {
            let help = suggest("fleet entries", model, self.cards.iter().copied());
            self.wrong(&step(at, "model"), Kind::UnknownName, format!("the fleet has no entry `{model}`"), help);
        }
        if let Some(rule) = &expect.rule
            && !self.spec.rules.iter().any(|r| r.name == *rule)
        {
            let help = suggest("rules", rule, self.spec.rules.iter().map(|r| r.name.as_str()));
            self.wrong(&step(at, "rule"), Kind::UnknownName, format!("there is no rule `{rule}`"), help);
        }
        for plan in expect.shares.keys() {
            let _ = self.target(&step(&step(at, "shares"), plan), plan);
        }
        for arm in expect.propensity.keys().filter(|a| !arms.contains(a)) {
            self.not_an_arm(&step(&step(at, "propensity"), arm), arm, arms);
        }
    }
}
