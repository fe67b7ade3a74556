//! Two policies on the same recorded requests: what would have moved, and what that would have been worth.
//!
//! Both decide every request with the state that they have; requests are weighed by the exact probability of each arm, so
//! no draw adds noise to what moved. Worth is estimated from the log alone by SNIPS ([`super::estimate`]). It is consistent
//! where the log gave every arm that a policy takes a probability above 0, and the state of the policy does not depend on
//! the very rewards that are weighed.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    estimate::{Asked, EstimateError, Estimator, EstimatorKind, Row},
    log::{Entry, chances},
};
use crate::policy::{Policy, State};

/// Requests that are shown.
const SHOWN: usize = 10;

/// What is different.
#[derive(Clone, Debug, Serialize)]
pub struct DiffReport {
    pub old: String,
    pub new: String,
    /// Recorded decisions that were looked at, and those that both could decide.
    pub decisions: usize,
    pub compared: usize,
    /// Decisions that could not be compared, by reason.
    pub skipped: BTreeMap<String, usize>,
    /// Expected share of the requests that go to another arm.
    pub moved: f64,
    /// Expected share of each arm, old and new; `(refused)` where no arm could serve.
    pub shares: BTreeMap<String, (f64, f64)>,
    /// Expected shares that move, by from and to, greatest first.
    pub flows: Vec<Flow>,
    /// Requests of which most moves.
    pub requests: Vec<Moved>,
    /// Absent where nothing can be estimated; `no_effect` says why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<Effect>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_effect: Option<String>,
}

/// From an arm to another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flow {
    pub from: String,
    pub to: String,
    pub share: f64,
}

/// One request.
#[derive(Clone, Debug, Serialize)]
pub struct Moved {
    pub id: String,
    /// The likeliest arm of each.
    pub from: String,
    pub to: String,
    /// Share of the request's probability that moves.
    pub moved: f64,
}

/// What the move would have been worth.
#[derive(Clone, Debug, Serialize)]
pub struct Effect {
    /// Decisions with a known reward under the new policy's weights.
    pub rewarded: usize,
    pub old: f64,
    pub new: f64,
    pub difference: f64,
    /// 95 % bootstrap interval of the difference, by session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// Effective sample size of each (Kish): (Σ w)² / Σ w².
    pub effective_old: f64,
    pub effective_new: f64,
    /// Mean weight of the new policy: far below 1, the log hardly has what it would do.
    pub overlap: f64,
}

