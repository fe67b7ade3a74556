//! What a model said to the questions, a line of JSON per answer, and the arms that plans are run over: [`SMALL`] gives out
//! these answers, [`SIMULATED`] makes up those of a stronger model.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::tasks::{Kind, Task};
use crate::{
    bench::BenchError,
    cascade::{Input, canonical::form, gate},
    domain::{Facts, Reading, Score, Scored, Scorer, Signals, Spend},
    fit::gate::Verification,
    replay::{
        metrics::SplitMix,
        plan_run::{Answers, Asked, Ending, Recorded},
    },
};

/// The model that was asked. Its call at a temperature gives the next sample at that temperature that the run has not had.
pub const SMALL: &str = "small";
/// A stronger model that there is not: right with probability [`STRONG`], by a draw that belongs to the question, at
/// [`PRICE`] times the small one's price for the same tokens.
pub const SIMULATED: &str = "simulated";
pub const STRONG: f64 = 0.9;
pub const PRICE: u64 = 10;

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub task: String,
    pub kind: Kind,
    /// Who was asked.
    pub model: String,
    /// Of the prompt; its first 16 digits.
    pub prompt: String,
    pub reference: String,
    pub temperature: f64,
    /// Among those of the question at this temperature, from 0.
    pub sample: u32,
    pub text: String,
    /// By canonical form against the reference.
    pub correct: bool,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Rounded to six decimals; those that could be computed.
    pub scores: Vec<Reading>,
    /// What the model says of it, where it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verification>,
}

/// Whether an answer says what the reference says.
pub fn is_right(text: &str, reference: &str) -> bool {
    form(text) == form(reference)
}

/// The readings as they are kept.
pub fn kept(readings: &[Reading]) -> Vec<Reading> {
    let rounded = |scored: Scored| Scored { value: (scored.value * 1e6).round() / 1e6, ..scored };
    readings.iter().filter_map(|r| Some(Reading { read: Ok(rounded(r.read.ok()?)), ..*r })).collect()
}

impl Answer {
    /// Millionths of a US dollar, at a made up price of one for a token, read or written.
    fn cost(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.completion_tokens)
    }

    /// Whether it answers this question, with the prompt that was recorded.
    pub fn is_to(&self, task: &Task) -> bool {
        self.task == task.id && task.hash().to_string().starts_with(&self.prompt)
    }

    /// What a learned score is made of.
    pub fn features(&self) -> Option<[f64; Scorer::FEATURES]> {
        gate::features(self.completion_tokens as usize, |standard| self.score(standard))
    }

    /// A score of it; a verified one by what was said.
    pub fn score(&self, score: Score) -> Option<f64> {
        match score {
            Score::Learned(scorer) => return Some(gate::p_right(&scorer, &self.features()?)),
            Score::Verified => return self.verified.as_ref()?.share(),
            _ => {}
        }
        let reading = self.scores.iter().find(|reading| reading.score == score)?;
        Some(reading.read.ok()?.value)
    }
}

/// Writes answers, a line each.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, answers: &[Answer]) -> Result<(), BenchError> {
    let name = || path.display().to_string();
    let mut text = String::new();
    for answer in answers {
        let line = serde_json::to_string(answer).map_err(|e| BenchError::Usage(format!("{}: {e}", name())))?;
        text.push_str(&line);
        text.push('\n');
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(BenchError::io(dir.display().to_string()))?;
    }
    std::fs::write(path, text).map_err(BenchError::io(name()))
}

/// Reads what [`write()`] wrote.
///
/// # Errors
/// When the file cannot be read, is not that, or marks an answer otherwise than its text and reference do.
pub fn read(path: &Path) -> Result<Vec<Answer>, BenchError> {
    let text = std::fs::read_to_string(path).map_err(BenchError::io(path.display().to_string()))?;
    let wrong = |line: usize, what: String| BenchError::Usage(format!("{}: line {line}: {what}", path.display()));
    let mut answers = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let answer: Answer = serde_json::from_str(line).map_err(|e| wrong(number, e.to_string()))?;
        if answer.correct != is_right(&answer.text, &answer.reference) {
            return Err(wrong(number, format!("`{}` is marked as what it is not", answer.text)));
        }
        answers.push(answer);
    }
    Ok(answers)
}

