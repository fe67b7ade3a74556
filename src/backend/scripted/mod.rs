//! A backend that computes nothing: what it answers, when, and how it fails is written down. For tests, demonstrations and
//! development without models. The same calls in the same order get the same answers.

mod text;

#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Backend, BackendError, Call, Reply,
    slots::{Slot, Slots},
    status,
};
use crate::domain::{Choice, Chunk, Completion, ErrorKind, ModelState, Usage, UsageSource};
use text::Plan;

/// How a scripted model behaves: the first rule that fits a request; with none, it echoes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScriptedConfig {
    /// Tried in order.
    pub rules: Vec<Rule>,
    /// Calls at once; absent: any number. Up to 1024 more wait, each for at most 30 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u32>,
}

/// What happens to the requests that it fits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// Fits requests whose last user message contains this; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    pub reply: ReplyText,
    /// How likely each of its tokens was, between 0 and 1; absent: made up, from 0.5 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certainty: Option<f64>,
    /// Milliseconds before the first token.
    pub first_token_ms: u64,
    /// Milliseconds before each further token.
    pub token_ms: u64,
    /// Fails instead of answering.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fail: Option<Fail>,
    /// The stream breaks off after that many chunks of text; a whole answer fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_after: Option<u32>,
    /// After that many chunks of text nothing comes any more; a whole answer never comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_after: Option<u32>,
    /// Claims these counts, whatever was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<ClaimedUsage>,
}

/// What is said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReplyText {
    /// The last user message.
    #[default]
    Echo,
    /// This.
    Text(String),
    /// One of these: the first to a request's first call, the second to its second, and so on, and again from the first.
    Texts(Vec<String>),
    /// That many words, drawn by the request's seed and the choice's number.
    Words(u32),
}

/// A failure in place of an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Fail {
    /// A label as policies use it (`timeout`, `rate_limited`, ...); absent: what `status` means, else `server_error`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "known_kind")]
    pub kind: Option<String>,
    /// The HTTP status that a server would have sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Only that many calls fail, the first ones; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
}

/// Token counts as claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClaimedUsage {
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

fn kind_named(label: &str) -> Option<ErrorKind> {
    ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == label)
}

fn known_kind<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let label = Option::<String>::deserialize(d)?;
    if let Some(unknown) = label.as_deref().filter(|l| kind_named(l).is_none()) {
        let known: Vec<&str> = ErrorKind::ALL.into_iter().map(ErrorKind::as_str).collect();
        let message = format!("`{unknown}` is no kind of error; there are: {}", known.join(", "));
        return Err(serde::de::Error::custom(message));
    }
    Ok(label)
}

/// A scripted fleet entry.
pub struct ScriptedBackend {
    name: String,
    /// The configured rules, then the one that echoes; with each the number of calls that it has failed.
    rules: Vec<(Rule, AtomicU32)>,
    slots: Slots,
}

impl ScriptedBackend {
    pub fn new(name: impl Into<String>, config: ScriptedConfig) -> Self {
        let ScriptedConfig { rules, max_concurrent } = config;
        let rules = rules.into_iter().chain([Rule::default()]).map(|rule| (rule, AtomicU32::new(0))).collect();
        Self { name: name.into(), rules, slots: Slots::new(max_concurrent, 1024, Duration::from_secs(30)) }
    }

    fn fails(&self, fail: &Fail, failed: &AtomicU32) -> Option<BackendError> {
        // Counts up to `times` and no further.
        let counted = |n: u32| fail.times.is_none_or(|times| n < times).then(|| n.saturating_add(1));
        failed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted).ok()?;
        let kind = fail.kind.as_deref().and_then(kind_named);
        let kind = kind.or(fail.status.map(status::kind_of)).unwrap_or(ErrorKind::ServerError);
        Some(BackendError {
            status: fail.status,
            retry_after: fail.retry_after_ms.map(Duration::from_millis),
            ..self.error(kind, "fails as its script says")
        })
    }

    fn error(&self, kind: ErrorKind, what: &str) -> BackendError {
        BackendError::new(kind, format!("scripted model `{}` {what}", self.name))
    }
}

