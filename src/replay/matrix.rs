//! Outcomes of a fleet on a set of queries: the matrix of scores and costs from which routers are fitted and judged.
//!
//! Read from Parquet with one row per (query, model): `query_id, query, model, score` (0 to 1), and where they are known
//! `task, cost_usd, prompt_tokens, completion_tokens`. Costs that a file does not have come from a price list.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
};

use arrow::{
    array::{Array, AsArray, RecordBatch},
    compute::cast,
    datatypes::{DataType, Float64Type},
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::metrics::{Frame, Point, SplitMix};

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
        serde_json::from_str(include_str!("../../eval/bench/prices.json")).map_err(|e| e.to_string())
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
}

impl Matrix {
    /// Reads a file. Queries that lack a model's outcome are left out, since nothing could be compared on them; so are
    /// rows without a cost where other rows of the file have one.
    ///
    /// # Errors
    /// When the file is no Parquet, lacks a column, holds a score outside of 0..1, or has no costs and the price list no
    /// price for one of its models.
    pub fn read(path: &Path, prices: Option<&Prices>) -> Result<Self, MatrixError> {
        let wrong = |reason: String| MatrixError { file: path.display().to_string(), reason };
        let bytes = std::fs::read(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        drop(bytes);
        let file = File::open(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let not_parquet = |e: parquet::errors::ParquetError| wrong(format!("is no Parquet file: {e}"));
        let reader =
            ParquetRecordBatchReaderBuilder::try_new(file).map_err(not_parquet)?.build().map_err(not_parquet)?;
        let mut table = Table::default();
        for batch in reader {
            let batch = batch.map_err(|e| wrong(format!("cannot be read: {e}")))?;
            table.take(&batch).map_err(wrong)?;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        table.finish(name, hash, prices).map_err(wrong)
    }

    /// Every `.parquet` file of a directory, or the one file, in name order.
    ///
    /// # Errors
    /// As for [`Matrix::read`], and when there is none.
    pub fn read_all(path: &Path, prices: Option<&Prices>) -> Result<Vec<Self>, MatrixError> {
        if !path.is_dir() {
            return Ok(vec![Self::read(path, prices)?]);
        }
        let wrong = |reason: String| MatrixError { file: path.display().to_string(), reason };
        let entries = std::fs::read_dir(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let mut files: Vec<_> = entries
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "parquet"))
            .collect();
        files.sort();
        if files.is_empty() {
            return Err(wrong("holds no .parquet file".to_owned()));
        }
        files.iter().map(|file| Self::read(file, prices)).collect()
    }

    /// A matrix of given cells, for tests and other sources. `scores` and `costs` are queries x models.
    pub fn of(name: &str, models: Vec<String>, queries: Vec<Query>, scores: Vec<f64>, costs: Vec<f64>) -> Self {
        let rows = scores.len();
        Self { name: name.to_owned(), hash: String::new(), rows, models, queries, scores, costs }
    }

    /// The matrix of the models at these places, in this order.
    pub fn with_models(&self, places: &[usize]) -> Self {
        let pick = |of: &[f64]| -> Vec<f64> {
            of.chunks_exact(self.models.len().max(1)).flat_map(|row| places.iter().map(|m| row[*m])).collect()
        };
        let models = places.iter().map(|m| self.models[*m].clone()).collect();
        Self { models, scores: pick(&self.scores), costs: pick(&self.costs), ..self.clone() }
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

/// Rows as they come.
#[derive(Default)]
struct Table {
    rows: usize,
    unpriced: usize,
    /// By query id: the query, and by model score, cost and tokens.
    queries: BTreeMap<String, (Query, BTreeMap<String, Cell>)>,
    /// Query ids in the order of the file.
    order: Vec<String>,
    models: BTreeSet<String>,
}

#[derive(Clone, Copy)]
struct Cell {
    score: f64,
    cost: Option<f64>,
}

impl Table {
    fn take(&mut self, batch: &RecordBatch) -> Result<(), String> {
        let column = |name: &str, to: &DataType| match batch.column_by_name(name) {
            Some(column) => cast(column, to).map(Some).map_err(|e| format!("the column `{name}`: {e}")),
            None => Ok(None),
        };
        let needed = |name: &str, to: &DataType| {
            column(name, to)?.ok_or_else(|| {
                format!("has no column `{name}`; outcomes have `query_id`, `query`, `model`, `score` and `cost_usd`")
            })
        };
        let (query, model) = (needed("query", &DataType::Utf8)?, needed("model", &DataType::Utf8)?);
        let score = needed("score", &DataType::Float64)?;
        let (id, task) = (column("query_id", &DataType::Utf8)?, column("task", &DataType::Utf8)?);
        let cost = column("cost_usd", &DataType::Float64)?;
        let (query, model) = (query.as_string::<i32>(), model.as_string::<i32>());
        let score = score.as_primitive::<Float64Type>();
        for row in 0..batch.num_rows() {
            let at = self.rows;
            self.rows += 1;
            let text = |array: &Option<std::sync::Arc<dyn Array>>| {
                let array = array.as_ref().map(|a| a.as_string::<i32>()).filter(|a| a.is_valid(row));
                array.map(|a| a.value(row).to_owned())
            };
            if query.is_null(row) || model.is_null(row) || score.is_null(row) {
                continue;
            }
            let value = score.value(row);
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("row {at}: the score {value} is not between 0 and 1"));
            }
            let cost = cost.as_ref().map(|c| c.as_primitive::<Float64Type>()).filter(|c| c.is_valid(row));
            let cost = cost.map(|c| c.value(row)).filter(|c| c.is_finite() && *c >= 0.0);
            self.unpriced += usize::from(cost.is_none());
            let (query, model) = (query.value(row).to_owned(), model.value(row).to_owned());
            let id = text(&id).unwrap_or_else(|| query.clone());
            if !self.queries.contains_key(&id) {
                self.order.push(id.clone());
            }
            let fresh =
                || (Query { id: id.clone(), task: text(&task).unwrap_or_default(), text: query }, BTreeMap::new());
            let entry = self.queries.entry(id.clone()).or_insert_with(fresh);
            self.models.insert(model.clone());
            entry.1.insert(model, Cell { score: value, cost });
        }
        Ok(())
    }

    fn finish(mut self, name: String, hash: String, prices: Option<&Prices>) -> Result<Matrix, String> {
        let models: Vec<String> = self.models.into_iter().collect();
        if models.is_empty() {
            return Err("holds no outcomes".to_owned());
        }
        // Either the file has costs, or all of them come from the list: the two do not mix.
        let listed: Option<Vec<f64>> = match (self.unpriced == self.rows, prices) {
            (false, _) => None,
            (true, None) => {
                return Err("has no `cost_usd`; give the models' prices with `--prices FILE`".to_owned());
            }
            (true, Some(prices)) => {
                let of = |model: &String| {
                    let price = prices.usd_per_million.get(model).map(|usd| usd * prices.tokens_per_call / 1e6);
                    price.ok_or_else(|| {
                        format!("has no `cost_usd`, and the price list has no price for `{model}`; give one with `--prices FILE`")
                    })
                };
                Some(models.iter().map(of).collect::<Result<_, _>>()?)
            }
        };
        let (mut queries, mut scores, mut costs) = (Vec::new(), Vec::new(), Vec::new());
        for id in self.order {
            let Some((query, cells)) = self.queries.remove(&id) else { continue };
            let row: Option<Vec<(f64, f64)>> = models
                .iter()
                .enumerate()
                .map(|(m, model)| {
                    let cell = cells.get(model)?;
                    let cost = listed.as_ref().map_or(cell.cost, |listed| listed.get(m).copied());
                    Some((cell.score, cost?))
                })
                .collect();
            let Some(row) = row else { continue };
            queries.push(query);
            scores.extend(row.iter().map(|(score, _)| score));
            costs.extend(row.iter().map(|(_, cost)| cost));
        }
        if queries.is_empty() {
            return Err(format!("no query has an outcome and a cost for each of the {} models", models.len()));
        }
        Ok(Matrix { name, hash, rows: self.rows, models, queries, scores, costs })
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
        std::fs::write(&path, "query,model\n").unwrap();
        let error = Matrix::read(&path, None).unwrap_err().to_string();
        assert!(error.contains("outcomes.parquet: is no Parquet file"), "{error}");
        let error = Matrix::read_all(dir.path().join("none").as_path(), None).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
