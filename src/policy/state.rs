//! What a policy has learnt: a fold over a totally ordered log of updates. `A` and `b` are kept, never the inverse; what
//! decisions need of them (a Cholesky factor, the coefficients) is derived in a fixed order after each update and after
//! each load, so a state that went through JSON decides the same bytes.
//!
//! Forgetting counts from the newest decision among the folded updates of *any* arm, not from the wall clock: an arm that
//! is no longer pulled loses its certainty as the others learn, and between two updates a decision is a pure function of
//! the published state. With a sliding window the newest updates are kept, and sums are taken anew from them, so that
//! nothing is left of what has gone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::{
    linalg,
    select::linear::{Linear, Prior},
};
use crate::domain::{Hash, Micros, StateUpdate};

/// A policy's learnt state after `seq` updates. Immutable once published; `Policy::fold` makes the next one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct State {
    /// Number of updates folded in.
    pub seq: u64,
    /// The policy that learnt this.
    pub policy_hash: Hash,
    /// Length of feature vectors; 0 for a policy that does not learn.
    pub(super) dimensions: usize,
    pub(super) ridge: Ridge,
    /// The newest decision among the folded updates: forgetting counts up to here.
    pub(super) clock: Micros,
    /// Pacing's price, in reward per target cost.
    pub(super) price: f64,
    pub(super) arms: BTreeMap<String, Learnt>,
    /// With a sliding window: the newest updates, oldest first.
    recent: VecDeque<Remembered>,
}

/// What is known of one arm.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Learnt {
    /// Rewarded pulls, within the window where there is one; they do not decay.
    pub pulls: u64,
    /// When the newest of them was decided.
    pub decided: Micros,
    /// Weighted sum of x xᵀ, packed, without the ridge.
    pub a: Vec<f64>,
    /// Weighted sum of r x.
    pub b: Vec<f64>,
    /// Weighted number of observations, and weighted sum of their costs in USD.
    weight: f64,
    cost: f64,
    fit: Option<Fit>,
}

/// An update within the window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    arm: String,
    features: Vec<f64>,
    reward: f64,
    cost_usd: f64,
    decided: Micros,
}

/// Regularisation of an arm's regression: λ of the constant, and of every other feature.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredRidge")]
pub(super) struct Ridge {
    pub constant: f64,
    pub features: f64,
}

/// States of earlier versions have one number for both.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredRidge {
    One(f64),
    Two { constant: f64, features: f64 },
}

impl From<StoredRidge> for Ridge {
    fn from(stored: StoredRidge) -> Self {
        match stored {
            StoredRidge::One(both) => Ridge { constant: both, features: both },
            StoredRidge::Two { constant, features } => Ridge { constant, features },
        }
    }
}

impl Ridge {
    /// λ of feature `i`.
    pub fn of(&self, i: usize) -> f64 {
        if i == 0 { self.constant } else { self.features }
    }

    /// sqrt(xᵀ Λ⁻¹ x): how little is known at x of an arm that was never pulled.
    pub fn width(&self, x: &[f64]) -> f64 {
        let (constant, rest) = x.split_at(x.len().min(1));
        (linalg::dot(constant, constant) / self.constant + linalg::dot(rest, rest) / self.features).sqrt()
    }
}

/// Derived from `a`, `b` and the ridge alone.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fit {
    /// Lower Cholesky factor of A + Λ, packed; Λ is the ridge, a diagonal.
    pub l: Vec<f64>,
    /// (A + Λ)⁻¹ b.
    pub theta: Vec<f64>,
}

/// The form that is stored: no derived values.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    seq: u64,
    policy_hash: Hash,
    dimensions: usize,
    ridge: Ridge,
    clock: Micros,
    #[serde(default, skip_serializing_if = "is_zero")]
    price: f64,
    arms: BTreeMap<String, StoredArm>,
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    recent: VecDeque<Remembered>,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredArm {
    pulls: u64,
    decided: Micros,
    a: Vec<f64>,
    b: Vec<f64>,
    #[serde(default, skip_serializing_if = "is_zero")]
    weight: f64,
    #[serde(default, skip_serializing_if = "is_zero")]
    cost: f64,
}

fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

impl From<Stored> for State {
    fn from(s: Stored) -> Self {
        let arms = s
            .arms
            .into_iter()
            .map(|(name, arm)| {
                let StoredArm { pulls, decided, a, b, weight, cost } = arm;
                let mut arm = Learnt { pulls, decided, a, b, weight, cost, fit: None };
                arm.refit(s.dimensions, s.ridge);
                (name, arm)
            })
            .collect();
        State {
            seq: s.seq,
            policy_hash: s.policy_hash,
            dimensions: s.dimensions,
            ridge: s.ridge,
            clock: s.clock,
            price: s.price,
            arms,
            recent: s.recent,
        }
    }
}

