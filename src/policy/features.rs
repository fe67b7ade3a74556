//! What a learning selector sees of a request: a vector of named signals, each with its scaling, behind a constant 1.
//!
//! | name | value |
//! |---|---|
//! | `tokens`, `query_tokens` | log2(1 + n) / 16 |
//! | `complexity` | / 100 |
//! | `code_share` | as it is |
//! | `turn` | at most 8, / 8 |
//! | `tools`, `response_format`, `pii` | 0 or 1 |
//! | `{similarity: NAME}` | the cosine |
//! | `task` | one-hot over the policy's example sets, in name order: the one with the greatest cosine |
//! | `{language: [en, de]}` | one-hot, one more place for all others |
//! | `{embedding: {project: N}}` | N dimensions of a fixed random projection |
//!
//! The projection is a matrix of signs over sqrt(N) (Achlioptas, "Database-friendly random projections", JCSS 2003),
//! which keeps lengths in expectation; its signs come from our generator under a constant seed, so that it is part of
//! what the policy hash stands for without being stored.

use super::{
    draw::{Purpose, block},
    linalg,
};
use crate::domain::{Context, Signals};

/// Seed of the projection's signs. Part of the meaning of every policy that projects: never change it.
const PROJECTION_SEED: u64 = 0x7765_6972_0001;

/// One feature, resolved.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Feature {
    /// A place in [`Signals::FEATURES`].
    Named(usize),
    Similarity(String),
    /// The example sets, in name order.
    Task(Vec<String>),
    Language(Vec<String>),
    Embedding {
        project: usize,
    },
}

/// A feature vector's recipe.
#[derive(Debug)]
pub(super) struct Features {
    list: Vec<Feature>,
    dimensions: usize,
    /// Row-major, one block of N x D per embedding feature, in order; empty where no embedder was given.
    projections: Vec<Vec<f64>>,
}

impl Features {
    /// `embedding`: dimensions of the embedder, 0 without one.
    pub fn new(list: Vec<Feature>, embedding: usize) -> Self {
        let dimensions = 1 + list
            .iter()
            .map(|f| match f {
                Feature::Named(_) | Feature::Similarity(_) => 1,
                Feature::Language(codes) => codes.len() + 1,
                Feature::Task(sets) => sets.len(),
                Feature::Embedding { project } => *project,
            })
            .sum::<usize>();
        let projections = list
            .iter()
            .filter_map(|f| match f {
                Feature::Embedding { project } => Some(projection(*project, embedding)),
                _ => None,
            })
            .collect();
        Self { list, dimensions, projections }
    }

    /// What each feature is, with its parameters: two policies with the same list see requests alike, if their example sets
    /// and embedders are the same.
    pub fn names(&self) -> Vec<String> {
        let name = |f: &Feature| match f {
            Feature::Named(n) => Signals::FEATURES.get(*n).copied().unwrap_or_default().to_owned(),
            Feature::Similarity(set) => format!("similarity {set}"),
            Feature::Task(sets) => format!("task {}", sets.join(" ")),
            Feature::Language(codes) => format!("language {}", codes.join(" ")),
            Feature::Embedding { project } => format!("embedding {project}"),
        };
        self.list.iter().map(name).collect()
    }

