//! What a predictor is worth on queries that it has not seen: the trade-off it offers, beside the best single model, a
//! random mix of models and an oracle.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use super::Inputs;
use crate::{
    policy::predict::{Prediction, Predictor, best},
    replay::{
        matrix::Matrix,
        metrics::{Hull, Point},
        router::{Outcomes, choices, weights},
    },
};

/// Shares of the best single model's cost at which routers are compared.
pub const BUDGETS: [f64; 5] = [0.1, 0.25, 0.5, 0.75, 1.0];

/// One line.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub router: String,
    /// `cost_weight`, for a predictor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_weight: Option<f64>,
    pub mean_score: f64,
    pub mean_cost_usd: f64,
    /// What a random mix of models scores at that cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_router: Option<f64>,
    pub shares: BTreeMap<String, f64>,
}

/// The whole judgement.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub queries: usize,
    /// USD that `cost_weight` is per: the mean of the predicted costs.
    pub cost_scale: f64,
    /// Average improvement in quality, of the predictor and of the zero router; absent where the cheapest model is the
    /// best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aiq_zero: Option<f64>,
    pub lines: Vec<Line>,
}

/// Predictions for the queries at `places`, by the code that serves.
pub fn predictions(predictor: &Predictor, inputs: &Inputs, places: &[usize]) -> Vec<Prediction> {
    places.iter().map(|q| predictor.predict(&inputs.seen(*q))).collect()
}

impl Report {
    /// Judges predictions for the queries at `places`.
    pub fn of(matrix: &Matrix, places: &[usize], predictions: &[Prediction]) -> Self {
        let all: Vec<usize> = (0..places.len()).collect();
        let settings = choices(predictions);
        let hull = Outcomes::of(matrix, places, &settings).hull(&all);
        let frame = matrix.frame(places);
        let zero = frame.as_ref().map(|f| f.zero.clone()).unwrap_or_else(|| Hull::of(matrix.means(places)));
        let line = |router: String, cost_weight: Option<f64>, chosen: &[usize]| {
            let n = chosen.len().max(1) as f64;
            let (mut cost, mut score) = (0.0, 0.0);
            let mut shares: BTreeMap<String, f64> = BTreeMap::new();
            for (q, m) in places.iter().zip(chosen) {
                cost += matrix.costs(*q)[*m] / n;
                score += matrix.scores(*q)[*m] / n;
                *shares.entry(matrix.models[*m].clone()).or_default() += 1.0 / n;
            }
            Line {
                router,
                cost_weight,
                mean_score: score,
                mean_cost_usd: cost,
                zero_router: zero.score_at(cost),
                shares,
            }
        };
        let means = matrix.means(places);
        let greatest = |by: fn(&Point) -> f64| {
            (0..means.len()).max_by(|a, b| by(&means[*a]).total_cmp(&by(&means[*b]))).unwrap_or(0)
        };
        let (single, cheapest) = (greatest(|p| p.score), greatest(|p| -p.cost));
        let mut lines = vec![
            line(format!("always {}", matrix.models[single]), None, &vec![single; places.len()]),
            line(format!("always {}", matrix.models[cheapest]), None, &vec![cheapest; places.len()]),
        ];
        let truth: Vec<Prediction> = places
            .iter()
            .map(|q| Prediction { quality: matrix.scores(*q).to_vec(), cost: matrix.costs(*q).to_vec() })
            .collect();
        let unit = mean_cost(predictions);
        let oracle: Vec<usize> = truth.iter().map(|p| best(p, 1e-6, unit)).collect();
        lines.push(line("oracle (best model per query)".to_owned(), None, &oracle));
        let top = means.get(single).map_or(0.0, |p| p.cost);
        let points: Vec<Line> = weights()
            .into_iter()
            .zip(&settings)
            .map(|(weight, chosen)| line("predictor".to_owned(), Some(weight), chosen))
            .collect();
        for budget in BUDGETS {
            // The best of what the budget allows.
            let within = points.iter().filter(|p| p.mean_cost_usd <= budget * top);
            if let Some(found) = within.max_by(|a, b| a.mean_score.total_cmp(&b.mean_score)) {
                lines.push(Line { router: format!("at {:.0} % of the cost", budget * 100.0), ..found.clone() });
            }
        }
        if let Some(first) = points.into_iter().next() {
            lines.push(Line { router: "whatever it costs".to_owned(), ..first });
        }
        Self {
            queries: places.len(),
            cost_scale: unit,
            aiq: frame.as_ref().map(|f| f.aiq(&hull)),
            aiq_zero: frame.as_ref().map(|f| f.aiq(&f.zero)),
            lines,
        }
    }

    /// As a table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let width = self.lines.iter().map(|l| l.router.chars().count()).max().unwrap_or(0);
        let _ =
            writeln!(out, "{:width$}  {:>7}  {:>10}  {:>7}  {:>11}  shares", "", "score", "USD", "mix", "cost_weight");
        for line in &self.lines {
            let mut shares: Vec<(&String, &f64)> = line.shares.iter().collect();
            shares.sort_by(|a, b| b.1.total_cmp(a.1));
            let shares: Vec<String> =
                shares.iter().take(4).map(|(name, share)| format!("{name} {:.0} %", *share * 100.0)).collect();
            let mix = line.zero_router.map_or_else(|| "-".to_owned(), |z| format!("{z:.4}"));
            let weight = line.cost_weight.map_or_else(String::new, |w| format!("{w:.4}"));
            let _ = writeln!(
                out,
                "{:width$}  {:>7.4}  {:>10.6}  {mix:>7}  {weight:>11}  {}",
                line.router,
                line.mean_score,
                line.mean_cost_usd,
                shares.join(", ")
            );
        }
        let _ = writeln!(out, "mix: what a random mix of single models scores at that cost (the zero router)");
        if let (Some(aiq), Some(zero)) = (self.aiq, self.aiq_zero) {
            let _ = writeln!(out, "AIQ {aiq:.4}, of the zero router {zero:.4}, on {} queries", self.queries);
        }
        let _ = writeln!(out, "cost_weight is per cost_scale: {:.6} USD", self.cost_scale);
        out
    }
}

/// The mean of all predicted costs in USD, over queries and models.
fn mean_cost(predictions: &[Prediction]) -> f64 {
    let (mut sum, mut n) = (0.0, 0.0f64);
    for cost in predictions.iter().flat_map(|p| &p.cost) {
        sum += cost;
        n += 1.0;
    }
    (sum / n.max(1.0)).max(f64::MIN_POSITIVE)
}
