//! JSON bytes to typed values, with errors that name the place: line and column for what is no JSON, the path
//! (`messages[0].content`) for what has the wrong type. The fast way parses once; only a failure is parsed again, to find
//! its path.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::error::Category;

/// Error messages quote at most this much of serde's words, which may hold the client's own text.
const QUOTED: usize = 240;

/// Why a body is no request; always the client's to mend (400).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    pub message: String,
    /// The field at fault, as a path.
    pub param: Option<String>,
    /// OpenAI's machine-readable word, where it has one.
    pub code: Option<&'static str>,
}

impl Invalid {
    /// A value of the right type that may not be.
    pub fn value(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: Some(param.into()), code: Some("invalid_value") }
    }

    /// A field that must be there.
    pub fn missing(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: Some(param.into()), code: Some("missing_required_parameter") }
    }

    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        self.code.unwrap_or("invalid")
    }
}

/// Parses one JSON object.
pub fn object<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Invalid> {
    let text = std::str::from_utf8(bytes).map_err(|e| not_utf8(bytes, e.valid_up_to()))?;
    match serde_json::from_str::<Object<T>>(text) {
        Ok(Object(value)) => Ok(value),
        Err(error) => Err(explain::<T>(text, &error)),
    }
}

fn not_utf8(bytes: &[u8], at: usize) -> Invalid {
    let line = 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
    let column = 1 + bytes[..at].iter().rev().take_while(|b| **b != b'\n').count();
    Invalid {
        message: format!("The body is not UTF-8: byte {at} (line {line}, column {column}) begins no character."),
        param: None,
        code: Some("invalid_utf8"),
    }
}

/// Says what is wrong with `text`, which did not parse. Parses once more, for the path.
fn explain<'a, T: Deserialize<'a>>(text: &'a str, error: &serde_json::Error) -> Invalid {
    if error.classify() != Category::Data {
        let hint = if text.trim().is_empty() { "; it is empty" } else { "" };
        return Invalid {
            message: format!("The body is not valid JSON{hint}: {}.", quote(&error.to_string())),
            param: None,
            code: Some("invalid_json"),
        };
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let path = match serde_path_to_error::deserialize::<_, Object<T>>(&mut deserializer) {
        Err(error) => error.path().to_string(),
        Ok(_) => String::new(),
    };
    // serde_path_to_error writes `.` for the document itself.
    let param = Some(path).filter(|path| !path.is_empty() && path != ".");
    let what = quote(&error.to_string());
    match param {
        Some(param) => Invalid {
            message: format!("Invalid value for '{param}': {what}."),
            param: Some(param),
            code: Some("invalid_type"),
        },
        None => Invalid { message: format!("Invalid request: {what}."), param: None, code: Some("invalid_type") },
    }
}

fn quote(words: &str) -> String {
    match words.char_indices().nth(QUOTED) {
        None => words.to_owned(),
        // The end says where, and is worth keeping.
        Some((cut, _)) => {
            let place = words.rfind(" at line ").filter(|at| *at > cut).map_or("", |at| &words[at..]);
            format!("{}…{place}", &words[..cut])
        }
    }
}

/// A value that must be written as a JSON object. serde's derived structs would take an array of their fields as well.
#[derive(Debug, Default)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(V(PhantomData))
    }
}

/// An array of which only the length matters; its elements are skipped. `null` counts as none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count(pub usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array or null")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Count, A::Error> {
                let mut count = 0;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Count(count))
            }

            fn visit_unit<E>(self) -> Result<Count, E> {
                Ok(Count(0))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// An integer in JSON's notation; fractions and exponents are refused.
#[derive(Clone, Copy, Debug)]
pub struct Integer(pub i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Integer;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_i64<E>(self, v: i64) -> Result<Integer, E> {
                Ok(Integer(v))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Integer, E> {
                // Above every limit that a field has; the range check then names the limit.
                Ok(Integer(i64::try_from(v).unwrap_or(i64::MAX)))
            }
        }
        deserializer.deserialize_i64(V)
    }
}

/// A number, whole or not.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_i64<E>(self, v: i64) -> Result<Number, E> {
                Ok(Number(v as f64))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Number, E> {
                Ok(Number(v as f64))
            }

            fn visit_f64<E>(self, v: f64) -> Result<Number, E> {
                Ok(Number(v))
            }
        }
        deserializer.deserialize_f64(V)
    }
}

/// One string, or an array of them.
#[derive(Debug, PartialEq)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E>(self, v: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany::One(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<OneOrMany, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = seq.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany::Many(texts))
            }
        }
        deserializer.deserialize_any(V)
    }
}
