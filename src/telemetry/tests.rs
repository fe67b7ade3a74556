//! Metrics as they are scraped, filters as they fail.

use std::time::Duration;

use super::*;
use crate::domain::UsageSource;

#[test]
fn what_is_counted_is_rendered() {
    let metrics = Metrics::new();
    metrics.http_started();
    metrics.http_request("/v1/models", 200, Duration::from_millis(3));
    metrics.http_started();
    metrics.decision("support", "frugal \"x\"", DecidedBy::Select, Duration::from_micros(20));
    let usage = Usage {
        prompt_tokens: 7,
        cached_tokens: 2,
        completion_tokens: 5,
        source: UsageSource::Reported,
        ..Usage::default()
    };
    metrics.call("smol", Duration::from_secs(1), Some(Duration::from_millis(30)), &usage);
    metrics.call_failed("smol", "timeout");
    metrics.plan_note("escalated");
    metrics.log(100, 90, 80);
    let text = metrics.render();
    for line in [
        "http_server_requests_total{http_route=\"/v1/models\",http_response_status_code=\"200\"} 1",
        "http_server_request_duration_seconds_count{http_route=\"/v1/models\"} 1",
        "http_server_active_requests 1",
        "weir_decisions_total{weir_policy=\"support\",weir_arm=\"frugal \\\"x\\\"\",weir_decided_by=\"select\"} 1",
        "gen_ai_client_tokens_total{gen_ai_request_model=\"smol\",gen_ai_token_type=\"input\"} 7",
        "gen_ai_client_tokens_total{gen_ai_request_model=\"smol\",gen_ai_token_type=\"cached\"} 2",
        "gen_ai_client_tokens_total{gen_ai_request_model=\"smol\",gen_ai_token_type=\"output\"} 5",
        "gen_ai_server_time_to_first_token_seconds_bucket{le=\"0.04\",gen_ai_request_model=\"smol\"} 1",
        "gen_ai_client_errors_total{gen_ai_request_model=\"smol\",error_type=\"timeout\"} 1",
        "weir_plan_notes_total{weir_reason=\"escalated\"} 1",
        "weir_event_log_seq 100",
        "weir_store_lag_events 10",
        "weir_learner_lag_events 20",
    ] {
        assert!(text.lines().any(|l| l == line), "missing: {line}\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn a_filter_that_is_none_is_named() {
    let Err(error) = subscriber(LogFormat::Text, "weir=loud", std::io::sink) else { panic!("accepted") };
    assert_eq!(error.kind(), "filter");
    assert!(error.to_string().starts_with("WEIR_LOG=weir=loud is no log filter"), "{error}");
}

#[test]
fn a_panic_message_that_may_quote_a_prompt_is_withheld() {
    let message = |panics: fn()| panic_message(&*std::panic::catch_unwind(panics).unwrap_err());
    assert_eq!(message(|| panic!("a literal")), "a literal");
    let cut = message(|| drop(std::hint::black_box("pr\u{f6}mpt")[..3].to_owned()));
    assert!(cut.contains("withheld"), "{cut}");
}
