use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::{FutureExt, future::BoxFuture};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    backend::{remote::testing, scripted::ScriptedBackend},
    cascade::limiter::LimiterPolicy,
    domain::{CallSpec, Completion, DecisionId, Usage},
};

const POLICY: LimiterPolicy = LimiterPolicy {
    initial: 2,
    min: 1,
    max: 40,
    increase: 1,
    backoff_ratio: 0.5,
    slow_factor: None,
    window: 1_000_000,
};

fn call(text: &str, stream: bool, deadline: Option<Instant>) -> Call {
    let body = json!({"messages": [{"role": "user", "content": text}]}).to_string();
    Call {
        id: DecisionId::new(),
        index: 0,
        spec: CallSpec::bare("m"),
        request: Arc::new(testing::request(&body, stream)),
        client_authorization: None,
        deadline,
    }
}

fn limited(inner: Arc<dyn Backend>, policy: LimiterPolicy, max_waiting: usize) -> Limited {
    Limited::new(inner, "m", Limiter::new(policy).unwrap(), max_waiting, Duration::from_secs(60))
}

fn scripted(rules: serde_json::Value) -> Arc<dyn Backend> {
    Arc::new(ScriptedBackend::new("m", serde_json::from_value(json!({"rules": rules})).unwrap()))
}

impl Limited {
    /// Calls under way, and calls that wait.
    fn load(&self) -> (u32, usize) {
        let queue = self.gate.queue();
        (queue.limiter.in_flight(), queue.waiting.len())
    }
}

#[tokio::test]
async fn a_place_is_taken_until_the_end_of_a_stream_or_of_whoever_reads_it() {
    let backend = limited(scripted(json!([{"reply": {"text": "a b c"}}])), POLICY, 1);
    let start = || async {
        match backend.start(call("x", true, None)).await.unwrap() {
            Reply::Stream { chunks, .. } => chunks,
            Reply::Whole { .. } => unreachable!(),
        }
    };
    let (mut first, second) = (start().await, start().await);
    assert_eq!(backend.load(), (2, 0));
    let mut third = Box::pin(start());
    assert!(third.as_mut().now_or_never().is_none());
    let refused = backend.start(call("x", true, None)).await.err().unwrap();
    assert_eq!((refused.kind, refused.status), (ErrorKind::RateLimited, None));
    assert!(
        refused.message.contains("2 calls at once") && refused.message.contains("1 calls are waiting"),
        "{refused}"
    );
    assert_eq!((backend.load(), backend.state().waiting), ((2, 1), 1));
    while first.next().await.is_some() {}
    assert_eq!(backend.load(), (2, 0), "the place went to the one that waits");
    drop((second, third.await));
    assert_eq!(backend.load(), (0, 0));
}

#[tokio::test]
async fn nobody_waits_beyond_his_deadline() {
    let backend = limited(scripted(json!([{"reply": {"text": "a"}, "first_token_ms": 60000}])), POLICY, 5);
    let mut running: Vec<_> = (0..2).map(|_| Box::pin(backend.start(call("x", false, None)))).collect();
    running.iter_mut().for_each(|call| assert!(call.as_mut().now_or_never().is_none()));
    let soon = Instant::now() + Duration::from_millis(20);
    let late = backend.start(call("x", false, Some(soon))).await.err().unwrap();
    assert!(late.kind == ErrorKind::RateLimited && late.message.contains("none came free in time"), "{late}");
    assert_eq!((backend.load(), backend.concurrency_limit()), ((2, 0), Some(2)));
    // A client that leaves says nothing; a deadline that passes while the server computes does.
    running.clear();
    assert_eq!((backend.load(), backend.concurrency_limit()), ((0, 0), Some(2)));
    let passed = Instant::now();
    assert!(backend.start(call("x", false, Some(passed))).now_or_never().is_none());
    assert_eq!((backend.load(), backend.concurrency_limit()), ((0, 0), Some(1)));
}

#[tokio::test]
async fn only_what_tells_of_load_lowers_the_limit() {
    let status = |kind: &str, status: u16| json!({"contains": kind, "fail": {"kind": kind, "status": status}});
    let rules = json!([status("server_error", 500), status("bad_request", 400), status("rate_limited", 429)]);
    let policy = LimiterPolicy { initial: 16, ..POLICY };
    let backend = limited(scripted(rules), policy, 5);
    for (text, limit) in [("server_error", 16), ("bad_request", 16), ("rate_limited", 8), ("rate_limited", 4)] {
        assert!(backend.start(call(text, false, None)).await.is_err());
        assert_eq!(backend.concurrency_limit(), Some(limit), "{text}");
    }
}

