//! From logits to a token: greedy, or drawn from the tempered and truncated distribution.
//!
//! The random number of a token is a pure function of (seed, choice, position): SplitMix64's finaliser over the three.
//! So an answer depends on nothing but the prompt, the seed and the machine's arithmetic, whatever runs beside it.

use super::ops::{Level, elementwise};

/// Temperatures below it, and above 0, are this: the difference to greedy is beyond f32.
const LEAST_TEMPERATURE: f64 = 1e-4;

/// How to choose tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choosing {
    /// 0 is greedy.
    pub temperature: f64,
    /// Keeps the most likely tokens that together have at least this probability; 1 keeps all.
    pub top_p: f64,
    pub seed: u64,
}

/// Natural logarithms of probabilities under the unscaled distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub chosen: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
    /// Of the whole distribution, in nats.
    pub entropy: f32,
}

/// A set of token ids.
#[derive(Clone, Debug)]
pub struct Allowed {
    words: Vec<u64>,
}

impl Allowed {
    /// None of a vocabulary of that size.
    pub fn none(vocabulary: usize) -> Self {
        Self { words: vec![0; vocabulary.div_ceil(64)] }
    }

    /// Adds a token; one that is not of the vocabulary is left out.
    pub fn add(&mut self, token: u32) {
        if let Some(word) = self.words.get_mut(token as usize / 64) {
            *word |= 1 << (token % 64);
        }
    }

    pub fn contains(&self, token: u32) -> bool {
        self.words.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }
}

/// Says which tokens may come next, for structured output: asked once per token, on the engine's thread. What it says must
/// follow from the answer so far alone, since a sequence may be computed again, and guesses are checked out of turn.
pub trait TokenMask: Send + Sync + std::fmt::Debug {
    /// Adds all tokens that may follow `answer` to `allowed`, which is empty. The end is a token, too: an answer that may end here
    /// must be given the tokens that end it.
    fn allow(&self, answer: &[u32], allowed: &mut Allowed);
}

/// Logits of which only the allowed are left; the others are so small that they have no probability. `None` when none is.
pub fn masked(logits: &[f32], allowed: &Allowed) -> Option<Vec<f32>> {
    let mut any = false;
    let mut keep = |(token, logit): (u32, &f32)| match allowed.contains(token) {
        true => {
            any = true;
            *logit
        }
        false => f32::NEG_INFINITY,
    };
    let out: Vec<f32> = (0..).zip(logits).map(&mut keep).collect();
    any.then_some(out)
}

/// Chooses the token at `position` (the number of tokens before it) for choice `choice`.
///
/// `None` when the logits are not finite: the weights are damaged.
pub fn choose(logits: &[f32], how: Choosing, choice: u32, position: usize) -> Option<u32> {
    let (best, _) = greatest(logits)?;
    Some(match how.temperature > 0.0 {
        false => best,
        true => draw(logits, how, uniform(how.seed, choice, position)),
    })
}

/// Index and value of the greatest logit, the first of equals.
fn greatest(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (i as u32, *logit);
        }
        if logit.is_nan() {
            return None;
        }
    }
    best.1.is_finite().then_some(best)
}

fn draw(logits: &[f32], how: Choosing, uniform: f64) -> u32 {
    let mut weights = logits.to_vec();
    elementwise::scale(Level::detect(), &mut weights, (1.0 / how.temperature.max(LEAST_TEMPERATURE)) as f32);
    let mut total = [0.0];
    elementwise::softmax_weights(Level::detect(), &mut weights, &mut total);
    let tokens = weights.iter().enumerate().map(|(i, w)| (i as u32, *w));
    if how.top_p >= 1.0 {
        return walk(tokens, uniform * f64::from(total[0]));
    }
    // A token with less than (1 - p) / (n - 1) of the mass cannot be needed to reach p: no need to sort those.
    let total = f64::from(total[0]);
    // The most likely token has the weight 1 and always stays.
    let cut = ((1.0 - how.top_p) / (logits.len().max(2) - 1) as f64 * total).min(1.0);
    let mut kept: Vec<(u32, f32)> = tokens.filter(|(_, w)| f64::from(*w) >= cut).collect();
    kept.sort_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
    let mut mass = 0.0;
    let mut count = 0;
    for (_, w) in &kept {
        mass += f64::from(*w);
        count += 1;
        if mass >= how.top_p * total {
            break;
        }
    }
    walk(kept[..count].iter().copied(), uniform * mass)
}

/// The first token whose cumulated weight exceeds `target`; the last with any weight where rounding leaves none.
fn walk(weights: impl Iterator<Item = (u32, f32)>, target: f64) -> u32 {
    let mut mass = 0.0;
    let mut last = 0;
    for (token, weight) in weights {
        mass += f64::from(weight);
        if weight > 0.0 {
            last = token;
        }
        if mass > target {
            return token;
        }
    }
    last
}

/// Log-probabilities of a token and of the likeliest, and the entropy, under the unscaled distribution.
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = [0.0];
    let mut weights = logits.to_vec();
    elementwise::softmax_weights(Level::detect(), &mut weights, &mut sum);
    let log = f64::from(greatest) + f64::from(sum[0]).ln();
    // -sum p ln p, with p = w / sum and ln p = logit - log.
    let term =
        |(w, logit): (&f32, &f32)| if logit.is_finite() { f64::from(*w) * (log - f64::from(*logit)) } else { 0.0 };
    let entropy = weights.iter().zip(logits).map(term).sum::<f64>() / f64::from(sum[0]);
    let of = |token: u32| (f64::from(logits[token as usize]) - log) as f32;
    let mut best: Vec<u32> = Vec::with_capacity(top + 1);
    if top > 0 {
        for (i, logit) in logits.iter().enumerate() {
            if best.len() == top && best.last().is_some_and(|last| *logit <= logits[*last as usize]) {
                continue;
            }
            let place = best.partition_point(|other| logits[*other as usize] >= *logit);
            best.insert(place, i as u32);
            best.truncate(top);
        }
    }
    Logprobs { chosen: of(token), top: best.into_iter().map(|t| (t, of(t))).collect(), entropy: entropy as f32 }
}

