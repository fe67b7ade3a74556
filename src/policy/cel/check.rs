//! The type check of conditions: every name, every type, every function, with the place inside the expression.

use std::ops::Range;

use cel::{
    IdedExpr, Program as Parsed,
    common::ast::{CallExpr, ComprehensionExpr, Expr, LiteralValue, SelectExpr, operators as op},
};
use regex::RegexBuilder;

use super::{
    super::diagnostic::{nearest, suggest},
    Condition, Program, regex_name, slot_name,
    syntax::syntax,
    typing::{FUNCTIONS, function, operation, operator, unify},
    variables::{FLEET, Slot, TABLE, Ty},
};

/// Longest expression in bytes.
const MAX_LENGTH: usize = 4096;
/// Deepest nesting of an expression.
const MAX_DEPTH: usize = 48;

/// What is wrong with an expression, and where in its text.
#[derive(Debug)]
pub(in crate::policy) struct Problem {
    /// Bytes of the expression.
    pub at: Range<usize>,
    pub message: String,
    pub help: Option<String>,
}

/// The names that conditions may use beside the fixed ones.
pub(in crate::policy) struct Names<'a> {
    pub examples: Vec<&'a str>,
    pub fleet: Vec<&'a str>,
}

/// Parses and checks a condition, and lowers it onto `program`.
pub(in crate::policy) fn check(
    text: &str,
    names: &Names<'_>,
    program: &mut Program,
) -> Result<Condition, Vec<Problem>> {
    let whole = 0..text.len();
    let one = |at: Range<usize>, message: &str, help: &str| {
        Err(vec![Problem { at, message: message.to_owned(), help: Some(help.to_owned()) }])
    };
    if text.len() > MAX_LENGTH {
        return one(whole, "this expression is longer than 4096 bytes", "split the rule");
    }
    if text.trim().is_empty() {
        return one(whole, "this expression is empty", "write a condition, e.g. `signals.turn > 3`, or `true`");
    }
    let parsed = match Parsed::compile(text) {
        Ok(parsed) => parsed,
        Err(errors) => return Err(syntax(text, &errors)),
    };
    let mut checker =
        Checker { text, parsed: &parsed, names, program, problems: Vec::new(), locals: Vec::new(), too_deep: false };
    let (ty, expression) = checker.expr(parsed.expression(), 0);
    if checker.problems.is_empty() && ty != Some(Ty::Bool) {
        let ty = ty.map_or_else(String::new, |t| t.to_string());
        return one(
            whole,
            &format!("a condition must be a bool; this is {}", article(&ty)),
            "compare it with something, as in `x > 0`",
        );
    }
    match checker.problems.is_empty() {
        true => Ok(Condition { expression }),
        false => Err(checker.problems),
    }
}

fn article(ty: &str) -> String {
    format!("{} {ty}", if ty.starts_with(['a', 'e', 'i', 'o']) { "an" } else { "a" })
}

struct Checker<'a> {
    text: &'a str,
    parsed: &'a Parsed,
    names: &'a Names<'a>,
    program: &'a mut Program,
    problems: Vec<Problem>,
    /// Variables of comprehensions, innermost last.
    locals: Vec<(String, Ty)>,
    /// Whether the nesting has been reported; once is enough.
    too_deep: bool,
}

/// A type, unless something inside was wrong and has been reported.
type Typed = (Option<Ty>, IdedExpr);

