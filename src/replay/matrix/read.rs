//! Reading outcomes: every cell that cannot be right is an error that names its row and column.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    compute::cast,
    datatypes::{DataType, Float64Type},
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::{Matrix, Prices, Query};
use crate::cascade::Forms;

/// What a file of outcomes may have; the first three it must have.
pub const COLUMNS: [&str; 8] = ["query", "model", "score", "query_id", "task", "cost_usd", "latency_ms", "response"];
const NEEDED: usize = 3;
/// Numbers; the others are texts.
const NUMBERS: [&str; 3] = ["score", "cost_usd", "latency_ms"];

/// What a file's columns are called, where that is not what weir calls them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns(BTreeMap<&'static str, String>);

impl Columns {
    /// From `OURS=THEIRS` each.
    ///
    /// # Errors
    /// When a column is not known, or named twice.
    pub fn of(given: &[String]) -> Result<Self, String> {
        let mut out = BTreeMap::new();
        for text in given {
            let (ours, theirs) = text
                .split_once('=')
                .filter(|(_, theirs)| !theirs.is_empty())
                .ok_or_else(|| format!("`{text}`: a column is given as NAME=THEIRS, e.g. score=quality"))?;
            let known = COLUMNS.iter().find(|c| **c == ours);
            let known =
                known.ok_or_else(|| format!("`{ours}` is no column of outcomes; they are {}", COLUMNS.join(", ")))?;
            if out.insert(*known, theirs.to_owned()).is_some() {
                return Err(format!("the column `{ours}` is given twice"));
            }
        }
        Ok(Self(out))
    }

    /// As the file calls it.
    fn theirs(&self, ours: &'static str) -> &str {
        self.0.get(ours).map_or(ours, String::as_str)
    }

    /// Whether the file has to have it.
    fn needed(&self, ours: &'static str) -> bool {
        COLUMNS[..NEEDED].contains(&ours) || self.0.contains_key(ours)
    }

    /// What to say where a column is not there, but others are.
    fn missing(&self, ours: &'static str, have: &[&str]) -> String {
        let rename = if self.0.contains_key(ours) { "" } else { "; another name is given with `--column NAME=THEIRS`" };
        format!("has no column `{}`, but {}{rename}", self.theirs(ours), have.join(", "))
    }
}

/// How outcomes are read.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// For files without costs.
    pub prices: Option<Prices>,
    pub columns: Columns,
}

pub(super) fn read(path: &Path, how: &How) -> Result<Matrix, String> {
    let cannot = |e: std::io::Error| format!("cannot be read: {e}");
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut File::open(path).map_err(cannot)?, &mut hasher).map_err(cannot)?;
    let hash = hasher.finalize().to_hex().to_string();
    let mut file = BufReader::new(File::open(path).map_err(cannot)?);
    let start = file.fill_buf().map_err(cannot)?;
    if start.is_empty() {
        return Err("is empty".to_owned());
    }
    let parquet = start.starts_with(b"PAR1");
    let mut table = Table::new(if parquet { "row" } else { "line" });
    match parquet {
        true => read_parquet(File::open(path).map_err(cannot)?, &how.columns, &mut table)?,
        false => read_lines(file, &how.columns, &mut table)?,
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    table.finish(name, hash, how.prices.as_ref())
}

/// One row, as it is.
#[derive(Default)]
struct Cells {
    texts: BTreeMap<&'static str, String>,
    numbers: BTreeMap<&'static str, f64>,
}

fn read_parquet(file: File, columns: &Columns, table: &mut Table) -> Result<(), String> {
    let broken = |e: parquet::errors::ParquetError| format!("is no Parquet file, or not all of one: {e}");
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(broken)?.build().map_err(broken)?;
    for batch in reader {
        let batch = batch.map_err(|e| format!("cannot be read: {e}"))?;
        read_batch(&batch, columns, table)?;
    }
    Ok(())
}

