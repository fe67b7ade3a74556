//! What heads of answers say of rate limits.

use super::*;

#[tokio::test]
async fn what_an_answer_says_of_a_rate_limit_is_in_the_models_state() {
    let said =
        "x-ratelimit-limit-requests: 10\r\nx-ratelimit-remaining-requests: 4\r\nx-ratelimit-reset-requests: 1h\r\n";
    let whole = r#"{"id":"x","choices":[{"message":{"content":"hey"}}]}"#;
    for (status, answers) in [("200 OK", true), ("429 Too Many Requests", false)] {
        let (url, _told) = always(json(status, said, whole)).await;
        let remote = RemoteBackend::new(remote(&url)).unwrap();
        assert_eq!(remote.state().limit_used, 0.0);
        assert_eq!(remote.start(call(BODY, false)).await.is_ok(), answers);
        assert!((remote.state().limit_used - 0.6).abs() < 1e-12, "{status}");
    }
}
