//! YAML with places: bytes to a JSON value and a map from JSON pointers to byte ranges. Everything that is wrong with
//! the text itself is found here, without recursion and within fixed bounds.

use std::{borrow::Cow, collections::BTreeMap, ops::Range, sync::Arc};

use miette::NamedSource;
use saphyr::Scalar;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};
use serde_json::{Map, Number, Value};

use super::diagnostic::{Diagnostic, DiagnosticKind, Severity, named};

/// Deepest nesting of lists and maps.
const MAX_DEPTH: usize = 32;
/// Most nodes of a file, aliases expanded: a handful of nested aliases can otherwise grow without bound.
const MAX_NODES: usize = 50_000;
/// Longest file in bytes.
const MAX_BYTES: usize = 1 << 20;

/// A policy file: its text, and where every node of it stands.
#[derive(Debug)]
pub(super) struct Source {
    pub file: String,
    pub text: Arc<str>,
    pub named: NamedSource<Arc<str>>,
    /// Byte offset of each line's first byte.
    lines: Vec<usize>,
    /// By JSON pointer.
    places: BTreeMap<String, Place>,
}

/// Where a node stands.
#[derive(Clone, Debug)]
struct Place {
    value: Range<usize>,
    key: Option<Range<usize>>,
    style: Option<ScalarStyle>,
}

impl Default for Source {
    fn default() -> Self {
        Source::new("", "".into(), BTreeMap::new())
    }
}

impl Source {
    fn new(file: &str, text: Arc<str>, places: BTreeMap<String, Place>) -> Self {
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Source { file: file.to_owned(), named: named(file, text.clone()), text, lines, places }
    }

    /// Line and column (in characters), both from 1.
    fn position(&self, byte: usize) -> (usize, usize) {
        let line = self.lines.partition_point(|start| *start <= byte).max(1);
        let start = self.lines.get(line - 1).copied().unwrap_or(0);
        let column = self.text.get(start..byte).map_or(0, |s| s.chars().count());
        (line, column + 1)
    }

    /// A finding at a byte range.
    pub fn at(
        self: &Arc<Self>,
        span: Range<usize>,
        path: String,
        kind: DiagnosticKind,
        message: impl Into<String>,
    ) -> Diagnostic {
        let start = span.start.min(self.text.len());
        let (line, column) = self.position(start);
        Diagnostic {
            severity: Severity::Error,
            kind,
            file: self.file.clone(),
            line,
            column,
            pointer: String::new(),
            path,
            message: message.into(),
            label: String::new(),
            help: None,
            span: start..span.end.clamp(start, self.text.len()),
            source: self.clone(),
        }
    }

    /// A finding about the value at `pointer`; where the pointer leads nowhere, about the nearest node above it.
    pub fn value(self: &Arc<Self>, pointer: &str, kind: DiagnosticKind, message: impl Into<String>) -> Diagnostic {
        let span = self.nearest(pointer).map_or(0..0, |(_, place)| place.value.clone());
        Diagnostic { pointer: pointer.to_owned(), ..self.at(span, readable(pointer), kind, message) }
    }

    /// A finding about the key at `pointer`.
    pub fn key(self: &Arc<Self>, pointer: &str, kind: DiagnosticKind, message: impl Into<String>) -> Diagnostic {
        let span = match self.nearest(pointer) {
            Some((found, place)) if found == pointer => place.key.clone().unwrap_or_else(|| place.value.clone()),
            Some((_, place)) => place.value.clone(),
            None => 0..0,
        };
        Diagnostic { pointer: pointer.to_owned(), ..self.at(span, readable(pointer), kind, message) }
    }