impl From<State> for Stored {
    fn from(s: State) -> Self {
        let arms = s
            .arms
            .into_iter()
            .map(|(name, arm)| {
                let Learnt { pulls, decided, a, b, weight, cost, .. } = arm;
                (name, StoredArm { pulls, decided, a, b, weight, cost })
            })
            .collect();
        Stored {
            seq: s.seq,
            policy_hash: s.policy_hash,
            dimensions: s.dimensions,
            ridge: s.ridge,
            clock: s.clock,
            price: s.price,
            arms,
            recent: s.recent,
        }
    }
}

impl Learnt {
    /// Before the first pull: nothing, or what a fit said beforehand.
    fn new(dimensions: usize, prior: Option<&Prior>) -> Self {
        match prior {
            Some(p) => Learnt {
                pulls: p.pulls,
                decided: 0,
                a: p.a.clone(),
                b: p.b.clone(),
                weight: p.pulls as f64,
                cost: p.cost,
                fit: None,
            },
            None => Learnt {
                pulls: 0,
                decided: 0,
                a: vec![0.0; linalg::packed_len(dimensions)],
                b: vec![0.0; dimensions],
                weight: 0.0,
                cost: 0.0,
                fit: None,
            },
        }
    }

    /// The derived values; `None` before the first pull, or where the numbers have overflowed.
    pub fn fit(&self) -> Option<&Fit> {
        self.fit.as_ref()
    }

    /// Mean cost of a pull in USD; 0 where none is known.
    pub fn mean_cost(&self) -> f64 {
        if self.weight > 0.0 { self.cost / self.weight } else { 0.0 }
    }

    fn refit(&mut self, dimensions: usize, ridge: Ridge) {
        self.fit = None;
        if self.pulls == 0 || self.a.len() != linalg::packed_len(dimensions) || self.b.len() != dimensions {
            return;
        }
        self.fit = linalg::cholesky(&self.a, dimensions, |i| ridge.of(i)).map(|l| {
            let theta = linalg::solve(&l, &self.b);
            Fit { l, theta }
        });
    }

    fn scale(&mut self, by: f64) {
        self.a.iter_mut().chain(&mut self.b).for_each(|v| *v *= by);
        self.weight *= by;
        self.cost *= by;
    }

    fn add(&mut self, features: &[f64], reward: f64, cost: f64, decided: Micros, weight: f64) {
        linalg::rank_one(&mut self.a, features, weight);
        let wr = weight * reward;
        for (b, x) in self.b.iter_mut().zip(features) {
            *b += wr * x;
        }
        self.weight += weight;
        self.cost += weight * cost;
        self.pulls += 1;
        self.decided = self.decided.max(decided);
    }
}

/// Why an update cannot be folded. The state is unchanged then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FoldError {
    /// Updates have one order, without gaps.
    #[error("update {got} cannot follow a state of {state} updates; {} is next", state + 1)]
    OutOfOrder { state: u64, got: u64 },
    /// The update belongs to another policy.
    #[error("the update is of policy {got}, the state of {state}")]
    OtherPolicy { state: Hash, got: Hash },
    /// The policy has no such arm.
    #[error("the policy has no arm `{0}`")]
    UnknownArm(String),
    /// The features are not those of this policy.
    #[error("the update has {got} features, the policy {expected}")]
    Features { expected: usize, got: usize },
    /// A feature or the reward is infinite or not a number.
    #[error("the update of arm `{0}` holds a number that is not finite")]
    NotFinite(String),
    /// A state that was given does not fit the policy.
    #[error("the given state does not fit: {0}")]
    Given(String),
    /// The selector does not learn.
    #[error("this policy does not learn")]
    DoesNotLearn,
}

impl FoldError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            FoldError::OutOfOrder { .. } => "out_of_order",
            FoldError::OtherPolicy { .. } => "other_policy",
            FoldError::UnknownArm(_) => "unknown_arm",
            FoldError::Features { .. } => "features",
            FoldError::NotFinite(_) => "not_finite",
            FoldError::Given(_) => "given",
            FoldError::DoesNotLearn => "does_not_learn",
        }
    }
}

impl State {
    pub(super) fn empty(policy_hash: Hash, dimensions: usize, ridge: Ridge) -> Self {
        State {
            seq: 0,
            policy_hash,
            dimensions,
            ridge,
            clock: 0,
            price: 0.0,
            arms: BTreeMap::new(),
            recent: VecDeque::new(),
        }
    }

    /// The state before the first update: what a warm start knows, else nothing.
    pub(super) fn initial(policy_hash: Hash, linear: &Linear) -> Self {
        let (dimensions, ridge) = (linear.features.dimensions(), linear.ridge);
        let mut state = Self::empty(policy_hash, dimensions, ridge);
        for (name, prior) in &linear.prior {
            let mut arm = Learnt::new(dimensions, Some(prior));
            arm.refit(dimensions, ridge);
            state.arms.insert(name.clone(), arm);
        }
        state
    }

