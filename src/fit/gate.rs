//! A gate's calibration from answers that are known to be right or wrong: JSON lines, of `weir bench cascade --generate` or of
//! anybody else. What stands before the gate is applied first, so that it is calibrated on what it will see.

use std::{collections::BTreeSet, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    cascade::{
        self,
        calibration::{Calibration, CalibrationError, Direction, Point},
    },
    domain::{Bound, Reading, Score, Scorer, Signals},
    fit::{algebra, embed::measured},
    replay::metrics::SplitMix,
};

/// One answer. Further fields are not looked at.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Answer {
    /// As the fleet names it.
    pub model: String,
    /// What was measured of it.
    pub scores: Vec<Reading>,
    pub correct: bool,
    /// That it was drawn at, where that is known.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// How long it is; without it a learned score is of the other features alone.
    #[serde(default)]
    pub completion_tokens: u32,
    /// What verifying calls said of it, for the score `verified`.
    #[serde(default)]
    pub verified: Option<Verification>,
    /// The question, where answers of several models to one are compared.
    #[serde(default)]
    pub task: Option<String>,
    #[serde(default)]
    pub cost_usd: Option<f64>,
    /// Of the prompt, as a decision's record has them; a learned score looks at them where every answer has them.
    #[serde(default)]
    pub signals: Option<Signals>,
    /// The prompt's text, which is measured where there are no signals.
    #[serde(default)]
    pub query: Option<String>,
}

impl Answer {
    /// What a learned score is made of.
    fn features(&self) -> Option<[f64; Scorer::FEATURES]> {
        cascade::gate::features(self.completion_tokens as usize, |standard| self.score(standard))
    }

    /// Its value, where it has that score.
    pub fn score(&self, score: Score) -> Option<f64> {
        if let Score::Learned(scorer) = score {
            let told = match &self.signals {
                Some(signals) => scorer.told(signals),
                None if scorer.asks_prompt() => return None,
                None => scorer,
            };
            return Some(cascade::gate::p_right(&told, &self.features()?));
        }
        match self.scores.iter().find(|reading| reading.score == score) {
            Some(reading) => Some(reading.read.ok()?.value),
            None if score == Score::Verified => self.verified.as_ref()?.share(),
            None => None,
        }
    }
}

/// What verifying calls said of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Of each: that the answer is right, that it is wrong, or neither.
    pub said: Vec<Option<bool>>,
    /// Of the prompt, which is computed once for all of them, and of all that was written.
    #[serde(default)]
    pub prompt_tokens: u32,
    #[serde(default)]
    pub completion_tokens: u32,
}

impl Verification {
    /// Which share says that it is right, of those that say it is right or wrong ([`Score::Verified`]).
    pub fn share(&self) -> Option<f64> {
        let said: Vec<bool> = self.said.iter().flatten().copied().collect();
        let right = said.iter().filter(|right| **right).count();
        (!said.is_empty()).then(|| right as f64 / said.len() as f64)
    }
}

/// A gate that an answer has to pass: `mean_margin > 0.2`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Passed {
    pub score: Score,
    pub bound: Bound,
}

impl FromStr for Passed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let side: fn(f64) -> Bound = if text.contains('<') { Bound::Below } else { Bound::Above };
        let (score, threshold) =
            text.split_once(['<', '>']).ok_or("a condition is a score, `<` or `>`, and a number")?;
        let threshold = threshold.trim().parse::<f64>().map_err(|e| format!("`{}`: {e}", threshold.trim()))?;
        Ok(Self { score: score.trim().parse()?, bound: side(threshold) })
    }
}

/// Why answers give no calibration.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error(
        "line {line}: {error}; a line is {{\"model\": …, \"scores\": [{{\"score\": …, \"value\": …}}], \"correct\": …}}"
    )]
    Line { line: usize, error: serde_json::Error },
    #[error("there is no answer of `{model}`; there are answers of {}", known.join(", "))]
    NoModel { model: String, known: Vec<String> },
    #[error("{found} of the answers that a score is learned from have all features; at least {needed} have to")]
    TooFew { found: usize, needed: usize },
    #[error("no score can be learned: the features of these answers say all the same")]
    Singular,
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
}

/// A calibration, and how many answers had no such score or did not pass the gates before.
#[derive(Debug)]
pub struct Calibrated {
    pub calibration: Calibration,
    pub left_out: usize,
}

