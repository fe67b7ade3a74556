//! Asks an in-process model the questions: once at temperature 0, and several times at others, with log-probabilities.

use std::{collections::BTreeMap, path::PathBuf};

use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    answers::{Answer, is_right, kept},
    tasks::Task,
};
use crate::{
    bench::BenchError,
    cascade,
    domain::{TokenLogprob, Usage},
    engine::{Choosing, Engine, EngineError, EngineOptions, Generate, GenerateEvent, Prompt},
};

/// How the model is asked.
#[derive(Clone, Debug)]
pub struct Plan {
    /// As the fleet names it.
    pub name: String,
    pub model: PathBuf,
    pub options: EngineOptions,
    /// Temperatures, and how many answers at each.
    pub samples: Vec<(f64, u32)>,
    /// Longest answer.
    pub max_tokens: u32,
}

/// Questions that are in the engine at once.
const AT_ONCE: usize = 4;

/// All answers, in the order of the questions. `tick` hears of every question that is through.
///
/// # Errors
/// When the model cannot be loaded, or fails.
pub fn ask(plan: &Plan, tasks: &[Task], tick: &dyn Fn()) -> Result<Vec<Answer>, BenchError> {
    let failed = |e: EngineError| BenchError::Start { what: "the model".to_owned(), reason: e.to_string() };
    let engine = Engine::load(&plan.model, plan.options.clone()).map_err(failed)?;
    let mut answers = Vec::new();
    for some in tasks.chunks(AT_ONCE) {
        let mut running = Vec::new();
        for task in some {
            for &(temperature, samples) in &plan.samples {
                let generate = request(plan, task, temperature, samples);
                running.push((task, temperature, engine.generate(generate).map_err(failed)?));
            }
        }
        for (task, temperature, events) in running {
            answers.extend(collect(plan, task, temperature, events)?);
        }
        some.iter().for_each(|_| tick());
    }
    Ok(answers)
}

fn request(plan: &Plan, task: &Task, temperature: f64, n: u32) -> Generate {
    // Of the question and the temperature, so that an answer does not depend on what else is asked.
    let [a, b, c, d, e, f, g, h, ..] = task.hash().0;
    let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]) ^ (temperature * 100.0).round() as u64;
    Generate {
        prompt: Prompt::Chat(task.messages()),
        choosing: Choosing { temperature, top_p: 1.0, seed },
        max_tokens: Some(plan.max_tokens),
        stop: Vec::new(),
        n,
        priority: 0,
        deadline: None,
        exact: true,
        sharing: Vec::new(),
        keep: None,
        // Two for the margin; entropies are of whole distributions.
        logprobs: Some(2),
        mask: None,
    }
}

fn collect(
    plan: &Plan,
    task: &Task,
    temperature: f64,
    mut events: UnboundedReceiver<GenerateEvent>,
) -> Result<Vec<Answer>, BenchError> {
    let mut said: BTreeMap<u32, (String, Vec<TokenLogprob>)> = BTreeMap::new();
    let mut usage: Option<Usage> = None;
    while let Some(event) = events.blocking_recv() {
        match event {
            GenerateEvent::Text { choice, text, logprobs } => {
                let of = said.entry(choice).or_default();
                of.0.push_str(&text);
                of.1.extend(logprobs);
            }
            // A choice may say nothing.
            GenerateEvent::Finish { choice, .. } => _ = said.entry(choice).or_default(),
            GenerateEvent::Usage(counted) => usage = Some(counted),
            GenerateEvent::Failed(error) => {
                return Err(BenchError::Load { what: task.id.clone(), reason: error.to_string() });
            }
        }
    }
    let usage = usage.ok_or_else(|| BenchError::Load {
        what: task.id.clone(),
        reason: "the engine ended before the answer did".to_owned(),
    })?;
    let answer = |(sample, (text, tokens)): (u32, (String, Vec<TokenLogprob>))| Answer {
        task: task.id.clone(),
        kind: task.kind,
        model: plan.name.clone(),
        prompt: task.hash().to_string().chars().take(16).collect(),
        reference: task.reference.clone(),
        temperature,
        sample,
        correct: is_right(&text, &task.reference),
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: tokens.len() as u32,
        scores: kept(&cascade::readings(&tokens, [])),
        text,
    };
    Ok(said.into_iter().map(answer).collect())
}
