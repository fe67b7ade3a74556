//! The shape of a file: JSON Schema generated from [`Spec`](super::Spec), and its errors worded for people and mapped
//! to places.

use std::sync::{Arc, LazyLock};

use jsonschema::{ValidationError, error::ValidationErrorKind};
use serde_json::Value;

use super::{
    diagnostic::{Diagnostic, DiagnosticKind, suggest},
    source::{Source, step},
    spec::Spec,
};

/// Keys of the design that this version refuses by name, and the part of a file where each belongs.
const LATER: &[(&str, &[&str])] = &[("/plans/*", &["cascade", "parallel", "aggregate", "steps", "graph"])];

/// The JSON Schema (draft 2020-12) of policy files.
pub fn schema() -> &'static Value {
    &policies().schema
}

/// The shape of policy files, generated once.
pub(super) fn policies() -> &'static Shape {
    static SHAPE: LazyLock<Shape> = LazyLock::new(|| Shape { later: LATER, ..Shape::of::<Spec>() });
    &SHAPE
}

/// A schema, and the keys that are refused by name.
pub(super) struct Shape {
    schema: Value,
    later: &'static [(&'static str, &'static [&'static str])],
}

impl Shape {
    /// The shape of `T`, with nothing refused by name.
    pub fn of<T: schemars::JsonSchema>() -> Self {
        let settings = schemars::generate::SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
        Shape { schema: settings.into_generator().into_root_schema_for::<T>().to_value(), later: &[] }
    }
}

/// Every way in which `value` departs from the shape.
pub(super) fn check(shape: &Shape, source: &Arc<Source>, value: &Value) -> Vec<Diagnostic> {
    let validator = match jsonschema::validator_for(&shape.schema) {
        Ok(validator) => validator,
        // The schema is generated from our own types; that it compiles is tested.
        Err(error) => return vec![source.value("", DiagnosticKind::Value, format!("weir's own schema: {error}"))],
    };
    let mut words = Words { shape, source, out: Vec::new() };
    for error in validator.iter_errors(value) {
        words.word(&error);
    }
    let mut out = words.out;
    // A plan of a kind that does not exist yet need not also be told that it is no call.
    let later: Vec<String> =
        out.iter().filter(|d| d.kind == DiagnosticKind::NotYet).map(|d| parent(&d.pointer).to_owned()).collect();
    out.retain(|d| d.label != NEEDED || !later.iter().any(|l| l == parent(&d.pointer)));
    out
}

/// The label of a missing key.
const NEEDED: &str = "needed here";

pub(super) fn parent(pointer: &str) -> &str {
    &pointer[..pointer.rfind('/').unwrap_or(0)]
}

/// Puts errors into words.
struct Words<'a> {
    shape: &'a Shape,
    source: &'a Arc<Source>,
    out: Vec<Diagnostic>,
}

