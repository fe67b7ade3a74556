//! A backend behind a circuit breaker ([`crate::cascade::breaker`]): what its calls come to is counted, and while it is left alone calls fail
//! at once, with the kind `breaker_open`, which a policy's fallback always answers.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::{Stream, StreamExt, stream::BoxStream};

use super::{Backend, BackendError, Call, Reply};
use crate::{
    cascade::breaker::{Breaker, BreakerPolicy, BreakerState, Verdict},
    domain::{Chunk, ErrorKind, Micros, ModelState},
};

/// A breaker that has changed.
#[derive(Clone, Debug)]
pub struct BreakerChange {
    pub model: String,
    pub state: BreakerState,
    /// Why, for people.
    pub detail: String,
}

/// Whom a change is told, in the order of the changes. It is told while the breaker is held, and so must not wait.
pub type Listener = Arc<dyn Fn(BreakerChange) + Send + Sync>;

/// A backend and its breaker.
pub struct Guarded {
    inner: Arc<dyn Backend>,
    guard: Arc<Guard>,
}

struct Guard {
    model: String,
    breaker: Mutex<Breaker>,
    started: Instant,
    listener: Listener,
}

/// One call that went through. Dropped before its end it says nothing of the model, unless the request's deadline had passed.
struct Pass {
    guard: Arc<Guard>,
    then: BreakerState,
    deadline: Option<Instant>,
    ended: bool,
}

impl Guard {
    fn now(&self) -> Micros {
        Micros::try_from(self.started.elapsed().as_micros()).unwrap_or(Micros::MAX)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the breaker, and tells what it has become.
    fn change<T>(&self, detail: &str, what: impl FnOnce(&mut Breaker, Micros) -> T) -> T {
        let mut breaker = self.breaker();
        // Not before: another call's end may have come between, and with it another moment.
        let now = self.now();
        // An open one whose time is up is told of when a call goes through.
        let before = breaker.as_it_was();
        let out = what(&mut breaker, now);
        let after = breaker.as_it_was();
        if before.as_str() != after.as_str() {
            let detail = match after {
                BreakerState::Open { until } => {
                    format!("{detail}; left alone for {:.0} s", (until - now) as f64 / 1e6)
                }
                _ => detail.to_owned(),
            };
            (self.listener)(BreakerChange { model: self.model.clone(), state: after, detail });
        }
        out
    }

    fn enter(self: &Arc<Self>, deadline: Option<Instant>) -> Result<Pass, BackendError> {
        let now = self.now();
        let then = self.change("its time is up: one call at a time, to see", |breaker, now| {
            breaker.enter(now).then(|| breaker.state(now))
        });
        if let Some(then) = then {
            return Ok(Pass { guard: Arc::clone(self), then, deadline, ended: false });
        }
        let wait = match self.breaker().state(now) {
            BreakerState::Open { until } => Duration::from_micros((until - now).max(0) as u64),
            _ => Duration::from_secs(1),
        };
        let message = format!(
            "model `{}` is left alone for {:.0} s more, as its calls kept failing (`weir models running`)",
            self.model,
            wait.as_secs_f64().ceil()
        );
        Err(BackendError { retry_after: Some(wait), ..BackendError::new(ErrorKind::BreakerOpen, message) })
    }
}

impl Pass {
    fn end(&mut self, verdict: Verdict, why: &str) {
        if !std::mem::replace(&mut self.ended, true) {
            let then = self.then;
            self.guard.change(why, |breaker, now| breaker.end(then, verdict, now));
        }
    }

    fn failed(&mut self, error: &BackendError) {
        let (bad, all) = self.guard.breaker().failed();
        let why = format!("{} of its last {} calls failed, this one by {}", bad + 1, all + 1, error.kind.as_str());
        self.end(Verdict::of(error.kind), &why);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        match self.deadline {
            _ if self.ended => {}
            Some(deadline) if deadline <= Instant::now() => self.failed(&BackendError::new(ErrorKind::Timeout, "")),
            _ => self.end(Verdict::Neither, ""),
        }
    }
}

/// A stream whose end is noted.
struct Watched {
    chunks: BoxStream<'static, Result<Chunk, BackendError>>,
    pass: Pass,
}

impl Stream for Watched {
    type Item = Result<Chunk, BackendError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.chunks.poll_next_unpin(cx));
        match &item {
            Some(Ok(Chunk::Usage(_))) => self.pass.end(Verdict::Good, "its calls go well again"),
            Some(Ok(_)) => {}
            Some(Err(error)) => self.pass.failed(error),
            None => self.pass.failed(&BackendError::new(ErrorKind::Cut, "")),
        }
        Poll::Ready(item)
    }
}

impl Guarded {
    /// `inner`, left alone when its calls keep failing.
    pub fn new(inner: Arc<dyn Backend>, model: impl Into<String>, policy: BreakerPolicy, listener: Listener) -> Self {
        let breaker = Mutex::new(Breaker::new(policy));
        let guard = Guard { model: model.into(), breaker, started: Instant::now(), listener };
        Self { inner, guard: Arc::new(guard) }
    }
}

#[async_trait]
impl Backend for Guarded {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn inner(&self) -> Option<&dyn Backend> {
        Some(&*self.inner)
    }

    async fn start(&self, call: Call) -> Result<Reply, BackendError> {
        let mut pass = self.guard.enter(call.deadline)?;
        match self.inner.start(call).await {
            Ok(Reply::Stream { chunks, model_reported }) => {
                Ok(Reply::Stream { chunks: Watched { chunks, pass }.boxed(), model_reported })
            }
            Ok(whole) => {
                pass.end(Verdict::Good, "its calls go well again");
                Ok(whole)
            }
            Err(error) => {
                pass.failed(&error);
                Err(error)
            }
        }
    }

    fn state(&self) -> ModelState {
        let state = self.inner.state();
        let (admits, (bad, all)) = {
            let breaker = self.guard.breaker();
            (breaker.admits(self.guard.now()), breaker.failed())
        };
        let failed_share = if all == 0 { 0.0 } else { bad as f64 / all as f64 };
        ModelState { available: state.available && admits, failed_share, ..state }
    }

    fn breaker(&self) -> Option<BreakerState> {
        Some(self.guard.breaker().state(self.guard.now()))
    }
}

#[cfg(test)]
mod tests;
