//! `accept_when:` resolved: scores and thresholds, and whether an answer can have them.

use super::{
    super::{
        diagnostic::DiagnosticKind as Kind,
        source::step,
        spec::{ConditionSpec, ScoreName, StageSpec},
    },
    Compiler,
    plans::Tree,
};
use crate::domain::{Aggregate, Bound, Condition, Plan, Score};

/// The greatest entropy in nats: ln of a vocabulary, of which none has as many as a million tokens.
const ENTROPY: f64 = 13.8;

impl Compiler<'_> {
    /// The conditions of a stage; `None` where something is wrong with them. `tree`: the stage, where nothing is wrong with
    /// it.
    pub(super) fn accept_when(
        &mut self,
        at: &str,
        stage: &StageSpec,
        last: bool,
        tree: Option<&Tree>,
    ) -> Option<Vec<Condition>> {
        let Some(specs) = &stage.accept_when else {
            if stage.stop_early {
                let d = self.source.key(
                    &step(at, "stop_early"),
                    Kind::Conflict,
                    "there is nothing that could stop this stage",
                );
                self.findings.push(d.help("give `accept_when`, or remove it"));
            }
            if !last {
                let message = "without `accept_when` this stage's answer is always taken";
                let d = self.source.value(at, Kind::Conflict, message).warning();
                self.findings.push(d.help("give conditions, unless the stages after it are for its failures alone"));
            }
            return Some(Vec::new());
        };
        let list = step(at, "accept_when");
        if last {
            let d = self.source.key(&list, Kind::Conflict, "the last stage of a cascade is always accepted");
            self.findings.push(d.help("remove it, or add a stage to escalate to"));
        }
        let built = specs.iter().enumerate();
        let built: Vec<Option<Condition>> =
            built.map(|(i, spec)| self.gate(&step(&list, &i.to_string()), spec, tree)).collect();
        let built: Option<Vec<Condition>> = built.into_iter().collect();
        self.stops_early(at, stage, built.as_deref(), tree);
        built.filter(|_| !last)
    }

    /// Whether a stage that is to be stopped while its answer comes can be.
    fn stops_early(&mut self, at: &str, stage: &StageSpec, conditions: Option<&[Condition]>, tree: Option<&Tree>) {
        if !stage.stop_early {
            return;
        }
        let at = step(at, "stop_early");
        if tree.is_some_and(|tree| !matches!(tree.plan, Plan::Call(_) | Plan::Hedged { .. })) {
            let d = self.source.key(&at, Kind::Conflict, "only a `call` can be stopped while its answer comes");
            self.findings.push(d.help("put it beside a `call`, or remove it"));
        } else if conditions.is_some_and(|conditions| !conditions.iter().any(Condition::is_early)) {
            let message = "no condition of this stage can be told to fail before the answer's end";
            let d = self.source.key(&at, Kind::Conflict, message);
            let help =
                "`first_token_entropy` can, and `logprob_quantile` with `q: 0` and `above`; add one, or remove it";
            self.findings.push(d.help(help));
        }
    }

    fn gate(&mut self, at: &str, spec: &ConditionSpec, tree: Option<&Tree>) -> Option<Condition> {
        if spec.score == Some(ScoreName::PWrong) {
            return self.calibrated(at, spec, tree);
        }
        let uncalibrated = self.is_uncalibrated(at, spec);
        let score = self.score(at, spec).filter(|_| uncalibrated);
        let bound = match (spec.below, spec.above) {
            (Some(below), None) => Some(Bound::Below(below)),
            (None, Some(above)) => Some(Bound::Above(above)),
            _ => {
                let help = "exactly one of `below` and `above`";
                self.wrong(at, Kind::Conflict, "this condition has not one threshold", Some(help.into()));
                None
            }
        };
        let (score, bound) = (score?, bound?);
        let fits = self.threshold(at, score, bound);
        let scored = tree.is_none_or(|tree| self.can_be_scored(at, spec, score, tree));
        (fits && scored)
            .then(|| Condition { if_unscored: spec.if_unscored.unwrap_or_default(), ..Condition::new(score, bound) })
    }

    fn score(&mut self, at: &str, spec: &ConditionSpec) -> Option<Score> {
        let Some(name) = spec.score else {
            self.wrong(at, Kind::Value, "this condition names no score", None);
            return None;
        };
        match (name, spec.q) {
            (ScoreName::LogprobQuantile, None) => {
                let help = "e.g. `q: 0.1`; 0 is the least likely token, 0.5 the median";
                self.wrong(at, Kind::Value, "`logprob_quantile` needs `q`, which quantile", Some(help.into()));
                return None;
            }
            (ScoreName::LogprobQuantile, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                let d = self.source.key(&step(at, "q"), Kind::Conflict, "`q` is of `logprob_quantile` alone");
                self.findings.push(d.help("remove it"));
                return None;
            }
        }
        Some(match name {
            ScoreName::MeanTokenEntropy => Score::MeanTokenEntropy,
            ScoreName::FirstTokenEntropy => Score::FirstTokenEntropy,
            ScoreName::MeanMargin => Score::MeanMargin,
            ScoreName::MeanLogprob => Score::MeanLogprob,
            ScoreName::LogprobQuantile => Score::LogprobQuantile(spec.q.unwrap_or_default()),
            ScoreName::Disagreement => Score::Disagreement,
            ScoreName::Verified => Score::Verified,
            // Has a calibration, which names the score; see `calibrated`.
            ScoreName::PWrong => return None,
        })
    }

    /// Whether the threshold lies within the score's range, and some score on the right side of it.
    fn threshold(&mut self, at: &str, score: Score, bound: Bound) -> bool {
        let (least, most, range) = range(score);
        let (key, holds, accepts_unsure) = match bound {
            Bound::Below(below) => ("below", below > least && below <= most, score.high_is_sure()),
            Bound::Above(above) => ("above", above >= least && above < most, !score.high_is_sure()),
        };
        let (at, threshold) = (step(at, key), bound.threshold());
        if !holds {
            let message = match (least..=most).contains(&threshold) {
                true => format!("`{score}` is never {key} {threshold}"),
                false => format!("{threshold} is outside the range of `{score}`"),
            };
            self.wrong(&at, Kind::Value, message, Some(format!("`{score}` is {range}")));
        } else if accepts_unsure {
            let message = format!("this accepts what is unsure: `{score}` is {range}");
            let other = if key == "below" { "above" } else { "below" };
            let d = self.source.key(&at, Kind::Conflict, message).warning();
            self.findings.push(d.help(format!("write `{other}`, if that is not meant")));
        }
        holds
    }

    /// Whether the stage's answers can have the score.
    pub(super) fn can_be_scored(&mut self, at: &str, spec: &ConditionSpec, score: Score, tree: &Tree) -> bool {
        match score {
            Score::Disagreement => return self.can_disagree(at, &tree.plan),
            Score::Verified => return self.is_verified(at, &tree.plan),
            _ => {}
        }
        if spec.if_unscored.is_some() {
            return true;
        }
        let mut silent: Vec<&str> = Vec::new();
        for (places, answers) in tree.calls.iter().zip(answering(&tree.plan)) {
            for place in places.iter().filter(|place| answers && !self.entries[**place].capabilities.logprobs) {
                if !silent.contains(&self.cards[*place]) {
                    silent.push(self.cards[*place]);
                }
            }
        }
        if silent.is_empty() {
            return true;
        }
        let (names, give) = (silent.join("`, `"), if silent.len() == 1 { "gives" } else { "give" });
        let message = format!("`{names}` {give} no log-probabilities, from which `{score}` is computed");
        let help = "say what follows (`if_unscored: accept` or `if_unscored: escalate`), or ask another score: `disagreement` of a \
                    `parallel` stage needs none";
        self.wrong(at, Kind::Conflict, message, Some(help.into()));
        false
    }

    fn can_disagree(&mut self, at: &str, plan: &Plan) -> bool {
        let message = match plan {
            Plan::Parallel { aggregate: Aggregate::First, .. } => "of `first` only one answer is there to the end",
            Plan::Parallel { branches, .. } if branches.len() < 2 => "one branch has nobody to disagree with",
            Plan::Parallel { .. } => return true,
            Plan::Verified(verified) => return self.can_disagree(at, &verified.plan),
            Plan::Call(_) | Plan::Hedged { .. } | Plan::Cascade(_) | Plan::Steps(_) => {
                "only the branches of a `parallel` stage can disagree, and this is none"
            }
        };
        let help = "ask several times and count: `parallel: [{call: MODEL, temperature: 0.8, times: 3}]` with `aggregate: vote`; or \
                    ask another score";
        self.wrong(&step(at, "score"), Kind::Conflict, message, Some(help.into()));
        false
    }
}

