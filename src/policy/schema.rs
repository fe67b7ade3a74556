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
const LATER: &[(&str, &[&str])] = &[("/plans/**", &["steps", "graph"])];

/// Keys that belong to another part of a plan.
const ELSEWHERE: &[(&str, &str)] = &[
    ("times", "`times` is of the branches of a `parallel` plan"),
    ("accept_when", "`accept_when` is of the stages of a `cascade`"),
];

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
    /// The shape of `T`, with nothing refused by name. Types that contain themselves are references (`$ref`) within it.
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
                let wanted = expected(&shape.schema, schema_at(&shape.schema, at));
                let quote = wanted == "text" && (got.is_number() || got.is_boolean());
                let help = match got.as_str() {
                    _ if quote => Some(format!("put it in quotes: \"{got}\"")),
                    Some(name) if properties(&shape.schema, schema_at(&shape.schema, at)).contains(&"call") => {
                        Some(format!("write `{{call: {name}}}` for a model, `{{plan: {name}}}` for a plan"))
                    }
                    _ => None,
                };
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
        let node = schema_at(&shape.schema, at);
        let options: Vec<&str> = shapes(&shape.schema, node).iter().filter_map(|s| s.get("const")?.as_str()).collect();
        if let (Some(text), false) = (got.as_str(), options.is_empty()) {
            let message = format!("{} is not one of the values that are allowed here", found(got));
            let finding = self.source.value(at, DiagnosticKind::Value, message);
            let help = match properties(&shape.schema, node).contains(&text) {
                true => Some(format!("it needs a value: `{{{text}: …}}`")),
                false => suggest("values", text, options.iter().copied()),
            };
            self.out.push(finding.maybe_help(help));
            return;
        }
        match context.iter().find(|branch| !branch.iter().any(|e| of_another_type(e, at))) {
            Some(branch) => branch.iter().for_each(|e| self.word(e)),
            None => {
                let wanted = expected(&shape.schema, schema_at(&shape.schema, at));
                let message = format!("expected {wanted}, found {}", found(got));
                let finding = self.source.value(at, DiagnosticKind::Value, message);
                self.out.push(finding.label(format!("expected {wanted}")));
            }
        }
    }
}

/// Whether a value is not even of the type that is wanted at `at`, be it of one type or one of several.
fn of_another_type(error: &ValidationError<'_>, at: &str) -> bool {
    let all = |branches: &[Vec<ValidationError<'static>>]| {
        branches.iter().all(|branch| branch.iter().any(|e| of_another_type(e, at)))
    };
    error.instance_path().as_str() == at
        && match error.kind() {
            ValidationErrorKind::Type { .. } => true,
            ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => all(context),
            _ => false,
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
        let empty = match expected(&shape.schema, schema_at(&shape.schema, &finding.pointer)).as_str() {
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
    let known: Vec<&str> = properties(&shape.schema, schema_at(&shape.schema, at));
    let elsewhere = ELSEWHERE.iter().find(|(name, _)| *name == key && known.contains(&"call"));
    source
        .key(&pointer, DiagnosticKind::UnknownKey, format!("there is no key `{key}` here"))
        .label("unknown key")
        .maybe_help(match elsewhere {
            Some((_, help)) => Some((*help).to_owned()),
            None => suggest("keys", key, known.iter().copied()),
        })
}

/// Whether the pointer `at` is of the form `pattern`, in which `*` stands for any one step and `**` for one or more.
fn fits(pattern: &str, at: &str) -> bool {
    fn steps(pattern: &[&str], at: &[&str]) -> bool {
        match (pattern, at) {
            ([], []) => true,
            (["**", rest @ ..], [_, at @ ..]) => steps(rest, at) || steps(pattern, at),
            ([step, rest @ ..], [here, at @ ..]) => (*step == "*" || step == here) && steps(rest, at),
            _ => false,
        }
    }
    steps(&pattern.split('/').collect::<Vec<_>>(), &at.split('/').collect::<Vec<_>>())
}

/// The part of the schema that describes the node at an instance's pointer. Where several shapes are allowed, the one
/// with keys, since that is what a pointer goes on into.
fn schema_at<'a>(schema: &'a Value, pointer: &str) -> &'a Value {
    let mut node = schema;
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        node = shapes(schema, node).iter().find_map(|shape| child(shape, &part)).unwrap_or(&Value::Null);
    }
    node
}

/// The shapes that a node allows, references followed.
fn shapes<'a>(schema: &'a Value, node: &'a Value) -> Vec<&'a Value> {
    let referred = node.get("$ref").and_then(Value::as_str).and_then(|at| schema.pointer(at.trim_start_matches('#')));
    if let Some(referred) = referred {
        return shapes(schema, referred);
    }
    match node.get("anyOf").or_else(|| node.get("oneOf")).and_then(Value::as_array) {
        Some(branches) => branches.iter().flat_map(|branch| shapes(schema, branch)).collect(),
        None => vec![node],
    }
}

fn child<'a>(node: &'a Value, key: &str) -> Option<&'a Value> {
    node.get("properties")
        .and_then(|p| p.get(key))
        .or_else(|| node.get("items"))
        .or_else(|| node.get("additionalProperties").filter(|v| v.is_object()))
}

fn properties<'a>(schema: &'a Value, node: &'a Value) -> Vec<&'a str> {
    shapes(schema, node)
        .iter()
        .filter_map(|shape| shape.get("properties").and_then(Value::as_object))
        .flat_map(|map| map.keys().map(String::as_str))
        .collect()
}

/// The description of a property, as a remedy for its absence.
fn described(shape: &Shape, at: &str, name: &str) -> Option<String> {
    let node = schema_at(&shape.schema, at);
    let node = shapes(&shape.schema, node).iter().find_map(|s| s.get("properties").and_then(|p| p.get(name)))?;
    let text = node.get("description").and_then(Value::as_str)?;
    Some(format!("`{name}`: {}", text.replace('\n', " ")))
}

/// What a schema node accepts, in words.
fn expected(schema: &Value, node: &Value) -> String {
    let mut words: Vec<String> = Vec::new();
    for shape in shapes(schema, node) {
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
                    let keys = properties(schema, shape);
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
