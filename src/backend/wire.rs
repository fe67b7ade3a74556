//! JSON that passes through: finding and replacing single fields of a text without building a tree of it. What is not
//! named stays as it was, byte for byte: order, white space, number forms, fields that weir has never heard of.

use std::{borrow::Cow, fmt, ops::Range, sync::LazyLock};

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::domain::{FinishReason, Usage, UsageSource};

/// One field of a JSON object: its name, its value's text, and where that stands.
#[derive(Clone, Debug)]
pub struct Field<'a> {
    pub key: Cow<'a, str>,
    pub value: &'a str,
    pub at: Range<usize>,
}

struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(16);
                while let Some(Key(key)) = map.next_key()? {
                    fields.push((key, map.next_value()?));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// The fields of the JSON object that `json` is, in order, repeated ones included. The whole text is checked to be JSON.
///
/// # Errors
/// When `json` is anything else.
pub fn fields(json: &[u8]) -> Result<Vec<Field<'_>>, serde_json::Error> {
    let Fields(found) = serde_json::from_slice(json)?;
    let base = json.as_ptr() as usize;
    Ok(found
        .into_iter()
        .map(|(key, raw)| {
            let value = raw.get();
            // A borrowed RawValue is a part of the text that was parsed.
            let start = value.as_ptr() as usize - base;
            Field { key, value, at: start..start + value.len() }
        })
        .collect())
}

/// A text with some spans replaced.
#[derive(Debug, Default)]
pub struct Edits(Vec<(Range<usize>, Vec<u8>)>);

impl Edits {
    /// Replaces `span`; spans must not overlap. An empty span inserts; of several at one place the first comes first.
    pub fn replace(&mut self, span: Range<usize>, with: impl Into<Vec<u8>>) {
        self.0.push((span, with.into()));
    }

    /// Inserts fields, given as `"name":value`, at the end of the object that ends with `json`.
    pub fn append(&mut self, json: &[u8], is_empty: bool, fields: &[String]) {
        let end = json.iter().rposition(|b| *b == b'}').unwrap_or(json.len());
        for (i, field) in fields.iter().enumerate() {
            let comma = if is_empty && i == 0 { "" } else { "," };
            self.replace(end..end, format!("{comma}{field}"));
        }
    }

    /// The text as edited; the very same bytes where there is nothing to edit.
    pub fn apply(mut self, text: &Bytes) -> Bytes {
        if self.0.is_empty() {
            return text.clone();
        }
        self.0.sort_by_key(|(span, _)| span.start);
        let grown: usize = self.0.iter().map(|(_, with)| with.len()).sum();
        let mut out = BytesMut::with_capacity(text.len() + grown);
        let mut from = 0;
        for (span, with) in &self.0 {
            out.extend_from_slice(&text[from..span.start]);
            out.extend_from_slice(with);
            from = span.end;
        }
        out.extend_from_slice(&text[from..]);
        out.freeze()
    }
}

/// `text` as a JSON string, quotes included.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// `chunk` with its top-level `id` replaced by `new_id`, which must need no escaping.
///
/// `upstream_id` (as it stands between the quotes) is what the server's ids have been so far: where the text begins with
/// it, as most servers' do, nothing is parsed. Otherwise the top level is walked. A text without an `id` gets one; one that
/// is no JSON object is `None`.
pub fn rewrite_id(chunk: &Bytes, upstream_id: Option<&str>, new_id: &str) -> Option<Bytes> {
    if let Some(span) = upstream_id.and_then(|id| leading_id(chunk, id)) {
        return Some(splice_id(chunk, span, new_id));
    }
    let fields = fields(chunk).ok()?;
    Some(rewrite_id_in(chunk, &fields, new_id))
}

