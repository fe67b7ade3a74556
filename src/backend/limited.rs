//! A backend that is given as many calls at once as it bears ([`crate::cascade::limiter`]): what each call comes to moves the limit, and a
//! call beyond it waits in order for a place.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::{Stream, StreamExt, stream::BoxStream};
use tokio::sync::oneshot;

use super::{Backend, BackendError, Call, Reply};
use crate::{
    cascade::limiter::{Limiter, Permit, Verdict},
    domain::{Chunk, ErrorKind, Micros, ModelState},
};

/// A backend and the limit of its calls.
pub struct Limited {
    inner: Arc<dyn Backend>,
    gate: Arc<Gate>,
}

/// Who may call now, and who waits.
struct Gate {
    model: String,
    max_waiting: usize,
    patience: Duration,
    started: Instant,
    queue: Mutex<Queue>,
}

struct Queue {
    limiter: Limiter,
    /// In the order in which they came.
    waiting: VecDeque<(u64, oneshot::Sender<Place>)>,
    next: u64,
}

/// A place under the limit. Dropped before its call's end it says nothing of the server's load, unless the request's deadline had passed.
struct Place {
    gate: Arc<Gate>,
    permit: Option<Permit>,
    began: Micros,
    /// Time to the first piece of a stream.
    ttft_us: Option<i64>,
    deadline: Option<Instant>,
}

/// One that waits; out of the queue when dropped.
struct Waiting<'a> {
    gate: &'a Gate,
    number: u64,
}

enum Asked<'a> {
    Goes(Place),
    Waits(Waiting<'a>, oneshot::Receiver<Place>),
}

impl Gate {
    fn now(&self) -> Micros {
        Micros::try_from(self.started.elapsed().as_micros()).unwrap_or(Micros::MAX)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(self: &Arc<Self>, permit: Permit) -> Place {
        Place { gate: Arc::clone(self), permit: Some(permit), began: self.now(), ttft_us: None, deadline: None }
    }

    /// Takes a place, waiting for one if need be.
    ///
    /// # Errors
    /// `rate_limited` when too many wait already, or none came free in time.
    async fn take(self: &Arc<Self>, deadline: Option<Instant>) -> Result<Place, BackendError> {
        let mut place = match self.ask()? {
            Asked::Goes(place) => place,
            Asked::Waits(waiting, place) => self.wait(waiting, place, deadline).await?,
        };
        (place.began, place.deadline) = (self.now(), deadline);
        Ok(place)
    }

    fn ask(self: &Arc<Self>) -> Result<Asked<'_>, BackendError> {
        let mut queue = self.queue();
        // Whoever comes later does not overtake.
        if queue.waiting.is_empty()
            && let Some(permit) = queue.limiter.admit()
        {
            return Ok(Asked::Goes(self.place(permit)));
        }
        let (waiting, limit) = (queue.waiting.len(), queue.limiter.limit());
        if waiting >= self.max_waiting {
            return Err(self.busy(limit, &format!("{waiting} calls are waiting already")));
        }
        let (sender, place) = oneshot::channel();
        let number = queue.next;
        queue.next += 1;
        queue.waiting.push_back((number, sender));
        Ok(Asked::Waits(Waiting { gate: self, number }, place))
    }

