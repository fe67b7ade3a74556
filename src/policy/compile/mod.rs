//! From what a file says to what it means: names resolved against file and fleet, conditions checked, parts that
//! contradict each other found. Every error at once, each with its place.

mod calibrated;
mod cases;
mod failover;
mod gates;
mod plans;
mod select;
mod steps;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Serialize;

use super::{
    Artifacts, Fallback, Guaranteed, Inputs, Policy, Target,
    budget::{Budget, Used},
    cel::{self, Condition, Names, Program},
    diagnostic::{Diagnostic, DiagnosticKind as Kind, Diagnostics, suggest},
    parse,
    reward::{Quality, Reward, Scaled},
    rules::Rule,
    source::{Source, step},
    spec::{IfNoneLeft, OnError, Per, ScaledSpec, Spec, WhenSpent, duration_us},
};
use crate::domain::{CallSpec, EmbedderIdentity, ErrorKind, Fleet, Hash, ModelCard, Plan, PolicyVersion, canonical};

/// Error kinds that another try elsewhere may well cure.
const TRANSIENT: &[ErrorKind] = &[
    ErrorKind::Timeout,
    ErrorKind::RateLimited,
    ErrorKind::ServerError,
    ErrorKind::Unreachable,
    ErrorKind::Cut,
    ErrorKind::Garbage,
];
/// Error kinds that no other model can cure: the request's own fault, or nobody there to answer.
const FINAL: &[ErrorKind] = &[ErrorKind::BadRequest, ErrorKind::Cancelled];

/// Compiles a policy.
///
/// # Errors
/// All errors of meaning, in the order of the file.
pub fn compile(spec: &Spec, inputs: &Inputs<'_>) -> Result<Policy, Diagnostics> {
    let mut c = Compiler {
        spec,
        source: &spec.source,
        cards: inputs.fleet.0.values().map(|card| card.name.as_str()).collect(),
        entries: inputs.fleet.0.values().collect(),
        targets: Vec::new(),
        models: BTreeMap::new(),
        artifacts: &inputs.artifacts,
        guarantees: Vec::new(),
        findings: Vec::new(),
    };
    c.name();
    c.models(inputs.fleet);
    c.plans();
    c.examples(inputs);
    let mut program = Program::default();
    let rules = c.rules(&mut program);
    let (arms, arm_targets) = c.arms();
    let dimensions = inputs.embedder.as_ref().map_or(0, |e| e.dimensions as usize);
    let selector = c.selector(&arms, dimensions, inputs);
    let only_if = c.only_if(&arms, &mut program);
    let modifiers = c.modifiers(&arms);
    let min_propensity = c.floor(&arms);
    let splits = c.splits(&arms, min_propensity);
    let reward = c.reward(inputs.fleet);
    let budgets = c.budgets();
    let fallback = c.fallback();
    c.shadows();
    c.chunks();
    c.tests(&arms);
    let no_embedding = c.no_embedding(&arms, selector.as_ref());
    if c.findings.is_empty() {
        c.surprises(selector.as_ref(), min_propensity, arms.len());
    }
    let version = c.version(inputs);
    let mut findings = Diagnostics(c.findings);
    findings.sort();
    let targets = c.targets;
    match (selector, version) {
        (Some(selector), Some(version)) if !findings.has_errors() => Ok(Policy {
            name: spec.policy.clone(),
            description: spec.description.clone(),
            hash: version.hash,
            version,
            warnings: findings,
            cards: inputs.fleet.0.values().cloned().collect(),
            targets,
            rules,
            program,
            evaluator: cel::Evaluator::new(),
            arms,
            arm_targets,
            selector,
            only_if,
            modifiers,
            splits,
            shadows: spec.shadow_decide.clone(),
            chunks: spec.chunks.clone(),
            min_propensity,
            no_embedding,
            reward,
            budgets,
            guarantees: c.guarantees,
            fallback,
            examples: inputs.examples.clone(),
            embedder: inputs.embedder.clone(),
            example_sets: spec.examples.keys().cloned().collect(),
            tests: spec.tests.clone(),
        }),
        _ => Err(findings),
    }
}

