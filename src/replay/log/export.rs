//! `weir audit export --parquet` as a log: decisions with their contexts, without the states of the policies that made
//! them.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{
        Array, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    },
    compute::cast,
    datatypes::DataType,
};
use async_trait::async_trait;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
};
use serde::Deserialize;

use super::{
    entry::{Entry, REFUSED, session_of},
    source::{Page, Source},
};
use crate::{
    audit::DecisionFilter,
    domain::{Candidate, Context, DecidedBy, DecisionId, EmbedderIdentity, Embedding, OutcomeStatus},
    policy::Observed,
    replay::ReplayError,
};

/// Columns that are read; those with a mark may be missing.
const COLUMNS: [(&str, bool); 24] = [
    ("id", true),
    ("time", true),
    ("policy", true),
    ("decided_by", true),
    ("arm", true),
    ("propensity", true),
    ("candidates", true),
    ("tenant", true),
    ("session", true),
    ("dry", true),
    ("status", true),
    ("served_by", true),
    ("cost_usd", true),
    ("joules", false),
    ("latency_us", true),
    ("ttft_us", true),
    ("attempts", false),
    ("prompt_tokens", false),
    ("completion_tokens", false),
    ("tokens", false),
    ("feedback", true),
    ("context", true),
    ("embedding", false),
    ("embedder", false),
];
/// A file, read from its end: the newest decision comes first in it.
pub struct Export {
    inner: Arc<Inner>,
    /// Row groups that are still to be read.
    left: usize,
}

/// What a row group is read with.
struct Inner {
    name: String,
    path: PathBuf,
    metadata: ArrowReaderMetadata,
    filter: DecisionFilter,
    /// The first row of every row group, and the number of rows.
    starts: Vec<usize>,
    /// Rows from here on are too old.
    until: usize,
}

fn wrong(name: &str, what: impl std::fmt::Display) -> ReplayError {
    ReplayError::Export { file: name.to_owned(), what: what.to_string() }
}

impl Export {
    /// Whether a file is an export of decisions, by its columns; a file of outcomes is not.
    pub fn is_one(path: &Path) -> bool {
        let metadata = File::open(path).ok().and_then(|f| ArrowReaderMetadata::load(&f, Default::default()).ok());
        let schema = metadata.map(|m| m.schema().clone());
        schema.is_some_and(|s| ["policy_hash", "propensity"].iter().all(|c| s.column_with_name(c).is_some()))
    }

    /// Opens an export; of its decisions the newest `last`, or all.
    ///
    /// # Errors
    /// When it cannot be read, lacks a column, or has no rows.
    pub fn open(path: &Path, filter: &DecisionFilter, last: Option<usize>) -> Result<Self, ReplayError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|e| wrong(&name, format!("cannot be read: {e}")))?;
        let metadata = ArrowReaderMetadata::load(&file, Default::default())
            .map_err(|e| wrong(&name, format!("is no Parquet file, or not all of one: {e}")))?;
        for (column, needed) in COLUMNS {
            if needed && metadata.schema().column_with_name(column).is_none() {
                let what = format!("has no column `{column}`; `weir audit export --parquet FILE` writes it");
                return Err(wrong(&name, what));
            }
        }
        let mut starts = vec![0];
        for group in metadata.metadata().row_groups() {
            starts.push(starts[starts.len() - 1] + group.num_rows() as usize);
        }
        let rows = starts[starts.len() - 1];
        if rows == 0 {
            return Err(wrong(&name, "holds no decisions"));
        }
        let until = last.map_or(rows, |last| last.min(rows));
        let left = starts.partition_point(|start| *start < until);
        let inner = Inner { name, path: path.to_owned(), metadata, filter: filter.clone(), starts, until };
        Ok(Self { inner: Arc::new(inner), left })
    }

    /// Decisions that will be looked at.
    pub fn decisions(&self) -> usize {
        self.inner.until
    }
}

