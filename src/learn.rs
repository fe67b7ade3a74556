//! The learner: folds the event log into policy state.
//!
//! It follows the log behind the store: whatever it hears of is recorded already. Feedback on a decision becomes a
//! [`StateUpdate`] (features and arm from the decision's *record*, never from memory), which is itself appended to the log
//! and folded. State is therefore snapshot + fold over a totally ordered list, and can be derived again by anybody who
//! holds the record. Requests read immutable published versions; nothing here is on their way.
//!
//! One decision teaches once: the first feedback that makes a policy's reward complete counts, later feedback is recorded
//! and changes nothing. A request that the client says is its own retry does not teach.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use async_trait::async_trait;

use crate::{
    audit::{AuditStore, DecisionView, EventLog, Follower, Logged, Snapshot, StoreError},
    clock::now_micros,
    domain::{DecidedBy, DecisionId, Event, EventBody, Hash, OutcomeStatus, StateUpdate},
    policy::{Observed, Policy, State},
};

/// A snapshot is saved after this many updates, so that a start folds at most as many.
const SNAPSHOT_EVERY: u64 = 256;
/// Updates read from the store at once.
const PAGE: usize = 1024;

/// What went wrong with learning.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    #[error("the store cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("the recorded state of policy {policy} cannot be restored: {reason}")]
    State { policy: String, reason: String },
}

/// Published versions of the state of every policy, by policy hash; cheap to read, replaced as a whole.
#[derive(Clone, Default)]
pub struct Published(Arc<ArcSwap<BTreeMap<Hash, Arc<State>>>>);

impl Published {
    /// The current state of a policy; `None` for one that is not in use.
    pub fn get(&self, policy: Hash) -> Option<Arc<State>> {
        self.0.load().get(&policy).cloned()
    }

    fn set(&self, policy: Hash, state: Arc<State>) {
        self.0.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.insert(policy, Arc::clone(&state));
            map
        });
    }
}

/// Follows the log and learns.
pub struct Learner {
    log: EventLog,
    store: Arc<dyn AuditStore>,
    policies: ArcSwap<BTreeMap<Hash, Arc<Policy>>>,
    published: Published,
    /// Decisions that have taught since the start: their updates may not have reached the store yet.
    taught: Mutex<BTreeSet<DecisionId>>,
    /// Decisions judged before they had an outcome.
    awaiting: Mutex<BTreeSet<DecisionId>>,
    /// Whether some policy's reward is complete with the outcome alone.
    outcome_teaches: AtomicBool,
}

impl Learner {
    /// Restores the state of every policy from the store and publishes it.
    ///
    /// # Errors
    /// When the store cannot be read, or holds a state that does not fit its policy.
    pub async fn start(
        log: EventLog,
        store: Arc<dyn AuditStore>,
        policies: impl IntoIterator<Item = Arc<Policy>>,
        published: Published,
    ) -> Result<Self, LearnError> {
        let policies: BTreeMap<Hash, Arc<Policy>> = policies.into_iter().map(|p| (p.hash(), p)).collect();
        for policy in policies.values() {
            let state = restore(store.as_ref(), policy, None).await?;
            published.set(policy.hash(), Arc::new(state));
        }
        let outcome_teaches = AtomicBool::new(policies.values().any(|p| outcome_teaches(p)));
        Ok(Self {
            log,
            store,
            policies: ArcSwap::from_pointee(policies),
            published,
            taught: Mutex::default(),
            awaiting: Mutex::default(),
            outcome_teaches,
        })
    }

    /// Takes a policy into use while weir runs: its state is restored and published before this returns. The policies
    /// before it stay, as feedback on what they decided may still come.
    ///
    /// # Errors
    /// As for [`Learner::start`].
    pub async fn adopt(&self, policy: Arc<Policy>) -> Result<(), LearnError> {
        if self.policies.load().contains_key(&policy.hash()) {
            return Ok(());
        }
        let state = restore(self.store.as_ref(), &policy, None).await?;
        self.published.set(policy.hash(), Arc::new(state));
        if outcome_teaches(&policy) {
            self.outcome_teaches.store(true, Ordering::Relaxed);
        }
        self.policies.rcu(|known| {
            let mut known = BTreeMap::clone(known);
            known.insert(policy.hash(), Arc::clone(&policy));
            known
        });
        Ok(())
    }

    /// Feedback that was recorded but had not taught when weir last stopped.
    pub async fn catch_up(&self) -> Result<(), LearnError> {
        for policy in self.policies.load_full().values().filter(|p| p.learns()) {
            for decision in self.store.untaught(policy.hash()).await? {
                self.teach(decision).await?;
            }
        }
        Ok(())
    }