/// A temperature as a key.
fn hundredths(temperature: f64) -> i64 {
    (temperature * 100.0).round() as i64
}

/// The answers to one question.
#[derive(Clone, Debug)]
pub struct Asking {
    pub task: String,
    pub kind: Kind,
    /// All answers, and the numbers of their forms: 0 is what is right.
    answers: Vec<Answer>,
    forms: Vec<u32>,
    /// By temperature, which answers, in the order of their samples.
    samples: BTreeMap<i64, Vec<usize>>,
    /// Whether the simulated model is right.
    strong: bool,
    /// Of the prompt, where it is known.
    pub signals: Option<Signals>,
}

/// What a run's answer was: this recorded one, or a simulated one.
const MADE_UP: usize = usize::MAX;

impl Asking {
    /// The questions, in the order of the file. `seed` is the simulated model's.
    pub fn all(answers: Vec<Answer>, seed: u64) -> Vec<Self> {
        let mut by_task: BTreeMap<String, Vec<Answer>> = BTreeMap::new();
        let mut order = Vec::new();
        for answer in answers {
            let of = by_task.entry(answer.task.clone()).or_default();
            if of.is_empty() {
                order.push(answer.task.clone());
            }
            of.push(answer);
        }
        let of = |(n, task): (usize, String)| Some(Self::of(by_task.remove(&task)?, seed ^ (n as u64) << 17));
        order.into_iter().enumerate().filter_map(of).collect()
    }

    fn of(mut answers: Vec<Answer>, seed: u64) -> Self {
        answers.sort_by_key(|answer| (hundredths(answer.temperature), answer.sample));
        let mut known = vec![form(&answers[0].reference)];
        let mut number = |text: &str| {
            let form = form(text);
            let place = known.iter().position(|other| *other == form).unwrap_or_else(|| {
                known.push(form);
                known.len() - 1
            });
            place as u32
        };
        let forms = answers.iter().map(|answer| number(&answer.text)).collect();
        let mut samples: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        for (n, answer) in answers.iter().enumerate() {
            samples.entry(hundredths(answer.temperature)).or_default().push(n);
        }
        let mut rng = SplitMix(seed);
        rng.next_u64();
        let (task, kind) = (answers[0].task.clone(), answers[0].kind);
        Self { task, kind, answers, forms, samples, strong: rng.unit() < STRONG, signals: None }
    }

    /// Whether it asks this question, with the prompt that was recorded.
    pub fn is_of(&self, task: &Task) -> bool {
        self.answers[0].is_to(task)
    }

    /// All answers.
    #[cfg(test)]
    pub fn into_answers(self) -> Vec<Answer> {
        self.answers
    }

    /// The answer at temperature 0.
    pub fn greedy(&self) -> Option<&Answer> {
        self.samples.get(&0)?.first().map(|n| &self.answers[*n])
    }

    /// Samples at a temperature.
    pub fn samples(&self, temperature: f64) -> impl Iterator<Item = &Answer> {
        self.samples.get(&hundredths(temperature)).into_iter().flatten().map(|n| &self.answers[*n])
    }

    /// Answers for one run of a plan, with `asked` among their scores.
    pub fn shelf(&self, asked: Option<Score>) -> Shelf<'_> {
        Shelf { asking: self, asked, taken: BTreeSet::new(), verdicts: 0, made: Vec::new() }
    }

    /// Whether the answer that a run gave out is right.
    pub fn right(&self, answer: usize) -> bool {
        if answer == MADE_UP { self.strong } else { self.answers.get(answer).is_some_and(|answer| answer.correct) }
    }

    /// What an answer says, as a number: 0 says what the reference says.
    fn form(&self, answer: usize) -> u32 {
        if answer != MADE_UP {
            return self.forms[answer];
        }
        // A wrong answer of another model is like none of the small one's.
        if self.strong { 0 } else { u32::MAX }
    }
}

