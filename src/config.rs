//! `weir.yaml`: what the operator writes ([`ConfigFile`]), and what the program needs ([`Config`]).
//!
//! Two stages, so that neither has to serve the other: the file holds only what was typed (every key optional, one way to
//! say each thing); [`Config::assemble`] adds the command line, the environment and the defaults, reads policy files and
//! resolves names. Precedence: command line, then environment, then file, then default.

mod chunk_reuse;
mod overload;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    backend::scripted::ScriptedConfig,
    cascade::{breaker::BreakerPolicy, retry_budget::RetryBudgetPolicy},
    domain::{Capabilities, Energy, Fleet, ModelCard, Price},
    engine::Bound,
    gateway::UnknownModel,
};

pub use chunk_reuse::ChunkReuseSection;
pub use overload::{AdaptiveConcurrency, BreakerSection, RetryBudgetSection};

/// The built-in configuration's policy: two arms on the same weights, learning from feedback.
pub const DEFAULT_POLICY: &str = include_str!("../policies/default.yaml");

/// `weir.yaml` as typed.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConfigFile {
    /// Address to listen on; loopback unless you say otherwise.
    pub listen: Option<String>,
    /// Where the event log, the embedded store and fetched models live.
    pub data_dir: Option<PathBuf>,
    /// `postgres://…` to keep the record in PostgreSQL; the embedded SQLite store otherwise.
    pub database_url: Option<String>,
    pub record: RecordSection,
    /// API keys; with none, everybody who reaches the port may ask.
    pub keys: Vec<KeyEntry>,
    /// The models there are.
    pub fleet: Vec<FleetEntry>,
    /// Policy files, relative to this file.
    pub policies: Vec<PathBuf>,
    /// The policy behind `auto`; the first one otherwise.
    pub default_policy: Option<String>,
    /// Other names for policies, plans and models.
    pub aliases: BTreeMap<String, String>,
    /// What becomes of a `model` that nothing here is called.
    pub unknown_model: Option<UnknownModel>,
    pub embedder: Option<EmbedderSection>,
    /// MiB for keys and values of all models in the process together, of what runs and of what is kept for reuse; 2048
    /// otherwise, and in any case what each model's longest sequence needs.
    pub kv_cache_mib: Option<usize>,
    /// MiB that the documents of each model in the process may take on disk, in the data directory; 0, and so none, otherwise.
    pub kv_disk_mib: Option<u64>,
    pub chunk_reuse: ChunkReuseSection,
    pub breaker: BreakerSection,
    pub retry_budget: RetryBudgetSection,
    pub limits: LimitsSection,
}

/// What is kept, and how safely.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RecordSection {
    pub durability: Durability,
    /// Prompts and answers: `off`, or their hashes only.
    pub bodies: Bodies,
    /// The context (features and embedding) of each decision: needed to reproduce and to replay, personal data too.
    pub context: KeepContext,
    /// When the log cannot be written: `refuse` requests (503), or `serve` them without a record.
    pub when_log_fails: WhenLogFails,
}

/// When an event counts as written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// After `write(2)`: survives kill -9 of weir.
    #[default]
    Written,
    /// After a group fsync: survives the machine.
    Strict,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bodies {
    #[default]
    Off,
    Hash,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepContext {
    #[default]
    Keep,
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenLogFails {
    #[default]
    Refuse,
    Serve,
}

/// One API key. The secret itself stays in the environment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    pub name: String,
    /// Environment variable that holds the secret.
    pub env: String,
    #[serde(default)]
    pub tenant: String,
    #[serde(default)]
    pub tier: String,
    /// May read the record.
    #[serde(default)]
    pub admin: bool,
}

/// One model of the fleet: exactly one of `local`, `remote`, `scripted` says where it runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FleetEntry {
    pub name: String,
    pub tags: Vec<String>,
    /// Longest prompt plus answer in tokens. A local model's own is read from its file; this bounds it, and with it the memory
    /// that it is promised.
    pub context: Option<u32>,
    pub price: Price,
    /// Joules per token, where they have been measured; for policies whose reward counts joules.
    pub energy: Option<Energy>,
    pub capabilities: Option<Capabilities>,
    pub local: Option<LocalEntry>,
    pub remote: Option<RemoteEntry>,
    pub scripted: Option<ScriptedConfig>,
}

