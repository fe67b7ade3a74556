//! Gates of a cascade over recorded answers: thresholds are taken from one half of the questions and judged on the other,
//! every run by the machine that serves.

use rayon::prelude::*;
use serde::Serialize;

use super::{
    answers::{Asking, SIMULATED, SMALL},
    calibrated::{Seen, auroc, calibration_error},
    curve::{self, Both},
    plans::{self, First, Last, VERDICTS},
};
use crate::{
    cascade::Setup,
    domain::{Bound, Condition, Plan, Score, Scorer},
    fit::{self, gate::Example},
    replay::{
        metrics::{Point, SplitMix},
        plan_run::{End, PlanRun, run},
    },
};

/// A gate whose threshold moves.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    pub score: Score,
    /// Which side of a threshold is sure.
    pub low_is_sure: bool,
    /// What it is asked of.
    pub first: First,
    /// It is learned from the greedy answers to the training questions.
    pub learned: Option<Taught>,
}

/// What a gate is learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taught {
    Answers,
    /// Of answers and of the signals of their prompts.
    Prompts,
}

impl Gate {
    /// All that are judged.
    pub fn all() -> Vec<Self> {
        let of = |score, low_is_sure| Self { score, low_is_sure, first: First::Greedy, learned: None };
        let learned = |by| Self { learned: Some(by), ..of(Score::Learned(Scorer::default()), false) };
        vec![
            of(Score::MeanTokenEntropy, true),
            of(Score::FirstTokenEntropy, true),
            of(Score::MeanMargin, false),
            of(Score::MeanLogprob, false),
            of(Score::LogprobQuantile(0.0), false),
            of(Score::LogprobQuantile(0.1), false),
            of(Score::LogprobQuantile(0.5), false),
            Self { first: First::Probes, ..of(Score::Disagreement, true) },
            learned(Taught::Answers),
            learned(Taught::Prompts),
            Self { first: First::Verified, ..of(Score::Verified, false) },
        ]
    }

    fn name(&self) -> String {
        match (self.first, self.learned) {
            (First::Probes, _) => format!("{} of 3 probes", self.score),
            (First::Verified, _) => format!("{} {VERDICTS} x", self.score),
            (First::Greedy, Some(Taught::Prompts)) => format!("{} of prompt and answer", self.score),
            (First::Greedy, _) => self.score.to_string(),
        }
    }

    /// The gate with what the training questions teach; nothing, where they teach nothing.
    fn fitted(&self, train: &[&Asking]) -> Self {
        let Some(by) = self.learned else { return *self };
        let example = |asking: &&Asking| {
            let answer = asking.greedy()?;
            let signals = match by {
                Taught::Answers => None,
                Taught::Prompts => Some(asking.signals.as_ref()?.features()),
            };
            Some(Example { scores: answer.features()?, signals, right: answer.correct })
        };
        let examples: Vec<Example> = train.iter().filter_map(example).collect();
        Self { score: fit::gate::scorer(&examples).map_or(self.score, Score::Learned), ..*self }
    }

    /// The score as the plan of this question has it.
    fn score(&self, asking: &Asking) -> Score {
        match (self.score, &asking.signals) {
            (Score::Learned(scorer), Some(signals)) => Score::Learned(scorer.told(signals)),
            (score, _) => score,
        }
    }

    fn condition(&self, asking: &Asking, threshold: f64) -> Condition {
        Condition::new(
            self.score(asking),
            if self.low_is_sure { Bound::Below(threshold) } else { Bound::Above(threshold) },
        )
    }

    /// How unsure the gate would be of the first stage's answer; `None` where it has no score.
    fn unsureness(&self, asking: &Asking) -> Option<f64> {
        let turned = |score: f64| if self.low_is_sure { score } else { -score };
        match self.first {
            First::Greedy | First::Verified => asking.greedy()?.score(self.score(asking)).map(turned),
            First::Probes => Some(plans::disagreement(asking)),
        }
    }

    /// Thresholds that escalate from all to none of the training questions, in equal steps. This is where a gate whose
    /// threshold comes from a calibration would have only one.
    fn thresholds(&self, train: &[&Asking], steps: usize) -> Vec<f64> {
        let mut unsure: Vec<f64> = train.iter().filter_map(|asking| self.unsureness(asking)).collect();
        unsure.sort_by(f64::total_cmp);
        let turned = |t: f64| if self.low_is_sure { t } else { -t };
        let at = |step: usize| {
            // The threshold itself escalates: the last one is beyond all.
            let place = step * unsure.len() / steps.max(1);
            unsure.get(place).copied().unwrap_or_else(|| unsure.last().map_or(0.0, |last| last + 1.0))
        };
        (0..=steps).map(|step| turned(at(step))).collect()
    }
}

