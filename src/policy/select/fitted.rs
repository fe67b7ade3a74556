//! Selectors fitted offline: `ridge`, `logistic`, `kernel`, `knn`, `clusters`, `graph`, `ensemble`. The artifact predicts
//! quality and cost of each of its models; the score is quality - cost_weight x cost / cost_scale. Without a temperature
//! the greatest score has all the mass, with one an arm has exp(score / temperature).

use super::{Situation, Weighed};
use crate::policy::{
    features::query_feature,
    predict::{Predictor, Seen},
};

/// A predictor and how its predictions are weighed.
#[derive(Debug)]
pub(in crate::policy) struct Fitted {
    pub predictor: Predictor,
    /// Names of the query features that the artifact was fitted with.
    pub features: Vec<String>,
    /// Per arm, the place of its model in the artifact.
    pub models: Vec<usize>,
    pub cost_weight: f64,
    pub cost_scale: f64,
    pub temperature: f64,
}

impl Fitted {
    /// The recorded features are the query features, without the embedding, which is recorded already.
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        let signals = &s.context.signals;
        let features: Vec<f64> = self.features.iter().map(|name| query_feature(name, signals).unwrap_or(0.0)).collect();
        let embedding = s.context.embedding.as_ref().map_or(&[][..], |e| &e.vector);
        let prediction = self.predictor.predict(&Seen { embedding, features: &features });
        let score = |m: &usize| prediction.quality[*m] - self.cost_weight * (prediction.cost[*m] / self.cost_scale);
        let scores: Vec<f64> = self.models.iter().map(score).collect();
        let mut top: Option<(f64, usize)> = None;
        for (i, score) in scores.iter().enumerate().filter(|(i, _)| s.alive[*i]) {
            if top.is_none_or(|(before, _)| *score > before) {
                top = Some((*score, i));
            }
        }
        let mass = scores.iter().enumerate().map(|(i, score)| match top {
            Some((best, _)) if self.temperature > 0.0 && s.alive[i] => libm::exp((score - best) / self.temperature),
            Some((_, best)) if self.temperature == 0.0 && i == best => 1.0,
            _ => 0.0,
        });
        let expected = self.models.iter().map(|m| prediction.quality[*m]).collect();
        Weighed { mass: mass.collect(), scores: scores.iter().copied().map(Some).collect(), features, expected }
    }
}
