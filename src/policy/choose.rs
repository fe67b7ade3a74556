//! Which entries of the fleet the calls of a plan go to, or why the plan is out.
//!
//! Each call goes to the first entry of its model that nothing eliminates. Restrictions, capabilities and context
//! length bind every call that a plan can make, a judge's included: one call without an entry takes the plan out. Budgets take
//! it out where not even its beginning is within them; later calls are masked as it runs. A model
//! that is down does so only where the plan could not answer without it: a cascade answers while one of its stages can, a
//! parallel plan while its quorum can. Calls of models that are down stay where they are; the machine goes around them.

use super::{Policy, Target, reckon::Tokens};
use crate::domain::{Aggregate, CallSpec, Context, Elimination, Plan, Score};

/// What a target's calls go to: places in the fleet.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Chosen {
    /// Of a plan of one call.
    Call(usize),
    /// Of any other, per call in the order of [`Plan::calls`].
    Tree(Vec<usize>),
}

/// Why a target is out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Out {
    pub reason: Elimination,
    /// Of a plan of several calls, the entry that is why, where one alone is.
    pub model: Option<usize>,
}

impl From<Elimination> for Out {
    fn from(reason: Elimination) -> Self {
        Self { reason, model: None }
    }
}

impl Policy {
    /// What the target's calls go to, else why it is out: of one call, why its first entry is.
    pub(super) fn available(&self, target: &Target, restricting: &[usize], context: &Context) -> Result<Chosen, Out> {
        let Plan::Call(call) = &target.plan else {
            return self.available_tree(target, restricting, context, true).map(Chosen::Tree);
        };
        let mut first = None;
        for &model in target.calls.iter().flatten() {
            match self.eliminated(model, call.sampling.max_tokens, restricting, context) {
                None => return Ok(Chosen::Call(model)),
                Some(reason) => first = first.or(Some(reason)),
            }
        }
        Err(first.unwrap_or_else(|| Elimination::Unavailable(target.name.clone())).into())
    }

    /// [`Policy::available`] of a plan of several calls; without `budgets`, whatever it may cost.
    pub(super) fn available_tree(
        &self,
        target: &Target,
        restricting: &[usize],
        context: &Context,
        budgets: bool,
    ) -> Result<Vec<usize>, Out> {
        let mut walk = Walk { policy: self, target, restricting, context, budgets, chosen: Vec::new(), down: None };
        let whole = walk.node(&target.plan)?;
        let Walk { chosen, down, .. } = walk;
        if !whole.answers {
            let name = down.map_or(&target.name, |model| &self.cards[model].name);
            return Err(Out { reason: Elimination::Unavailable(name.clone()), model: down });
        }
        match self.plan_over_budget(target, &chosen, context).filter(|_| budgets) {
            Some(reason) => Err(reason.into()),
            None => Ok(chosen),
        }
    }

    /// The plan that a target's calls make up, with the fleet's names; gates that ask about the prompt are told of it.
    pub(super) fn plan(&self, target: &Target, chosen: &Chosen, context: &Context) -> Plan {
        match (&target.plan, chosen) {
            (Plan::Call(call), Chosen::Call(model)) => Plan::Call(self.call(call, *model)),
            (tree, Chosen::Tree(models)) => {
                let mut plan = tree.clone();
                for (call, model) in plan.calls_mut().into_iter().zip(models) {
                    call.model.clone_from(&self.cards[*model].name);
                }
                for condition in plan.conditions_mut() {
                    if let Score::Learned(scorer) = &mut condition.score {
                        *scorer = scorer.told(&context.signals);
                    }
                }
                plan
            }
            // What was chosen was chosen for this target.
            (tree, Chosen::Call(_)) => tree.clone(),
        }
    }

    pub(super) fn call(&self, call: &CallSpec, model: usize) -> CallSpec {
        CallSpec {
            model: self.cards[model].name.clone(),
            sampling: call.sampling.clone(),
            system: call.system.clone(),
            firm: call.firm,
            worst: None,
        }
    }

    /// Why a call of at most `limit` answer tokens may not go to an entry.
    pub(super) fn eliminated(
        &self,
        model: usize,
        limit: Option<u32>,
        restricting: &[usize],
        context: &Context,
    ) -> Option<Elimination> {
        self.barred(model, limit, 0, restricting, context)
            .or_else(|| self.is_down(model, context).then(|| Elimination::Unavailable(self.cards[model].name.clone())))
            .or_else(|| self.over_budget(model, limit, context))
    }