fn read_batch(batch: &RecordBatch, columns: &Columns, table: &mut Table) -> Result<(), String> {
    let schema = batch.schema();
    let mut found: Vec<(&'static str, ArrayRef)> = Vec::new();
    for ours in COLUMNS {
        let Some(column) = batch.column_by_name(columns.theirs(ours)) else {
            if columns.needed(ours) {
                let have: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
                return Err(columns.missing(ours, &have));
            }
            continue;
        };
        let to = if NUMBERS.contains(&ours) { DataType::Float64 } else { DataType::Utf8 };
        let read = cast(column, &to).map_err(|e| format!("the column `{}`: {e}", columns.theirs(ours)))?;
        // What cannot be read becomes null, without an error.
        if let Some(at) = (0..read.len()).find(|at| read.is_null(*at) && column.is_valid(*at)) {
            let text = arrow::util::display::array_value_to_string(column, at).unwrap_or_default();
            let what = format!("`{text}` is no {}", if to == DataType::Float64 { "number" } else { "text" });
            return Err(table.wrong(table.rows + at, columns.theirs(ours), &what));
        }
        found.push((ours, read));
    }
    for at in 0..batch.num_rows() {
        let mut cells = Cells::default();
        for (ours, column) in found.iter().filter(|(_, column)| column.is_valid(at)) {
            match column.as_primitive_opt::<Float64Type>() {
                Some(numbers) => _ = cells.numbers.insert(*ours, numbers.value(at)),
                None => _ = cells.texts.insert(*ours, column.as_string::<i32>().value(at).to_owned()),
            }
        }
        table.take(table.rows, cells, columns)?;
    }
    Ok(())
}

fn read_lines(file: impl BufRead, columns: &Columns, table: &mut Table) -> Result<(), String> {
    for (line, number) in file.lines().zip(1..) {
        let line = line.map_err(|e| format!("line {number}: {e}"))?;
        if line.trim().is_empty() {
            continue;
        }
        let object: BTreeMap<String, Value> = serde_json::from_str(&line).map_err(|e| match table.rows {
            0 => format!("is neither Parquet nor JSON lines: line {number} is no JSON object: {e}"),
            _ => format!("line {number} is no JSON object: {e}"),
        })?;
        let mut cells = Cells::default();
        for ours in COLUMNS {
            let theirs = columns.theirs(ours);
            match object.get(theirs) {
                None if columns.needed(ours) => {
                    let have: Vec<&str> = object.keys().map(String::as_str).collect();
                    return Err(format!("line {number} {}", columns.missing(ours, &have)));
                }
                None | Some(Value::Null) => {}
                Some(value) if NUMBERS.contains(&ours) => {
                    let number_of = value.as_f64().or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))));
                    let read =
                        number_of.ok_or_else(|| table.wrong(number, theirs, &format!("`{value}` is no number")))?;
                    cells.numbers.insert(ours, read);
                }
                Some(Value::String(text)) => _ = cells.texts.insert(ours, text.clone()),
                Some(value @ Value::Number(_)) => _ = cells.texts.insert(ours, value.to_string()),
                Some(value) => return Err(table.wrong(number, theirs, &format!("`{value}` is no text"))),
            }
        }
        table.take(number, cells, columns)?;
    }
    Ok(())
}

/// Rows as they come.
struct Table {
    /// How a row is called.
    unit: &'static str,
    rows: usize,
    unpriced: usize,
    /// Rows without a query, a model or a score.
    skipped: usize,
    /// By query id.
    queries: BTreeMap<String, Answers>,
    /// Query ids in the order of the file.
    order: Vec<String>,
    /// Numbers of the models, as they came.
    models: BTreeMap<String, usize>,
}

/// A query, where it was first, and its outcomes by model.
struct Answers {
    query: Query,
    at: usize,
    cells: BTreeMap<usize, Cell>,
    /// Of what the answers say.
    forms: Forms,
}

#[derive(Clone, Copy)]
struct Cell {
    at: usize,
    score: f64,
    cost: Option<f64>,
    latency: Option<f64>,
    form: Option<u32>,
}

impl Table {
    fn new(unit: &'static str) -> Self {
        Self {
            unit,
            rows: 0,
            unpriced: 0,
            skipped: 0,
            queries: BTreeMap::new(),
            order: Vec::new(),
            models: BTreeMap::new(),
        }
    }

    fn wrong(&self, at: usize, column: &str, what: &str) -> String {
        format!("{} {at}, column `{column}`: {what}", self.unit)
    }