    /// A finding inside the text at `pointer`: `within` is a byte range of the scalar's value. Exact for plain and
    /// simply quoted scalars and for block scalars; the whole scalar where escapes or folding moved the bytes.
    pub fn inside(
        self: &Arc<Self>,
        pointer: &str,
        value: &str,
        within: Range<usize>,
        kind: DiagnosticKind,
        message: impl Into<String>,
    ) -> Diagnostic {
        let message = message.into();
        let Some((found, place)) = self.nearest(pointer) else { return self.value(pointer, kind, message) };
        if found != pointer {
            return self.value(pointer, kind, message);
        }
        let shown = self.text.get(place.value.clone()).unwrap_or_default();
        let span = match place.style {
            Some(ScalarStyle::Plain) if shown.starts_with(value) => {
                Some(place.value.start + within.start..place.value.start + within.end)
            }
            Some(ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted)
                if shown.get(1..).is_some_and(|s| s.starts_with(value)) =>
            {
                Some(place.value.start + 1 + within.start..place.value.start + 1 + within.end)
            }
            Some(ScalarStyle::Literal) => self.inside_literal(place, value, &within),
            _ => None,
        };
        let span = span.unwrap_or_else(|| place.value.clone());
        Diagnostic { pointer: pointer.to_owned(), ..self.at(span, readable(pointer), kind, message) }
    }

    /// Bytes of a literal block: line n of the value is line n of the block, behind its indentation.
    fn inside_literal(&self, place: &Place, value: &str, within: &Range<usize>) -> Option<Range<usize>> {
        let before = value.get(..within.start)?;
        let line = before.matches('\n').count();
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        let text = value.get(start..)?.lines().next()?;
        let first = text.trim_start();
        // The marker of a block scalar stands on its header or on its content; look from there for the line itself.
        let (from, _) = self.position(place.value.start);
        let at = (from - 1..from + 2 + line).find_map(|n| {
            let begin = *self.lines.get(n)?;
            let end = self.lines.get(n + 1).copied().unwrap_or(self.text.len());
            let offset = self.text.get(begin..end)?.find(first)?;
            (!first.is_empty()).then_some(begin + offset)
        })?;
        let column = within.start.checked_sub(start)?.checked_sub(text.len() - first.len())?;
        Some(at + column..at + column + within.len())
    }

    fn nearest<'a>(&self, pointer: &'a str) -> Option<(&'a str, &Place)> {
        let mut pointer = pointer;
        loop {
            if let Some(place) = self.places.get(pointer) {
                return Some((pointer, place));
            }
            pointer = &pointer[..pointer.rfind('/')?];
        }
    }
}

/// One step of a JSON pointer, escaped.
pub(super) fn step(pointer: &str, key: &str) -> String {
    format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"))
}

/// `/rules/2/when` as people write it: `rules[2].when`.
pub(super) fn readable(pointer: &str) -> String {
    let mut out = String::new();
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            out.push_str(&format!("[{part}]"));
        } else if part.is_empty() || part.contains(['.', ' ', '[', '"']) {
            out.push_str(&format!("[{part:?}]"));
        } else {
            if !out.is_empty() {
                out.push('.');
            }
            out.push_str(&part);
        }
    }
    out
}

/// Reads a file: its value and places, or everything that is wrong with its text. With findings that leave a value
/// (duplicate keys, a tag), both: the value is still worth checking for other errors.
pub(super) fn read(file: &str, bytes: &[u8]) -> (Arc<Source>, Option<Value>, Vec<Diagnostic>) {
    let failed = |text: &str, span: Range<usize>, message: String, help: &str| {
        let source = Arc::new(Source::new(file, text.into(), BTreeMap::new()));
        let diagnostic = source.at(span, String::new(), DiagnosticKind::Syntax, message).help(help);
        (source, None, vec![diagnostic])
    };
    if bytes.len() > MAX_BYTES {
        return failed(
            "",
            0..0,
            format!("the file has {} bytes; a policy has at most {MAX_BYTES}", bytes.len()),
            "is this the right file? A policy is a short text",
        );
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = error.valid_up_to();
            let lossy = String::from_utf8_lossy(bytes);
            return failed(
                &lossy,
                at..at + 1,
                format!("the file is not UTF-8: byte 0x{:02x} at offset {at}", bytes[at]),
                "save the file as UTF-8",
            );
        }
    };
    // A byte order mark is a habit of some editors and means nothing here; it stays in the text so that offsets hold.
    let mut reader = Reader::new(file, text);
    reader.run();
    reader.finish()
}