/// A model in the process.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LocalEntry {
    /// Name of an asset (`weir models list`), or a path to a GGUF file.
    pub model: String,
    /// Threads for its arithmetic; all cores, at most four, otherwise.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Requests that generate at the same time.
    #[serde(default)]
    pub max_sequences: Option<usize>,
    /// Most MiB that its keys and values may take of `kv_cache_mib`; at least one whole context.
    #[serde(default)]
    pub cache_mib: Option<usize>,
    /// Tokens to guess ahead from what was said before, and to check in one step: the same answers, faster where they
    /// repeat the prompt. 8 otherwise; 0 for none.
    #[serde(default)]
    pub prompt_lookup: Option<usize>,
    /// 8 or 16, of activations in products with quantised weights. 16 is the default: the model's own answers. 8 is about a
    /// third faster with long prompts and many requests, and changes one most likely token in twenty to forty.
    #[serde(default)]
    pub activation_bits: Option<u8>,
}

/// A model behind an OpenAI-compatible server.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteEntry {
    /// Base URL, with or without `/v1`.
    pub url: String,
    /// The model's name there; the fleet entry's name otherwise.
    #[serde(default)]
    pub model: Option<String>,
    /// Send the client's own `model` on unchanged.
    #[serde(default)]
    pub pass_model: bool,
    /// Environment variable that holds the key for that server.
    #[serde(default)]
    pub key_env: Option<String>,
    /// Send the client's `authorization` on.
    #[serde(default)]
    pub forward_client_key: bool,
    /// Seconds until the first byte of an answer.
    #[serde(default)]
    pub first_byte_timeout_s: Option<f64>,
    /// Seconds between two bytes of a stream.
    #[serde(default)]
    pub idle_timeout_s: Option<f64>,
    /// Calls at once, at most; any number otherwise.
    #[serde(default)]
    pub max_concurrent: Option<u32>,
    /// Instead: as many calls at once as the server turns out to bear.
    #[serde(default)]
    pub adaptive_concurrency: Option<AdaptiveConcurrency>,
}

/// The embedding model.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbedderSection {
    /// Name of an asset, or `off`.
    pub model: String,
    /// How long a decision waits for an embedding before `no_embedding` decides.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    #[serde(default)]
    pub threads: Option<usize>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsSection {
    /// Largest request body.
    pub body_mib: Option<u64>,
    /// Seconds that a stop waits for requests under way.
    pub drain_s: Option<u64>,
}

/// What was given on the command line and in the environment.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub config: Option<PathBuf>,
    pub listen: Option<String>,
    pub data_dir: Option<PathBuf>,
    pub database_url: Option<String>,
    pub upstream: Option<String>,
    /// With `upstream`: send the client's `authorization` on.
    pub forward_client_key: bool,
    pub policies: Vec<PathBuf>,
    /// Further in-process models for the built-in configuration: assets, `hf:OWNER/REPO/FILE`, or paths.
    pub fleet: Vec<String>,
}

/// A policy file, read but not compiled.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    pub file: String,
    /// Whether it is a file of the configuration, and read again when it changes.
    pub watched: bool,
    pub yaml: Vec<u8>,
}

/// What the program needs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it came from, for people.
    pub origin: String,
    pub listen: SocketAddr,
    pub data_dir: PathBuf,
    pub database_url: Option<String>,
    pub record: RecordSection,
    pub keys: Vec<Key>,
    pub fleet: Vec<FleetEntry>,
    pub policies: Vec<PolicyFile>,
    pub default_policy: Option<String>,
    pub aliases: BTreeMap<String, String>,
    pub unknown_model: UnknownModel,
    /// Asset name; `None` when switched off.
    pub embedder: Option<String>,
    /// Whether the file names it, and it is not just the default.
    pub embedder_asked: bool,
    pub embed_deadline: Duration,
    pub embed_threads: usize,
    /// For keys and values of all models in the process.
    pub kv_cache_bytes: usize,
    /// Of each model's documents.
    pub kv_disk_bytes: u64,
    /// `None`: documents are not reused.
    pub chunk_reuse: Option<Bound>,
    /// `None`: no entry has one.
    pub breaker: Option<BreakerPolicy>,
    /// `None`: no bound on the retries of all requests together.
    pub retry_budget: Option<RetryBudgetPolicy>,
    pub body_limit: usize,
    pub drain: Duration,
    /// `--upstream`: the list of its models is asked for at the start.
    pub upstream: Option<String>,
}

