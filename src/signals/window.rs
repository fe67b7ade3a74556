//! Which part of a long text is embedded: by token ids, the first and the last half of the window, special tokens counted.
//! A question tends to stand at the beginning or at the end of a long prompt; the middle is quoted material.

use tokenizers::Tokenizer;

/// Beyond this many bytes, only the first and the last half of a text are tokenised at all (cut at white space where there
/// is some). Half of it holds more than 256 tokens of anything that was written to be read, so the ids within the window
/// are those of the whole text, and a prompt of megabytes costs no more than one of 32 KiB.
const EXAMINED_BYTES: usize = 32 << 10;

/// The ids of `text` with special tokens, cut to `window`: when there are more, the first ⌈window/2⌉ and the last
/// ⌊window/2⌋. With a BERT tokenizer the first is `[CLS]` and the last `[SEP]` either way.
pub fn window_text(tokenizer: &Tokenizer, text: &str, window: usize) -> Result<Vec<u32>, tokenizers::Error> {
    let ids = if text.len() <= EXAMINED_BYTES {
        tokenizer.encode_fast(text, true)?.get_ids().to_vec()
    } else {
        let (head, tail) = ends(text, EXAMINED_BYTES / 2);
        // Joined by a space: both cuts are at white space, where tokens never join.
        tokenizer.encode_fast(format!("{head} {tail}"), true)?.get_ids().to_vec()
    };
    Ok(cut(ids, window))
}

fn cut(mut ids: Vec<u32>, window: usize) -> Vec<u32> {
    if ids.len() > window {
        let (first, last) = (window.div_ceil(2), window / 2);
        ids.drain(first..ids.len() - last);
    }
    ids
}

/// About `half` bytes of each end of a text of at least twice that, cut at white space if it is near, else between
/// characters.
fn ends(text: &str, half: usize) -> (&str, &str) {
    let head = &text[..text.floor_char_boundary(half)];
    let tail = &text[text.ceil_char_boundary(text.len() - half)..];
    let head = head.rfind(char::is_whitespace).filter(|at| *at > half / 2).map_or(head, |at| &head[..at]);
    let tail = tail.find(char::is_whitespace).filter(|at| *at < half / 2).map_or(tail, |at| &tail[at..]);
    (head, tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_text_is_whole_and_a_long_one_keeps_both_ends() {
        assert_eq!(cut((0..512).collect(), 512), (0..512).collect::<Vec<_>>());
        let cut_ids = cut((0..2_000).collect(), 512);
        assert_eq!(cut_ids.len(), 512);
        assert_eq!(cut_ids[..256], (0..256).collect::<Vec<_>>());
        assert_eq!(cut_ids[256..], (1_744..2_000).collect::<Vec<_>>());
        assert_eq!(cut((0..10).collect(), 5), [0, 1, 2, 8, 9]);
    }

    #[test]
    fn ends_are_cut_at_white_space_or_between_characters() {
        let text = "word ".repeat(100);
        let (head, tail) = ends(&text, 52);
        assert!(head.ends_with("word") && head.len() == 49, "{head}");
        assert!(tail.starts_with(" word"), "{tail}");
        let accents = "é".repeat(100);
        let (head, tail) = ends(&accents, 51);
        assert_eq!((head.len(), tail.len()), (50, 50));
    }
}
