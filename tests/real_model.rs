//! The default weir, as a newcomer starts it: no configuration, the real models, real answers.

use serde_json::{Value, json};

use crate::support::{
    test_home,
    weir::{self, Weir, chat},
};

/// A data directory whose models are those that `./test` fetched.
fn data_dir(dir: &std::path::Path) -> std::path::PathBuf {
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    std::os::unix::fs::symlink(test_home().join("models"), data.join("models")).unwrap();
    data
}

/// `--fleet` puts a further model beside the default one, and an arm for it into the policy.
#[tokio::test(flavor = "multi_thread")]
async fn a_further_model_is_a_further_arm() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_dir(dir.path());
    let config = weir::config(dir.path(), "{}");
    let models = test_home().join("models/smollm2-135m-instruct");
    let model = std::fs::read_dir(models)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "gguf"))
        .unwrap();
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
