//! Our canonical JSON against RFC 8785's own vectors, and against an independent implementation.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::*;

fn text<T: Serialize>(value: &T) -> String {
    String::from_utf8(to_bytes(value).unwrap()).unwrap()
}

#[test]
fn the_example_of_rfc_8785_section_3_2_2() {
    let value: Value = serde_json::from_str(
        r#"{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],
            "string":"\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}"#,
    )
    .unwrap();
    assert_eq!(
        text(&value),
        r#"{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}"#
    );
}

#[test]
fn keys_are_sorted_by_utf_16_code_units_as_in_section_3_2_3() {
    let value: Value = serde_json::from_str(
        r#"{"\u20ac":"Euro Sign","\r":"Carriage Return","\ufb33":"Hebrew Letter Dalet With Dagesh","1":"One",
            "\ud83d\ude00":"Emoji: Grinning Face","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis"}"#,
    )
    .unwrap();
    let order: Vec<String> = serde_json::from_str::<serde_json::Map<String, Value>>(&text(&value))
        .unwrap()
        .into_iter()
        .map(|(_, v)| v.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        order,
        [
            "Carriage Return",
            "One",
            "Control",
            "Latin Small Letter O With Diaeresis",
            "Euro Sign",
            "Emoji: Grinning Face",
            "Hebrew Letter Dalet With Dagesh"
        ]
    );
}

#[test]
fn numbers_follow_appendix_b() {
    for (bits, expected) in [
        (0x0000000000000000u64, "0"),
        (0x8000000000000000, "0"),
        (0x0000000000000001, "5e-324"),
        (0x8000000000000001, "-5e-324"),
        (0x7fefffffffffffff, "1.7976931348623157e+308"),
        (0x4340000000000000, "9007199254740992"),
        (0xc340000000000000, "-9007199254740992"),
        (0x4430000000000000, "295147905179352830000"),
        (0x44b52d02c7e14af5, "9.999999999999997e+22"),
        (0x44b52d02c7e14af6, "1e+23"),
        (0x444b1ae4d6e2ef4f, "999999999999999900000"),
        (0x444b1ae4d6e2ef50, "1e+21"),
        (0x3eb0c6f7a0b5ed8c, "9.999999999999997e-7"),
        (0x3eb0c6f7a0b5ed8d, "0.000001"),
        (0x41b3de4355555553, "333333333.3333332"),
        (0xbecbf647612f3696, "-0.0000033333333333333333"),
    ] {
        assert_eq!(text(&f64::from_bits(bits)), expected, "{bits:016x}");
    }
    assert!(to_bytes(&f64::NAN).is_err());
    assert!(to_bytes(&f64::INFINITY).is_err());
}

#[test]
fn integers_are_never_rounded() {
    assert_eq!(text(&i64::MAX), "9223372036854775807");
    assert_eq!(text(&i64::MIN), "-9223372036854775808");
    assert_eq!(text(&u64::MAX), "18446744073709551615");
    assert_eq!(text(&((1u64 << 53) + 1)), "9007199254740993");
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Shape {
    Unit,
    One(u8),
    Two(u8, i64),
    Named { zeta: f32, alpha: Option<char> },
}

#[derive(Serialize)]
struct Outer {
    zebra: Vec<Shape>,
    #[serde(flatten)]
    inner: Inner,
    apple: BTreeMap<u32, (bool, ())>,
}

#[derive(Serialize)]
struct Inner {
    mango: &'static str,
    banana: f64,
}

#[test]
fn every_shape_of_serde_agrees_with_the_oracle() {
    let value = Outer {
        zebra: vec![
            Shape::Unit,
            Shape::One(7),
            Shape::Two(1, -(1 << 53)),
            Shape::Named { zeta: 0.1, alpha: Some('é') },
            Shape::Named { zeta: -0.0, alpha: None },
        ],
        inner: Inner { mango: "a\u{0}\"b\\\u{1f}\n", banana: 1e-9 },
        apple: BTreeMap::from([(10, (true, ())), (9, (false, ()))]),
    };
    assert_eq!(text(&value), String::from_utf8(serde_json_canonicalizer::to_vec(&value).unwrap()).unwrap());
}

#[test]
fn a_key_that_comes_twice_is_an_error_and_leaves_the_buffer_alone() {
    #[derive(Serialize)]
    struct Twice {
        b: u8,
        #[serde(rename = "a")]
        first: u8,
        #[serde(flatten)]
        rest: BTreeMap<&'static str, u8>,
    }
    let mut out = b"before".to_vec();
    assert!(write(&mut out, &Twice { b: 1, first: 2, rest: BTreeMap::from([("a", 3)]) }).is_err());
    assert_eq!(out, b"before");
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-(1i64 << 53)..=1 << 53).prop_map(Value::from),
        any::<f64>().prop_filter("finite", |x| x.is_finite()).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((any::<String>(), inner), 0..6)
                .prop_map(|pairs| { pairs.into_iter().collect::<serde_json::Map<String, Value>>().into() }),
        ]
    })
}

proptest! {
    #[test]
    fn any_value_agrees_with_the_oracle(value in values()) {
        prop_assert_eq!(to_bytes(&value).unwrap(), serde_json_canonicalizer::to_vec(&value).unwrap());
    }

    #[test]
    fn what_was_written_reads_back(value in values()) {
        let bytes = to_bytes(&value).unwrap();
        let again: Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(to_bytes(&again).unwrap(), bytes);
    }
}

#[test]
fn vectors_survive() {
    let vector = [0.0f32, -0.0, 1.5, f32::MIN_POSITIVE, f32::NAN];
    let back = vector_from_base64(&vector_to_base64(&vector)).unwrap();
    assert_eq!(vector.map(f32::to_bits).to_vec(), back.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    assert_eq!(vector_from_bytes(&[0; 3]), None);
}
