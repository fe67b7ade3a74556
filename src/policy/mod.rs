//! Floor 1: policies. A YAML file is read ([`parse`]) and compiled ([`compile`]) into a [`Policy`], whose
//! [`decide`](Policy::decide) is a pure function of a state and a context: no clock, no randomness but the context's
//! seed, no I/O, one order of arithmetic. What is decided here can be derived again from the record, byte for byte.
//!
//! The way of a file: `source` (YAML with places) → `schema` (shape) → `spec` (types) → `compile` (meaning; `cel` checks
//! conditions). The way of a decision: `rules` (conditions, restrictions) → `choose` (what may be called, at what bound on
//! its price: `reckon`, `budget`) → `select` (probabilities, from `features` and `state`) → `decide` (floor and `draw`).
//! Calls, retries and streams belong to `cascade` and `dispatch`; measuring signals and embedding texts to `signals`.

pub mod artifact;
mod budget;
mod cel;
mod choose;
mod chunks;
mod compile;
mod decide;
mod diagnostic;
pub mod document;
mod draw;
pub mod explain;
mod features;
pub(crate) mod linalg;
pub mod predict;
mod reckon;
mod reward;
mod rules;
mod schema;
mod select;
mod source;
mod spec;
mod split;
mod state;
pub mod testing;

use std::{collections::BTreeMap, sync::Arc};

pub use self::{
    artifact::Artifact,
    budget::{Counted, Spent, Used, Who},
    cel::variables::{Documented, reference as variables},
    chunks::{BetweenSpec, ChunksSpec},
    compile::{compile, from_version},
    diagnostic::{Diagnostic, DiagnosticKind, Diagnostics, Severity},
    features::query_feature,
    reckon::{BOUNDS_TOKENS, Bounds},
    schema::schema,
    spec::{
        AggregateName, AggregateSpec, AskSpec, AskedSpec, BoundsSpec, BranchSpec, BudgetSpec, ConditionSpec,
        EmbeddingFeatureSpec, EpsilonGreedySpec, ExpectSpec, FallbackSpec, FeatureSpec, FittedSpec, FixedSpec,
        IfNoneLeft, LearntSpec, LinUcbSpec, MadeAggregateSpec, MadeFeatureSpec, ModelSpec, OnError, PacingSpec, Per,
        PlainSpec, PlanSpec, QualitySpec, RewardSpec, RuleSpec, ScaledSpec, ScoreName, SelectSpec, SessionSpec,
        SetSpec, SimilaritySpec, Spec, SplitSpec, StageSpec, TenantSpec, TestSpec, ThompsonSpec, WarmStartSpec,
        WhenSpent,
    },
    split::SplitBy,
    state::{FoldError, State},
};
use crate::{
    cascade::calibration::Guarantee,
    domain::{
        Context, EmbedderIdentity, ErrorKind, FailoverWeights, Fleet, Hash, Micros, ModelCard, OutcomeStatus, Plan,
        PolicyVersion, StateUpdate,
    },
};

/// Reads a policy file: YAML, shape and types, with every error at once.
///
/// # Errors
/// All that is wrong with text and shape. What names mean is checked by [`compile`].
pub fn parse(file: &str, yaml: &[u8]) -> Result<Spec, Diagnostics> {
    let read = document::read::<Spec>(file, yaml, schema::policies());
    match read.value.filter(|_| read.findings.0.is_empty()) {
        Some(spec) => Ok(Spec { source: read.source, ..spec }),
        None => Err(read.findings),
    }
}

/// Reads and compiles without an embedder, for checking: errors of shape do not keep errors of meaning from being found,
/// so that everything comes at once. `fleet` may depend on the file.
///
/// # Errors
/// Everything that is wrong, in the order of the file.
pub fn check(file: &str, yaml: &[u8], fleet: impl FnOnce(&Spec) -> Fleet) -> Result<Policy, Diagnostics> {
    check_with(file, yaml, |spec| (fleet(spec), Artifacts::new()))
}