impl Inner {
    /// The entries of a row group, oldest first.
    fn group(&self, group: usize) -> Result<Vec<Entry>, ReplayError> {
        let failed = |e: &dyn std::fmt::Display| wrong(&self.name, format!("row group {group} cannot be read: {e}"));
        // Its own place in the file: groups are read at the same time.
        let file = File::open(&self.path).map_err(|e| failed(&e))?;
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone());
        let filter = &self.filter;
        let names = COLUMNS.iter().map(|(name, _)| *name).filter(|name| match *name {
            "time" => filter.since.is_some() || filter.until.is_some(),
            "policy" => filter.policy.is_some(),
            "tenant" => filter.tenant.is_some(),
            _ => true,
        });
        let mask = ProjectionMask::columns(self.metadata.parquet_schema(), names);
        let first = self.starts[group];
        let rows = self.starts[group + 1] - first;
        let reader = reader.with_row_groups(vec![group]).with_projection(mask).with_batch_size(rows.max(1)).build();
        let mut entries = Vec::with_capacity(rows);
        let mut row = first;
        for batch in reader.map_err(|e| failed(&e))? {
            let batch = batch.map_err(|e| failed(&e))?;
            let columns = Columns::of(&batch).map_err(|what| wrong(&self.name, what))?;
            // Many decisions in a row have the same arms with the same probabilities.
            let mut candidates = (String::new(), Vec::new());
            for at in 0..batch.num_rows().min(self.until.saturating_sub(row)) {
                if columns.passes(at, &self.filter) {
                    let entry = columns.entry(at, &mut candidates).map_err(|(column, what)| {
                        wrong(&self.name, format!("row {}, column `{column}`: {what}", row + at))
                    })?;
                    entries.push(entry);
                }
            }
            row += batch.num_rows();
        }
        entries.reverse();
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].id >= pair[1].id) {
            let what = format!(
                "decision {} is there twice, or the rows are not newest first, as they were exported",
                pair[1].id
            );
            return Err(wrong(&self.name, what));
        }
        Ok(entries)
    }
}

#[async_trait]
impl Source for Export {
    async fn next(&mut self) -> Result<Option<Vec<Page>>, ReplayError> {
        if self.left == 0 {
            return Ok(None);
        }
        // Two per core, so that none waits for the longest.
        let from = self.left.saturating_sub(2 * rayon::current_num_threads().max(1));
        let page = |group: usize| {
            let inner = Arc::clone(&self.inner);
            Page::of(move || inner.group(group))
        };
        let pages = (from..self.left).rev().map(page).collect();
        self.left = from;
        Ok(Some(pages))
    }

    fn about(&self) -> Result<String, ReplayError> {
        let Inner { name, path, filter, until, .. } = &*self.inner;
        let failed = |e: &dyn std::fmt::Display| wrong(name, format!("cannot be read: {e}"));
        let mut hash = blake3::Hasher::new();
        hash.update_reader(File::open(path).map_err(|e| failed(&e))?).map_err(|e| failed(&e))?;
        let filter = serde_json::to_string(filter).map_err(|e| failed(&e))?;
        Ok(format!("export {} {until} {filter}", hash.finalize().to_hex()))
    }

    fn place(&self) -> String {
        self.left.to_string()
    }

    fn go_to(&mut self, place: &str) -> Result<(), ReplayError> {
        self.left = place.parse().map_err(|_| ReplayError::Place(place.to_owned()))?;
        Ok(())
    }
}

/// Columns of a batch, in the types that they are read as.
struct Columns {
    id: StringArray,
    /// These three only where the filter asks for them.
    time: Option<TimestampMicrosecondArray>,
    policy: Option<StringArray>,
    decided_by: StringArray,
    arm: StringArray,
    propensity: Float64Array,
    candidates: StringArray,
    tenant: Option<StringArray>,
    session: StringArray,
    dry: BooleanArray,
    status: StringArray,
    served_by: StringArray,
    cost_usd: Float64Array,
    joules: Option<Float64Array>,
    latency_us: Int64Array,
    ttft_us: Int64Array,
    /// Calls.
    attempts: Option<Int64Array>,
    /// Of all calls; in older exports of the answer that was given, prompt and answer.
    tokens: Vec<Int64Array>,
    feedback: StringArray,
    context: StringArray,
    embedding: Option<Arc<dyn Array>>,
    embedder: Option<StringArray>,
}

