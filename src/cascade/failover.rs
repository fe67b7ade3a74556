//! Which model is tried next after an error: the shortest path through a graph of the request's fallback candidates (after Bholani,
//! "Graph-based self-healing tool routing", arXiv 2603.01548).
//!
//! Nodes are a start (the planned call that failed), the candidates in the policy's order, and an end (an answer). Edges into a
//! candidate weigh what calling it takes, its edge to the end how little it can be relied upon ([`Parts`]). A failed or vetoed
//! candidate's edges are infinite ([`monitors`]). After each failure the path is sought again from what is passed: the start, and every
//! candidate that failed or is vetoed and could have been called. Nothing is tried twice, and where nothing is left, [`NoPath`] says why
//! of each candidate.
//!
//! By default every candidate may follow the start and every other. With edges of its own ([`Failover::with_edges`]) a policy says what
//! only follows what. A path of several candidates counts on all but the last to fail, and pays for each.
//!
//! Pure: time is in [`Room`], nothing is drawn. Whether an error is to be answered at all (`fallback.on`) is the caller's to know.

mod hop;
mod monitors;
mod shortest;
#[cfg(test)]
mod tests;
mod weights;

pub use hop::{Hop, Left, Leg, NoPath};
pub use monitors::{Monitor, Room, Why};
use serde::{Deserialize, Serialize};
use shortest::Graph;
pub use weights::{Added, Parts};

pub use crate::domain::{Availability, Edge, FailoverWeights, Health};
use crate::domain::{ErrorKind, FailoverGraph};

/// Candidates that one request may have.
pub const MOST_CANDIDATES: usize = 100;

/// A model that may answer in place of the planned one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Fleet name.
    pub name: String,
    pub health: Health,
}

/// What a policy's author got wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FailoverError {
    #[error("the fallback weight `{name}` is {value}; expected a number from 0 to 1000000")]
    Weight { name: &'static str, value: f64 },
    #[error("the fallback names `{name}` twice; expected each model once")]
    Twice { name: String },
    #[error("the fallback has {n} models; at most {MOST_CANDIDATES} are allowed")]
    TooMany { n: usize },
    #[error("an edge names `{name}`, which is no model of the fallback")]
    Unknown { name: String },
    #[error("an edge leads from `{name}` to itself; nothing is tried twice")]
    Loop { name: String },
    #[error("no edge leads to `{name}`, directly or through others; it could never be tried")]
    Unreachable { name: String },
}

impl FailoverError {
    /// A fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Weight { .. } => "weight",
            Self::Twice { .. } => "twice",
            Self::TooMany { .. } => "too_many",
            Self::Unknown { .. } => "unknown",
            Self::Loop { .. } => "loop",
            Self::Unreachable { .. } => "unreachable",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mark {
    Untried,
    UnderWay,
    Failed(ErrorKind),
}

/// From where a candidate may be called.
#[derive(Clone, Debug, Default)]
struct Follows {
    start: bool,
    after: Vec<usize>,
}

/// The failover of one request.
#[derive(Clone, Debug)]
pub struct Failover {
    candidates: Vec<Candidate>,
    weights: FailoverWeights,
    marks: Vec<Mark>,
    /// Whether it cannot be called now, whatever its health says.
    down: Vec<bool>,
    /// Per candidate; `None`: each may follow the start and every other.
    follows: Option<Vec<Follows>>,
    planned: Vec<(String, ErrorKind)>,
    most: usize,
    hops: usize,
}

impl Failover {
    /// Over a decision's fallback, whose models are these, in its order.
    ///
    /// # Errors
    /// As [`Failover::new`] and [`Failover::with_edges`].
    pub fn of<'a>(graph: &FailoverGraph, models: impl Iterator<Item = &'a str>) -> Result<Self, FailoverError> {
        let health = graph.health.iter().copied().chain(std::iter::repeat(Health::default()));
        let candidates = models.zip(health).map(|(name, health)| Candidate { name: name.to_owned(), health });
        let failover = Self::new(candidates.collect(), graph.weights)?;
        if graph.edges.is_empty() { Ok(failover) } else { failover.with_edges(&graph.edges) }
    }

    /// Over candidates in the policy's order, each of which may follow every other.
    ///
    /// # Errors
    /// Weights out of range, a model named twice, too many models.
    pub fn new(candidates: Vec<Candidate>, weights: FailoverWeights) -> Result<Self, FailoverError> {
        weights.check()?;
        let n = candidates.len();
        if n > MOST_CANDIDATES {
            return Err(FailoverError::TooMany { n });
        }
        let named_before = |i: &usize| candidates[..*i].iter().any(|c| c.name == candidates[*i].name);
        if let Some(i) = (0..n).find(named_before) {
            return Err(FailoverError::Twice { name: candidates[i].name.clone() });
        }
        let (marks, down) = (vec![Mark::Untried; n], vec![false; n]);
        Ok(Self { candidates, weights, marks, down, follows: None, planned: Vec::new(), most: n, hops: 0 })
    }

    /// The same, with these edges only (and each candidate's to the end).
    ///
    /// # Errors
    /// An edge that names no candidate or leads to where it begins; a candidate that no edges lead to.
    pub fn with_edges(mut self, edges: &[Edge]) -> Result<Self, FailoverError> {
        let find = |name: &String| self.place(name).ok_or_else(|| FailoverError::Unknown { name: name.clone() });
        let mut follows = vec![Follows::default(); self.candidates.len()];
        for Edge { after, to } in edges {
            let into = &mut follows[find(to)?];
            match after {
                None => into.start = true,
                Some(after) if after == to => return Err(FailoverError::Loop { name: to.clone() }),
                Some(after) => into.after.push(find(after)?),
            }
        }
        self.follows = Some(follows);
        let reached = self.passed(|_| true);
        match reached.iter().position(|reached| !reached) {
            Some(i) => Err(FailoverError::Unreachable { name: self.candidates[i].name.clone() }),
            None => Ok(self),
        }
    }

