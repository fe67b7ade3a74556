//! Ways to set weir up: the example configuration, and in front of another server.

use serde_json::{Value, json};

use crate::support::weir::{self, Weir, chat};

#[test]
fn the_example_configuration_is_fine() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/weir.yaml.example");
    let (code, out, err) = weir::run(&["check", "--json", "--config", example]);
    assert_eq!(code, 0, "{out}{err}");
    let said: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(said["policies"], json!(["default"]));
    assert_eq!(said["listen"], json!("127.0.0.1:8080"));
}

/// `--upstream` is a complete set-up: names pass through, `auto` routes among what the server lists.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_is_a_complete_set_up() {
    let dir = tempfile::tempdir().unwrap();
    let upstream_dir = dir.path().join("upstream");
    std::fs::create_dir(&upstream_dir).unwrap();
    std::fs::write(
        upstream_dir.join("p.yaml"),
        "policy: fixed\nmodels: {a: {name: model-a}}\nselect: {arms: [a], static: a}\n",
    )
    .unwrap();
    let upstream_config = weir::config(
        &upstream_dir,
        "fleet:\n  - {name: model-a, scripted: {rules: [{reply: {text: from a}}]}}\n  \
         - {name: model-b, scripted: {rules: [{reply: {text: from b}}]}}\npolicies: [p.yaml]\nembedder: {model: off}\n\
         unknown_model: auto\n",
    );
    let upstream = Weir::start(&upstream_config, &upstream_dir.join("data"), &[]);

    let config = weir::config(dir.path(), "{}");
    let front = Weir::start(&config, &dir.path().join("data"), &["--upstream", &upstream.url]);
    for (model, said) in [("model-a", "from a"), ("model-b", "from b"), ("a-name-nobody-lists", "from a")] {
        let (status, answer) = front.post("/v1/chat/completions", &chat(model, "hello")).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["message"]["content"], said, "{model}: {answer}");
        let id = answer["id"].as_str().unwrap();
        let (_, view) = front.get(&format!("/v1/audit/decisions/{id}")).await;
        assert_eq!(view["decision"]["decided_by"], "pinned", "{view}");
        assert_eq!(view["decision"]["model_requested"], model, "{view}");
        assert_eq!(view["outcome"]["usage"]["source"], "reported", "{view}");
    }
    let (status, answer) = front.post("/v1/chat/completions", &chat("auto", "hello")).await;
    assert_eq!(status, 200, "{answer}");
    let (_, view) = front.get(&format!("/v1/audit/decisions/{}", answer["id"].as_str().unwrap())).await;
    assert_eq!(view["decision"]["decided_by"], "select", "{view}");
    let arms: Vec<&str> =
        view["decision"]["candidates"].as_array().unwrap().iter().map(|c| c["arm"].as_str().unwrap()).collect();
    assert!(arms.contains(&"model-a") && arms.contains(&"model-b"), "{view}");
    let total: f64 =
        view["decision"]["candidates"].as_array().unwrap().iter().map(|c| c["propensity"].as_f64().unwrap()).sum();
    assert!((total - 1.0).abs() < 1e-9, "{view}");
}

/// An arm that cannot do what is asked is out, with that reason; with none left the client is told what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_arm_cannot_do_eliminates_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("p.yaml"),
        "policy: two\nmodels: {plain: {name: plain}, tools: {name: tools}}\nselect:\n  arms: [plain, tools]\n  \
         static: {plain: 0.9, tools: 0.1}\n",
    )
    .unwrap();
    let config = weir::config(
        dir.path(),
        "fleet:\n  - name: plain\n    capabilities: {tools: false, images: false, audio: false}\n    scripted: {}\n  \
         - {name: tools, capabilities: {images: false}, scripted: {}}\npolicies: [p.yaml]\nembedder: {model: off}\n",
    );
    let weir = Weir::start(&config, &dir.path().join("data"), &[]);
    let mut body = chat("auto", "call it");
    body["tools"] = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    for _ in 0..10 {
        let (status, answer) = weir.post("/v1/chat/completions", &body).await;
        assert_eq!((status, answer["model"].as_str()), (200, Some("tools")), "{answer}");
    }
    let (status, said) = weir.post("/v1/decision", &body).await;
    assert_eq!(status, 200, "{said}");
    let plain =
        said["decision"]["candidates"].as_array().unwrap().iter().find(|c| c["arm"] == "plain").unwrap().clone();
    assert_eq!((&plain["propensity"], &plain["eliminated"]["by"]), (&json!(0.0), &json!("capability")), "{plain}");

    let image = json!({"model": "auto", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]}]});
    let (status, said) = weir.post("/v1/chat/completions", &image).await;
    assert_eq!(status, 400, "{said}");
    assert!(said["error"]["message"].as_str().unwrap().contains("images"), "{said}");
    let (_, listed) = weir.get("/v1/audit/decisions?status=refused").await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1), "one refusal, recorded once: {listed}");
}

