//! Dispatch: runs a decision's plan. The machine of [`crate::cascade`] says what is to be done; this does it, over
//! [`Backend`]s and tokio's timers, and journals one attempt per call and exactly one outcome per request.
//!
//! As a call ends the machine is told how the backends are at that moment: what waits before models where the time to a first token is
//! bounded, and who cannot be called where the call failed. Both are recorded with the attempt, so that the run can be derived again.
//!
//! The record comes before the effect: the last attempt and the outcome are appended in one write before the last piece of
//! the answer is given out. Where that fails, the client gets an error in its place. A client that leaves (the future of
//! [`Dispatcher::run`] or the answer's stream is dropped) cancels the call and leaves an outcome behind all the same.

mod answer;
mod calls;
mod held;
mod journal;
mod ledger;
mod shown;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream::BoxStream};

use crate::{
    backend::{Backend, BackendError, Call, tally},
    cascade::{
        self, Answered, Command, Forms, Input, Limits, Machine, RetryPolicy, Setup, Timer,
        retry_budget::{RetryBudget, RetryBudgetPolicy},
    },
    domain::{
        AttemptReason, BestBecause, CallSpec, Chunk, Decision, DecisionId, ErrorKind, Event, Facts, Fleet, Micros,
        ModelState, OutcomeStatus, Place, Plan, Request, Score, StepFacts, Usage, What,
    },
    gateway::{AnswerBody, Caller, GatewayError, Speeds},
};

use answer::Answering;
use calls::{Calls, Happened};
use held::{Held, Verdict};
pub use journal::LogJournal;
use ledger::Ledger;
pub use shown::verifying;
use watch::Watch;

/// What a judge may write where its plan does not say: a number, and some models' thoughts about it.
const JUDGE_TOKENS: u32 = 256;

/// Where events are recorded; the event log, or a list in tests.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Records the events in one write, in order; returns once they will survive weir's own end.
    ///
    /// # Errors
    /// A sentence that says why nothing could be recorded.
    async fn append(&self, events: Vec<Event>) -> Result<(), String>;
}

/// What holds for every request.
#[derive(Clone, Debug)]
pub struct DispatchOptions {
    pub retry: RetryPolicy,
    pub limits: Limits,
    /// Of all requests together; `None`: no bound.
    pub retry_budget: Option<RetryBudgetPolicy>,
    /// Whether outcomes carry the BLAKE3 of the answer's text.
    pub hash_bodies: bool,
}

impl Default for DispatchOptions {
    fn default() -> Self {
        Self {
            retry: RetryPolicy::default(),
            limits: Limits::default(),
            retry_budget: Some(RetryBudgetPolicy::default()),
            hash_bodies: false,
        }
    }
}

/// An answer that has begun, or is there.
pub struct Dispatched {
    /// The fleet model that answers.
    pub model: String,
    pub body: AnswerBody,
    /// Why it is only the best answer so far, where it is.
    pub because: Option<BestBecause>,
}

/// Runs plans over the fleet's backends.
pub struct Dispatcher {
    backends: BTreeMap<String, Arc<dyn Backend>>,
    journal: Arc<dyn Journal>,
    fleet: Arc<Fleet>,
    options: DispatchOptions,
    retries: Retries,
    speeds: Arc<Speeds>,
}

/// What is left of the retries of all requests.
struct Retries {
    budget: Option<Mutex<RetryBudget>>,
    started: Instant,
}

impl Retries {
    fn new(policy: Option<RetryBudgetPolicy>) -> Self {
        let budget = policy.map(|policy| Mutex::new(RetryBudget::new(policy, 0)));
        Self { budget, started: Instant::now() }
    }

    /// A call is made that is neither a retry nor a hedge.
    fn call(&self) {
        if let Some(budget) = &self.budget {
            budget.lock().unwrap_or_else(PoisonError::into_inner).call(ledger::micros(self.started.elapsed()));
        }
    }

