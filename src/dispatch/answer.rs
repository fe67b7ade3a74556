//! A streamed answer on its way to the client: pieces pass through, the end is held back until it is recorded.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{Stream, StreamExt, stream::BoxStream};
use tokio::time::{Instant, Sleep};

use super::ledger::{Ledger, micros};
use crate::{
    backend::BackendError,
    cascade::{Answered, Command, Event, Machine, Timer},
    domain::{Chunk, DecisionId, ErrorKind, Micros, OutcomeStatus, Spend},
    gateway::GatewayError,
};

/// The stream of [`crate::gateway::AnswerBody::Stream`]. Dropping it early drops the backend's stream, which cancels the
/// call, and its ledger, which records that the client left.
pub(super) struct Answering {
    id: DecisionId,
    call: u32,
    model: String,
    machine: Machine,
    ledger: Ledger,
    chunks: Option<BoxStream<'static, Result<Chunk, BackendError>>>,
    first: Option<Chunk>,
    /// The machine's deadline, on its clock and on tokio's.
    deadline: Option<(Micros, Instant)>,
    alarm: Option<Pin<Box<Sleep>>>,
    /// What is given out once it is recorded how the request ended.
    last: Option<Result<Chunk, GatewayError>>,
}

/// The machine's view of a failed call that cost so much all the same, at a moment when the models `down` cannot be called.
pub(super) fn failure(call: u32, error: &BackendError, cost: Spend, down: Vec<String>) -> Event {
    let retry_after = error.retry_after.map(micros);
    Event::Failed { call, kind: error.kind, retry_after, cost, down }
}

impl Answering {
    /// The answer of `call`, whose `first` piece is there and counted.
    pub(super) fn new(
        id: DecisionId,
        call: u32,
        machine: Machine,
        mut ledger: Ledger,
        chunks: BoxStream<'static, Result<Chunk, BackendError>>,
        first: Option<Chunk>,
        deadline: Option<(Micros, Instant)>,
    ) -> Self {
        ledger.answering();
        let model = ledger.model(call);
        Self { id, call, model, machine, ledger, chunks: Some(chunks), first, deadline, alarm: None, last: None }
    }

    fn poll_backend(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, BackendError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let Some(chunks) = &mut self.chunks else { return Poll::Ready(None) };
        let next = std::task::ready!(chunks.poll_next_unpin(cx));
        if let Some(Ok(chunk)) = &next {
            self.ledger.piece(self.call, chunk);
        }
        Poll::Ready(next)
    }

    /// Ready when the deadline has passed.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Micros> {
        let Some((at, instant)) = self.deadline else { return Poll::Pending };
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(instant)));
        alarm.as_mut().poll(cx).map(|()| at)
    }

    /// The call has ended: tells the machine and writes the outcome that it decides upon.
    fn end(&mut self, event: Event, now: Micros, outcome: Result<Chunk, BackendError>) {
        self.machine.handle(event, now);
        while let Some(command) = self.machine.poll() {
            match command {
                Command::Finish { .. } => self.ledger.close(OutcomeStatus::Ok, None),
                Command::Fail { kind, .. } => self.ledger.close(OutcomeStatus::Error, Some(kind.as_str())),
                Command::Cancel { .. } => self.chunks = None,
                Command::Note(note) => self.ledger.note(note),
                // After a forward the machine only ends; there is nothing to start, forward or wait for.
                Command::Start { .. } | Command::Forward { .. } | Command::Emit { .. } | Command::SetTimer { .. } => {}
            }
        }
        let (id, model) = (self.id, self.model.clone());
        self.last = Some(outcome.map_err(|error| GatewayError::Backend { id, model, error }));
    }

    fn fail(&mut self, error: BackendError) {
        self.ledger.failed(self.call, &error);
        // Nothing follows, so that nobody asks who could be called.
        let event = failure(self.call, &error, self.ledger.cost(self.call), Vec::new());
        let now = self.ledger.now();
        self.end(event, now, Err(error));
    }
}

impl Stream for Answering {
    type Item = Result<Chunk, GatewayError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if this.last.is_some() {
                let recorded = std::task::ready!(this.ledger.poll_recorded(cx));
                this.chunks = None;
                let last = this.last.take();
                return Poll::Ready(match recorded {
                    Ok(()) => last,
                    Err(reason) => Some(Err(GatewayError::NotRecorded(reason))),
                });
            }
            if this.machine.ended() {
                return Poll::Ready(None);
            }
            match this.poll_backend(cx) {
                Poll::Ready(Some(Ok(Chunk::Usage(usage)))) => {
                    this.ledger.serves(this.call);
                    this.ledger.streamed(this.call, usage);
                    // Nothing that follows could change the answer, so that nobody asks what it says.
                    let answer = Arc::new(Answered::default());
                    let (event, now) = (Event::Done { call: this.call, answer }, this.ledger.now());
                    this.end(event, now, Ok(Chunk::Usage(usage)));
                }
                Poll::Ready(Some(Ok(chunk))) => {
                    this.ledger.serves(this.call);
                    return Poll::Ready(Some(Ok(chunk)));
                }
                Poll::Ready(Some(Err(error))) => this.fail(error),
                Poll::Ready(None) => {
                    let what = "the backend's stream ended before its answer did";
                    this.fail(BackendError::new(ErrorKind::Cut, what));
                }
                Poll::Pending => {
                    let at = std::task::ready!(this.poll_deadline(cx));
                    let stopped = this.ledger.stopped(this.call, true);
                    let error = stopped.unwrap_or_else(|| BackendError::new(ErrorKind::Timeout, "the deadline passed"));
                    let now = this.ledger.now().max(at);
                    this.end(Event::Timer(Timer::Deadline), now, Err(error));
                }
            }
        }
    }
}
