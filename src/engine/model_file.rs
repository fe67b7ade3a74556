//! A model's weights with what is said about them, whatever they lie in: GGUF ([`super::gguf`]) or a folder of safetensors
//! ([`super::safetensors`]). Metadata has GGUF's keys, and tensors GGUF's names and order of dimensions. What the metadata means is
//! left to [`super::model`] and [`super::tokenizer`].

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::{EngineError, gguf, safetensors};

/// A metadata value. Integers are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

/// How a tensor's elements are stored. Only what the engine reads has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    /// Blocks of 32 with one f16 scale; `w = d (q - 8)`.
    Q4_0,
    /// Blocks of 32 with f16 scale and minimum; `w = d q + m`.
    Q4_1,
    /// Blocks of 32 signed bytes with one f16 scale.
    Q8_0,
    /// Blocks of 32 with one f16 scale, and with a minimum.
    Q5_0,
    Q5_1,
    /// Blocks of 256 whose parts have scales (and some minima) of a few bits.
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl TensorType {
    pub(super) fn from_u32(code: u32) -> Option<Self> {
        Some(match code {
            0 => TensorType::F32,
            1 => TensorType::F16,
            2 => TensorType::Q4_0,
            3 => TensorType::Q4_1,
            8 => TensorType::Q8_0,
            30 => TensorType::Bf16,
            6 => TensorType::Q5_0,
            7 => TensorType::Q5_1,
            10 => TensorType::Q2K,
            11 => TensorType::Q3K,
            12 => TensorType::Q4K,
            13 => TensorType::Q5K,
            14 => TensorType::Q6K,
            _ => return None,
        })
    }

    /// Elements per block, and bytes per block.
    pub fn block(self) -> (u64, u64) {
        match self {
            TensorType::F32 => (1, 4),
            TensorType::F16 | TensorType::Bf16 => (1, 2),
            TensorType::Q4_0 => (32, 18),
            TensorType::Q4_1 => (32, 20),
            TensorType::Q8_0 => (32, 34),
            TensorType::Q5_0 => (32, 22),
            TensorType::Q5_1 => (32, 24),
            TensorType::Q2K => (256, 84),
            TensorType::Q3K => (256, 110),
            TensorType::Q4K => (256, 144),
            TensorType::Q5K => (256, 176),
            TensorType::Q6K => (256, 210),
        }
    }

    /// The name that llama.cpp gives it.
    pub fn name(self) -> &'static str {
        match self {
            TensorType::F32 => "F32",
            TensorType::F16 => "F16",
            TensorType::Bf16 => "BF16",
            TensorType::Q4_0 => "Q4_0",
            TensorType::Q4_1 => "Q4_1",
            TensorType::Q8_0 => "Q8_0",
            TensorType::Q5_0 => "Q5_0",
            TensorType::Q5_1 => "Q5_1",
            TensorType::Q2K => "Q2_K",
            TensorType::Q3K => "Q3_K",
            TensorType::Q4K => "Q4_K",
            TensorType::Q5K => "Q5_K",
            TensorType::Q6K => "Q6_K",
        }
    }
}

/// Where a tensor is and what shape it has.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub kind: TensorType,
    /// Innermost dimension first, as in the file: a matrix of `rows` x `columns` is `[columns, rows]`.
    pub dimensions: Vec<u64>,
    /// Which of the files it lies in.
    pub file: usize,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
    /// The bytes of one that lies in no file but follows from the metadata.
    pub made: Option<Vec<u8>>,
}

impl TensorInfo {
    pub fn elements(&self) -> u64 {
        self.dimensions.iter().product()
    }
}

/// Open files with their headers read and every tensor's place checked.
pub struct ModelFile {
    pub(super) path: PathBuf,
    pub(super) files: Vec<File>,
    /// Of all tensors that were read.
    pub(super) read: Mutex<blake3::Hasher>,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl ModelFile {
    /// Reads what there is at a path: a folder or a file of safetensors, else GGUF.
    ///
    /// # Errors
    /// [`EngineError::Io`] when it cannot be read, [`EngineError::Corrupt`] when it is not whole,
    /// [`EngineError::UnsupportedModel`] for versions, byte orders and tensor types that are not read here.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        match path.is_dir() || path.extension().is_some_and(|e| e == "safetensors") {
            true => safetensors::open(path),
            false => gguf::open(path),
        }
    }

    pub fn files(&self) -> &[File] {
        &self.files
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The raw bytes of a tensor, or `None` when there is no tensor of that name.
    ///
    /// # Errors
    /// [`EngineError::Io`] when reading fails.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, EngineError> {
        let Some(info) = self.tensors.get(name) else { return Ok(None) };
        let Some(mut file) = self.files.get(info.file) else {
            self.note(name, info, info.made.as_deref().unwrap_or_default());
            return Ok(info.made.clone());
        };
        let mut bytes = vec![0; info.bytes as usize];
        file.seek(SeekFrom::Start(info.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|e| EngineError::io(&self.path, &e))?;
        self.note(name, info, &bytes);
        Ok(Some(bytes))
    }

    fn note(&self, name: &str, info: &TensorInfo, bytes: &[u8]) {
        let mut hasher = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        hasher.update(format!("{name} {} {:?}\n", info.kind.name(), info.dimensions).as_bytes()).update(bytes);
    }

    /// A hash of all tensors that were read so far, in that order.
    pub fn hash_of_read(&self) -> [u8; 32] {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner).finalize().as_bytes()
    }

    pub fn corrupt(&self, reason: impl Into<String>) -> EngineError {
        EngineError::Corrupt { path: self.path.clone(), reason: reason.into() }
    }

    pub fn unsupported(&self, reason: impl Into<String>) -> EngineError {
        EngineError::UnsupportedModel { path: self.path.clone(), reason: reason.into() }
    }

    /// A whole number of the metadata that must be there.
    pub fn need_u64(&self, key: &str) -> Result<u64, EngineError> {
        self.u64(key)?.ok_or_else(|| self.corrupt(format!("metadata `{key}` is missing")))
    }

    /// A whole number of the metadata; `None` when absent, an error when of another type.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(_) => Err(self.corrupt(format!("metadata `{key}` is not a whole number of at least 0"))),
        }
    }

    /// A number of the metadata; `None` when absent.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) if x.is_finite() => Ok(Some(*x)),
            Some(Value::Unsigned(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.corrupt(format!("metadata `{key}` is not a finite number"))),
        }
    }

    /// A text of the metadata; `None` when absent.
    pub fn text(&self, key: &str) -> Result<Option<&str>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.corrupt(format!("metadata `{key}` is not a text"))),
        }
    }

    /// A truth value of the metadata; `None` when absent.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.corrupt(format!("metadata `{key}` is not true or false"))),
        }
    }

    /// A list of the metadata; `None` when absent.
    pub fn list(&self, key: &str) -> Result<Option<&[Value]>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(_) => Err(self.corrupt(format!("metadata `{key}` is not a list"))),
        }
    }
}
