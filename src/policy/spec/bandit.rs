//! The selectors that learn from feedback.

use schemars::JsonSchema;
use serde::Deserialize;

/// A bandit over linear models of the reward: its own fields, and those that all three share.
macro_rules! bandit {
    ($(#[$about:meta])* $name:ident { $($(#[$field:meta])* $own:ident: $kind:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[$field])*
                #[serde(default)]
                pub $own: Option<$kind>,
            )*
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
    };
}

bandit! {
    /// Disjoint LinUCB (Li et al., 2010): per arm a ridge regression of the reward, and a bonus for what is uncertain.
    LinUcbSpec {
        /// Width of the confidence bound. Default: 0.5.
        #[schemars(range(min = 0.0))]
        alpha: f64,
    }
}

bandit! {
    /// Linear Thompson sampling (Agrawal and Goyal, 2013): an arm's probability is that of its reward being the greatest.
    ThompsonSpec {
        /// Standard deviation of the reward, given the features. Default: 0.5.
        #[schemars(extend("exclusiveMinimum" = 0))]
        noise: f64,
    }
}

bandit! {
    /// Epsilon-greedy: the greatest estimate, and with probability epsilon any arm.
    ///
    /// It finds an arm that is added among many close ones later than the other two, or not at all (`eval/bandits.md`): it is
    /// for those who want one parameter and probabilities that anyone can check.
    EpsilonGreedySpec {
        /// Probability of any arm at the beginning. Default: 0.1.
        #[schemars(range(min = 0.0, max = 1.0))]
        epsilon: f64,
        /// Factor on epsilon per update. Default: 1.
        #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
        decay: f64,
        /// Least epsilon. Default: 0.
        #[schemars(range(min = 0.0, max = 1.0))]
        least: f64,
    }
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
