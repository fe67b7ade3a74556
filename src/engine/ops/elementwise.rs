//! Operations on rows of numbers: norms, rotary embedding, gates, softmax and the quantisation of activations.
//!
//! Sums are kept in sixteen lanes by index and added up in one fixed order, so that they depend on nothing but their
//! terms. No fused multiply-add: all instruction sets give the same bits.

use super::versions;

const LANES: usize = 16;

/// The lanes of a sum, added pairwise.
#[inline(always)]
fn reduce(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Adding it rounds to the nearest whole number, ties to even, for numbers below 2^22: the whole number is then in the
/// lowest bits, which is cheaper to read than a checked conversion and does vectorise.
const ROUND: f32 = 12_582_912.0;

/// The whole number that `shifted - ROUND` is.
#[inline(always)]
fn whole(shifted: f32) -> i32 {
    (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32)
}

/// e^x to within two units in the last place for x in -87..88; below, a tiny positive number. Cephes' polynomial
/// after reduction by powers of two, without branches so that it vectorises.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    y * f32::from_bits((whole(shifted).wrapping_add(127) << 23) as u32)
}

versions! {
    /// RMS norm of each row: `out = x / sqrt(mean(x^2) + epsilon) * weight`; `x` and `out` are rows of `weight.len()`.
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mut lanes = [0f32; LANES];
            let (chunks, rest) = x.as_chunks::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    lanes[i] += chunk[i] * chunk[i];
                }
            }
            for (i, v) in rest.iter().enumerate() {
                lanes[i] += v * v;
            }
            let mean = reduce(lanes, |a, b| a + b) / width as f32;
            let scale = 1.0 / (mean + epsilon).sqrt();
            for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
                *o = v * scale * w;
            }
        }
    }
}

versions! {
    /// `x += y`, element by element.
    pub fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

versions! {
    /// Adds `bias` to every row of `x`.
    pub fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                *x += b;
            }
        }
    }
}

versions! {
    /// SwiGLU: `gate = silu(gate) * up`, with silu(x) = x / (1 + e^-x).
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

versions! {
    /// GeGLU: `gate = gelu(gate) * up`, with gelu(x) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the form with the
    /// hyperbolic tangent (Hendrycks and Gimpel 2016).
    pub fn gelu_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            let twice = 1.595_769 * (x + 0.044_715 * x * x * x);
            *g = x / (1.0 + exp(-twice)) * u;
        }
    }
}

versions! {
    /// Rotates neighbouring pairs of each head by the angles whose cosines and sines are given (half a head each). GGUF files
    /// of the llama architecture have their query and key rows in that order; of others they are brought into it at load.
    pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        for head in x.chunks_exact_mut(cos.len() * 2) {
            let (pairs, _) = head.as_chunks_mut::<2>();
            for ((pair, c), s) in pairs.iter_mut().zip(cos).zip(sin) {
                let [a, b] = *pair;
                *pair = [a * c - b * s, a * s + b * c];
            }
        }
    }
}

versions! {
    /// Turns `scores` into e^(score - greatest) and writes their sum to `sum[0]`; dividing is left to the caller.
    pub fn softmax_weights(scores: &mut [f32], sum: &mut [f32; 1]) {
        let mut top = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = scores.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                top[i] = if chunk[i] > top[i] { chunk[i] } else { top[i] };
            }
        }
        for (i, v) in rest.iter().enumerate() {
            top[i] = if *v > top[i] { *v } else { top[i] };
        }
        let top = reduce(top, |a, b| if a > b { a } else { b });
        let mut lanes = [0f32; LANES];
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                chunk[i] = exp(chunk[i] - top);
                lanes[i] += chunk[i];
            }
        }
        for (i, v) in rest.iter_mut().enumerate() {
            *v = exp(*v - top);
            lanes[i] += *v;
        }
        sum[0] = reduce(lanes, |a, b| a + b);
    }
}

