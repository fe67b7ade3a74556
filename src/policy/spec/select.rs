//! What chooses: selectors, what they see, and what sessions and tenants change of them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{EpsilonGreedySpec, LinUcbSpec, ThompsonSpec};
use crate::policy::split::SplitBy;

/// The selector. Exactly one of `static`, `weighted`, `cheapest`, `fastest`, `similarity`, `ridge`, `logistic`, `kernel`,
/// `knn`, `clusters`, `graph`, `ensemble`, `linucb`, `thompson` and `epsilon_greedy`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectSpec {
    /// Plans or models, in order of preference where nothing else orders them.
    #[schemars(length(min = 1))]
    pub arms: Vec<String>,
    /// Per arm, a condition (as in `rules`) under which alone it may be taken.
    #[serde(default)]
    pub only_if: BTreeMap<String, String>,
    /// One arm, or weights per arm.
    #[serde(default, rename = "static")]
    pub fixed: Option<FixedSpec>,
    /// Weights per arm: a random draw in these proportions.
    #[serde(default)]
    #[schemars(extend("minProperties" = 1))]
    pub weighted: Option<BTreeMap<String, f64>>,
    /// The arm whose call is expected to cost least: `{}`.
    #[serde(default)]
    pub cheapest: Option<PlainSpec>,
    /// The arm whose call is expected to take least time, by what was measured lately: `{}`.
    #[serde(default)]
    pub fastest: Option<PlainSpec>,
    /// The arm of the nearest example set.
    #[serde(default)]
    pub similarity: Option<SimilaritySpec>,
    /// A linear map from the query to each model's quality, fitted by `weir policy fit`. The cheapest to fit and to serve;
    /// never the best of the fitted ones on public outcomes (eval/policies.md).
    #[serde(default)]
    pub ridge: Option<FittedSpec>,
    /// The same through the logistic function: as small, and nowhere far from the best.
    #[serde(default)]
    pub logistic: Option<FittedSpec>,
    /// A linear map that also sees how close the query is to landmarks: the best where quality bends with the query.
    #[serde(default)]
    pub kernel: Option<FittedSpec>,
    /// The outcomes of the nearest fitted queries: the best where many queries are alike; carries its examples with it.
    #[serde(default)]
    pub knn: Option<FittedSpec>,
    /// The outcomes of the nearest clusters of fitted queries: the best where tasks are clusters, and poor within one task.
    #[serde(default)]
    pub clusters: Option<FittedSpec>,
    /// A graph of queries and models with edge prediction. Takes in a model by a few observations; otherwise behind `ensemble`.
    #[serde(default)]
    pub graph: Option<FittedSpec>,
    /// Ridge, kernel and knn together: the one to begin with.
    #[serde(default)]
    pub ensemble: Option<FittedSpec>,
    /// A contextual bandit: disjoint LinUCB.
    #[serde(default)]
    pub linucb: Option<LinUcbSpec>,
    /// A contextual bandit: linear Thompson sampling.
    #[serde(default)]
    pub thompson: Option<ThompsonSpec>,
    /// A contextual bandit: the greatest estimate, and sometimes any.
    #[serde(default)]
    pub epsilon_greedy: Option<EpsilonGreedySpec>,
    /// What a bandit sees of a request, beside a constant 1.
    #[serde(default)]
    pub features: Vec<FeatureSpec>,
    /// What a session's earlier turns change.
    #[serde(default)]
    pub session: Option<SessionSpec>,
    /// What a selector that learns begins with, fitted to measured outcomes.
    #[serde(default)]
    pub warm_start: Option<WarmStartSpec>,
    /// By tenant, what is different for it.
    #[serde(default)]
    pub tenants: BTreeMap<String, TenantSpec>,
    /// Least probability of every arm that can serve the request. Default: 0.02 for a bandit, else 0.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_propensity: Option<f64>,
    /// The arm where the selector needs an embedding and there is none.
    #[serde(default)]
    pub no_embedding: Option<String>,
}

/// A share of the traffic for one arm: the same sessions, keys or tenants every time.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitSpec {
    /// Unique; part of the hash that says who is in, and named in explanations.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Share of those who ask.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub share: f64,
    /// Who stays together. Without one (no session, no key), every request is drawn anew.
    pub by: SplitBy,
    /// The arm that they get, where it can serve the request.
    #[serde(rename = "use")]
    pub use_: String,
}

