//! From logits to a token: greedy, or drawn from the tempered and truncated distribution.
//!
//! The random number of a token is a pure function of (seed, choice, position): SplitMix64's finaliser over the three.
//! So an answer depends on nothing but the prompt, the seed and the machine's arithmetic, whatever runs beside it.

/// How to choose tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choosing {
    /// 0 is greedy.
    pub temperature: f64,
    /// Keeps the most likely tokens that together have at least this probability; 1 keeps all.
    pub top_p: f64,
    pub seed: u64,
}

/// A sampled token with what was asked to be known about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities under the unscaled distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub chosen: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the token at `position` (the number of tokens before it) for choice `choice`; with `top`, also computes
/// log-probabilities of it and of the `top` most likely tokens.
///
/// `None` when the logits are not finite: the weights are damaged.
pub fn sample(logits: &[f32], how: Choosing, choice: u32, position: usize, top: Option<usize>) -> Option<Sampled> {
    let (best, greatest) = greatest(logits)?;
    let token = match how.temperature > 0.0 {
        false => best,
        true => draw(logits, greatest, how, uniform(how.seed, choice, position)),
    };
    Some(Sampled { token, logprobs: top.map(|n| logprobs(logits, greatest, token, n)) })
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

fn draw(logits: &[f32], greatest: f32, how: Choosing, uniform: f64) -> u32 {
    let weight = |logit: f32| ((f64::from(logit) - f64::from(greatest)) / how.temperature).exp();
    let weights: Vec<f64> = logits.iter().map(|logit| weight(*logit)).collect();
    let total: f64 = weights.iter().sum();
    if how.top_p >= 1.0 {
        return walk(weights.iter().enumerate().map(|(i, w)| (i as u32, *w)), uniform * total);
    }
    // A token with less than (1 - p) / (n - 1) of the mass cannot be needed to reach p: no need to sort those.
    let cut = (1.0 - how.top_p) / (logits.len().max(2) - 1) as f64 * total;
    let mut kept: Vec<(u32, f64)> =
        weights.iter().enumerate().filter(|(_, w)| **w >= cut).map(|(i, w)| (i as u32, *w)).collect();
    kept.sort_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
    let mut mass = 0.0;
    let mut count = 0;
    for (_, w) in &kept {
        mass += w;
        count += 1;
        if mass >= how.top_p * total {
            break;
        }
    }
    walk(kept[..count].iter().copied(), uniform * mass)
}

/// The first token whose cumulated weight exceeds `target`; the last with any weight where rounding leaves none.
fn walk(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let mut mass = 0.0;
    let mut last = 0;
    for (token, weight) in weights {
        mass += weight;
        if weight > 0.0 {
            last = token;
        }
        if mass > target {
            return token;
        }
    }
    last
}

fn logprobs(logits: &[f32], greatest: f32, token: u32, top: usize) -> Logprobs {
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
    let log = f64::from(greatest) + sum.ln();
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
    Logprobs { chosen: of(token), top: best.into_iter().map(|t| (t, of(t))).collect() }
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
        assert_eq!(sample(&[1.0, 3.0, 3.0], how, 0, 5, None).unwrap().token, 1);
    }

    #[test]
    fn frequencies_follow_the_tempered_softmax() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        for temperature in [0.5, 1.0, 2.0] {
            let how = Choosing { temperature, ..SOFT };
            let mut counts = [0u32; 4];
            for position in 0..40_000 {
                counts[sample(&logits, how, 3, position, None).unwrap().token as usize] += 1;
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
                seen[sample(&logits, Choosing { top_p, ..SOFT }, 0, position, None).unwrap().token as usize] = true;
            }
            seen
        };
        assert_eq!(seen(0.4), [false, true, false, false]);
        assert_eq!(seen(0.79), [false, true, false, true]);
        assert_eq!(seen(0.9), [true, true, false, true]);
        assert_eq!(seen(1.0), [true; 4]);
        assert_eq!(seen(0.0), [false, true, false, false]);
    }

    #[test]
    fn logprobs_are_of_the_unscaled_distribution() {
        let logits: Vec<f32> = [0.2f32, 0.7, 0.1].iter().map(|p| p.ln() + 3.0).collect();
        let how = Choosing { temperature: 0.0, ..SOFT };
        let sampled = sample(&logits, how, 0, 0, Some(2)).unwrap().logprobs.unwrap();
        assert!((sampled.chosen - 0.7f32.ln()).abs() < 1e-6);
        assert_eq!(sampled.top.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [1, 0]);
        assert!((sampled.top[1].1 - 0.2f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn damaged_logits_are_noticed() {
        assert_eq!(sample(&[0.0, f32::NAN], SOFT, 0, 0, None), None);
        assert_eq!(sample(&[f32::NEG_INFINITY; 2], SOFT, 0, 0, None), None);
        assert_eq!(sample(&[0.0, f32::INFINITY], SOFT, 0, 0, None), None);
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