    /// What was paid for is not made.
    fn give_back(&self) {
        if let Some(budget) = &self.budget {
            budget.lock().unwrap_or_else(PoisonError::into_inner).give_back();
        }
    }

    /// Whether a call may be repeated, or hedged; if so, it is paid for.
    fn take(&self) -> bool {
        let Some(budget) = &self.budget else { return true };
        budget.lock().unwrap_or_else(PoisonError::into_inner).take(ledger::micros(self.started.elapsed()))
    }
}

impl Dispatcher {
    /// `backends` by fleet name.
    pub fn new(
        backends: BTreeMap<String, Arc<dyn Backend>>,
        journal: Arc<dyn Journal>,
        fleet: Fleet,
        options: DispatchOptions,
    ) -> Self {
        let retries = Retries::new(options.retry_budget);
        Self { backends, journal, fleet: Arc::new(fleet), options, retries, speeds: Arc::default() }
    }

    /// The same, which expects of models what was measured of them.
    pub fn with_speeds(self, speeds: Arc<Speeds>) -> Self {
        Self { speeds, ..self }
    }

    /// Load and availability of every backend, by fleet name.
    pub fn states(&self) -> BTreeMap<String, ModelState> {
        self.backends.iter().map(|(name, backend)| (name.clone(), backend.state())).collect()
    }

    /// Microseconds to the first token that are expected of these models now, as at the decision: with what they have of the
    /// client's prompt. Asked before the books of an answer are closed, so that the record has the moment that the machine is told.
    async fn waits(&self, models: &[&str], request: &Arc<Request>) -> BTreeMap<String, i64> {
        let mut waits = BTreeMap::new();
        for &model in models {
            let Some(backend) = self.backends.get(model) else { continue };
            let state = self.speeds.state(model, backend.as_ref(), Some(request)).await;
            let seconds = state.first_token_s(tally::prompt_tokens(request));
            waits.insert(model.to_owned(), (seconds * 1e6) as i64);
        }
        waits
    }

    /// Makes the calls of `decision.plan`, with retries and `decision.fallback`, up to the first piece of a stream or the
    /// whole of an answer. A refused decision is recorded as such.
    ///
    /// # Errors
    /// What the last call failed with, a refusal, or that the outcome could not be recorded.
    pub async fn run(
        &self,
        id: DecisionId,
        decision: &Decision,
        request: Arc<Request>,
        caller: &Caller,
    ) -> Result<Dispatched, GatewayError> {
        let mut ledger = Ledger::new(id, Arc::clone(&self.journal), Arc::clone(&self.fleet), self.options.hash_bodies);
        let setup = Setup::of(id, decision, &self.options.retry, self.options.limits);
        let (Some(plan), Some(setup)) = (&decision.plan, setup) else {
            let reason = decision.refusal.clone().unwrap_or_else(|| "the policy refuses this request".to_owned());
            ledger.close(OutcomeStatus::Refused, Some("refused"));
            ledger.recorded().await.map_err(GatewayError::NotRecorded)?;
            return Err(GatewayError::Refused { id, reason });
        };
        let bounded = setup.limits.first_token.is_some() && !matches!(plan, Plan::Call(_));
        let mut models = plan.models();
        let waited_for = if bounded { models.clone() } else { Vec::new() };
        models.extend(decision.fallback.iter().map(|call| call.model.as_str()));
        models.sort_unstable();
        models.dedup();
        let machine = Machine::new(setup, ledger.now());
        let run = Run {
            dispatcher: self,
            id,
            plan,
            models,
            waited_for,
            request,
            authorization: caller.authorization.as_deref(),
            machine,
            timers: Timers::default(),
            expired: false,
            calls: Calls::default(),
            held: BTreeMap::new(),
            forms: Forms::default(),
            unread: None,
            verdicts: BTreeMap::new(),
            steps: BTreeMap::new(),
            watched: BTreeMap::new(),
            errors: BTreeMap::new(),
            because: None,
            ledger,
        };
        run.drive().await
    }
}

