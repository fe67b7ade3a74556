//! Server-sent events out of a byte stream (WHATWG HTML, "Server-sent events"): only `data` matters here. Bytes in, bytes
//! out: what a TCP segment cuts, be it a character, is whole again before anybody reads it.

use bytes::{Bytes, BytesMut};

/// Cuts frames into the data of events. Lines end with LF or CRLF; a lone CR, which no server sends, does not end one.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    /// Bytes received and not yet looked at.
    frame: Bytes,
    /// The beginning of a line whose end has not come.
    carry: BytesMut,
    /// Data lines of the event that has not ended.
    data: Option<Bytes>,
    started: bool,
}

impl Splitter {
    /// Takes the next frame. The one before must have been used up: [`Splitter::next_event`] has returned `None`.
    pub(super) fn push(&mut self, mut frame: Bytes) {
        debug_assert!(self.frame.is_empty(), "a frame is used up before the next one");
        if frame.is_empty() {
            return;
        }
        if !self.started && frame.starts_with("\u{feff}".as_bytes()) {
            frame = frame.slice(3..);
        }
        self.started = true;
        self.frame = frame;
    }

    /// The data of the next complete event: of one line a slice of the frame it came in.
    pub(super) fn next_event(&mut self) -> Option<Bytes> {
        while let Some(line) = self.next_line() {
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    return Some(data);
                }
            } else if let Some(at) = value_at(&line) {
                let value = line.slice(at..);
                self.data = Some(match self.data.take() {
                    None => value,
                    Some(before) => Bytes::from([&before[..], b"\n", &value[..]].concat()),
                });
            }
        }
        None
    }

    /// Bytes of an event that has not ended; to be bounded by the caller.
    pub(super) fn pending(&self) -> usize {
        self.carry.len() + self.data.as_ref().map_or(0, Bytes::len)
    }

    /// At the end of the stream: whether its last, unended event is the mark `[DONE]`. Servers forget the empty line after
    /// it. Any other unended event is dropped, as the standard says.
    pub(super) fn ends_with_done(&mut self) -> bool {
        if let Some(data) = &self.data {
            return &data[..] == b"[DONE]" && self.carry.is_empty();
        }
        let line = self.carry.strip_suffix(b"\r").unwrap_or(&self.carry);
        matches!(line, b"data: [DONE]" | b"data:[DONE]")
    }

    fn next_line(&mut self) -> Option<Bytes> {
        if self.frame.is_empty() {
            return None;
        }
        let Some(end) = memchr::memchr(b'\n', &self.frame) else {
            self.carry.extend_from_slice(&self.frame);
            self.frame = Bytes::new();
            return None;
        };
        let mut line = if self.carry.is_empty() {
            self.frame.slice(..end)
        } else {
            self.carry.extend_from_slice(&self.frame[..end]);
            self.carry.split().freeze()
        };
        self.frame = self.frame.slice(end + 1..);
        if line.last() == Some(&b'\r') {
            line.truncate(line.len() - 1);
        }
        Some(line)
    }
}

/// Where the value of a `data` line begins; `None` for every other line (comments and heartbeats begin with a colon).
fn value_at(line: &[u8]) -> Option<usize> {
    let rest = line.strip_prefix(b"data")?;
    match rest.first() {
        None => Some(4),
        Some(b':') => Some(if rest.get(1) == Some(&b' ') { 6 } else { 5 }),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRANSCRIPT: &str = "\u{feff}: heartbeat\n\ndata: {\"a\":\"é漢🙂\"}\r\n\r\nevent: x\ndata:two\ndata: lines\nid: 3\n\n:\n\n\ndata\n\ndatabase: no\n\ndata: [DONE]\n\n";

    fn expected() -> Vec<Vec<u8>> {
        ["{\"a\":\"é漢🙂\"}", "two\nlines", "", "[DONE]"].iter().map(|s| s.as_bytes().to_vec()).collect()
    }

    fn events(pieces: &[&[u8]]) -> (Vec<Vec<u8>>, Splitter) {
        let mut splitter = Splitter::default();
        let mut out = Vec::new();
        for piece in pieces {
            splitter.push(Bytes::copy_from_slice(piece));
            while let Some(data) = splitter.next_event() {
                out.push(data.to_vec());
            }
        }
        (out, splitter)
    }

    #[test]
    fn events_survive_every_cut() {
        let bytes = TRANSCRIPT.as_bytes();
        assert_eq!(events(&[bytes]).0, expected());
        // The mark at the very start counts only when it comes whole.
        for cut in 3..bytes.len() {
            assert_eq!(events(&[&bytes[..cut], &bytes[cut..]]).0, expected(), "cut at {cut}");
        }
        let single: Vec<&[u8]> = bytes[3..].chunks(1).collect();
        assert_eq!(events(&single).0, expected());
    }

    #[test]
    fn an_unended_event_is_dropped_unless_it_is_the_mark() {
        for (end, done) in [
            ("data: [DONE]\n", true),
            ("data: [DONE]", true),
            ("data:[DONE]\r", true),
            ("data: [DONE", false),
            ("data: {\"a\":1}\n", false),
            ("data: [DONE]\nda", false),
            ("", false),
        ] {
            let (out, mut splitter) = events(&[b"data: 1\n\n", end.as_bytes()]);
            assert_eq!(out, [b"1".to_vec()]);
            assert_eq!(splitter.ends_with_done(), done, "{end:?}");
        }
    }

    #[test]
    fn one_line_of_one_frame_is_not_copied() {
        let frame = Bytes::from_static(b"data: {\"a\":1}\n\n");
        let mut splitter = Splitter::default();
        splitter.push(frame.clone());
        assert_eq!(splitter.next_event().unwrap().as_ptr(), frame[6..].as_ptr());
    }

    proptest! {
        #[test]
        fn random_cuts_change_nothing(cuts in proptest::collection::vec(3usize..TRANSCRIPT.len(), 0..12)) {
            let bytes = TRANSCRIPT.as_bytes();
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut from = 0;
            let mut pieces: Vec<&[u8]> = Vec::new();
            for cut in cuts {
                pieces.push(&bytes[from..cut]);
                from = cut;
            }
            pieces.push(&bytes[from..]);
            prop_assert_eq!(events(&pieces).0, expected());
        }

        #[test]
        fn any_bytes_are_survived(frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let pieces: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            let whole = frames.concat();
            if !whole.starts_with(b"\xef") {
                prop_assert_eq!(events(&pieces).0, events(&[&whole]).0);
            }
        }
    }
}