/// Reads JSON lines; empty lines are skipped.
///
/// # Errors
/// The first line that is no answer.
pub fn read(text: &str) -> Result<Vec<Answer>, GateError> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let answer = |(line, json)| {
        let mut answer: Answer = serde_json::from_str(json).map_err(|error| GateError::Line { line, error })?;
        if let (None, Some(query)) = (&answer.signals, &answer.query) {
            answer.signals = Some(measured(query));
        }
        Ok(answer)
    };
    lines.map(answer).collect()
}

/// Learns a score from a third of the answers, which calibrate nothing any more; the others are left. `seed` deals them.
///
/// # Errors
/// Where too few answers have all features.
pub fn learn(answers: &mut Vec<Answer>, seed: u64) -> Result<Scorer, GateError> {
    let order = SplitMix(seed).order(answers.len());
    let taken: BTreeSet<usize> = order.into_iter().take(answers.len() / 3).collect();
    let prompts = answers.iter().all(|answer| answer.signals.is_some());
    let of = |i: &usize| {
        let answer = &answers[*i];
        Some(Example {
            scores: answer.features()?,
            signals: answer.signals.as_ref().filter(|_| prompts).map(Signals::features),
            right: answer.correct,
        })
    };
    let scorer = scorer(&taken.iter().filter_map(of).collect::<Vec<_>>())?;
    let mut place = 0;
    answers.retain(|_| {
        place += 1;
        !taken.contains(&(place - 1))
    });
    Ok(scorer)
}

/// What a score is learned from.
#[derive(Clone, Debug)]
pub struct Example {
    /// The standard scores, and the length.
    pub scores: [f64; Scorer::FEATURES],
    /// Of the prompt; of all examples, or of none.
    pub signals: Option<[f64; Signals::FEATURES.len()]>,
    pub right: bool,
}

/// A score by logistic regression. Features are standardised for the fit alone.
///
/// # Errors
/// Where there are too few examples.
pub fn scorer(known: &[Example]) -> Result<Scorer, GateError> {
    const LAMBDA: f64 = 1.0;
    const LEAST: usize = 50;
    if known.len() < LEAST {
        return Err(GateError::TooFew { found: known.len(), needed: LEAST });
    }
    let n = known.len() as f64;
    let features: Vec<Vec<f64>> =
        known.iter().map(|x| x.scores.iter().chain(x.signals.iter().flatten()).copied().collect()).collect();
    let scale: Vec<(f64, f64)> = (0..features[0].len())
        .map(|i| {
            let mean = features.iter().map(|x| x[i]).sum::<f64>() / n;
            let squares: f64 = features.iter().map(|x| (x[i] - mean).powi(2)).sum();
            // What is always the same tells nothing, also where its mean is rounded.
            let deviation = (squares / n).sqrt();
            (mean, if deviation > 1e-9 * mean.abs().max(1.0) { deviation } else { f64::INFINITY })
        })
        .collect();
    let row = |x: &Vec<f64>| {
        let standard = x.iter().zip(&scale).map(|(x, (mean, deviation))| (x - mean) / deviation);
        std::iter::once(1.0).chain(standard).collect::<Vec<f64>>()
    };
    let rows: Vec<Vec<f64>> = features.iter().map(row).collect();
    let right: Vec<f64> = known.iter().map(|x| f64::from(u8::from(x.right))).collect();
    let places: Vec<usize> = (0..rows.len()).collect();
    let fitted = algebra::logistic(&rows, 1, &places, &|i| &right[i..=i], LAMBDA).ok_or(GateError::Singular)?;
    let mut scorer = Scorer { bias: fitted[0], ..Scorer::default() };
    let weights = scorer.weights.iter_mut().chain(&mut scorer.signals);
    for (weight, (fitted, (mean, deviation))) in weights.zip(fitted[1..].iter().zip(&scale)) {
        *weight = fitted / deviation;
        scorer.bias -= *weight * mean;
    }
    Ok(scorer)
}

