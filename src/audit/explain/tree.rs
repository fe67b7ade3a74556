//! The run of a composed plan as the tree that the plan is: under each node its calls and what was decided there.

use std::fmt::Write;

use crate::{
    audit::query::DecisionView,
    domain::{Aggregate, AttemptReason, FinishReason, Place, Plan, Verified},
};

use super::attempt;

const STEP: &str = "  ";

/// The calls and decisions of `view`, which ran `plan`.
pub(super) fn write(out: &mut String, plan: &Plan, view: &DecisionView) -> std::fmt::Result {
    writeln!(out, "\nrun")?;
    let mut tree = Tree { out, view };
    tree.node(plan, "", &mut Place::new())?;
    // The fallback's calls belong to the request, not to a node.
    for call in view.attempts.iter().filter(|attempt| is_fallback(attempt.at.is_empty(), attempt.why)) {
        attempt(tree.out, call, "    ")?;
    }
    Ok(())
}

fn is_fallback(at_root: bool, why: AttemptReason) -> bool {
    at_root && matches!(why, AttemptReason::Fallback | AttemptReason::Retry)
}

struct Tree<'a> {
    out: &'a mut String,
    view: &'a DecisionView,
}

impl Tree<'_> {
    /// A node with everything below it. `title`: what it is to the node above it.
    fn node(&mut self, plan: &Plan, title: &str, at: &mut Place) -> std::fmt::Result {
        let indent = STEP.repeat(at.len() + 2);
        match plan {
            Plan::Call(call) => {
                writeln!(self.out, "{indent}{title}call {}", call.model)?;
                self.calls(at, false)?;
            }
            Plan::Hedged { .. } => {
                writeln!(self.out, "{indent}{title}call {plan}")?;
                self.calls(at, false)?;
            }
            Plan::Cascade(stages) => {
                writeln!(self.out, "{indent}{title}cascade")?;
                for (i, stage) in (0..).zip(stages) {
                    at.push(i);
                    self.node(&stage.plan, &format!("stage {i}: "), at)?;
                    at.pop();
                }
            }
            Plan::Parallel { branches, aggregate } => {
                let word = match aggregate {
                    Aggregate::First => "first",
                    Aggregate::Vote => "vote",
                    Aggregate::WeightedVote { .. } => "weighted vote",
                    Aggregate::Judge { .. } => "judge",
                    Aggregate::Refine { .. } => "refine",
                };
                writeln!(self.out, "{indent}{title}parallel, {word}")?;
                for (i, branch) in (0..).zip(branches) {
                    at.push(i);
                    self.node(branch, &format!("branch {i}: "), at)?;
                    at.pop();
                }
                if let Some(call) = aggregate.call() {
                    at.push(branches.len() as u32);
                    writeln!(self.out, "{indent}{STEP}{word}: call {}", call.model)?;
                    self.calls(at, false)?;
                    at.pop();
                }
            }
            Plan::Steps(steps) => {
                writeln!(self.out, "{indent}{title}reasoning steps")?;
                for (i, (word, call)) in (0..).zip(["small", "large", "answer"].into_iter().zip(steps.calls())) {
                    at.push(i);
                    writeln!(self.out, "{indent}{STEP}{word}: call {}", call.model)?;
                    self.calls(at, false)?;
                    at.pop();
                }
            }
            Plan::Verified(verified) => {
                writeln!(self.out, "{indent}{title}verified")?;
                at.push(Verified::PLAN);
                self.node(&verified.plan, "answer: ", at)?;
                at.pop();
                at.push(Verified::BY);
                writeln!(self.out, "{indent}{STEP}verify: call {}, {} x", verified.by.model, verified.times)?;
                self.calls(at, true)?;
                at.pop();
            }
        }
        self.notes(at)
    }

    /// `verifies`: they say whether an answer is right.
    fn calls(&mut self, at: &Place, verifies: bool) -> std::fmt::Result {
        let indent = STEP.repeat(at.len() + 3);
        let mut any = false;
        for call in self.view.attempts.iter().filter(|attempt| attempt.at == *at) {
            any = true;
            attempt(self.out, call, &indent)?;
            // Of an answer that was stopped it is not known.
            if let Some(facts) = call.facts.as_ref().filter(|_| call.finish != Some(FinishReason::Cancelled)) {
                let said = match (verifies, facts.verdict) {
                    (true, Some(0)) => "says that it is wrong".to_owned(),
                    (true, Some(_)) => "says that it is right".to_owned(),
                    (true, None) => "says neither".to_owned(),
                    (false, _) => format!("answer form {}", facts.form),
                };
                writeln!(self.out, "{indent}             {said}")?;
            }
        }
        if !any {
            writeln!(self.out, "{indent}not called")?;
        }
        Ok(())
    }

    fn notes(&mut self, at: &Place) -> std::fmt::Result {
        let indent = STEP.repeat(at.len() + 3);
        for note in self.view.notes.iter().filter(|note| note.note.at == *at) {
            writeln!(self.out, "{indent}{}", note.note.what)?;
        }
        Ok(())
    }
}
