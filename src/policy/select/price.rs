//! `cheapest` and `fastest`: the arm whose call is expected to cost, or to take, least. What may be chosen at all is said
//! by `only_if`, rules and budgets.

use super::{Offer, Situation, Weighed};
use crate::domain::{Context, ModelState};

/// Tokens of an answer where neither the client nor the plan bounds them.
const ANSWER_TOKENS: u32 = 256;

/// Expected cost of a call in USD: all prompt tokens, and as many answer tokens as are allowed.
pub(in crate::policy) fn estimated_cost(offer: &Offer<'_>, context: &Context) -> f64 {
    let price = &offer.card.price;
    let tokens =
        f64::from(context.signals.tokens) * price.input + f64::from(answer_tokens(offer, context)) * price.output;
    tokens / 1e6
}

/// The client's bound or the plan's, whichever is less, and 256 without any.
fn answer_tokens(offer: &Offer<'_>, context: &Context) -> u32 {
    match (context.request.max_tokens, offer.max_tokens) {
        (0, None) => ANSWER_TOKENS,
        (0, Some(limit)) => limit,
        (asked, None) => asked,
        (asked, Some(limit)) => asked.min(limit),
    }
}

/// Expected time in seconds, from what was measured of the model's last calls: time to the first token, once more per
/// call that waits already, and the answer at the measured rate. A model that has not been measured counts as 0, so that
/// it is tried.
fn expected_seconds(offer: &Offer<'_>, context: &Context) -> f64 {
    let idle = ModelState::default();
    let state = context.fleet.get(&offer.card.name).unwrap_or(&idle);
    let first = state.ttft_ms / 1000.0 * (1.0 + f64::from(state.waiting));
    let rest = match state.tokens_per_s > 0.0 {
        true => f64::from(answer_tokens(offer, context)) / state.tokens_per_s,
        false => 0.0,
    };
    first + rest
}

/// The score is minus the expected cost.
pub(super) fn cheapest(s: &Situation<'_>) -> Weighed {
    greatest(s, |offer| -estimated_cost(offer, s.context))
}

/// The score is minus the expected time.
pub(super) fn fastest(s: &Situation<'_>) -> Weighed {
    greatest(s, |offer| -expected_seconds(offer, s.context))
}

/// All for the greatest score, ties to the first.
fn greatest(s: &Situation<'_>, score: impl Fn(&Offer<'_>) -> f64) -> Weighed {
    let scores: Vec<Option<f64>> = s.calls.iter().map(|offer| offer.as_ref().map(&score)).collect();
    let mut best: Option<(f64, usize)> = None;
    for (i, score) in scores.iter().enumerate() {
        if let Some(score) = score
            && s.alive[i]
            && best.is_none_or(|(before, _)| *score > before)
        {
            best = Some((*score, i));
        }
    }
    let mass = (0..s.arms.len()).map(|i| if best.is_some_and(|(_, b)| b == i) { 1.0 } else { 0.0 }).collect();
    Weighed { mass, scores, ..Weighed::default() }
}
