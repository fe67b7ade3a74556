//! The composition: one place that builds every component, in the order in which they need each other.
//!
//! models and libraries (assets) → engines and remote backends → embedder → policies → event log → store → learner →
//! feeder → gateway → HTTP. Whatever is wrong is found before the port answers.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    assets::{self, Assets},
    audit::{self, AuditStore, DecisionView, EventLog, Feeder, FeederOptions, LogOptions, StoreTarget},
    backend::{
        Backend,
        local::LocalBackend,
        remote::{RemoteBackend, RemoteConfig, Secret, UpstreamModel},
        scripted::ScriptedBackend,
    },
    clock::now_micros,
    config::{self, Config, FleetEntry, UPSTREAM},
    dispatch::{self, DispatchOptions, Dispatcher, LogJournal},
    domain::{Admin, Event, EventBody, Fleet, ModelCard},
    engine::{Engine, EngineOptions},
    gateway::{Gateway, Parts},
    http,
    learn::{Learner, Published},
    policy::{self, Policy},
    signals::{Embedder, EmbedderFiles, OrtEmbedder, Pooling},
    telemetry::Metrics,
};

/// How long a start waits for a store that does not answer.
const STORE_PATIENCE: Duration = Duration::from_secs(20);
/// How long a start waits until the store has what an earlier run left in the log.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(600);
/// How long a start waits for `--upstream` to list its models.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(3);

/// Why weir does not start; each names the component and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}. {}", listen_hint(source))]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the data directory {path} cannot be used: {source}. Choose another one with --data-dir or WEIR_HOME")]
    DataDir { path: PathBuf, source: std::io::Error },
    #[error(
        "refusing to listen on {0} without API keys: everybody could use this weir. Configure `keys:`, or listen on 127.0.0.1"
    )]
    Open(SocketAddr),
    #[error(transparent)]
    Asset(#[from] assets::AssetError),
    #[error("model `{name}`: {reason}")]
    Model { name: String, reason: String },
    /// Rendered diagnostics.
    #[error("{0}")]
    Policy(String),
    #[error("event log: {0}")]
    Log(#[from] audit::LogError),
    #[error("the store {target} is not available: {source}. {hint}")]
    Store { target: String, source: audit::StoreError, hint: &'static str },
    #[error("{0}")]
    Learn(#[from] crate::learn::LearnError),
    #[error("{0}")]
    Other(String),
}

fn listen_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "Another program has this port; choose one with --listen 127.0.0.1:PORT",
        std::io::ErrorKind::PermissionDenied => "Ports below 1024 need privileges; choose one with --listen",
        _ => "Choose an address of this machine with --listen",
    }
}

/// A weir that serves.
pub struct Running {
    address: SocketAddr,
    gateway: Arc<Gateway>,
    log: EventLog,
    feeder: Arc<Feeder>,
    server: JoinHandle<http::Drained>,
    stop: tokio::sync::watch::Sender<bool>,
    needs_key: bool,
}

/// Builds everything and begins to listen.
///
/// # Errors
/// [`StartError`]; nothing is left running then.
pub async fn start(config: Config) -> Result<Running, StartError> {
    crate::tls::install_provider();
    if !config.listen.ip().is_loopback() && config.keys.is_empty() {
        return Err(StartError::Open(config.listen));
    }
    // The port first: a taken one should not cost a download.
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| StartError::Listen { address: config.listen, source })?;
    let address = listener.local_addr().map_err(|source| StartError::Listen { address: config.listen, source })?;
    usable(&config.data_dir)?;
    let log = EventLog::open(&config.data_dir.join("log"), log_options(&config))?;

    let mut config = config;
    list_upstream_models(&mut config).await;
    let checked = check(&config)?;
    // In front of another server, models are fetched only for what a policy or the configuration asks for.
    if config.upstream.is_some() && !config.embedder_asked && !checked.iter().any(Policy::needs_embedding) {
        config.embedder = None;
    }
    let assets = Arc::new(Assets::new(&config.data_dir, assets::Options::from_env()));
    let (backends, fleet) = backends(&config, &assets).await?;
    let (embedder, embedder_missing) = match embedder(&config, &assets).await {
        Ok(found) => (found, None),
        Err(reason) => {
            tracing::warn!(%reason, "no embedder: policies that want an embedding take their `no_embedding` branch");
            (None, Some(reason))
        }
    };
    let policies = compile(&config, &fleet, embedder.as_ref()).await?;

    let target = store_target(config.database_url.as_deref(), &config.data_dir)?;
    let store = open_store(&target).await?;
    // First without a learner: it restores its state from a store that has everything.
    let first = Feeder::start(log.clone(), Arc::clone(&store), None, FeederOptions::default()).await?;
    caught_up(&first, &log).await?;
    let interrupted = audit::close_interrupted(&log, store.as_ref(), now_micros())
        .await
        .map_err(|source| store_error(&target, source))?;
    if interrupted > 0 {
        tracing::warn!(interrupted, "requests were under way when weir last stopped; they are recorded as interrupted");
    }
    record_start(&log, store.as_ref(), &policies, &target).await?;
    caught_up(&first, &log).await?;
    drop(first);

    let published = Published::default();
    let learner =
        Arc::new(Learner::start(log.clone(), Arc::clone(&store), policies.iter().cloned(), published.clone()).await?);
    let follower = Arc::clone(&learner) as Arc<dyn audit::Follower>;
    let feeder =
        Arc::new(Feeder::start(log.clone(), Arc::clone(&store), Some(follower), FeederOptions::default()).await?);
    learner.catch_up().await?;

    let metrics = Arc::new(Metrics::new());
    let refuse = config.record.when_log_fails == config::WhenLogFails::Refuse;
    let journal = Arc::new(LogJournal::new(log.clone(), refuse));
    let dispatcher = Dispatcher::new(
        backends.clone(),
        Arc::clone(&journal) as Arc<dyn dispatch::Journal>,
        fleet.clone(),
        DispatchOptions { hash_bodies: config.record.bodies == config::Bodies::Hash, ..DispatchOptions::default() },
    );
    let default_policy =
        config.default_policy.clone().or_else(|| policies.first().map(|p| p.name().to_owned())).unwrap_or_default();
    let needs_key = !config.keys.is_empty();
    let options = http_options(&config, &metrics);
    let gateway = Arc::new(Gateway::new(Parts {
        policies,
        default_policy,
        fleet,
        aliases: config.aliases,
        unknown_model: config.unknown_model,
        backends,
        dispatcher,
        embedder,
        embedder_missing,
        embed_deadline: config.embed_deadline,
        published,
        log: log.clone(),
        journal,
        store,
        feeder: Arc::clone(&feeder),
        metrics,
        keep_context: config.record.context == config::KeepContext::Keep,
        hash_bodies: config.record.bodies == config::Bodies::Hash,
    }));
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let app = http::app(Arc::clone(&gateway) as Arc<dyn http::Service>, options);
    let serve_options = http::ServeOptions { drain: config.drain, ..http::ServeOptions::default() };
    let server = tokio::spawn(http::serve(listener, app, serve_options, async move {
        // An error means that the sender is gone, which is a stop too.
        let _ = stopped.wait_for(|stop| *stop).await;
    }));
    Ok(Running { address, gateway, log, feeder, server, stop, needs_key })
}

