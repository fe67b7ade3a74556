//! `static`: one arm, or fixed weights.

use super::{Situation, Weighed};

/// Weights per arm, in the order of `arms`; not negative, not all 0.
#[derive(Debug)]
pub(in crate::policy) struct Fixed {
    pub weights: Vec<f64>,
}

impl Fixed {
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        let mass = self.weights.iter().zip(s.alive).map(|(w, alive)| if *alive { *w } else { 0.0 }).collect();
        Weighed { mass, scores: vec![None; self.weights.len()], ..Weighed::default() }
    }

    /// Whether one arm has all the weight.
    pub fn is_one_arm(&self) -> bool {
        self.weights.iter().filter(|w| **w > 0.0).count() == 1
    }
}
