//! What operators ask of a weir that runs: its fleet, what models keep, whether it can serve, its metrics.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use super::{FleetStatus, Gateway, GatewayError, Readiness};
use crate::{
    backend::{Backend, BackendError},
    clock::now_micros,
    dispatch::Journal,
    domain::{Admin, Event, EventBody, KvAnswer, KvCommand},
};

impl Gateway {
    /// All entries of the fleet, and how they are.
    pub fn fleet(&self) -> Vec<FleetStatus> {
        self.parts.backends.iter().map(|(name, backend)| status(name, backend)).collect()
    }

    /// Loads or unloads a model that runs in this process, while others serve; gives how it is then.
    ///
    /// # Errors
    /// [`GatewayError::UnknownModel`], [`GatewayError::Invalid`] for entries that run elsewhere or cannot be loaded.
    pub async fn set_loaded(&self, name: &str, loaded: bool) -> Result<FleetStatus, GatewayError> {
        let backend = self.backend(name)?;
        if backend.local().is_some_and(|local| local.loaded == loaded) {
            return Ok(status(name, backend));
        }
        let wrong = |e: BackendError| GatewayError::Invalid { message: e.message, param: Some("loaded".to_owned()) };
        backend.set_loaded(loaded).await.map_err(wrong)?;
        let action = if loaded { "model_loaded" } else { "model_unloaded" };
        self.record_admin(action, name.to_owned()).await?;
        Ok(status(name, backend))
    }

    /// What a model in this process keeps of keys and values: asked for, computed beforehand, let go.
    ///
    /// # Errors
    /// [`GatewayError::UnknownModel`], [`GatewayError::Invalid`] for entries that run elsewhere and prompts without documents.
    pub async fn kv(&self, name: &str, command: KvCommand) -> Result<KvAnswer, GatewayError> {
        let wrong = |e: BackendError| GatewayError::Invalid { message: e.message, param: None };
        let done = match &command {
            KvCommand::Stat | KvCommand::Lookup(_) => None,
            KvCommand::Pin(_, keep) => Some(("kv_pinned", format!("{name} for {} s", keep.as_secs()))),
            KvCommand::Clear(_) => Some(("kv_cleared", name.to_owned())),
        };
        let answer = self.backend(name)?.kv(command).await.map_err(wrong)?;
        if let Some((action, detail)) = done {
            self.record_admin(action, detail).await?;
        }
        Ok(answer)
    }

    fn backend(&self, name: &str) -> Result<&Arc<dyn Backend>, GatewayError> {
        let served = || self.parts.backends.keys().cloned().collect();
        let backend = self.parts.backends.get(name);
        backend.ok_or_else(|| GatewayError::UnknownModel { name: name.to_owned(), served: served() })
    }

    /// Records what an administrator did.
    async fn record_admin(&self, action: &str, detail: String) -> Result<(), GatewayError> {
        let admin = Admin { action: action.to_owned(), detail };
        let event = Event::new(now_micros(), None, EventBody::Admin(admin));
        self.parts.journal.append(vec![event]).await.map_err(GatewayError::NotRecorded)
    }

    /// Whether requests can be served now, component by component.
    pub async fn readiness(&self) -> Readiness {
        let mut components = BTreeMap::new();
        let mut ready = !self.draining.load(Ordering::Relaxed);
        if !ready {
            components.insert("weir".to_owned(), "shutting down".to_owned());
        }
        let log = match self.log_failing().await {
            Some(error) if self.parts.journal.refuses() => {
                ready = false;
                error
            }
            Some(error) => format!("serving without a record: {error}"),
            None => "ok".to_owned(),
        };
        components.insert("event log".to_owned(), log);
        // The store may lag or be down: the log holds everything until it is back.
        let store = match self.parts.feeder.last_error() {
            Some(error) => format!("{} events behind: {error}", self.parts.feeder.lag()),
            None => "ok".to_owned(),
        };
        components.insert("store".to_owned(), store);
        let embedder = match (&self.parts.embedder, &self.parts.embedder_missing) {
            (Some(_), _) => "ok".to_owned(),
            (None, Some(reason)) => format!("missing: {reason}"),
            (None, None) => "off".to_owned(),
        };
        components.insert("embedder".to_owned(), embedder);
        for (name, backend) in &self.parts.backends {
            let state = if backend.state().available { "ok" } else { "not available" };
            components.insert(format!("model {name}"), state.to_owned());
        }
        Readiness { ready, components }
    }

    /// Prometheus text.
    pub fn metrics(&self) -> String {
        let last = self.parts.log.last_seq();
        let stored = last.saturating_sub(self.parts.feeder.lag());
        // The learner follows the store batch by batch.
        self.parts.metrics.log(last, stored, stored);
        for (name, backend) in &self.parts.backends {
            if let Some(counters) = backend.counters() {
                self.parts.metrics.engine(name, counters);
            }
            if let Some(limit) = backend.concurrency_limit() {
                self.parts.metrics.concurrency_limit(name, limit);
            }
        }
        self.parts.metrics.render()
    }

    /// What keeps the log from being written. Where the last append failed another is tried, since a weir that is not
    /// ready may get no requests to find out by.
    async fn log_failing(&self) -> Option<String> {
        self.parts.journal.failing()?;
        // As large as an ordinary decision with its context, so that room for the one is room for the other.
        let detail = format!("{:<6000}", "whether the log can be written again");
        let probe = Admin { action: "probe".into(), detail };
        let event = Event::new(now_micros(), None, EventBody::Admin(probe));
        let _ = self.parts.journal.append(vec![event]).await;
        self.parts.journal.failing()
    }
}

fn status(name: &str, backend: &Arc<dyn Backend>) -> FleetStatus {
    let state = backend.state();
    FleetStatus {
        name: name.to_owned(),
        kind: backend.kind(),
        available: state.available,
        running: state.running,
        waiting: state.waiting,
        breaker: backend.breaker().map(|state| state.as_str()),
        limit_used: (state.limit_used > 0.0).then_some(state.limit_used),
        concurrency_limit: backend.concurrency_limit(),
        local: backend.local(),
    }
}
