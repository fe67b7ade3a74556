//! One asset's folder in the data directory: its lock, its stamps, full and cheap checks, and putting a file in place.
//!
//! A file is in place only when it is whole: it is written elsewhere in the folder, checked, synced, and renamed. The
//! stamp beside it records what was checked, so that the next start need not read it again: a file whose size and time
//! of change are the stamp's is taken for the one that was checked.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{catalog::AssetFile, error::AssetError};

const LOCK: &str = ".lock";
const STAMPS: &str = ".stamps.json";
/// What a killed process may leave behind; removed by the next one that holds the lock.
pub(super) const STAGING: &str = ".staging-";

/// What was found when a file was last checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    pub sha256: String,
    pub bytes: u64,
    /// Time of change, in nanoseconds since 1970; `None` for a file that was found damaged, or whose time is unknown.
    pub changed_ns: Option<u64>,
    /// Where it came from, in words.
    pub source: String,
}

/// The stamps of a folder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Stamps {
    /// The name under which the asset is known; for references, what lists it again.
    pub names: Vec<String>,
    pub files: BTreeMap<String, Stamp>,
}

/// How a file stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FileState {
    /// As it should be.
    Ok,
    /// Not there.
    Missing,
    /// Not as long as it should be.
    WrongSize { expected: u64, found: u64 },
    /// Other bytes than it should have.
    WrongChecksum { expected: String, found: String },
    /// There, of the right length, and changed since it was last checked, or never checked.
    Unchecked,
}

/// One asset's folder.
pub(super) struct Shelf {
    dir: PathBuf,
}

impl Shelf {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn path(&self, file: &AssetFile) -> PathBuf {
        self.dir.join(&file.path)
    }

    /// Creates the folder and waits for its lock; `waiting` is called when another process or thread holds it. The lock
    /// ends with the returned file, or with the process.
    pub fn lock(&self, waiting: impl FnOnce()) -> Result<File, AssetError> {
        fs::create_dir_all(&self.dir).map_err(AssetError::io("create", &self.dir))?;
        let path = self.dir.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(AssetError::io("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(AssetError::io("lock", &path))?;
            }
            Err(TryLockError::Error(error)) => return Err(AssetError::io("lock", &path)(error)),
        }
        Ok(file)
    }

    /// Removes what killed processes left. Only while the lock is held.
    pub fn sweep(&self) {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(STAGING)) {
            let path = entry.path();
            let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            if let Err(error) = gone {
                tracing::warn!(path = %path.display(), %error, "cannot remove what an interrupted fetch left");
            }
        }
    }

    /// The stamps; none when there are none that can be read, which costs one full check.
    pub fn stamps(&self) -> Stamps {
        fs::read(self.dir.join(STAMPS)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// The cheap check: size and stamp, no reading. What is expected is the catalogue's checksum, else the stamp's.
    pub fn glance(&self, file: &AssetFile, stamps: &Stamps) -> FileState {
        let Ok(meta) = fs::metadata(self.path(file)) else { return FileState::Missing };
        let stamp = stamps.files.get(&file.path);
        let expected = file.bytes.or(stamp.map(|s| s.bytes));
        match expected {
            Some(expected) if expected != meta.len() => FileState::WrongSize { expected, found: meta.len() },
            _ => match stamp {
                Some(stamp)
                    if stamp.changed_ns.is_some()
                        && changed_ns(&meta) == stamp.changed_ns
                        && file.sha256.as_ref().is_none_or(|sum| *sum == stamp.sha256) =>
                {
                    FileState::Ok
                }
                _ => FileState::Unchecked,
            },
        }
    }

    /// The full check: every byte is read. A file of which nothing is known (a reference without checksum, put there by
    /// hand) passes.
    ///
    /// Returns the state and the checksum found, where the file could be read.
    pub fn check(
        &self,
        file: &AssetFile,
        stamps: &Stamps,
        progress: impl FnMut(u64),
    ) -> Result<(FileState, Option<String>), AssetError> {
        let path = self.path(file);
        let stamp = stamps.files.get(&file.path);
        let found = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((FileState::Missing, None)),
            Err(error) => return Err(AssetError::io("read", path)(error)),
        };
        if let Some(expected) = file.bytes.or(stamp.map(|s| s.bytes))
            && expected != found
        {
            return Ok((FileState::WrongSize { expected, found }, None));
        }
        let found = hash_file(&path, progress).map_err(AssetError::io("read", &path))?;
        let expected = file.sha256.clone().or(stamp.map(|s| s.sha256.clone()));
        Ok(match expected {
            Some(expected) if expected != found => {
                (FileState::WrongChecksum { expected, found: found.clone() }, Some(found))
            }
            _ => (FileState::Ok, Some(found)),
        })
    }

    /// Moves a checked file into place, durably, and stamps it. Only while the lock is held.
    pub fn place(
        &self,
        name: &str,
        file: &AssetFile,
        from: &Path,
        sha256: &str,
        source: &str,
    ) -> Result<(), AssetError> {
        let to = self.path(file);
        let parent = to.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).map_err(AssetError::io("create", parent))?;
        File::open(from).and_then(|f| f.sync_all()).map_err(AssetError::io("sync", from))?;
        fs::rename(from, &to).map_err(AssetError::io("write", &to))?;
        sync_dir(parent);
        self.stamp(name, file, sha256, source)
    }

    /// Records that a file was checked just now. Only while the lock is held.
    pub fn stamp(&self, name: &str, file: &AssetFile, sha256: &str, source: &str) -> Result<(), AssetError> {
        let path = self.path(file);
        let meta = fs::metadata(&path).map_err(AssetError::io("read", &path))?;
        let mut stamps = self.stamps();
        if !stamps.names.iter().any(|n| n == name) {
            stamps.names.push(name.to_owned());
        }
        let stamp = Stamp {
            sha256: sha256.to_owned(),
            bytes: meta.len(),
            changed_ns: changed_ns(&meta),
            source: source.to_owned(),
        };
        stamps.files.insert(file.path.clone(), stamp);
        self.write_stamps(&stamps)
    }

    /// Makes the next glance at a file read it whole: it was found damaged. Only while the lock is held.
    pub fn distrust(&self, file: &AssetFile) -> Result<(), AssetError> {
        let mut stamps = self.stamps();
        match stamps.files.get_mut(&file.path) {
            // The checksum stays: for a file named by the user it is all that is known of it.
            Some(stamp) if stamp.changed_ns.is_some() => stamp.changed_ns = None,
            _ => return Ok(()),
        }
        self.write_stamps(&stamps)
    }

    fn write_stamps(&self, stamps: &Stamps) -> Result<(), AssetError> {
        let path = self.dir.join(STAMPS);
        let write = || -> io::Result<()> {
            let mut new = tempfile::Builder::new().prefix(STAGING).tempfile_in(&self.dir)?;
            serde_json::to_writer_pretty(&mut new, stamps)?;
            new.flush()?;
            new.as_file().sync_all()?;
            readable(new.as_file())?;
            new.persist(&path)?;
            Ok(())
        };
        write().map_err(AssetError::io("write", &path))
    }
}

