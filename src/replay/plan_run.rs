//! Runs a plan again over recorded answers, by the very machine that serves ([`crate::cascade::Machine`]): no call is made,
//! no clock is read, and nothing is drawn that the seed does not give.
//!
//! A source of answers ([`Answers`]) says of each call that the machine starts how it ended, after how long and at what
//! cost. What it does not know is a miss: it ends the run, which is counted and never guessed at. Time is virtual:
//! instants are the begin plus recorded latencies, timers run out when they were set for, and of what happens at the same
//! instant comes first what was begun first.
//!
//! Sources: the attempts of one recorded decision ([`journal`]), and a row of a matrix of outcomes ([`outcomes`]).

pub mod journal;
pub mod outcomes;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    cascade::{Answered, Command, Event, Input, Machine, Setup, Timer},
    domain::{AttemptReason, CallSpec, ErrorKind, Facts, Micros, Note, Place, Plan, Reading, Score, Spend},
};

/// A call whose answer is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its number in the run, from 0.
    pub call: u32,
    pub spec: &'a CallSpec,
    pub why: AttemptReason,
    pub input: &'a Input,
    /// The node that makes it.
    pub at: &'a [u32],
    pub now: Micros,
}

/// How a recorded call ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    Answers(Facts),
    /// `retry_after`: how long the server asked to be left alone, in microseconds.
    Fails {
        kind: ErrorKind,
        retry_after: Option<i64>,
        /// The models that could not be called then.
        down: Vec<String>,
    },
    /// Not within its record: it was cancelled, or the record breaks off.
    Never,
}

/// A recorded answer, or error.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Which one it is, in the source's own numbers.
    pub answer: usize,
    pub ending: Ending,
    pub cost: Spend,
    /// Microseconds from the call's start to the first piece of its answer, where it came in pieces.
    pub first: Option<i64>,
    /// What was known of the answer while it came, where it did not come to its end.
    pub known: Vec<Reading>,
    /// Microseconds from the call's start to its end.
    pub latency: i64,
}

/// Where recorded answers are from.
pub trait Answers {
    /// What came of the call; `None` where such a call was never recorded.
    fn answer(&mut self, asked: &Asked<'_>) -> Option<Recorded>;

    /// When a timer that was set for `at` ran out, not before; `None`: something else happened before it did.
    fn rings(&mut self, _timer: Timer, at: Micros) -> Option<Micros> {
        Some(at)
    }

    /// Whether what would follow this timer, a retry or a hedge, was denied for the sake of other requests.
    fn denies(&mut self, _timer: Timer) -> bool {
        false
    }
}

/// One call of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    pub model: String,
    pub why: AttemptReason,
    pub at: Place,
    /// The recorded answer, in the source's numbers.
    pub answer: usize,
    /// A call that was cancelled costs what is recorded of it.
    pub cost: Spend,
    /// Whether the machine wanted nothing more of it before it was through.
    pub cancelled: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By the answer of this call, which is this recorded one.
    Answered { call: u32, answer: usize },
    /// With an error.
    Failed { kind: ErrorKind },
    /// A call of this model was never recorded, so that nobody knows.
    Missed { call: u32, model: String },
    /// The record ends before the plan does.
    Open,
}

/// One run of a plan over recorded answers.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRun {
    pub end: End,
    /// In the order of their numbers; without the one that was missed.
    pub calls: Vec<Made>,
    /// Of all calls.
    pub cost: Spend,
    /// Microseconds from the begin to the end.
    pub latency: i64,
    pub notes: Vec<Note>,
}

impl PlanRun {
    /// The call that answered.
    pub fn served(&self) -> Option<&Made> {
        match self.end {
            End::Answered { call, .. } => self.calls.get(call as usize),
            _ => None,
        }
    }

    /// Whether a call was wanted that was never recorded.
    pub fn missed(&self) -> bool {
        matches!(self.end, End::Missed { .. })
    }
}

/// Runs a plan over recorded answers, from an instant on.
pub fn run(setup: &Setup, begin: Micros, answers: &mut impl Answers) -> PlanRun {
    Driver {
        plan: &setup.plan,
        answers,
        now: begin,
        coming: BTreeMap::new(),
        sequence: 0,
        calls: Vec::new(),
        notes: Vec::new(),
    }
    .drive(Machine::new(setup.clone(), begin), begin)
}

struct Driver<'a, A> {
    plan: &'a Plan,
    answers: &'a mut A,
    now: Micros,
    /// What will happen, by its instant and then by when it was begun.
    coming: BTreeMap<(Micros, u64), Event>,
    sequence: u64,
    calls: Vec<Made>,
    notes: Vec<Note>,
}

