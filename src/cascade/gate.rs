//! Scores of a complete answer, from the log-probabilities that came with it: what a stage's conditions ask.
//!
//! Numerics. All sums are f64, over the tokens from first to last, one addition after another; `exp` and `ln` are libm's,
//! so that every machine gives the same bits. Log-probabilities and entropies arrive as f32 and are widened first.
//! A mean is the sum divided once by the count. A score that ends up infinite or NaN is none.
//!
//! Entropy. Exact where every token carries that of its whole distribution (engines of ours). Else from the alternatives
//! that a server lists, renormalised to sum to 1: with m the largest listed log-probability l_i, w_i = exp(l_i - m) and
//! Z = sum w_i,
//!
//! ```text
//! H = ln Z - (sum w_i (l_i - m)) / Z        (nats)
//! ```
//!
//! which is lower than the whole distribution's entropy where the rest of the mass is spread, and at most ln of the number
//! listed; the score is marked as not exact. A token with fewer than two alternatives has no such entropy: one alternative
//! alone would always look certain. The margin and the log-probabilities need no renormalising and are exact in both.
//!
//! An answer of which any token lacks what a score needs has none: a mean over the tokens that happen to have it would be
//! that of another text.

use libm::{exp, log};

use crate::domain::{Score, Scored, Scorer, TokenLogprob, Unscored};

/// The score of an answer with these tokens. Units are [`Score`]'s. How far answers disagree is no score of one.
///
/// # Errors
/// What the answer lacks for it.
pub fn score(score: Score, tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    let scored = match score {
        Score::MeanTokenEntropy => mean_token_entropy(tokens),
        Score::FirstTokenEntropy => first_token_entropy(tokens),
        Score::MeanMargin => mean_margin(tokens),
        Score::MeanLogprob => mean_logprob(tokens),
        Score::LogprobQuantile(q) => logprob_quantile(tokens, q),
        Score::Disagreement => Err(Unscored::NoVote),
        Score::Verified => Err(Unscored::NoVerdict),
        Score::Learned(scorer) => learned(&scorer, tokens),
    }?;
    if scored.value.is_finite() { Ok(scored) } else { Err(Unscored::NotFinite) }
}

/// Mean entropy of the distributions that the tokens were drawn from, in nats: low is sure. The score "Softmax-Ent" of
/// Fomicheva et al., "Unsupervised Quality Estimation for Neural Machine Translation", TACL 8 (2020), arXiv 2005.10608,
/// section on exploiting the softmax distribution.
///
/// # Errors
/// [`Unscored::NoLogprobs`] without tokens, [`Unscored::NoAlternatives`] where a token has no entropy.
pub fn mean_token_entropy(tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    mean(tokens, entropy)
}

/// Entropy of the first token's distribution, in nats: low is sure. GlimpRouter ("GlimpRouter", arXiv 2601.05110) reads
/// from it, renormalised over the 20 likeliest tokens, how hard the step is that the token begins; here it is the
/// answer's.
///
/// # Errors
/// As [`mean_token_entropy`], of the first token.
pub fn first_token_entropy(tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    entropy(tokens.first().ok_or(Unscored::NoLogprobs)?)
}

/// Mean difference between the two largest probabilities at each token, from 0 to 1: high is sure. The margin of Scheffer,
/// Decomain, Wrobel, "Active Hidden Markov Models for Information Extraction", IDA 2001, averaged over the answer.
///
/// # Errors
/// [`Unscored::NoLogprobs`] without tokens, [`Unscored::NoAlternatives`] where a token has fewer than two alternatives.
pub fn mean_margin(tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    mean(tokens, |token| {
        let mut best = f64::NEG_INFINITY;
        let mut second = f64::NEG_INFINITY;
        let mut count = 0;
        for logprob in alternatives(token) {
            count += 1;
            if logprob > best {
                (best, second) = (logprob, best);
            } else if logprob > second {
                second = logprob;
            }
        }
        if count < 2 {
            return Err(Unscored::NoAlternatives);
        }
        Ok(Scored { value: exp(best) - exp(second), exact: true })
    })
}

/// Mean log-probability of the answer's tokens, at most 0: high is sure. "Chow-Average" of Gupta et al., "Language Model
/// Cascades: Token-level uncertainty and beyond", ICLR 2024, arXiv 2404.10136, section 3: the log-probability of the whole
/// answer, normalised by its length.
///
/// # Errors
/// [`Unscored::NoLogprobs`] without tokens.
pub fn mean_logprob(tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    mean(tokens, |token| Ok(Scored { value: f64::from(token.logprob), exact: true }))
}