/// Calibrates a gate on `score` with the answers of these models, all where none is named, that pass what stands before it.
///
/// # Errors
/// A model without answers, or too few answers.
pub fn calibrate(
    score: Score,
    answers: &[Answer],
    models: &[String],
    passed: &[Passed],
    seed: u64,
) -> Result<Calibrated, GateError> {
    let known: BTreeSet<&str> = answers.iter().map(|answer| answer.model.as_str()).collect();
    if let Some(model) = models.iter().find(|model| !known.contains(model.as_str())) {
        let known = known.into_iter().map(str::to_owned).collect();
        return Err(GateError::NoModel { model: model.clone(), known });
    }
    let counts = |answer: &&Answer| models.is_empty() || models.contains(&answer.model);
    let passes = |answer: &Answer| {
        passed.iter().all(|gate| answer.score(gate.score).is_some_and(|value| gate.bound.holds(value)))
    };
    let (mut points, mut left_out, mut of) = (Vec::new(), 0, BTreeSet::new());
    for answer in answers.iter().filter(counts) {
        match answer.score(score).filter(|_| passes(answer)) {
            Some(value) => {
                points.push(Point { score: value, wrong: !answer.correct });
                of.insert(answer.model.clone());
            }
            None => left_out += 1,
        }
    }
    let direction = if score.high_is_sure() { Direction::HighIsSure } else { Direction::LowIsSure };
    let calibration = Calibration::fit(score.name(), direction, of.into_iter().collect(), seed, points)?;
    Ok(Calibrated { calibration, left_out })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(n: usize) -> Vec<Answer> {
        let line = |i: usize| {
            let (score, model) = (i as f64 / n as f64, if i.is_multiple_of(2) { "a" } else { "b" });
            format!(
                r#"{{"model":"{model}","scores":[{{"score":"mean_margin","value":{score}}},{{"score":"mean_logprob","unscored":"no_logprobs"}}],"correct":{},"task":"x"}}"#,
                i > n / 4
            )
        };
        read(&(0..n).map(line).collect::<Vec<_>>().join("\n")).unwrap()
    }

    #[test]
    fn a_gate_is_calibrated_on_what_it_will_see() {
        let answers = answers(1000);
        let all = calibrate(Score::MeanMargin, &answers, &[], &[], 0).unwrap();
        assert_eq!((all.calibration.models(), all.left_out), (&["a".to_owned(), "b".to_owned()][..], 0));
        assert!(all.calibration.p_wrong(0.1) > 0.9 && all.calibration.p_wrong(0.9) < 0.1);
        let gate: Passed = "mean_margin > 0.5".parse().unwrap();
        let some = calibrate(Score::MeanMargin, &answers, &["a".into()], &[gate], 0).unwrap();
        assert_eq!((some.calibration.points().len(), some.left_out), (249, 251));
        assert!(some.calibration.points().iter().all(|point| !point.wrong));
    }

    #[test]
    fn what_cannot_be_calibrated_is_named() {
        let answers = answers(300);
        let error = calibrate(Score::MeanMargin, &answers, &["c".into()], &[], 0).unwrap_err().to_string();
        assert!(error.contains("no answer of `c`; there are answers of a, b"), "{error}");
        let error = calibrate(Score::MeanLogprob, &answers, &[], &[], 0).unwrap_err().to_string();
        assert!(error.contains("0 points are too few"), "{error}");
        let error = read("{\"model\":\"a\",\"scores\":[],\"correct\":true}\n{\"model\":1}").unwrap_err().to_string();
        assert!(error.starts_with("line 2: "), "{error}");
        for bad in ["mean_margin", "nothing < 1", "mean_margin < much"] {
            assert!(bad.parse::<Passed>().is_err(), "{bad}");
        }
        assert_eq!("logprob_quantile 0.1 > -3".parse::<Passed>().unwrap().score, Score::LogprobQuantile(0.1));
    }

    #[test]
    fn what_is_learned_tells_right_from_wrong_better_than_any_score_alone() {
        // Right where margin and log-probability together are high; each alone tells half of it.
        let mut rng = SplitMix(5);
        let mut line = || {
            let (margin, logprob) = (rng.unit(), -rng.unit());
            let right = margin + logprob > 0.0;
            let other = |name: &str| format!(r#"{{"score":{name},"value":0.5}}"#);
            let quantiles = [0.0, 0.1, 0.5].map(|q| other(&format!(r#"{{"logprob_quantile":{q:?}}}"#)));
            format!(
                r#"{{"model":"a","completion_tokens":9,"correct":{right},"scores":[{{"score":"mean_margin","value":{margin}}},
                {{"score":"mean_logprob","value":{logprob}}},{},{},{}]}}"#,
                other(r#""mean_token_entropy""#),
                other(r#""first_token_entropy""#),
                quantiles.join(",")
            )
            .replace('\n', "")
        };
        let mut answers = read(&(0..900).map(|_| line()).collect::<Vec<_>>().join("\n")).unwrap();
        let scorer = learn(&mut answers, 1).unwrap();
        assert_eq!(answers.len(), 600, "a third has taught it");
        let errors = |score| calibrate(score, &answers, &[], &[], 0).unwrap().calibration;
        let (learned, margin) = (errors(Score::Learned(scorer)), errors(Score::MeanMargin));
        let kept = |of: &Calibration| of.guaranteed(0.1, 0.95).unwrap().map_or(0.0, |g| g.coverage);
        assert!(kept(&learned) > 0.4 && kept(&learned) > 2.0 * kept(&margin), "{} {}", kept(&learned), kept(&margin));
        // It is named with what it has learned, and read again.
        assert_eq!(learned.score().parse::<Score>(), Ok(Score::Learned(scorer)));
        assert_eq!(Score::Learned(scorer).to_string(), "learned");
        answers.truncate(100);
        let few = learn(&mut answers, 1).unwrap_err().to_string();
        assert!(few.contains("33 of the answers that a score is learned from"), "{few}");
    }

    #[test]
    fn a_learned_score_knows_what_prompts_are_hard_where_every_answer_has_one() {
        let mut rng = SplitMix(9);
        let mut line = |query: &str| {
            let hard = rng.unit() < 0.5;
            let right = if hard { rng.unit() < 0.1 } else { rng.unit() < 0.9 };
            let scores: Vec<Reading> = Score::STANDARD
                .map(|score| Reading { score, read: Ok(crate::domain::Scored { value: rng.unit(), exact: true }) })
                .to_vec();
            let prompt = if hard { "fn main() { let x = 1; return x; }" } else { "How are you?" };
            serde_json::json!({"model": "a", "correct": right, "scores": scores, query: prompt}).to_string()
        };
        let mut answers = read(&(0..900).map(|_| line("query")).collect::<Vec<_>>().join("\n")).unwrap();
        let scorer = learn(&mut answers, 1).unwrap();
        assert!(scorer.asks_prompt());
        let calibration = calibrate(Score::Learned(scorer), &answers, &[], &[], 0).unwrap().calibration;
        let (sure, unsure) = (calibration.p_wrong(0.9), calibration.p_wrong(0.1));
        assert!(sure < 0.25 && unsure > 0.75, "{sure} {unsure}");
        // An answer whose prompt nobody knows has no such score, and where one is not known none is asked.
        answers[0].signals = None;
        assert_eq!(calibrate(Score::Learned(scorer), &answers, &[], &[], 0).unwrap().left_out, 1);
        assert!(!learn(&mut answers, 1).unwrap().asks_prompt());
        let mut unknown = read(&(0..900).map(|_| line("other")).collect::<Vec<_>>().join("\n")).unwrap();
        assert!(!learn(&mut unknown, 1).unwrap().asks_prompt());
    }

    #[test]
    fn a_signal_that_is_always_the_same_has_no_weight() {
        let mut rng = SplitMix(2);
        let signals = Signals { tokens: 20, complexity: 33.3, ..Signals::default() };
        let example = |_| Example {
            scores: std::array::from_fn(|_| rng.unit()),
            signals: Some(signals.features()),
            right: rng.unit() < 0.75,
        };
        let scorer = scorer(&(0..100).map(example).collect::<Vec<_>>()).unwrap();
        assert_eq!(scorer.signals, [0.0; Signals::FEATURES.len()]);
        assert!(!scorer.asks_prompt() && scorer.weights.iter().all(|weight| weight.is_finite()));
    }

    #[test]
    fn a_gate_on_verified_answers_is_calibrated_by_what_was_said_of_them() {
        let line = |i: usize| {
            // Right ones are doubted once in four verdicts, wrong ones believed once.
            let right = !i.is_multiple_of(3);
            let said = [Some(right), Some(right), None, Some(right), Some(i.is_multiple_of(4) != right)];
            serde_json::json!({"model": "a", "correct": right, "scores": [], "verified": {"said": said}}).to_string()
        };
        let answers = read(&(0..600).map(line).collect::<Vec<_>>().join("\n")).unwrap();
        assert_eq!(answers[1].score(Score::Verified), Some(1.0));
        let calibration = calibrate(Score::Verified, &answers, &[], &[], 0).unwrap().calibration;
        assert_eq!((calibration.points().len(), calibration.score()), (600, "verified"));
        assert!(calibration.p_wrong(0.75) < 0.1 && calibration.p_wrong(0.25) > 0.9);
    }
}
