//! One event in a segment file: a fixed head, the record, and beside it what may be erased.
//!
//! ```text
//! 0   length of all that follows this field's 4 bytes (u32, little-endian, as all numbers here)
//! 4   CRC-32 of bytes 8 to the end of the record
//! 8   lengths of record, context, embedding, bodies (4 x u32; u32::MAX where a part is absent)
//! 24  CRC-32 of context, embedding, bodies (3 x u32)
//! 36  record, context, embedding, bodies
//! ```
//! The erasable parts have checksums of their own: a part is erased by overwriting it with zeros in place, and reads
//! as absent from then on (all zeros under another checksum); nothing else of the frame changes.

use super::record::{Beside, Logged};

/// Bytes before the record.
pub const HEAD: usize = 36;
/// A frame longer than this is damage, not data.
pub const MAX_FRAME: usize = 1 << 30;
const ABSENT: u32 = u32::MAX;

/// The fixed head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    crc: u32,
    record: u32,
    beside: [u32; 3],
    beside_crc: [u32; 3],
}

/// Why bytes are no whole frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameFault {
    /// The bytes end before the frame does; `need` bytes in all would be enough to know more.
    Short { need: usize },
    /// Lengths that no frame has.
    Lengths,
    /// The record's checksum is wrong.
    Checksum,
    /// A part beside the record is neither what was written nor erased.
    Beside,
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

/// Appends the frame of `logged` to `out`.
pub fn encode(out: &mut Vec<u8>, logged: &Logged) {
    let start = out.len();
    let parts = [&logged.event.context, &logged.event.embedding, &logged.event.bodies];
    out.reserve(HEAD + logged.size());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&(logged.record.len() as u32).to_le_bytes());
    for part in parts {
        out.extend_from_slice(&part.as_ref().map_or(ABSENT, |bytes| bytes.len() as u32).to_le_bytes());
    }
    for part in parts {
        out.extend_from_slice(&part.as_deref().map_or(0, crc32fast::hash).to_le_bytes());
    }
    out.extend_from_slice(&logged.record);
    let crc = crc32fast::hash(&out[start + 8..]);
    for part in parts.into_iter().flatten() {
        out.extend_from_slice(part);
    }
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

impl FrameHead {
    /// Reads the head of the frame that `bytes` begins with.
    ///
    /// # Errors
    /// [`FrameFault::Short`] or [`FrameFault::Lengths`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameFault> {
        if bytes.len() < HEAD {
            return Err(FrameFault::Short { need: HEAD });
        }
        let head = Self {
            crc: number(bytes, 4),
            record: number(bytes, 8),
            beside: [number(bytes, 12), number(bytes, 16), number(bytes, 20)],
            beside_crc: [number(bytes, 24), number(bytes, 28), number(bytes, 32)],
        };
        let size = head.size();
        if size > MAX_FRAME || number(bytes, 0) as usize + 4 != size {
            return Err(FrameFault::Lengths);
        }
        Ok(head)
    }

    /// Bytes of the whole frame.
    pub fn size(&self) -> usize {
        let beside = self.beside.iter().filter(|&&len| len != ABSENT).fold(0usize, |sum, &len| sum + len as usize);
        HEAD + self.record as usize + beside
    }

    /// Where the erasable parts lie, from the frame's start.
    pub fn beside_range(&self) -> std::ops::Range<usize> {
        HEAD + self.record as usize..self.size()
    }
}

/// Takes the frame that `bytes` begins with apart: the record, what lies beside it, and the frame's size.
///
/// # Errors
/// Any [`FrameFault`].
pub fn decode(bytes: &[u8]) -> Result<(Vec<u8>, Beside, usize), FrameFault> {
    let head = FrameHead::parse(bytes)?;
    let size = head.size();
    if bytes.len() < size {
        return Err(FrameFault::Short { need: size });
    }
    let record = &bytes[HEAD..HEAD + head.record as usize];
    if crc32fast::hash(&bytes[8..HEAD + record.len()]) != head.crc {
        return Err(FrameFault::Checksum);
    }
    let mut at = HEAD + record.len();
    let mut parts = [None, None, None];
    for (i, part) in parts.iter_mut().enumerate() {
        if head.beside[i] == ABSENT {
            continue;
        }
        let found = &bytes[at..at + head.beside[i] as usize];
        at += found.len();
        if crc32fast::hash(found) == head.beside_crc[i] {
            *part = Some(found.to_vec());
        } else if found.iter().any(|&byte| byte != 0) {
            return Err(FrameFault::Beside);
        }
    }
    let [context, embedding, bodies] = parts;
    Ok((record.to_vec(), Beside { context, embedding, bodies }, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::{record::Draft, testing},
        domain::{DecisionId, Hash},
    };

    fn frame() -> (Logged, Vec<u8>) {
        let logged = Draft::new(testing::decision(DecisionId::new(), 1)).unwrap().place("r", b"\"r\"", 1, Hash::ZERO);
        let mut bytes = b"xx".to_vec();
        encode(&mut bytes, &logged);
        (logged, bytes.split_off(2))
    }

    #[test]
    fn a_frame_comes_back_and_every_shorter_one_is_short() {
        let (logged, bytes) = frame();
        let (record, beside, size) = decode(&bytes).unwrap();
        assert_eq!(size, bytes.len());
        assert_eq!(Logged::parse(record, beside).unwrap(), logged);
        for cut in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..cut]), Err(FrameFault::Short { .. })), "{cut}");
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let (_, bytes) = frame();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(decode(&flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_is_zeroed_beside_the_record_reads_as_absent() {
        let (logged, mut bytes) = frame();
        let range = FrameHead::parse(&bytes).unwrap().beside_range();
        bytes[range].fill(0);
        let (record, beside, _) = decode(&bytes).unwrap();
        assert_eq!(record, logged.record);
        assert_eq!(beside, Beside::default());
    }
}
