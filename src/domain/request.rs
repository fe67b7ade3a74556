//! What a client asked, in weir's own terms.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Need, RequestView, Sampling};

/// Who said a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Function,
}

impl Role {
    /// OpenAI's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
            Role::Function => "function",
        }
    }
}

/// One part of a message. Parts that weir does not read itself (images, audio, files) stay JSON and go to remote
/// backends untouched.
#[derive(Clone, Debug, PartialEq)]
pub enum ContentPart {
    Text(String),
    /// A document: text that the client has marked to be computed once and reused wherever it stands, by models that can.
    Chunk(String),
    Other {
        kind: String,
    },
}

impl ContentPart {
    /// Its text, marked or not.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Chunk(text) => Some(text),
            Self::Other { .. } => None,
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub role: Role,
    pub content: Vec<ContentPart>,
}

impl Message {
    /// A message of one text part.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, content: vec![ContentPart::Text(text.into())] }
    }

    /// The text parts, joined by line feeds.
    pub fn joined_text(&self) -> String {
        let mut parts = self.content.iter().filter_map(ContentPart::text);
        let Some(first) = parts.next() else { return String::new() };
        let mut out = first.to_owned();
        for part in parts {
            out.push('\n');
            out.push_str(part);
        }
        out
    }
}

/// A chat request as the gateway sees it. `body` is the client's own JSON: remote backends get it with nothing changed
/// but `model` and what the plan overrides, so that fields weir has never heard of arrive.
#[derive(Clone, Debug)]
pub struct Request {
    /// The `model` that the client wrote: a policy, `auto`, a plan or a model.
    pub model: String,
    pub messages: Arc<[Message]>,
    pub sampling: Sampling,
    /// Number of choices asked for, at least 1.
    pub n: u32,
    pub logprobs: bool,
    pub top_logprobs: u8,
    pub stream: bool,
    pub include_usage: bool,
    /// What a model must be able to do to answer this at all.
    pub needs: Vec<Need>,
    pub metadata: BTreeMap<String, String>,
    pub user: Option<String>,
    /// Session identity: the header `x-weir-session`, else `metadata.session_id`.
    pub session: Option<String>,
    /// `x-stainless-retry-count`: above zero, the client itself says that it repeats a request.
    pub client_retry: u32,
    /// How models in the process rank it among what waits, from OpenAI's `service_tier`: 1 for `priority`, -1 for `flex`, else 0.
    pub priority: i32,
    /// `weir: {exact: true}`: models in the process compute marked documents where they stand.
    pub exact: bool,
    /// For how long models in the process keep its documents before all that is not pinned: `cache_control.ttl`, the longest of the
    /// request.
    pub keep: Option<Duration>,
    /// Who may share computed documents with whom: those of one tenant, or of one key without a tenant.
    pub sharing: String,
    /// What the answer has begun with already: models continue it and do not say it again. Where it is there, `body` has it
    /// as its last message, with the fields by which servers know it (`continue_final_message`).
    pub begun: Option<Arc<str>>,
    pub body: Bytes,
}

/// With whom requests of a tenant, or of a key without one, share what is computed of documents ([`Request::sharing`]).
pub fn sharing(tenant: &str, key: &str) -> String {
    match tenant.is_empty() {
        true => format!("key {key}"),
        false => format!("tenant {tenant}"),
    }
}

impl Request {
    /// The text that is embedded and classified: the last user message.
    pub fn query(&self) -> String {
        self.messages.iter().rev().find(|m| m.role == Role::User).map(Message::joined_text).unwrap_or_default()
    }

    /// What policies may know of the request itself.
    pub fn view(&self) -> RequestView {
        RequestView {
            model: self.model.clone(),
            stream: self.stream,
            max_tokens: self.sampling.max_tokens.unwrap_or(0),
            n: self.n,
            needs: self.needs.clone(),
            metadata: self.metadata.clone(),
            client_retry: self.client_retry,
        }
    }

    /// All system and developer text, joined by line feeds.
    pub fn system_prompt(&self) -> Option<String> {
        let texts: Vec<String> = self
            .messages
            .iter()
            .filter(|m| matches!(m.role, Role::System | Role::Developer))
            .map(Message::joined_text)
            .collect();
        (!texts.is_empty()).then(|| texts.join("\n"))
    }

    /// Number of user messages: 1 for a first question.
    pub fn turn(&self) -> u32 {
        self.messages.iter().filter(|m| m.role == Role::User).count() as u32
    }
}