/// A key with its secret, read from the environment.
#[derive(Clone)]
pub struct Key {
    pub name: String,
    pub secret: String,
    pub tenant: String,
    pub tier: String,
    pub admin: bool,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("name", &self.name).field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

/// What is wrong with a configuration; every message names the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// Rendered by the same diagnostics as policies.
    #[error("{0}")]
    Wrong(String),
    #[error("{}", problems.join("\n"))]
    Problems { problems: Vec<String> },
}

impl ConfigFile {
    /// Reads a file with all its errors at once.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let bytes = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        crate::policy::document::load(&path.display().to_string(), &bytes)
            .map_err(|diagnostics| ConfigError::Wrong(diagnostics.to_string()))
    }
}

/// The fleet entry of `--upstream`.
pub const UPSTREAM: &str = "upstream";

impl Config {
    /// Command line, environment, file and defaults in one. `data_dir` is the command line's default.
    pub fn assemble(over: Overrides, default_data_dir: PathBuf) -> Result<Self, ConfigError> {
        let implicit = Path::new("weir.yaml");
        let path = over.config.clone().or_else(|| implicit.exists().then(|| implicit.to_owned()));
        let (file, base, origin) = match &path {
            Some(path) => {
                let base = path.parent().map(Path::to_owned).unwrap_or_default();
                (ConfigFile::read(path)?, base, path.display().to_string())
            }
            None => (ConfigFile::default(), PathBuf::new(), "built-in default".to_owned()),
        };
        let mut problems = Vec::new();

        let listen_text = over.listen.or(file.listen).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
        let listen = listen_text.parse().unwrap_or_else(|_| {
            problems.push(format!("listen: `{listen_text}` is no address and port; for example 127.0.0.1:8080"));
            SocketAddr::from(([127, 0, 0, 1], 8080))
        });

        let mut policies = Vec::new();
        for policy in file.policies.iter().map(|p| base.join(p)).chain(over.policies) {
            match std::fs::read(&policy) {
                Ok(yaml) => policies.push(PolicyFile { file: policy.display().to_string(), watched: true, yaml }),
                Err(error) => problems.push(format!("policies: cannot read {}: {error}", policy.display())),
            }
        }

        let mut fleet = file.fleet;
        let mut unknown_model = file.unknown_model.unwrap_or(UnknownModel::Error);
        if let Some(url) = &over.upstream {
            fleet.push(upstream_entry(url, over.forward_client_key));
            unknown_model = UnknownModel::PassThrough(UPSTREAM.to_owned());
        } else if fleet.is_empty() {
            fleet.push(local_entry(DEFAULT_MODEL, DEFAULT_MODEL));
            let more: Vec<String> = over.fleet.iter().map(|model| model_name(model)).collect();
            fleet.extend(over.fleet.iter().zip(&more).map(|(model, name)| local_entry(name, model)));
            if policies.is_empty() {
                policies.push(default_policy(&more));
            }
        } else if !over.fleet.is_empty() {
            problems.push("--fleet adds to the built-in configuration; here, add the models under `fleet:`".to_owned());
        }
        check_fleet(&fleet, &mut problems);

        let keys = file
            .keys
            .into_iter()
            .filter_map(|key| match std::env::var(&key.env) {
                Ok(secret) if !secret.is_empty() => {
                    Some(Key { name: key.name, secret, tenant: key.tenant, tier: key.tier, admin: key.admin })
                }
                _ => {
                    problems.push(format!(
                        "keys: the environment variable {} of key `{}` is not set; set it or take the key out",
                        key.env, key.name
                    ));
                    None
                }
            })
            .collect();

        let embedder = match file.embedder.as_ref().map(|e| e.model.as_str()) {
            Some("off") => None,
            Some(name) => Some(name.to_owned()),
            None => Some("bge-small-en".to_owned()),
        };

        let breaker = file.breaker.policy().unwrap_or_else(|problem| {
            problems.push(problem);
            BreakerPolicy::default()
        });

        if !problems.is_empty() {
            return Err(ConfigError::Problems {
                problems: problems.into_iter().map(|p| format!("{origin}: {p}")).collect(),
            });
        }
        Ok(Self {
            listen,
            data_dir: over.data_dir.or(file.data_dir).unwrap_or(default_data_dir),
            database_url: over.database_url.or(file.database_url).filter(|url| !url.is_empty()),
            record: file.record,
            keys,
            fleet,
            policies,
            default_policy: file.default_policy,
            aliases: file.aliases,
            unknown_model,
            embedder,
            embedder_asked: file.embedder.is_some(),
            embed_deadline: Duration::from_millis(file.embedder.as_ref().and_then(|e| e.deadline_ms).unwrap_or(250)),
            embed_threads: file.embedder.as_ref().and_then(|e| e.threads).unwrap_or(1),
            kv_cache_bytes: file
                .kv_cache_mib
                .map_or(crate::engine::kv_cache::DEFAULT_BYTES, |mib| mib.saturating_mul(1 << 20)),
            kv_disk_bytes: file.kv_disk_mib.unwrap_or(0).saturating_mul(1 << 20),
            chunk_reuse: file.chunk_reuse.bound(),
            breaker: file.breaker.enabled.unwrap_or(true).then_some(breaker),
            retry_budget: file.retry_budget.policy(),
            body_limit: (file.limits.body_mib.unwrap_or(10) as usize) << 20,
            drain: Duration::from_secs(file.limits.drain_s.unwrap_or(30)),
            upstream: over.upstream,
            origin,
        })
    }

