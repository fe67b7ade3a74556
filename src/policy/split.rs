//! `split`: a sticky, hashed share of the traffic for one arm, after everything else has given its probabilities. Who is in
//! the share is a hash of the split's name and of who asks, so that a session (key, tenant) stays where it is.
//!
//! What is recorded is the arm's probability over all who could have asked: (1 - share) p + share for the split's arm, and
//! (1 - share) p for the others. Over many sessions that is how often the arm is taken, so the log can be replayed.

use super::draw::{self, Purpose};
use crate::domain::{Context, Hash};

/// Who stays together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SplitBy {
    /// The conversation.
    Session,
    /// The API key.
    Key,
    /// The key's tenant.
    Tenant,
    /// Nobody: every request anew.
    Request,
}

/// A split, resolved.
#[derive(Debug)]
pub(super) struct Split {
    pub name: String,
    /// In (0, 1).
    pub share: f64,
    pub by: SplitBy,
    /// Place in the arms.
    pub arm: usize,
}

impl Split {
    /// Whether this request is in the share. Without a session, key or tenant it is as for `request`.
    fn takes(&self, context: &Context) -> bool {
        let id = match self.by {
            SplitBy::Session => context.session.id.as_str(),
            SplitBy::Key => context.key.id.as_str(),
            SplitBy::Tenant => context.key.tenant.as_str(),
            SplitBy::Request => "",
        };
        let seed = match id {
            "" => context.seed ^ word(&self.name, ""),
            id => word(&self.name, id),
        };
        draw::unit(seed, Purpose::Split as u32, 0) < self.share
    }
}

/// The first eight bytes of a hash of both.
fn word(name: &str, id: &str) -> u64 {
    let hash = Hash::of([name.as_bytes(), id.as_bytes()].join(&0).as_slice());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.0[..8]);
    u64::from_le_bytes(first)
}

/// The splits whose arm can serve this request, in order.
pub(super) fn usable<'a>(splits: &'a [Split], alive: &[bool]) -> Vec<&'a Split> {
    splits.iter().filter(|s| alive[s.arm]).collect()
}

/// The part of the traffic that no split takes.
pub(super) fn rest(splits: &[&Split]) -> f64 {
    splits.iter().map(|s| 1.0 - s.share).product()
}

/// The probabilities of the arms over all who could have asked; the first split counts first.
pub(super) fn marginal(splits: &[&Split], p: &[f64]) -> Vec<f64> {
    let mut out = p.to_vec();
    for split in splits.iter().rev() {
        out.iter_mut().for_each(|p| *p *= 1.0 - split.share);
        out[split.arm] += split.share;
    }
    out
}

/// The split that takes this request.
pub(super) fn taken<'a>(splits: &[&'a Split], context: &Context) -> Option<&'a Split> {
    splits.iter().copied().find(|s| s.takes(context))
}
