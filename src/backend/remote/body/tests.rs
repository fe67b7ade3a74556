//! What is spliced, and that nothing else changes.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    backend::remote::testing::request,
    domain::{CallSpec, DecisionId},
};

fn call(body: &str, stream: bool, spec: CallSpec) -> Call {
    Call {
        id: DecisionId::new(),
        index: 0,
        spec,
        request: Arc::new(request(body, stream)),
        client_authorization: None,
        deadline: None,
    }
}

fn sent(body: &str, stream: bool, spec: CallSpec) -> String {
    let bytes = upstream_body(&call(body, stream, spec), Some("up"), true).unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn plain(body: &str) -> String {
    sent(body, false, CallSpec::bare("m"))
}

#[test]
fn only_the_model_changes() {
    let body = "{ \"z\":1.50e+00 ,\"model\" : \"auto\",\t\"tools\":[{\"type\":\"function\"}],\"x\":\"\\u00e9\", \"n\":18446744073709551616 }\n";
    assert_eq!(plain(body), body.replace("\"auto\"", "\"up\""));
    assert_eq!(plain(r#"{"mod\u0065l":"a","x":{"model":"inner"}}"#), r#"{"mod\u0065l":"up","x":{"model":"inner"}}"#);
    assert_eq!(plain(r#"{"model":"a","model":"b"}"#), r#"{"model":"up","model":"up"}"#);
    assert_eq!(plain("{}"), r#"{"model":"up"}"#);
    assert_eq!(plain(r#"{"a":1} "#), r#"{"a":1,"model":"up"} "#);
}

#[test]
fn an_untouched_body_is_the_same_memory() {
    let call = call(r#"{"model":"a","messages":[]}"#, false, CallSpec::bare("m"));
    let bytes = upstream_body(&call, None, true).unwrap();
    assert_eq!(bytes.as_ptr(), call.request.body.as_ptr());
}

#[test]
fn streams_are_asked_for_their_usage() {
    let stream = |body: &str| sent(body, true, CallSpec::bare("m"));
    assert_eq!(
        stream(r#"{"model":"up","stream":true}"#),
        r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#
    );
    assert_eq!(
        stream(r#"{"model":"up","stream":true,"stream_options":{"include_usage": false , "x":1}}"#),
        r#"{"model":"up","stream":true,"stream_options":{"include_usage": true , "x":1}}"#
    );
    assert_eq!(
        stream(r#"{"model":"up","stream":true,"stream_options":{"x":1}}"#),
        r#"{"model":"up","stream":true,"stream_options":{"x":1,"include_usage":true}}"#
    );
    assert_eq!(
        stream(r#"{"model":"up","stream":true,"stream_options":{ }}"#),
        r#"{"model":"up","stream":true,"stream_options":{ "include_usage":true}}"#
    );
    assert_eq!(
        stream(r#"{"model":"up","stream":true,"stream_options":null}"#),
        r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#
    );
    // The body follows the request as weir understood it.
    assert_eq!(plain(r#"{"model":"up","stream":true}"#), r#"{"model":"up","stream":false}"#);
}

#[test]
fn the_plan_sets_what_the_client_left_open_and_lowers_max_tokens() {
    let spec = CallSpec {
        sampling: Sampling {
            max_tokens: Some(50),
            temperature: Some(0.0),
            top_p: Some(0.5),
            seed: Some(-3),
            stop: vec!["END".into()],
        },
        ..CallSpec::bare("m")
    };
    assert_eq!(
        sent(r#"{"model":"up","temperature":null,"x":1}"#, false, spec.clone()),
        r#"{"model":"up","temperature":0.0,"x":1,"max_tokens":50,"top_p":0.5,"seed":-3,"stop":["END"]}"#
    );
    let body = r#"{"model":"up","max_completion_tokens":99,"temperature":1,"stop":"a"}"#;
    let mut call = call(body, false, spec.clone());
    let request = Arc::make_mut(&mut call.request);
    request.sampling =
        Sampling { max_tokens: Some(99), temperature: Some(1.0), stop: vec!["a".into()], ..Sampling::default() };
    assert_eq!(
        upstream_body(&call, Some("up"), true).unwrap(),
        r#"{"model":"up","max_completion_tokens":50,"temperature":1,"stop":["a","END"],"top_p":0.5,"seed":-3}"#
    );
    Arc::make_mut(&mut call.request).sampling.max_tokens = Some(7);
    let low = upstream_body(&call, Some("up"), true).unwrap();
    assert!(low.starts_with(br#"{"model":"up","max_completion_tokens":99"#), "a lower wish of the client stays");
}

#[test]
fn system_text_goes_before_the_clients_own() {
    let with = |body: &str| {
        let spec = CallSpec { system: Some("be \"brief\"".into()), ..CallSpec::bare("m") };
        sent(body, false, spec)
    };
    assert_eq!(
        with(r#"{"model":"up","messages":[ {"role":"user","content":"q"}]}"#),
        r#"{"model":"up","messages":[{"role":"system","content":"be \"brief\""}, {"role":"user","content":"q"}]}"#
    );
    assert_eq!(
        with(r#"{"model":"up","messages":[]}"#),
        r#"{"model":"up","messages":[{"role":"system","content":"be \"brief\""}]}"#
    );
    assert_eq!(
        with(
            r#"{"model":"up","messages":[{"role":"system", "content":"own\u0021","name":"n"},{"role":"user","content":"q"}]}"#
        ),
        r#"{"model":"up","messages":[{"role":"system", "content":"be \"brief\"\n\nown!","name":"n"},{"role":"user","content":"q"}]}"#
    );
    assert_eq!(
        with(r#"{"model":"up","messages":[{"role":"developer","content":[{"type":"text","text":"own"}]}]}"#),
        r#"{"model":"up","messages":[{"role":"developer","content":[{"type":"text","text":"be \"brief\""},{"type":"text","text":"own"}]}]}"#
    );
    let spec = CallSpec { system: Some("s".into()), ..CallSpec::bare("m") };
    assert!(upstream_body(&call(r#"{"messages":3}"#, false, spec), None, true).is_err());
}

#[test]
fn what_is_no_object_is_refused() {
    for body in ["", "[]", "3", "{", r#"{"a":1}x"#, "{\"a\":\u{1}}"] {
        assert!(upstream_body(&call(body, false, CallSpec::bare("m")), Some("up"), true).is_err(), "{body}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((any::<String>(), inner), 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn the_rest_is_byte_exact(
        before in proptest::collection::vec(("[^\u{0}-\u{1f}\"\\\\]{0,8}", any_json()), 0..5),
        after in proptest::collection::vec(("x[a-z]{0,5}", any_json()), 0..5),
        pretty in any::<bool>(),
        has_model in any::<bool>(),
    ) {
        let show = |v: &Value| if pretty { serde_json::to_string_pretty(v).unwrap() } else { v.to_string() };
        let reserved = ["model", "stream", "stream_options"];
        let head: String = before.iter().filter(|(k, _)| !reserved.contains(&k.as_str()))
            .map(|(k, v)| format!("{}: {},", json!(k), show(v))).collect();
        let tail: String = after.iter().map(|(k, v)| format!(",\n{}:{}", json!(k), show(v))).collect();
        let (body, expected) = if has_model {
            (format!("{{{head}\"model\":\"auto\"{tail}}}"), format!("{{{head}\"model\":\"up\"{tail}}}"))
        } else {
            (format!("{{{head}\"q\":0{tail}}}"), format!("{{{head}\"q\":0{tail},\"model\":\"up\"}}"))
        };
        prop_assert_eq!(plain(&body), expected);
    }
}

#[test]
fn what_weir_alone_understands_does_not_leave() {
    assert_eq!(plain(r#"{"weir":{"exact":true},"model":"a","x":1.50}"#), r#"{"model":"up","x":1.50}"#);
    assert_eq!(plain(r#"{"model":"a", "weir" : null}"#), r#"{"model":"up"}"#);
    let marked = r#"{"model":"a","messages":[{"role":"user","weir":{"chunk":true},"content":[{"type":"text","text":"\"weir\"","weir":{"chunk":true},"cache_control":{"type":"ephemeral"}}]}],"weir":{}}"#;
    let want = r#"{"model":"up","messages":[{"role":"user","content":[{"type":"text","text":"\"weir\"","cache_control":{"type":"ephemeral"}}]}]}"#;
    assert_eq!(plain(marked), want);
    // Text that says so stays.
    let said = r#"{"model":"up","messages":[{"role":"user","content":"the \"weir\""}]}"#;
    assert_eq!(plain(said), said);
}
