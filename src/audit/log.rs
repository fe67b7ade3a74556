//! The write-ahead event log: one sequencer, one hash chain, segment files in `<data_dir>/log/`.
//!
//! An append is one `write(2)` for all its events: it survives the death of the process, by kill -9 too. With
//! [`Durability::Strict`] it also waits for an fdatasync that serves all who wait at that time, and so survives the death
//! of the machine. A failed write leaves nothing behind: the torn bytes are cut away, the chain is where it was, and
//! the next append may go right. The log never waits for a store; the [`super::Feeder`] follows it.

mod disk;
mod recent;
mod sync;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use self::{disk::Disk, recent::Recent, sync::Syncer};
use super::{
    frame,
    reader::LogReader,
    record::{Draft, Logged, RecordError},
    segment,
};
use crate::domain::{Event, Hash, canonical};

/// What an append waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// `write(2)`: survives the process.
    #[default]
    Written,
    /// A group fdatasync: survives the machine.
    Strict,
}

/// How a log is kept.
#[derive(Clone, Debug)]
pub struct LogOptions {
    pub durability: Durability,
    /// Name of this weir's chain; unique among all that feed one store.
    pub replica: String,
    /// A segment that has grown to this many bytes is followed by a new one.
    pub segment_bytes: u64,
    /// Newest segments that [`EventLog::remove_ingested`] keeps, however old their events; at least 1.
    pub keep_segments: usize,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { durability: Durability::Written, replica: "weir".to_owned(), segment_bytes: 64 << 20, keep_segments: 4 }
    }
}

/// Why the log cannot be opened, written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "another weir{} is using the data directory of {dir}; stop it, or give this one another --data-dir",
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Locked { dir: PathBuf, pid: Option<u32> },
    #[error("no space is left for the event log at {path}: {source}; free some, or move the data directory")]
    Full { path: PathBuf, source: io::Error },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} is damaged at byte {offset}: {what}; `weir audit verify --from-log` tells more; with the file moved away, \
         weir starts and goes on after what the store holds"
    )]
    Corrupt { path: PathBuf, offset: u64, what: String },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("an event of {0} bytes is too large for the log")]
    TooLarge(usize),
    #[error("the event log failed to reach the disk ({0}); restart weir when the disk is well")]
    Broken(String),
}

impl LogError {
    /// Fixed label for metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            LogError::Locked { .. } => "locked",
            LogError::Full { .. } => "full",
            LogError::Io { .. } => "io",
            LogError::Corrupt { .. } => "corrupt",
            LogError::Record(_) => "record",
            LogError::TooLarge(_) => "too_large",
            LogError::Broken(_) => "broken",
        }
    }

    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            // EFBIG: the limit of the process (ulimit -f) or of the file system.
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => LogError::Full { path, source },
            _ => LogError::Io { action, path, source },
        }
    }
}

/// What opening had to cut off the end of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    pub segment: PathBuf,
    /// Where the good part ends.
    pub offset: u64,
    /// Bytes cut off.
    pub dropped: u64,
    pub fault: String,
    /// Where the bytes that were cut off are kept.
    pub kept: PathBuf,
}

struct Shared {
    dir: PathBuf,
    options: LogOptions,
    replica_json: Vec<u8>,
    disk: Mutex<Disk>,
    recent: Recent,
    last: watch::Sender<u64>,
    sync: Option<Syncer>,
    recovery: Option<Recovery>,
    /// Held for the life of the log; the system releases it however the process ends.
    _lock: std::fs::File,
}

/// The write-ahead log of one weir. Cheap to clone; all clones are the same log.
#[derive(Clone)]
pub struct EventLog(Arc<Shared>);

impl EventLog {
    /// Opens or creates the log in `dir`, takes its lock, cuts a torn tail and finds the end of the chain.
    ///
    /// # Errors
    /// [`LogError::Locked`] when another process has it; [`LogError::Corrupt`] when no end can be found.
    pub fn open(dir: &Path, options: LogOptions) -> Result<EventLog, LogError> {
        std::fs::create_dir_all(dir).map_err(|e| LogError::io("create", dir, e))?;
        let lock = disk::lock(dir)?;
        let (disk, recovery) = disk::open(dir, options.segment_bytes)?;
        if let Some(cut) = &recovery {
            tracing::warn!(
                segment = %cut.segment.display(), offset = cut.offset, dropped_bytes = cut.dropped, fault = cut.fault,
                kept = %cut.kept.display(), "the event log ended in an unfinished write, which was cut off"
            );
        }
        let sync = match options.durability {
            Durability::Written => None,
            Durability::Strict => {
                Some(Syncer::start(disk.file(), disk.seq()).map_err(|e| LogError::io("sync", dir, e))?)
            }
        };
        let replica_json = canonical::to_bytes(options.replica.as_str()).map_err(RecordError::Write)?;
        Ok(EventLog(Arc::new(Shared {
            dir: dir.to_owned(),
            replica_json,
            recent: Recent::default(),
            last: watch::Sender::new(disk.seq()),
            disk: Mutex::new(disk),
            sync,
            recovery,
            options,
            _lock: lock,
        })))
    }

