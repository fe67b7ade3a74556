//! What a newcomer gets wrong, and what goes wrong around weir: each has a message to act on, and nothing panics.

use std::path::Path;

use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::support::weir::{self, Weir, chat};

const SCRIPTED: &str = r#"
fleet:
  - name: one
    scripted: {rules: [{reply: {text: "an answer"}}]}
policies: [one.yaml]
embedder: {model: "off"}
"#;

fn scripted(dir: &Path) -> std::path::PathBuf {
    std::fs::write(
        dir.join("one.yaml"),
        "policy: one\nmodels: {one: {name: one}}\nselect: {arms: [one], static: one}\n",
    )
    .unwrap();
    weir::config(dir, SCRIPTED)
}

fn refuses_to_start(config: &Path, data: &Path, more: &[&str]) -> String {
    match Weir::try_start(config, data, more) {
        Ok(_) => panic!("it started"),
        Err((status, stderr)) => {
            assert_eq!(status.and_then(|s| s.code()), Some(1), "{stderr}");
            assert!(!stderr.contains("panicked"), "{stderr}");
            stderr
        }
    }
}

fn refuses_to_listen(address: &str, dir: &Path) -> String {
    let out = weir::program()
        .args(["serve", "--listen", address, "--data-dir"])
        .arg(dir.join("data"))
        .arg("--config")
        .arg(scripted(dir))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    String::from_utf8(out.stderr).unwrap()
}

#[test]
fn a_taken_port_names_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let stderr = refuses_to_listen(&address, dir.path());
    assert!(stderr.contains(&address) && stderr.contains("--listen"), "{stderr}");
}

#[test]
fn a_data_directory_that_cannot_be_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let stderr = refuses_to_start(&scripted(dir.path()), &file.join("data"), &[]);
    assert!(stderr.contains("a-file") && stderr.contains("--data-dir"), "{stderr}");
}

#[test]
fn two_weirs_do_not_share_a_data_directory() {
    let dir = tempfile::tempdir().unwrap();
    let config = scripted(dir.path());
    let data = dir.path().join("data");
    let _first = Weir::start(&config, &data, &[]);
    let stderr = refuses_to_start(&config, &data, &[]);
    assert!(stderr.contains("another weir") || stderr.contains("in use"), "{stderr}");
}

#[test]
fn an_open_port_to_the_world_needs_keys() {
    let dir = tempfile::tempdir().unwrap();
    let stderr = refuses_to_listen("0.0.0.0:0", dir.path());
    assert!(stderr.contains("keys"), "{stderr}");
}

#[test]
fn a_database_that_is_down_at_the_start_is_said_without_its_password() {
    let dir = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("postgres://weir:s3cret@127.0.0.1:{free}/weir");
    let stderr = refuses_to_start(&scripted(dir.path()), &dir.path().join("data"), &["--database-url", &url]);
    assert!(stderr.contains("PostgreSQL") && stderr.contains("DATABASE_URL"), "{stderr}");
    assert!(!stderr.contains("s3cret"), "{stderr}");
}