versions! {
    /// `x *= factor`.
    pub fn scale(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

versions! {
    /// Quantises blocks of 32 to eight bits: `v = round(x / s)` with `s = max |x| / 127`; `sums` are of v, of each half of the block, `totals` of s v.
    /// `x` is a multiple of 32 long, `values` as long, the others a 32nd of it.
    pub fn quantise8(x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [[i32; 2]], totals: &mut [f32]) {
        let (x, _) = x.as_chunks::<32>();
        let (values, _) = values.as_chunks_mut::<32>();
        for ((((x, values), scale), sum), total) in x.iter().zip(values).zip(scales).zip(sums).zip(totals) {
            let mut whole = [0; 32];
            *scale = quantise_block(x, 127.0, &mut whole);
            let mut lanes = [0i32; 2];
            for i in 0..32 {
                values[i] = whole[i] as i8;
                lanes[i / 16] = whole[i].wrapping_add(lanes[i / 16]);
            }
            *sum = lanes;
            *total = *scale * lanes[0].wrapping_add(lanes[1]) as f32;
        }
    }
}

versions! {
    /// Quantises blocks of 32 to sixteen bits: `v = round(x / s)` with `s = max |x| / 32639`, kept as two signed bytes,
    /// `v = 256 high + low`. A block's 64 values are its 32 high bytes, then its 32 low bytes; `sums` are of v, of each half of the block,
    /// `totals` of s v. `x` is a multiple of 32 long, `values` twice as long, the others a 32nd of it.
    pub fn quantise16(x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [[i32; 2]], totals: &mut [f32]) {
        let (x, _) = x.as_chunks::<32>();
        let (values, _) = values.as_chunks_mut::<64>();
        for ((((x, values), scale), sum), total) in x.iter().zip(values).zip(scales).zip(sums).zip(totals) {
            let mut whole = [0; 32];
            // The greatest v whose halves fit: 256 * 127 + 127.
            *scale = quantise_block(x, 32_639.0, &mut whole);
            let mut lanes = [0i32; 2];
            for i in 0..32 {
                let high = whole[i].wrapping_add(128) >> 8;
                values[i] = high as i8;
                values[32 + i] = whole[i].wrapping_sub(high << 8) as i8;
                lanes[i / 16] = whole[i].wrapping_add(lanes[i / 16]);
            }
            *sum = lanes;
            *total = *scale * lanes[0].wrapping_add(lanes[1]) as f32;
        }
    }
}

/// Whole numbers of at most `most` for a block, and their scale.
#[inline(always)]
fn quantise_block(x: &[f32; 32], most: f32, out: &mut [i32; 32]) -> f32 {
    let mut greatest = [0f32; LANES];
    for i in 0..32 {
        let a = x[i].abs();
        let g = &mut greatest[i % LANES];
        *g = if a > *g { a } else { *g };
    }
    let greatest = reduce(greatest, |a, b| if a > b { a } else { b });
    let inverse = if greatest > 1e-30 { most / greatest } else { 0.0 };
    for i in 0..32 {
        out[i] = whole(x[i] * inverse + ROUND);
    }
    greatest / most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::Level;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        crate::engine::testing::numbers(n, seed)
    }

    #[test]
    fn exp_is_close_to_the_real_one() {
        for i in -8600..8700 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn all_levels_give_the_same_bits() {
        for n in [32, 96, 576] {
            let x = numbers(n * 3, 1);
            let w = numbers(n, 2);
            let run = |level| {
                let mut out = vec![0.0; n * 3];
                rms_norm(level, &x, &w, 1e-5, &mut out);
                let mut gate = x.clone();
                silu_mul(level, &mut gate, &out);
                gelu_mul(level, &mut gate, &out);
                let mut weights = x[..n - 3].to_vec();
                let mut sum = [0.0];
                softmax_weights(level, &mut weights, &mut sum);
                let blocks = n * 3 / 32;
                let (mut q, mut s, mut t) = (vec![0i8; n * 9], vec![0.0; blocks], vec![[0; 2]; blocks]);
                let mut totals = vec![0.0; blocks];
                let (q8, q16) = q.split_at_mut(n * 3);
                quantise8(level, &x, q8, &mut s, &mut t, &mut totals);
                let eight = (s.clone(), t.clone(), totals.clone());
                quantise16(level, &x, q16, &mut s, &mut t, &mut totals);
                let mut rotated = x.clone();
                rope(level, &mut rotated, &w[..8], &w[8..16]);
                (out, gate, weights, sum, q, eight, (s, t, totals), rotated)
            };
            let want = run(Level::Scalar);
            for level in Level::available() {
                assert_eq!(run(level), want, "{level:?}");
            }
        }
    }

    #[test]
    fn softmax_and_norm_are_what_they_say() {
        let mut weights = [1.0f32, 2.0, 3.0, 0.5];
        let mut sum = [0.0];
        softmax_weights(Level::detect(), &mut weights, &mut sum);
        let total: f64 = [1.0f64, 2.0, 3.0, 0.5].iter().map(|x| (x - 3.0).exp()).sum();
        assert!((f64::from(sum[0]) - total).abs() < 1e-6);
        let mut out = [0.0; 2];
        rms_norm(Level::detect(), &[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
        let rms = 12.5f32.sqrt();
        assert!((out[0] - 3.0 / rms).abs() < 1e-6 && (out[1] - 8.0 / rms).abs() < 1e-6);
    }

    #[test]
    fn quantised_blocks_come_back_within_half_a_step() {
        let mut x = numbers(320, 7);
        x[64..96].fill(0.0);
        for planes in [1, 2] {
            let (mut q, mut s, mut t) = (vec![0i8; 320 * planes], vec![0.0; 10], vec![[0; 2]; 10]);
            let mut totals = vec![0.0; 10];
            let quantise = if planes == 1 { quantise8 } else { quantise16 };
            quantise(Level::detect(), &x, &mut q, &mut s, &mut t, &mut totals);
            let value = |i: usize| match planes {
                1 => i32::from(q[i]),
                _ => i32::from(q[i / 32 * 64 + i % 32]) * 256 + i32::from(q[i / 32 * 64 + i % 32 + 32]),
            };
            for (i, x) in x.iter().enumerate() {
                let step = s[i / 32];
                assert!((x - value(i) as f32 * step).abs() <= step * 0.51);
            }
            assert_eq!(t[3], [96..112, 112..128].map(|half| half.map(value).sum::<i32>()));
            assert_eq!(totals[3], s[3] * (t[3][0] + t[3][1]) as f32);
        }
    }
}
