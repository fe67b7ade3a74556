//! What a policy has learnt: a fold over a totally ordered log of updates. `A` and `b` are kept, never the inverse; what
//! decisions need of them (a Cholesky factor, the coefficients) is derived in a fixed order after each update and after
//! each load, so a state that went through JSON decides the same bytes.
//!
//! Forgetting counts from the newest decision among the folded updates of *any* arm, not from the wall clock: an arm that
//! is no longer pulled loses its certainty as the others learn, and between two updates a decision is a pure function of
//! the published state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::linalg;
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
    pub(super) ridge: f64,
    /// The newest decision among the folded updates: forgetting counts up to here.
    pub(super) clock: Micros,
    pub(super) arms: BTreeMap<String, Arm>,
}

/// What is known of one arm.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Arm {
    /// Rewarded pulls; never decays.
    pub pulls: u64,
    /// When the newest of them was decided.
    pub decided: Micros,
    /// Weighted sum of x xᵀ, packed, without the ridge.
    pub a: Vec<f64>,
    /// Weighted sum of r x.
    pub b: Vec<f64>,
    fit: Option<Fit>,
}

/// Derived from `a`, `b` and the ridge alone.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fit {
    /// Lower Cholesky factor of A + ridge I, packed.
    pub l: Vec<f64>,
    /// (A + ridge I)⁻¹ b.
    pub theta: Vec<f64>,
}

/// The form that is stored: no derived values.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    seq: u64,
    policy_hash: Hash,
    dimensions: usize,
    ridge: f64,
    clock: Micros,
    arms: BTreeMap<String, StoredArm>,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredArm {
    pulls: u64,
    decided: Micros,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl From<Stored> for State {
    fn from(s: Stored) -> Self {
        let arms = s
            .arms
            .into_iter()
            .map(|(name, arm)| {
                let mut arm = Arm { pulls: arm.pulls, decided: arm.decided, a: arm.a, b: arm.b, fit: None };
                arm.refit(s.dimensions, s.ridge);
                (name, arm)
            })
            .collect();
        State { seq: s.seq, policy_hash: s.policy_hash, dimensions: s.dimensions, ridge: s.ridge, clock: s.clock, arms }
    }
}

impl From<State> for Stored {
    fn from(s: State) -> Self {
        let arms = s
            .arms
            .into_iter()
            .map(|(name, arm)| (name, StoredArm { pulls: arm.pulls, decided: arm.decided, a: arm.a, b: arm.b }))
            .collect();
        Stored {
            seq: s.seq,
            policy_hash: s.policy_hash,
            dimensions: s.dimensions,
            ridge: s.ridge,
            clock: s.clock,
            arms,
        }
    }
}

impl Arm {
    fn new(dimensions: usize) -> Self {
        Arm { pulls: 0, decided: 0, a: vec![0.0; linalg::packed_len(dimensions)], b: vec![0.0; dimensions], fit: None }
    }

    /// The derived values; `None` before the first pull, or where the numbers have overflowed.
    pub fn fit(&self) -> Option<&Fit> {
        self.fit.as_ref()
    }

    fn refit(&mut self, dimensions: usize, ridge: f64) {
        self.fit = None;
        if self.pulls == 0 || self.a.len() != linalg::packed_len(dimensions) || self.b.len() != dimensions {
            return;
        }
        self.fit = linalg::cholesky(&self.a, dimensions, ridge).map(|l| {
            let theta = linalg::solve(&l, &self.b);
            Fit { l, theta }
        });
    }

    fn scale(&mut self, by: f64) {
        self.a.iter_mut().chain(&mut self.b).for_each(|v| *v *= by);
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
            FoldError::DoesNotLearn => "does_not_learn",
        }
    }
}

impl State {
    pub(super) fn empty(policy_hash: Hash, dimensions: usize, ridge: f64) -> Self {
        State { seq: 0, policy_hash, dimensions, ridge, clock: 0, arms: BTreeMap::new() }
    }

    /// Folds in one update: forget up to it, then add w x xᵀ and w r x, with w below 1 for an update that is older than
    /// the newest one.
    pub(super) fn fold(&mut self, update: &StateUpdate, half_life: Option<Micros>) -> Result<(), FoldError> {
        if update.policy_hash != self.policy_hash {
            return Err(FoldError::OtherPolicy { state: self.policy_hash, got: update.policy_hash });
        }
        if update.seq != self.seq + 1 {
            return Err(FoldError::OutOfOrder { state: self.seq, got: update.seq });
        }
        if update.features.len() != self.dimensions {
            return Err(FoldError::Features { expected: self.dimensions, got: update.features.len() });
        }
        if !update.reward.is_finite() || update.features.iter().any(|x| !x.is_finite()) {
            return Err(FoldError::NotFinite(update.arm.clone()));
        }
        let mut weight = 1.0;
        let mut forgot = false;
        if let Some(half_life) = half_life
            && self.seq > 0
        {
            let halves = |us: Micros| libm::exp2(-(us as f64) / half_life as f64);
            if update.decided > self.clock {
                let by = halves(update.decided - self.clock);
                self.arms.values_mut().for_each(|arm| arm.scale(by));
                forgot = true;
            } else {
                weight = halves(self.clock - update.decided);
            }
        }
        self.clock = if self.seq == 0 { update.decided } else { self.clock.max(update.decided) };
        let (dimensions, ridge) = (self.dimensions, self.ridge);
        let arm = self.arms.entry(update.arm.clone()).or_insert_with(|| Arm::new(dimensions));
        linalg::rank_one(&mut arm.a, &update.features, weight);
        let wr = weight * update.reward;
        for (b, x) in arm.b.iter_mut().zip(&update.features) {
            *b += wr * x;
        }
        arm.pulls += 1;
        arm.decided = arm.decided.max(update.decided);
        match forgot {
            true => self.arms.values_mut().for_each(|arm| arm.refit(dimensions, ridge)),
            false => arm.refit(dimensions, ridge),
        }
        self.seq += 1;
        Ok(())
    }

    /// Rewarded pulls per arm, for listings.
    pub fn pulls(&self) -> BTreeMap<&str, u64> {
        self.arms.iter().map(|(name, arm)| (name.as_str(), arm.pulls)).collect()
    }
}
