//! The log's files: the lock, the open segment, writing with the torn end cut away, finding the end after a crash.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{LogError, Recovery};
use crate::{
    audit::{
        frame::{self, FrameHead},
        segment::{self, HEADER},
    },
    domain::Hash,
};

/// Takes the directory's lock and leaves the process id in it.
pub(super) fn lock(dir: &Path) -> Result<File, LogError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| LogError::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
            return Err(LogError::Locked { dir: dir.to_owned(), pid });
        }
        Err(TryLockError::Error(error)) => return Err(LogError::io("lock", &path, error)),
    }
    // Only for the other's message: a disk too full for it is no reason not to start.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

/// The segment being written, and the end of the chain.
#[derive(Debug)]
pub(super) struct Disk {
    dir: PathBuf,
    path: PathBuf,
    file: Arc<File>,
    /// End of the last good frame; what lies behind is torn and may be overwritten.
    offset: u64,
    /// A torn end could not be cut off; it must be before anything else is written.
    torn: bool,
    segment_bytes: u64,
    seq: u64,
    hash: Hash,
    buffer: Vec<u8>,
}

impl Disk {
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) fn hash(&self) -> Hash {
        self.hash
    }

    pub(super) fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Puts another handle in the open segment's place, as a disk that fails would.
    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: File) -> Arc<File> {
        std::mem::replace(&mut self.file, Arc::new(file))
    }

    /// An empty buffer that keeps its capacity between appends.
    pub(super) fn take_buffer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Writes frames whose last event is `seq` with `hash`. On an error the log is as before.
    pub(super) fn write(&mut self, mut buffer: Vec<u8>, seq: u64, hash: Hash) -> Result<(), LogError> {
        if self.offset > HEADER as u64 && self.offset + buffer.len() as u64 > self.segment_bytes {
            self.start_segment(self.seq + 1, self.hash)?;
        }
        if self.torn {
            self.file.set_len(self.offset).map_err(|e| LogError::io("truncate", &self.path, e))?;
            self.torn = false;
        }
        if let Err(error) = self.file.write_all_at(&buffer, self.offset) {
            self.torn = self.file.set_len(self.offset).is_err();
            return Err(LogError::io("write", &self.path, error));
        }
        self.offset += buffer.len() as u64;
        self.seq = seq;
        self.hash = hash;
        buffer.clear();
        if buffer.capacity() <= 1 << 20 {
            self.buffer = buffer;
        }
        Ok(())
    }

    pub(super) fn fast_forward(&mut self, seq: u64, hash: Hash) -> Result<(), LogError> {
        if seq <= self.seq {
            return Err(LogError::Corrupt {
                path: self.path.clone(),
                offset: self.offset,
                what: format!("cannot go on after event {seq}: the log already has event {}", self.seq),
            });
        }
        self.start_segment(seq + 1, hash)?;
        self.seq = seq;
        self.hash = hash;
        Ok(())
    }

    fn start_segment(&mut self, first: u64, prev: Hash) -> Result<(), LogError> {
        // Nothing after this waits for the old file, so it has to be on the disk now.
        self.file.sync_data().map_err(|e| LogError::io("sync", &self.path, e))?;
        let (path, file) = create(&self.dir, first, prev)?;
        self.path = path;
        self.file = Arc::new(file);
        self.offset = HEADER as u64;
        self.torn = false;
        Ok(())
    }
}

fn create(dir: &Path, first: u64, prev: Hash) -> Result<(PathBuf, File), LogError> {
    let path = segment::path(dir, first);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .map_err(|e| LogError::io("create", &path, e))?;
    let written = file
        .write_all_at(&segment::header(first, prev), 0)
        .and_then(|()| file.sync_data())
        .and_then(|()| File::open(dir)?.sync_all());
    if let Err(error) = written {
        // A segment without a whole head would be in the way of the next try.
        let _ = fs::remove_file(&path);
        return Err(LogError::io("write", &path, error));
    }
    Ok((path, file))
}

