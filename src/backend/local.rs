//! The in-process engine as a backend: what a plan and a client ask for, put together into one engine request; the
//! engine's events as chunks or as a whole completion. Inference itself is [`crate::engine`]'s.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{Backend, BackendError, Call, LocalInfo, LocalModel, PromptState, Reply};
use crate::{
    domain::{
        Choice, Chunk, Completion, ContentPart, Counters, ErrorKind, FinishReason, Hash, KvAnswer, KvCommand, Message,
        ModelState, Need, PromptKv, Request, Role,
    },
    engine::{
        Choosing, Computed, Encoded, Engine, EngineError, EngineOptions, Generate, GenerateEvent, ModelInfo, Prompt,
    },
};

/// Texts longer than this many bytes are tokenised on a thread where blocking is allowed (about 10 ms).
const LONG_TEXT: usize = 32 << 10;
/// Sampling where neither the client nor the plan says anything: OpenAI's documented defaults.
const DEFAULT_TEMPERATURE: f64 = 1.0;
const DEFAULT_TOP_P: f64 = 1.0;

/// A fleet entry that an in-process engine serves.
pub struct LocalBackend {
    name: String,
    path: PathBuf,
    options: EngineOptions,
    /// `None` while it is not loaded. Calls under way hold it, too, and so it goes when they have ended.
    engine: ArcSwapOption<Engine>,
    /// What the file says; stays when it is unloaded.
    info: ModelInfo,
    /// One loads or unloads at a time.
    turn: tokio::sync::Mutex<()>,
}

