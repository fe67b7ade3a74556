//! `plans:` resolved: names of models and of other plans, and what may stand beside which. A plan that names another
//! becomes one tree with it, so that all that is said of a tree holds of the whole.

use std::collections::BTreeMap;

use super::{
    super::{
        Target,
        diagnostic::{DiagnosticKind as Kind, suggest},
        source::step,
        spec::{AggregateName, AggregateSpec, AskSpec, BranchSpec, HedgeSpec, MadeAggregateSpec, Node, StageSpec},
    },
    Compiler,
};
use crate::domain::{Aggregate, CallSpec, Plan, Sampling, Stage};

/// Most cascades and parallel plans inside one another, and most plans by name on the way to a call.
const DEPTH: usize = 8;
/// Most calls of a plan.
pub(super) const CALLS: usize = 64;

/// A plan, resolved.
#[derive(Clone)]
pub(super) struct Tree {
    /// With the file's names for models.
    pub plan: Plan,
    /// Per call of the plan, places in the fleet.
    pub calls: Vec<Vec<usize>>,
    /// Cascades and parallel plans inside one another.
    depth: usize,
    /// Plans by name inside one another.
    names: usize,
}

/// Where resolving stands.
#[derive(Default)]
struct Named<'a> {
    /// What became of a plan; nothing, where something is wrong with it.
    done: BTreeMap<&'a str, Option<Tree>>,
    /// Plans that are being resolved, each named by the one before.
    open: Vec<&'a str>,
}

impl<'a> Compiler<'a> {
    pub(super) fn plans(&mut self) {
        let mut named = Named::default();
        for name in self.spec.plans.keys() {
            if self.spec.models.contains_key(name) {
                let at = step("/plans", name);
                let d = self.source.key(&at, Kind::Conflict, format!("`{name}` is a model already"));
                self.findings.push(d.help("every model is a plan of its own name; give this plan another"));
                continue;
            }
            if let Some(Tree { plan, calls, .. }) = self.named_plan(name, &mut named) {
                self.targets.push(Target { name: name.clone(), named: true, plan, calls });
            }
        }
    }

    fn named_plan(&mut self, name: &'a str, named: &mut Named<'a>) -> Option<Tree> {
        if let Some(done) = named.done.get(name) {
            return done.clone();
        }
        let spec = self.spec.plans.get(name)?;
        named.open.push(name);
        let tree = self.node(&step("/plans", name), spec.node(), 0, named);
        named.open.pop();
        named.done.insert(name, tree.clone());
        tree
    }

    /// `above`: cascades and parallel plans of the same named plan that the node is in.
    fn node(&mut self, at: &str, node: Node<'a>, above: usize, named: &mut Named<'a>) -> Option<Tree> {
        let kinds = [
            ("call", node.call.is_some()),
            ("cascade", node.cascade.is_some()),
            ("parallel", node.parallel.is_some()),
            ("steps", node.steps.is_some()),
            ("plan", node.plan.is_some()),
        ];
        let given: Vec<&str> = kinds.into_iter().filter(|(_, given)| *given).map(|(kind, _)| kind).collect();
        if given.len() != 1 {
            let message = match given.len() {
                0 => "this says nothing to run".to_owned(),
                _ => format!("this is several plans: `{}`", given.join("`, `")),
            };
            let help = "give exactly one of `call`, `cascade`, `parallel`, `steps` and `plan`";
            self.wrong(at, Kind::Conflict, message, Some(help.into()));
        } else {
            self.beside(at, &node, given[0]);
        }
        if above >= DEPTH && (node.cascade.is_some() || node.parallel.is_some()) {
            self.too_deep(at);
            return None;
        }
        let call = node.call.and_then(|model| self.leaf(&step(at, "call"), model, node.sampling, node.system));
        let call = match node.hedge.filter(|_| node.call.is_some()) {
            Some(hedge) => self.hedged(&step(at, "hedge"), call, hedge),
            None => call,
        };
        let cascade = node.cascade.and_then(|stages| self.cascade(at, stages, above, named));
        let parallel = node.parallel.and_then(|branches| self.parallel(at, branches, node.aggregate, above, named));
        let steps = node.steps.and_then(|spec| self.steps(at, spec));
        let plan = node.plan.and_then(|name| self.by_name(&step(at, "plan"), name, above, named));
        call.or(cascade).or(parallel).or(steps).or(plan).filter(|_| given.len() == 1)
    }