/// Finds the end of the log, cuts off what a crash left unfinished, and opens the last segment for writing.
pub(super) fn open(dir: &Path, segment_bytes: u64) -> Result<(Disk, Option<Recovery>), LogError> {
    let mut segments = segment::list(dir).map_err(|e| LogError::io("read", dir, e))?;
    let mut recovery = None;
    while let Some(last) = segments.pop() {
        let path = last.path;
        let Some(scan) = segment::scan(&path).map_err(|e| LogError::io("read", &path, e))? else {
            // The crash came while the segment was being created. Its number says where the chain was, not the hash.
            if segments.is_empty() && last.first > 1 {
                return Err(LogError::Corrupt { path, offset: 0, what: "it has no whole head".to_owned() });
            }
            let size = fs::metadata(&path).map_or(0, |meta| meta.len());
            recovery = Some(set_aside(&path, 0, size, "the segment has no whole head".to_owned())?);
            fs::remove_file(&path).map_err(|e| LogError::io("delete", &path, e))?;
            continue;
        };
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| LogError::io("open", &path, e))?;
        if let Some(what) = scan.foreign {
            return Err(LogError::Corrupt { path, offset: scan.good, what });
        }
        if scan.good < scan.size {
            let fault = scan.fault.unwrap_or_default();
            recovery = Some(set_aside(&path, scan.good, scan.size, fault)?);
            file.set_len(scan.good).map_err(|e| LogError::io("truncate", &path, e))?;
        }
        let disk = Disk {
            dir: dir.to_owned(),
            path,
            file: Arc::new(file),
            offset: scan.good,
            torn: false,
            segment_bytes,
            seq: scan.seq,
            hash: scan.hash,
            buffer: Vec::new(),
        };
        return Ok((disk, recovery));
    }
    let (path, file) = create(dir, 1, Hash::ZERO)?;
    let disk = Disk {
        dir: dir.to_owned(),
        path,
        file: Arc::new(file),
        offset: HEADER as u64,
        torn: false,
        segment_bytes,
        seq: 0,
        hash: Hash::ZERO,
        buffer: Vec::new(),
    };
    Ok((disk, recovery))
}

/// Copies what is about to be cut off into a file of its own: should it be more than a torn write, it is not lost.
fn set_aside(path: &Path, offset: u64, size: u64, fault: String) -> Result<Recovery, LogError> {
    let mut kept = path.to_owned();
    kept.set_extension(format!("{offset}.torn"));
    let bytes = fs::read(path).map_err(|e| LogError::io("read", path, e))?;
    let tail = bytes.get(offset as usize..).unwrap_or_default();
    fs::write(&kept, tail).map_err(|e| LogError::io("write", &kept, e))?;
    Ok(Recovery { segment: path.to_owned(), offset, dropped: size - offset, fault, kept })
}

/// Zeroes what lies beside the records of these events.
pub(super) fn erase(dir: &Path, seqs: &[u64], last: u64) -> Result<usize, LogError> {
    let segments = segment::list(dir).map_err(|e| LogError::io("read", dir, e))?;
    let mut wanted: Vec<u64> = seqs.iter().copied().filter(|&seq| seq >= 1 && seq <= last).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut erased = 0;
    for (i, here) in segments.iter().enumerate() {
        let end = segments.get(i + 1).map_or(last, |next| next.first - 1);
        let path = &here.path;
        let mut wanted = wanted.iter().filter(|&&seq| seq >= here.first && seq <= end).peekable();
        if wanted.peek().is_none() {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| LogError::io("open", path, e))?;
        let (mut offset, mut seq) = (HEADER as u64, here.first);
        while let Some(&&target) = wanted.peek() {
            let mut head = [0; frame::HEAD];
            match file.read_exact_at(&mut head, offset) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(LogError::io("read", path, error)),
            }
            let head = FrameHead::parse(&head).map_err(|fault| LogError::Corrupt {
                path: path.clone(),
                offset,
                what: format!("{fault:?}"),
            })?;
            if seq == target {
                let range = head.beside_range();
                file.write_all_at(&vec![0; range.len()], offset + range.start as u64)
                    .map_err(|e| LogError::io("write", path, e))?;
                erased += 1;
                wanted.next();
            }
            seq += 1;
            offset += head.size() as u64;
        }
        file.sync_data().map_err(|e| LogError::io("sync", path, e))?;
    }
    Ok(erased)
}