impl LocalBackend {
    /// Loads a model file for the fleet entry `name`. Blocks while it reads.
    ///
    /// # Errors
    /// Whatever is wrong with the file or the options.
    pub fn load(path: &Path, options: EngineOptions, name: impl Into<String>) -> Result<Self, EngineError> {
        let engine = Engine::load(path, options.clone())?;
        Ok(Self {
            name: name.into(),
            path: path.to_owned(),
            options,
            info: engine.info().clone(),
            engine: ArcSwapOption::from_pointee(engine),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// What the model file is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn engine(&self) -> Result<Arc<Engine>, BackendError> {
        self.engine.load_full().ok_or_else(|| {
            let name = &self.name;
            let message = format!("model `{name}` is not loaded; load it with `weir models load {name}`");
            BackendError::new(ErrorKind::Unreachable, message)
        })
    }

    fn error(&self, error: &EngineError) -> BackendError {
        failed(&self.name, error)
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
        let sampling = call.spec.sampling_for(&request.sampling);
        let seed = sampling.seed.map_or_else(|| derived_seed(call), |seed| seed as u64);
        Ok(Generate {
            prompt: match &request.begun {
                None => Prompt::Chat(self.messages(request, call.spec.system.as_deref())?),
                Some(begun) => Prompt::Begun(self.messages(request, call.spec.system.as_deref())?, begun.to_string()),
            },
            choosing: Choosing {
                temperature: sampling.temperature.unwrap_or(DEFAULT_TEMPERATURE),
                top_p: sampling.top_p.unwrap_or(DEFAULT_TOP_P),
                seed,
            },
            max_tokens: sampling.max_tokens,
            stop: sampling.stop,
            n: request.n,
            priority: request.priority,
            deadline: call.deadline,
            exact: request.exact,
            sharing: request.sharing.clone().into_bytes(),
            keep: request.keep,
            logprobs: request.logprobs.then_some(request.top_logprobs),
            mask: None,
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
                // Parts are joined by line feeds.
                Some(first) => {
                    first.role = Role::System;
                    first.content.insert(0, ContentPart::Text(format!("{system}\n")));
                }
                None => messages.insert(0, Message::text(Role::System, system)),
            }
        }
        Ok(messages)
    }

    async fn submit(
        &self,
        engine: &Arc<Engine>,
        call: &Call,
    ) -> Result<UnboundedReceiver<GenerateEvent>, BackendError> {
        let generate = self.generate(call)?;
        let (Prompt::Chat(messages) | Prompt::Begun(messages, _)) = &generate.prompt else {
            return Err(BackendError::new(ErrorKind::Internal, "a chat call became another prompt"));
        };
        let begun = call.request.begun.as_ref().map_or(0, |begun| begun.len());
        let bytes = begun + messages.iter().flat_map(|m| &m.content).map(length).sum::<usize>();
        let submitted = if bytes > LONG_TEXT {
            let engine = Arc::clone(engine);
            tokio::task::spawn_blocking(move || engine.generate(generate))
                .await
                .map_err(|e| BackendError::new(ErrorKind::Internal, format!("tokenising failed: {e}")))?
        } else {
            engine.generate(generate)
        };
        submitted.map_err(|e| self.error(&e))
    }

    async fn whole(&self, mut events: UnboundedReceiver<GenerateEvent>, n: u32) -> Result<Completion, BackendError> {
        let mut choices: Vec<Choice> = (0..n)
            .map(|index| Choice { index, text: String::new(), logprobs: Vec::new(), finish: FinishReason::Cancelled })
            .collect();
        while let Some(event) = events.recv().await {
            match chunk(&self.name, event)? {
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

impl LocalBackend {
    /// A request's prompt, tokenised where blocking is allowed.
    async fn encoded(&self, engine: &Arc<Engine>, request: &Request) -> Result<Encoded, BackendError> {
        let (engine, messages) = (Arc::clone(engine), self.messages(request, None)?);
        let encoded = tokio::task::spawn_blocking(move || engine.encode(&messages)).await.map_err(internal)?;
        encoded.map_err(|e| self.error(&e))
    }

    async fn kept_of(&self, engine: &Arc<Engine>, request: &Request) -> Result<PromptKv, BackendError> {
        Ok(engine.kv_of(&self.encoded(engine, request).await?, request.sharing.as_bytes()))
    }

    /// Has a prompt computed for its documents, which stay for so long.
    async fn pin(&self, engine: &Arc<Engine>, request: &Request, keep: Duration) -> Result<(), BackendError> {
        let prompt = self.encoded(engine, request).await?;
        let before = engine.kv_of(&prompt, request.sharing.as_bytes());
        if before.documents.is_empty() {
            let message = match before.chunk_reuse {
                Some(_) => format!("reuse of documents is {}", engine.info().chunk_reuse),
                None => "the prompt has no marked document of a size that is reused".to_owned(),
            };
            return Err(BackendError::new(ErrorKind::BadRequest, format!("model `{}`: {message}", self.name)));
        }
        let generate = Generate {
            prompt: Prompt::Encoded(prompt),
            choosing: Choosing { temperature: 0.0, top_p: 1.0, seed: 0 },
            max_tokens: Some(1),
            stop: Vec::new(),
            n: 1,
            priority: 0,
            deadline: None,
            exact: false,
            sharing: request.sharing.clone().into_bytes(),
            keep: Some(keep),
            logprobs: None,
            mask: None,
        };
        let events = engine.generate(generate).map_err(|e| self.error(&e))?;
        self.whole(events, 1).await.map(|_| ())
    }
}

fn internal(error: tokio::task::JoinError) -> BackendError {
    BackendError::new(ErrorKind::Internal, error.to_string())
}

/// As it was loaded last: a record may have come since the first time.
fn engine_info(engine: &ArcSwapOption<Engine>) -> Option<String> {
    engine.load().as_ref().map(|engine| engine.info().chunk_reuse.clone())
}

fn failed(name: &str, error: &EngineError) -> BackendError {
    BackendError {
        retry_after: matches!(error, EngineError::Busy { .. }).then_some(Duration::from_secs(1)),
        ..BackendError::new(error.kind(), format!("model `{name}`: {error}"))
    }
}

/// The chunk of an event.
fn chunk(name: &str, event: GenerateEvent) -> Result<Chunk, BackendError> {
    match event {
        GenerateEvent::Text { choice, text, logprobs } => Ok(Chunk::Text { choice, text, logprobs }),
        GenerateEvent::Finish { choice, reason } => Ok(Chunk::Finish { choice, reason }),
        GenerateEvent::Usage(usage) => Ok(Chunk::Usage(usage)),
        GenerateEvent::Failed(error) => Err(failed(name, &error)),
    }
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
    part.text().map_or(0, str::len)
}

#[async_trait]
impl Backend for LocalBackend {
    fn kind(&self) -> &'static str {
        "local"
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let engine = self.engine()?;
        let events = self.submit(&engine, &call).await?;
        let name = &self.info.name;
        let model_reported = (!name.is_empty()).then(|| name.clone());
        if !call.request.stream {
            let completion = self.whole(events, call.request.n).await?;
            return Ok(Reply::Whole { completion, model_reported });
        }
        // `None`: the last chunk, or an error, has been given out. The engine is held until then.
        let chunks = stream::unfold(Some((events, engine, self.name.clone())), |state| async move {
            let (mut events, engine, name) = state?;
            let item = match events.recv().await {
                Some(event) => chunk(&name, event),
                None => Err(failed(&name, &EngineError::Stopped)),
            };
            let last = matches!(item, Ok(Chunk::Usage(_)) | Err(_));
            Some((item, (!last).then_some((events, engine, name))))
        });
        Ok(Reply::Stream { chunks: chunks.boxed(), model_reported })
    }

    fn state(&self) -> ModelState {
        let Some(engine) = self.engine.load_full() else { return ModelState::default() };
        let (running, waiting) = engine.load_state();
        let pace = engine.pace();
        ModelState {
            available: engine.is_running(),
            running: running as u32,
            waiting: waiting as u32,
            pending_tokens: u32::try_from(pace.pending).unwrap_or(u32::MAX),
            prefill_tokens_per_s: pace.prefill_tokens_per_s,
            decode_tokens_per_s: pace.decode_tokens_per_s,
            ..ModelState::default()
        }
    }

    async fn prompt(&self, request: &Arc<Request>) -> Option<PromptState> {
        let messages = self.messages(request, None).ok()?;
        let bytes: usize = messages.iter().flat_map(|m| &m.content).map(length).sum();
        let engine = self.engine.load_full()?;
        let (exact, sharing) = (request.exact, request.sharing.clone());
        let look = move || {
            let prompt = engine.encode(&messages).ok()?;
            let resident = engine.resident(&prompt, exact, sharing.as_bytes());
            Some(PromptState { tokens: prompt.tokens.len() as u32, resident: resident as u32 })
        };
        match bytes > LONG_TEXT {
            true => tokio::task::spawn_blocking(look).await.ok()?,
            false => look(),
        }
    }

    fn local(&self) -> Option<LocalModel> {
        let ModelInfo { architecture, parameters, quantisation, context, weight_bytes, kv_bytes_per_token, .. } =
            self.info.clone();
        let info = LocalInfo {
            architecture,
            computed_by: self.info.computed_by.as_str(),
            parameters,
            quantisation,
            context,
            weight_bytes,
            kv_bytes_per_token,
            chunk_reuse: engine_info(&self.engine).unwrap_or_else(|| self.info.chunk_reuse.clone()),
        };
        let loaded = self.engine.load().is_some();
        Some(LocalModel { file: self.path.display().to_string(), loaded, info })
    }

    async fn set_loaded(&self, loaded: bool) -> Result<(), BackendError> {
        let _turn = self.turn.lock().await;
        if self.engine.load().is_some() == loaded {
            return Ok(());
        }
        if !loaded {
            let engine = self.engine.swap(None);
            // Joins the engine's thread, unless calls still hold it.
            return tokio::task::spawn_blocking(move || drop(engine)).await.map_err(internal);
        }
        let (path, options) = (self.path.clone(), self.options.clone());
        let engine = tokio::task::spawn_blocking(move || Engine::load(&path, options)).await.map_err(internal)?;
        self.engine.store(Some(Arc::new(engine.map_err(|e| self.error(&e))?)));
        Ok(())
    }

    async fn kv(&self, command: KvCommand) -> Result<KvAnswer, BackendError> {
        let engine = self.engine()?;
        if engine.info().computed_by == Computed::Candle {
            let message = format!("model `{}` is computed by candle, which keeps nothing", self.name);
            return Err(BackendError::new(ErrorKind::Unsupported, message));
        }
        Ok(match command {
            KvCommand::Stat => KvAnswer::Stat(engine.kv_stat()),
            KvCommand::Lookup(request) => KvAnswer::Prompt(self.kept_of(&engine, &request).await?),
            KvCommand::Pin(request, keep) => {
                self.pin(&engine, &request, keep).await?;
                KvAnswer::Prompt(self.kept_of(&engine, &request).await?)
            }
            KvCommand::Clear(request) => {
                let prompt = match &request {
                    Some(request) => Some(self.encoded(&engine, request).await?),
                    None => None,
                };
                let sharing = request.map_or_else(Vec::new, |request| request.sharing.clone().into_bytes());
                let clear = move || engine.kv_clear(prompt.as_ref(), &sharing);
                let cleared = tokio::task::spawn_blocking(clear).await.map_err(internal)?;
                KvAnswer::Cleared(cleared.map_err(|e| self.error(&e))?)
            }
        })
    }

    fn counters(&self) -> Option<Counters> {
        self.engine.load().as_ref().map(|engine| engine.counters())
    }
}

#[cfg(test)]
mod tests;