    /// Keys that mean nothing beside this kind of node.
    fn beside(&mut self, at: &str, node: &Node<'_>, kind: &str) {
        for key in node.settings.iter().filter(|_| kind != "call") {
            let message = format!("`{key}` is of a call, and this is none");
            let help = match kind {
                "plan" => "put it beside the `call` of the plan that is named".to_owned(),
                "steps" => "`small`, `large` and `answer` can each be a `{call: MODEL}` with what it sets".to_owned(),
                _ => format!("put it beside each `call` of the `{kind}`"),
            };
            self.findings.push(self.source.key(&step(at, key), Kind::Conflict, message).help(help));
        }
        match (node.aggregate, kind) {
            (None, "parallel") => {
                let help =
                    "e.g. `aggregate: vote`; or `first`, `{weighted_vote: [..]}`, `{judge: MODEL}`, `{refine: MODEL}`";
                let message = "`parallel` needs `aggregate`: how its branches become one answer";
                self.wrong(at, Kind::Conflict, message, Some(help.into()));
            }
            (Some(_), kind) if kind != "parallel" => {
                let message = "`aggregate` is of `parallel`, and there is none here";
                let d = self.source.key(&step(at, "aggregate"), Kind::Conflict, message);
                self.findings.push(d.help("remove it"));
            }
            _ => {}
        }
    }

    fn too_deep(&mut self, at: &str) {
        let message = format!("this is the {}th cascade or parallel plan inside others", DEPTH + 1);
        self.wrong(at, Kind::Value, message, Some(format!("at most {DEPTH} inside one another")));
    }

    pub(super) fn leaf(&mut self, at: &str, model: &str, sampling: Sampling, system: Option<&str>) -> Option<Tree> {
        let Some(places) = self.models.get(model).cloned() else {
            let help = match self.spec.plans.contains_key(model) {
                true => Some(format!("`{model}` is a plan, which is run by `plan: {model}`")),
                false => suggest("models", model, self.spec.models.keys().map(String::as_str)),
            };
            self.wrong(at, Kind::UnknownName, format!("there is no model `{model}`"), help);
            return None;
        };
        let call = CallSpec { sampling, system: system.map(str::to_owned), ..CallSpec::bare(model) };
        Some(Tree { plan: Plan::Call(call), calls: vec![places], depth: 0, names: 0 })
    }

    /// A call with a second one beside it, which sets the same.
    fn hedged(&mut self, at: &str, tree: Option<Tree>, spec: &HedgeSpec) -> Option<Tree> {
        let other = match &spec.call {
            Some(model) => Some(self.leaf(&step(at, "call"), model, Sampling::default(), None)?),
            None => None,
        };
        let Tree { plan: Plan::Call(call), mut calls, depth, names } = tree? else { return None };
        let hedge = match other {
            Some(Tree { plan: Plan::Call(other), calls: places, .. }) => {
                calls.extend(places);
                CallSpec { model: other.model, ..call.clone() }
            }
            _ => {
                calls.extend(calls.first().cloned());
                call.clone()
            }
        };
        Some(Tree { plan: Plan::Hedged { call, hedge, after_ms: spec.after_ms }, calls, depth, names })
    }

    fn by_name(&mut self, at: &str, name: &'a str, above: usize, named: &mut Named<'a>) -> Option<Tree> {
        if let Some(first) = named.open.iter().position(|open| *open == name) {
            let way: Vec<String> = named.open[first..].iter().chain([&name]).map(|n| format!("`{n}`")).collect();
            let message = format!("this leads back to where it came from: {}", way.join(" -> "));
            self.wrong(at, Kind::Conflict, message, Some("a plan cannot be a part of itself".into()));
            return None;
        }
        if !self.spec.plans.contains_key(name) {
            let help = match self.spec.models.contains_key(name) {
                true => Some(format!("`{name}` is a model, which is called by `call: {name}`")),
                false => suggest("plans", name, self.spec.plans.keys().map(String::as_str)),
            };
            self.wrong(at, Kind::UnknownName, format!("there is no plan `{name}`"), help);
            return None;
        }
        let tree = match named.open.len() > DEPTH {
            true => None,
            false => Some(self.named_plan(name, named)?),
        };
        let Some(tree) = tree.filter(|tree| tree.names < DEPTH) else {
            let message = format!("this is the {}th plan by name inside others", DEPTH + 1);
            self.wrong(at, Kind::Value, message, Some(format!("at most {DEPTH} inside one another")));
            return None;
        };
        if above + tree.depth > DEPTH {
            self.too_deep(at);
            return None;
        }
        Some(Tree { names: tree.names + 1, ..tree })
    }

