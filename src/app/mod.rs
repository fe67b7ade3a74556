//! The composition: one place that builds every component, in the order in which they need each other.
//!
//! models and libraries (assets) → engines and remote backends → embedder → policies → event log → store → learner →
//! feeder → gateway → HTTP. Whatever is wrong is found before the port answers.

mod models;
mod policies;
mod record;
mod reload;
pub mod state;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    assets::{self, Assets},
    audit::{self, EventLog, Feeder, FeederOptions},
    backend::Listener,
    clock::now_micros,
    config::{self, Config},
    dispatch::{self, DispatchOptions, Dispatcher, LogJournal},
    gateway::{Gateway, Parts, Sessions, Speeds, Spending},
    http,
    learn::{Learner, Published},
    policy::Policy,
    telemetry::Metrics,
};

pub use models::offline_embedder;
use models::{backends, embedder, list_upstream_models};
use policies::compile;
pub use policies::{check, compile_plain, compile_with, policy_for_replay, read_artifacts};
pub use record::open_record;
use record::{caught_up, log_options, open_store, record_start, store_error, store_target, usable};

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
    /// The watch over the policy files.
    watching: JoinHandle<()>,
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
    let (changes, changed) = tokio::sync::mpsc::unbounded_channel();
    // Where nobody listens any more, weir is stopping.
    let told: Listener = Arc::new(move |change| _ = changes.send(change));
    let (backends, fleet) = backends(&config, &assets, &told).await?;
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
    let (speeds, spending) = (Arc::new(Speeds::default()), Arc::new(Spending::default()));
    let sessions = Arc::new(Sessions::default());
    for policy in &policies {
        let counted = spending.count_for(policy, store.as_ref(), now_micros()).await;
        counted.map_err(|source| store_error(&target, source))?;
    }
    let metrics = Arc::new(Metrics::new());
    let followers: Vec<Arc<dyn audit::Follower>> = vec![
        Arc::clone(&learner) as _,
        Arc::clone(&speeds) as _,
        Arc::clone(&spending) as _,
        Arc::clone(&sessions) as _,
        Arc::clone(&metrics) as _,
    ];
    let feeder = Arc::new(
        Feeder::start(log.clone(), Arc::clone(&store), Some(Arc::new(followers)), FeederOptions::default()).await?,
    );
    learner.catch_up().await?;

    let refuse = config.record.when_log_fails == config::WhenLogFails::Refuse;
    let journal = Arc::new(LogJournal::new(log.clone(), refuse));
    tokio::spawn(record::breakers(changed, Arc::clone(&journal)));
    let dispatcher = Dispatcher::new(
        backends.clone(),
        Arc::clone(&journal) as Arc<dyn dispatch::Journal>,
        fleet.clone(),
        DispatchOptions {
            retry_budget: config.retry_budget,
            hash_bodies: config.record.bodies == config::Bodies::Hash,
            ..DispatchOptions::default()
        },
    )
    .with_speeds(Arc::clone(&speeds));
    let default_policy =
        config.default_policy.clone().or_else(|| policies.first().map(|p| p.name().to_owned())).unwrap_or_default();
    let needs_key = !config.keys.is_empty();
    let options = http_options(&config, &metrics);
    let reload = (fleet.clone(), embedder.clone(), Arc::clone(&store));
    let (running, watched) = (policies.clone(), config.clone());
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
        speeds,
        spending: Arc::clone(&spending),
        sessions,
        keep_context: config.record.context == config::KeepContext::Keep,
        hash_bodies: config.record.bodies == config::Bodies::Hash,
    }));
    let (fleet, embedder, store) = reload;
    let reloader = reload::Reloader::new(
        &watched,
        &running,
        fleet,
        embedder,
        log.clone(),
        store,
        learner,
        spending,
        Arc::clone(&gateway),
    )?;
    let watching = tokio::spawn(reloader.watch());
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let app = http::app(Arc::clone(&gateway) as Arc<dyn http::Service>, options);
    let serve_options = http::ServeOptions { drain: config.drain, ..http::ServeOptions::default() };
    let server = tokio::spawn(http::serve(listener, app, serve_options, async move {
        // An error means that the sender is gone, which is a stop too.
        let _ = stopped.wait_for(|stop| *stop).await;
    }));
    Ok(Running { address, gateway, log, feeder, server, watching, stop, needs_key })
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
        self.watching.abort();
        self.gateway.drain();
        let _ = self.stop.send(true);
        if let Ok(drained) = server.await
            && drained.cut > 0
        {
            tracing::warn!(connections = drained.cut, "requests were still under way; they are recorded as cancelled");
        }
        // What is fed may teach, and what it teaches is logged again.
        while self.feeder.lag() > 0 {
            if let Err(error) = self.feeder.flush(self.log.last_seq(), Duration::from_secs(10)).await {
                tracing::warn!(%error, "the store does not have everything yet; it is fed at the next start");
                break;
            }
        }
        Ok(())
    }
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
