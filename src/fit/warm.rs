//! What a bandit begins with: the sums that it would have, had it asked every model about every query of the outcomes.

use std::collections::BTreeMap;

use super::{Fitted, Inputs, embed::measured};
use crate::{
    domain::{Context, Embedding, Signals},
    policy::{
        Policy,
        artifact::{Card, Tensor},
        linalg,
        predict::Prediction,
    },
    replay::matrix::Matrix,
};

/// A fit, and what it expects of queries.
pub struct Warm {
    pub fitted: Fitted,
    /// Per model, the coefficients of the reward.
    theta: Vec<Vec<f64>>,
    cost: Vec<f64>,
}

impl Warm {
    /// Expected reward and mean cost for the queries at `places`.
    pub fn predictions(&self, policy: &Policy, matrix: &Matrix, inputs: &Inputs, places: &[usize]) -> Vec<Prediction> {
        let predict = |q: &usize| {
            let x = policy
                .feature_vector(&context(policy, measured(&matrix.queries[*q].text), Some(inputs), *q))
                .unwrap_or_default();
            let quality = self.theta.iter().map(|t| linalg::dot(t, &x)).collect();
            Prediction { quality, cost: self.cost.clone() }
        };
        places.iter().map(predict).collect()
    }
}

/// Fits the means of x xᵀ and of r x over the queries at `places`: x as the policy's features are, r as its reward is with
/// the score as the feedback that it waits for. Predictions are those of the policy itself after `pulls` requests per arm.
///
/// # Errors
/// When the policy does not learn, or its reward needs what outcomes do not have.
pub fn warm_start(
    policy: &Policy,
    matrix: &Matrix,
    inputs: &Inputs,
    places: &[usize],
    pulls: u32,
) -> Result<Warm, String> {
    let models = matrix.models.len();
    let vectors: Vec<Vec<f64>> = places
        .iter()
        .map(|q| policy.feature_vector(&context(policy, measured(&matrix.queries[*q].text), Some(inputs), *q)))
        .collect::<Option<_>>()
        .ok_or("only a policy that learns has a warm start: `linucb`, `thompson` or `epsilon_greedy`")?;
    let rewards = |q: usize| -> Option<Vec<f64>> {
        let reward = |(score, cost): (&f64, &f64)| policy.reward(&policy.outcome(*score, *cost));
        matrix.scores(q).iter().zip(matrix.costs(q)).map(reward).collect()
    };
    let d = vectors.first().map_or(0, Vec::len);
    let (mut a, mut b, mut cost) = (vec![0.0; linalg::packed_len(d)], vec![0.0; models * d], vec![0.0; models]);
    let share = 1.0 / places.len().max(1) as f64;
    for (q, x) in places.iter().zip(&vectors) {
        linalg::rank_one(&mut a, x, share);
        let rewards = rewards(*q).ok_or("the policy's reward cannot be had from a score and a cost")?;
        for (m, reward) in rewards.iter().enumerate() {
            cost[m] += share * matrix.costs(*q)[m];
            b[m * d..(m + 1) * d].iter_mut().zip(x).for_each(|(b, x)| *b += share * reward * x);
        }
    }
    let pulls = f64::from(pulls);
    let scaled: Vec<f64> = a.iter().map(|x| x * pulls).collect();
    let factor = linalg::cholesky(&scaled, d, |i| policy.ridge(i).unwrap_or(1.0))
        .ok_or("the queries' features cannot be solved for")?;
    let theta: Vec<Vec<f64>> = b
        .chunks_exact(d.max(1))
        .map(|b| linalg::solve(&factor, &b.iter().map(|x| x * pulls).collect::<Vec<f64>>()))
        .collect();
    let mut card = Card::new("bandit", matrix.models.clone());
    card.embedder = policy.needs_embedding().then(|| inputs.embedder.clone());
    card.features = policy.feature_names();
    card.data.file.clone_from(&matrix.name);
    card.data.hash.clone_from(&matrix.hash);
    card.data.queries = matrix.len();
    card.data.fitted_on = places.len();
    let tensor = |shape: Vec<usize>, data: &[f64]| Tensor { shape, data: data.iter().map(|x| *x as f32).collect() };
    let tensors = BTreeMap::from([
        ("bandit.a".to_owned(), tensor(vec![a.len()], &a)),
        ("bandit.b".to_owned(), tensor(vec![models, d], &b)),
        ("bandit.cost".to_owned(), tensor(vec![models], &cost)),
    ]);
    Ok(Warm { fitted: Fitted { card, tensors }, theta, cost })
}

/// A query as the policy would see it: its signals, and where the policy looks at embeddings, its embedding and what of the
/// signals comes from that.
pub fn context(policy: &Policy, signals: Signals, inputs: Option<&Inputs>, q: usize) -> Context {
    let mut context = Context { signals, ..Context::default() };
    if let Some(inputs) = inputs.filter(|_| policy.needs_embedding()) {
        let vector = &inputs.embeddings[q];
        context.signals.similarity = policy.similarities(vector);
        context.signals.embedded = true;
        let embedder = std::sync::Arc::new(inputs.embedder.clone());
        context.embedding = Some(Embedding { vector: std::sync::Arc::clone(vector), embedder });
    }
    context
}
