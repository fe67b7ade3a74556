//! A policy's verdict on one context, with everything that explains it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{CallSpec, FailoverGraph, Hash, MicroUsd, Plan, Spend};

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// A rule's `use`.
    Rule,
    /// The selector drew an arm.
    Select,
    /// The client named a plan or a model.
    Pinned,
    /// Beside the deciding policy; nothing was called.
    Shadow,
    /// Nothing may serve this request.
    Refused,
}

/// Why an arm or a model was out before the draw. A closed list, so that it can be counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "by", content = "detail")]
pub enum Elimination {
    /// A rule's `allow_models` or `deny_models`; the rule's name.
    Restriction(String),
    /// The model cannot do what the request needs; the need.
    Capability(String),
    /// The prompt is longer than the model's context.
    Context(String),
    /// The model is not available now.
    Unavailable(String),
    /// The arm's own condition (`only_if`) does not hold, or failed to evaluate; how.
    Condition(String),
    /// The call may cost more than a budget has left; which, and how much.
    Budget(String),
}

/// What one request may use, over all of its calls. What would overrun it is not begun, and the best answer so far is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestBounds {
    /// What the budgets had left, where the plan makes several calls; of one call it is known before the draw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd: Option<MicroUsd>,
    /// Of prompts and answers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Retries and fallback counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<u32>,
    /// Microseconds from the start to the end of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_us: Option<i64>,
    /// Microseconds from the start to the first token of the answer: no stage of a cascade is escalated to that is not expected
    /// to begin in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_us: Option<i64>,
    /// Microseconds to the first token that are expected of a call, by fleet name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub waits: BTreeMap<String, i64>,
    /// The most that one call of a model is reckoned with, by fleet name, in records from before calls said so themselves
    /// ([`CallSpec::worst`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub worst: BTreeMap<String, Spend>,
}

/// One arm as it stood before the draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub arm: String,
    /// The selector's score (for LinUCB the upper bound); absent where it gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Exact probability with which the draw takes this arm.
    pub propensity: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eliminated: Option<Elimination>,
    /// Of a plan of several calls, the model that is why it is out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// What became of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleOutcome {
    /// The condition was false.
    NoMatch,
    /// True, and its `use` decided.
    Used,
    /// True, and its restrictions were added.
    Restricted,
    /// True, but its `use` cannot serve this request (eliminated); the next rules were tried.
    NotUsable,
    /// True, but its restrictions left no arm, and `if_none_left: ignore` dropped them.
    Dropped,
    /// The condition failed to evaluate; `on_error` took effect as if it were true.
    ErrorTaken,
    /// The condition failed to evaluate; `on_error` skipped it.
    ErrorSkipped,
}

/// One rule as it was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleTrace {
    pub rule: String,
    pub outcome: RuleOutcome,
    /// The evaluation error, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The result of `decide(policy, state, context)`; a pure function's value, compared byte for byte by `reproduce`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub policy: String,
    pub policy_hash: Hash,
    /// Number of updates folded into the state that was used.
    pub state_seq: u64,
    pub decided_by: DecidedBy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The chosen arm; empty when refused.
    pub arm: String,
    /// What will be run; absent when refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// Calls that may follow an error, in order; already within the restrictions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fallback: Vec<CallSpec>,
    /// How often a failed call is repeated before the fallback; dispatch's own default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// Kinds of error (`timeout`, `rate_limited`, ...) that the fallback answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fallback_on: Vec<String>,
    /// Probability of the arm taken; 1 for rules and pins.
    pub propensity: f64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// The selector's feature vector, shared by the arms; empty where none was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleTrace>,
    /// Why nothing may serve the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// The split in whose share this request is: it has chosen the arm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Which call of the fallback follows which error is sought in this graph; absent: in their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Box<FailoverGraph>>,
    /// Absent where nothing bounds it but weir's own limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Box<RequestBounds>>,
    /// Why the embedding was missing, where the policy wanted one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_embedding: Option<String>,
}
