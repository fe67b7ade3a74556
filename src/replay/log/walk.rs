//! One policy's way over the log.

use std::{borrow::Cow, collections::BTreeMap, io};

use rayon::prelude::*;

use super::{
    Choice, Differing, ReplayedPolicy,
    entry::{Entry, chances},
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
/// Decisions that are shown, of those where a policy differs most from the log.
const SHOWN: usize = 10;
/// Above this number of decisions their choices are not listed.
const LISTED: usize = 20_000;
/// Decisions that one core takes at a time.
const SHARE: usize = 64;

pub(super) struct Walk<'a> {
    pub(super) policy: &'a Policy,
    out: ReplayedPolicy,
    state: State,
    /// Numbers of arms, by name, and per number: taken by the log, and of these rewarded.
    arms: BTreeMap<String, u32>,
    taken: Vec<(f64, f64)>,
    direct: Direct,
    rows: Rows,
    /// Of the rewards where the arm agreed.
    sum: f64,
}

/// A decision of the policy on an entry.
type Made<'e> = (Decision, Cow<'e, Context>);

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
            sum: 0.0,
        }
    }

    /// Takes entries in their order.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    pub(super) fn take(&mut self, entries: &[Entry]) -> io::Result<()> {
        if self.out.made_the_log {
            return entries.iter().try_for_each(|entry| self.own(entry));
        }
        let policy = self.policy;
        if policy.learns() {
            return entries.iter().try_for_each(|entry| match entry.apart() {
                Some(why) => self.skip(why),
                None => {
                    let made = entry.seen_by(policy).map(|context| (policy.decide(&self.state, &context), context));
                    self.other(entry, made)
                }
            });
        }
        let state = &self.state;
        let made = entries.par_iter().with_min_len(SHARE).map(|entry| match entry.apart() {
            Some(_) => None,
            None => Some(entry.seen_by(policy).map(|context| (policy.decide(state, &context), context))),
        });
        let made: Vec<_> = made.collect();
        entries.iter().zip(made).try_for_each(|(entry, made)| match made {
            None => self.skip(entry.apart().unwrap_or_default()),
            Some(made) => self.other(entry, made),
        })
    }

    fn skip(&mut self, why: &str) -> io::Result<()> {
        count(&mut self.out.skipped, why);
        Ok(())
    }

    /// An entry of the policy's own, which is derived elsewhere.
    fn own(&mut self, entry: &Entry) -> io::Result<()> {
        count(&mut self.out.arms, &entry.arm);
        self.out.by_rule += usize::from(entry.decided_by == DecidedBy::Rule);
        if let Some(reward) = entry.reward(self.policy) {
            self.out.rewarded += 1;
            self.sum += reward;
        }
        if entry.apart().is_some() {
            return Ok(());
        }
        self.weigh(entry, 1.0, &BTreeMap::from([(entry.arm.clone(), 1.0)]))
    }

    fn other(&mut self, entry: &Entry, made: Result<Made<'_>, String>) -> io::Result<()> {
        let (decision, context) = match made {
            Ok(made) => made,
            Err(reason) => return self.skip(&reason),
        };
        let out = &mut self.out;
        out.decisions += 1;
        count(&mut out.arms, &decision.arm);
        if out.decisions <= LISTED {
            out.choices.push(Choice {
                id: entry.id.to_string(),
                logged: entry.arm.clone(),
                chosen: decision.arm.clone(),
                propensity: decision.propensity,
            });
        } else {
            out.choices = Vec::new();
        }
        let target = chances(&decision);
        let could = |arm: &String| entry.could.iter().any(|(name, _)| name == arm);
        let there: f64 = target.iter().filter(|(arm, _)| could(arm)).map(|(_, p)| p).sum();
        out.unsupported += (1.0 - there).max(0.0);
        out.by_rule += usize::from(entry.decided_by == DecidedBy::Rule);
        if entry.propensity > 0.0 {
            let weight = target.get(&entry.arm).copied().unwrap_or(0.0) / entry.propensity;
            self.weigh(entry, weight, &target)?;
        }
        if decision.arm != entry.arm {
            self.out.differs(entry, &decision, &context);
            return Ok(());
        }
        self.out.agreed += 1;
        let Some(reward) = entry.reward(self.policy) else { return Ok(()) };
        self.out.rewarded += 1;
        self.sum += reward;
        if self.policy.learns() && decision.decided_by == DecidedBy::Select {
            let cost_usd = entry.observed.as_ref().map_or(0.0, |o| o.cost_usd);
            let update = StateUpdate {
                propensity: entry.propensity,
                ..StateUpdate::of(&decision, self.state.seq, reward, cost_usd, context.now)
            };
            if let Err(error) = self.policy.fold(&mut self.state, &update) {
                self.skip(&format!("not learnt from: {error}"))?;
            }
        }
        Ok(())
    }

    fn number(&mut self, arm: &str) -> u32 {
        if let Some(number) = self.arms.get(arm) {
            return *number;
        }
        let number = self.arms.len() as u32;
        self.arms.insert(arm.to_owned(), number);
        self.taken.push((0.0, 0.0));
        number
    }

    fn weigh(&mut self, entry: &Entry, weight: f64, target: &BTreeMap<String, f64>) -> io::Result<()> {
        let arm = self.number(&entry.arm);
        let target = target.iter().map(|(name, p)| (self.number(name), *p)).collect();
        let mut features = [1.0; DIMENSIONS];
        for (x, name) in features[1..].iter_mut().zip(FEATURES) {
            *x = entry.context.as_ref().ok().and_then(|c| query_feature(name, &c.signals)).unwrap_or(0.0);
        }
        let row = Weighed { session: entry.session, arm, weight, reward: entry.reward(self.policy), features, target };
        let taken = &mut self.taken[arm as usize];
        taken.0 += 1.0;
        if let Some(reward) = row.reward {
            taken.1 += 1.0;
            self.out.rewarded_in_log += 1;
            self.direct.take(part(row.session), arm as usize, &row.features, reward);
        }
        self.rows.push(&row)
    }

    /// The policy's report, when all entries are taken. `derived` is what became of its own decisions.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub(super) fn finish(
        mut self,
        derived: Option<(usize, usize, BTreeMap<String, usize>)>,
    ) -> io::Result<ReplayedPolicy> {
        let mut out = self.out;
        if let Some((decisions, agreed, impossible)) = derived {
            (out.decisions, out.agreed) = (decisions, agreed);
            out.skipped = impossible;
        }
        out.mean_reward = (out.rewarded > 0).then(|| self.sum / out.rewarded as f64);
        out.unsupported /= out.decisions.max(1) as f64;
        if out.unsupported > UNSUPPORTED {
            out.no_estimate = Some(format!(
                "{:.1} % of what it would do the log could never have done, so nothing is known of it: let the policy that \
                 serves explore (`min_propensity: 0.02`), without rules that decide for these requests",
                100.0 * out.unsupported
            ));
            return Ok(out);
        }
        self.direct.reach(self.arms.len());
        let fitted = self.direct.fit();
        let mut estimator = Estimator::new(Asked { rewards: (f64::MIN, f64::MAX), ..Asked::default() });
        let mut wrong = None;
        self.rows.read(|row| {
            let model = |arm: u32| fitted.predict(part(row.session), arm as usize, &row.features);
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
            Ok(estimates) => out.estimates = Some(estimates),
            Err(why) => out.no_estimate = Some(why.to_string()),
        }
        Ok(out)
    }
}

/// Which part of the log a session is in, for the reward model.
fn part(session: u64) -> usize {
    (session % PARTS as u64) as usize
}

fn count(counts: &mut BTreeMap<String, usize>, name: &str) {
    match counts.get_mut(name) {
        Some(count) => *count += 1,
        None => _ = counts.insert(name.to_owned(), 1),
    }
}

impl ReplayedPolicy {
    /// Keeps the decision if it is among those that differ most; of two that differ as much, the earlier.
    fn differs(&mut self, logged: &Entry, decision: &Decision, context: &Context) {
        let target = chances(decision).get(&logged.arm).copied().unwrap_or(0.0);
        let at = self.differing.partition_point(|d| d.target <= target);
        if at == SHOWN {
            return;
        }
        let differing = Differing {
            id: logged.id.to_string(),
            logged: logged.arm.clone(),
            logged_propensity: logged.propensity,
            target,
            chosen: decision.arm.clone(),
            propensity: decision.propensity,
            explanation: explain::text(decision, context),
        };
        self.differing.insert(at, differing);
        self.differing.truncate(SHOWN);
    }
}
