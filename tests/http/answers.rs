//! What right requests get: transcripts of every route.

use serde_json::{Value, json};
use weir::domain::{OutcomeStatus, Role};

use super::fake::{ID, Server, chat};

#[tokio::test]
async fn a_whole_answer() {
    let server = Server::start().await;
    insta::assert_snapshot!("whole", server.chat("auto").await.transcript());
}

#[tokio::test]
async fn a_stream() {
    let server = Server::start().await;
    let reply = server.stream("auto").await;
    assert!(reply.whole);
    insta::assert_snapshot!("stream", reply.transcript());
}

#[tokio::test]
async fn a_stream_with_usage_and_log_probabilities() {
    let server = Server::start().await;
    let mut body = chat("auto");
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body["logprobs"] = true.into();
    insta::assert_snapshot!(
        "stream_with_usage_and_logprobs",
        server.post("/v1/chat/completions", &body).await.transcript()
    );
}

#[tokio::test]
async fn a_remote_answer_passes_as_it_is() {
    let server = Server::start().await;
    let reply = server.chat("wire").await;
    assert_eq!(reply.body, "{\"id\":\"chatcmpl-theirs\",\"their\":\"own\"}");
    assert_eq!(reply.header("x-request-id"), Some(ID));
    let reply = server.stream("wire").await;
    assert_eq!(reply.body, "data: {\"id\":\"chatcmpl-theirs\",\"choices\":[],\"their\":\"own\"}\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn headers_reach_the_gateway() {
    let server = Server::start().await;
    let headers = [("x-weir-session", "s-1"), ("x-stainless-retry-count", "2"), ("authorization", "Bearer theirs")];
    let mut body = chat("auto");
    body["metadata"] = json!({"session_id": "not this one"});
    let text = body.to_string();
    // The content type is tolerated, whatever it is.
    let reply = server.send("POST", "/v1/chat/completions", &headers, text.as_bytes()).await;
    assert_eq!(reply.status, 200);
    let requests = server.fake.requests.lock().unwrap();
    let (request, caller) = &requests[0];
    assert_eq!(request.session.as_deref(), Some("s-1"));
    assert_eq!(request.client_retry, 2);
    assert_eq!(request.messages[0].role, Role::User);
    assert_eq!(request.body, text.as_bytes());
    assert_eq!(caller.authorization.as_deref(), Some("Bearer theirs"));
    assert_eq!(caller.key.id, "");
}

#[tokio::test]
async fn nul_and_escapes_come_through() {
    let server = Server::start().await;
    let mut body = chat("auto");
    body["messages"][0]["content"] = "a\u{0}b\u{1F600}".into();
    assert_eq!(server.post("/v1/chat/completions", &body).await.status, 200);
    assert_eq!(server.fake.requests.lock().unwrap()[0].0.query(), "a\u{0}b\u{1F600}");
}

#[tokio::test]
async fn a_decision() {
    let server = Server::start().await;
    let reply = server.post("/v1/decision", &chat("auto")).await;
    assert_eq!(reply.header("x-request-id"), Some(ID));
    let json = reply.json();
    assert_eq!(json["id"], ID);
    assert_eq!(json["object"], "decision");
    assert_eq!(json["decision"]["arm"], "quick");
    assert_eq!(json["decision"]["propensity"], 0.5);
    assert_eq!(json["context"]["seed"], "0000000000000000");
    assert!(!reply.body.contains("MARKERPROMPT"));
}

#[tokio::test]
async fn models() {
    let server = Server::start().await;
    insta::assert_snapshot!("models", server.get("/v1/models").await.transcript());
    for path in ["/v1/models/org/smol", "/v1/models/org%2Fsmol"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, &reply.json()["id"]), (200, &json!("org/smol")), "{path}");
    }
}

#[tokio::test]
async fn embeddings() {
    let server = Server::start().await;
    let post = |body: Value| {
        let server = &server;
        async move { server.post("/v1/embeddings", &body).await }
    };
    insta::assert_snapshot!("embeddings", post(json!({"model": "bge", "input": ["one", "three"]})).await.transcript());
    let one = post(json!({"model": "bge", "input": "one", "dimensions": 2})).await;
    assert_eq!(one.json()["data"][0]["embedding"], json!([3.0, 0.5]));
    let base64 = post(json!({"model": "bge", "input": "one", "encoding_format": "base64"})).await;
    assert_eq!(base64.json()["data"][0]["embedding"], "AABAQAAAAD8=");
}

