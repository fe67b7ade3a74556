//! One policy's way over the log.

use std::{collections::BTreeMap, io};

use super::{
    Choice, Differing, Needed, ReplayedPolicy,
    entry::{Entry, each_chance},
    rows::{DIMENSIONS, FEATURES, Rows, Weighed},
};
use crate::{
    domain::{Context, DecidedBy, Decision, StateUpdate},
    policy::{Policy, State, explain, query_feature},
    replay::{
        direct::{Direct, PARTS},
        estimate::{Asked, Estimator},
    },
};

/// Share of the policy's probability that may lie on arms that the log could not have taken, for an estimate to be given.
const UNSUPPORTED: f64 = 0.01;
/// What is advised where a log cannot tell.
const FLOOR: f64 = 0.02;
/// How exactly people want to know a reward.
const WITHIN: f64 = 0.01;
/// Decisions that are shown, of those where a policy differs most from the log.
const SHOWN: usize = 10;
/// Above this number of decisions their choices are not listed.
const LISTED: usize = 20_000;

/// One policy's way over the whole log.
pub(super) struct Walk<'a> {
    pub(super) policy: &'a Policy,
    out: ReplayedPolicy,
    state: State,
    /// Numbers of arms, by name, and per number: taken by the log, and of these rewarded.
    arms: BTreeMap<String, u32>,
    taken: Vec<(f64, f64)>,
    direct: Direct,
    rows: Rows,
    /// The replay method: rewards where the arm agreed, all alike.
    agreed: Estimator,
    /// Of all rewards that are known: how many, and their squares.
    known: (usize, f64),
}

/// What came of some entries. Parts are made on any core and added in the order of the log, so that all sums are the same
/// however it is cut.
#[derive(Default)]
pub(super) struct Part {
    decisions: usize,
    agreed: usize,
    by_rule: usize,
    skipped: BTreeMap<String, usize>,
    /// Names of arms by their numbers here, and how often each was chosen.
    arms: Vec<(String, usize)>,
    rows: Vec<Weighed>,
    /// Where the arm agreed and the reward is known: the session, and the reward.
    rewards: Vec<(u64, f64)>,
    /// Probabilities of what the log could not have done, where there are any.
    unsupported: Vec<f64>,
    choices: Vec<Choice>,
    /// The most different first.
    differing: Vec<Differing>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(policy: &'a Policy, made_the_log: bool) -> Self {
        Self {
            policy,
            out: ReplayedPolicy {
                policy: policy.name().to_owned(),
                hash: policy.hash().short(),
                made_the_log,
                ..ReplayedPolicy::default()
            },
            state: policy.initial_state(),
            arms: BTreeMap::new(),
            taken: Vec::new(),
            direct: Direct::new(DIMENSIONS, 0),
            rows: Rows::new(),
            agreed: Estimator::new(Asked { rewards: (f64::MIN, f64::MAX), ..Asked::default() }),
            known: (0, 0.0),
        }
    }

    /// Whether entries have to be taken in their order, since what came of one changes what is decided next.
    pub(super) fn learns(&self) -> bool {
        self.policy.learns() && !self.out.made_the_log
    }

    /// Decides on entries, in any order of such calls.
    pub(super) fn judge(&self, entries: &[Entry]) -> Part {
        let mut part = Part::default();
        for entry in entries {
            match (self.out.made_the_log, entry.apart()) {
                (true, _) => part.own(self.policy, entry),
                (false, Some(why)) => count(&mut part.skipped, why),
                (false, None) => match entry.seen_by(self.policy) {
                    Ok(context) => {
                        let decision = self.policy.decide(&self.state, &context);
                        part.other(self.policy, self.lists(&part), entry, &decision, &context);
                    }
                    Err(why) => count(&mut part.skipped, &why),
                },
            }
        }
        part
    }

