//! The books of one request: what its calls took, cost and ended in, and that exactly one outcome is recorded, whoever
//! leaves first. The guard is the ledger's `Drop`.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{SystemTime, UNIX_EPOCH},
};

use futures_util::future::BoxFuture;
use tokio::{runtime::Handle, time::Instant};

use super::Journal;
use crate::{
    backend::{BackendError, tally::Tally, wire},
    domain::{
        Attempt, AttemptReason, CallSpec, Chunk, Completion, DecisionId, ErrorKind, Event, EventBody, FinishReason,
        Fleet, Hash, Micros, Outcome, OutcomeStatus, Request, Sampling, Usage,
    },
};

/// One request's books.
pub(super) struct Ledger {
    id: DecisionId,
    request: Arc<Request>,
    journal: Arc<dyn Journal>,
    fleet: Arc<Fleet>,
    runtime: Handle,
    /// Wall clock and monotonic clock at the same moment: stamps are the first plus what the second has run since.
    began: Micros,
    clock: Instant,
    open: Option<Open>,
    /// Model of the latest call.
    model: String,
    calls: u32,
    cost_usd: f64,
    /// As long as it is known of every call.
    joules: Option<f64>,
    /// Of the latest call that ended.
    usage: Usage,
    /// From the request's start to the first piece of its answer.
    ttft_us: Option<i64>,
    /// Whether a part of an answer has been given out.
    given: bool,
    answer: Option<AnswerText>,
    /// Ended attempts, and the outcome, that are not appended yet.
    entries: Vec<Event>,
    writing: Option<BoxFuture<'static, Result<(), String>>>,
    closed: bool,
}

/// The call that is running.
struct Open {
    index: u32,
    why: AttemptReason,
    backend: &'static str,
    sampling: Sampling,
    began: Instant,
    started: Micros,
    ttft_us: Option<i64>,
    model_reported: Option<String>,
    finish: Option<FinishReason>,
    tally: Tally,
}

impl Ledger {
    pub(super) fn new(
        id: DecisionId,
        request: Arc<Request>,
        journal: Arc<dyn Journal>,
        fleet: Arc<Fleet>,
        hash_bodies: bool,
    ) -> Self {
        Self {
            id,
            request,
            journal,
            fleet,
            runtime: Handle::current(),
            began: wall_clock(),
            clock: Instant::now(),
            open: None,
            model: String::new(),
            calls: 0,
            cost_usd: 0.0,
            joules: Some(0.0),
            usage: Usage::default(),
            ttft_us: None,
            given: false,
            answer: hash_bodies.then(AnswerText::default),
            entries: Vec::new(),
            writing: None,
            closed: false,
        }
    }

    /// The request's own clock, in microseconds since the epoch; never goes back.
    pub(super) fn now(&self) -> Micros {
        self.began + since(self.clock)
    }

    /// The moment at which [`Ledger::now`] will be `at`.
    pub(super) fn instant(&self, at: Micros) -> Instant {
        self.clock + std::time::Duration::from_micros(u64::try_from(at - self.began).unwrap_or(0))
    }

    /// The model of the latest call.
    pub(super) fn model(&self) -> String {
        self.model.clone()
    }

    /// Calls made so far.
    pub(super) fn calls(&self) -> u32 {
        self.calls
    }

    pub(super) fn begin(&mut self, index: u32, why: AttemptReason, spec: &CallSpec, backend: &'static str) {
        self.calls += 1;
        self.model.clone_from(&spec.model);
        let now = Instant::now();
        self.open = Some(Open {
            index,
            why,
            backend,
            sampling: spec.sampling_for(&self.request.sampling),
            began: now,
            started: self.now(),
            ttft_us: None,
            model_reported: None,
            finish: None,
            tally: Tally::default(),
        });
    }

