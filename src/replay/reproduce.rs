//! Deriving recorded decisions again, bit for bit: policy version, state, context and embedding all from the record; and
//! what the machine then did of plans of several calls, from what came of their calls.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{ReplayError, plan_run::journal};
use crate::{
    audit::{AuditStore, DecisionView},
    domain::{Context, DecidedBy, Decision, Embedding, Hash, PolicyVersion, StateUpdate, canonical},
    learn,
    policy::{self, Artifact, Artifacts, Policy, State},
};

/// One decision that came out otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    pub id: String,
    /// The recorded decision and the one derived now, as canonical JSON.
    pub recorded: String,
    pub derived: String,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ReproduceReport {
    /// Decisions asked about.
    pub asked: usize,
    /// Derived again, same bytes.
    pub same: usize,
    pub differences: Vec<Difference>,
    /// Decisions that cannot be derived, with the reason: their context was erased or never kept.
    pub impossible: Vec<(String, String)>,
    /// Runs of plans of several calls.
    pub plans: PlanRuns,
}

/// Plans of several calls, run again over their own attempts: whether the machine decides the same, note by note, and gives
/// out the same model's answer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PlanRuns {
    pub asked: usize,
    pub same: usize,
    pub differences: Vec<Difference>,
}

impl PlanRuns {
    fn take(&mut self, view: &DecisionView) {
        let Some(again) = journal::again(view) else { return };
        self.asked += 1;
        match again.same {
            true => self.same += 1,
            false => self.differences.push(Difference {
                id: view.id.to_string(),
                recorded: again.recorded.json(),
                derived: again.derived.json(),
            }),
        }
    }
}

impl ReproduceReport {
    pub fn all_same(&self) -> bool {
        self.differences.is_empty() && self.plans.differences.is_empty()
    }
}

/// The recorded context of a decision, embedding included; an error says what is missing.
pub fn context_of(view: &DecisionView) -> Result<Context, String> {
    if view.context_bytes.is_none() {
        return Err("its context was erased, or was never kept (`record.context: none`)".into());
    }
    let mut context = view.context.clone().ok_or("its context is no context of this version")?;
    if view.decision.embedding_hash.is_some() {
        let vector = view.embedding.clone().ok_or("its embedding was erased")?;
        let embedder = view.decision.embedder.clone().ok_or("its embedder is not recorded")?;
        context.embedding = Some(Embedding { vector: vector.into(), embedder: Arc::new(embedder) });
    }
    Ok(context)
}

/// The policy that a record names, compiled again from the record.
pub async fn recorded_policy(store: &dyn AuditStore, decision: &Decision, id: &str) -> Result<Policy, ReplayError> {
    let version = store.policy_version(decision.policy_hash).await?.ok_or_else(|| ReplayError::NoPolicy {
        name: decision.policy.clone(),
        hash: decision.policy_hash.short(),
        decision: id.to_owned(),
    })?;
    policy_of_version(store, &version).await
}

/// A recorded version, compiled again with the artifacts that the record keeps.
pub async fn policy_of_version(store: &dyn AuditStore, version: &PolicyVersion) -> Result<Policy, ReplayError> {
    let mut artifacts = Artifacts::new();
    for (path, hash) in &version.artifacts {
        let kept = store.snapshot(*hash, 0).await?;
        let artifact = kept
            .ok_or_else(|| format!("the artifact {hash} is not in the record"))
            .and_then(|kept| Artifact::from_bytes(&kept.bytes).map(Arc::new).map_err(|e| e.to_string()));
        artifacts.insert(path.clone(), artifact);
    }
    policy::from_version(version, artifacts)
        .map_err(|e| ReplayError::Policy { name: version.name.clone(), reason: e.to_string() })
}

/// Derives `views` again and compares canonical bytes. They may come in any order; each policy's state is folded forward
/// once.
///
/// # Errors
/// When the store cannot be read or a policy is not in it; a decision that differs is no error but in the report.
pub async fn reproduce(store: &dyn AuditStore, views: Vec<DecisionView>) -> Result<ReproduceReport, ReplayError> {
    let mut reproducer = Reproducer::default();
    views.iter().for_each(|view| reproducer.report.plans.take(view));
    reproducer.take(store, views).await?;
    Ok(reproducer.report)
}

/// Derives decisions page by page.
#[derive(Default)]
pub(super) struct Reproducer {
    report: ReproduceReport,
    derivers: BTreeMap<Hash, Deriver>,
    counts: BTreeMap<Hash, Counts>,
}