    /// The fleet as policies see it.
    pub fn cards(&self) -> Fleet {
        Fleet::new(self.fleet.iter().map(FleetEntry::card))
    }
}

impl FleetEntry {
    /// The entry as policies see it.
    pub fn card(&self) -> ModelCard {
        let default = if self.local.is_some() { Capabilities::text_only() } else { Capabilities::default() };
        ModelCard {
            name: self.name.clone(),
            tags: self.tags.clone(),
            context: self.context.unwrap_or(0),
            price: self.price,
            energy: self.energy,
            capabilities: self.capabilities.clone().unwrap_or(default),
        }
    }
}

fn check_fleet(fleet: &[FleetEntry], problems: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    for (i, entry) in fleet.iter().enumerate() {
        if entry.name.is_empty() {
            problems.push(format!("fleet[{i}]: needs a `name`"));
        } else if !seen.insert(&entry.name) {
            problems.push(format!("fleet[{i}]: the name `{}` is taken already", entry.name));
        }
        let places =
            [entry.local.is_some(), entry.remote.is_some(), entry.scripted.is_some()].iter().filter(|x| **x).count();
        if places != 1 {
            problems.push(format!(
                "fleet[{i}] `{}`: needs exactly one of `local`, `remote`, `scripted` to say where it runs; has {places}",
                entry.name
            ));
        }
        if [entry.price.input, entry.price.output, entry.price.cached_input.unwrap_or(0.0)]
            .iter()
            .any(|x| !x.is_finite() || *x < 0.0)
        {
            problems.push(format!("fleet[{i}] `{}`: prices are USD per million tokens, zero or more", entry.name));
        }
        let energy = entry.energy.unwrap_or_default();
        if [energy.input, energy.output].iter().any(|x| !x.is_finite() || *x < 0.0) {
            problems.push(format!("fleet[{i}] `{}`: energy is in joules per token, zero or more", entry.name));
        }
        if let Some(bits) = entry.local.as_ref().and_then(|local| local.activation_bits)
            && crate::engine::Precision::of_bits(bits).is_none()
        {
            problems.push(format!("fleet[{i}] `{}`: activation_bits is {bits}, and must be 8 or 16", entry.name));
        }
        if let Some(remote) = &entry.remote
            && !(remote.url.starts_with("http://") || remote.url.starts_with("https://"))
        {
            problems
                .push(format!("fleet[{i}] `{}`: `{}` does not begin with http:// or https://", entry.name, remote.url));
        }
        if let Some(remote) = &entry.remote
            && let Some(adaptive) = &remote.adaptive_concurrency
        {
            if remote.max_concurrent.is_some() {
                problems.push(format!(
                    "fleet[{i}] `{}`: has both `max_concurrent` and `adaptive_concurrency`; set the latter's `max` instead",
                    entry.name
                ));
            }
            if let Err(error) = adaptive.policy().check() {
                problems.push(format!("fleet[{i}] `{}`: adaptive_concurrency: {error}", entry.name));
            }
        }
    }
}

