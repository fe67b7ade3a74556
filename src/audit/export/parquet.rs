//! Decisions as a Parquet table, newest first, written by pages.

use std::{io::Write, sync::Arc};

use arrow::{
    array::{
        ArrayRef, BooleanArray, Float32Builder, Float64Array, Float64Builder, Int64Array, ListBuilder, RecordBatch,
        StringArray, TimestampMicrosecondArray, UInt32Array, UInt64Array,
    },
    datatypes::{DataType, Field, Schema, TimeUnit},
};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};

use super::ExportError;
use crate::{
    audit::{
        projection::decided_by,
        query::{DecisionFilter, DecisionView},
        store::{AuditStore, StoreError},
    },
    domain::Outcome,
};

/// Decisions of one page of the store.
const PAGE: u32 = 500;
/// Pages of one row group: what `weir replay` has in memory at once, per core.
const GROUP: u64 = 4;

fn schema() -> Schema {
    let list = |item: DataType| DataType::List(Arc::new(Field::new_list_field(item, true)));
    let text = DataType::Utf8;
    Schema::new(vec![
        Field::new("id", text.clone(), false),
        Field::new("time", DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), false),
        Field::new("replica", text.clone(), false),
        Field::new("seq", DataType::UInt64, false),
        Field::new("hash", text.clone(), false),
        Field::new("policy", text.clone(), false),
        Field::new("policy_hash", text.clone(), false),
        Field::new("state_seq", DataType::UInt64, false),
        Field::new("decided_by", text.clone(), false),
        Field::new("rule", text.clone(), true),
        Field::new("arm", text.clone(), false),
        Field::new("propensity", DataType::Float64, false),
        // JSON: every arm with its score, propensity and what eliminated it.
        Field::new("candidates", text.clone(), false),
        Field::new("features", list(DataType::Float64), false),
        Field::new("model_requested", text.clone(), false),
        Field::new("stream", DataType::Boolean, false),
        Field::new("key", text.clone(), false),
        Field::new("tenant", text.clone(), false),
        Field::new("session", text.clone(), false),
        Field::new("client_retry", DataType::UInt32, false),
        Field::new("dry", DataType::Boolean, false),
        Field::new("status", text.clone(), true),
        Field::new("served_by", text.clone(), true),
        Field::new("attempts", DataType::UInt32, true),
        Field::new("cost_usd", DataType::Float64, true),
        Field::new("joules", DataType::Float64, true),
        Field::new("latency_us", DataType::Int64, true),
        Field::new("ttft_us", DataType::Int64, true),
        Field::new("prompt_tokens", DataType::UInt32, true),
        Field::new("completion_tokens", DataType::UInt32, true),
        // Of all calls together; those above are of the answer that was given.
        Field::new("tokens", DataType::UInt64, true),
        Field::new("error", text.clone(), true),
        // JSON: every judgement with its time, source, name and value.
        Field::new("feedback", text.clone(), false),
        // JSON, as recorded; absent where it was not kept or was erased.
        Field::new("context", text, true),
        Field::new("embedding", list(DataType::Float32), true),
        // JSON: which embedder made it.
        Field::new("embedder", DataType::Utf8, true),
    ])
}

/// Writes all decisions that pass the filter (its limit aside), one row each. Gives back how many.
///
/// # Errors
/// When the store cannot be read or `out` not written.
pub async fn export_parquet(
    store: &dyn AuditStore,
    filter: &DecisionFilter,
    out: impl Write + Send,
) -> Result<u64, ExportError> {
    let schema = Arc::new(schema());
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(out, schema.clone(), Some(properties))?;
    let mut filter = DecisionFilter { limit: Some(PAGE), ..filter.clone() };
    let mut written = 0;
    loop {
        let rows = store.decisions(&filter).await?;
        let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
        let mut views = store.whole(&ids).await?;
        // Newest first, as the rows.
        views.reverse();
        if !views.is_empty() {
            writer.write(&batch(&schema, &views)?)?;
            written += views.len() as u64;
            if written % (GROUP * u64::from(PAGE)) == 0 {
                writer.flush()?;
            }
        }
        if rows.len() < PAGE as usize {
            break;
        }
        filter.before = rows.last().map(|row| row.id);
    }
    writer.close()?;
    Ok(written)
}

