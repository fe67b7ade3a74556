//! What a policy file may say: the types that YAML is read into, and from which the JSON Schema is generated. What the
//! parts mean together is checked and resolved by `compile`.

use std::{collections::BTreeMap, sync::Arc};

use schemars::JsonSchema;
use serde::Deserialize;

use super::{source::Source, split::SplitBy};

/// A policy: which plan answers a request.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(title = "weir policy")]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The policy's name, by which clients ask for it as `model`.
    #[schemars(length(min = 1))]
    pub policy: String,
    /// What it is for, in a sentence; shown in listings.
    #[serde(default)]
    pub description: String,
    /// This file's names for fleet entries.
    #[schemars(extend("minProperties" = 1))]
    pub models: BTreeMap<String, ModelSpec>,
    /// Named sets of example texts; `signals.similarity.NAME` is the greatest cosine to one of them.
    #[serde(default)]
    pub examples: BTreeMap<String, Vec<String>>,
    /// Named plans. Every model is a plan of its own name already.
    #[serde(default)]
    pub plans: BTreeMap<String, PlanSpec>,
    /// Tried in order: restrictions add up, the first usable `use` wins.
    #[serde(default)]
    pub rules: Vec<RuleSpec>,
    /// What decides where no rule does.
    pub select: SelectSpec,
    /// What the selector learns from.
    #[serde(default)]
    pub reward: Option<RewardSpec>,
    /// Other policies of this weir that decide beside this one; what they decide is recorded, and nothing is called.
    #[serde(default)]
    pub shadow_decide: Vec<String>,
    /// Sticky, hashed shares of what the selector decides, e.g. a canary.
    #[serde(default)]
    pub split: Vec<SplitSpec>,
    /// What may be spent. A call that may cost more than is left is not made.
    #[serde(default)]
    pub budget: Vec<BudgetSpec>,
    /// What follows an error.
    #[serde(default)]
    pub fallback: Option<FallbackSpec>,
    /// Cases that `weir policy test` runs.
    #[serde(default)]
    pub tests: Vec<TestSpec>,
    /// The file that this was read from.
    #[serde(skip)]
    #[schemars(skip)]
    pub(super) source: Arc<Source>,
}

impl Spec {
    /// The file name that was given to `parse`.
    pub fn file(&self) -> &str {
        &self.source.file
    }

    /// The texts to embed, per example set.
    pub fn examples(&self) -> &BTreeMap<String, Vec<String>> {
        &self.examples
    }

    /// Whether anything in the file can look at an embedding: if not, the policy is compiled without an embedder, and
    /// its hash does not depend on one.
    pub fn needs_embedder(&self) -> bool {
        let embedding = |f: &FeatureSpec| matches!(f, FeatureSpec::Made(m) if m.language.is_none());
        !self.examples.is_empty() || self.select.features.iter().any(embedding) || self.select.fitted().next().is_some()
    }

    /// The artifacts that the file names: path as written, and hash.
    pub fn artifacts(&self) -> Vec<(&str, &str)> {
        let warm = self.select.warm_start.as_ref().map(|w| (w.artifact.as_str(), w.hash.as_str()));
        self.select.fitted().map(|(_, spec)| (spec.artifact.as_str(), spec.hash.as_str())).chain(warm).collect()
    }

    /// The policy as it is before a warm start, for fitting one.
    pub fn cold(mut self) -> Self {
        self.select.warm_start = None;
        self
    }

    /// The YAML text, byte for byte.
    pub fn yaml(&self) -> &str {
        &self.source.text
    }
}

/// A fleet entry by name, or all that carry a tag. Exactly one of the two.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Name of a fleet entry.
    #[serde(default)]
    pub name: Option<String>,
    /// A tag. With several entries, a call goes to the first (by name) that nothing eliminates.
    #[serde(default)]
    pub tag: Option<String>,
}

/// One call of a model, with sampling that the plan sets where the client did not.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanSpec {
    /// A name of `models`.
    pub call: String,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub top_p: Option<f64>,
    /// Upper bound on generated tokens.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    #[serde(default)]
    pub seed: Option<i64>,
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub stop: Vec<String>,
    /// Text put before the client's system prompt.
    #[serde(default)]
    pub system: Option<String>,
}

/// A condition and what follows from it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Unique; named in explanations and records.
    #[schemars(length(min = 1))]
    pub name: String,
    /// A CEL expression of type bool over `request`, `signals`, `session`, `key` and `fleet`.
    #[schemars(length(min = 1))]
    pub when: String,
    /// The plan or model to use.
    #[serde(default, rename = "use")]
    pub use_: Option<String>,
    /// Only these names of `models` may be called, by whatever plan.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub allow_models: Option<Vec<String>>,
    /// These names of `models` may not be called, by whatever plan.
    #[serde(default)]
    pub deny_models: Vec<String>,
    /// What happens when the restrictions leave no arm that could serve the request. Default: refuse.
    #[serde(default)]
    pub if_none_left: Option<IfNoneLeft>,
    /// What happens when the condition fails to evaluate. Default: a rule with restrictions takes effect, a `use` alone
    /// does not.
    #[serde(default)]
    pub on_error: Option<OnError>,
}

