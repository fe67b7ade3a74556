//! `weir bench replay`: how fast logged decisions are replayed, and in how much memory. A log is made up and written as
//! `weir audit export` writes one; `weir replay` reads it in a process of its own, whose accounts the kernel keeps.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Instant,
};

use arrow::{
    array::{
        ArrayRef, BooleanArray, FixedSizeListArray, Float32Array, Float64Array, Int64Array, RecordBatch, StringArray,
        TimestampMicrosecondArray,
    },
    compute::cast,
    datatypes::{DataType, Field},
};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::{
    BenchError, process,
    report::{Machine, median},
};
use crate::{
    domain::{Context, EmbedderIdentity, ModelState, SessionView},
    replay::metrics::SplitMix,
};

/// Decisions of a row group: what an export has.
const GROUP: usize = 2000;
/// Models of the log; each has a quarter of the decisions.
const MODELS: [&str; 4] = ["small", "medium", "large", "remote"];

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Lengths of logs.
    pub decisions: Vec<usize>,
    pub repeats: usize,
    /// Also with embeddings, on a log of the first length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedder: Option<EmbedderIdentity>,
    #[serde(skip)]
    pub data_dir: PathBuf,
}

/// One policy on one log: medians over the repeats.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub policy: &'static str,
    pub decisions: usize,
    pub file_mib: f64,
    pub wall_s: f64,
    pub cpu_s: f64,
    /// Per second of processor time: what one core does.
    pub rows_per_core_s: f64,
    pub rows_per_s: f64,
    pub peak_mib: f64,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Row>,
    pub plan: Plan,
    pub machine: Machine,
}

/// Policies: the file, and whether it needs embeddings.
const POLICIES: [(&str, &str, bool); 3] = [
    (
        "rules",
        "rules:\n  - {name: private, when: signals.pii.count > 0, allow_models: [small, medium]}\n  - {name: long, when: \
         signals.tokens > 3500, use: large}\nselect: {arms: [small, medium, large, remote], weighted: {small: 5, medium: 3, \
         large: 1, remote: 1}}\n",
        false,
    ),
    (
        "linucb",
        "select: {arms: [small, medium, large, remote], linucb: {}, features: [tokens, complexity, code_share, turn]}\n",
        false,
    ),
    (
        "linucb, embedding in 32 dimensions",
        "select: {arms: [small, medium, large, remote], linucb: {}, features: [tokens, {embedding: {project: 32}}], no_embedding: \
         small}\n",
        true,
    ),
];

/// Writes a log of `decisions`, newest first, with contexts as weir keeps them.
///
/// # Errors
/// When the file cannot be written.
pub fn write_log(
    path: &Path,
    decisions: usize,
    embedder: Option<&EmbedderIdentity>,
    tick: &dyn Fn(u64),
) -> Result<(), BenchError> {
    let failed = |e: parquet::errors::ParquetError| BenchError::io("the made log")(std::io::Error::other(e));
    let file = File::create(path).map_err(BenchError::io(path.display().to_string()))?;
    let first = batch(decisions.saturating_sub(1)..decisions, embedder);
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(file, first.schema(), Some(properties)).map_err(failed)?;
    let groups: Vec<std::ops::Range<usize>> =
        (0..decisions.div_ceil(GROUP)).rev().map(|g| g * GROUP..((g + 1) * GROUP).min(decisions)).collect();
    for some in groups.chunks(16) {
        let batches: Vec<RecordBatch> = some.par_iter().map(|rows| batch(rows.clone(), embedder)).collect();
        for batch in batches {
            writer.write(&batch).map_err(failed)?;
            writer.flush().map_err(failed)?;
            tick(batch.num_rows() as u64);
        }
    }
    writer.close().map_err(failed)?;
    Ok(())
}

