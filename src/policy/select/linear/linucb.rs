//! `linucb`: disjoint LinUCB (Li, Chu, Langford, Schapire, "A contextual-bandit approach to personalized news article
//! recommendation", WWW 2010). The score is the upper bound θ·x + α sqrt(xᵀ (A + Λ)⁻¹ x); the tried arm with the
//! greatest bound has all the mass.

use super::{Belief, greedy};

/// Parameters, with defaults filled in.
#[derive(Debug)]
pub(in crate::policy) struct LinUcb {
    /// Width of the confidence bound, in standard errors.
    pub alpha: f64,
}

impl LinUcb {
    pub fn score(&self, belief: &Belief) -> f64 {
        belief.mean + self.alpha * belief.width
    }

    pub fn shares(&self, beliefs: &[Belief]) -> Vec<f64> {
        greedy(beliefs, |b| self.score(b) - b.price)
    }
}
