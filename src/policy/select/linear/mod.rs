//! Selectors that learn online: per arm a ridge regression of the reward on the request's features (the state), and a
//! rule that turns what is known of the arms into probabilities: [`linucb`], [`thompson`], [`epsilon_greedy`].
//!
//! **Contexts as evidence allows.** The constant has its own, weaker ridge: with one λ for all, a handful of pulls fits a
//! dozen coefficients to noise, and the arm pays for it in regret for thousands of requests. With a stronger λ on all
//! other features an arm begins as one without context, and its coefficients grow as there is evidence for them (partial
//! pooling; Gelman, Hill, "Data analysis using regression and multilevel/hierarchical models", 2006, section 12). Measured
//! in eval/bandits.md.
//!
//! **The trap of untried arms.** A cold arm's LinUCB bound is α sqrt(xᵀ Λ⁻¹ x). Where that lies below what a tried arm
//! already earns, the cold arm is *never* taken, and an arm added online stays unknown for good. So pulls are forced, as a
//! step from probabilities to probabilities: of K arms that can serve, each with fewer than `min_pulls` rewarded pulls
//! gets 1/K, its fair share; the rest is divided among the tried ones by the rule.
//!
//! Only *rewarded* pulls count, and rewards come late. A step that gave cold arms everything would send all traffic to
//! an unknown model for as long as feedback takes; with fair shares a cold start explores evenly, a new arm among K gets
//! 1/K until enough feedback is in, and where feedback never comes the damage is bounded by that share.
//!
//! **Pacing** (Badanidiyuru, Kleinberg, Slivkins, "Bandits with knapsacks", FOCS 2013; the dual step as in Balseiro, Gur,
//! "Learning in repeated auctions with budgets", Management Science 2019): a price per dollar rises while requests cost
//! more than the target and falls while they cost less; an arm's score pays for its mean cost at that price.

pub(in crate::policy) mod epsilon_greedy;
pub(in crate::policy) mod linucb;
pub(in crate::policy) mod thompson;

use std::collections::BTreeMap;

use self::{epsilon_greedy::EpsilonGreedy, linucb::LinUcb, thompson::Thompson};
use super::{Situation, Weighed};
use crate::{
    domain::Micros,
    policy::{
        Artifact,
        artifact::ArtifactError,
        features::Features,
        linalg,
        state::{Learnt, Ridge},
    },
};

/// From beliefs to probabilities.
#[derive(Debug)]
pub(in crate::policy) enum Rule {
    LinUcb(LinUcb),
    Thompson(Thompson),
    EpsilonGreedy(EpsilonGreedy),
}

/// Keeps what requests cost near a target, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::policy) struct Pacing {
    /// Target of the mean cost per request, in USD.
    pub usd_per_request: f64,
    /// Change of the price per update, per relative excess.
    pub step: f64,
    /// Greatest price, in reward per target cost.
    pub limit: f64,
}

/// What an offline fit says of an arm, counted as observations.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::policy) struct Prior {
    /// Observations that it counts as.
    pub pulls: u64,
    /// Sum of x xᵀ, packed.
    pub a: Vec<f64>,
    /// Sum of r x.
    pub b: Vec<f64>,
    /// Sum of cost in USD.
    pub cost: f64,
}

impl Prior {
    /// Per model of an artifact that `weir policy fit --warm-start` wrote: its sums, as if they were of `pulls` requests.
    ///
    /// # Errors
    /// When the tensors are not of `dimensions` features.
    pub fn of(artifact: &Artifact, dimensions: usize, pulls: u32) -> Result<Vec<Self>, ArtifactError> {
        let models = artifact.card.models.len();
        let a = artifact.tensor("bandit.a", &[linalg::packed_len(dimensions)])?;
        let b = artifact.tensor("bandit.b", &[models, dimensions])?;
        let cost = artifact.tensor("bandit.cost", &[models])?;
        // The artifact has means over its queries.
        let scaled = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x) * f64::from(pulls)).collect() };
        let rows = b.data.chunks_exact(dimensions.max(1)).zip(scaled(&cost.data));
        Ok(rows.map(|(b, cost)| Prior { pulls: u64::from(pulls), a: scaled(&a.data), b: scaled(b), cost }).collect())
    }
}