/// Decisions by their numbers, the newest first.
fn batch(rows: std::ops::Range<usize>, embedder: Option<&EmbedderIdentity>) -> RecordBatch {
    let rows: Vec<Made> = rows.rev().map(Made::of).collect();
    let text =
        |of: &dyn Fn(&Made) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(rows.iter().map(of))) };
    let float =
        |of: &dyn Fn(&Made) -> f64| -> ArrayRef { Arc::new(Float64Array::from_iter_values(rows.iter().map(of))) };
    let whole = |of: &dyn Fn(&Made) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(rows.iter().map(of))) };
    let candidates = MODELS.map(|arm| json!({"arm": arm, "propensity": 0.25}));
    let candidates = json!(candidates).to_string();
    let times = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.context.now)).with_timezone("UTC");
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("id", text(&|r| r.id().to_string())),
        ("time", Arc::new(times)),
        ("policy", text(&|_| "made".to_owned())),
        ("policy_hash", text(&|_| "0".repeat(64))),
        ("decided_by", text(&|_| "select".to_owned())),
        ("arm", text(&|r| r.arm.to_owned())),
        ("propensity", float(&|_| 0.25)),
        ("candidates", text(&|_| candidates.clone())),
        ("tenant", text(&|r| r.context.key.tenant.clone())),
        ("session", text(&|r| r.context.session.id.clone())),
        ("dry", Arc::new(BooleanArray::from(vec![false; rows.len()]))),
        ("status", text(&|_| "ok".to_owned())),
        ("served_by", text(&|r| r.arm.to_owned())),
        ("cost_usd", float(&|r| r.cost_usd)),
        ("latency_us", whole(&|r| 400_000 + (r.number % 1000) as i64)),
        ("ttft_us", whole(&|r| 90_000 + (r.number % 1000) as i64)),
        ("prompt_tokens", whole(&|r| i64::from(r.context.signals.tokens))),
        ("feedback", text(&|r| r.feedback.clone())),
        ("context", text(&|r| serde_json::to_string(&r.context).unwrap_or_default())),
    ];
    if let Some(embedder) = embedder {
        let name = serde_json::to_string(embedder).unwrap_or_default();
        columns.push(("embedder", text(&|_| name.clone())));
        let dimensions = embedder.dimensions as usize;
        let vectors: Vec<f32> = rows.iter().flat_map(|r| r.vector(dimensions)).collect();
        let item = Arc::new(Field::new_list_field(DataType::Float32, true));
        let fixed =
            FixedSizeListArray::new(item.clone(), dimensions as i32, Arc::new(Float32Array::from(vectors)), None);
        if let Ok(list) = cast(&fixed, &DataType::List(item)) {
            columns.push(("embedding", list));
        }
    }
    RecordBatch::try_from_iter(columns)
        .unwrap_or_else(|_| RecordBatch::new_empty(Arc::new(arrow::datatypes::Schema::empty())))
}

/// A made decision.
struct Made {
    number: usize,
    arm: &'static str,
    cost_usd: f64,
    feedback: String,
    context: Context,
}

impl Made {
    fn of(number: usize) -> Self {
        let mut rng = SplitMix(number as u64);
        let mut context =
            Context { now: 1_780_000_000_000_000 + number as i64 * 50_000, seed: rng.next_u64(), ..Context::default() };
        context.request.model = "auto".to_owned();
        context.request.n = 1;
        context.signals.tokens = rng.below(4000) as u32;
        context.signals.query_tokens = context.signals.tokens / 3;
        context.signals.language = ["en", "de", "fr", "und"][rng.below(4)].to_owned();
        context.signals.complexity = rng.unit() * 100.0;
        context.signals.code_share = if rng.below(4) == 0 { rng.unit() } else { 0.0 };
        context.signals.turn = 1 + (number % 3) as u32;
        context.signals.pii.count = u32::from(rng.below(50) == 0);
        context.session =
            SessionView { id: format!("{:016x}", number / 3), turn: 1 + (number % 3) as u32, ..SessionView::default() };
        context.key.id = format!("key-{}", rng.below(20));
        context.key.tenant = format!("tenant-{}", rng.below(5));
        let state = |running| ModelState {
            available: true,
            running,
            ttft_ms: 90.5,
            tokens_per_s: 41.25,
            ..ModelState::default()
        };
        context.fleet = MODELS.iter().map(|m| ((*m).to_owned(), state(rng.below(8) as u32))).collect();
        let at = rng.below(MODELS.len());
        // Half of the requests are judged; what is dearer is better, on what is difficult.
        let liked = rng.unit() < 0.4 + 0.1 * at as f64 * context.signals.complexity / 100.0;
        let feedback = match rng.below(2) {
            0 => "[]".to_owned(),
            _ => json!([{"at": context.now, "source": "user", "name": "score", "value": f64::from(u8::from(liked))}])
                .to_string(),
        };
        let cost_usd = 1e-6 * f64::from(context.signals.tokens) * (1 << at) as f64;
        Self { number, arm: MODELS[at], cost_usd, feedback, context }
    }

