//! Evaluation of checked conditions on one context. Pure: the same condition and context give the same answer.

use std::sync::Arc;

use cel::{
    Env, ExecutionError, Value,
    common::{types::CelBool, value::CowVal},
    context::VariableResolver,
};
use regex::Regex;

use super::{Condition, Program, regex_name, slot_name};
use crate::domain::Context;

/// Reads slots from a context when the evaluation reaches them.
struct Slots<'a> {
    program: &'a Program,
    context: &'a Context,
}

impl VariableResolver for Slots<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        let number: usize = variable.strip_prefix('$')?.parse().ok()?;
        self.program.slots.get(number)?.read(self.context)
    }
}

/// The standard functions, made once per policy.
pub(in crate::policy) struct Evaluator {
    env: Arc<Env>,
}

impl std::fmt::Debug for Evaluator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Evaluator")
    }
}

impl Evaluator {
    pub fn new() -> Self {
        Self { env: Arc::new(Env::stdlib()) }
    }

    /// Calls `body` with a function that evaluates conditions on `context`; what they share is set up once.
    pub fn with<R>(
        &self,
        program: &Program,
        context: &Context,
        body: impl FnOnce(&dyn Fn(&Condition) -> Result<bool, String>) -> R,
    ) -> R {
        let slots = Slots { program, context };
        let mut cel = cel::Context::with_env(self.env.clone());
        cel.set_variable_resolver(&slots);
        for (n, regex) in program.regexes.iter().enumerate() {
            let regex: Regex = regex.clone();
            // The name holds a `$`, so that nothing declared can be in its way.
            let _ = cel.add_function(&regex_name(n), move |text: Arc<String>| regex.is_match(&text));
        }
        body(&|condition| {
            let value = Value::resolve_val(&condition.expression, &cel).map_err(|e| describe(program, &e))?;
            // The checker lets only bool through.
            value.downcast_ref::<CelBool>().map(|b| *b.inner()).ok_or_else(|| "the condition is not a bool".to_owned())
        })
    }
}

/// An evaluation error in words, with the variable's own name in place of its slot's.
fn describe(program: &Program, error: &ExecutionError) -> String {
    match error {
        ExecutionError::UndeclaredReference(name) => {
            let slot = (0..program.slots.len()).find(|n| slot_name(*n) == **name);
            match slot {
                Some(n) => format!("the request has no {}", program.slots[n].name()),
                None => format!("unknown name {name}"),
            }
        }
        ExecutionError::NoSuchKey(key) => format!("there is no key {key:?}"),
        ExecutionError::IndexOutOfBounds(_) => "the index is outside the list".to_owned(),
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => "division by zero".to_owned(),
        ExecutionError::Overflow(..) => "the result is too large".to_owned(),
        ExecutionError::FunctionError { function, message } => format!("{function}: {message}"),
        other => other.to_string(),
    }
}