/// Compares two policies on logged decisions, each deciding with the state given.
pub fn diff(entries: &[Entry], (old, old_state): (&Policy, &State), (new, new_state): (&Policy, &State)) -> DiffReport {
    let name = |p: &Policy| format!("{} {}", p.name(), p.hash().short());
    let mut report = DiffReport {
        old: name(old),
        new: name(new),
        decisions: entries.len(),
        compared: 0,
        skipped: BTreeMap::new(),
        moved: 0.0,
        shares: BTreeMap::new(),
        flows: Vec::new(),
        requests: Vec::new(),
        effect: None,
        no_effect: None,
    };
    let mut flows: BTreeMap<(String, String), f64> = BTreeMap::new();
    let mut estimators = [Estimator::new(Asked::any_reward()), Estimator::new(Asked::any_reward())];
    let mut wrong = None;
    for logged in entries {
        if let Some(why) = logged.apart() {
            *report.skipped.entry(why.to_owned()).or_default() += 1;
            continue;
        }
        let (was, is) = match (logged.seen_by(old), logged.seen_by(new)) {
            (Ok(a), Ok(b)) => (chances(&old.decide(old_state, &a)), chances(&new.decide(new_state, &b))),
            (Err(reason), _) | (_, Err(reason)) => {
                *report.skipped.entry(reason).or_default() += 1;
                continue;
            }
        };
        report.compared += 1;
        let of = |chances: &BTreeMap<String, f64>, arm: &str| chances.get(arm).copied().unwrap_or(0.0);
        let arms: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
        let moved = arms.iter().map(|arm| (of(&is, arm) - of(&was, arm)).max(0.0)).sum::<f64>();
        report.moved += moved;
        for arm in &arms {
            let share = report.shares.entry((*arm).clone()).or_default();
            share.0 += of(&was, arm);
            share.1 += of(&is, arm);
        }
        // What an arm loses goes to those that gain, in proportion.
        for from in arms.iter().filter(|_| moved > 0.0) {
            let lost = (of(&was, from) - of(&is, from)).max(0.0);
            for to in arms.iter().filter(|_| lost > 0.0) {
                let gained = (of(&is, to) - of(&was, to)).max(0.0);
                if gained > 0.0 {
                    *flows.entry(((*from).clone(), (*to).clone())).or_default() += lost * gained / moved;
                }
            }
        }
        if moved > 1e-9 {
            let likeliest = |c: &BTreeMap<String, f64>| {
                c.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(arm, _)| arm.clone()).unwrap_or_default()
            };
            report.requests.push(Moved { id: logged.id.to_string(), from: likeliest(&was), to: likeliest(&is), moved });
        }
        let reward = logged.reward(new).or_else(|| logged.reward(old));
        if let Some(reward) = reward.filter(|_| logged.propensity > 0.0) {
            for (estimator, chances) in estimators.iter_mut().zip([&was, &is]) {
                let weight = of(chances, &logged.arm) / logged.propensity;
                if let Err(error) = estimator.take(&Row::plain(logged.session, weight, reward)) {
                    wrong.get_or_insert(error);
                }
            }
        }
    }
    let n = report.compared.max(1) as f64;
    report.moved /= n;
    report.shares.values_mut().for_each(|(a, b)| (*a, *b) = (*a / n, *b / n));
    report.flows = flows.into_iter().map(|((from, to), sum)| Flow { from, to, share: sum / n }).collect();
    report.flows.sort_by(|a, b| b.share.total_cmp(&a.share).then_with(|| a.from.cmp(&b.from)));
    report.requests.sort_by(|a, b| b.moved.total_cmp(&a.moved).then_with(|| a.id.cmp(&b.id)));
    report.requests.truncate(SHOWN);
    match wrong.map_or_else(|| effect(&estimators), |error| Err(error.to_string())) {
        Ok(effect) => report.effect = Some(effect),
        Err(why) => report.no_effect = Some(why),
    }
    report
}

fn effect([old, new]: &[Estimator; 2]) -> Result<Effect, String> {
    let of = |estimator: &Estimator, which: &str| {
        estimator.finish().map_err(|error| match error {
            EstimateError::NoReward => {
                "no compared decision has a known reward: give feedback, or a reward that needs none".to_owned()
            }
            EstimateError::NoOverlap => format!(
                "the {which} policy would have taken none of the rewarded decisions: without `min_propensity` the log says \
                 nothing about other arms"
            ),
            error => error.to_string(),
        })
    };
    let (was, is) = (of(old, "old")?, of(new, "new")?);
    Ok(Effect {
        rewarded: is.rewarded as usize,
        old: was.snips.value,
        new: is.snips.value,
        difference: is.snips.value - was.snips.value,
        interval: new.less(old, EstimatorKind::Snips, 0.95).and_then(|less| less.interval),
        effective_old: was.effective,
        effective_new: is.effective,
        overlap: is.overlap,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effect_is_the_difference_of_self_normalised_means() {
        let of = |rows: &[(u64, f64, f64, f64)]| {
            let mut made = [Estimator::new(Asked::any_reward()), Estimator::new(Asked::any_reward())];
            for (session, old, new, reward) in rows {
                made[0].take(&Row::plain(*session, *old, *reward)).unwrap();
                made[1].take(&Row::plain(*session, *new, *reward)).unwrap();
            }
            effect(&made)
        };
        // Two arms, logged with a half each; the old policy takes them evenly, the new one only the second.
        let e = of(&[(0, 1.0, 0.0, 0.0), (1, 1.0, 2.0, 1.0), (2, 1.0, 0.0, 0.2), (3, 1.0, 2.0, 0.8)]).unwrap();
        assert!((e.old - 0.5).abs() < 1e-12 && (e.new - 0.9).abs() < 1e-12 && (e.difference - 0.4).abs() < 1e-12);
        assert_eq!((e.effective_old, e.effective_new, e.overlap), (4.0, 2.0, 1.0));
        let (low, high) = e.interval.unwrap();
        assert!(low <= 0.4 && 0.4 <= high, "{low} {high}");
        assert!(of(&[(0, 1.0, 0.0, 1.0)]).unwrap_err().contains("min_propensity"));
        assert!(of(&[]).unwrap_err().contains("reward"));
    }
}
