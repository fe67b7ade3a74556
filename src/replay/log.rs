//! What other policies would have chosen for the recorded requests.
//!
//! A learning policy learns as it goes by the replay method (Li et al., arXiv 1003.5956): where it chooses the arm that
//! was really taken, and that decision's reward is known, it is told so; elsewhere it learns nothing. What the policy would
//! have earned is estimated from all rewarded decisions, by the exact probabilities that were logged and those that the
//! policy gives ([`super::estimate`]); a decision at time t is weighed by the policy as it was at t. Rewards are
//! recomputed from their parts under the policy's own weights. The policy that made the log is derived from its own
//! recorded states instead, so that it must agree with itself in every decision.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    ReplayError,
    diff::chances,
    direct::{Direct, PARTS},
    estimate::{Asked, Estimates, Row, estimate, session},
    reproduce::{context_of, reproduce},
};
use crate::{
    audit::{AuditStore, DecisionView},
    domain::{Context, DecidedBy, Decision, StateUpdate},
    learn::observed,
    policy::{Policy, explain, query_feature},
};

/// Share of the policy's probability that may lie on arms that the log could not have taken, for an estimate to be given.
const UNSUPPORTED: f64 = 0.01;
/// Decisions that are shown, of those where a policy differs most from the log.
const SHOWN: usize = 10;
/// What the reward model sees, behind a constant 1: signals that every logged context has.
const FEATURES: [&str; 4] = ["tokens", "query_tokens", "complexity", "code_share"];

/// One policy's way over the log.
#[derive(Clone, Debug, Serialize)]
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
    /// What it would have earned per decision; absent where `no_estimate` says why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimates: Option<Estimates>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_estimate: Option<String>,
    /// Decisions of the log that a rule made, for certain.
    pub by_rule: usize,
    /// Mean probability that the policy gives to arms that the log could not have taken.
    pub unsupported: f64,
    /// Decisions with a reward under this policy's weights, whichever arm was taken.
    pub rewarded_in_log: usize,
    /// Per decision: id, logged arm, chosen arm, propensity of the chosen arm.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Choice>,
    /// The decisions whose arm it would least likely have taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differing: Vec<Differing>,
}

/// A decision that another policy would hardly have made.
#[derive(Clone, Debug, Serialize)]
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
#[derive(Clone, Debug, Serialize)]
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
    pub policies: Vec<ReplayedPolicy>,
}

/// Replays `views` (oldest first) under each policy.
///
/// # Errors
/// When the store cannot be read.
pub async fn replay_log(
    store: &dyn AuditStore,
    views: &[DecisionView],
    policies: &[Policy],
) -> Result<ReplayReport, ReplayError> {
    let mut report = ReplayReport { decisions: views.len(), policies: Vec::new() };
    for policy in policies {
        let (own, others): (Vec<&DecisionView>, Vec<&DecisionView>) =
            views.iter().partition(|view| view.decision.decision.policy_hash == policy.hash());
        let replayed = if others.is_empty() && !own.is_empty() {
            replay_own(store, policy, views).await?
        } else {
            replay_other(policy, views)
        };
        report.policies.push(replayed);
    }
    Ok(report)
}

fn empty(policy: &Policy) -> ReplayedPolicy {
    ReplayedPolicy {
        policy: policy.name().to_owned(),
        hash: policy.hash().short(),
        made_the_log: false,
        decisions: 0,
        agreed: 0,
        skipped: BTreeMap::new(),
        arms: BTreeMap::new(),
        rewarded: 0,
        mean_reward: None,
        estimates: None,
        no_estimate: None,
        by_rule: 0,
        unsupported: 0.0,
        rewarded_in_log: 0,
        choices: Vec::new(),
        differing: Vec::new(),
    }
}

