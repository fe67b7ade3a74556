//! How fast the models were lately, as policies see it: means over each model's recent calls, in which a call counts a
//! fifth of all before it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    audit::{Follower, Logged},
    backend::Backend,
    domain::{Attempt, EventBody, ModelState, Request},
};

/// Weight of the newest call.
const NEWEST: f64 = 0.2;

/// Follows the log and keeps a mean per model; lost at a restart.
#[derive(Default)]
pub struct Speeds(Mutex<BTreeMap<String, Speed>>);

#[derive(Clone, Copy, Default)]
struct Speed {
    ttft_ms: f64,
    tokens_per_s: f64,
}

impl Speeds {
    /// Writes what is known of `model` into its state.
    pub fn fill(&self, model: &str, state: &mut ModelState) {
        if let Some(speed) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(model) {
            (state.ttft_ms, state.tokens_per_s) = (speed.ttft_ms, speed.tokens_per_s);
        }
    }

    /// A model's state as policies and plans see it: with what was measured of it, and, of a `request`, what its prompt is to the
    /// model.
    pub async fn state(&self, model: &str, backend: &dyn Backend, request: Option<&Arc<Request>>) -> ModelState {
        let mut state = backend.state();
        self.fill(model, &mut state);
        if let Some(request) = request
            && let Some(prompt) = backend.prompt(request).await
        {
            (state.prompt_tokens, state.resident_tokens) = (prompt.tokens, prompt.resident);
        }
        state
    }

    fn observe(&self, attempt: &Attempt) {
        let tokens = f64::from(attempt.usage.completion_tokens);
        if attempt.error.is_some() || tokens <= 0.0 || attempt.latency_us <= 0 {
            return;
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let speed = table.entry(attempt.model.clone()).or_default();
        let mix = |old: &mut f64, new: f64| *old = if *old == 0.0 { new } else { *old + NEWEST * (new - *old) };
        // An answer that came in one piece says nothing about its first token.
        let streamed = attempt.ttft_us.filter(|first| attempt.latency_us - first > 1_000 && tokens > 1.0);
        match streamed {
            Some(first) => {
                mix(&mut speed.ttft_ms, first as f64 / 1e3);
                mix(&mut speed.tokens_per_s, (tokens - 1.0) / ((attempt.latency_us - first) as f64 / 1e6));
            }
            None => mix(&mut speed.tokens_per_s, tokens / (attempt.latency_us as f64 / 1e6)),
        }
    }
}

#[async_trait]
impl Follower for Speeds {
    async fn follow(&self, batch: &[Logged]) {
        for logged in batch {
            if let EventBody::Attempt(attempt) = &logged.event.body {
                self.observe(attempt);
            }
        }
    }
}