    /// Appends events as one contiguous write and returns the last one's number. Hashes of contexts, embeddings and
    /// bodies are filled in where the caller has not ([`super::record::seal`]).
    ///
    /// # Errors
    /// [`LogError::Full`], [`LogError::Io`]: nothing was appended, and a later call may go right.
    pub async fn append(&self, events: Vec<Event>) -> Result<u64, LogError> {
        let seq = self.write(events)?;
        if let Some(sync) = &self.0.sync {
            sync.wait(seq).await?;
        }
        Ok(seq)
    }

    /// [`EventLog::append`] without waiting for the disk, whatever the durability; for `Drop`, which cannot wait.
    ///
    /// # Errors
    /// As [`EventLog::append`].
    pub fn write(&self, events: Vec<Event>) -> Result<u64, LogError> {
        let shared = &*self.0;
        let drafts = events.into_iter().map(Draft::new).collect::<Result<Vec<_>, _>>()?;
        let mut disk = self.disk();
        if drafts.is_empty() {
            return Ok(disk.seq());
        }
        let (mut seq, mut hash) = (disk.seq(), disk.hash());
        let mut buffer = disk.take_buffer();
        let mut placed = Vec::with_capacity(drafts.len());
        for draft in drafts {
            seq += 1;
            let logged = draft.place(&shared.options.replica, &shared.replica_json, seq, hash);
            if logged.size() + frame::HEAD > frame::MAX_FRAME {
                return Err(LogError::TooLarge(logged.size()));
            }
            hash = logged.hash;
            frame::encode(&mut buffer, &logged);
            placed.push(logged);
        }
        disk.write(buffer, seq, hash)?;
        if let Some(sync) = &shared.sync {
            sync.written(disk.file(), seq);
        }
        // Under the sequencer's lock, so that both see events in order.
        shared.recent.push(placed);
        shared.last.send_replace(seq);
        Ok(seq)
    }

    /// The last event's number; 0 in an empty log.
    pub fn last_seq(&self) -> u64 {
        *self.0.last.borrow()
    }

    /// Number and hash of the last event.
    pub fn head(&self) -> (u64, Hash) {
        let disk = self.disk();
        (disk.seq(), disk.hash())
    }

    /// Follows the last event's number.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.last.subscribe()
    }

    /// Reads from event `seq` on, and follows the log: at its end the reader gives `None`, and more later.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn read_from(&self, seq: u64) -> Result<LogReader, LogError> {
        LogReader::live(&self.0.dir, seq, self.0.last.subscribe())
    }

    pub fn replica(&self) -> &str {
        &self.0.options.replica
    }

    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// What opening cut off, if anything.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.0.recovery.as_ref()
    }

    /// Goes on after event `seq` of the store, whose hash is `hash`. For a log that ends before its store does: the
    /// machine died between a write and the disk, or the log was deleted.
    ///
    /// # Errors
    /// When `seq` is not beyond this log's end, or the new segment cannot be written.
    pub fn fast_forward(&self, seq: u64, hash: Hash) -> Result<(), LogError> {
        let mut disk = self.disk();
        disk.fast_forward(seq, hash)?;
        if let Some(sync) = &self.0.sync {
            sync.written(disk.file(), seq);
        }
        self.0.recent.clear();
        self.0.last.send_replace(seq);
        Ok(())
    }

    /// Deletes segments all of whose events are at or before `ingested`, but never the newest `keep_segments`. Gives
    /// back how many.
    ///
    /// # Errors
    /// When a file cannot be deleted.
    pub fn remove_ingested(&self, ingested: u64) -> Result<usize, LogError> {
        let dir = &self.0.dir;
        let segments = segment::list(dir).map_err(|e| LogError::io("read", dir, e))?;
        let removable = segments.len().saturating_sub(self.0.options.keep_segments.max(1));
        let mut removed = 0;
        for pair in segments.windows(2).take(removable) {
            if pair[1].first > ingested + 1 {
                break;
            }
            std::fs::remove_file(&pair[0].path).map_err(|e| LogError::io("delete", &pair[0].path, e))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Overwrites contexts, embeddings and bodies of these events with zeros, in whatever segments still hold them; the
    /// chain is untouched. Gives back how many events were found.
    ///
    /// # Errors
    /// When a segment cannot be read or written.
    pub fn erase(&self, seqs: &[u64]) -> Result<usize, LogError> {
        self.0.recent.clear();
        disk::erase(&self.0.dir, seqs, self.last_seq())
    }

    /// From now on the newest events are also kept in memory, for [`EventLog::take_recent`].
    pub(super) fn keep_recent(&self) {
        self.0.recent.enable();
    }

    /// Events from `seq` on that are still in memory, at most `max`; `None` when `seq` has left it.
    pub(super) fn take_recent(&self, seq: u64, max: usize) -> Option<Vec<Logged>> {
        self.0.recent.take(seq, max)
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        // A panic while the lock was held cannot have left a half-made state: `Disk` changes its place in the chain
        // only after a write has gone right.
        self.0.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLog").field("dir", &self.0.dir).field("last_seq", &self.last_seq()).finish()
    }
}

#[cfg(test)]
mod tests;
