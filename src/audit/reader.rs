//! Reading the log: from any event on, over all segments, alive (following a log that is being written in this process)
//! or at rest (the files as they are, without the lock, as the command line does beside a running weir).

use std::{fs::File, os::unix::fs::FileExt, path::Path, path::PathBuf};

use tokio::sync::watch;

use super::{
    frame::{self, FrameFault, FrameHead},
    log::LogError,
    record::Logged,
    segment::{self, HEADER, Segment},
};

/// Bytes asked of a file at once.
const READ: usize = 256 << 10;

struct Open {
    segment: Segment,
    file: File,
    /// Place in the file of `buffer[at]`.
    offset: u64,
    buffer: Vec<u8>,
    at: usize,
    /// Number of the frame at `offset`.
    seq: u64,
}

/// Gives events in order. `None` means: no more for now; a later call may give more.
pub struct LogReader {
    dir: PathBuf,
    next: u64,
    /// Last event that may be read; absent for files at rest.
    live: Option<watch::Receiver<u64>>,
    open: Option<Open>,
}

impl LogReader {
    /// Reads the log of `dir` as it lies on the disk.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn at_rest(dir: &Path, seq: u64) -> Result<Self, LogError> {
        Self::new(dir, seq, None)
    }

    pub(super) fn live(dir: &Path, seq: u64, last: watch::Receiver<u64>) -> Result<Self, LogError> {
        Self::new(dir, seq, Some(last))
    }

    fn new(dir: &Path, seq: u64, live: Option<watch::Receiver<u64>>) -> Result<Self, LogError> {
        let mut reader = Self { dir: dir.to_owned(), next: seq.max(1), live, open: None };
        reader.open = reader.locate(None)?;
        Ok(reader)
    }

    /// Number of the event that comes next.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Goes to event `seq`.
    pub fn seek(&mut self, seq: u64) {
        if seq != self.next {
            self.next = seq.max(1);
            self.open = None;
        }
    }

    /// The segment that holds `next`, or the first one after `after`.
    fn locate(&self, after: Option<u64>) -> Result<Option<Open>, LogError> {
        let segments = segment::list(&self.dir).map_err(|e| LogError::io("read", &self.dir, e))?;
        let found = match after {
            Some(first) => segments.into_iter().find(|s| s.first > first),
            None => {
                let at = segments.partition_point(|s| s.first <= self.next).saturating_sub(1);
                segments.into_iter().nth(at)
            }
        };
        let Some(segment) = found else { return Ok(None) };
        let path = &segment.path;
        let file = File::open(path).map_err(|e| LogError::io("open", path, e))?;
        let mut head = [0; HEADER];
        let whole = file.read_exact_at(&mut head, 0).is_ok();
        if !whole || segment::parse_header(&head).is_none_or(|(first, _)| first != segment.first) {
            // Being created at this moment, or cut short by a crash: the next open of the log sees to it.
            return Ok(None);
        }
        let seq = segment.first;
        Ok(Some(Open { segment, file, offset: HEADER as u64, buffer: Vec::new(), at: 0, seq }))
    }

    /// The next event.
    ///
    /// # Errors
    /// [`LogError::Corrupt`] where a segment is damaged; reading cannot go on from there.
    pub fn read(&mut self) -> Result<Option<Logged>, LogError> {
        loop {
            if let Some(last) = &self.live
                && self.next > *last.borrow()
            {
                // What was read ahead may be a write that is then cut away; it is read again.
                if let Some(open) = &mut self.open {
                    open.forget();
                }
                return Ok(None);
            }
            if self.open.is_none() {
                self.open = self.locate(None)?;
            }
            let Some(open) = &mut self.open else { return Ok(None) };
            // Events missing between segments: the log was fast-forwarded, or older segments are gone.
            self.next = self.next.max(open.segment.first);
            match open.frame(self.next)? {
                Some(logged) => {
                    self.next = logged.seq + 1;
                    return Ok(Some(logged));
                }
                None => {
                    let (first, rest) = (open.segment.first, open.buffer.len() - open.at);
                    match self.locate(Some(first))? {
                        Some(next) if rest == 0 => self.open = Some(next),
                        Some(_) => {
                            return Err(open_fault(self.open.as_ref(), "the segment ends within an event"));
                        }
                        None => {
                            if let Some(open) = &mut self.open {
                                open.forget();
                            }
                            return Ok(None);
                        }
                    }
                }
            }
        }
    }
}

fn open_fault(open: Option<&Open>, what: &str) -> LogError {
    let (path, offset) = open.map(|o| (o.segment.path.clone(), o.offset)).unwrap_or_default();
    LogError::Corrupt { path, offset, what: what.to_owned() }
}

impl Open {
    fn forget(&mut self) {
        self.buffer.clear();
        self.at = 0;
    }

    fn fault(&self, what: impl std::fmt::Debug) -> LogError {
        LogError::Corrupt { path: self.segment.path.clone(), offset: self.offset, what: format!("{what:?}") }
    }

    /// Makes at least `need` bytes available from the current place, if the file has them.
    fn fill(&mut self, need: usize) -> Result<bool, LogError> {
        self.buffer.drain(..self.at);
        self.at = 0;
        while self.buffer.len() < need {
            let have = self.buffer.len();
            self.buffer.resize(have + READ.max(need - have), 0);
            let read = self.file.read_at(&mut self.buffer[have..], self.offset + have as u64);
            let read = match read {
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                    self.buffer.truncate(have);
                    continue;
                }
                Err(error) => return Err(LogError::io("read", &self.segment.path, error)),
            };
            self.buffer.truncate(have + read);
            if read == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The event `wanted`, skipping those before it. `None` where the file ends.
    fn frame(&mut self, wanted: u64) -> Result<Option<Logged>, LogError> {
        loop {
            let bytes = &self.buffer[self.at..];
            let parsed = if self.seq < wanted {
                match FrameHead::parse(bytes) {
                    Ok(head) if bytes.len() < head.size() => Err(FrameFault::Short { need: head.size() }),
                    Ok(head) => Ok((None, head.size())),
                    Err(fault) => Err(fault),
                }
            } else {
                frame::decode(bytes).map(|(record, beside, size)| (Some((record, beside)), size))
            };
            match parsed {
                Ok((None, size)) => self.advance(size),
                Ok((Some((record, beside)), size)) => {
                    let logged = Logged::parse(record, beside).map_err(|e| self.fault(e.to_string()))?;
                    if logged.seq != self.seq {
                        return Err(self.fault(format!("event {} where {} belongs", logged.seq, self.seq)));
                    }
                    self.advance(size);
                    return Ok(Some(logged));
                }
                Err(FrameFault::Short { need }) => {
                    if !self.fill(need)? {
                        return Ok(None);
                    }
                }
                Err(fault) => return Err(self.fault(fault)),
            }
        }
    }

    fn advance(&mut self, size: usize) {
        self.at += size;
        self.offset += size as u64;
        self.seq += 1;
    }
}

impl Iterator for LogReader {
    type Item = Result<Logged, LogError>;

    /// Not fused: a live log may give more after `None`.
    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}
