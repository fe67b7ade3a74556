//! Segment files: how they are named, what their head says, and how one is scanned after a crash.
//!
//! A segment is named by the sequence number of its first event. Its head repeats that number and holds the hash that
//! the first event links to, so that a log goes on even where the segment before is gone or the new one is still empty.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{frame, record::Head};
use crate::domain::Hash;

/// Bytes before the first frame.
pub const HEADER: usize = 52;
const MAGIC: &[u8; 8] = b"WEIRLOG1";
const EXTENSION: &str = "wal";

/// A segment file in a log directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment {
    pub first: u64,
    pub path: PathBuf,
}

/// Path of the segment that begins with event `first`.
pub fn path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.{EXTENSION}"))
}

/// All segments of a directory in order; a directory that is not there holds none.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(dir: &Path) -> io::Result<Vec<Segment>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut segments = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let (Some(first), true) = (number, path.extension().is_some_and(|e| e == EXTENSION)) {
            segments.push(Segment { first, path });
        }
    }
    segments.sort();
    Ok(segments)
}

/// The head of a segment whose first event is `first` and links to `prev`.
pub fn header(first: u64, prev: Hash) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(MAGIC);
    out[8..16].copy_from_slice(&first.to_le_bytes());
    out[16..48].copy_from_slice(&prev.0);
    let crc = crc32fast::hash(&out[..48]);
    out[48..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Reads a segment's head: its first sequence number and the hash that it links to. `None`: no whole head.
pub fn parse_header(bytes: &[u8]) -> Option<(u64, Hash)> {
    let bytes: &[u8; HEADER] = bytes.first_chunk()?;
    let (content, crc) = bytes.split_at(48);
    if &content[..8] != MAGIC || crc32fast::hash(content).to_le_bytes() != *crc {
        return None;
    }
    let mut first = [0; 8];
    first.copy_from_slice(&content[8..16]);
    let mut prev = [0; 32];
    prev.copy_from_slice(&content[16..]);
    Some((u64::from_le_bytes(first), Hash(prev)))
}

/// What a scan of one segment found.
#[derive(Debug)]
pub struct Scan {
    /// Bytes up to the end of the last good frame.
    pub good: u64,
    /// Bytes in the file.
    pub size: u64,
    /// The last good event's number; one less than the segment's first when there is none.
    pub seq: u64,
    /// The last good event's hash; what the head says when there is none.
    pub hash: Hash,
    /// A frame that is not whole: why.
    pub fault: Option<String>,
    /// A frame that is whole but does not belong: why. No crash leaves such a thing.
    pub foreign: Option<String>,
}

/// Reads all frames of a segment, checking checksums, numbers and links. `None`: the file has no whole head.
///
/// # Errors
/// When the file cannot be read.
pub fn scan(path: &Path) -> io::Result<Option<Scan>> {
    let bytes = fs::read(path)?;
    let Some((first, mut hash)) = parse_header(&bytes) else { return Ok(None) };
    let mut at = HEADER;
    let mut seq = first.saturating_sub(1);
    let mut fault = None;
    let mut foreign = None;
    while at < bytes.len() {
        let (record, size) = match frame::decode(&bytes[at..]) {
            Ok((record, _, size)) => (record, size),
            Err(error) => {
                fault = Some(format!("{error:?}"));
                break;
            }
        };
        match Head::parse(&record) {
            Ok(head) if head.seq == seq + 1 && head.prev == hash => {
                seq = head.seq;
                hash = Hash::of(&record);
                at += size;
            }
            Ok(head) => foreign = Some(format!("event {} does not follow event {seq}", head.seq)),
            Err(error) => foreign = Some(error.to_string()),
        }
        if foreign.is_some() {
            break;
        }
    }
    Ok(Some(Scan { good: at as u64, size: bytes.len() as u64, seq, hash, fault, foreign }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_a_damaged_one_does_not() {
        let head = header(7, Hash::of(b"x"));
        assert_eq!(parse_header(&head), Some((7, Hash::of(b"x"))));
        for at in 0..HEADER {
            let mut bad = head;
            bad[at] ^= 1;
            assert_eq!(parse_header(&bad), None, "byte {at}");
        }
        assert_eq!(parse_header(&head[..51]), None);
    }

    #[test]
    fn segments_are_listed_in_order_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["00000000000000000010.wal", "00000000000000000009.wal", "lock", "7.torn", "x.wal"] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        let firsts: Vec<u64> = list(dir.path()).unwrap().into_iter().map(|s| s.first).collect();
        assert_eq!(firsts, [9, 10]);
        assert!(list(&dir.path().join("absent")).unwrap().is_empty());
    }
}
