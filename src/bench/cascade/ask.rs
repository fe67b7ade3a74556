//! Asks an in-process model the questions: once at temperature 0, and several times at others, with log-probabilities; and
//! whether its answers are right.

use std::{collections::BTreeMap, path::PathBuf};

use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    answers::{Answer, is_right, kept},
    plans::VERDICTS,
    tasks::Task,
};
use crate::{
    bench::BenchError,
    cascade::{self, vote},
    dispatch::verifying,
    domain::{Message, Role, TokenLogprob, Usage},
    engine::{Choosing, Engine, EngineError, EngineOptions, Generate, GenerateEvent, Prompt},
    fit::gate::Verification,
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
/// As a policy's `verify` has it.
const VERDICT_TOKENS: u32 = 16;

/// All answers, in the order of the questions. `tick` hears of every question that is through.
///
/// # Errors
/// When the model cannot be loaded, or fails.
pub fn ask(plan: &Plan, tasks: &[Task], tick: &dyn Fn()) -> Result<Vec<Answer>, BenchError> {
    let engine = Engine::load(&plan.model, plan.options.clone()).map_err(failed)?;
    let mut answers = Vec::new();
    for some in tasks.chunks(AT_ONCE) {
        let mut running = Vec::new();
        for task in some {
            for &(temperature, samples) in &plan.samples {
                let generate = Generate {
                    max_tokens: Some(plan.max_tokens),
                    ..generate(task, Prompt::Chat(task.messages()), temperature, samples)
                };
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

/// Asks the model whether its greedy answers are right, as a plan's verifying calls do. `tick` hears of every answer.
///
/// # Errors
/// When the model cannot be loaded, or fails.
pub fn verify(plan: &Plan, tasks: &[Task], answers: &mut [Answer], tick: &dyn Fn()) -> Result<(), BenchError> {
    let engine = Engine::load(&plan.model, plan.options.clone()).map_err(failed)?;
    let mut greedy: Vec<(&Task, &mut Answer)> = answers
        .iter_mut()
        .filter(|answer| answer.temperature == 0.0)
        .filter_map(|answer| Some((tasks.iter().find(|task| answer.is_to(task))?, answer)))
        .collect();
    for some in greedy.chunks_mut(AT_ONCE) {
        let mut running = Vec::new();
        for (task, answer) in some {
            let question = verifying(&task.messages(), &answer.text);
            let prompt = Prompt::Chat(vec![Message::text(Role::User, question)]);
            let generate =
                Generate { max_tokens: Some(VERDICT_TOKENS), logprobs: None, ..generate(task, prompt, 1.0, VERDICTS) };
            running.push((task.id.as_str(), answer, engine.generate(generate).map_err(failed)?));
        }
        for (id, answer, events) in running {
            let (said, usage) = said(id, events)?;
            answer.verified = Some(Verification {
                said: said.values().map(|(text, _)| vote::approves(text)).collect(),
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            });
            tick();
        }
    }
    Ok(())
}

fn failed(error: EngineError) -> BenchError {
    BenchError::Start { what: "the model".to_owned(), reason: error.to_string() }
}

fn generate(task: &Task, prompt: Prompt, temperature: f64, n: u32) -> Generate {
    // Of the question and the temperature, so that an answer does not depend on what else is asked.
    let [a, b, c, d, e, f, g, h, ..] = task.hash().0;
    let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]) ^ (temperature * 100.0).round() as u64;
    Generate {
        prompt,
        choosing: Choosing { temperature, top_p: 1.0, seed },
        max_tokens: None,
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

/// By choice, what was said, with its tokens where their log-probabilities were asked for; and what it took.
type Said = (BTreeMap<u32, (String, Vec<TokenLogprob>)>, Usage);

fn said(id: &str, mut events: UnboundedReceiver<GenerateEvent>) -> Result<Said, BenchError> {
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
                return Err(BenchError::Load { what: id.to_owned(), reason: error.to_string() });
            }
        }
    }
    let usage = usage.ok_or_else(|| BenchError::Load {
        what: id.to_owned(),
        reason: "the engine ended before the answer did".to_owned(),
    })?;
    Ok((said, usage))
}

fn collect(
    plan: &Plan,
    task: &Task,
    temperature: f64,
    events: UnboundedReceiver<GenerateEvent>,
) -> Result<Vec<Answer>, BenchError> {
    let (said, usage) = said(&task.id, events)?;
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
        verified: None,
        text,
    };
    Ok(said.into_iter().map(answer).collect())
}
