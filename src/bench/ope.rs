//! `weir bench ope`: the estimators against the truth. Where every model's outcome is known, a policy's value is known, too;
//! so logs are drawn under known policies, over and over, other policies are estimated from each log alone, and it is
//! counted how far off the estimates are and how often their intervals hold.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde::Serialize;

use super::report::Machine;
use crate::{
    policy::query_feature,
    replay::{
        direct::{Direct, PARTS},
        estimate::{Asked, Estimates, Row, estimate},
        matrix::Matrix,
        metrics::SplitMix,
    },
};

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Logs that are drawn, per data set and way of logging.
    pub repetitions: usize,
    /// Decisions per log.
    pub decisions: usize,
    /// Bootstrap resamples per estimate.
    pub resamples: usize,
}

/// Models at most: the best, the cheapest, and others between.
const MODELS: usize = 4;
/// Probability that a logging policy leaves to each model at least.
const FLOOR: f64 = 0.1;
/// Tasks that the reward model tells apart.
const TASKS: usize = 8;
/// Effective sample size below which nothing is promised.
pub const EFFECTIVE: f64 = 200.0;

/// The estimators, in the order of the tables.
const NAMES: [&str; 6] = ["IPS", "clipped IPS", "SNIPS", "DM", "DR", "switch-DR"];

/// An estimator over all repetitions.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub estimator: &'static str,
    /// Mean estimate less the truth.
    pub bias: f64,
    pub rmse: f64,
    /// Share of bootstrap intervals that hold the truth, and their mean width.
    pub coverage: f64,
    pub width: f64,
}

/// A target policy, estimated from the logs of another.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    pub set: String,
    pub logging: &'static str,
    pub missing: &'static str,
    pub target: String,
    pub truth: f64,
    /// Mean effective sample size.
    pub effective: f64,
    pub lines: Vec<Line>,
    /// The same for the Bernstein interval of IPS.
    pub bernstein_coverage: f64,
    pub bernstein_width: f64,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Case>,
    pub plan: Plan,
    pub machine: Machine,
}

/// Which feedback is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Missing {
    None,
    /// Some arms are answered less often, whatever the reward.
    ByArm,
    /// Good answers are reported more often.
    ByScore,
}

impl Missing {
    fn label(self) -> &'static str {
        match self {
            Missing::None => "none",
            Missing::ByArm => "at random, by arm",
            Missing::ByScore => "by score",
        }
    }

    /// Probability that a reward is seen.
    fn seen(self, arm: usize, arms: usize, reward: f64) -> f64 {
        match self {
            Missing::None => 1.0,
            Missing::ByArm => 0.4 + 0.5 * arm as f64 / (arms - 1).max(1) as f64,
            Missing::ByScore => 0.4 + 0.5 * reward,
        }
    }
}

/// Probabilities per query and arm.
type Shares = Vec<Vec<f64>>;

