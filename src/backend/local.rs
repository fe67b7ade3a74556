//! The in-process engine as a backend: what a plan and a client ask for, put together into one engine request; the
//! engine's events as chunks or as a whole completion. Inference itself is [`crate::engine`]'s.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{Backend, BackendError, Call, Reply};
use crate::{
    domain::{
        Choice, Chunk, Completion, ContentPart, Counters, ErrorKind, FinishReason, Hash, Message, ModelState, Need,
        Request, Role, Sampling,
    },
    engine::{Choosing, Engine, EngineError, Generate, GenerateEvent, Prompt},
};

/// Texts longer than this many bytes are tokenised on a thread where blocking is allowed (about 10 ms).
const LONG_TEXT: usize = 32 << 10;
/// Sampling where neither the client nor the plan says anything: OpenAI's documented defaults.
const DEFAULT_TEMPERATURE: f64 = 1.0;
const DEFAULT_TOP_P: f64 = 1.0;

/// A fleet entry that an in-process engine serves. Several entries may share an engine.
pub struct LocalBackend {
    engine: Arc<Engine>,
    name: String,
}

impl LocalBackend {
    /// A backend for the fleet entry `name`.
    pub fn new(engine: impl Into<Arc<Engine>>, name: impl Into<String>) -> Self {
        Self { engine: engine.into(), name: name.into() }
    }

    fn error(&self, error: &EngineError) -> BackendError {
        BackendError {
            retry_after: matches!(error, EngineError::Busy { .. }).then_some(Duration::from_secs(1)),
            ..BackendError::new(error.kind(), format!("model `{}`: {error}", self.name))
        }
    }

    fn unsupported(&self, what: &str) -> BackendError {
        let message = format!(
            "model `{}` runs in this process and takes text only, without {what}; send the request to a model that can",
            self.name
        );
        BackendError::new(ErrorKind::Unsupported, message)
    }

    /// The engine's request for a call.
    fn generate(&self, call: &Call) -> Result<Generate, BackendError> {
        let request = &call.request;
        if let Some(need) = request.needs.iter().find(|need| **need != Need::Logprobs) {
            return Err(self.unsupported(need.as_str()));
        }
        let sampling = merged(&call.spec.sampling, &request.sampling);
        let seed = sampling.seed.map_or_else(|| derived_seed(call), |seed| seed as u64);
        Ok(Generate {
            prompt: Prompt::Chat(self.messages(request, call.spec.system.as_deref())?),
            choosing: Choosing {
                temperature: sampling.temperature.unwrap_or(DEFAULT_TEMPERATURE),
                top_p: sampling.top_p.unwrap_or(DEFAULT_TOP_P),
                seed,
            },
            max_tokens: sampling.max_tokens,
            stop: sampling.stop,
            n: request.n,
            priority: 0,
            logprobs: request.logprobs.then_some(request.top_logprobs),
        })
    }

    /// The client's messages, with the plan's system text before the client's own.
    fn messages(&self, request: &Request, system: Option<&str>) -> Result<Vec<Message>, BackendError> {
        for part in request.messages.iter().flat_map(|message| &message.content) {
            if let ContentPart::Other { kind } = part {
                return Err(self.unsupported(&format!("parts of the type `{kind}`")));
            }
        }
        let mut messages = request.messages.to_vec();
        if let Some(system) = system {
            match messages.first_mut().filter(|m| matches!(m.role, Role::System | Role::Developer)) {
                Some(first) => *first = Message::text(Role::System, format!("{system}\n\n{}", first.joined_text())),
                None => messages.insert(0, Message::text(Role::System, system)),
            }
        }
        Ok(messages)
    }

    async fn submit(&self, call: &Call) -> Result<UnboundedReceiver<GenerateEvent>, BackendError> {
        let generate = self.generate(call)?;
        let Prompt::Chat(messages) = &generate.prompt else {
            return Err(BackendError::new(ErrorKind::Internal, "a chat call became another prompt"));
        };
        let bytes: usize = messages.iter().flat_map(|m| &m.content).map(length).sum();
        let submitted = if bytes > LONG_TEXT {
            let engine = Arc::clone(&self.engine);
            tokio::task::spawn_blocking(move || engine.generate(generate))
                .await
                .map_err(|e| BackendError::new(ErrorKind::Internal, format!("tokenising failed: {e}")))?
        } else {
            self.engine.generate(generate)
        };
        submitted.map_err(|e| self.error(&e))
    }

