//! The books of one request: what its calls took, cost and ended in, and that exactly one outcome is recorded, whoever
//! leaves first. The guard is the ledger's `Drop`.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::future::BoxFuture;
use tokio::{runtime::Handle, time::Instant};

use super::Journal;
use crate::{
    backend::{BackendError, tally::Tally, wire},
    domain::{
        Attempt, AttemptReason, CallSpec, Chunk, Completion, DecisionId, ErrorKind, Event, EventBody, Facts,
        FinishReason, Fleet, Hash, Micros, Note, Outcome, OutcomeStatus, Place, Reading, Request, Sampling, Spend,
        Usage,
    },
};

/// One request's books.
pub(super) struct Ledger {
    id: DecisionId,
    journal: Arc<dyn Journal>,
    fleet: Arc<Fleet>,
    runtime: Handle,
    /// Wall clock and monotonic clock at the same moment: stamps are the first plus what the second has run since.
    began: Micros,
    clock: Instant,
    /// The last instant that was told.
    told: AtomicI64,
    /// The calls that are running.
    open: Vec<Open>,
    ended: Vec<Ended>,
    calls: u32,
    cost_usd: f64,
    /// As long as it is known of every call.
    joules: Option<f64>,
    /// From the request's start to the first piece of its answer.
    ttft_us: Option<i64>,
    /// The call of whose answer a part has been given out.
    served: Option<u32>,
    hash_bodies: bool,
    /// Ended attempts, notes and the outcome, that are not appended yet.
    entries: Vec<Event>,
    writing: Option<BoxFuture<'static, Result<(), String>>>,
    closed: bool,
}

/// A call that is running.
struct Open {
    index: u32,
    why: AttemptReason,
    at: Place,
    model: String,
    /// What it was shown.
    request: Arc<Request>,
    backend: &'static str,
    sampling: Sampling,
    started: Micros,
    ttft_us: Option<i64>,
    model_reported: Option<String>,
    finish: Option<FinishReason>,
    tally: Tally,
    facts: Option<Facts>,
    down: Vec<String>,
    answer: Option<AnswerText>,
}

/// What is kept of a call that has ended.
struct Ended {
    index: u32,
    model: String,
    usage: Usage,
    cost_usd: f64,
    answer: Option<AnswerText>,
}

impl Ledger {
    pub(super) fn new(id: DecisionId, journal: Arc<dyn Journal>, fleet: Arc<Fleet>, hash_bodies: bool) -> Self {
        Self {
            id,
            journal,
            fleet,
            runtime: Handle::current(),
            began: wall_clock(),
            clock: Instant::now(),
            told: AtomicI64::new(0),
            open: Vec::new(),
            ended: Vec::new(),
            calls: 0,
            cost_usd: 0.0,
            joules: Some(0.0),
            ttft_us: None,
            served: None,
            hash_bodies,
            entries: Vec::new(),
            writing: None,
            closed: false,
        }
    }

