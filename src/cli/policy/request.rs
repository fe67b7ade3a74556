//! From what a person gives on the command line or in a test to what a policy decides upon.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value};

use crate::{
    config::{ConfigFile, FleetEntry},
    domain::{Context, Embedding, Fleet, Request, SessionView},
    http::wire,
    policy::{Policy, TestSpec},
    signals::{self, Embedder},
};

/// A request of one user message.
pub(super) fn from_prompt(policy: &Policy, prompt: &str) -> anyhow::Result<Request> {
    from_json(policy, &BTreeMap::new(), Some(prompt))
}

/// A test's request.
pub(super) fn from_test(policy: &Policy, test: &TestSpec) -> anyhow::Result<Request> {
    let empty = BTreeMap::new();
    let request = from_json(policy, test.request.as_ref().unwrap_or(&empty), test.prompt.as_deref())?;
    Ok(Request { client_retry: test.client_retry, ..request })
}

/// A chat request in OpenAI's JSON; `model` is the policy's name where it gives none.
pub(super) fn from_json(
    policy: &Policy,
    given: &BTreeMap<String, Value>,
    prompt: Option<&str>,
) -> anyhow::Result<Request> {
    let mut body: Map<String, Value> = given.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    body.entry("model").or_insert_with(|| policy.name().into());
    if let Some(prompt) = prompt {
        body.insert("messages".into(), serde_json::json!([{"role": "user", "content": prompt}]));
    }
    let body = serde_json::to_vec(&body)?;
    wire::chat::parse(body.into()).map_err(|e| anyhow::anyhow!("the request is not one: {}", e.message))
}

/// The context of a request from nobody in particular: first of its session, all models available, nothing embedded.
pub(super) fn context(policy: &Policy, request: &Request) -> Context {
    let mut signals = signals::measure(request);
    for set in policy.example_sets() {
        signals.similarity.insert(set.to_owned(), -1.0);
    }
    Context {
        request: request.view(),
        signals,
        session: SessionView { turn: 1, ..SessionView::default() },
        ..Context::default()
    }
}

/// Whether a case's queries are embedded for it. Elsewhere a test gives the similarities that it is about, or shows what
/// is done without an embedding.
pub(super) fn embeds(policy: &Policy, case: &TestSpec) -> bool {
    policy.predicts() || policy.needs_embedding() && !case.learnt.is_empty()
}

/// The same with the query embedded, where there is an embedder.
pub(super) fn embedded(
    policy: &Policy,
    request: &Request,
    embedder: Option<&Arc<dyn Embedder>>,
) -> anyhow::Result<Context> {
    let mut context = context(policy, request);
    let Some(embedder) = embedder else { return Ok(context) };
    let vector = crate::cli::runtime()?.block_on(embedder.embed(&request.query()))?;
    context.signals.similarity = policy.similarities(&vector);
    context.signals.embedded = true;
    context.embedding = Some(Embedding { vector, embedder: embedder.identity() });
    Ok(context)
}

/// The fleet of a weir.yaml. The rest of the file is `weir check`'s to judge.
pub(crate) fn fleet(path: &Path) -> anyhow::Result<Fleet> {
    Ok(Fleet::new(ConfigFile::read(path)?.fleet.iter().map(FleetEntry::card)))
}