    /// The same, with at most `most` hops.
    pub fn with_most(mut self, most: usize) -> Self {
        self.most = most.min(self.candidates.len());
        self
    }

    /// A call has failed, or could not begin. Of a candidate, it is not tried (again); of another model, it is remembered for
    /// [`NoPath`]. Returns whether it is a candidate.
    pub fn fail(&mut self, model: &str, kind: ErrorKind) -> bool {
        match self.place(model) {
            Some(i) => self.marks[i] = Mark::Failed(kind),
            None => self.planned.push((model.to_owned(), kind)),
        }
        self.place(model).is_some()
    }

    /// What is known of a candidate now. Returns whether it is one. A failed one stays failed.
    pub fn update(&mut self, model: &str, health: Health) -> bool {
        let place = self.place(model);
        if let Some(i) = place {
            self.candidates[i].health = health;
        }
        place.is_some()
    }

    /// Whether a candidate cannot be called now, beside what its health says. Returns whether it is one.
    pub fn set_down(&mut self, model: &str, down: bool) -> bool {
        let place = self.place(model);
        if let Some(i) = place {
            self.down[i] = down;
        }
        place.is_some()
    }

    /// What to call next; it then counts as tried. Returns at most as many hops as there are candidates.
    ///
    /// # Errors
    /// Nothing is left: why, of each candidate.
    pub fn next(&mut self, room: &Room) -> Result<Hop, NoPath> {
        let barred: Vec<Option<Why>> = (0..self.candidates.len()).map(|i| self.barred(i, room)).collect();
        let hop = if self.hops < self.most { self.shortest(&barred, room) } else { None };
        let Some(hop) = hop else {
            let candidates = (0..).zip(barred).map(|(i, why)| self.left(i, why.unwrap_or_else(|| self.beyond(i))));
            return Err(NoPath { now: room.now, planned: self.planned.clone(), candidates: candidates.collect() });
        };
        self.marks[hop.index] = Mark::UnderWay;
        self.hops += 1;
        Ok(hop)
    }

    /// Whether it is a candidate that was not given out and is not known to have failed.
    pub fn is_untried(&self, model: &str) -> bool {
        self.place(model).is_some_and(|i| self.marks[i] == Mark::Untried)
    }

    fn place(&self, model: &str) -> Option<usize> {
        self.candidates.iter().position(|candidate| candidate.name == model)
    }

    /// Why a candidate's edges are infinite, if they are.
    fn barred(&self, i: usize, room: &Room) -> Option<Why> {
        match self.marks[i] {
            Mark::Untried => {
                let veto = monitors::veto(&self.candidates[i].health, room);
                veto.or_else(|| self.down[i].then_some(Why::Down))
            }
            Mark::UnderWay => Some(Why::UnderWay),
            Mark::Failed(kind) => Some(Why::Failed { kind }),
        }
    }

    /// Why one that is not barred is not tried either.
    fn beyond(&self, i: usize) -> Why {
        if self.hops >= self.most {
            return Why::HopsSpent { most: self.most };
        }
        let after = self.follows.iter().flat_map(|all| &all[i].after);
        Why::OnlyAfter { models: after.map(|a| self.candidates[*a].name.clone()).collect() }
    }

    fn left(&self, index: usize, why: Why) -> Left {
        Left { index, model: self.candidates[index].name.clone(), why }
    }

    fn shortest(&self, barred: &[Option<Why>], room: &Room) -> Option<Hop> {
        let parts = |(i, c): (usize, &Candidate)| Parts::of(i, &c.health, &self.weights, room);
        let parts: Vec<Parts> = self.candidates.iter().enumerate().map(parts).collect();
        let call: Vec<Option<f64>> = barred.iter().zip(&parts).map(|(b, p)| b.is_none().then(|| p.call())).collect();
        let answer: Vec<f64> = parts.iter().map(Parts::answer).collect();
        let passed = self.passed(|i| barred[i].as_ref().is_some_and(|why| why.monitor().is_some()));
        let first = |i: usize| self.opened(i, &passed);
        let edge = |from: usize, to: usize| self.follows.as_ref().is_none_or(|all| all[to].after.contains(&from));
        let path = Graph { call: &call, answer: &answer, first: &first, edge: &edge }.shortest()?;
        let leg = |&i: &usize| Leg { index: i, model: self.candidates[i].name.clone(), parts: parts[i].clone() };
        let barred = barred.iter().enumerate();
        Some(Hop {
            index: *path.nodes.first()?,
            weight: path.weight,
            path: path.nodes.iter().map(leg).collect(),
            passed_over: barred.filter_map(|(i, why)| Some(self.left(i, why.clone()?))).collect(),
        })
    }

    /// Whether an edge leads to a candidate from the start or from what is passed.
    fn opened(&self, i: usize, passed: &[bool]) -> bool {
        self.follows.as_ref().is_none_or(|all| all[i].start || all[i].after.iter().any(|a| passed[*a]))
    }

    /// The candidates that failed, and of those that `vetoed` names the ones that could have been called: what follows them may be.
    fn passed(&self, vetoed: impl Fn(usize) -> bool) -> Vec<bool> {
        let mut passed: Vec<bool> = self.marks.iter().map(|mark| matches!(mark, Mark::Failed(_))).collect();
        let more = |passed: &[bool]| (0..passed.len()).find(|i| !passed[*i] && vetoed(*i) && self.opened(*i, passed));
        while let Some(i) = more(&passed) {
            passed[i] = true;
        }
        passed
    }
}
