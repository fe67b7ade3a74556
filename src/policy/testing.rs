//! The `tests:` of a policy file: a context from a case, and whether the decision is what the case expects. How a
//! request's signals are measured is the caller's business.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::{LearntSpec, Policy, State, TestSpec, decide::took_part, diagnostic::suggest, source::step};
use crate::domain::{Context, Decision, KeyView, ModelState, RuleOutcome, SessionView, Signals, StateUpdate};

/// What came of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    pub name: String,
    pub passed: bool,
    /// Each expectation that does not hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
    pub decision: Decision,
}

/// Runs one case on `context`, which the caller has made from the case's request; what the case gives beside it is laid
/// over here.
///
/// # Errors
/// When a value that the case gives does not have its variable's type.
pub fn run(policy: &Policy, state: &State, test: &TestSpec, context: Context) -> Result<Case, String> {
    let context = overlay(test, context)?;
    let decision = policy.decide(state, &context);
    let mut failures = compare(test, &decision);
    failures.extend(shares(policy, state, test, &context));
    Ok(Case { name: test.name.clone(), passed: failures.is_empty(), failures, decision })
}

/// Folds into `state` what a case says was learnt; `context` is of the request that was answered then.
///
/// # Errors
/// When nothing could have been learnt from that request: a rule decides it, or the embedding is missing.
pub fn learn(policy: &Policy, state: &mut State, learnt: &LearntSpec, context: &Context) -> Result<(), String> {
    let decision = policy.decide(state, context);
    if decision.features.is_empty() {
        let why = match (&decision.rule, &decision.no_embedding) {
            (Some(rule), _) => format!("the rule `{rule}` decides it"),
            (_, Some(why)) => why.clone(),
            _ => "the selector does not".to_owned(),
        };
        return Err(format!("`{}` cannot have learnt from this request: {why}", learnt.arm));
    }
    for _ in 0..learnt.times.unwrap_or(1) {
        let update = StateUpdate {
            arm: learnt.arm.clone(),
            propensity: 1.0,
            ..StateUpdate::of(&decision, state.seq, learnt.reward, learnt.cost_usd.unwrap_or(0.0), context.now)
        };
        policy.fold(state, &update).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// What a file's tests have touched: names and how often, in the order of the file.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Coverage {
    /// Conditions that held.
    pub rules: Vec<(String, usize)>,
    /// Arms and other plans that were taken.
    pub plans: Vec<(String, usize)>,
    /// Splits that had the request in their share.
    pub splits: Vec<(String, usize)>,
    /// Rules whose condition never did not hold: no test shows what is let through.
    pub always: Vec<String>,
}

impl Coverage {
    /// Of the decisions of a policy's tests.
    pub fn of<'a>(policy: &Policy, decisions: impl Iterator<Item = &'a Decision> + Clone) -> Self {
        let held = |rule: &str| {
            let traces = decisions.clone().flat_map(|d| &d.rules).filter(|t| t.rule == rule);
            let fails = |o| matches!(o, RuleOutcome::NoMatch | RuleOutcome::ErrorSkipped);
            let (no, yes): (Vec<_>, Vec<_>) = traces.partition(|t| fails(t.outcome));
            (yes.len(), no.len())
        };
        let mut plans: Vec<&str> = policy.arms();
        let used = policy.rules.iter().filter_map(|r| Some(policy.targets[r.use_?].name.as_str()));
        for name in used {
            if !plans.contains(&name) {
                plans.push(name);
            }
        }
        let count = |of: &dyn Fn(&Decision) -> bool| decisions.clone().filter(|d| of(d)).count();
        let rules = policy.rules.iter().map(|r| (r.name.clone(), held(&r.name).0)).collect();
        Self {
            rules,
            plans: plans.into_iter().map(|p| (p.to_owned(), count(&|d| d.arm == p))).collect(),
            splits: policy
                .splits
                .iter()
                .map(|s| (s.name.clone(), count(&|d| d.split.as_deref() == Some(&s.name))))
                .collect(),
            always: policy.rules.iter().filter(|r| matches!(held(&r.name), (1.., 0))).map(|r| r.name.clone()).collect(),
        }
    }

    /// What no test has touched, in words.
    pub fn missing(&self) -> Vec<String> {
        let none = |what: &'static str, of: &[(String, usize)]| -> Vec<String> {
            of.iter().filter(|(_, n)| *n == 0).map(|(name, _)| format!("{what} `{name}`")).collect()
        };
        let mut out = none("the rule never holds:", &self.rules);
        out.extend(none("the plan is never taken:", &self.plans));
        out.extend(none("the split never has a request:", &self.splits));
        out.extend(self.always.iter().map(|name| format!("the rule always holds: `{name}`")));
        out
    }
}