/// A population of queries with known outcomes, and policies over it.
struct World {
    arms: usize,
    features: Vec<Vec<f64>>,
    rewards: Vec<Vec<f64>>,
    logging: Vec<(&'static str, Shares)>,
    targets: Vec<(&'static str, Shares)>,
}

impl World {
    fn of(matrix: &Matrix) -> Self {
        let n = matrix.len();
        let every: Vec<usize> = (0..n).collect();
        let mut by_task: BTreeMap<&str, usize> = BTreeMap::new();
        matrix.queries.iter().for_each(|q| *by_task.entry(&q.task).or_default() += 1);
        let mut tasks: Vec<(&str, usize)> = by_task.into_iter().collect();
        tasks.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        tasks.truncate(TASKS);
        let task = |q: usize| tasks.iter().position(|(name, _)| *name == matrix.queries[q].task);
        let features = every.iter().map(|q| {
            let signals = crate::fit::embed::measured(&matrix.queries[*q].text);
            let named = ["tokens", "complexity"].iter().filter_map(|name| query_feature(name, &signals));
            let place = task(*q);
            let hot = (0..tasks.len()).map(|t| if Some(t) == place { 1.0 } else { 0.0 });
            std::iter::once(1.0).chain(named).chain(hot).collect()
        });
        let features: Vec<Vec<f64>> = features.collect();
        let arms = matrix.models.len();
        // Policies that look at the request: softmax over fixed linear scores.
        let leaning = |seed: u64| -> Shares {
            let mut rng = SplitMix(seed);
            let d = features.first().map_or(0, Vec::len);
            let theta: Vec<Vec<f64>> = (0..arms).map(|_| (0..d).map(|_| 1.5 * rng.normal()).collect()).collect();
            let soft = |x: &Vec<f64>| {
                let scores = theta.iter().map(|t| libm::exp(t.iter().zip(x).map(|(t, x)| t * x).sum::<f64>()));
                let scores: Vec<f64> = scores.collect();
                let total: f64 = scores.iter().sum();
                scores.iter().map(|s| FLOOR + (1.0 - FLOOR * arms as f64) * s / total).collect()
            };
            features.iter().map(soft).collect()
        };
        let even: Shares = vec![vec![1.0 / arms as f64; arms]; n];
        let one = |arm: usize, share: f64| -> Vec<f64> {
            (0..arms).map(|a| (1.0 - share) / arms as f64 + if a == arm { share } else { 0.0 }).collect()
        };
        let best_of = |places: &[usize]| {
            let sum = |arm: usize| places.iter().map(|q| matrix.scores(*q)[arm]).sum::<f64>();
            (0..arms).max_by(|a, b| sum(*a).total_cmp(&sum(*b))).unwrap_or(0)
        };
        let best = best_of(&every);
        let members = |t: Option<usize>| -> Vec<usize> { every.iter().copied().filter(|q| task(*q) == t).collect() };
        let per_task: BTreeMap<Option<usize>, usize> =
            (0..tasks.len()).map(Some).chain([None]).map(|t| (t, best_of(&members(t)))).collect();
        Self {
            arms,
            rewards: every.iter().map(|q| matrix.scores(*q).to_vec()).collect(),
            logging: vec![("even", even.clone()), ("leaning", leaning(11))],
            targets: vec![
                ("always the best", vec![one(best, 1.0); n]),
                ("best per task", every.iter().map(|q| one(per_task[&task(*q)], 0.9)).collect()),
                ("even", even),
                ("leaning elsewhere", leaning(29)),
            ],
            features,
        }
    }

    fn truth(&self, shares: &Shares) -> f64 {
        let value = |(p, r): (&Vec<f64>, &Vec<f64>)| p.iter().zip(r).map(|(p, r)| p * r).sum::<f64>();
        shares.iter().zip(&self.rewards).map(value).sum::<f64>() / shares.len().max(1) as f64
    }

    /// One log of `logging`, and what it says of each target.
    fn repetition(
        &self,
        (logging, greatest): (&Shares, &[f64]),
        missing: Missing,
        plan: &Plan,
        seed: u64,
    ) -> Vec<Option<Estimates>> {
        let mut rng = SplitMix(seed);
        let mut log = Vec::with_capacity(plan.decisions);
        let mut direct = Direct::new(self.features.first().map_or(0, Vec::len), self.arms);
        let (mut taken, mut seen) = (vec![0.0; self.arms], vec![0.0; self.arms]);
        for n in 0..plan.decisions {
            let q = rng.below(self.features.len());
            let mut at = rng.unit();
            let arm = logging[q]
                .iter()
                .position(|p| {
                    at -= p;
                    at < 0.0
                })
                .unwrap_or(self.arms - 1);
            let reward = self.rewards[q][arm];
            let reward = (rng.unit() < missing.seen(arm, self.arms, reward)).then_some(reward);
            taken[arm] += 1.0;
            if let Some(reward) = reward {
                seen[arm] += 1.0;
                direct.take(n % PARTS, arm, &self.features[q], reward);
            }
            log.push((q, arm, reward));
        }
        let fitted = direct.fit();
        let estimates = self.targets.iter().zip(greatest).map(|((_, target), greatest)| {
            let rows = log.iter().enumerate().map(|(n, (q, arm, reward))| {
                let model = |arm: usize| fitted.predict(n % PARTS, arm, &self.features[*q]);
                Row {
                    session: n as u64,
                    weight: target[*q][*arm] / logging[*q][*arm],
                    reward: *reward,
                    observed: if seen[*arm] > 0.0 { seen[*arm] / taken[*arm] } else { 1.0 },
                    model_taken: model(*arm),
                    model_target: (0..self.arms).map(|a| target[*q][a] * model(a)).sum(),
                }
            });
            let rows: Vec<Row> = rows.collect();
            let asked = Asked {
                max_weight: *greatest,
                resamples: plan.resamples,
                seed: seed ^ 0x626f_6f74,
                ..Asked::default()
            };
            estimate(&rows, asked).ok()
        });
        estimates.collect()
    }

    /// Per target the greatest weight that any arm could have anywhere.
    fn greatest(&self, logging: &Shares) -> Vec<f64> {
        let of = |target: &Shares| {
            target.iter().zip(logging).flat_map(|(t, l)| t.iter().zip(l)).map(|(t, l)| t / l).fold(0.0, f64::max)
        };
        self.targets.iter().map(|(_, target)| of(target)).collect()
    }
}

/// At most [`MODELS`] models, spread evenly from the worst mean score to the best.
fn few(matrix: &Matrix) -> Matrix {
    let every: Vec<usize> = (0..matrix.len()).collect();
    let means = matrix.means(&every);
    let mut order: Vec<usize> = (0..matrix.models.len()).collect();
    order.sort_by(|a, b| means[*a].score.total_cmp(&means[*b].score));
    let k = order.len().min(MODELS);
    let places: Vec<usize> = (0..k).map(|i| order[i * (order.len() - 1) / (k - 1).max(1)]).collect();
    matrix.with_models(&places)
}

/// Runs the plan on one set.
pub fn run(matrix: &Matrix, plan: &Plan, tick: &(dyn Fn() + Sync)) -> Vec<Case> {
    let world = World::of(&few(matrix));
    let mut out = Vec::new();
    for (name, logging) in &world.logging {
        let kinds: &[Missing] = match *name {
            "leaning" => &[Missing::None, Missing::ByArm, Missing::ByScore],
            _ => &[Missing::None],
        };
        let greatest = world.greatest(logging);
        for missing in kinds {
            let one = |n: usize| world.repetition((logging, &greatest), *missing, plan, 7919 * n as u64 + 1);
            let all = repeat(plan.repetitions, tick, &one);
            for (t, (target, shares)) in world.targets.iter().enumerate() {
                let truth = world.truth(shares);
                let estimates: Vec<&Estimates> = all.iter().filter_map(|of| of[t].as_ref()).collect();
                out.push(case(&matrix.name, name, *missing, target, truth, &estimates));
            }
        }
    }
    out
}

/// `make` for every number below `n` on all cores, in order.
fn repeat<T: Send>(n: usize, tick: &(dyn Fn() + Sync), make: &(dyn Fn(usize) -> T + Sync)) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut out: Vec<(usize, T)> = std::thread::scope(|scope| {
        let work = || {
            let mut mine = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= n {
                    return mine;
                }
                mine.push((at, make(at)));
                tick();
            }
        };
        let handles: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        handles.into_iter().flat_map(|h| h.join().unwrap_or_default()).collect()
    });
    out.sort_by_key(|(at, _)| *at);
    out.into_iter().map(|(_, value)| value).collect()
}

