//! What share of a text's lines look like code: lines between ``` fences, and lines that a few cheap signs betray. Only
//! lines that are not blank count; fence lines themselves count as code.
//!
//! A line is code by its own looks when it ends like a statement or block (`;` `{` `}` `);` `],` after a symbol), starts with
//! a word that starts statements in common languages *and* has a symbol that goes with it, or at least a sixth of its
//! characters are code symbols and there are three or more of them. Prose with a bracket or a semicolon stays prose.

/// First words of statements and the marks one of which must follow.
const OPENERS: &[(&str, &[&str])] = &[
    ("def ", &["(", ":"]),
    ("class ", &[":", "{"]),
    ("import ", &[";", "{", "\"", " as ", " from "]),
    ("from ", &[" import "]),
    ("fn ", &["("]),
    ("pub ", &["fn ", "struct ", "enum ", "mod ", "use "]),
    ("let ", &["="]),
    ("const ", &["="]),
    ("var ", &["="]),
    ("func ", &["("]),
    ("function ", &["("]),
    ("return ", &["(", "[", "==", "+", ";"]),
    ("if ", &["==", "!=", "):", "&&", "||"]),
    ("if (", &[")"]),
    ("elif ", &[":"]),
    ("else:", &[":"]),
    ("for ", &[" in range(", "):", "]:", "++"]),
    ("for (", &[";", ":", " of ", " in "]),
    ("while ", &["True:", "):"]),
    ("while (", &[")"]),
    ("print(", &[")"]),
    ("#include", &["<", "\""]),
    ("#!/", &["/"]),
    ("SELECT ", &[" FROM ", "*", ","]),
    ("INSERT INTO ", &["(", "VALUES"]),
    ("UPDATE ", &[" SET "]),
    ("CREATE TABLE ", &["("]),
    ("$ ", &["-", "/", "."]),
    ("//", &[" "]),
    ("/*", &["*"]),
];

const SYMBOLS: &[u8] = b"{}[]()<>=;:+*/&|!_$#@\\^~%";

/// Share of lines that look like code, 0 to 1; 0 for no lines.
pub(super) fn share(text: &str) -> f64 {
    let (mut lines, mut code, mut fenced) = (0_u32, 0_u32, false);
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        lines += 1;
        if line.starts_with("```") || line.starts_with("~~~") {
            // A fence that opens and closes on one line changes nothing.
            fenced ^= line.len() == 3 || !line[3..].contains("```");
            code += 1;
        } else {
            code += u32::from(fenced || is_code(line));
        }
    }
    if lines == 0 { 0.0 } else { f64::from(code) / f64::from(lines) }
}

fn is_code(line: &str) -> bool {
    // The first kilobyte of a line says what it is.
    let line = &line[..line.floor_char_boundary(1024)];
    let bytes = line.as_bytes();
    let opener = OPENERS.iter().any(|(opener, marks)| {
        line.strip_prefix(opener)
            .is_some_and(|rest| marks.iter().any(|mark| rest.contains(mark) || opener.ends_with(mark)))
    });
    // `import os`: two words, the second no sentence's end.
    let import =
        line.strip_prefix("import ").is_some_and(|path| !path.contains(' ') && !path.ends_with(['.', '!', '?']));
    if opener || import {
        return true;
    }
    let symbols = bytes.iter().filter(|b| SYMBOLS.contains(b)).count();
    let ends_like_code = match bytes.last() {
        Some(b';' | b'{' | b'}') => symbols >= 2 || bytes.len() == 1 || line.contains(['=', '(', '.']),
        _ => matches!(line, ")" | "]" | ");" | "]," | "),"),
    };
    ends_like_code || (symbols >= 3 && symbols * 6 >= bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_code_and_of_prose() {
        for code in [
            "x = foo(bar, baz[1]);",
            "def main():",
            "fn main() {",
            "}",
            "for (int i = 0; i < n; i++) {",
            "if a == b:",
            "print('hello')",
            "#include <stdio.h>",
            "SELECT name FROM users WHERE id = 3",
            "from os import path",
            "else:",
            "import os.path",
            "<div class=\"x\">{{ y }}</div>",
            "// the answer",
        ] {
            assert!(is_code(code), "{code}");
        }
        for prose in [
            "What is the capital of France?",
            "I came; I saw; I left.",
            "If it rains tomorrow (which I doubt), we stay.",
            "For the record, this is prose.",
            "return to sender",
            "Let me think: is 3 + 4 = 7?",
            "import duties are high.",
            "for the record (as I said), no",
            "if you can, please (really) come",
            "Меня зовут Иван, а тебя?",
        ] {
            assert!(!is_code(prose), "{prose}");
        }
    }

    #[test]
    fn shares_and_fences() {
        assert_eq!(share(""), 0.0);
        assert_eq!(share("\n \n"), 0.0);
        assert_eq!(share("Why does this fail?\n```python\nprint(1)\nplain words\n```\nPlease explain."), 4.0 / 6.0);
        assert_eq!(share("let x = 1;\nlet y = 2;"), 1.0);
        assert_eq!(share("```let x```\nprose here\nmore prose\nand more"), 0.25);
    }
}
