//! Final answers that a text marks as such, and choices from A to E in the phrasings that models use.

use super::{Form, bare, plain, short};

/// Marks before a final answer, in lower case. The one that comes last in a text counts, `\boxed{}` before all.
const MARKS: [&str; 5] = ["####", "answer is", "answer:", "answer**:", "answer:**"];

/// The final answer that the text marks, if it marks one.
pub(super) fn marked(text: &str) -> Option<Form> {
    if let Some(inner) = boxed(text) {
        return Some(short(inner).unwrap_or_else(|| Form::Text(plain(bare(inner)))));
    }
    // ASCII only, so that places in the copy are places in the text.
    let lower = text.to_ascii_lowercase();
    let at = MARKS.iter().filter_map(|mark| Some(lower.rfind(mark)? + mark.len())).max()?;
    let rest = text[at..].trim_start_matches([':', '*', ' ', '\t']);
    let rest = match rest.trim_start_matches(['\r', '\n', ' ']) {
        // The answer may stand below its mark.
        below if rest.starts_with(['\r', '\n']) => below,
        _ => rest,
    };
    let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
    if line.trim().is_empty() {
        return None;
    }
    let words = || after.trim().is_empty().then(|| Form::Text(plain(line)));
    short(line).or_else(|| short(sentence(line))).or_else(words)
}

/// The line up to its first full stop that ends a sentence.
fn sentence(line: &str) -> &str {
    line.split_once(". ").map_or(line, |(sentence, _)| sentence)
}

/// What the last `\boxed{…}` of the text holds.
fn boxed(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    let inner = &text[text.rfind(OPEN)? + OPEN.len()..];
    let mut depth = 1usize;
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inner[..at]);
        }
    }
    None
}

/// A choice from A to E: alone (`B`, `b.`, `(B)`, `**B**`), named (`option B`, `choice (b)`), or before its own text on one
/// line (`B) Paris`, `(B) Paris`, `B: Paris`, `B. Paris`). A small letter before a text is none: `a. m.` is no choice.
pub(super) fn choice(text: &str) -> Option<char> {
    let text = bare(text);
    if text.contains('\n') {
        return None;
    }
    let named = ["option ", "choice ", "answer ", "letter "].iter().find_map(|word| {
        let (head, rest) = text.split_at_checked(word.len())?;
        head.eq_ignore_ascii_case(word).then_some(rest)
    });
    let text = named.unwrap_or(text).trim_start_matches(['*', '_', '`', '(', '[', ' ']);
    let mut chars = text.chars();
    let letter = chars.next()?;
    let upper = letter.to_ascii_uppercase();
    if !('A'..='E').contains(&upper) {
        return None;
    }
    let rest = chars.as_str().trim_start_matches(['*', '_', '`']);
    let alone = rest.trim_matches([')', ']', '.', ':', ',', '!', '*', '_', '`', ' ']).is_empty();
    let before_text = letter == upper && rest.starts_with([')', ']', '.', ':']) && {
        // A point between letters is an abbreviation: `D.C.`, `E.g.`
        let after = &rest[1..];
        after.starts_with([' ', '*']) || after.is_empty()
    };
    (alone || before_text).then_some(upper)
}
