//! A policy's way over the queries of a matrix: the probability of every model for each.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    domain::{CallSpec, Context, DecidedBy, Decision, Micros, ModelState, Plan, StateUpdate},
    policy::{Expects, Policy, State},
    replay::{
        calibration::Reliability,
        matrix::Matrix,
        metrics::SplitMix,
        plan_run::outcomes::{Came, over},
    },
};

/// Time between two queries, for policies that forget by time.
const APART: Micros = 1_000_000;
/// Queries that one core takes at a time.
const SHARE: usize = 512;

/// Probabilities of the models whose answers are given out, queries x models; a query that was refused has none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Walk {
    models: usize,
    chances: Vec<f64>,
    /// Per query, USD that plans of several calls are expected to cost beside the answer that is given out.
    beside: Vec<f64>,
    /// Per query, the probability of a plan that asks for an answer which there is not.
    missed: Vec<f64>,
}

/// One query of a walk.
pub(super) struct Row<'a> {
    chances: &'a mut [f64],
    beside: &'a mut f64,
    missed: &'a mut f64,
}

impl Row<'_> {
    fn take(&mut self, came: &Came, costs: &[f64], chance: f64) {
        if let Some(model) = came.served {
            self.chances[model] += chance;
        }
        *self.missed += chance * f64::from(u8::from(came.missed));
        *self.beside += chance * (came.cost_usd - came.served.map_or(0.0, |model| costs[model]));
    }
}

impl Walk {
    pub(super) fn new(queries: usize, models: usize) -> Self {
        Self { models, chances: vec![0.0; queries * models], beside: vec![0.0; queries], missed: vec![0.0; queries] }
    }

    pub(super) fn of(matrix: &Matrix, choose: &dyn Fn(usize) -> Vec<(usize, f64)>) -> Self {
        let mut out = Self::new(matrix.len(), matrix.models.len());
        for q in 0..matrix.len() {
            choose(q).into_iter().for_each(|(m, p)| out.row(q).chances[m] += p);
        }
        out
    }

