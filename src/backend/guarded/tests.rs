use serde_json::json;

use super::*;
use crate::{
    backend::scripted::ScriptedBackend,
    domain::{CallSpec, DecisionId},
};

const POLICY: BreakerPolicy =
    BreakerPolicy { window: 4, least: 2, share: 0.5, open: 40_000, most_open: 40_000, probes: 1 };

fn guarded(rules: serde_json::Value) -> (Guarded, Arc<Mutex<Vec<String>>>) {
    let script = serde_json::from_value(json!({"rules": rules})).unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let listener = {
        let heard = Arc::clone(&heard);
        move |change: BreakerChange| {
            heard.lock().unwrap().push(format!("{} {}: {}", change.model, change.state.as_str(), change.detail));
        }
    };
    (Guarded::new(Arc::new(ScriptedBackend::new("m", script)), "m", POLICY, Arc::new(listener)), heard)
}

async fn ask(backend: &Guarded, text: &str, stream: bool) -> Result<(), BackendError> {
    let body = json!({"messages": [{"role": "user", "content": text}]}).to_string();
    let request = crate::backend::remote::testing::request(&body, stream);
    let call = Call {
        id: DecisionId::new(),
        index: 0,
        spec: CallSpec::bare("m"),
        request: Arc::new(request),
        client_authorization: None,
        deadline: None,
    };
    match backend.start(call).await? {
        Reply::Whole { .. } => Ok(()),
        Reply::Stream { mut chunks, .. } => {
            while let Some(chunk) = chunks.next().await {
                chunk?;
            }
            Ok(())
        }
    }
}

#[tokio::test]
async fn a_model_whose_calls_fail_is_left_alone_and_tried_again() {
    let rules = json!([{"contains": "bad", "fail": {"kind": "server_error"}}, {"contains": "cut", "cut_after": 1},
                       {"contains": "wrong", "fail": {"kind": "bad_request"}}, {"reply": {"text": "a b c"}}]);
    let (backend, heard) = guarded(rules);
    assert!(ask(&backend, "fine", false).await.is_ok());
    for _ in 0..5 {
        assert_eq!(ask(&backend, "wrong", false).await.unwrap_err().kind, ErrorKind::BadRequest);
    }
    assert_eq!(backend.breaker(), Some(BreakerState::Closed), "the requests' own fault");
    // Within a stream, too.
    assert_eq!(ask(&backend, "cut", true).await.unwrap_err().kind, ErrorKind::Cut);
    assert!(!backend.state().available);
    let error = ask(&backend, "fine", false).await.unwrap_err();
    assert!(error.kind == ErrorKind::BreakerOpen && error.retry_after.is_some(), "{error}");
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(backend.state().available);
    assert_eq!(ask(&backend, "bad", false).await.unwrap_err().kind, ErrorKind::ServerError);
    assert_eq!(ask(&backend, "fine", true).await.unwrap_err().kind, ErrorKind::BreakerOpen);
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(ask(&backend, "fine", true).await.is_ok());
    assert_eq!(backend.breaker(), Some(BreakerState::Closed));
    let heard = heard.lock().unwrap();
    let states: Vec<&str> = heard.iter().map(|said| said.split(':').next().unwrap()).collect();
    assert_eq!(states, ["m open", "m half_open", "m open", "m half_open", "m closed"]);
    assert!(heard[0].contains("1 of its last 2 calls failed, this one by cut; left alone for 0 s"), "{heard:?}");
}

/// Whoever is slow to tell of a change is not overtaken by who makes the next.
#[test]
fn changes_are_told_in_their_order() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (begun, begins) = std::sync::mpsc::channel();
    let listener = {
        let told = Arc::clone(&told);
        move |change: BreakerChange| {
            if matches!(change.state, BreakerState::Open { .. }) {
                begun.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
            told.lock().unwrap().push(change.state.as_str());
        }
    };
    let policy = BreakerPolicy { least: 1, open: 1, ..POLICY };
    let guard = Arc::new(Guard {
        model: "m".to_owned(),
        breaker: Mutex::new(Breaker::new(policy)),
        started: Instant::now(),
        listener: Arc::new(listener),
    });
    let opening = std::thread::spawn({
        let guard = Arc::clone(&guard);
        move || guard.enter(None).unwrap().failed(&BackendError::new(ErrorKind::Cut, ""))
    });
    begins.recv().unwrap();
    guard.enter(None).unwrap().end(Verdict::Good, "");
    opening.join().unwrap();
    assert_eq!(*told.lock().unwrap(), ["open", "half_open", "closed"]);
}

#[tokio::test]
async fn a_client_that_leaves_gives_the_place_of_a_probe_back() {
    let rules =
        json!([{"contains": "bad", "fail": {"kind": "timeout"}}, {"reply": {"text": "a b c"}, "first_token_ms": 5000}]);
    let (backend, _) = guarded(rules);
    for _ in 0..2 {
        assert_eq!(ask(&backend, "bad", false).await.unwrap_err().kind, ErrorKind::Timeout);
    }
    tokio::time::sleep(Duration::from_millis(60)).await;
    let mut probe = Box::pin(ask(&backend, "fine", false));
    assert!(futures_util::FutureExt::now_or_never(&mut probe).is_none());
    assert_eq!(ask(&backend, "fine", false).await.unwrap_err().kind, ErrorKind::BreakerOpen, "one at a time");
    drop(probe);
    assert!(backend.state().available);
}
