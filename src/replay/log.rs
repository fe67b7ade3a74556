//! What other policies would have chosen for the recorded requests.
//!
//! A learning policy learns as it goes by the replay method (Li et al., arXiv 1003.5956): where it chooses the arm that
//! was really taken, and that decision's reward is known, it is told so; elsewhere it learns nothing. Rewards are
//! recomputed from their parts under the policy's own weights. The policy that made the log is derived from its own
//! recorded states instead, so that it must agree with itself in every decision.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    ReplayError,
    reproduce::{context_of, reproduce},
};
use crate::{
    audit::{AuditStore, DecisionView},
    domain::{Context, DecidedBy, StateUpdate},
    learn::observed,
    policy::Policy,
};

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
    /// Per decision: id, logged arm, chosen arm, propensity of the chosen arm.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Choice>,
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
        choices: Vec::new(),
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
    for view in views {
        let decision = &view.decision.decision;
        *out.arms.entry(decision.arm.clone()).or_default() += 1;
        if let Some(reward) = observed(view).and_then(|o| policy.reward(&o)) {
            out.rewarded += 1;
            sum += reward;
        }
    }
    out.mean_reward = (out.rewarded > 0).then(|| sum / out.rewarded as f64);
    Ok(out)
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
    for view in views {
        let logged = &view.decision.decision;
        if logged.decided_by == DecidedBy::Pinned {
            *out.skipped.entry("pinned by the client".to_owned()).or_default() += 1;
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
        if decision.arm != logged.arm {
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
    out
}
