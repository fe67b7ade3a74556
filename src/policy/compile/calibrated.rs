//! `p_wrong`: gates whose thresholds come out of a calibration. What is compiled is a condition on the score that was
//! calibrated, so that the machine knows nothing of calibrations.

use super::{
    super::{
        Artifacts, Guaranteed,
        artifact::CALIBRATION,
        diagnostic::{DiagnosticKind as Kind, suggest},
        source::step,
        spec::ConditionSpec,
    },
    Compiler,
    gates::answering,
    plans::Tree,
};
use crate::{
    cascade::calibration::{Calibration, Direction},
    domain::{Bound, Condition, Hash, Score},
};

/// Of a guarantee, where the file does not say.
const CONFIDENCE: f64 = 0.95;

impl<'a> Compiler<'a> {
    /// Whether a condition on another score has nothing that only `p_wrong` has.
    pub(super) fn is_uncalibrated(&mut self, at: &str, spec: &ConditionSpec) -> bool {
        let given = [
            ("calibration", spec.calibration.is_some()),
            ("max_error", spec.max_error.is_some()),
            ("accepted", spec.accepted.is_some()),
            ("confidence", spec.confidence.is_some()),
        ];
        let Some((key, _)) = given.into_iter().find(|(_, given)| *given) else { return true };
        let d = self.source.key(&step(at, key), Kind::Conflict, format!("`{key}` is of `p_wrong` alone"));
        self.findings.push(d.help("remove it, or ask the score `p_wrong`"));
        false
    }

    /// A condition on `p_wrong`; `None` where something is wrong with it. `tree`: the stage, where nothing is wrong with it.
    pub(super) fn calibrated(&mut self, at: &str, spec: &ConditionSpec, tree: Option<&Tree>) -> Option<Condition> {
        for (key, given) in [("above", spec.above.is_some()), ("q", spec.q.is_some())] {
            if given {
                let d = self.source.key(&step(at, key), Kind::Conflict, format!("`p_wrong` has no `{key}`"));
                self.findings
                    .push(d.help("accept what is wrong with a probability `below` something, or keep a `max_error`"));
                return None;
            }
        }
        let (calibration, hash) = self.calibration(at, spec)?;
        let score: Score = match calibration.score().parse() {
            Ok(score) => score,
            Err(problem) => {
                let help = "`weir policy fit --cascade` of this version writes one that can be read";
                self.wrong(&step(at, "calibration"), Kind::Artifact, problem, Some(help.into()));
                return None;
            }
        };
        let turned = (calibration.direction() == Direction::HighIsSure) != score.high_is_sure();
        if turned {
            let message = format!("the calibration reads `{score}` the wrong way round");
            self.wrong(&step(at, "calibration"), Kind::Artifact, message, Some("fit it again".into()));
            return None;
        }
        let known = tree.is_none_or(|tree| self.is_calibrated_for(at, calibration, tree));
        let scored = tree.is_none_or(|tree| self.can_be_scored(at, spec, score, tree));
        let threshold = self.threshold_of(at, spec, calibration, score, hash)?;
        let bound = if score.high_is_sure() { Bound::Above(threshold) } else { Bound::Below(threshold) };
        (known && scored).then(|| Condition {
            calibration: Some(hash),
            max_error: spec.max_error,
            if_unscored: spec.if_unscored.unwrap_or_default(),
            ..Condition::new(score, bound)
        })
    }

    fn calibration(&mut self, at: &str, spec: &ConditionSpec) -> Option<(&'a Calibration, Hash)> {
        let Some(path) = &spec.calibration else {
            let help = "`weir policy fit --cascade` writes one from answers that are known to be right or wrong";
            self.wrong(at, Kind::Value, "`p_wrong` needs a `calibration`", Some(help.into()));
            return None;
        };
        let file = step(at, "calibration");
        let help =
            Some("`weir policy fit --cascade` writes calibrations; the path is relative to this file".to_owned());
        let artifacts: &'a Artifacts = self.artifacts;
        let artifact = match artifacts.get(path) {
            Some(Ok(artifact)) => artifact,
            Some(Err(reason)) => {
                self.wrong(&file, Kind::Artifact, format!("the calibration {path} cannot be used: {reason}"), help);
                return None;
            }
            None => {
                self.wrong(&file, Kind::Artifact, format!("the calibration {path} was not read"), None);
                return None;
            }
        };
        match &artifact.calibration {
            Some(calibration) => Some((calibration, artifact.hash)),
            None => {
                let message = format!("{path} is fitted as `{}`, and no `{CALIBRATION}`", artifact.card.selector);
                self.wrong(&file, Kind::Artifact, message, help);
                None
            }
        }
    }