    async fn teach(&self, id: DecisionId) -> Result<(), LearnError> {
        if self.taught.lock().unwrap_or_else(PoisonError::into_inner).contains(&id) {
            return Ok(());
        }
        let Some(view) = self.store.decision(id).await? else { return Ok(()) };
        let record = &view.decision;
        let policies = self.policies.load_full();
        let Some(policy) = policies.get(&record.decision.policy_hash).filter(|p| p.learns()) else {
            return Ok(());
        };
        let teaches = record.decision.decided_by == DecidedBy::Select
            && record.client_retry == 0
            && view.state_updates.is_empty()
            && !record.decision.features.is_empty();
        if !teaches {
            return Ok(());
        }
        let Some(observed) = observed(&view) else {
            self.awaiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
            return Ok(());
        };
        let Some(reward) = policy.reward(&observed) else { return Ok(()) };
        let Some(published) = self.published.get(policy.hash()) else { return Ok(()) };
        let mut state = State::clone(&published);
        let update = StateUpdate::of(&record.decision, state.seq, reward, observed.cost_usd, view.at);
        if let Err(error) = policy.fold(&mut state, &update) {
            tracing::error!(policy = policy.name(), %error, "an update does not fit its policy; it is left out");
            return Ok(());
        }
        // The update is in the log before any decision can use it.
        let event = Event::new(now_micros(), Some(id), EventBody::StateUpdate(update));
        if let Err(error) = self.log.append(vec![event]).await {
            tracing::error!(%error, "the update could not be recorded; it is learnt at the next start");
            return Ok(());
        }
        self.taught.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        if state.seq.is_multiple_of(SNAPSHOT_EVERY)
            && let Err(error) = save(self.store.as_ref(), policy.hash(), &state).await
        {
            tracing::warn!(%error, "the snapshot could not be saved; the next start folds a longer list");
        }
        self.published.set(policy.hash(), Arc::new(state));
        Ok(())
    }
}

#[async_trait]
impl Follower for Learner {
    /// Hears of events once they are in the store.
    async fn follow(&self, batch: &[Logged]) {
        for logged in batch {
            let Some(id) = logged.event.decision else { continue };
            let teaches = match logged.event.body {
                EventBody::Feedback(_) => true,
                EventBody::Outcome(_) => {
                    self.awaiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id)
                        || self.outcome_teaches.load(Ordering::Relaxed)
                }
                _ => false,
            };
            if !teaches {
                continue;
            }
            if let Err(error) = self.teach(id).await {
                tracing::warn!(%error, decision = %id, "feedback could not be learnt now; it is at the next start");
            }
        }
    }
}

async fn save(store: &dyn AuditStore, policy: Hash, state: &State) -> Result<(), StoreError> {
    // A state that folds is made of finite numbers and strings.
    let bytes = serde_json::to_vec(state).map_err(|e| StoreError::Row(e.to_string()))?;
    store.save_snapshot(&Snapshot { policy_hash: policy, state_seq: state.seq, bytes }).await
}

/// The state of `policy` after `upto` updates (all of them with `None`): its latest usable snapshot plus the fold over
/// the recorded updates that follow.
pub async fn restore(store: &dyn AuditStore, policy: &Policy, upto: Option<u64>) -> Result<State, LearnError> {
    let wrong = |reason: String| LearnError::State { policy: policy.name().to_owned(), reason };
    let mut state = match store.snapshot(policy.hash(), upto.unwrap_or(u64::MAX)).await? {
        Some(snapshot) => serde_json::from_slice(&snapshot.bytes).map_err(|e| wrong(e.to_string()))?,
        None => policy.initial_state(),
    };
    loop {
        let page = store.state_updates(policy.hash(), state.seq + 1, PAGE).await?;
        let full = page.len() == PAGE;
        for update in page {
            if upto.is_some_and(|upto| state.seq >= upto) {
                return Ok(state);
            }
            policy.fold(&mut state, &update).map_err(|e| wrong(e.to_string()))?;
        }
        if !full {
            return Ok(state);
        }
    }
}

/// Whether a policy's reward is complete with the outcome alone.
fn outcome_teaches(policy: &Policy) -> bool {
    let unjudged = Observed {
        feedback: BTreeMap::new(),
        cost_usd: 0.0,
        tokens: 0,
        calls: 1,
        joules: Some(0.0),
        latency_us: 0,
        ttft_us: None,
        status: OutcomeStatus::Ok,
    };
    policy.learns() && policy.reward(&unjudged).is_some()
}

/// What was observed of a decision's answer: the first feedback of each name, and what the outcome says. `None` without an
/// outcome.
pub fn observed(view: &DecisionView) -> Option<Observed> {
    let outcome = view.outcome.as_ref()?;
    let mut feedback = BTreeMap::new();
    for given in &view.feedback {
        feedback.entry(given.feedback.name.clone()).or_insert(given.feedback.value);
    }
    Some(Observed {
        feedback,
        cost_usd: outcome.cost_usd,
        tokens: view.tokens(),
        calls: outcome.attempts,
        joules: outcome.joules,
        latency_us: outcome.latency_us,
        ttft_us: outcome.ttft_us,
        status: outcome.status,
    })
}
