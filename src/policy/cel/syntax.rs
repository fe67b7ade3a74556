//! Syntax errors of conditions: the parser's messages in words, with the place inside the expression.

use super::check::Problem;

/// Syntax errors: the parser's places are line and column (from 1 or 0) of the expression.
pub(super) fn syntax(text: &str, errors: &cel::ParseErrors) -> Vec<Problem> {
    let mut out: Vec<Problem> = Vec::new();
    for error in &errors.errors {
        let line = usize::try_from(error.pos.0).unwrap_or(1).max(1);
        let start: usize = text.split_inclusive('\n').take(line - 1).map(str::len).sum();
        let column = usize::try_from(error.pos.1).unwrap_or(0).saturating_sub(1);
        let rest = text.get(start..).unwrap_or_default();
        let offset = rest.char_indices().nth(column).map_or(rest.len(), |(at, _)| at);
        let at = (start + offset).min(text.len());
        let message = reword(error.msg.lines().next().unwrap_or_default().trim());
        // One mistake makes the parser stumble several times; the first place is the one to look at.
        if out.is_empty() {
            let help = (text.contains(" and ") || text.contains(" or ") || text.contains(" not "))
                .then(|| "in CEL, and/or/not are written `&&`, `||` and `!`".to_owned())
                .or_else(|| text.contains(" = ").then(|| "equality is written `==`".to_owned()));
            out.push(Problem { at: at..text.len().min(at + 1), message: format!("this is not CEL: {message}"), help });
        }
    }
    out
}

/// The parser's message without its list of everything that might have followed.
pub(super) fn reword(message: &str) -> String {
    let message = message.strip_prefix("Syntax error: ").unwrap_or(message);
    let quoted = |rest: &str| {
        let rest = rest.split(" expecting ").next().unwrap_or(rest).trim();
        match rest.trim_matches('\'').trim() {
            "<EOF>" => "something is missing at the end".to_owned(),
            text => format!("`{text}` is not expected here"),
        }
    };
    if let Some(rest) = message.strip_prefix("mismatched input ").or(message.strip_prefix("extraneous input ")) {
        return quoted(rest);
    }
    if let Some(rest) = message.strip_prefix("no viable alternative at input ") {
        return quoted(rest);
    }
    if let Some(rest) = message.strip_prefix("token recognition error at: ") {
        return format!("`{}` is not part of the language", rest.trim_matches('\'').trim());
    }
    if let Some((what, _)) = message.strip_prefix("missing ").and_then(|rest| rest.split_once(" at ")) {
        return format!("{} is missing", what.replace('\'', "`"));
    }
    message.to_owned()
}