#[tokio::test]
async fn feedback() {
    let server = Server::start().await;
    let body = json!({"id": format!("chatcmpl-{ID}"), "value": true, "idempotency_key": "k"});
    let reply = server.post("/v1/feedback", &body).await;
    assert_eq!((reply.status, reply.json()), (200, json!({"id": ID, "recorded": true})));
    let again = server.post("/v1/feedback", &body).await;
    assert_eq!((again.status, again.json()), (200, json!({"id": ID, "recorded": false})));
    let body = json!({"id": ID, "value": -0.5, "name": "resolved", "source": "judge"});
    assert_eq!(server.post("/v1/feedback", &body).await.status, 200);
    let all = server.fake.feedback.lock().unwrap();
    let (first, last) = (&all[0].1, &all[2].1);
    assert_eq!((first.name.as_str(), first.source.as_str(), first.value), ("score", "user", 1.0));
    assert_eq!((last.name.as_str(), last.source.as_str(), last.value), ("resolved", "judge", -0.5));
}

#[tokio::test]
async fn the_record() {
    let server = Server::start().await;
    let path = format!("/v1/audit/decisions?limit=2&before={ID}&policy=p&arm=a&status=cancelled&session=s&tenant=t");
    let reply = server.get(&path).await;
    assert_eq!(
        reply.json(),
        json!({"object": "list", "data": [{"id": "row-0"}, {"id": "row-1"}], "has_more": true, "first_id": "row-0",
               "last_id": "row-1"})
    );
    {
        let queries = server.fake.queries.lock().unwrap();
        let query = &queries[0];
        assert_eq!(query.limit, Some(3), "one more, to know whether there are more");
        assert_eq!(query.before, Some(super::fake::id()));
        assert_eq!(query.status, Some(OutcomeStatus::Cancelled));
        assert_eq!((query.policy.as_deref(), query.arm.as_deref()), (Some("p"), Some("a")));
    }
    let one = server.get(&format!("/v1/audit/decisions/chatcmpl-{ID}")).await;
    assert_eq!((one.status, &one.json()["id"]), (200, &json!(ID)));
    assert_eq!(one.header("x-request-id"), Some(ID));
}

#[tokio::test]
async fn health_readiness_metrics() {
    let server = Server::start().await;
    assert_eq!(server.get("/healthz").await.json(), json!({"status": "ok"}));
    assert_eq!(server.get("/readyz").await.json(), json!({"ready": true, "components": {"log": "ok"}}));
    server.fake.unready.store(true, std::sync::atomic::Ordering::SeqCst);
    let reply = server.get("/readyz").await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.json()["components"]["log"], "no space left on device");
    assert_eq!(server.get("/healthz").await.status, 200);

    server.stream("auto").await;
    server.stream("breaks").await;
    server.get("/nowhere").await;
    let reply = server.get("/metrics").await;
    assert!(reply.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    for line in [
        "http_server_requests_total{http_route=\"/readyz\",http_response_status_code=\"503\"} 1",
        "http_server_requests_total{http_route=\"/v1/chat/completions\",http_response_status_code=\"200\"} 1",
        "http_server_requests_total{http_route=\"/v1/chat/completions\",http_response_status_code=\"502\"} 1",
        "http_server_requests_total{http_route=\"other\",http_response_status_code=\"404\"} 1",
        // The scrape itself.
        "http_server_active_requests 1",
    ] {
        assert!(reply.body.lines().any(|l| l == line), "missing: {line}\n{}", reply.body);
    }
}

#[tokio::test]
async fn the_document_names_every_route() {
    let server = Server::start().await;
    let document = server.get("/openapi.json").await.json();
    let paths = document["paths"].as_object().unwrap();
    for route in weir::http::ROUTES {
        // A catch-all has no notation of its own there.
        let route = route.replace("{*id}", "{id}");
        assert!(paths.contains_key(&route), "{route} is not documented");
    }
    assert_eq!(paths.len(), weir::http::ROUTES.len());
    let request = &document["components"]["schemas"]["ChatCompletionRequest"];
    assert!(request["properties"]["temperature"]["maximum"] == 2, "{request:#}");
    assert!(request["required"].as_array().unwrap().contains(&json!("model")), "{request:#}");
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "{name} is referred to and missing");
    }
}
