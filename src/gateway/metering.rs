//! Metrics of calls and of what plans decided, counted from the record: so they say what it says.

use std::time::Duration;

use async_trait::async_trait;

use crate::{
    audit::{Follower, Logged},
    domain::{Attempt, EventBody, FinishReason},
    telemetry::Metrics,
};

#[async_trait]
impl Follower for Metrics {
    async fn follow(&self, batch: &[Logged]) {
        for logged in batch {
            match &logged.event.body {
                EventBody::Attempt(attempt) => counted(self, attempt),
                EventBody::Note(note) => self.plan_note(&note.what.reason()),
                _ => {}
            }
        }
    }
}

fn counted(metrics: &Metrics, attempt: &Attempt) {
    let micros = |micros: i64| Duration::from_micros(u64::try_from(micros).unwrap_or(0));
    match &attempt.error {
        Some(error) => metrics.call_failed(&attempt.model, error),
        // How long it would have taken is not known.
        None if attempt.finish == Some(FinishReason::Cancelled) => metrics.tokens(&attempt.model, &attempt.usage),
        None => {
            let (took, first) = (micros(attempt.latency_us), attempt.ttft_us.map(micros));
            metrics.call(&attempt.model, took, first, &attempt.usage);
        }
    }
}
