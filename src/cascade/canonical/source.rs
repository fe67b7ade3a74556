//! Fenced blocks and the normal form of code: what may be changed without changing what a program does in any language
//! whose blocks are made by indentation or by braces.

/// The fenced blocks of a text.
pub(super) struct Fenced<'a> {
    /// The blocks' lines, one block after another.
    pub(super) code: String,
    /// What follows the last block.
    pub(super) after: &'a str,
}

/// The blocks between lines that begin with three or more backticks or tildes, `None` without one. A block that is not
/// closed goes to the end. The fence's language is left out.
pub(super) fn fenced(text: &str) -> Option<Fenced<'_>> {
    let mut code = String::new();
    let mut open: Option<(char, usize)> = None;
    let mut after = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        at += line.len();
        match (open, fence(line)) {
            (None, Some(fence)) => {
                open = Some(fence);
                after = Some("");
            }
            (Some((mark, length)), Some((closing, n))) if mark == closing && n >= length => {
                open = None;
                after = Some(&text[at..]);
            }
            (Some(_), _) => {
                code.push_str(line);
                if !line.ends_with('\n') {
                    code.push('\n');
                }
            }
            (None, None) => {}
        }
    }
    Some(Fenced { code, after: after? })
}

/// The fence that a line is: its character and how many of them.
fn fence(line: &str) -> Option<(char, usize)> {
    let line = line.trim_start();
    let mark = line.chars().next().filter(|c| matches!(c, '`' | '~'))?;
    let length = line.chars().take_while(|c| *c == mark).count();
    (length >= 3).then_some((mark, length))
}

/// Code without white space at the ends of lines, without empty lines, without the indentation that all lines share; a tab
/// in the indentation is four spaces. White space inside a line stays: it may be inside a string.
pub(super) fn normal(code: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in code.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        let rest = line.trim_start();
        let indent = line[..line.len() - rest.len()].replace('\t', "    ");
        lines.push(indent + rest);
    }
    let shared = lines.iter().map(|line| line.len() - line.trim_start().len()).min().unwrap_or(0);
    let cut: Vec<&str> = lines.iter().map(|line| line.get(shared..).unwrap_or(line)).collect();
    cut.join("\n")
}