/// A selector without parameters: `{}`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlainSpec {}

/// What a session's earlier turns change. Each step maps probabilities to probabilities; all end with the session.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SessionSpec {
    /// Stickiness: the session's arm is left only for an arm whose score is higher by at least this. With a selector that
    /// has no scores: the share that stays. Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub switch_cost: Option<f64>,
    /// Weight of the mean probabilities of the session's earlier turns, against this turn's. Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub mix: Option<f64>,
    /// Strength of feedback within the session: an arm's odds are multiplied by exp(bias x sum of (value - 0.5)).
    /// Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub bias: Option<f64>,
}

/// What is different for a tenant.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantSpec {
    /// Factors on arms' probabilities; an arm without one keeps 1, and 0 takes it away while others are left.
    #[schemars(extend("minProperties" = 1))]
    pub weights: BTreeMap<String, f64>,
}

/// One arm's name, or a weight per arm.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum FixedSpec {
    Arm(String),
    Weights(BTreeMap<String, f64>),
}

/// Arms by nearest example set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SimilaritySpec {
    /// Names of `examples`, and the arm that each stands for.
    #[schemars(extend("minProperties" = 1))]
    pub sets: BTreeMap<String, SetSpec>,
    /// The arm where no set is near enough.
    pub default: String,
}

/// One example set of a similarity selector.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSpec {
    pub arm: String,
    /// Least cosine that counts as near. Default: 0.75.
    #[serde(default)]
    #[schemars(range(min = -1.0, max = 1.0))]
    pub above: Option<f64>,
}

/// A selector that was fitted to outcomes, and how quality is weighed against cost.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FittedSpec {
    /// The file that `weir policy fit` wrote; relative to this one.
    #[schemars(length(min = 1))]
    pub artifact: String,
    /// Its hash, as `weir policy fit` printed it: 64 hexadecimal digits.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub hash: String,
    /// By arm, the name that its model has in the artifact. Default: the arm's own name.
    #[serde(default)]
    pub models: BTreeMap<String, String>,
    /// What `cost_scale` dollars are worth in quality. Default: 0, whatever it costs.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub cost_weight: Option<f64>,
    /// The cost in USD that counts as 1. Default: 0.01.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub cost_scale: Option<f64>,
    /// Above 0: an arm's probability is in proportion to exp(score / temperature). Default: 0, the greatest score.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: Option<f64>,
}

/// What `weir policy fit --warm-start` wrote for this policy.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WarmStartSpec {
    /// The file; relative to this one.
    #[schemars(length(min = 1))]
    pub artifact: String,
    /// Its hash: 64 hexadecimal digits.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub hash: String,
    /// By arm, the name that its model has in the artifact. Default: the arm's own name; an arm that the artifact does not
    /// know begins with nothing.
    #[serde(default)]
    pub models: BTreeMap<String, String>,
    /// Rewarded requests that the fit counts as, per arm. Default: 50.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100_000))]
    pub pulls: Option<u32>,
}

impl SelectSpec {
    /// The fitted selectors that are given, by key.
    pub(in crate::policy) fn fitted(&self) -> impl Iterator<Item = (&'static str, &FittedSpec)> {
        [
            ("ridge", &self.ridge),
            ("logistic", &self.logistic),
            ("kernel", &self.kernel),
            ("knn", &self.knn),
            ("clusters", &self.clusters),
            ("graph", &self.graph),
            ("ensemble", &self.ensemble),
        ]
        .into_iter()
        .filter_map(|(name, spec)| Some((name, spec.as_ref()?)))
    }
}

/// A feature by name, or one with a parameter.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum FeatureSpec {
    Named(String),
    Made(MadeFeatureSpec),
}

/// A feature with a parameter. Exactly one key.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MadeFeatureSpec {
    /// The query's embedding.
    #[serde(default)]
    pub embedding: Option<EmbeddingFeatureSpec>,
    /// One-hot over these ISO 639-1 codes, with one more place for all others.
    #[serde(default)]
    pub language: Option<Vec<String>>,
    /// The cosine to the named example set.
    #[serde(default)]
    pub similarity: Option<String>,
}

/// How the embedding enters.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingFeatureSpec {
    /// Dimensions after a fixed random projection.
    #[schemars(range(min = 1, max = 256))]
    pub project: u32,
}