/// Least and greatest value of a score, and both in words.
fn range(score: Score) -> (f64, f64, &'static str) {
    match score {
        Score::MeanTokenEntropy | Score::FirstTokenEntropy => {
            (0.0, ENTROPY, "0 to 13.8 nats, and low where it is sure")
        }
        Score::MeanMargin => (0.0, 1.0, "0 to 1, and high where it is sure"),
        Score::MeanLogprob | Score::LogprobQuantile(_) => (f64::MIN, 0.0, "at most 0, and high where it is sure"),
        Score::Disagreement => (0.0, 1.0, "0 to 1, and low where branches agree"),
        Score::Learned(_) => (0.0, 1.0, "0 to 1, and high where it is sure"),
        Score::Verified => (0.0, 1.0, "0 to 1, and high where more say that it is right"),
    }
}

/// Per call of a plan, in order, whether its answer can become the plan's. A judge's cannot.
pub(super) fn answering(plan: &Plan) -> Vec<bool> {
    match plan {
        Plan::Call(_) => vec![true],
        Plan::Hedged { .. } => vec![true, true],
        Plan::Cascade(stages) => stages.iter().flat_map(|stage| answering(&stage.plan)).collect(),
        Plan::Parallel { branches, aggregate } => {
            let mut answers: Vec<bool> = branches.iter().flat_map(answering).collect();
            answers.extend(aggregate.call().map(|_| matches!(aggregate, Aggregate::Refine { .. })));
            answers
        }
        Plan::Steps(_) => vec![false, false, true],
        Plan::Verified(verified) => answering(&verified.plan).into_iter().chain([false]).collect(),
    }
}
