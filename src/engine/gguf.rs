//! Reading GGUF files: header, metadata and raw tensor bytes, with every size checked against the file before it is
//! trusted.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian. The reader is
//! our own and not candle's, which divides by `general.alignment` (a damaged file panics there) and does not say where
//! in the file it stumbled.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
    sync::Mutex,
};

use super::{
    EngineError,
    model_file::{ModelFile, TensorInfo, TensorType, Value},
};

/// Longest accepted nesting of arrays; the format needs one.
const MAX_DEPTH: u32 = 4;
const MAX_DIMENSIONS: u32 = 4;
const MAX_NAME: usize = 1024;
const DEFAULT_ALIGNMENT: u64 = 32;

/// Reads the header.
///
/// # Errors
/// [`EngineError::Io`] when the file cannot be read, [`EngineError::Corrupt`] when it is no whole GGUF file,
/// [`EngineError::UnsupportedModel`] for versions, byte orders and tensor types that are not read here.
pub fn open(path: &Path) -> Result<ModelFile, EngineError> {
    let file = File::open(path).map_err(|e| EngineError::io(path, &e))?;
    let length = file.metadata().map_err(|e| EngineError::io(path, &e))?.len();
    let mut header = Header { path, reader: BufReader::with_capacity(1 << 16, &file), at: 0, length };
    let (metadata, tensors) = header.read()?;
    Ok(ModelFile { path: path.to_owned(), files: vec![file], read: Mutex::default(), metadata, tensors })
}

type Tables = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

/// Reads the header front to back; knows how many bytes are left, so that no length of the file is believed.
struct Header<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    at: u64,
    length: u64,
}

impl Header<'_> {
    fn corrupt(&self, reason: impl Into<String>) -> EngineError {
        EngineError::Corrupt { path: self.path.to_owned(), reason: reason.into() }
    }

    fn unsupported(&self, reason: impl Into<String>) -> EngineError {
        EngineError::UnsupportedModel { path: self.path.to_owned(), reason: reason.into() }
    }

    fn read(&mut self) -> Result<Tables, EngineError> {
        let magic: [u8; 4] = self.bytes("the magic number")?;
        if magic == *b"FUGG" {
            return Err(self.unsupported("the file is big-endian"));
        }
        if magic != *b"GGUF" {
            return Err(self.corrupt("it does not begin with `GGUF`"));
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(self.unsupported(format!("GGUF version {version}; versions 2 and 3 are read")));
        }
        let tensor_count = self.u64("the number of tensors")?;
        let value_count = self.u64("the number of metadata entries")?;
        // Each entry takes at least a name's length, a type and one byte; each tensor name, shape, type and offset.
        self.fits(value_count, 13, "metadata entries")?;
        self.fits(tensor_count, 24, "tensors")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..value_count {
            let key = self.name("a metadata key")?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, 0, &key)?;
            metadata.insert(key, value);
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, info) = self.tensor()?;
            tensors.insert(name, info);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(_) => return Err(self.corrupt("metadata `general.alignment` is no power of two")),
        };
        let data = self.at.div_ceil(alignment) * alignment;
        for (name, info) in &mut tensors {
            let end = data.checked_add(info.offset).and_then(|start| start.checked_add(info.bytes));
            match end {
                Some(end) if end <= self.length => info.offset += data,
                _ => {
                    let reason = format!(
                        "tensor `{name}` should end at byte {}, but the file has {} bytes: it is cut short",
                        end.unwrap_or(u64::MAX),
                        self.length
                    );
                    return Err(EngineError::Corrupt { path: self.path.to_owned(), reason });
                }
            }
        }
        Ok((metadata, tensors))
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo), EngineError> {
        let name = self.name("a tensor name")?;
        let rank = self.u32(&name)?;
        if rank == 0 || rank > MAX_DIMENSIONS {
            return Err(self.corrupt(format!("tensor `{name}` has {rank} dimensions")));
        }
        let mut dimensions = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            dimensions.push(self.u64(&name)?);
        }
        let code = self.u32(&name)?;
        let offset = self.u64(&name)?;
        let kind = TensorType::from_u32(code)
            .ok_or_else(|| self.unsupported(format!("tensor `{name}` has element type {code}, which is not read")))?;
        let (elements_per_block, block_bytes) = kind.block();
        let elements = dimensions.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let bytes = elements
            .filter(|n| *n > 0 && dimensions.first().is_some_and(|d| d % elements_per_block == 0))
            .and_then(|n| (n / elements_per_block).checked_mul(block_bytes))
            .ok_or_else(|| self.corrupt(format!("tensor `{name}` has the impossible shape {dimensions:?}")))?;
        Ok((name, TensorInfo { kind, dimensions, file: 0, offset, bytes, made: None }))
    }

    fn value(&mut self, kind: u32, depth: u32, key: &str) -> Result<Value, EngineError> {
        Ok(match kind {
            0 => Value::Unsigned(self.bytes::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => Value::Bool(self.bytes::<1>(key)?[0] != 0),
            8 => Value::Text(self.text(key)?),
            9 if depth < MAX_DEPTH => {
                let inner = self.u32(key)?;
                let count = self.u64(key)?;
                self.fits(count, if inner == 8 || inner == 9 { 8 } else { 1 }, key)?;
                let mut list = Vec::new();
                for _ in 0..count {
                    list.push(self.value(inner, depth + 1, key)?);
                }
                Value::List(list)
            }
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes(key)?)),
            _ => return Err(self.corrupt(format!("metadata `{key}` has the unknown type {kind}"))),
        })
    }

    /// Fails unless `count` things of at least `least` bytes each fit into what is left of the file.
    fn fits(&self, count: u64, least: u64, what: &str) -> Result<(), EngineError> {
        let left = self.length - self.at;
        if count.checked_mul(least).is_none_or(|bytes| bytes > left) {
            return Err(self.corrupt(format!(
                "at byte {}: {count} {what} are announced, but only {left} bytes are left",
                self.at
            )));
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], EngineError> {
        if self.length - self.at < N as u64 {
            return Err(self.cut(what));
        }
        let mut out = [0; N];
        self.reader.read_exact(&mut out).map_err(|e| EngineError::io(self.path, &e))?;
        self.at += N as u64;
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, EngineError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, EngineError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    fn cut(&self, what: &str) -> EngineError {
        self.corrupt(format!("it ends at byte {}, in the middle of {what}", self.length))
    }

    /// A key or a tensor name. Longer ones are no names but garbage, and would make unreadable messages.
    fn name(&mut self, what: &str) -> Result<String, EngineError> {
        let name = self.text(what)?;
        if name.len() > MAX_NAME {
            return Err(self.corrupt(format!("{what} before byte {} has {} bytes", self.at, name.len())));
        }
        Ok(name)
    }

    fn text(&mut self, what: &str) -> Result<String, EngineError> {
        let length = self.u64(what)?;
        if self.length - self.at < length {
            return Err(self.cut(what));
        }
        let mut bytes = vec![0; length as usize];
        self.reader.read_exact(&mut bytes).map_err(|e| EngineError::io(self.path, &e))?;
        self.at += length;
        String::from_utf8(bytes).map_err(|_| self.corrupt(format!("{what} is not UTF-8 (before byte {})", self.at)))
    }
}

#[cfg(test)]
mod tests;
