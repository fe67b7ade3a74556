//! What a policy file may say: the types that YAML is read into, and from which the JSON Schema is generated. What the
//! parts mean together is checked and resolved by `compile`.

use std::{collections::BTreeMap, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{chunks::ChunksSpec, source::Source};
use crate::domain::{Edge, FailoverWeights};

mod bandit;
mod plan;
mod select;
mod testing;

pub use bandit::*;
pub use plan::*;
pub use select::*;
pub use testing::*;

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
    /// What is a document where clients mark none: models that may compute it once and reuse it wherever it stands.
    #[serde(default)]
    pub chunks: Option<ChunksSpec>,
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
        let fitted = self.select.fitted().map(|(_, spec)| (spec.artifact.as_str(), spec.hash.as_str()));
        let mut calibrations = Vec::new();
        self.plans.values().for_each(|plan| plan.node().calibrations(&mut calibrations));
        fitted.chain(warm).chain(calibrations.into_iter().map(|path| (path, ""))).collect()
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
    /// USD per request, or within `every`. A plan of several calls is begun where its beginning is within it; what would
    /// overrun it later is left out, and the best answer so far is given.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub usd: Option<f64>,
    /// Tokens of all prompts and answers together, of a request or within `every`. A call that may take more than is left is not
    /// made.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub tokens: Option<u64>,
    /// Calls of a request or within `every`, retries and fallback counted.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub calls: Option<u32>,
    /// Seconds from a request's start to the end of its answer; within `every`, of all requests together. A request is cut off
    /// where none are left.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub seconds: Option<f64>,
    /// Seconds from a request's start to the first token of its answer, by which cascades abide: a stage is not escalated to
    /// where the calls that wait before it, and what of the prompt it has not in memory, would take longer than what is left;
    /// the best answer so far is given. For `per: request` only.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub first_token_seconds: Option<f64>,
    /// Length of the time that the budget is for, counted in UTC from the epoch: `1d` begins at midnight. Default: 1d. Not
    /// for `per: request`.
    #[serde(default)]
    pub every: Option<String>,
    /// What becomes of a request when no arm is within the budget. Default: refuse.
    #[serde(default)]
    pub when_spent: Option<WhenSpent>,
}

/// Whose spending a budget bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
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
    /// Seek the next model by weights of expected cost, latency, errors, rate limits and order, instead of in order: the shortest
    /// path through the models that are left, anew after each error.
    #[serde(default)]
    pub weights: Option<FailoverWeights>,
    /// Which model follows which; names of `to`. Default: each may follow the planned call and every other.
    #[serde(default)]
    pub edges: Vec<Edge>,
    /// How often the failed call itself is repeated first, after errors that may pass. Default: 2.
    #[serde(default)]
    #[schemars(range(max = 5))]
    pub retries: Option<u32>,
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
