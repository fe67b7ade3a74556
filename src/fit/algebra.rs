//! Ridge and logistic regression by the normal equations.

use crate::{policy::linalg, replay::matrix::Matrix};

/// Sums over queries: x xᵀ packed, and x y per model.
#[derive(Clone)]
pub(super) struct Gram {
    columns: usize,
    models: usize,
    n: f64,
    a: Vec<f64>,
    /// Models x columns.
    b: Vec<f64>,
    /// Sum of y per model.
    y: Vec<f64>,
}

impl Gram {
    /// Of the scores of the queries at `places`.
    pub fn of(rows: &[Vec<f64>], matrix: &Matrix, places: &[usize]) -> Self {
        Self::with(rows, matrix.models.len(), places, &|q, m| matrix.scores(q)[m])
    }

    /// Of any target.
    pub fn with(rows: &[Vec<f64>], models: usize, places: &[usize], target: &dyn Fn(usize, usize) -> f64) -> Self {
        let columns = places.first().map_or(0, |q| rows[*q].len());
        let mut out = Self {
            columns,
            models,
            n: 0.0,
            a: vec![0.0; linalg::packed_len(columns)],
            b: vec![0.0; models * columns],
            y: vec![0.0; models],
        };
        for q in places {
            let x = &rows[*q];
            linalg::rank_one(&mut out.a, x, 1.0);
            for m in 0..models {
                let y = target(*q, m);
                out.y[m] += y;
                out.b[m * columns..(m + 1) * columns].iter_mut().zip(x).for_each(|(b, x)| *b += y * x);
            }
            out.n += 1.0;
        }
        out
    }

    /// Adds the sums of another set of queries.
    pub fn add(&mut self, other: &Self) {
        self.n += other.n;
        for (own, others) in [(&mut self.a, &other.a), (&mut self.b, &other.b), (&mut self.y, &other.y)] {
            own.iter_mut().zip(others).for_each(|(a, b)| *a += b);
        }
    }

    /// Ridge weights, models x columns. The targets' means are taken out first and go to the constant, which is the first
    /// column, so that it is hardly regularised. `None` where the matrix has no factor.
    pub fn solve(&self, lambda: f64) -> Option<Vec<f64>> {
        let d = self.columns;
        let factor = linalg::cholesky(&self.a, d, |_| lambda)?;
        let constant: Vec<f64> = (0..d).map(|i| self.a[i * (i + 1) / 2]).collect();
        let mut out = Vec::with_capacity(self.models * d);
        for m in 0..self.models {
            let mean = self.y[m] / self.n.max(1.0);
            let b: Vec<f64> = (0..d).map(|i| self.b[m * d + i] - mean * constant[i]).collect();
            let mut w = linalg::solve(&factor, &b);
            w[0] += mean;
            out.extend(w);
        }
        Some(out)
    }
}

/// Logistic regression of scores in [0, 1], one per model, that `scores` says of a row; models x columns. By steps with the Hessian's upper bound xᵀx/4, which has one
/// factor for all models and never overshoots (Böhning, Lindsay, "Monotonicity of quadratic-approximation algorithms",
/// 1988).
pub(super) fn logistic<'a>(
    rows: &[Vec<f64>],
    models: usize,
    places: &[usize],
    scores: &dyn Fn(usize) -> &'a [f64],
    lambda: f64,
) -> Option<Vec<f64>> {
    const STEPS: usize = 60;
    let columns = places.first().map_or(0, |q| rows[*q].len());
    let mut a = vec![0.0; linalg::packed_len(columns)];
    places.iter().for_each(|q| linalg::rank_one(&mut a, &rows[*q], 0.25));
    let factor = linalg::cholesky(&a, columns, |_| lambda)?;
    let mut weights = vec![0.0; models * columns];
    for _ in 0..STEPS {
        let mut gradient: Vec<f64> = weights.iter().map(|w| -lambda * w).collect();
        for q in places {
            let x = &rows[*q];
            for (m, score) in scores(*q).iter().enumerate() {
                let z = linalg::dot(&weights[m * columns..(m + 1) * columns], x);
                let rest = score - 1.0 / (1.0 + (-z).exp());
                gradient[m * columns..(m + 1) * columns].iter_mut().zip(x).for_each(|(g, x)| *g += rest * x);
            }
        }
        for (w, g) in weights.chunks_exact_mut(columns).zip(gradient.chunks_exact(columns)) {
            w.iter_mut().zip(linalg::solve(&factor, g)).for_each(|(w, step)| *w += step);
        }
    }
    Some(weights)
}

/// a · b in single precision, for what only searches.
pub(super) fn dot32(a: &[f32], b: &[f32]) -> f32 {
    let (a16, a_rest) = a.as_chunks::<16>();
    let (b16, b_rest) = b.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for (x, y) in a16.iter().zip(b16) {
        for lane in 0..16 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f32>()
}
