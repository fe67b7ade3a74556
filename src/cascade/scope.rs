//! What all nodes of one machine share: the clock, the numbering of calls, the bounds, and the commands given.
//!
//! Money is reserved as a call begins (its worst case) and settled as it ends (what it cost). A call that was cancelled is
//! never heard of again, so that its reservation counts as spent: the budget holds whatever it did.

use std::collections::{BTreeMap, VecDeque};

use crate::domain::{AttemptReason, CallSpec, ErrorKind, Mask, MicroUsd, Micros, Note, Place, Spend, What};

use super::{Command, Input, Limits, RetryPolicy, retry};

/// What is left of a request's bounds. A copy serves to try out whether something fits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    late: bool,
    calls: u32,
    usd: Option<MicroUsd>,
    tokens: Option<u64>,
}

impl Room {
    /// Takes one call of this worst case.
    pub(super) fn take(&mut self, worst: Spend) -> Result<(), Mask> {
        if self.late {
            return Err(Mask::Deadline);
        }
        let calls = self.calls.checked_sub(1).ok_or(Mask::Calls)?;
        let usd = self.usd.map(|usd| usd.checked_sub(worst.usd).ok_or(Mask::Budget)).transpose()?;
        let tokens = self.tokens.map(|tokens| tokens.checked_sub(worst.tokens).ok_or(Mask::Tokens)).transpose()?;
        *self = Self { late: false, calls, usd, tokens };
        Ok(())
    }

    /// Reserves the worst case of a call that begins.
    fn reserve(&mut self, worst: Spend) {
        self.calls = self.calls.saturating_sub(1);
        self.usd = self.usd.map(|usd| usd.saturating_sub(worst.usd));
        self.tokens = self.tokens.map(|tokens| tokens.saturating_sub(worst.tokens));
    }

    /// Gives back what was reserved for a call that is not made.
    fn release(&mut self, worst: Spend) {
        self.calls = self.calls.saturating_add(1);
        self.settle(worst, Spend::default());
    }

    /// Puts what a call cost in the place of what was reserved for it.
    fn settle(&mut self, reserved: Spend, cost: Spend) {
        self.usd = self.usd.map(|usd| usd.saturating_add(reserved.usd).saturating_sub(cost.usd));
        self.tokens = self.tokens.map(|tokens| tokens.saturating_add(reserved.tokens).saturating_sub(cost.tokens));
    }
}

/// What all nodes of one machine share.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) now: Micros,
    /// Whether a part of an answer has gone to the client.
    pub(super) forwarded: bool,
    /// Models that could not be called when a call last failed.
    pub(super) down: Vec<String>,
    retry: RetryPolicy,
    deadline: Option<Micros>,
    seed: u64,
    calls: u32,
    room: Room,
    worst: BTreeMap<String, Spend>,
    /// When the first token is due, and how long each model is expected to take to it.
    first_token_by: Option<Micros>,
    waits: BTreeMap<String, i64>,
    /// What is reserved for each running call.
    running: BTreeMap<u32, Spend>,
    /// Models that were called, by call.
    models: Vec<String>,
    retries: u32,
    commands: VecDeque<Command>,
}

impl Scope {
    pub(super) fn new(
        retry: RetryPolicy,
        limits: Limits,
        worst: BTreeMap<String, Spend>,
        waits: BTreeMap<String, i64>,
        seed: u64,
        now: Micros,
    ) -> Self {
        Self {
            now,
            forwarded: false,
            down: Vec::new(),
            retry,
            deadline: limits.deadline.map(|d| now.saturating_add(d)),
            seed,
            calls: 0,
            room: Room { late: false, calls: limits.max_calls.max(1), usd: limits.budget, tokens: limits.tokens },
            worst,
            first_token_by: limits.first_token.map(|time| now.saturating_add(time)),
            waits,
            running: BTreeMap::new(),
            models: Vec::new(),
            retries: 0,
            commands: VecDeque::with_capacity(4),
        }
    }

    pub(super) fn deadline(&self) -> Option<Micros> {
        self.deadline
    }

