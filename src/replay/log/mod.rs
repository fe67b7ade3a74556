//! What other policies would have chosen for the recorded requests.
//!
//! A learning policy learns as it goes by the replay method (Li et al., arXiv 1003.5956): where it chooses the arm that
//! was really taken, and that decision's reward is known, it is told so; elsewhere it learns nothing. What the policy would
//! have earned is estimated from all rewarded decisions, by the exact probabilities that were logged and those that the
//! policy gives ([`super::estimate`]); a decision at time t is weighed by the policy as it was at t. Rewards are
//! recomputed from their parts under the policy's own weights. The policy that made the log is derived from its own
//! recorded states instead, so that it must agree with itself in every decision.

mod entry;
mod export;
mod ledger;
mod measures;
mod part;
mod rows;
mod sessions;
mod source;
mod walk;

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use self::{
    entry::{Entry, chances},
    export::Export,
    measures::Measured,
    sessions::BySession,
    source::{Page, Record, Source},
};
use self::{
    measures::{End, Measures},
    part::Part,
    rows::Rows,
    walk::{SoFar, Walk},
};
use super::{
    CheckpointError, Checkpoints, ReplayError, WhatIf,
    calibration::Calibration,
    estimate::{Estimates, Estimator, EstimatorKind},
    metrics::Pair,
    reproduce::{Counts, Reproducer},
};
use crate::{
    audit::AuditStore,
    domain::{DecisionId, Hash},
    policy::Policy,
};

/// One policy's way over the log.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplayedPolicy {
    pub policy: String,
    pub hash: String,
    /// Whether this very policy version made the decisions it is compared with.
    pub made_the_log: bool,
    /// Decisions it was asked about.
    pub decisions: usize,
    /// Same arm as the log.
    pub agreed: usize,
    /// Decisions that could not be replayed, by reason.
    pub skipped: BTreeMap<String, usize>,
    /// How often each arm was chosen.
    pub arms: BTreeMap<String, usize>,
    /// Rows whose arm agreed and whose reward is known under this policy's weights, and their mean reward. Its use as an
    /// estimate of the policy's value needs a log with uniform propensities (Li et al., theorem 1).
    pub rewarded: usize,
    pub mean_reward: Option<f64>,
    /// 95 % bootstrap interval of it, by session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_interval: Option<(f64, f64)>,
    /// What it would have earned per decision; absent where `no_estimate` says why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimates: Option<Estimates>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_estimate: Option<String>,
    /// The reward where sessions are weighed as wholes, if there are any of several turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by_session: Option<BySession>,
    /// What it would have cost and how long it would have taken.
    pub measured: Measured,
    /// Whether what it expects of the logged arms is what came of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// How much more of such a log would have the doubly robust interval within 0.01 on each side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_one_hundredth: Option<Needed>,
    /// Decisions of the log that a rule made, for certain.
    pub by_rule: usize,
    /// Mean probability that the policy gives to arms that the log could not have taken.
    pub unsupported: f64,
    /// Decisions with a reward under this policy's weights, whichever arm was taken.
    pub rewarded_in_log: usize,
    /// Per decision: id, logged arm, chosen arm, propensity of the chosen arm. Empty above 20,000 decisions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Choice>,
    /// The decisions whose arm it would least likely have taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differing: Vec<Differing>,
}

/// A length of log; an interval narrows with the square root of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Needed {
    pub decisions: f64,
    pub days: f64,
}

impl Needed {
    /// For people.
    pub fn told(&self) -> String {
        format!("{} ({:.0} decisions)", walk::in_days(self.days), self.decisions)
    }
}

/// A decision that another policy would hardly have made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Differing {
    pub id: String,
    pub logged: String,
    pub logged_propensity: f64,
    /// Probability that the policy gives to the logged arm.
    pub target: f64,
    pub chosen: String,
    pub propensity: f64,
    /// As the policy explains it.
    pub explanation: String,
}

/// One decision under a replayed policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Choice {
    pub id: String,
    pub logged: String,
    pub chosen: String,
    pub propensity: f64,
}