impl<A: Answers> Driver<'_, A> {
    fn drive(mut self, mut machine: Machine, begin: Micros) -> PlanRun {
        let end = loop {
            if let Some(end) = self.obey(&mut machine) {
                break end;
            }
            let Some(((at, _), event)) = self.coming.pop_first() else { break End::Open };
            self.now = self.now.max(at);
            machine.handle(event, self.now);
        };
        let cost = self.calls.iter().fold(Spend::default(), |sum, made| sum.saturating_add(made.cost));
        PlanRun { end, calls: self.calls, cost, latency: self.now.saturating_sub(begin), notes: self.notes }
    }

    /// Does what the machine says; how the run ended, where it has.
    fn obey(&mut self, machine: &mut Machine) -> Option<End> {
        while let Some(command) = machine.poll() {
            match command {
                Command::Start { call, spec, why, input, at } => {
                    let asked = Asked { call, spec: &spec, why, input: &input, at: &at, now: self.now };
                    let Some(recorded) = self.answers.answer(&asked) else {
                        return Some(End::Missed { call, model: spec.model });
                    };
                    self.begin(call, &at, &recorded);
                    let Recorded { answer, cost, .. } = recorded;
                    self.calls.push(Made { model: spec.model, why, at, answer, cost, cancelled: false });
                }
                Command::Cancel { call } => {
                    if let Some(made) = self.calls.get_mut(call as usize) {
                        made.cancelled = true;
                    }
                }
                Command::SetTimer { timer: timer @ Timer::Backoff { call }, .. } if self.answers.denies(timer) => {
                    machine.handle(Event::RetryDenied { call }, self.now);
                }
                Command::SetTimer { timer: timer @ Timer::Hedge { call }, at } if self.answers.denies(timer) => {
                    let denied = self.answers.rings(timer, at).unwrap_or(at);
                    self.expect(denied.max(at), Event::HedgeDenied { call });
                }
                Command::SetTimer { timer, at } => {
                    if let Some(rings) = self.answers.rings(timer, at) {
                        self.expect(rings.max(at), Event::Timer(timer));
                    }
                }
                Command::Note(note) => self.notes.push(note),
                // The end says whose answer it is.
                Command::Forward { .. } | Command::Emit { .. } => {}
                Command::Finish { call } => {
                    let answer = self.calls.get(call as usize).map_or(0, |made| made.answer);
                    return Some(End::Answered { call, answer });
                }
                Command::Fail { kind, .. } => return Some(End::Failed { kind }),
            }
        }
        None
    }

    /// What will be heard of a call that begins now.
    fn begin(&mut self, call: u32, at: &[u32], recorded: &Recorded) {
        let end = self.now.saturating_add(recorded.latency.max(0));
        self.expect(self.now, Event::Started { call });
        if let Some(first) = recorded.first {
            let first = self.now.saturating_add(first.max(0)).min(end);
            self.expect(first, Event::Delta { call });
            // The first token is known with the first piece; the least likely one only matters where it stopped the call.
            let watched = self.plan.watched_at(at);
            let known = match &recorded.ending {
                Ending::Answers(facts) => &facts.scores,
                Ending::Fails { .. } | Ending::Never => &recorded.known,
            };
            let of = |is: fn(Score) -> bool| -> Vec<Reading> {
                known.iter().filter(|reading| watched.contains(&reading.score) && is(reading.score)).copied().collect()
            };
            let begin = of(|score| score == Score::FirstTokenEntropy);
            let rest = of(|score| score != Score::FirstTokenEntropy);
            if !begin.is_empty() {
                self.expect(first, Event::Early { call, readings: begin });
            }
            if !rest.is_empty() && recorded.ending == Ending::Never {
                self.expect(end, Event::Early { call, readings: rest });
            }
        }
        match &recorded.ending {
            Ending::Answers(facts) => {
                let answer = Arc::new(Answered { facts: facts.clone(), cost: recorded.cost });
                self.expect(end, Event::Done { call, answer });
            }
            Ending::Fails { kind, retry_after, down } => {
                let (kind, retry_after, down) = (*kind, *retry_after, down.clone());
                self.expect(end, Event::Failed { call, kind, retry_after, cost: recorded.cost, down });
            }
            Ending::Never => {}
        }
    }

    fn expect(&mut self, at: Micros, event: Event) {
        self.coming.insert((at, self.sequence), event);
        self.sequence += 1;
    }
}
