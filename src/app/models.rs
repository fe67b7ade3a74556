//! The fleet's backends and the embedder, with what they need fetched.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::StartError;
use crate::{
    assets::{self, Assets},
    backend::{
        Backend, Guarded, Limited, Listener,
        local::LocalBackend,
        remote::{RemoteBackend, RemoteConfig, Secret, UpstreamModel},
        scripted::ScriptedBackend,
    },
    cascade::limiter::Limiter,
    config::{self, Config, FleetEntry, UPSTREAM},
    domain::{Fleet, ModelCard},
    engine::{Chunks, EngineOptions, KvCache, Precision},
    signals::{Embedder, EmbedderFiles, OrtEmbedder, Pooling},
};

/// How long a start waits for `--upstream` to list its models.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(3);

/// How many calls wait for a place at a server whose limit is adapted, where its entry does not say.
const MAX_WAITING: u32 = 1024;

/// Adds one fleet entry per model that `--upstream` lists, so that `auto` has arms. Where the list cannot be had, every
/// model name still passes through.
pub(super) async fn list_upstream_models(config: &mut Config) {
    if config.upstream.is_none() {
        return;
    }
    let Some(entry) = config.fleet.iter().find(|e| e.name == UPSTREAM).cloned() else { return };
    match upstream_models(&entry).await {
        Ok(models) => {
            for model in models.into_iter().take(64) {
                if config.fleet.iter().any(|e| e.name == model) {
                    continue;
                }
                let mut named = entry.clone();
                named.name.clone_from(&model);
                if let Some(remote) = &mut named.remote {
                    remote.model = Some(model);
                    remote.pass_model = false;
                }
                config.fleet.push(named);
            }
        }
        Err(error) => {
            tracing::warn!(%error, "the upstream does not list its models: names pass through, `auto` is the upstream's default");
        }
    }
    if config.policies.is_empty() {
        let listed: Vec<&str> = config.fleet.iter().map(|e| e.name.as_str()).filter(|n| *n != UPSTREAM).collect();
        config.policies.push(config::upstream_policy(&listed));
    }
}

async fn upstream_models(entry: &FleetEntry) -> Result<Vec<String>, String> {
    let remote = entry.remote.as_ref().ok_or("it is not remote")?;
    let backend = RemoteBackend::new(remote_config(entry, remote)?).map_err(|e| e.to_string())?;
    match tokio::time::timeout(UPSTREAM_PATIENCE, backend.models()).await {
        Ok(listed) => listed.map_err(|e| e.to_string()),
        Err(_) => Err(format!("no answer within {UPSTREAM_PATIENCE:?}")),
    }
}

pub(super) type Backends = BTreeMap<String, Arc<dyn Backend>>;

/// One backend per fleet entry, and the fleet as policies see it (context lengths read from local models).
pub(super) async fn backends(
    config: &Config,
    assets: &Arc<Assets>,
    listener: &Listener,
) -> Result<(Backends, Fleet), StartError> {
    let mut backends = Backends::new();
    let mut cards: Vec<ModelCard> = Vec::new();
    let kv_cache = KvCache::new(config.kv_cache_bytes);
    // Where there is nothing else, a failing server is better than none.
    let others = config.fleet.len() > 1 && config.upstream.is_none();
    for entry in &config.fleet {
        let mut card = entry.card();
        let wrong = |reason: String| StartError::Model { name: entry.name.clone(), reason };
        let backend: Arc<dyn Backend> = if let Some(local) = &entry.local {
            let path = model_file(&local.model, assets).await?;
            let mut options = EngineOptions {
                kv_cache: kv_cache.clone(),
                packed: Some(config.data_dir.join("packed")),
                context: entry.context,
                disk: (config.kv_disk_bytes > 0).then(|| (config.data_dir.join("kv"), config.kv_disk_bytes)),
                chunks: config.chunk_reuse.map_or(Chunks::Off, |bound| {
                    let dir = config.data_dir.join("fidelity");
                    Chunks::Measured { dir, bound }
                }),
                ..EngineOptions::default()
            };
            if let Some(threads) = local.threads {
                options.threads = threads;
            }
            if let Some(sequences) = local.max_sequences {
                options.max_sequences = sequences;
            }
            if let Some(mib) = local.cache_mib {
                options.cache_bytes = Some(mib.saturating_mul(1 << 20));
            }
            if let Some(guesses) = local.prompt_lookup {
                options.prompt_lookup = guesses;
            }
            if let Some(precision) = local.activation_bits.and_then(Precision::of_bits) {
                options.activations = precision;
            }
            let name = entry.name.clone();
            let backend = tokio::task::spawn_blocking(move || LocalBackend::load(&path, options, name))
                .await
                .map_err(|e| wrong(e.to_string()))?
                .map_err(|e| wrong(e.to_string()))?;
            // What is configured bounds the model, and the model what is configured.
            card.context = u32::try_from(backend.info().context).unwrap_or(u32::MAX);
            Arc::new(backend)
        } else if let Some(remote) = &entry.remote {
            let adaptive = remote.adaptive_concurrency.clone();
            let (settings, name) = (remote_config(entry, remote).map_err(wrong)?, entry.name.clone());
            let patience = settings.first_byte_timeout;
            let remote: Arc<dyn Backend> = Arc::new(RemoteBackend::new(settings).map_err(|e| wrong(e.to_string()))?);
            // A call that a breaker refuses takes no place.
            let remote = match adaptive {
                Some(adaptive) => {
                    let limiter = Limiter::new(adaptive.policy()).map_err(|e| wrong(e.to_string()))?;
                    let max_waiting = adaptive.max_waiting.unwrap_or(MAX_WAITING) as usize;
                    Arc::new(Limited::new(remote, name, limiter, max_waiting, patience))
                }
                None => remote,
            };
            match config.breaker.filter(|_| others) {
                Some(policy) => Arc::new(Guarded::new(remote, entry.name.clone(), policy, Arc::clone(listener))),
                None => remote,
            }
        } else if let Some(scripted) = &entry.scripted {
            Arc::new(ScriptedBackend::new(entry.name.clone(), scripted.clone()))
        } else {
            return Err(wrong("needs one of `local`, `remote`, `scripted`".into()));
        };
        backends.insert(entry.name.clone(), backend);
        cards.push(card);
    }
    Ok((backends, Fleet::new(cards)))
}

