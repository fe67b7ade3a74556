//! `similarity`: the arm of the nearest example set that is near enough, else the default.

use super::{Situation, Weighed};

/// An example set and what it stands for.
#[derive(Debug)]
pub(in crate::policy) struct Set {
    pub name: String,
    /// Place in `arms`.
    pub arm: usize,
    /// Least cosine that counts as near.
    pub above: f64,
}

/// Sets in name order, so that of two equally near the first by name wins.
#[derive(Debug)]
pub(in crate::policy) struct Similarity {
    pub sets: Vec<Set>,
    pub default: usize,
}

impl Similarity {
    /// An arm's score is the greatest cosine of its sets. A set whose arm cannot serve is passed over.
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        let mut scores: Vec<Option<f64>> = vec![None; s.arms.len()];
        let mut best: Option<(f64, usize)> = None;
        for set in &self.sets {
            let cosine = s.context.signals.similarity.get(&set.name).copied().unwrap_or(-1.0);
            if scores[set.arm].is_none_or(|before| before < cosine) {
                scores[set.arm] = Some(cosine);
            }
            if s.alive[set.arm] && cosine >= set.above && best.is_none_or(|(before, _)| before < cosine) {
                best = Some((cosine, set.arm));
            }
        }
        let arm = best.map_or(self.default, |(_, arm)| arm);
        let mass = (0..s.arms.len()).map(|i| if i == arm && s.alive[i] { 1.0 } else { 0.0 }).collect();
        Weighed { mass, scores, ..Weighed::default() }
    }
}
