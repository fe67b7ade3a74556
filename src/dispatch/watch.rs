//! Scores of an answer that is still coming: how sure its first token was, and the least likely token so far.

use crate::{
    backend::wire::Said,
    cascade::gate,
    domain::{Chunk, Reading, Score, Scored, Unscored},
};

/// What is watched of one call's answer, of its first choice.
#[derive(Debug)]
pub(super) struct Watch {
    scores: Vec<Score>,
    /// The first token has been seen.
    begun: bool,
    /// The least log-probability so far.
    least: f64,
}

impl Watch {
    /// `None` where nothing is to be watched.
    pub(super) fn of(scores: Vec<Score>) -> Option<Self> {
        (!scores.is_empty()).then_some(Self { scores, begun: false, least: f64::INFINITY })
    }

    /// What is known with this piece that was not known before.
    pub(super) fn piece(&mut self, chunk: &Chunk) -> Vec<Reading> {
        let mut said = Said::default();
        match chunk {
            Chunk::Text { choice: 0, text, logprobs } => said.add(text, logprobs.iter().cloned()),
            Chunk::Wire(json) => said.read(json),
            Chunk::Text { .. } | Chunk::Finish { .. } | Chunk::Usage(_) => return Vec::new(),
        }
        let says = !said.tokens.is_empty() || !said.text().is_empty();
        let first = says && !self.begun;
        self.begun |= first;
        let mut readings = Vec::new();
        for &score in &self.scores {
            match score {
                Score::FirstTokenEntropy if first => {
                    let read = said.tokens.first().ok_or(Unscored::NoLogprobs);
                    let read = read.and_then(|token| gate::score(score, std::slice::from_ref(token)));
                    readings.push(Reading { score, read });
                }
                Score::LogprobQuantile(_) => {
                    let least = said.tokens.iter().map(|token| f64::from(token.logprob)).fold(f64::INFINITY, f64::min);
                    if least < self.least {
                        self.least = least;
                        readings.push(Reading { score, read: Ok(Scored { value: least, exact: true }) });
                    }
                }
                _ => {}
            }
        }
        readings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::TokenLogprob;

    fn token(logprob: f32, entropy: f32) -> TokenLogprob {
        TokenLogprob { token: String::new(), logprob, bytes: Vec::new(), top: Vec::new(), entropy: Some(entropy) }
    }

    fn piece(text: &str, logprobs: Vec<TokenLogprob>) -> Chunk {
        Chunk::Text { choice: 0, text: text.to_owned(), logprobs }
    }

    #[test]
    fn the_first_token_is_told_once_and_the_least_likely_as_it_falls() {
        let least = Score::LogprobQuantile(0.0);
        let mut watch = Watch::of(vec![Score::FirstTokenEntropy, least]).unwrap();
        let exact = |score, value| Reading { score, read: Ok(Scored { value, exact: true }) };
        assert_eq!(watch.piece(&piece("", Vec::new())), [], "nothing is said yet");
        let both = vec![token(-0.5, 0.25), token(-0.75, 2.0)];
        assert_eq!(watch.piece(&piece("a b", both)), [exact(Score::FirstTokenEntropy, 0.25), exact(least, -0.75)]);
        assert_eq!(watch.piece(&piece("c", vec![token(-0.5, 1.0)])), []);
        assert_eq!(watch.piece(&piece("d", vec![token(-1.5, 1.0)])), [exact(least, -1.5)]);
        assert!(Watch::of(Vec::new()).is_none());
    }

    #[test]
    fn an_answer_without_log_probabilities_has_no_score() {
        let mut watch = Watch::of(vec![Score::FirstTokenEntropy]).unwrap();
        let told = watch.piece(&piece("a", Vec::new()));
        assert_eq!(told, [Reading { score: Score::FirstTokenEntropy, read: Err(Unscored::NoLogprobs) }]);
        assert_eq!(watch.piece(&piece("b", Vec::new())), []);
    }
}
