//! Tests that a policy file carries.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

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
    /// The fleet entry that is called; of a plan of several calls, the first.
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
