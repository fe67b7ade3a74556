//! A logged decision as replay needs it, whichever way it was kept.

use std::{borrow::Cow, collections::BTreeMap};

use crate::{
    audit::DecisionView,
    domain::{Context, DecidedBy, Decision, DecisionId},
    learn,
    policy::{Observed, Policy},
    replay::{estimate::session, reproduce::context_of},
};

/// The arm of what no arm may serve.
pub(super) const REFUSED: &str = "(refused)";

/// What was decided, how likely that was, and what came of it.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: DecisionId,
    /// Hash of the session, or of the decision's own id where it has none.
    pub session: u64,
    pub decided_by: DecidedBy,
    /// Only asked about: nothing was called.
    pub dry: bool,
    pub arm: String,
    pub propensity: f64,
    /// The arms that it could have taken, in name order, with their probabilities.
    pub could: Vec<(String, f64)>,
    /// The model whose answer the client got; empty where there was none.
    pub served_by: String,
    /// Absent where there is no outcome.
    pub observed: Option<Observed>,
    /// With its embedding; or what is missing.
    pub context: Result<Context, String>,
    /// The whole record, where this is from a store.
    pub view: Option<Box<DecisionView>>,
}

impl Entry {
    pub fn of(view: DecisionView) -> Self {
        let decision = &view.decision.decision;
        Self {
            id: view.id,
            session: session_of(&view.decision.session, view.id),
            decided_by: decision.decided_by,
            dry: view.decision.dry,
            arm: decision.arm.clone(),
            propensity: decision.propensity,
            could: chances(decision).into_iter().collect(),
            served_by: view.outcome.as_ref().map(|o| o.served_by.clone()).unwrap_or_default(),
            observed: learn::observed(&view),
            context: context_of(&view),
            view: Some(Box::new(view)),
        }
    }

    /// Why the entry says nothing of policies: it was not a policy that chose what was served.
    pub fn apart(&self) -> Option<&'static str> {
        match self.decided_by {
            DecidedBy::Pinned => Some("pinned by the client"),
            DecidedBy::Shadow => Some("decided beside another, or only asked about"),
            _ => self.dry.then_some("decided beside another, or only asked about"),
        }
    }

    /// The context as a policy sees it, with cosines to its own examples.
    ///
    /// # Errors
    /// What is missing of it.
    pub fn seen_by(&self, policy: &Policy) -> Result<Cow<'_, Context>, String> {
        let context = self.context.as_ref().map_err(Clone::clone)?;
        if !policy.needs_embedding() {
            return Ok(Cow::Borrowed(context));
        }
        let embedding = context.embedding.as_ref().ok_or("its embedding was not logged and the policy needs it")?;
        let similarity = policy.similarities(&embedding.vector);
        if similarity == context.signals.similarity {
            return Ok(Cow::Borrowed(context));
        }
        let mut context = context.clone();
        context.signals.similarity = similarity;
        Ok(Cow::Owned(context))
    }

    /// Its reward under a policy's weights, where it is known.
    pub fn reward(&self, policy: &Policy) -> Option<f64> {
        policy.reward(self.observed.as_ref()?)
    }
}

/// Rows of one session are drawn together.
pub(super) fn session_of(name: &str, id: DecisionId) -> u64 {
    if name.is_empty() { session(&id.to_string()) } else { session(name) }
}

/// Probability of each arm, by name.
pub fn chances(decision: &Decision) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    each_chance(decision, |arm, p| *out.entry(arm.to_owned()).or_insert(0.0) += p);
    out
}

/// The arms that can be taken, with their probabilities.
pub(super) fn each_chance(decision: &Decision, mut take: impl FnMut(&str, f64)) {
    if decision.decided_by == DecidedBy::Refused || decision.plan.is_none() {
        take(REFUSED, 1.0);
    } else if decision.decided_by == DecidedBy::Select {
        decision.candidates.iter().filter(|c| c.propensity > 0.0).for_each(|c| take(&c.arm, c.propensity));
    } else {
        take(&decision.arm, 1.0);
    }
}
