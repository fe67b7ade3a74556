//! One policy's way over the log.

use std::{collections::BTreeMap, io};

use serde::{Deserialize, Serialize};

use super::{
    Needed, ReplayedPolicy,
    entry::Entry,
    ledger::Ledger,
    measures::Measures,
    part::{Part, count, keep},
    rows::{DIMENSIONS, Rows},
    sessions::{BySession, Sessions},
};
use crate::{
    domain::{DecidedBy, StateUpdate},
    policy::{Policy, State},
    replay::{
        calibration::Reliability,
        direct::{Direct, PARTS},
        estimate::{Asked, Estimator, Row},
    },
};

/// Share of the policy's probability that may lie on arms that the log could not have taken, for an estimate to be given.
const UNSUPPORTED: f64 = 0.01;
/// What is advised where a log cannot tell.
const FLOOR: f64 = 0.02;
/// How exactly people want to know a reward.
const WITHIN: f64 = 0.01;
/// Above this number of decisions their choices are not listed.
const LISTED: usize = 20_000;

/// One policy's way over the whole log.
pub(super) struct Walk<'a> {
    pub(super) policy: &'a Policy,
    so_far: SoFar,
    rows: Rows,
}

/// What came of the entries so far, but for the rows.
#[derive(Serialize, Deserialize)]
pub(super) struct SoFar {
    out: ReplayedPolicy,
    state: State,
    /// Numbers of arms, by name, and per number: taken by the log, and of these rewarded.
    arms: BTreeMap<String, u32>,
    taken: Vec<(f64, f64)>,
    direct: Direct,
    /// The replay method: rewards where the arm agreed, all alike.
    agreed: Estimator,
    /// Of all rewards that are known: how many, and their squares.
    known: (usize, f64),
    measures: Measures,
    sessions: Sessions,
    reliability: Reliability,
    ledger: Ledger,
}

impl<'a> Walk<'a> {
    pub(super) fn new(policy: &'a Policy, made_the_log: bool, rows: Rows) -> Self {
        let so_far = SoFar {
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
            agreed: Estimator::new(Asked::any_reward()),
            known: (0, 0.0),
            measures: Measures::new(),
            sessions: Sessions::default(),
            reliability: Reliability::default(),
            ledger: Ledger::default(),
        };
        Self { policy, so_far, rows }
    }

    /// One that was stopped, with what came of it until then.
    pub(super) fn resumed(policy: &'a Policy, so_far: SoFar, rows: Rows) -> Self {
        Self { policy, so_far, rows }
    }

