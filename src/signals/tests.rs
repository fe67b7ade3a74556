//! `measure` as a whole: golden features, the estimate's error, and that no text makes it panic.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::domain::{Message, PiiSignals, Sampling};

fn request(messages: Vec<Message>) -> Request {
    Request {
        model: "auto".into(),
        messages: Arc::from(messages),
        sampling: Sampling::default(),
        n: 1,
        logprobs: false,
        top_logprobs: 0,
        stream: false,
        include_usage: false,
        needs: vec![],
        metadata: BTreeMap::new(),
        user: None,
        session: None,
        client_retry: 0,
        priority: 0,
        exact: false,
        keep: None,
        sharing: String::new(),
        begun: None,
        body: Bytes::new(),
    }
}

fn user(text: &str) -> Request {
    request(vec![Message::text(Role::User, text)])
}

#[test]
fn golden_features_of_a_plain_question() {
    let signals = measure(&user("What is the capital of France?"));
    let expected = Signals {
        tokens: 11,
        query_tokens: 7,
        language: "en".into(),
        code_share: 0.0,
        // Six words, one sentence, eight syllables: 100 - (206.835 - 6.09 - 112.8).
        complexity: signals.complexity,
        turn: 1,
        ..Signals::default()
    };
    assert_eq!(signals, expected);
    assert!((signals.complexity - 12.055).abs() < 1e-9, "{}", signals.complexity);
}

#[test]
fn golden_features_of_a_conversation() {
    let mut request = request(vec![
        Message::text(Role::System, "You are terse."),
        Message::text(Role::User, "My card 4111 1111 1111 1111 was declined"),
        Message::text(Role::Assistant, "Mail support@example.com."),
        Message {
            role: Role::User,
            content: vec![
                ContentPart::Text("fn main() {\n    println!(\"hi\");\n}".into()),
                ContentPart::Other { kind: "image_url".into() },
                ContentPart::Text("why does this not compile".into()),
            ],
        },
    ]);
    request.needs = vec![Need::Tools, Need::ResponseFormat];
    let signals = measure(&request);
    assert_eq!(signals.turn, 2);
    assert_eq!(signals.code_share, 0.75);
    assert_eq!(signals.system_prompt, crate::domain::Hash::of(b"You are terse.").to_string()[..16]);
    assert!(signals.tools && signals.response_format);
    // What was said in earlier turns is sent again, so it counts.
    assert_eq!(signals.pii, PiiSignals { count: 2, email: 1, card: 1, ..PiiSignals::default() });
    assert!(signals.tokens > signals.query_tokens + 20, "{signals:?}");
}

#[test]
fn the_system_prompt_hash_is_of_the_system_prompt() {
    let parts = |texts: &[&str]| texts.iter().map(|t| ContentPart::Text((*t).into())).collect();
    let request = request(vec![
        Message { role: Role::System, content: parts(&["one", "two"]) },
        Message::text(Role::User, "hello"),
        Message { role: Role::Developer, content: parts(&["three"]) },
    ]);
    let whole = crate::domain::Hash::of(request.system_prompt().unwrap().as_bytes()).to_string();
    assert_eq!(measure(&request).system_prompt, whole[..16]);
    assert_eq!(measure(&user("hello")).system_prompt, "");
}

#[test]
fn no_user_message_and_no_text_are_measured_too() {
    for request in [request(vec![]), request(vec![Message::text(Role::System, "s")]), user(""), user("\0")] {
        let signals = measure(&request);
        assert_eq!((signals.language.as_str(), signals.complexity, signals.code_share), ("und", 0.0, 0.0));
    }
}

/// How near it comes to a real tokenizer's counts is tested with one in `tests/embedder.rs`.
#[test]
fn the_token_estimate_by_hand() {
    for (text, expected) in [
        ("", 0),
        (" ", 1),
        ("What is the capital of France?", 7),
        ("internationalization", 3),
        ("1234567", 3),
        ("a - - b ----", 5),
        ("one\n\n\ntwo", 3),
        ("\u{1f980}\u{1f980}", 4),
        ("法国的首都是哪里", 8),
        ("столица", 4),
    ] {
        assert_eq!(estimate_tokens(text), expected, "{text:?}");
    }
}

/// Far more than it takes, since test machines are shared; what it takes is in the commit's message. A quadratic step would
/// not pass.
#[test]
fn long_texts_are_measured_in_linear_time() {
    const SHORT: usize = 128 << 10;
    for text in ["lorem ipsum ", "1 ", "4111 ", "@", "a", "a@", "DE89 ", "+1"] {
        // The least of several, as other processes only make it longer.
        let time = |bytes: usize| {
            let text = user(&text.repeat(bytes / text.len()));
            let once = || {
                let start = Instant::now();
                measure(&text);
                start.elapsed()
            };
            (0..5).map(|_| once()).min().unwrap().as_secs_f64()
        };
        // Eight times where it is linear, 64 times where it is quadratic.
        let ratio = time(8 * SHORT) / time(SHORT);
        assert!(ratio < 32.0, "{ratio} times for {text:?}");
    }
}

#[test]
#[ignore = "a measurement: cargo test --release --lib signals::tests::cost -- --ignored --nocapture"]
fn cost_of_a_short_query() {
    let query = "I was charged twice for my order last week and the support page keeps sending me in circles. Could you tell \
                 me how to get the second payment back, and how long a refund usually takes to arrive?";
    let request = user(query);
    let time = |what: &str, f: &mut dyn FnMut()| {
        f();
        let start = Instant::now();
        for _ in 0..10_000 {
            f();
        }
        println!("{what}: {:.2} us", start.elapsed().as_secs_f64() * 100.0);
    };
    time("measure", &mut || drop(std::hint::black_box(measure(&request))));
    time("tokens", &mut || _ = std::hint::black_box(tokens::estimate(query)));
    time("pii", &mut || pii::scan(std::hint::black_box(query), &mut PiiSignals::default()));
    time("code", &mut || _ = std::hint::black_box(code::share(query)));
    time("complexity", &mut || _ = std::hint::black_box(complexity::of(query)));
    time("language", &mut || _ = std::hint::black_box(language::detect(query)));
    time("language by trigrams", &mut || {
        let query =
            "Jaka jest stolica Francji i ilu ma mieszkancow? Prosze o krotka odpowiedz, najlepiej jednym zdaniem.";
        _ = std::hint::black_box(language::detect(query));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_text_makes_it_panic_and_every_feature_is_in_range(text in any::<String>(), digits in "[0-9 +().@/A-Z-]{0,80}") {
        for text in [&text, &digits, &format!("{text}{digits}"), &format!("\0{digits}\0{text}")] {
            let signals = measure(&user(text));
            prop_assert!((0.0..=1.0).contains(&signals.code_share));
            prop_assert!((0.0..=100.0).contains(&signals.complexity));
            prop_assert!(signals.query_tokens as usize <= 4 * text.chars().count());
            let pii = signals.pii;
            prop_assert_eq!(pii.count, pii.email + pii.phone + pii.card + pii.iban + pii.ssn);
        }
    }

    #[test]
    fn the_same_text_measures_the_same(text in "\\PC{0,200}") {
        prop_assert_eq!(measure(&user(&text)), measure(&user(&text)));
    }
}