/// The built-in model.
const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

fn local_entry(name: &str, model: &str) -> FleetEntry {
    FleetEntry {
        name: name.to_owned(),
        tags: vec!["local".into()],
        local: Some(LocalEntry { model: model.to_owned(), ..LocalEntry::default() }),
        ..FleetEntry::default()
    }
}

/// A fleet name for a model given by path or reference: its file name, in lower case, without ending and revision.
fn model_name(reference: &str) -> String {
    let file = reference.rsplit('/').next().unwrap_or(reference);
    let file = file.split(['@', '#']).next().unwrap_or(file);
    file.strip_suffix(".gguf").unwrap_or(file).to_lowercase()
}

/// The built-in policy, with `more` models as further arms.
fn default_policy(more: &[String]) -> PolicyFile {
    let quoted = |name: &String| serde_json::Value::from(name.as_str()).to_string();
    let mut yaml = DEFAULT_POLICY.to_owned();
    if !more.is_empty() {
        let models: String = more.iter().map(|n| format!("  {0}: {{name: {0}}}\n", quoted(n))).collect();
        let arms: String = more.iter().map(|n| format!(", {}", quoted(n))).collect();
        yaml = yaml.replacen("plans:\n", &format!("{models}plans:\n"), 1);
        yaml = yaml.replacen("arms: [quick, careful", &format!("arms: [quick, careful{arms}"), 1);
    }
    PolicyFile { file: "policies/default.yaml".into(), watched: false, yaml: yaml.into_bytes() }
}

/// The server of `--upstream`: any model name; its key from `OPENAI_API_KEY`, unless the client's own is sent on.
fn upstream_entry(url: &str, forward_client_key: bool) -> FleetEntry {
    FleetEntry {
        name: UPSTREAM.into(),
        tags: vec!["remote".into()],
        remote: Some(RemoteEntry {
            url: url.to_owned(),
            model: None,
            pass_model: true,
            key_env: (!forward_client_key && std::env::var_os("OPENAI_API_KEY").is_some())
                .then(|| "OPENAI_API_KEY".to_owned()),
            forward_client_key,
            first_byte_timeout_s: None,
            idle_timeout_s: None,
            max_concurrent: None,
            adaptive_concurrency: None,
        }),
        ..FleetEntry::default()
    }
}

/// What `--upstream` does with `auto`: a bandit over the models that the server lists, or, where it lists none, the
/// server's own idea of `auto`.
pub fn upstream_policy(listed: &[&str]) -> PolicyFile {
    let names: Vec<&str> = if listed.is_empty() { vec![UPSTREAM] } else { listed.to_vec() };
    let quoted = |name: &str| serde_json::Value::from(name).to_string();
    let models: Vec<String> = names.iter().map(|n| format!("  {}: {{name: {}}}", quoted(n), quoted(n))).collect();
    let arms: Vec<String> = names.iter().map(|n| quoted(n)).collect();
    let select = match names.as_slice() {
        [only] => format!("  static: {}", quoted(only)),
        _ => "  linucb: {alpha: 1.0, ridge: 1.0}\n  features: [tokens, complexity, code_share, turn]".to_owned(),
    };
    let reward =
        if names.len() > 1 { "reward:\n  quality: {weight: 1.0, from: feedback.score, wait: 24h}\n" } else { "" };
    let yaml = format!(
        "policy: default\nmodels:\n{}\nselect:\n  arms: [{}]\n{select}\n{reward}",
        models.join("\n"),
        arms.join(", ")
    );
    PolicyFile { file: "the policy of --upstream".into(), watched: false, yaml: yaml.into_bytes() }
}