#[test]
fn a_configuration_with_errors_shows_them_with_their_places() {
    let dir = tempfile::tempdir().unwrap();
    let config = weir::config(dir.path(), "listn: 127.0.0.1:1\nfleet:\n  - {name: a, remot: {url: http://x}}\n");
    let (code, _, stderr) = weir::run(&["check", "--config", config.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(stderr.contains("listn") && stderr.contains("listen"), "{stderr}");
    assert!(stderr.contains("remot") && stderr.contains("remote"), "both errors at once: {stderr}");
}

#[test]
fn activations_have_eight_or_sixteen_bits() {
    let dir = tempfile::tempdir().unwrap();
    let config = weir::config(dir.path(), "fleet:\n  - {name: a, local: {model: m.gguf, activation_bits: 4}}\n");
    let (code, _, stderr) = weir::run(&["check", "--config", config.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(stderr.contains("`a`: activation_bits is 4, and must be 8 or 16"), "{stderr}");
}

#[test]
fn a_policy_with_errors_keeps_weir_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let config = scripted(dir.path());
    std::fs::write(
        dir.path().join("one.yaml"),
        "policy: one\nmodels: {one: {name: one}}\nselect: {arms: [oen], static: oen}\n",
    )
    .unwrap();
    let stderr = refuses_to_start(&config, &dir.path().join("data"), &[]);
    assert!(stderr.contains("one.yaml") && stderr.contains("oen"), "{stderr}");
}

#[test]
fn a_truncated_model_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("broken.gguf");
    std::fs::write(&model, b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0abc").unwrap();
    let yaml = SCRIPTED.replace(
        "scripted: {rules: [{reply: {text: \"an answer\"}}]}",
        &format!("local: {{model: {}}}", model.display()),
    );
    std::fs::write(
        dir.path().join("one.yaml"),
        "policy: one\nmodels: {one: {name: one}}\nselect: {arms: [one], static: one}\n",
    )
    .unwrap();
    let stderr = refuses_to_start(&weir::config(dir.path(), &yaml), &dir.path().join("data"), &[]);
    assert!(stderr.contains("broken.gguf"), "{stderr}");
}

/// Each bad body, the status that it gets, and a word of the message.
#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_openai_errors() {
    let dir = tempfile::tempdir().unwrap();
    let weir = Weir::start(&scripted(dir.path()), &dir.path().join("data"), &[]);
    let user = |content: Value| json!({"model": "auto", "messages": [{"role": "user", "content": content}]});
    let with = |key: &str, value: Value| {
        let mut body = user(json!("x"));
        body[key] = value;
        body
    };
    let cases: Vec<(Vec<u8>, u16, &str)> = vec![
        (b"{not json".to_vec(), 400, "JSON"),
        (b"\xff\xfe{}".to_vec(), 400, "UTF-8"),
        (b"".to_vec(), 400, ""),
        (json!({"model": "auto", "messages": []}).to_string().into_bytes(), 400, "messages"),
        (json!({"model": "auto"}).to_string().into_bytes(), 400, "messages"),
        (user(json!(5)).to_string().into_bytes(), 400, "content"),
        (with("max_tokens", json!(-1)).to_string().into_bytes(), 400, "max_tokens"),
        (with("temperature", json!("hot")).to_string().into_bytes(), 400, "temperature"),
        (with("model", json!("no-such-model")).to_string().into_bytes(), 404, "one"),
        (user(json!("x".repeat(11 << 20))).to_string().into_bytes(), 413, ""),
    ];
    for (body, expected, word) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let response =
            weir::client().post(format!("{}/v1/chat/completions", weir.url)).body(body).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        assert_eq!(status, expected, "{shown}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        let message = error["error"]["message"].as_str().unwrap_or_else(|| panic!("{shown}: {text}"));
        assert!(message.contains(word), "{shown}: {message}");
    }
    // A NUL is text like any other, in the prompt and in what is recorded of it.
    let mut nul = chat("auto", "before\u{0}after");
    nul["metadata"] = json!({"note": "a\u{0}b"});
    let (status, answer) = weir.post("/v1/chat/completions", &nul).await;
    assert_eq!(status, 200, "{answer}");
    let id = answer["id"].as_str().unwrap();
    let (status, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
    assert_eq!(status, 200, "{view}");
    assert!(!weir.stderr().contains("panicked"), "{}", weir.stderr());
}

/// A client that leaves in the middle ends its request, and the record says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    scripted(dir.path());
    let config = weir::config(
        dir.path(),
        &SCRIPTED.replace(
            "{reply: {text: \"an answer\"}}",
            "{reply: {text: \"one two three four five six seven eight nine ten\"}, token_ms: 200}",
        ),
    );
    let weir = Weir::start(&config, &dir.path().join("data"), &[]);
    let mut body = chat("auto", "count");
    body["stream"] = json!(true);
    let response = weir::client().post(format!("{}/v1/chat/completions", weir.url)).json(&body).send().await.unwrap();
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let mut bytes = response.bytes_stream();
    bytes.next().await.unwrap().unwrap();
    drop(bytes);
    for _ in 0..100 {
        let (_, view) = weir.get(&format!("/v1/audit/decisions/{id}")).await;
        if view["outcome"]["status"] == "cancelled" {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("the departure was never recorded");
}

/// A full disk refuses requests with 503, says so in `/readyz`, and what was recorded before still verifies.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = scripted(dir.path());
    let data = dir.path().join("data");
    // A limit on file size stands in for the full disk: writes beyond it fail the same way (EFBIG for ENOSPC).
    let weir = Weir::start_limited(&config, &data, 512);
    let mut refused = None;
    for i in 0..2000 {
        let (status, answer) = weir.post("/v1/chat/completions", &chat("auto", &format!("{i}"))).await;
        if status != 200 {
            refused = Some((status, answer));
            break;
        }
    }
    let (status, answer) = refused.expect("the limit was never reached");
    assert_eq!(status, 503, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("recorded"), "{answer}");
    let (status, ready) = weir.get("/readyz").await;
    assert_eq!(status, 503, "{ready}");
    drop(weir);
    let weir = Weir::start(&config, &data, &[]);
    let (status, _) = weir.post("/v1/chat/completions", &chat("auto", "again")).await;
    assert_eq!(status, 200, "with space again, it serves again");
    drop(weir);
    let (code, out, err) = weir::run(&["audit", "verify", "--json", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
}