impl Checker<'_> {
    /// The parser's places are byte offsets, the last one inclusive.
    fn place(&self, id: u64) -> Range<usize> {
        match self.parsed.source_info().offset_for(id) {
            Some((start, stop)) => {
                let start = self.text.floor_char_boundary(start as usize);
                start..self.text.ceil_char_boundary((stop as usize).saturating_add(1)).max(start)
            }
            None => 0..self.text.len(),
        }
    }

    fn wrong(&mut self, at: Range<usize>, message: impl Into<String>, help: Option<String>) -> Option<Ty> {
        self.problems.push(Problem { at, message: message.into(), help });
        None
    }

    fn slot(&mut self, slot: Slot, id: u64) -> IdedExpr {
        let n = self.program.slots.iter().position(|s| *s == slot).unwrap_or_else(|| {
            self.program.slots.push(slot);
            self.program.slots.len() - 1
        });
        IdedExpr { id, expr: Expr::Ident(slot_name(n)) }
    }

    fn expr(&mut self, e: &IdedExpr, depth: usize) -> Typed {
        if depth > MAX_DEPTH {
            if self.too_deep {
                return (None, e.clone());
            }
            self.too_deep = true;
            let at = self.place(e.id);
            let ty = self.wrong(
                at,
                format!("this expression is nested more than {MAX_DEPTH} deep"),
                Some("split the rule".into()),
            );
            return (ty, e.clone());
        }
        match &e.expr {
            Expr::Literal(literal) => (self.literal(literal, e.id), e.clone()),
            Expr::Ident(name) if self.local(name).is_some() => (self.local(name), e.clone()),
            Expr::Ident(_) | Expr::Select(_) => self.name(e, depth),
            Expr::Call(call) if call.func_name == op::INDEX && self.path(e).is_some() => self.name(e, depth),
            Expr::Call(call) => self.call(e, call, depth),
            Expr::List(list) => {
                let mut element = Some(Ty::Any);
                let mut lowered = list.clone();
                for (item, out) in list.elements.iter().zip(&mut lowered.elements) {
                    let (ty, expr) = self.expr(item, depth + 1);
                    *out = expr;
                    element = match (element, ty) {
                        (Some(a), Some(b)) => unify(&a, &b).or_else(|| {
                            let at = self.place(item.id);
                            self.wrong(at, format!("a list of {a} cannot hold {}", article(&b.to_string())), None)
                        }),
                        _ => None,
                    };
                }
                (element.map(|t| Ty::List(Box::new(t))), IdedExpr { id: e.id, expr: Expr::List(lowered) })
            }
            Expr::Comprehension(c) => self.comprehension(e, c, depth),
            Expr::Map(_) | Expr::Struct(_) => {
                let at = self.place(e.id);
                (self.wrong(at, "maps and messages cannot be written in a condition", None), e.clone())
            }
            Expr::Unspecified => {
                let at = self.place(e.id);
                (self.wrong(at, "this is not CEL", None), e.clone())
            }
        }
    }

    fn literal(&mut self, literal: &LiteralValue, id: u64) -> Option<Ty> {
        match literal {
            LiteralValue::Boolean(_) => Some(Ty::Bool),
            LiteralValue::Int(_) => Some(Ty::Int),
            LiteralValue::UInt(_) => Some(Ty::Uint),
            LiteralValue::Double(_) => Some(Ty::Double),
            LiteralValue::String(_) => Some(Ty::Text),
            LiteralValue::Null => {
                let at = self.place(id);
                self.wrong(
                    at,
                    "nothing is ever null here",
                    Some("test with `has(...)`, or compare with \"\" or 0".into()),
                )
            }
            LiteralValue::Bytes(_) => {
                let at = self.place(id);
                self.wrong(at, "no variable holds bytes", Some("write a string, without the `b`".into()))
            }
        }
    }

    fn local(&self, name: &str) -> Option<Ty> {
        self.locals.iter().rev().find(|(n, _)| n == name).map(|(_, ty)| ty.clone())
    }

    /// The segments of `a.b["c"]`, with the place from its first to its last byte. `None` for anything but a name that
    /// begins with a variable of ours.
    fn path(&self, e: &IdedExpr) -> Option<(Vec<String>, Range<usize>)> {
        match &e.expr {
            Expr::Ident(name) if self.local(name).is_none() => {
                let name = name.strip_prefix('.').unwrap_or(name);
                Some((vec![name.to_owned()], self.place(e.id)))
            }
            Expr::Select(SelectExpr { operand, field, test: false }) => {
                let (mut path, at) = self.path(operand)?;
                path.push(field.clone());
                // A selection's own place is its dot; the field follows, perhaps after white space.
                let from = self.place(e.id).end.max(at.end);
                let end =
                    self.text.get(from..).and_then(|s| s.find(field.as_str())).map_or(from, |n| from + n + field.len());
                Some((path, at.start..end))
            }
            Expr::Call(CallExpr { func_name, target: None, args }) if func_name == op::INDEX => {
                let [operand, index] = args.as_slice() else { return None };
                let Expr::Literal(LiteralValue::String(key)) = &index.expr else { return None };
                let (mut path, at) = self.path(operand)?;
                path.push(key.inner().to_owned());
                let end = self.place(index.id).end;
                let close = self.text.get(end..).and_then(|s| s.find(']')).map_or(end, |n| end + n + 1);
                Some((path, at.start..close))
            }
            _ => None,
        }
    }

    /// A variable, or a presence test on one.
    fn name(&mut self, e: &IdedExpr, depth: usize) -> Typed {
        if let Expr::Select(SelectExpr { operand, field, test: true }) = &e.expr {
            let Some((mut path, at)) = self.path(operand) else {
                let at = self.place(e.id);
                return (
                    self.wrong(
                        at,
                        "`has` tests for a field of a variable",
                        Some("e.g. `has(request.metadata.team)`".into()),
                    ),
                    e.clone(),
                );
            };
            if path == ["request", "metadata"] {
                return (Some(Ty::Bool), self.slot(Slot::HasMetadata(field.clone()), e.id));
            }
            path.push(field.clone());
            let found = self.lookup(&path, at, e.id).is_some();
            // Every other variable always has a value.
            let yes = IdedExpr { id: e.id, expr: Expr::Literal(LiteralValue::Boolean(true.into())) };
            return (found.then_some(Ty::Bool), yes);
        }
        match self.path(e) {
            Some((path, at)) => match self.lookup(&path, at, e.id) {
                Some((ty, slot)) => (Some(ty), self.slot(slot, e.id)),
                None => (None, e.clone()),
            },
            None => {
                // A field of something computed: no type of ours but the variables has fields.
                let Expr::Select(select) = &e.expr else { return (None, e.clone()) };
                let (ty, _) = self.expr(&select.operand, depth + 1);
                if let Some(ty) = ty {
                    let at = self.place(e.id);
                    self.wrong(at, format!("{} has no field `{}`", article(&ty.to_string()), select.field), None);
                }
                (None, e.clone())
            }
        }
    }

    fn lookup(&mut self, path: &[String], at: Range<usize>, _id: u64) -> Option<(Ty, Slot)> {
        let joined = path.join(".");
        let segments: Vec<&str> = path.iter().map(String::as_str).collect();
        if let Some(n) = TABLE.iter().position(|v| v.path == joined) {
            return Some(((TABLE[n].ty)(), Slot::Fixed(n)));
        }
        match segments.as_slice() {
            ["request", "needs"] => return Some((Ty::List(Box::new(Ty::Text)), Slot::Needs)),
            ["request", "metadata"] => return Some((Ty::Map, Slot::Metadata)),
            ["request", "metadata", key] => return Some((Ty::Text, Slot::MetadataKey((*key).to_owned()))),
            ["signals", "similarity", name] => {
                if self.names.examples.contains(name) {
                    return Some((Ty::Double, Slot::Similarity((*name).to_owned())));
                }
                let help = match self.names.examples.is_empty() {
                    true => Some(format!("define `{name}` under `examples:`")),
                    false => suggest("example sets", name, self.names.examples.iter().copied()),
                };
                self.wrong(at, format!("there is no example set `{name}`"), help);
                return None;
            }
            ["fleet", rest @ ..] if !rest.is_empty() => return self.fleet(rest, at),
            _ => {}
        }
        let all: Vec<String> = super::variables::reference().into_iter().map(|d| d.name).collect();
        // Something below a variable, or a group of variables?
        if let Some(v) = TABLE.iter().find(|v| joined.strip_prefix(v.path).is_some_and(|rest| rest.starts_with('.'))) {
            self.wrong(at, format!("`{}` is {} and has no fields", v.path, article(&(v.ty)().to_string())), None);
            return None;
        }
        let members: Vec<&str> = all
            .iter()
            .filter(|n| n.strip_prefix(joined.as_str()).is_some_and(|rest| rest.starts_with('.')))
            .map(String::as_str)
            .collect();
        if !members.is_empty() {
            self.wrong(
                at,
                format!("`{joined}` is a group of variables, not a value"),
                Some(format!("name one of them: {}", members.join(", "))),
            );
            return None;
        }
        let near = nearest(&joined, all.iter().map(String::as_str)).map(str::to_owned).or_else(|| {
            let last = segments.last().copied().unwrap_or_default();
            let tail = |n: &&String| n.rsplit('.').next().is_some_and(|t| nearest(last, [t]).is_some());
            all.iter().find(tail).cloned()
        });
        let help = match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => match segments.split_last() {
                Some((_, group)) if !group.is_empty() && all.iter().any(|n| n.starts_with(&(group.join(".") + "."))) => {
                    let prefix = group.join(".") + ".";
                    let known: Vec<&str> = all.iter().filter(|n| n.starts_with(&prefix)).map(String::as_str).collect();
                    format!("known are: {}", known.join(", "))
                }
                _ => "variables begin with `request.`, `signals.`, `session.`, `key.` or `fleet.`; text is written in quotes".to_owned(),
            },
        };
        self.wrong(at, format!("there is no variable `{joined}`"), Some(help));
        None
    }

    fn fleet(&mut self, rest: &[&str], at: Range<usize>) -> Option<(Ty, Slot)> {
        let name = rest[0];
        if !self.names.fleet.contains(&name) {
            let dotted = rest.len() > 2;
            let help = match suggest("fleet entries", name, self.names.fleet.iter().copied()) {
                _ if dotted => {
                    Some("a name with dots or dashes goes in brackets: `fleet[\"gpt-4.1\"].running`".to_owned())
                }
                help => help,
            };
            self.wrong(at, format!("there is no fleet entry `{name}`"), help);
            return None;
        }
        let fields: Vec<&str> = FLEET.iter().map(|f| f.0).collect();
        let [_, field] = rest else {
            let message = format!("`fleet.{}` is not a value", rest.join("."));
            self.wrong(at, message, Some(format!("its fields: {}", fields.join(", "))));
            return None;
        };
        match FLEET.iter().position(|f| f.0 == *field) {
            Some(n) => Some(((FLEET[n].1)(), Slot::Fleet(name.to_owned(), n))),
            None => {
                let help = suggest("fields", field, fields.iter().copied());
                self.wrong(at, format!("a fleet entry has no `{field}`"), help);
                None
            }
        }
    }

    fn call(&mut self, e: &IdedExpr, call: &CallExpr, depth: usize) -> Typed {
        let mut lowered = call.clone();
        let mut types = Vec::new();
        let mut whole = true;
        if let Some(target) = &call.target {
            // `optional.of(x)`: a namespace, not a variable.
            if matches!(&target.expr, Expr::Ident(n) if n == "optional" || n == "base64" || n == "math") {
                let at = self.place(e.id);
                return (self.wrong(at, format!("there is no function `{}`", call.func_name), None), e.clone());
            }
            let (ty, expr) = self.expr(target, depth + 1);
            whole &= ty.is_some();
            types.push(ty.unwrap_or(Ty::Any));
            lowered.target = Some(Box::new(expr));
        }
        for (arg, out) in call.args.iter().zip(&mut lowered.args) {
            let (ty, expr) = self.expr(arg, depth + 1);
            whole &= ty.is_some();
            types.push(ty.unwrap_or(Ty::Any));
            *out = expr;
        }
        let name = call.func_name.as_str();
        let known = FUNCTIONS.contains(&name) || operator(name).is_some();
        if !known {
            let at = self.named(e.id, name);
            let help = suggest("functions", name, FUNCTIONS.iter().copied());
            return (self.wrong(at, format!("there is no function `{name}`"), help), e.clone());
        }
        if !whole {
            return (None, e.clone());
        }
        if name == "matches" {
            return self.matches(e, call, &types, lowered);
        }
        let result = match operator(name) {
            Some(_) => operation(name, &types),
            None => function(name, call.target.is_some(), &types),
        };
        match result {
            Ok(ty) => (Some(ty), IdedExpr { id: e.id, expr: Expr::Call(lowered) }),
            Err(help) => {
                let shown: Vec<String> = types.iter().map(Ty::to_string).collect();
                let (at, message) = match operator(name) {
                    Some(symbol) => {
                        let at = call.args.first().zip(call.args.last()).map_or(self.place(e.id), |(a, b)| {
                            let (a, b) = (self.extent(a), self.extent(b));
                            a.start.min(b.start)..a.end.max(b.end)
                        });
                        (at, format!("`{symbol}` cannot take {}", shown.join(" and ")))
                    }
                    None => (
                        self.named(e.id, name),
                        format!(
                            "`{name}` cannot take {}",
                            match shown.len() {
                                0 => "nothing".to_owned(),
                                _ => shown.join(" and "),
                            }
                        ),
                    ),
                };
                (self.wrong(at, message, help), e.clone())
            }
        }
    }

    /// From the first byte of an expression to its last, as well as the parser tells.
    fn extent(&self, e: &IdedExpr) -> Range<usize> {
        if let Some((_, at)) = self.path(e) {
            return at;
        }
        let mut at = self.place(e.id);
        if let Expr::Call(call) = &e.expr {
            for part in call.target.as_deref().into_iter().chain(&call.args) {
                let inner = self.extent(part);
                at = at.start.min(inner.start)..at.end.max(inner.end);
            }
        }
        at
    }

    /// The place of a function's name: a call's own place is its bracket.
    fn named(&self, id: u64, name: &str) -> Range<usize> {
        let at = self.place(id);
        let before = self.text.get(..at.end).and_then(|s| s.rfind(name));
        let start = before.or_else(|| self.text.find(name)).unwrap_or(at.start);
        start..(start + name.len()).min(self.text.len())
    }

    /// `x.matches("...")`: the pattern is compiled here, once, so that it cannot fail or cost later.
    fn matches(&mut self, e: &IdedExpr, call: &CallExpr, types: &[Ty], lowered: CallExpr) -> Typed {
        let at = self.named(e.id, "matches");
        if types != [Ty::Text, Ty::Text] {
            return (
                self.wrong(
                    at,
                    "`matches` takes a string and a pattern",
                    Some("e.g. `request.model.matches(\"^gpt-\")`".into()),
                ),
                e.clone(),
            );
        }
        let mut parts: Vec<IdedExpr> = lowered.target.map(|t| *t).into_iter().chain(lowered.args).collect();
        let pattern = match call.args.last().map(|a| &a.expr) {
            Some(Expr::Literal(LiteralValue::String(s))) => s.inner().to_owned(),
            _ => return (self.wrong(at, "the pattern of `matches` must be written out", None), e.clone()),
        };
        match RegexBuilder::new(&pattern).size_limit(1 << 20).build() {
            Ok(regex) => {
                self.program.regexes.push(regex);
                parts.truncate(1);
                let call =
                    CallExpr { func_name: regex_name(self.program.regexes.len() - 1), target: None, args: parts };
                (Some(Ty::Bool), IdedExpr { id: e.id, expr: Expr::Call(call) })
            }
            Err(error) => {
                let at = call.args.last().map_or(at, |a| self.place(a.id));
                let error = error.to_string();
                let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
                (self.wrong(at, format!("this is not a regular expression: {reason}"), None), e.clone())
            }
        }
    }

    fn comprehension(&mut self, e: &IdedExpr, c: &ComprehensionExpr, depth: usize) -> Typed {
        let (range, iter_range) = self.expr(&c.iter_range, depth + 1);
        let element = match range {
            Some(Ty::List(element)) => *element,
            Some(Ty::Map) => {
                let at = self.extent(&c.iter_range);
                let help = "a map has no order; test for single keys: `has(request.metadata.KEY)`";
                return (self.wrong(at, "a map cannot be walked through", Some(help.into())), e.clone());
            }
            Some(other) => {
                let at = self.extent(&c.iter_range);
                return (
                    self.wrong(
                        at,
                        format!("only a list can be walked through; this is {}", article(&other.to_string())),
                        None,
                    ),
                    e.clone(),
                );
            }
            None => return (None, e.clone()),
        };
        if c.iter_var2.is_some() {
            let at = self.place(e.id);
            return (self.wrong(at, "comprehensions take one variable here", None), e.clone());
        }
        let (start, accu_init) = self.expr(&c.accu_init, depth + 1);
        let Some(start) = start else { return (None, e.clone()) };
        let locals = self.locals.len();
        self.locals.push((c.iter_var.clone(), element));
        self.locals.push((c.accu_var.clone(), start.clone()));
        let (going, loop_cond) = self.expr(&c.loop_cond, depth + 1);
        let (step, loop_step) = self.expr(&c.loop_step, depth + 1);
        let total = step.and_then(|step| unify(&start, &step));
        if let (Some(total), Some(last)) = (&total, self.locals.last_mut()) {
            last.1 = total.clone();
        }
        let (result, lowered_result) = self.expr(&c.result, depth + 1);
        self.locals.truncate(locals);
        let whole = going.is_some() && total.is_some();
        let lowered =
            ComprehensionExpr { iter_range, accu_init, loop_cond, loop_step, result: lowered_result, ..c.clone() };
        (result.filter(|_| whole), IdedExpr { id: e.id, expr: Expr::Comprehension(Box::new(lowered)) })
    }
}
