//! `cheapest` and `fastest`: the arm whose plan is expected to cost, or to take, least. Of a plan of several calls that is
//! what all of them may cost or take ([`Tokens::whole`]). What may be chosen at all is said by `only_if`, rules and
//! budgets.

use super::{Offer, Situation, Weighed};
use crate::{
    domain::{Context, ModelCard, ModelState},
    policy::reckon::Tokens,
};

/// Expected cost in USD: per call all prompt tokens, and as many answer tokens as are allowed.
pub(in crate::policy) fn estimated_cost(offer: &Offer<'_>, context: &Context) -> f64 {
    let tokens = Tokens::of(context);
    match *offer {
        Offer::Call { card, max_tokens } => tokens.cost(&card.price, max_tokens, 0.0),
        Offer::Tree { plan, models, cards } => {
            let mut models = models.iter();
            tokens.whole(plan, |a, b| a + b, &mut |call, shown| {
                let card = models.next().and_then(|m| cards.get(*m));
                card.map_or(0.0, |card| tokens.cost(&card.price, call.sampling.max_tokens, shown))
            })
        }
    }
}

/// Expected time in seconds. Branches take as long as the longest of them.
fn expected_seconds(offer: &Offer<'_>, context: &Context) -> f64 {
    match *offer {
        Offer::Call { card, max_tokens } => call_seconds(card, max_tokens, context),
        Offer::Tree { plan, models, cards } => {
            let mut models = models.iter();
            Tokens::of(context).whole(plan, f64::max, &mut |call, _| {
                let card = models.next().and_then(|m| cards.get(*m));
                card.map_or(0.0, |card| call_seconds(card, call.sampling.max_tokens, context))
            })
        }
    }
}

/// From what was measured of the model: time to the first token ([`ModelState::first_token_s`]), and the answer at the measured
/// rate. A model that has not been measured counts as 0, so that it is tried.
fn call_seconds(card: &ModelCard, max_tokens: Option<u32>, context: &Context) -> f64 {
    let idle = ModelState::default();
    let state = context.fleet.get(&card.name).unwrap_or(&idle);
    let first = state.first_token_s(context.signals.tokens);
    let rest = match state.tokens_per_s > 0.0 {
        true => f64::from(Tokens::of(context).answer(max_tokens)) / state.tokens_per_s,
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
    let scores: Vec<Option<f64>> = s.offers.iter().map(|offer| offer.as_ref().map(&score)).collect();
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
