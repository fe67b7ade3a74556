//! `cheapest` and `fastest`: the arm whose plan is expected to cost, or to take, least. Of a plan of several calls that is
//! what all of them may cost or take ([`Tokens::whole`]). What a model has of the prompt already is reckoned at its price for cached
//! tokens, so that a session that leaves its model pays for what it forfeits there. What may be chosen at all is said by `only_if`, rules and
//! budgets.

use super::{Offer, Situation, Weighed};
use crate::{
    domain::{Context, ModelCard, ModelState},
    policy::reckon::{Shown, Tokens},
};

/// Most that it is reckoned to cost in USD: per call all prompt tokens at their full price, and as many answer tokens as are allowed.
pub(in crate::policy) fn estimated_cost(offer: &Offer<'_>, context: &Context) -> f64 {
    cost(offer, context, &|_| 0)
}

/// Cost in USD where a model has so many tokens of the prompt already.
fn cost(offer: &Offer<'_>, context: &Context, had: &dyn Fn(&ModelCard) -> u32) -> f64 {
    let tokens = Tokens::of(context);
    let call = |card: &ModelCard, limit, shown| {
        tokens.cost(&card.price, limit, shown) - tokens.saved(&card.price, had(card), shown)
    };
    match *offer {
        Offer::Call { card, max_tokens } => call(card, max_tokens, Shown::REQUEST),
        Offer::Tree { plan, models, cards } => {
            let mut models = models.iter();
            tokens.whole(plan, |a, b| a + b, &mut |spec, shown| {
                let card = models.next().and_then(|m| cards.get(*m));
                card.map_or(0.0, |card| call(card, spec.sampling.max_tokens, shown))
            })
        }
    }
}

/// Tokens of the prompt that a model is expected to have already: of one in the process the share that is in its memory, of another
/// one what it read and wrote in the session's last turn, where that was its own.
fn had(card: &ModelCard, context: &Context) -> u32 {
    let Context { session, signals, fleet, .. } = context;
    if let Some(state) = fleet.get(&card.name).filter(|state| state.prompt_tokens > 0) {
        let resident = state.resident_tokens.min(state.prompt_tokens);
        let share = u64::from(signals.tokens) * u64::from(resident) / u64::from(state.prompt_tokens);
        return u32::try_from(share).unwrap_or(u32::MAX);
    }
    if session.last_model == card.name { session.last_tokens } else { 0 }
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
    greatest(s, |offer| -cost(offer, s.context, &|card| had(card, s.context)))
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
