//! Thresholds of a whole cascade under a cap on its mean cost, from answers of every stage's model to the same questions:
//! FrugalGPT's search (Chen, Zaharia, Zou, arXiv 2305.05176, section 3, "LLM cascade") for the thresholds that answer best
//! within the budget. A threshold that accepts nothing takes its stage out, one that accepts everything the stages after it, so
//! that the list of models is found with them.
//!
//! Each gate's candidates are the quantiles of its scores; all combinations are tried. What a choice is worth is said by
//! questions that had no part in it: thresholds are found without each of five parts and judged on that one.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::gate::Answer;
use crate::{domain::Score, replay::metrics::SplitMix};

/// Stages at most: with more, all combinations of thresholds are too many.
pub const MOST: usize = 4;
/// Fewest questions.
pub const LEAST: usize = 100;
const PARTS: usize = 5;
/// A sum of costs is as exact as this.
const ROUNDING: f64 = 1e-9;

/// One stage's answer to one question.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// How sure, in a unit where more is surer; none is never accepted.
    pub sure: Option<f64>,
    pub right: bool,
    pub usd: f64,
}

/// The answers to one question, in the order of the stages.
pub type Question = Vec<Seen>;

/// Why there are no thresholds.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum StagesError {
    #[error("{found} stages; from 2 to {MOST} can be searched")]
    Stages { found: usize },
    #[error("{found} questions have an answer of each of {stages}; at least {LEAST} have to")]
    TooFew { found: usize, stages: String },
    #[error("`{model}` has two answers to the question `{task}`; --temperature chooses among several")]
    Twice { model: String, task: String },
    #[error("line {line} has no `task`, by which the answers to one question are known")]
    NoTask { line: usize },
    #[error("an answer of `{model}` has no `cost_usd`, and there are no --costs, one per stage")]
    NoCost { model: String },
    #[error("even the cheapest of {stages} costs more than ${cap} an answer, ${cheapest:.6}")]
    Cap { stages: String, cap: f64, cheapest: f64 },
}

/// A choice of thresholds, each in the score's own unit; of stages that are left in, the last without one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cascade {
    pub stages: Vec<Stage>,
    /// Over the questions that it was chosen with.
    pub right: f64,
    pub usd: f64,
    /// Means over the parts, of choices without them.
    pub right_held_out: f64,
    pub usd_held_out: f64,
    /// Of the questions, each stage answers.
    pub answered: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    pub model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// The answers by question. `costs`: of each stage, where answers do not say.
///
/// # Errors
/// Where answers cannot be told apart, or cost nobody knows what.
pub fn questions(
    answers: &[Answer],
    models: &[String],
    score: Score,
    costs: &[f64],
) -> Result<Vec<Question>, StagesError> {
    if !(2..=MOST).contains(&models.len()) {
        return Err(StagesError::Stages { found: models.len() });
    }
    let mut by_task: BTreeMap<&str, Vec<Option<Seen>>> = BTreeMap::new();
    for (line, answer) in (1..).zip(answers) {
        let Some(stage) = models.iter().position(|model| *model == answer.model) else { continue };
        let task = answer.task.as_deref().ok_or(StagesError::NoTask { line })?;
        let no_cost = || StagesError::NoCost { model: answer.model.clone() };
        let usd = answer.cost_usd.or(costs.get(stage).copied()).ok_or_else(no_cost)?;
        let turned = |value: f64| if score.high_is_sure() { value } else { -value };
        let seen = Seen { sure: answer.score(score).map(turned), right: answer.correct, usd };
        let of = by_task.entry(task).or_insert_with(|| vec![None; models.len()]);
        if of[stage].replace(seen).is_some() {
            return Err(StagesError::Twice { model: answer.model.clone(), task: task.to_owned() });
        }
    }
    let whole: Vec<Question> = by_task.into_values().filter_map(|seen| seen.into_iter().collect()).collect();
    if whole.len() < LEAST {
        return Err(StagesError::TooFew { found: whole.len(), stages: models.join(", ") });
    }
    Ok(whole)
}

/// What a choice comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Worth {
    right: f64,
    usd: f64,
}

/// The thresholds, in the unit of [`Seen::sure`], that answer most questions right at a mean cost of at most `cap`; of equal
/// ones the cheapest. A gate accepts what is surer than its threshold.
fn search(questions: &[&Question], cap: f64) -> Option<(Vec<f64>, Worth)> {
    let gates = questions.first()?.len() - 1;
    // About a hundred thousand combinations.
    let steps = [100, 100, 100, 46][gates.min(3)];
    let candidates: Vec<Vec<f64>> = (0..gates).map(|gate| quantiles(questions, gate, steps)).collect();
    let count: usize = candidates.iter().map(Vec::len).product();
    let of = |mut n: usize| -> Vec<f64> {
        let pick = |list: &Vec<f64>| {
            let value = list[n % list.len()];
            n /= list.len();
            value
        };
        candidates.iter().map(pick).collect()
    };
    let best = (0..count)
        .into_par_iter()
        .map(|n| (n, worth(questions, &of(n))))
        .filter(|(_, worth)| worth.usd <= cap * (1.0 + ROUNDING))
        .max_by(|(n, a), (m, b)| a.right.total_cmp(&b.right).then(b.usd.total_cmp(&a.usd)).then(m.cmp(n)));
    best.map(|(n, worth)| (of(n), worth))
}