#[async_trait]
impl Backend for ScriptedBackend {
    fn kind(&self) -> &'static str {
        "scripted"
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let slot = self.slots.take(&self.name).await?;
        let query = call.request.query();
        let fits = |rule: &Rule| rule.contains.as_ref().is_none_or(|text| query.contains(text.as_str()));
        let Some((rule, failed)) = self.rules.iter().find(|(rule, _)| fits(rule)) else {
            return Err(self.error(ErrorKind::Internal, "has no rule left"));
        };
        if let Some(error) = rule.fail.as_ref().and_then(|fail| self.fails(fail, failed)) {
            return Err(error);
        }
        let plan = Plan::new(&call, rule, &query);
        let usage = match rule.usage {
            Some(claimed) => Usage {
                prompt_tokens: claimed.prompt_tokens,
                cached_tokens: claimed.cached_tokens,
                completion_tokens: claimed.completion_tokens,
                source: UsageSource::Reported,
                ..Usage::default()
            },
            None => plan.usage,
        };
        if call.request.stream {
            return Ok(Reply::Stream { chunks: self.stream(rule, plan, usage, slot), model_reported: None });
        }
        self.whole(rule, plan, usage).await
    }

    fn state(&self) -> ModelState {
        self.slots.state()
    }
}

/// What comes next in a stream, and after how long.
enum Next {
    Chunk(Chunk, Duration),
    Error(BackendError),
    Stall,
}

impl ScriptedBackend {
    async fn whole(&self, rule: &Rule, plan: Plan, usage: Usage) -> Result<Reply, BackendError> {
        let tokens = plan.choices.iter().map(|c| c.tokens.len()).max().unwrap_or(0) as u64;
        let wait = rule.first_token_ms.saturating_add(rule.token_ms.saturating_mul(tokens.saturating_sub(1)));
        pause(Duration::from_millis(wait)).await;
        if rule.stall_after.is_some() {
            std::future::pending::<()>().await;
        }
        if rule.cut_after.is_some() {
            return Err(self.error(ErrorKind::Cut, "breaks off as its script says"));
        }
        let choices = plan.choices.into_iter().map(|choice| Choice {
            index: choice.index,
            text: choice.tokens.concat(),
            logprobs: choice.logprobs.into_iter().flatten().collect(),
            finish: choice.finish,
        });
        let completion = Completion::Choices { choices: choices.collect(), usage };
        Ok(Reply::Whole { completion, model_reported: None })
    }

    fn stream(
        &self,
        rule: &Rule,
        plan: Plan,
        usage: Usage,
        slot: Slot,
    ) -> stream::BoxStream<'static, Result<Chunk, BackendError>> {
        let mut queue = VecDeque::new();
        let first = Duration::from_millis(rule.first_token_ms);
        let further = Duration::from_millis(rule.token_ms);
        // Choices take turns, as a batching engine's do.
        let longest = plan.choices.iter().map(|c| c.tokens.len()).max().unwrap_or(0);
        for position in 0..longest {
            let mut wait = if position == 0 { first } else { further };
            for choice in &plan.choices {
                let Some(text) = choice.tokens.get(position) else { continue };
                let logprobs = choice.logprobs.get(position).cloned().flatten().into_iter().collect();
                let chunk = Chunk::Text { choice: choice.index, text: text.clone(), logprobs };
                queue.push_back(Next::Chunk(chunk, std::mem::take(&mut wait)));
            }
        }
        let limit = |after: Option<u32>| after.map(|n| n as usize).filter(|n| *n <= queue.len());
        match (limit(rule.cut_after), limit(rule.stall_after)) {
            (Some(cut), stall) if stall.is_none_or(|stall| cut <= stall) => {
                queue.truncate(cut);
                queue.push_back(Next::Error(self.error(ErrorKind::Cut, "breaks off as its script says")));
            }
            (_, Some(stall)) => {
                queue.truncate(stall);
                queue.push_back(Next::Stall);
            }
            _ => {
                for choice in &plan.choices {
                    let chunk = Chunk::Finish { choice: choice.index, reason: choice.finish };
                    queue.push_back(Next::Chunk(chunk, Duration::ZERO));
                }
                queue.push_back(Next::Chunk(Chunk::Usage(usage), Duration::ZERO));
            }
        }
        // The place is held until the stream is dropped.
        stream::unfold((queue, slot), |(mut queue, slot)| async move {
            let item = match queue.pop_front()? {
                Next::Chunk(chunk, wait) => {
                    pause(wait).await;
                    Ok(chunk)
                }
                Next::Error(error) => Err(error),
                Next::Stall => std::future::pending().await,
            };
            Some((item, (queue, slot)))
        })
        .boxed()
    }
}

async fn pause(wait: Duration) {
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}