/// The same for a text whose fields are known.
pub fn rewrite_id_in(chunk: &Bytes, fields: &[Field<'_>], new_id: &str) -> Bytes {
    let mut edits = Edits::default();
    for field in fields.iter().filter(|f| f.key == "id") {
        edits.replace(field.at.clone(), format!("\"{new_id}\""));
    }
    if edits.0.is_empty() {
        let comma = if fields.is_empty() { "" } else { "," };
        let start = chunk.iter().position(|b| *b == b'{').map_or(0, |at| at + 1);
        edits.replace(start..start, format!("\"id\":\"{new_id}\"{comma}"));
    }
    edits.apply(chunk)
}

/// Where the id stands between its quotes, when `chunk` is an object that begins with exactly that id.
pub fn leading_id(chunk: &[u8], id: &str) -> Option<Range<usize>> {
    let after_key = chunk.strip_prefix(b"{\"id\":")?;
    let space = usize::from(after_key.first() == Some(&b' '));
    let start = 6 + space + 1;
    let end = start + id.len();
    let fits = chunk.get(start - 1) == Some(&b'"')
        && chunk.get(start..end) == Some(id.as_bytes())
        && chunk.get(end) == Some(&b'"')
        && chunk.last() == Some(&b'}');
    (fits && !id.is_empty()).then_some(start..end)
}

/// `chunk` with `span` replaced by `new_id`: one allocation, one copy.
pub fn splice_id(chunk: &[u8], span: Range<usize>, new_id: &str) -> Bytes {
    let mut out = Vec::with_capacity(chunk.len() - span.len() + new_id.len());
    out.extend_from_slice(&chunk[..span.start]);
    out.extend_from_slice(new_id.as_bytes());
    out.extend_from_slice(&chunk[span.end..]);
    Bytes::from(out)
}

/// What is looked for in every chunk; compiled once.
struct Needles {
    usage: Finder<'static>,
    finish_reason: Finder<'static>,
    error: Finder<'static>,
}

static NEEDLES: LazyLock<Needles> = LazyLock::new(|| Needles {
    usage: Finder::new(b"\"usage\""),
    finish_reason: Finder::new(b"\"finish_reason\""),
    error: Finder::new(b"\"error\""),
});

/// The texts that follow each `"key":` in `json`, white space skipped. Quotes inside JSON strings are escaped, so that a
/// found `"key":` is a field's name, of whatever depth.
fn values_of<'a>(json: &'a [u8], key: &'a Finder<'static>) -> impl Iterator<Item = &'a [u8]> {
    key.find_iter(json).filter_map(|at| {
        let rest = json[at + key.needle().len()..].trim_ascii_start();
        Some(rest.strip_prefix(b":")?.trim_ascii_start())
    })
}

/// Whether some field `error`, of whatever depth, holds more than `null`. A sieve: what it lets through is to be parsed.
pub fn may_hold_error(json: &[u8]) -> bool {
    values_of(json, &NEEDLES.error).any(|value| !value.starts_with(b"null"))
}

/// Why the choices of a chunk or a completion ended, for those that did. A word that OpenAI does not know counts as `stop`.
pub fn finish_reasons(json: &[u8]) -> impl Iterator<Item = FinishReason> {
    values_of(json, &NEEDLES.finish_reason).filter_map(|value| {
        let word = value.strip_prefix(b"\"")?;
        let word = &word[..memchr::memchr(b'"', word)?];
        Some(match word {
            b"length" => FinishReason::Length,
            b"tool_calls" | b"function_call" => FinishReason::ToolCalls,
            b"content_filter" => FinishReason::ContentFilter,
            _ => FinishReason::Stop,
        })
    })
}

/// Whether some field `usage`, of whatever depth, holds more than `null`. A sieve, as above.
pub fn may_hold_usage(json: &[u8]) -> bool {
    values_of(json, &NEEDLES.usage).any(|value| !value.starts_with(b"null"))
}

