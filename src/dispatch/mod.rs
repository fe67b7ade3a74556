//! Dispatch: runs a decision's plan. The machine of [`crate::cascade`] says what is to be done; this does it, over
//! [`Backend`]s and tokio's timers, and journals one attempt per call and exactly one outcome per request.
//!
//! The record comes before the effect: the last attempt and the outcome are appended in one write before the last piece of
//! the answer is given out. Where that fails, the client gets an error in its place. A client that leaves (the future of
//! [`Dispatcher::run`] or the answer's stream is dropped) cancels the call and leaves an outcome behind all the same.

mod answer;
mod journal;
mod ledger;

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};

use crate::{
    backend::{Backend, BackendError, Call, Reply},
    cascade::{self, Answered, Command, Limits, Machine, RetryPolicy, Setup, Timer},
    domain::{
        AttemptReason, CallSpec, Chunk, Completion, Decision, DecisionId, ErrorKind, Event, Fleet, Micros, ModelState,
        OutcomeStatus, Plan, Request,
    },
    gateway::{AnswerBody, Caller, GatewayError},
};

use answer::Answering;
pub use journal::LogJournal;
use ledger::Ledger;

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
#[derive(Clone, Debug, Default)]
pub struct DispatchOptions {
    pub retry: RetryPolicy,
    pub limits: Limits,
    /// Whether outcomes carry the BLAKE3 of the answer's text.
    pub hash_bodies: bool,
}

/// An answer that has begun, or is there.
pub struct Dispatched {
    /// The fleet model that answers.
    pub model: String,
    pub body: AnswerBody,
}

/// Runs plans over the fleet's backends.
pub struct Dispatcher {
    backends: BTreeMap<String, Arc<dyn Backend>>,
    journal: Arc<dyn Journal>,
    fleet: Arc<Fleet>,
    options: DispatchOptions,
}

impl Dispatcher {
    /// `backends` by fleet name.
    pub fn new(
        backends: BTreeMap<String, Arc<dyn Backend>>,
        journal: Arc<dyn Journal>,
        fleet: Fleet,
        options: DispatchOptions,
    ) -> Self {
        Self { backends, journal, fleet: Arc::new(fleet), options }
    }

    /// Load and availability of every backend, by fleet name.
    pub fn states(&self) -> BTreeMap<String, ModelState> {
        self.backends.iter().map(|(name, backend)| (name.clone(), backend.state())).collect()
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
        let mut ledger = Ledger::new(
            id,
            Arc::clone(&request),
            Arc::clone(&self.journal),
            Arc::clone(&self.fleet),
            self.options.hash_bodies,
        );
        let Some(plan) = &decision.plan else {
            let reason = decision.refusal.clone().unwrap_or_else(|| "the policy refuses this request".to_owned());
            ledger.close(OutcomeStatus::Refused, Some("refused"));
            ledger.recorded().await.map_err(GatewayError::NotRecorded)?;
            return Err(GatewayError::Refused { id, reason });
        };
        // Held-back answers and several calls at once are not wired yet; no policy can make such a plan.
        if !matches!(plan, Plan::Call(_)) {
            ledger.close(OutcomeStatus::Error, Some(ErrorKind::Internal.as_str()));
            ledger.recorded().await.map_err(GatewayError::NotRecorded)?;
            let message = format!("plans of several calls are not served yet: {plan}");
            let error = BackendError::new(ErrorKind::Internal, message);
            return Err(GatewayError::Backend { id, model: decision.arm.clone(), error });
        }
        let named = |label: &String| ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == label);
        let setup = Setup {
            plan: plan.clone(),
            fallback: decision.fallback.clone(),
            fallback_on: decision.fallback_on.iter().filter_map(named).collect(),
            retry: RetryPolicy {
                max_retries: decision.retries.unwrap_or(self.options.retry.max_retries),
                ..self.options.retry.clone()
            },
            limits: self.options.limits,
            worst: BTreeMap::new(),
            seed: id.0.as_u64_pair().1,
        };
        let machine = Machine::new(setup, ledger.now());
        let run = Run {
            dispatcher: self,
            id,
            request,
            authorization: caller.authorization.as_deref(),
            machine,
            timers: Timers::default(),
            active: Active::Nothing,
            whole: None,
            first: None,
            error: None,
            ledger,
        };
        run.drive().await
    }
}

