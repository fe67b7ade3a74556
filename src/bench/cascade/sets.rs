//! Plans that need no log-probabilities, over matrices of outcomes with responses: votes of models, and cascades that call
//! the best model where cheaper ones disagree. Which are worth their cost is found on one half of the queries and judged
//! on the other.

use rayon::prelude::*;
use serde::Serialize;

use crate::{
    domain::{Aggregate, Bound, CallSpec, Condition, Plan, Score, Stage},
    replay::{
        matrix::Matrix,
        metrics::{Hull, Point, bootstrap},
        plan_run::outcomes::{Came, over},
    },
};

const RESAMPLES: usize = 500;
/// Cheap models that plans are made of, at most.
const CHEAP: usize = 8;

/// A plan, judged on queries that it was not chosen on.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub plan: String,
    pub cost_usd: f64,
    pub score: f64,
    /// Best mix of single models at the same cost, on the same queries.
    pub zero_router: Option<f64>,
    /// The score less that, with the paired 95 % bootstrap interval over queries.
    pub gain: Option<f64>,
    pub interval: Option<(f64, f64)>,
    pub calls: f64,
    /// Of a cascade: share of the queries that were escalated.
    pub escalated: Option<f64>,
    pub missed: usize,
}

/// A matrix.
#[derive(Clone, Debug, Serialize)]
pub struct Set {
    pub name: String,
    pub hash: String,
    pub queries: usize,
    pub models: usize,
    /// Plans that were tried on the first half.
    pub tried: usize,
    /// Single models on the hull, and the plans that were chosen, by rising cost.
    pub rows: Vec<Row>,
}

fn call(model: &str) -> Plan {
    Plan::Call(CallSpec::bare(model))
}

fn vote(models: &[&str]) -> Plan {
    Plan::Parallel { branches: models.iter().map(|m| call(m)).collect(), aggregate: Aggregate::Vote }
}

/// A vote, and this model where the vote's answers disagree as much.
fn escalating(models: &[&str], below: f64, best: &str) -> Plan {
    let agree = Condition::new(Score::Disagreement, Bound::Below(below));
    Plan::Cascade(vec![
        Stage { plan: vote(models), accept_when: vec![agree], stop_early: false },
        Stage { plan: call(best), accept_when: Vec::new(), stop_early: false },
    ])
}

/// All votes of three, and all cascades from two and from three models, that cost no more than the best one.
fn plans(matrix: &Matrix, means: &[Point], best: usize) -> Vec<Plan> {
    let mut cheap: Vec<usize> = (0..means.len()).filter(|m| *m != best && means[*m].cost < means[best].cost).collect();
    cheap.sort_by(|a, b| means[*b].score.total_cmp(&means[*a].score).then(a.cmp(b)));
    cheap.truncate(CHEAP);
    let name = |m: usize| matrix.models[m].as_str();
    let mut plans = Vec::new();
    for (i, &a) in cheap.iter().enumerate() {
        for (j, &b) in cheap.iter().enumerate().skip(i + 1) {
            plans.push(escalating(&[name(a), name(b)], 0.5, name(best)));
            for &c in &cheap[j + 1..] {
                let three = [name(a), name(b), name(c)];
                plans.push(vote(&three));
                plans.extend([0.25, 0.75].map(|below| escalating(&three, below, name(best))));
            }
        }
    }
    plans
}

fn mean(matrix: &Matrix, plan: &Plan, places: &[usize]) -> Result<(Point, Vec<Came>), String> {
    let came: Vec<Came> = places.iter().map(|q| over(plan, matrix, *q)).collect::<Result<_, _>>()?;
    let n = came.len().max(1) as f64;
    let sum = |of: &dyn Fn(&Came) -> f64| came.iter().map(of).sum::<f64>() / n;
    Ok((Point { cost: sum(&|c| c.cost_usd), score: sum(&|c| c.score) }, came))
}