/// A gate before one last stage.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub gate: String,
    /// `vote of 5` (the same weights), or `simulated`.
    pub last: &'static str,
    /// Area between the curve and escalating at random, over foresight's; mean and standard deviation over the splits.
    pub gain: f64,
    pub gain_deviation: f64,
    /// Probability that a wrong answer of the first stage is less sure than a right one; over all questions.
    pub auroc: Option<f64>,
    /// Of the isotonic regression, out of fold, over all questions.
    pub calibration_error: f64,
    /// Nothing and everything escalated; means over the splits, as all that follows.
    pub never: Point,
    pub always: Point,
    /// Quality where half of the further cost is spent: by this gate, at random, with foresight.
    pub half: [f64; 3],
    /// By rising share of questions accepted.
    pub curve: Vec<Point>,
    /// Runs that asked for an answer that there is not.
    pub missed: usize,
}

/// What is judged, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// Random halves.
    pub splits: u64,
    /// Thresholds less one.
    pub steps: usize,
}

/// Runs a plan for one question; `asked` is a score that its answers have beside the recorded ones.
pub fn over(plan: &Plan, asking: &Asking, asked: Option<Score>) -> PlanRun {
    run(&Setup::bare(plan.clone()), 0, &mut asking.shelf(asked))
}

/// What a run cost, in USD, and whether its answer is right.
pub fn point(asking: &Asking, run: &PlanRun) -> Point {
    let right = matches!(run.end, End::Answered { answer, .. } if asking.right(answer));
    Point { cost: run.cost.usd as f64 / 1e6, score: f64::from(u8::from(right)) }
}