/// The answers that one run has not had yet. Time is a millisecond per token that is written: nothing is known of it but
/// the order.
pub struct Shelf<'a> {
    asking: &'a Asking,
    asked: Option<Score>,
    taken: BTreeSet<usize>,
    /// How many verifying calls have been answered.
    verdicts: usize,
    /// The answers of the run's calls.
    made: Vec<usize>,
}

/// What a run's verifying calls answer, as a number of an answer.
const VERDICT: usize = usize::MAX - 1;

impl Shelf<'_> {
    /// What the next verifying call says of the answer of a call, where that was asked.
    fn verdict(&mut self, call: u32) -> Option<Recorded> {
        let of = self.asking.answers.get(*self.made.get(call as usize)?)?;
        let verified = of.verified.as_ref()?;
        let said = *verified.said.get(self.verdicts)?;
        let each = verified.completion_tokens.div_ceil(verified.said.len() as u32);
        // The first computes the prompt for all.
        let tokens = u64::from(each) + if self.verdicts == 0 { u64::from(verified.prompt_tokens) } else { 0 };
        self.verdicts += 1;
        let facts = Facts { form: u32::MAX - 1, verdict: said.map(u32::from), ..Facts::default() };
        let cost = Spend { usd: tokens, tokens };
        let latency = i64::from(each) * 1000;
        self.made.push(VERDICT);
        Some(Recorded {
            answer: VERDICT,
            ending: Ending::Answers(facts),
            cost,
            first: None,
            known: Vec::new(),
            latency,
        })
    }
}