/// The machine's timers, as instants of its clock.
#[derive(Clone, Debug, Default)]
struct Timers {
    deadline: Option<Micros>,
    /// Of calls.
    others: Vec<(Timer, Micros)>,
}

impl Timers {
    fn set(&mut self, timer: Timer, at: Micros) {
        match timer {
            Timer::Deadline => self.deadline = Some(at),
            Timer::Backoff { .. } | Timer::Hedge { .. } => {
                self.clear(timer);
                self.others.push((timer, at));
            }
        }
    }

    /// The one that runs out first.
    fn next(&self) -> Option<(Timer, Micros)> {
        let deadline = self.deadline.map(|at| (Timer::Deadline, at));
        deadline.into_iter().chain(self.others.iter().copied()).min_by_key(|(_, at)| *at)
    }

    fn clear(&mut self, timer: Timer) {
        match timer {
            Timer::Deadline => self.deadline = None,
            Timer::Backoff { .. } | Timer::Hedge { .. } => self.others.retain(|(other, _)| *other != timer),
        }
    }
}

/// One request until its answer begins.
struct Run<'a> {
    dispatcher: &'a Dispatcher,
    id: DecisionId,
    plan: &'a Plan,
    /// Every model that it may call, also after an error.
    models: Vec<&'a str>,
    /// Those before which the time that is waited is bounded.
    waited_for: Vec<&'a str>,
    request: Arc<Request>,
    authorization: Option<&'a str>,
    machine: Machine,
    timers: Timers,
    /// The deadline has passed.
    expired: bool,
    calls: Calls<'a>,
    /// What has come of each call's answer that was not forwarded.
    held: BTreeMap<u32, Held>,
    forms: Forms,
    /// The end of an answer that began with it: the machine is told of the beginning first.
    unread: Option<(u32, Usage)>,
    /// What each call is asked that is shown other answers to judge.
    verdicts: BTreeMap<u32, Verdict>,
    /// The steps before each call that writes a reasoning step.
    steps: BTreeMap<u32, Vec<u32>>,
    /// What is looked at while it comes, of running calls.
    watched: BTreeMap<u32, Watch>,
    /// Of the calls that have failed, with their models.
    errors: BTreeMap<u32, (String, BackendError)>,
    /// Why the answer is only the best so far, where it is.
    because: Option<BestBecause>,
    ledger: Ledger,
}

impl<'a> Run<'a> {
    async fn drive(mut self) -> Result<Dispatched, GatewayError> {
        loop {
            while let Some(command) = self.machine.poll() {
                match command {
                    Command::SetTimer { timer: Timer::Backoff { call }, .. } if !self.dispatcher.retries.take() => {
                        self.machine.handle(cascade::Event::RetryDenied { call }, self.ledger.now());
                    }
                    Command::SetTimer { timer, at } => self.timers.set(timer, at),
                    Command::Start { call, spec, why, input, at } => self.start(call, spec, why, &input, at),
                    Command::Cancel { call } => self.stop(call),
                    Command::Note(note) => {
                        match note.what {
                            What::BestSoFar { because, .. } => self.because = Some(because),
                            // Its timer had paid for it.
                            What::HedgeMasked { .. } => self.dispatcher.retries.give_back(),
                            _ => {}
                        }
                        self.ledger.note(note);
                    }
                    Command::Forward { call } => {
                        if let Some(chunks) = self.calls.take(call) {
                            return Ok(self.forward(call, chunks));
                        }
                    }
                    // `Finish` of the same call follows.
                    Command::Emit { .. } => {}
                    Command::Finish { call } => return self.finish(call).await,
                    Command::Fail { kind, call } => return Err(self.fail(kind, call).await),
                }
            }
            self.ledger.flush().await.map_err(GatewayError::NotRecorded)?;
            self.wait().await;
        }
    }