    /// A UUIDv7 of its time and number.
    fn id(&self) -> uuid::Uuid {
        let milliseconds = (self.context.now / 1000) as u128;
        uuid::Uuid::from_u128(milliseconds << 80 | 7 << 76 | 2 << 62 | self.number as u128)
    }

    /// A unit vector.
    fn vector(&self, dimensions: usize) -> Vec<f32> {
        let mut rng = SplitMix(!(self.number as u64));
        let vector: Vec<f32> = (0..dimensions).map(|_| rng.unit() as f32 - 0.5).collect();
        let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
        vector.into_iter().map(|x| x / norm).collect()
    }
}

/// Measures.
///
/// # Errors
/// When a log cannot be written, or `weir replay` fails on it.
pub fn run(plan: Plan, say: &dyn Fn(&str), tick: &dyn Fn(u64)) -> Result<Report, BenchError> {
    let dir = tempfile::tempdir().map_err(BenchError::io("a temporary directory"))?;
    let mut rows = Vec::new();
    let plain = plan.decisions.iter().map(|n| (*n, None));
    let embedded = plan.embedder.as_ref().zip(plan.decisions.first()).map(|(e, n)| (*n, Some(e)));
    for (decisions, embedder) in plain.chain(embedded) {
        let log = dir.path().join("decisions.parquet");
        say(&format!("making up {decisions} decisions"));
        write_log(&log, decisions, embedder, tick)?;
        for (name, policy, _) in POLICIES.into_iter().filter(|(.., needs)| *needs == embedder.is_some()) {
            say(&format!("replaying {decisions} decisions under {name}"));
            let file = dir.path().join("policy.yaml");
            let models: Vec<String> = MODELS.iter().map(|m| format!("{m}: {{name: {m}}}")).collect();
            let reward =
                "reward: {quality: {weight: 1, from: feedback.score}, cost_usd: {weight: -0.1, scale: 0.01}}\n";
            let yaml = format!("policy: bench\nmodels: {{{}}}\n{policy}{reward}", models.join(", "));
            fs::write(&file, yaml).map_err(BenchError::io(file.display().to_string()))?;
            let runs = (0..plan.repeats.max(1)).map(|_| once(&log, &file, &plan.data_dir, decisions));
            let runs: Vec<(f64, process::Usage)> = runs.collect::<Result<_, _>>()?;
            let of = |figure: fn(&(f64, process::Usage)) -> f64| median(runs.iter().map(figure));
            let (wall_s, cpu_s) = (of(|r| r.0), of(|r| r.1.cpu_s));
            rows.push(Row {
                policy: name,
                decisions,
                file_mib: fs::metadata(&log).map_or(0.0, |m| m.len() as f64 / f64::from(1 << 20)),
                wall_s,
                cpu_s,
                rows_per_core_s: decisions as f64 / cpu_s,
                rows_per_s: decisions as f64 / wall_s,
                peak_mib: of(|r| r.1.rss_peak as f64 / f64::from(1 << 20)),
            });
        }
    }
    let mut figures = BTreeMap::new();
    for row in &rows {
        let name = format!("{}.{}", row.policy, row.decisions).replace(' ', "_");
        figures.insert(format!("{name}.rows_per_core_s"), row.rows_per_core_s);
        figures.insert(format!("{name}.peak_mib"), row.peak_mib);
    }
    Ok(Report { bench: "replay", figures, rows, plan, machine: Machine::here() })
}