/// Compiles again what a record says was compiled, with the artifacts that it names.
///
/// # Errors
/// When an artifact is not there, or the record's YAML, vectors or hash are not what they were.
pub fn from_version(v: &PolicyVersion, artifacts: Artifacts) -> Result<Policy, Diagnostics> {
    let spec = parse(&v.file, v.yaml.as_bytes())?;
    let broken = |what: String| Diagnostics(vec![spec.source.at(0..0, String::new(), Kind::Conflict, what)]);
    let mut examples = BTreeMap::new();
    for (name, vectors) in &v.examples {
        let decoded: Option<Vec<Arc<[f32]>>> =
            vectors.iter().map(|text| canonical::vector_from_base64(text).map(Into::into)).collect();
        let decoded = decoded.ok_or_else(|| broken(format!("the recorded vectors of `{name}` are damaged")))?;
        examples.insert(name.clone(), decoded);
    }
    let inputs = Inputs { fleet: &v.fleet, artifacts, examples, embedder: v.embedder.clone().map(Arc::new) };
    let policy = compile(&spec, &inputs)?;
    if policy.hash != v.hash {
        return Err(broken(format!(
            "the recorded policy has the hash {}, compiled again it has {}: the record was altered, or this weir compiles differently",
            v.hash, policy.hash
        )));
    }
    Ok(policy)
}

/// What the hash covers.
#[derive(Serialize)]
struct Identity<'a> {
    language: u32,
    yaml: &'a str,
    fleet: &'a Fleet,
    examples: &'a BTreeMap<String, Vec<String>>,
    embedder: Option<&'a EmbedderIdentity>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    artifacts: &'a BTreeMap<String, Hash>,
}

struct Compiler<'a> {
    spec: &'a Spec,
    source: &'a Arc<Source>,
    /// Names of the fleet's entries, in order.
    cards: Vec<&'a str>,
    /// And what the fleet says of them.
    entries: Vec<&'a ModelCard>,
    targets: Vec<Target>,
    /// This file's model names, and the places in the fleet that they stand for.
    models: BTreeMap<&'a str, Vec<usize>>,
    artifacts: &'a Artifacts,
    guarantees: Vec<Guaranteed>,
    findings: Vec<Diagnostic>,
}

impl<'a> Compiler<'a> {
    fn wrong(&mut self, pointer: &str, kind: Kind, message: impl Into<String>, help: Option<String>) {
        self.findings.push(self.source.value(pointer, kind, message).maybe_help(help));
    }

    fn name(&mut self) {
        let name = &self.spec.policy;
        let fine = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !fine {
            self.wrong(
                "/policy",
                Kind::Value,
                format!("`{name}` cannot be a policy's name"),
                Some("letters, digits, `-`, `_` and `.`, beginning with a letter or digit".into()),
            );
        } else if name == "auto" {
            self.wrong(
                "/policy",
                Kind::Conflict,
                "`auto` stands for the default policy and cannot be a name",
                Some("choose another name".into()),
            );
        }
    }

    fn models(&mut self, fleet: &Fleet) {
        for (alias, model) in &self.spec.models {
            let at = step("/models", alias);
            let mut places = Vec::new();
            match (&model.name, &model.tag) {
                (Some(name), None) => match self.cards.iter().position(|card| card == name) {
                    Some(place) => places.push(place),
                    None => {
                        let help = suggest("fleet entries", name, self.cards.iter().copied());
                        self.wrong(
                            &step(&at, "name"),
                            Kind::UnknownName,
                            format!("the fleet has no entry `{name}`"),
                            help,
                        );
                    }
                },
                (None, Some(tag)) => {
                    places = fleet.tagged(tag).filter_map(|c| self.cards.iter().position(|n| *n == c.name)).collect();
                    if places.is_empty() {
                        let tags: BTreeSet<&str> = fleet.0.values().flat_map(|c| &c.tags).map(String::as_str).collect();
                        let help = suggest("tags", tag, tags.iter().copied());
                        self.wrong(
                            &step(&at, "tag"),
                            Kind::UnknownName,
                            format!("no fleet entry has the tag `{tag}`"),
                            help,
                        );
                    }
                }
                _ => self.wrong(
                    &at,
                    Kind::Conflict,
                    format!("`{alias}` needs exactly one of `name` and `tag`"),
                    Some(format!("e.g. `{alias}: {{name: FLEET-ENTRY}}`")),
                ),
            }
            self.models.insert(alias, places.clone());
            let plan = Plan::Call(CallSpec::bare(alias.as_str()));
            self.targets.push(Target { name: alias.clone(), named: false, plan, calls: vec![places] });
        }
    }