    /// Whether the calibration is of every model that can give the stage's answer.
    fn is_calibrated_for(&mut self, at: &str, calibration: &Calibration, tree: &Tree) -> bool {
        let models = calibration.models();
        let calls = tree.calls.iter().zip(answering(&tree.plan)).filter(|(_, answers)| *answers);
        let mut entries = calls.flat_map(|(places, _)| places).map(|place| self.cards[*place]);
        let Some(other) = entries.find(|name| !models.iter().any(|model| model == name)) else { return true };
        let help = suggest("models of the calibration", other, models.iter().map(String::as_str));
        let message = format!("the calibration says nothing of answers of `{other}`, which this stage may give");
        self.wrong(&step(at, "calibration"), Kind::Artifact, message, help);
        false
    }

    fn threshold_of(
        &mut self,
        at: &str,
        spec: &ConditionSpec,
        calibration: &Calibration,
        score: Score,
        hash: Hash,
    ) -> Option<f64> {
        match (spec.below, spec.max_error, spec.accepted) {
            (None, None, Some(share)) if spec.confidence.is_none() => {
                let threshold = calibration.threshold_accepting(share);
                threshold.map_err(|e| self.wrong(&step(at, "accepted"), Kind::Value, e.to_string(), None)).ok()
            }
            (Some(below), None, None) if spec.confidence.is_none() => {
                if !(below > 0.0 && below <= 1.0) {
                    let message = format!("{below} is no probability that something could lie below");
                    self.wrong(&step(at, "below"), Kind::Value, message, Some("more than 0, and at most 1".into()));
                    return None;
                }
                let threshold = calibration.threshold_at(below);
                if threshold.is_none() {
                    let message = format!("no answer of the calibration is wrong with a probability below {below}");
                    self.wrong(
                        &step(at, "below"),
                        Kind::Value,
                        message,
                        Some("accept more, or calibrate better answers".into()),
                    );
                }
                threshold
            }
            (None, Some(max_error), None) => match calibration
                .guaranteed(max_error, spec.confidence.unwrap_or(CONFIDENCE))
            {
                Ok(Some(guarantee)) => {
                    let threshold = guarantee.threshold;
                    let bound = if score.high_is_sure() { Bound::Above(threshold) } else { Bound::Below(threshold) };
                    let condition = Condition::new(score, bound).to_string();
                    self.guarantees.push(Guaranteed { at: at.to_owned(), condition, calibration: hash, guarantee });
                    Some(threshold)
                }
                Ok(None) => {
                    let message = format!(
                        "no threshold of `{score}` keeps {max_error} wrong with this confidence, by {} answers",
                        calibration.points().len()
                    );
                    let help = "calibrate with more answers, allow more errors, or accept less confidence";
                    self.wrong(&step(at, "max_error"), Kind::Value, message, Some(help.into()));
                    None
                }
                Err(error) => {
                    self.wrong(&step(at, "max_error"), Kind::Value, error.to_string(), None);
                    None
                }
            },
            _ => {
                let help = "`below: 0.2`, a probability by the calibration; `max_error: 0.1`, with a `confidence`, a guarantee; or `accepted: 0.6`, a \
                            share of answers";
                let message = "`p_wrong` needs exactly one of `below`, `max_error` and `accepted`, and `confidence` only beside `max_error`";
                self.wrong(at, Kind::Conflict, message, Some(help.into()));
                None
            }
        }
    }
}
