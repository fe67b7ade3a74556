//! The default weir, as a newcomer starts it: no configuration, the real models, real answers.

use serde_json::{Value, json};

use crate::support::{
    data_dir, model_file,
    weir::{self, Weir, chat},
};

/// Of two models that run in the process, a rule sends a prompt to the one that has computed it before.
#[tokio::test(flavor = "multi_thread")]
async fn a_rule_sees_what_of_a_prompt_is_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let policy = dir.path().join("warm.yaml");
    std::fs::write(
        &policy,
        "policy: resident
models: {cold: {name: cold}, warm: {name: warm}}
rules:
  - {name: resident, when: fleet.warm.resident_tokens * 2 > fleet.warm.prompt_tokens, use: warm}
select: {arms: [cold, warm], static: {cold: 1}}
",
    )
    .unwrap();
    let local = json!({"model": model_file(), "threads": 1});
    let fleet = json!([{"name": "cold", "local": local}, {"name": "warm", "local": local}]);
    let config = weir::config(dir.path(), &json!({"fleet": fleet, "policies": [policy]}).to_string());
    let weir = Weir::start(&config, &data, &[]);
    let text = "The tide came in over the flats and the boats rose one by one. ".repeat(8);
    let decided = async |text: &str| {
        let (status, said) = weir.post("/v1/decision", &chat("auto", text)).await;
        assert_eq!(status, 200, "{said}");
        said["decision"]["arm"].as_str().unwrap().to_owned()
    };
    assert_eq!(decided(&text).await, "cold");
    let mut asked = chat("warm", &text);
    asked["max_tokens"] = json!(2);
    let (status, answer) = weir.post("/v1/chat/completions", &asked).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(decided(&text).await, "warm");
    assert_eq!(decided("Hello there").await, "cold");
    let (_, answer) = weir.post("/v1/chat/completions", &chat("auto", &text)).await;
    assert_eq!(answer["model"], "warm");
    let (prompt, cached) =
        (&answer["usage"]["prompt_tokens"], &answer["usage"]["prompt_tokens_details"]["cached_tokens"]);
    assert!(cached.as_u64().unwrap() * 2 > prompt.as_u64().unwrap(), "{answer}");
    drop(weir);
    // What was in memory is part of the record, so the decision can be derived again.
    let (code, out, err) =
        weir::run(&["audit", "reproduce", "--last", "100", "--json", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
}

/// Models come and go while others serve, and the record says which there were.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_unloaded_and_loaded_while_another_serves() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let policy = dir.path().join("two.yaml");
    std::fs::write(
        &policy,
        "policy: two
models: {first: {name: first}, second: {name: second}}
select: {arms: [first, second], static: {second: 1}}
",
    )
    .unwrap();
    let local = json!({"model": model_file(), "threads": 1});
    let fleet = json!([{"name": "first", "local": local}, {"name": "second", "local": local}]);
    let config = weir::config(dir.path(), &json!({"fleet": fleet, "policies": [policy]}).to_string());
    let weir = Weir::start(&config, &data, &[]);
    let ask = async |model: &str, tokens: u32| {
        let mut body = chat(model, "Count from one to a hundred.");
        body["max_tokens"] = json!(tokens);
        body["temperature"] = json!(0);
        weir.post("/v1/chat/completions", &body).await
    };
    let models = |args: &[&str]| {
        let args: Vec<&str> = ["models"].iter().chain(args).chain(&["--url", &weir.url]).copied().collect();
        let (code, out, err) = weir::run(&args);
        (code, out + &err)
    };
    let (_, whole) = ask("second", 60).await;
    // A call that is under way ends as if nothing had happened.
    let (answer, (code, said)) = tokio::join!(ask("second", 60), async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        tokio::task::block_in_place(|| models(&["unload", "second"]))
    });
    assert_eq!((code, answer.0), (0, 200), "{said} {}", answer.1);
    assert!(said.starts_with("second: not loaded; llama Q4_1"), "{said}");
    assert_eq!(answer.1["choices"], whole["choices"]);
    let (_, decided) = weir.post("/v1/decision", &chat("auto", "hello")).await;
    assert_eq!(decided["decision"]["arm"], "first", "{decided}");
    let (status, answer) = ask("auto", 2).await;
    assert_eq!((status, answer["model"].as_str()), (200, Some("first")), "{answer}");
    let (status, answer) = ask("second", 2).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (503, Some("model_unavailable")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("second"), "{answer}");
    let (code, said) = models(&["running"]);
    assert!(code == 0 && said.contains("first   loaded") && said.contains("second  not loaded"), "{said}");
    let (code, said) = models(&["load", "second"]);
    assert!(code == 0 && said.starts_with("second: loaded"), "{said}");
    let (status, answer) = ask("second", 60).await;
    assert_eq!((status, &answer["choices"]), (200, &whole["choices"]));
    let (code, said) = models(&["unload", "third"]);
    assert!(code != 0 && said.contains("third") && said.contains("first, second"), "{said}");
}