    /// The same for a policy that learns, in the order of the log.
    pub(super) fn learn(&mut self, entries: &[Entry]) -> Part {
        let mut part = Part::default();
        for entry in entries {
            if let Some(why) = entry.apart() {
                count(&mut part.skipped, why);
                continue;
            }
            let context = match entry.seen_by(self.policy) {
                Ok(context) => context,
                Err(why) => {
                    count(&mut part.skipped, &why);
                    continue;
                }
            };
            let decision = self.policy.decide(&self.state, &context);
            let agreed = part.other(self.policy, self.lists(&part), entry, &decision, &context);
            let Some(reward) = agreed.filter(|_| decision.decided_by == DecidedBy::Select) else { continue };
            let cost_usd = entry.observed.as_ref().map_or(0.0, |o| o.cost_usd);
            let update = StateUpdate {
                propensity: entry.propensity,
                ..StateUpdate::of(&decision, self.state.seq, reward, cost_usd, context.now)
            };
            if let Err(error) = self.policy.fold(&mut self.state, &update) {
                count(&mut part.skipped, &format!("not learnt from: {error}"));
            }
        }
        part
    }

    /// Whether choices are still listed.
    fn lists(&self, part: &Part) -> bool {
        self.out.decisions + part.decisions <= LISTED
    }

    /// Adds a part; parts come in the order of the log.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    pub(super) fn add(&mut self, part: Part) -> io::Result<()> {
        let out = &mut self.out;
        out.decisions += part.decisions;
        out.agreed += part.agreed;
        out.by_rule += part.by_rule;
        out.rewarded += part.rewards.len();
        part.skipped.into_iter().for_each(|(why, n)| *out.skipped.entry(why).or_default() += n);
        for (session, reward) in part.rewards {
            let row = super::Row {
                session,
                weight: 1.0,
                reward: Some(reward),
                observed: 1.0,
                model_taken: 0.0,
                model_target: 0.0,
            };
            // A reward that is no number is said by the other estimators.
            let _ = self.agreed.take(&row);
        }
        part.unsupported.iter().for_each(|p| out.unsupported += p);
        match out.decisions <= LISTED {
            true => out.choices.extend(part.choices),
            false => out.choices = Vec::new(),
        }
        part.differing.into_iter().for_each(|d| keep(&mut out.differing, d));
        let mut numbers = Vec::with_capacity(part.arms.len());
        for (name, chosen) in part.arms {
            if chosen > 0 {
                *self.out.arms.entry(name.clone()).or_default() += chosen;
            }
            let next = self.arms.len() as u32;
            numbers.push(*self.arms.entry(name).or_insert(next));
        }
        self.taken.resize(self.arms.len(), (0.0, 0.0));
        for mut row in part.rows {
            let number = |local: u32| numbers[local as usize];
            row.arm = number(row.arm);
            row.target.iter_mut().for_each(|(arm, _)| *arm = number(*arm));
            let taken = &mut self.taken[row.arm as usize];
            taken.0 += 1.0;
            if let Some(reward) = row.reward {
                taken.1 += 1.0;
                self.known = (self.known.0 + 1, self.known.1 + reward * reward);
                self.out.rewarded_in_log += 1;
                self.direct.take(half(row.session), row.arm as usize, &row.features, reward);
            }
            self.rows.push(&row)?;
        }
        Ok(())
    }

    /// The policy's report, when all entries are taken. `derived` is what became of its own decisions.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub(super) fn finish(
        mut self,
        derived: Option<(usize, usize, BTreeMap<String, usize>)>,
        days: f64,
    ) -> io::Result<ReplayedPolicy> {
        let mut out = self.out;
        if let Some((decisions, agreed, impossible)) = derived {
            (out.decisions, out.agreed) = (decisions, agreed);
            out.skipped = impossible;
        }
        if let Ok(agreed) = self.agreed.finish() {
            (out.mean_reward, out.mean_interval) = (Some(agreed.snips.value), agreed.snips.interval);
        }
        out.unsupported /= out.decisions.max(1) as f64;
        if out.unsupported > UNSUPPORTED {
            let mut why = format!(
                "{:.1} % of what it would do the log could never have done, so nothing is known of it: let the policy that \
                 serves explore (`min_propensity: {FLOOR}`), without rules that decide for these requests",
                100.0 * out.unsupported
            );
            if let Some(days) = days_with_floor(self.known, days) {
                why += &format!("; {} of such traffic would then tell to ±0.01", in_days(days));
            }
            out.no_estimate = Some(why);
            return Ok(out);
        }
        self.direct.reach(self.arms.len());
        let fitted = self.direct.fit();
        let mut estimator = Estimator::new(Asked { rewards: (f64::MIN, f64::MAX), ..Asked::default() });
        let mut wrong = None;
        self.rows.read(|row| {
            let model = |arm: u32| fitted.predict(half(row.session), arm as usize, &row.features);
            let (taken, seen) = self.taken[row.arm as usize];
            let row = super::Row {
                session: row.session,
                weight: row.weight,
                reward: row.reward,
                observed: if seen > 0.0 { seen / taken } else { 1.0 },
                model_taken: model(row.arm),
                model_target: row.target.iter().map(|(arm, p)| p * model(*arm)).sum(),
            };
            if let Err(error) = estimator.take(&row) {
                wrong.get_or_insert(error);
            }
        })?;
        match wrong.map_or_else(|| estimator.finish(), Err) {
            Ok(estimates) => {
                let half = estimates.dr.interval.map(|(low, high)| (high - low) / 2.0);
                out.to_one_hundredth = half.filter(|half| *half > WITHIN).map(|half| {
                    let times = (half / WITHIN).powi(2);
                    Needed { decisions: times * out.decisions as f64, days: times * days }
                });
                out.estimates = Some(estimates);
            }
            Err(why) => out.no_estimate = Some(why.to_string()),
        }
        Ok(out)
    }
}