/// What happens when restrictions leave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IfNoneLeft {
    Refuse,
    Ignore,
}

/// What a rule does whose condition fails to evaluate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// As if the condition were true.
    Apply,
    /// As if it were false.
    Skip,
}

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
    pub(super) fn fitted(&self) -> impl Iterator<Item = (&'static str, &FittedSpec)> {
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

/// Disjoint LinUCB (Li et al., 2010): per arm a ridge regression of the reward, and a bonus for what is uncertain.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinUcbSpec {
    /// Width of the confidence bound. Default: 0.5.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub alpha: Option<f64>,
    /// Regularisation of the constant. Default: 1.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub ridge: Option<f64>,
    /// Regularisation of every other feature: the greater, the longer an arm behaves as if there were no context. Default:
    /// 25 times `ridge`.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub feature_ridge: Option<f64>,
    /// After this time an observation counts half, e.g. `7d`. Default: never.
    #[serde(default)]
    pub half_life: Option<String>,
    /// Only this many of the newest rewarded requests count, of all arms together. Default: all.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100_000))]
    pub window: Option<u32>,
    /// Rewarded pulls until an arm may be left to the rule alone; before, it gets at least its fair share. Default: 5.
    #[serde(default)]
    pub min_pulls: Option<u64>,
    /// Keeps the mean cost of requests near a target.
    #[serde(default)]
    pub pacing: Option<PacingSpec>,
}

/// Linear Thompson sampling (Agrawal and Goyal, 2013): an arm's probability is that of its reward being the greatest.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ThompsonSpec {
    /// Standard deviation of the reward, given the features. Default: 0.5.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub noise: Option<f64>,
    /// Regularisation of the constant. Default: 1.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub ridge: Option<f64>,
    /// Regularisation of every other feature: the greater, the longer an arm behaves as if there were no context. Default:
    /// 25 times `ridge`.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub feature_ridge: Option<f64>,
    /// After this time an observation counts half, e.g. `7d`. Default: never.
    #[serde(default)]
    pub half_life: Option<String>,
    /// Only this many of the newest rewarded requests count, of all arms together. Default: all.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100_000))]
    pub window: Option<u32>,
    /// Rewarded pulls until an arm may be left to the rule alone; before, it gets at least its fair share. Default: 5.
    #[serde(default)]
    pub min_pulls: Option<u64>,
    /// Keeps the mean cost of requests near a target.
    #[serde(default)]
    pub pacing: Option<PacingSpec>,
}

/// Epsilon-greedy: the greatest estimate, and with probability epsilon any arm.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EpsilonGreedySpec {
    /// Probability of any arm at the beginning. Default: 0.1.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub epsilon: Option<f64>,
    /// Factor on epsilon per update. Default: 1.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub decay: Option<f64>,
    /// Least epsilon. Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub least: Option<f64>,
    /// Regularisation of the constant. Default: 1.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub ridge: Option<f64>,
    /// Regularisation of every other feature: the greater, the longer an arm behaves as if there were no context. Default:
    /// 25 times `ridge`.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub feature_ridge: Option<f64>,
    /// After this time an observation counts half, e.g. `7d`. Default: never.
    #[serde(default)]
    pub half_life: Option<String>,
    /// Only this many of the newest rewarded requests count, of all arms together. Default: all.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100_000))]
    pub window: Option<u32>,
    /// Rewarded pulls until an arm may be left to the rule alone; before, it gets at least its fair share. Default: 5.
    #[serde(default)]
    pub min_pulls: Option<u64>,
    /// Keeps the mean cost of requests near a target.
    #[serde(default)]
    pub pacing: Option<PacingSpec>,
}

/// Budget pacing by a dual variable: a price per dollar rises while requests cost more than the target.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PacingSpec {
    /// Target of the mean cost per request, in USD.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub usd_per_request: f64,
    /// Change of the price per rewarded request, per relative excess over the target. Default: 0.02.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub step: Option<f64>,
    /// Greatest price, in reward per target cost. Default: 10.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub limit: Option<f64>,
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

/// Reward of one request: the sum of its parts, each times its weight. At least one part.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RewardSpec {
    #[serde(default)]
    pub quality: Option<QualitySpec>,
    #[serde(default)]
    pub cost_usd: Option<ScaledSpec>,
    #[serde(default)]
    pub latency_s: Option<ScaledSpec>,
    /// Joules of the whole request, from the fleet's `energy`.
    #[serde(default)]
    pub joules: Option<ScaledSpec>,
}

/// Feedback as quality; without it a request teaches nothing.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QualitySpec {
    pub weight: f64,
    /// `feedback.NAME`.
    pub from: String,
    /// How long feedback is waited for, e.g. `24h`. Default: 24h.
    #[serde(default)]
    pub wait: Option<String>,
}