/// `--fleet` puts a further model beside the default one, and an arm for it into the policy.
#[tokio::test(flavor = "multi_thread")]
async fn a_further_model_is_a_further_arm() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let config = weir::config(dir.path(), "{}");
    let model = model_file();
    let weir = Weir::start(&config, &data, &["--fleet", model.to_str().unwrap()]);
    let name = model.file_stem().unwrap().to_str().unwrap().to_lowercase();
    let (status, said) = weir.post("/v1/decision", &chat("auto", "hello")).await;
    assert_eq!(status, 200, "{said}");
    let arms: Vec<&Value> = said["decision"]["candidates"].as_array().unwrap().iter().map(|c| &c["arm"]).collect();
    assert_eq!(arms, [&json!("quick"), &json!("careful"), &json!(name)], "{said}");
    let (status, answer) = weir.post("/v1/chat/completions", &chat(&name, "What is the capital of France?")).await;
    assert_eq!((status, answer["model"].as_str()), (200, Some(name.as_str())), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_weir_answers_learns_and_explains() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let config = weir::config(dir.path(), "{}");
    let weir = Weir::start(&config, &data, &[]);

    let (status, answer) = weir.post("/v1/chat/completions", &chat("quick", "What is the capital of France?")).await;
    assert_eq!(status, 200, "{answer}");
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(answer["model"], "smollm2-135m-instruct");

    // Eight at once, streamed, by the bandit.
    let client = weir::client();
    let streams = (0..8).map(|i| {
        let mut body = chat("auto", &format!("Write one short sentence about the number {i}."));
        body["stream"] = json!(true);
        body["max_tokens"] = json!(24);
        body["stream_options"] = json!({"include_usage": true});
        let request = client.post(format!("{}/v1/chat/completions", weir.url)).json(&body);
        async move {
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 200);
            let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
            (id, response.text().await.unwrap())
        }
    });
    for (id, text) in futures_util::future::join_all(streams).await {
        let events: Vec<&str> = text.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
        assert_eq!(events.last(), Some(&"[DONE]"), "{text}");
        let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
        let said: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
        assert!(!said.trim().is_empty(), "{text}");
        let usage = &chunks.last().unwrap()["usage"];
        assert!(
            usage["completion_tokens"].as_u64().unwrap() >= 1 && usage["completion_tokens"].as_u64().unwrap() <= 24
        );
        let (status, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
        assert_eq!((status, view["outcome"]["status"].as_str()), (200, Some("ok")), "{view}");
    }

    // The embedder is there too.
    let (status, answer) =
        weir.post("/v1/embeddings", &json!({"model": "bge-small-en", "input": ["a cat", "a kitten"]})).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["data"][1]["embedding"].as_array().unwrap().len(), 384);

    drop(weir);
    let (code, out, err) =
        weir::run(&["audit", "reproduce", "--last", "100", "--json", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
}
