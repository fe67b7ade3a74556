//! `weir bench cascade`: what gates of cascades are worth. Answers of an in-process model to made questions ([`tasks`],
//! [`ask`]) are kept in a file ([`answers`]); plans ([`plans`]) are run over them by the machine that serves, and no model is
//! called. Gates are swept ([`sweep`], [`curve`], [`calibrated`]), and given guarantees ([`guarantees`]); over matrices of outcomes there are votes, and cascades by
//! agreement ([`sets`]).

pub mod answers;
pub mod ask;
mod calibrated;
mod curve;
pub mod guarantees;
mod plans;
mod report;
pub mod sets;
pub mod sweep;
pub mod tasks;

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use self::{
    answers::{Answer, Asking},
    guarantees::Guaranteed,
    sets::Set,
    sweep::{Fixed, Row, Sweep},
    tasks::{Kind, Task},
};
use super::{BenchError, report::Machine};
use crate::replay::matrix::Matrix;

pub use plans::{PROBE, VOTE, VOTES};

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Answers to replay.
    pub answers: PathBuf,
    /// Random halves: thresholds are taken from one and judged on the other.
    pub splits: u64,
    /// Thresholds per gate, less one.
    pub steps: usize,
    /// Of the simulated model, and of the halves of matrices.
    pub seed: u64,
}

/// The questions and how they were answered.
#[derive(Clone, Debug, Serialize)]
pub struct Asked {
    /// BLAKE3 of the answers as they were read.
    pub hash: String,
    pub questions: usize,
    pub answers: usize,
    /// By kind and by temperature: answers, and the share that is right.
    pub right: Vec<(Kind, f64, usize, f64)>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub asked: Asked,
    pub plans: Vec<Fixed>,
    pub rows: Vec<Row>,
    pub guarantees: Vec<Guaranteed>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<Set>,
    pub plan: Plan,
    pub machine: Machine,
}

/// Replays plans over recorded answers, and over matrices.
///
/// # Errors
/// When the answers cannot be read, or a matrix has no responses.
pub fn run(plan: Plan, matrices: &[Matrix], tick: &(dyn Fn() + Sync)) -> Result<Report, BenchError> {
    let answers = answers::read(&plan.answers)?;
    if answers.is_empty() {
        return Err(BenchError::Usage(format!("{} holds no answers", plan.answers.display())));
    }
    let bytes = std::fs::read(&plan.answers).map_err(BenchError::io(plan.answers.display().to_string()))?;
    let asked = asked(&answers, blake3::hash(&bytes).to_hex().to_string());
    let guarantees = guarantees::judge(&answers, plan.splits, plan.seed);
    let guarantees = guarantees.map_err(|e| BenchError::Usage(format!("{}: {e}", plan.answers.display())))?;
    let mut askings = Asking::all(answers, plan.seed);
    let tasks = tasks::make(askings.len(), plan.seed);
    for asking in &mut askings {
        asking.signals = tasks.iter().find(|task| asking.is_of(task)).map(Task::signals);
    }
    let fixed = sweep::fixed(&askings);
    let rows = sweep::sweep(&askings, Sweep { splits: plan.splits, steps: plan.steps }, tick);
    let sets: Vec<Set> = matrices
        .iter()
        .map(|matrix| sets::judge(matrix, plan.seed, tick))
        .collect::<Result<_, _>>()
        .map_err(BenchError::Usage)?;
    let mut report = Report {
        bench: "cascade",
        figures: BTreeMap::new(),
        asked,
        plans: fixed,
        rows,
        guarantees,
        sets,
        plan,
        machine: Machine::here(),
    };
    report.figures = report.figures();
    Ok(report)
}

fn asked(answers: &[Answer], hash: String) -> Asked {
    let mut right: BTreeMap<(Kind, i64), (usize, usize)> = BTreeMap::new();
    for answer in answers {
        let of = right.entry((answer.kind, (answer.temperature * 100.0).round() as i64)).or_default();
        *of = (of.0 + 1, of.1 + usize::from(answer.correct));
    }
    let share = |((kind, hundredths), (all, right)): ((Kind, i64), (usize, usize))| {
        (kind, hundredths as f64 / 100.0, all, right as f64 / all as f64)
    };
    Asked {
        hash,
        questions: answers.iter().map(|a| &a.task).collect::<std::collections::BTreeSet<_>>().len(),
        answers: answers.len(),
        right: right.into_iter().map(share).collect(),
    }
}
