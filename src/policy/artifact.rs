//! What a fit leaves behind: one safetensors file whose metadata holds a [`Card`], or the JSON of a gate's calibration. A policy names it by path and hash, and
//! its hash is part of the policy's.

use std::{borrow::Cow, collections::BTreeMap};

use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    cascade::calibration::Calibration,
    domain::{EmbedderIdentity, Hash},
};

/// The version of the form; another one is refused.
const FORM: u32 = 1;
/// The key of the card in the file's metadata.
const CARD: &str = "weir";
/// What the card of a calibration calls its selector.
pub(super) const CALIBRATION: &str = "calibration";

/// What an artifact is and where it is from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    pub form: u32,
    /// The selector that reads it: `ridge`, `logistic`, `knn`, `clusters`, `graph`, `ensemble`, or `bandit` for a warm
    /// start.
    pub selector: String,
    /// The models whose outcomes it was fitted to, in the tensors' order.
    pub models: Vec<String>,
    /// Which embedder made the vectors; absent where none was needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedder: Option<EmbedderIdentity>,
    /// Names of the query features beside the embedding, in order.
    pub features: Vec<String>,
    pub data: Data,
    pub seed: u64,
    /// Parameters of the fit, chosen or given.
    pub parameters: BTreeMap<String, f64>,
    /// Figures on the queries that were held out.
    pub metrics: BTreeMap<String, f64>,
}

/// The outcomes that an artifact was fitted to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// File name, for people.
    pub file: String,
    /// BLAKE3 of the file.
    pub hash: String,
    pub queries: usize,
    pub fitted_on: usize,
    pub held_out: usize,
}

/// Numbers with a shape, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// A card and its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    pub card: Card,
    pub tensors: BTreeMap<String, Tensor>,
    /// Of a `*.calibration.json`, whose card says `calibration`.
    pub calibration: Option<Calibration>,
    /// BLAKE3 of the file.
    pub hash: Hash,
}

/// Why bytes are no artifact.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("it is no safetensors file: {0}")]
    Form(#[from] safetensors::SafeTensorError),
    #[error("it has no weir card; `weir policy fit` writes artifacts")]
    NoCard,
    #[error("its card cannot be read: {0}")]
    Card(#[from] serde_json::Error),
    #[error("its form is {0}, this weir reads {FORM}; fit it again")]
    OtherForm(u32),
    #[error("it is no calibration that this weir reads: {0}")]
    Calibration(serde_json::Error),
    #[error("its tensor `{0}` is not of 32-bit numbers")]
    Numbers(String),
    #[error("its tensor `{name}` {what}")]
    Tensor { name: String, what: String },
}

impl Card {
    pub fn new(selector: &str, models: Vec<String>) -> Self {
        Card {
            form: FORM,
            selector: selector.to_owned(),
            models,
            embedder: None,
            features: Vec::new(),
            data: Data::default(),
            seed: 0,
            parameters: BTreeMap::new(),
            metrics: BTreeMap::new(),
        }
    }
}

struct Floats<'a>(&'a Tensor);

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.0.data.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        self.0.data.len() * 4
    }
}

impl Artifact {
    /// The file's bytes; the same card and tensors give the same bytes.
    ///
    /// # Errors
    /// When a shape does not fit its numbers.
    pub fn to_bytes(card: &Card, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>, ArtifactError> {
        let card = serde_json::to_string(card)?;
        let metadata = std::iter::once((CARD.to_owned(), card)).collect();
        Ok(safetensors::serialize(tensors.iter().map(|(name, t)| (name, Floats(t))), Some(metadata))?)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// When these are not an artifact of this form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ArtifactError> {
        // Eight bytes of length come first in the other form, of which the last ones are 0.
        if bytes.trim_ascii_start().starts_with(b"{") && !bytes.iter().take(8).any(|b| *b == 0) {
            let calibration: Calibration = serde_json::from_slice(bytes).map_err(ArtifactError::Calibration)?;
            let card = Card::new(CALIBRATION, calibration.models().to_vec());
            return Ok(Artifact {
                card,
                tensors: BTreeMap::new(),
                calibration: Some(calibration),
                hash: Hash::of(bytes),
            });
        }
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let card = metadata.metadata().as_ref().and_then(|m| m.get(CARD)).ok_or(ArtifactError::NoCard)?;
        let card: Card = serde_json::from_str(card)?;
        if card.form != FORM {
            return Err(ArtifactError::OtherForm(card.form));
        }
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes)?.tensors() {
            tensors.insert(name.clone(), floats(name, &view)?);
        }
        Ok(Artifact { card, tensors, calibration: None, hash: Hash::of(bytes) })
    }

    /// A tensor of this shape; 0 stands for any length.
    ///
    /// # Errors
    /// When it is missing, or of another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&Tensor, ArtifactError> {
        let wrong = |what: String| ArtifactError::Tensor { name: name.to_owned(), what };
        let tensor = self.tensors.get(name).ok_or_else(|| wrong("is missing".to_owned()))?;
        let fits = tensor.shape.len() == shape.len() && tensor.shape.iter().zip(shape).all(|(a, b)| *b == 0 || a == b);
        if !fits {
            return Err(wrong(format!("has the shape {:?}, not {shape:?}", tensor.shape)));
        }
        if tensor.data.iter().any(|x| !x.is_finite()) {
            return Err(wrong("holds a number that is not finite".to_owned()));
        }
        Ok(tensor)
    }
}

fn floats(name: String, view: &TensorView<'_>) -> Result<Tensor, ArtifactError> {
    if view.dtype() != Dtype::F32 {
        return Err(ArtifactError::Numbers(name));
    }
    let (words, _) = view.data().as_chunks::<4>();
    Ok(Tensor { shape: view.shape().to_vec(), data: words.iter().map(|b| f32::from_le_bytes(*b)).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_comes_back_as_it_was_and_damage_is_named() {
        let card = Card::new("ridge", vec!["a".into(), "b".into()]);
        let tensor = Tensor { shape: vec![2, 3], data: vec![1.0, -2.5, 0.0, 3.0, 4.0, 5.5] };
        let tensors = BTreeMap::from([("w".to_owned(), tensor.clone())]);
        let bytes = Artifact::to_bytes(&card, &tensors).unwrap();
        assert_eq!(bytes, Artifact::to_bytes(&card, &tensors).unwrap());
        let read = Artifact::from_bytes(&bytes).unwrap();
        assert_eq!((&read.card, &read.tensors, read.hash), (&card, &tensors, Hash::of(&bytes)));
        assert_eq!(read.tensor("w", &[2, 0]).unwrap(), &tensor);
        assert!(read.tensor("w", &[3, 2]).unwrap_err().to_string().contains("[2, 3], not [3, 2]"));
        assert!(read.tensor("v", &[1]).unwrap_err().to_string().contains("`v` is missing"));
        assert!(Artifact::from_bytes(&bytes[..20]).is_err());
        assert!(Artifact::from_bytes(b"not at all a file of tensors").is_err());
        let other = Artifact::to_bytes(&Card { form: 9, ..card }, &tensors).unwrap();
        assert!(Artifact::from_bytes(&other).unwrap_err().to_string().contains("form is 9"));
        let bare = safetensors::serialize([("w", Floats(&tensor))], None).unwrap();
        assert!(matches!(Artifact::from_bytes(&bare), Err(ArtifactError::NoCard)));
    }
}