/// A server that answers 429 once all its places are taken.
struct Server {
    places: AtomicU32,
    running: AtomicU32,
}

#[async_trait]
impl Backend for Server {
    fn kind(&self) -> &'static str {
        "remote"
    }

    async fn start(&self, _: Call) -> Result<Reply, BackendError> {
        if self.running.fetch_add(1, Ordering::SeqCst) >= self.places.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            return Err(BackendError { status: Some(429), ..BackendError::new(ErrorKind::RateLimited, "full") });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.running.fetch_sub(1, Ordering::SeqCst);
        Ok(Reply::Whole {
            completion: Completion::Choices { choices: Vec::new(), usage: Usage::default() },
            model_reported: None,
        })
    }

    fn state(&self) -> ModelState {
        ModelState::default()
    }
}

#[tokio::test]
async fn the_limit_goes_to_what_the_server_bears_and_follows_it() {
    let server = Arc::new(Server { places: AtomicU32::new(6), running: AtomicU32::new(0) });
    let policy = LimiterPolicy { initial: 32, max: 64, backoff_ratio: 0.7, ..POLICY };
    let backend = Arc::new(limited(Arc::clone(&server) as Arc<dyn Backend>, policy, 100));
    for _ in 0..50 {
        let backend = Arc::clone(&backend);
        tokio::spawn(async move {
            loop {
                _ = backend.start(call("x", false, None)).await;
                tokio::task::yield_now().await;
            }
        });
    }
    let shown = || backend.concurrency_limit().unwrap();
    for (places, low, high) in [(6, 3, 7), (30, 15, 31), (2, 1, 3)] {
        server.places.store(places, Ordering::SeqCst);
        let found = async {
            while !(low..=high).contains(&shown()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(30), found).await.is_ok(), "{} for {places}", shown());
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert!((low / 2..=high * 2).contains(&shown()), "{} for {places}", shown());
        }
    }
}

/// A call in the order in which it came: it waits, or has its place.
enum Caller<'a> {
    Waits(BoxFuture<'a, Result<Place, BackendError>>),
    Calls(Place),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whoever ends, leaves or gives up: places are as many as calls, the limit keeps its bounds, nobody overtakes, and nobody
    /// waits while a place is free.
    #[test]
    fn places_are_never_lost(
        steps in prop::collection::vec((0u8..9, any::<prop::sample::Index>()), 0..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let policy = LimiterPolicy { initial: 3, min: 2, max: 6, ..POLICY };
            let backend = limited(scripted(json!([])), policy, 8);
            let mut callers: VecDeque<Caller<'_>> = VecDeque::new();
            for (what, which) in steps {
                let waits = callers.iter().filter(|caller| matches!(caller, Caller::Waits(_))).count();
                if what < 4 {
                    callers.push_back(Caller::Waits(backend.gate.take(None).boxed()));
                } else if !callers.is_empty() {
                    match callers.remove(which.index(callers.len())).unwrap() {
                        Caller::Calls(mut place) => match what {
                            4 | 5 => place.end(Verdict::Success),
                            6 => place.end(Verdict::Congested),
                            _ => drop(place),
                        },
                        Caller::Waits(take) => drop(take),
                    }
                }
                // Who has been handed a place may leave before he knows.
                if what == 8 {
                    callers.retain(|caller| !matches!(caller, Caller::Waits(_)));
                }
                let mut one_waits = false;
                let mut still = VecDeque::new();
                for caller in std::mem::take(&mut callers) {
                    still.extend(match caller {
                        Caller::Waits(mut take) => match (&mut take).now_or_never() {
                            None => {
                                one_waits = true;
                                Some(Caller::Waits(take))
                            }
                            Some(Ok(place)) => {
                                assert!(!one_waits, "one has overtaken");
                                Some(Caller::Calls(place))
                            }
                            Some(Err(error)) => {
                                assert!(waits == 8 && error.kind == ErrorKind::RateLimited, "{error}");
                                None
                            }
                        },
                        calls => Some(calls),
                    });
                }
                callers = still;
                let calls = callers.iter().filter(|caller| matches!(caller, Caller::Calls(_))).count();
                assert_eq!(backend.load(), (calls as u32, callers.len() - calls));
                let limit = backend.concurrency_limit().unwrap();
                assert!((2..=6).contains(&limit));
                assert!(callers.len() == calls || calls as u32 >= limit, "one waits for nothing");
                tokio::task::yield_now().await;
            }
            callers.clear();
            assert_eq!(backend.load(), (0, 0));
        });
    }
}