/// One replay: seconds, and what the kernel says of it.
fn once(log: &Path, policy: &Path, data_dir: &Path, decisions: usize) -> Result<(f64, process::Usage), BenchError> {
    let failed = |reason: String| BenchError::Start { what: "weir replay".to_owned(), reason };
    let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let mut command = Command::new(program);
    command.args(["replay", "--json", "--data"]).arg(log).arg("--policy").arg(policy).arg("--data-dir").arg(data_dir);
    let begun = Instant::now();
    let (usage, output) = process::accounts(command)?;
    let wall_s = begun.elapsed().as_secs_f64();
    let report: serde_json::Value = serde_json::from_slice(&output).map_err(|e| failed(e.to_string()))?;
    if report["decisions"] != json!(decisions) || report["policies"][0]["estimates"]["rows"] != json!(decisions) {
        return Err(failed(format!("it replayed {} of {decisions} decisions", report["policies"][0]["decisions"])));
    }
    Ok((wall_s, usage))
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let mut out = "| policy | decisions | file MiB | seconds | processor seconds | decisions/s per core | decisions/s | peak MiB |\n\
                       |---|---|---|---|---|---|---|---|\n"
            .to_owned();
        for r in &self.rows {
            out += &format!(
                "| {} | {} | {:.0} | {:.1} | {:.1} | {:.0} | {:.0} | {:.0} |\n",
                r.policy, r.decisions, r.file_mib, r.wall_s, r.cpu_s, r.rows_per_core_s, r.rows_per_s, r.peak_mib
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::DecisionFilter,
        replay::{Export, Source},
    };

    #[tokio::test]
    async fn a_made_log_reads_as_an_export() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.parquet");
        write_log(&path, 1200, None, &|_| {}).unwrap();
        assert!(Export::is_one(&path));
        let mut export = Export::open(&path, &DecisionFilter::default(), None).unwrap();
        let mut entries = Vec::new();
        while let Some(pages) = export.next().await.unwrap() {
            pages.into_iter().for_each(|page| entries.extend(page.read().unwrap()));
        }
        assert_eq!(entries.len(), 1200);
        assert!(entries.windows(2).all(|w| w[0].id < w[1].id));
        assert_eq!(entries[7].context.as_ref().unwrap(), &Made::of(7).context);
        assert_eq!(entries[7].could.len(), 4);
    }

    /// What an export says whose column is replaced at a row by another row's, or by a number.
    async fn said_of(column: &str, change: impl Fn(&ArrayRef) -> Option<ArrayRef>) -> String {
        let rows = batch(0..10, None);
        let schema = rows.schema();
        let columns = schema.fields().iter().zip(rows.columns()).filter_map(|(field, values)| {
            let values = if field.name() == column { change(values)? } else { values.clone() };
            Some((field.name().clone(), values))
        });
        let rows = RecordBatch::try_from_iter(columns.collect::<Vec<_>>()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.parquet");
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), rows.schema(), None).unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
        let mut export = match Export::open(&path, &DecisionFilter::default(), None) {
            Ok(export) => export,
            Err(error) => return error.to_string(),
        };
        let page = export.next().await.unwrap().unwrap().remove(0);
        page.read().map_or_else(|e| e.to_string(), |entries| format!("{} entries", entries.len()))
    }

    #[tokio::test]
    async fn a_cell_of_an_export_that_cannot_be_right_is_named() {
        let text = |at: usize, text: &'static str| {
            move |values: &ArrayRef| -> Option<ArrayRef> {
                let values: &StringArray = values.as_any().downcast_ref()?;
                let change =
                    |(n, old): (usize, Option<&str>)| if n == at { text.to_owned() } else { old.unwrap().to_owned() };
                Some(Arc::new(StringArray::from_iter_values(values.iter().enumerate().map(change))))
            }
        };
        let number = |value: f64| {
            move |_: &ArrayRef| -> Option<ArrayRef> { Some(Arc::new(Float64Array::from(vec![value; 10]))) }
        };
        assert_eq!(said_of("", |_| None).await, "10 entries");
        let says = |said: String, what: &str| assert!(said.contains("log.parquet: ") && said.contains(what), "{said}");
        says(
            said_of("propensity", number(0.0)).await,
            "row 0, column `propensity`: 0; what was taken had a probability above 0",
        );
        says(said_of("propensity", number(f64::NAN)).await, "row 0, column `propensity`: NaN");
        says(said_of("cost_usd", number(f64::INFINITY)).await, "row 0, column `cost_usd`: inf is no cost");
        says(said_of("context", text(4, "{")).await, "row 4, column `context`: ");
        says(said_of("candidates", text(2, "none")).await, "row 2, column `candidates`: ");
        says(said_of("decided_by", text(3, "chance")).await, "row 3, column `decided_by`: unknown variant `chance`");
        says(said_of("id", text(5, "x")).await, "row 5, column `id`: ");
        says(
            said_of("feedback", |_| None).await,
            "has no column `feedback`; `weir audit export --parquet FILE` writes it",
        );
        let twice = |values: &ArrayRef| -> Option<ArrayRef> {
            arrow::compute::concat(&[&values.slice(0, 5), &values.slice(4, 5)]).ok()
        };
        says(said_of("id", twice).await, "is there twice, or the rows are not newest first");
    }
}
