//! `decide(policy, state, context)`: total and pure. Rules, then the selector's probabilities, masks, renormalisation,
//! the floor, and one draw from exactly the vector that is recorded.

use super::{
    Fallback, Policy, Target,
    choose::{Chosen, Out},
    draw::{self, Purpose},
    reckon::{Shown, Tokens},
    rules::Ruling,
    select::{Offer, Selector, Situation, Weighed, linear::Linear},
    split,
    state::State,
};
use crate::domain::{
    CallSpec, Candidate, Context, DecidedBy, Decision, Edge, Elimination, FailoverGraph, Health, ModelState, Plan,
    RuleOutcome,
};

impl Policy {
    /// Decides. A refusal is a decision without a plan.
    pub fn decide(&self, state: &State, context: &Context) -> Decision {
        self.decide_expecting(state, context).0
    }

    /// Decides; and by candidate what the selector expects the arm to earn, in [`Policy::expects`]' sense. Empty where it
    /// expects nothing.
    pub fn decide_expecting(&self, state: &State, context: &Context) -> (Decision, Vec<f64>) {
        let ruling = self.rule(context, false);
        if let Some(n) = ruling.used
            && let Some(target) = self.rules[n].use_
            && let Ok(chosen) = self.available(&self.targets[target], &ruling.restricting, context)
        {
            let target = &self.targets[target];
            let mut decision = self.blank(state, DecidedBy::Rule);
            decision.rule = Some(self.rules[n].name.clone());
            self.take(&mut decision, target, &chosen, &ruling, context, true);
            decision.propensity = 1.0;
            decision.rules = ruling.trace;
            return (decision, Vec::new());
        }
        self.select(state, context, ruling)
    }

    /// The client named a plan of this policy, one of its models, or a fleet entry. The rules' restrictions bind; their
    /// `use` does not. What the client named is what it gets: of the fallback, only the retries apply. `None` when
    /// nothing has that name.
    pub fn pin(&self, target: &str, state: &State, context: &Context) -> Option<Decision> {
        let bare;
        let target = match self.targets.iter().find(|t| t.name == target) {
            Some(target) => target,
            None => {
                let model = self.cards.iter().position(|card| card.name == target)?;
                let plan = Plan::Call(CallSpec::bare(target));
                bare = Target { name: target.to_owned(), named: false, plan, calls: vec![vec![model]] };
                &bare
            }
        };
        let ruling = self.rule(context, true);
        let mut decision = self.blank(state, DecidedBy::Pinned);
        match self.available(target, &ruling.restricting, context) {
            Ok(chosen) => {
                self.take(&mut decision, target, &chosen, &ruling, context, false);
                decision.propensity = 1.0;
            }
            Err(out) => {
                // Still pinned, and the name kept: without it the decision could not be derived again.
                decision.arm = target.name.clone();
                if let Elimination::Restriction(rule) = &out.reason {
                    decision.rule = Some(rule.clone());
                }
                let model = self.named(&out);
                let why = because(&out.reason, model.as_deref());
                decision.refusal = Some(format!("`{}` was asked for by name, but {why}", target.name));
                decision.candidates = vec![Candidate {
                    arm: target.name.clone(),
                    score: None,
                    propensity: 0.0,
                    eliminated: Some(out.reason),
                    model,
                }];
            }
        }
        decision.rules = ruling.trace;
        Some(decision)
    }

    fn blank(&self, state: &State, decided_by: DecidedBy) -> Decision {
        Decision {
            policy: self.name.clone(),
            policy_hash: self.hash,
            state_seq: state.seq,
            decided_by,
            rule: None,
            arm: String::new(),
            plan: None,
            fallback: Vec::new(),
            retries: None,
            fallback_on: Vec::new(),
            propensity: 0.0,
            candidates: Vec::new(),
            features: Vec::new(),
            rules: Vec::new(),
            refusal: None,
            no_embedding: None,
            split: None,
            bounds: None,
            failover: None,
        }
    }

    /// The model that is why a plan of several calls is out.
    fn named(&self, out: &Out) -> Option<String> {
        Some(self.cards.get(out.model?)?.name.clone())
    }

    fn take(
        &self,
        decision: &mut Decision,
        target: &Target,
        chosen: &Chosen,
        ruling: &Ruling,
        context: &Context,
        others: bool,
    ) {
        let mut plan = self.plan(target, chosen, context);
        decision.arm = target.name.clone();
        if let Some(fallback) = &self.fallback {
            decision.fallback_on = fallback.on.iter().map(|kind| kind.as_str().to_owned()).collect();
            decision.retries = fallback.retries;
            // Of each call of the decision's fallback, its place in the policy's.
            let mut places = Vec::new();
            for (place, target) in fallback.to.iter().map(|t| &self.targets[*t]).enumerate().filter(|_| others) {
                if let Plan::Call(call) = &target.plan
                    && let Ok(Chosen::Call(model)) = self.available(target, &ruling.restricting, context)
                {
                    let next = self.call(call, model);
                    let planned = matches!(&plan, Plan::Call(call) if *call == next);
                    if !planned && !decision.fallback.contains(&next) {
                        decision.fallback.push(next);
                        places.push((place, model));
                    }
                }
            }
            decision.failover = self.graph(fallback, &decision.fallback, &places, context);
        }
        if !self.budgets.is_empty() {
            decision.bounds = self.request_bounds(&mut plan, &mut decision.fallback, context);
        }
        decision.plan = Some(plan);
    }

