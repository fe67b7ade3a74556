//! From the log to the store: a task that follows the log, takes events in order in batches, puts them into the store
//! and then hands them to whoever follows (the learner). A store that is down is tried again for as long as it takes;
//! requests do not notice, the log holds what is to come.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    log::{EventLog, LogError},
    reader::LogReader,
    record::Logged,
    store::{AuditStore, StoreError},
};
use crate::domain::{Admin, Event, EventBody, Micros, Outcome, OutcomeStatus, Usage};

/// Gets every event once it is in the store, in order.
#[async_trait]
pub trait Follower: Send + Sync {
    /// The next events of the log, at least one. Awaited: the feeder goes on when this returns.
    async fn follow(&self, batch: &[Logged]);
}

/// Several followers, one after the other.
#[async_trait]
impl Follower for Vec<Arc<dyn Follower>> {
    async fn follow(&self, batch: &[Logged]) {
        for follower in self {
            follower.follow(batch).await;
        }
    }
}

/// How events are batched, and how a store that is down is tried.
#[derive(Clone, Debug)]
pub struct FeederOptions {
    /// Most events of one transaction.
    pub max_events: usize,
    /// Most bytes of one transaction (one larger event still goes, alone).
    pub max_bytes: usize,
    /// How long the first event of a batch may wait for more.
    pub gather: Duration,
    /// Wait before the second try; doubled for each further one.
    pub backoff: Duration,
    pub max_backoff: Duration,
}

impl Default for FeederOptions {
    fn default() -> Self {
        Self {
            max_events: 512,
            max_bytes: 8 << 20,
            gather: Duration::from_millis(25),
            backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
        }
    }
}

/// Why [`Feeder::flush`] gave up waiting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store has events up to {have} of {wanted}{}", error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default())]
pub struct FlushError {
    pub wanted: u64,
    pub have: u64,
    /// The store's last error, when it is failing.
    pub error: Option<String>,
}

#[derive(Default)]
struct Shared {
    error: Mutex<Option<String>>,
    /// Someone waits for the store: no gathering.
    hurry: Notify,
    /// Stop when all is in.
    stop: Notify,
}

