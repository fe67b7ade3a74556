//! What a plan may cost and how long it may take, before anything runs: all of its calls, as if none were spared. Nobody
//! knows beforehand how often a stage escalates or a vote is decided early, so a bound is all that can be said; `cheapest`
//! and `fastest` compare plans of several calls by it, too.

use serde::Serialize;

use super::Policy;
use crate::domain::{Aggregate, CallSpec, Context, Plan, Price};

/// Tokens of an answer that nothing bounds, in a decision.
const ANSWER_TOKENS: u32 = 256;
/// Tokens of the prompt that [`Policy::bounds`] reckons with, and of an answer that nothing bounds.
pub const BOUNDS_TOKENS: u32 = 1000;

/// Tokens of what weir itself asks about answers, beside them.
const QUESTION_TOKENS: f64 = 64.0;

/// What a call is shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Shown {
    /// The client's request, and behind it so many tokens of answers or of reasoning.
    Request(f64),
    /// A question about so many tokens of answers, in which the request is quoted: what a model has of the request does not help,
    /// and nothing of the client's bounds the answer.
    Question(f64),
}

impl Shown {
    pub const REQUEST: Self = Self::Request(0.0);
}

/// How many tokens calls are reckoned with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens {
    pub prompt: u32,
    /// The client's bound on an answer; 0: none.
    pub asked: u32,
    /// Of an answer that neither client nor plan bounds.
    pub unbounded: u32,
}

impl Tokens {
    /// Of a request that is to be decided.
    pub fn of(context: &Context) -> Self {
        Self { prompt: context.signals.tokens, asked: context.request.max_tokens, unbounded: ANSWER_TOKENS }
    }

    /// Of an answer: the client's bound or the plan's, whichever is less.
    pub fn answer(&self, limit: Option<u32>) -> u32 {
        match (self.asked, limit) {
            (0, None) => self.unbounded,
            (0, Some(limit)) => limit,
            (asked, None) => asked,
            (asked, Some(limit)) => asked.min(limit),
        }
    }

    fn prompt_of(&self, shown: Shown) -> f64 {
        let more = match shown {
            Shown::Request(tokens) => tokens,
            Shown::Question(tokens) => tokens + QUESTION_TOKENS,
        };
        f64::from(self.prompt) + more
    }

    fn answer_of(&self, limit: Option<u32>, shown: Shown) -> u32 {
        match shown {
            Shown::Request(_) => self.answer(limit),
            Shown::Question(_) => limit.unwrap_or(self.unbounded),
        }
    }

    /// Of one call, prompt and answer together.
    pub fn all(&self, limit: Option<u32>, shown: Shown) -> u64 {
        self.prompt_of(shown) as u64 + u64::from(self.answer_of(limit, shown))
    }

    /// Cost of one call in USD: all tokens that it is shown, and as many of its own as are allowed.
    pub fn cost(&self, price: &Price, limit: Option<u32>, shown: Shown) -> f64 {
        (self.prompt_of(shown) * price.input + f64::from(self.answer_of(limit, shown)) * price.output) / 1e6
    }

    /// USD that a call costs less where the model has so many of the prompt's tokens already.
    pub fn saved(&self, price: &Price, had: u32, shown: Shown) -> f64 {
        let cached = price.cached_input.unwrap_or(price.input);
        match shown {
            Shown::Request(_) => f64::from(had.min(self.prompt)) * (price.input - cached) / 1e6,
            Shown::Question(_) => 0.0,
        }
    }

    /// A plan's whole, from what `of` says of each call, in the order of [`Plan::calls`]; its second argument is
    /// what the call is shown. Stages add up, branches come `together`.
    pub fn whole(
        &self,
        plan: &Plan,
        together: fn(f64, f64) -> f64,
        of: &mut dyn FnMut(&CallSpec, Shown) -> f64,
    ) -> f64 {
        self.walk(plan, together, of).0
    }

    /// The whole, and the most tokens that the plan's answer has.
    fn walk(
        &self,
        plan: &Plan,
        together: fn(f64, f64) -> f64,
        of: &mut dyn FnMut(&CallSpec, Shown) -> f64,
    ) -> (f64, f64) {
        let answer = |call: &CallSpec| f64::from(self.answer(call.sampling.max_tokens));
        match plan {
            Plan::Call(call) => (of(call, Shown::REQUEST), answer(call)),
            Plan::Hedged { call, hedge, .. } => {
                (together(of(call, Shown::REQUEST), of(hedge, Shown::REQUEST)), answer(call).max(answer(hedge)))
            }
            Plan::Cascade(stages) => stages.iter().fold((0.0, 0.0), |(sum, most), stage| {
                let (cost, tokens) = self.walk(&stage.plan, together, of);
                (sum + cost, most.max(tokens))
            }),
            Plan::Parallel { branches, aggregate } => {
                let (mut whole, mut most, mut shown) = (0.0, 0.0_f64, 0.0);
                for branch in branches {
                    let (cost, tokens) = self.walk(branch, together, of);
                    whole = together(whole, cost);
                    most = most.max(tokens);
                    shown += tokens;
                }
                match aggregate {
                    Aggregate::Judge { call } => whole += of(call, Shown::Question(shown)),
                    Aggregate::Refine { call } => {
                        whole += of(call, Shown::Request(shown));
                        most = most.max(answer(call));
                    }
                    Aggregate::First | Aggregate::Vote | Aggregate::WeightedVote { .. } => {}
                }
                (whole, most)
            }
            Plan::Steps(steps) => {
                let shown = Shown::Request(f64::from(steps.max_tokens));
                let cost = |(call, times): (&CallSpec, u32)| f64::from(times) * of(call, shown);
                (steps.times().into_iter().map(cost).sum(), answer(&steps.answer))
            }
            Plan::Verified(verified) => {
                let (whole, tokens) = self.walk(&verified.plan, together, of);
                let one = of(&verified.by, Shown::Question(tokens));
                let all = (1..verified.times).fold(one, |sum, _| together(sum, one));
                (whole + all, tokens)
            }
        }
    }
}

/// What can be said of a plan before anything runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bounds {
    pub name: String,
    /// In one line, with the file's names for models.
    pub plan: String,
    /// Retries and the request's fallback aside.
    pub calls_at_most: u32,
    /// Of all calls, each with the dearest entry of its model: for a prompt of [`BOUNDS_TOKENS`], and as many tokens per
    /// answer where the plan does not bound them. A judge or a refining call is shown the branches' answers.
    pub cost_at_most_usd: f64,
}

impl Policy {
    /// The bounds of the file's `plans`, by name.
    pub fn bounds(&self) -> Vec<Bounds> {
        let tokens = Tokens { prompt: BOUNDS_TOKENS, asked: 0, unbounded: BOUNDS_TOKENS };
        let plans = self.targets.iter().filter(|target| target.named);
        plans
            .map(|target| {
                let mut entries = target.calls.iter();
                let mut dearest = |call: &CallSpec, shown: Shown| {
                    let entries = entries.next().into_iter().flatten();
                    let cost = |m: &usize| tokens.cost(&self.cards[*m].price, call.sampling.max_tokens, shown);
                    entries.map(cost).fold(0.0, f64::max)
                };
                Bounds {
                    name: target.name.clone(),
                    plan: target.plan.to_string(),
                    calls_at_most: target.plan.most_calls(),
                    cost_at_most_usd: tokens.whole(&target.plan, |a, b| a + b, &mut dearest),
                }
            })
            .collect()
    }
}
