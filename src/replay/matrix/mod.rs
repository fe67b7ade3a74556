//! Outcomes of a fleet on a set of queries: the matrix of scores and costs from which routers are fitted and judged.
//!
//! Read from Parquet or JSON lines with one row per (query, model): `query, model, score` (0 to 1), and where they are known
//! `query_id, task, cost_usd, latency_ms, response`, under these names or others. Of responses only is kept which of them say
//! the same ([`crate::cascade::Forms`]), which plans that compare answers ask for. Costs that a file does not have come from a price
//! list.

mod read;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

pub use self::read::{COLUMNS, Columns, How};
use super::metrics::{Frame, Point, SplitMix};
use crate::cascade::Forms;

/// Why outcomes cannot be used; names the file, and the column or what to do.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct MatrixError {
    pub file: String,
    pub reason: String,
}

/// One query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: String,
    /// Empty where the file says none.
    pub task: String,
    pub text: String,
}

/// USD per million tokens by model name, and how many tokens a call is taken to have where a file does not say.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    pub tokens_per_call: f64,
    pub usd_per_million: BTreeMap<String, f64>,
}

impl Prices {
    /// The list that comes with weir: what the public outcome sets say of their models.
    ///
    /// # Errors
    /// Never for the list of this build; a test reads it.
    pub fn builtin() -> Result<Self, String> {
        serde_json::from_str(include_str!("../../../eval/bench/prices.json")).map_err(|e| e.to_string())
    }
}

/// Queries times models.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The file's name without its ending.
    pub name: String,
    /// BLAKE3 of the file, hexadecimal.
    pub hash: String,
    /// Rows of the file that were read.
    pub rows: usize,
    /// In name order.
    pub models: Vec<String>,
    pub queries: Vec<Query>,
    /// Queries x models, row-major.
    scores: Vec<f64>,
    costs: Vec<f64>,
    /// In milliseconds; empty unless all outcomes have one.
    latencies: Vec<f64>,
    /// Numbers of what answers say: those of one query with the same number say the same. Empty where the file has no
    /// responses; `None` for one that is not there.
    forms: Vec<Option<u32>>,
    /// Rows and queries that could not be used, by reason.
    pub left_out: BTreeMap<String, usize>,
}

impl Matrix {
    /// Reads a file of Parquet or of JSON lines. Queries that lack a model's outcome are left out, since nothing could be
    /// compared on them; so are those that lack a cost where other rows of the file have one. Both are counted.
    ///
    /// # Errors
    /// When the file is neither, lacks a column, or has no costs and the price list no price for one of its models; and for
    /// every cell that cannot be right, by row and column.
    pub fn read(path: &Path, how: &How) -> Result<Self, MatrixError> {
        read::read(path, how).map_err(|reason| MatrixError { file: path.display().to_string(), reason })
    }