/// A learning selector's parameters, with defaults filled in.
#[derive(Debug)]
pub(in crate::policy) struct Linear {
    pub rule: Rule,
    pub ridge: Ridge,
    pub half_life: Option<Micros>,
    /// Only this many of the newest updates count.
    pub window: Option<usize>,
    pub min_pulls: u64,
    pub pacing: Option<Pacing>,
    /// Warm start: by arm.
    pub prior: BTreeMap<String, Prior>,
    pub features: Features,
}

/// An arm at one context.
#[derive(Clone, Copy, Debug)]
pub(in crate::policy) struct Belief {
    /// Expected reward θ·x.
    pub mean: f64,
    /// sqrt(xᵀ (A + Λ)⁻¹ x).
    pub width: f64,
    /// What pacing takes off the score.
    pub price: f64,
}

impl Linear {
    /// A mixture: fair shares for cold arms, the rest by the rule among the tried ones.
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        let x = self.features.vector(s.context);
        let unknown = Belief { mean: 0.0, width: self.ridge.width(&x), price: 0.0 };
        let mut z = vec![0.0; x.len()];
        let known = s.state.dimensions == x.len();
        let mut scores = Vec::with_capacity(s.arms.len());
        let mut expected = Vec::with_capacity(s.arms.len());
        let mut mass = vec![0.0; s.arms.len()];
        let (mut tried, mut beliefs) = (Vec::new(), Vec::new());
        let (mut alive, mut cold) = (0u32, 0u32);
        for (i, name) in s.arms.iter().enumerate() {
            let arm = s.state.arms.get(name).filter(|_| known);
            let belief = arm.and_then(|a| Some((a, a.fit()?))).map(|(arm, fit)| {
                linalg::forward(&fit.l, &x, &mut z);
                Belief {
                    mean: linalg::dot(&fit.theta, &x),
                    width: linalg::dot(&z, &z).sqrt(),
                    price: self.price(s.state.price, arm),
                }
            });
            expected.push(belief.map_or(f64::NAN, |b| b.mean));
            scores.push(Some(self.score(belief.as_ref().unwrap_or(&unknown))));
            if !s.alive[i] {
                continue;
            }
            alive += 1;
            match belief {
                Some(belief) if arm.map_or(0, |a| a.pulls) >= self.min_pulls => {
                    tried.push(i);
                    beliefs.push(belief);
                }
                // With `min_pulls: 0` an arm is left to its bound from the start.
                None if self.min_pulls == 0 => {
                    tried.push(i);
                    beliefs.push(unknown);
                }
                _ => {
                    cold += 1;
                    mass[i] = 1.0;
                }
            }
        }
        // In units of 1/K: each cold arm has 1, the tried ones share all that is left.
        if !tried.is_empty() {
            let rest = f64::from(alive - cold);
            for (i, share) in tried.into_iter().zip(self.shares(&beliefs, s.state.seq)) {
                mass[i] = rest * share;
            }
        }
        Weighed { mass, scores, features: x, expected }
    }

    fn score(&self, belief: &Belief) -> f64 {
        let score = match &self.rule {
            Rule::LinUcb(rule) => rule.score(belief),
            Rule::Thompson(_) | Rule::EpsilonGreedy(_) => belief.mean,
        };
        score - belief.price
    }

    fn shares(&self, beliefs: &[Belief], updates: u64) -> Vec<f64> {
        match &self.rule {
            Rule::LinUcb(rule) => rule.shares(beliefs),
            Rule::Thompson(rule) => rule.shares(beliefs),
            Rule::EpsilonGreedy(rule) => rule.shares(beliefs, updates),
        }
    }

    fn price(&self, price: f64, arm: &Learnt) -> f64 {
        match self.pacing {
            Some(pacing) if price > 0.0 => price * (arm.mean_cost() / pacing.usd_per_request),
            _ => 0.0,
        }
    }
}

/// All for the greatest score, ties to the first.
fn greedy(beliefs: &[Belief], score: impl Fn(&Belief) -> f64) -> Vec<f64> {
    let mut best: Option<(f64, usize)> = None;
    for (i, belief) in beliefs.iter().enumerate() {
        let score = score(belief);
        if best.is_none_or(|(before, _)| score > before) {
            best = Some((score, i));
        }
    }
    (0..beliefs.len()).map(|i| if best.is_some_and(|(_, b)| b == i) { 1.0 } else { 0.0 }).collect()
}
