//! The record for other programs. JSON Lines: all events of all chains, byte for byte, enough to verify them again.
//! Parquet: one row per decision with what analysis asks for.

mod parquet;

use std::io::{self, Write};

use serde::Serialize;
use serde_json::value::RawValue;

pub use self::parquet::export_parquet;
use super::store::{AuditStore, StoreError};
use crate::domain::canonical;

/// Why an export stopped.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the export cannot be written: {0}")]
    Io(#[from] io::Error),
    #[error("the Parquet file cannot be written: {0}")]
    Parquet(#[from] ::parquet::errors::ParquetError),
    #[error("the Parquet columns do not fit: {0}")]
    Arrow(#[from] arrow::error::ArrowError),
}

impl ExportError {
    /// Fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            ExportError::Store(error) => error.kind(),
            ExportError::Io(_) => "io",
            ExportError::Parquet(_) => "parquet",
            ExportError::Arrow(_) => "arrow",
        }
    }
}

/// One line. `record` is the record's own bytes: BLAKE3 over them gives `hash`.
#[derive(Serialize)]
struct Line<'a> {
    hash: String,
    record: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<Box<RawValue>>,
    /// Base64 of little-endian f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding: Option<String>,
}

/// Writes all events, by replica and sequence number, one JSON object a line. Gives back how many.
///
/// # Errors
/// When the store cannot be read or `out` not written.
pub async fn export_jsonl(store: &dyn AuditStore, out: &mut dyn Write) -> Result<u64, ExportError> {
    const PAGE: u32 = 500;
    let mut written = 0;
    for cursor in store.replicas().await? {
        let mut from = 1;
        loop {
            let page = store.stored_events(&cursor.replica, from, PAGE).await?;
            let Some(last) = page.last() else { break };
            from = last.seq + 1;
            for event in page {
                let text = String::from_utf8(event.record).map_err(|e| StoreError::Row(e.to_string()))?;
                let record: &RawValue = serde_json::from_str(&text).map_err(|e| StoreError::Row(e.to_string()))?;
                let context = event
                    .beside
                    .context
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .and_then(|text| RawValue::from_string(text).ok());
                let embedding = event
                    .beside
                    .embedding
                    .and_then(|bytes| canonical::vector_from_bytes(&bytes))
                    .map(|v| canonical::vector_to_base64(&v));
                let line = Line { hash: event.hash.to_string(), record, context, embedding };
                serde_json::to_writer(&mut *out, &line).map_err(io::Error::from)?;
                out.write_all(b"\n")?;
                written += 1;
            }
        }
    }
    out.flush()?;
    Ok(written)
}
