//! `linucb`: disjoint LinUCB (Li, Chu, Langford, Schapire, "A contextual-bandit approach to personalized news article
//! recommendation", WWW 2010). Per arm a ridge regression; the score is the upper bound
//! θ·x + α sqrt(xᵀ (A + λI)⁻¹ x), with the bonus through a Cholesky factor: |L⁻¹ x|.
//!
//! **The trap of untried arms.** A cold arm's bound is α|x|/sqrt(λ). Where that lies below what a tried arm already
//! earns, the cold arm is *never* taken, and an arm added online stays unknown for good. So pulls are forced, as a step
//! from probabilities to probabilities: of K arms that can serve, each with fewer than `min_pulls` rewarded pulls gets
//! 1/K, its fair share; the rest goes to the greedy choice among the tried ones.
//!
//! Only *rewarded* pulls count, and rewards come late. A step that gave cold arms everything would send all traffic to
//! an unknown model for as long as feedback takes; with fair shares a cold start explores evenly, a new arm among K gets
//! 1/K until enough feedback is in, and where feedback never comes the damage is bounded by that share.

use super::{Situation, Weighed};
use crate::{
    domain::Micros,
    policy::{features::Features, linalg},
};

/// Parameters, with defaults filled in.
#[derive(Debug)]
pub(in crate::policy) struct LinUcb {
    pub alpha: f64,
    pub ridge: f64,
    pub half_life: Option<Micros>,
    pub min_pulls: u64,
    pub features: Features,
}

impl LinUcb {
    /// A one-hot mixture: fair shares for cold arms, the rest for the greatest bound, ties to the first.
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        let x = self.features.vector(s.context);
        let cold_bonus = self.alpha * linalg::dot(&x, &x).sqrt() / self.ridge.sqrt();
        let mut z = vec![0.0; x.len()];
        let known = s.state.dimensions == x.len();
        let mut scores = Vec::with_capacity(s.arms.len());
        let mut mass = vec![0.0; s.arms.len()];
        let mut best: Option<(f64, usize)> = None;
        let (mut alive, mut cold) = (0u32, 0u32);
        for (i, name) in s.arms.iter().enumerate() {
            let arm = s.state.arms.get(name).filter(|_| known);
            let score = match arm.and_then(|a| a.fit()) {
                Some(fit) => {
                    linalg::forward(&fit.l, &x, &mut z);
                    linalg::dot(&fit.theta, &x) + self.alpha * linalg::dot(&z, &z).sqrt()
                }
                None => cold_bonus,
            };
            scores.push(Some(score));
            if !s.alive[i] {
                continue;
            }
            alive += 1;
            if arm.map_or(0, |a| a.pulls) < self.min_pulls {
                cold += 1;
                mass[i] = 1.0;
            } else if best.is_none_or(|(before, _)| score > before) {
                best = Some((score, i));
            }
        }
        // In units of 1/K: each cold arm has 1, the greedy one all that is left.
        if let Some((_, i)) = best {
            mass[i] = f64::from(alive - cold);
        }
        Weighed { mass, scores, features: x }
    }
}