    async fn wait(
        &self,
        waiting: Waiting<'_>,
        place: oneshot::Receiver<Place>,
        deadline: Option<Instant>,
    ) -> Result<Place, BackendError> {
        let patience = tokio::time::Instant::now() + self.patience;
        let until = deadline.map_or(patience, |deadline| patience.min(deadline.into()));
        let got = tokio::time::timeout_at(until, place).await;
        drop(waiting);
        match got {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) => Err(BackendError::new(ErrorKind::Cancelled, format!("model `{}` is stopping", self.model))),
            Err(_) => Err(self.busy(self.queue().limiter.limit(), "none came free in time")),
        }
    }

    fn busy(&self, limit: u32, why: &str) -> BackendError {
        let message = format!(
            "model `{}` is given {limit} calls at once, as its server bears no more now, and all places are taken ({why})",
            self.model
        );
        BackendError::new(ErrorKind::RateLimited, message)
    }

    fn give_back(self: &Arc<Self>, permit: Permit, verdict: Verdict, ttft_us: Option<i64>) {
        let mut free = Vec::new();
        {
            let mut queue = self.queue();
            if let Some(moved) = queue.limiter.ended(permit, verdict, ttft_us, self.now()) {
                let because = moved.because.as_str();
                tracing::debug!(model = self.model, from = moved.from, to = moved.to, because, "calls at once");
            }
            while !queue.waiting.is_empty()
                && let Some(permit) = queue.limiter.admit()
            {
                free.extend(queue.waiting.pop_front().map(|(_, first)| (first, self.place(permit))));
            }
        }
        // Not while the queue is held: who has left meanwhile gives the place back at once.
        free.into_iter().for_each(|(first, place)| _ = first.send(place));
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.gate.queue().waiting.retain(|(number, _)| *number != self.number);
    }
}

impl Place {
    fn end(&mut self, verdict: Verdict) {
        if let Some(permit) = self.permit.take() {
            self.gate.give_back(permit, verdict, self.ttft_us);
        }
    }

    fn failed(&mut self, error: &BackendError) {
        self.end(Verdict::of(error.kind, error.status));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        self.end(if late { Verdict::Congested } else { Verdict::Neutral });
    }
}

/// A stream whose end gives the place back.
struct Held {
    chunks: BoxStream<'static, Result<Chunk, BackendError>>,
    place: Place,
}

impl Stream for Held {
    type Item = Result<Chunk, BackendError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.chunks.poll_next_unpin(cx));
        if self.place.ttft_us.is_none() {
            self.place.ttft_us = Some(self.place.gate.now().saturating_sub(self.place.began));
        }
        match &item {
            Some(Ok(Chunk::Usage(_))) => self.place.end(Verdict::Success),
            Some(Ok(_)) => {}
            Some(Err(error)) => self.place.failed(error),
            None => self.place.end(Verdict::Neutral),
        }
        Poll::Ready(item)
    }
}

impl Limited {
    /// `inner`, given as many calls at once as `limiter` says; `max_waiting` more wait for a place, each for at most `patience` and not
    /// beyond its request's deadline.
    pub fn new(
        inner: Arc<dyn Backend>,
        model: impl Into<String>,
        limiter: Limiter,
        max_waiting: usize,
        patience: Duration,
    ) -> Self {
        let queue = Mutex::new(Queue { limiter, waiting: VecDeque::new(), next: 0 });
        let gate = Gate { model: model.into(), max_waiting, patience, started: Instant::now(), queue };
        Self { inner, gate: Arc::new(gate) }
    }
}

#[async_trait]
impl Backend for Limited {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn inner(&self) -> Option<&dyn Backend> {
        Some(&*self.inner)
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let mut place = self.gate.take(call.deadline).await?;
        match self.inner.start(call).await {
            Ok(Reply::Stream { chunks, model_reported }) => {
                Ok(Reply::Stream { chunks: Held { chunks, place }.boxed(), model_reported })
            }
            Ok(whole) => {
                place.end(Verdict::Success);
                Ok(whole)
            }
            Err(error) => {
                place.failed(&error);
                Err(error)
            }
        }
    }

    fn state(&self) -> ModelState {
        let state = self.inner.state();
        let waiting = u32::try_from(self.gate.queue().waiting.len()).unwrap_or(u32::MAX);
        ModelState { waiting: state.waiting.saturating_add(waiting), ..state }
    }

    fn concurrency_limit(&self) -> Option<u32> {
        Some(self.gate.queue().limiter.limit())
    }
}

#[cfg(test)]
mod tests;