/// All policies over one log.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayReport {
    pub decisions: usize,
    /// From the first decision to the last.
    pub days: f64,
    /// What the log itself came to.
    pub logged: Measured,
    /// What was taken to be other than it was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what_if: Vec<String>,
    pub policies: Vec<ReplayedPolicy>,
    /// Every two policies that weigh rewards alike, doubly robust.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<Pair>,
}

/// What a log is replayed with.
pub struct Setting<'a> {
    /// The record that the log is from, where it is from one.
    pub store: Option<&'a dyn AuditStore>,
    /// The policies that made all of the log.
    pub own: &'a [Hash],
    pub what_if: &'a WhatIf,
    /// Where what is done is kept, and gone on from.
    pub checkpoints: Option<Checkpoints>,
}

/// What is kept of a replay that is not through.
#[derive(Serialize, Deserialize)]
struct Kept<W> {
    /// Of the source.
    place: String,
    decisions: usize,
    start: Option<DecisionId>,
    last: Option<DecisionId>,
    logged: Measures,
    derived: BTreeMap<Hash, Counts>,
    /// By policy, with the rows and bytes that are in its file.
    walks: Vec<(W, (u64, u64))>,
}

/// Its name, and that of a policy's rows.
const KEPT: &str = "replay.json";

fn rows_file(policy: usize) -> String {
    format!("rows-{policy}.bin")
}

/// Where a policy's rows go: a file that is kept, of which so many rows and bytes are there, or a temporary one.
fn rows_of(kept: Option<&Checkpoints>, policy: usize, there: (u64, u64)) -> Result<Rows, CheckpointError> {
    let Some(path) = kept.map(|kept| kept.path(&rows_file(policy))) else { return Ok(Rows::new()) };
    Rows::kept(&path, there).map_err(|source| CheckpointError::File { path, source })
}

