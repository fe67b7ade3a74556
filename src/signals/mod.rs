//! Floor 2: from a request's text to what policies may know of it. [`measure`] computes the named features; an
//! [`Embedder`] turns the query into a vector. Nothing here decides, and nothing here keeps text.
//!
//! Similarity to named examples is the policy's to compute (`Policy::similarities`), as its dot product decides.

mod code;
mod complexity;
mod embedder;
mod language;
mod ort_embedder;
mod pii;
mod tokens;
mod window;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::domain::{ContentPart, Need, Request, Role, Signals};

pub use embedder::{EmbedError, Embedder, Pooling, embed_within};
pub use ort_embedder::{EmbedderFiles, OrtEmbedder};
pub use tokens::estimate as estimate_tokens;
pub use window::window_text;

/// `code_share`, `complexity` and `language` look at no more than this many bytes of the query's beginning: what a text is
/// like shows there, and a prompt of megabytes must not hold up others. Counts (`tokens`, `pii`) cover everything.
const EXAMINED_BYTES: usize = 32 << 10;

/// Measures all signals but `similarity` and `embedded`, which need an embedding. Deterministic, and linear in the length
/// of the conversation.
///
/// `tokens`, `turn` and `pii` are of the whole conversation, since all of it is sent to a model; `language`, `code_share`
/// and `complexity` are of the query. Only text parts are read: not tool schemas, tool call arguments, images or files.
pub fn measure(request: &Request) -> Signals {
    let query = request.query();
    let beginning = &query[..query.floor_char_boundary(EXAMINED_BYTES)];
    let mut pii = crate::domain::PiiSignals::default();
    let mut tokens = 0_u32;
    for message in request.messages.iter() {
        tokens = tokens.saturating_add(tokens::PER_MESSAGE);
        for part in &message.content {
            if let Some(text) = part.text() {
                tokens = tokens.saturating_add(tokens::estimate(text));
                pii::scan(text, &mut pii);
            }
        }
    }
    Signals {
        tokens,
        query_tokens: tokens::estimate(&query),
        language: language::detect(beginning).into(),
        code_share: code::share(beginning),
        complexity: complexity::of(beginning),
        turn: request.turn(),
        system_prompt: system_prompt_hash(request),
        tools: request.needs.contains(&Need::Tools),
        response_format: request.needs.contains(&Need::ResponseFormat),
        pii,
        similarity: BTreeMap::new(),
        embedded: false,
    }
}

/// First 16 hexadecimal digits of the BLAKE3 of [`Request::system_prompt`], without building that string; empty without
/// one.
fn system_prompt_hash(request: &Request) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut any = false;
    for message in request.messages.iter().filter(|m| matches!(m.role, Role::System | Role::Developer)) {
        if any {
            hasher.update(b"\n");
        }
        any = true;
        let texts = message.content.iter().filter_map(ContentPart::text);
        for (index, text) in texts.enumerate() {
            if index > 0 {
                hasher.update(b"\n");
            }
            hasher.update(text.as_bytes());
        }
    }
    if any { hasher.finalize().to_hex()[..16].to_owned() } else { String::new() }
}
