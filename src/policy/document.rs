//! Any YAML document of ours, read the way policies are: places, JSON Schema from the types, every error at once.
//! `weir.yaml` uses it too, so that there is one kind of error message.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::{
    diagnostic::{DiagnosticKind, Diagnostics, Severity},
    schema::{self, Shape},
    source::{self, step},
};

/// Reads a document of type `T`; `file` is for messages.
///
/// # Errors
/// All that is wrong with text and shape, each with its place.
pub fn load<T: DeserializeOwned + JsonSchema>(file: &str, yaml: &[u8]) -> Result<T, Diagnostics> {
    read(file, yaml, &Shape::of::<T>()).map(|(value, _)| value)
}

pub(super) fn read<T: DeserializeOwned>(
    file: &str,
    yaml: &[u8],
    shape: &Shape,
) -> Result<(T, std::sync::Arc<source::Source>), Diagnostics> {
    let (source, value, mut findings) = source::read(file, yaml);
    if let Some(value) = value {
        findings.extend(schema::check(shape, &source, &value));
        if !findings.iter().any(|f| f.severity == Severity::Error) {
            match serde_path_to_error::deserialize::<_, T>(value) {
                Ok(parsed) => return Ok((parsed, source)),
                // What fits the schema fails here only for numbers of the wrong kind, such as 1.0 for a count.
                Err(error) => {
                    let pointer = error.path().iter().fold(String::new(), |at, part| match part {
                        serde_path_to_error::Segment::Seq { index } => step(&at, &index.to_string()),
                        serde_path_to_error::Segment::Map { key } => step(&at, key),
                        serde_path_to_error::Segment::Enum { variant } => step(&at, variant),
                        serde_path_to_error::Segment::Unknown => at,
                    });
                    let message = error.into_inner().to_string();
                    findings.push(source.value(&pointer, DiagnosticKind::Value, message));
                }
            }
        }
    }
    let mut all = Diagnostics(findings);
    all.sort();
    Err(all)
}
