//! Policy files compiled against the fleet and the embedder that are there.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{StartError, models::load_embedder};
use crate::{
    assets::{self, Assets},
    audit::AuditStore,
    config::Config,
    domain::{Fleet, Hash},
    policy::{self, Artifact, Artifacts, Inputs, Policy},
    signals::Embedder,
};

/// What `weir check` does: compiles every policy against the fleet, without an embedder; fetches nothing.
///
/// # Errors
/// Everything that is wrong with any file, at once.
pub fn check(config: &Config) -> Result<Vec<Policy>, StartError> {
    let fleet = config.cards();
    let mut policies: Vec<Policy> = Vec::new();
    let mut wrong = Vec::new();
    for file in &config.policies {
        match policy::check_with(&file.file, &file.yaml, |spec| (fleet.clone(), read_artifacts(spec))) {
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
    for policy in &policies {
        let unknown = policy.shadows().iter().find(|name| policies.iter().all(|p| p.name() != name.as_str()));
        if let Some(name) = unknown {
            let names: Vec<&str> = policies.iter().map(Policy::name).collect();
            wrong.push(format!(
                "{}: shadow_decide: there is no policy `{name}`; name one of `policies:` ({})",
                policy.version().file,
                names.join(", ")
            ));
        }
    }
    if policies.is_empty() && wrong.is_empty() {
        wrong.push(format!(
            "{}: no policy is configured; add one under `policies:` (`weir policy init` writes one)",
            config.origin
        ));
    }
    if wrong.is_empty() { Ok(policies) } else { Err(StartError::Policy(wrong.join("\n"))) }
}

/// A policy file compiled for replay: against the fleet, or what it is changed to, and the embedder that a recorded policy
/// version names.
pub async fn policy_for_replay(
    path: &Path,
    data_dir: &Path,
    store: &dyn AuditStore,
    hash: Hash,
    changed: &dyn Fn(&Fleet) -> Fleet,
) -> Result<Policy, StartError> {
    let yaml = std::fs::read(path).map_err(|e| StartError::Other(format!("cannot read {}: {e}", path.display())))?;
    let file = path.display().to_string();
    let spec = policy::parse(&file, &yaml).map_err(|d| StartError::Policy(d.to_string()))?;
    let version =
        store.policy_version(hash).await.map_err(|e| StartError::Other(e.to_string()))?.ok_or_else(|| {
            StartError::Other(format!("the policy {} that made the record is not in it", hash.short()))
        })?;
    let fleet = changed(&version.fleet);
    let plain = compile_plain(&spec, &fleet)?;
    let embedder = if plain.needs_embedding() {
        let assets = Assets::new(data_dir, assets::Options::from_env());
        let name = version.embedder.as_ref().map_or("bge-small-en", |e| e.name.as_str()).to_owned();
        Some(load_embedder(&assets, &name, 1).await.map_err(StartError::Other)?)
    } else {
        None
    };
    compile_one(&spec, &fleet, embedder.as_ref()).await
}

/// Reads the artifacts that a policy names, beside its file; what cannot be read is said there.
pub fn read_artifacts(spec: &policy::Spec) -> Artifacts {
    let read = |path: &str| -> Result<Arc<Artifact>, String> {
        let bytes = std::fs::read(artifact_path(spec.file(), path)).map_err(|e| e.to_string())?;
        Artifact::from_bytes(&bytes).map(Arc::new).map_err(|e| e.to_string())
    };
    spec.artifacts().into_iter().map(|(path, _)| (path.to_owned(), read(path))).collect()
}

/// A path in a policy is relative to the policy's file.
pub(super) fn artifact_path(policy: &str, artifact: &str) -> PathBuf {
    Path::new(policy).parent().unwrap_or(Path::new("")).join(artifact)
}

/// Compiles without an embedder: what a policy is before anything is embedded.
///
/// # Errors
/// When the policy does not compile.
pub fn compile_plain(spec: &policy::Spec, fleet: &Fleet) -> Result<Policy, StartError> {
    let inputs = Inputs::unembedded(fleet).with(read_artifacts(spec));
    policy::compile(spec, &inputs).map_err(|d| StartError::Policy(d.to_string()))
}

/// Compiles for somebody who has an embedder at hand: `weir policy test` and `explain`.
///
/// # Errors
/// When the embedder fails on an example, or the policy does not compile.
pub async fn compile_with(
    spec: &policy::Spec,
    fleet: &Fleet,
    embedder: &Arc<dyn Embedder>,
) -> Result<Policy, StartError> {
    compile_one(spec, fleet, Some(embedder)).await
}

pub(super) async fn compile(
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

/// Compiles a policy; its examples are embedded only where it looks at embeddings at all, so that an embedder that does
/// not matter is no part of its identity.
pub(super) async fn compile_one(
    spec: &policy::Spec,
    fleet: &Fleet,
    embedder: Option<&Arc<dyn Embedder>>,
) -> Result<Policy, StartError> {
    let wrong = |d: policy::Diagnostics| StartError::Policy(d.to_string());
    let mut inputs = Inputs::unembedded(fleet).with(read_artifacts(spec));
    let plain = policy::compile(spec, &inputs).map_err(wrong)?;
    let Some(embedder) = embedder.filter(|_| plain.needs_embedding()) else { return Ok(plain) };
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