/// Thresholds from one that accepts every score to one that accepts none.
fn quantiles(questions: &[&Question], gate: usize, steps: usize) -> Vec<f64> {
    let mut sure: Vec<f64> = questions.iter().filter_map(|question| question[gate].sure).collect();
    sure.sort_by(f64::total_cmp);
    let mut all = vec![f64::NEG_INFINITY];
    all.extend((1..steps).filter_map(|step| sure.get(step * sure.len() / steps)).copied());
    all.push(f64::INFINITY);
    all.dedup();
    all
}

fn worth(questions: &[&Question], thresholds: &[f64]) -> Worth {
    let mut sum = Worth { right: 0.0, usd: 0.0 };
    for question in questions {
        let (stage, usd) = run(question, thresholds);
        sum.usd += usd;
        sum.right += f64::from(u8::from(question[stage].right));
    }
    let n = questions.len().max(1) as f64;
    Worth { right: sum.right / n, usd: sum.usd / n }
}

/// The stage that answers, and what all that were asked cost. One whose gate accepts nothing is not asked.
fn run(question: &Question, thresholds: &[f64]) -> (usize, f64) {
    let mut usd = 0.0;
    for (stage, (seen, threshold)) in question.iter().zip(thresholds).enumerate() {
        if *threshold == f64::INFINITY {
            continue;
        }
        usd += seen.usd;
        if *threshold == f64::NEG_INFINITY || seen.sure.is_some_and(|sure| sure > *threshold) {
            return (stage, usd);
        }
    }
    let last = question.len() - 1;
    (last, usd + question[last].usd)
}

/// Finds the cascade of these stages that answers best within `cap` USD an answer. `seed` deals the parts.
///
/// # Errors
/// Where nothing is within the cap.
pub fn fit(
    questions: &[Question],
    models: &[String],
    score: Score,
    cap: f64,
    seed: u64,
) -> Result<Cascade, StagesError> {
    let all: Vec<&Question> = questions.iter().collect();
    let (thresholds, found) = search(&all, cap).ok_or_else(|| {
        let alone = |stage: usize| all.iter().map(|question| question[stage].usd).sum::<f64>() / all.len() as f64;
        let cheapest = (0..models.len()).map(alone).fold(f64::INFINITY, f64::min);
        StagesError::Cap { stages: models.join(", "), cap, cheapest }
    })?;
    let order = SplitMix(seed).order(all.len());
    let mut held_out = Worth { right: 0.0, usd: 0.0 };
    for part in 0..PARTS {
        let is_out = |place: &usize| place % PARTS == part;
        let (out, rest): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(is_out);
        let of = |places: Vec<usize>| places.into_iter().map(|place| all[order[place]]).collect::<Vec<_>>();
        let (out, rest) = (of(out), of(rest));
        // What the rest cannot be within, the whole just could.
        let chosen = search(&rest, cap).map_or_else(|| thresholds.clone(), |(chosen, _)| chosen);
        let of = worth(&out, &chosen);
        held_out.right += of.right * out.len() as f64 / all.len() as f64;
        held_out.usd += of.usd * out.len() as f64 / all.len() as f64;
    }
    let mut shares = vec![0.0; models.len()];
    for question in &all {
        shares[run(question, &thresholds).0] += 1.0 / all.len() as f64;
    }
    let (mut stages, mut answered) = (Vec::new(), Vec::new());
    for (stage, model) in models.iter().enumerate() {
        let threshold = thresholds.get(stage).copied().filter(|t| *t != f64::NEG_INFINITY);
        if threshold == Some(f64::INFINITY) {
            continue;
        }
        let threshold = threshold.map(|t| if score.high_is_sure() { t } else { -t });
        stages.push(Stage { model: model.clone(), threshold });
        answered.push(shares[stage]);
        if threshold.is_none() {
            break;
        }
    }
    Ok(Cascade {
        stages,
        right: found.right,
        usd: found.usd,
        right_held_out: held_out.right,
        usd_held_out: held_out.usd,
        answered,
    })
}

