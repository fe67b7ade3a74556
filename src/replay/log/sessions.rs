//! Weights of whole sessions. Where what a policy does in one turn changes what is asked in the next, a turn's weight alone
//! is not enough: the request itself came about under the logging policy. Per-decision importance sampling (Precup, Sutton,
//! Singh, "Eligibility traces for off-policy policy evaluation", ICML 2000, section 3) weighs the reward of turn t by the
//! product of the weights of turns 1 to t. The variance grows with the length of sessions, the bias of single weights is
//! gone.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::replay::estimate::Estimate;

/// Sessions that are remembered at least. One that comes back after twice as many others begins anew.
const REMEMBERED: usize = 1 << 18;

/// The reward per decision where sessions are weighed as wholes: self-normalised over all turns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BySession {
    pub reward: Estimate,
    /// How many decisions of the policy's own log they are worth (Kish).
    pub effective: f64,
    /// Turns of the longest session.
    pub longest: u32,
}

/// Products of weights so far, by session.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Sessions {
    young: HashMap<u64, (f64, u32)>,
    old: HashMap<u64, (f64, u32)>,
    pub(super) longest: u32,
}

impl Sessions {
    /// The product up to and with this turn.
    pub(super) fn along(&mut self, session: u64, weight: f64) -> f64 {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        let before = self.young.get(&session).or_else(|| self.old.get(&session));
        let (product, turns) = before.map_or((weight, 1), |(product, turns)| (product * weight, turns + 1));
        self.young.insert(session, (product, turns));
        self.longest = self.longest.max(turns);
        product
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::{
        estimate::{Asked, Row, estimate},
        metrics::SplitMix,
    };

    #[test]
    fn what_a_turn_does_to_the_next_is_weighed() {
        // Two turns. Arm 1 in the first makes the second easy (reward 1), arm 0 hard (0); the first earns nothing. The log takes
        // arm 1 with a half, the policy with 0.9 in both turns: it earns (0 + 0.9) / 2 per decision. By single weights the
        // second turn would be as easy as in the log: (0 + 0.5) / 2.
        let mut rng = SplitMix(7);
        let mut sessions = Sessions::default();
        let (mut single, mut whole) = (Vec::new(), Vec::new());
        for session in 0..40_000u64 {
            let arms = [rng.below(2), rng.below(2)];
            for (turn, arm) in arms.iter().enumerate() {
                let weight = if *arm == 1 { 1.8 } else { 0.2 };
                let reward = if turn == 1 && arms[0] == 1 { 1.0 } else { 0.0 };
                single.push(Row::plain(session, weight, reward));
                whole.push(Row::plain(session, sessions.along(session, weight), reward));
            }
        }
        let value = |rows: &[Row]| estimate(rows, Asked::default()).unwrap().snips.value;
        assert!((value(&single) - 0.25).abs() < 0.01, "{}", value(&single));
        assert!((value(&whole) - 0.45).abs() < 0.01, "{}", value(&whole));
        assert_eq!(sessions.longest, 2);
    }

    #[test]
    fn the_memory_of_sessions_is_bounded() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.along(1, 2.0), 2.0);
        (10..10 + REMEMBERED as u64).for_each(|s| _ = sessions.along(s, 1.0));
        // Still known, from the old half; then too many others came.
        assert_eq!(sessions.along(1, 2.0), 4.0);
        (10..10 + 3 * REMEMBERED as u64).for_each(|s| _ = sessions.along(s, 1.0));
        assert_eq!(sessions.along(1, 2.0), 2.0);
        assert!(sessions.young.len() <= REMEMBERED && sessions.old.len() <= REMEMBERED);
    }
}