fn batch(schema: &Arc<Schema>, views: &[DecisionView]) -> Result<RecordBatch, ExportError> {
    let text = |get: &dyn Fn(&DecisionView) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(views.iter().map(get)))
    };
    let maybe = |get: &dyn Fn(&DecisionView) -> Option<String>| -> ArrayRef {
        Arc::new(StringArray::from_iter(views.iter().map(get)))
    };
    let yes = |get: &dyn Fn(&DecisionView) -> bool| -> ArrayRef {
        Arc::new(views.iter().map(|view| Some(get(view))).collect::<BooleanArray>())
    };
    let end = |view: &DecisionView| -> Option<Outcome> { view.outcome.clone() };
    let times = views.iter().map(|view| view.at);
    let columns: Vec<ArrayRef> = vec![
        text(&|v| v.id.to_string()),
        Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
        text(&|v| v.replica.clone()),
        Arc::new(UInt64Array::from_iter_values(views.iter().map(|v| v.seq))),
        text(&|v| v.hash.to_string()),
        text(&|v| v.decision.decision.policy.clone()),
        text(&|v| v.decision.decision.policy_hash.to_string()),
        Arc::new(UInt64Array::from_iter_values(views.iter().map(|v| v.decision.decision.state_seq))),
        text(&|v| decided_by(v.decision.decision.decided_by).to_owned()),
        maybe(&|v| v.decision.decision.rule.clone()),
        text(&|v| v.decision.decision.arm.clone()),
        Arc::new(Float64Array::from_iter_values(views.iter().map(|v| v.decision.decision.propensity))),
        json(views, |v| serde_json::to_string(&v.decision.decision.candidates))?,
        features(views),
        text(&|v| v.decision.model_requested.clone()),
        yes(&|v| v.decision.stream),
        text(&|v| v.decision.key.clone()),
        text(&|v| v.decision.tenant.clone()),
        text(&|v| v.decision.session.clone()),
        Arc::new(UInt32Array::from_iter_values(views.iter().map(|v| v.decision.client_retry))),
        yes(&|v| v.decision.dry),
        maybe(&|v| end(v).map(|o| o.status.as_str().to_owned())),
        maybe(&|v| end(v).map(|o| o.served_by)),
        Arc::new(UInt32Array::from_iter(views.iter().map(|v| end(v).map(|o| o.attempts)))),
        Arc::new(Float64Array::from_iter(views.iter().map(|v| end(v).map(|o| o.cost_usd)))),
        Arc::new(Float64Array::from_iter(views.iter().map(|v| end(v).and_then(|o| o.joules)))),
        Arc::new(Int64Array::from_iter(views.iter().map(|v| end(v).map(|o| o.latency_us)))),
        Arc::new(Int64Array::from_iter(views.iter().map(|v| end(v).and_then(|o| o.ttft_us)))),
        Arc::new(UInt32Array::from_iter(views.iter().map(|v| end(v).map(|o| o.usage.prompt_tokens)))),
        Arc::new(UInt32Array::from_iter(views.iter().map(|v| end(v).map(|o| o.usage.completion_tokens)))),
        Arc::new(UInt64Array::from_iter(views.iter().map(|v| end(v).map(|_| v.tokens())))),
        maybe(&|v| end(v).and_then(|o| o.error)),
        json(views, |v| serde_json::to_string(&v.feedback))?,
        maybe(&|v| v.context_bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned())),
        embeddings(views),
        maybe(&|v| v.decision.embedder.as_ref().and_then(|e| serde_json::to_string(e).ok())),
    ];
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

fn json(
    views: &[DecisionView],
    get: impl Fn(&DecisionView) -> serde_json::Result<String>,
) -> Result<ArrayRef, ExportError> {
    let texts = views.iter().map(get).collect::<Result<Vec<_>, _>>().map_err(|e| StoreError::Row(e.to_string()))?;
    Ok(Arc::new(StringArray::from(texts)))
}

fn features(views: &[DecisionView]) -> ArrayRef {
    let mut builder = ListBuilder::new(Float64Builder::new());
    for view in views {
        builder.values().append_slice(&view.decision.decision.features);
        builder.append(true);
    }
    Arc::new(builder.finish())
}

fn embeddings(views: &[DecisionView]) -> ArrayRef {
    let mut builder = ListBuilder::new(Float32Builder::new());
    for view in views {
        if let Some(vector) = &view.embedding {
            builder.values().append_slice(vector);
        }
        builder.append(view.embedding.is_some());
    }
    Arc::new(builder.finish())
}
