//! Two policies on the same recorded requests: what would have moved, and what that would have been worth.
//!
//! Both decide every request with the state that they have; requests are weighed by the exact probability of each arm, so
//! no draw adds noise to what moved. Worth is estimated from the log alone by self-normalised importance sampling
//! (Swaminathan, Joachims, "The self-normalized estimator for counterfactual learning", NeurIPS 2015):
//! V(π) = Σ w r / Σ w with w = π(a | x) / p(a | x), a and p as logged. It is consistent where the log gave every arm that π
//! takes a probability above 0, and the state of π does not depend on the very rewards that are weighed.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    log::{Entry, chances},
    metrics::bootstrap,
};
use crate::policy::{Policy, State};

/// Resamples of the interval.
const RESAMPLES: usize = 2000;
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

/// A rewarded decision under both policies.
struct Weighed {
    session: usize,
    old: f64,
    new: f64,
    reward: f64,
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
    let mut weighed: Vec<Weighed> = Vec::new();
    let mut sessions: BTreeMap<u64, usize> = BTreeMap::new();
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
            let next = sessions.len();
            let session = *sessions.entry(logged.session).or_insert(next);
            let weight = |c: &BTreeMap<String, f64>| of(c, &logged.arm) / logged.propensity;
            weighed.push(Weighed { session, old: weight(&was), new: weight(&is), reward });
        }
    }
    let n = report.compared.max(1) as f64;
    report.moved /= n;
    report.shares.values_mut().for_each(|(a, b)| (*a, *b) = (*a / n, *b / n));
    report.flows = flows.into_iter().map(|((from, to), sum)| Flow { from, to, share: sum / n }).collect();
    report.flows.sort_by(|a, b| b.share.total_cmp(&a.share).then_with(|| a.from.cmp(&b.from)));
    report.requests.sort_by(|a, b| b.moved.total_cmp(&a.moved).then_with(|| a.id.cmp(&b.id)));
    report.requests.truncate(SHOWN);
    match effect(&weighed, sessions.len()) {
        Ok(effect) => report.effect = Some(effect),
        Err(why) => report.no_effect = Some(why),
    }
    report
}

fn effect(weighed: &[Weighed], sessions: usize) -> Result<Effect, String> {
    if weighed.is_empty() {
        return Err("no compared decision has a known reward: give feedback, or a reward that needs none".to_owned());
    }
    let sums = |of: fn(&Weighed) -> f64, each: &mut dyn Iterator<Item = &Weighed>| {
        let (mut w, mut wr, mut ww) = (0.0, 0.0, 0.0);
        for x in each {
            w += of(x);
            wr += of(x) * x.reward;
            ww += of(x) * of(x);
        }
        (w, wr, ww)
    };
    let (old, new) = (sums(|x| x.old, &mut weighed.iter()), sums(|x| x.new, &mut weighed.iter()));
    if old.0 <= 0.0 || new.0 <= 0.0 {
        let which = if new.0 <= 0.0 { "new" } else { "old" };
        return Err(format!(
            "the {which} policy would have taken none of the rewarded decisions: without `min_propensity` the log says \
             nothing about other arms"
        ));
    }
    let mut by_session: Vec<Vec<&Weighed>> = vec![Vec::new(); sessions];
    weighed.iter().for_each(|x| by_session[x.session].push(x));
    let by_session: Vec<Vec<&Weighed>> = by_session.into_iter().filter(|s| !s.is_empty()).collect();
    let interval = bootstrap(by_session.len(), RESAMPLES, 0x6469_6666, |sample| {
        let drawn = || sample.iter().flat_map(|s| by_session[*s].iter().copied());
        let (old, new) = (sums(|x| x.old, &mut drawn()), sums(|x| x.new, &mut drawn()));
        new.1 / new.0 - old.1 / old.0
    });
    Ok(Effect {
        rewarded: weighed.len(),
        old: old.1 / old.0,
        new: new.1 / new.0,
        difference: new.1 / new.0 - old.1 / old.0,
        interval: interval.filter(|_| by_session.len() > 1),
        effective_old: old.0 * old.0 / old.2,
        effective_new: new.0 * new.0 / new.2,
        overlap: new.0 / weighed.len() as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effect_is_the_difference_of_self_normalised_means() {
        let one = |session, old, new, reward| Weighed { session, old, new, reward };
        // Two arms, logged with a half each; the old policy takes them evenly, the new one only the second.
        let log = [one(0, 1.0, 0.0, 0.0), one(1, 1.0, 2.0, 1.0), one(2, 1.0, 0.0, 0.2), one(3, 1.0, 2.0, 0.8)];
        let e = effect(&log, 4).unwrap();
        assert!((e.old - 0.5).abs() < 1e-12 && (e.new - 0.9).abs() < 1e-12 && (e.difference - 0.4).abs() < 1e-12);
        assert_eq!((e.effective_old, e.effective_new, e.overlap), (4.0, 2.0, 1.0));
        let (low, high) = e.interval.unwrap();
        assert!(low <= 0.4 && 0.4 <= high, "{low} {high}");
        assert!(effect(&[one(0, 1.0, 0.0, 1.0)], 1).unwrap_err().contains("min_propensity"));
        assert!(effect(&[], 0).unwrap_err().contains("reward"));
    }
}