    pub(super) fn push(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    pub(super) fn note(&mut self, at: &[u32], what: What) {
        self.push(Command::Note(Note { at: at.to_vec(), what }));
    }

    pub(super) fn pop(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// What is left at this instant.
    pub(super) fn room(&self) -> Room {
        Room { late: self.deadline.is_some_and(|deadline| self.now >= deadline), ..self.room }
    }

    /// The most that the call can cost.
    pub(super) fn worst(&self, spec: &CallSpec) -> Spend {
        spec.worst.or_else(|| self.worst.get(&spec.model).copied()).unwrap_or(Spend::MAX)
    }

    /// How long these models are expected to take to their first token from now on.
    pub(super) fn expect(&mut self, waits: &BTreeMap<String, i64>) {
        self.waits.extend(waits.iter().map(|(model, wait)| (model.clone(), *wait)));
    }

    /// Whether a model could not be called when a call last failed.
    pub(super) fn is_down(&self, model: &str) -> bool {
        self.down.iter().any(|down| down == model)
    }

    /// Whether an answer that begins with calls of these models, all at once, is expected to begin in time.
    pub(super) fn in_time(&self, models: &[String]) -> Result<(), Mask> {
        let wait = models.iter().filter_map(|model| self.waits.get(model)).max().copied().unwrap_or(0);
        match self.first_token_by {
            Some(by) if self.now.saturating_add(wait) > by => Err(Mask::FirstToken),
            _ => Ok(()),
        }
    }

    /// Whether the request may make this call now.
    pub(super) fn admits(&self, spec: &CallSpec) -> Result<(), Mask> {
        self.room().take(self.worst(spec))
    }

    /// Begins a call that [`Scope::admits`].
    pub(super) fn start(&mut self, spec: &CallSpec, why: AttemptReason, input: &Input, at: &Place) -> u32 {
        let call = self.calls;
        self.calls += 1;
        let worst = self.worst(spec);
        self.room.reserve(worst);
        self.running.insert(call, worst);
        self.models.push(spec.model.clone());
        self.push(Command::Start { call, spec: spec.clone(), why, input: input.clone(), at: at.clone() });
        call
    }

    /// Keeps room for a call that is to be made later, which [`Scope::release`] gives back.
    pub(super) fn hold(&mut self, spec: &CallSpec) {
        self.room.reserve(self.worst(spec));
    }

    pub(super) fn release(&mut self, spec: &CallSpec) {
        self.room.release(self.worst(spec));
    }

    pub(super) fn cancel(&mut self, call: u32) {
        self.running.remove(&call);
        self.push(Command::Cancel { call });
    }

    pub(super) fn forward(&mut self, call: u32) {
        self.forwarded = true;
        self.push(Command::Forward { call });
    }

    pub(super) fn is_running(&self, call: u32) -> bool {
        self.running.contains_key(&call)
    }

    /// A running call has ended and cost this.
    pub(super) fn settle(&mut self, call: u32, cost: Spend) {
        let Some(reserved) = self.running.remove(&call) else { return };
        self.room.settle(reserved, cost);
    }

    /// The models of the request's calls, by call.
    pub(super) fn models(&self) -> &[String] {
        &self.models
    }

    /// Microseconds and USD that are left, where they are bounded.
    pub(super) fn left(&self) -> (Option<i64>, Option<f64>) {
        (self.deadline.map(|deadline| deadline - self.now), self.room.usd.map(|usd| usd as f64 / 1e6))
    }

    /// Whether the model has been called in this request.
    pub(super) fn tried(&self, model: &str) -> bool {
        self.models.iter().any(|tried| tried == model)
    }

    /// When the same call may be made again; `None`: not at all. Draws from the seed's place for the failed call.
    pub(super) fn retry_at(
        &mut self,
        spec: &CallSpec,
        call: u32,
        kind: ErrorKind,
        retry: u32,
        retry_after: Option<i64>,
    ) -> Option<Micros> {
        if self.forwarded || self.retries >= self.retry.budget || self.admits(spec).is_err() {
            return None;
        }
        let seed = self.seed ^ retry::mix(u64::from(call));
        let at = self.now.saturating_add(self.retry.wait(kind, retry, retry_after, seed)?);
        // A retry that the deadline would cut off at once is none.
        if self.deadline.is_some_and(|deadline| at >= deadline) {
            return None;
        }
        self.retries += 1;
        Some(at)
    }

    /// A retry that [`Scope::retry_at`] allowed is not made.
    pub(super) fn retry_denied(&mut self) {
        self.retries = self.retries.saturating_sub(1);
    }
}