impl Answers for Shelf<'_> {
    fn answer(&mut self, asked: &Asked<'_>) -> Option<Recorded> {
        // Nobody knows what a judge, who is shown more than the question, would have said.
        match asked.input {
            Input::Request => {}
            Input::Verify(of) => return self.verdict(*of),
            _ => return None,
        }
        let temperature = asked.spec.sampling.temperature.unwrap_or(0.0);
        let (answer, of, times) = match asked.spec.model.as_str() {
            SMALL => {
                let samples = self.asking.samples.get(&hundredths(temperature))?;
                let next = *samples.iter().find(|n| !self.taken.contains(n))?;
                (next, &self.asking.answers[next], 1)
            }
            SIMULATED => (MADE_UP, self.asking.greedy()?, PRICE),
            _ => return None,
        };
        if !self.taken.insert(answer) {
            return None;
        }
        let mut scores = if answer == MADE_UP { Vec::new() } else { of.scores.clone() };
        if let Some(score) = self.asked.filter(|_| answer != MADE_UP) {
            scores.extend(of.score(score).map(|value| Reading { score, read: Ok(Scored { value, exact: true }) }));
        }
        self.made.push(answer);
        Some(Recorded {
            answer,
            ending: Ending::Answers(Facts { form: self.asking.form(answer), scores, ..Facts::default() }),
            cost: Spend { usd: times * of.cost(), tokens: of.cost() },
            first: None,
            known: Vec::new(),
            latency: i64::from(of.completion_tokens) * 1000,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An answer of so many tokens.
    pub fn answer(task: &str, temperature: f64, sample: u32, text: &str, entropy: f64) -> Answer {
        let reference = "4".to_owned();
        Answer {
            task: task.to_owned(),
            kind: Kind::Arithmetic,
            model: "made".to_owned(),
            prompt: "0".repeat(16),
            temperature,
            sample,
            text: text.to_owned(),
            correct: is_right(text, &reference),
            reference,
            prompt_tokens: 9,
            completion_tokens: 1,
            scores: vec![Reading { score: Score::MeanTokenEntropy, read: Ok(Scored { value: entropy, exact: true }) }],
            verified: None,
        }
    }

    #[test]
    fn what_is_right_is_what_says_the_same() {
        assert!(is_right("2 plus 2 is 4. The answer is 4.", "4") && is_right("4.0", "4") && !is_right("44", "4"));
        assert!(is_right("B) Rome", "B") && is_right("b.", "B") && !is_right("Rome", "B") && !is_right("A) B", "B"));
        let reference = r#"{"name":"Ann","age":31}"#;
        assert!(is_right("```json\n{\"age\": 31.0, \"name\": \"Ann\"}\n```", reference));
        assert!(!is_right(r#"{"name": "Ann", "age": "31"}"#, reference) && !is_right("Ann, 31", reference));
    }

    #[test]
    fn answers_are_written_and_read_and_marks_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new").join("a.jsonl");
        let answers = vec![answer("t-0", 0.0, 0, "4", 0.5), answer("t-0", 0.7, 0, "5", 0.25)];
        write(&path, &answers).unwrap();
        assert_eq!(read(&path).unwrap(), answers);
        let text = std::fs::read_to_string(&path).unwrap().replacen("\"correct\":true", "\"correct\":false", 1);
        std::fs::write(&path, text).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("line 1: `4` is marked as what it is not"), "{error}");
    }

    #[test]
    fn a_run_gets_each_sample_once() {
        use crate::domain::{AttemptReason, CallSpec, Sampling};
        let answers =
            vec![answer("t", 0.7, 1, "five", 0.1), answer("t", 0.7, 0, "4", 0.1), answer("t", 0.0, 0, "3", 0.9)];
        let asking = Asking::all(answers, 1).remove(0);
        let mut shelf = asking.shelf(None);
        let mut ask = |model: &str, temperature: f64| {
            let spec = CallSpec {
                sampling: Sampling { temperature: Some(temperature), ..Sampling::default() },
                ..CallSpec::bare(model)
            };
            let input = &Input::Request;
            shelf.answer(&Asked { call: 0, spec: &spec, why: AttemptReason::Planned, input, at: &[], now: 0 })
        };
        let (first, second) = (ask(SMALL, 0.7).unwrap(), ask(SMALL, 0.7).unwrap());
        assert_eq!((asking.right(first.answer), asking.right(second.answer)), (true, false));
        assert_eq!((ask(SMALL, 0.7), ask(SMALL, 0.3), ask("other", 0.0)), (None, None, None));
        let greedy = ask(SMALL, 0.0).unwrap();
        assert_eq!((greedy.cost.usd, asking.right(greedy.answer)), (10, false));
        let made_up = ask(SIMULATED, 0.0).unwrap();
        assert_eq!((made_up.cost.usd, asking.right(made_up.answer)), (100, asking.strong));
    }

    #[test]
    fn verifying_calls_say_what_was_said_of_the_answer_and_compute_the_prompt_once() {
        use crate::domain::{AttemptReason, CallSpec, Sampling};
        let said = vec![Some(true), None, Some(false)];
        let verified = Some(Verification { said, prompt_tokens: 50, completion_tokens: 6 });
        let greedy = Answer { verified, ..answer("t", 0.0, 0, "4", 0.9) };
        assert_eq!(greedy.score(Score::Verified), Some(0.5));
        let asking = Asking::all(vec![greedy], 1).remove(0);
        let mut shelf = asking.shelf(None);
        let mut ask = |call: u32, input: Input| {
            let sampling = Sampling { temperature: Some(0.0), ..Sampling::default() };
            let spec = CallSpec { sampling, ..CallSpec::bare(SMALL) };
            let why = AttemptReason::Planned;
            shelf.answer(&Asked { call, spec: &spec, why, input: &input, at: &[], now: 0 })
        };
        ask(0, Input::Request).unwrap();
        let said: Vec<_> = (1..5).map(|call| ask(call, Input::Verify(0))).collect();
        let verdict = |recorded: &Recorded| match &recorded.ending {
            Ending::Answers(facts) => facts.verdict,
            other => panic!("{other:?}"),
        };
        let verdicts: Vec<_> = said.iter().flatten().map(verdict).collect();
        let costs: Vec<_> = said.iter().flatten().map(|recorded| recorded.cost.usd).collect();
        assert_eq!((verdicts, costs), (vec![Some(1), None, Some(0)], vec![52, 2, 2]));
        assert!(said[3].is_none(), "more was never asked");
    }
}