    /// The graph in which the next of these calls is sought; `places`: of each, its place in the policy's fallback and in the
    /// fleet. What cannot be called is not in it: who follows that follows the planned call.
    fn graph(
        &self,
        fallback: &Fallback,
        calls: &[CallSpec],
        places: &[(usize, usize)],
        context: &Context,
    ) -> Option<Box<FailoverGraph>> {
        let weights = fallback.weights.filter(|_| !calls.is_empty())?;
        let tokens = Tokens::of(context);
        let health = |(call, (_, model)): (&CallSpec, &(usize, usize))| {
            let card = &self.cards[*model];
            let idle = ModelState::default();
            let state = context.fleet.get(&card.name).unwrap_or(&idle);
            Health {
                cost_usd: tokens.cost(&card.price, call.sampling.max_tokens, Shown::REQUEST),
                latency_us: (state.ttft_ms * 1000.0 * (1.0 + f64::from(state.waiting))) as i64,
                reliability: 1.0 - state.failed_share,
                remaining: (state.limit_used > 0.0).then_some(1.0 - state.limit_used),
                ..Health::default()
            }
        };
        let name = |place: usize| places.iter().position(|(p, _)| *p == place).map(|at| calls[at].model.clone());
        let edge = |(after, to): &(Option<usize>, usize)| Some(Edge { after: after.and_then(name), to: name(*to)? });
        Some(Box::new(FailoverGraph {
            weights,
            edges: fallback.edges.iter().filter_map(edge).collect(),
            health: calls.iter().zip(places).map(health).collect(),
        }))
    }

    fn select(&self, state: &State, context: &Context, ruling: Ruling) -> (Decision, Vec<f64>) {
        let mut decision = self.blank(state, DecidedBy::Select);
        let stands = self.stands(&ruling, context);
        let alive: Vec<bool> = stands.iter().map(Result::is_ok).collect();
        decision.no_embedding = self.missing_embedding(context);
        let weighed = match (&decision.no_embedding, self.no_embedding) {
            (Some(_), arm) => {
                let mass = (0..alive.len()).map(|i| if Some(i) == arm && alive[i] { 1.0 } else { 0.0 }).collect();
                Weighed { mass, scores: vec![None; alive.len()], ..Weighed::default() }
            }
            (None, _) => {
                let pairs = stands.iter().zip(&self.arm_targets);
                let offers: Vec<Option<Offer<'_>>> =
                    pairs.map(|(stand, t)| self.offer(&self.targets[*t], stand.as_ref().ok()?)).collect();
                let arms = &self.arms;
                self.selector.weigh(&Situation { arms, alive: &alive, offers: &offers, state, context })
            }
        };
        let mut probabilities = weighed.mass;
        normalise(&mut probabilities, &alive);
        if decision.no_embedding.is_none() && alive.contains(&true) {
            self.modifiers.apply(&self.arms, &alive, &weighed.scores, context, &mut probabilities);
        }
        let splits = split::usable(&self.splits, &alive);
        // So that the floor holds for what is recorded, too.
        floored(&mut probabilities, &alive, self.min_propensity / split::rest(&splits));
        let taken = split::taken(&splits, context);
        let drawn = match taken {
            Some(split) => Some(split.arm),
            None => draw::pick(&probabilities, draw::unit(context.seed, Purpose::Arm as u32, 0)),
        };
        let probabilities = if splits.is_empty() { probabilities } else { split::marginal(&splits, &probabilities) };
        decision.split = taken.map(|split| split.name.clone());
        decision.features = weighed.features;
        match drawn.and_then(|i| Some((i, stands.get(i)?.as_ref().ok()?))) {
            Some((i, chosen)) => {
                self.take(&mut decision, &self.targets[self.arm_targets[i]], chosen, &ruling, context, true);
                decision.propensity = probabilities[i];
            }
            None => {
                decision.decided_by = DecidedBy::Refused;
                decision.features = Vec::new();
                let reasons: Vec<String> = self
                    .arms
                    .iter()
                    .zip(&stands)
                    .filter_map(|(arm, s)| {
                        let out = s.as_ref().err()?;
                        Some(format!("{arm}: {}", because(&out.reason, self.named(out).as_deref())))
                    })
                    .collect();
                decision.refusal = Some(format!("no arm can serve this request ({})", reasons.join("; ")));
                let restriction = stands.iter().find_map(|s| match s {
                    Err(Out { reason: Elimination::Restriction(rule), .. }) => Some(rule.clone()),
                    _ => None,
                });
                decision.rule = restriction;
            }
        }
        decision.candidates = self
            .arms
            .iter()
            .zip(stands)
            .zip(weighed.scores.iter().zip(&probabilities))
            .map(|((arm, stand), (score, propensity))| Candidate {
                arm: arm.clone(),
                score: *score,
                propensity: *propensity,
                model: stand.as_ref().err().and_then(|out| self.named(out)),
                eliminated: stand.err().map(|out| out.reason),
            })
            .collect();
        decision.rules = ruling.trace;
        (decision, weighed.expected)
    }