async fn replay_own(
    store: &dyn AuditStore,
    policy: &Policy,
    views: &[DecisionView],
) -> Result<ReplayedPolicy, ReplayError> {
    let derived = reproduce(store, views.to_vec()).await?;
    let mut out = empty(policy);
    out.made_the_log = true;
    for (_, reason) in &derived.impossible {
        *out.skipped.entry(reason.clone()).or_default() += 1;
    }
    out.decisions = derived.asked - derived.impossible.len();
    out.agreed = derived.same;
    let mut sum = 0.0;
    let mut rows = Vec::new();
    for view in views {
        let decision = &view.decision.decision;
        *out.arms.entry(decision.arm.clone()).or_default() += 1;
        out.by_rule += usize::from(decision.decided_by == DecidedBy::Rule);
        if asked_for(view) {
            rows.push(Logged::of(policy, view, 1.0, BTreeMap::from([(decision.arm.clone(), 1.0)])));
        }
        if let Some(reward) = observed(view).and_then(|o| policy.reward(&o)) {
            out.rewarded += 1;
            sum += reward;
        }
    }
    out.mean_reward = (out.rewarded > 0).then(|| sum / out.rewarded as f64);
    out.judge(&rows);
    Ok(out)
}

/// Whether a policy chose, and the request was served by what it chose.
fn asked_for(view: &DecisionView) -> bool {
    !matches!(view.decision.decision.decided_by, DecidedBy::Pinned | DecidedBy::Shadow) && !view.decision.dry
}

/// A logged decision, weighed.
struct Logged {
    session: u64,
    arm: String,
    weight: f64,
    /// Under the replayed policy's weights.
    reward: Option<f64>,
    /// What the reward model sees.
    features: Vec<f64>,
    /// The replayed policy's probabilities.
    target: BTreeMap<String, f64>,
}

impl Logged {
    fn of(policy: &Policy, view: &DecisionView, weight: f64, target: BTreeMap<String, f64>) -> Self {
        let own = if view.decision.session.is_empty() { view.id.to_string() } else { view.decision.session.clone() };
        let signals = view.context.as_ref().map(|c| &c.signals);
        let named = FEATURES.iter().map(|name| signals.and_then(|s| query_feature(name, s)).unwrap_or(0.0));
        Self {
            session: session(&own),
            arm: view.decision.decision.arm.clone(),
            weight,
            reward: observed(view).and_then(|o| policy.reward(&o)),
            features: std::iter::once(1.0).chain(named).collect(),
            target,
        }
    }

    fn part(&self) -> usize {
        (self.session % PARTS as u64) as usize
    }
}

impl ReplayedPolicy {
    /// Estimates from the log's rows, or says why there are none.
    fn judge(&mut self, log: &[Logged]) {
        self.rewarded_in_log = log.iter().filter(|l| l.reward.is_some()).count();
        if self.unsupported > UNSUPPORTED {
            self.no_estimate = Some(format!(
                "{:.1} % of what it would do the log could never have done, so nothing is known of it: let the policy that \
                 serves explore (`min_propensity: 0.02`), without rules that decide for these requests",
                100.0 * self.unsupported
            ));
            return;
        }
        let names: BTreeSet<&String> = log.iter().flat_map(|l| l.target.keys().chain([&l.arm])).collect();
        let places: BTreeMap<&String, usize> = names.into_iter().zip(0..).collect();
        let place = |arm: &String| places.get(arm).copied().unwrap_or(0);
        let (mut taken, mut seen) = (vec![0.0; places.len()], vec![0.0; places.len()]);
        let mut direct = Direct::new(1 + FEATURES.len(), places.len());
        for l in log {
            taken[place(&l.arm)] += 1.0;
            if let Some(reward) = l.reward {
                seen[place(&l.arm)] += 1.0;
                direct.take(l.part(), place(&l.arm), &l.features, reward);
            }
        }
        let fitted = direct.fit();
        let rows: Vec<Row> = log
            .iter()
            .map(|l| {
                let model = |arm: usize| fitted.predict(l.part(), arm, &l.features);
                let at = place(&l.arm);
                Row {
                    session: l.session,
                    weight: l.weight,
                    reward: l.reward,
                    observed: if seen[at] > 0.0 { seen[at] / taken[at] } else { 1.0 },
                    model_taken: model(at),
                    model_target: l.target.iter().map(|(arm, p)| p * model(place(arm))).sum(),
                }
            })
            .collect();
        let asked = Asked { rewards: (f64::MIN, f64::MAX), ..Asked::default() };
        match estimate(&rows, asked) {
            Ok(estimates) => self.estimates = Some(estimates),
            Err(why) => self.no_estimate = Some(why.to_string()),
        }
    }
}

