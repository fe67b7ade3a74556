//! What policies have learnt, as operators see and set it: in the record of a data directory, while no weir serves there.

use std::{path::Path, sync::Arc};

use super::{
    StartError,
    record::{caught_up, open_record, open_store, store_target, usable},
};
use crate::{
    audit::{AuditStore, DecisionFilter, EventLog, Feeder, FeederOptions, LogOptions},
    clock::now_micros,
    domain::{Admin, Event, EventBody, Hash, StateUpdate},
    learn,
    policy::{Policy, State},
    replay,
};

/// A recorded version of a policy and what it has learnt.
pub struct Learnt {
    pub policy: Policy,
    pub state: State,
}

/// The version of a policy in the record whose hash begins with `version`; without one, the version that decided or came
/// last.
///
/// # Errors
/// When the record has no such policy.
pub async fn learnt(store: &dyn AuditStore, name: &str, version: Option<&str>) -> Result<Learnt, StartError> {
    let other = |e: &dyn std::fmt::Display| StartError::Other(e.to_string());
    let versions = store.policy_versions(name).await.map_err(|e| other(&e))?;
    let hash = match version {
        Some(prefix) => {
            let mut found = versions.iter().map(|(hash, _)| *hash).filter(|h| h.to_string().starts_with(prefix));
            match (found.next(), found.next()) {
                (Some(hash), None) => Some(hash),
                (Some(_), Some(_)) => {
                    return Err(StartError::Other(format!("more than one version of `{name}` begins with {prefix}")));
                }
                (None, _) => {
                    let known: Vec<String> = versions.iter().map(|(hash, _)| hash.short()).collect();
                    let known = known.join(", ");
                    return Err(StartError::Other(format!("`{name}` has no version {prefix}; there are: {known}")));
                }
            }
        }
        None => {
            let filter = DecisionFilter { policy: Some(name.to_owned()), limit: Some(1), ..DecisionFilter::default() };
            let newest = store.decisions(&filter).await.map_err(|e| other(&e))?.pop();
            match (versions.first(), newest) {
                (Some((_, at)), Some(row)) if row.at > *at => Some(row.policy_hash),
                (first, _) => first.map(|(hash, _)| *hash),
            }
        }
    };
    let version = match hash {
        Some(hash) => store.policy_version(hash).await.map_err(|e| other(&e))?,
        None => None,
    };
    let Some(version) = version else {
        return Err(StartError::Other(format!(
            "the record has no policy `{name}`; weir records one when it serves it"
        )));
    };
    let policy = replay::policy_of_version(store, &version).await.map_err(|e| other(&e))?;
    let state = learn::restore(store, &policy, None).await?;
    Ok(Learnt { policy, state })
}

/// Sets the state of a policy to `given`, or to what it was before anything was learnt, by an update like any other: it is
/// in the log, decisions after it can be derived again, and those before it, too. Gives the policy's hash and the number
/// of updates now.
///
/// # Errors
/// While weir serves from this data directory, when the record has no such policy, or the state does not fit it.
pub async fn set_state(
    data_dir: &Path,
    database_url: Option<&str>,
    name: &str,
    version: Option<&str>,
    given: Option<State>,
) -> Result<(Hash, u64), StartError> {
    usable(data_dir)?;
    // The record must be there before anything is written.
    drop(open_record(data_dir, database_url).await?);
    let log = EventLog::open(&data_dir.join("log"), LogOptions::default())?;
    let target = store_target(database_url, data_dir)?;
    let store: Arc<dyn AuditStore> = open_store(&target).await?;
    let feeder = Feeder::start(log.clone(), Arc::clone(&store), None, FeederOptions::default()).await?;
    caught_up(&feeder, &log).await?;
    let Learnt { policy, mut state } = learnt(store.as_ref(), name, version).await?;
    let action = if given.is_some() { "state_imported" } else { "state_reset" };
    let wanted = match given {
        Some(given) => policy.carry(&given).map_err(|e| StartError::Other(e.to_string()))?,
        None => policy.initial_state(),
    };
    let now = now_micros();
    let update = StateUpdate {
        policy: policy.name().to_owned(),
        policy_hash: policy.hash(),
        seq: state.seq + 1,
        arm: String::new(),
        features: Vec::new(),
        reward: 0.0,
        cost_usd: 0.0,
        propensity: 0.0,
        decided: now,
        set: Some(Box::new(serde_json::to_value(&wanted).map_err(|e| StartError::Other(e.to_string()))?)),
    };
    policy.fold(&mut state, &update).map_err(|e| StartError::Other(e.to_string()))?;
    let detail = format!("{} {}: update {}", policy.name(), policy.hash(), state.seq);
    let note = EventBody::Admin(Admin { action: action.to_owned(), detail });
    log.append(vec![Event::new(now, None, EventBody::StateUpdate(update)), Event::new(now, None, note)]).await?;
    caught_up(&feeder, &log).await?;
    store.close().await;
    Ok((policy.hash(), state.seq))
}
