//! The floors of the house hold: no module imports what stands above it, or what its floor may not touch.

use std::{fs, path::Path};

/// Module, and the crates and modules that its files must not name.
const RULES: &[(&str, &[&str])] = &[
    ("domain", &["tokio", "axum", "sqlx", "candle_core", "ort", "reqwest", "crate::"]),
    ("policy", PURE),
    ("cascade", PURE),
    (
        "signals",
        &["axum", "crate::audit", "crate::backend", "crate::engine", "crate::gateway", "crate::http", "crate::app"],
    ),
    (
        "audit",
        &["axum", "crate::backend", "crate::engine", "crate::signals", "crate::gateway", "crate::http", "crate::app"],
    ),
    (
        "engine",
        &[
            "axum",
            "sqlx",
            "reqwest",
            "crate::audit",
            "crate::backend",
            "crate::signals",
            "crate::gateway",
            "crate::http",
        ],
    ),
    (
        "backend/remote",
        &["axum", "sqlx", "crate::engine", "crate::audit", "crate::signals", "crate::gateway", "crate::http"],
    ),
    (
        "backend/scripted",
        &["axum", "sqlx", "crate::engine", "crate::audit", "crate::signals", "crate::gateway", "crate::http"],
    ),
    (
        "backend/local.rs",
        &["axum", "sqlx", "reqwest", "crate::audit", "crate::signals", "crate::gateway", "crate::http"],
    ),
    ("assets", &["axum", "sqlx", "crate::audit", "crate::backend", "crate::gateway", "crate::http", "crate::engine"]),
    ("gateway", &["axum", "crate::http", "crate::cli", "crate::app"]),
    ("dispatch", &["axum", "crate::http", "crate::cli", "crate::app"]),
    ("learn.rs", &["axum", "crate::http", "crate::cli", "crate::app"]),
    (
        "fit",
        &[
            "axum",
            "sqlx",
            "crate::dispatch",
            "crate::engine",
            "crate::gateway",
            "crate::http",
            "crate::cli",
            "crate::app",
        ],
    ),
    ("replay", &["axum", "crate::dispatch", "crate::engine", "crate::backend::remote", "crate::http"]),
];

/// Floor 1 is pure: no I/O, no clock, no global randomness, no locks, no order that differs between runs.
const PURE: &[&str] = &[
    "tokio",
    "axum",
    "sqlx",
    "candle_core",
    "ort::",
    "reqwest",
    "std::env",
    "std::fs",
    "SystemTime",
    "Instant::now",
    "HashMap",
    "HashSet",
    "Mutex",
    "RwLock",
    "crate::signals",
    "crate::backend",
    "crate::audit",
    "crate::engine",
    "crate::gateway",
    "crate::http",
];

fn files(path: &Path, out: &mut Vec<std::path::PathBuf>) {
    if path.is_file() {
        out.push(path.to_owned());
        return;
    }
    for entry in fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() || path.extension().is_some_and(|e| e == "rs") {
            files(&path, out);
        }
    }
}

/// The code of a file: no comments, and nothing from the first `#[cfg(test)]` on.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .take_while(|(_, line)| !line.contains("#[cfg(test)]"))
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or_default()))
}

/// Whether `line` names `word` as a path or a type, not as a part of a longer name.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !joins(before)
            && (word.ends_with(':') || !joins(after))
            && (word.contains(':') || word.chars().any(char::is_uppercase) || after == Some(':'))
    })
}

#[test]
fn no_module_imports_from_above() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (module, forbidden) in RULES {
        let mut paths = Vec::new();
        files(&src.join(module), &mut paths);
        for path in paths.iter().filter(|p| !p.ends_with("tests.rs")) {
            let text = fs::read_to_string(path).unwrap();
            for (number, line) in code(&text) {
                for word in *forbidden {
                    let allowed = *word == "crate::" && line.contains("crate::domain");
                    if names(line, word) && !allowed {
                        wrong.push(format!(
                            "{}:{number}: {word} may not be used here: {}",
                            path.display(),
                            line.trim()
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_check_itself_sees_what_it_looks_for() {
    assert!(names("use tokio::sync::mpsc;", "tokio"));
    assert!(names("let m: HashMap<u8, u8>;", "HashMap"));
    assert!(names("use crate::http::routes;", "crate::http"));
    assert!(!names("let tokio_like = 1;", "tokio"));
    assert!(!names("crate::httpish::x", "crate::http"));
}
