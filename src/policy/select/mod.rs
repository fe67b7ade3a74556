//! Selectors: one file per family. Each gives a probability for every arm that can serve the request, never a choice;
//! the masks, the floor and the draw are `decide`'s. [`modify`] holds what maps
//! probabilities to probabilities whatever the family.

pub(super) mod fitted;
pub(super) mod fixed;
pub(super) mod linear;
pub(super) mod modify;
pub(super) mod price;
pub(super) mod similarity;

use crate::domain::{Context, ModelCard, Plan};

use super::state::State;

/// The families.
#[derive(Debug)]
pub(super) enum Selector {
    Fixed(fixed::Fixed),
    Similarity(similarity::Similarity),
    /// The least estimated cost.
    Cheapest,
    /// The least expected time.
    Fastest,
    Fitted(Box<fitted::Fitted>),
    Linear(Box<linear::Linear>),
}

/// What a selector says, per arm in the order of `arms`.
#[derive(Debug, Default)]
pub(super) struct Weighed {
    /// Mass per arm, none on arms that cannot serve. Need not add up to 1.
    pub mass: Vec<f64>,
    /// Scores, where the family has them.
    pub scores: Vec<Option<f64>>,
    /// The feature vector, where one was made.
    pub features: Vec<f64>,
    /// What each arm is expected to earn, NaN where nothing is known of it; empty where the family expects nothing. See
    /// [`super::Expects`].
    pub expected: Vec<f64>,
}

/// What a selector may look at.
pub(super) struct Situation<'a> {
    pub arms: &'a [String],
    /// Whether the arm can serve this request at all.
    pub alive: &'a [bool],
    /// Per arm that can serve, what it would run.
    pub offers: &'a [Option<Offer<'a>>],
    pub state: &'a State,
    pub context: &'a Context,
}

/// A plan that could be run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offer<'a> {
    Call {
        card: &'a ModelCard,
        /// The plan's own bound on the answer's tokens.
        max_tokens: Option<u32>,
    },
    Tree {
        plan: &'a Plan,
        /// Per call, its place among the cards.
        models: &'a [usize],
        cards: &'a [ModelCard],
    },
}

impl Selector {
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        match self {
            Selector::Fixed(f) => f.weigh(s),
            Selector::Similarity(f) => f.weigh(s),
            Selector::Cheapest => price::cheapest(s),
            Selector::Fastest => price::fastest(s),
            Selector::Fitted(f) => f.weigh(s),
            Selector::Linear(f) => f.weigh(s),
        }
    }

    /// Whether a decision needs the query's embedding.
    pub fn needs_embedding(&self) -> bool {
        match self {
            Selector::Fixed(_) | Selector::Cheapest | Selector::Fastest => false,
            Selector::Similarity(_) | Selector::Fitted(_) => true,
            Selector::Linear(f) => f.features.needs_embedding(),
        }
    }
}