/// The `q` quantile of the tokens' log-probabilities, at most 0: high is sure. "Chow-Quantile" of Gupta et al. (as above),
/// section 3; q = 0 is the least likely token. Between order statistics the quantile is interpolated linearly (definition 7
/// of Hyndman and Fan, "Sample Quantiles in Statistical Packages", The American Statistician 50(4), 1996): with h = (n - 1) q,
/// x_h is between the ones below and above. Scores that are the same or infinite are not interpolated.
///
/// # Errors
/// [`Unscored::NoLogprobs`] without tokens, [`Unscored::NotFinite`] where `q` or a log-probability is NaN.
pub fn logprob_quantile(tokens: &[TokenLogprob], q: f64) -> Result<Scored, Unscored> {
    let mut sorted: Vec<f64> = tokens.iter().map(|token| f64::from(token.logprob)).collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1).ok_or(Unscored::NoLogprobs)?;
    if q.is_nan() || sorted.iter().any(|x| x.is_nan()) {
        return Err(Unscored::NotFinite);
    }
    let h = last as f64 * q.clamp(0.0, 1.0);
    let below = (h.floor() as usize).min(last);
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    let part = h - below as f64;
    let value = if part == 0.0 || low == high { low } else { low + part * (high - low) };
    Ok(Scored { value, exact: true })
}

/// How probably the answer is right: [`p_right`] of its scores and its length. Exact where all of them are.
///
/// # Errors
/// As the scores that it is made of.
pub fn learned(scorer: &Scorer, tokens: &[TokenLogprob]) -> Result<Scored, Unscored> {
    let mut exact = true;
    let mut features = [0.0; Scorer::FEATURES];
    for (feature, standard) in features.iter_mut().zip(Score::STANDARD) {
        let scored = score(standard, tokens)?;
        *feature = scored.value;
        exact &= scored.exact;
    }
    features[Scorer::FEATURES - 1] = length(tokens.len());
    Ok(Scored { value: p_right(scorer, &features), exact })
}

/// What a learned score is made of: the standard scores, as `of` has them, and the length. `None` where one is not known.
pub fn features(tokens: usize, of: impl Fn(Score) -> Option<f64>) -> Option<[f64; Scorer::FEATURES]> {
    let mut features = [length(tokens); Scorer::FEATURES];
    for (feature, standard) in features.iter_mut().zip(Score::STANDARD) {
        *feature = of(standard)?;
    }
    Some(features)
}

/// The logistic function of the weighted features, 0 to 1.
pub fn p_right(scorer: &Scorer, features: &[f64; Scorer::FEATURES]) -> f64 {
    let mut z = scorer.bias;
    for (weight, feature) in scorer.weights.iter().zip(features) {
        z += weight * feature;
    }
    1.0 / (1.0 + exp(-z))
}

/// The feature of an answer of so many tokens.
fn length(tokens: usize) -> f64 {
    log(1.0 + tokens as f64)
}

/// Mean over tokens; exact where every token is.
fn mean(tokens: &[TokenLogprob], of: impl Fn(&TokenLogprob) -> Result<Scored, Unscored>) -> Result<Scored, Unscored> {
    if tokens.is_empty() {
        return Err(Unscored::NoLogprobs);
    }
    let mut sum = 0.0;
    let mut exact = true;
    for token in tokens {
        let scored = of(token)?;
        sum += scored.value;
        exact &= scored.exact;
    }
    Ok(Scored { value: sum / tokens.len() as f64, exact })
}

/// Entropy of one token's distribution, in nats.
fn entropy(token: &TokenLogprob) -> Result<Scored, Unscored> {
    if let Some(entropy) = token.entropy {
        return Ok(Scored { value: f64::from(entropy), exact: true });
    }
    let count = alternatives(token).count();
    let most = alternatives(token).fold(f64::NEG_INFINITY, f64::max);
    if count < 2 || most == f64::NEG_INFINITY {
        return Err(Unscored::NoAlternatives);
    }
    let (mut z, mut weighed) = (0.0, 0.0);
    for logprob in alternatives(token) {
        let below = logprob - most;
        let weight = exp(below);
        z += weight;
        // A weight of 0 adds nothing, also where `below` is infinite.
        if weight > 0.0 {
            weighed += weight * below;
        }
    }
    Ok(Scored { value: log(z) - weighed / z, exact: false })
}

/// The alternatives' log-probabilities, widened. Minus infinity is a probability of 0; NaN and plus infinity are none.
fn alternatives(token: &TokenLogprob) -> impl Iterator<Item = f64> {
    token.top.iter().map(|top| f64::from(top.logprob)).filter(|l| *l < f64::INFINITY)
}
