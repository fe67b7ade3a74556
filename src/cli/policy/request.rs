//! From what a person gives on the command line or in a test to what a policy decides upon.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use serde_json::{Map, Value};

use crate::{
    domain::{Capabilities, Context, Fleet, ModelCard, Price, Request, RequestView, SessionView},
    http::wire,
    policy::{Policy, TestSpec, document},
    signals,
};

/// A request of one user message.
pub(super) fn from_prompt(policy: &Policy, prompt: &str) -> anyhow::Result<Request> {
    from_json(policy, &BTreeMap::new(), Some(prompt))
}

/// A test's request.
pub(super) fn from_test(policy: &Policy, test: &TestSpec) -> anyhow::Result<Request> {
    let empty = BTreeMap::new();
    from_json(policy, test.request.as_ref().unwrap_or(&empty), test.prompt.as_deref())
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
        request: RequestView {
            model: request.model.clone(),
            stream: request.stream,
            max_tokens: request.sampling.max_tokens.unwrap_or(0),
            n: request.n,
            needs: request.needs.clone(),
            metadata: request.metadata.clone(),
            client_retry: request.client_retry,
        },
        signals,
        session: SessionView { turn: 1, ..SessionView::default() },
        ..Context::default()
    }
}

/// What is read of a weir.yaml here.
#[derive(serde::Deserialize, schemars::JsonSchema)]
struct FleetOnly {
    fleet: Vec<Entry>,
}

/// A fleet entry's card; where it runs is not asked, but for what a model in the process cannot do.
#[derive(serde::Deserialize, schemars::JsonSchema)]
struct Entry {
    name: String,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default)]
    context: Option<u32>,
    #[serde(default)]
    price: Price,
    #[serde(default)]
    capabilities: Option<Capabilities>,
    #[serde(default)]
    local: Option<Value>,
}

/// The fleet of a weir.yaml.
pub(super) fn fleet(path: &Path) -> anyhow::Result<Fleet> {
    let shown = path.display().to_string();
    let yaml = std::fs::read(path).with_context(|| format!("cannot read {shown}"))?;
    let file: FleetOnly = document::load(&shown, &yaml).map_err(|found| anyhow::anyhow!("{found}"))?;
    Ok(Fleet::new(file.fleet.into_iter().map(|entry| ModelCard {
        name: entry.name,
        tags: entry.tags,
        context: entry.context.unwrap_or(0),
        price: entry.price,
        capabilities: entry.capabilities.unwrap_or_else(|| match entry.local {
            Some(_) => Capabilities::text_only(),
            None => Capabilities::default(),
        }),
    })))
}
