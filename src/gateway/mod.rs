//! The way of one request through weir: signals, decision, dispatch, record. Everything the HTTP edge may do is a method
//! of [`Gateway`]; nothing here knows status codes.

mod metering;
mod operation;
mod sessions;
mod speeds;
mod spending;
mod types;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use crate::{
    audit::{AuditStore, DecisionFilter, DecisionRow, DecisionView, EventLog, Feeder, StoreError},
    backend::{Backend, BackendError},
    clock::now_micros,
    dispatch::{Dispatcher, Journal, LogJournal},
    domain::{
        Admin, Context, DecidedBy, Decision, DecisionId, DecisionRecord, Elimination, EmbedderIdentity, ErrorKind,
        Event, EventBody, Feedback, Fleet, Hash, Need, Request, SessionView, Signals, canonical,
    },
    learn::Published,
    policy::Policy,
    signals::{self, Embedder},
    telemetry::Metrics,
};

pub use sessions::Sessions;
pub use speeds::Speeds;
pub use spending::Spending;
pub use types::{
    Answer, AnswerBody, Caller, Embedded, Explained, FleetStatus, GatewayError, Readiness, Served, UnknownModel,
};
use watch::Watch;

/// The name behind which the default policy decides.
pub const AUTO: &str = "auto";

/// What the gateway is built from; `app.rs` puts it together.
pub struct Parts {
    pub policies: Vec<Arc<Policy>>,
    /// Name of the policy behind `auto`.
    pub default_policy: String,
    pub fleet: Fleet,
    pub aliases: BTreeMap<String, String>,
    pub unknown_model: UnknownModel,
    pub backends: BTreeMap<String, Arc<dyn Backend>>,
    pub dispatcher: Dispatcher,
    pub embedder: Option<Arc<dyn Embedder>>,
    pub embedder_missing: Option<String>,
    pub embed_deadline: Duration,
    pub published: Published,
    pub log: EventLog,
    /// The same log, as what is written to.
    pub journal: Arc<LogJournal>,
    pub store: Arc<dyn AuditStore>,
    pub feeder: Arc<Feeder>,
    pub metrics: Arc<Metrics>,
    pub speeds: Arc<Speeds>,
    pub spending: Arc<Spending>,
    pub sessions: Arc<Sessions>,
    pub keep_context: bool,
    pub hash_bodies: bool,
}

/// The router as a whole. One per process, shared by all requests.
pub struct Gateway {
    parts: Parts,
    policies: ArcSwap<BTreeMap<String, Arc<Policy>>>,
    watch: Watch,
    started: i64,
    draining: AtomicBool,
}

/// What a client's `model` turned out to name.
enum Target {
    /// The policy decides.
    Policy(Arc<Policy>),
    /// A plan or a model, within a policy's restrictions.
    Pinned(Arc<Policy>, String),
}

/// A decision that has been recorded.
struct Decided {
    id: DecisionId,
    decision: Decision,
    context: Context,
}

impl Gateway {
    /// Ready to serve.
    pub fn new(parts: Parts) -> Self {
        let policies: BTreeMap<_, _> = parts.policies.iter().map(|p| (p.name().to_owned(), Arc::clone(p))).collect();
        Self {
            parts,
            policies: ArcSwap::from_pointee(policies),
            watch: Watch::default(),
            started: now_micros() / 1_000_000,
            draining: AtomicBool::new(false),
        }
    }

    /// The policy of that name that is in use.
    pub fn policy(&self, name: &str) -> Option<Arc<Policy>> {
        self.policies.load().get(name).cloned()
    }

    /// Takes a policy into use, in the place of the one of its name. Requests under way keep theirs.
    pub fn adopt(&self, policy: Arc<Policy>) {
        self.policies.rcu(|policies| {
            let mut policies = BTreeMap::clone(policies);
            policies.insert(policy.name().to_owned(), Arc::clone(&policy));
            policies
        });
    }