struct Deriver {
    policy: Policy,
    state: State,
    /// Updates that were read and not folded yet.
    ahead: VecDeque<StateUpdate>,
}

/// Of one policy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Counts {
    asked: usize,
    same: usize,
    /// By reason.
    impossible: BTreeMap<String, usize>,
}

impl Reproducer {
    /// One that was stopped after these.
    pub(super) fn resumed(counts: BTreeMap<Hash, Counts>) -> Self {
        Self { counts, ..Self::default() }
    }

    pub(super) fn counts(&self) -> &BTreeMap<Hash, Counts> {
        &self.counts
    }

    /// Of a policy: decisions that could be derived, how many came out the same, and why others could not be.
    pub(super) fn of(&self, policy: Hash) -> (usize, usize, BTreeMap<String, usize>) {
        self.counts.get(&policy).map_or_else(Default::default, |c| {
            (c.asked - c.impossible.values().sum::<usize>(), c.same, c.impossible.clone())
        })
    }

    /// Takes decisions in any order; from page to page they had better be in their own.
    pub(super) async fn take(&mut self, store: &dyn AuditStore, views: Vec<DecisionView>) -> Result<(), ReplayError> {
        let mut by_policy: BTreeMap<Hash, Vec<DecisionView>> = BTreeMap::new();
        self.report.asked += views.len();
        for view in views {
            by_policy.entry(view.decision.decision.policy_hash).or_default().push(view);
        }
        for (hash, mut views) in by_policy {
            views.sort_by_key(|view| view.decision.decision.state_seq);
            let Some(first) = views.first() else { continue };
            let seq = first.decision.decision.state_seq;
            // Decisions at the same time may have used an older state than one of the page before.
            if self.derivers.get(&hash).is_none_or(|known| known.state.seq > seq) {
                let policy = recorded_policy(store, &first.decision.decision, &first.id.to_string()).await?;
                let state = learn::restore(store, &policy, Some(seq)).await?;
                let ahead = VecDeque::new();
                self.derivers.insert(hash, Deriver { policy, state, ahead });
            }
            let Some(deriver) = self.derivers.get_mut(&hash) else { continue };
            let counts = self.counts.entry(hash).or_default();
            for view in &views {
                deriver.derive(store, view, counts, &mut self.report).await?;
            }
        }
        Ok(())
    }
}

impl Deriver {
    /// Folds until the state is as new.
    async fn reach(&mut self, store: &dyn AuditStore, seq: u64) -> Result<(), ReplayError> {
        while self.state.seq < seq {
            if self.ahead.is_empty() {
                self.ahead = store.state_updates(self.policy.hash(), self.state.seq + 1, 1024).await?.into();
            }
            let Some(update) = self.ahead.pop_front() else { break };
            self.policy.fold(&mut self.state, &update).map_err(|e| learn::LearnError::State {
                policy: self.policy.name().to_owned(),
                reason: e.to_string(),
            })?;
        }
        Ok(())
    }

    async fn derive(
        &mut self,
        store: &dyn AuditStore,
        view: &DecisionView,
        counts: &mut Counts,
        report: &mut ReproduceReport,
    ) -> Result<(), ReplayError> {
        let recorded = &view.decision.decision;
        counts.asked += 1;
        self.reach(store, recorded.state_seq).await?;
        let context = match context_of(view) {
            Ok(context) => context,
            Err(reason) => {
                *counts.impossible.entry(reason.clone()).or_default() += 1;
                report.impossible.push((view.id.to_string(), reason));
                return Ok(());
            }
        };
        let derived = match recorded.decided_by {
            DecidedBy::Pinned => self.policy.pin(&recorded.arm, &self.state, &context),
            _ => Some(self.policy.decide(&self.state, &context)),
        };
        // A shadow decides like any other policy; only the record says that nothing came of it.
        let derived = derived.map(|mut derived| {
            if recorded.decided_by == DecidedBy::Shadow {
                derived.decided_by = DecidedBy::Shadow;
            }
            derived
        });
        let recorded = canonical::to_bytes(recorded).unwrap_or_default();
        let derived = derived.and_then(|d| canonical::to_bytes(&d).ok()).unwrap_or_default();
        if recorded == derived {
            counts.same += 1;
            report.same += 1;
        } else {
            report.differences.push(Difference {
                id: view.id.to_string(),
                recorded: String::from_utf8_lossy(&recorded).into_owned(),
                derived: String::from_utf8_lossy(&derived).into_owned(),
            });
        }
        Ok(())
    }
}