/// Days of the same traffic until a policy that always takes what the log has with probability [`FLOOR`] is known to within
/// [`WITHIN`]: n = 1.96² E\[r²\] / (p δ²) rewarded decisions, since a weight is at most 1/p. `known`: rewards, and the sum of
/// their squares.
fn days_with_floor((rewarded, squares): (usize, f64), days: f64) -> Option<f64> {
    let rewarded = rewarded as f64;
    let needed = 1.96 * 1.96 * (squares / rewarded) / (FLOOR * WITHIN * WITHIN);
    let days = days * needed / rewarded;
    (rewarded > 0.0 && days.is_finite() && days > 0.0).then_some(days)
}

/// A length of time for people.
pub(super) fn in_days(days: f64) -> String {
    match days {
        d if d < 1.0 => "less than a day".to_owned(),
        d if d < 1.5 => "about a day".to_owned(),
        d => format!("about {d:.0} days"),
    }
}

impl Part {
    /// An entry of the policy's own, which is derived elsewhere.
    fn own(&mut self, policy: &Policy, entry: &Entry) {
        let arm = self.number(&entry.arm);
        self.arms[arm as usize].1 += 1;
        self.by_rule += usize::from(entry.decided_by == DecidedBy::Rule);
        self.rewards.extend(entry.reward(policy).map(|r| (entry.session, r)));
        if entry.apart().is_none() {
            self.weigh(policy, entry, arm, 1.0, vec![(arm, 1.0)]);
        }
    }

    /// What the policy makes of an entry; its reward, if it is known and the arms are the same.
    fn other(
        &mut self,
        policy: &Policy,
        listed: bool,
        entry: &Entry,
        decision: &Decision,
        context: &Context,
    ) -> Option<f64> {
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
        let mut target = Vec::with_capacity(decision.candidates.len());
        let (mut there, mut of_logged) = (0.0, 0.0);
        each_chance(decision, |arm, p| {
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
                        explanation: explain::text(decision, context),
                    },
                );
            }
            return None;
        }
        self.agreed += 1;
        let reward = entry.reward(policy);
        self.rewards.extend(reward.map(|r| (entry.session, r)));
        reward
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
        self.rows.push(Weighed { session: entry.session, arm, weight, reward, features, target });
    }
}

/// Which half of the log a session is in, for the reward model.
fn half(session: u64) -> usize {
    (session % PARTS as u64) as usize
}

fn count(counts: &mut BTreeMap<String, usize>, name: &str) {
    match counts.get_mut(name) {
        Some(count) => *count += 1,
        None => _ = counts.insert(name.to_owned(), 1),
    }
}

/// Keeps a decision if it is among those that differ most; of two that differ as much, the earlier.
fn keep(differing: &mut Vec<Differing>, one: Differing) {
    let at = differing.partition_point(|d| d.target <= one.target);
    if at < SHOWN {
        differing.insert(at, one);
        differing.truncate(SHOWN);
    }
}
