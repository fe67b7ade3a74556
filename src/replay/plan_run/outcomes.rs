//! A plan over one query of a matrix of outcomes, where every model has answered once.
//!
//! Answers are the same whatever the plan's sampling and system prompt, as the matrix says nothing of these. A second call of
//! a model in one run is a miss, and so is the call of a judge, a refinement or a verification, which is shown more than the query. There
//! are no log-probabilities, so that gates which ask for them have no score. Two answers of which one is not known say
//! different things.

use std::collections::BTreeSet;

use super::{Answers, Asked, End, Ending, Recorded, run};
use crate::{
    cascade::{Input, Setup},
    domain::{Aggregate, Facts, Plan, Spend},
    replay::matrix::Matrix,
};

/// The answers to one query.
struct Row<'a> {
    matrix: &'a Matrix,
    query: usize,
    given: BTreeSet<usize>,
}

impl Answers for Row<'_> {
    fn answer(&mut self, asked: &Asked<'_>) -> Option<Recorded> {
        let column = self.matrix.models.iter().position(|model| *model == asked.spec.model)?;
        if *asked.input != Input::Request || !self.given.insert(column) {
            return None;
        }
        let known = self.matrix.form(self.query, column);
        // What is not known has a number of its own.
        let form = known.unwrap_or(u32::MAX - column as u32);
        let latency = self.matrix.latencies(self.query).map_or(0.0, |ms| ms[column] * 1e3);
        Some(Recorded {
            answer: column,
            ending: Ending::Answers(Facts { form, ..Facts::default() }),
            cost: Spend::usd((self.matrix.costs(self.query)[column] * 1e6).ceil() as u64),
            first: None,
            known: Vec::new(),
            latency: latency as i64,
        })
    }
}

/// What came of a plan for one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Came {
    /// The model whose answer it is; none where the plan failed or the run was missed.
    pub served: Option<usize>,
    /// Of the answer; 0 without one.
    pub score: f64,
    /// Of all calls.
    pub cost_usd: f64,
    /// Where every outcome of the matrix has one.
    pub latency_ms: Option<f64>,
    /// Calls made.
    pub calls: usize,
    /// An answer was asked for that the matrix does not have. What was paid until then counts.
    pub missed: bool,
}

/// Runs a plan over the answers to one query.
///
/// # Errors
/// Where the matrix lacks what the plan decides by.
pub fn over(plan: &Plan, matrix: &Matrix, query: usize) -> Result<Came, String> {
    if compares(plan) && !matrix.has_responses() {
        return Err(format!("the plan {plan} compares answers, and {} has none: no column `response`", matrix.name));
    }
    if races(plan) && matrix.latencies(query).is_none() {
        return Err(format!(
            "the plan {plan} takes what comes first, and {} does not say: no `latency_ms`",
            matrix.name
        ));
    }
    let setup = Setup::bare(plan.clone());
    let mut row = Row { matrix, query, given: BTreeSet::new() };
    let run = run(&setup, 0, &mut row);
    let served = match run.end {
        End::Answered { answer, .. } => Some(answer),
        End::Failed { .. } | End::Missed { .. } | End::Open => None,
    };
    Ok(Came {
        served,
        score: served.map_or(0.0, |column| matrix.scores(query)[column]),
        cost_usd: run.calls.iter().map(|made| matrix.costs(query)[made.answer]).sum(),
        latency_ms: matrix.latencies(query).map(|_| run.latency as f64 / 1e3),
        calls: run.calls.len(),
        missed: run.missed(),
    })
}

fn any(plan: &Plan, is: &dyn Fn(&Aggregate) -> bool) -> bool {
    match plan {
        Plan::Call(_) | Plan::Hedged { .. } => false,
        Plan::Cascade(stages) => stages.iter().any(|stage| any(&stage.plan, is)),
        Plan::Parallel { branches, aggregate } => is(aggregate) || branches.iter().any(|branch| any(branch, is)),
        // Nobody has recorded its steps, which is a miss.
        Plan::Steps(_) => false,
        Plan::Verified(verified) => any(&verified.plan, is),
    }
}

/// Whether it matters what answers say: to a vote, to a judge, who is asked where they differ, and to a gate on how far
/// branches disagree, which can stand above any of these.
fn compares(plan: &Plan) -> bool {
    any(plan, &|aggregate| !matches!(aggregate, Aggregate::First))
}

/// Whether it matters which answer comes first, or when.
fn races(plan: &Plan) -> bool {
    match plan {
        Plan::Call(_) | Plan::Steps(_) => false,
        Plan::Hedged { .. } => true,
        Plan::Cascade(stages) => stages.iter().any(|stage| races(&stage.plan)),
        Plan::Parallel { branches, aggregate } => matches!(aggregate, Aggregate::First) || branches.iter().any(races),
        Plan::Verified(verified) => races(&verified.plan),
    }
}