    /// The request's own clock, in microseconds since the epoch. No instant is told twice, so that the record gives the order in
    /// which things happened.
    pub(super) fn now(&self) -> Micros {
        let now = self.began + since(self.clock);
        let before = self.told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |told| Some(now.max(told + 1)));
        before.map_or(now, |told| now.max(told + 1))
    }

    /// The moment at which [`Ledger::now`] will be `at`.
    pub(super) fn instant(&self, at: Micros) -> Instant {
        self.clock + Duration::from_micros(u64::try_from(at - self.began).unwrap_or(0))
    }

    /// The model of a call; empty for one that never was.
    pub(super) fn model(&self, call: u32) -> String {
        let open = self.open.iter().find(|open| open.index == call).map(|open| &open.model);
        let ended = || self.ended.iter().find(|ended| ended.index == call).map(|ended| &ended.model);
        open.or_else(ended).cloned().unwrap_or_default()
    }

    /// What a call that has ended cost, with its price rounded up.
    pub(super) fn cost(&self, call: u32) -> Spend {
        let ended = self.ended.iter().find(|ended| ended.index == call);
        ended.map(|ended| Spend::of(ended.cost_usd, &ended.usage)).unwrap_or_default()
    }

    /// A call begins: what it is shown, and where in the plan it stands.
    pub(super) fn begin(
        &mut self,
        index: u32,
        why: AttemptReason,
        at: Place,
        spec: &CallSpec,
        request: Arc<Request>,
        backend: &'static str,
    ) {
        self.calls += 1;
        self.open.push(Open {
            index,
            why,
            at,
            model: spec.model.clone(),
            backend,
            sampling: spec.sampling_for(&request.sampling),
            request,
            started: self.now(),
            ttft_us: None,
            model_reported: None,
            finish: None,
            tally: Tally::default(),
            facts: None,
            down: Vec::new(),
            answer: self.hash_bodies.then(AnswerText::default),
        });
    }

    /// Where in the plan a running call stands.
    pub(super) fn place(&self, call: u32) -> &[u32] {
        self.open.iter().find(|open| open.index == call).map(|open| &*open.at).unwrap_or_default()
    }

    fn running(&mut self, call: u32) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.index == call)
    }

    /// The name by which the server called its model.
    pub(super) fn reported(&mut self, call: u32, model: Option<String>) {
        if let Some(open) = self.running(call) {
            open.model_reported = model.filter(|reported| *reported != open.model);
        }
    }

    /// The first piece of the call's answer is there.
    pub(super) fn arrived(&mut self, call: u32) {
        let now = self.now();
        if let Some(open) = self.running(call) {
            open.ttft_us = Some(now - open.started);
        }
    }

    /// The client's answer begins now.
    pub(super) fn answering(&mut self) {
        self.ttft_us.get_or_insert_with(|| since(self.clock));
    }

    /// The call's answer is the client's.
    pub(super) fn serves(&mut self, call: u32) {
        self.served = Some(call);
    }

    /// A piece of a call's answer.
    pub(super) fn piece(&mut self, call: u32, chunk: &Chunk) {
        let Some(open) = self.running(call) else { return };
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
        if let Some(answer) = &mut open.answer {
            answer.piece(chunk);
        }
    }

    /// What gates, votes and judges are told of a call's answer.
    pub(super) fn facts(&mut self, call: u32, facts: Facts) {
        if let Some(open) = self.running(call) {
            open.facts = Some(facts);
        }
    }

    /// The models that cannot be called as the call fails.
    pub(super) fn down(&mut self, call: u32, models: &[String]) {
        if let Some(open) = self.running(call) {
            open.down = models.to_vec();
        }
    }

    /// What is known of an answer that is still coming; it stays in the record where the call is stopped.
    pub(super) fn early(&mut self, call: u32, readings: &[Reading]) {
        let Some(open) = self.running(call) else { return };
        let scores = &mut open.facts.get_or_insert_default().scores;
        scores.retain(|known| readings.iter().all(|reading| reading.score != known.score));
        scores.extend_from_slice(readings);
    }

    /// The call has ended well with a streamed answer.
    pub(super) fn streamed(&mut self, call: u32, usage: Usage) {
        self.end(call, usage, None);
    }

    /// The call has ended well with a whole answer.
    pub(super) fn whole(&mut self, call: u32, completion: &Completion) {
        if let Some(open) = self.running(call) {
            open.finish = match completion {
                Completion::Choices { choices, .. } => choices.first().map(|c| c.finish),
                Completion::Wire { body, .. } => wire::finish_reasons(body).next(),
            };
            if let Some(answer) = &mut open.answer {
                answer.whole(completion);
            }
        }
        self.end(call, completion.usage(), None);
    }

    /// The call has failed.
    pub(super) fn failed(&mut self, call: u32, error: &BackendError) {
        let usage = self.partial_usage(call);
        self.end(call, usage, Some(error));
    }

    /// The machine has stopped a call that was running: by the deadline, or because its answer is no longer wanted.
    pub(super) fn stopped(&mut self, call: u32, deadline: bool) -> Option<BackendError> {
        let model = &self.running(call)?.model;
        if deadline {
            let message = format!("the request's deadline passed while model `{model}` was answering");
            let error = BackendError::new(ErrorKind::Timeout, message);
            self.failed(call, &error);
            return Some(error);
        }
        self.cancelled(call);
        None
    }

    fn cancelled(&mut self, call: u32) {
        let usage = self.partial_usage(call);
        if let Some(open) = self.running(call) {
            open.finish = Some(FinishReason::Cancelled);
        }
        self.end(call, usage, None);
    }

    /// A decision of the machine.
    pub(super) fn note(&mut self, note: Note) {
        self.entries.push(Event::new(self.now(), Some(self.id), EventBody::Note(note)));
    }

    fn partial_usage(&mut self, call: u32) -> Usage {
        match self.running(call) {
            Some(open) if !open.tally.is_empty() => open.tally.usage(&open.request),
            _ => Usage::default(),
        }
    }

    fn end(&mut self, call: u32, usage: Usage, error: Option<&BackendError>) {
        let Some(place) = self.open.iter().position(|open| open.index == call) else { return };
        let open = self.open.remove(place);
        let card = self.fleet.get(&open.model);
        let cost_usd = card.map_or(0.0, |card| card.price.cost(&usage));
        let joules = card.and_then(|card| Some(card.energy?.joules(&usage)));
        self.cost_usd += cost_usd;
        self.joules = self.joules.zip(joules).map(|(sum, more)| sum + more);
        self.ended.push(Ended { index: call, model: open.model.clone(), usage, cost_usd, answer: open.answer });
        let attempt = Attempt {
            index: open.index,
            why: open.why,
            at: open.at,
            model: open.model,
            model_reported: open.model_reported,
            backend: open.backend.to_owned(),
            sampling: open.sampling,
            started: open.started,
            ttft_us: open.ttft_us,
            // By the request's own clock, so that ends of calls are in the order in which the machine was told of them.
            latency_us: self.now() - open.started,
            usage,
            cost_usd,
            joules,
            finish: open.finish,
            error: error.map(|error| error.kind.as_str().to_owned()),
            error_detail: error.map(|error| error.message.clone()),
            retry_after_us: error.and_then(|error| error.retry_after).map(micros),
            down: open.down,
            facts: open.facts,
        };
        self.entries.push(Event::new(self.now(), Some(self.id), EventBody::Attempt(Box::new(attempt))));
    }

    /// Ends the books with the request's outcome; to be followed by [`Ledger::recorded`].
    pub(super) fn close(&mut self, status: OutcomeStatus, error: Option<&str>) {
        if self.closed {
            return;
        }
        self.closed = true;
        let served = self.served.and_then(|call| self.ended.iter().position(|ended| ended.index == call));
        let served = served.map(|place| self.ended.swap_remove(place));
        // Where nothing was given out, the tokens of the call that ended last.
        let usage = served.as_ref().or(self.ended.last()).map(|ended| ended.usage).unwrap_or_default();
        let outcome = Outcome {
            status,
            served_by: served.as_ref().map(|ended| ended.model.clone()).unwrap_or_default(),
            attempts: self.calls,
            cost_usd: self.cost_usd,
            joules: self.joules.filter(|_| self.calls > 0),
            latency_us: since(self.clock),
            ttft_us: self.ttft_us,
            usage,
            error: error.map(str::to_owned),
            answer_hash: served.and_then(|ended| ended.answer).map(AnswerText::hash),
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
            // The client has left: what the machine answers to `ClientGone` is that the calls are dropped (their futures
            // or streams go with their owner) and the request over.
            for call in self.open.iter().map(|open| open.index).collect::<Vec<_>>() {
                self.cancelled(call);
            }
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
    micros(moment.elapsed())
}

/// In microseconds.
pub(super) fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

fn wall_clock() -> Micros {
    micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
