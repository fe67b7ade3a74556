//! The body of a call: the client's own JSON with `model`, and what the plan overrides, spliced in. Everything else stays
//! byte for byte as the client wrote it.

use bytes::Bytes;

use crate::{
    backend::{
        Call,
        wire::{self, Edits, Field, quoted},
    },
    domain::Sampling,
};

/// The body cannot be sent on.
#[derive(Debug, thiserror::Error)]
#[error("the request's body is no JSON object as chat completions want it: {0}")]
pub(super) struct BodyError(String);

impl From<serde_json::Error> for BodyError {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
    }
}

/// The upstream body of `call`. `model`: what the server calls the model, `None` to leave the client's word;
/// `ask_usage`: whether a stream is to report its usage.
///
/// # Errors
/// When the client's body is no JSON object, or a system text is to be added and `messages` is no array.
pub(super) fn upstream_body(call: &Call, model: Option<&str>, ask_usage: bool) -> Result<Bytes, BodyError> {
    let request = &*call.request;
    let body = &without_own(&request.body)?;
    let fields = wire::fields(body)?;
    let mut splice = Splice { fields: &fields, edits: Edits::default(), added: Vec::new() };
    if let Some(model) = model {
        splice.set(&["model"], &quoted(model));
    }
    if wants_stream(&fields) != request.stream {
        splice.set(&["stream"], if request.stream { "true" } else { "false" });
    }
    if request.stream && ask_usage {
        splice.ask_usage()?;
    }
    if request.logprobs {
        splice.set(&["logprobs"], "true");
    }
    if request.logprobs && request.top_logprobs > 0 {
        splice.set(&["top_logprobs"], &request.top_logprobs.to_string());
    }
    splice.sampling(&request.sampling, &call.spec.sampling_for(&request.sampling))?;
    if let Some(system) = &call.spec.system {
        splice.system(system)?;
    }
    let Splice { mut edits, added, .. } = splice;
    edits.append(body, fields.is_empty(), &added);
    Ok(edits.apply(body))
}

/// `body` without what weir alone understands (`weir` in it, in its messages and in their parts): servers refuse what they do not
/// know.
fn without_own(body: &Bytes) -> Result<Bytes, BodyError> {
    const OWN: &str = "weir";
    if memchr::memmem::find(body, b"\"weir\"").is_none() {
        return Ok(body.clone());
    }
    let mut edits = Edits::default();
    let fields = wire::fields(body)?;
    for field in fields.iter().filter(|field| field.key == "messages") {
        let mut messages: serde_json::Value = serde_json::from_str(field.value)?;
        let mut found = false;
        for message in messages.as_array_mut().into_iter().flatten() {
            let parts = message.get_mut("content").and_then(serde_json::Value::as_array_mut).into_iter().flatten();
            for part in parts.filter_map(serde_json::Value::as_object_mut) {
                found |= part.shift_remove(OWN).is_some();
            }
            found |= message.as_object_mut().is_some_and(|message| message.shift_remove(OWN).is_some());
        }
        if found {
            edits.replace(field.at.clone(), messages.to_string());
        }
    }
    if fields.iter().any(|field| field.key == OWN) {
        // Written again without it; the values stay as they are.
        let kept = fields.iter().filter(|field| field.key != OWN);
        let mut out = String::from("{");
        for field in kept {
            let comma = if out.len() == 1 { "" } else { "," };
            out += &format!("{comma}{}:{}", quoted(&field.key), field.value);
        }
        return without_own(&Bytes::from(out + "}"));
    }
    Ok(edits.apply(body))
}

/// `body` with its `model` set.
pub(super) fn with_model(body: &Bytes, model: Option<&str>) -> Result<Bytes, BodyError> {
    let fields = wire::fields(body)?;
    let mut splice = Splice { fields: &fields, edits: Edits::default(), added: Vec::new() };
    if let Some(model) = model {
        splice.set(&["model"], &quoted(model));
    }
    let Splice { mut edits, added, .. } = splice;
    edits.append(body, fields.is_empty(), &added);
    Ok(edits.apply(body))
}

fn wants_stream(fields: &[Field<'_>]) -> bool {
    fields.iter().rfind(|f| f.key == "stream").is_some_and(|f| f.value == "true")
}

struct Splice<'a> {
    fields: &'a [Field<'a>],
    edits: Edits,
    /// Fields that the client did not write, as `"name":value`.
    added: Vec<String>,
}

