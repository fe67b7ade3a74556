//! `plans:`: what may be run, as trees of calls. That each node is exactly one of `call`, `cascade`, `parallel`, `steps` and `plan`,
//! and what may stand beside which, is checked by `compile`, whose messages say more than a schema's.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::domain::{IfUnscored, Sampling};

/// Something with a `call`: that and what it sets, and fields of its own.
macro_rules! call {
    ($(#[$about:meta])* $name:ident { $($(#[$field:meta])* $own:ident: $kind:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            /// One call of a model: a name of `models`.
            pub call: Option<String>,
            $(
                $(#[$field])*
                pub $own: $kind,
            )*
            /// Of the call. 0 is greedy.
            #[schemars(range(min = 0.0, max = 2.0))]
            pub temperature: Option<f64>,
            /// Of the call.
            #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
            pub top_p: Option<f64>,
            /// Upper bound on the call's generated tokens.
            #[schemars(range(min = 1))]
            pub max_tokens: Option<u32>,
            /// Of the call.
            pub seed: Option<i64>,
            /// Texts that end the call's answer, beside the client's.
            #[schemars(length(max = 16))]
            pub stop: Vec<String>,
            /// Text put before the client's system prompt in the call.
            pub system: Option<String>,
        }

        impl $name {
            /// What it sets for its call.
            pub(in crate::policy) fn sampling(&self) -> Sampling {
                Sampling {
                    max_tokens: self.max_tokens,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    seed: self.seed,
                    stop: self.stop.clone(),
                }
            }
        }
    };
}

/// A node of a plan, and fields of its own.
macro_rules! node {
    ($(#[$about:meta])* $name:ident { $($(#[$field:meta])* $own:ident: $kind:ty,)* }) => {
        call! {
            $(#[$about])*
            $name {
                /// Stages in order, until one accepts its answer.
                #[schemars(length(min = 1))]
                cascade: Option<Vec<StageSpec>>,
                /// Branches at the same time; what becomes of their answers says `aggregate`.
                #[schemars(length(min = 1))]
                parallel: Option<Vec<BranchSpec>>,
                /// How the branches of `parallel` become one answer: `first`, `vote`, `{weighted_vote: [..]}`, `{judge: MODEL}` or
                /// `{refine: MODEL}`.
                aggregate: Option<AggregateSpec>,
                /// Another plan of this file, by name.
                plan: Option<String>,
                /// Reasoning step by step by two models, and an answer after it.
                steps: Option<Box<StepsSpec>>,
                /// Beside `call`: a second call, where the first has not begun to answer in time. Which begins first answers, the
                /// other is cancelled.
                hedge: Option<HedgeSpec>,
                $($(#[$field])* $own: $kind,)*
            }
        }

        impl $name {
            /// What all nodes have.
            pub(in crate::policy) fn node(&self) -> Node<'_> {
                let given = [
                    ("temperature", self.temperature.is_some()),
                    ("top_p", self.top_p.is_some()),
                    ("max_tokens", self.max_tokens.is_some()),
                    ("seed", self.seed.is_some()),
                    ("stop", !self.stop.is_empty()),
                    ("system", self.system.is_some()),
                    ("hedge", self.hedge.is_some()),
                ];
                Node {
                    call: self.call.as_deref(),
                    settings: given.into_iter().filter(|(_, given)| *given).map(|(key, _)| key).collect(),
                    sampling: self.sampling(),
                    system: self.system.as_deref(),
                    cascade: self.cascade.as_deref(),
                    parallel: self.parallel.as_deref(),
                    aggregate: self.aggregate.as_ref(),
                    plan: self.plan.as_deref(),
                    steps: self.steps.as_deref(),
                    hedge: self.hedge.as_ref(),
                }
            }
        }
    };
}

node! {
    /// What may be run under a name. Exactly one of `call`, `cascade`, `parallel`, `steps` and `plan`. Beside `call` stands sampling that
    /// the plan sets where the client did not.
    PlanSpec {}
}

node! {
    /// One stage of a cascade. Exactly one of `call`, `cascade`, `parallel`, `steps` and `plan`.
    StageSpec {
        /// Conditions on the stage's answer: all hold, or the next stage is asked. Not on the last stage, whose answer is taken.
        #[schemars(length(min = 1))]
        accept_when: Option<Vec<ConditionSpec>>,
        /// Stop the call while its answer comes, as soon as a condition cannot hold any more and a later stage can begin. What
        /// it has said is gone then, also where the later stages fail. A remote model is only stopped where the client streams.
        stop_early: bool,
        /// Calls that are shown the stage's answer and say whether it is right; which share says so is the score `verified`.
        verify: Option<VerifySpec>,
    }
}

call! {
    /// Calls that verify a stage's answer (AutoMix), all at once. `call` defaults to the stage's own model, `temperature` to 1
    /// (of a single one: 0), `max_tokens` to 16.
    VerifySpec {
        /// How many. Default: 8.
        #[schemars(range(min = 1, max = 63))]
        times: Option<u32>,
    }
}

node! {
    /// One branch of a parallel plan. Exactly one of `call`, `cascade`, `parallel`, `steps` and `plan`. What a call in a branch sets
    /// holds also where the client said otherwise.
    BranchSpec {
        /// That many branches of this kind. Default: 1.
        #[schemars(range(min = 1, max = 64))]
        times: Option<u32>,
    }
}

call! {
    /// A call that follows the branches of a parallel plan.
    AskedSpec {}
}

/// The second call of a call that has not begun to answer in time. What its call sets holds of it, too.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["after_ms"]))]
pub struct HedgeSpec {
    /// Milliseconds from the call to the first piece of its answer, or to a whole answer: best about the 95th percentile.
    #[schemars(range(min = 1))]
    pub after_ms: u32,
    /// A name of `models`. Default: the call's own.
    pub call: Option<String>,
}

/// What all nodes of plans have.
pub(in crate::policy) struct Node<'a> {
    pub call: Option<&'a str>,
    /// Keys that are given and only mean something beside `call`.
    pub settings: Vec<&'static str>,
    pub sampling: Sampling,
    pub system: Option<&'a str>,
    pub cascade: Option<&'a [StageSpec]>,
    pub parallel: Option<&'a [BranchSpec]>,
    pub aggregate: Option<&'a AggregateSpec>,
    pub plan: Option<&'a str>,
    pub steps: Option<&'a StepsSpec>,
    pub hedge: Option<&'a HedgeSpec>,
}

impl<'a> Node<'a> {
    /// The calibrations that its gates name, by path.
    pub fn calibrations(&self, into: &mut Vec<&'a str>) {
        for stage in self.cascade.into_iter().flatten() {
            let conditions = stage.accept_when.iter().flatten();
            into.extend(conditions.filter_map(|condition| condition.calibration.as_deref()));
            stage.node().calibrations(into);
        }
        self.parallel.into_iter().flatten().for_each(|branch| branch.node().calibrations(into));
    }
}

/// Reasoning steps (GlimpRouter): the small model begins each step; where the entropy of its first token is at least `tau`,
/// the large model writes the step. Clients get the answer, not the steps.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["small", "large"]))]
pub struct StepsSpec {
    /// Begins each step: a model, or a call with sampling.
    pub small: Option<AskSpec>,
    /// Writes the steps that the small model is unsure of.
    pub large: Option<AskSpec>,
    /// Writes the answer. Default: the large model.
    pub answer: Option<AskSpec>,
    /// Entropy of a step's first token in nats from which on the large model writes it. Default: 1.
    pub tau: Option<f64>,
    /// What ends a step. Default: an empty line.
    pub separator: Option<String>,
    /// What stands before the first step. Default: `<think>` and a line feed.
    pub open: Option<String>,
    /// What ends the reasoning where a model writes it, and stands before the answer. Default: `</think>`.
    pub close: Option<String>,
    /// Default: 16.
    #[schemars(range(min = 1, max = 31))]
    pub max_steps: Option<u32>,
    /// Longest step. Default: 512.
    #[schemars(range(min = 1))]
    pub step_tokens: Option<u32>,
    /// Longest reasoning; it ends with the step that reaches this. Default: 8192.
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
}

/// How branches become one answer: by a word, or with a parameter.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum AggregateSpec {
    Named(AggregateName),
    Made(Box<MadeAggregateSpec>),
}

/// How branches become one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AggregateName {
    /// The branch that is complete first; the others are cancelled.
    First,
    /// The answer that most branches give, compared by canonical form.
    Vote,
}

/// How branches become one answer. Exactly one of `weighted_vote`, `judge` and `refine`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MadeAggregateSpec {
    /// A vote with one weight per entry of `parallel`; each of an entry's `times` branches has it.
    pub weighted_vote: Option<Vec<f64>>,
    /// One more call, of a model or with sampling, is shown the answers and names the best.
    pub judge: Option<AskSpec>,
    /// One more call, of a model or with sampling, is shown the answers and writes its own.
    pub refine: Option<AskSpec>,
}