impl ReplayedPolicy {
    /// Keeps the decision if it is among those that differ most; of two that differ as much, the earlier.
    fn differs(&mut self, logged: &Decision, decision: &Decision, context: &Context, id: String) {
        let target = chances(decision).get(&logged.arm).copied().unwrap_or(0.0);
        let at = self.differing.partition_point(|d| d.target <= target);
        if at == SHOWN {
            return;
        }
        let differing = Differing {
            id,
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

/// The recorded context of a decision as another policy sees it, with cosines to its own examples.
///
/// # Errors
/// What is missing of it.
pub(super) fn seen_by(policy: &Policy, view: &DecisionView) -> Result<Context, String> {
    let mut context = context_of(view)?;
    if policy.needs_embedding() {
        let embedding = context.embedding.as_ref().ok_or("its embedding was not logged and the policy needs it")?;
        context.signals.similarity = policy.similarities(&embedding.vector);
    }
    Ok(context)
}

fn replay_other(policy: &Policy, views: &[DecisionView]) -> ReplayedPolicy {
    let mut out = empty(policy);
    let mut state = policy.initial_state();
    let mut sum = 0.0;
    let mut rows = Vec::new();
    for view in views {
        let logged = &view.decision.decision;
        if !asked_for(view) {
            let reason = match logged.decided_by {
                DecidedBy::Pinned => "pinned by the client",
                _ => "decided beside another, or only asked about",
            };
            *out.skipped.entry(reason.to_owned()).or_default() += 1;
            continue;
        }
        let context = match seen_by(policy, view) {
            Ok(context) => context,
            Err(reason) => {
                *out.skipped.entry(reason).or_default() += 1;
                continue;
            }
        };
        let decision = policy.decide(&state, &context);
        out.decisions += 1;
        *out.arms.entry(decision.arm.clone()).or_default() += 1;
        out.choices.push(Choice {
            id: view.id.to_string(),
            logged: logged.arm.clone(),
            chosen: decision.arm.clone(),
            propensity: decision.propensity,
        });
        let target = chances(&decision);
        let could = chances(logged);
        let there: f64 = target.iter().filter(|(arm, _)| could.contains_key(*arm)).map(|(_, p)| p).sum();
        if logged.decided_by == DecidedBy::Rule {
            out.by_rule += 1;
        }
        out.unsupported += (1.0 - there).max(0.0);
        if logged.propensity > 0.0 {
            let weight = target.get(&logged.arm).copied().unwrap_or(0.0) / logged.propensity;
            rows.push(Logged::of(policy, view, weight, target));
        }
        if decision.arm != logged.arm {
            out.differs(logged, &decision, &context, view.id.to_string());
            continue;
        }
        out.agreed += 1;
        let Some(seen) = observed(view) else { continue };
        let Some(reward) = policy.reward(&seen) else { continue };
        out.rewarded += 1;
        sum += reward;
        if policy.learns() && decision.decided_by == DecidedBy::Select {
            let update = StateUpdate {
                propensity: logged.propensity,
                ..StateUpdate::of(&decision, state.seq, reward, seen.cost_usd, context.now)
            };
            if let Err(error) = policy.fold(&mut state, &update) {
                *out.skipped.entry(format!("not learnt from: {error}")).or_default() += 1;
            }
        }
    }
    out.mean_reward = (out.rewarded > 0).then(|| sum / out.rewarded as f64);
    out.unsupported /= out.decisions.max(1) as f64;
    out.judge(&rows);
    out
}