fn case(set: &str, logging: &'static str, missing: Missing, target: &str, truth: f64, of: &[&Estimates]) -> Case {
    let n = of.len().max(1) as f64;
    let mean = |value: &dyn Fn(&Estimates) -> f64| of.iter().map(|e| value(e)).sum::<f64>() / n;
    let holds = |interval: Option<(f64, f64)>| {
        // A constant reward has intervals without width.
        let inside = |(low, high): (f64, f64)| low - 1e-12 <= truth && truth <= high + 1e-12;
        if interval.is_some_and(inside) { 1.0 } else { 0.0 }
    };
    let width = |interval: Option<(f64, f64)>| interval.map_or(f64::NAN, |(low, high)| high - low);
    let lines = NAMES.iter().enumerate().map(|(i, name)| {
        let pick = |e: &Estimates| [e.ips, e.clipped, e.snips, e.dm, e.dr, e.switch_dr][i];
        Line {
            estimator: name,
            bias: mean(&|e| pick(e).value) - truth,
            rmse: mean(&|e| (pick(e).value - truth).powi(2)).sqrt(),
            coverage: mean(&|e| holds(pick(e).interval)),
            width: mean(&|e| width(pick(e).interval)),
        }
    });
    Case {
        set: set.to_owned(),
        logging,
        missing: missing.label(),
        target: target.to_owned(),
        truth,
        effective: mean(&|e| e.effective),
        lines: lines.collect(),
        bernstein_coverage: mean(&|e| holds(e.bernstein)),
        bernstein_width: mean(&|e| width(e.bernstein)),
    }
}