    fn start(&mut self, call: u32, mut spec: CallSpec, why: AttemptReason, input: &Input, at: Place) {
        let backend = self.dispatcher.backends.get(&spec.model);
        let kind = backend.map_or("none", |backend| backend.kind());
        let request = match input {
            Input::Request => self.asking(&at, kind),
            Input::Judge(shown) => {
                self.verdicts.insert(call, Verdict::Best { of: shown.len() });
                spec.sampling.temperature.get_or_insert(0.0);
                spec.sampling.max_tokens.get_or_insert(JUDGE_TOKENS);
                Arc::new(shown::judge(&self.request, &self.texts(shown)))
            }
            Input::Refine(shown) => Arc::new(shown::refine(&self.request, &self.texts(shown))),
            Input::Verify(of) => {
                self.verdicts.insert(call, Verdict::Right);
                Arc::new(shown::verify(&self.request, &self.texts(&[*of])[0]))
            }
            Input::Step(after) => {
                let begun = self.reasoning(&at, after, false);
                self.steps.insert(call, after.clone());
                let step = shown::step(&self.request, begun, !self.plan.watched_at(&at).is_empty());
                Arc::new(self.with_logprobs(&at, &step).unwrap_or(step))
            }
            Input::Reasoned(steps) => {
                let begun = self.reasoning(&at, steps, true);
                let request = shown::continued(&self.request, begun);
                Arc::new(self.with_logprobs(&at, &request).unwrap_or(request))
            }
        };
        if let Some(watch) = Watch::of(self.plan.watched_at(&at)) {
            self.watched.insert(call, watch);
        }
        // A client's seed draws the same numbers for every call; answers that have to differ get seeds beside it.
        if let (true, None, Some(seed)) = (spec.firm, spec.sampling.seed, request.sampling.seed) {
            spec.sampling.seed = Some(seed.wrapping_add(i64::from(call)));
        }
        if !matches!(why, AttemptReason::Retry | AttemptReason::Hedge) {
            self.dispatcher.retries.call();
        }
        self.ledger.begin(call, why, at, &spec, Arc::clone(&request), kind);
        let Some(backend) = backend else {
            let message = format!("no backend is configured for model `{}`", spec.model);
            let error = BackendError::new(ErrorKind::Internal, message);
            self.calls.start(call, async { Err(error) }.boxed());
            return;
        };
        let made = Call {
            id: self.id,
            index: call,
            spec,
            request,
            client_authorization: self.authorization.map(str::to_owned),
            deadline: self.timers.deadline.map(|at| self.ledger.instant(at).into_std()),
        };
        self.calls.start(call, backend.start(made));
    }

    /// The client's request as the call at `at` makes it: with log-probabilities where a gate needs them, and in pieces where
    /// one looks at them. Whole answers of remote models are not asked for in pieces, as all of them would have to be read.
    fn asking(&self, at: &[u32], backend: &str) -> Arc<Request> {
        let request = self.with_logprobs(at, &self.request);
        if !self.request.stream && backend != "remote" && !self.plan.watched_at(at).is_empty() {
            return Arc::new(shown::streamed(request.as_ref().unwrap_or(&self.request)));
        }
        request.map_or_else(|| Arc::clone(&self.request), Arc::new)
    }

    /// A request with the log-probabilities that are needed of the call at `at`, where it does not ask for as many itself.
    fn with_logprobs(&self, at: &[u32], request: &Request) -> Option<Request> {
        let top = self.plan.scores_at(at).iter().filter_map(Score::logprobs).max()?;
        (!request.logprobs || request.top_logprobs < top).then(|| shown::with_logprobs(request, top))
    }

    /// The reasoning that these calls have written.
    fn reasoning(&self, at: &[u32], steps: &[u32], closed: bool) -> String {
        let texts = self.texts(steps);
        self.plan.steps_at(at).map(|plan| plan.joined(&texts, closed)).unwrap_or_default()
    }

