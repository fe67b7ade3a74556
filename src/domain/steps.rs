//! Reasoning step by step, each step written by one of two models (GlimpRouter: "GlimpRouter", arXiv 2601.05110): the small
//! one begins, and how sure it is of a step's first token decides whether it goes on or the large one writes the step.

use serde::{Deserialize, Serialize};

use super::{CallSpec, Score};

/// A plan of reasoning steps, and an answer after them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// Begins every step, and writes those of whose first token it is sure.
    pub small: CallSpec,
    /// Writes the others.
    pub large: CallSpec,
    /// Writes the answer, which begins where the reasoning has ended.
    pub answer: CallSpec,
    /// Entropy of a step's first token in nats from which on the large model writes it.
    pub tau: f64,
    /// What ends a step.
    pub separator: String,
    /// What stands before the first step.
    pub open: String,
    /// What ends the reasoning, where a model writes it.
    pub close: String,
    pub max_steps: u32,
    /// Of all steps together.
    pub max_tokens: u32,
}

impl Steps {
    /// What is read of a step's beginning.
    pub const SCORE: Score = Score::FirstTokenEntropy;

    /// Places of its calls below the plan's.
    pub const SMALL: u32 = 0;
    pub const LARGE: u32 = 1;
    pub const ANSWER: u32 = 2;

    pub fn calls(&self) -> [&CallSpec; 3] {
        [&self.small, &self.large, &self.answer]
    }

    /// The most calls of one run: two a step, as the small model may have begun what the large one writes, and the answer.
    pub fn most_calls(&self) -> u32 {
        self.max_steps.saturating_mul(2).saturating_add(1)
    }

    /// Each call, and how often it is made at most.
    pub fn times(&self) -> [(&CallSpec, u32); 3] {
        [(&self.small, self.max_steps), (&self.large, self.max_steps), (&self.answer, 1)]
    }

    /// The reasoning as a model is given it to go on from: what was written of each step, in order. `closed`: as it is given
    /// to the model that answers.
    pub fn joined(&self, steps: &[String], closed: bool) -> String {
        let mut text = self.open.clone();
        for (i, step) in steps.iter().enumerate() {
            if i > 0 {
                text.push_str(&self.separator);
            }
            // What stands behind the end is no reasoning any more.
            text.push_str(step.split(&self.close).next().unwrap_or_default().trim_end());
        }
        match closed {
            true => text + "\n" + &self.close + "\n\n",
            false if steps.is_empty() => text,
            false => text + &self.separator,
        }
    }

    /// Whether a step ends the reasoning: it says so, or says nothing.
    pub fn closes(&self, step: &str) -> bool {
        step.trim().is_empty() || step.contains(&self.close)
    }
}

/// What is known of a reasoning step beside its scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFacts {
    /// That were written.
    pub tokens: u32,
    /// It ends the reasoning.
    pub closes: bool,
    /// It is, word for word, the step before it.
    pub repeats: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Steps {
        let call = CallSpec::bare("m");
        Steps {
            small: call.clone(),
            large: call.clone(),
            answer: call,
            tau: 1.0,
            separator: "\n\n".to_owned(),
            open: "<think>\n".to_owned(),
            close: "</think>".to_owned(),
            max_steps: 4,
            max_tokens: 100,
        }
    }

    #[test]
    fn reasoning_is_joined_as_a_model_would_have_written_it() {
        let said = ["One.".to_owned(), "Two.\n</think> It is 2.".to_owned()];
        assert_eq!(steps().joined(&[], false), "<think>\n");
        assert_eq!(steps().joined(&said[..1], false), "<think>\nOne.\n\n");
        assert_eq!(steps().joined(&said, true), "<think>\nOne.\n\nTwo.\n</think>\n\n");
        assert!(steps().closes(&said[1]) && steps().closes(" \n") && !steps().closes(&said[0]));
        assert_eq!(steps().most_calls(), 9);
    }
}