/// What a server says of its rate limit is seen in how the fleet stands, and what has little left of it is not fallen back to
/// where another has more.
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limit_that_a_server_reports_counts_in_failover() {
    use axum::{Json, Router, routing::post};

    const POLICY: &str = "policy: p\nmodels: {broken: {name: broken}, scarce: {name: scarce}, plenty: {name: plenty}}\nselect: {arms: \
                          [broken], static: broken}\nfallback: {on: [transient], to: [scarce, plenty], weights: {rate_limit: 5}, \
                          retries: 0}\n";
    // 12 of 100 requests are left, and more of the tokens.
    let headers = [
        ("x-ratelimit-limit-requests", "100"),
        ("x-ratelimit-remaining-requests", "12"),
        ("x-ratelimit-reset-requests", "6m0s"),
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "900"),
    ];
    let answer = json!({"id": "x", "object": "chat.completion", "created": 1, "model": "scarce", "choices": [{"index": 0, "message":
        {"role": "assistant", "content": "scarce"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1,
        "total_tokens": 2}});
    let server = Router::new().route("/v1/chat/completions", post(async move || (headers, Json(answer))));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, server).await });

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("p.yaml"), POLICY).unwrap();
    let config = weir::config(
        dir.path(),
        &format!(
            "fleet:\n  - {{name: broken, scripted: {{rules: [{{fail: {{kind: server_error}}}}]}}}}\n  - {{name: scarce, remote: {{url: \
             \"{url}\"}}}}\n  - {{name: plenty, scripted: {{rules: [{{reply: {{text: plenty}}}}]}}}}\npolicies: [p.yaml]\nembedder: \
             {{model: \"off\"}}\n"
        ),
    );
    let weir = Weir::start(&config, &dir.path().join("data"), &[]);
    let stands = || {
        let (code, out, err) = weir::run(&["models", "running", "--url", &weir.url]);
        assert_eq!(code, 0, "{err}");
        out.lines().find(|line| line.starts_with("scarce")).unwrap().to_owned()
    };
    assert!(!stands().contains("rate limit"), "{}", stands());
    // Nothing is known of it, so the policy's order stands; then it is.
    for said in ["scarce", "plenty"] {
        let (status, answer) = weir.post("/v1/chat/completions", &chat("auto", "hello")).await;
        assert_eq!((status, &answer["choices"][0]["message"]["content"]), (200, &json!(said)), "{answer}");
    }
    assert!(stands().ends_with("88 % of its rate limit used"), "{}", stands());
    let (_, fleet) = weir.get("/v1/fleet").await;
    let used: Vec<&Value> = fleet["data"].as_array().unwrap().iter().map(|entry| &entry["limit_used"]).collect();
    assert_eq!(used, [&json!(null), &json!(null), &json!(0.88)], "{fleet}");
}

/// `cheapest` stays with a session's model while what it would forfeit there outweighs the lower price.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_with_the_model_that_has_its_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let policy = "policy: thrifty\nmodels: {own: {name: own}, other: {name: other}}\nselect: {arms: [own, other], cheapest: {}}\n";
    std::fs::write(dir.path().join("p.yaml"), policy).unwrap();
    let config = weir::config(
        dir.path(),
        "fleet:\n  - name: own\n    price: {input: 2, output: 1, cached_input: 0.1}\n    \
         scripted: {rules: [{reply: {text: mine}, usage: {prompt_tokens: 5000, completion_tokens: 2}}]}\n  \
         - {name: other, price: {input: 1, output: 1}, scripted: {}}\npolicies: [p.yaml]\nembedder: {model: off}\n",
    );
    let weir = Weir::start(&config, &dir.path().join("data"), &[]);
    let client = weir::client();
    let ask = async |model: &str, session: &str| {
        let url = format!("{}/v1/chat/completions", weir.url);
        let asked = client.post(url).header("x-weir-session", session).body(chat(model, "and then?").to_string());
        let answer: Value = serde_json::from_str(&asked.send().await.unwrap().text().await.unwrap()).unwrap();
        // Whoever reads the record waits until it is followed.
        weir.get(&format!("/v1/audit/decisions/{}", answer["id"].as_str().unwrap())).await.1
    };
    assert_eq!(ask("auto", "a").await["decision"]["arm"], "other");
    assert_eq!(ask("own", "b").await["outcome"]["served_by"], "own");
    let view = ask("auto", "b").await;
    assert_eq!(view["decision"]["arm"], "own", "{view}");
    let session = &view["context"]["session"];
    assert_eq!((&session["last_model"], &session["last_tokens"]), (&json!("own"), &json!(5002)), "{view}");
    assert_eq!(ask("auto", "a").await["decision"]["arm"], "other", "another session");
}
