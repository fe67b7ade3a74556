//! Conditions: CEL over a documented, typed set of variables.
//!
//! The crate `cel` parses and evaluates; it does not know types, and names that do not exist fail only when they are
//! reached. So [`check`] walks the parsed tree against the table in [`variables`] and lowers it: every variable becomes a
//! numbered slot that is read from the [`Context`](crate::domain::Context) when it is reached (nothing is converted that
//! no condition asks for), and every regular expression is compiled once. A lowered condition can still fail, on a
//! missing metadata key, an index, a division by zero or an overflow; what happens then is the rule's `on_error`.

mod check;
mod eval;
mod syntax;
mod typing;
pub(super) mod variables;

pub(super) use check::{Names, check};
pub(super) use eval::Evaluator;

use cel::IdedExpr;
use regex::Regex;

/// A checked condition of type bool, lowered onto a [`Program`]'s slots.
#[derive(Debug)]
pub(super) struct Condition {
    expression: IdedExpr,
}

/// What the conditions of a policy share: the variables and regular expressions that they use, by number.
#[derive(Debug, Default)]
pub(super) struct Program {
    slots: Vec<variables::Slot>,
    regexes: Vec<Regex>,
}

impl Program {
    /// Whether any condition reads a similarity, and with it needs the query's embedding.
    pub fn uses_similarity(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot, variables::Slot::Similarity(_)))
    }

    /// Whether any asks what of the prompt a model has in memory.
    pub fn uses_residency(&self) -> bool {
        self.slots.iter().any(variables::Slot::is_residency)
    }
}

/// The name of slot `n` in a lowered tree; no identifier of the language can be equal to it.
fn slot_name(n: usize) -> String {
    format!("${n}")
}

/// The name of the function that matches regular expression `n`.
fn regex_name(n: usize) -> String {
    format!("matches${n}")
}

#[cfg(test)]
mod tests;