/// The context with what the case gives.
///
/// # Errors
/// As for [`run`].
pub fn overlay(test: &TestSpec, mut context: Context) -> Result<Context, String> {
    context.signals = over(&context.signals, &test.signals, "signals")?;
    context.session = over(&context.session, &test.session, "session")?;
    context.key = over(&context.key, &test.key, "key")?;
    for (name, given) in &test.fleet {
        let idle = ModelState { available: true, ..ModelState::default() };
        let state = over(context.fleet.get(name).unwrap_or(&idle), given, &format!("fleet.{name}"))?;
        context.fleet.insert(name.clone(), state);
    }
    context.seed = test.seed;
    Ok(context)
}

fn over<T>(base: &T, given: &BTreeMap<String, Value>, what: &str) -> Result<T, String>
where
    T: Serialize + serde::de::DeserializeOwned,
{
    let mut value = serde_json::to_value(base).map_err(|e| format!("{what}: {e}"))?;
    for (key, given) in given {
        match (value.get_mut(key), given) {
            (Some(Value::Object(map)), Value::Object(given)) => {
                map.extend(given.iter().map(|(k, v)| (k.clone(), v.clone())));
            }
            (Some(slot), given) => *slot = given.clone(),
            // Left out of the form while it says nothing; that the name exists was checked when the policy was compiled.
            (None, given) => {
                value.as_object_mut().map(|map| map.insert(key.clone(), given.clone()));
            }
        }
    }
    serde_json::from_value(value).map_err(|e| format!("{what}: {e}"))
}

/// Keys of a case's `signals`, `session`, `key` and `fleet` that do not exist: where below the case, what, and a hint.
pub(super) fn unknown_overrides(
    test: &TestSpec,
    examples: &BTreeMap<String, Vec<String>>,
    arms: &[String],
) -> Vec<(String, (String, Option<String>))> {
    let mut out = Vec::new();
    let mut compare = |at: &str, given: &BTreeMap<String, Value>, form: Result<Value, serde_json::Error>| {
        let Ok(Value::Object(form)) = form else { return };
        for (key, value) in given {
            match form.get(key) {
                None => {
                    let help = suggest("names", key, form.keys().map(String::as_str));
                    out.push((step(at, key), (format!("there is no `{key}` here"), help)));
                }
                Some(Value::Object(inner)) => {
                    let known: Vec<&str> = match key.as_str() {
                        "similarity" => examples.keys().map(String::as_str).collect(),
                        "shares" | "judged" => arms.iter().map(String::as_str).collect(),
                        _ => inner.keys().map(String::as_str).collect(),
                    };
                    for name in value.as_object().into_iter().flat_map(|m| m.keys()) {
                        if !known.contains(&name.as_str()) {
                            let help = suggest("names", name, known.iter().copied());
                            out.push((step(&step(at, key), name), (format!("there is no `{name}` here"), help)));
                        }
                    }
                }
                Some(_) => {}
            }
        }
    };
    compare("/signals", &test.signals, serde_json::to_value(Signals::default()));
    compare("/session", &test.session, serde_json::to_value(whole_session()));
    compare(
        "/key",
        &test.key,
        serde_json::to_value(KeyView { spent_usd: 1.0, tenant_spent_usd: 1.0, ..KeyView::default() }),
    );
    for (name, given) in &test.fleet {
        compare(&step("/fleet", name), given, serde_json::to_value(ModelState::whole()));
    }
    out
}