impl Words<'_> {
    fn word(&mut self, error: &ValidationError<'_>) {
        use ValidationErrorKind as K;
        let at = error.instance_path().as_str();
        let got = error.instance();
        let (source, shape) = (self.source, self.shape);
        let out = &mut self.out;
        let say = |message: String| source.value(at, DiagnosticKind::Value, message);
        match error.kind() {
            K::AdditionalProperties { unexpected } | K::UnevaluatedProperties { unexpected } => {
                for key in unexpected {
                    let finding = unknown_key(shape, source, at, key);
                    out.push(finding);
                }
            }
            K::Required { property } => {
                let name = property.as_str().unwrap_or_default();
                let missing = source.value(&step(at, name), DiagnosticKind::Value, "this key is missing");
                out.push(missing.label(NEEDED).maybe_help(described(shape, at, name)));
            }
            // The only place without any key: a selector that takes no parameters.
            K::FalseSchema => out.push(say("nothing may be given here".to_owned()).help("write `{}`")),
            K::Type { .. } => {
                let wanted = expected(schema_at(&shape.schema, at));
                let quote = wanted == "text" && (got.is_number() || got.is_boolean());
                let help = quote.then(|| format!("put it in quotes: \"{got}\""));
                out.push(
                    say(format!("expected {wanted}, found {}", found(got)))
                        .label(format!("expected {wanted}"))
                        .maybe_help(help),
                );
            }
            K::Enum { options } => {
                let names: Vec<&str> = options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let help = suggest("values", got.as_str().unwrap_or_default(), names.iter().copied());
                out.push(
                    say(format!("{} is not one of the values that are allowed here", found(got))).maybe_help(help),
                );
            }
            K::Minimum { limit } => out.push(say(format!("{} is too small; at least {limit}", found(got)))),
            K::ExclusiveMinimum { limit } => out.push(say(format!("{} is too small; more than {limit}", found(got)))),
            K::Maximum { limit } => out.push(say(format!("{} is too large; at most {limit}", found(got)))),
            K::ExclusiveMaximum { limit } => out.push(say(format!("{} is too large; less than {limit}", found(got)))),
            K::MinItems { .. } | K::MinProperties { .. } => {
                out.push(say("this is empty; at least one entry is needed".to_owned()));
            }
            K::MaxItems { limit } => out.push(say(format!("too many entries; at most {limit}"))),
            K::MinLength { .. } => out.push(say("this text is empty".to_owned())),
            K::AnyOf { context } | K::OneOfNotValid { context } => self.any_of(at, got, context),
            // Formats such as `uint32` bound numbers; the schema's own wording of the rest is good enough.
            _ => out.push(say(error.to_string())),
        }
    }

    /// Of several shapes, the errors of the one that was meant: the branch whose type fits the value.
    fn any_of(&mut self, at: &str, got: &Value, context: &[Vec<ValidationError<'static>>]) {
        let shape = self.shape;
        let options: Vec<&str> =
            shapes(schema_at(&shape.schema, at)).iter().filter_map(|s| s.get("const")?.as_str()).collect();
        if let (Some(text), false) = (got.as_str(), options.is_empty()) {
            let message = format!("{} is not one of the values that are allowed here", found(got));
            let help = suggest("values", text, options.iter().copied());
            self.out.push(self.source.value(at, DiagnosticKind::Value, message).maybe_help(help));
            return;
        }
        let own_type = |e: &ValidationError<'_>| {
            matches!(e.kind(), ValidationErrorKind::Type { .. }) && e.instance_path().as_str() == at
        };
        match context.iter().find(|branch| !branch.iter().any(own_type)) {
            Some(branch) => branch.iter().for_each(|e| self.word(e)),
            None => {
                let wanted = expected(schema_at(&shape.schema, at));
                let message = format!("expected {wanted}, found {}", found(got));
                let finding = self.source.value(at, DiagnosticKind::Value, message);
                self.out.push(finding.label(format!("expected {wanted}")));
            }
        }
    }
}

/// The value with what is wrong about its shape taken out, so that the rest can still be checked for its meaning: keys
/// that are not known or hold the wrong type are left out, missing texts, lists and maps are empty.
pub(super) fn mend(shape: &Shape, value: &Value, findings: &[Diagnostic]) -> Value {
    let mut value = value.clone();
    for finding in findings {
        let key = finding.pointer[parent(&finding.pointer).len()..].trim_start_matches('/');
        let key = key.replace("~1", "/").replace("~0", "~");
        let Some(Value::Object(map)) = value.pointer_mut(parent(&finding.pointer)) else { continue };
        if finding.label != NEEDED {
            map.shift_remove(&key);
            continue;
        }
        // Without models, every name in the file would seem unknown.
        let empty = match expected(schema_at(&shape.schema, &finding.pointer)).as_str() {
            _ if finding.pointer == "/models" => continue,
            "text" => Value::String(String::new()),
            "a list" => Value::Array(Vec::new()),
            other if other.starts_with("a map") => Value::Object(serde_json::Map::new()),
            _ => continue,
        };
        map.insert(key, empty);
    }
    value
}