    /// Whether the policies that are to decide beside this one exist; what is missing otherwise.
    ///
    /// # Errors
    /// The name of one that does not.
    pub fn knows_shadows(&self, policy: &Policy) -> Result<(), String> {
        let policies = self.policies.load();
        match policy.shadows().iter().find(|name| !policies.contains_key(*name)) {
            Some(name) => Err(format!("shadow_decide: there is no policy `{name}` in this weir")),
            None => Ok(()),
        }
    }

    /// Decides, calls, and hands the answer over; all of it recorded.
    ///
    /// # Errors
    /// See [`GatewayError`]; every error after the decision is recorded as the request's outcome.
    pub async fn chat(&self, request: Request, caller: Caller) -> Result<Answer, GatewayError> {
        let request = self.marked(request);
        let decided = self.decide_and_record(&request, &caller, false).await?;
        // While the model is asked.
        let shadows = self.decide_beside(&decided, &request, &caller);
        let Decided { id, ref decision, .. } = decided;
        let call = self.parts.dispatcher.run(id, decision, Arc::clone(&request), &caller);
        let (called, ()) = tokio::join!(call, shadows);
        let decision = decision.clone();
        let dispatched = match called {
            Err(GatewayError::Refused { id, reason }) => return Err(refusal(id, reason, &decision)),
            result => result?,
        };
        Ok(Answer {
            id,
            model: dispatched.model,
            policy: decision.policy,
            arm: decision.arm,
            created: now_micros() / 1_000_000,
            best_so_far: dispatched.because,
            body: dispatched.body,
        })
    }

    /// Decides and records it, and calls nothing.
    pub async fn decide(&self, request: Request, caller: Caller) -> Result<Explained, GatewayError> {
        let request = self.marked(request);
        let Decided { id, decision, context } = self.decide_and_record(&request, &caller, true).await?;
        Ok(Explained { id, decision, context })
    }