    fn examples(&mut self, inputs: &Inputs<'_>) {
        for (name, texts) in &self.spec.examples {
            let at = step("/examples", name);
            let identifier = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                && !name.starts_with(|c: char| c.is_ascii_digit());
            if !identifier || name.is_empty() {
                let d = self.source.key(&at, Kind::Value, format!("`{name}` cannot be the name of an example set"));
                self.findings
                    .push(d.help("letters, digits and `_`, so that conditions can say `signals.similarity.NAME`"));
            }
            if texts.is_empty() {
                self.wrong(
                    &at,
                    Kind::Value,
                    format!("the example set `{name}` is empty"),
                    Some("give it a few typical texts".into()),
                );
            }
            for (i, text) in texts.iter().enumerate().filter(|(_, t)| t.trim().is_empty()) {
                let _ = text;
                self.wrong(&step(&at, &i.to_string()), Kind::Value, "this example is empty", None);
            }
            if let Some(embedder) = &inputs.embedder {
                let vectors = inputs.examples.get(name).map(Vec::as_slice).unwrap_or_default();
                if vectors.len() != texts.len() || vectors.iter().any(|v| v.len() != embedder.dimensions as usize) {
                    self.wrong(&at, Kind::Conflict, format!("the texts of `{name}` were not embedded"), None);
                }
            }
        }
    }