/// A number in 0..1 for (seed, choice, position).
pub fn uniform(seed: u64, choice: u32, position: usize) -> f64 {
    let stream = mix(seed ^ mix(u64::from(choice).wrapping_add(0x6a09_e667_f3bc_c909)));
    let bits = mix(stream.wrapping_add((position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's finaliser (Steele, Lea and Flood, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOFT: Choosing = Choosing { temperature: 1.0, top_p: 1.0, seed: 7 };

    #[test]
    fn greedy_takes_the_first_of_the_greatest() {
        let how = Choosing { temperature: 0.0, ..SOFT };
        assert_eq!(choose(&[1.0, 3.0, 3.0], how, 0, 5).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_tempered_softmax() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        for temperature in [0.5, 1.0, 2.0] {
            let how = Choosing { temperature, ..SOFT };
            let mut counts = [0u32; 4];
            for position in 0..40_000 {
                counts[choose(&logits, how, 3, position).unwrap() as usize] += 1;
            }
            let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(&weights) {
                // Four standard errors of a share of 40,000 draws are at most 0.01.
                assert!((f64::from(*count) / 40_000.0 - weight / total).abs() < 0.01, "{counts:?}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        // Probabilities .5, .3, .15, .05.
        let logits: Vec<f32> = [0.15f32, 0.5, 0.05, 0.3].iter().map(|p| p.ln()).collect();
        let seen = |top_p| {
            let mut seen = [false; 4];
            for position in 0..2_000 {
                seen[choose(&logits, Choosing { top_p, ..SOFT }, 0, position).unwrap() as usize] = true;
            }
            seen
        };
        assert_eq!(seen(0.4), [false, true, false, false]);
        assert_eq!(seen(0.79), [false, true, false, true]);
        assert_eq!(seen(0.9), [true, true, false, true]);
        assert_eq!(seen(1.0), [true; 4]);
        assert_eq!(seen(0.0), [false, true, false, false]);
        // All alike: the first alone.
        assert_eq!(choose(&[1.0; 5], Choosing { top_p: 0.0, ..SOFT }, 0, 9).unwrap(), 0);
        assert_eq!(choose(&[0.0, 2.0, 2.0], Choosing { top_p: 0.0, ..SOFT }, 0, 9).unwrap(), 1);
    }

    #[test]
    fn logprobs_are_of_the_unscaled_distribution() {
        let logits: Vec<f32> = [0.2f32, 0.7, 0.1].iter().map(|p| p.ln() + 3.0).collect();
        let sampled = logprobs(&logits, 1, 2);
        assert!((sampled.chosen - 0.7f32.ln()).abs() < 1e-6);
        assert_eq!(sampled.top.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [1, 0]);
        assert!((sampled.top[1].1 - 0.2f32.ln()).abs() < 1e-6);
        let entropy: f64 = [0.2f64, 0.7, 0.1].iter().map(|p| -p * p.ln()).sum();
        assert!((f64::from(sampled.entropy) - entropy).abs() < 1e-6);
        // As sure as can be, and not at all.
        assert!(logprobs(&[0.0, 90.0, f32::NEG_INFINITY], 1, 0).entropy.abs() < 1e-6);
        assert!((logprobs(&[2.0; 1000], 1, 0).entropy - 1000f32.ln()).abs() < 1e-5);
    }

    #[test]
    fn only_allowed_tokens_are_chosen() {
        let mut allowed = Allowed::none(100);
        assert!(masked(&[1.0; 100], &allowed).is_none());
        [3, 64, 99, 1000].iter().for_each(|token| allowed.add(*token));
        let mut logits = vec![5.0; 100];
        logits[64] = 6.0;
        let left = masked(&logits, &allowed).unwrap();
        let greedy = Choosing { temperature: 0.0, ..SOFT };
        assert_eq!(choose(&left, greedy, 0, 0), Some(64));
        let mut seen = std::collections::BTreeSet::new();
        (0..500).for_each(|position| _ = seen.insert(choose(&left, SOFT, 0, position).unwrap()));
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [3, 64, 99]);
        let half = Choosing { top_p: 0.5, ..SOFT };
        assert!((0..500).all(|position| choose(&left, half, 0, position) == Some(64)));
        allowed.clear();
        assert!(!allowed.contains(3));
    }

    #[test]
    fn damaged_logits_are_noticed() {
        assert_eq!(choose(&[0.0, f32::NAN], SOFT, 0, 0), None);
        assert_eq!(choose(&[f32::NEG_INFINITY; 2], SOFT, 0, 0), None);
        assert_eq!(choose(&[0.0, f32::INFINITY], SOFT, 0, 0), None);
    }

    #[test]
    fn the_generator_is_pinned() {
        // Computed apart, in Python, from the formula above: changing it would change every seeded answer.
        let got: Vec<u64> = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1)]
            .iter()
            .map(|(s, c, p)| (uniform(*s, *c, *p) * (1u64 << 53) as f64) as u64)
            .collect();
        assert_eq!(got, [3577608990260958, 7996524184436956, 2450994268152312, 4243020762466270]);
    }
}