/// A list or map under construction.
struct Frame {
    pointer: String,
    start: usize,
    anchor: usize,
    key_place: Option<Range<usize>>,
    node: Node,
}

enum Node {
    List(Vec<Value>),
    /// The pending key with its place; `None` while a key is awaited. A duplicate's value is read and dropped.
    Map {
        map: Map<String, Value>,
        pending: Option<Key>,
    },
}

struct Key {
    name: String,
    place: Range<usize>,
    dropped: bool,
}

struct Reader<'a> {
    text: &'a str,
    source: Arc<Source>,
    places: BTreeMap<String, Place>,
    /// Byte offset of each character.
    bytes: Vec<usize>,
    frames: Vec<Frame>,
    root: Option<Value>,
    anchors: BTreeMap<usize, Value>,
    open_anchors: Vec<usize>,
    nodes: usize,
    findings: Vec<Diagnostic>,
    fatal: bool,
}

impl<'a> Reader<'a> {
    fn new(file: &str, text: &'a str) -> Self {
        let mut bytes: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        bytes.push(text.len());
        Reader {
            text,
            source: Arc::new(Source::new(file, text.into(), BTreeMap::new())),
            places: BTreeMap::new(),
            bytes,
            frames: Vec::new(),
            root: None,
            anchors: BTreeMap::new(),
            open_anchors: Vec::new(),
            nodes: 0,
            findings: Vec::new(),
            fatal: false,
        }
    }

    fn byte(&self, marker: Marker) -> usize {
        self.bytes.get(marker.index()).copied().unwrap_or(self.text.len())
    }

    fn find(&mut self, span: Range<usize>, path: &str, message: impl Into<String>, help: &str) {
        let diagnostic = self.source.at(span, readable(path), DiagnosticKind::Syntax, message).help(help);
        self.findings.push(Diagnostic { pointer: path.to_owned(), ..diagnostic });
    }

    fn run(&mut self) {
        let text = self.text;
        let mut parser = Parser::new_from_str(text);
        let mut documents = 0;
        while let Some(event) = parser.next_event() {
            match event {
                Err(error) => {
                    let at = self.byte(*error.marker());
                    let at = at.min(text.trim_end().len());
                    let line = text[..at].rfind('\n').map_or(0, |n| n + 1);
                    let line = text[line..].lines().next().unwrap_or_default();
                    let help = if line.trim_start_matches(' ').starts_with('\t') {
                        "YAML is indented with spaces, never with tabs"
                    } else {
                        "look at this line and the one before it: indentation, a missing colon, an unclosed quote or bracket"
                    };
                    let (message, help) = match error.info() {
                        "recursion limit exceeded" => (
                            "lists and maps are nested too deep".to_owned(),
                            "no part of a policy is that deep; look for stray brackets",
                        ),
                        "while parsing node, found unknown anchor" => (
                            "this alias names no anchor of the file".to_owned(),
                            "define the anchor before it is used, or put the text in quotes: `*` begins an alias",
                        ),
                        info => (format!("this is not YAML: {info}"), help),
                    };
                    self.find(at..at + 1, "", message, help);
                    self.fatal = true;
                    return;
                }
                Ok((Event::DocumentStart(_), span)) => {
                    documents += 1;
                    if documents > 1 {
                        let at = self.byte(span.start);
                        self.find(
                            at..at + 3,
                            "",
                            "a second document starts here; a file holds one policy",
                            "move it to a file of its own",
                        );
                        return;
                    }
                }
                Ok((event, span)) => {
                    self.event(event, span);
                    if self.fatal {
                        return;
                    }
                }
            }
        }
    }

