//! The body of `POST /v1/chat/completions` (and `/v1/decision`) to a [`Request`].
//!
//! Only what weir acts upon is parsed; everything else is skipped, stays in `Request::body`, and reaches remote backends
//! untouched. Ranges are OpenAI's. This is on every request's way: about 2 µs for 1 kB.

use std::{borrow::Cow, collections::BTreeMap, fmt, time::Duration};

use bytes::Bytes;
use jiff::SignedDuration;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, SeqAccess, Visitor},
};
use serde_json::Value;
use utoipa::ToSchema;

use super::parse::{self, Count, Integer, Invalid, Number, Object, OneOrMany};
use crate::domain::{ContentPart, Message, Need, Request, Role, Sampling};

/// OpenAI's limit on `n`.
pub const MAX_CHOICES: i64 = 128;
/// OpenAI's limit on `top_logprobs`.
pub const MAX_TOP_LOGPROBS: i64 = 20;
/// More than any context; a larger number is a mistake.
const MAX_TOKENS: i64 = i32::MAX as i64;
/// OpenAI allows 4; some servers behind weir allow more.
const MAX_STOPS: usize = 16;
/// OpenAI's limits on `metadata`, which goes into every record.
const MAX_METADATA: (usize, usize, usize) = (16, 64, 512);

/// The longest that a client may pin documents.
const MOST_KEPT: Duration = Duration::from_secs(24 * 3600);

/// A chat. Fields that are not listed here go to remote models untouched.
#[derive(Deserialize, ToSchema)]
#[schema(as = ChatCompletionRequest)]
pub struct Body<'a> {
    /// A policy, plan or model (`GET /v1/models`), or `auto`.
    #[serde(borrow, default)]
    #[schema(value_type = String, required, example = "auto")]
    model: Option<Cow<'a, str>>,
    /// The conversation, oldest first.
    #[serde(borrow, default)]
    #[schema(value_type = Vec<MessageBody>, required, min_items = 1)]
    messages: Option<Vec<Object<MessageBody<'a>>>>,
    /// Upper bound on generated tokens; `max_completion_tokens` wins.
    #[serde(default)]
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_tokens: Option<Integer>,
    /// Upper bound on generated tokens.
    #[serde(default)]
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_completion_tokens: Option<Integer>,
    /// 0 is greedy.
    #[serde(default)]
    #[schema(value_type = Option<f64>, minimum = 0, maximum = 2)]
    temperature: Option<Number>,
    /// Only tokens within this share of the probability are drawn.
    #[serde(default)]
    #[schema(value_type = Option<f64>, minimum = 0, maximum = 1)]
    top_p: Option<Number>,
    /// The same seed, request and model give the same answer.
    #[serde(default)]
    #[schema(value_type = Option<i64>)]
    seed: Option<Integer>,
    /// A string, or up to 16 of them, before which to stop.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>)]
    stop: Option<OneOrMany>,
    /// Number of answers.
    #[serde(default)]
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 128, default = 1)]
    n: Option<Integer>,
    /// Whether to return log-probabilities.
    #[serde(default)]
    logprobs: Option<bool>,
    /// Alternatives per token; needs `logprobs`.
    #[serde(default)]
    #[schema(value_type = Option<u8>, minimum = 0, maximum = 20)]
    top_logprobs: Option<Integer>,
    /// Whether to answer by server-sent events.
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    #[schema(value_type = Option<StreamOptions>)]
    stream_options: Option<Object<StreamOptions>>,
    /// Functions that the model may call; only models that can are considered.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Value>>)]
    tools: Count,
    /// Deprecated form of `tools`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Value>>)]
    functions: Count,
    /// Any type but `text` needs a model that can.
    #[serde(borrow, default)]
    #[schema(value_type = Option<Value>)]
    response_format: Option<Object<ResponseFormat<'a>>>,
    /// `audio` needs a model that can.
    #[serde(borrow, default)]
    #[schema(value_type = Option<Vec<String>>)]
    modalities: Option<Vec<Cow<'a, str>>>,
    /// At most 16 pairs; seen by policies and recorded. `session_id` names the session, unless `x-weir-session` does.
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    /// The end user, as the client knows them.
    #[serde(default)]
    user: Option<String>,
    /// `priority` goes first among what waits for a model in the process, `flex` last; others make no difference there.
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>, example = "flex")]
    service_tier: Option<Cow<'a, str>>,
    /// What weir alone understands; not sent to servers behind it.
    #[serde(default)]
    #[schema(value_type = Option<WeirOptions>)]
    weir: Option<Object<WeirOptions>>,
}