    /// The name by which the server called its model.
    pub(super) fn reported(&mut self, model: Option<String>) {
        let fleet_name = &self.model;
        if let Some(open) = &mut self.open {
            open.model_reported = model.filter(|reported| reported != fleet_name);
        }
    }

    /// The first piece of the call's answer is there.
    pub(super) fn arrived(&mut self) {
        if let Some(open) = &mut self.open {
            open.ttft_us = Some(since(open.began));
            self.ttft_us = Some(since(self.clock));
        }
    }

    /// A piece is about to be given out.
    pub(super) fn piece(&mut self, chunk: &Chunk) {
        let Some(open) = &mut self.open else { return };
        self.given = true;
        match chunk {
            Chunk::Text { text, .. } => open.tally.text(text.len()),
            Chunk::Finish { choice: 0, reason } => open.finish = Some(*reason),
            Chunk::Wire(json) => {
                open.tally.wire(json.len());
                if open.finish.is_none() {
                    open.finish = wire::finish_reasons(json).next();
                }
            }
            Chunk::Finish { .. } | Chunk::Usage(_) => {}
        }
        if let Some(answer) = &mut self.answer {
            answer.piece(chunk);
        }
    }

    /// The call has ended well with a streamed answer.
    pub(super) fn streamed(&mut self, usage: Usage) {
        self.end(usage, None);
    }

    /// The call has ended well with a whole answer.
    pub(super) fn whole(&mut self, completion: &Completion, model_reported: Option<String>) {
        self.reported(model_reported);
        if let Some(open) = &mut self.open {
            open.finish = match completion {
                Completion::Choices { choices, .. } => choices.first().map(|c| c.finish),
                Completion::Wire { body, .. } => wire::finish_reasons(body).next(),
            };
        }
        if let Some(answer) = &mut self.answer {
            answer.whole(completion);
        }
        self.given = true;
        self.end(completion.usage(), None);
    }

    /// The call has failed; its model.
    pub(super) fn failed(&mut self, error: &BackendError) -> String {
        let usage = self.partial_usage();
        self.end(usage, Some((error.kind.as_str(), error.message.clone())));
        self.model()
    }

    /// The machine has stopped the call that was running, if one was: the error that stands for it.
    pub(super) fn stopped(&mut self, kind: ErrorKind) -> Option<BackendError> {
        self.open.as_ref()?;
        let message = match kind {
            ErrorKind::Timeout => format!("the request's deadline passed while model `{}` was answering", self.model),
            _ => format!("the call of model `{}` was stopped", self.model),
        };
        let error = BackendError::new(kind, message);
        self.failed(&error);
        Some(error)
    }

    fn partial_usage(&self) -> Usage {
        match &self.open {
            Some(open) if !open.tally.is_empty() => open.tally.usage(&self.request),
            _ => Usage::default(),
        }
    }

    fn end(&mut self, usage: Usage, error: Option<(&str, String)>) {
        let Some(open) = self.open.take() else { return };
        let cost_usd = self.fleet.get(&self.model).map_or(0.0, |card| card.price.cost(&usage));
        self.cost_usd += cost_usd;
        let joules = self.fleet.get(&self.model).and_then(|card| Some(card.energy?.joules(&usage)));
        self.joules = self.joules.zip(joules).map(|(sum, more)| sum + more);
        self.usage = usage;
        let (error, error_detail) = error.map(|(label, detail)| (label.to_owned(), detail)).unzip();
        let attempt = Attempt {
            index: open.index,
            why: open.why,
            model: self.model.clone(),
            model_reported: open.model_reported,
            backend: open.backend.to_owned(),
            sampling: open.sampling,
            started: open.started,
            ttft_us: open.ttft_us,
            latency_us: since(open.began),
            usage,
            cost_usd,
            joules,
            finish: open.finish,
            error,
            error_detail,
        };
        self.entries.push(Event::new(self.now(), Some(self.id), EventBody::Attempt(Box::new(attempt))));
    }