    /// Every target's name, for hints.
    fn target_names(&self) -> Vec<&'a str> {
        self.spec.models.keys().chain(self.spec.plans.keys()).map(String::as_str).collect()
    }

    fn target(&mut self, pointer: &str, name: &str) -> Option<usize> {
        let found = self.targets.iter().position(|t| t.name == name);
        if found.is_none() && !self.spec.plans.contains_key(name) {
            let known = self.target_names();
            let help = suggest("plans and models", name, known.iter().copied());
            self.wrong(pointer, Kind::UnknownName, format!("there is no plan or model `{name}`"), help);
        }
        found
    }

    fn model_set(&mut self, pointer: &str, names: &[String]) -> Vec<bool> {
        let mut set = vec![false; self.cards.len()];
        for (i, name) in names.iter().enumerate() {
            match self.models.get(name.as_str()) {
                Some(places) => places.iter().for_each(|p| set[*p] = true),
                None => {
                    let help = match self.spec.plans.contains_key(name) {
                        true => Some(
                            "this is a plan; restrictions name models, and bind every plan that calls them".to_owned(),
                        ),
                        false => suggest("models", name, self.spec.models.keys().map(String::as_str)),
                    };
                    let message = format!("there is no model `{name}`");
                    self.wrong(&step(pointer, &i.to_string()), Kind::UnknownName, message, help);
                }
            }
        }
        set
    }

    fn rules(&mut self, program: &mut Program) -> Vec<Rule> {
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        for (i, rule) in self.spec.rules.iter().enumerate() {
            let at = format!("/rules/{i}");
            if !seen.insert(rule.name.as_str()) {
                let message = format!("another rule is named `{}` already", rule.name);
                self.wrong(
                    &step(&at, "name"),
                    Kind::Conflict,
                    message,
                    Some("explanations name rules; make it unique".into()),
                );
            }
            let restricts = rule.allow_models.is_some() || !rule.deny_models.is_empty();
            if !restricts && rule.use_.is_none() {
                self.wrong(
                    &at,
                    Kind::Conflict,
                    format!("the rule `{}` does nothing", rule.name),
                    Some("give it `use`, `allow_models` or `deny_models`".into()),
                );
            }
            if rule.if_none_left.is_some() && !restricts {
                self.wrong(
                    &step(&at, "if_none_left"),
                    Kind::Conflict,
                    "`if_none_left` is about restrictions, and this rule has none",
                    Some("remove it".into()),
                );
            }
            let use_ = rule.use_.as_ref().and_then(|name| self.target(&step(&at, "use"), name));
            let allow = rule.allow_models.as_ref().map(|names| self.model_set(&step(&at, "allow_models"), names));
            let deny = self.model_set(&step(&at, "deny_models"), &rule.deny_models);
            if let Some(condition) = self.condition(&step(&at, "when"), &rule.when, program) {
                out.push(Rule {
                    name: rule.name.clone(),
                    condition,
                    use_,
                    allow,
                    deny,
                    ignorable: rule.if_none_left == Some(IfNoneLeft::Ignore),
                    apply_on_error: rule.on_error.map_or(restricts, |e| e == OnError::Apply),
                });
            }
        }
        out
    }

    /// A condition, checked and lowered; `None` where something is wrong with it, which is reported.
    fn condition(&mut self, at: &str, when: &str, program: &mut Program) -> Option<Condition> {
        let names =
            Names { examples: self.spec.examples.keys().map(String::as_str).collect(), fleet: self.cards.clone() };
        match cel::check(when, &names, program) {
            Ok(condition) => Some(condition),
            Err(problems) => {
                for p in problems {
                    let d = self.source.inside(at, when, p.at, Kind::Condition, p.message);
                    self.findings.push(d.maybe_help(p.help));
                }
                None
            }
        }
    }

    fn scaled(&mut self, pointer: &str, spec: &Option<ScaledSpec>) -> Option<Scaled> {
        let spec = spec.as_ref()?;
        self.sign(&step(pointer, "weight"), spec.weight);
        Some(Scaled { weight: spec.weight, scale: spec.scale.unwrap_or(1.0) })
    }

    fn sign(&mut self, pointer: &str, weight: f64) {
        if weight > 0.0 && weight.is_finite() {
            let d = self.source.value(pointer, Kind::Conflict, "a weight above 0 rewards what is dear or slow");
            self.findings.push(d.warning().help("costs have negative weights"));
        }
    }

    fn reward(&mut self, fleet: &Fleet) -> Option<Reward> {
        let spec = self.spec.reward.as_ref()?;
        let quality = spec.quality.as_ref().map(|q| {
            let from = q.from.strip_prefix("feedback.").unwrap_or_default().to_owned();
            if from.is_empty() {
                let help = Some("e.g. `from: feedback.score`".to_owned());
                self.wrong("/reward/quality/from", Kind::Value, format!("`{}` is not `feedback.NAME`", q.from), help);
            }
            let wait = duration_us(q.wait.as_deref().unwrap_or("24h")).unwrap_or_else(|message| {
                self.wrong("/reward/quality/wait", Kind::Value, message, None);
                0
            });
            Quality { weight: q.weight, from, wait }
        });
        let reward = Reward {
            quality,
            cost_usd: self.scaled("/reward/cost_usd", &spec.cost_usd),
            latency_s: self.scaled("/reward/latency_s", &spec.latency_s),
            joules: self.scaled("/reward/joules", &spec.joules),
        };
        if reward.joules.is_some() {
            let called = |place: &usize| self.targets.iter().any(|t| t.calls.iter().flatten().any(|p| p == place));
            let unmeasured = fleet.0.values().enumerate().find(|(i, card)| card.energy.is_none() && called(i));
            if let Some((_, card)) = unmeasured {
                let message = format!("the fleet does not say how many joules `{}` takes", card.name);
                let help =
                    "measure it, and give the entry of the fleet `energy: {input: J, output: J}`, in joules per token";
                self.wrong("/reward/joules", Kind::Conflict, message, Some(help.into()));
            }
        }
        if reward.quality.is_none()
            && reward.cost_usd.is_none()
            && reward.latency_s.is_none()
            && reward.joules.is_none()
        {
            let help = "give at least one of `quality`, `cost_usd`, `latency_s` and `joules`";
            self.wrong("/reward", Kind::Value, "this reward has no parts", Some(help.into()));
        }
        Some(reward)
    }

    fn shadows(&mut self) {
        let mut seen = BTreeSet::new();
        for (i, name) in self.spec.shadow_decide.iter().enumerate() {
            let at = format!("/shadow_decide/{i}");
            if *name == self.spec.policy {
                self.wrong(&at, Kind::Conflict, "a policy is no shadow of itself", Some("name another policy".into()));
            } else if !seen.insert(name) {
                self.wrong(&at, Kind::Conflict, format!("`{name}` is named twice"), None);
            }
        }
    }

    fn chunks(&mut self) {
        if self.spec.chunks.as_ref().is_some_and(|chunks| chunks.roles.is_empty() && chunks.between.is_none()) {
            let help = "give `roles` (such as `[tool]`), `between` (lines around documents), or both";
            self.wrong("/chunks", Kind::Value, "this takes nothing for a document", Some(help.into()));
        }
    }

    fn budgets(&mut self) -> Vec<Budget> {
        let mut out: Vec<Budget> = Vec::new();
        for (i, spec) in self.spec.budget.iter().enumerate() {
            let at = format!("/budget/{i}");
            if out.iter().any(|b| b.per == spec.per) {
                let message = format!("there is a budget per {} already", spec.per.as_str());
                self.wrong(&step(&at, "per"), Kind::Conflict, message, Some("one per kind".into()));
                continue;
            }
            if spec.per == Per::Request && spec.every.is_some() {
                let message = "a budget per request is for each one alone, and has no `every`";
                self.wrong(&step(&at, "every"), Kind::Conflict, message, Some("remove it".into()));
            }
            let every = duration_us(spec.every.as_deref().unwrap_or("1d")).unwrap_or_else(|message| {
                self.wrong(&step(&at, "every"), Kind::Value, message, None);
                1
            });
            let when_spent = spec.when_spent.unwrap_or(WhenSpent::Refuse);
            if spec.first_token_seconds.is_some() && spec.per != Per::Request {
                let message = format!(
                    "the time to the first token is of one request, and this budget is per {}",
                    spec.per.as_str()
                );
                let help = "move it to a budget `per: request`";
                self.wrong(&step(&at, "first_token_seconds"), Kind::Conflict, message, Some(help.into()));
            }
            let most = Used {
                usd: spec.usd.unwrap_or(f64::INFINITY),
                tokens: spec.tokens.map_or(f64::INFINITY, |tokens| tokens as f64),
                calls: spec.calls.map_or(f64::INFINITY, f64::from),
                seconds: spec.seconds.unwrap_or(f64::INFINITY),
            };
            if most == Used::UNBOUNDED && spec.first_token_seconds.is_none() {
                let help = "give `usd`, `tokens`, `calls` or `seconds`; per request also `first_token_seconds`";
                self.wrong(&at, Kind::Value, "this budget bounds nothing", Some(help.into()));
            }
            let first_token_us = spec.first_token_seconds.map(|seconds| (seconds * 1e6) as i64);
            out.push(Budget { per: spec.per, most, every, when_spent, first_token_us });
        }
        out
    }

    fn fallback(&mut self) -> Option<Fallback> {
        let spec = self.spec.fallback.as_ref()?;
        let mut on = BTreeSet::new();
        for (i, name) in spec.on.iter().enumerate() {
            match name.as_str() {
                "transient" => on.extend(TRANSIENT),
                "any" => on.extend(ErrorKind::ALL.iter().filter(|k| !FINAL.contains(k))),
                _ => match ErrorKind::ALL.iter().find(|k| k.as_str() == name) {
                    Some(kind) => {
                        on.insert(*kind);
                    }
                    None => {
                        let known = ErrorKind::ALL.iter().map(|k| k.as_str()).chain(["transient", "any"]);
                        let help = suggest("kinds of error", name, known);
                        let message = format!("there is no kind of error `{name}`");
                        self.wrong(&format!("/fallback/on/{i}"), Kind::UnknownName, message, help);
                    }
                },
            }
        }
        let mut to = Vec::new();
        for (i, name) in spec.to.iter().enumerate() {
            let at = format!("/fallback/to/{i}");
            let Some(target) = self.target(&at, name) else { continue };
            if !matches!(self.targets[target].plan, Plan::Call(_)) {
                let message = format!("`{name}` makes several calls, and what follows an error is one");
                let help = "name models, or plans with `call`; the cascade's own stages follow an error before these";
                self.wrong(&at, Kind::Conflict, message, Some(help.into()));
            }
            to.push(target);
        }
        if spec.to.is_empty() && spec.retries.is_none() {
            let help = Some("give `to`, or `retries`".to_owned());
            self.wrong("/fallback", Kind::Conflict, "this fallback leads nowhere", help);
        }
        let edges = self.failover();
        Some(Fallback { on: on.into_iter().collect(), to, retries: spec.retries, weights: spec.weights, edges })
    }

    fn version(&mut self, inputs: &Inputs<'_>) -> Option<PolicyVersion> {
        let examples: BTreeMap<String, Vec<String>> = inputs
            .examples
            .iter()
            .map(|(name, vectors)| (name.clone(), vectors.iter().map(|v| canonical::vector_to_base64(v)).collect()))
            .collect();
        let artifacts: BTreeMap<String, Hash> =
            inputs.artifacts.iter().filter_map(|(path, a)| Some((path.clone(), a.as_ref().ok()?.hash))).collect();
        let identity = Identity {
            language: 1,
            yaml: &self.source.text,
            fleet: inputs.fleet,
            examples: &examples,
            embedder: inputs.embedder.as_deref(),
            artifacts: &artifacts,
        };
        match canonical::to_bytes(&identity) {
            Ok(bytes) => Some(PolicyVersion {
                artifacts,
                name: self.spec.policy.clone(),
                hash: Hash::of(&bytes),
                file: self.source.file.clone(),
                yaml: self.source.text.to_string(),
                fleet: inputs.fleet.clone(),
                examples,
                embedder: inputs.embedder.as_deref().cloned(),
            }),
            Err(error) => {
                self.wrong("", Kind::Value, format!("the fleet cannot be hashed: {error}"), None);
                None
            }
        }
    }
}