    /// What these calls have answered.
    fn texts(&self, calls: &[u32]) -> Vec<String> {
        calls.iter().map(|call| self.held.get(call).map(|held| held.said().text()).unwrap_or_default()).collect()
    }

    fn stop(&mut self, call: u32) {
        self.calls.cancel(call);
        let model = self.ledger.model(call);
        if let Some(error) = self.ledger.stopped(call, self.expired) {
            self.errors.insert(call, (model, error));
        }
    }

    /// Whether the call is under way and nothing of its answer is there.
    fn waits_for(&self, call: u32) -> bool {
        self.calls.is_active(call) && self.held.get(&call).is_none_or(Held::is_empty)
    }

    /// Waits for the next thing to happen and tells the machine.
    async fn wait(&mut self) {
        if let Some((call, usage)) = self.unread.take() {
            return self.ended(call, usage).await;
        }
        let next = self.timers.next();
        let until = next.map(|(_, at)| self.ledger.instant(at));
        let ring = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let happened = tokio::select! {
            biased;
            happened = self.calls.next() => Some(happened),
            () = ring => None,
        };
        let now = self.ledger.now();
        match happened {
            None => {
                if let Some((timer, at)) = next {
                    self.timers.clear(timer);
                    self.expired |= timer == Timer::Deadline;
                    let event = match timer {
                        Timer::Hedge { call } if self.waits_for(call) && !self.dispatcher.retries.take() => {
                            cascade::Event::HedgeDenied { call }
                        }
                        _ => cascade::Event::Timer(timer),
                    };
                    self.machine.handle(event, at.max(now));
                }
            }
            Some((call, Happened::Started { model_reported })) => {
                self.ledger.reported(call, model_reported);
                self.machine.handle(cascade::Event::Started { call }, now);
            }
            Some((call, Happened::Piece(chunk))) => self.piece(call, chunk, now).await,
            Some((call, Happened::Whole { completion, model_reported })) => {
                self.ledger.reported(call, model_reported);
                let written = completion.usage().completion_tokens;
                let held = Held::of(completion);
                let waits = self.dispatcher.waits(&self.waited_for, &self.request).await;
                let facts = self.facts(call, &held, written, waits);
                if let Some(whole) = held.completion() {
                    self.ledger.whole(call, whole);
                }
                self.held.insert(call, held);
                self.done(call, facts);
            }
            Some((call, Happened::Failed(error))) => {
                self.held.remove(&call);
                let model = self.ledger.model(call);
                let down = self.down();
                self.ledger.down(call, &down);
                self.ledger.failed(call, &error);
                let event = answer::failure(call, &error, self.ledger.cost(call), down);
                self.errors.insert(call, (model, error));
                self.machine.handle(event, self.ledger.now());
            }
        }
    }

    async fn piece(&mut self, call: u32, chunk: Chunk, now: Micros) {
        self.ledger.piece(call, &chunk);
        let usage = if let Chunk::Usage(usage) = &chunk { Some(*usage) } else { None };
        let held = self.held.entry(call).or_default();
        let first = held.is_empty();
        let readings = self.watched.get_mut(&call).map(|watch| watch.piece(&chunk)).unwrap_or_default();
        held.piece(chunk);
        if first {
            self.ledger.arrived(call);
            self.unread = usage.map(|usage| (call, usage));
            self.machine.handle(cascade::Event::Delta { call }, now);
        } else if let Some(usage) = usage {
            return self.ended(call, usage).await;
        }
        if !readings.is_empty() {
            self.ledger.early(call, &readings);
            self.machine.handle(cascade::Event::Early { call, readings }, now);
        }
    }

    /// A held answer's stream has come to its end.
    async fn ended(&mut self, call: u32, usage: Usage) {
        self.calls.cancel(call);
        let held = self.held.remove(&call).unwrap_or_default();
        let waits = self.dispatcher.waits(&self.waited_for, &self.request).await;
        let facts = self.facts(call, &held, usage.completion_tokens, waits);
        self.held.insert(call, held);
        self.ledger.streamed(call, usage);
        self.done(call, facts);
    }

