//! Arithmetic that decides: plain f64, one fixed order of operations, no fused multiply-add, so that the same inputs
//! give the same bytes on any machine, in debug and release builds alike. IEEE 754 fixes `+ - * /` and `sqrt`; Rust
//! neither reorders nor contracts them.
//!
//! Symmetric matrices are packed by rows of their lower triangle: entry (i, j), j <= i, is at i(i+1)/2 + j.

/// Entries of a packed symmetric matrix of `n` rows.
pub(crate) fn packed_len(n: usize) -> usize {
    n * (n + 1) / 2
}

/// a · b as eight interleaved sums, added up pairwise. Elements beyond the shorter one are left out.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for (x, y) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] += x * y;
    }
    add_up(&sums)
}

/// The same for single-precision vectors, multiplied and summed in double.
pub(crate) fn dot_f32(a: &[f32], b: &[f32]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for (x, y) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += f64::from(x[lane]) * f64::from(y[lane]);
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] += f64::from(*x) * f64::from(*y);
    }
    add_up(&sums)
}

fn add_up(s: &[f64; 8]) -> f64 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// `out` = M x for a row-major matrix of `out.len()` rows.
pub(crate) fn matvec(m: &[f64], x: &[f64], out: &mut [f64]) {
    for (row, y) in m.chunks_exact(x.len().max(1)).zip(out.iter_mut()) {
        *y = dot(row, x);
    }
}

/// A += w x xᵀ, packed.
pub(crate) fn rank_one(a: &mut [f64], x: &[f64], w: f64) {
    let mut at = 0;
    for i in 0..x.len() {
        let wi = w * x[i];
        for xj in &x[..=i] {
            a[at] += wi * xj;
            at += 1;
        }
    }
}

/// The lower Cholesky factor L of A + diag(ridge(0), ridge(1), …), packed; `None` when that is not positive definite.
pub(crate) fn cholesky(a: &[f64], n: usize, ridge: impl Fn(usize) -> f64) -> Option<Vec<f64>> {
    let mut l = vec![0.0; packed_len(n)];
    for i in 0..n {
        let ri = i * (i + 1) / 2;
        for j in 0..=i {
            let rj = j * (j + 1) / 2;
            let s = a[ri + j] - dot(&l[ri..ri + j], &l[rj..rj + j]);
            if i == j {
                let pivot = s + ridge(i);
                if !(pivot.is_finite() && pivot > 0.0) {
                    return None;
                }
                l[ri + j] = pivot.sqrt();
            } else {
                l[ri + j] = s / l[rj + j];
            }
        }
    }
    Some(l)
}

/// z with L z = x, by forward substitution.
pub(crate) fn forward(l: &[f64], x: &[f64], z: &mut [f64]) {
    for i in 0..x.len() {
        let ri = i * (i + 1) / 2;
        z[i] = (x[i] - dot(&l[ri..ri + i], &z[..i])) / l[ri + i];
    }
}

/// y with Lᵀ y = z, by backward substitution, in place. Columns of Lᵀ are rows of L, so each solved entry is taken out
/// of all earlier ones.
pub(crate) fn backward(l: &[f64], y: &mut [f64]) {
    for i in (0..y.len()).rev() {
        let ri = i * (i + 1) / 2;
        y[i] /= l[ri + i];
        let yi = y[i];
        for (yj, lij) in y[..i].iter_mut().zip(&l[ri..ri + i]) {
            *yj -= lij * yi;
        }
    }
}

/// (L Lᵀ)⁻¹ b.
pub(crate) fn solve(l: &[f64], b: &[f64]) -> Vec<f64> {
    let mut z = vec![0.0; b.len()];
    forward(l, b, &mut z);
    backward(l, &mut z);
    z
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize, salt: u64) -> Vec<f64> {
        (0..n).map(|i| crate::policy::draw::unit(salt, 9, i as u64) - 0.5).collect()
    }

    #[test]
    fn dot_has_the_documented_order() {
        // Sums that depend on the order: 1e16 swallows 1 unless they meet in different lanes.
        let a = [1e16, 1.0, -1e16, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let b = [1.0; 9];
        // Lane 0: 1e16 + 1 = 1e16; lane 2: -1e16; (0+4)+(2+6) = 0; (1+5)+(3+7) = 2.
        assert_eq!(dot(&a, &b), 2.0);
    }

    #[test]
    fn cholesky_solves_what_it_factors() {
        for n in [1, 2, 7, 8, 9, 33] {
            let mut a = vec![0.0; packed_len(n)];
            for k in 0..2 * n {
                rank_one(&mut a, &sample(n, k as u64), 1.0);
            }
            let b = sample(n, 999);
            let l = cholesky(&a, n, |_| 0.5).unwrap();
            let x = solve(&l, &b);
            for (i, b) in b.iter().enumerate() {
                let row: Vec<f64> = (0..n)
                    .map(|j| {
                        let (r, c) = (i.max(j), i.min(j));
                        a[r * (r + 1) / 2 + c] + if i == j { 0.5 } else { 0.0 }
                    })
                    .collect();
                assert!((dot(&row, &x) - b).abs() < 1e-10, "n {n} row {i}");
            }
        }
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_has_no_factor() {
        assert!(cholesky(&[-1.0], 1, |_| 0.5).is_none());
        assert!(cholesky(&[f64::NAN], 1, |_| 0.5).is_none());
    }
}
