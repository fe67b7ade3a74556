//! Names of metrics: OpenTelemetry's semantic conventions (HTTP server, GenAI) with `_` for `.`, as Prometheus wants them,
//! and `weir_` for what has no convention. Units (`_seconds`) and `_total` are appended when they are written out.

/// `http.server.request.duration`.
pub const HTTP_DURATION: &str = "http_server_request_duration";
/// The convention reads this off the duration's histogram; by status it is a counter of its own, to keep histograms few.
pub const HTTP_REQUESTS: &str = "http_server_requests";
/// `http.server.active_requests`.
pub const HTTP_ACTIVE: &str = "http_server_active_requests";

/// `gen_ai.client.operation.duration`: weir is the client of its backends.
pub const OPERATION_DURATION: &str = "gen_ai_client_operation_duration";
/// `gen_ai.client.operation.time_to_first_chunk`, under the name that servers give it.
pub const TIME_TO_FIRST_TOKEN: &str = "gen_ai_server_time_to_first_token";
/// `gen_ai.client.token.usage`, as a counter: totals are what is asked for.
pub const TOKENS: &str = "gen_ai_client_tokens";
/// Failed calls; `error.type` holds the kind.
pub const ERRORS: &str = "gen_ai_client_errors";

/// Decisions by policy, arm and what decided.
pub const DECISIONS: &str = "weir_decisions";
/// Time of the pure decision.
pub const DECIDE_DURATION: &str = "weir_decide_duration";
/// Last sequence number of the event log.
pub const LOG_SEQ: &str = "weir_event_log_seq";
/// Events that wait for the store.
pub const STORE_LAG: &str = "weir_store_lag_events";
/// Events that wait for the learner.
pub const LEARNER_LAG: &str = "weir_learner_lag_events";
/// Tokens of in-process models by what was done with them.
pub const ENGINE_TOKENS: &str = "weir_engine_tokens";
/// Tokens whose keys and values in-process models keep for reuse.
pub const ENGINE_KEPT: &str = "weir_engine_kept_tokens";
/// Times that a sequence gave its blocks to others.
pub const ENGINE_PREEMPTIONS: &str = "weir_engine_preemptions";
/// What running plans decided, by reason.
pub const PLAN_NOTES: &str = "weir_plan_notes";
/// Calls at once that a server is given.
pub const CONCURRENCY_LIMIT: &str = "weir_concurrency_limit";
/// Version as a label.
pub const BUILD_INFO: &str = "weir_build_info";