/// A judgement, as much of it as is needed.
#[derive(Deserialize)]
struct Judged {
    name: String,
    value: f64,
}

impl Columns {
    fn of(batch: &RecordBatch) -> Result<Self, String> {
        let found = |name: &str, to: &DataType| {
            let column = batch.column_by_name(name)?;
            Some(cast(column, to).map_err(|e| format!("the column `{name}`: {e}")))
        };
        let needed =
            |name: &str, to: DataType| found(name, &to).unwrap_or_else(|| Err(format!("has no column `{name}`")));
        let there = |name: &str| batch.column_by_name(name).is_some();
        let text = |name: &str| needed(name, DataType::Utf8).map(|c| c.as_string::<i32>().clone());
        let float = |name: &str| needed(name, DataType::Float64).map(|c| c.as_primitive().clone());
        let whole = |name: &str| needed(name, DataType::Int64).map(|c| c.as_primitive().clone());
        let micros = DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, Some("UTC".into()));
        Ok(Self {
            id: text("id")?,
            time: there("time").then(|| needed("time", micros)).transpose()?.map(|c| c.as_primitive().clone()),
            policy: there("policy").then(|| text("policy")).transpose()?,
            decided_by: text("decided_by")?,
            arm: text("arm")?,
            propensity: float("propensity")?,
            candidates: text("candidates")?,
            tenant: there("tenant").then(|| text("tenant")).transpose()?,
            session: text("session")?,
            dry: needed("dry", DataType::Boolean)?.as_boolean().clone(),
            status: text("status")?,
            served_by: text("served_by")?,
            cost_usd: float("cost_usd")?,
            joules: there("joules").then(|| float("joules")).transpose()?,
            latency_us: whole("latency_us")?,
            ttft_us: whole("ttft_us")?,
            attempts: there("attempts").then(|| whole("attempts")).transpose()?,
            tokens: match there("tokens") {
                true => vec![whole("tokens")?],
                false => {
                    let of_answer = ["prompt_tokens", "completion_tokens"].into_iter().filter(|name| there(name));
                    of_answer.map(whole).collect::<Result<_, _>>()?
                }
            },
            feedback: text("feedback")?,
            context: text("context")?,
            embedding: batch.column_by_name("embedding").cloned(),
            embedder: there("embedder").then(|| text("embedder")).transpose()?,
        })
    }

    fn passes(&self, at: usize, filter: &DecisionFilter) -> bool {
        let time = self.time.as_ref().map_or(0, |t| t.value(at));
        let is = |column: &Option<StringArray>, wanted: &Option<String>| match (column, wanted) {
            (Some(column), Some(wanted)) => column.value(at) == wanted,
            _ => true,
        };
        filter.since.is_none_or(|since| time >= since)
            && filter.until.is_none_or(|until| time < until)
            && is(&self.policy, &filter.policy)
            && is(&self.tenant, &filter.tenant)
    }

    /// # Errors
    /// The column and what is wrong with it.
    fn entry(&self, at: usize, known: &mut (String, Vec<(String, f64)>)) -> Result<Entry, (&'static str, String)> {
        let bad = |column: &'static str| move |e: &dyn std::fmt::Display| (column, e.to_string());
        let id = uuid::Uuid::parse_str(self.id.value(at)).map_err(|e| bad("id")(&e))?;
        let decided_by: DecidedBy = named(self.decided_by.value(at)).map_err(|e| bad("decided_by")(&e))?;
        let propensity = self.propensity.value(at);
        if !(propensity > 0.0 && propensity <= 1.0) && decided_by != DecidedBy::Refused {
            let what = format!("{propensity}; what was taken had a probability above 0 and at most 1");
            return Err(("propensity", what));
        }
        let arm = self.arm.value(at).to_owned();
        let could = match decided_by {
            DecidedBy::Refused => vec![(REFUSED.to_owned(), 1.0)],
            DecidedBy::Select => {
                let text = self.candidates.value(at);
                if known.0 != text {
                    let candidates: Vec<Candidate> = serde_json::from_str(text).map_err(|e| bad("candidates")(&e))?;
                    let could = candidates.into_iter().filter(|c| c.propensity > 0.0).map(|c| (c.arm, c.propensity));
                    *known = (text.to_owned(), could.collect());
                }
                known.1.clone()
            }
            _ => vec![(arm.clone(), 1.0)],
        };
        let observed = match self.status.is_valid(at) {
            false => None,
            true => Some(self.observed(at)?),
        };
        let id = DecisionId(id);
        Ok(Entry {
            id,
            session: session_of(self.session.value(at), id),
            decided_by,
            dry: self.dry.value(at),
            arm,
            propensity,
            could,
            // A null is an empty text here.
            served_by: self.served_by.value(at).to_owned(),
            observed,
            context: self.context(at)?,
            view: None,
        })
    }

    fn observed(&self, at: usize) -> Result<Observed, (&'static str, String)> {
        let status: OutcomeStatus = named(self.status.value(at)).map_err(|e| ("status", e.to_string()))?;
        let text = self.feedback.value(at);
        let judged: Vec<Judged> = match text {
            "[]" | "" => Vec::new(),
            text => serde_json::from_str(text).map_err(|e| ("feedback", e.to_string()))?,
        };
        let mut feedback = std::collections::BTreeMap::new();
        judged.into_iter().for_each(|j| _ = feedback.entry(j.name).or_insert(j.value));
        let cost_usd = self.cost_usd.value(at);
        if !cost_usd.is_finite() {
            return Err(("cost_usd", format!("{cost_usd} is no cost")));
        }
        let ttft_us = self.ttft_us.is_valid(at).then(|| self.ttft_us.value(at));
        let joules = self.joules.as_ref().filter(|j| j.is_valid(at)).map(|j| j.value(at));
        let count = |column: &Int64Array| if column.is_valid(at) { column.value(at).max(0) } else { 0 };
        let tokens = self.tokens.iter().map(count).fold(0, i64::saturating_add) as u64;
        // An answer takes at least one.
        let calls = self.attempts.as_ref().map_or(1, count).min(i64::from(u32::MAX)) as u32;
        let latency_us = self.latency_us.value(at);
        Ok(Observed { feedback, cost_usd, tokens, calls, joules, latency_us, ttft_us, status })
    }

    /// The context with its embedding, or what is missing.
    fn context(&self, at: usize) -> Result<Result<Context, String>, (&'static str, String)> {
        if self.context.is_null(at) {
            return Ok(Err("its context was erased, or was never kept (`record.context: none`)".to_owned()));
        }
        let mut context: Context =
            serde_json::from_str(self.context.value(at)).map_err(|e| ("context", e.to_string()))?;
        let vector = self.embedding.as_ref().filter(|e| e.is_valid(at));
        let embedder = self.embedder.as_ref().filter(|e| e.is_valid(at));
        if let (Some(lists), Some(embedder)) = (vector, embedder) {
            let list = lists.as_list_opt::<i32>().map(|lists| lists.value(at));
            let vector = list.as_ref().and_then(|l| l.as_primitive_opt::<arrow::datatypes::Float32Type>());
            let vector = vector.ok_or(("embedding", "is no list of 32-bit floats".to_owned()))?;
            let embedder: EmbedderIdentity =
                serde_json::from_str(embedder.value(at)).map_err(|e| ("embedder", e.to_string()))?;
            context.embedding =
                Some(Embedding { vector: vector.values().to_vec().into(), embedder: Arc::new(embedder) });
        }
        Ok(Ok(context))
    }
}

/// A value by its serialised name.
fn named<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, serde::de::value::Error> {
    use serde::de::IntoDeserializer;
    T::deserialize(name.into_deserializer())
}
