//! Rules: which conditions hold, and what they restrict or use then. What may be called is `choose`'s to say.
//!
//! Restrictions bind whatever decides, so all rules that have any are evaluated before the first `use` is considered: a
//! rule further down cannot be outrun by a `use` above it.

use super::{Policy, cel::Condition};
use crate::domain::{Context, RuleOutcome, RuleTrace};

/// A rule, resolved. Vectors of bool are over the fleet's entries in name order.
#[derive(Debug)]
pub(super) struct Rule {
    pub name: String,
    pub condition: Condition,
    /// Place in the policy's targets.
    pub use_: Option<usize>,
    pub allow: Option<Vec<bool>>,
    pub deny: Vec<bool>,
    /// `if_none_left: ignore`.
    pub ignorable: bool,
    /// `on_error: apply`.
    pub apply_on_error: bool,
}

impl Rule {
    pub fn restricts(&self) -> bool {
        self.allow.is_some() || self.deny.iter().any(|d| *d)
    }

    pub fn forbids(&self, model: usize) -> bool {
        self.allow.as_ref().is_some_and(|allow| !allow[model]) || self.deny[model]
    }
}

/// What the rules say about one context.
pub(super) struct Ruling {
    /// Places of the rules whose restrictions bind.
    pub restricting: Vec<usize>,
    /// The rule whose `use` decides.
    pub used: Option<usize>,
    pub trace: Vec<RuleTrace>,
}

type Verdicts = Vec<Option<Result<bool, String>>>;

impl Policy {
    /// Evaluates the rules. With `pinned`, no `use` is considered: the client has chosen.
    pub(super) fn rule(&self, context: &Context, pinned: bool) -> Ruling {
        if self.rules.is_empty() {
            return Ruling { restricting: Vec::new(), used: None, trace: Vec::new() };
        }
        self.evaluator.with(&self.program, context, |eval| {
            let mut verdicts: Verdicts = self.rules.iter().map(|_| None).collect();
            let mut holds = |n: usize| {
                let rule = &self.rules[n];
                match verdicts[n].get_or_insert_with(|| eval(&rule.condition)) {
                    Ok(yes) => *yes,
                    Err(_) => rule.apply_on_error,
                }
            };
            let mut restricting: Vec<usize> =
                (0..self.rules.len()).filter(|n| self.rules[*n].restricts() && holds(*n)).collect();
            let mut first_use = |restricting: &[usize]| {
                (0..self.rules.len()).filter(|_| !pinned).find(|n| {
                    self.rules[*n].use_.is_some_and(|target| {
                        holds(*n) && self.available(&self.targets[target], restricting, context).is_ok()
                    })
                })
            };
            let mut used = first_use(&restricting);
            let mut dropped = Vec::new();
            let any_arm = |restricting: &[usize]| {
                self.arm_targets.iter().any(|t| self.available(&self.targets[*t], restricting, context).is_ok())
            };
            if used.is_none() && restricting.iter().any(|n| self.rules[*n].ignorable) && !any_arm(&restricting) {
                let (out, kept): (Vec<_>, Vec<_>) = restricting.iter().partition(|n| self.rules[**n].ignorable);
                // Dropped only where that helps: what is down stays down.
                if any_arm(&kept) {
                    (restricting, dropped) = (kept, out);
                    used = first_use(&restricting);
                }
            }
            let trace = self.trace(&verdicts, &dropped, used, pinned);
            Ruling { restricting, used, trace }
        })
    }

    fn trace(&self, verdicts: &Verdicts, dropped: &[usize], used: Option<usize>, pinned: bool) -> Vec<RuleTrace> {
        let mut out = Vec::new();
        for (n, (rule, verdict)) in self.rules.iter().zip(verdicts).enumerate() {
            let Some(verdict) = verdict else { continue };
            let outcome = match verdict {
                Err(_) if rule.apply_on_error => RuleOutcome::ErrorTaken,
                Err(_) => RuleOutcome::ErrorSkipped,
                Ok(false) => RuleOutcome::NoMatch,
                Ok(true) if used == Some(n) => RuleOutcome::Used,
                Ok(true) if dropped.contains(&n) => RuleOutcome::Dropped,
                // After the deciding rule a `use` is not looked at any more; what is left of the rule restricts.
                Ok(true) if rule.use_.is_some() && !pinned && used.is_none_or(|u| n < u) => RuleOutcome::NotUsable,
                Ok(true) => RuleOutcome::Restricted,
            };
            out.push(RuleTrace { rule: rule.name.clone(), outcome, error: verdict.as_ref().err().cloned() });
        }
        out
    }
}