/// A session of which every part says something, so that its form has every key.
fn whole_session() -> SessionView {
    let some = BTreeMap::from([(String::new(), 0.0)]);
    SessionView {
        last_model: "m".to_owned(),
        last_tokens: 1,
        shares: some.clone(),
        judged: some,
        spent_usd: 1.0,
        ..SessionView::default()
    }
}

/// Expected shares over many seeds that do not hold.
fn shares(policy: &Policy, state: &State, test: &TestSpec, context: &Context) -> Vec<String> {
    let seeds = u64::from(test.seeds.unwrap_or(1000));
    let mut taken: BTreeMap<String, u64> = BTreeMap::new();
    if !test.expect.shares.is_empty() {
        for n in 0..seeds {
            let context = Context { seed: test.seed.wrapping_add(n), ..context.clone() };
            *taken.entry(policy.decide(state, &context).arm).or_default() += 1;
        }
    }
    let mut failures = Vec::new();
    for (plan, bounds) in &test.expect.shares {
        let share = taken.get(plan).copied().unwrap_or(0) as f64 / seeds as f64;
        if bounds.at_least.is_some_and(|least| share < least) || bounds.at_most.is_some_and(|most| share > most) {
            failures.push(format!("`{plan}` was taken for a share of {share} of {seeds} seeds"));
        }
    }
    failures
}

fn compare(test: &TestSpec, decision: &Decision) -> Vec<String> {
    let mut failures = Vec::new();
    let expect = &test.expect;
    let taken = match decision.arm.as_str() {
        "" => "nothing (refused)".to_owned(),
        arm => format!("`{arm}`"),
    };
    for name in [&expect.plan, &expect.arm].into_iter().flatten() {
        if decision.arm != *name {
            failures.push(format!("expected the plan `{name}`, got {taken}"));
        }
    }
    if let Some(model) = &expect.model {
        let called = decision.plan.as_ref().map(|p| p.models()).unwrap_or_default();
        if called.first() != Some(&model.as_str()) {
            let called = called.first().map_or_else(|| "nothing".to_owned(), |m| format!("`{m}`"));
            failures.push(format!("expected a call of `{model}`, got one of {called}"));
        }
    }
    if let Some(rule) = &expect.rule {
        let took = |name: &str| decision.rules.iter().any(|t| t.rule == name && took_part(t.outcome));
        if decision.rule.as_deref() != Some(rule.as_str()) && !took(rule) {
            let others: Vec<&str> =
                decision.rules.iter().filter(|t| took_part(t.outcome)).map(|t| t.rule.as_str()).collect();
            let others = if others.is_empty() { "no rule".to_owned() } else { format!("`{}`", others.join("`, `")) };
            failures.push(format!("expected the rule `{rule}` to take part; {others} did"));
        }
    }
    if let Some(refused) = expect.refused {
        if refused && decision.plan.is_some() {
            failures.push(format!("expected a refusal, got {taken}"));
        }
        if !refused && decision.plan.is_none() {
            let why = decision.refusal.as_deref().unwrap_or("no reason given");
            failures.push(format!("refused: {why}"));
        }
    }
    for (arm, bounds) in &expect.propensity {
        let Some(candidate) = decision.candidates.iter().find(|c| c.arm == *arm) else {
            failures.push(format!("`{arm}` was not drawn from: {taken} was decided before the selector"));
            continue;
        };
        let p = candidate.propensity;
        if bounds.at_least.is_some_and(|least| p < least) || bounds.at_most.is_some_and(|most| p > most) {
            failures.push(format!("the probability of `{arm}` is {p}"));
        }
    }
    failures
}
