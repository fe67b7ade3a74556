//! A rough count of tokens for calls whose backend reported none, or that ended before it could: prompt bytes over four,
//! and for the answer the greater of pieces seen and text bytes over four.

use crate::domain::{Request, Usage, UsageSource};

/// English text has about four bytes per token in the vocabularies in use.
const BYTES_PER_TOKEN: usize = 4;

/// What has been seen of one answer. Costs a few additions per piece; no text is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pieces: usize,
    bytes: usize,
    /// Length of the shortest wire chunk: about what an empty one takes.
    envelope: usize,
    wire: usize,
}

impl Tally {
    /// A piece of text of `bytes` bytes.
    pub fn text(&mut self, bytes: usize) {
        self.pieces += 1;
        self.bytes += bytes;
    }

    /// A chunk of `bytes` bytes of JSON, envelope included.
    pub fn wire(&mut self, bytes: usize) {
        self.envelope = if self.wire == 0 { bytes } else { self.envelope.min(bytes) };
        self.wire += 1;
        self.bytes += bytes;
    }

    /// Estimated tokens of `request` and of what was seen of its answer.
    pub fn usage(&self, request: &Request) -> Usage {
        // The first wire chunk carries the role, the last the finish reason.
        let pieces = self.pieces + self.wire.saturating_sub(2);
        let text = self.bytes.saturating_sub(self.wire * self.envelope);
        Usage {
            prompt_tokens: prompt_tokens(request),
            cached_tokens: 0,
            completion_tokens: count(pieces.max(text.div_ceil(BYTES_PER_TOKEN))),
            source: UsageSource::Estimated,
            ..Usage::default()
        }
    }

    /// Whether anything was seen.
    pub fn is_empty(&self) -> bool {
        self.pieces + self.wire == 0
    }
}

/// Estimated tokens of a request's text, with four per message for its frame.
pub fn prompt_tokens(request: &Request) -> u32 {
    let tokens = |text: String| text.len().div_ceil(BYTES_PER_TOKEN);
    count(request.messages.iter().map(|m| tokens(m.joined_text()) + 4).sum())
}

/// Estimated tokens of a whole text.
pub fn text_tokens(bytes: usize) -> u32 {
    count(bytes.div_ceil(BYTES_PER_TOKEN))
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_bytes_both_bound_the_estimate() {
        let request = crate::backend::remote::testing::request(r#"{"messages":[]}"#, true);
        let of = |tally: &Tally| tally.usage(&request).completion_tokens;
        let mut tally = Tally::default();
        assert!(tally.is_empty());
        for _ in 0..10 {
            tally.text(1);
        }
        assert_eq!(of(&tally), 10);
        tally.text(100);
        assert_eq!(of(&tally), 28);
        let mut tally = Tally::default();
        for bytes in [200, 210, 300, 190] {
            tally.wire(bytes);
        }
        assert_eq!(of(&tally), 35);
        assert!(!tally.is_empty());
    }
}