/// A temporary file is its maker's alone; what is shared must be readable by whoever runs weir.
fn readable(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    let _ = file;
    Ok(())
}

/// Makes a rename durable. Some file systems cannot sync a folder; the file itself was synced.
fn sync_dir(dir: &Path) {
    if let Err(error) = File::open(dir).and_then(|d| d.sync_all()) {
        tracing::debug!(path = %dir.display(), %error, "cannot sync the folder");
    }
}

fn changed_ns(meta: &fs::Metadata) -> Option<u64> {
    let since = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_nanos()).ok()
}

/// The SHA-256 of a file, in lower-case hexadecimal; `progress` gets the number of bytes of each step.
pub(super) fn hash_file(path: &Path, progress: impl FnMut(u64)) -> io::Result<String> {
    copy_hashing(&mut File::open(path)?, &mut io::sink(), progress).map(|(_, sum)| sum)
}

/// Copies all, and returns the number of bytes and their SHA-256.
pub(super) fn copy_hashing(
    from: &mut impl Read,
    to: &mut impl Write,
    mut progress: impl FnMut(u64),
) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
        total += n as u64;
        progress(n as u64);
    }
    let sum = hasher.finalize();
    Ok((total, sum.iter().map(|b| format!("{b:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_sha256() {
        let (bytes, sum) = copy_hashing(&mut &b"abc"[..], &mut io::sink(), |_| ()).unwrap();
        assert_eq!((bytes, sum.as_str()), (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    }

    #[test]
    fn a_glance_trusts_only_what_was_checked_and_is_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(dir.path().join("a"));
        let file =
            AssetFile { role: "model".into(), path: "m.gguf".into(), bytes: Some(3), sha256: None, sources: vec![] };
        let _lock = shelf.lock(|| ()).unwrap();
        assert_eq!(shelf.glance(&file, &shelf.stamps()), FileState::Missing);
        fs::write(shelf.path(&file), "abc").unwrap();
        assert_eq!(shelf.glance(&file, &shelf.stamps()), FileState::Unchecked);
        shelf.stamp("a", &file, "00", "here").unwrap();
        assert_eq!(shelf.glance(&file, &shelf.stamps()), FileState::Ok);
        let other = AssetFile { sha256: Some("11".into()), ..file.clone() };
        assert_eq!(shelf.glance(&other, &shelf.stamps()), FileState::Unchecked, "the catalogue has changed");
        shelf.distrust(&file).unwrap();
        assert_eq!(shelf.glance(&file, &shelf.stamps()), FileState::Unchecked);
        fs::write(shelf.path(&file), "ab").unwrap();
        assert_eq!(shelf.glance(&file, &shelf.stamps()), FileState::WrongSize { expected: 3, found: 2 });
    }
}