/// All gates before both last stages.
pub fn sweep(askings: &[Asking], how: Sweep, tick: &(dyn Fn() + Sync)) -> Vec<Row> {
    let lasts = [(Last::Vote, "vote of 5"), (Last::Simulated, SIMULATED)];
    let verified = askings.iter().all(|asking| asking.greedy().is_some_and(|answer| answer.verified.is_some()));
    let gates: Vec<Gate> = Gate::all().into_iter().filter(|g| verified || g.first != First::Verified).collect();
    let cases: Vec<_> = lasts.into_iter().flat_map(|last| gates.iter().map(move |gate| (*gate, last))).collect();
    let row = |(gate, (last, name)): (Gate, (Last, &'static str))| {
        let row = row(&gate, last, name, askings, how);
        tick();
        row
    };
    cases.into_par_iter().map(row).collect()
}

fn row(gate: &Gate, last: Last, name: &'static str, askings: &[Asking], how: Sweep) -> Row {
    let stages = |asking: &Asking| {
        let of = |plan: &Plan| point(asking, &over(plan, asking, None));
        Both { first: of(&plans::first(gate.first)), last: of(&plans::last(last)) }
    };
    let both: Vec<Both> = askings.iter().map(stages).collect();
    let seen = seen(gate, askings, &both);
    let mut gains = Vec::new();
    let mut curves = vec![Point { cost: 0.0, score: 0.0 }; how.steps + 1];
    let (mut ends, mut half) = ([Point { cost: 0.0, score: 0.0 }; 2], [0.0; 3]);
    let mut missed = 0;
    let share = 1.0 / how.splits.max(1) as f64;
    for seed in 0..how.splits.max(1) {
        let order = SplitMix(seed ^ 0x6761_7465).order(askings.len());
        let (train, test) = order.split_at(order.len() / 2);
        let train: Vec<&Asking> = train.iter().map(|i| &askings[*i]).collect();
        let gate = gate.fitted(&train);
        let pairs: Vec<Both> = test.iter().map(|i| both[*i]).collect();
        let mut points = Vec::new();
        for threshold in gate.thresholds(&train, how.steps) {
            let mut sum = Point { cost: 0.0, score: 0.0 };
            for asking in test.iter().map(|i| &askings[*i]) {
                let condition = gate.condition(asking, threshold);
                let plan = plans::cascade(plans::first(gate.first), condition, plans::last(last));
                let run = over(&plan, asking, gate.learned.map(|_| condition.score));
                missed += usize::from(run.missed());
                let of = point(asking, &run);
                sum = Point { cost: sum.cost + of.cost, score: sum.score + of.score };
            }
            let n = test.len().max(1) as f64;
            points.push(Point { cost: sum.cost / n, score: sum.score / n });
        }
        for (to, of) in curves.iter_mut().zip(&points) {
            *to = Point { cost: to.cost + share * of.cost, score: to.score + share * of.score };
        }
        let line = curve::random(&pairs);
        for (to, of) in ends.iter_mut().zip(line) {
            *to = Point { cost: to.cost + share * of.cost, score: to.score + share * of.score };
        }
        let middle = 0.5 * (line[0].cost + line[1].cost);
        let through = curve::sorted(points.iter().copied().chain(line).collect());
        let at = [&through[..], &line[..], &curve::sorted(curve::oracle(&pairs))[..]];
        for (to, of) in half.iter_mut().zip(at) {
            *to += share * curve::at(of, middle);
        }
        gains.extend(curve::gain(&pairs, &points));
    }
    let mean = gains.iter().sum::<f64>() / gains.len().max(1) as f64;
    let squares: f64 = gains.iter().map(|gain| (gain - mean).powi(2)).sum();
    Row {
        gate: gate.name(),
        last: name,
        gain: mean,
        gain_deviation: (squares / (gains.len().max(2) - 1) as f64).sqrt(),
        auroc: auroc(&seen),
        calibration_error: calibration_error(&seen, 1),
        never: ends[0],
        always: ends[1],
        half,
        curve: curves,
        missed,
    }
}

/// How unsure the gate is of each question, and whether the first stage is wrong; a learned one of each half by what the
/// other teaches.
fn seen(gate: &Gate, askings: &[Asking], both: &[Both]) -> Vec<Seen> {
    let order = SplitMix(0x6761_7465).order(askings.len());
    let (a, b) = order.split_at(order.len() / 2);
    let mut seen = Vec::new();
    for (half, other) in [(a, b), (b, a)] {
        let gate = gate.fitted(&other.iter().map(|i| &askings[*i]).collect::<Vec<_>>());
        seen.extend(half.iter().filter_map(|i| Some((gate.unsureness(&askings[*i])?, both[*i].first.score == 0.0))));
    }
    seen
}

/// A plan without a threshold that moves.
#[derive(Clone, Debug, Serialize)]
pub struct Fixed {
    pub plan: String,
    pub quality: f64,
    /// In the order of the kinds.
    pub by_kind: Vec<f64>,
    pub cost_usd: f64,
    pub calls: f64,
    /// Share of the questions answered by each stage; of a plan without stages, nothing.
    pub stages: Vec<f64>,
    pub missed: usize,
}

/// Plans without a threshold that moves, over all questions.
pub fn fixed(askings: &[Asking]) -> Vec<Fixed> {
    let plans = [
        (format!("{SMALL}, greedy"), plans::first(First::Greedy)),
        ("vote of 3 probes".to_owned(), plans::first(First::Probes)),
        ("vote of 5".to_owned(), plans::last(Last::Vote)),
        (SIMULATED.to_owned(), plans::last(Last::Simulated)),
        ("3 probes, 2 more, 3 more (after ACAR)".to_owned(), plans::modes(None)),
        ("3 probes, 2 more, simulated (after ACAR)".to_owned(), plans::modes(Some(SIMULATED))),
    ];
    plans.into_iter().map(|(name, plan)| one(name, &plan, askings)).collect()
}

fn one(name: String, plan: &Plan, askings: &[Asking]) -> Fixed {
    let runs: Vec<PlanRun> = askings.iter().map(|asking| over(plan, asking, None)).collect();
    let points: Vec<Point> = askings.iter().zip(&runs).map(|(asking, run)| point(asking, run)).collect();
    let n = askings.len().max(1) as f64;
    let stages = match plan {
        Plan::Cascade(stages) => stages.len(),
        _ => 0,
    };
    let by_stage = |stage: usize| {
        let of = runs.iter().filter(|run| run.served().and_then(|made| made.at.first()) == Some(&(stage as u32)));
        of.count() as f64 / n
    };
    let of_kind = |kind| {
        let of: Vec<f64> = askings.iter().zip(&points).filter(|(a, _)| a.kind == kind).map(|(_, p)| p.score).collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    Fixed {
        plan: name,
        quality: points.iter().map(|p| p.score).sum::<f64>() / n,
        by_kind: super::tasks::Kind::ALL.map(of_kind).to_vec(),
        cost_usd: points.iter().map(|p| p.cost).sum::<f64>() / n,
        calls: runs.iter().map(|run| run.calls.len()).sum::<usize>() as f64 / n,
        stages: (0..stages).map(by_stage).collect(),
        missed: runs.iter().filter(|run| run.missed()).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bench::cascade::answers::{Answer, tests::answer},
        domain::{Reading, Signals},
        fit::gate::Verification,
    };

    /// Questions of which every second one is wrong, and unsure; samples at 0.7 are right.
    fn askings(n: usize) -> Vec<Asking> {
        let of = |i: usize| -> Vec<Answer> {
            let task = format!("t-{i}");
            let (text, entropy) = if i.is_multiple_of(2) { ("4", 0.1) } else { ("5", 0.9) };
            let greedy = answer(&task, 0.0, 0, text, entropy + i as f64 * 1e-4);
            let probes = ["4", if i.is_multiple_of(2) { "4" } else { "5" }, if i % 4 == 3 { "6" } else { "4" }];
            let probes =
                probes.into_iter().zip(0..).map(|(text, sample)| answer(&task, plans::PROBE, sample, text, 0.5));
            let votes = (0..5).map(|sample| answer(&task, plans::VOTE, sample, "4", 0.5));
            std::iter::once(greedy).chain(probes.collect::<Vec<_>>()).chain(votes).collect()
        };
        Asking::all((0..n).flat_map(of).collect(), 1)
    }

    #[test]
    fn a_gate_that_knows_is_foresight_and_one_that_does_not_is_chance() {
        let askings = askings(80);
        let how = Sweep { splits: 4, steps: 10 };
        let rows = sweep(&askings, how, &|| {});
        let row = |gate: &str, last: &str| rows.iter().find(|r| r.gate == gate && r.last == last).unwrap();
        let entropy = row("mean_token_entropy", "vote of 5");
        assert!(entropy.gain > 0.9 && entropy.auroc == Some(1.0), "{entropy:?}");
        assert!(entropy.calibration_error < 0.05 && entropy.missed == 0);
        let ends = (entropy.curve[0], entropy.curve[10]);
        assert!((ends.0.cost - entropy.always.cost).abs() < 1e-12 && ends.0.score == 1.0);
        assert!((ends.1.score - entropy.never.score).abs() < 0.05, "{ends:?}");
        // Scores that no answer has escalate all.
        let none = row("mean_margin", "vote of 5");
        assert!(none.auroc.is_none() && none.curve.iter().all(|p| (p.cost - none.always.cost).abs() < 1e-12));
        assert_eq!(row("disagreement of 3 probes", "vote of 5").missed, 0);
    }

    #[test]
    fn modes_are_taken_by_agreement() {
        let rows = fixed(&askings(40));
        let of = |name: &str| rows.iter().find(|r| r.plan.starts_with(name)).unwrap();
        assert_eq!((of("small").quality, of("vote of 5").quality, of("small").calls), (0.5, 1.0, 1.0));
        let modes = of("3 probes, 2 more, 3 more");
        assert_eq!((modes.stages.as_slice(), modes.quality, modes.missed), (&[0.5, 0.5, 0.0][..], 1.0, 0));
        assert_eq!(modes.calls, 4.0, "three probes, and two more for a half");
        assert!(of("simulated").quality > 0.7);
    }

    #[test]
    fn learned_and_verified_gates_are_judged_like_the_others() {
        let all = |i: usize| {
            let mut asking = askings(i + 1).remove(i).into_answers();
            for answer in &mut asking {
                let entropy = answer.score(Score::MeanTokenEntropy).unwrap();
                let read = Ok(crate::domain::Scored { value: entropy, exact: true });
                answer.scores = Score::STANDARD.map(|score| Reading { score, read }).to_vec();
                let mut said = vec![Some(answer.correct); VERDICTS as usize];
                said[3] = None;
                answer.verified = Some(Verification { said, prompt_tokens: 30, completion_tokens: 6 });
            }
            asking
        };
        let mut askings = Asking::all((0..240).flat_map(all).collect(), 1);
        for (i, asking) in askings.iter_mut().enumerate() {
            asking.signals = Some(Signals { complexity: (i % 7) as f64, ..Signals::default() });
        }
        let rows = sweep(&askings, Sweep { splits: 2, steps: 10 }, &|| {});
        assert_eq!(rows.len(), 2 * Gate::all().len());
        for name in ["learned", "learned of prompt and answer"] {
            let row = rows.iter().find(|r| r.gate == name && r.last == "vote of 5").unwrap();
            assert!(row.gain > 0.9 && row.auroc > Some(0.99) && row.missed == 0, "{row:?}");
        }
        let verified = rows.iter().find(|r| r.gate == "verified 8 x" && r.last == "vote of 5").unwrap();
        assert!(verified.auroc == Some(1.0) && verified.missed == 0 && verified.gain > 0.9, "{verified:?}");
    }
}
