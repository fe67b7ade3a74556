//! Logs and metrics. Logs go to stderr, one line per event, filtered by `WEIR_LOG`; metrics are OpenMetrics text. Names
//! follow OpenTelemetry's GenAI and HTTP conventions ([`names`]). Prompts and completions are in neither: labels come from
//! closed sets or from the configuration, and log fields are ids, labels, counts and times.

pub mod names;

use std::{io, sync::atomic::Ordering, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::domain::{Counters, DecidedBy, Usage};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{variable}={filter} is no log filter: {reason}; examples: `info`, `weir=debug,sqlx=warn`")]
    Filter { variable: &'static str, filter: String, reason: String },
    #[error("logging was started twice")]
    Twice,
}

impl TelemetryError {
    /// Fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            TelemetryError::Filter { .. } => "filter",
            TelemetryError::Twice => "twice",
        }
    }
}

/// The filter where `WEIR_LOG` says nothing.
pub const DEFAULT_FILTER: &str = "info";
/// The variable that holds the filter.
pub const FILTER_VARIABLE: &str = "WEIR_LOG";

/// Starts logging to stderr for the whole process.
///
/// # Errors
/// When `WEIR_LOG` is no filter, or a subscriber is installed already.
pub fn init(format: LogFormat) -> Result<(), TelemetryError> {
    let filter = std::env::var(FILTER_VARIABLE).unwrap_or_default();
    let filter = if filter.is_empty() { DEFAULT_FILTER.to_owned() } else { filter };
    subscriber(format, &filter, io::stderr)?.try_init().map_err(|_| TelemetryError::Twice)
}

/// A subscriber that writes to `writer`; what [`init`] installs, and what tests read from.
///
/// # Errors
/// When `filter` is none.
pub fn subscriber<W>(
    format: LogFormat,
    filter: &str,
    writer: W,
) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, TelemetryError>
where
    W: for<'a> fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).map_err(|e| TelemetryError::Filter {
        variable: FILTER_VARIABLE,
        filter: filter.to_owned(),
        reason: e.to_string(),
    })?;
    let registry = tracing_subscriber::registry().with(filter);
    Ok(match format {
        LogFormat::Text => {
            let ansi = io::IsTerminal::is_terminal(&io::stderr());
            Box::new(registry.with(fmt::layer().with_writer(writer).with_ansi(ansi).with_target(false)))
        }
        LogFormat::Json => Box::new(registry.with(fmt::layer().json().flatten_event(true).with_writer(writer))),
    })
}

