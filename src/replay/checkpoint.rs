//! What is done of a long replay, kept in a directory, so that one that was stopped goes on from there. What comes out in the
//! end is the same as without a stop, byte for byte.

use std::{
    fs,
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

/// Why what is kept cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{} holds the middle of another replay (other policies, another log, another weir): give another directory with --resume, \
         or remove this one",
        .0.display()
    )]
    Other(PathBuf),
    #[error("{} cannot be read again ({what}): remove it, and the replay begins anew", .path.display())]
    Broken { path: PathBuf, what: String },
}

/// A directory of what is done.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    /// At most one in this time.
    every: Duration,
    newest: Instant,
}

impl Checkpoints {
    /// Makes the directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path, every: Duration) -> Result<Self, CheckpointError> {
        fs::create_dir_all(dir).map_err(|source| CheckpointError::File { path: dir.to_owned(), source })?;
        Ok(Self { dir: dir.to_owned(), every, newest: Instant::now() })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether it is time for another; if so, the time begins again.
    pub(super) fn due(&mut self) -> bool {
        let due = self.newest.elapsed() >= self.every;
        if due {
            self.newest = Instant::now();
        }
        due
    }

    /// Keeps a value under a name: all of it, or what was there before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn keep(&self, name: &str, about: &str, value: &impl Serialize) -> Result<(), CheckpointError> {
        let (path, fresh) = (self.path(name), self.path(&format!("{name}.part")));
        let write = || {
            let mut file = BufWriter::new(fs::File::create(&fresh)?);
            serde_json::to_writer(&mut file, &(about, value))?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.flush()?;
            fs::rename(&fresh, &path)
        };
        write().map_err(|source| CheckpointError::File { path: path.clone(), source })
    }

    /// What was kept under a name; nothing where nothing was.
    ///
    /// # Errors
    /// When it is about something else, or cannot be read.
    pub(super) fn kept<T: DeserializeOwned>(&self, name: &str, about: &str) -> Result<Option<T>, CheckpointError> {
        let path = self.path(name);
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CheckpointError::File { path, source }),
        };
        let read: Result<(String, T), _> = serde_json::from_reader(BufReader::new(file));
        match read {
            Ok((of, value)) if of == about => Ok(Some(value)),
            Ok(_) => Err(CheckpointError::Other(self.dir.clone())),
            // What another weir wrote may have another form.
            Err(e) => Err(CheckpointError::Broken { path: self.dir.clone(), what: e.to_string() }),
        }
    }

    /// Removes what was kept under these names, and the directory, if nothing else is in it.
    pub(super) fn done(&self, names: impl Iterator<Item = String>) {
        for name in names {
            let _ = fs::remove_file(self.path(&name));
            // Of one that was stopped while it wrote.
            let _ = fs::remove_file(self.path(&format!("{name}.part")));
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_for_the_same_replay_only() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("kept");
        let mut kept = Checkpoints::open(&at, Duration::ZERO).unwrap();
        assert!(kept.due());
        assert_eq!(kept.kept::<Vec<f64>>("a", "this").unwrap(), None);
        let values = vec![0.1 + 0.2, f64::MIN_POSITIVE, -1e300];
        kept.keep("a", "this", &values).unwrap();
        assert_eq!(kept.kept::<Vec<f64>>("a", "this").unwrap(), Some(values));
        assert!(matches!(kept.kept::<Vec<f64>>("a", "that"), Err(CheckpointError::Other(_))));
        fs::write(kept.path("a"), "{").unwrap();
        assert!(kept.kept::<Vec<f64>>("a", "this").unwrap_err().to_string().contains("remove it"));
        kept.done(["a".to_owned()].into_iter());
        assert!(!at.exists());
    }
}
