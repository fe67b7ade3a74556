//! What is measured of every request at the edge: count by route and status, time to the last byte, requests under way.
//! A stream is observed until its body is gone; a client that left counts as 499. Nothing here sees a body's content.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;

use super::{
    App,
    error::{ApiError, CLIENT_LEFT},
};
use crate::telemetry::Metrics;

/// Label of a path that no route has.
const OTHER: &str = "other";

/// One request under way; written down when dropped.
struct Observation {
    metrics: Arc<Metrics>,
    route: &'static str,
    status: AtomicU16,
    started: Instant,
}

impl Drop for Observation {
    fn drop(&mut self) {
        let (route, status, took) = (self.route, *self.status.get_mut(), self.started.elapsed());
        self.metrics.http_request(route, status, took);
        tracing::debug!(route, status, took_ms = took.as_secs_f64() * 1e3, "answered");
    }
}

/// The thread between a streamed body, which ends last, and the request's observation. The handler makes it, puts one
/// copy into the body and one into the response's extensions, where [`edge`] finds it.
#[derive(Clone, Default)]
pub(super) struct StreamObservation(Arc<OnceLock<Observation>>);

impl StreamObservation {
    /// The stream was sent whole (200), or ended with an error event that, had it come before the first byte, would have
    /// had this status.
    pub(super) fn ended(&self, status: u16) {
        if let Some(observation) = self.0.get() {
            observation.status.store(status, Ordering::Relaxed);
        }
    }
}

/// The outermost layer of every route: observes, and turns a panic into a 500.
pub(super) async fn edge(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or(OTHER, |path| label(path.as_str()));
    app.metrics.http_started();
    let observation = Observation {
        metrics: Arc::clone(&app.metrics),
        route,
        status: AtomicU16::new(CLIENT_LEFT),
        started: Instant::now(),
    };
    let mut response = match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            tracing::error!(route, "a handler panicked; this is a defect of weir");
            ApiError::internal("weir met a defect of its own; the log on its standard error says more.").into_response()
        }
    };
    match response.extensions_mut().remove::<StreamObservation>() {
        // From here on the body decides.
        Some(stream) => {
            if stream.0.set(observation).is_err() {
                tracing::debug!(route, "a stream was observed twice");
            }
        }
        None => observation.status.store(response.status().as_u16(), Ordering::Relaxed),
    }
    response
}

fn label(path: &str) -> &'static str {
    super::ROUTES.iter().find(|route| **route == path).copied().unwrap_or(OTHER)
}
