//! Where the record goes: data directory, event log, store.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::sync::mpsc::UnboundedReceiver;

use super::{StartError, policies::artifact_path};
use crate::{
    audit::{self, AuditStore, EventLog, Feeder, LogOptions, Snapshot, StoreTarget},
    backend::BreakerChange,
    cascade::breaker::BreakerState,
    clock::now_micros,
    config::{self, Config},
    dispatch::{Journal, LogJournal},
    domain::{Admin, Event, EventBody, Hash, PolicyVersion},
    policy::Policy,
};

/// How long a start waits for a store that does not answer.
const STORE_PATIENCE: Duration = Duration::from_secs(20);
/// How long a start waits until the store has what an earlier run left in the log.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(600);

/// The store of a data directory, for verbs that read the record.
pub async fn open_record(data_dir: &Path, database_url: Option<&str>) -> Result<Arc<dyn AuditStore>, StartError> {
    let target = store_target(database_url, data_dir)?;
    audit::open_existing(&target).await.map_err(|source| store_error(&target, source))
}

pub(super) fn log_options(config: &Config) -> LogOptions {
    LogOptions {
        durability: match config.record.durability {
            config::Durability::Written => audit::Durability::Written,
            config::Durability::Strict => audit::Durability::Strict,
        },
        ..LogOptions::default()
    }
}

pub(super) fn usable(data_dir: &Path) -> Result<(), StartError> {
    let wrong = |source| StartError::DataDir { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(wrong)?;
    tempfile::Builder::new().prefix(".weir-probe").tempfile_in(data_dir).map_err(wrong)?;
    Ok(())
}

pub(super) fn store_target(database_url: Option<&str>, data_dir: &Path) -> Result<StoreTarget, StartError> {
    StoreTarget::choose(database_url, data_dir).map_err(|e| StartError::Other(e.to_string()))
}

pub(super) fn store_error(target: &StoreTarget, source: audit::StoreError) -> StartError {
    let (target, hint) = match target {
        StoreTarget::Sqlite(path) => (path.display().to_string(), "Check the file and its directory's permissions"),
        // The URL may hold a password.
        StoreTarget::Postgres(_) => (
            "in PostgreSQL (DATABASE_URL)".to_owned(),
            "Check that the server runs and the URL is right, or leave DATABASE_URL out to use the embedded store",
        ),
    };
    StartError::Store { target, source, hint }
}

/// Opens the store, patiently: a database often starts beside weir.
pub(super) async fn open_store(target: &StoreTarget) -> Result<Arc<dyn AuditStore>, StartError> {
    let begun = std::time::Instant::now();
    let mut told = false;
    loop {
        match audit::open_store(target).await {
            Ok(store) => return Ok(store),
            Err(error @ audit::StoreError::Unavailable(_)) if begun.elapsed() < STORE_PATIENCE => {
                if !told {
                    tracing::warn!(%error, "the store does not answer yet; trying for {STORE_PATIENCE:?}");
                    told = true;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(store_error(target, error)),
        }
    }
}

/// Waits until the store has all that is in the log.
pub(super) async fn caught_up(feeder: &Feeder, log: &EventLog) -> Result<(), StartError> {
    feeder.flush(log.last_seq(), CATCH_UP_PATIENCE).await.map_err(|e| StartError::Other(e.to_string()))
}

/// Puts the artifacts of a policy into the store, by their hash, so that its decisions can be derived again wherever the
/// record goes.
async fn keep_artifacts(
    store: &dyn AuditStore,
    version: &PolicyVersion,
    target: &StoreTarget,
) -> Result<(), StartError> {
    for (path, hash) in &version.artifacts {
        let file = artifact_path(&version.file, path);
        let bytes =
            std::fs::read(&file).map_err(|e| StartError::Other(format!("cannot read {}: {e}", file.display())))?;
        if Hash::of(&bytes) != *hash {
            return Err(StartError::Other(format!("{} changed while weir started; start again", file.display())));
        }
        let kept = Snapshot { policy_hash: *hash, state_seq: 0, bytes };
        store.save_snapshot(&kept).await.map_err(|source| store_error(target, source))?;
    }
    Ok(())
}

/// Every policy version in use is in the record before the first decision under it.
pub(super) async fn record_start(
    log: &EventLog,
    store: &dyn AuditStore,
    policies: &[Arc<Policy>],
    target: &StoreTarget,
) -> Result<(), StartError> {
    let now = now_micros();
    let admin = Admin { action: "start".into(), detail: crate::BUILD.into() };
    let mut events = vec![Event::new(now, None, EventBody::Admin(admin))];
    for policy in policies {
        events.extend(version_event(store, policy, target).await?);
    }
    log.append(events).await?;
    Ok(())
}

/// Records a policy that is taken into use while weir runs, unless the record knows it.
pub(super) async fn record_policy(
    log: &EventLog,
    store: &dyn AuditStore,
    policy: &Policy,
    target: &StoreTarget,
) -> Result<(), StartError> {
    let events: Vec<Event> = version_event(store, policy, target).await?.into_iter().collect();
    if !events.is_empty() {
        log.append(events).await?;
    }
    Ok(())
}

async fn version_event(
    store: &dyn AuditStore,
    policy: &Policy,
    target: &StoreTarget,
) -> Result<Option<Event>, StartError> {
    let known = store.policy_version(policy.hash()).await.map_err(|source| store_error(target, source))?;
    if known.is_some() {
        return Ok(None);
    }
    let version = policy.version();
    keep_artifacts(store, &version, target).await?;
    Ok(Some(Event::new(now_micros(), None, EventBody::PolicyVersion(Box::new(version)))))
}

/// Records breakers that open and close, for as long as there are any.
pub(super) async fn breakers(mut changed: UnboundedReceiver<BreakerChange>, journal: Arc<LogJournal>) {
    while let Some(BreakerChange { model, state, detail }) = changed.recv().await {
        match state {
            BreakerState::Open { .. } => tracing::warn!(model, detail, "a model is left alone"),
            _ => tracing::info!(model, state = state.as_str(), detail, "a model that was left alone"),
        }
        let admin = Admin { action: format!("breaker_{}", state.as_str()), detail: format!("{model}: {detail}") };
        let event = Event::new(now_micros(), None, EventBody::Admin(admin));
        if let Err(error) = journal.append(vec![event]).await {
            tracing::warn!(error, "a breaker's change was not recorded");
        }
    }
}