    /// Every `.parquet` and `.jsonl` file of a directory, or the one file, in name order.
    ///
    /// # Errors
    /// As for [`Matrix::read`], and when there is none.
    pub fn read_all(path: &Path, how: &How) -> Result<Vec<Self>, MatrixError> {
        if !path.is_dir() {
            return Ok(vec![Self::read(path, how)?]);
        }
        let wrong = |reason: String| MatrixError { file: path.display().to_string(), reason };
        let entries = std::fs::read_dir(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let mut files: Vec<_> = entries
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "parquet" || e == "jsonl" || e == "ndjson"))
            .collect();
        files.sort();
        if files.is_empty() {
            return Err(wrong("holds no .parquet and no .jsonl file".to_owned()));
        }
        files.iter().map(|file| Self::read(file, how)).collect()
    }

    /// A matrix of given cells, for tests and other sources. `scores` and `costs` are queries x models.
    pub fn of(name: &str, models: Vec<String>, queries: Vec<Query>, scores: Vec<f64>, costs: Vec<f64>) -> Self {
        let rows = scores.len();
        Self {
            name: name.to_owned(),
            hash: String::new(),
            rows,
            models,
            queries,
            scores,
            costs,
            latencies: Vec::new(),
            forms: Vec::new(),
            left_out: BTreeMap::new(),
        }
    }

    /// The matrix with what was answered, queries x models.
    pub fn with_responses(mut self, responses: &[Option<String>]) -> Self {
        let number = |row: &[Option<String>]| {
            let mut forms = Forms::default();
            row.iter().map(|response| response.as_deref().map(|text| forms.number(text))).collect::<Vec<_>>()
        };
        self.forms = responses.chunks(self.models.len().max(1)).flat_map(number).collect();
        self
    }

    /// The matrix of the models at these places, in this order.
    pub fn with_models(&self, places: &[usize]) -> Self {
        fn of_models<T: Copy>(of: &[T], models: usize, places: &[usize]) -> Vec<T> {
            of.chunks_exact(models.max(1)).flat_map(|row| places.iter().map(|m| row[*m])).collect()
        }
        let pick = |of: &[f64]| of_models(of, self.models.len(), places);
        let models = places.iter().map(|m| self.models[*m].clone()).collect();
        Self {
            models,
            scores: pick(&self.scores),
            costs: pick(&self.costs),
            latencies: pick(&self.latencies),
            forms: of_models(&self.forms, self.models.len(), places),
            ..self.clone()
        }
    }

    pub fn len(&self) -> usize {
        self.queries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    /// Scores of a query, by model.
    pub fn scores(&self, query: usize) -> &[f64] {
        let k = self.models.len();
        &self.scores[query * k..(query + 1) * k]
    }

    /// Costs of a query in USD, by model.
    pub fn costs(&self, query: usize) -> &[f64] {
        let k = self.models.len();
        &self.costs[query * k..(query + 1) * k]
    }

    /// Latencies of a query in milliseconds, by model; of all queries or of none.
    pub fn latencies(&self, query: usize) -> Option<&[f64]> {
        let k = self.models.len();
        self.latencies.get(query * k..(query + 1) * k)
    }

    /// The number of what a model's answer to a query says, among those to the same query.
    pub fn form(&self, query: usize, model: usize) -> Option<u32> {
        self.forms.get(query * self.models.len() + model).copied().flatten()
    }

    /// Whether it is known what was answered.
    pub fn has_responses(&self) -> bool {
        !self.forms.is_empty()
    }

    fn forms(&self, query: usize) -> &[Option<u32>] {
        let k = self.models.len();
        self.forms.get(query * k..(query + 1) * k).unwrap_or_default()
    }

    /// Multiplies the costs of each model.
    pub(super) fn scale_costs(&mut self, factors: &[f64]) {
        self.costs.iter_mut().zip(factors.iter().cycle()).for_each(|(cost, factor)| *cost *= factor);
    }

    /// The queries at these places.
    pub fn subset(&self, places: &[usize]) -> Self {
        Self {
            name: self.name.clone(),
            hash: self.hash.clone(),
            rows: places.len() * self.models.len(),
            models: self.models.clone(),
            queries: places.iter().map(|q| self.queries[*q].clone()).collect(),
            scores: places.iter().flat_map(|q| self.scores(*q)).copied().collect(),
            costs: places.iter().flat_map(|q| self.costs(*q)).copied().collect(),
            latencies: places.iter().filter_map(|q| self.latencies(*q)).flatten().copied().collect(),
            forms: places.iter().flat_map(|q| self.forms(*q)).copied().collect(),
            left_out: self.left_out.clone(),
        }
    }

    /// A fold in 0..k for every query, at random under `seed`; equal texts are in the same fold.
    pub fn folds(&self, k: usize, seed: u64) -> Vec<usize> {
        let texts: BTreeSet<&str> = self.queries.iter().map(|q| q.text.as_str()).collect();
        let order = SplitMix(seed).order(texts.len());
        let fold: BTreeMap<&str, usize> = texts.into_iter().zip(order).map(|(text, n)| (text, n % k.max(1))).collect();
        self.queries.iter().map(|q| fold.get(q.text.as_str()).copied().unwrap_or(0)).collect()
    }

    /// Mean cost and score of each model over the queries at `places`.
    pub fn means(&self, places: &[usize]) -> Vec<Point> {
        let n = places.len().max(1) as f64;
        let mut out = vec![Point { cost: 0.0, score: 0.0 }; self.models.len()];
        for q in places {
            for (m, point) in out.iter_mut().enumerate() {
                point.cost += self.costs(*q)[m] / n;
                point.score += self.scores(*q)[m] / n;
            }
        }
        out
    }

    /// What routers are compared with on the queries at `places`.
    pub fn frame(&self, places: &[usize]) -> Option<Frame> {
        Frame::of(self.means(places))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample(n: usize) -> Matrix {
        let query = |i: usize| Query { id: i.to_string(), task: String::new(), text: format!("question {}", i / 2) };
        let models = vec!["cheap".to_owned(), "dear".to_owned()];
        let scores = (0..n).flat_map(|i| [f64::from(i % 2 == 0), 1.0]).collect();
        let costs = (0..n).flat_map(|_| [0.001, 0.01]).collect();
        Matrix::of("sample", models, (0..n).map(query).collect(), scores, costs)
    }

    #[test]
    fn equal_texts_share_a_fold_and_folds_are_even() {
        let matrix = sample(200);
        let folds = matrix.folds(5, 7);
        for pair in folds.chunks(2) {
            assert_eq!(pair[0], pair[1]);
        }
        for fold in 0..5 {
            assert_eq!(folds.iter().filter(|f| **f == fold).count(), 40);
        }
        assert_ne!(folds, matrix.folds(5, 8));
    }

    #[test]
    fn means_and_frames_are_over_the_places_given() {
        let matrix = sample(10);
        let even: Vec<usize> = (0..10).step_by(2).collect();
        assert_eq!(matrix.means(&even)[0].score, 1.0);
        assert!(matrix.frame(&even).is_none(), "the cheapest is the best there");
        let all: Vec<usize> = (0..10).collect();
        let frame = matrix.frame(&all).unwrap();
        assert!((frame.from - 0.001).abs() < 1e-12 && (frame.to - 0.01).abs() < 1e-12 && frame.best == 1);
        let some = matrix.subset(&[3, 4]);
        assert_eq!((some.len(), some.scores(0), some.queries[1].id.as_str()), (2, &[0.0, 1.0][..], "4"));
    }

    #[test]
    fn the_price_list_of_this_build_reads() {
        assert!(Prices::builtin().unwrap().usd_per_million.len() >= 9);
    }

    #[test]
    fn what_is_no_parquet_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outcomes.parquet");
        std::fs::write(&path, "PAR1query,model\n").unwrap();
        let error = Matrix::read(&path, &How::default()).unwrap_err().to_string();
        assert!(error.contains("outcomes.parquet: is no Parquet file"), "{error}");
        let error = Matrix::read_all(dir.path().join("none").as_path(), &How::default()).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