    /// The same, but for its being up and for budgets. `shown`: tokens of other answers in the prompt.
    fn barred(
        &self,
        model: usize,
        limit: Option<u32>,
        shown: u64,
        restricting: &[usize],
        context: &Context,
    ) -> Option<Elimination> {
        if let Some(n) = restricting.iter().find(|n| self.rules[**n].forbids(model)) {
            return Some(Elimination::Restriction(self.rules[*n].name.clone()));
        }
        let card = &self.cards[model];
        if let Some(need) = context.request.needs.iter().find(|need| !card.capabilities.has(**need)) {
            return Some(Elimination::Capability(need.as_str().to_owned()));
        }
        let answer = bound(limit, context);
        let prompt = u64::from(context.signals.tokens) + shown;
        if card.context > 0 && prompt + u64::from(answer) > u64::from(card.context) {
            return Some(Elimination::Context(format!(
                "{}: {prompt} prompt and {answer} answer tokens, {} at most",
                card.name, card.context
            )));
        }
        None
    }

    fn is_down(&self, model: usize, context: &Context) -> bool {
        context.fleet.get(&self.cards[model].name).is_some_and(|state| !state.available)
    }
}

/// Tokens of an answer, as far as they are bounded: 0 where neither the client nor the plan says.
fn bound(limit: Option<u32>, context: &Context) -> u32 {
    Tokens { unbounded: 0, ..Tokens::of(context) }.answer(limit)
}

/// A walk over the calls of a plan, in order.
struct Walk<'a> {
    policy: &'a Policy,
    target: &'a Target,
    restricting: &'a [usize],
    context: &'a Context,
    budgets: bool,
    /// One entry per call so far.
    chosen: Vec<usize>,
    /// The first entry that is down.
    down: Option<usize>,
}

/// What is known of a node.
struct Visited {
    /// Whether it can answer, as far as models are up.
    answers: bool,
    /// Tokens of its answer, as far as they are bounded.
    tokens: u64,
}

impl Walk<'_> {
    fn node(&mut self, plan: &Plan) -> Result<Visited, Out> {
        match plan {
            Plan::Call(call) => self.leaf(call, 0),
            Plan::Hedged { call, hedge, .. } => {
                let (call, hedge) = (self.leaf(call, 0)?, self.leaf(hedge, 0)?);
                Ok(Visited { answers: call.answers || hedge.answers, tokens: call.tokens.max(hedge.tokens) })
            }
            Plan::Cascade(stages) => {
                let mut whole = Visited { answers: false, tokens: 0 };
                for stage in stages {
                    let stage = self.node(&stage.plan)?;
                    whole.answers |= stage.answers;
                    whole.tokens = whole.tokens.max(stage.tokens);
                }
                Ok(whole)
            }
            Plan::Parallel { branches, aggregate } => {
                let (mut answering, mut shown, mut tokens) = (0, 0, 0);
                for branch in branches {
                    let branch = self.node(branch)?;
                    answering += usize::from(branch.answers);
                    shown += branch.tokens;
                    tokens = tokens.max(branch.tokens);
                }
                // Where it is down, the branches' vote stands in for it.
                if let Some(call) = aggregate.call() {
                    let asked = self.leaf(call, shown)?;
                    if matches!(aggregate, Aggregate::Refine { .. }) {
                        tokens = tokens.max(asked.tokens);
                    }
                }
                Ok(Visited { answers: answering >= aggregate.quorum(branches.len()), tokens })
            }
            // One model can write all steps where the other is down; without who answers there is no answer.
            Plan::Steps(steps) => {
                let shown = u64::from(steps.max_tokens);
                let small = self.leaf(&steps.small, shown)?;
                let large = self.leaf(&steps.large, shown)?;
                let answer = self.leaf(&steps.answer, shown)?;
                Ok(Visited { answers: answer.answers && (small.answers || large.answers), tokens: answer.tokens })
            }
            // Where who verifies is down, the answer is not verified.
            Plan::Verified(verified) => {
                let answer = self.node(&verified.plan)?;
                self.leaf(&verified.by, answer.tokens)?;
                Ok(answer)
            }
        }
    }

    fn leaf(&mut self, call: &CallSpec, shown: u64) -> Result<Visited, Out> {
        let Self { policy, restricting, context, .. } = *self;
        let limit = call.sampling.max_tokens;
        let tokens = u64::from(bound(limit, context));
        let entries = self.target.calls.get(self.chosen.len()).map(Vec::as_slice).unwrap_or_default();
        let (mut first, mut down, mut dear) = (None, None, None);
        for &model in entries {
            match policy.barred(model, limit, shown, restricting, context) {
                Some(reason) => first = first.or(Some(Out { reason, model: Some(model) })),
                None if policy.is_down(model, context) => down = down.or(Some(model)),
                // Where the budget has an end, the machine goes around the call.
                None if self.budgets && policy.over_budget(model, limit, context).is_some() => {
                    dear = dear.or(Some(model));
                }
                None => {
                    self.chosen.push(model);
                    return Ok(Visited { answers: true, tokens });
                }
            }
        }
        if let Some(model) = dear {
            self.chosen.push(model);
            return Ok(Visited { answers: true, tokens });
        }
        let Some(model) = down else {
            return Err(first.unwrap_or_else(|| Elimination::Unavailable(call.model.clone()).into()));
        };
        self.down = self.down.or(Some(model));
        self.chosen.push(model);
        Ok(Visited { answers: false, tokens })
    }
}