/// [`check`] for a file that may name artifacts; what was read of these is given, too.
///
/// # Errors
/// As for [`check`].
pub fn check_with(
    file: &str,
    yaml: &[u8],
    given: impl FnOnce(&Spec) -> (Fleet, Artifacts),
) -> Result<Policy, Diagnostics> {
    let read = document::read::<Spec>(file, yaml, schema::policies());
    let mut findings = read.findings;
    let Some(spec) = read.value.map(|spec| Spec { source: read.source, ..spec }) else { return Err(findings) };
    let (fleet, artifacts) = given(&spec);
    match compile(&spec, &Inputs::unembedded(&fleet).with(artifacts)) {
        Ok(policy) if findings.0.is_empty() => Ok(policy),
        Ok(_) => Err(findings),
        Err(meaning) => {
            // What only follows from something that is reported already would lead astray.
            let follows = |d: &Diagnostic| {
                findings.0.iter().any(|f| {
                    let name = f.pointer.rsplit('/').next().unwrap_or_default();
                    let named = d.kind == DiagnosticKind::UnknownName && d.message.contains(&format!("`{name}`"));
                    under(&d.pointer, &f.pointer)
                        || schema::parent(&f.pointer) == d.pointer
                        || (!name.is_empty() && named)
                })
            };
            let (mut kept, _): (Vec<_>, Vec<_>) =
                meaning.0.into_iter().partition(|d| findings.0.is_empty() || !follows(d));
            findings.0.append(&mut kept);
            findings.sort();
            Err(findings)
        }
    }
}

/// Whether a JSON pointer leads to the same node as another, or below it.
fn under(pointer: &str, above: &str) -> bool {
    pointer.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What compiling a policy is handed beside the file; all of it is part of the policy's hash.
pub struct Inputs<'a> {
    pub fleet: &'a Fleet,
    /// By path as written in the file: what was read, or why it could not be.
    pub artifacts: Artifacts,
    /// Per example set, the texts' unit vectors in order; empty without an embedder.
    pub examples: BTreeMap<String, Vec<Arc<[f32]>>>,
    pub embedder: Option<Arc<EmbedderIdentity>>,
}

/// Artifacts by path as written in a policy: what was read, or why it could not be.
pub type Artifacts = BTreeMap<String, Result<Arc<Artifact>, String>>;

impl<'a> Inputs<'a> {
    /// Inputs without an embedder: what `weir check` compiles with, and all that a policy needs that embeds nothing.
    pub fn unembedded(fleet: &'a Fleet) -> Self {
        Inputs { fleet, artifacts: BTreeMap::new(), examples: BTreeMap::new(), embedder: None }
    }

    /// The same with artifacts.
    pub fn with(self, artifacts: Artifacts) -> Self {
        Inputs { artifacts, ..self }
    }
}

/// What became known of a request after its decision.
#[derive(Clone, Debug)]
pub struct Observed {
    /// By name; the last value of each.
    pub feedback: BTreeMap<String, f64>,
    pub cost_usd: f64,
    /// Of all prompts and answers together.
    pub tokens: u64,
    /// Retries and fallback counted.
    pub calls: u32,
    /// Absent where the fleet does not say what its models take.
    pub joules: Option<f64>,
    pub latency_us: i64,
    pub ttft_us: Option<i64>,
    pub status: OutcomeStatus,
}

/// Something that can be run: a plan of the file, or a model of it as a plan.
#[derive(Debug)]
struct Target {
    name: String,
    /// Whether it is one of the file's `plans`.
    named: bool,
    /// With the file's names for models.
    plan: Plan,
    /// Per call, in the order of [`Plan::calls`], places in the fleet in name order: the call goes to the first that nothing
    /// eliminates.
    calls: Vec<Vec<usize>>,
}

/// Calls after an error.
#[derive(Debug)]
struct Fallback {
    on: Vec<ErrorKind>,
    /// Places in the targets.
    to: Vec<usize>,
    /// Of the failed call itself, before `to`.
    retries: Option<u32>,
    weights: Option<FailoverWeights>,
    /// Places in `to`: after which, which.
    edges: Vec<(Option<usize>, usize)>,
}

/// A gate whose threshold a calibration has found for a bound on what it may accept wrongly.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Guaranteed {
    /// Where the condition stands in the file.
    pub at: String,
    /// The score that is read, and its threshold.
    pub condition: String,
    pub calibration: Hash,
    #[serde(flatten)]
    pub guarantee: Guarantee,
}