impl Running {
    /// Tells a newcomer what to do next; on stdout.
    pub fn greet(&self) {
        let key = if self.needs_key { " \\\n    -H \"authorization: Bearer $YOUR_KEY\"" } else { "" };
        println!("weir {} is listening on http://{}", crate::BUILD, self.address);
        println!();
        println!("  curl -N http://{}/v1/chat/completions{key} \\", self.address);
        println!("    -H 'content-type: application/json' \\");
        println!(
            "    -d '{{\"model\": \"auto\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'"
        );
        println!();
        println!("Why it went where it went: weir audit show ID (the `id` of the answer)");
    }

    /// Serves until SIGTERM or Ctrl-C; then finishes what is under way and feeds the store.
    pub async fn until_stopped(self) -> Result<(), StartError> {
        let other = |e: std::io::Error| StartError::Other(e.to_string());
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(other)?;
        let mut server = self.server;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
            ended = &mut server => {
                return Err(StartError::Other(format!("the server ended by itself: {ended:?}")));
            }
        }
        tracing::info!("stopping: no new requests; those under way may end");
        self.gateway.drain();
        let _ = self.stop.send(true);
        if let Ok(drained) = server.await
            && drained.cut > 0
        {
            tracing::warn!(connections = drained.cut, "requests were still under way; they are recorded as cancelled");
        }
        if let Err(error) = self.feeder.flush(self.log.last_seq(), Duration::from_secs(10)).await {
            tracing::warn!(%error, "the store does not have everything yet; it is fed at the next start");
        }
        Ok(())
    }
}

