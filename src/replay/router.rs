//! A router on a matrix of outcomes: what it would have cost and scored at every trade-off of quality against cost.

use super::{
    matrix::Matrix,
    metrics::{Hull, Point},
};
use crate::policy::predict::{Prediction, best};

/// Cost weights at which a predictor is asked, in quality per mean cost: 0, and 60 from a thousandth to several hundred.
pub fn weights() -> Vec<f64> {
    let mut out = vec![0.0];
    out.extend((0..60).map(|i| 10f64.powf(-3.5 + 6.0 * f64::from(i) / 59.0)));
    out
}

/// What was paid and scored per setting and query.
#[derive(Clone, Debug)]
pub struct Outcomes {
    pub queries: usize,
    /// Settings x queries.
    cost: Vec<f32>,
    score: Vec<f32>,
}

impl Outcomes {
    /// One choice of a model per setting and query; `choices` is settings x places.
    pub fn of(matrix: &Matrix, places: &[usize], choices: &[Vec<usize>]) -> Self {
        let mut out = Self { queries: places.len(), cost: Vec::new(), score: Vec::new() };
        for setting in choices {
            for (query, model) in places.iter().zip(setting) {
                out.cost.push(matrix.costs(*query)[*model] as f32);
                out.score.push(matrix.scores(*query)[*model] as f32);
            }
        }
        out
    }

    /// The mean of several runs over the same queries and settings: what a router that is drawn at random among these
    /// would pay and score.
    pub fn mean(runs: &[Self]) -> Option<Self> {
        let first = runs.first()?;
        let n = runs.len() as f32;
        let mean = |of: fn(&Self) -> &Vec<f32>| {
            (0..of(first).len()).map(|i| runs.iter().map(|r| of(r)[i]).sum::<f32>() / n).collect()
        };
        Some(Self { queries: first.queries, cost: mean(|r| &r.cost), score: mean(|r| &r.score) })
    }

    /// The hull of all settings over a sample of the queries, by their numbers here.
    pub fn hull(&self, sample: &[usize]) -> Hull {
        let n = sample.len().max(1) as f64;
        let mean = |row: &[f32]| sample.iter().map(|i| f64::from(row[*i])).sum::<f64>() / n;
        let rows = self.cost.chunks_exact(self.queries.max(1)).zip(self.score.chunks_exact(self.queries.max(1)));
        Hull::of(rows.map(|(cost, score)| Point { cost: mean(cost), score: mean(score) }))
    }
}

/// The choices of a predictor at each of [`weights`], and as a last setting always the model that it takes for the
/// cheapest. The unit of cost is the mean of all predicted costs.
pub fn choices(predictions: &[Prediction]) -> Vec<Vec<usize>> {
    let models = predictions.first().map_or(0, |p| p.cost.len());
    let mut costs = vec![0.0; models];
    for p in predictions {
        costs.iter_mut().zip(&p.cost).for_each(|(sum, cost)| *sum += cost);
    }
    let n = predictions.len().max(1) as f64;
    let unit = (costs.iter().sum::<f64>() / (n * models.max(1) as f64)).max(f64::MIN_POSITIVE);
    let cheapest = (0..models).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap_or(0);
    let mut out: Vec<Vec<usize>> =
        weights().into_iter().map(|w| predictions.iter().map(|p| best(p, w, unit)).collect()).collect();
    out.push(vec![cheapest; predictions.len()]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::matrix::Query;

    #[test]
    fn a_perfect_predictor_reaches_the_oracle_and_the_cheapest() {
        let query = |i: usize| Query { id: i.to_string(), task: String::new(), text: i.to_string() };
        let scores: Vec<f64> = (0..10).flat_map(|i| [f64::from(i % 2 == 0), 1.0]).collect();
        let costs: Vec<f64> = (0..10).flat_map(|_| [1.0, 10.0]).collect();
        let models = vec!["cheap".to_owned(), "dear".to_owned()];
        let matrix = Matrix::of("m", models, (0..10).map(query).collect(), scores, costs);
        let places: Vec<usize> = (0..10).collect();
        let predictions: Vec<Prediction> = places
            .iter()
            .map(|q| Prediction { quality: matrix.scores(*q).to_vec(), cost: matrix.costs(*q).to_vec() })
            .collect();
        let outcomes = Outcomes::of(&matrix, &places, &choices(&predictions));
        let hull = outcomes.hull(&places);
        assert_eq!(hull.points(), [Point { cost: 1.0, score: 0.5 }, Point { cost: 5.5, score: 1.0 }]);
        // Half of the queries: only those that the cheap model answers.
        assert_eq!(outcomes.hull(&[0, 2, 4]).points(), [Point { cost: 1.0, score: 1.0 }]);
        let same = Outcomes::mean(&[outcomes.clone(), outcomes.clone()]).unwrap();
        assert_eq!(same.hull(&places), hull);
    }
}