/// A compiled policy: immutable, cheap to share.
#[derive(Debug)]
pub struct Policy {
    name: String,
    description: String,
    hash: Hash,
    version: PolicyVersion,
    warnings: Diagnostics,
    cards: Vec<ModelCard>,
    targets: Vec<Target>,
    rules: Vec<rules::Rule>,
    program: cel::Program,
    evaluator: cel::Evaluator,
    /// Names of the arms, and their places in the targets.
    arms: Vec<String>,
    arm_targets: Vec<usize>,
    selector: select::Selector,
    /// Per arm, the condition under which it may be taken.
    only_if: Vec<Option<cel::Condition>>,
    modifiers: select::modify::Modifiers,
    splits: Vec<split::Split>,
    shadows: Vec<String>,
    chunks: Option<ChunksSpec>,
    min_propensity: f64,
    no_embedding: Option<usize>,
    reward: Option<reward::Reward>,
    budgets: Vec<budget::Budget>,
    guarantees: Vec<Guaranteed>,
    fallback: Option<Fallback>,
    examples: BTreeMap<String, Vec<Arc<[f32]>>>,
    embedder: Option<Arc<EmbedderIdentity>>,
    example_sets: Vec<String>,
    tests: Vec<TestSpec>,
}

/// What a selector expects of arms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expects {
    /// The answer's quality, whatever it costs; of fitted selectors.
    Quality,
    /// The reward; of selectors that learn online.
    Reward,
}

impl Policy {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is for, in the author's words; may be empty.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Covers everything that compiling was handed: YAML, fleet, example vectors, embedder.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// All that it takes to compile this policy again.
    pub fn version(&self) -> PolicyVersion {
        self.version.clone()
    }

    /// The gates that keep a bound on what they may accept wrongly, and what their calibrations said.
    pub fn guarantees(&self) -> &[Guaranteed] {
        &self.guarantees
    }

    /// What is allowed but will surprise.
    pub fn warnings(&self) -> &Diagnostics {
        &self.warnings
    }

    /// Whether decisions look at the query's embedding, by the selector or by a rule.
    pub fn needs_embedding(&self) -> bool {
        self.selector.needs_embedding() || self.program.uses_similarity()
    }

    /// Whether it asks what of the prompt models have in memory.
    pub fn needs_residency(&self) -> bool {
        let prices_it = matches!(self.selector, select::Selector::Cheapest)
            && self.cards.iter().any(|card| card.price.cached_input.is_some());
        let bounds_it = self.budgets.iter().any(|budget| budget.first_token_us.is_some());
        self.program.uses_residency() || prices_it || bounds_it
    }

    /// Whether it cannot decide at all without an embedding, as its selector predicts from it.
    pub fn predicts(&self) -> bool {
        matches!(self.selector, select::Selector::Fitted(_))
    }

    /// Whether there are rules: without, nothing about the request bears on a pinned plan but what it needs.
    pub fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether the size or the signals of a prompt bear on a pinned plan all the same: on budgets, and on plans of several
    /// calls, whose models have to hold it and whose gates may ask about it.
    pub fn measures_pinned(&self) -> bool {
        !self.budgets.is_empty() || self.targets.iter().any(|target| !matches!(target.plan, Plan::Call(_)))
    }

    /// Whether rewards change later decisions.
    pub fn learns(&self) -> bool {
        self.learner().is_some()
    }

    /// Names that a client may pin: plans and models of the file.
    pub fn plan_names(&self) -> Vec<&str> {
        self.targets.iter().map(|t| t.name.as_str()).collect()
    }

    /// The selector's arms in order.
    pub fn arms(&self) -> Vec<&str> {
        self.arms.iter().map(String::as_str).collect()
    }

    /// Every model that a plan of this policy can call, by name.
    pub fn models(&self) -> std::collections::BTreeSet<&str> {
        self.targets
            .iter()
            .flat_map(|t| t.calls.iter().flatten())
            .filter_map(|m| Some(self.cards.get(*m)?.name.as_str()))
            .collect()
    }

    /// The model that an arm calls if nothing eliminates it; `None` for a plan of several calls.
    pub fn first_model(&self, arm: &str) -> Option<&str> {
        let at = self.arms.iter().position(|name| name == arm)?;
        let target = self.targets.get(*self.arm_targets.get(at)?)?;
        let model = target.calls.first()?.first().filter(|_| matches!(target.plan, Plan::Call(_)))?;
        Some(&self.cards.get(*model)?.name)
    }

    /// The first plan of several calls that a selector or a rule of this policy may take, by name.
    pub fn composed(&self) -> Option<&str> {
        let used = self.arm_targets.iter().copied().chain(self.rules.iter().filter_map(|rule| rule.use_));
        let mut targets = used.filter_map(|t| self.targets.get(t));
        targets.find(|t| !matches!(t.plan, Plan::Call(_))).map(|t| t.name.as_str())
    }