/// What each stage's model is right, and costs on average, alone.
pub fn alone(questions: &[Question], models: &[String]) -> Vec<(String, f64, f64)> {
    let n = questions.len().max(1) as f64;
    let of = |(stage, model): (usize, &String)| {
        let right = questions.iter().filter(|question| question[stage].right).count() as f64 / n;
        (model.clone(), right, questions.iter().map(|question| question[stage].usd).sum::<f64>() / n)
    };
    models.iter().enumerate().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::gate;

    const MODELS: [&str; 3] = ["small", "medium", "large"];

    fn models() -> Vec<String> {
        MODELS.map(str::to_owned).to_vec()
    }

    /// Questions whose hardness every model but the large one shows: `small` is right below .5, `medium` below .8.
    fn made(n: usize) -> Vec<Answer> {
        let mut rng = SplitMix(4);
        let mut lines = String::new();
        for task in 0..n {
            let hardness = rng.unit();
            for (model, able, usd) in [("small", 0.5, 0.001), ("medium", 0.8, 0.004), ("large", 1.1, 0.02)] {
                let margin = (1.0 - hardness).clamp(0.0, 1.0);
                let line = serde_json::json!({
                    "model": model, "task": format!("q{task}"), "correct": hardness < able, "cost_usd": usd,
                    "scores": [{"score": "mean_margin", "value": margin}],
                });
                lines += &format!("{line}\n");
            }
        }
        gate::read(&lines).unwrap()
    }

    #[test]
    fn thresholds_lie_where_models_stop_being_right() {
        let questions = questions(&made(600), &models(), Score::MeanMargin, &[]).unwrap();
        let found = fit(&questions, &models(), Score::MeanMargin, 0.02, 1).unwrap();
        assert_eq!((found.right, found.stages.len()), (1.0, 3));
        let thresholds: Vec<f64> = found.stages.iter().filter_map(|stage| stage.threshold).collect();
        assert!((thresholds[0] - 0.5).abs() < 0.03 && (thresholds[1] - 0.2).abs() < 0.03, "{thresholds:?}");
        assert!(found.usd < 0.01 && found.right_held_out > 0.97, "{found:?}");
        assert!((found.answered.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_cap_is_kept_and_takes_out_what_it_does_not_pay_for() {
        let questions = questions(&made(600), &models(), Score::MeanMargin, &[]).unwrap();
        let mut before = 0.0;
        for cap in [0.001, 0.002, 0.004, 0.008] {
            let found = fit(&questions, &models(), Score::MeanMargin, cap, 1).unwrap();
            assert!(found.usd <= cap * (1.0 + ROUNDING) && found.right >= before, "{cap}: {found:?}");
            // No choice of one model within the cap is better.
            let best = alone(&questions, &models()).into_iter().filter(|(.., usd)| *usd <= cap * (1.0 + ROUNDING));
            assert!(best.map(|(_, right, _)| right).fold(0.0, f64::max) <= found.right, "{cap}: {found:?}");
            before = found.right;
        }
        let least = fit(&questions, &models(), Score::MeanMargin, 0.001, 1).unwrap();
        assert_eq!(least.stages, [Stage { model: "small".into(), threshold: None }]);
        let error = fit(&questions, &models(), Score::MeanMargin, 0.0001, 1).unwrap_err().to_string();
        assert!(error.contains("costs more than $0.0001 an answer, $0.001"), "{error}");
    }

    #[test]
    fn a_stage_that_is_never_right_is_left_out() {
        let mut answers = made(300);
        answers.iter_mut().filter(|answer| answer.model == "small").for_each(|answer| answer.correct = false);
        let questions = questions(&answers, &models(), Score::MeanMargin, &[]).unwrap();
        let found = fit(&questions, &models(), Score::MeanMargin, 0.02, 1).unwrap();
        assert_eq!(found.stages.iter().map(|stage| &*stage.model).collect::<Vec<_>>(), ["medium", "large"]);
    }

    #[test]
    fn what_cannot_be_joined_is_named() {
        let error = |answers: &[Answer], models: &[&str], costs: &[f64]| {
            let models: Vec<String> = models.iter().map(|model| (*model).to_owned()).collect();
            questions(answers, &models, Score::MeanMargin, costs).unwrap_err().to_string()
        };
        let answers = made(200);
        assert!(error(&answers, &["small"], &[]).contains("1 stages; from 2 to 4"));
        assert!(
            error(&answers, &["small", "other"], &[]).contains("0 questions have an answer of each of small, other")
        );
        let twice: Vec<Answer> = answers.iter().chain(&answers[..1]).cloned().collect();
        assert!(error(&twice, &MODELS, &[]).contains("`small` has two answers to the question `q0`"));
        let mut bare = answers.clone();
        bare.iter_mut().for_each(|answer| answer.cost_usd = None);
        assert!(error(&bare, &MODELS, &[]).contains("`small` has no `cost_usd`"));
        assert!(questions(&bare, &models(), Score::MeanMargin, &[0.1, 0.2, 0.3]).is_ok());
        bare[0].task = None;
        assert!(error(&bare, &MODELS, &[0.1, 0.2, 0.3]).contains("line 1 has no `task`"));
    }
}