/// The call that is being made. One at a time, as today's plans have it.
enum Active<'a> {
    Nothing,
    /// Sent; no answer yet.
    Starting {
        call: u32,
        reply: BoxFuture<'a, Result<Reply, BackendError>>,
    },
    /// Answering, but nothing has come yet.
    Opening {
        call: u32,
        chunks: BoxStream<'static, Result<Chunk, BackendError>>,
    },
}

/// What a call did.
enum Happened {
    Replied(u32, Result<Reply, BackendError>),
    First(u32, Option<Result<Chunk, BackendError>>),
}

impl Active<'_> {
    async fn next(&mut self) -> Happened {
        match self {
            Active::Nothing => std::future::pending().await,
            Active::Starting { call, reply } => {
                let call = *call;
                let result = reply.await;
                *self = Active::Nothing;
                Happened::Replied(call, result)
            }
            Active::Opening { call, chunks } => Happened::First(*call, chunks.next().await),
        }
    }
}

/// The machine's timers, as instants of its clock.
#[derive(Clone, Copy, Debug, Default)]
struct Timers {
    deadline: Option<Micros>,
    /// One at a time, as there is one call at a time.
    backoff: Option<(u32, Micros)>,
}

impl Timers {
    fn set(&mut self, timer: Timer, at: Micros) {
        match timer {
            Timer::Deadline => self.deadline = Some(at),
            Timer::Backoff { call } => self.backoff = Some((call, at)),
        }
    }

    /// The one that runs out first.
    fn next(&self) -> Option<(Timer, Micros)> {
        let deadline = self.deadline.map(|at| (Timer::Deadline, at));
        let backoff = self.backoff.map(|(call, at)| (Timer::Backoff { call }, at));
        deadline.into_iter().chain(backoff).min_by_key(|(_, at)| *at)
    }

    fn clear(&mut self, timer: Timer) {
        match timer {
            Timer::Deadline => self.deadline = None,
            Timer::Backoff { .. } => self.backoff = None,
        }
    }
}

/// One request until its answer begins.
struct Run<'a> {
    dispatcher: &'a Dispatcher,
    id: DecisionId,
    request: Arc<Request>,
    authorization: Option<&'a str>,
    machine: Machine,
    timers: Timers,
    active: Active<'a>,
    whole: Option<Completion>,
    first: Option<Chunk>,
    /// Of the call that failed last.
    error: Option<(String, BackendError)>,
    ledger: Ledger,
}

impl<'a> Run<'a> {
    async fn drive(mut self) -> Result<Dispatched, GatewayError> {
        loop {
            while let Some(command) = self.machine.poll() {
                match command {
                    Command::SetTimer { timer, at } => self.timers.set(timer, at),
                    Command::Start { call, spec, why, .. } => self.start(call, spec, why),
                    Command::Cancel { .. } => self.active = Active::Nothing,
                    Command::Forward { .. } => {
                        if let Active::Opening { chunks, .. } = std::mem::replace(&mut self.active, Active::Nothing) {
                            return Ok(self.forward(chunks));
                        }
                    }
                    // A bare call holds nothing back; its attempts and its outcome are its whole record.
                    Command::Emit { .. } | Command::Note(_) => {}
                    Command::Finish { .. } => return self.finish().await,
                    Command::Fail { kind, .. } => return Err(self.fail(kind).await),
                }
            }
            self.wait().await?;
        }
    }

    fn start(&mut self, call: u32, spec: CallSpec, why: AttemptReason) {
        let backend = self.dispatcher.backends.get(&spec.model);
        let kind = backend.map_or("none", |backend| backend.kind());
        self.ledger.begin(call, why, &spec, kind);
        let Some(backend) = backend else {
            let message = format!("no backend is configured for model `{}`", spec.model);
            self.failed(call, BackendError::new(ErrorKind::Internal, message));
            return;
        };
        let made = Call {
            id: self.id,
            index: call,
            spec,
            request: Arc::clone(&self.request),
            client_authorization: self.authorization.map(str::to_owned),
            deadline: self.timers.deadline.map(|at| self.ledger.instant(at).into_std()),
        };
        self.active = Active::Starting { call, reply: backend.start(made) };
    }

