//! An answer that is held back until the plan has decided: what of it a client may be given, and what gates, votes and
//! judges are told of it.

use futures_util::{StreamExt, stream};

use crate::{
    backend::wire::{self, Said},
    cascade::{self, Forms},
    domain::{Chunk, Completion, Facts, Score},
    gateway::AnswerBody,
};

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

    /// The answer for the client. `logprobs`: whether it asked for them; what came for the gates' sake is taken out.
    pub(super) fn into_body(self, logprobs: bool) -> AnswerBody {
        let stripped = move |json| if logprobs { json } else { wire::without_logprobs(&json) };
        match self.whole {
            Some(Completion::Wire { body, usage }) => {
                AnswerBody::Whole(Completion::Wire { body: stripped(body), usage })
            }
            Some(whole) => AnswerBody::Whole(whole),
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

/// What the machine is told of an answer. `asked`: the scores that gates ask for; without any, none is computed.
/// `shown`: of a judge's answer, how many answers it was shown.
pub(super) fn facts(said: &Said, forms: &mut Forms, asked: &[Score], shown: usize) -> Facts {
    let text = said.text();
    Facts {
        form: forms.number(&text),
        scores: if asked.is_empty() { Vec::new() } else { cascade::readings(&said.tokens, asked.iter().copied()) },
        verdict: cascade::vote::verdict(&text, shown).map(|n| n as u32),
    }
}