    fn row(&mut self, q: usize) -> Row<'_> {
        Row {
            chances: &mut self.chances[q * self.models..(q + 1) * self.models],
            beside: &mut self.beside[q],
            missed: &mut self.missed[q],
        }
    }

    /// By model.
    pub(super) fn chances(&self, q: usize) -> &[f64] {
        &self.chances[q * self.models..(q + 1) * self.models]
    }

    pub(super) fn add(&mut self, other: &Self, share: f64) {
        let add = |to: &mut [f64], of: &[f64]| to.iter_mut().zip(of).for_each(|(a, b)| *a += share * b);
        add(&mut self.chances, &other.chances);
        add(&mut self.beside, &other.beside);
        add(&mut self.missed, &other.missed);
    }

    /// Mean probability of plans that ask for an answer which there is not.
    pub(super) fn missed(&self) -> f64 {
        self.missed.iter().sum::<f64>() / self.missed.len().max(1) as f64
    }

    /// Whether answers came from other than one call each.
    pub(super) fn composed(&self) -> bool {
        self.beside.iter().chain(&self.missed).any(|x| *x != 0.0)
    }

    /// Expected score of a query.
    pub(super) fn score(&self, matrix: &Matrix, q: usize) -> f64 {
        self.chances(q).iter().zip(matrix.scores(q)).map(|(p, s)| p * s).sum()
    }

    /// Expected cost of a query in USD.
    pub(super) fn cost(&self, matrix: &Matrix, q: usize) -> f64 {
        self.chances(q).iter().zip(matrix.costs(q)).map(|(p, c)| p * c).sum::<f64>() + self.beside[q]
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
    /// What each arm does if nothing eliminates a part of it.
    arms: BTreeMap<String, Plan>,
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
        let fleet: BTreeMap<String, ModelState> = columns.keys().map(|m| (m.clone(), state(m))).collect();
        let mut arms = BTreeMap::new();
        if !matrix.is_empty() {
            let context = Context { fleet: fleet.clone(), ..context(policy, 0) };
            for arm in policy.arms() {
                let plan = policy.pin(arm, &policy.initial_state(), &context).and_then(|decision| decision.plan);
                let bare = || policy.first_model(arm).map(|model| Plan::Call(CallSpec::bare(model)));
                arms.extend(plan.or_else(bare).map(|plan| (arm.to_owned(), plan)));
            }
        }
        Ok(Self { policy, matrix, columns, fleet, arms, context })
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
                self.put(&decision, step.1, walk.row(step.1))?;
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
            let models = self.matrix.models.len().max(1);
            let beside = walk.beside.par_chunks_mut(SHARE).zip(walk.missed.par_chunks_mut(SHARE));
            let rows = walk.chances.par_chunks_mut(SHARE * models).zip(beside);
            let parts = rows.zip(steps.par_chunks(SHARE)).map(|((chances, (beside, missed)), steps)| {
                let mut part = Reliability::default();
                let beside = beside.iter_mut().zip(missed);
                for ((chances, (beside, missed)), step) in chances.chunks_exact_mut(models).zip(beside).zip(steps) {
                    let (_, decision, expected) = self.decide(&state, step);
                    self.put(&decision, step.1, Row { chances, beside, missed })?;
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

    /// What comes of a plan for a query.
    fn outcome(&self, plan: &Plan, q: usize) -> Result<Came, String> {
        let Plan::Call(spec) = plan else { return over(plan, self.matrix, q) };
        let m = self.column(Some(&spec.model))?;
        Ok(Came {
            served: Some(m),
            score: self.matrix.scores(q)[m],
            cost_usd: self.matrix.costs(q)[m],
            latency_ms: self.matrix.latencies(q).map(|ms| ms[m]),
            calls: 1,
            missed: false,
        })
    }

    fn of_arm(&self, arm: &str, q: usize) -> Result<Came, String> {
        let plan = self.arms.get(arm).ok_or_else(|| format!("there are no outcomes of {arm}"))?;
        self.outcome(plan, q)
    }

    /// The models' probabilities.
    fn put(&self, decision: &Decision, q: usize, mut row: Row<'_>) -> Result<(), String> {
        let Some(plan) = &decision.plan else { return Ok(()) };
        let (taken, costs) = (self.outcome(plan, q)?, self.matrix.costs(q));
        if decision.decided_by != DecidedBy::Select {
            row.take(&taken, costs, 1.0);
            return Ok(());
        }
        for c in decision.candidates.iter().filter(|c| c.propensity > 0.0) {
            match c.arm == decision.arm {
                true => row.take(&taken, costs, c.propensity),
                false => row.take(&self.of_arm(&c.arm, q)?, costs, c.propensity),
            }
        }
        Ok(())
    }

    /// What was expected of each arm that could be taken, beside what its answer was worth.
    fn expect(&self, to: &mut Reliability, q: usize, decision: &Decision, expected: &[f64]) -> Result<(), String> {
        let Some(of) = self.policy.expects() else { return Ok(()) };
        for (c, expected) in decision.candidates.iter().zip(expected).filter(|(c, _)| c.eliminated.is_none()) {
            let came = self.of_arm(&c.arm, q)?;
            if came.missed {
                continue;
            }
            let came = match of {
                Expects::Quality => Some(came.score),
                Expects::Reward => self.policy.reward(&self.policy.outcome(came.score, came.cost_usd)),
            };
            came.into_iter().for_each(|came| to.take(*expected, came));
        }
        Ok(())
    }

    fn learn(&self, state: &mut State, q: usize, decision: &Decision, now: Micros) -> Result<(), String> {
        let Some(plan) = decision.plan.as_ref().filter(|_| decision.decided_by == DecidedBy::Select) else {
            return Ok(());
        };
        let came = self.outcome(plan, q)?;
        let reward = self.policy.reward(&self.policy.outcome(came.score, came.cost_usd)).filter(|_| !came.missed);
        let Some(reward) = reward else { return Ok(()) };
        let update = StateUpdate::of(decision, state.seq, reward, came.cost_usd, now);
        self.policy.fold(state, &update).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{Aggregate, Bound, Condition, Fleet, ModelCard, Price, Score, Stage},
        replay::matrix::Query,
    };

    fn call(model: &str) -> Plan {
        Plan::Call(CallSpec::bare(model))
    }

    #[test]
    fn plans_of_several_calls_are_walked_by_the_machine() {
        let query = |i: usize| Query { id: i.to_string(), task: String::new(), text: format!("question {i}") };
        let models = ["a", "b", "c"].map(str::to_owned).to_vec();
        let said = ["1", "2", "3", "4", "4", "5"].map(|text| Some(text.to_owned()));
        let (scores, costs) = (vec![0.0, 0.5, 1.0, 0.25, 0.0, 1.0], vec![0.001, 0.002, 0.1, 0.001, 0.002, 0.1]);
        let matrix = Matrix::of("made", models, (0..2).map(query).collect(), scores, costs).with_responses(&said);
        let card = |name: &str| ModelCard {
            name: name.to_owned(),
            tags: Vec::new(),
            context: 0,
            price: Price { input: 1.0, output: 1.0, cached_input: None },
            energy: None,
            capabilities: Default::default(),
        };
        let yaml = "policy: p\nmodels: {a: {name: a}, b: {name: b}, c: {name: c}}\n\
                    select: {arms: [a, b, c], weighted: {a: 1, b: 1, c: 2}}\n";
        let fleet = |_: &_| Fleet::new(["a", "b", "c"].map(card));
        let policy = crate::policy::check("p.yaml", yaml.as_bytes(), fleet).unwrap();
        let context = |_: &Policy, _: usize| Context::default();
        let way = Way::new(&policy, &matrix, &context, &BTreeSet::new()).unwrap();
        let agree = Condition::new(Score::Disagreement, Bound::Below(0.5));
        let two = Plan::Parallel { branches: vec![call("a"), call("b")], aggregate: Aggregate::Vote };
        let cascade = Plan::Cascade(vec![
            Stage { plan: two, accept_when: vec![agree], stop_early: false },
            Stage { plan: call("c"), accept_when: Vec::new(), stop_early: false },
        ]);
        let mut walk = Walk::new(2, 3);
        let (_, mut decision, _) = way.decide(&policy.initial_state(), &(0, 0, 7));
        decision.plan = Some(cascade);
        decision.decided_by = DecidedBy::Rule;
        for q in 0..2 {
            way.put(&decision, q, walk.row(q)).unwrap();
        }
        assert_eq!(walk.scores(&matrix), [1.0, 0.25]);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(walk.cost(&matrix, 0), 0.103);
        close(walk.cost(&matrix, 1), 0.003);
        assert!(walk.composed() && walk.missed() == 0.0);

        // A half of the probability is on the cascade, as the arm that was drawn; the rest are calls.
        decision.decided_by = DecidedBy::Select;
        decision.arm = "c".to_owned();
        let mut walk = Walk::new(2, 3);
        way.put(&decision, 0, walk.row(0)).unwrap();
        close(walk.score(&matrix, 0), 0.25 * 0.0 + 0.25 * 0.5 + 0.5 * 1.0);
        close(walk.cost(&matrix, 0), 0.25 * 0.001 + 0.25 * 0.002 + 0.5 * 0.103);

        decision.decided_by = DecidedBy::Rule;
        decision.plan = Some(Plan::Parallel { branches: vec![call("a"); 3], aggregate: Aggregate::Vote });
        let mut walk = Walk::new(2, 3);
        way.put(&decision, 0, walk.row(0)).unwrap();
        assert_eq!((walk.missed(), walk.score(&matrix, 0)), (0.5, 0.0), "of two queries");
        close(walk.cost(&matrix, 0), 0.001);
    }
}