/// Judges plans over a matrix.
///
/// # Errors
/// When it has no responses.
pub fn judge(matrix: &Matrix, seed: u64, tick: &(dyn Fn() + Sync)) -> Result<Set, String> {
    if !matrix.has_responses() {
        return Err(format!("{} has no responses, and nobody can say where models agree", matrix.name));
    }
    let folds = matrix.folds(2, seed);
    let half = |fold: usize| -> Vec<usize> { (0..matrix.len()).filter(|q| folds[*q] == fold).collect() };
    let (train, test) = (half(0), half(1));
    let means = matrix.means(&train);
    let best = (0..means.len())
        .max_by(|a, b| means[*a].score.total_cmp(&means[*b].score).then(b.cmp(a)))
        .ok_or_else(|| format!("{} has no models", matrix.name))?;
    let plans = plans(matrix, &means, best);
    let tried = plans.len();
    let on_train: Vec<Point> =
        plans.par_iter().map(|plan| Ok(mean(matrix, plan, &train)?.0)).collect::<Result<_, String>>()?;
    tick();
    let hull = Hull::of(means.iter().chain(&on_train).copied());
    let singles = (0..means.len()).filter(|m| hull.points().contains(&means[*m])).map(|m| call(&matrix.models[m]));
    let chosen = plans.iter().zip(&on_train).filter(|(_, point)| hull.points().contains(point)).map(|(p, _)| p.clone());
    let mut rows: Vec<Row> =
        singles.chain(chosen).map(|plan| row(matrix, &plan, &test)).collect::<Result<_, String>>()?;
    rows.sort_by(|a, b| a.cost_usd.total_cmp(&b.cost_usd));
    tick();
    Ok(Set {
        name: matrix.name.clone(),
        hash: matrix.hash.clone(),
        queries: matrix.len(),
        models: matrix.models.len(),
        tried,
        rows,
    })
}

fn row(matrix: &Matrix, plan: &Plan, test: &[usize]) -> Result<Row, String> {
    let (point, came) = mean(matrix, plan, test)?;
    // What single models score, mixed to the same cost, on these queries. Rounding aside: a model is on its own hull.
    let less = |sample: &[usize]| {
        let places: Vec<usize> = sample.iter().map(|i| test[*i]).collect();
        let n = sample.len().max(1) as f64;
        let cost = sample.iter().map(|i| came[*i].cost_usd).sum::<f64>() / n;
        let score = sample.iter().map(|i| came[*i].score).sum::<f64>() / n;
        let zero = Hull::of(matrix.means(&places)).score_at(cost * (1.0 + 1e-9));
        zero.map_or((f64::NAN, score), |zero| (zero, score))
    };
    let all: Vec<usize> = (0..test.len()).collect();
    let (zero, score) = less(&all);
    let interval = bootstrap(test.len(), RESAMPLES, 0x6361_7363, |sample| {
        let (zero, score) = less(sample);
        score - zero
    });
    let cheap = match plan {
        Plan::Cascade(stages) => Some(stages[0].plan.calls().len()),
        _ => None,
    };
    let n = came.len().max(1) as f64;
    Ok(Row {
        plan: plan.to_string(),
        cost_usd: point.cost,
        score: point.score,
        zero_router: zero.is_finite().then_some(zero),
        gain: zero.is_finite().then_some(score - zero),
        interval: interval.filter(|_| zero.is_finite()),
        calls: came.iter().map(|c| c.calls).sum::<usize>() as f64 / n,
        escalated: cheap.map(|cheap| came.iter().filter(|c| c.calls > cheap).count() as f64 / n),
        missed: came.iter().filter(|c| c.missed).count(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::matrix::Query;

    /// Two cheap models that are wrong on every fourth query each, never both, and a dear one that is always right.
    fn matrix(responses: bool) -> Matrix {
        let n = 80;
        let query = |i: usize| Query { id: i.to_string(), task: String::new(), text: format!("question {i}") };
        let models = ["a", "b", "dear"].map(str::to_owned).to_vec();
        let row = |i: usize| [f64::from(!i.is_multiple_of(4)), f64::from(i % 4 != 1), 1.0];
        let scores: Vec<f64> = (0..n).flat_map(row).collect();
        let costs = (0..n).flat_map(|_| [0.001, 0.001, 0.1]).collect();
        let said: Vec<Option<String>> = scores
            .chunks(3)
            .enumerate()
            .flat_map(|(i, row)| row.iter().map(move |s| Some(if *s == 1.0 { i.to_string() } else { "?".to_owned() })))
            .collect();
        Matrix::of("made", models, (0..n).map(query).collect(), scores, costs).with_responses(if responses {
            &said
        } else {
            &[]
        })
    }

    #[test]
    fn agreement_of_cheap_models_is_worth_the_dear_one_elsewhere() {
        let set = judge(&matrix(true), 1, &|| {}).unwrap();
        assert_eq!(set.tried, 1);
        let row = set.rows.iter().find(|row| row.plan.starts_with("cascade(vote(")).unwrap();
        assert_eq!((row.score, row.missed), (1.0, 0));
        assert!((row.escalated.unwrap() - 0.5).abs() < 0.15, "{row:?}");
        assert!(row.gain.unwrap() > 0.05 && row.interval.unwrap().0 > 0.0, "{row:?}");
        assert!(row.cost_usd < 0.07);
        let error = judge(&matrix(false), 1, &|| {}).unwrap_err();
        assert!(error.contains("made has no responses"), "{error}");
    }
}
