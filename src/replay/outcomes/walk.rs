//! A policy's way over the queries of a matrix: the probability of every model for each.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    domain::{Context, DecidedBy, Decision, Micros, ModelState, StateUpdate},
    policy::{Expects, Policy, State},
    replay::{calibration::Reliability, matrix::Matrix, metrics::SplitMix},
};

/// Time between two queries, for policies that forget by time.
const APART: Micros = 1_000_000;
/// Queries that one core takes at a time.
const SHARE: usize = 512;

/// Probabilities of the models, queries x models; a query that was refused has none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Walk {
    models: usize,
    chances: Vec<f64>,
}

impl Walk {
    pub(super) fn new(queries: usize, models: usize) -> Self {
        Self { models, chances: vec![0.0; queries * models] }
    }

    pub(super) fn of(matrix: &Matrix, choose: &dyn Fn(usize) -> Vec<(usize, f64)>) -> Self {
        let mut out = Self::new(matrix.len(), matrix.models.len());
        for q in 0..matrix.len() {
            choose(q).into_iter().for_each(|(m, p)| out.row(q)[m] += p);
        }
        out
    }

    fn row(&mut self, q: usize) -> &mut [f64] {
        &mut self.chances[q * self.models..(q + 1) * self.models]
    }

    /// By model.
    pub(super) fn chances(&self, q: usize) -> &[f64] {
        &self.chances[q * self.models..(q + 1) * self.models]
    }

    pub(super) fn add(&mut self, other: &Self, share: f64) {
        self.chances.iter_mut().zip(&other.chances).for_each(|(a, b)| *a += share * b);
    }

    /// Expected score of a query.
    pub(super) fn score(&self, matrix: &Matrix, q: usize) -> f64 {
        self.chances(q).iter().zip(matrix.scores(q)).map(|(p, s)| p * s).sum()
    }

    /// Expected cost of a query in USD.
    pub(super) fn cost(&self, matrix: &Matrix, q: usize) -> f64 {
        self.chances(q).iter().zip(matrix.costs(q)).map(|(p, c)| p * c).sum()
    }

    pub(super) fn scores(&self, matrix: &Matrix) -> Vec<f64> {
        (0..matrix.len()).map(|q| self.score(matrix, q)).collect()
    }

    pub(super) fn costs(&self, matrix: &Matrix) -> Vec<f64> {
        (0..matrix.len()).map(|q| self.cost(matrix, q)).collect()
    }

    /// Share of a query's probability that is elsewhere in `other`.
    pub(super) fn moved(&self, other: &Self, q: usize) -> f64 {
        self.chances(q).iter().zip(other.chances(q)).map(|(a, b)| (a - b).max(0.0)).sum()
    }

    /// The first of the likeliest models, with its probability.
    pub(super) fn likeliest(&self, q: usize) -> (usize, f64) {
        let chances = self.chances(q).iter().copied().enumerate();
        chances.fold((0, f64::MIN), |best, (m, p)| if p > best.1 { (m, p) } else { best })
    }
}

/// What hears of the decisions on certain queries.
pub(super) type Watch<'a> = (&'a BTreeSet<usize>, &'a mut dyn FnMut(usize, &Decision, &Context));

/// One pass over the queries.
#[derive(Serialize, Deserialize)]
pub(super) struct Pass {
    pub(super) walk: Walk,
    /// Of the queries.
    pub(super) order: Vec<usize>,
    pub(super) reliability: Reliability,
}

/// A policy over a matrix.
pub(super) struct Way<'a> {
    pub(super) policy: &'a Policy,
    matrix: &'a Matrix,
    /// Which column of the matrix each model of the policy is.
    columns: BTreeMap<String, usize>,
    fleet: BTreeMap<String, ModelState>,
    context: &'a (dyn Fn(&Policy, usize) -> Context + Sync),
}

impl<'a> Way<'a> {
    /// # Errors
    /// When the policy can reach a model without outcomes, or takes plans of several calls.
    pub(super) fn new(
        policy: &'a Policy,
        matrix: &'a Matrix,
        context: &'a (dyn Fn(&Policy, usize) -> Context + Sync),
        without: &BTreeSet<String>,
    ) -> Result<Self, String> {
        let of = |model: &str| {
            matrix.models.iter().position(|m| m == model).map(|at| (model.to_owned(), at)).ok_or_else(|| {
                format!(
                    "the policy {} can reach the model {model}, of which {} has no outcomes; it has those of {}",
                    policy.name(),
                    matrix.name,
                    matrix.models.join(", ")
                )
            })
        };
        if let Some(plan) = policy.composed() {
            return Err(format!(
                "the plan {plan} of {} makes several calls, and outcomes of single models do not say what it answers; replay it \
                 over a record",
                policy.name()
            ));
        }
        let columns: BTreeMap<String, usize> = policy.models().into_iter().map(of).collect::<Result<_, _>>()?;
        let state = |model: &String| ModelState { available: !without.contains(model), ..ModelState::default() };
        let fleet = columns.keys().map(|m| (m.clone(), state(m))).collect();
        Ok(Self { policy, matrix, columns, fleet, context })
    }