/// A name of `models`, or a call with what it sets.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum AskSpec {
    Model(String),
    Call(Box<AskedSpec>),
}

/// One condition on an answer: a score, and the side of a threshold on which it has to lie. Exactly one of `below` and
/// `above`; of `p_wrong` instead `max_error` or `accepted`, from which the calibration finds the threshold.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["score"]))]
pub struct ConditionSpec {
    /// What is measured of the answer.
    pub score: Option<ScoreName>,
    /// Which quantile of the tokens' log-probabilities: 0 is the least likely token, 0.5 the median. For
    /// `logprob_quantile`, and only there.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub q: Option<f64>,
    /// The score has to be less than this, in its own unit.
    pub below: Option<f64>,
    /// The score has to be more than this, in its own unit.
    pub above: Option<f64>,
    /// For `p_wrong`: the file of a calibration (`weir policy fit --cascade`), beside this one. It says which score is read.
    pub calibration: Option<String>,
    /// For `p_wrong`: the share of accepted answers that may be wrong. The threshold is the one that keeps it with this
    /// `confidence`, over draws of the calibration's answers; for as long as answers come from where these came from.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub max_error: Option<f64>,
    /// For `p_wrong`: the share of answers that is accepted, the surest of the calibration's; what is left is escalated, so that it
    /// says what is spent.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub accepted: Option<f64>,
    /// Beside `max_error`. Default: 0.95.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub confidence: Option<f64>,
    /// What follows where an answer carries too little for the score. Default: escalate.
    pub if_unscored: Option<IfUnscored>,
}

/// What can be measured of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreName {
    /// Mean entropy of the tokens' distributions, in nats, at least 0: low is sure.
    MeanTokenEntropy,
    /// Entropy of the first token's distribution, in nats, at least 0: low is sure.
    FirstTokenEntropy,
    /// Mean difference between the two largest probabilities at each token, 0 to 1: high is sure.
    MeanMargin,
    /// Mean log-probability of the tokens (natural logarithm), at most 0: high is sure.
    MeanLogprob,
    /// The quantile `q` of the tokens' log-probabilities (natural logarithm), at most 0: high is sure.
    LogprobQuantile,
    /// How far the branches of a parallel stage disagree: 0 when all answers are the same, 1 when no two are.
    Disagreement,
    /// Which share of the stage's `verify` calls says that the answer is right, 0 to 1: high is sure.
    Verified,
    /// How probably the answer is wrong, 0 to 1, by a `calibration`.
    PWrong,
}