    /// The chunk of an event.
    fn chunk(&self, event: GenerateEvent) -> Result<Chunk, BackendError> {
        match event {
            GenerateEvent::Text { choice, text, logprobs } => Ok(Chunk::Text { choice, text, logprobs }),
            GenerateEvent::Finish { choice, reason } => Ok(Chunk::Finish { choice, reason }),
            GenerateEvent::Usage(usage) => Ok(Chunk::Usage(usage)),
            GenerateEvent::Failed(error) => Err(self.error(&error)),
        }
    }

    async fn whole(&self, mut events: UnboundedReceiver<GenerateEvent>, n: u32) -> Result<Completion, BackendError> {
        let mut choices: Vec<Choice> = (0..n)
            .map(|index| Choice { index, text: String::new(), logprobs: Vec::new(), finish: FinishReason::Cancelled })
            .collect();
        while let Some(event) = events.recv().await {
            match self.chunk(event)? {
                Chunk::Text { choice, text, logprobs } => {
                    if let Some(entry) = choices.get_mut(choice as usize) {
                        entry.text.push_str(&text);
                        entry.logprobs.extend(logprobs);
                    }
                }
                Chunk::Finish { choice, reason } => {
                    if let Some(entry) = choices.get_mut(choice as usize) {
                        entry.finish = reason;
                    }
                }
                Chunk::Usage(usage) => return Ok(Completion::Choices { choices, usage }),
                Chunk::Wire(_) => {}
            }
        }
        Err(self.error(&EngineError::Stopped))
    }
}

/// What the client says counts; the plan fills in the rest, and bounds the answer's length.
fn merged(plan: &Sampling, client: &Sampling) -> Sampling {
    let max_tokens = match (plan.max_tokens, client.max_tokens) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    Sampling { max_tokens, ..plan.overridden_by(client) }
}

/// The seed of a call for which nobody gave one: a hash of its id and its place, so that the record suffices to draw the
/// same numbers again.
fn derived_seed(call: &Call) -> u64 {
    let mut bytes = call.id.0.as_bytes().to_vec();
    bytes.extend(call.index.to_le_bytes());
    let hash = Hash::of(&bytes).0;
    let [a, b, c, d, e, f, g, h, ..] = hash;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn length(part: &ContentPart) -> usize {
    match part {
        ContentPart::Text(text) => text.len(),
        ContentPart::Other { .. } => 0,
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn kind(&self) -> &'static str {
        "local"
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let events = self.submit(&call).await?;
        let name = &self.engine.info().name;
        let model_reported = (!name.is_empty()).then(|| name.clone());
        if !call.request.stream {
            let completion = self.whole(events, call.request.n).await?;
            return Ok(Reply::Whole { completion, model_reported });
        }
        let backend = Self { engine: Arc::clone(&self.engine), name: self.name.clone() };
        // `None`: the last chunk, or an error, has been given out.
        let chunks = stream::unfold(Some((events, backend)), |state| async move {
            let (mut events, backend) = state?;
            let item = match events.recv().await {
                Some(event) => backend.chunk(event),
                None => Err(backend.error(&EngineError::Stopped)),
            };
            let last = matches!(item, Ok(Chunk::Usage(_)) | Err(_));
            Some((item, (!last).then_some((events, backend))))
        });
        Ok(Reply::Stream { chunks: chunks.boxed(), model_reported })
    }

    fn state(&self) -> ModelState {
        let (running, waiting) = self.engine.load_state();
        ModelState {
            available: self.engine.is_running(),
            running: running as u32,
            waiting: waiting as u32,
            ..ModelState::default()
        }
    }

    fn counters(&self) -> Option<Counters> {
        Some(self.engine.counters())
    }
}

#[cfg(test)]
mod tests;
