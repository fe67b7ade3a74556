//! Figures of walks over a matrix.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{Line, Origin, Recovered, walk::Walk};
use crate::{
    policy::Policy,
    replay::{
        matrix::Matrix,
        metrics::{Frame, Hull, Pair, Percentiles, Point, bootstrap_within},
    },
};

/// Resamples of the intervals.
const RESAMPLES: usize = 2000;
/// The same resamples of the queries for all figures, so that differences are paired.
const SEED: u64 = 0x6f75_7463;
/// Points of a regret curve.
const CURVE: usize = 50;

/// A matrix, and what lines are compared with.
pub(super) struct Measure<'a> {
    pub(super) matrix: &'a Matrix,
    /// Of each model.
    pub(super) means: Vec<Point>,
    frame: Option<Frame>,
    pub(super) zero: Hull,
    pub(super) best: usize,
    pub(super) cheapest: usize,
    tasks: BTreeMap<&'a str, Vec<usize>>,
}

fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / of.len().max(1) as f64
}

impl<'a> Measure<'a> {
    pub(super) fn new(matrix: &'a Matrix) -> Self {
        let every: Vec<usize> = (0..matrix.len()).collect();
        let means = matrix.means(&every);
        let frame = matrix.frame(&every);
        let pick = |by: &dyn Fn(&Point) -> f64| {
            (0..means.len()).max_by(|a, b| by(&means[*a]).total_cmp(&by(&means[*b])).then(b.cmp(a))).unwrap_or(0)
        };
        let (best, cheapest) = (frame.as_ref().map_or_else(|| pick(&|p| p.score), |f| f.best), pick(&|p| -p.cost));
        let mut tasks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        matrix.queries.iter().enumerate().for_each(|(q, query)| tasks.entry(&query.task).or_default().push(q));
        if tasks.keys().all(|t| t.is_empty()) {
            tasks.clear();
        }
        Self { matrix, zero: Hull::of(means.iter().copied()), means, frame, best, cheapest, tasks }
    }

    /// The hull of the single models and these.
    pub(super) fn hull(&self, of: impl IntoIterator<Item = Point>) -> Hull {
        Hull::of(self.means.iter().copied().chain(of))
    }

    pub(super) fn aiq(&self, hull: &Hull) -> Option<f64> {
        self.frame.as_ref().map(|f| f.aiq(hull))
    }

    fn interval(&self, of: &[f64], alpha: f64) -> Option<(f64, f64)> {
        let n = of.len().max(1) as f64;
        bootstrap_within(of.len(), RESAMPLES, SEED, 1.0 - alpha, |s| s.iter().map(|i| of[*i]).sum::<f64>() / n)
    }

    /// All figures of a walk, but what is said of policies only; `alpha` is that of the gain's interval.
    pub(super) fn line(&self, name: String, walk: &Walk, alpha: f64) -> Line {
        let (matrix, n) = (self.matrix, self.matrix.len());
        let (scores, costs) = (walk.scores(matrix), walk.costs(matrix));
        let over: Vec<f64> = scores.iter().enumerate().map(|(q, s)| s - matrix.scores(q)[self.best]).collect();
        let wanted = [(&scores, 0.05), (&costs, 0.05), (&over, alpha)];
        let intervals: Vec<_> = wanted.par_iter().map(|(of, alpha)| self.interval(of, *alpha)).collect();
        let point = Point { cost: mean(&costs), score: mean(&scores) };
        let (weak, strong) = (self.means[self.cheapest].score, self.means[self.best].score);
        let share = |m: usize| (0..n).map(|q| walk.chances(q)[m]).sum::<f64>() / n.max(1) as f64;
        let shares: Vec<f64> = (0..matrix.models.len()).map(share).collect();
        let tasks = self.tasks.iter().map(|(task, of)| {
            let sum: f64 = of.iter().map(|q| scores[*q]).sum();
            ((*task).to_owned(), sum / of.len() as f64)
        });
        Line {
            name,
            origin: Origin::Computed,
            hash: None,
            mean_score: point.score,
            score_interval: intervals[0],
            mean_cost_usd: point.cost,
            cost_interval: intervals[1],
            gain: mean(&over),
            interval: intervals[2],
            gap_to_oracle: 0.0,
            // A single model's own cost is a sum in another order.
            zero_router: self.zero.score_at(point.cost * (1.0 + 1e-9)),
            pgr: (strong > weak).then(|| (1e9 * (point.score - weak) / (strong - weak)).round() / 1e9 + 0.0),
            aiq: self.aiq(&self.hull([point])),
            pair: self.recovered(&shares, point.score),
            latency_ms: self.latency(walk),
            refused: (1.0 - walk.missed() - shares.iter().sum::<f64>()).max(0.0),
            missed: walk.missed(),
            shares: matrix.models.iter().cloned().zip(shares).filter(|(_, s)| *s > 0.0).collect(),
            deviation: None,
            calibration: None,
            regret: Vec::new(),
            tasks: tasks.collect(),
        }
    }