    /// One pass, and the order of it: that of the file, or shuffled by the seed. With a watch, a policy that does not learn
    /// decides on the watched queries only.
    ///
    /// # Errors
    /// When an update does not fold.
    pub(super) fn pass(&self, seed: Option<u64>, mut watch: Option<Watch<'_>>) -> Result<Pass, String> {
        let n = self.matrix.len();
        let mut rng = SplitMix(seed.unwrap_or(0) ^ 0x7265_706c);
        let order: Vec<usize> = seed.map_or_else(|| (0..n).collect(), |_| rng.order(n));
        // When, which query, and the seed of its draw.
        let steps: Vec<(Micros, usize, u64)> =
            (0i64..).zip(&order).map(|(step, q)| (step * APART, *q, rng.next_u64())).collect();
        let mut walk = Walk::new(n, self.matrix.models.len());
        let mut reliability = Reliability::default();
        let mut state = self.policy.initial_state();
        if self.policy.learns() {
            for step in &steps {
                let (context, decision, expected) = self.decide(&state, step);
                self.put(&decision, walk.row(step.1))?;
                self.expect(&mut reliability, step.1, &decision, &expected)?;
                if let Some((watched, hear)) = &mut watch
                    && watched.contains(&step.1)
                {
                    hear(step.1, &decision, &context);
                }
                self.learn(&mut state, step.1, &decision, context.now)?;
            }
        } else if let Some((watched, hear)) = watch {
            for step in steps.iter().filter(|(_, q, _)| watched.contains(q)) {
                let (context, decision, _) = self.decide(&state, step);
                hear(step.1, &decision, &context);
            }
        } else {
            let models = self.matrix.models.len();
            let rows = walk.chances.par_chunks_mut(SHARE * models.max(1));
            let parts = rows.zip(steps.par_chunks(SHARE)).map(|(rows, steps)| {
                let mut part = Reliability::default();
                for (row, step) in rows.chunks_exact_mut(models.max(1)).zip(steps) {
                    let (_, decision, expected) = self.decide(&state, step);
                    self.put(&decision, row)?;
                    self.expect(&mut part, step.1, &decision, &expected)?;
                }
                Ok(part)
            });
            // In their order, so that sums are the same however many cores there are.
            let parts: Vec<Reliability> = parts.collect::<Result<_, String>>()?;
            parts.iter().for_each(|part| reliability.merge(part));
        }
        Ok(Pass { walk, order, reliability })
    }

    fn decide(&self, state: &State, &(now, q, seed): &(Micros, usize, u64)) -> (Context, Decision, Vec<f64>) {
        let context = Context { now, seed, fleet: self.fleet.clone(), ..(self.context)(self.policy, q) };
        let (decision, expected) = self.policy.decide_expecting(state, &context);
        (context, decision, expected)
    }

    fn column(&self, model: Option<&str>) -> Result<usize, String> {
        let model = model.unwrap_or_default();
        self.columns.get(model).copied().ok_or_else(|| format!("there are no outcomes of {model}"))
    }

    /// The models' probabilities.
    fn put(&self, decision: &Decision, row: &mut [f64]) -> Result<(), String> {
        let Some(plan) = &decision.plan else { return Ok(()) };
        let taken = self.column(plan.models().first().copied())?;
        if decision.decided_by != DecidedBy::Select {
            row[taken] += 1.0;
            return Ok(());
        }
        for c in decision.candidates.iter().filter(|c| c.propensity > 0.0) {
            let m = if c.arm == decision.arm { taken } else { self.column(self.policy.first_model(&c.arm))? };
            row[m] += c.propensity;
        }
        Ok(())
    }

    /// What was expected of each arm that could be taken, beside what its model's answer was worth.
    fn expect(&self, to: &mut Reliability, q: usize, decision: &Decision, expected: &[f64]) -> Result<(), String> {
        let Some(of) = self.policy.expects() else { return Ok(()) };
        for (c, expected) in decision.candidates.iter().zip(expected).filter(|(c, _)| c.eliminated.is_none()) {
            let m = self.column(self.policy.first_model(&c.arm))?;
            let (score, cost_usd) = (self.matrix.scores(q)[m], self.matrix.costs(q)[m]);
            let came = match of {
                Expects::Quality => Some(score),
                Expects::Reward => self.policy.reward(&self.policy.outcome(score, cost_usd)),
            };
            came.into_iter().for_each(|came| to.take(*expected, came));
        }
        Ok(())
    }

    fn learn(&self, state: &mut State, q: usize, decision: &Decision, now: Micros) -> Result<(), String> {
        let Some(plan) = decision.plan.as_ref().filter(|_| decision.decided_by == DecidedBy::Select) else {
            return Ok(());
        };
        let taken = self.column(plan.models().first().copied())?;
        let (score, cost_usd) = (self.matrix.scores(q)[taken], self.matrix.costs(q)[taken]);
        let Some(reward) = self.policy.reward(&self.policy.outcome(score, cost_usd)) else { return Ok(()) };
        let update = StateUpdate::of(decision, state.seq, reward, cost_usd, now);
        self.policy.fold(state, &update).map_err(|e| e.to_string())
    }
}
