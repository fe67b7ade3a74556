//! What the first choice of an answer says, read out of a server's chunks or of its completion: the text, the calls of tools
//! and the tokens' log-probabilities.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::domain::{TokenLogprob, TopLogprob};

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    content: String,
    /// By index: name and arguments.
    tool_calls: BTreeMap<u32, (String, String)>,
    /// Of the text, where they came with it.
    pub tokens: Vec<TokenLogprob>,
}

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
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Message {
    content: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Deserialize)]
struct ToolCall {
    index: Option<u32>,
    function: Option<Function>,
}

#[derive(Deserialize)]
struct Function {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<Token>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Token>>,
}

impl Said {
    /// More text, with what is known of its tokens.
    pub fn add(&mut self, text: &str, tokens: impl IntoIterator<Item = TokenLogprob>) {
        self.content.push_str(text);
        self.tokens.extend(tokens);
    }

    /// A chunk or a completion as a server wrote it. What is none says nothing.
    pub fn read(&mut self, json: &[u8]) {
        let Ok(body) = serde_json::from_slice::<Body>(json) else { return };
        for choice in body.choices.into_iter().filter(|choice| choice.index == 0) {
            if let Some(message) = choice.message {
                self.content.push_str(message.content.as_deref().unwrap_or_default());
                for (place, call) in (0..).zip(message.tool_calls.into_iter().flatten()) {
                    let entry = self.tool_calls.entry(call.index.unwrap_or(place)).or_default();
                    if let Some(function) = call.function {
                        entry.0.push_str(function.name.as_deref().unwrap_or_default());
                        entry.1.push_str(function.arguments.as_deref().unwrap_or_default());
                    }
                }
            }
            let tokens = choice.logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default();
            self.tokens.extend(tokens.into_iter().map(token));
        }
    }

    /// The text; of an answer that only calls tools, these calls as a list in JSON.
    pub fn text(&self) -> String {
        if !self.content.is_empty() || self.tool_calls.is_empty() {
            return self.content.clone();
        }
        let call = |(name, arguments): &(String, String)| {
            // Arguments are JSON in a text, if the model wrote them well.
            let arguments = serde_json::from_str(arguments).unwrap_or(Value::from(arguments.as_str()));
            json!({"name": name, "arguments": arguments})
        };
        Value::from_iter(self.tool_calls.values().map(call)).to_string()
    }
}

fn token(token: Token) -> TokenLogprob {
    let top = token.top_logprobs.into_iter().flatten();
    TokenLogprob {
        logprob: token.logprob,
        bytes: token.bytes.unwrap_or_else(|| token.token.clone().into_bytes()),
        token: token.token,
        top: top
            .map(|t| TopLogprob {
                logprob: t.logprob,
                bytes: t.bytes.unwrap_or_else(|| t.token.clone().into_bytes()),
                token: t.token,
            })
            .collect(),
        entropy: None,
    }
}

/// A chunk or a completion without its choices' log-probabilities, for clients that have not asked for them.
pub fn without_logprobs(json: &Bytes) -> Bytes {
    if memchr::memmem::find(json, b"\"logprobs\"").is_none() {
        return json.clone();
    }
    let Ok(mut body) = serde_json::from_slice::<Value>(json) else { return json.clone() };
    for choice in body.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(logprobs) = choice.get_mut("logprobs") {
            *logprobs = Value::Null;
        }
    }
    Bytes::from(body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_choice_is_put_together_from_chunks() {
        let mut said = Said::default();
        said.read(br#"{"choices":[{"index":0,"delta":{"role":"assistant","content":"4"},"logprobs":{"content":[
            {"token":"4","logprob":-0.5,"bytes":null,"top_logprobs":[{"token":"4","logprob":-0.5},{"token":"5","logprob":-1.5}]}]}}]}"#);
        said.read(
            br#"{"choices":[{"index":1,"delta":{"content":"other"}},{"delta":{"content":"2"},"logprobs":null}]}"#,
        );
        said.read(b"nonsense");
        assert_eq!(said.text(), "42");
        assert_eq!(said.tokens.len(), 1);
        assert_eq!((said.tokens[0].logprob, &*said.tokens[0].bytes), (-0.5, &b"4"[..]));
        assert_eq!(said.tokens[0].top.iter().map(|t| t.logprob).collect::<Vec<_>>(), [-0.5, -1.5]);
    }

    #[test]
    fn calls_of_tools_say_what_they_call_however_they_are_cut() {
        let mut said = Said::default();
        said.read(
            br#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{\"a\""}}]}}]}"#,
        );
        said.read(br#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":": 1}"}}]}}]}"#);
        let mut whole = Said::default();
        whole.read(br#"{"choices":[{"message":{"content":null,"tool_calls":[{"function":{"name":"f","arguments":"{ \"a\":1 }"}}]}}]}"#);
        assert_eq!(said.text(), r#"[{"name":"f","arguments":{"a":1}}]"#);
        assert_eq!(said.text(), whole.text());
    }

    #[test]
    fn log_probabilities_are_taken_out_and_nothing_else() {
        let json = Bytes::from_static(
            br#"{"id":"x","choices":[{"index":0,"logprobs":{"content":[]},"delta":{"content":"a"}}],"z":1.0}"#,
        );
        let out = without_logprobs(&json);
        assert_eq!(&out[..], br#"{"id":"x","choices":[{"index":0,"logprobs":null,"delta":{"content":"a"}}],"z":1.0}"#);
        let plain = Bytes::from_static(br#"{ "id" : "x" }"#);
        assert_eq!(without_logprobs(&plain), plain);
    }
}