/// Replays a log under each policy. The decisions of a policy that made all of it are derived from the record with the states
/// that it had, unless something is to be other than it was. `tick` hears how many entries are through.
///
/// # Errors
/// When the log or the store cannot be read, or a temporary file cannot be kept.
pub async fn replay_log(
    setting: Setting<'_>,
    source: &mut dyn Source,
    policies: &[Policy],
    tick: &dyn Fn(usize),
) -> Result<ReplayReport, ReplayError> {
    let Setting { store, own, what_if, mut checkpoints } = setting;
    let is_own = |p: &Policy| store.is_some() && own.contains(&p.hash()) && what_if.is_nothing();
    let mut about = String::new();
    let mut kept = None;
    if let Some(checkpoints) = &checkpoints {
        let hashes: Vec<String> = policies.iter().map(|p| p.hash().to_string()).collect();
        let (version, source) = (env!("CARGO_PKG_VERSION"), source.about()?);
        about = format!("weir {version}; {source}; {}; {}", hashes.join(" "), what_if.told().join(", "));
        kept = checkpoints.kept::<Kept<SoFar>>(KEPT, &about)?;
    }
    let mut walks: Vec<Walk<'_>> = Vec::new();
    let (mut decisions, mut start, mut last) = (0, None, None);
    let (mut derived, mut logged) = (Reproducer::default(), Measures::new());
    if let Some(kept) = kept {
        for (i, (policy, (so_far, rows))) in policies.iter().zip(kept.walks).enumerate() {
            walks.push(Walk::resumed(policy, so_far, rows_of(checkpoints.as_ref(), i, rows)?));
        }
        source.go_to(&kept.place)?;
        (decisions, start, last, logged) = (kept.decisions, kept.start, kept.last, kept.logged);
        derived = Reproducer::resumed(kept.derived);
        tick(decisions);
    } else {
        for (i, policy) in policies.iter().enumerate() {
            walks.push(Walk::new(policy, is_own(policy), rows_of(checkpoints.as_ref(), i, (0, 0))?));
        }
    }
    while let Some(pages) = source.next().await? {
        let ordered = walks.iter().any(Walk::in_order);
        let derives = store.filter(|_| policies.iter().any(is_own));
        // Read and judged on any core. What has to be taken in order is kept for that.
        let read = pages.into_par_iter().map(|page| {
            let mut entries = page.read()?;
            if !what_if.is_nothing() {
                entries.iter_mut().for_each(|entry| what_if.entry(entry));
            }
            let parts: Vec<Option<Part>> =
                walks.iter().map(|walk| (!walk.in_order()).then(|| walk.judge(&entries))).collect();
            let ends = entries.first().map(|e| e.id).zip(entries.last().map(|e| e.id));
            let count = entries.len();
            let measured: Vec<End> = entries.iter().filter(|e| e.apart().is_none()).filter_map(End::of).collect();
            let kept = if ordered || derives.is_some() { entries } else { Vec::new() };
            Ok((ends, count, measured, kept, parts))
        });
        let read: Vec<_> = read.collect::<Result<_, ReplayError>>()?;
        for (ends, count, measured, mut entries, parts) in read {
            if let Some((first, newest)) = ends {
                if last.is_some_and(|last| last >= first) {
                    return Err(ReplayError::Order(first.to_string()));
                }
                start.get_or_insert(first);
                last = Some(newest);
            }
            decisions += count;
            measured.iter().for_each(|end| logged.take(1.0, end));
            if let Some(store) = derives {
                let views = entries.iter_mut().filter_map(|e| e.view.take()).map(|view| *view);
                derived.take(store, views.collect()).await?;
            }
            let each = walks.par_iter_mut().zip(parts);
            each.try_for_each(|(walk, part)| {
                let part = part.unwrap_or_else(|| walk.follow(&entries));
                walk.add(part)
            })?;
            tick(count);
        }
        if let Some(checkpoints) = &mut checkpoints
            && checkpoints.due()
        {
            let so_far = walks.iter_mut().map(Walk::so_far).collect::<std::io::Result<_>>()?;
            let (place, derived) = (source.place(), derived.counts().clone());
            let kept = Kept { place, decisions, start, last, logged: logged.clone(), derived, walks: so_far };
            checkpoints.keep(KEPT, &about, &kept)?;
        }
    }
    let days = start.zip(last).map_or(0.0, |(start, last)| days_between(start, last));
    let finish = |walk: Walk<'_>| {
        let derived = is_own(walk.policy).then(|| derived.of(walk.policy.hash()));
        walk.finish(derived, days)
    };
    let ended: Vec<(ReplayedPolicy, Option<Estimator>)> =
        walks.into_par_iter().map(finish).collect::<std::io::Result<_>>()?;
    let pairs = pairs(policies, &ended);
    let policies: Vec<ReplayedPolicy> = ended.into_iter().map(|(policy, _)| policy).collect();
    if let Some(checkpoints) = &checkpoints {
        checkpoints.done((0..policies.len()).map(rows_file).chain([KEPT.to_owned()]));
    }
    Ok(ReplayReport { decisions, days, logged: logged.finish(), what_if: what_if.told(), policies, pairs })
}

fn pairs(policies: &[Policy], ended: &[(ReplayedPolicy, Option<Estimator>)]) -> Vec<Pair> {
    let known: Vec<(&Policy, &Estimator)> =
        policies.iter().zip(ended).filter_map(|(policy, (_, estimator))| Some((policy, estimator.as_ref()?))).collect();
    let each = known.iter().enumerate().flat_map(|(i, a)| known[i + 1..].iter().map(move |b| (a, b)));
    let like: Vec<_> = each.filter(|(a, b)| a.0.rewards_like(b.0)).collect();
    let confidence = 1.0 - 0.05 / like.len().max(1) as f64;
    let pair = |((first, a), (second, b)): (&(&Policy, &Estimator), &(&Policy, &Estimator))| {
        let less = a.less(b, EstimatorKind::Dr, confidence)?;
        let name = |policy: &Policy| policy.name().to_owned();
        Some(Pair { first: name(first), second: name(second), difference: less.value, interval: less.interval })
    };
    like.into_par_iter().filter_map(|(a, b)| pair((a, b))).collect()
}

/// By the times in the ids (UUIDv7, RFC 9562, section 5.7).
fn days_between(start: DecisionId, last: DecisionId) -> f64 {
    let milliseconds = |id: DecisionId| (id.0.as_u128() >> 80) as f64;
    (milliseconds(last) - milliseconds(start)).max(0.0) / 86_400_000.0
}