    /// Folds in one update: forget up to it, then add w x xᵀ and w r x, with w below 1 for an update that is older than
    /// the newest one.
    pub(super) fn fold(&mut self, update: &StateUpdate, linear: &Linear) -> Result<(), FoldError> {
        if update.policy_hash != self.policy_hash {
            return Err(FoldError::OtherPolicy { state: self.policy_hash, got: update.policy_hash });
        }
        if update.seq != self.seq + 1 {
            return Err(FoldError::OutOfOrder { state: self.seq, got: update.seq });
        }
        if let Some(given) = &update.set {
            let given = State::deserialize(&**given).map_err(|e| FoldError::Given(e.to_string()))?;
            *self = State { seq: update.seq, ..given.carried(self)? };
            return Ok(());
        }
        if update.features.len() != self.dimensions {
            return Err(FoldError::Features { expected: self.dimensions, got: update.features.len() });
        }
        let finite = |x: &f64| x.is_finite();
        if !(finite(&update.reward) && finite(&update.cost_usd) && update.features.iter().all(finite)) {
            return Err(FoldError::NotFinite(update.arm.clone()));
        }
        let mut weight = 1.0;
        let mut stale = BTreeSet::from([update.arm.clone()]);
        if let Some(half_life) = linear.half_life
            && self.seq > 0
        {
            let halves = |us: Micros| libm::exp2(-(us as f64) / half_life as f64);
            if update.decided > self.clock {
                let by = halves(update.decided - self.clock);
                self.arms.values_mut().for_each(|arm| arm.scale(by));
                stale.extend(self.arms.keys().cloned());
            } else {
                weight = halves(self.clock - update.decided);
            }
        }
        self.clock = if self.seq == 0 { update.decided } else { self.clock.max(update.decided) };
        let (dimensions, ridge) = (self.dimensions, self.ridge);
        let prior = linear.prior.get(&update.arm);
        let arm = self.arms.entry(update.arm.clone()).or_insert_with(|| Learnt::new(dimensions, prior));
        arm.add(&update.features, update.reward, update.cost_usd, update.decided, weight);
        if let Some(window) = linear.window {
            self.recent.push_back(Remembered {
                arm: update.arm.clone(),
                features: update.features.clone(),
                reward: update.reward,
                cost_usd: update.cost_usd,
                decided: update.decided,
            });
            while self.recent.len() > window
                && let Some(gone) = self.recent.pop_front()
            {
                self.rebuild(&gone.arm, linear);
                stale.insert(gone.arm);
            }
        }
        for name in &stale {
            if let Some(arm) = self.arms.get_mut(name) {
                arm.refit(dimensions, ridge);
            }
        }
        if let Some(pacing) = linear.pacing {
            let excess = update.cost_usd / pacing.usd_per_request - 1.0;
            self.price = (self.price + pacing.step * excess).clamp(0.0, pacing.limit);
        }
        self.seq += 1;
        Ok(())
    }

    /// This state as one of the policy that `of` belongs to, at its sequence number. What was learnt under other parameters
    /// is as true under these; only the features must be the same.
    ///
    /// # Errors
    /// When the features' number differs, or the sums are not whole.
    pub(super) fn carried(mut self, of: &State) -> Result<State, FoldError> {
        let wrong = |what: String| Err(FoldError::Given(what));
        if self.dimensions != of.dimensions {
            return wrong(format!("it has {} features, the policy {}", self.dimensions, of.dimensions));
        }
        let packed = linalg::packed_len(of.dimensions);
        for (name, arm) in &mut self.arms {
            let finite = arm.a.iter().chain(&arm.b).chain([&arm.weight, &arm.cost]).all(|x| x.is_finite());
            if arm.a.len() != packed || arm.b.len() != of.dimensions || !finite {
                return wrong(format!("what it says of `{name}` is not whole"));
            }
            arm.refit(of.dimensions, of.ridge);
        }
        if self.recent.iter().any(|r| r.features.len() != of.dimensions) {
            return wrong("an observation in its window is not whole".to_owned());
        }
        Ok(State { seq: of.seq, policy_hash: of.policy_hash, ridge: of.ridge, ..self })
    }

    /// Takes an arm's sums anew from its prior and the updates within the window.
    fn rebuild(&mut self, name: &str, linear: &Linear) {
        let mut arm = Learnt::new(self.dimensions, linear.prior.get(name));
        for r in self.recent.iter().filter(|r| r.arm == name) {
            arm.add(&r.features, r.reward, r.cost_usd, r.decided, 1.0);
        }
        self.arms.insert(name.to_owned(), arm);
    }

    /// Rewarded pulls per arm, for listings.
    pub fn pulls(&self) -> BTreeMap<&str, u64> {
        self.arms.iter().map(|(name, arm)| (name.as_str(), arm.pulls)).collect()
    }
}
