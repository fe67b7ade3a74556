//! `fallback: weights` and `edges` checked: the graph has to make sense whichever models are up.

use super::{
    super::{
        diagnostic::{DiagnosticKind as Kind, suggest},
        source::step,
    },
    Compiler,
};
use crate::{
    cascade::failover::{Failover, FailoverError},
    domain::{Edge, FailoverGraph},
};

impl Compiler<'_> {
    /// The edges of the failover graph, as places in `fallback.to`.
    pub(super) fn failover(&mut self) -> Vec<(Option<usize>, usize)> {
        let Some(spec) = &self.spec.fallback else { return Vec::new() };
        let (to, edges) = (&spec.to, &spec.edges);
        if spec.weights.is_none() && !edges.is_empty() {
            let help = "give `weights`, `{}` for the usual ones";
            let message = "edges are of a graph, which is sought by `weights`";
            self.wrong("/fallback/edges", Kind::Conflict, message, Some(help.into()));
            return Vec::new();
        }
        let graph =
            FailoverGraph { weights: spec.weights.unwrap_or_default(), edges: edges.clone(), ..Default::default() };
        if spec.weights.is_some()
            && let Err(error) = Failover::of(&graph, to.iter().map(String::as_str))
        {
            let at = match &error {
                FailoverError::Weight { name, .. } => step("/fallback/weights", name),
                FailoverError::Twice { .. } | FailoverError::TooMany { .. } => "/fallback/to".to_owned(),
                _ => "/fallback/edges".to_owned(),
            };
            let help = match &error {
                FailoverError::Unknown { name } => {
                    suggest("models of the fallback", name, to.iter().map(String::as_str))
                }
                _ => None,
            };
            self.wrong(&at, Kind::Value, error.to_string(), help);
            return Vec::new();
        }
        let place = |name: &String| to.iter().position(|known| known == name);
        let edge = |Edge { after, to }: &Edge| Some((after.as_ref().and_then(place), place(to)?));
        edges.iter().filter_map(edge).collect()
    }
}