/// Handle of the feeding task, which ends when it is dropped.
pub struct Feeder {
    log: EventLog,
    fed: watch::Receiver<u64>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Feeder {
    /// Starts feeding. Asks the store first where it is: should it be ahead of the log (the log was deleted, or a power
    /// cut took its end), the log goes on where the store ends. Call this before anything is appended.
    ///
    /// A store that does not answer within two seconds is tried again by the task.
    ///
    /// # Errors
    /// When the log cannot be read or written.
    pub async fn start(
        log: EventLog,
        store: Arc<dyn AuditStore>,
        follower: Option<Arc<dyn Follower>>,
        options: FeederOptions,
    ) -> Result<Self, LogError> {
        let shared = Arc::new(Shared::default());
        log.keep_recent();
        let cursor = match timeout(Duration::from_secs(2), store.replicas()).await {
            Ok(Ok(replicas)) => Some(replicas.into_iter().find(|c| c.replica == log.replica())),
            Ok(Err(error)) => {
                shared.note(Some(&error.to_string()));
                None
            }
            Err(_) => {
                shared.note(Some("the store did not answer within two seconds"));
                None
            }
        };
        if let Some(Some(cursor)) = &cursor
            && cursor.seq > log.last_seq()
        {
            tracing::warn!(
                log = log.last_seq(),
                store = cursor.seq,
                "the event log ends before the store does and goes on after the store's last event"
            );
            log.fast_forward(cursor.seq, cursor.hash)?;
        }
        let start = cursor.map(|cursor| cursor.map_or(0, |c| c.seq));
        let (sender, fed) = watch::channel(start.unwrap_or(0));
        let reader = log.read_from(start.unwrap_or(0) + 1)?;
        let appended = log.subscribe();
        let feed =
            Feed { log: log.clone(), store, follower, options, shared: shared.clone(), reader, appended, fed: sender };
        let task = tokio::spawn(feed.run(start));
        Ok(Self { log, fed, shared, task })
    }

    /// The last event that the store has, as far as this feeder knows.
    pub fn fed(&self) -> u64 {
        *self.fed.borrow()
    }

    /// Events in the log that the store does not have.
    pub fn lag(&self) -> u64 {
        self.log.last_seq().saturating_sub(self.fed())
    }

    /// Why the store takes nothing; `None` while it does.
    pub fn last_error(&self) -> Option<String> {
        self.shared.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the store has event `seq` and the follower has seen it.
    ///
    /// # Errors
    /// When that has not happened after `limit`.
    pub async fn flush(&self, seq: u64, limit: Duration) -> Result<(), FlushError> {
        let mut fed = self.fed.clone();
        self.shared.hurry.notify_one();
        let done = timeout(limit, fed.wait_for(|&have| have >= seq)).await;
        match done {
            Ok(Ok(_)) => Ok(()),
            _ => Err(FlushError { wanted: seq, have: self.fed(), error: self.last_error() }),
        }
    }

    /// Feeds all that the log holds now and ends, or ends after `limit`; what is left is fed at the next start.
    ///
    /// # Errors
    /// When events are left.
    pub async fn stop(mut self, limit: Duration) -> Result<(), FlushError> {
        let result = self.flush(self.log.last_seq(), limit).await;
        self.shared.stop.notify_one();
        if timeout(Duration::from_secs(1), &mut self.task).await.is_err() {
            self.task.abort();
        }
        result
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    /// Keeps what the store's state is and says so once per change.
    fn note(&self, now: Option<&str>) {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*error, now) {
            (None, Some(now)) => tracing::warn!(error = now, "the store takes no events; the event log keeps them"),
            (Some(_), None) => tracing::info!("the store takes events again"),
            _ => {}
        }
        *error = now.map(str::to_owned);
    }
}

struct Feed {
    log: EventLog,
    store: Arc<dyn AuditStore>,
    follower: Option<Arc<dyn Follower>>,
    options: FeederOptions,
    shared: Arc<Shared>,
    reader: LogReader,
    appended: watch::Receiver<u64>,
    fed: watch::Sender<u64>,
}

impl Feed {
    async fn run(mut self, start: Option<u64>) {
        let mut have = match start {
            Some(have) => have,
            None => self.ask_cursor().await,
        };
        self.fed.send_replace(have);
        let shared = self.shared.clone();
        loop {
            tokio::select! {
                biased;
                () = shared.stop.notified() => return,
                more = self.more(have) => if !more { return },
            }
            let batch = match self.next_batch(have + 1) {
                Ok(batch) if batch.is_empty() => {
                    // The log's end was moved (fast-forward) or its files are gone: nothing to do but wait.
                    sleep(self.options.backoff).await;
                    continue;
                }
                Ok(batch) => batch,
                Err(error) => {
                    self.shared.note(Some(&error.to_string()));
                    sleep(self.options.max_backoff).await;
                    continue;
                }
            };
            let Some(last) = batch.last().map(|logged| logged.seq) else { continue };
            self.put(&batch).await;
            if let Some(follower) = &self.follower {
                follower.follow(&batch).await;
            }
            have = last;
            self.fed.send_replace(have);
            if let Err(error) = self.log.remove_ingested(have) {
                tracing::warn!(%error, "old segments of the event log cannot be removed");
            }
        }
    }

    async fn ask_cursor(&mut self) -> u64 {
        let mut wait = self.options.backoff;
        loop {
            match self.store.cursor(self.log.replica()).await {
                Ok(seq) => {
                    self.shared.note(None);
                    return seq;
                }
                Err(error) => self.shared.note(Some(&error.to_string())),
            }
            sleep(wait).await;
            wait = (wait * 2).min(self.options.max_backoff);
        }
    }

    /// Waits for events after `have`, and a little for more of them. `false`: the log is gone.
    async fn more(&mut self, have: u64) -> bool {
        if self.appended.wait_for(|&last| last > have).await.is_err() {
            return false;
        }
        let enough = have + self.options.max_events as u64;
        let until = Instant::now() + self.options.gather;
        tokio::select! {
            () = self.shared.hurry.notified() => {}
            _ = tokio::time::timeout_at(until, self.appended.wait_for(|&last| last >= enough)) => {}
        }
        true
    }

    fn next_batch(&mut self, from: u64) -> Result<Vec<Logged>, LogError> {
        if let Some(batch) = self.log.take_recent(from, self.options.max_events) {
            return Ok(batch);
        }
        self.reader.seek(from);
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < self.options.max_events && bytes < self.options.max_bytes {
            let Some(logged) = self.reader.read()? else { break };
            bytes += logged.size();
            batch.push(logged);
        }
        Ok(batch)
    }

    async fn put(&self, batch: &[Logged]) {
        let mut wait = self.options.backoff;
        loop {
            match self.store.ingest(batch).await {
                Ok(()) => {
                    self.shared.note(None);
                    return;
                }
                Err(error) => self.shared.note(Some(&error.to_string())),
            }
            sleep(wait).await;
            wait = (wait * 2).min(self.options.max_backoff);
        }
    }
}

/// Puts right what an earlier run left: every decision of this log's replica that never got an outcome gets one,
/// `interrupted`; and what opening the log had to cut off is recorded. Gives back how many decisions were closed.
///
/// Call it at the start, with the store caught up ([`Feeder::flush`] of the log's last event) and before serving.
/// Latency and tokens of an interrupted request are not known and stand as 0.
///
/// # Errors
/// When the store cannot be asked, or the log not written.
pub async fn close_interrupted(log: &EventLog, store: &dyn AuditStore, now: Micros) -> Result<usize, StoreError> {
    let mut events = Vec::new();
    if let Some(cut) = log.recovery() {
        let detail = format!(
            "{} bytes cut off {} at byte {} ({}); kept in {}",
            cut.dropped,
            cut.segment.display(),
            cut.offset,
            cut.fault,
            cut.kept.display()
        );
        events.push(Event::new(now, None, EventBody::Admin(Admin { action: "log_recovered".to_owned(), detail })));
    }
    let open = store.open_decisions(log.replica()).await?;
    let closed = open.len();
    events.extend(open.into_iter().map(|decision| {
        let outcome = Outcome {
            status: OutcomeStatus::Interrupted,
            served_by: String::new(),
            attempts: decision.attempts,
            cost_usd: decision.cost_usd,
            joules: None,
            latency_us: 0,
            ttft_us: None,
            usage: Usage::default(),
            error: Some("interrupted".to_owned()),
            answer_hash: None,
        };
        Event::new(now, Some(decision.id), EventBody::Outcome(outcome))
    }));
    if !events.is_empty() {
        log.append(events).await?;
    }
    Ok(closed)
}
