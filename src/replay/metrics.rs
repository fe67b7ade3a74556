//! Metrics of routers on outcomes: points of (mean cost, mean score), their non-decreasing convex hull, the average
//! improvement in quality (AIQ), the average performance gap recovered (APGR), and paired bootstrap intervals.
//!
//! Hull and AIQ follow RouterBench (Hu et al., arXiv 2403.12031, section 4): a router that can be set to two points can be
//! mixed at random to any point between them, so what counts is the upper convex hull; a dearer setting is never worse
//! than a cheaper one that may be used in its place. The area is taken from the cheapest hull model's cost to the best
//! single model's, over the width, so that 1 is the best possible and costs outside of what is worth paying do not count.

/// What a router cost and scored on average: USD per query, and 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Point {
    pub cost: f64,
    pub score: f64,
}

/// The non-decreasing upper convex hull of points, by rising cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Hull(Vec<Point>);

impl Hull {
    /// Points that are not finite are left out.
    pub fn of(points: impl IntoIterator<Item = Point>) -> Self {
        let mut points: Vec<Point> = points.into_iter().filter(|p| p.cost.is_finite() && p.score.is_finite()).collect();
        points.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(b.score.total_cmp(&a.score)));
        let mut hull: Vec<Point> = Vec::new();
        for p in points {
            if hull.last().is_some_and(|last| p.score <= last.score) {
                continue;
            }
            while let [.., a, b] = hull[..]
                && (b.score - a.score) * (p.cost - a.cost) <= (p.score - a.score) * (b.cost - a.cost)
            {
                hull.pop();
            }
            hull.push(p);
        }
        Hull(hull)
    }

    /// Its corners, by rising cost and score.
    pub fn points(&self) -> &[Point] {
        &self.0
    }

    /// Greatest mean score at a mean cost of at most `cost`; `None` below the cheapest point.
    pub fn score_at(&self, cost: f64) -> Option<f64> {
        let after = self.0.iter().position(|p| p.cost > cost);
        match after {
            Some(0) => None,
            None => self.0.last().map(|p| p.score),
            Some(n) => {
                let (a, b) = (self.0[n - 1], self.0[n]);
                Some(a.score + (b.score - a.score) * (cost - a.cost) / (b.cost - a.cost))
            }
        }
    }

    /// Mean of the score over the costs from `from` to `to`: the area under the hull over the width. Below the cheapest
    /// point the hull is continued at that point's score: only what is cheaper than the cheapest model could be there.
    /// `None` for an empty hull or no width.
    pub fn area(&self, from: f64, to: f64) -> Option<f64> {
        let (first, last) = (self.0.first()?, self.0.last()?);
        if from >= to || !(from.is_finite() && to.is_finite()) {
            return None;
        }
        let value = |cost: f64| match cost {
            c if c <= first.cost => first.score,
            c if c >= last.cost => last.score,
            c => self.score_at(c).unwrap_or(first.score),
        };
        let mut cuts: Vec<f64> = self.0.iter().map(|p| p.cost).filter(|c| *c > from && *c < to).collect();
        cuts.insert(0, from);
        cuts.push(to);
        let area: f64 = cuts.windows(2).map(|w| 0.5 * (value(w[0]) + value(w[1])) * (w[1] - w[0])).sum();
        Some(area / (to - from))
    }
}

/// What is compared with: the single models' hull ("zero router": each query goes to a model at random, whatever it
/// says), and the bounds of AIQ.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Mean cost and score of each model.
    pub models: Vec<Point>,
    pub zero: Hull,
    /// Cost of the cheapest model on the hull, and of the best single one.
    pub from: f64,
    pub to: f64,
    /// Place of the best single model.
    pub best: usize,
}

impl Frame {
    /// `None` without models, or where the best single model is also the cheapest: then there is nothing to route.
    pub fn of(models: Vec<Point>) -> Option<Self> {
        let zero = Hull::of(models.iter().copied());
        let (from, top) = (zero.points().first()?.cost, *zero.points().last()?);
        let best = models.iter().position(|p| *p == top)?;
        (top.cost > from).then_some(Self { models, zero, from, to: top.cost, best })
    }

    /// Average improvement in quality of a hull.
    pub fn aiq(&self, hull: &Hull) -> f64 {
        hull.area(self.from, self.to).unwrap_or(f64::NAN)
    }
}

