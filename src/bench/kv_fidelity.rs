//! `weir bench kv-fidelity`: what reusing documents costs, by way of reuse: the same questions with their documents computed apart
//! and in place ([`crate::engine::fidelity`]). Intervals are of a bootstrap over questions.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use super::{BenchError, questions::Question, report::Machine};
use crate::{
    engine::{
        EngineError, EngineOptions,
        fidelity::{
            Laboratory, Trial, Variant,
            record::{Fidelity, Mean},
        },
    },
    replay::metrics::bootstrap,
};

const RESAMPLES: usize = 1000;

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub model: PathBuf,
    pub options: EngineOptions,
    pub variants: Vec<Variant>,
    /// Tokens of the full answer that are compared.
    pub answer: usize,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub model: String,
    /// Of its keys and values.
    pub identity: String,
    pub questions: usize,
    /// Questions that did not fit the context.
    pub left_out: usize,
    pub documents: usize,
    pub prompt_tokens: f64,
    pub answer_tokens: usize,
    pub rows: Vec<Fidelity>,
    pub machine: Machine,
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let mut out = format!(
            "{}: {} questions ({} left out) about {} documents, prompts of {:.0} tokens on average, {} tokens of each answer. In brackets: 95 %.\n\n",
            self.model, self.questions, self.left_out, self.documents, self.prompt_tokens, self.answer_tokens
        );
        out += "| reuse | computed | divergence, nats | same best token | F1 of the answers |\n|---|---|---|---|---|\n";
        for r in &self.rows {
            let shown =
                |m: &Mean, digits: usize| format!("{:.digits$} [{:.digits$}, {:.digits$}]", m.mean, m.low, m.high);
            out += &format!(
                "| {} | {:.0} % | {} | {} | {} |\n",
                r.variant,
                100.0 * r.computed,
                shown(&r.divergence, 4),
                shown(&r.top1, 3),
                shown(&r.f1, 3)
            );
        }
        out
    }
}

/// What one question gave with one variant.
struct Seen {
    trial: Trial,
    f1: f64,
    computed: f64,
}

/// Measures.
///
/// # Errors
/// When the model cannot be loaded, or none of the questions fits its context.
pub fn run(plan: &Plan, questions: &[Question], tick: &dyn Fn()) -> Result<Report, BenchError> {
    let failed = |e: EngineError| BenchError::Start { what: "the model".to_owned(), reason: e.to_string() };
    let mut laboratory = Laboratory::load(&plan.model, &plan.options).map_err(failed)?;
    let mut seen: Vec<Vec<Seen>> = plan.variants.iter().map(|_| Vec::new()).collect();
    let (mut left_out, mut documents, mut tokens, mut taken) = (0, 0, 0, 0);
    for question in questions {
        let mut reference = match laboratory.reference(&question.messages(), plan.answer) {
            Ok(reference) => reference,
            Err(EngineError::PromptTooLong { .. }) => {
                left_out += 1;
                tick();
                continue;
            }
            Err(e) => return Err(failed(e)),
        };
        let full = laboratory.full_answer(&reference);
        let length = reference.tokens();
        taken += 1;
        documents += reference.documents();
        tokens += length;
        for (variant, seen) in plan.variants.iter().zip(&mut seen) {
            if let Some(trial) = laboratory.attempt(&mut reference, *variant) {
                let (f1, computed) = (f1(&full, &trial.answer), trial.computed as f64 / length as f64);
                seen.push(Seen { trial, f1, computed });
            }
        }
        tick();
    }
    if seen.iter().all(Vec::is_empty) {
        return Err(BenchError::Usage("no question has a document that may be reused and fits the context".to_owned()));
    }
    let rows: Vec<Fidelity> = plan
        .variants
        .iter()
        .zip(&seen)
        .filter(|(_, s)| !s.is_empty())
        .map(|(variant, seen)| row(*variant, seen))
        .collect();
    let mut figures = BTreeMap::new();
    for row in &rows {
        figures.insert(format!("{}.divergence", row.variant), row.divergence.mean);
        figures.insert(format!("{}.top1", row.variant), row.top1.mean);
        figures.insert(format!("{}.f1", row.variant), row.f1.mean);
        figures.insert(format!("{}.computed", row.variant), row.computed);
    }
    Ok(Report {
        bench: "kv-fidelity",
        figures,
        model: plan.model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        identity: format!("{:032x}", laboratory.identity()),
        questions: taken,
        left_out,
        documents,
        prompt_tokens: tokens as f64 / taken.max(1) as f64,
        answer_tokens: plan.answer,
        rows,
        machine: Machine::here(),
    })
}

fn row(variant: Variant, seen: &[Seen]) -> Fidelity {
    // Of all positions together: long answers count for more.
    let by_position = |value: &dyn Fn(&Trial) -> f64| {
        mean(seen.len(), |sample| {
            let sum: f64 = sample.iter().map(|i| value(&seen[*i].trial)).sum();
            sum / sample.iter().map(|i| seen[*i].trial.agrees.len()).sum::<usize>() as f64
        })
    };
    Fidelity {
        variant: variant.name(),
        questions: seen.len(),
        divergence: by_position(&|trial| trial.divergence.iter().sum()),
        top1: by_position(&|trial| trial.agrees.iter().filter(|same| **same).count() as f64),
        f1: mean(seen.len(), |sample| sample.iter().map(|i| seen[*i].f1).sum::<f64>() / sample.len() as f64),
        computed: seen.iter().map(|s| s.computed).sum::<f64>() / seen.len() as f64,
    }
}

fn mean(count: usize, statistic: impl Fn(&[usize]) -> f64) -> Mean {
    let all: Vec<usize> = (0..count).collect();
    let mean = statistic(&all);
    let (low, high) = bootstrap(count, RESAMPLES, 1, statistic).unwrap_or((mean, mean));
    Mean { mean, low, high }
}

/// F1 of the words of two texts, as SQuAD's script counts them (Rajpurkar et al. 2016): lower case, without punctuation and articles.
fn f1(want: &str, got: &str) -> f64 {
    let words = |text: &str| {
        let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
        let mut words: Vec<String> =
            plain.split_whitespace().filter(|w| !["a", "an", "the"].contains(w)).map(str::to_owned).collect();
        words.sort_unstable();
        words
    };
    let (want, mut got) = (words(want), words(got));
    let total = want.len() + got.len();
    if total == 0 {
        return 1.0;
    }
    let mut common = 0;
    for word in &want {
        if let Ok(at) = got.binary_search(word) {
            got.remove(at);
            common += 1;
        }
    }
    2.0 * f64::from(common) / total as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_as_by_squad() {
        assert!((f1("The Danube.", "danube") - 1.0).abs() < 1e-12);
        assert!((f1("the river Danube", "Danube in Vienna, a city") - 2.0 / 6.0).abs() < 1e-12);
        assert!(f1("x", "y") == 0.0 && f1("", "a the") == 1.0 && f1("x x", "x") < 0.7);
    }
}
