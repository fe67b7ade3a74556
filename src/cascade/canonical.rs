//! Canonical forms: when do two answers say the same? Votes compare forms, never texts.
//!
//! The form is found in this order, and the first that fits is taken:
//! 1. JSON: an object or an array that is the whole text: RFC 8785 (sorted keys, shortest numbers, no white space);
//! 2. a final answer that the text marks as such (`\boxed{…}`, `#### …`, `the answer is …`, `Answer: …`), behind the last
//!    fenced block if there is one: its number or choice, or its words, where the mark is on the last line;
//! 3. all fenced blocks: as JSON, else as code in normal form;
//! 4. a number or a choice from A to E that is the whole text;
//! 5. the text: lower case, runs of white space as one space, without quotes, emphasis and a full stop around it.
//!
//! What is not certainly the same is kept apart: a false difference costs an escalation, a false agreement gives a wrong
//! answer out. So `42 km` and `42` differ, and so do `50` and `50%`, while `50%`, `0.5`, `1/2` and `\frac{1}{2}` are one
//! number. Two programs that do the same in other words differ as well.
//!
//! Extraction and comparison follow the practice of answer checkers for MATH (Hendrycks et al., arXiv 2103.03874, appendix)
//! and GSM8K (Cobbe et al., arXiv 2110.14168: `####`); the rules here are our own.

mod mark;
mod number;
mod source;

use crate::domain::canonical;

/// What an answer says, apart from how it says it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// An exact rational in lowest terms: `-7`, `3/4`; digits as they are where they do not fit into 127 bits.
    Number(String),
    /// `A` to `E`.
    Choice(char),
    /// Canonical JSON of an object or an array.
    Json(String),
    /// Fenced code in normal form.
    Code(String),
    /// Anything else.
    Text(String),
}

/// The form of an answer.
pub fn form(text: &str) -> Form {
    if let Some(json) = json(text) {
        return Form::Json(json);
    }
    let fenced = source::fenced(text);
    // Code before a mark is how the answer was found; a mark inside code is code.
    if let Some(form) = mark::marked(fenced.as_ref().map_or(text, |fenced| fenced.after)) {
        return form;
    }
    match fenced {
        Some(fenced) => json(&fenced.code).map_or_else(|| Form::Code(source::normal(&fenced.code)), Form::Json),
        None => short(text).unwrap_or_else(|| Form::Text(plain(text))),
    }
}

/// A text that is nothing but a number or a choice.
fn short(text: &str) -> Option<Form> {
    number::number(text).map(Form::Number).or_else(|| mark::choice(text).map(Form::Choice))
}

/// Canonical JSON of an object or an array. A key that comes twice counts with its last value, as in most readers.
fn json(text: &str) -> Option<String> {
    let text = text.trim();
    if !text.starts_with(['{', '[']) {
        return None;
    }
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    String::from_utf8(canonical::to_bytes(&value).ok()?).ok()
}

/// The text without what may stand around a short answer: white space, emphasis, math delimiters, a full stop.
fn bare(text: &str) -> &str {
    let mut text = text;
    loop {
        let before = text;
        text = text.trim().trim_matches(['*', '_', '`', '"']);
        text = text.strip_suffix(['.', ',', ';', '!']).unwrap_or(text);
        for (open, close) in [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\text{", "}"), ("(", ")")] {
            if let Some(inner) = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close)) {
                text = inner;
            }
        }
        text = text.strip_prefix("\\$").unwrap_or(text);
        if text == before {
            return text;
        }
    }
}

/// Text in lower case with single spaces, without what surrounds it.
fn plain(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let joined = words.join(" ").to_lowercase();
    let around: &[char] = &['"', '\'', '*', '_', '`', '“', '”', '‘', '’', '.', ' '];
    joined.trim_matches(around).to_owned()
}