    /// Unit vectors of `texts`, one after the other: the embedder is not to be batched.
    pub async fn embeddings(&self, model: &str, texts: Vec<String>) -> Result<Embedded, GatewayError> {
        let embedder = self.parts.embedder.as_ref().ok_or_else(|| {
            GatewayError::NoEmbedder(
                self.parts.embedder_missing.clone().unwrap_or_else(|| "no embedder is configured".to_owned()),
            )
        })?;
        let name = embedder.identity().name.clone();
        let resolved = self.parts.aliases.get(model).map_or(model, String::as_str);
        if resolved != name && resolved != "auto" {
            return Err(GatewayError::UnknownModel { name: model.to_owned(), served: vec![name] });
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut tokens = 0;
        for text in &texts {
            let vector = embedder.embed(text).await.map_err(|e| GatewayError::NoEmbedder(e.to_string()))?;
            tokens += embedder.count_tokens(text) as u32;
            vectors.push(vector);
        }
        Ok(Embedded { model: name, vectors, tokens })
    }

    /// All names that `model` may be.
    pub fn served(&self) -> Vec<Served> {
        let entry =
            |id: &str, kind| Served { id: id.to_owned(), kind, created: self.started, owned_by: "weir".to_owned() };
        let mut served = vec![entry(AUTO, "policy")];
        let policies = self.policies.load();
        served.extend(policies.keys().map(|name| entry(name, "policy")));
        if let Some(policy) = policies.get(&self.parts.default_policy) {
            served.extend(policy.plan_names().into_iter().map(|name| entry(name, "plan")));
        }
        served.extend(self.parts.fleet.0.keys().map(|name| entry(name, "model")));
        if let Some(embedder) = &self.parts.embedder {
            served.push(entry(&embedder.identity().name, "model"));
        }
        served.extend(self.parts.aliases.keys().map(|name| entry(name, "alias")));
        let mut seen = BTreeSet::new();
        served.retain(|s| seen.insert(s.id.clone()));
        served
    }

    /// Records a judgement; the learner hears of it through the log. `false` when its idempotency key was seen before.
    pub async fn feedback(&self, id: DecisionId, feedback: Feedback) -> Result<bool, GatewayError> {
        if !feedback.value.is_finite() {
            return Err(GatewayError::Invalid {
                message: "`value` must be a finite number".into(),
                param: Some("value".into()),
            });
        }
        self.caught_up().await?;
        let Some(judged) = self.parts.store.decision(id).await.map_err(store_error)? else {
            return Err(GatewayError::NotFound(format!(
                "there is no decision {id}; feedback takes the `id` of an answer or its `x-request-id`"
            )));
        };
        if let Some(key) = &feedback.idempotency_key
            && self.parts.store.has_feedback_key(id, key).await.map_err(store_error)?
        {
            return Ok(false);
        }
        let (name, value) = (feedback.name.clone(), feedback.value);
        let event = Event::new(now_micros(), Some(id), EventBody::Feedback(feedback));
        self.parts.journal.append(vec![event]).await.map_err(GatewayError::NotRecorded)?;
        let record = &judged.decision;
        if !record.session.is_empty() {
            self.parts.sessions.judged(&record.session, &record.decision.arm, value);
        }
        if self.judges(&record.decision.policy, &name) && judged.feedback.iter().all(|f| f.feedback.name != name) {
            self.report(self.watch.judged(&judged, value)).await;
        }
        Ok(true)
    }

    /// Whether feedback of this name says how good an answer under the policy was.
    fn judges(&self, policy: &str, name: &str) -> bool {
        let policies = self.policies.load();
        let awaited = policies.get(policy).and_then(|policy| policy.awaits_feedback().map(|(name, _)| name.to_owned()));
        awaited.as_deref().unwrap_or("score") == name
    }

    async fn report(&self, found: Vec<Admin>) {
        for admin in found {
            tracing::warn!(action = admin.action, detail = admin.detail, "a guarantee does not hold");
            let event = Event::new(now_micros(), None, EventBody::Admin(admin));
            if let Err(error) = self.parts.journal.append(vec![event]).await {
                tracing::warn!(error, "a violated guarantee was not recorded");
            }
        }
    }

    /// Decisions as the store has them, newest first.
    pub async fn decisions(&self, filter: DecisionFilter) -> Result<Vec<DecisionRow>, GatewayError> {
        self.caught_up().await?;
        self.parts.store.decisions(&filter).await.map_err(store_error)
    }

    /// One decision with all that belongs to it.
    pub async fn decision(&self, id: DecisionId) -> Result<DecisionView, GatewayError> {
        self.caught_up().await?;
        let view = self.parts.store.decision(id).await.map_err(store_error)?;
        view.ok_or_else(|| GatewayError::NotFound(format!("there is no decision {id} in the record")))
    }

    /// From now on every new request is refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// A request with what its policy takes for documents marked.
    fn marked(&self, mut request: Request) -> Arc<Request> {
        // A name that means nothing is reported where it is decided.
        if let Ok(Target::Policy(policy) | Target::Pinned(policy, _)) = self.resolve(&request.model)
            && let Some(messages) = policy.chunks().and_then(|chunks| chunks.mark(&request.messages))
        {
            request.messages = messages;
        }
        Arc::new(request)
    }

    async fn decide_and_record(
        &self,
        request: &Arc<Request>,
        caller: &Caller,
        dry: bool,
    ) -> Result<Decided, GatewayError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(GatewayError::Draining);
        }
        let id = DecisionId::new();
        let target = self.resolve(&request.model)?;
        let (policy, pinned) = match &target {
            Target::Policy(policy) => (policy, None),
            Target::Pinned(policy, name) => (policy, Some(name.as_str())),
        };
        let mut context = self.context(id, policy, pinned.is_some(), request, caller).await;
        let state = self.parts.published.get(policy.hash()).unwrap_or_else(|| Arc::new(policy.initial_state()));
        let begun = Instant::now();
        let decision = match pinned {
            Some(name) => policy.pin(name, &state, &context).ok_or_else(|| self.unknown(&request.model))?,
            None => policy.decide(&state, &context),
        };
        self.parts.metrics.decision(&decision.policy, &decision.arm, decision.decided_by, begun.elapsed());
        if !context.session.id.is_empty() && !dry {
            self.parts.sessions.decided(&context.session.id, &decision);
        }
        let mut event = self.event(id, decision.clone(), &context, request, caller, None)?;
        if let EventBody::Decision(record) = &mut event.body {
            record.dry = dry;
        }
        self.parts.journal.append(vec![event]).await.map_err(GatewayError::NotRecorded)?;
        if !self.parts.keep_context {
            context.embedding = None;
        }
        Ok(Decided { id, decision, context })
    }

    /// What the policies named by `shadow_decide` would have done: decided with their own state and seed, recorded, and
    /// nothing called. What goes wrong here is no concern of the request.
    async fn decide_beside(&self, decided: &Decided, request: &Arc<Request>, caller: &Caller) {
        let Some(policy) = self.policy(&decided.decision.policy) else { return };
        for name in policy.shadows() {
            let Some(shadow) = self.policy(name) else { continue };
            let id = DecisionId::new();
            let context = self.context(id, &shadow, false, request, caller).await;
            let state = self.parts.published.get(shadow.hash()).unwrap_or_else(|| Arc::new(shadow.initial_state()));
            let mut decision = shadow.decide(&state, &context);
            decision.decided_by = DecidedBy::Shadow;
            let event = self.event(id, decision, &context, request, caller, Some(decided.id));
            let recorded = match event {
                Ok(event) => self.parts.journal.append(vec![event]).await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = recorded {
                tracing::warn!(%error, policy = name, "what the shadow decided could not be recorded");
            }
        }
    }

    /// The decision as it is recorded.
    fn event(
        &self,
        id: DecisionId,
        decision: Decision,
        context: &Context,
        request: &Request,
        caller: &Caller,
        shadow_of: Option<DecisionId>,
    ) -> Result<Event, GatewayError> {
        let record = DecisionRecord {
            decision,
            model_requested: request.model.clone(),
            stream: request.stream,
            key: caller.key.id.clone(),
            tenant: caller.key.tenant.clone(),
            session: context.session.id.clone(),
            client_retry: request.client_retry,
            dry: shadow_of.is_some(),
            shadow_of,
            build: crate::BUILD.to_owned(),
            embedder: context.embedding.as_ref().map(|e| EmbedderIdentity::clone(&e.embedder)),
            context_hash: None,
            embedding_hash: None,
            request_hash: self.parts.hash_bodies.then(|| Hash::of(&request.body)),
        };
        let mut event = Event::new(context.now, Some(id), EventBody::Decision(Box::new(record)));
        if self.parts.keep_context {
            event.context = Some(canonical::to_bytes(context).map_err(|e| GatewayError::NotRecorded(e.to_string()))?);
            event.embedding = context.embedding.as_ref().map(|e| canonical::vector_to_bytes(&e.vector));
        }
        Ok(event)
    }

    /// What is known about the request, as far as this policy looks at it. A pinned request under a policy without rules
    /// is not embedded, and measured only where plans or budgets ask: nothing else could follow from it.
    async fn context(
        &self,
        id: DecisionId,
        policy: &Policy,
        pinned: bool,
        request: &Arc<Request>,
        caller: &Caller,
    ) -> Context {
        let looked_at = !pinned || policy.has_rules();
        let measured = looked_at || policy.measures_pinned();
        let mut signals = if measured { signals::measure(request) } else { Signals::default() };
        let mut embedding = None;
        if looked_at && policy.needs_embedding() {
            match signals::embed_within(self.parts.embedder.as_ref(), &request.query(), self.parts.embed_deadline).await
            {
                Ok(found) => {
                    signals.similarity = policy.similarities(&found.vector);
                    signals.embedded = true;
                    embedding = Some(found);
                }
                Err(reason) => {
                    tracing::debug!(decision = %id, %reason, "the query was not embedded");
                }
            }
        }
        let mut session = match &request.session {
            Some(session) => self.parts.sessions.view(&Hash::of(session.as_bytes()).to_string()[..16]),
            None => SessionView::default(),
        };
        let (now, mut key) = (now_micros(), caller.key.clone());
        self.parts.spending.fill(policy, now, &mut session, &mut key);
        let resident = measured && policy.needs_residency();
        let mut fleet = BTreeMap::new();
        for (name, backend) in &self.parts.backends {
            let state = self.parts.speeds.state(name, backend.as_ref(), resident.then_some(request)).await;
            fleet.insert(name.clone(), state);
        }
        Context { now, seed: seed(id, policy.name()), request: request.view(), signals, session, key, fleet, embedding }
    }

    /// What `name` means: `auto`, a policy, a plan or model, an alias of one, or what `unknown_model` says.
    fn resolve(&self, name: &str) -> Result<Target, GatewayError> {
        let name = self.parts.aliases.get(name).map_or(name, String::as_str);
        let policies = self.policies.load();
        let default = policies.get(&self.parts.default_policy).ok_or_else(|| self.unknown(name))?;
        if name == AUTO {
            return Ok(Target::Policy(Arc::clone(default)));
        }
        if let Some(policy) = policies.get(name) {
            return Ok(Target::Policy(Arc::clone(policy)));
        }
        let pinned = |name: &str| Ok(Target::Pinned(Arc::clone(default), name.to_owned()));
        if self.parts.fleet.get(name).is_some() || default.plan_names().contains(&name) {
            return pinned(name);
        }
        match &self.parts.unknown_model {
            UnknownModel::Error => Err(self.unknown(name)),
            UnknownModel::Auto => Ok(Target::Policy(Arc::clone(default))),
            UnknownModel::PassThrough(entry) => pinned(entry),
        }
    }

    fn unknown(&self, name: &str) -> GatewayError {
        GatewayError::UnknownModel { name: name.to_owned(), served: self.served().into_iter().map(|s| s.id).collect() }
    }

    /// Waits until the store has everything that was logged before this call, for questions that are asked of it.
    async fn caught_up(&self) -> Result<(), GatewayError> {
        let seq = self.parts.log.last_seq();
        self.parts.feeder.flush(seq, Duration::from_secs(10)).await.map_err(|e| GatewayError::Store(e.to_string()))
    }
}