    fn event(&mut self, event: Event<'_>, span: Span) {
        let range = self.byte(span.start)..self.byte(span.end);
        match event {
            Event::Scalar(text, style, anchor, tag) => self.scalar(text, style, anchor, tag.as_deref(), range),
            Event::SequenceStart(anchor, tag) => self.open(anchor, tag.as_deref(), range, Node::List(Vec::new())),
            Event::MappingStart(anchor, tag) => {
                self.open(anchor, tag.as_deref(), range, Node::Map { map: Map::new(), pending: None });
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(range),
            Event::Alias(id) => self.alias(id, range),
            _ => {}
        }
    }

    /// The pointer and key place of the node that begins now; `None` when it is a key itself.
    fn slot(&self) -> Option<(String, Option<Range<usize>>)> {
        let Some(frame) = self.frames.last() else { return Some((String::new(), None)) };
        match &frame.node {
            Node::List(items) => Some((step(&frame.pointer, &items.len().to_string()), None)),
            Node::Map { pending: None, .. } => None,
            Node::Map { pending: Some(key), .. } => Some((step(&frame.pointer, &key.name), Some(key.place.clone()))),
        }
    }

    fn count(&mut self, nodes: usize, at: &Range<usize>) -> bool {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            self.find(
                at.clone(),
                "",
                format!("the file has more than {MAX_NODES} values, aliases expanded"),
                "aliases of aliases grow quickly; write the policy out",
            );
            self.fatal = true;
        }
        !self.fatal
    }

    fn tag(&mut self, tag: Option<&Tag>, at: &Range<usize>, pointer: &str) {
        if let Some(tag) = tag.filter(|t| !t.is_yaml_core_schema()) {
            self.find(
                at.clone(),
                pointer,
                format!("the tag `{tag}` means nothing in a policy"),
                "remove the tag; plain YAML values are enough",
            );
        }
    }

