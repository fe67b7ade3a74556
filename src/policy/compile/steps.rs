//! `steps:` resolved: reasoning by two models, and who answers.

use super::{
    super::{
        diagnostic::{Diagnostic, DiagnosticKind as Kind},
        source::step,
        spec::{AskSpec, StepsSpec},
    },
    Compiler,
    plans::{CALLS, Parts, Tree},
};
use crate::domain::{CallSpec, Plan, Steps};

/// As published: entropy, sampling, length of a step and of the whole (GlimpRouter, arXiv 2601.05110, and its code).
const TAU: f64 = 1.0;
const TEMPERATURE: f64 = 0.6;
const TOP_P: f64 = 0.95;
const STEP_TOKENS: u32 = 512;
const MAX_TOKENS: u32 = 8192;
/// Ours, as a plan's calls are bounded.
const MAX_STEPS: u32 = 16;

impl Compiler<'_> {
    pub(super) fn steps(&mut self, at: &str, spec: &StepsSpec) -> Option<Tree> {
        let at = &step(at, "steps");
        let before = self.findings.len();
        let writer = |call: CallSpec| {
            let mut sampling = call.sampling.clone();
            sampling.temperature.get_or_insert(TEMPERATURE);
            sampling.top_p.get_or_insert(TOP_P);
            sampling.max_tokens =
                Some(sampling.max_tokens.unwrap_or(u32::MAX).min(spec.step_tokens.unwrap_or(STEP_TOKENS)));
            CallSpec { sampling, ..call }
        };
        let small =
            self.continuing(&step(at, "small"), spec.small.as_ref(), "small").map(|(call, of)| (writer(call), of));
        let large =
            self.continuing(&step(at, "large"), spec.large.as_ref(), "large").map(|(call, of)| (writer(call), of));
        let answer = match &spec.answer {
            Some(ask) => self.continuing(&step(at, "answer"), Some(ask), "answer"),
            // The large model, with what is set for it but the length of a step.
            None => spec.large.as_ref().and_then(|ask| self.ask(&step(at, "large"), ask)),
        };
        if let Some((call, places)) = &small {
            self.gives_logprobs(&step(at, "small"), call, places);
        }
        let tau = spec.tau.unwrap_or(TAU);
        if !(tau.is_finite() && tau >= 0.0) {
            self.wrong(&step(at, "tau"), Kind::Value, format!("an entropy in nats is at least 0; this is {tau}"), None);
        }
        let text = |given: &Option<String>, or: &str| given.clone().unwrap_or_else(|| or.to_owned());
        let (separator, close) = (text(&spec.separator, "\n\n"), text(&spec.close, "</think>"));
        for (key, text) in [("separator", &separator), ("close", &close)] {
            if text.is_empty() {
                self.wrong(&step(at, key), Kind::Value, format!("an empty `{key}` is found everywhere"), None);
            }
        }
        let max_steps = spec.max_steps.unwrap_or(MAX_STEPS);
        if max_steps.saturating_mul(2).saturating_add(1) > CALLS as u32 {
            let message = format!("{max_steps} steps can make {} calls", u64::from(max_steps) * 2 + 1);
            let help = format!("at most {} steps, for {CALLS} calls in all", (CALLS - 1) / 2);
            self.wrong(&step(at, "max_steps"), Kind::Value, message, Some(help));
        }
        let ((small, a), (large, b), (answer, c)) = (small?, large?, answer?);
        let steps = Steps {
            small: CallSpec { sampling: stopped(&small, &separator), ..small },
            large: CallSpec { sampling: stopped(&large, &separator), ..large },
            answer,
            tau,
            separator,
            open: text(&spec.open, "<think>\n"),
            close,
            max_steps,
            max_tokens: spec.max_tokens.unwrap_or(MAX_TOKENS),
        };
        self.has_room(at, &steps, &[&a, &b, &c]);
        let mut parts = Parts::default();
        parts.calls.extend([a, b, c]);
        (!self.findings[before..].iter().any(Diagnostic::is_error)).then(|| parts.tree(Plan::Steps(Box::new(steps))))
    }

    /// A call that goes on from an answer that has begun, and where it can go.
    fn continuing(&mut self, at: &str, ask: Option<&AskSpec>, what: &str) -> Option<(CallSpec, Vec<usize>)> {
        let Some(ask) = ask else {
            self.wrong(
                at,
                Kind::Conflict,
                format!("`steps` names no `{what}` model"),
                Some(format!("give `{what}: MODEL`")),
            );
            return None;
        };
        let (call, places) = self.ask(at, ask)?;
        let unable: Vec<&str> = places
            .iter()
            .filter(|place| !self.entries[**place].capabilities.continuation)
            .map(|place| self.cards[*place])
            .collect();
        if !unable.is_empty() {
            let message = format!("`{}` is not known to go on from an answer that has begun", unable.join("`, `"));
            let help = "models in the process do; where its server knows `continue_final_message`, say `capabilities: {continuation: true}` \
                        of the entry";
            self.wrong(at, Kind::Conflict, message, Some(help.into()));
        }
        Some((call, places))
    }

    /// Warns of entries that never have room for the reasoning.
    fn has_room(&mut self, at: &str, steps: &Steps, calls: &[&Vec<usize>]) {
        let mut told: Vec<usize> = Vec::new();
        for &place in calls.iter().copied().flatten() {
            let (name, context) = (&self.entries[place].name, self.entries[place].context);
            if context > 0 && context <= steps.max_tokens && !told.contains(&place) {
                told.push(place);
                let message =
                    format!("the reasoning may have {} tokens, and `{name}` takes {context} in all", steps.max_tokens);
                let d = self.source.value(at, Kind::Value, message).warning();
                self.findings.push(d.help("give a smaller `max_tokens`, or this model is never asked"));
            }
        }
    }

    fn gives_logprobs(&mut self, at: &str, call: &CallSpec, places: &[usize]) {
        if places.iter().any(|place| !self.entries[*place].capabilities.logprobs) {
            let message = format!("`{}` gives no log-probabilities, by which steps are routed", call.model);
            self.wrong(at, Kind::Conflict, message, Some("name a model that gives them".into()));
        }
    }
}

/// With the separator as a text that ends the call's answer.
fn stopped(call: &CallSpec, separator: &str) -> crate::domain::Sampling {
    let mut sampling = call.sampling.clone();
    if sampling.stop.iter().all(|stop| stop != separator) {
        sampling.stop.push(separator.to_owned());
    }
    sampling
}
