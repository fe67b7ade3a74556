//! Selectors: one file per family. Each gives a probability for every arm that can serve the request, never a choice;
//! the masks, the floor and the draw are `decide`'s.

pub(super) mod fixed;
pub(super) mod linucb;
pub(super) mod similarity;

use crate::domain::Context;

use super::state::State;

/// The families.
#[derive(Debug)]
pub(super) enum Selector {
    Fixed(fixed::Fixed),
    Similarity(similarity::Similarity),
    LinUcb(linucb::LinUcb),
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
}

/// What a selector may look at.
pub(super) struct Situation<'a> {
    pub arms: &'a [String],
    /// Whether the arm can serve this request at all.
    pub alive: &'a [bool],
    pub state: &'a State,
    pub context: &'a Context,
}

impl Selector {
    pub fn weigh(&self, s: &Situation<'_>) -> Weighed {
        match self {
            Selector::Fixed(f) => f.weigh(s),
            Selector::Similarity(f) => f.weigh(s),
            Selector::LinUcb(f) => f.weigh(s),
        }
    }

    /// Whether a decision needs the query's embedding.
    pub fn needs_embedding(&self) -> bool {
        match self {
            Selector::Fixed(_) => false,
            Selector::Similarity(_) => true,
            Selector::LinUcb(f) => f.features.needs_embedding(),
        }
    }
}