    fn cascade(&mut self, at: &str, stages: &'a [StageSpec], above: usize, named: &mut Named<'a>) -> Option<Tree> {
        let list = step(at, "cascade");
        let mut whole = Some((Vec::new(), Parts::default()));
        for (i, spec) in stages.iter().enumerate() {
            let at = step(&list, &i.to_string());
            let tree = self.node(&at, spec.node(), above + 1, named);
            let tree = self.verified(&at, spec, tree);
            let accept_when = self.accept_when(&at, spec, i + 1 == stages.len(), tree.as_ref());
            match (tree, accept_when) {
                (Some(tree), Some(accept_when)) => {
                    self.asks_verified(&at, spec, &accept_when);
                    if let Some((stages, parts)) = &mut whole {
                        stages.push(Stage { plan: parts.take(&tree), accept_when, stop_early: spec.stop_early });
                    }
                }
                _ => whole = None,
            }
        }
        if stages.len() == 1 {
            let d = self.source.key(&list, Kind::Conflict, "a cascade of one stage is that stage").warning();
            self.findings.push(d.help("add a stage to escalate to, or write the stage in the cascade's place"));
        }
        let (stages, parts) = whole?;
        let plan = Plan::Cascade(stages);
        self.few_enough(at, plan.most_calls() as usize)?;
        Some(parts.tree(plan))
    }

