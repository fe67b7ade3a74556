//! From a stream of bytes to text that never ends within a character, and text held back while it may become a stop
//! string.

/// Decodes UTF-8 as it comes. What cannot be UTF-8 becomes U+FFFD, as soon as that is certain.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes and appends to `text` all characters that are complete.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        // Incomplete: wait for more.
                        None => {
                            rest = after;
                            break;
                        }
                        Some(wrong) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[wrong..];
                        }
                    }
                }
            }
        }
        self.pending = rest.to_vec();
    }

    /// The text has ended: what is left of a character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Finds the first stop string in a stream of text, wherever its pieces are cut.
#[derive(Clone, Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// A filter for these stop strings; empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes text; gives back what may be shown, and whether a stop string was found. From then on nothing may be
    /// pushed. Of several stop strings the one that begins first counts, and is not part of the text.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            // Another stop string may begin before this one and still be incomplete; the one that is complete first
            // decides, as in OpenAI's service.
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text has ended: what was held back after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8], cuts: &[usize]) -> (String, Vec<String>) {
        let mut stream = Utf8Stream::default();
        let mut pieces = Vec::new();
        let mut rest = bytes;
        for cut in cuts {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            let mut text = String::new();
            stream.push(now, &mut text);
            pieces.push(text);
            rest = later;
        }
        let mut text = String::new();
        stream.push(rest, &mut text);
        stream.finish(&mut text);
        pieces.push(text);
        (pieces.concat(), pieces)
    }

    proptest! {
        #[test]
        fn valid_text_comes_out_whole_however_it_is_cut(text in "\\PC{0,40}", cuts in prop::collection::vec(0usize..5, 0..30)) {
            let (whole, _) = decode(text.as_bytes(), &cuts);
            prop_assert_eq!(whole, text);
        }

        #[test]
        fn any_bytes_decode_as_the_standard_library_does(bytes in prop::collection::vec(any::<u8>(), 0..60), cuts in prop::collection::vec(0usize..4, 0..40)) {
            let (whole, _) = decode(&bytes, &cuts);
            prop_assert_eq!(whole, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn stop_strings_end_the_text_where_they_begin(
            text in "[abc]{0,30}", stops in prop::collection::vec("[abc]{1,4}", 0..3), cuts in prop::collection::vec(1usize..4, 0..30),
        ) {
            let mut filter = StopFilter::new(stops.clone());
            let mut shown = String::new();
            let mut stopped = false;
            let mut rest = text.as_str();
            let mut seen = 0;
            for cut in cuts.iter().chain([&usize::MAX]) {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                seen += now.len();
                let (out, found) = filter.push(now);
                shown.push_str(&out);
                rest = later;
                if found {
                    stopped = true;
                    break;
                }
                // What is not held back can never be part of a stop string.
                prop_assert_eq!(shown.len() + filter.held(), seen);
            }
            if !stopped {
                shown.push_str(&filter.finish());
            }
            let seen = &text[..seen];
            let first = stops.iter().filter_map(|stop| seen.find(stop.as_str())).min();
            prop_assert_eq!(stopped, stops.iter().any(|stop| text.contains(stop.as_str())));
            prop_assert_eq!(&shown, &seen[..first.unwrap_or(seen.len())]);
        }
    }

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        let euro = "€".as_bytes();
        stream.push(&euro[..2], &mut text);
        assert_eq!(text, "");
        stream.push(&euro[2..], &mut text);
        assert_eq!(text, "€");
    }

    #[test]
    fn a_stop_string_across_pieces_never_shows() {
        let mut filter = StopFilter::new(["</end>".to_owned()]);
        assert_eq!(filter.push("fine <"), ("fine ".to_owned(), false));
        assert_eq!(filter.push("/e"), (String::new(), false));
        assert_eq!(filter.push("lse </"), ("</else ".to_owned(), false));
        assert_eq!(filter.push("end> no"), (String::new(), true));
    }
}