/// Average performance gap recovered by sending the queries with the greatest `gain` to the strong model, over all shares
/// of calls to it (Ong et al., "RouteLLM", arXiv 2406.18665, section 3.3): 0 is the weak model, 0.5 a random mix, above 1
/// what beats the strong one. `None` where the two models score alike.
pub fn apgr(gain: &[f64], weak: &[f64], strong: &[f64]) -> Option<f64> {
    let n = gain.len();
    let (low, high): (f64, f64) = (weak.iter().sum(), strong.iter().sum());
    if n == 0 || high == low {
        return None;
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| gain[*b].total_cmp(&gain[*a]).then(a.cmp(b)));
    let mut recovered = 0.0;
    let mut area = 0.0;
    for i in order {
        let before = recovered;
        recovered += strong[i] - weak[i];
        area += 0.5 * (before + recovered);
    }
    Some(area / n as f64 / (high - low))
}

/// A paired bootstrap interval of `statistic` over queries (Efron, "Bootstrap methods", 1979): the same resample of query
/// numbers is handed to it every time, so that differences between routers are differences on the same queries. Returns
/// the 2.5 % and 97.5 % quantiles over `resamples`, drawn by a fixed generator under `seed`. Values that are not finite
/// are left out.
pub fn bootstrap(
    queries: usize,
    resamples: usize,
    seed: u64,
    statistic: impl FnMut(&[usize]) -> f64,
) -> Option<(f64, f64)> {
    bootstrap_within(queries, resamples, seed, 0.95, statistic)
}

/// The same for another confidence than 95 %.
pub fn bootstrap_within(
    queries: usize,
    resamples: usize,
    seed: u64,
    confidence: f64,
    mut statistic: impl FnMut(&[usize]) -> f64,
) -> Option<(f64, f64)> {
    let mut rng = SplitMix(seed);
    let mut values: Vec<f64> = Vec::with_capacity(resamples);
    let mut sample = vec![0; queries];
    for _ in 0..resamples {
        sample.iter_mut().for_each(|s| *s = rng.below(queries));
        values.push(statistic(&sample));
    }
    middle(values, confidence)
}

/// The quantiles between which the middle `confidence` of the values lies; values that are not finite are left out.
pub fn middle(mut values: Vec<f64>, confidence: f64) -> Option<(f64, f64)> {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    let at = |q: f64| values.get(((values.len().max(1) - 1) as f64 * q).round() as usize).copied();
    let tail = (1.0 - confidence) / 2.0;
    Some((at(tail)?, at(1.0 - tail)?))
}

/// Of a quantity, its values weighed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// Two policies on the same requests.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Pair {
    pub first: String,
    pub second: String,
    /// The first's mean score, or estimated reward, less the second's, with the paired 95 % bootstrap interval over queries or
    /// sessions, widened for the number of pairs (Bonferroni).
    pub difference: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
}

/// Weighed values in cells one per cent wide, so that percentiles are right to half of one; from 0.001 on, to 10^8. Memory
/// does not grow with their number.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Histogram {
    cells: Vec<f64>,
}

/// Logarithm of a cell's width, and of the least value.
const CELL: f64 = 0.009_950_330_853_168_083;
const LEAST: f64 = -6.907_755_278_982_137;
const CELLS: usize = 2546;

impl Histogram {
    /// Values that are no positive number are left out.
    pub fn add(&mut self, weight: f64, value: f64) {
        if !(value > 0.0 && weight > 0.0 && weight.is_finite()) {
            return;
        }
        self.cells.resize(CELLS, 0.0);
        let cell = ((libm::log(value) - LEAST) / CELL).clamp(0.0, (CELLS - 1) as f64) as usize;
        self.cells[cell] += weight;
    }