/// What `weir check` does: compiles every policy against the fleet, without an embedder; fetches nothing.
///
/// # Errors
/// Everything that is wrong with any file, at once.
pub fn check(config: &Config) -> Result<Vec<Policy>, StartError> {
    let fleet = config.cards();
    let mut policies: Vec<Policy> = Vec::new();
    let mut wrong = Vec::new();
    for file in &config.policies {
        match policy::check(&file.file, &file.yaml, |_| fleet.clone()) {
            Ok(policy) if policies.iter().any(|p| p.name() == policy.name()) => {
                wrong.push(format!("{}: another file has a policy named `{}` already", file.file, policy.name()));
            }
            Ok(policy) => policies.push(policy),
            Err(diagnostics) => wrong.push(diagnostics.to_string()),
        }
    }
    if let Some(name) = &config.default_policy
        && wrong.is_empty()
        && policies.iter().all(|p| p.name() != name)
    {
        let names: Vec<&str> = policies.iter().map(Policy::name).collect();
        wrong.push(format!(
            "{}: default_policy: no policy file has the name `{name}`; there are: {}",
            config.origin,
            names.join(", ")
        ));
    }
    if policies.is_empty() && wrong.is_empty() {
        wrong.push(format!(
            "{}: no policy is configured; add one under `policies:` (`weir policy init` writes one)",
            config.origin
        ));
    }
    if wrong.is_empty() { Ok(policies) } else { Err(StartError::Policy(wrong.join("\n"))) }
}

/// The store of a data directory, for verbs that read the record.
pub async fn open_record(data_dir: &Path, database_url: Option<&str>) -> Result<Arc<dyn AuditStore>, StartError> {
    let target = store_target(database_url, data_dir)?;
    audit::open_existing(&target).await.map_err(|source| store_error(&target, source))
}

/// A policy file compiled for replay: against the fleet and embedder that the record names.
pub async fn policy_for_replay(
    path: &Path,
    data_dir: &Path,
    store: &dyn AuditStore,
    views: &[DecisionView],
) -> Result<Policy, StartError> {
    let yaml = std::fs::read(path).map_err(|e| StartError::Other(format!("cannot read {}: {e}", path.display())))?;
    let file = path.display().to_string();
    let spec = policy::parse(&file, &yaml).map_err(|d| StartError::Policy(d.to_string()))?;
    let newest = views.last().ok_or_else(|| StartError::Other("the record is empty".into()))?;
    let hash = newest.decision.decision.policy_hash;
    let version =
        store.policy_version(hash).await.map_err(|e| StartError::Other(e.to_string()))?.ok_or_else(|| {
            StartError::Other(format!("the policy {} that made the record is not in it", hash.short()))
        })?;
    let plain = policy::compile(&spec, &unembedded(&version.fleet)).map_err(|d| StartError::Policy(d.to_string()))?;
    let embedder = if plain.needs_embedding() {
        let assets = Assets::new(data_dir, assets::Options::from_env());
        let name = version.embedder.as_ref().map_or("bge-small-en", |e| e.name.as_str()).to_owned();
        Some(load_embedder(&assets, &name, 1).await.map_err(StartError::Other)?)
    } else {
        None
    };
    compile_one(&spec, &version.fleet, embedder.as_ref()).await
}

fn log_options(config: &Config) -> LogOptions {
    LogOptions {
        durability: match config.record.durability {
            config::Durability::Written => audit::Durability::Written,
            config::Durability::Strict => audit::Durability::Strict,
        },
        ..LogOptions::default()
    }
}