/// What weir alone understands, in a request, a message or a part of one.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WeirOptions {
    /// In a request: marked documents are computed where they stand, as if nobody had marked them.
    #[serde(default)]
    exact: bool,
    /// In a message or a part: a document, to be computed once and reused wherever it stands, as `cache_control` says, too.
    #[serde(default)]
    chunk: bool,
}

/// How to stream.
#[derive(Default, Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether a last chunk tells the usage.
    #[serde(default)]
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
struct ResponseFormat<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
}

/// One message.
#[derive(Deserialize, ToSchema)]
#[schema(as = ChatMessage)]
struct MessageBody<'a> {
    /// `system`, `developer`, `user`, `assistant`, `tool` or `function`.
    #[schema(value_type = String, example = "user")]
    role: Role,
    /// A string, or an array of parts (`{"type": "text", "text": …}`, images, audio); null where an assistant calls tools.
    #[serde(borrow, default)]
    #[schema(value_type = Option<Value>, example = "Hello")]
    content: Content<'a>,
    #[serde(default)]
    #[schema(value_type = Option<Vec<Value>>)]
    tool_calls: Count,
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    function_call: Option<IgnoredAny>,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    refusal: Option<IgnoredAny>,
    /// Any value but null marks the message's text as a document that is reused wherever it stands (Anthropic's convention). Its `ttl`
    /// (such as `5m`) pins the request's documents for so long.
    #[serde(default)]
    cache_control: Option<Value>,
    #[serde(default)]
    #[schema(value_type = Option<WeirOptions>)]
    weir: Option<Object<WeirOptions>>,
}

#[derive(Default)]
enum Content<'a> {
    #[default]
    None,
    Text(String),
    Parts(Vec<Object<PartBody<'a>>>),
}

#[derive(Deserialize)]
struct PartBody<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    cache_control: Option<Value>,
    #[serde(default)]
    weir: Option<Object<WeirOptions>>,
}

/// What messages and parts say of the whole request.
#[derive(Default)]
struct Found {
    needs: Needs,
    keep: Option<Duration>,
}

impl Found {
    /// Whether a message or a part is marked as a document. A `ttl` that is no duration is another server's.
    fn is_chunk(&mut self, cache_control: Option<Value>, weir: Option<Object<WeirOptions>>) -> bool {
        let ttl = cache_control.as_ref().and_then(|control| control["ttl"].as_str()?.parse::<SignedDuration>().ok());
        self.keep = self.keep.max(ttl.and_then(|ttl| Duration::try_from(ttl).ok()).map(|ttl| ttl.min(MOST_KEPT)));
        cache_control.is_some() || weir.is_some_and(|Object(options)| options.chunk)
    }
}

fn text_part(text: String, chunk: bool) -> ContentPart {
    if chunk { ContentPart::Chunk(text) } else { ContentPart::Text(text) }
}

impl<'de: 'a, 'a> Deserialize<'de> for Content<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<'a>(std::marker::PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for V<'a> {
            type Value = Content<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of content parts, or null")
            }

            fn visit_str<E>(self, v: &str) -> Result<Self::Value, E> {
                Ok(Content::Text(v.to_owned()))
            }

            fn visit_string<E>(self, v: String) -> Result<Self::Value, E> {
                Ok(Content::Text(v))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Content::None)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(V(std::marker::PhantomData))
    }
}