    /// `None` without values.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let total: f64 = self.cells.iter().sum();
        let at = |share: f64| {
            let mut sum = 0.0;
            let reached = |weight: &f64| {
                sum += weight;
                *weight > 0.0 && sum >= share * total * (1.0 - 1e-12)
            };
            let cell = self.cells.iter().position(reached)?;
            Some(libm::exp(LEAST + CELL * (cell as f64 + 0.5)))
        };
        Some(Percentiles { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// A small generator for splits and resamples (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct SplitMix(pub u64);

impl SplitMix {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 for `n` = 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A standard normal number (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        (-2.0 * libm::log(u)).sqrt() * libm::cos(2.0 * std::f64::consts::PI * v)
    }

    /// A random order of 0..n (Fisher and Yates).
    pub fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn p(cost: f64, score: f64) -> Point {
        Point { cost, score }
    }

    #[test]
    fn the_hull_is_convex_and_never_falls() {
        let hull = Hull::of([p(1.0, 0.5), p(2.0, 0.55), p(3.0, 0.7), p(4.0, 0.6), p(5.0, 0.7)]);
        assert_eq!(hull.points(), [p(1.0, 0.5), p(3.0, 0.7)]);
        assert_eq!(hull.score_at(0.5), None);
        assert!((hull.score_at(2.0).unwrap() - 0.6).abs() < 1e-12);
        assert_eq!(hull.score_at(9.0), Some(0.7));
        assert_eq!(Hull::of([p(1.0, 0.2), p(1.0, 0.4)]).points(), [p(1.0, 0.4)]);
    }

    #[test]
    fn aiq_is_the_mean_height_between_the_cheapest_and_the_best() {
        let frame = Frame::of(vec![p(1.0, 0.5), p(3.0, 0.7), p(2.0, 0.3)]).unwrap();
        assert_eq!((frame.from, frame.to, frame.best), (1.0, 3.0, 1));
        assert!((frame.aiq(&frame.zero) - 0.6).abs() < 1e-12);
        // A router that reaches 0.7 at 2: (0.6 + 0.7) / 2.
        assert!((frame.aiq(&Hull::of([p(1.0, 0.5), p(2.0, 0.7)])) - 0.65).abs() < 1e-12);
        // What begins later is continued to the left, what ends earlier to the right.
        assert!((frame.aiq(&Hull::of([p(2.0, 0.6)])) - 0.6).abs() < 1e-12);
        assert!(Frame::of(vec![p(1.0, 0.9), p(2.0, 0.5)]).is_none());
    }

    #[test]
    fn apgr_is_one_half_for_no_information_and_more_for_some() {
        // Two queries; the strong model is better on the second alone.
        let (weak, strong) = ([1.0, 0.0], [1.0, 1.0]);
        assert!((apgr(&[0.0, 1.0], &weak, &strong).unwrap() - 0.75).abs() < 1e-12);
        assert!((apgr(&[1.0, 0.0], &weak, &strong).unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(apgr(&[1.0], &[1.0], &[1.0]), None);
    }

    #[test]
    fn an_interval_covers_what_it_should() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let (low, high) =
            bootstrap(400, 500, 1, |s| s.iter().map(|i| values[*i]).sum::<f64>() / s.len() as f64).unwrap();
        // The standard error is 0.025.
        assert!((0.44..0.47).contains(&low) && (0.53..0.56).contains(&high), "{low} {high}");
        assert_eq!(bootstrap(400, 5, 1, |_| f64::NAN), None);
    }

    #[test]
    fn percentiles_are_weighed_and_right_to_half_a_per_cent() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentiles(), None);
        (1..=1000).for_each(|ms| histogram.add(1.0, f64::from(ms)));
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.006, "{got} {want}");
        let p = histogram.percentiles().unwrap();
        [(p.p50, 500.0), (p.p90, 900.0), (p.p99, 990.0)].into_iter().for_each(|(got, want)| near(got, want));
        // Half of the weight on one value.
        histogram.add(1000.0, 2.0);
        near(histogram.percentiles().unwrap().p50, 2.0);
        histogram.add(f64::NAN, 5.0);
        histogram.add(1e9, f64::NAN);
        near(histogram.percentiles().unwrap().p90, 800.0);
    }

    proptest! {
        #[test]
        fn no_point_is_above_the_hull(points in prop::collection::vec((0.0f64..10.0, 0.0f64..1.0), 1..20)) {
            let points: Vec<Point> = points.into_iter().map(|(c, s)| p(c, s)).collect();
            let hull = Hull::of(points.iter().copied());
            for q in &points {
                prop_assert!(hull.score_at(q.cost).unwrap() >= q.score - 1e-9);
            }
            for w in hull.points().windows(2) {
                prop_assert!(w[1].cost > w[0].cost && w[1].score > w[0].score);
            }
        }
    }
}
