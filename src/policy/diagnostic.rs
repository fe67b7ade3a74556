//! What is wrong with a policy file, and where: one [`Diagnostic`] per finding, each with file, line, column, path,
//! what was expected and the nearest name. Rendering is miette's; whether the reader is a terminal is the caller's
//! knowledge ([`Diagnostics::render`]), `Display` is plain ASCII.

use std::{fmt, sync::Arc};

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceCode};
use serde::Serialize;

use super::source::Source;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The file is not accepted.
    Error,
    /// The file is accepted; something about it will surprise.
    Warning,
}

/// The kind of finding, as a fixed label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiagnosticKind {
    /// Not YAML, not UTF-8, empty, too deep, duplicate keys, tags.
    Syntax,
    /// A key that the language does not have.
    UnknownKey,
    /// A key of the design that this version does not have yet.
    NotYet,
    /// A value of the wrong type or out of range, or a missing key.
    Value,
    /// A name that nothing in the file or the fleet has.
    UnknownName,
    /// A condition that is not valid CEL, or not well typed.
    Condition,
    /// Parts that contradict each other.
    Conflict,
    /// A fitted artifact that is missing, damaged, another one, or does not fit.
    Artifact,
    /// A warning about what the policy's log can be used for.
    Replay,
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnostic {
    pub severity: Severity,
    pub kind: DiagnosticKind,
    pub file: String,
    /// From 1; 0 when the finding has no place.
    pub line: usize,
    /// In characters, from 1; 0 when the finding has no place.
    pub column: usize,
    /// Place within the document, e.g. `rules[2].when`; empty for the whole file.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What is at the place, in few words, for the margin of the excerpt.
    #[serde(skip)]
    pub label: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Byte range within the file.
    #[serde(skip)]
    pub span: std::ops::Range<usize>,
    /// The place as a JSON pointer.
    #[serde(skip)]
    pub(super) pointer: String,
    #[serde(skip)]
    pub(super) source: Arc<Source>,
}

impl Diagnostic {
    /// The same finding with a remedy.
    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The same finding with a remedy, where there is one.
    pub(super) fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help.or(self.help);
        self
    }

    pub(super) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    pub(super) fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    pub(super) fn warning(mut self) -> Self {
        self.severity = Severity::Warning;
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Diagnostic {}

impl miette::Diagnostic for Diagnostic {
    fn severity(&self) -> Option<miette::Severity> {
        Some(match self.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
        })
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        (self.line > 0).then_some(&self.source.named as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        if self.line == 0 {
            return None;
        }
        let label = (!self.label.is_empty()).then(|| self.label.clone());
        Some(Box::new(std::iter::once(LabeledSpan::new(label, self.span.start, self.span.len()))))
    }
}

/// All findings of one file, in order of place.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// The findings as text for people: with frames, Unicode and colour when `fancy`, plain ASCII otherwise.
    pub fn render(&self, fancy: bool) -> String {
        let theme = if fancy { GraphicalTheme::unicode() } else { GraphicalTheme::none() };
        let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(110).with_context_lines(1);
        let mut out = String::new();
        for diagnostic in &self.0 {
            if handler.render_report(&mut out, diagnostic).is_err() {
                // Only a formatter that fails can bring us here; the bare finding is still worth printing.
                out.push_str(&diagnostic.to_string());
            }
            let kept = out.trim_end().len();
            out.truncate(kept);
            if diagnostic.line == 0 {
                out.push_str(&format!("\n  in {}", diagnostic.file));
            }
            out.push_str("\n\n");
        }
        let kept = out.trim_end().len();
        out.truncate(kept);
        out
    }

    /// Whether any finding keeps the file from being accepted.
    pub fn has_errors(&self) -> bool {
        self.0.iter().any(Diagnostic::is_error)
    }

    /// Orders by place; what has no place comes first.
    pub(super) fn sort(&mut self) {
        self.0.sort_by(|a, b| {
            (a.line, a.column, a.severity, a.path.as_str(), a.message.as_str()).cmp(&(
                b.line,
                b.column,
                b.severity,
                b.path.as_str(),
                b.message.as_str(),
            ))
        });
        self.0.dedup_by(|a, b| a.span == b.span && a.path == b.path && a.message == b.message);
    }

    /// Fixed label of the first error, for logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self.0.first().map(|d| d.kind) {
            Some(DiagnosticKind::Syntax) => "syntax",
            Some(DiagnosticKind::UnknownKey) => "unknown_key",
            Some(DiagnosticKind::NotYet) => "not_yet",
            Some(DiagnosticKind::Value) => "value",
            Some(DiagnosticKind::UnknownName) => "unknown_name",
            Some(DiagnosticKind::Condition) => "condition",
            Some(DiagnosticKind::Conflict) => "conflict",
            Some(DiagnosticKind::Artifact) => "artifact",
            Some(DiagnosticKind::Replay) => "replay",
            None => "none",
        }
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}

/// A source that miette can quote.
pub(super) fn named(file: &str, text: Arc<str>) -> NamedSource<Arc<str>> {
    NamedSource::new(file, text).with_language("yaml")
}

/// The known name nearest to `name`, where one is near enough to be meant.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = name.to_lowercase();
    known
        .into_iter()
        .map(|k| (strsim::damerau_levenshtein(&folded, &k.to_lowercase()), k))
        .filter(|(distance, k)| *distance <= (name.chars().count().max(k.chars().count()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, k)| k)
}

/// "did you mean `x`?", else the list of what is known, where it is short enough to help.
pub(super) fn suggest<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    if let Some(near) = nearest(name, known.clone()) {
        return Some(format!("did you mean `{near}`?"));
    }
    let all: Vec<String> = known.into_iter().map(|k| format!("`{k}`")).collect();
    match all.len() {
        0 => Some(format!("there are no {what} here")),
        1..=30 => Some(format!("known {what}: {}", all.join(", "))),
        _ => None,
    }
}
