//! The calls that may follow an error: in the policy's order, or by the shortest path through the [`failover`] graph. Models that
//! cannot be called when the error comes are passed over.

use std::collections::VecDeque;

use super::{
    failover::{Failover, NoPath, Room},
    scope::Scope,
};
use crate::domain::{CallSpec, ErrorKind, FailoverGraph, Mask, What};

/// What of a request's fallback may still follow.
#[derive(Debug)]
pub(super) enum Fallback {
    /// Calls with their indices, in order.
    Order(VecDeque<(u32, CallSpec)>),
    Graph {
        calls: Vec<CallSpec>,
        graph: Box<Failover>,
        no_path: Option<Box<NoPath>>,
    },
}

impl Fallback {
    /// Over these calls. A graph that makes no sense, which compiling a policy refuses, leaves them in their order.
    pub(super) fn new(calls: Vec<CallSpec>, graph: Option<&FailoverGraph>) -> Self {
        let graph = graph.and_then(|graph| Failover::of(graph, calls.iter().map(|call| call.model.as_str())).ok());
        match graph {
            Some(graph) => Self::Graph { calls, graph: Box::new(graph), no_path: None },
            None => Self::Order((0..).zip(calls).collect()),
        }
    }

    /// A call of a model has failed.
    pub(super) fn failed(&mut self, model: &str, kind: ErrorKind) {
        if let Self::Graph { graph, .. } = self {
            graph.fail(model, kind);
        }
    }

    /// What follows an error of this kind: a call of a model that the request has not tried; or what it would have overrun, of
    /// the last that was masked.
    pub(super) fn next(&mut self, kind: ErrorKind, scope: &mut Scope) -> (Option<CallSpec>, Option<Mask>) {
        let mut masked = None;
        match self {
            Self::Order(calls) => {
                while let Some((index, spec)) = calls.pop_front() {
                    if scope.tried(&spec.model) {
                        continue;
                    }
                    if scope.is_down(&spec.model) {
                        scope.note(&[], What::FallbackDown { index });
                        continue;
                    }
                    let Err(by) = scope.admits(&spec) else { return (Some(spec), masked) };
                    scope.note(&[], What::FallbackMasked { index, by });
                    // That time has run out says more than what else is spent.
                    masked = masked.filter(|mask| *mask == Mask::Deadline).or(Some(by));
                }
            }
            Self::Graph { calls, graph, no_path } => {
                // A model whose answer was rejected, or whose call was stopped, is not asked again either.
                for call in calls.iter().filter(|call| scope.tried(&call.model)) {
                    if graph.is_untried(&call.model) {
                        graph.fail(&call.model, kind);
                    }
                }
                for call in calls.iter() {
                    graph.set_down(&call.model, scope.is_down(&call.model));
                }
                loop {
                    let (time_left, usd_left) = scope.left();
                    let hop = match graph.next(&Room { now: scope.now, time_left, usd_left }) {
                        Ok(hop) => hop,
                        Err(none) => {
                            scope.note(&[], What::NoPath { models: calls.len() as u32 });
                            *no_path = Some(Box::new(none));
                            break;
                        }
                    };
                    let Some(spec) = calls.get(hop.index) else { break };
                    let index = hop.index as u32;
                    let Err(by) = scope.admits(spec) else {
                        scope.note(&[], What::FailedOver { index, weight: hop.weight });
                        return (Some(spec.clone()), masked);
                    };
                    scope.note(&[], What::FallbackMasked { index, by });
                    masked = masked.filter(|mask| *mask == Mask::Deadline).or(Some(by));
                    graph.fail(&spec.model, by.error());
                }
            }
        }
        (None, masked)
    }

    /// Why nothing was left.
    pub(super) fn no_path(&self) -> Option<&NoPath> {
        match self {
            Self::Order(_) => None,
            Self::Graph { no_path, .. } => no_path.as_deref(),
        }
    }
}
