//! The typing rules of the condition language: which operators and functions there are, on what, giving what. The sets
//! are those of `cel` 0.15's standard library, without what conditions have no use for (bytes, null, optionals, maps).

use cel::common::ast::operators as op;

use super::variables::Ty;

/// Functions of one receiver: name, receiver, arguments, result.
pub(super) const METHODS: &[(&str, Ty, &[Ty], Ty)] = &[
    ("contains", Ty::Text, &[Ty::Text], Ty::Bool),
    ("startsWith", Ty::Text, &[Ty::Text], Ty::Bool),
    ("endsWith", Ty::Text, &[Ty::Text], Ty::Bool),
    ("matches", Ty::Text, &[Ty::Text], Ty::Bool),
];
/// All names that may be called, for hints.
pub(super) const FUNCTIONS: &[&str] = &[
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "matches",
    "int",
    "uint",
    "double",
    "string",
    "bool",
    "has",
    "all",
    "exists",
    "exists_one",
    "filter",
    "map",
];

/// The type that both are, where the element of an empty list is any.
pub(super) fn unify(a: &Ty, b: &Ty) -> Option<Ty> {
    match (a, b) {
        (Ty::Any, t) | (t, Ty::Any) => Some(t.clone()),
        (Ty::List(a), Ty::List(b)) => unify(a, b).map(|t| Ty::List(Box::new(t))),
        (a, b) => (a == b).then(|| a.clone()),
    }
}

pub(super) fn numeric(t: &Ty) -> bool {
    matches!(t, Ty::Int | Ty::Uint | Ty::Double)
}

/// How an operator is written.
pub(super) fn operator(name: &str) -> Option<&'static str> {
    Some(match name {
        op::CONDITIONAL => "?:",
        op::LOGICAL_AND => "&&",
        op::LOGICAL_OR => "||",
        op::LOGICAL_NOT => "!",
        op::SUBSTRACT | op::NEGATE => "-",
        op::ADD => "+",
        op::MULTIPLY => "*",
        op::DIVIDE => "/",
        op::MODULO => "%",
        op::EQUALS => "==",
        op::NOT_EQUALS => "!=",
        op::GREATER_EQUALS => ">=",
        op::LESS_EQUALS => "<=",
        op::GREATER => ">",
        op::LESS => "<",
        op::IN => "in",
        op::INDEX => "[]",
        op::NOT_STRICTLY_FALSE => "!",
        _ => return None,
    })
}

/// The result of an operator, or a hint.
pub(super) fn operation(name: &str, types: &[Ty]) -> Result<Ty, Option<String>> {
    let ok = |yes: bool, ty: Ty| if yes { Ok(ty) } else { Err(None) };
    match (name, types) {
        (op::LOGICAL_AND | op::LOGICAL_OR, [Ty::Bool, Ty::Bool]) => Ok(Ty::Bool),
        (op::LOGICAL_NOT | op::NOT_STRICTLY_FALSE, [Ty::Bool]) => Ok(Ty::Bool),
        (op::CONDITIONAL, [Ty::Bool, a, b]) => unify(a, b).ok_or(None),
        (op::EQUALS | op::NOT_EQUALS, [a, b]) => {
            ok(unify(a, b).is_some() || (numeric(a) && numeric(b)), Ty::Bool).map_err(|_| mixed(a, b))
        }
        (op::LESS | op::LESS_EQUALS | op::GREATER | op::GREATER_EQUALS, [a, b]) => {
            ok((numeric(a) && numeric(b)) || (*a == Ty::Text && *b == Ty::Text), Ty::Bool).map_err(|_| mixed(a, b))
        }
        (op::ADD, [Ty::Text, Ty::Text]) => Ok(Ty::Text),
        (op::ADD, [Ty::List(a), Ty::List(b)]) => unify(a, b).map(|t| Ty::List(Box::new(t))).ok_or(None),
        (op::MODULO, [a, b]) => ok(a == b && matches!(a, Ty::Int | Ty::Uint), a.clone()),
        (op::ADD | op::SUBSTRACT | op::MULTIPLY | op::DIVIDE, [a, b]) => {
            ok(a == b && numeric(a), a.clone()).map_err(|_| {
                (numeric(a) && numeric(b))
                    .then(|| "CEL does not mix number types; write `double(x)` or `int(x)`".to_owned())
            })
        }
        (op::NEGATE, [t @ (Ty::Int | Ty::Double)]) => Ok(t.clone()),
        (op::IN, [a, Ty::List(b)]) => ok(unify(a, b).is_some(), Ty::Bool),
        (op::IN, [Ty::Text, Ty::Map]) => Ok(Ty::Bool),
        (op::INDEX, [Ty::List(t), Ty::Int]) => Ok((**t).clone()),
        (op::INDEX, [Ty::Map, Ty::Text]) => Ok(Ty::Text),
        _ => Err(None),
    }
}

pub(super) fn mixed(a: &Ty, b: &Ty) -> Option<String> {
    (matches!((a, b), (Ty::Text, t) | (t, Ty::Text) if numeric(t)))
        .then(|| "a string is compared with a string: is a number in quotes here?".to_owned())
}

/// The result of a function, or a hint.
pub(super) fn function(name: &str, method: bool, types: &[Ty]) -> Result<Ty, Option<String>> {
    if let Some((_, receiver, args, result)) = METHODS.iter().find(|m| m.0 == name) {
        if !method {
            return Err(Some(format!("write `x.{name}(y)`")));
        }
        let fits = types.first() == Some(receiver) && types.get(1..) == Some(*args);
        return if fits {
            Ok(result.clone())
        } else {
            Err(Some(format!("`{name}` is a function of a string on a string")))
        };
    }
    match (name, types) {
        ("size", [Ty::Text | Ty::List(_) | Ty::Map]) => Ok(Ty::Int),
        _ if method => Err(Some(format!("write `{name}(x)`"))),
        ("int", [Ty::Int | Ty::Uint | Ty::Double | Ty::Text]) => Ok(Ty::Int),
        ("uint", [Ty::Int | Ty::Uint | Ty::Double | Ty::Text]) => Ok(Ty::Uint),
        ("double", [Ty::Int | Ty::Uint | Ty::Double | Ty::Text]) => Ok(Ty::Double),
        ("string", [Ty::Int | Ty::Uint | Ty::Double | Ty::Text | Ty::Bool]) => Ok(Ty::Text),
        ("bool", [Ty::Bool | Ty::Text]) => Ok(Ty::Bool),
        ("has" | "all" | "exists" | "exists_one" | "filter" | "map", _) => {
            Err(Some("macros are written `has(a.b)`, `list.exists(x, x > 1)`, `list.filter(x, ...)`".into()))
        }
        _ => Err(None),
    }
}
