//! `select:` resolved: arms, the selector and its parameters, features, floor; and what about them will surprise.

use std::collections::BTreeSet;

use super::{
    super::{
        diagnostic::{DiagnosticKind as Kind, suggest},
        features::{Feature, Features, NAMES},
        select::{
            Selector,
            fixed::Fixed,
            linucb::LinUcb,
            similarity::{Set, Similarity},
        },
        source::step,
        spec::{FeatureSpec, FixedSpec, LinUcbSpec, duration_us},
    },
    Compiler,
};

impl Compiler<'_> {
    pub(super) fn arms(&mut self) -> (Vec<String>, Vec<usize>) {
        let mut seen = BTreeSet::new();
        let mut targets = Vec::new();
        for (i, name) in self.spec.select.arms.iter().enumerate() {
            let at = format!("/select/arms/{i}");
            if !seen.insert(name.as_str()) {
                self.wrong(
                    &at,
                    Kind::Conflict,
                    format!("`{name}` is an arm already"),
                    Some("name each arm once".into()),
                );
            }
            targets.extend(self.target(&at, name));
        }
        (self.spec.select.arms.clone(), targets)
    }

    pub(super) fn arm(&mut self, pointer: &str, name: &str, arms: &[String]) -> Option<usize> {
        let found = arms.iter().position(|a| a == name);
        if found.is_none() {
            let help = suggest("arms", name, arms.iter().map(String::as_str));
            self.wrong(pointer, Kind::UnknownName, format!("`{name}` is not an arm"), help);
        }
        found
    }

    /// A key that should be an arm's name.
    pub(super) fn not_an_arm(&mut self, pointer: &str, name: &str, arms: &[String]) {
        let help = suggest("arms", name, arms.iter().map(String::as_str));
        let d = self.source.key(pointer, Kind::UnknownName, format!("`{name}` is not an arm"));
        self.findings.push(d.maybe_help(help));
    }

    pub(super) fn selector(&mut self, arms: &[String], embedding: usize) -> Option<Selector> {
        let select = &self.spec.select;
        let given = [
            select.fixed.as_ref().map(|_| "static"),
            select.similarity.as_ref().map(|_| "similarity"),
            select.linucb.as_ref().map(|_| "linucb"),
        ];
        let given: Vec<&str> = given.into_iter().flatten().collect();
        if given.len() != 1 {
            let message = match given.len() {
                0 => "no selector is given".to_owned(),
                _ => format!("{} selectors are given: `{}`", given.len(), given.join("`, `")),
            };
            let help = "exactly one of `static`, `similarity` and `linucb`".to_owned();
            self.wrong("/select", Kind::Conflict, message, Some(help));
        }
        if select.linucb.is_none() && !select.features.is_empty() {
            let message = "`features` are what `linucb` learns from; this selector does not look at them";
            let d = self.source.key("/select/features", Kind::Conflict, message);
            self.findings.push(d.help("remove them, or use `linucb`"));
        }
        let features = self.features();
        if let Some(spec) = &select.linucb {
            return self.linucb(spec, features, embedding).map(Selector::LinUcb);
        }
        if let Some(spec) = &select.similarity {
            let mut sets = Vec::new();
            for (name, set) in &spec.sets {
                let at = step("/select/similarity/sets", name);
                if !self.spec.examples.contains_key(name) {
                    let help = suggest("example sets", name, self.spec.examples.keys().map(String::as_str));
                    let d = self.source.key(&at, Kind::UnknownName, format!("there is no example set `{name}`"));
                    self.findings.push(d.maybe_help(help));
                }
                if let Some(arm) = self.arm(&step(&at, "arm"), &set.arm, arms) {
                    sets.push(Set { name: name.clone(), arm, above: set.above.unwrap_or(0.75) });
                }
            }
            let default = self.arm("/select/similarity/default", &spec.default, arms)?;
            return Some(Selector::Similarity(Similarity { sets, default }));
        }
        self.fixed(select.fixed.as_ref()?, arms).map(Selector::Fixed)
    }

    pub(super) fn fixed(&mut self, spec: &FixedSpec, arms: &[String]) -> Option<Fixed> {
        let at = "/select/static";
        let mut weights = vec![0.0; arms.len()];
        match spec {
            FixedSpec::Arm(name) => weights[self.arm(at, name, arms)?] = 1.0,
            FixedSpec::Weights(map) => {
                for (name, weight) in map {
                    let at = step(at, name);
                    if !(weight.is_finite() && *weight >= 0.0) {
                        self.wrong(&at, Kind::Value, format!("a weight is at least 0; this is {weight}"), None);
                    }
                    match arms.iter().position(|a| a == name) {
                        Some(i) => weights[i] = *weight,
                        None => self.not_an_arm(&at, name, arms),
                    }
                }
                let sum: f64 = weights.iter().sum();
                if !(sum > 0.0 && sum.is_finite()) {
                    self.wrong(at, Kind::Value, "no arm has a weight above 0", Some("give at least one".into()));
                }
            }
        }
        Some(Fixed { weights })
    }

    pub(super) fn linucb(&mut self, spec: &LinUcbSpec, features: Vec<Feature>, embedding: usize) -> Option<LinUcb> {
        let half_life = match spec.half_life.as_deref().map(duration_us) {
            Some(Err(message)) => {
                self.wrong("/select/linucb/half_life", Kind::Value, message, None);
                None
            }
            Some(Ok(us)) => Some(us),
            None => None,
        };
        if self.spec.reward.is_none() {
            let d =
                self.source.key("/select/linucb", Kind::Conflict, "`linucb` learns from a reward, and there is none");
            self.findings.push(d.help("add `reward:`, e.g. `reward: {quality: {weight: 1, from: feedback.score}}`"));
        }
        Some(LinUcb {
            alpha: spec.alpha.unwrap_or(0.5),
            ridge: spec.ridge.unwrap_or(1.0),
            half_life,
            min_pulls: spec.min_pulls.unwrap_or(5),
            features: Features::new(features, embedding),
        })
    }

    pub(super) fn features(&mut self) -> Vec<Feature> {
        let mut out: Vec<Feature> = Vec::new();
        for (i, feature) in self.spec.select.features.iter().enumerate() {
            let at = format!("/select/features/{i}");
            let made = match feature {
                FeatureSpec::Named(name) => match NAMES.iter().position(|n| n == name) {
                    Some(n) => Feature::Named(n),
                    None if name == "task" => {
                        let d = self.source.value(
                            &at,
                            Kind::NotYet,
                            "this version of weir does not have the feature `task` yet",
                        );
                        self.findings.push(d.help("remove it"));
                        continue;
                    }
                    None => {
                        let help = match name.as_str() {
                            "embedding" => Some("write `{embedding: {project: 32}}`".to_owned()),
                            "language" => Some("write `{language: [en, de]}`".to_owned()),
                            "similarity" => Some("write `{similarity: NAME}`".to_owned()),
                            _ => suggest("features", name, NAMES.iter().copied()),
                        };
                        self.wrong(&at, Kind::UnknownName, format!("there is no feature `{name}`"), help);
                        continue;
                    }
                },
                FeatureSpec::Made(made) => match (&made.embedding, &made.language, &made.similarity) {
                    (Some(e), None, None) => Feature::Embedding { project: e.project as usize },
                    (None, Some(codes), None) if !codes.is_empty() => Feature::Language(codes.clone()),
                    (None, None, Some(name)) => {
                        if !self.spec.examples.contains_key(name) {
                            let help = suggest("example sets", name, self.spec.examples.keys().map(String::as_str));
                            let message = format!("there is no example set `{name}`");
                            self.wrong(&step(&at, "similarity"), Kind::UnknownName, message, help);
                        }
                        Feature::Similarity(name.clone())
                    }
                    _ => {
                        let help = "exactly one of `embedding`, `language` (with codes) and `similarity`";
                        self.wrong(&at, Kind::Conflict, "this is not one feature", Some(help.into()));
                        continue;
                    }
                },
            };
            if out.contains(&made) {
                self.wrong(&at, Kind::Conflict, "this feature is given twice", Some("name each feature once".into()));
            }
            out.push(made);
        }
        out
    }

    pub(super) fn floor(&mut self, arms: &[String]) -> f64 {
        let select = &self.spec.select;
        let floor = select.min_propensity.unwrap_or(if select.linucb.is_some() { 0.02 } else { 0.0 });
        if floor * arms.len() as f64 > 1.0 {
            let most = 1.0 / arms.len() as f64;
            let message = format!("{} arms cannot all have a probability of at least {floor}", arms.len());
            self.wrong("/select/min_propensity", Kind::Conflict, message, Some(format!("at most {most:.4}")));
        }
        floor
    }

    pub(super) fn no_embedding(&mut self, arms: &[String], selector: Option<&Selector>) -> Option<usize> {
        match &self.spec.select.no_embedding {
            Some(name) => self.arm("/select/no_embedding", name, arms),
            None => {
                if selector.is_some_and(Selector::needs_embedding) {
                    let message = "this selector needs the query's embedding, and `no_embedding` is missing";
                    let help = "name the arm for requests without one: `no_embedding: ARM`";
                    self.wrong("/select", Kind::Value, message, Some(help.into()));
                }
                None
            }
        }
    }

    /// What is allowed and will surprise.
    pub(super) fn surprises(&mut self, selector: Option<&Selector>, floor: f64, arms: usize) {
        let certain = match selector {
            Some(Selector::Fixed(f)) => f.is_one_arm(),
            Some(Selector::Similarity(_)) | Some(Selector::LinUcb(_)) => true,
            None => false,
        };
        if certain && floor == 0.0 && arms > 1 {
            let message = "every choice here is certain, so this policy's log can tell nothing about the arms that were not taken";
            let d = self.source.key("/select", Kind::Replay, message).warning();
            self.findings.push(d.help("set `min_propensity: 0.02` if you mean to compare policies by replay"));
        }
        if let Some(Selector::LinUcb(l)) = selector
            && l.min_pulls == 0
        {
            let message =
                "with `min_pulls: 0` an arm whose bound starts below what another already earns is hardly tried";
            let d = self.source.value("/select/linucb/min_pulls", Kind::Replay, message).warning();
            self.findings
                .push(d.help("leave it at 5, or raise `alpha`: an untried arm's bound is alpha * |x| / sqrt(ridge)"));
        }
    }
}
