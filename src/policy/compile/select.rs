//! `select:` resolved: arms, the selector and its parameters, features, floor; and what about them will surprise.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        Artifact, Inputs,
        cel::{Condition, Program},
        diagnostic::{DiagnosticKind as Kind, suggest},
        features::{Feature, Features},
        predict::Predictor,
        select::{
            Selector,
            fitted::Fitted,
            fixed::Fixed,
            linear::{Linear, Pacing, Prior, Rule, epsilon_greedy::EpsilonGreedy, linucb::LinUcb, thompson::Thompson},
            modify::Modifiers,
            similarity::{Set, Similarity},
        },
        source::step,
        spec::{FeatureSpec, FittedSpec, FixedSpec, PacingSpec, SimilaritySpec, duration_us},
        split::Split,
        state::Ridge,
    },
    Compiler,
};
use crate::domain::Signals;

/// Regularisation of a feature over that of the constant, where none is said: the middle of what did best on the shared
/// outcomes (15 to 35; eval/bandits.md).
const FEATURE_RIDGE: f64 = 25.0;

/// What all learning selectors may be given.
struct Learning<'a> {
    ridge: Ridge,
    half_life: Option<&'a str>,
    window: Option<u32>,
    min_pulls: Option<u64>,
    pacing: Option<&'a PacingSpec>,
}