    fn parallel(
        &mut self,
        at: &str,
        specs: &'a [BranchSpec],
        aggregate: Option<&'a AggregateSpec>,
        above: usize,
        named: &mut Named<'a>,
    ) -> Option<Tree> {
        let list = step(at, "parallel");
        let mut branches = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            let at = step(&list, &i.to_string());
            let times = spec.times.unwrap_or(1) as usize;
            let tree = self.node(&at, spec.node(), above + 1, named).map(probe);
            if times > 1 && tree.as_ref().is_some_and(|tree| !tree.plan.calls().into_iter().any(varies)) {
                let message =
                    format!("these {times} branches make the same calls, and nothing makes their answers differ");
                let d = self.source.value(&step(&at, "times"), Kind::Conflict, message).warning();
                self.findings.push(d.help("give the calls a `temperature` above 0, and no `seed`"));
            }
            branches.push((tree, times));
        }
        let count: usize = branches.iter().map(|(_, times)| times).sum();
        if count == 1 {
            let d = self.source.key(&list, Kind::Conflict, "a parallel plan of one branch is that branch").warning();
            self.findings.push(d.help("add a branch, or `times`; or write the branch in the plan's place"));
        }
        let counts: Vec<usize> = branches.iter().map(|(_, times)| *times).collect();
        let (aggregate, asked) = self.aggregate(&step(at, "aggregate"), aggregate?, &counts)?;
        let branches: Vec<(Tree, usize)> =
            branches.into_iter().map(|(tree, times)| Some((tree?, times))).collect::<Option<_>>()?;
        let calls: usize = branches.iter().map(|(tree, times)| tree.plan.most_calls() as usize * times).sum();
        self.few_enough(at, calls + usize::from(asked.is_some()))?;
        let (mut plans, mut parts) = (Vec::new(), Parts::default());
        for (tree, times) in branches {
            plans.extend((0..times).map(|_| parts.take(&tree)));
        }
        parts.calls.extend(asked);
        Some(parts.tree(Plan::Parallel { branches: plans, aggregate }))
    }

    fn few_enough(&mut self, at: &str, calls: usize) -> Option<()> {
        if calls > CALLS {
            let message = format!("this plan can make {calls} calls");
            self.wrong(at, Kind::Value, message, Some(format!("at most {CALLS} in all")));
            return None;
        }
        Some(())
    }

    /// How branches become one answer, and where its call can go. `counts`: how many branches each entry of the list is.
    fn aggregate(
        &mut self,
        at: &str,
        spec: &'a AggregateSpec,
        counts: &[usize],
    ) -> Option<(Aggregate, Option<Vec<usize>>)> {
        let made = match spec {
            AggregateSpec::Named(AggregateName::First) => return Some((Aggregate::First, None)),
            AggregateSpec::Named(AggregateName::Vote) => return Some((Aggregate::Vote, None)),
            AggregateSpec::Made(made) => made,
        };
        match &**made {
            MadeAggregateSpec { weighted_vote: Some(weights), judge: None, refine: None } => {
                let weights = self.weighted(&step(at, "weighted_vote"), weights, counts)?;
                Some((Aggregate::WeightedVote { weights }, None))
            }
            MadeAggregateSpec { weighted_vote: None, judge: Some(ask), refine: None } => {
                let (call, places) = self.ask(&step(at, "judge"), ask)?;
                Some((Aggregate::Judge { call }, Some(places)))
            }
            MadeAggregateSpec { weighted_vote: None, judge: None, refine: Some(ask) } => {
                let (call, places) = self.ask(&step(at, "refine"), ask)?;
                Some((Aggregate::Refine { call }, Some(places)))
            }
            _ => {
                let help = "exactly one of `weighted_vote`, `judge` and `refine`; or the words `first` and `vote`";
                self.wrong(at, Kind::Conflict, "this is not one way to make one answer", Some(help.into()));
                None
            }
        }
    }

    /// A weight per branch, from one per entry.
    fn weighted(&mut self, at: &str, weights: &[f64], counts: &[usize]) -> Option<Vec<f64>> {
        let before = self.findings.len();
        if weights.len() != counts.len() {
            let (weights, entries) = (counted(weights.len(), "weight"), counted(counts.len(), "entry"));
            let help = "one weight per entry of `parallel`; each of an entry's `times` branches has it";
            self.wrong(at, Kind::Conflict, format!("{weights} for {entries} of `parallel`"), Some(help.into()));
        }
        for (i, weight) in weights.iter().enumerate().filter(|(_, w)| !(w.is_finite() && **w >= 0.0)) {
            let message = format!("a weight is at least 0; this is {weight}");
            self.wrong(&step(at, &i.to_string()), Kind::Value, message, None);
        }
        if weights.iter().all(|w| *w == 0.0) {
            self.wrong(at, Kind::Value, "no branch has a weight above 0", Some("give at least one".into()));
        }
        let each = weights.iter().zip(counts).flat_map(|(weight, count)| std::iter::repeat_n(*weight, *count));
        (self.findings.len() == before).then(|| each.collect())
    }

    pub(super) fn ask(&mut self, at: &str, spec: &AskSpec) -> Option<(CallSpec, Vec<usize>)> {
        let tree = match spec {
            AskSpec::Model(model) => self.leaf(at, model, Sampling::default(), None),
            AskSpec::Call(call) => match &call.call {
                Some(model) => self.leaf(&step(at, "call"), model, call.sampling(), call.system.as_deref()),
                None => {
                    let message = "this names no model to call";
                    self.wrong(at, Kind::Conflict, message, Some("give `call: MODEL`".into()));
                    None
                }
            },
        }?;
        match (tree.plan, tree.calls.into_iter().next()) {
            (Plan::Call(call), Some(places)) => Some((call, places)),
            _ => None,
        }
    }
}

/// What the children of a node have beside their plans, put together.
#[derive(Default)]
pub(super) struct Parts {
    pub calls: Vec<Vec<usize>>,
    depth: usize,
    names: usize,
}

impl Parts {
    /// Takes in a child, whose plan is returned.
    fn take(&mut self, tree: &Tree) -> Plan {
        self.calls.extend(tree.calls.iter().cloned());
        self.depth = self.depth.max(tree.depth);
        self.names = self.names.max(tree.names);
        tree.plan.clone()
    }

    pub fn tree(self, plan: Plan) -> Tree {
        Tree { plan, calls: self.calls, depth: self.depth + 1, names: self.names }
    }
}

/// A branch: what its calls set is what makes its answer another than the other branches', so clients do not undo it.
fn probe(mut tree: Tree) -> Tree {
    for call in tree.plan.calls_mut() {
        call.firm |= call.sampling != Sampling::default();
    }
    tree
}

/// Whether the call's answer may be another when it is made again.
fn varies(call: &CallSpec) -> bool {
    call.sampling.temperature.is_some_and(|t| t > 0.0) && call.sampling.seed.is_none()
}

fn counted(n: usize, what: &str) -> String {
    match (n, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{n} {stem}ies"),
        (_, None) => format!("{n} {what}s"),
    }
}
