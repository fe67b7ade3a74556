//! What wrong requests get, and what clients see of failures: always OpenAI's shape.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weir::{
    domain::ErrorKind,
    http::{ApiKey, HttpOptions, ServeOptions},
};

use super::fake::{ID, Reply, Server, chat, head};

/// The error object, once its shape was checked.
fn error(reply: &Reply) -> Value {
    let error = reply.json()["error"].clone();
    let keys: Vec<&String> = error.as_object().unwrap_or_else(|| panic!("{reply:?}")).keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"], "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert!(error["message"].as_str().unwrap().len() > 10, "{error}");
    error
}

#[tokio::test]
async fn bad_chat_bodies() {
    let server = Server::start().await;
    let mut invalid_utf8 = chat("auto").to_string().into_bytes();
    let at = invalid_utf8.windows(6).position(|w| w == b"MARKER").unwrap();
    invalid_utf8[at] = 0xff;
    let cases: [(Vec<u8>, &str, Option<&str>); 8] = [
        (b"".to_vec(), "invalid_json", None),
        (b"{\"model\": ".to_vec(), "invalid_json", None),
        (b"[]".to_vec(), "invalid_type", None),
        (invalid_utf8, "invalid_utf8", None),
        (json!({"model": "auto", "messages": []}).to_string().into_bytes(), "empty_array", Some("messages")),
        (
            json!({"messages": [{"role": "user", "content": "x"}]}).to_string().into_bytes(),
            "missing_required_parameter",
            Some("model"),
        ),
        (
            json!({"model": "auto", "messages": [{"role": "user", "content": 1}]}).to_string().into_bytes(),
            "invalid_type",
            Some("messages[0].content"),
        ),
        (
            json!({"model": "auto", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1})
                .to_string()
                .into_bytes(),
            "invalid_value",
            Some("max_tokens"),
        ),
    ];
    for (body, code, param) in cases {
        for path in ["/v1/chat/completions", "/v1/decision"] {
            let reply = server.send("POST", path, &[], &body).await;
            let error = error(&reply);
            assert_eq!((reply.status, &error["type"]), (400, &json!("invalid_request_error")), "{error}");
            assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!(param)), "{error}");
        }
    }
    assert!(server.fake.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_body_that_is_too_large() {
    let server = Server::start().await;
    let body = vec![b' '; (10 << 20) + 1];
    let reply = server.send("POST", "/v1/chat/completions", &[], &body).await;
    assert_eq!((reply.status, &error(&reply)["code"]), (413, &json!("request_too_large")));
    assert!(error(&reply)["message"].as_str().unwrap().contains("10485760"));

    // Chunked: no length is announced.
    let mut stream = server.connect().await;
    stream
        .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    let piece = vec![b' '; 1 << 20];
    for _ in 0..11 {
        stream.write_all(b"100000\r\n").await.unwrap();
        stream.write_all(&piece).await.unwrap();
        stream.write_all(b"\r\n").await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(Reply::parse(&bytes).status, 413);

    // Who asks first is told before sending.
    let mut stream = server.connect().await;
    let expect = head("POST", "/v1/chat/completions", &[("expect", "100-continue")], 20 << 20, false);
    stream.write_all(&expect).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(Reply::parse(&bytes).status, 413);
}

#[tokio::test]
async fn a_body_in_pieces_and_a_body_cut_short() {
    let server = Server::start().await;
    let body = chat("auto").to_string();
    let (first, second) = body.split_at(20);
    let mut stream = server.connect().await;
    stream.write_all(&head("POST", "/v1/chat/completions", &[], body.len(), true)).await.unwrap();
    stream.write_all(first.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    stream.write_all(second.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(Reply::parse(&bytes).status, 200);

    let mut stream = server.connect().await;
    stream.write_all(&head("POST", "/v1/chat/completions", &[], body.len(), true)).await.unwrap();
    stream.write_all(first.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let answer = String::from_utf8_lossy(&bytes);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(server.fake.requests.lock().unwrap().len(), 1, "what was cut short is no request");
    assert_eq!(server.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn failures_of_the_gateway() {
    let server = Server::start().await;
    // Model that fails so, status, type, code, param.
    let cases = [
        ("unknown", 404, "invalid_request_error", "model_not_found", Some("model")),
        ("refused", 403, "permission_error", "policy_refused", None),
        ("unavailable", 503, "server_error", "model_unavailable", None),
        ("incapable", 400, "invalid_request_error", "unsupported_by_models", None),
        ("unrecorded", 503, "server_error", "not_recorded", None),
        ("draining", 503, "server_error", "draining", None),
        ("panics", 500, "server_error", "internal", None),
        ("timeout", 504, "server_error", "timeout", None),
        ("rate_limited", 429, "rate_limit_error", "rate_limit_exceeded", None),
        ("server_error", 502, "server_error", "server_error", None),
        ("unreachable", 502, "server_error", "unreachable", None),
        ("cut", 502, "server_error", "cut", None),
        ("garbage", 502, "server_error", "garbage", None),
        ("auth", 502, "server_error", "auth", None),
        ("context_too_long", 400, "invalid_request_error", "context_length_exceeded", Some("messages")),
        ("bad_request", 400, "invalid_request_error", "bad_request", None),
        ("model_not_found", 404, "invalid_request_error", "model_not_found", Some("model")),
        ("unsupported", 400, "invalid_request_error", "unsupported", None),
        ("breaker_open", 503, "server_error", "model_unavailable", None),
        ("cancelled", 499, "server_error", "cancelled", None),
        ("internal", 500, "server_error", "internal", None),
        ("upstream_html", 400, "invalid_request_error", "bad_request", None),
    ];
    for (model, status, class, code, param) in cases {
        let reply = server.chat(model).await;
        let error = error(&reply);
        assert_eq!(reply.status, status, "{model}: {error}");
        assert_eq!((&error["type"], &error["code"]), (&json!(class), &json!(code)), "{model}: {error}");
        assert_eq!(error["param"], json!(param), "{model}: {error}");
        let has_id = !["unknown", "unrecorded", "draining", "panics"].contains(&model);
        assert_eq!(reply.header("x-request-id"), has_id.then_some(ID), "{model}");
        // Before a stream has begun, its failure is an ordinary error.
        assert_eq!(server.stream(model).await.status, status, "{model}");
    }
    for kind in ErrorKind::ALL {
        assert!(cases.iter().any(|case| case.0 == kind.as_str()), "{kind:?} is not tested");
    }
    assert_eq!(server.chat("rate_limited").await.header("retry-after"), Some("2"));
    assert_eq!(server.chat("draining").await.header("retry-after"), Some("2"));
    assert!(server.chat("unknown").await.body.contains("auto, smol"), "the 404 lists what is served");
    assert!(server.chat("incapable").await.body.contains("tools, images"));
}

#[tokio::test]
async fn an_upstreams_own_error_passes() {
    let server = Server::start().await;
    let reply = server.chat("upstream_400").await;
    assert_eq!((reply.status, reply.body.as_str()), (422, "{\"error\":{\"message\":\"theirs\",\"code\":\"x\"}}"));
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_its_error() {
    let server = Server::start().await;
    let reply = server.stream("breaks").await;
    assert_eq!(reply.status, 200);
    assert!(reply.whole, "the transport itself ends in order");
    insta::assert_snapshot!("stream_that_breaks", reply.body);
}

#[tokio::test]
async fn bad_embedding_requests() {
    let server = Server::start().await;
    let many = vec!["x"; 2049];
    let cases = [
        (json!({"input": "x"}), 400, "model", "must provide 'model'"),
        (json!({"model": "bge"}), 400, "input", "must provide 'input'"),
        (json!({"model": "bge", "input": []}), 400, "input", "empty"),
        (json!({"model": "bge", "input": ["a", ""]}), 400, "input[1]", "empty string"),
        (json!({"model": "bge", "input": [1, 2]}), 400, "input[0]", "token ids"),
        (json!({"model": "bge", "input": [[1, 2]]}), 400, "input[0]", "token ids"),
        (json!({"model": "bge", "input": 5}), 400, "input", "a string or an array of strings"),
        (json!({"model": "bge", "input": many}), 400, "input", "2049"),
        (json!({"model": "bge", "input": "x", "dimensions": 3}), 400, "dimensions", "`bge` has 2"),
        (json!({"model": "bge", "input": "x", "encoding_format": "int8"}), 400, "encoding_format", "int8"),
    ];
    for (body, status, param, words) in cases {
        let reply = server.post("/v1/embeddings", &body).await;
        let error = error(&reply);
        assert_eq!((reply.status, &error["param"]), (status, &json!(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
    let none = server.post("/v1/embeddings", &json!({"model": "none", "input": "x"})).await;
    assert_eq!((none.status, none.header("x-should-retry")), (503, Some("false")));
    assert!(error(&none)["message"].as_str().unwrap().contains("weir models fetch"));
}

#[tokio::test]
async fn bad_feedback() {
    let server = Server::start().await;
    let cases = [
        (json!({"value": 1}), "id"),
        (json!({"id": "nobody", "value": 1}), "id"),
        (json!({"id": ID}), "value"),
        (json!({"id": ID, "value": "good"}), "value"),
        (json!({"id": ID, "value": 1, "name": ""}), "name"),
        (json!({"id": ID, "value": 1, "source": "s".repeat(129)}), "source"),
        (json!({"id": ID, "value": 1, "idempotency_key": ""}), "idempotency_key"),
    ];
    for (body, param) in cases {
        let reply = server.post("/v1/feedback", &body).await;
        assert_eq!((reply.status, &error(&reply)["param"]), (400, &json!(param)), "{body}");
    }
    let huge =
        server.send("POST", "/v1/feedback", &[], format!("{{\"id\":\"{ID}\",\"value\":1e999}}").as_bytes()).await;
    assert_eq!(huge.status, 400);
    assert!(server.fake.feedback.lock().unwrap().is_empty());
}

#[tokio::test]
async fn bad_questions_to_the_record() {
    let server = Server::start().await;
    for query in ["limit=0", "limit=1001", "limit=x", "status=fine", "before=x", "polcy=p"] {
        let reply = server.get(&format!("/v1/audit/decisions?{query}")).await;
        assert_eq!(reply.status, 400, "{query}");
        error(&reply);
    }
    let down = server.get("/v1/audit/decisions?policy=down").await;
    assert_eq!((down.status, &error(&down)["code"]), (503, &json!("store")));
    assert_eq!(server.get("/v1/audit/decisions/nobody").await.status, 400);
    let other = "0192f0c1-2f5c-7c30-9d8a-6f5a3c2b1aff";
    assert_eq!(server.get(&format!("/v1/audit/decisions/{other}")).await.status, 404);
}

#[tokio::test]
async fn paths_and_methods_that_are_not() {
    let server = Server::start().await;
    let reply = server.get("/v2/chat").await;
    assert_eq!((reply.status, &error(&reply)["code"]), (404, &json!("unknown_url")));
    let reply = server.post("/chat/completions", &chat("auto")).await;
    assert!(error(&reply)["message"].as_str().unwrap().contains("did you mean /v1/chat/completions"));
    let reply = server.get("/v1/chat/completions").await;
    assert_eq!((reply.status, &error(&reply)["code"]), (405, &json!("method_not_allowed")));
    assert_eq!(reply.header("allow"), Some("POST"));
    let reply = server.get("/v1/models/nobody").await;
    assert_eq!((reply.status, &error(&reply)["code"]), (404, &json!("model_not_found")));
    assert!(reply.body.contains("org/smol"));
    let reply = server.send("HEAD", "/v1/models", &[], b"").await;
    assert_eq!((reply.status, reply.body.as_str()), (200, ""));
    let reply = server.send("HEAD", "/v1/chat/completions", &[], b"").await;
    assert_eq!((reply.status, reply.body.as_str()), (405, ""));
}

fn key(name: &str, admin: bool) -> ApiKey {
    let secret = format!("sk-{name}");
    ApiKey { name: name.to_owned(), secret, tenant: "acme".to_owned(), tier: "gold".to_owned(), admin }
}

#[tokio::test]
async fn keys() {
    let options = HttpOptions { keys: vec![key("app", false), key("boss", true)], ..HttpOptions::default() };
    assert!(!format!("{options:?}").contains("sk-"), "secrets are not printed");
    let server = Server::with(options, ServeOptions::default()).await;
    let get = |path: &'static str, authorization: Option<&'static str>| {
        let server = &server;
        async move {
            let header = authorization.map(|a| ("authorization", a));
            server.send("GET", path, header.as_slice(), b"").await
        }
    };
    for wrong in [None, Some("Bearer sk-nobody"), Some("Bearer "), Some("sk-app"), Some("Basic sk-app")] {
        for path in ["/v1/models", "/v1/models/default", "/v1/audit/decisions", "/v1/fleet", "/metrics"] {
            let reply = get(path, wrong).await;
            assert_eq!((reply.status, &error(&reply)["code"]), (401, &json!("invalid_api_key")), "{path} {wrong:?}");
            assert_eq!(reply.header("www-authenticate"), Some("Bearer realm=\"weir\""));
        }
        let header = wrong.map(|a| ("authorization", a));
        for path in ["/v1/chat/completions", "/v1/decision", "/v1/embeddings", "/v1/feedback"] {
            assert_eq!(server.send("POST", path, header.as_slice(), b"{}").await.status, 401, "{path}");
        }
    }
    for path in ["/healthz", "/readyz", "/openapi.json"] {
        assert_eq!(get(path, None).await.status, 200, "{path} is open");
    }
    assert_eq!(get("/v1/models", Some("bearer sk-app")).await.status, 200);
    let put = [("authorization", "Bearer sk-app")];
    let reply = server.send("PUT", "/v1/fleet/org/smol", &put, br#"{"loaded": false}"#).await;
    assert_eq!((reply.status, &error(&reply)["code"]), (403, &json!("admin_key_required")));
    for path in ["/v1/kv/lookup", "/v1/kv/pin", "/v1/kv/clear"] {
        let reply = server.send("POST", path, &put, br#"{"model": "org/smol"}"#).await;
        assert_eq!((reply.status, &error(&reply)["code"]), (403, &json!("admin_key_required")), "{path}");
    }
    for path in ["/v1/audit/decisions", "/v1/fleet", "/v1/kv", "/metrics"] {
        let reply = get(path, Some("Bearer sk-app")).await;
        assert_eq!((reply.status, &error(&reply)["code"]), (403, &json!("admin_key_required")));
        assert_eq!(get(path, Some("Bearer sk-boss")).await.status, 200);
    }
    let headers = [("authorization", "Bearer sk-app")];
    server.send("POST", "/v1/chat/completions", &headers, chat("auto").to_string().as_bytes()).await;
    let requests = server.fake.requests.lock().unwrap();
    let caller = &requests[0].1;
    assert_eq!((caller.key.id.as_str(), caller.key.tenant.as_str(), caller.key.tier.as_str()), ("app", "acme", "gold"));
    assert_eq!(caller.authorization, None, "weir's own key is not for upstreams");
}

#[tokio::test]
async fn kept_documents_are_looked_up_pinned_and_let_go() {
    let server = Server::start().await;
    let post = async |verb: &str, body: Value| {
        server.send("POST", &format!("/v1/kv/{verb}"), &[], body.to_string().as_bytes()).await
    };
    let part = json!({"type": "text", "text": "a document", "weir": {"chunk": true}});
    let messages = json!([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]);
    let asked = json!({"model": "org/smol", "messages": messages});
    let with = |key: &str, value: Value| {
        let mut asked = asked.clone();
        asked[key] = value;
        asked
    };
    let mine = post("lookup", asked.clone()).await.json();
    assert_eq!(mine["documents"], json!([{"tokens": 64, "in_memory": true, "on_disk": false, "pinned_s": null}]));
    // The fake's tokens are the length of who shares: the key that asks, a tenant, another key.
    let whose = async |asked: Value| post("lookup", asked).await.json()["tokens"].clone();
    assert_eq!(whose(with("tenant", json!("acme"))).await, json!("tenant acme".len()));
    assert_eq!(whose(with("key", json!("app-7"))).await, json!("key app-7".len()));
    assert_eq!(post("pin", with("ttl_s", json!(60))).await.json()["tokens"], 60);
    assert_eq!(post("pin", asked.clone()).await.json()["tokens"], 3600);
    assert_eq!(post("clear", asked.clone()).await.json(), json!({"entries": 1, "on_disk": 0}));
    assert_eq!(post("clear", json!({"model": "org/smol"})).await.json(), json!({"entries": 9, "on_disk": 2}));
    for (verb, body, says) in [
        ("lookup", json!({"model": "org/smol"}), "'messages' is missing"),
        ("pin", json!({"messages": messages}), "'model' is missing"),
        ("pin", with("ttl_s", json!(0)), "'ttl_s' must be from 1"),
        ("pin", with("ttl", json!(60)), "unknown field `ttl`"),
        ("lookup", json!({"model": "org/smol", "messages": [{"role": "user"}]}), "messages[0].content"),
    ] {
        let reply = post(verb, body).await;
        assert_eq!(reply.status, 400, "{says}");
        assert!(error(&reply)["message"].as_str().unwrap().contains(says), "{says}: {}", reply.body);
    }
    let reply = post("clear", json!({"model": "nobody"})).await;
    assert_eq!((reply.status, &error(&reply)["code"]), (404, &json!("model_not_found")));
    assert_eq!(server.get("/v1/kv").await.json()["data"], json!([]), "the fake's model is not loaded");
}

#[tokio::test]
async fn a_fleet_entry_is_loaded_and_unloaded_by_name() {
    let server = Server::start().await;
    let put =
        async |name: &str, body: &str| server.send("PUT", &format!("/v1/fleet/{name}"), &[], body.as_bytes()).await;
    let reply = put("org/smol", r#"{"loaded": false}"#).await;
    assert_eq!((reply.status, &reply.json()["available"]), (200, &json!(false)));
    let reply = put("org/huge", r#"{"loaded": true}"#).await;
    assert_eq!((reply.status, &error(&reply)["code"]), (404, &json!("model_not_found")));
    for wrong in ["", "{}", "[]", r#"{"loaded": 1}"#, r#"{"loaded": true, "more": 1}"#] {
        let reply = put("org/smol", wrong).await;
        assert_eq!(reply.status, 400, "{wrong}");
        assert!(error(&reply)["message"].as_str().unwrap().contains(r#"{"loaded": true}"#), "{}", reply.body);
    }
    assert_eq!(server.get("/v1/fleet").await.json()["data"][0]["name"], "org/smol");
}