/// Makes panics log where they happened, and what only where the message is a literal. The standard hook prints every
/// message, and those of `str` quote the text that was cut, which may be a prompt. For `weir serve`.
pub fn withhold_panic_messages() {
    std::panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let what = panic_message(info.payload());
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(location, %backtrace, "weir met a defect of its own: {what}");
    }));
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("(the message is withheld: it may quote a request)")
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabels {
    http_route: &'static str,
    http_response_status_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    http_route: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    gen_ai_request_model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    gen_ai_request_model: String,
    gen_ai_token_type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    weir_policy: String,
    weir_arm: String,
    weir_decided_by: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    gen_ai_request_model: String,
    error_type: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoteLabels {
    weir_reason: String,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics of a weir. Recording takes a hash lookup under a read lock (about 100 ns) and never waits for a scrape.
pub struct Metrics {
    registry: Registry,
    http_requests: Family<HttpLabels, Counter>,
    http_duration: Histograms<RouteLabels>,
    http_active: Gauge,
    duration: Histograms<ModelLabels>,
    ttft: Histograms<ModelLabels>,
    tokens: Family<TokenLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
    decisions: Family<DecisionLabels, Counter>,
    decide: Histogram,
    log_seq: Gauge,
    store_lag: Gauge,
    learner_lag: Gauge,
    engine_tokens: Family<TokenLabels, Counter>,
    engine_kept: Family<ModelLabels, Gauge>,
    engine_preemptions: Family<ModelLabels, Counter>,
    concurrency_limit: Family<ModelLabels, Gauge>,
    plan_notes: Family<NoteLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Fresh metrics, all zero.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let build = Family::<Vec<(String, String)>, Gauge>::default();
        build.get_or_create(&vec![("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]).set(1);
        registry.register(names::BUILD_INFO, "Which weir this is; always 1", build);

        let metrics = Self {
            http_requests: Family::default(),
            http_duration: Family::new_with_constructor(durations),
            http_active: Gauge::default(),
            duration: Family::new_with_constructor(durations),
            ttft: Family::new_with_constructor(durations),
            tokens: Family::default(),
            errors: Family::default(),
            decisions: Family::default(),
            decide: Histogram::new(DECIDE_BUCKETS),
            log_seq: Gauge::default(),
            store_lag: Gauge::default(),
            learner_lag: Gauge::default(),
            engine_tokens: Family::default(),
            engine_kept: Family::default(),
            engine_preemptions: Family::default(),
            concurrency_limit: Family::default(),
            plan_notes: Family::default(),
            registry,
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register(
            names::HTTP_REQUESTS,
            "Requests by route and status; 499: the client left",
            self.http_requests.clone(),
        );
        r.register_with_unit(
            names::HTTP_DURATION,
            "Time from a request's head to the last byte of its answer",
            Unit::Seconds,
            self.http_duration.clone(),
        );
        r.register(names::HTTP_ACTIVE, "Requests under way", self.http_active.clone());
        r.register_with_unit(
            names::OPERATION_DURATION,
            "Time that one call of a model took",
            Unit::Seconds,
            self.duration.clone(),
        );
        r.register_with_unit(
            names::TIME_TO_FIRST_TOKEN,
            "Time from the start of a call to its first token",
            Unit::Seconds,
            self.ttft.clone(),
        );
        r.register(names::TOKENS, "Tokens by model: input, cached (of the input), output", self.tokens.clone());
        r.register(names::ERRORS, "Failed calls by model and kind", self.errors.clone());
        r.register(names::DECISIONS, "Decisions by policy, arm and what decided", self.decisions.clone());
        r.register_with_unit(
            names::DECIDE_DURATION,
            "Time to decide, embedding excluded",
            Unit::Seconds,
            self.decide.clone(),
        );
        r.register(names::LOG_SEQ, "Sequence number of the last event in the log", self.log_seq.clone());
        r.register(names::STORE_LAG, "Events in the log that the store does not have yet", self.store_lag.clone());
        r.register(names::LEARNER_LAG, "Events in the log that the learner has not seen yet", self.learner_lag.clone());
        r.register(
            names::ENGINE_TOKENS,
            "Tokens of in-process models: prefilled, reused, decoded, recomputed, guessed, guessed_right",
            self.engine_tokens.clone(),
        );
        r.register(names::ENGINE_KEPT, "Tokens whose keys and values are kept for reuse", self.engine_kept.clone());
        r.register(
            names::ENGINE_PREEMPTIONS,
            "Times that a sequence gave its blocks to others",
            self.engine_preemptions.clone(),
        );
        r.register(
            names::PLAN_NOTES,
            "What plans decided as they ran, by reason: gate_fails, escalated, retry_denied and the like",
            self.plan_notes.clone(),
        );
        r.register(
            names::CONCURRENCY_LIMIT,
            "Calls at once that a server is given, where adapted to what it bears",
            self.concurrency_limit.clone(),
        );
        self
    }

    /// A request has begun; [`Self::http_request`] ends it.
    pub fn http_started(&self) {
        self.http_active.inc();
    }

    /// A request has ended. `route` is a path pattern, of a closed set.
    pub fn http_request(&self, route: &'static str, status: u16, took: Duration) {
        self.http_active.dec();
        let labels = HttpLabels { http_route: route, http_response_status_code: status };
        self.http_requests.get_or_create(&labels).inc();
        self.http_duration.get_or_create(&RouteLabels { http_route: route }).observe(took.as_secs_f64());
    }

    /// A decision was made; `took` is the time of `decide` itself.
    pub fn decision(&self, policy: &str, arm: &str, decided_by: DecidedBy, took: Duration) {
        let labels = DecisionLabels {
            weir_policy: policy.to_owned(),
            weir_arm: arm.to_owned(),
            weir_decided_by: decided_by_label(decided_by),
        };
        self.decisions.get_or_create(&labels).inc();
        self.decide.observe(took.as_secs_f64());
    }

    /// A call went right.
    pub fn call(&self, model: &str, took: Duration, ttft: Option<Duration>, usage: &Usage) {
        let labels = ModelLabels { gen_ai_request_model: model.to_owned() };
        self.duration.get_or_create(&labels).observe(took.as_secs_f64());
        if let Some(ttft) = ttft {
            self.ttft.get_or_create(&labels).observe(ttft.as_secs_f64());
        }
        self.tokens(model, usage);
    }

    /// Tokens of a call, whatever became of it.
    pub fn tokens(&self, model: &str, usage: &Usage) {
        for (kind, count) in
            [("input", usage.prompt_tokens), ("cached", usage.cached_tokens), ("output", usage.completion_tokens)]
        {
            let labels = TokenLabels { gen_ai_request_model: model.to_owned(), gen_ai_token_type: kind };
            self.tokens.get_or_create(&labels).inc_by(u64::from(count));
        }
    }

    /// A call failed; `error` is the kind's fixed label.
    pub fn call_failed(&self, model: &str, error: &str) {
        let labels = ErrorLabels { gen_ai_request_model: model.to_owned(), error_type: error.to_owned() };
        self.errors.get_or_create(&labels).inc();
    }

    /// A plan has decided something, for this reason of the fixed list.
    pub fn plan_note(&self, reason: &str) {
        self.plan_notes.get_or_create(&NoteLabels { weir_reason: reason.to_owned() }).inc();
    }

    /// Where the event log, the store's feeder and the learner are, as sequence numbers; set before each scrape.
    pub fn log(&self, last: u64, stored: u64, learned: u64) {
        self.log_seq.set(gauge(last));
        self.store_lag.set(gauge(last.saturating_sub(stored)));
        self.learner_lag.set(gauge(last.saturating_sub(learned)));
    }

    /// What an in-process model has done since it was loaded; set before each scrape.
    pub fn engine(&self, model: &str, counters: Counters) {
        let Counters {
            prefilled,
            reused,
            attached,
            loaded,
            decoded,
            kept,
            recomputed,
            preempted,
            guessed,
            guessed_right,
        } = counters;
        for (kind, count) in [
            ("prefilled", prefilled),
            ("reused", reused),
            ("chunk", attached),
            ("chunk_from_disk", loaded),
            ("decoded", decoded),
            ("recomputed", recomputed),
            ("guessed", guessed),
            ("guessed_right", guessed_right),
        ] {
            let labels = TokenLabels { gen_ai_request_model: model.to_owned(), gen_ai_token_type: kind };
            self.engine_tokens.get_or_create(&labels).inner().store(count, Ordering::Relaxed);
        }
        let labels = ModelLabels { gen_ai_request_model: model.to_owned() };
        self.engine_preemptions.get_or_create(&labels).inner().store(preempted, Ordering::Relaxed);
        self.engine_kept.get_or_create(&labels).set(gauge(kept));
    }

    /// How many calls at once a model's server is given now; set before each scrape.
    pub fn concurrency_limit(&self, model: &str, limit: u32) {
        let labels = ModelLabels { gen_ai_request_model: model.to_owned() };
        self.concurrency_limit.get_or_create(&labels).set(i64::from(limit));
    }

    /// All of them as OpenMetrics text.
    pub fn render(&self) -> String {
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &self.registry) {
            // Writing to a string fails only when a metric itself does.
            tracing::error!(%error, "metrics could not be rendered");
        }
        out
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The label of what decided.
pub fn decided_by_label(by: DecidedBy) -> &'static str {
    match by {
        DecidedBy::Rule => "rule",
        DecidedBy::Select => "select",
        DecidedBy::Pinned => "pinned",
        DecidedBy::Shadow => "shadow",
        DecidedBy::Refused => "refused",
    }
}

/// Seconds, from a cached answer to a long generation; the buckets of OpenTelemetry's GenAI conventions, and finer below.
const DURATION_BUCKETS: [f64; 19] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96,
    81.92, 163.84,
];
/// Seconds.
const DECIDE_BUCKETS: [f64; 9] = [1e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 1e-2];

fn durations() -> Histogram {
    Histogram::new(DURATION_BUCKETS)
}

#[cfg(test)]
mod tests;