fn unknown_key(shape: &Shape, source: &Arc<Source>, at: &str, key: &str) -> Diagnostic {
    let pointer = step(at, key);
    if shape.later.iter().any(|(place, keys)| fits(place, at) && keys.contains(&key)) {
        return source
            .key(&pointer, DiagnosticKind::NotYet, format!("this version of weir does not have `{key}` yet"))
            .label("not yet")
            .help("remove it; a key that did nothing would be worse than an error");
    }
    if key == "<<" {
        return source
            .key(&pointer, DiagnosticKind::UnknownKey, "merge keys (`<<`) are not part of YAML 1.2")
            .help("write the keys out");
    }
    let known: Vec<&str> = properties(schema_at(&shape.schema, at));
    source
        .key(&pointer, DiagnosticKind::UnknownKey, format!("there is no key `{key}` here"))
        .label("unknown key")
        .maybe_help(suggest("keys", key, known.iter().copied()))
}

/// Whether the pointer `at` is of the form `pattern`, in which `*` stands for any one step.
fn fits(pattern: &str, at: &str) -> bool {
    let (mut a, mut b) = (pattern.split('/'), at.split('/'));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return true,
            (Some(x), Some(y)) if x == "*" || x == y => {}
            _ => return false,
        }
    }
}

/// The part of the schema that describes the node at an instance's pointer. Where several shapes are allowed, the one
/// with keys, since that is what a pointer goes on into.
fn schema_at<'a>(schema: &'a Value, pointer: &str) -> &'a Value {
    let mut node = schema;
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        node = shapes(node).iter().find_map(|shape| child(shape, &part)).unwrap_or(&Value::Null);
    }
    node
}

fn shapes(node: &Value) -> Vec<&Value> {
    match node.get("anyOf").or_else(|| node.get("oneOf")).and_then(Value::as_array) {
        Some(branches) => branches.iter().flat_map(shapes).collect(),
        None => vec![node],
    }
}

fn child<'a>(node: &'a Value, key: &str) -> Option<&'a Value> {
    node.get("properties")
        .and_then(|p| p.get(key))
        .or_else(|| node.get("items"))
        .or_else(|| node.get("additionalProperties").filter(|v| v.is_object()))
}

fn properties(node: &Value) -> Vec<&str> {
    shapes(node)
        .iter()
        .filter_map(|shape| shape.get("properties").and_then(Value::as_object))
        .flat_map(|map| map.keys().map(String::as_str))
        .collect()
}

/// The description of a property, as a remedy for its absence.
fn described(shape: &Shape, at: &str, name: &str) -> Option<String> {
    let node =
        shapes(schema_at(&shape.schema, at)).iter().find_map(|s| s.get("properties").and_then(|p| p.get(name)))?;
    let text = node.get("description").and_then(Value::as_str)?;
    Some(format!("`{name}`: {}", text.replace('\n', " ")))
}

/// What a schema node accepts, in words.
fn expected(node: &Value) -> String {
    let mut words: Vec<String> = Vec::new();
    for shape in shapes(node) {
        let types: Vec<&str> = match shape.get("type") {
            Some(Value::String(t)) => vec![t],
            Some(Value::Array(types)) => types.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        for t in types.into_iter().filter(|t| *t != "null") {
            words.push(match t {
                "string" => "text".to_owned(),
                "integer" => "a whole number".to_owned(),
                "number" => "a number".to_owned(),
                "boolean" => "`true` or `false`".to_owned(),
                "array" => "a list".to_owned(),
                "object" => {
                    let keys = properties(shape);
                    match keys.len() {
                        1..=4 => format!("a map with `{}`", keys.join("`, `")),
                        _ => "a map".to_owned(),
                    }
                }
                other => other.to_owned(),
            });
        }
        words.extend(shape.get("const").map(|c| format!("`{}`", c.as_str().unwrap_or_default())));
        if let Some(options) = shape.get("enum").and_then(Value::as_array) {
            let names: Vec<&str> = options.iter().filter_map(Value::as_str).collect();
            words.push(format!("one of `{}`", names.join("`, `")));
        }
    }
    match words.len() {
        0 => "another value".to_owned(),
        _ => words.join(" or "),
    }
}

/// A value in words.
fn found(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) if s.chars().count() <= 40 => format!("the text {s:?}"),
        Value::String(_) => "a text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a map".to_owned(),
    }
}