    fn done(&mut self, call: u32, facts: Facts) {
        let answer = Arc::new(Answered { facts, cost: self.ledger.cost(call) });
        self.machine.handle(cascade::Event::Done { call, answer }, self.ledger.now());
    }

    /// The models that may be called after an error, and cannot be now.
    fn down(&self) -> Vec<String> {
        let backend = |model: &str| self.dispatcher.backends.get(model);
        let down = |model: &&&str| backend(model).is_some_and(|backend| !backend.state().available);
        self.models.iter().filter(down).map(|model| (*model).to_owned()).collect()
    }

    /// What the machine is told of a running call's answer, and recorded of it. Nobody asks what the answer of a plan of one
    /// call says.
    /// `written`: the answer's tokens.
    fn facts(&mut self, call: u32, held: &Held, written: u32, waits: BTreeMap<String, i64>) -> Facts {
        if matches!(self.plan, Plan::Call(_)) {
            return Facts::default();
        }
        let asked = self.plan.scores_at(self.ledger.place(call));
        let said = held.said();
        let mut facts = held::facts(&said, &mut self.forms, &asked, self.verdicts.get(&call).copied());
        facts.waits = waits;
        if let Some(after) = self.steps.get(&call) {
            let text = said.text();
            let closes = self.plan.steps_at(self.ledger.place(call)).is_some_and(|steps| steps.closes(&text));
            let repeats = after.last().is_some_and(|last| self.texts(&[*last])[0].trim() == text.trim());
            facts.step = Some(StepFacts { tokens: written, closes, repeats });
        }
        self.ledger.facts(call, facts.clone());
        facts
    }

    fn forward(mut self, call: u32, chunks: BoxStream<'static, Result<Chunk, BackendError>>) -> Dispatched {
        let deadline = self.timers.deadline.map(|at| (at, self.ledger.instant(at)));
        let first = self.held.remove(&call).and_then(Held::into_first);
        let model = self.ledger.model(call);
        let answering = Answering::new(self.id, call, self.machine, self.ledger, chunks, first, deadline);
        Dispatched { model, body: AnswerBody::Stream(answering.boxed()), because: None }
    }

    async fn finish(mut self, call: u32) -> Result<Dispatched, GatewayError> {
        let Some(held) = self.held.remove(&call) else {
            return Err(self.fail(ErrorKind::Internal, None).await);
        };
        let body = held.into_body(self.request.logprobs, self.request.stream);
        if matches!(body, AnswerBody::Stream(_)) {
            self.ledger.answering();
        }
        let model = self.ledger.model(call);
        self.ledger.serves(call);
        self.ledger.close(OutcomeStatus::Ok, None);
        self.ledger.recorded().await.map_err(GatewayError::NotRecorded)?;
        Ok(Dispatched { model, body, because: self.because })
    }

    async fn fail(&mut self, kind: ErrorKind, call: Option<u32>) -> GatewayError {
        let of_call = call.and_then(|call| self.errors.remove(&call));
        let (model, mut error) = of_call.filter(|(_, error)| error.kind == kind).unwrap_or_else(|| {
            let message = match kind {
                ErrorKind::Timeout => "the request's deadline passed before an answer came",
                ErrorKind::RateLimited => "what the request may cost or call is spent, and no answer has come",
                _ => "the plan ended without an answer",
            };
            (call.map(|call| self.ledger.model(call)).unwrap_or_default(), BackendError::new(kind, message))
        });
        if let Some(no_path) = self.machine.no_path() {
            error.message = format!("{}; {no_path}", error.message);
        }
        self.ledger.close(OutcomeStatus::Error, Some(kind.as_str()));
        match self.ledger.recorded().await {
            Ok(()) => GatewayError::Backend { id: self.id, model, error },
            Err(reason) => GatewayError::NotRecorded(reason),
        }
    }
}
