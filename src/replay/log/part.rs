//! What a policy makes of some entries.

use std::{borrow::Cow, collections::BTreeMap};

use super::{
    Choice, Differing,
    entry::{Entry, each_chance},
    measures::End,
    rows::{DIMENSIONS, FEATURES, Weighed},
};
use crate::{
    domain::{Context, DecidedBy, Decision},
    policy::{Expects, Policy, State, explain, query_feature},
};

/// Decisions that are shown, of those where a policy differs most from the log.
const SHOWN: usize = 10;

/// What came of some entries. Parts are made on any core and added in the order of the log, so that all sums are the same
/// however it is cut.
#[derive(Default)]
pub(super) struct Part {
    pub decisions: usize,
    pub agreed: usize,
    pub by_rule: usize,
    pub skipped: BTreeMap<String, usize>,
    /// Names of arms by their numbers here, and how often each was chosen.
    pub arms: Vec<(String, usize)>,
    pub rows: Vec<Weighed>,
    /// The weight of each decision whose end is known, and that end.
    pub ends: Vec<(f64, End)>,
    /// Where the arm agreed and the reward is known: the session, and the reward.
    pub rewards: Vec<(u64, f64)>,
    /// Probabilities of what the log could not have done, where there are any.
    pub unsupported: Vec<f64>,
    pub choices: Vec<Choice>,
    /// The most different first.
    pub differing: Vec<Differing>,
    /// What the policy expected of the logged arms, and what came.
    pub expected: Vec<(f64, f64)>,
}

impl Part {
    /// An entry of the policy's own, which is derived elsewhere.
    pub(super) fn own(&mut self, policy: &Policy, entry: &Entry) {
        let arm = self.number(&entry.arm);
        self.arms[arm as usize].1 += 1;
        self.by_rule += usize::from(entry.decided_by == DecidedBy::Rule);
        self.rewards.extend(entry.reward(policy).map(|r| (entry.session, r)));
        if entry.apart().is_none() {
            self.weigh(policy, entry, arm, 1.0, vec![(arm, 1.0)]);
        }
    }

    /// The entry's context as the policy sees it, or `None` where it is left out, which is counted.
    pub(super) fn seen<'a>(&mut self, policy: &Policy, entry: &'a Entry) -> Option<Cow<'a, Context>> {
        let seen = match entry.apart() {
            Some(why) => Err(why.to_owned()),
            None => entry.seen_by(policy),
        };
        seen.map_err(|why| count(&mut self.skipped, &why)).ok()
    }

    /// What the policy makes of an entry; the decision, and its reward, if it is known and the arms are the same.
    pub(super) fn other(
        &mut self,
        policy: &Policy,
        state: &State,
        listed: bool,
        entry: &Entry,
        context: &Context,
    ) -> (Decision, Option<f64>) {
        let (decision, expected) = policy.decide_expecting(state, context);
        self.decisions += 1;
        self.by_rule += usize::from(entry.decided_by == DecidedBy::Rule);
        let chosen = self.number(&decision.arm) as usize;
        self.arms[chosen].1 += 1;
        if listed {
            self.choices.push(Choice {
                id: entry.id.to_string(),
                logged: entry.arm.clone(),
                chosen: decision.arm.clone(),
                propensity: decision.propensity,
            });
        }
        if let Some(of) = policy.expects()
            && let Some(at) = decision.candidates.iter().position(|c| c.arm == entry.arm)
            && let Some((predicted, came)) = expected.get(at).zip(came(policy, of, entry))
        {
            self.expected.push((*predicted, came));
        }
        let mut target = Vec::with_capacity(decision.candidates.len());
        let (mut there, mut of_logged) = (0.0, 0.0);
        each_chance(&decision, |arm, p| {
            if entry.could.iter().any(|(name, _)| name == arm) {
                there += p;
            }
            if entry.arm == arm {
                of_logged += p;
            }
            target.push((self.number(arm), p));
        });
        if there < 1.0 {
            self.unsupported.push(1.0 - there);
        }
        if entry.propensity > 0.0 {
            let arm = self.number(&entry.arm);
            self.weigh(policy, entry, arm, of_logged / entry.propensity, target);
        }
        if decision.arm != entry.arm {
            if self.differing.len() < SHOWN || self.differing.last().is_some_and(|d| of_logged < d.target) {
                keep(
                    &mut self.differing,
                    Differing {
                        id: entry.id.to_string(),
                        logged: entry.arm.clone(),
                        logged_propensity: entry.propensity,
                        target: of_logged,
                        chosen: decision.arm.clone(),
                        propensity: decision.propensity,
                        explanation: explain::text(&decision, context),
                    },
                );
            }
            return (decision, None);
        }
        self.agreed += 1;
        let reward = entry.reward(policy);
        self.rewards.extend(reward.map(|r| (entry.session, r)));
        (decision, reward)
    }

    fn number(&mut self, arm: &str) -> u32 {
        let known = self.arms.iter().position(|(name, _)| name == arm);
        known.unwrap_or_else(|| {
            self.arms.push((arm.to_owned(), 0));
            self.arms.len() - 1
        }) as u32
    }

    fn weigh(&mut self, policy: &Policy, entry: &Entry, arm: u32, weight: f64, target: Vec<(u32, f64)>) {
        let mut features = [1.0; DIMENSIONS];
        for (x, name) in features[1..].iter_mut().zip(FEATURES) {
            *x = entry.context.as_ref().ok().and_then(|c| query_feature(name, &c.signals)).unwrap_or(0.0);
        }
        let reward = entry.reward(policy);
        self.ends.extend(End::of(entry).map(|end| (weight, end)));
        // The product over the session is known where parts are added.
        self.rows.push(Weighed { session: entry.session, arm, weight, along: weight, reward, features, target });
    }
}

/// What came of an entry, in the sense of what was expected.
fn came(policy: &Policy, of: Expects, entry: &Entry) -> Option<f64> {
    match of {
        Expects::Quality => policy.quality(entry.observed.as_ref()?),
        Expects::Reward => entry.reward(policy),
    }
}

pub(super) fn count(counts: &mut BTreeMap<String, usize>, name: &str) {
    match counts.get_mut(name) {
        Some(count) => *count += 1,
        None => _ = counts.insert(name.to_owned(), 1),
    }
}

/// Keeps a decision if it is among those that differ most; of two that differ as much, the earlier.
pub(super) fn keep(differing: &mut Vec<Differing>, one: Differing) {
    let at = differing.partition_point(|d| d.target <= one.target);
    if at < SHOWN {
        differing.insert(at, one);
        differing.truncate(SHOWN);
    }
}