fn store_error(error: StoreError) -> GatewayError {
    GatewayError::Store(error.to_string())
}

/// A refusal in the words that the client can act on: what no arm can do, or how much too long the prompt is, where that
/// is what eliminated every arm.
fn refusal(id: DecisionId, reason: String, decision: &Decision) -> GatewayError {
    let incapable: BTreeSet<&str> = decision
        .candidates
        .iter()
        .filter_map(|c| match &c.eliminated {
            Some(Elimination::Capability(need)) => Some(need.as_str()),
            _ => None,
        })
        .collect();
    let all_incapable = !decision.candidates.is_empty()
        && decision.candidates.iter().all(|c| matches!(c.eliminated, Some(Elimination::Capability(_))));
    if all_incapable {
        let needs = Need::ALL.into_iter().filter(|n| incapable.contains(n.as_str())).collect();
        return GatewayError::Incapable { id, needs };
    }
    let too_long = decision.candidates.iter().find_map(|c| match &c.eliminated {
        Some(Elimination::Context(why)) => Some((c.arm.clone(), why.clone())),
        _ => None,
    });
    if let Some((model, why)) = too_long
        && decision.candidates.iter().all(|c| matches!(c.eliminated, Some(Elimination::Context(_))))
    {
        let error = BackendError::new(ErrorKind::ContextTooLong, why);
        return GatewayError::Backend { id, model, error };
    }
    if decision.candidates.iter().any(|c| matches!(c.eliminated, Some(Elimination::Budget(_)))) {
        return GatewayError::OverBudget { id, reason };
    }
    if decision.candidates.iter().any(|c| matches!(c.eliminated, Some(Elimination::Unavailable(_)))) {
        return GatewayError::Unavailable { id, reason };
    }
    GatewayError::Refused { id, reason }
}

/// The seed of a decision: a hash of request id and policy name, so that two policies draw independently.
fn seed(id: DecisionId, policy: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(id.0.as_bytes());
    hasher.update(policy.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}
