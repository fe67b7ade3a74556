//! Places: how many calls a backend runs at once, how many wait for a place, and the two counts that policies see.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::BackendError;
use crate::domain::{ErrorKind, ModelState};

/// The places of one backend.
#[derive(Debug)]
pub(super) struct Slots {
    places: Option<Arc<Semaphore>>,
    max_waiting: u32,
    patience: Duration,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    running: AtomicU32,
    waiting: AtomicU32,
}

/// A place taken; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    counts: Arc<Counts>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.counts.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One that waits; counted until dropped.
struct Waiting<'a>(&'a Counts);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Slots {
    /// At most `max_concurrent` calls at once (`None`: any number), at most `max_waiting` more waiting, each for at most
    /// `patience`.
    pub(super) fn new(max_concurrent: Option<u32>, max_waiting: u32, patience: Duration) -> Self {
        let places = max_concurrent.map(|n| Arc::new(Semaphore::new(n as usize)));
        Self { places, max_waiting, patience, counts: Arc::default() }
    }

    /// Takes a place, waiting for one if need be.
    ///
    /// # Errors
    /// `rate_limited` when too many wait already, or none came free in time.
    pub(super) async fn take(&self, model: &str) -> Result<Slot, BackendError> {
        let permit = match &self.places {
            None => None,
            Some(places) => Some(match Arc::clone(places).try_acquire_owned() {
                Ok(permit) => permit,
                Err(_) => self.wait(places, model).await?,
            }),
        };
        self.counts.running.fetch_add(1, Ordering::Relaxed);
        Ok(Slot { counts: Arc::clone(&self.counts), _permit: permit })
    }

    async fn wait(&self, places: &Arc<Semaphore>, model: &str) -> Result<OwnedSemaphorePermit, BackendError> {
        let before = self.counts.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.counts);
        let busy = |why: &str| {
            BackendError::new(
                ErrorKind::RateLimited,
                format!("all places of model `{model}` are taken ({why}); raise its max_concurrent, or try again"),
            )
        };
        if before >= self.max_waiting {
            return Err(busy(&format!("{before} calls are waiting already")));
        }
        match tokio::time::timeout(self.patience, Arc::clone(places).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(BackendError::new(ErrorKind::Cancelled, format!("model `{model}` is stopping"))),
            Err(_) => Err(busy(&format!("none came free within {:?}", self.patience))),
        }
    }

    pub(super) fn state(&self) -> ModelState {
        ModelState {
            available: true,
            running: self.counts.running.load(Ordering::Relaxed),
            waiting: self.counts.waiting.load(Ordering::Relaxed),
            ..ModelState::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_are_counted_given_back_and_refused() {
        let slots = Slots::new(Some(1), 1, Duration::from_secs(3600));
        let first = slots.take("m").await.unwrap();
        assert_eq!((slots.state().running, slots.state().waiting), (1, 0));
        let mut second = Box::pin(slots.take("m"));
        assert!(futures_util::FutureExt::now_or_never(&mut second).is_none());
        assert_eq!((slots.state().running, slots.state().waiting), (1, 1));
        assert_eq!(slots.take("m").await.unwrap_err().kind, ErrorKind::RateLimited);
        drop(first);
        let second = second.await.unwrap();
        assert_eq!((slots.state().running, slots.state().waiting), (1, 0));
        drop(second);
        assert_eq!(slots.state().running, 0);
    }

    #[tokio::test]
    async fn patience_ends() {
        let slots = Slots::new(Some(0), 1, Duration::from_millis(1));
        assert_eq!(slots.take("m").await.unwrap_err().kind, ErrorKind::RateLimited);
        assert_eq!(slots.state(), ModelState { available: true, running: 0, waiting: 0, ..ModelState::default() });
    }
}
