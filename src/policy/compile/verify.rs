//! `verify:` resolved: who is asked whether a stage's answer is right.

use super::{
    super::{diagnostic::DiagnosticKind as Kind, source::step, spec::StageSpec},
    Compiler,
    plans::Tree,
};
use crate::domain::{CallSpec, Condition, Plan, Score, Verified};

/// AutoMix (arXiv 2310.12963): how often the small model is asked.
const TIMES: u32 = 8;
/// Ours: room for one word and what stands around it.
const MAX_TOKENS: u32 = 16;

impl Compiler<'_> {
    /// A stage with the calls that verify its answer, where it has some; `None` where something is wrong.
    pub(super) fn verified(&mut self, at: &str, stage: &StageSpec, tree: Option<Tree>) -> Option<Tree> {
        let Some(spec) = &stage.verify else { return tree };
        let at = step(at, "verify");
        let times = spec.times.unwrap_or(TIMES);
        let mut sampling = spec.sampling();
        sampling.temperature.get_or_insert(if times > 1 { 1.0 } else { 0.0 });
        sampling.max_tokens.get_or_insert(MAX_TOKENS);
        if times > 1 && (sampling.temperature == Some(0.0) || sampling.seed.is_some()) {
            let message = format!("these {times} calls ask the same, and nothing makes what they say differ");
            let d = self.source.value(&step(&at, "times"), Kind::Conflict, message).warning();
            self.findings.push(d.help("give them a `temperature` above 0 and no `seed`, or one call"));
        }
        let system = spec.system.as_deref();
        let asked = match (&spec.call, tree.as_ref().map(|tree| &tree.plan)) {
            (Some(model), _) => self.leaf(&step(&at, "call"), model, sampling, system),
            (None, Some(Plan::Call(call) | Plan::Hedged { call, .. })) => {
                let model = call.model.clone();
                self.leaf(&at, &model, sampling, system)
            }
            (None, Some(_)) => {
                let message = "this stage is not one call, whose model could verify its own answer";
                self.wrong(&at, Kind::Conflict, message, Some("say which model does: `call: MODEL`".into()));
                None
            }
            (None, None) => None,
        };
        let (Tree { plan: Plan::Call(by), calls: places, .. }, mut tree) = (asked?, tree?) else { return None };
        let by = CallSpec { firm: true, ..by };
        let plan = Plan::Verified(Box::new(Verified { plan: tree.plan.clone(), by, times }));
        tree.calls.extend(places);
        tree.plan = plan;
        Some(tree)
    }

    /// Whether somebody asks for what the calls say.
    pub(super) fn asks_verified(&mut self, at: &str, stage: &StageSpec, conditions: &[Condition]) {
        if stage.verify.is_some() && !conditions.iter().any(|condition| condition.score == Score::Verified) {
            let message = "this stage's answer is verified, and no condition asks what came of it";
            let d = self.source.key(&step(at, "verify"), Kind::Conflict, message);
            self.findings.push(d.help("add `{score: verified, above: 0.6}` to `accept_when`, or remove it"));
        }
    }

    /// Whether there are calls that say `verified`.
    pub(super) fn is_verified(&mut self, at: &str, plan: &Plan) -> bool {
        let verified = matches!(plan, Plan::Verified(_));
        if !verified {
            let message = "nobody verifies this stage's answer";
            let help = "give the stage `verify: {times: 8}`, or with another model `verify: {call: MODEL, times: 8}`";
            self.wrong(&step(at, "score"), Kind::Conflict, message, Some(help.into()));
        }
        verified
    }
}
