//! The words of a scripted answer: cut into tokens, stopped, counted, and given log-probabilities. All of it follows from
//! the request.
//!
//! Log-probabilities are made up, but well-formed and always the same: the token's probability p is drawn from a hash of
//! text, position and choice, in [0.5, 1); alternative i of `top_logprobs` (the token itself is the first) has
//! p · (1 - p)^i, so they fall and sum to less than 1.

use crate::{
    backend::Call,
    domain::{FinishReason, Hash, TokenLogprob, TopLogprob, Usage, UsageSource},
};

use super::{ReplyText, Rule};

const VOCABULARY: [&str; 16] = [
    "water", "river", "stone", "over", "under", "slow", "clear", "falls", "step", "weir", "gate", "flow", "bank",
    "deep", "light", "turns",
];

/// All that a scripted call will say.
pub(super) struct Plan {
    pub(super) choices: Vec<PlannedChoice>,
    pub(super) usage: Usage,
}

pub(super) struct PlannedChoice {
    pub(super) index: u32,
    pub(super) tokens: Vec<String>,
    /// One per token where they were asked for, else none at all.
    pub(super) logprobs: Vec<Option<TokenLogprob>>,
    pub(super) finish: FinishReason,
}

impl Plan {
    pub(super) fn new(call: &Call, rule: &Rule, query: &str) -> Self {
        let request = &call.request;
        let sampling = call.spec.sampling_for(&request.sampling);
        let choices: Vec<PlannedChoice> = (0..request.n.max(1))
            .map(|index| {
                let text = match &rule.reply {
                    ReplyText::Echo => query.to_owned(),
                    ReplyText::Text(text) => text.clone(),
                    ReplyText::Texts(texts) => {
                        let place = call.index as usize % texts.len().max(1);
                        texts.get(place).cloned().unwrap_or_default()
                    }
                    ReplyText::Words(count) => words(*count, sampling.seed.unwrap_or(0), index),
                };
                let (tokens, finish) = cut(&text, sampling.max_tokens, &sampling.stop);
                let logprobs = if request.logprobs {
                    let top = usize::from(request.top_logprobs);
                    tokens
                        .iter()
                        .enumerate()
                        .map(|(i, token)| Some(logprob(token, i, index, top, rule.certainty)))
                        .collect()
                } else {
                    Vec::new()
                };
                PlannedChoice { index, tokens, logprobs, finish }
            })
            .collect();
        let said = |text: &str| split(text).count();
        let prompt: usize = request.messages.iter().map(|m| said(&m.joined_text())).sum();
        let system = call.spec.system.as_deref().map_or(0, said);
        let usage = Usage {
            prompt_tokens: (prompt + system) as u32,
            cached_tokens: 0,
            completion_tokens: choices.iter().map(|c| c.tokens.len()).sum::<usize>() as u32,
            source: UsageSource::Reported,
            ..Usage::default()
        };
        Self { choices, usage }
    }
}

/// Tokens: words with the white space before them; white space at the end belongs to the last one.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let word = rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len());
        let end = rest[word..].find(char::is_whitespace).map_or(rest.len(), |at| word + at);
        let end = if rest[end..].trim_start().is_empty() { rest.len() } else { end };
        let (token, later) = rest.split_at(end);
        rest = later;
        Some(token)
    })
}

/// The tokens up to the first stop string or the last allowed token, whichever comes first.
fn cut(text: &str, max_tokens: Option<u32>, stop: &[String]) -> (Vec<String>, FinishReason) {
    let stop_at = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| Some((text.find(s.as_str())?, s.len()))).min();
    let allowed = max_tokens.map_or(usize::MAX, |n| n as usize);
    let within: usize = split(text).take(allowed).map(str::len).sum();
    // A stop string counts once its last byte has been said.
    if let Some((at, _)) = stop_at.filter(|(at, len)| at + len <= within) {
        return (split(&text[..at]).map(str::to_owned).collect(), FinishReason::Stop);
    }
    let tokens = split(&text[..within]).map(str::to_owned).collect();
    (tokens, if within < text.len() { FinishReason::Length } else { FinishReason::Stop })
}

