//! Packed weights on disk: a model file's matrices as [`Linear`] keeps them, written once and mapped into memory from then on.
//!
//! The system shares the pages between all that map them, and lets go of what is not used. A file is whole or not there (it is
//! written beside its place and renamed), it says which source it was made of (paths, sizes, times and tables of its files) and how,
//! and each matrix has a checksum that is checked when it is opened; one that does not fit is made anew.
//!
//! Layout: [`MAGIC`], the length of the header (u64, little-endian), the header (JSON), zeros up to a page, the matrices.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::{
    model_file::ModelFile,
    ops::linear::{Format, Linear, Shape},
};

/// Eight bytes that these files begin with; the last two are the version of packing and layout.
const MAGIC: &[u8; 8] = b"weirpk01";
const PAGE: u64 = 4096;
/// Longer headers are damage.
const MOST_HEADER: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Header {
    source: String,
    /// [`ModelFile::hash_of_read`] after all was read.
    weights: [u8; 32],
    matrices: BTreeMap<String, Place>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Place {
    shape: Shape,
    /// From the first page behind the header.
    offset: u64,
    bytes: u64,
    crc: u32,
}

/// A file of packed weights that fits its source.
pub struct Packed {
    map: Arc<Mmap>,
    data: u64,
    header: Header,
}

impl Packed {
    /// Opens what was packed from this source; `None` where there is nothing, or something else.
    pub fn open(dir: &Path, source: &ModelFile, format: Format) -> Option<Self> {
        let path = place(dir, source, format);
        match Self::read(&path, &fingerprint(source, format)) {
            Ok(packed) => Some(packed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "packed weights cannot be used and are made anew");
                None
            }
        }
    }

    fn read(path: &Path, source: &str) -> io::Result<Self> {
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let (mut magic, mut size) = ([0; 8], [0; 8]);
        file.read_exact(&mut magic)?;
        file.read_exact(&mut size)?;
        let size = u64::from_le_bytes(size);
        if magic != *MAGIC || size > MOST_HEADER.min(length) {
            return Err(damaged("its beginning is of another version, or damaged"));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header)?;
        let header: Header = serde_json::from_slice(&header)?;
        if header.source != source {
            return Err(damaged("it was made of another model file"));
        }
        let data = (16 + size).next_multiple_of(PAGE);
        // SAFETY: nobody writes to these files: they are made beside their place and renamed.
        let map = Arc::new(unsafe { Mmap::map(&file)? });
        for (name, place) in &header.matrices {
            let end = place.offset.checked_add(place.bytes).and_then(|end| end.checked_add(data));
            if end.is_none_or(|end| end > length) || place.bytes as usize != place.shape.bytes() {
                return Err(damaged(&format!("`{name}` does not lie inside it")));
            }
            let begin = (data + place.offset) as usize;
            if crc32fast::hash(&map[begin..begin + place.bytes as usize]) != place.crc {
                return Err(damaged(&format!("`{name}` is damaged")));
            }
        }
        Ok(Self { map, data, header })
    }

    /// A matrix by the name of its tensor.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Option<Linear> {
        let place = self.header.matrices.get(name)?;
        Linear::mapped(place.shape, &self.map, (self.data + place.offset) as usize)
            .filter(|linear| linear.rows() == rows && linear.columns() == columns)
    }

    /// The hash of the weights that it was made of.
    pub fn weights(&self) -> [u8; 32] {
        self.header.weights
    }
}

/// Writes matrices behind each other, then the header.
pub struct Writer {
    dir: PathBuf,
    place: PathBuf,
    source: String,
    data: BufWriter<File>,
    matrices: BTreeMap<String, Place>,
    at: u64,
}

impl Writer {
    /// # Errors
    /// When nothing can be written there.
    pub fn new(dir: &Path, source: &ModelFile, format: Format) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            place: place(dir, source, format),
            source: fingerprint(source, format),
            data: BufWriter::with_capacity(1 << 20, tempfile::tempfile_in(dir)?),
            matrices: BTreeMap::new(),
            at: 0,
        })
    }

    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, name: &str, matrix: &Linear) -> io::Result<()> {
        let bytes = matrix.as_bytes();
        let place =
            Place { shape: matrix.shape(), offset: self.at, bytes: bytes.len() as u64, crc: crc32fast::hash(bytes) };
        self.data.write_all(bytes)?;
        self.at += place.bytes;
        let padded = self.at.next_multiple_of(PAGE);
        self.data.write_all(&[0; PAGE as usize][..(padded - self.at) as usize])?;
        self.at = padded;
        self.matrices.insert(name.to_owned(), place);
        Ok(())
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self, weights: [u8; 32]) -> io::Result<()> {
        let header = serde_json::to_vec(&Header { source: self.source, weights, matrices: self.matrices })?;
        let mut out = tempfile::NamedTempFile::new_in(&self.dir)?;
        out.write_all(MAGIC)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let length = 16 + header.len() as u64;
        out.write_all(&vec![0; (length.next_multiple_of(PAGE) - length) as usize])?;
        let mut data = self.data.into_inner().map_err(io::IntoInnerError::into_error)?;
        data.seek(SeekFrom::Start(0))?;
        io::copy(&mut data, &mut out)?;
        out.as_file().sync_all()?;
        out.persist(&self.place).map_err(|e| e.error)?;
        Ok(())
    }
}

/// One file for each source and format, so that a source that changes replaces what was made of it before.
fn place(dir: &Path, source: &ModelFile, format: Format) -> PathBuf {
    let path = source.path().canonicalize().unwrap_or_else(|_| source.path().to_owned());
    let hash = blake3::hash(format!("{format:?} {}", path.display()).as_bytes()).to_hex();
    dir.join(format!("{}.weirpack", &hash[..32]))
}

/// What a source is, without reading its weights.
fn fingerprint(source: &ModelFile, format: Format) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{format:?} {:?} {:?}", source.metadata, source.tensors).as_bytes());
    for file in source.files() {
        let stat = file.metadata().map(|m| {
            let time = m.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
            (m.len(), time.as_nanos())
        });
        hasher.update(format!("{:?}", stat.unwrap_or_default()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests;
