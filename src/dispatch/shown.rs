//! The requests of a plan's own calls: what a judge, a verifying and a refining model are shown.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::domain::{ContentPart, Message, Request, Role, Sampling};

const JUDGE: &str = "Several answers to one request follow. Say which of them is best: right, complete, and in the form \
                     that the request asks for. Reply with the number of the best answer and nothing else.";

const REFINE: &str = "Others have answered the above; their answers follow. Some may be wrong. Write the one best answer \
                      to the request, in the form that it asks for, without speaking of the other answers.";

const VERIFY: &str = "A request and an answer to it follow. Check the answer: is it right, and in the form that the request \
                      asks for? Reply with `yes` or `no` and nothing else.";

/// The request of a judge: one message with the conversation and the answers, numbered from 1.
pub(super) fn judge(request: &Request, answers: &[String]) -> Request {
    asking(request, about(&request.messages, JUDGE, &numbered(answers)))
}

/// The request of a verifying call: one message with the conversation and the answer.
pub(super) fn verify(request: &Request, answer: &str) -> Request {
    asking(request, verifying(&request.messages, answer))
}

/// What a verifying call is asked about the answer to a conversation.
pub fn verifying(messages: &[Message], answer: &str) -> String {
    about(messages, VERIFY, &format!("\n# Answer\n\n{answer}\n\n# Is it right? `yes` or `no`:"))
}

fn about(messages: &[Message], question: &str, answers: &str) -> String {
    let said: Vec<String> = messages.iter().map(|m| format!("[{}]\n{}", m.role.as_str(), m.joined_text())).collect();
    format!("{question}\n\n# Request\n\n{}\n{answers}", said.join("\n\n"))
}

/// A question about answers: one message. Nothing of the client's sampling holds for it, as what it wants said is one word.
fn asking(request: &Request, text: String) -> Request {
    let messages = json!([{"role": "user", "content": text}]);
    Request {
        messages: Arc::from([Message::text(Role::User, text)]),
        sampling: Sampling::default(),
        n: 1,
        logprobs: false,
        top_logprobs: 0,
        stream: false,
        include_usage: false,
        needs: Vec::new(),
        body: Bytes::from(json!({"model": request.model, "messages": messages}).to_string()),
        ..request.clone()
    }
}

/// The request of a refining model: the client's own, with the answers at its end. They join the last message where that is
/// the user's, as many models take no two messages of a user in a row.
pub(super) fn refine(request: &Request, answers: &[String]) -> Request {
    let text = format!("\n\n{REFINE}\n{}", numbered(answers));
    let mut messages = request.messages.to_vec();
    match messages.last_mut().filter(|message| message.role == Role::User) {
        Some(last) => last.content.push(ContentPart::Text(text.clone())),
        None => messages.push(Message::text(Role::User, text.trim_start())),
    }
    Request { messages: messages.into(), body: with_text(&request.body, &text), ..request.clone() }
}

/// The request with log-probabilities asked for: what gates need, for backends to give and for [`super::held`] to take out
/// again.
pub(super) fn with_logprobs(request: &Request, top: u8) -> Request {
    Request { logprobs: true, top_logprobs: request.top_logprobs.max(top), ..request.clone() }
}

/// The request of one more reasoning step: the conversation, and what of its answer there is. Of the client's sampling holds
/// what says how to draw.
pub(super) fn step(request: &Request, begun: String, stream: bool) -> Request {
    let client = &request.sampling;
    let sampling =
        Sampling { temperature: client.temperature, top_p: client.top_p, seed: client.seed, ..Sampling::default() };
    let json: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let drawn = ["model", "messages", "temperature", "top_p", "seed"].into_iter();
    let kept = drawn.filter_map(|key| Some((key.to_owned(), json.get(key)?.clone())));
    let body = Bytes::from(Value::Object(kept.collect()).to_string());
    let request = Request {
        sampling,
        n: 1,
        logprobs: false,
        top_logprobs: 0,
        stream,
        include_usage: false,
        needs: Vec::new(),
        body,
        ..request.clone()
    };
    continued(&request, begun)
}

/// The client's request, whose answer has begun with this.
pub(super) fn continued(request: &Request, begun: String) -> Request {
    let mut body = request.body.clone();
    if let Ok(mut json) = serde_json::from_slice::<Value>(&body)
        && let Some(messages) = json.get_mut("messages").and_then(Value::as_array_mut)
    {
        messages.push(json!({"role": "assistant", "content": begun}));
        json["continue_final_message"] = json!(true);
        json["add_generation_prompt"] = json!(false);
        body = Bytes::from(json.to_string());
    }
    Request { begun: Some(begun.into()), body, ..request.clone() }
}

/// The request whose answer comes in pieces, also where the client wants it whole.
pub(super) fn streamed(request: &Request) -> Request {
    Request { stream: true, ..request.clone() }
}

fn numbered(answers: &[String]) -> String {
    let mut out = String::new();
    for (i, answer) in answers.iter().enumerate() {
        out += &format!("\n# Answer {}\n\n{answer}\n", i + 1);
    }
    out
}

/// The client's JSON with `text` at the end of its last user message. What is no such JSON stays as it is: the backend
/// says what is wrong with it.
fn with_text(body: &Bytes, text: &str) -> Bytes {
    let Ok(mut json) = serde_json::from_slice::<Value>(body) else { return body.clone() };
    let Some(messages) = json.get_mut("messages").and_then(Value::as_array_mut) else { return body.clone() };
    match messages.last_mut().filter(|message| message["role"] == "user").map(|message| &mut message["content"]) {
        Some(Value::String(content)) => content.push_str(text),
        Some(Value::Array(parts)) => parts.push(json!({"type": "text", "text": text})),
        _ => messages.push(json!({"role": "user", "content": text.trim_start()})),
    }
    Bytes::from(json.to_string())
}