/// The first eight bytes of a hash of all parts.
fn draw(parts: &[&[u8]]) -> u64 {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    let Hash([a, b, c, d, e, f, g, h, ..]) = Hash::of(&bytes);
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn words(count: u32, seed: i64, choice: u32) -> String {
    let word = |position: u32| {
        let drawn = draw(&[b"words", &seed.to_le_bytes(), &choice.to_le_bytes(), &position.to_le_bytes()]);
        VOCABULARY[(drawn % VOCABULARY.len() as u64) as usize]
    };
    (0..count).map(word).collect::<Vec<_>>().join(" ")
}

fn logprob(token: &str, position: usize, choice: u32, top: usize, certainty: Option<f64>) -> TokenLogprob {
    let drawn = draw(&[b"logprob", token.as_bytes(), &(position as u64).to_le_bytes(), &choice.to_le_bytes()]);
    let p = certainty.unwrap_or(0.5 + (drawn >> 12) as f64 / (1u64 << 53) as f64);
    let at = |i: usize| (p.ln() + i as f64 * (1.0 - p).ln()) as f32;
    let alternatives = (0..top).map(|i| {
        let token = if i == 0 { token.to_owned() } else { format!("{token}~{i}") };
        TopLogprob { logprob: at(i), bytes: token.clone().into_bytes(), token }
    });
    TokenLogprob {
        token: token.to_owned(),
        logprob: at(0),
        bytes: token.as_bytes().to_vec(),
        top: alternatives.collect(),
        entropy: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_into(text: &str, max: Option<u32>, stop: &[&str]) -> (Vec<String>, FinishReason) {
        cut(text, max, &stop.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    fn tokens(words: &[&str]) -> Vec<String> {
        words.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn words_keep_their_space_and_give_back_the_text() {
        for text in ["", " ", "one", " one  two\nthree ", "漢字 é\u{a0}x", "\n\n"] {
            assert_eq!(split(text).collect::<String>(), text);
        }
        assert_eq!(split("one two  three ").collect::<Vec<_>>(), ["one", " two", "  three "]);
    }

    #[test]
    fn answers_end_where_they_must() {
        assert_eq!(cut_into("a b c", None, &[]), (tokens(&["a", " b", " c"]), FinishReason::Stop));
        assert_eq!(cut_into("a b c", Some(2), &[]), (tokens(&["a", " b"]), FinishReason::Length));
        assert_eq!(cut_into("a b c", Some(3), &[]).1, FinishReason::Stop);
        assert_eq!(cut_into("a b c", Some(0), &[]), (tokens(&[]), FinishReason::Length));
        assert_eq!(cut_into("a bEND c", None, &["c", "END", ""]), (tokens(&["a", " b"]), FinishReason::Stop));
        // The stop string begins within the bound but ends beyond it.
        assert_eq!(cut_into("a b c", Some(2), &["b c"]), (tokens(&["a", " b"]), FinishReason::Length));
    }

    #[test]
    fn log_probabilities_are_well_formed_and_always_the_same() {
        let one = logprob(" b", 3, 0, 4, None);
        assert_eq!(one, logprob(" b", 3, 0, 4, None));
        assert_ne!(one.logprob, logprob(" b", 4, 0, 4, None).logprob);
        assert_eq!((one.top.len(), one.top[0].logprob, &*one.top[0].token), (4, one.logprob, " b"));
        assert!(one.top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
        assert!(one.top.iter().map(|t| f64::from(t.logprob).exp()).sum::<f64>() <= 1.0 + 1e-6);
        assert!((0.5f32.ln()..=0.0).contains(&one.logprob));
    }
}