    fn scalar(&mut self, text: Cow<'_, str>, style: ScalarStyle, anchor: usize, tag: Option<&Tag>, at: Range<usize>) {
        if !self.count(1, &at) {
            return;
        }
        let Some((pointer, key)) = self.slot() else {
            self.tag(tag, &at, "");
            self.key(text.into_owned(), at);
            return;
        };
        self.tag(tag, &at, &pointer);
        let tag = tag.map(|t| Cow::<'_, Tag>::Owned(t.clone()));
        let value = match Scalar::parse_from_cow_and_metadata(Cow::Borrowed(&*text), style, tag.as_ref()) {
            Some(Scalar::Null) => Value::Null,
            Some(Scalar::Boolean(b)) => Value::Bool(b),
            Some(Scalar::Integer(i)) => Value::from(i),
            Some(Scalar::FloatingPoint(f)) => match Number::from_f64(f.into_inner()) {
                Some(number) => Value::Number(number),
                None => {
                    self.find(at.clone(), &pointer, format!("`{text}` is not a finite number"), "write a number");
                    Value::from(0)
                }
            },
            Some(Scalar::String(s)) => Value::String(s.into_owned()),
            None => {
                self.find(
                    at.clone(),
                    &pointer,
                    format!("`{text}` does not have the type that its tag says"),
                    "remove the tag, or correct the value",
                );
                Value::String(text.to_string())
            }
        };
        if let Value::String(s) = &value
            && s.contains('\0')
        {
            self.find(at.clone(), &pointer, "text in a policy may not hold U+0000", "remove the character");
        }
        self.places.entry(pointer).or_insert(Place { value: at, key, style: Some(style) });
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        self.attach(value);
    }

    fn key(&mut self, name: String, place: Range<usize>) {
        let Some(Frame { pointer, node: Node::Map { map, pending }, .. }) = self.frames.last_mut() else { return };
        let dropped = map.contains_key(&name);
        let pointer = step(pointer, &name);
        *pending = Some(Key { name: name.clone(), place: place.clone(), dropped });
        if dropped {
            let first = self.places.get(&pointer).and_then(|p| p.key.clone());
            let where_ = first.map_or(0, |f| self.source.position(f.start).0);
            self.find(
                place,
                &pointer,
                format!("the key `{name}` is given twice; the first is on line {where_}"),
                "keep one of the two",
            );
        }
    }

    fn open(&mut self, anchor: usize, tag: Option<&Tag>, at: Range<usize>, node: Node) {
        if !self.count(1, &at) {
            return;
        }
        if self.frames.len() >= MAX_DEPTH {
            self.find(
                at,
                "",
                format!("lists and maps are nested more than {MAX_DEPTH} deep"),
                "no part of a policy is that deep; look for stray brackets",
            );
            self.fatal = true;
            return;
        }
        let Some((pointer, key_place)) = self.slot() else {
            self.find(at, "", "a key must be text, not a list or a map", "put quotes around the key");
            self.fatal = true;
            return;
        };
        self.tag(tag, &at, &pointer);
        if anchor > 0 {
            self.open_anchors.push(anchor);
        }
        self.frames.push(Frame { pointer, start: at.start, anchor, key_place, node });
    }

    fn close(&mut self, at: Range<usize>) {
        let Some(frame) = self.frames.pop() else { return };
        let value = match frame.node {
            Node::List(items) => Value::Array(items),
            Node::Map { map, .. } => Value::Object(map),
        };
        if frame.anchor > 0 {
            self.open_anchors.retain(|open| *open != frame.anchor);
            self.anchors.insert(frame.anchor, value.clone());
        }
        // Of a collection only the first line is shown; an excerpt of fifty lines explains nothing.
        let whole = self.text.get(frame.start..at.end.max(frame.start)).unwrap_or_default();
        let end = frame.start + whole.lines().next().map_or(0, |l| l.trim_end().len());
        self.places.entry(frame.pointer).or_insert(Place {
            value: frame.start..end,
            key: frame.key_place,
            style: None,
        });
        self.attach(value);
    }

    fn alias(&mut self, id: usize, at: Range<usize>) {
        let Some((pointer, key)) = self.slot() else {
            self.find(at, "", "an alias cannot be a key", "write the key out");
            self.fatal = true;
            return;
        };
        if self.open_anchors.contains(&id) {
            self.find(at, &pointer, "this alias stands inside the very value that it names", "write the value out");
            self.fatal = true;
            return;
        }
        let Some(value) = self.anchors.get(&id).cloned() else {
            self.find(at, &pointer, "this alias names no anchor of the file", "define the anchor before it is used");
            self.fatal = true;
            return;
        };
        if !self.count(size(&value), &at) {
            return;
        }
        if self.frames.len() + depth(&value) > MAX_DEPTH {
            self.find(
                at,
                &pointer,
                format!("with this alias, lists and maps are nested more than {MAX_DEPTH} deep"),
                "write the policy out",
            );
            self.fatal = true;
            return;
        }
        self.places.entry(pointer).or_insert(Place { value: at, key, style: None });
        self.attach(value);
    }

    fn attach(&mut self, value: Value) {
        match self.frames.last_mut().map(|frame| &mut frame.node) {
            None => self.root = Some(value),
            Some(Node::List(items)) => items.push(value),
            Some(Node::Map { map, pending }) => {
                if let Some(key) = pending.take()
                    && !key.dropped
                {
                    map.insert(key.name, value);
                }
            }
        }
    }

    fn finish(mut self) -> (Arc<Source>, Option<Value>, Vec<Diagnostic>) {
        if !self.fatal && matches!(self.root, None | Some(Value::Null)) {
            let diagnostic = self
                .source
                .at(0..0, String::new(), DiagnosticKind::Syntax, "the file is empty")
                .help("`weir policy init` writes a policy to start from");
            self.findings.push(diagnostic);
            self.fatal = true;
        }
        let source = Arc::new(Source::new(&self.source.file, self.source.text.clone(), self.places));
        (source, if self.fatal { None } else { self.root }, self.findings)
    }
}

/// Nesting of a tree; at most `MAX_DEPTH`, so recursion is safe here and below.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Number of values in a tree.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        _ => 0,
    }
}
