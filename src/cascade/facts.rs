//! From an answer to what the machine is told of it.

use crate::domain::{Reading, Score, TokenLogprob};

use super::{
    canonical::{self, Form},
    gate,
};

/// The scores of an answer with these tokens that its gates ask for, and the usual ones.
pub fn readings(tokens: &[TokenLogprob], asked: impl IntoIterator<Item = Score>) -> Vec<Reading> {
    let mut scores = Score::STANDARD.to_vec();
    scores.extend(asked.into_iter().filter(|score| score.logprobs().is_some() && !Score::STANDARD.contains(score)));
    scores.into_iter().map(|score| Reading { score, read: gate::score(score, tokens) }).collect()
}

/// Numbers the forms of one request's answers ([`crate::domain::Facts::form`]).
#[derive(Debug, Default)]
pub struct Forms(Vec<Form>);

impl Forms {
    /// The number of an answer's form.
    pub fn number(&mut self, text: &str) -> u32 {
        let form = canonical::form(text);
        let place = self.0.iter().position(|known| *known == form).unwrap_or_else(|| {
            self.0.push(form);
            self.0.len() - 1
        });
        place as u32
    }
}