impl Report {
    /// Collects cases into the document that all benches print.
    pub fn of(rows: Vec<Case>, plan: Plan) -> Self {
        let mut figures = BTreeMap::new();
        for missing in [Missing::None, Missing::ByArm, Missing::ByScore] {
            let cases: Vec<&Case> =
                rows.iter().filter(|c| c.missing == missing.label() && c.effective >= EFFECTIVE).collect();
            for (i, name) in NAMES.iter().enumerate() {
                let of = |value: fn(&Line) -> f64, pick: fn(f64, f64) -> f64, from: f64| {
                    cases.iter().map(|c| value(&c.lines[i])).fold(from, pick)
                };
                let key = |what: &str| format!("missing {}.{name}.{what}", missing.label()).replace(' ', "_");
                figures.insert(key("least_coverage"), of(|l| l.coverage, f64::min, f64::INFINITY));
                figures.insert(key("greatest_coverage"), of(|l| l.coverage, f64::max, 0.0));
                figures.insert(key("greatest_bias"), of(|l| l.bias.abs(), f64::max, 0.0));
            }
            let dr = cases.iter().map(|c| c.lines[4].rmse / c.lines[0].rmse).fold(0.0, f64::max);
            figures.insert(format!("missing {}.DR over IPS, rmse", missing.label()).replace(' ', "_"), dr);
            let least = cases.iter().map(|c| c.bernstein_coverage).fold(f64::INFINITY, f64::min);
            figures.insert(format!("missing {}.Bernstein.least_coverage", missing.label()).replace(' ', "_"), least);
        }
        figures.retain(|_, v| v.is_finite());
        Self { bench: "ope", figures, rows, plan, machine: Machine::here() }
    }

    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let cell = |l: &Line| format!("{:+.4} / {:.4} / {:.1} %", l.bias, l.rmse, 100.0 * l.coverage);
        for missing in [Missing::None, Missing::ByArm, Missing::ByScore] {
            let _ = writeln!(
                out,
                "### Feedback missing: {}\n\nBias / RMSE / share of 95 % bootstrap intervals that hold the truth.\n\n\
                 | set | log | target | truth | effective n | {} | Bernstein holds (width) |\n|{}",
                missing.label(),
                NAMES.join(" | "),
                "---|".repeat(6 + NAMES.len())
            );
            for c in self.rows.iter().filter(|c| c.missing == missing.label()) {
                let cells: Vec<String> = c.lines.iter().map(cell).collect();
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {:.4} | {:.0} | {} | {:.1} % ({:.2}) |",
                    c.set,
                    c.logging,
                    c.target,
                    c.truth,
                    c.effective,
                    cells.join(" | "),
                    100.0 * c.bernstein_coverage,
                    c.bernstein_width
                );
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::matrix::Query;

    /// A made world: intervals hold about as often as they say, the doubly robust estimate is no worse, and feedback that is
    /// missing by score is not repaired.
    #[test]
    fn estimates_are_near_the_truth() {
        let n = 600;
        let query = |i: usize| Query { id: i.to_string(), task: (i % 3).to_string(), text: format!("question {i}") };
        let mut rng = SplitMix(5);
        let scores = (0..n)
            .flat_map(|i| (0..3).map(move |m| if i % 3 == m { 0.9 } else { 0.4 }))
            .map(|p| if rng.unit() < p { 1.0 } else { 0.0 })
            .collect();
        let models = vec!["a".into(), "b".into(), "c".into()];
        let matrix = Matrix::of("made", models, (0..n).map(query).collect(), scores, vec![0.0; 3 * n]);
        let plan = Plan { repetitions: 60, decisions: 900, resamples: 100 };
        let cases = run(&matrix, &plan, &|| {});
        assert_eq!(cases.len(), 16);
        for case in &cases {
            let [ips, _, snips, _, dr, _] = &case.lines[..] else { panic!() };
            if case.missing == "by score" {
                assert!(snips.bias > 0.05, "{case:?}");
                continue;
            }
            assert!(case.bernstein_coverage == 1.0 && ips.coverage > 0.8 && dr.coverage > 0.8, "{case:?}");
            assert!(dr.rmse < ips.rmse * 1.02 && dr.bias.abs() < 0.02 && snips.bias.abs() < 0.02, "{case:?}");
        }
    }
}