/// Whether a chunk says anything of usage, be it true or not.
pub fn tells_usage(fields: &[Field<'_>]) -> bool {
    fields.iter().any(|f| f.key == "usage" && f.value != "null")
}

/// No context holds so many tokens.
const MOST_TOKENS: f64 = 1e9;

/// The usage object at the top level of a chunk or a completion. One that holds no count, or what is none (negative, beyond
/// all measure), is not believed: budgets and records live on it.
pub fn usage_in(fields: &[Field<'_>]) -> Option<Usage> {
    #[derive(Deserialize)]
    struct Reported {
        #[serde(default)]
        prompt_tokens: Option<f64>,
        #[serde(default)]
        completion_tokens: Option<f64>,
        #[serde(default)]
        prompt_tokens_details: Option<Details>,
    }
    #[derive(Deserialize)]
    struct Details {
        #[serde(default)]
        cached_tokens: Option<f64>,
    }
    let field = fields.iter().rfind(|f| f.key == "usage" && f.value.starts_with('{'))?;
    let reported: Reported = serde_json::from_str(field.value).ok()?;
    reported.prompt_tokens.or(reported.completion_tokens)?;
    // Some servers count in floating point.
    let count = |n: Option<f64>| {
        let n = n.unwrap_or(0.0);
        (0.0..=MOST_TOKENS).contains(&n).then_some(n as u32)
    };
    let prompt_tokens = count(reported.prompt_tokens)?;
    let cached_tokens = count(reported.prompt_tokens_details.and_then(|d| d.cached_tokens)).unwrap_or(0);
    Some(Usage {
        prompt_tokens,
        cached_tokens: cached_tokens.min(prompt_tokens),
        completion_tokens: count(reported.completion_tokens)?,
        source: UsageSource::Reported,
        ..Usage::default()
    })
}

/// Whether a chunk carries no choice at all, as the one that only reports usage does.
pub fn has_no_choices(fields: &[Field<'_>]) -> bool {
    fields.iter().any(|f| f.key == "choices" && f.value[1..].trim_start().starts_with(']'))
}

/// Whether a chunk or a completion carries a choice: `choices` is a list that begins with an object.
pub fn has_choice(fields: &[Field<'_>]) -> bool {
    let choices = fields.iter().rfind(|f| f.key == "choices").and_then(|f| f.value.strip_prefix('['));
    choices.is_some_and(|list| list.trim_start().starts_with('{'))
}

/// Whether this is JSON from beginning to end, and UTF-8. Nothing of it is kept.
pub fn is_json(json: &[u8]) -> bool {
    std::str::from_utf8(json).is_ok_and(|text| serde_json::from_str::<IgnoredAny>(text).is_ok())
}

/// The generated text of each choice in a chunk (`delta`) or a completion (`message`), by choice index.
pub fn texts(json: &[u8]) -> Vec<(u32, String)> {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        #[serde(default)]
        index: u32,
        #[serde(alias = "delta")]
        message: Option<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        content: Option<String>,
    }
    let Ok(body) = serde_json::from_slice::<Body>(json) else { return Vec::new() };
    body.choices.into_iter().filter_map(|c| Some((c.index, c.message?.content?))).collect()
}

mod said;

pub use said::{Said, without_logprobs};

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(json: &str, upstream: Option<&str>) -> String {
        let out = rewrite_id(&Bytes::copy_from_slice(json.as_bytes()), upstream, "new").unwrap();
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn only_the_top_level_id_changes() {
        assert_eq!(rewritten(r#"{"id":"u1","a":1}"#, Some("u1")), r#"{"id":"new","a":1}"#);
        assert_eq!(rewritten(r#"{"id": "u1","a":1}"#, Some("u1")), r#"{"id": "new","a":1}"#);
        assert_eq!(
            rewritten(r#"{"choices":[{"id":"u1"}], "id" : "u1" }"#, Some("u1")),
            r#"{"choices":[{"id":"u1"}], "id" : "new" }"#
        );
        // A text that quotes the pair is no pair.
        let quoting = r#"{"c":"\"id\":\"u1\"","id":"u1"}"#;
        assert_eq!(rewritten(quoting, Some("u1")), r#"{"c":"\"id\":\"u1\"","id":"new"}"#);
        // Another id than before, an escaped name, none, null, and twice.
        assert_eq!(rewritten(r#"{"id":"u2"}"#, Some("u1")), r#"{"id":"new"}"#);
        assert_eq!(rewritten(r#"{"\u0069d":"u2"}"#, None), r#"{"\u0069d":"new"}"#);
        assert_eq!(rewritten(r#"{"a":1}"#, None), r#"{"id":"new","a":1}"#);
        assert_eq!(rewritten("{}", None), r#"{"id":"new"}"#);
        assert_eq!(rewritten(r#"{"id":null}"#, None), r#"{"id":"new"}"#);
        assert_eq!(rewritten(r#"{"id":1,"id":2}"#, None), r#"{"id":"new","id":"new"}"#);
        // An empty upstream id is no mark to trust.
        assert_eq!(rewritten(r#"{"id":"","a":1}"#, Some("")), r#"{"id":"new","a":1}"#);
        for bad in ["", "[]", "nonsense", r#"{"id":"u1","#, r#"{"a":"#] {
            assert_eq!(rewrite_id(&Bytes::copy_from_slice(bad.as_bytes()), Some("u1"), "new"), None, "{bad}");
        }
    }

    #[test]
    fn usage_is_read_at_the_top_level_only() {
        let reported = |p, c, k| Usage {
            prompt_tokens: p,
            cached_tokens: k,
            completion_tokens: c,
            source: UsageSource::Reported,
            ..Usage::default()
        };
        let usage = |json: &[u8]| usage_in(&fields(json).unwrap());
        assert_eq!(
            usage(
                br#"{"usage": {"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#
            ),
            Some(reported(3, 2, 1))
        );
        assert_eq!(usage(br#"{"usage":{"prompt_tokens":3.0}}"#), Some(reported(3, 0, 0)));
        assert_eq!(usage(br#"{"usage":null}"#), None);
        assert!(!tells_usage(&fields(br#"{"usage":null,"x":{"usage":{}}}"#).unwrap()));
        assert_eq!(usage(br#"{"x":{"usage":{"prompt_tokens":3}}}"#), None);
        assert_eq!(usage(br#"{"x":"\"usage\":{"}"#), None);
    }

    #[test]
    fn what_is_no_count_of_tokens_is_not_believed() {
        for lie in [
            "{}",
            "[]",
            r#"{"prompt_tokens":3,"completion_tokens":-1}"#,
            r#"{"prompt_tokens":1e30,"completion_tokens":1}"#,
            r#"{"prompt_tokens":4294967295,"completion_tokens":4294967295}"#,
            r#"{"prompt_tokens":1e999,"completion_tokens":1}"#,
            r#"{"prompt_tokens":"three"}"#,
            r#"{"prompt_tokens_details":{"cached_tokens":5}}"#,
        ] {
            let json = format!(r#"{{"usage":{lie}}}"#);
            let fields = fields(json.as_bytes()).unwrap();
            assert_eq!(usage_in(&fields), None, "{lie}");
            assert!(tells_usage(&fields) && may_hold_usage(json.as_bytes()), "{lie}");
        }
        let more_cached = r#"{"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":-1}}}"#;
        assert_eq!(usage_in(&fields(more_cached.as_bytes()).unwrap()).unwrap().cached_tokens, 0);
    }

    #[test]
    fn an_answer_has_a_choice_and_is_json() {
        let one = |json: &str| has_choice(&fields(json.as_bytes()).unwrap());
        assert!(one(r#"{"choices": [ {}]}"#));
        for none in [r#"{"choices":[]}"#, r#"{"choices":[ null]}"#, r#"{"choices":{}}"#, "{}"] {
            assert!(!one(none), "{none}");
        }
        assert!(is_json("{\"a\":\"é\"}".as_bytes()) && is_json(br#"{"a":1e999}"#));
        for none in [&b"{\"a\":[}"[..], b"{\"a\":\"\xff\"}", b"{\"a\":\"\n\"}", b"{} {}", b""] {
            assert!(!is_json(none), "{none:?}");
        }
    }

    #[test]
    fn finish_reasons_are_found_wherever_they_stand() {
        let all = |json: &str| finish_reasons(json.as_bytes()).collect::<Vec<_>>();
        assert_eq!(all(r#"{"choices":[{"finish_reason":null}]}"#), []);
        assert_eq!(
            all(r#"{"choices":[{"finish_reason" : "length"},{"finish_reason":"tool_calls"}]}"#),
            [FinishReason::Length, FinishReason::ToolCalls]
        );
        assert_eq!(all(r#"{"content":"\"finish_reason\":\"stop\""}"#), []);
        assert_eq!(all(r#"{"finish_reason":"sto"#), []);
    }

    #[test]
    fn texts_are_read_from_chunks_and_completions() {
        let chunk = r#"{"choices":[{"index":1,"delta":{"content":"a\"é"}}]}"#.as_bytes();
        assert_eq!(texts(chunk), [(1, "a\"é".to_owned())]);
        assert_eq!(
            texts(br#"{"choices":[{"message":{"content":"x"}},{"message":{"content":null}}]}"#),
            [(0, "x".into())]
        );
    }

    #[test]
    fn an_error_may_hide_at_any_depth() {
        assert!(may_hold_error(br#"{"id":"x","error": {"code":1}}"#));
        assert!(!may_hold_error(br#"{"error":null,"finish_reason":"error"}"#));
        assert!(!may_hold_error(br#"{"content":"\"error\":{}"}"#));
    }

    #[test]
    fn no_choices_means_none() {
        let none = |json: &str| has_no_choices(&fields(json.as_bytes()).unwrap());
        assert!(none(r#"{"choices": [ ],"usage":{}}"#));
        assert!(!none(r#"{"choices":[{}]}"#));
        assert!(!none(r#"{"usage":{}}"#));
    }
}