impl Splice<'_> {
    /// Gives every field of these names the value; where there is none, adds the first. A repeated name is changed in
    /// every place, because servers differ in which one counts.
    fn set(&mut self, names: &[&str], value: &str) {
        let mut found = false;
        for field in self.fields.iter().filter(|f| names.contains(&&*f.key)) {
            found = true;
            if field.value != value {
                self.edits.replace(field.at.clone(), value);
            }
        }
        if !found {
            self.added.push(format!("\"{}\":{value}", names[0]));
        }
    }

    fn ask_usage(&mut self) -> Result<(), BodyError> {
        let Some(options) = self.fields.iter().rfind(|f| f.key == "stream_options" && f.value.starts_with('{')) else {
            self.set(&["stream_options"], r#"{"include_usage":true}"#);
            return Ok(());
        };
        let inner = wire::fields(options.value.as_bytes())?;
        let mut found = false;
        for field in inner.iter().filter(|f| f.key == "include_usage") {
            found = true;
            if field.value != "true" {
                let start = options.at.start;
                self.edits.replace(start + field.at.start..start + field.at.end, "true");
            }
        }
        if !found {
            let end = options.at.end - 1;
            let comma = if inner.is_empty() { "" } else { "," };
            self.edits.replace(end..end, format!("{comma}\"include_usage\":true"));
        }
        Ok(())
    }

    /// Writes what is to hold where it differs from what the client asked for.
    fn sampling(&mut self, asked: &Sampling, held: &Sampling) -> Result<(), BodyError> {
        if let Some(n) = held.max_tokens.filter(|_| held.max_tokens != asked.max_tokens) {
            // Whichever of the two names the client used; `max_tokens` is the one that all servers know.
            self.set(&["max_tokens", "max_completion_tokens"], &n.to_string());
        }
        if let Some(t) = held.temperature.filter(|_| held.temperature != asked.temperature) {
            self.set(&["temperature"], &serde_json::to_string(&t)?);
        }
        if let Some(p) = held.top_p.filter(|_| held.top_p != asked.top_p) {
            self.set(&["top_p"], &serde_json::to_string(&p)?);
        }
        if let Some(seed) = held.seed.filter(|_| held.seed != asked.seed) {
            self.set(&["seed"], &seed.to_string());
        }
        if held.stop != asked.stop {
            self.set(&["stop"], &serde_json::to_string(&held.stop)?);
        }
        Ok(())
    }

    /// Puts `text` before the client's system prompt: into the first message where that is one, else as a new one.
    fn system(&mut self, text: &str) -> Result<(), BodyError> {
        let wrong = || BodyError("`messages` is not an array of objects".to_owned());
        let messages = self.fields.iter().rfind(|f| f.key == "messages").ok_or_else(wrong)?;
        let inside = messages.value.strip_prefix('[').ok_or_else(wrong)?;
        let offset = messages.at.start;
        let items: Vec<&serde_json::value::RawValue> = serde_json::from_str(messages.value)?;
        if let Some(first) = items.first().map(|raw| raw.get()) {
            let fields = wire::fields(first.as_bytes())?;
            let value = |name: &str| fields.iter().rfind(|f| f.key == name);
            let is_system = value("role").is_some_and(|role| matches!(role.value, "\"system\"" | "\"developer\""));
            if let Some(content) = value("content").filter(|_| is_system) {
                let start = offset + (first.as_ptr() as usize - messages.value.as_ptr() as usize);
                let at = start + content.at.start..start + content.at.end;
                if content.value.starts_with('"') {
                    let own: String = serde_json::from_str(content.value)?;
                    self.edits.replace(at, quoted(&format!("{text}\n\n{own}")));
                } else if let Some(parts) = content.value.strip_prefix('[') {
                    let comma = if parts.trim_start().starts_with(']') { "" } else { "," };
                    let part = format!("{{\"type\":\"text\",\"text\":{}}}{comma}", quoted(text));
                    self.edits.replace(at.start + 1..at.start + 1, part);
                } else {
                    self.edits.replace(at, quoted(text));
                }
                return Ok(());
            }
        }
        let comma = if inside.trim_start().starts_with(']') { "" } else { "," };
        let message = format!("{{\"role\":\"system\",\"content\":{}}}{comma}", quoted(text));
        self.edits.replace(offset + 1..offset + 1, message);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
