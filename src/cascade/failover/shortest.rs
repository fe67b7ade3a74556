//! The shortest path from what is passed, through candidates, to an answer (Dijkstra, "A note on two problems in connexion with
//! graphs", 1959). A graph has a hundred nodes at most, so the nearest is found by looking at all.

use std::cmp::Ordering;

/// A graph of candidates, by index. No weight is negative or NaN.
pub(super) struct Graph<'a> {
    /// Weight of calling each; `None` is infinite.
    pub call: &'a [Option<f64>],
    /// Weight from each to the end.
    pub answer: &'a [f64],
    /// Whether each may be called now.
    pub first: &'a dyn Fn(usize) -> bool,
    /// Whether the second may be called after the first.
    pub edge: &'a dyn Fn(usize, usize) -> bool,
}

/// A path and its weight. Never empty.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Path {
    pub weight: f64,
    pub nodes: Vec<usize>,
}

impl Path {
    fn then(&self, node: usize, weight: f64) -> Self {
        let nodes = self.nodes.iter().copied().chain([node]).collect();
        Self { weight: self.weight + weight, nodes }
    }

    /// The lighter, then the one of fewer calls, then the one whose candidates come first: a total order.
    fn order(&self, other: &Self) -> Ordering {
        let calls = self.nodes.len().cmp(&other.nodes.len());
        self.weight.total_cmp(&other.weight).then(calls).then_with(|| self.nodes.cmp(&other.nodes))
    }
}

impl Graph<'_> {
    /// The least path, or `None` where nothing can be called.
    pub(super) fn shortest(&self) -> Option<Path> {
        let n = self.call.len();
        let start = |i: usize| self.call[i].filter(|_| (self.first)(i)).map(|w| Path { weight: w, nodes: vec![i] });
        let mut open: Vec<Option<Path>> = (0..n).map(start).collect();
        let mut settled = vec![false; n];
        let mut best: Option<Path> = None;
        while let Some(here) = nearest(&open, &settled).cloned() {
            let Some(&at) = here.nodes.last() else { break };
            settled[at] = true;
            let whole = Path { weight: here.weight + self.answer[at], nodes: here.nodes.clone() };
            keep(&mut best, whole);
            for next in (0..n).filter(|next| !settled[*next] && (self.edge)(at, *next)) {
                if let Some(weight) = self.call[next] {
                    keep(&mut open[next], here.then(next, weight));
                }
            }
        }
        best
    }
}

fn nearest<'a>(open: &'a [Option<Path>], settled: &[bool]) -> Option<&'a Path> {
    let unsettled = open.iter().zip(settled).filter(|(_, settled)| !**settled);
    unsettled.filter_map(|(path, _)| path.as_ref()).min_by(|a, b| a.order(b))
}

fn keep(best: &mut Option<Path>, path: Path) {
    if best.as_ref().is_none_or(|best| path.order(best).is_lt()) {
        *best = Some(path);
    }
}