    /// Ends the books with the request's outcome; to be followed by [`Ledger::recorded`].
    pub(super) fn close(&mut self, status: OutcomeStatus, error: Option<&str>) {
        if self.closed {
            return;
        }
        self.closed = true;
        let outcome = Outcome {
            status,
            served_by: if self.given { self.model.clone() } else { String::new() },
            attempts: self.calls,
            cost_usd: self.cost_usd,
            joules: self.joules.filter(|_| self.calls > 0),
            latency_us: since(self.clock),
            ttft_us: self.ttft_us,
            usage: self.usage,
            error: error.map(str::to_owned),
            answer_hash: self.answer.take().filter(|_| self.given).map(AnswerText::hash),
        };
        self.entries.push(Event::new(self.now(), Some(self.id), EventBody::Outcome(outcome)));
        self.write();
    }

    /// Appends what has come together, in one write.
    fn write(&mut self) {
        if self.entries.is_empty() {
            return;
        }
        let events = std::mem::take(&mut self.entries);
        let journal = Arc::clone(&self.journal);
        let before = self.writing.take();
        self.writing = Some(Box::pin(async move {
            if let Some(before) = before {
                before.await?;
            }
            journal.append(events).await
        }));
    }

    /// Records the attempts that have ended so far.
    pub(super) async fn flush(&mut self) -> Result<(), String> {
        self.write();
        self.recorded().await
    }

    /// Waits until everything written is recorded.
    pub(super) async fn recorded(&mut self) -> Result<(), String> {
        std::future::poll_fn(|cx| self.poll_recorded(cx)).await
    }

    pub(super) fn poll_recorded(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
        let Some(writing) = &mut self.writing else { return Poll::Ready(Ok(())) };
        let result = std::task::ready!(Pin::new(writing).poll(cx));
        self.writing = None;
        Poll::Ready(result)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if !self.closed {
            // The client has left: what the machine answers to `ClientGone` is that the call is dropped (its future or
            // stream goes with its owner) and the request over.
            let usage = self.partial_usage();
            if let Some(open) = &mut self.open {
                open.finish = Some(FinishReason::Cancelled);
            }
            self.end(usage, None);
            self.close(OutcomeStatus::Cancelled, None);
        }
        if let Some(writing) = self.writing.take() {
            let id = self.id;
            self.runtime.spawn(async move {
                if let Err(reason) = writing.await {
                    tracing::error!(decision = %id, %reason, "the outcome could not be recorded");
                }
            });
        }
    }
}

/// The answer's text, kept only where it is to be hashed.
#[derive(Debug, Default)]
struct AnswerText(BTreeMap<u32, String>);

impl AnswerText {
    fn add(&mut self, choice: u32, text: &str) {
        self.0.entry(choice).or_default().push_str(text);
    }

    fn piece(&mut self, chunk: &Chunk) {
        match chunk {
            Chunk::Text { choice, text, .. } => self.add(*choice, text),
            Chunk::Wire(json) => wire::texts(json).iter().for_each(|(choice, text)| self.add(*choice, text)),
            Chunk::Finish { .. } | Chunk::Usage(_) => {}
        }
    }

    fn whole(&mut self, completion: &Completion) {
        match completion {
            Completion::Choices { choices, .. } => choices.iter().for_each(|c| self.add(c.index, &c.text)),
            Completion::Wire { body, .. } => {
                wire::texts(body).iter().for_each(|(choice, text)| self.add(*choice, text));
            }
        }
    }

    /// BLAKE3 of the choices' texts in order, U+0000 between them.
    fn hash(self) -> Hash {
        let texts: Vec<String> = self.0.into_values().collect();
        Hash::of(texts.join("\0").as_bytes())
    }
}

fn since(moment: Instant) -> i64 {
    i64::try_from(moment.elapsed().as_micros()).unwrap_or(i64::MAX)
}

fn wall_clock() -> Micros {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)
}