    /// What came of it so far, with how many rows and bytes of them are written.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub(super) fn so_far(&mut self) -> io::Result<(&SoFar, (u64, u64))> {
        let rows = self.rows.flush()?;
        Ok((&self.so_far, rows))
    }

    /// Whether entries have to be taken in their order, since what came of one changes what is decided next.
    pub(super) fn in_order(&self) -> bool {
        (self.policy.learns() || self.spends()) && !self.so_far.out.made_the_log
    }

    /// Whether there is a budget that requests share.
    fn spends(&self) -> bool {
        self.policy.spending().next().is_some()
    }

    /// Decides on entries, in any order of such calls.
    pub(super) fn judge(&self, entries: &[Entry]) -> Part {
        let mut part = Part::default();
        for entry in entries {
            if self.so_far.out.made_the_log {
                part.own(self.policy, entry);
            } else if let Some(context) = part.seen(self.policy, entry) {
                let listed = self.lists(&part);
                part.other(self.policy, &self.so_far.state, listed, entry, &context);
            }
        }
        part
    }

    /// The same for a policy that learns or spends, in the order of the log.
    pub(super) fn follow(&mut self, entries: &[Entry]) -> Part {
        let mut part = Part::default();
        let (policy, spends) = (self.policy, self.spends());
        for entry in entries {
            let Some(mut context) = part.seen(policy, entry) else { continue };
            if spends {
                self.so_far.ledger.fill(policy, context.to_mut());
            }
            let listed = self.lists(&part);
            let (decision, reward) = part.other(policy, &self.so_far.state, listed, entry, &context);
            if spends {
                self.so_far.ledger.take(policy, entry, &decision, &context);
            }
            let learns = policy.learns() && decision.decided_by == DecidedBy::Select;
            let Some(reward) = reward.filter(|_| learns) else { continue };
            let cost_usd = entry.observed.as_ref().map_or(0.0, |o| o.cost_usd);
            let state = &mut self.so_far.state;
            let update = StateUpdate {
                propensity: entry.propensity,
                ..StateUpdate::of(&decision, state.seq, reward, cost_usd, context.now)
            };
            if let Err(error) = policy.fold(state, &update) {
                count(&mut part.skipped, &format!("not learnt from: {error}"));
            }
        }
        part
    }

    /// Whether choices are still listed.
    fn lists(&self, part: &Part) -> bool {
        self.so_far.out.decisions + part.decisions <= LISTED
    }

    /// Adds a part; parts come in the order of the log.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    pub(super) fn add(&mut self, part: Part) -> io::Result<()> {
        let so_far = &mut self.so_far;
        let out = &mut so_far.out;
        out.decisions += part.decisions;
        out.agreed += part.agreed;
        out.by_rule += part.by_rule;
        out.rewarded += part.rewards.len();
        part.skipped.into_iter().for_each(|(why, n)| *out.skipped.entry(why).or_default() += n);
        for (session, reward) in part.rewards {
            // A reward that is no number is said by the other estimators.
            let _ = so_far.agreed.take(&Row::plain(session, 1.0, reward));
        }
        part.unsupported.iter().for_each(|p| out.unsupported += p);
        match out.decisions <= LISTED {
            true => out.choices.extend(part.choices),
            false => out.choices = Vec::new(),
        }
        part.differing.into_iter().for_each(|d| keep(&mut out.differing, d));
        part.ends.iter().for_each(|(weight, end)| so_far.measures.take(*weight, end));
        part.expected.iter().for_each(|(predicted, came)| so_far.reliability.take(*predicted, *came));
        let mut numbers = Vec::with_capacity(part.arms.len());
        for (name, chosen) in part.arms {
            if chosen > 0 {
                *out.arms.entry(name.clone()).or_default() += chosen;
            }
            let next = so_far.arms.len() as u32;
            numbers.push(*so_far.arms.entry(name).or_insert(next));
        }
        so_far.taken.resize(so_far.arms.len(), (0.0, 0.0));
        for mut row in part.rows {
            let number = |local: u32| numbers[local as usize];
            row.arm = number(row.arm);
            row.target.iter_mut().for_each(|(arm, _)| *arm = number(*arm));
            row.along = so_far.sessions.along(row.session, row.weight);
            let taken = &mut so_far.taken[row.arm as usize];
            taken.0 += 1.0;
            if let Some(reward) = row.reward {
                taken.1 += 1.0;
                so_far.known = (so_far.known.0 + 1, so_far.known.1 + reward * reward);
                out.rewarded_in_log += 1;
                so_far.direct.take(half(row.session), row.arm as usize, &row.features, reward);
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
        self,
        derived: Option<(usize, usize, BTreeMap<String, usize>)>,
        days: f64,
    ) -> io::Result<(ReplayedPolicy, Option<Estimator>)> {
        let SoFar { mut out, arms, taken, mut direct, agreed, known, measures, sessions, reliability, .. } =
            self.so_far;
        if let Some((decisions, agreed, impossible)) = derived {
            (out.decisions, out.agreed) = (decisions, agreed);
            out.skipped = impossible;
        }
        if let Ok(agreed) = agreed.finish() {
            (out.mean_reward, out.mean_interval) = (Some(agreed.snips.value), agreed.snips.interval);
        }
        out.calibration = self.policy.expects().and_then(|of| reliability.finish(of));
        out.unsupported /= out.decisions.max(1) as f64;
        if out.unsupported > UNSUPPORTED {
            let mut why = format!(
                "{:.1} % of what it would do the log could never have done, so nothing is known of it: let the policy that \
                 serves explore (`min_propensity: {FLOOR}`), without rules that decide for these requests",
                100.0 * out.unsupported
            );
            if let Some(days) = days_with_floor(known, days) {
                why += &format!("; {} of such traffic would then tell to ±0.01", in_days(days));
            }
            out.no_estimate = Some(why);
            return Ok((out, None));
        }
        out.measured = measures.finish();
        direct.reach(arms.len());
        let fitted = direct.fit();
        let mut estimator = Estimator::new(Asked::any_reward());
        let mut whole = (sessions.longest > 1).then(|| Estimator::new(Asked::any_reward()));
        let (mut wrong, mut estimated) = (None, None);
        self.rows.read(|row| {
            let model = |arm: u32| fitted.predict(half(row.session), arm as usize, &row.features);
            let (taken, seen) = taken[row.arm as usize];
            let weighed = Row {
                session: row.session,
                weight: row.weight,
                reward: row.reward,
                observed: if seen > 0.0 { seen / taken } else { 1.0 },
                model_taken: model(row.arm),
                model_target: row.target.iter().map(|(arm, p)| p * model(*arm)).sum(),
            };
            if let Err(error) = estimator.take(&weighed) {
                wrong.get_or_insert(error);
            }
            if let Some(whole) = &mut whole {
                // Of the same row nothing else can be wrong.
                let _ = whole.take(&Row { weight: row.along, ..weighed });
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
                estimated = Some(estimator);
            }
            Err(why) => out.no_estimate = Some(why.to_string()),
        }
        out.by_session = whole.and_then(|whole| whole.finish().ok()).map(|e| BySession {
            reward: e.snips,
            effective: e.effective,
            longest: sessions.longest,
        });
        Ok((out, estimated))
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

/// Which half of the log a session is in, for the reward model.
fn half(session: u64) -> usize {
    (session % PARTS as u64) as usize
}