fn usable(data_dir: &Path) -> Result<(), StartError> {
    let wrong = |source| StartError::DataDir { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(wrong)?;
    tempfile::Builder::new().prefix(".weir-probe").tempfile_in(data_dir).map_err(wrong)?;
    Ok(())
}

fn store_target(database_url: Option<&str>, data_dir: &Path) -> Result<StoreTarget, StartError> {
    StoreTarget::choose(database_url, data_dir).map_err(|e| StartError::Other(e.to_string()))
}

fn store_error(target: &StoreTarget, source: audit::StoreError) -> StartError {
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
async fn open_store(target: &StoreTarget) -> Result<Arc<dyn AuditStore>, StartError> {
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
async fn caught_up(feeder: &Feeder, log: &EventLog) -> Result<(), StartError> {
    feeder.flush(log.last_seq(), CATCH_UP_PATIENCE).await.map_err(|e| StartError::Other(e.to_string()))
}

/// Every policy version in use is in the record before the first decision under it.
async fn record_start(
    log: &EventLog,
    store: &dyn AuditStore,
    policies: &[Arc<Policy>],
    target: &StoreTarget,
) -> Result<(), StartError> {
    let now = now_micros();
    let admin = Admin { action: "start".into(), detail: crate::BUILD.into() };
    let mut events = vec![Event::new(now, None, EventBody::Admin(admin))];
    for policy in policies {
        let known = store.policy_version(policy.hash()).await.map_err(|source| store_error(target, source))?;
        if known.is_none() {
            events.push(Event::new(now, None, EventBody::PolicyVersion(Box::new(policy.version()))));
        }
    }
    log.append(events).await?;
    Ok(())
}

/// Adds one fleet entry per model that `--upstream` lists, so that `auto` has arms. Where the list cannot be had, every
/// model name still passes through.
async fn list_upstream_models(config: &mut Config) {
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

type Backends = BTreeMap<String, Arc<dyn Backend>>;

/// One backend per fleet entry, and the fleet as policies see it (context lengths read from local models).
async fn backends(config: &Config, assets: &Arc<Assets>) -> Result<(Backends, Fleet), StartError> {
    let mut backends = Backends::new();
    let mut cards: Vec<ModelCard> = Vec::new();
    for entry in &config.fleet {
        let mut card = entry.card();
        let wrong = |reason: String| StartError::Model { name: entry.name.clone(), reason };
        let backend: Arc<dyn Backend> = if let Some(local) = &entry.local {
            let path = model_file(&local.model, assets).await?;
            let mut options = EngineOptions::default();
            if let Some(threads) = local.threads {
                options.threads = threads;
            }
            if let Some(sequences) = local.max_sequences {
                options.max_sequences = sequences;
            }
            let engine = tokio::task::spawn_blocking(move || Engine::load(&path, options))
                .await
                .map_err(|e| wrong(e.to_string()))?
                .map_err(|e| wrong(e.to_string()))?;
            if card.context == 0 {
                card.context = u32::try_from(engine.info().context).unwrap_or(u32::MAX);
            }
            Arc::new(LocalBackend::new(engine, entry.name.clone()))
        } else if let Some(remote) = &entry.remote {
            Arc::new(
                RemoteBackend::new(remote_config(entry, remote).map_err(wrong)?).map_err(|e| wrong(e.to_string()))?,
            )
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

/// A path as it is; anything else is an asset, fetched where it is missing.
async fn model_file(model: &str, assets: &Arc<Assets>) -> Result<PathBuf, StartError> {
    let path = Path::new(model);
    if path.extension().is_some() && path.exists() {
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
async fn embedder(config: &Config, assets: &Arc<Assets>) -> Result<Option<Arc<dyn Embedder>>, String> {
    match &config.embedder {
        Some(name) => load_embedder(assets, name, config.embed_threads).await.map(Some),
        None => Ok(None),
    }
}

async fn load_embedder(assets: &Assets, name: &str, threads: usize) -> Result<Arc<dyn Embedder>, String> {
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

async fn compile(
    config: &Config,
    fleet: &Fleet,
    embedder: Option<&Arc<dyn Embedder>>,
) -> Result<Vec<Arc<Policy>>, StartError> {
    let mut policies = Vec::new();
    for file in &config.policies {
        let spec = policy::parse(&file.file, &file.yaml).map_err(|d| StartError::Policy(d.to_string()))?;
        policies.push(Arc::new(compile_one(&spec, fleet, embedder).await?));
    }
    Ok(policies)
}

/// What a policy compiles with where nothing is embedded.
fn unembedded(fleet: &Fleet) -> policy::Inputs<'_> {
    policy::Inputs { fleet, examples: BTreeMap::new(), embedder: None }
}

/// Compiles a policy; its examples are embedded only where it looks at embeddings at all, so that an embedder that does
/// not matter is no part of its identity.
async fn compile_one(
    spec: &policy::Spec,
    fleet: &Fleet,
    embedder: Option<&Arc<dyn Embedder>>,
) -> Result<Policy, StartError> {
    let wrong = |d: policy::Diagnostics| StartError::Policy(d.to_string());
    let plain = policy::compile(spec, &unembedded(fleet)).map_err(wrong)?;
    let Some(embedder) = embedder.filter(|_| plain.needs_embedding()) else { return Ok(plain) };
    let mut inputs = unembedded(fleet);
    inputs.embedder = Some(embedder.identity());
    for (set, texts) in &spec.examples {
        let mut vectors = Vec::with_capacity(texts.len());
        for text in texts {
            let vector = embedder.embed(text).await;
            vectors.push(vector.map_err(|e| StartError::Other(format!("{}: examples.{set}: {e}", spec.file())))?);
        }
        inputs.examples.insert(set.clone(), vectors);
    }
    policy::compile(spec, &inputs).map_err(wrong)
}

fn http_options(config: &Config, metrics: &Arc<Metrics>) -> http::HttpOptions {
    http::HttpOptions {
        keys: config
            .keys
            .iter()
            .map(|key| http::ApiKey {
                name: key.name.clone(),
                secret: key.secret.clone(),
                tenant: key.tenant.clone(),
                tier: key.tier.clone(),
                admin: key.admin,
            })
            .collect(),
        body_limit: config.body_limit,
        metrics: Arc::clone(metrics),
        ..http::HttpOptions::default()
    }
}
