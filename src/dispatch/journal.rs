//! The event log as what dispatch and gateway write to, with the operator's choice of what a failing one means.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;

use super::Journal;
use crate::{audit::EventLog, domain::Event};

/// Appends to the event log, and knows whether the last append went right.
pub struct LogJournal {
    log: EventLog,
    /// Whether a request that cannot be recorded is refused (`record.when_log_fails: refuse`).
    or_refuse: bool,
    failing: Mutex<Option<String>>,
}

impl LogJournal {
    /// A journal over `log`.
    pub fn new(log: EventLog, or_refuse: bool) -> Self {
        Self { log, or_refuse, failing: Mutex::default() }
    }

    /// Why the last append failed; `None` when it went right.
    pub fn failing(&self) -> Option<String> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether requests are refused while the log fails.
    pub fn refuses(&self) -> bool {
        self.or_refuse
    }

    fn note(&self, now: Option<String>) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*failing, &now) {
            (None, Some(error)) if self.or_refuse => {
                tracing::error!(error, "the event log cannot be written: requests are refused until it can");
            }
            (None, Some(error)) => {
                tracing::error!(error, "the event log cannot be written: requests are served without a record");
            }
            (Some(_), None) => tracing::warn!("the event log can be written again"),
            _ => {}
        }
        *failing = now;
    }
}

#[async_trait]
impl Journal for LogJournal {
    async fn append(&self, events: Vec<Event>) -> Result<(), String> {
        match self.log.append(events).await {
            Ok(_) => {
                self.note(None);
                Ok(())
            }
            Err(error) => {
                let error = error.to_string();
                self.note(Some(error.clone()));
                if self.or_refuse { Err(error) } else { Ok(()) }
            }
        }
    }
}
