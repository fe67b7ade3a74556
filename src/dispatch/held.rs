//! An answer that is held back until the plan has decided: what of it a client may be given, and what gates, votes and
//! judges are told of it.

use std::collections::BTreeMap;

use futures_util::{StreamExt, stream};

use crate::{
    backend::wire::{self, Said},
    cascade::{self, Forms, vote},
    domain::{Choice, Chunk, Completion, Facts, FinishReason, Score, Usage},
    gateway::AnswerBody,
};

/// What a call is asked about other answers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verdict {
    /// Which of so many is best.
    Best { of: usize },
    /// Whether the one is right.
    Right,
}

/// What has come of one answer.
#[derive(Debug, Default)]
pub(super) struct Held {
    chunks: Vec<Chunk>,
    whole: Option<Completion>,
}

impl Held {
    /// Whether nothing has come yet.
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn piece(&mut self, chunk: Chunk) {
        self.chunks.push(chunk);
    }

    /// An answer that came in one piece.
    pub(super) fn of(completion: Completion) -> Self {
        Self { chunks: Vec::new(), whole: Some(completion) }
    }

    pub(super) fn completion(&self) -> Option<&Completion> {
        self.whole.as_ref()
    }

    /// The first piece, where that is all there is.
    pub(super) fn into_first(mut self) -> Option<Chunk> {
        self.chunks.pop()
    }

    /// What the first choice says, with its tokens' log-probabilities where they came with it.
    pub(super) fn said(&self) -> Said {
        let mut said = Said::default();
        for chunk in &self.chunks {
            match chunk {
                Chunk::Text { choice: 0, text, logprobs } => said.add(text, logprobs.iter().cloned()),
                Chunk::Wire(json) => said.read(json),
                Chunk::Text { .. } | Chunk::Finish { .. } | Chunk::Usage(_) => {}
            }
        }
        match &self.whole {
            Some(Completion::Choices { choices, .. }) => {
                if let Some(first) = choices.first() {
                    said.add(&first.text, first.logprobs.iter().cloned());
                }
            }
            Some(Completion::Wire { body, .. }) => said.read(body),
            None => {}
        }
        said
    }

    /// The answer for the client. `logprobs`: whether it asked for them; what came for the gates' sake is taken out. `stream`:
    /// whether it asked for pieces; what came in pieces for the gates' sake is put together.
    pub(super) fn into_body(self, logprobs: bool, stream: bool) -> AnswerBody {
        let stripped = move |json| if logprobs { json } else { wire::without_logprobs(&json) };
        match self.whole {
            Some(Completion::Wire { body, usage }) => {
                AnswerBody::Whole(Completion::Wire { body: stripped(body), usage })
            }
            Some(whole) => AnswerBody::Whole(whole),
            None if !stream => AnswerBody::Whole(assembled(self.chunks)),
            None => {
                let chunks = self.chunks.into_iter().map(move |chunk| match chunk {
                    Chunk::Wire(json) => Ok(Chunk::Wire(stripped(json))),
                    chunk => Ok(chunk),
                });
                AnswerBody::Stream(stream::iter(chunks).boxed())
            }
        }
    }
}

/// A whole answer from its pieces.
fn assembled(chunks: Vec<Chunk>) -> Completion {
    let mut choices: BTreeMap<u32, Choice> = BTreeMap::new();
    let mut all = Usage::default();
    let fresh = |index: u32| Choice { index, text: String::new(), logprobs: Vec::new(), finish: FinishReason::Stop };
    for chunk in chunks {
        match chunk {
            Chunk::Text { choice, text, logprobs } => {
                let of = choices.entry(choice).or_insert_with(|| fresh(choice));
                of.text.push_str(&text);
                of.logprobs.extend(logprobs);
            }
            Chunk::Finish { choice, reason } => choices.entry(choice).or_insert_with(|| fresh(choice)).finish = reason,
            Chunk::Usage(usage) => all = usage,
            // Only models that speak weir's own chunks are asked for pieces of a whole answer.
            Chunk::Wire(_) => {}
        }
    }
    Completion::Choices { choices: choices.into_values().collect(), usage: all }
}

/// What the machine is told of an answer. `asked`: the scores that gates ask for; without any, none is computed.
/// `verdict`: what the call was asked, where it was asked about other answers.
pub(super) fn facts(said: &Said, forms: &mut Forms, asked: &[Score], verdict: Option<Verdict>) -> Facts {
    let text = said.text();
    let verdict = match verdict {
        Some(Verdict::Best { of }) => vote::verdict(&text, of).map(|n| n as u32),
        Some(Verdict::Right) => vote::approves(&text).map(u32::from),
        None => None,
    };
    Facts {
        form: forms.number(&text),
        scores: if asked.is_empty() { Vec::new() } else { cascade::readings(&said.tokens, asked.iter().copied()) },
        verdict,
        ..Facts::default()
    }
}
