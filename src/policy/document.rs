//! Any YAML document of ours, read the way policies are: places, JSON Schema from the types, every error at once.
//! `weir.yaml` uses it too, so that there is one kind of error message.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::{
    diagnostic::{DiagnosticKind, Diagnostics},
    schema::{self, Shape},
    source::{self, Source, step},
};

/// Reads a document of type `T`; `file` is for messages.
///
/// # Errors
/// All that is wrong with text and shape, each with its place.
pub fn load<T: DeserializeOwned + JsonSchema>(file: &str, yaml: &[u8]) -> Result<T, Diagnostics> {
    let read = read(file, yaml, &Shape::of::<T>());
    match read.value.filter(|_| read.findings.0.is_empty()) {
        Some(value) => Ok(value),
        None => Err(read.findings),
    }
}

/// What could be made of a document.
pub(super) struct Read<T> {
    pub source: Arc<Source>,
    /// As far as it can be understood: with findings, what is left when these are taken out.
    pub value: Option<T>,
    pub findings: Diagnostics,
}

pub(super) fn read<T: DeserializeOwned>(file: &str, yaml: &[u8], shape: &Shape) -> Read<T> {
    let (source, value, mut findings) = source::read(file, yaml);
    let mut parsed = None;
    if let Some(value) = value {
        let departures = schema::check(shape, &source, &value);
        let mended = match departures.is_empty() {
            true => value,
            false => schema::mend(shape, &value, &departures),
        };
        findings.extend(departures);
        match serde_path_to_error::deserialize::<_, T>(mended) {
            Ok(understood) => parsed = Some(understood),
            // What fits the schema fails here only for numbers of the wrong kind, such as 1.0 for a count; what does not
            // fit is reported already.
            Err(error) if findings.is_empty() => {
                let pointer = error.path().iter().fold(String::new(), |at, part| match part {
                    Segment::Seq { index } => step(&at, &index.to_string()),
                    Segment::Map { key } => step(&at, key),
                    Segment::Enum { variant } => step(&at, variant),
                    Segment::Unknown => at,
                });
                let message = error.into_inner().to_string();
                findings.push(source.value(&pointer, DiagnosticKind::Value, message));
            }
            Err(_) => {}
        }
    }
    let mut findings = Diagnostics(findings);
    findings.sort();
    Read { source, value: parsed, findings }
}