impl<'a> Learning<'a> {
    fn of(
        ridge: Option<f64>,
        feature_ridge: Option<f64>,
        half_life: &'a Option<String>,
        window: Option<u32>,
        min_pulls: Option<u64>,
        pacing: &'a Option<PacingSpec>,
    ) -> Self {
        let constant = ridge.unwrap_or(1.0);
        let ridge = Ridge { constant, features: feature_ridge.unwrap_or(FEATURE_RIDGE * constant) };
        Self { ridge, half_life: half_life.as_deref(), window, min_pulls, pacing: pacing.as_ref() }
    }
}

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

    /// The keys of `select` that name a selector, and whether each is given.
    fn families(&self) -> [(&'static str, bool); 15] {
        let s = &self.spec.select;
        [
            ("static", s.fixed.is_some()),
            ("weighted", s.weighted.is_some()),
            ("cheapest", s.cheapest.is_some()),
            ("fastest", s.fastest.is_some()),
            ("similarity", s.similarity.is_some()),
            ("ridge", s.ridge.is_some()),
            ("logistic", s.logistic.is_some()),
            ("kernel", s.kernel.is_some()),
            ("knn", s.knn.is_some()),
            ("clusters", s.clusters.is_some()),
            ("graph", s.graph.is_some()),
            ("ensemble", s.ensemble.is_some()),
            ("linucb", s.linucb.is_some()),
            ("thompson", s.thompson.is_some()),
            ("epsilon_greedy", s.epsilon_greedy.is_some()),
        ]
    }

    /// Whether the selector is one that learns.
    pub(super) fn is_bandit(&self) -> bool {
        let s = &self.spec.select;
        s.linucb.is_some() || s.thompson.is_some() || s.epsilon_greedy.is_some()
    }

    pub(super) fn selector(&mut self, arms: &[String], embedding: usize, inputs: &Inputs<'_>) -> Option<Selector> {
        let families = self.families();
        let given: Vec<&str> = families.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if given.len() != 1 {
            let message = match given.len() {
                0 => "no selector is given".to_owned(),
                _ => format!("{} selectors are given: `{}`", given.len(), given.join("`, `")),
            };
            let (last, others) = (families[families.len() - 1].0, families.map(|(name, _)| name));
            let others = others[..others.len() - 1].join("`, `");
            let help = format!("exactly one of `{others}` and `{last}`");
            self.wrong("/select", Kind::Conflict, message, Some(help));
        }
        let select = &self.spec.select;
        if !self.is_bandit() && !select.features.is_empty() {
            let message = "`features` are what a bandit learns from; this selector does not look at them";
            let d = self.source.key("/select/features", Kind::Conflict, message);
            self.findings.push(d.help("remove them, or use `linucb`, `thompson` or `epsilon_greedy`"));
        }
        if !self.is_bandit() && select.warm_start.is_some() {
            let d = self.source.key("/select/warm_start", Kind::Conflict, "this selector does not learn");
            self.findings.push(d.help("`warm_start` is for `linucb`, `thompson` and `epsilon_greedy`; remove it"));
        }
        if let Some(linear) = self.bandit(arms, embedding, inputs) {
            return Some(Selector::Linear(Box::new(linear)));
        }
        if let Some((name, spec)) = select.fitted().next() {
            return self.fitted(name, spec, arms, inputs).map(|fitted| Selector::Fitted(Box::new(fitted)));
        }
        if let Some(spec) = &select.similarity {
            return self.similarity(spec, arms).map(Selector::Similarity);
        }
        if select.cheapest.is_some() {
            return Some(Selector::Cheapest);
        }
        if select.fastest.is_some() {
            return Some(Selector::Fastest);
        }
        if let Some(weights) = &select.weighted {
            return self.weights("/select/weighted", weights, arms).map(Selector::Fixed);
        }
        self.fixed(select.fixed.as_ref()?, arms).map(Selector::Fixed)
    }

    /// An artifact that the file names at `at`, fitted as `selector`.
    fn artifact<'i>(
        &mut self,
        at: &str,
        (path, hash): (&str, &str),
        selector: &str,
        inputs: &'i Inputs<'_>,
    ) -> Option<&'i Artifact> {
        let file = step(at, "artifact");
        let artifact = match inputs.artifacts.get(path) {
            Some(Ok(artifact)) => artifact,
            Some(Err(reason)) => {
                let message = format!("the artifact {path} cannot be used: {reason}");
                let help = "`weir policy fit` writes artifacts; the path is relative to this file";
                self.wrong(&file, Kind::Artifact, message, Some(help.into()));
                return None;
            }
            None => {
                self.wrong(&file, Kind::Artifact, format!("the artifact {path} was not read"), None);
                return None;
            }
        };
        if artifact.hash.to_string() != hash {
            let message = format!("the artifact {path} has the hash {}, not this one", artifact.hash);
            let help = "if the file is the one that you mean, write its hash here";
            self.wrong(&step(at, "hash"), Kind::Artifact, message, Some(help.into()));
        }
        let card = &artifact.card;
        if card.selector != selector {
            let message = format!("the artifact was fitted as `{}`, not as `{selector}`", card.selector);
            let help = match (selector, card.selector.as_str()) {
                ("bandit", _) => "`weir policy fit --warm-start` with this file writes one".to_owned(),
                (_, "bandit") => "it belongs under `warm_start:`".to_owned(),
                (_, other) => format!("write `{other}:` here, or fit again with `--selector {selector}`"),
            };
            self.wrong(&file, Kind::Artifact, message, Some(help));
            return None;
        }
        if let (Some(fitted), Some(here)) = (&card.embedder, &inputs.embedder)
            && fitted != &**here
        {
            let message =
                format!("the artifact was fitted with the embedder {}, this weir has {}", fitted.name, here.name);
            let help = "another embedder is another policy: fit again with it, or configure the other one";
            self.wrong(&file, Kind::Artifact, message, Some(help.into()));
        }
        Some(artifact)
    }

    /// Per arm, the place of its model in an artifact. `optional`: an arm that nobody said anything of may be unknown there.
    fn artifact_models(
        &mut self,
        at: &str,
        given: &BTreeMap<String, String>,
        arms: &[String],
        known: &[String],
        optional: bool,
    ) -> Vec<Option<usize>> {
        for arm in given.keys().filter(|arm| !arms.contains(arm)) {
            self.not_an_arm(&step(&step(at, "models"), arm), arm, arms);
        }
        let mut models = Vec::new();
        for (i, arm) in arms.iter().enumerate() {
            let (wanted, place) = match given.get(arm) {
                Some(named) => (named, step(&step(at, "models"), arm)),
                None => (arm, format!("/select/arms/{i}")),
            };
            let found = known.iter().position(|m| m == wanted);
            if found.is_none() && (!optional || given.contains_key(arm)) {
                let help = suggest("models of the artifact", wanted, known.iter().map(String::as_str));
                let message = format!("the artifact knows no model `{wanted}`");
                let more = help.unwrap_or_default();
                let help = format!(
                    "{more}{}say which one the arm is: `models: {{{arm}: NAME}}`",
                    if more.is_empty() { "" } else { "; " }
                );
                self.wrong(&place, Kind::UnknownName, message, Some(help));
            }
            models.push(found);
        }
        models
    }

    /// A fitted selector, with its artifact.
    fn fitted(&mut self, name: &str, spec: &FittedSpec, arms: &[String], inputs: &Inputs<'_>) -> Option<Fitted> {
        let at = step("/select", name);
        let artifact = self.artifact(&at, (&spec.artifact, &spec.hash), name, inputs)?;
        let models = self.artifact_models(&at, &spec.models, arms, &artifact.card.models, false);
        let predictor = match Predictor::of(artifact) {
            Ok(predictor) => predictor,
            Err(error) => {
                let message = format!("the artifact {} is damaged: {error}", spec.artifact);
                self.wrong(&step(&at, "artifact"), Kind::Artifact, message, Some("fit it again".into()));
                return None;
            }
        };
        Some(Fitted {
            predictor,
            features: artifact.card.features.clone(),
            models: models.into_iter().collect::<Option<Vec<usize>>>()?,
            cost_weight: spec.cost_weight.unwrap_or(0.0),
            cost_scale: spec.cost_scale.unwrap_or(0.01),
            temperature: spec.temperature.unwrap_or(0.0),
        })
    }

    /// What the arms of a learning selector begin with.
    fn warm_start(&mut self, arms: &[String], features: &Features, inputs: &Inputs<'_>) -> BTreeMap<String, Prior> {
        let spec = self.spec;
        let Some(warm) = &spec.select.warm_start else { return BTreeMap::new() };
        let at = "/select/warm_start";
        let Some(artifact) = self.artifact(at, (&warm.artifact, &warm.hash), "bandit", inputs) else {
            return BTreeMap::new();
        };
        let card = &artifact.card;
        if card.features != features.names() {
            let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let message = format!(
                "the artifact was fitted with the features {}; this policy has {}",
                list(&card.features),
                list(&features.names())
            );
            let help = "fit it again with this file";
            self.wrong("/select/features", Kind::Artifact, message, Some(help.into()));
            return BTreeMap::new();
        }
        let models = self.artifact_models(at, &warm.models, arms, &card.models, true);
        // Without an embedder a feature of the embedding has its length all the same.
        let d = features.dimensions();
        match Prior::of(artifact, d, warm.pulls.unwrap_or(50)) {
            Ok(priors) => {
                let known = arms.iter().zip(models);
                known.filter_map(|(arm, m)| Some((arm.clone(), priors.get(m?)?.clone()))).collect()
            }
            Err(error) => {
                let message = format!("the artifact {} is damaged: {error}", warm.artifact);
                self.wrong(&step(at, "artifact"), Kind::Artifact, message, Some("fit it again".into()));
                BTreeMap::new()
            }
        }
    }

    fn similarity(&mut self, spec: &SimilaritySpec, arms: &[String]) -> Option<Similarity> {
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
        Some(Similarity { sets, default })
    }

    fn fixed(&mut self, spec: &FixedSpec, arms: &[String]) -> Option<Fixed> {
        match spec {
            FixedSpec::Arm(name) => {
                let mut weights = vec![0.0; arms.len()];
                weights[self.arm("/select/static", name, arms)?] = 1.0;
                Some(Fixed { weights })
            }
            FixedSpec::Weights(map) => self.weights("/select/static", map, arms),
        }
    }

    fn weights(&mut self, at: &str, map: &BTreeMap<String, f64>, arms: &[String]) -> Option<Fixed> {
        let mut weights = vec![0.0; arms.len()];
        self.factors(at, map, arms, &mut weights);
        let sum: f64 = weights.iter().sum();
        if !(sum > 0.0 && sum.is_finite()) {
            self.wrong(at, Kind::Value, "no arm has a weight above 0", Some("give at least one".into()));
        }
        Some(Fixed { weights })
    }

    /// Writes a number per arm, at least 0, over what `into` holds.
    fn factors(&mut self, at: &str, map: &BTreeMap<String, f64>, arms: &[String], into: &mut [f64]) {
        for (name, weight) in map {
            let at = step(at, name);
            if !(weight.is_finite() && *weight >= 0.0) {
                self.wrong(&at, Kind::Value, format!("a weight is at least 0; this is {weight}"), None);
            }
            match arms.iter().position(|a| a == name) {
                Some(i) => into[i] = *weight,
                None => self.not_an_arm(&at, name, arms),
            }
        }
    }

    /// What `session` and `tenants` change.
    pub(super) fn modifiers(&mut self, arms: &[String]) -> Modifiers {
        let session = self.spec.select.session.clone().unwrap_or_default();
        let mut tenants = BTreeMap::new();
        for (tenant, spec) in &self.spec.select.tenants {
            let at = step(&step("/select/tenants", tenant), "weights");
            let mut weights = vec![1.0; arms.len()];
            self.factors(&at, &spec.weights, arms, &mut weights);
            if weights.iter().all(|w| *w == 0.0) {
                let help = "a restriction is a rule: `when: key.tenant == \"NAME\"` with `deny_models`";
                self.wrong(&at, Kind::Value, "this leaves the tenant no arm", Some(help.into()));
            }
            tenants.insert(tenant.clone(), weights);
        }
        Modifiers {
            tenants,
            mix: session.mix.unwrap_or(0.0),
            bias: session.bias.unwrap_or(0.0),
            switch_cost: session.switch_cost.unwrap_or(0.0),
        }
    }

    /// Shares that go to one arm.
    pub(super) fn splits(&mut self, arms: &[String], floor: f64) -> Vec<Split> {
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        for (i, spec) in self.spec.split.iter().enumerate() {
            let at = format!("/split/{i}");
            if !seen.insert(spec.name.as_str()) {
                let message = format!("another split is named `{}` already", spec.name);
                self.wrong(
                    &step(&at, "name"),
                    Kind::Conflict,
                    message,
                    Some("its name says who is in: make it unique".into()),
                );
            }
            if let Some(arm) = self.arm(&step(&at, "use"), &spec.use_, arms) {
                out.push(Split { name: spec.name.clone(), share: spec.share, by: spec.by, arm });
            }
        }
        let rest: f64 = out.iter().map(|s| 1.0 - s.share).product();
        if floor * arms.len() as f64 > rest {
            let message = format!(
                "the splits leave {rest:.3} of the traffic, too little for a `min_propensity` of {floor} for {} arms",
                arms.len()
            );
            self.wrong("/split", Kind::Conflict, message, Some("smaller shares, or a smaller `min_propensity`".into()));
        }
        out
    }

    /// Per arm, its own condition.
    pub(super) fn only_if(&mut self, arms: &[String], program: &mut Program) -> Vec<Option<Condition>> {
        let mut out: Vec<Option<Condition>> = arms.iter().map(|_| None).collect();
        for (name, when) in &self.spec.select.only_if {
            let at = step("/select/only_if", name);
            let condition = self.condition(&at, when, program);
            match arms.iter().position(|a| a == name) {
                Some(i) => out[i] = condition,
                None => self.not_an_arm(&at, name, arms),
            }
        }
        if !out.is_empty() && out.iter().all(Option::is_some) {
            let message = "every arm has a condition: a request for which none holds is refused";
            let d = self.source.key("/select/only_if", Kind::Conflict, message).warning();
            self.findings.push(d.help("leave one arm without a condition, if that is not meant"));
        }
        out
    }

    /// The learning selector, where one is given.
    fn bandit(&mut self, arms: &[String], embedding: usize, inputs: &Inputs<'_>) -> Option<Linear> {
        let select = &self.spec.select;
        let (name, rule, given) = if let Some(s) = &select.linucb {
            let rule = Rule::LinUcb(LinUcb { alpha: s.alpha.unwrap_or(0.5) });
            ("linucb", rule, Learning::of(s.ridge, s.feature_ridge, &s.half_life, s.window, s.min_pulls, &s.pacing))
        } else if let Some(s) = &select.thompson {
            let rule = Rule::Thompson(Thompson { noise: s.noise.unwrap_or(0.5) });
            ("thompson", rule, Learning::of(s.ridge, s.feature_ridge, &s.half_life, s.window, s.min_pulls, &s.pacing))
        } else if let Some(s) = &select.epsilon_greedy {
            let rule = Rule::EpsilonGreedy(EpsilonGreedy {
                epsilon: s.epsilon.unwrap_or(0.1),
                decay: s.decay.unwrap_or(1.0),
                least: s.least.unwrap_or(0.0),
            });
            (
                "epsilon_greedy",
                rule,
                Learning::of(s.ridge, s.feature_ridge, &s.half_life, s.window, s.min_pulls, &s.pacing),
            )
        } else {
            // Their names are checked all the same.
            self.features();
            return None;
        };
        let features = Features::new(self.features(), embedding);
        let at = step("/select", name);
        let half_life = given.half_life.and_then(|text| match duration_us(text) {
            Ok(us) => Some(us),
            Err(message) => {
                self.wrong(&step(&at, "half_life"), Kind::Value, message, None);
                None
            }
        });
        if given.half_life.is_some() && given.window.is_some() {
            let message = "`half_life` and `window` are two ways to forget";
            self.wrong(&step(&at, "window"), Kind::Conflict, message, Some("give one of them".into()));
        }
        if self.spec.reward.is_none() {
            let message = format!("`{name}` learns from a reward, and there is none");
            let d = self.source.key(&at, Kind::Conflict, message);
            self.findings.push(d.help("add `reward:`, e.g. `reward: {quality: {weight: 1, from: feedback.score}}`"));
        }
        let pacing = given.pacing.map(|p| Pacing {
            usd_per_request: p.usd_per_request,
            step: p.step.unwrap_or(0.02),
            limit: p.limit.unwrap_or(10.0),
        });
        Some(Linear {
            rule,
            ridge: given.ridge,
            half_life,
            window: given.window.map(|n| n as usize),
            min_pulls: given.min_pulls.unwrap_or(5),
            pacing,
            prior: self.warm_start(arms, &features, inputs),
            features,
        })
    }

    pub(super) fn features(&mut self) -> Vec<Feature> {
        let mut out: Vec<Feature> = Vec::new();
        for (i, feature) in self.spec.select.features.iter().enumerate() {
            let at = format!("/select/features/{i}");
            let made = match feature {
                FeatureSpec::Named(name) => match Signals::FEATURES.iter().position(|n| n == name) {
                    Some(n) => Feature::Named(n),
                    None if name == "task" => {
                        if self.spec.examples.is_empty() {
                            let message = "`task` is the nearest of the policy's example sets, and there are none";
                            let help = "give a few typical texts per task: `examples: {TASK: [TEXT, …]}`";
                            self.wrong(&at, Kind::Conflict, message, Some(help.into()));
                        }
                        Feature::Task(self.spec.examples.keys().cloned().collect())
                    }
                    None => {
                        let help = match name.as_str() {
                            "embedding" => Some("write `{embedding: {project: 32}}`".to_owned()),
                            "language" => Some("write `{language: [en, de]}`".to_owned()),
                            "similarity" => Some("write `{similarity: NAME}`".to_owned()),
                            _ => suggest("features", name, Signals::FEATURES.iter().copied()),
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
        let floor = select.min_propensity.unwrap_or(if self.is_bandit() { 0.02 } else { 0.0 });
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
            Some(Selector::Linear(l)) => !matches!(l.rule, Rule::Thompson(_)),
            Some(Selector::Fitted(f)) => f.temperature == 0.0,
            Some(Selector::Similarity(_) | Selector::Cheapest | Selector::Fastest) => true,
            None => false,
        };
        if certain && floor == 0.0 && arms > 1 {
            let message = "every choice here is certain, so this policy's log can tell nothing about the arms that were not taken";
            let d = self.source.key("/select", Kind::Replay, message).warning();
            self.findings.push(d.help("set `min_propensity: 0.02` if you mean to compare policies by replay"));
        }
        if let Some(Selector::Linear(l)) = selector
            && l.min_pulls == 0
            && matches!(l.rule, Rule::LinUcb(_))
        {
            let message =
                "with `min_pulls: 0` an arm whose bound starts below what another already earns is hardly tried";
            let d = self.source.value("/select/linucb/min_pulls", Kind::Replay, message).warning();
            self.findings
                .push(d.help("leave it at 5, or raise `alpha`: an untried arm's bound is alpha * / sqrt(ridge)"));
        }
    }
}
