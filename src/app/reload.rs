//! Policies that change while weir runs. The files are read once a second and compared by content, since editors replace
//! files in many ways; a changed one is compiled against the same fleet and embedder, recorded, given its state, and
//! taken into use for the next request. A file with errors changes nothing: the policy before it stays.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    StartError,
    policies::compile_one,
    record::{record_policy, store_target},
};
use crate::{
    audit::{AuditStore, EventLog, StoreTarget},
    clock::now_micros,
    config::{Config, PolicyFile},
    domain::{Admin, Event, EventBody, Fleet, Hash},
    gateway::{Gateway, Spending},
    learn::Learner,
    policy::{self, Policy},
    signals::Embedder,
};

/// How often the files are read.
const INTERVAL: Duration = Duration::from_secs(1);

/// All that a reload touches.
pub(super) struct Reloader {
    files: Vec<PolicyFile>,
    /// Per file, the hash of the content that was looked at last.
    seen: BTreeMap<String, Hash>,
    /// Per file, the name of its policy, which cannot change.
    names: BTreeMap<String, String>,
    fleet: Fleet,
    embedder: Option<Arc<dyn Embedder>>,
    log: EventLog,
    store: Arc<dyn AuditStore>,
    target: StoreTarget,
    learner: Arc<Learner>,
    spending: Arc<Spending>,
    gateway: Arc<Gateway>,
}

impl Reloader {
    /// For the files that the configuration names; what is built in cannot change.
    ///
    /// # Errors
    /// When the store's address is none.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        config: &Config,
        policies: &[Arc<Policy>],
        fleet: Fleet,
        embedder: Option<Arc<dyn Embedder>>,
        log: EventLog,
        store: Arc<dyn AuditStore>,
        learner: Arc<Learner>,
        spending: Arc<Spending>,
        gateway: Arc<Gateway>,
    ) -> Result<Self, StartError> {
        let files: Vec<PolicyFile> = config.policies.iter().filter(|f| f.watched).cloned().collect();
        let names = policies.iter().map(|p| (p.version().file, p.name().to_owned())).collect();
        let seen = files.iter().map(|f| (f.file.clone(), Hash::of(&f.yaml))).collect();
        let target = store_target(config.database_url.as_deref(), &config.data_dir)?;
        Ok(Self { files, seen, names, fleet, embedder, log, store, target, learner, spending, gateway })
    }

    /// Watches until the task is dropped.
    pub async fn watch(mut self) {
        if self.files.is_empty() {
            return;
        }
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            for file in self.files.clone() {
                // A file that is gone for a moment is being replaced; one that stays away changes nothing.
                let Ok(yaml) = tokio::fs::read(&file.file).await else { continue };
                let hash = Hash::of(&yaml);
                if self.seen.insert(file.file.clone(), hash) == Some(hash) {
                    continue;
                }
                if let Err(reason) = self.reload(&file.file, &yaml).await {
                    tracing::error!(
                        file = file.file,
                        "the changed policy is not used, the one before stays:\n{reason}"
                    );
                    let detail = format!("{}: {reason}", file.file);
                    self.note("policy_rejected", detail).await;
                }
            }
        }
    }

    async fn reload(&self, file: &str, yaml: &[u8]) -> Result<(), String> {
        let spec = policy::parse(file, yaml).map_err(|d| d.to_string())?;
        let policy = compile_one(&spec, &self.fleet, self.embedder.as_ref()).await.map_err(|e| e.to_string())?;
        if let Some(name) = self.names.get(file)
            && name != policy.name()
        {
            return Err(format!(
                "the policy `{name}` is now called `{}`; clients ask for it by name, so that takes a restart",
                policy.name()
            ));
        }
        let before = self.gateway.policy(policy.name());
        if before.as_ref().is_some_and(|before| before.hash() == policy.hash()) {
            return Ok(());
        }
        self.gateway.knows_shadows(&policy)?;
        let policy = Arc::new(policy);
        record_policy(&self.log, self.store.as_ref(), &policy, &self.target).await.map_err(|e| e.to_string())?;
        self.learner.adopt(Arc::clone(&policy)).await.map_err(|e| e.to_string())?;
        self.spending.count_for(&policy, self.store.as_ref(), now_micros()).await.map_err(|e| e.to_string())?;
        let old = before.map_or_else(String::new, |p| p.hash().to_string());
        let detail = format!("{}: {old} -> {}", policy.name(), policy.hash());
        tracing::info!(policy = policy.name(), hash = policy.hash().short(), "the changed policy is in use");
        self.gateway.adopt(policy);
        self.note("policy_reloaded", detail).await;
        Ok(())
    }

    async fn note(&self, action: &str, detail: String) {
        let body = EventBody::Admin(Admin { action: action.to_owned(), detail });
        if let Err(error) = self.log.append(vec![Event::new(now_micros(), None, body)]).await {
            tracing::error!(%error, action, "could not be recorded");
        }
    }
}