    fn recovered(&self, shares: &[f64], score: f64) -> Option<Recovered> {
        let (weak, strong) = (self.means[self.cheapest].score, self.means[self.best].score);
        if shares.len() != 2 || strong <= weak {
            return None;
        }
        let pgr = |score: f64| (score - weak) / (strong - weak);
        let at = |share: f64, score: f64| Point { cost: share, score: pgr(score) };
        let hull = Hull::of([at(0.0, weak), at(shares[self.best], score), at(1.0, strong)]);
        // The least share at which the hull is as high.
        let least = |wanted: f64| {
            hull.points().windows(2).find(|w| w[1].score >= wanted).map(|w| {
                let (a, b) = (w[0], w[1]);
                (a.cost + (b.cost - a.cost) * (wanted - a.score) / (b.score - a.score)).max(0.0)
            })
        };
        Some(Recovered {
            strong: shares[self.best],
            apgr: hull.area(0.0, 1.0)?,
            cpt_50: least(0.5),
            cpt_80: least(0.8),
        })
    }

    /// Of all queries with all models, each as likely as the walk has it; not told of plans of several calls.
    fn latency(&self, walk: &Walk) -> Option<Percentiles> {
        if walk.composed() {
            return None;
        }
        let mut all: Vec<(f64, f64)> = Vec::new();
        for q in 0..self.matrix.len() {
            let latencies = self.matrix.latencies(q)?.iter().copied();
            all.extend(latencies.zip(walk.chances(q).iter().copied()).filter(|(_, p)| *p > 0.0));
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total: f64 = all.iter().map(|(_, p)| p).sum();
        let at = |share: f64| {
            let mut sum = 0.0;
            let found = all.iter().find(|(_, p)| {
                sum += p;
                sum >= share * total
            });
            found.or(all.last()).map(|(ms, _)| *ms)
        };
        Some(Percentiles { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }

    /// The best single model's cumulative score less this one's, after so many queries of the order.
    pub(super) fn regret(&self, order: &[usize], scores: &[f64]) -> Vec<(usize, f64)> {
        let n = order.len();
        let mut sum = 0.0;
        let mut sums = vec![0.0];
        for q in order {
            sum += self.matrix.scores(*q)[self.best] - scores[*q];
            sums.push(sum);
        }
        let points = CURVE.min(n);
        (0..=points).map(|i| i * n / points.max(1)).map(|at| (at, sums[at])).collect()
    }

    /// The per-query oracle's model: the greatest score, then the least cost, then the first.
    fn oracle(&self, q: usize) -> usize {
        let (scores, costs) = (self.matrix.scores(q), self.matrix.costs(q));
        let better = |a: &usize, b: &usize| scores[*a].total_cmp(&scores[*b]).then(costs[*b].total_cmp(&costs[*a]));
        (0..scores.len()).max_by(|a, b| better(a, b).then(b.cmp(a))).unwrap_or(0)
    }

    pub(super) fn oracle_score(&self) -> f64 {
        mean(&(0..self.matrix.len()).map(|q| self.matrix.scores(q)[self.oracle(q)]).collect::<Vec<f64>>())
    }

    /// What policies are compared with.
    pub(super) fn baselines(&self) -> Vec<Line> {
        let (matrix, k) = (self.matrix, self.matrix.models.len());
        let line = |name: String, choose: &dyn Fn(usize) -> Vec<(usize, f64)>| {
            self.line(name, &Walk::of(matrix, choose), 0.05)
        };
        let large = self.first_large(0.5);
        let mut out = vec![
            line(format!("always {}", matrix.models[self.best]), &|_| vec![(self.best, 1.0)]),
            line(format!("always {}", matrix.models[self.cheapest]), &|_| vec![(self.cheapest, 1.0)]),
            line("random".to_owned(), &|_| (0..k).map(|m| (m, 1.0 / k as f64)).collect()),
        ];
        if self.best != self.cheapest {
            let first = |q: usize| if q < large { self.best } else { self.cheapest };
            out.push(line("first-large at half the cost".to_owned(), &|q| vec![(first(q), 1.0)]));
        }
        if self.tasks.len() > 1 {
            let best_for = |of: &Vec<usize>| {
                let sum = |m: usize| of.iter().map(|q| matrix.scores(*q)[m]).sum::<f64>();
                (0..k).max_by(|a, b| sum(*a).total_cmp(&sum(*b)).then(b.cmp(a))).unwrap_or(0)
            };
            let per_task: BTreeMap<&str, usize> = self.tasks.iter().map(|(task, of)| (*task, best_for(of))).collect();
            let of = |q: usize| per_task.get(matrix.queries[q].task.as_str()).copied().unwrap_or(self.best);
            out.push(line("best model per task".to_owned(), &|q| vec![(of(q), 1.0)]));
        }
        out.push(line("oracle (best model per query)".to_owned(), &|q| vec![(self.oracle(q), 1.0)]));
        out
    }

    /// How many queries, in the order of the file, the best model may have until what remains of a budget is only enough for
    /// the cheapest; the budget is a share of what the best one costs for all. A router without any model of the queries,
    /// which is hard to beat where budgets are strict.
    fn first_large(&self, share: f64) -> usize {
        let n = self.matrix.len();
        let cost = |q: usize, m: usize| self.matrix.costs(q)[m];
        let mut rest: f64 = (0..n).map(|q| cost(q, self.cheapest)).sum();
        let budget: f64 = share * (0..n).map(|q| cost(q, self.best)).sum::<f64>();
        let mut spent = 0.0;
        for q in 0..n {
            rest -= cost(q, self.cheapest);
            spent += cost(q, self.best);
            if spent + rest > budget {
                return q;
            }
        }
        n
    }

    /// Every two policies.
    pub(super) fn pairs(&self, policies: &[Policy], walks: &[Walk]) -> Vec<Pair> {
        let scores: Vec<Vec<f64>> = walks.iter().map(|w| w.scores(self.matrix)).collect();
        let pairs: Vec<(usize, usize)> =
            (0..walks.len()).flat_map(|a| (a + 1..walks.len()).map(move |b| (a, b))).collect();
        let alpha = 0.05 / pairs.len().max(1) as f64;
        let made = pairs.par_iter().map(|(a, b)| {
            let over: Vec<f64> = scores[*a].iter().zip(&scores[*b]).map(|(x, y)| x - y).collect();
            Pair {
                first: policies[*a].name().to_owned(),
                second: policies[*b].name().to_owned(),
                difference: mean(&over),
                interval: self.interval(&over, alpha),
            }
        });
        made.collect()
    }
}