    /// An outcome as weir would have observed it: the score is the feedback that counts, and nothing took any time.
    pub fn outcome(&self, score: f64, cost_usd: f64) -> Observed {
        let feedback = self.awaits_feedback().map(|(name, _)| (name.to_owned(), score)).into_iter().collect();
        Observed {
            feedback,
            cost_usd,
            tokens: 0,
            calls: 1,
            joules: None,
            latency_us: 0,
            ttft_us: None,
            status: OutcomeStatus::Ok,
        }
    }

    /// Names of the example sets.
    pub fn example_sets(&self) -> &[String] {
        &self.example_sets
    }

    /// Names of the policies that decide beside it.
    pub fn shadows(&self) -> &[String] {
        &self.shadows
    }

    /// What it takes for documents where clients mark none.
    pub fn chunks(&self) -> Option<&ChunksSpec> {
        self.chunks.as_ref()
    }

    /// The cases of the file's `tests`.
    pub fn tests(&self) -> &[TestSpec] {
        &self.tests
    }

    /// Per example set, the greatest cosine of `embedding` to one of its texts; all vectors are of unit length.
    pub fn similarities(&self, embedding: &[f32]) -> BTreeMap<String, f64> {
        self.examples
            .iter()
            .map(|(name, vectors)| {
                let best = vectors.iter().map(|v| linalg::dot_f32(v, embedding)).fold(-1.0, f64::max);
                (name.clone(), best)
            })
            .collect()
    }

    /// The state before anything was learnt.
    pub fn initial_state(&self) -> State {
        match self.learner() {
            Some(linear) => State::initial(self.hash, linear),
            None => State::empty(self.hash, 0, state::Ridge { constant: 1.0, features: 1.0 }),
        }
    }

    /// What a learning selector sees of a request: the vector, whose first element is 1; `None` for a policy that does not
    /// learn.
    pub fn feature_vector(&self, context: &Context) -> Option<Vec<f64>> {
        Some(self.learner()?.features.vector(context))
    }

    /// Regularisation of a learning selector's feature `i`; 0 is the constant. `None` for a policy that does not learn.
    pub fn ridge(&self, i: usize) -> Option<f64> {
        Some(self.learner()?.ridge.of(i))
    }

    /// Names of a learning selector's features with their parameters.
    pub fn feature_names(&self) -> Vec<String> {
        self.learner().map(|linear| linear.features.names()).unwrap_or_default()
    }

    /// What a request was worth; `None` when nothing may be learnt from it (yet).
    pub fn reward(&self, observed: &Observed) -> Option<f64> {
        self.reward.as_ref()?.of(observed)
    }

    /// Whether another weighs what was observed as this one does, so that their rewards can be compared.
    pub fn rewards_like(&self, other: &Self) -> bool {
        self.reward == other.reward
    }

    /// The quality part of what was observed, 0 to 1 as a rule; `None` where no feedback counts as quality, or none came.
    pub fn quality(&self, observed: &Observed) -> Option<f64> {
        let (name, _) = self.awaits_feedback()?;
        observed.feedback.get(name).copied().filter(|_| observed.status == OutcomeStatus::Ok)
    }

    /// What the numbers of [`Policy::decide_expecting`] are expectations of; `None` for selectors that expect nothing.
    pub fn expects(&self) -> Option<Expects> {
        match self.selector {
            select::Selector::Fitted(_) => Some(Expects::Quality),
            select::Selector::Linear(_) => Some(Expects::Reward),
            _ => None,
        }
    }

    /// The feedback that counts as quality and how long it is waited for, in microseconds; `None` when rewards do not
    /// depend on feedback.
    pub fn awaits_feedback(&self) -> Option<(&str, Micros)> {
        let quality = self.reward.as_ref()?.quality.as_ref()?;
        Some((&quality.from, quality.wait))
    }

    /// A state that another version of this policy has learnt, as one of this version.
    ///
    /// # Errors
    /// When this policy does not learn, or sees requests otherwise.
    pub fn carry(&self, learnt: &State) -> Result<State, FoldError> {
        self.learner().ok_or(FoldError::DoesNotLearn)?;
        learnt.clone().carried(&self.initial_state())
    }

    /// Folds one update into the state; `update.seq` must be `state.seq + 1`.
    ///
    /// # Errors
    /// When the update cannot follow this state or does not belong to this policy; the state is unchanged then.
    pub fn fold(&self, state: &mut State, update: &StateUpdate) -> Result<(), FoldError> {
        let linear = self.learner().ok_or(FoldError::DoesNotLearn)?;
        if update.set.is_none() && !self.arms.contains(&update.arm) {
            return Err(FoldError::UnknownArm(update.arm.clone()));
        }
        state.fold(update, linear)
    }
}

#[cfg(test)]
mod tests;