    /// Per arm, what it would call, or why it is out.
    fn stands(&self, ruling: &Ruling, context: &Context) -> Vec<Result<Chosen, Out>> {
        let mut stands: Vec<_> =
            self.arm_targets.iter().map(|t| self.available(&self.targets[*t], &ruling.restricting, context)).collect();
        if self.only_if.iter().any(Option::is_some) {
            self.evaluator.with(&self.program, context, |eval| {
                for (stand, condition) in stands.iter_mut().zip(&self.only_if) {
                    let Some(condition) = condition.as_ref().filter(|_| stand.is_ok()) else { continue };
                    let why = match eval(condition) {
                        Ok(true) => continue,
                        Ok(false) => "its condition does not hold".to_owned(),
                        Err(error) => format!("its condition failed: {error}"),
                    };
                    *stand = Err(Elimination::Condition(why).into());
                }
            });
        }
        if let Some((arm, chosen)) = self.cheapest_when_spent(&stands, &ruling.restricting, context) {
            stands[arm] = Ok(chosen);
        }
        stands
    }

    /// A target as the selector sees it.
    pub(super) fn offer<'a>(&'a self, target: &'a Target, chosen: &'a Chosen) -> Option<Offer<'a>> {
        match (&target.plan, chosen) {
            (Plan::Call(call), Chosen::Call(model)) => {
                Some(Offer::Call { card: self.cards.get(*model)?, max_tokens: call.sampling.max_tokens })
            }
            (plan, Chosen::Tree(models)) => Some(Offer::Tree { plan, models, cards: &self.cards }),
            (_, Chosen::Call(_)) => None,
        }
    }

    /// Why the selector cannot work as meant; `None` when it can.
    fn missing_embedding(&self, context: &Context) -> Option<String> {
        if !self.selector.needs_embedding() {
            return None;
        }
        let Some(compiled) = &self.embedder else {
            return Some("the policy was compiled without an embedder".to_owned());
        };
        let Some(embedding) = &context.embedding else { return Some("the query was not embedded".to_owned()) };
        if embedding.embedder != *compiled || embedding.vector.len() != compiled.dimensions as usize {
            return Some(format!(
                "the query was embedded by {}, the policy's examples by {}; another embedder is another policy",
                embedding.embedder.name, compiled.name
            ));
        }
        None
    }

    /// The selector, where it is one that learns.
    pub(super) fn learner(&self) -> Option<&Linear> {
        match &self.selector {
            Selector::Linear(linear) => Some(linear),
            _ => None,
        }
    }
}

/// Mass to probabilities: masked and normalised. Where the selector left no mass on any arm that can serve, the first of
/// these in the policy's order gets it.
fn normalise(mass: &mut [f64], alive: &[bool]) {
    for (m, alive) in mass.iter_mut().zip(alive) {
        if !alive || !m.is_finite() || *m < 0.0 {
            *m = 0.0;
        }
    }
    let total: f64 = mass.iter().sum();
    if total > 0.0 && total.is_finite() {
        mass.iter_mut().for_each(|m| *m /= total);
    } else if let Some(first) = alive.iter().position(|a| *a) {
        mass.iter_mut().for_each(|m| *m = 0.0);
        mass[first] = 1.0;
    }
}

/// The exploration floor, last of all: a mixture with the uniform distribution over the n arms that can serve,
/// f + (1 - n f) p, so that every one has at least f and the sum stays 1.
fn floored(p: &mut [f64], alive: &[bool], floor: f64) {
    let n = alive.iter().filter(|a| **a).count();
    if floor > 0.0 && n > 0 {
        let rest = 1.0 - n as f64 * floor;
        for (p, _) in p.iter_mut().zip(alive).filter(|(_, alive)| **alive) {
            *p = floor + rest * *p;
        }
    }
}

/// An elimination in words; `model`: of a plan of several calls, the one that is why.
pub(super) fn because(reason: &Elimination, model: Option<&str>) -> String {
    let it = model.unwrap_or("it");
    match reason {
        Elimination::Restriction(rule) => format!("the rule `{rule}` forbids {it}"),
        Elimination::Capability(need) => format!("{it} cannot do `{need}`"),
        Elimination::Context(detail) => format!("the request is too long for {it} ({detail})"),
        Elimination::Unavailable(model) => format!("{model} is not available"),
        Elimination::Condition(why) | Elimination::Budget(why) => why.clone(),
    }
}

/// Whether a rule took part: decided, or restricted.
pub(super) fn took_part(outcome: RuleOutcome) -> bool {
    matches!(outcome, RuleOutcome::Used | RuleOutcome::Restricted | RuleOutcome::NotUsable | RuleOutcome::ErrorTaken)
}