    fn take(&mut self, at: usize, mut cells: Cells, columns: &Columns) -> Result<(), String> {
        self.rows += 1;
        let wrong = |ours: &'static str, what: &str| Err(self.wrong(at, columns.theirs(ours), what));
        for ours in ["query", "model", "query_id"] {
            if cells.texts.get(ours).is_some_and(|text| text.trim().is_empty()) {
                return wrong(ours, "is empty");
            }
        }
        let score = cells.numbers.get("score").copied();
        if let Some(score) = score.filter(|s| !(0.0..=1.0).contains(s)) {
            return wrong("score", &format!("{score} is not between 0 and 1"));
        }
        for ours in ["cost_usd", "latency_ms"] {
            if let Some(value) = cells.numbers.get(ours).filter(|v| !(v.is_finite() && **v >= 0.0)) {
                return wrong(ours, &format!("{value} is not 0 or more"));
            }
        }
        let (cost, latency) = (cells.numbers.get("cost_usd").copied(), cells.numbers.get("latency_ms").copied());
        let (query, model) = (cells.texts.remove("query"), cells.texts.remove("model"));
        let (Some(text), Some(model), Some(score)) = (query, model, score) else {
            self.skipped += 1;
            return Ok(());
        };
        let id = cells.texts.remove("query_id").unwrap_or_else(|| text.clone());
        let task = cells.texts.remove("task").unwrap_or_default();
        let response = cells.texts.remove("response");
        let next = self.models.len();
        let number = *self.models.entry(model.clone()).or_insert(next);
        if !self.queries.contains_key(&id) {
            self.order.push(id.clone());
            let query = Query { id: id.clone(), task: task.clone(), text: text.clone() };
            self.queries.insert(id.clone(), Answers { query, at, cells: BTreeMap::new(), forms: Forms::default() });
        }
        let Some(known) = self.queries.get_mut(&id) else { return Ok(()) };
        let first = known.at;
        let differs =
            if known.query.text != text { Some("query") } else { (known.query.task != task).then_some("task") };
        let form = response.map(|text| known.forms.number(&text));
        let cell = Cell { at, score, cost, latency, form };
        let before = if differs.is_none() { known.cells.insert(number, cell) } else { None };
        if let Some(ours) = differs {
            let what = format!("the {ours} of {id} is another than in {} {first}", self.unit);
            return Err(self.wrong(at, columns.theirs(ours), &what));
        }
        if let Some(before) = before {
            let what = format!("{id} has an outcome of {model} already, in {} {}", self.unit, before.at);
            return Err(self.wrong(at, columns.theirs("query_id"), &what));
        }
        self.unpriced += usize::from(cost.is_none());
        Ok(())
    }

