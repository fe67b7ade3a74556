//! `epsilon_greedy`: the arm with the greatest estimate θ·x, and with probability ε any (Langford, Zhang, "The
//! epoch-greedy algorithm for contextual multi-armed bandits", NIPS 2007, with a ridge regression per arm). ε shrinks
//! with what was learnt: ε after n updates is `epsilon` times `decay`ⁿ, and never below `least`.

use super::{Belief, greedy};

/// Parameters, with defaults filled in.
#[derive(Debug)]
pub(in crate::policy) struct EpsilonGreedy {
    pub epsilon: f64,
    /// Factor per update, in (0, 1].
    pub decay: f64,
    pub least: f64,
}

impl EpsilonGreedy {
    /// ε after `updates` updates.
    fn now(&self, updates: u64) -> f64 {
        (self.epsilon * libm::pow(self.decay, updates as f64)).max(self.least)
    }

    pub fn shares(&self, beliefs: &[Belief], updates: u64) -> Vec<f64> {
        let epsilon = self.now(updates);
        let each = epsilon / beliefs.len() as f64;
        let mut shares = greedy(beliefs, |b| b.mean - b.price);
        shares.iter_mut().for_each(|s| *s = each + (1.0 - epsilon) * *s);
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epsilon_shrinks_to_the_least() {
        let e = EpsilonGreedy { epsilon: 0.5, decay: 0.9, least: 0.05 };
        assert_eq!(e.now(0), 0.5);
        assert!((e.now(3) - 0.3645).abs() < 1e-12);
        assert_eq!(e.now(1000), 0.05);
        let belief = |mean| Belief { mean, width: 1.0, price: 0.0 };
        let shares = e.shares(&[belief(0.1), belief(0.4)], 0);
        assert_eq!(shares, [0.25, 0.75]);
    }
}