    /// Length of the vector, the constant included.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    pub fn needs_embedding(&self) -> bool {
        self.list.iter().any(|f| matches!(f, Feature::Similarity(_) | Feature::Task(_) | Feature::Embedding { .. }))
    }

    /// The vector of a context. Where the embedding is missing its places are 0; the caller has checked before.
    pub fn vector(&self, context: &Context) -> Vec<f64> {
        let mut x = Vec::with_capacity(self.dimensions);
        x.push(1.0);
        let mut projections = self.projections.iter();
        for feature in &self.list {
            match feature {
                Feature::Named(n) => x.push(context.signals.feature(*n)),
                Feature::Similarity(name) => x.push(context.signals.similarity.get(name).copied().unwrap_or(-1.0)),
                Feature::Language(codes) => {
                    let at = codes.iter().position(|c| *c == context.signals.language).unwrap_or(codes.len());
                    x.extend((0..=codes.len()).map(|i| if i == at { 1.0 } else { 0.0 }));
                }
                Feature::Task(sets) => {
                    let near = |name: &String| context.signals.similarity.get(name).copied().unwrap_or(-1.0);
                    let mut best: Option<(f64, usize)> = None;
                    for (i, name) in sets.iter().enumerate() {
                        if best.is_none_or(|(before, _)| near(name) > before) {
                            best = Some((near(name), i));
                        }
                    }
                    x.extend((0..sets.len()).map(|i| if best.is_some_and(|(_, b)| b == i) { 1.0 } else { 0.0 }));
                }
                Feature::Embedding { project } => {
                    let from = x.len();
                    x.resize(from + project, 0.0);
                    if let (Some(matrix), Some(embedding)) = (projections.next(), &context.embedding) {
                        let e: Vec<f64> = embedding.vector.iter().map(|v| f64::from(*v)).collect();
                        if matrix.len() == project * e.len() {
                            linalg::matvec(matrix, &e, &mut x[from..]);
                        }
                    }
                }
            }
        }
        x
    }
}

/// A feature without parameters by its name, scaled as a learning selector sees it; `None` for a name that is none.
pub fn query_feature(name: &str, signals: &Signals) -> Option<f64> {
    Signals::FEATURES.iter().position(|n| *n == name).map(|n| signals.feature(n))
}

fn projection(rows: usize, columns: usize) -> Vec<f64> {
    let scale = 1.0 / (rows as f64).sqrt();
    let n = rows * columns;
    let mut out = Vec::with_capacity(n);
    for at in 0..n.div_ceil(128) {
        let bits = block(PROJECTION_SEED, Purpose::Projection as u32, at as u64);
        out.extend((0..128.min(n - at * 128)).map(|i| if bits[i / 32] >> (i % 32) & 1 == 1 { scale } else { -scale }));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::{EmbedderIdentity, Embedding};

    fn embedder() -> Arc<EmbedderIdentity> {
        Arc::new(EmbedderIdentity {
            name: "test".into(),
            weights: String::new(),
            precision: "f32".into(),
            pooling: "cls".into(),
            window: "512".into(),
            dimensions: 384,
        })
    }

    #[test]
    fn features_are_scaled_as_documented() {
        let features = Features::new(
            vec![Feature::Named(0), Feature::Named(2), Feature::Named(4), Feature::Language(vec!["de".into()])],
            0,
        );
        let mut context = Context::default();
        context.signals.tokens = 255;
        context.signals.complexity = 40.0;
        context.signals.turn = 20;
        context.signals.language = "fr".into();
        assert_eq!(features.vector(&context), [1.0, 0.5, 0.4, 1.0, 0.0, 1.0]);
        assert_eq!(features.dimensions(), 6);
    }

    #[test]
    fn the_task_is_the_nearest_example_set() {
        let features = Features::new(vec![Feature::Task(vec!["code".into(), "chat".into(), "sums".into()])], 0);
        let mut context = Context::default();
        for (name, cosine) in [("chat", 0.4), ("code", 0.2), ("sums", 0.4)] {
            context.signals.similarity.insert(name.into(), cosine);
        }
        assert_eq!(features.vector(&context), [1.0, 0.0, 1.0, 0.0]);
        assert!(features.needs_embedding());
    }

    #[test]
    fn the_projection_keeps_lengths_and_differs_by_row() {
        let features = Features::new(vec![Feature::Embedding { project: 64 }], 384);
        let mut lengths = Vec::new();
        for n in 0..20u64 {
            let raw: Vec<f32> = (0..384).map(|i| crate::policy::draw::unit(n, 7, i) as f32 - 0.5).collect();
            let norm = linalg::dot_f32(&raw, &raw).sqrt() as f32;
            let unit: Vec<f32> = raw.iter().map(|v| v / norm).collect();
            let context = Context {
                embedding: Some(Embedding { vector: unit.into(), embedder: embedder() }),
                ..Context::default()
            };
            let x = features.vector(&context);
            lengths.push(linalg::dot(&x[1..], &x[1..]).sqrt());
        }
        let mean = lengths.iter().sum::<f64>() / lengths.len() as f64;
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        let m = &features.projections[0];
        assert_ne!(m[..384], m[384..768]);
    }
}
