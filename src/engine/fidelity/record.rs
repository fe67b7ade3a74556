//! What was measured of one model's reuse of documents, kept in a file; without one that is good enough, a model does not reuse
//! them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Variant;

/// A mean with the interval in which it lies, 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// What one way of reuse costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    pub variant: String,
    pub questions: usize,
    /// Kullback-Leibler divergence of the next token from the full computation's, nats per token.
    pub divergence: Mean,
    /// Share of answer tokens whose best is the same.
    pub top1: Mean,
    /// Of the words of the answers, against the full computation's.
    pub f1: Mean,
    /// Share of a prompt's tokens that is computed when all documents are there.
    pub computed: f64,
}

/// What a way of reuse must keep to be used. Compared with means.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    pub divergence: f64,
    pub top1: f64,
    pub f1: f64,
}

impl Bound {
    pub fn holds(&self, fidelity: &Fidelity) -> bool {
        fidelity.divergence.mean <= self.divergence && fidelity.top1.mean >= self.top1 && fidelity.f1.mean >= self.f1
    }
}

/// A model's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FidelityRecord {
    /// Of the model's keys and values, in hexadecimal: of its weights and of everything else that they depend on.
    pub identity: String,
    pub model: String,
    #[serde(flatten)]
    pub fidelity: Fidelity,
    pub answer_tokens: usize,
    /// BLAKE3 of the questions that it was measured on.
    pub data: String,
    pub weir: String,
    /// When, by this machine's clock.
    pub measured_at: String,
}

impl FidelityRecord {
    /// Where a model's record lies in a folder.
    pub fn path(dir: &Path, identity: u128) -> PathBuf {
        dir.join(format!("{identity:032x}.json"))
    }

    /// The record of a model; `None` where there is none.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(dir: &Path, identity: u128) -> Result<Option<(Self, Variant)>, String> {
        let path = Self::path(dir, identity);
        let wrong = |what: String| format!("{}: {what}; measure it again with `weir kv calibrate`", path.display());
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(wrong(e.to_string())),
        };
        let record: Self = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        if record.identity != format!("{identity:032x}") {
            return Err(wrong(format!("is of another model, {}", record.identity)));
        }
        let variant = Variant::of_name(&record.fidelity.variant).map_err(wrong)?;
        Ok(Some((record, variant)))
    }

    /// Writes the record, in place of an earlier one.
    ///
    /// # Errors
    /// When the folder or the file cannot be written.
    pub fn write(&self, dir: &Path, identity: u128) -> std::io::Result<PathBuf> {
        std::fs::create_dir_all(dir)?;
        let path = Self::path(dir, identity);
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(&part, &path)?;
        Ok(path)
    }
}