/// Parses a chat request. `session` and `client_retry` come from headers and are set by the caller; `session` is
/// `metadata.session_id` until then.
///
/// # Errors
/// [`Invalid`] with the path of the field at fault.
pub fn parse(body: Bytes) -> Result<Request, Invalid> {
    let mut request = convert(parse::object::<Body<'_>>(&body)?)?;
    request.body = body;
    Ok(request)
}

fn convert(body: Body<'_>) -> Result<Request, Invalid> {
    let model = body.model.filter(|model| !model.is_empty()).ok_or_else(|| {
        Invalid::missing(
            "model",
            "You must provide 'model': a policy, plan or model that is served here (GET /v1/models lists them), or \
             'auto' to let the default policy choose.",
        )
    })?;
    let bodies = body.messages.ok_or_else(|| {
        Invalid::missing(
            "messages",
            "You must provide 'messages', such as [{\"role\": \"user\", \"content\": \"Hi\"}].",
        )
    })?;
    if bodies.is_empty() {
        return Err(Invalid {
            message: "'messages' is empty; it needs at least one message, such as {\"role\": \"user\", \"content\": \
                      \"Hi\"}."
                .to_owned(),
            param: Some("messages".to_owned()),
            code: Some("empty_array"),
        });
    }

    let mut found = Found::default();
    let mut messages = Vec::with_capacity(bodies.len());
    for (i, Object(body)) in bodies.into_iter().enumerate() {
        messages.push(message(i, body, &mut found)?);
    }

    let (max_field, max_tokens) = match body.max_completion_tokens {
        Some(max) => ("max_completion_tokens", Some(max)),
        None => ("max_tokens", body.max_tokens),
    };
    let logprobs = body.logprobs.unwrap_or(false);
    let top_logprobs = integer("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)?.unwrap_or(0);
    if body.top_logprobs.is_some() && !logprobs {
        return Err(Invalid::value("top_logprobs", "'top_logprobs' needs 'logprobs': true."));
    }
    let metadata = body.metadata.unwrap_or_default();
    check_metadata(&metadata)?;

    let Found { mut needs, keep } = found;
    needs.set(Need::Tools, body.tools.0 > 0 || body.functions.0 > 0);
    needs.set(Need::ResponseFormat, body.response_format.is_some_and(|format| format.0.kind != "text"));
    needs.set(Need::Audio, body.modalities.is_some_and(|m| m.iter().any(|m| m == "audio")));
    needs.set(Need::Logprobs, logprobs);

    Ok(Request {
        model: model.into_owned(),
        messages: messages.into(),
        sampling: Sampling {
            max_tokens: integer(max_field, max_tokens, 1, MAX_TOKENS)?.map(|max| max as u32),
            temperature: number("temperature", body.temperature, 2.0)?,
            top_p: number("top_p", body.top_p, 1.0)?,
            seed: body.seed.map(|seed| seed.0),
            stop: stops(body.stop)?,
        },
        n: integer("n", body.n, 1, MAX_CHOICES)?.unwrap_or(1) as u32,
        logprobs,
        top_logprobs: top_logprobs as u8,
        stream: body.stream.unwrap_or(false),
        include_usage: body.stream_options.is_some_and(|options| options.0.include_usage == Some(true)),
        needs: needs.into_vec(),
        session: metadata.get("session_id").cloned(),
        metadata,
        user: body.user,
        client_retry: 0,
        priority: match body.service_tier.as_deref() {
            Some("priority") => 1,
            Some("flex") => -1,
            _ => 0,
        },
        exact: body.weir.is_some_and(|Object(options)| options.exact),
        keep,
        sharing: String::new(),
        begun: None,
        body: Bytes::new(),
    })
}

fn message(i: usize, body: MessageBody<'_>, found: &mut Found) -> Result<Message, Invalid> {
    let calls_tools = body.tool_calls.0 > 0 || body.function_call.is_some();
    // A model without tools has no words for their calls and results either.
    found.needs.set(Need::Tools, calls_tools || matches!(body.role, Role::Tool | Role::Function));
    let chunk = found.is_chunk(body.cache_control, body.weir);
    let content = match body.content {
        Content::Text(text) => vec![text_part(text, chunk)],
        Content::Parts(parts) if parts.is_empty() => {
            let place = format!("messages[{i}].content");
            return Err(Invalid::value(&place, format!("'{place}' is an empty array; it needs at least one part.")));
        }
        Content::Parts(parts) => {
            let mut content = Vec::with_capacity(parts.len());
            for (j, Object(body)) in parts.into_iter().enumerate() {
                content.push(part(i, j, body, chunk, found)?);
            }
            content
        }
        Content::None if body.role == Role::Assistant && (calls_tools || body.refusal.is_some()) => Vec::new(),
        Content::None => {
            let place = format!("messages[{i}].content");
            return Err(Invalid::missing(
                &place,
                format!(
                    "'{place}' is missing: a string or an array of parts. Only an assistant's message that calls tools \
                     may leave it out."
                ),
            ));
        }
    };
    Ok(Message { role: body.role, content })
}

fn part(i: usize, j: usize, body: PartBody<'_>, chunk: bool, found: &mut Found) -> Result<ContentPart, Invalid> {
    match &*body.kind {
        "text" => {
            let place = format!("messages[{i}].content[{j}].text");
            let text = body.text.ok_or_else(|| {
                Invalid::missing(&place, format!("'{place}' is missing: a part of type 'text' holds its text there."))
            })?;
            return Ok(text_part(text, found.is_chunk(body.cache_control, body.weir) || chunk));
        }
        "refusal" => {}
        "input_audio" => found.needs.set(Need::Audio, true),
        // Images, and whatever else is not text (files, video): no text-only model can read it, and to drop it silently
        // would be to answer another question.
        _ => found.needs.set(Need::Images, true),
    }
    Ok(ContentPart::Other { kind: body.kind.into_owned() })
}

fn integer(param: &str, value: Option<Integer>, least: i64, most: i64) -> Result<Option<i64>, Invalid> {
    match value {
        Some(Integer(v)) if v < least || v > most => {
            let got = if v == i64::MAX { "a larger number".to_owned() } else { v.to_string() };
            Err(Invalid::value(param, format!("'{param}' must be from {least} to {most}, but is {got}.")))
        }
        value => Ok(value.map(|v| v.0)),
    }
}

fn number(param: &str, value: Option<Number>, most: f64) -> Result<Option<f64>, Invalid> {
    match value {
        Some(Number(v)) if !(0.0..=most).contains(&v) => {
            Err(Invalid::value(param, format!("'{param}' must be from 0 to {most}, but is {v}.")))
        }
        value => Ok(value.map(|v| v.0)),
    }
}

fn stops(stop: Option<OneOrMany>) -> Result<Vec<String>, Invalid> {
    let stops = match stop {
        None => return Ok(Vec::new()),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    if stops.len() > MAX_STOPS {
        return Err(Invalid::value("stop", format!("'stop' has {} strings; {MAX_STOPS} are allowed.", stops.len())));
    }
    if stops.iter().any(String::is_empty) {
        return Err(Invalid::value("stop", "'stop' holds an empty string, which would stop at once; leave it out."));
    }
    Ok(stops)
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), Invalid> {
    let (pairs, key_chars, value_chars) = MAX_METADATA;
    let wrong = if metadata.len() > pairs {
        format!("'metadata' has {} entries; {pairs} are allowed.", metadata.len())
    } else if metadata.keys().any(|key| key.chars().count() > key_chars) {
        format!("A key of 'metadata' is longer than {key_chars} characters.")
    } else if let Some((key, _)) = metadata.iter().find(|(_, value)| value.chars().count() > value_chars) {
        format!("'metadata.{key}' is longer than {value_chars} characters.")
    } else {
        return Ok(());
    };
    Err(Invalid::value("metadata", wrong))
}

/// A set of needs in the order of their declaration.
#[derive(Default)]
struct Needs([bool; 5]);

impl Needs {
    const ALL: [Need; 5] = [Need::Tools, Need::ResponseFormat, Need::Images, Need::Audio, Need::Logprobs];

    fn set(&mut self, need: Need, on: bool) {
        if on && let Some(i) = Self::ALL.iter().position(|n| *n == need) {
            self.0[i] = true;
        }
    }

    fn into_vec(self) -> Vec<Need> {
        Self::ALL.into_iter().zip(self.0).filter_map(|(need, on)| on.then_some(need)).collect()
    }
}