/// A measured quantity, divided by what counts as 1.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScaledSpec {
    /// Negative, to make it a cost.
    pub weight: f64,
    /// The quantity that counts as 1. Default: 1.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub scale: Option<f64>,
}

/// A bound on what is spent by one request, session, key or tenant. At most one per kind.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetSpec {
    pub per: Per,
    /// USD per request, or within `every`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub usd: f64,
    /// Length of the time that the budget is for, counted in UTC from the epoch: `1d` begins at midnight. Default: 1d. Not
    /// for `per: request`.
    #[serde(default)]
    pub every: Option<String>,
    /// What becomes of a request when no arm is within the budget. Default: refuse.
    #[serde(default)]
    pub when_spent: Option<WhenSpent>,
}

/// Whose spending a budget bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    Request,
    Session,
    Key,
    Tenant,
}

impl Per {
    pub fn as_str(self) -> &'static str {
        match self {
            Per::Request => "request",
            Per::Session => "session",
            Per::Key => "key",
            Per::Tenant => "tenant",
        }
    }
}

/// What becomes of a request when no arm is within the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenSpent {
    /// An error that says so (429, `insufficient_quota`).
    Refuse,
    /// The arm that is expected to cost least answers all the same.
    Cheapest,
}

/// What follows an error.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FallbackSpec {
    /// Kinds of error, or the groups `transient` and `any`.
    #[schemars(length(min = 1))]
    pub on: Vec<String>,
    /// Plans or models to call then, in order.
    #[serde(default)]
    pub to: Vec<String>,
    /// How often the failed call itself is repeated first, after errors that may pass. Default: 2.
    #[serde(default)]
    #[schemars(range(max = 5))]
    pub retries: Option<u32>,
}

/// One case: a request, what is known beside it, and what must come out. At least one of `prompt` and `request`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TestSpec {
    #[schemars(length(min = 1))]
    pub name: String,
    /// The only message, from the user.
    #[serde(default)]
    pub prompt: Option<String>,
    /// A chat request in OpenAI's JSON; with `prompt`, what it says beside the messages.
    #[serde(default)]
    pub request: Option<BTreeMap<String, serde_json::Value>>,
    /// Signals that are not measured but given.
    #[serde(default)]
    pub signals: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    pub session: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    pub key: BTreeMap<String, serde_json::Value>,
    /// State of fleet entries by name; what is not given is available and idle.
    #[serde(default)]
    pub fleet: BTreeMap<String, BTreeMap<String, serde_json::Value>>,
    /// How often the client has repeated the request on its own account, which it says in a header. Default: 0.
    #[serde(default)]
    pub client_retry: u32,
    /// What a policy that learns has learnt before, in order. Default: nothing.
    #[serde(default)]
    pub learnt: Vec<LearntSpec>,
    /// Seed of the draw. Default: 0.
    #[serde(default)]
    pub seed: u64,
    /// Seeds, from `seed` on, over which `expect.shares` are counted. Default: 1000.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100_000))]
    pub seeds: Option<u32>,
    pub expect: ExpectSpec,
}

/// Rewards that were observed before a test's request.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LearntSpec {
    /// The arm that had answered.
    pub arm: String,
    pub reward: f64,
    /// For how many requests. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1000))]
    pub times: Option<u32>,
    /// What had been asked. Default: the test's own request.
    #[serde(default)]
    pub prompt: Option<String>,
    /// What each had cost, for pacing. Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub cost_usd: Option<f64>,
}

/// What must come out of a test. All that is given must hold.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectSpec {
    /// The plan or model that is run. The same as `arm`.
    #[serde(default)]
    pub plan: Option<String>,
    #[serde(default)]
    pub arm: Option<String>,
    /// The fleet entry that is called.
    #[serde(default)]
    pub model: Option<String>,
    /// The rule that decided, or restricted.
    #[serde(default)]
    pub rule: Option<String>,
    #[serde(default)]
    pub refused: Option<bool>,
    /// Bounds on arms' probabilities.
    #[serde(default)]
    pub propensity: BTreeMap<String, BoundsSpec>,
    /// Bounds on the shares of the seeds that took a plan.
    #[serde(default)]
    pub shares: BTreeMap<String, BoundsSpec>,
}

/// Bounds, both inclusive.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BoundsSpec {
    #[serde(default)]
    pub at_least: Option<f64>,
    #[serde(default)]
    pub at_most: Option<f64>,
}

/// `90ms`, `30s`, `5m`, `24h`, `7d` in microseconds.
pub(super) fn duration_us(text: &str) -> Result<i64, String> {
    let wrong =
        || format!("`{text}` is not a length of time; write a number and a unit, as in `30s`, `5m`, `24h`, `7d`");
    let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: i64 = text[..at].parse().map_err(|_| wrong())?;
    let unit: i64 = match &text[at..] {
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).filter(|us| *us > 0).ok_or_else(|| format!("`{text}` is out of range"))
}