    /// Waits for the next thing to happen and tells the machine. A failed call that is not the end is recorded at once.
    async fn wait(&mut self) -> Result<(), GatewayError> {
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
            happened = self.active.next() => Some(happened),
            () = ring => None,
        };
        let now = self.ledger.now();
        match happened {
            None => {
                if let Some((timer, at)) = next {
                    self.timers.clear(timer);
                    self.machine.handle(cascade::Event::Timer(timer), at.max(now));
                }
            }
            Some(Happened::Replied(call, Ok(Reply::Whole { completion, model_reported }))) => {
                self.ledger.whole(&completion, model_reported);
                self.whole = Some(completion);
                // A bare call needs to know nothing of its answer.
                let answer = Arc::new(Answered::default());
                self.machine.handle(cascade::Event::Done { call, answer }, now);
            }
            Some(Happened::Replied(call, Ok(Reply::Stream { chunks, model_reported }))) => {
                self.ledger.reported(model_reported);
                self.active = Active::Opening { call, chunks };
                self.machine.handle(cascade::Event::Started { call }, now);
            }
            Some(Happened::First(call, Some(Ok(chunk)))) => {
                self.ledger.arrived();
                self.first = Some(chunk);
                self.machine.handle(cascade::Event::Delta { call }, now);
            }
            Some(Happened::First(call, None)) => {
                let error = BackendError::new(ErrorKind::Cut, "the backend's stream ended before it began");
                self.failed(call, error);
            }
            Some(Happened::First(call, Some(Err(error))) | Happened::Replied(call, Err(error))) => {
                self.failed(call, error);
            }
        }
        if !self.machine.ended() {
            self.ledger.flush().await.map_err(GatewayError::NotRecorded)?;
        }
        Ok(())
    }

    fn failed(&mut self, call: u32, error: BackendError) {
        self.active = Active::Nothing;
        let event = answer::failure(call, &error);
        let model = self.ledger.failed(&error);
        self.error = Some((model, error));
        self.machine.handle(event, self.ledger.now());
    }

    fn forward(self, chunks: BoxStream<'static, Result<Chunk, BackendError>>) -> Dispatched {
        let model = self.ledger.model();
        let deadline = self.timers.deadline.map(|at| (at, self.ledger.instant(at)));
        let answering = Answering::new(self.id, self.machine, self.ledger, chunks, self.first, deadline);
        Dispatched { model, body: AnswerBody::Stream(answering.boxed()) }
    }

    async fn finish(mut self) -> Result<Dispatched, GatewayError> {
        let model = self.ledger.model();
        let Some(whole) = self.whole.take() else {
            return Err(self.fail(ErrorKind::Internal).await);
        };
        self.ledger.close(OutcomeStatus::Ok, None);
        self.ledger.recorded().await.map_err(GatewayError::NotRecorded)?;
        Ok(Dispatched { model, body: AnswerBody::Whole(whole) })
    }

    async fn fail(&mut self, kind: ErrorKind) -> GatewayError {
        // A call that is still open was stopped by the machine.
        if let Some(error) = self.ledger.stopped(kind) {
            self.error = Some((self.ledger.model(), error));
        }
        let (model, error) = self.error.take().filter(|(_, error)| error.kind == kind).unwrap_or_else(|| {
            let message = match kind {
                ErrorKind::Timeout => "the request's deadline passed before an answer came",
                _ => "the plan ended without an answer",
            };
            (self.ledger.model(), BackendError::new(kind, message))
        });
        self.ledger.close(OutcomeStatus::Error, Some(kind.as_str()));
        match self.ledger.recorded().await {
            Ok(()) => GatewayError::Backend { id: self.id, model, error },
            Err(reason) => GatewayError::NotRecorded(reason),
        }
    }
}