fn remote_config(entry: &FleetEntry, remote: &config::RemoteEntry) -> Result<RemoteConfig, String> {
    let mut out = RemoteConfig::new(entry.name.clone(), remote.url.clone());
    if remote.pass_model {
        out.model = UpstreamModel::AsAsked;
    } else if let Some(model) = &remote.model {
        out.model = UpstreamModel::Named(model.clone());
    }
    if let Some(variable) = &remote.key_env {
        let key = std::env::var(variable).ok().filter(|key| !key.is_empty());
        out.api_key = Some(Secret::new(key.ok_or_else(|| {
            format!("the environment variable {variable} (`key_env`) is not set; set it or take `key_env` out")
        })?));
    }
    out.forward_client_key = remote.forward_client_key;
    let seconds = |name: &str, given: f64| {
        Duration::try_from_secs_f64(given).map_err(|e| format!("`{name}`: {given} is no number of seconds: {e}"))
    };
    if let Some(given) = remote.first_byte_timeout_s {
        out.first_byte_timeout = seconds("first_byte_timeout_s", given)?;
    }
    if let Some(given) = remote.idle_timeout_s {
        out.idle_timeout = seconds("idle_timeout_s", given)?;
    }
    out.max_concurrent = remote.max_concurrent;
    Ok(out)
}

/// A path (a file, or a folder of safetensors) as it is; anything else is an asset, fetched where it is missing.
async fn model_file(model: &str, assets: &Arc<Assets>) -> Result<PathBuf, StartError> {
    let path = Path::new(model);
    if path.extension().is_some() && path.exists() || path.join("config.json").exists() {
        return Ok(path.to_owned());
    }
    let installed = ensure(assets, model).await?;
    installed
        .files
        .get("model")
        .cloned()
        .ok_or_else(|| StartError::Other(format!("the asset `{model}` holds no model file")))
}

async fn ensure(assets: &Arc<Assets>, name: &str) -> Result<assets::Installed, StartError> {
    let (assets, name) = (Arc::clone(assets), name.to_owned());
    match tokio::task::spawn_blocking(move || assets.ensure(&name)).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(StartError::Other(error.to_string())),
    }
}

/// The configured embedder; `Ok(None)` where it is off or no policy asks for one and it is not there.
pub(super) async fn embedder(config: &Config, assets: &Arc<Assets>) -> Result<Option<Arc<dyn Embedder>>, String> {
    match &config.embedder {
        Some(name) => load_embedder(assets, name, config.embed_threads).await.map(Some),
        None => Ok(None),
    }
}

/// The embedder of that name, fetched where it is missing, on all cores: for work offline.
///
/// # Errors
/// When it cannot be fetched or loaded.
pub async fn offline_embedder(data_dir: &Path, name: &str) -> Result<Arc<dyn Embedder>, StartError> {
    let assets = Assets::new(data_dir, assets::Options::from_env());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    load_embedder(&assets, name, threads).await.map_err(|reason| StartError::Other(format!("{name}: {reason}")))
}

pub(super) async fn load_embedder(assets: &Assets, name: &str, threads: usize) -> Result<Arc<dyn Embedder>, String> {
    let (assets, name) = (assets.clone(), name.to_owned());
    let load = move || {
        let runtime = assets.ensure("onnxruntime").map_err(|e| e.to_string())?;
        let model = assets.ensure(&name).map_err(|e| e.to_string())?;
        let file = |installed: &assets::Installed, role: &str| {
            installed.files.get(role).cloned().ok_or_else(|| format!("the asset `{name}` has no {role}"))
        };
        let files = EmbedderFiles {
            onnxruntime: file(&runtime, "library")?,
            model: file(&model, "model")?,
            tokenizer: file(&model, "tokenizer")?,
            weights_sha256: model.sha256.get("model").cloned().unwrap_or_default(),
            pooling: if name.starts_with("bge") { Pooling::Cls } else { Pooling::Mean },
            window: 512,
            threads,
            name: name.clone(),
        };
        OrtEmbedder::load(&files).map_err(|e| e.to_string())
    };
    let embedder = tokio::task::spawn_blocking(load).await.map_err(|e| e.to_string())??;
    Ok(Arc::new(embedder))
}