    fn finish(mut self, name: String, hash: String, prices: Option<&Prices>) -> Result<Matrix, String> {
        if self.models.is_empty() {
            return Err("holds no outcomes".to_owned());
        }
        let models: Vec<(String, usize)> = self.models.into_iter().collect();
        // Either the file has costs, or all of them come from the list: the two do not mix.
        let listed: Option<Vec<f64>> = match (self.unpriced == self.rows - self.skipped, prices) {
            (false, _) => None,
            (true, None) => {
                return Err("has no `cost_usd`; give the models' prices with `--prices FILE`".to_owned());
            }
            (true, Some(prices)) => {
                let of = |(model, _): &(String, usize)| {
                    let price = prices.usd_per_million.get(model).map(|usd| usd * prices.tokens_per_call / 1e6);
                    price.ok_or_else(|| {
                        format!("has no `cost_usd`, and the price list has no price for `{model}`; give one with `--prices FILE`")
                    })
                };
                Some(models.iter().map(of).collect::<Result<_, _>>()?)
            }
        };
        let mut left_out: BTreeMap<String, usize> = BTreeMap::new();
        let mut leave = |why: &str, count: usize| {
            if count > 0 {
                *left_out.entry(why.to_owned()).or_default() += count;
            }
        };
        leave("rows without a query, a model or a score", self.skipped);
        let (mut queries, mut scores, mut costs, mut latencies) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut forms = Vec::new();
        for id in self.order {
            let Some(answers) = self.queries.remove(&id) else { continue };
            let row: Vec<Cell> = models.iter().filter_map(|(_, n)| answers.cells.get(n).copied()).collect();
            if row.len() < models.len() {
                leave("queries without an outcome of every model", 1);
                continue;
            }
            let paid: Vec<f64> = match &listed {
                Some(listed) => listed.clone(),
                None => row.iter().filter_map(|c| c.cost).collect(),
            };
            if paid.len() < models.len() {
                leave("queries without a cost for every model, where others have one", 1);
                continue;
            }
            queries.push(answers.query);
            scores.extend(row.iter().map(|c| c.score));
            costs.extend(paid);
            latencies.extend(row.iter().filter_map(|c| c.latency));
            forms.extend(row.iter().map(|c| c.form));
        }
        if queries.is_empty() {
            return Err(format!("no query has an outcome and a cost for each of the {} models", models.len()));
        }
        if latencies.len() < scores.len() {
            latencies.clear();
        }
        if forms.iter().all(Option::is_none) {
            forms.clear();
        }
        let models = models.into_iter().map(|(name, _)| name).collect();
        Ok(Matrix { name, hash, rows: self.rows, models, queries, scores, costs, latencies, forms, left_out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, columns: &[&str]) -> Result<Matrix, String> {
        let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
        let how = How { prices: None, columns: Columns::of(&columns)? };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path, &how)
    }

    const GOOD: &str = r#"{"query_id": 1, "query": "a", "model": "x", "score": 1, "cost_usd": 0.5, "latency_ms": 10}
{"query_id": 1, "query": "a", "model": "y", "score": 0.5, "cost_usd": 0.25, "latency_ms": 20}

{"query_id": 2, "query": "b", "model": "x", "score": null, "cost_usd": 0.5}
{"query_id": 2, "query": "b", "model": "y", "score": false, "cost_usd": 0.25, "else": [1]}
"#;

    #[test]
    fn lines_are_read_and_what_is_left_out_is_counted() {
        let matrix = lines(GOOD, &[]).unwrap();
        assert_eq!(
            (matrix.len(), matrix.rows, matrix.scores(0), matrix.costs(0)),
            (1, 4, &[1.0, 0.5][..], &[0.5, 0.25][..])
        );
        assert_eq!(matrix.latencies(0), Some(&[10.0, 20.0][..]));
        let left: Vec<(&str, usize)> = matrix.left_out.iter().map(|(why, n)| (why.as_str(), *n)).collect();
        assert_eq!(
            left,
            [("queries without an outcome of every model", 1), ("rows without a query, a model or a score", 1)]
        );
        let renamed = lines(&GOOD.replace("\"score\"", "\"quality\""), &["score=quality"]).unwrap();
        assert_eq!(renamed.scores(0), matrix.scores(0));
        let without = lines(&GOOD.replace(", \"latency_ms\": 20", ""), &[]).unwrap();
        assert_eq!(without.latencies(0), None);
    }

    #[test]
    fn what_cannot_be_right_is_named_by_line_and_column() {
        let bad = |from: &str, to: &str| lines(&GOOD.replacen(from, to, 1), &[]).unwrap_err();
        assert_eq!(bad("\"score\": 1", "\"score\": 1.5"), "line 1, column `score`: 1.5 is not between 0 and 1");
        assert_eq!(bad("\"score\": 1", "\"score\": \"1\""), "line 1, column `score`: `\"1\"` is no number");
        assert_eq!(bad("\"cost_usd\": 0.25", "\"cost_usd\": -1"), "line 2, column `cost_usd`: -1 is not 0 or more");
        assert_eq!(
            bad("\"model\": \"y\"", "\"model\": \"x\""),
            "line 2, column `query_id`: 1 has an outcome of x already, in line 1"
        );
        assert_eq!(
            bad("\"a\", \"model\": \"y\"", "\"c\", \"model\": \"y\""),
            "line 2, column `query`: the query of 1 is another than in line 1"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let bad = |from: &str, to: &str| lines(&GOOD.replacen(from, to, 1), &[]).unwrap_err();
        assert!(
            bad("\"model\": \"y\", ", "").starts_with("line 2 has no column `model`, but cost_usd, latency_ms, query")
        );
        assert!(bad("}", "").starts_with("is neither Parquet nor JSON lines: line 1 is no JSON object"));
        assert!(bad("20}", "20").starts_with("line 2 is no JSON object"));
        assert_eq!(lines("", &[]).unwrap_err(), "is empty");
        assert_eq!(lines("\n\n", &[]).unwrap_err(), "holds no outcomes");
        assert_eq!(bad("\"query\": \"a\"", "\"query\": \" \""), "line 1, column `query`: is empty");
        let given = |columns: &[&str]| lines(GOOD, columns).unwrap_err();
        assert!(given(&["skore=x"]).starts_with("`skore` is no column of outcomes; they are query, model, score"));
        assert!(given(&["score=a", "score=b"]).contains("twice"));
        assert!(given(&["score"]).contains("NAME=THEIRS"));
        assert!(given(&["latency_ms=ms"]).starts_with("line 1 has no column `ms`, but"));
    }
}
