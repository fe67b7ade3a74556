//! The variables of conditions: one table, from which the checker, the evaluator, the reference (`weir policy schema
//! --variables`) and the hints of error messages are made. The names are the JSON form of a
//! [`Context`](crate::domain::Context); a test holds the two together.

use cel::common::{
    types::{CelBool, CelDouble, CelInt, CelList, CelString},
    value::{CowVal, Val},
};
use serde::Serialize;

use crate::domain::{Context, ModelState};

/// A type of the condition language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
    Bool,
    Int,
    Uint,
    Double,
    Text,
    List(Box<Ty>),
    /// From text to text.
    Map,
    /// The element of an empty list: fits anything.
    Any,
}

impl std::fmt::Display for Ty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ty::Bool => f.write_str("bool"),
            Ty::Int => f.write_str("int"),
            Ty::Uint => f.write_str("uint"),
            Ty::Double => f.write_str("double"),
            Ty::Text => f.write_str("string"),
            Ty::List(of) => write!(f, "list({of})"),
            Ty::Map => f.write_str("map(string, string)"),
            Ty::Any => f.write_str("any"),
        }
    }
}

/// One variable.
pub(super) struct Variable {
    pub path: &'static str,
    pub ty: fn() -> Ty,
    pub doc: &'static str,
    get: for<'a> fn(&'a Context) -> CowVal<'a, 'a>,
}

fn boolean<'a>(b: bool) -> CowVal<'a, 'a> {
    CowVal::owned(CelBool::from(b))
}

fn int<'a>(n: u32) -> CowVal<'a, 'a> {
    CowVal::owned(CelInt::from(i64::from(n)))
}

fn double<'a>(x: f64) -> CowVal<'a, 'a> {
    CowVal::owned(CelDouble::from(x))
}

fn text(s: &str) -> CowVal<'_, '_> {
    CowVal::owned(CelString::from(s))
}

/// The metadata as one value. CEL's map is unordered, but the checker lets conditions only ask for a key or the size, so
/// that no order can show.
fn metadata(context: &Context) -> CowVal<'_, '_> {
    let value = cel::to_value(&context.request.metadata).ok().and_then(|v| Box::<dyn Val>::try_from(v).ok());
    value.map_or_else(|| text(""), CowVal::Owned)
}

macro_rules! variables {
    ($($path:literal, $ty:ident, $doc:literal, $get:expr;)*) => {
        /// All variables with a fixed name, in the order of the reference.
        pub(super) const TABLE: &[Variable] = &[$(Variable { path: $path, ty: || Ty::$ty, doc: $doc, get: $get },)*];
    };
}

variables! {
    "request.model", Text, "what the client wrote as `model`", |c| text(&c.request.model);
    "request.stream", Bool, "whether the client wants a stream", |c| boolean(c.request.stream);
    "request.max_tokens", Int, "what the client asked for; 0 when it did not say", |c| int(c.request.max_tokens);
    "request.n", Int, "number of choices asked for", |c| int(c.request.n);
    "request.client_retry", Int, "above 0: the client repeats a request on its own account", |c| int(c.request.client_retry);
    "signals.tokens", Int, "prompt tokens of the whole conversation", |c| int(c.signals.tokens);
    "signals.query_tokens", Int, "tokens of the query alone", |c| int(c.signals.query_tokens);
    "signals.language", Text, "ISO 639-1 code of the query's language, or `und`", |c| text(&c.signals.language);
    "signals.code_share", Double, "share of the query's lines that look like code, 0 to 1", |c| double(c.signals.code_share);
    "signals.complexity", Double, "100 minus Flesch reading ease, 0 to 100", |c| double(c.signals.complexity);
    "signals.turn", Int, "number of user messages, 1 for a first question", |c| int(c.signals.turn);
    "signals.system_prompt", Text, "first 16 hexadecimal digits of the system prompt's BLAKE3; empty without one", |c| text(&c.signals.system_prompt);
    "signals.tools", Bool, "whether tools were asked for", |c| boolean(c.signals.tools);
    "signals.response_format", Bool, "whether a response format was asked for", |c| boolean(c.signals.response_format);
    "signals.embedded", Bool, "whether the query was embedded", |c| boolean(c.signals.embedded);
    "signals.pii.count", Int, "personal data found by pattern, all kinds", |c| int(c.signals.pii.count);
    "signals.pii.email", Int, "email addresses", |c| int(c.signals.pii.email);
    "signals.pii.phone", Int, "telephone numbers", |c| int(c.signals.pii.phone);
    "signals.pii.card", Int, "digit runs that pass the Luhn check", |c| int(c.signals.pii.card);
    "signals.pii.iban", Int, "IBANs", |c| int(c.signals.pii.iban);
    "signals.pii.ssn", Int, "social security numbers", |c| int(c.signals.pii.ssn);
    "session.id", Text, "hash of the session id; empty without one", |c| text(&c.session.id);
    "session.turn", Int, "requests of this session decided before, plus one", |c| int(c.session.turn);
    "session.last_arm", Text, "arm of the session's last decision; empty for a first one", |c| text(&c.session.last_arm);
    "session.last_model", Text, "model whose answer the session got last; empty where none has ended", |c| text(&c.session.last_model);
    "session.last_tokens", Int, "tokens of that answer and of the prompt before it", |c| int(c.session.last_tokens);
    "session.spent_usd", Double, "what the session has cost within its budget's time; 0 without a budget per session", |c| double(c.session.spent_usd);
    "session.spent_tokens", Double, "tokens of prompts and answers that the session has used within its budget's time; 0 without a budget per session", |c| double(c.session.spent_tokens);
    "session.spent_calls", Double, "calls that the session has made within its budget's time; 0 without a budget per session", |c| double(c.session.spent_calls);
    "session.spent_s", Double, "seconds that the session's requests took within its budget's time; 0 without a budget per session", |c| double(c.session.spent_s);
    "key.id", Text, "name of the API key as configured; empty without authentication", |c| text(&c.key.id);
    "key.tenant", Text, "tenant of the key", |c| text(&c.key.tenant);
    "key.tier", Text, "tier of the key", |c| text(&c.key.tier);
    "key.spent_usd", Double, "what the key has cost within its budget's time; 0 without a budget per key", |c| double(c.key.spent_usd);
    "key.spent_tokens", Double, "tokens of prompts and answers that the key has used within its budget's time; 0 without a budget per key", |c| double(c.key.spent_tokens);
    "key.spent_calls", Double, "calls that the key has made within its budget's time; 0 without a budget per key", |c| double(c.key.spent_calls);
    "key.spent_s", Double, "seconds that the key's requests took within its budget's time; 0 without a budget per key", |c| double(c.key.spent_s);
    "key.tenant_spent_usd", Double, "what the tenant has cost within its budget's time; 0 without a budget per tenant", |c| double(c.key.tenant_spent_usd);
    "key.tenant_spent_tokens", Double, "tokens of prompts and answers that the tenant has used within its budget's time; 0 without a budget per tenant", |c| double(c.key.tenant_spent_tokens);
    "key.tenant_spent_calls", Double, "calls that the tenant has made within its budget's time; 0 without a budget per tenant", |c| double(c.key.tenant_spent_calls);
    "key.tenant_spent_s", Double, "seconds that the tenant's requests took within its budget's time; 0 without a budget per tenant", |c| double(c.key.tenant_spent_s);
}

/// A field of a fleet entry's state: name, type, meaning.
type Field = (&'static str, fn() -> Ty, &'static str);

/// The fields of one fleet entry's state, `fleet.NAME.FIELD`.
pub(super) const FLEET: &[Field] = &[
    ("available", || Ty::Bool, "whether calls may be sent there at all"),
    ("running", || Ty::Int, "calls under way"),
    ("waiting", || Ty::Int, "calls waiting for a place"),
    ("ttft_ms", || Ty::Double, "recent mean time to the first token in milliseconds; 0 where nothing was measured yet"),
    ("tokens_per_s", || Ty::Double, "recent mean rate of answer tokens of a call; 0 where nothing was measured yet"),
    ("failed_share", || Ty::Double, "share of its last calls that failed, 0 to 1, where a breaker counts them"),
    (
        "limit_used",
        || Ty::Double,
        "share of its server's rate limit that is used, 0 to 1, where the server reports one",
    ),
    (
        "pending_tokens",
        || Ty::Int,
        "tokens of prompts still to be computed before a request that comes now; of in-process models",
    ),
    (
        "prefill_tokens_per_s",
        || Ty::Double,
        "recent rate at which an in-process model computes prompts; 0 where nothing was measured yet",
    ),
    (
        "decode_tokens_per_s",
        || Ty::Double,
        "recent rate at which each running answer of an in-process model goes on; 0 where nothing was measured yet",
    ),
    (PROMPT_TOKENS, || Ty::Int, "tokens of this prompt for an in-process model; 0 for others"),
    (
        RESIDENT_TOKENS,
        || Ty::Int,
        "tokens of this prompt whose keys and values an in-process model has already, so that they cost nothing; 0 for others",
    ),
];

/// What is only known once the prompt has been tokenised for the model.
const PROMPT_TOKENS: &str = "prompt_tokens";
const RESIDENT_TOKENS: &str = "resident_tokens";

/// What a lowered condition reads.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Slot {
    /// An entry of [`TABLE`].
    Fixed(usize),
    /// `request.needs`.
    Needs,
    /// `request.metadata`, for `in`, `size` and computed keys.
    Metadata,
    /// `request.metadata.KEY`.
    MetadataKey(String),
    /// `has(request.metadata.KEY)`.
    HasMetadata(String),
    /// `signals.similarity.NAME`.
    Similarity(String),
    /// `fleet.NAME.FIELD`: the entry's name and the field's place in [`FLEET`].
    Fleet(String, usize),
}

impl Slot {
    /// The value in this context; `None` when there is none (a metadata key that the request does not have).
    pub fn read<'a>(&self, context: &'a Context) -> Option<CowVal<'a, 'a>> {
        Some(match self {
            Slot::Fixed(n) => (TABLE.get(*n)?.get)(context),
            Slot::Needs => {
                let needs: Vec<Box<dyn Val + 'a>> = context
                    .request
                    .needs
                    .iter()
                    .map(|need| Box::new(CelString::from(need.as_str())) as Box<dyn Val + 'a>)
                    .collect();
                CowVal::owned(CelList::from(needs))
            }
            // The map is only ever asked for a key or its size, so the order of its entries cannot show.
            Slot::Metadata => metadata(context),
            Slot::MetadataKey(key) => text(context.request.metadata.get(key)?),
            Slot::HasMetadata(key) => boolean(context.request.metadata.contains_key(key)),
            Slot::Similarity(name) => double(context.signals.similarity.get(name).copied().unwrap_or(-1.0)),
            Slot::Fleet(name, field) => {
                let idle = ModelState { available: true, ..ModelState::default() };
                let state = context.fleet.get(name).unwrap_or(&idle);
                match field {
                    0 => boolean(state.available),
                    1 => int(state.running),
                    2 => int(state.waiting),
                    3 => double(state.ttft_ms),
                    4 => double(state.tokens_per_s),
                    5 => double(state.failed_share),
                    6 => double(state.limit_used),
                    7 => int(state.pending_tokens),
                    8 => double(state.prefill_tokens_per_s),
                    9 => double(state.decode_tokens_per_s),
                    10 => int(state.prompt_tokens),
                    _ => int(state.resident_tokens),
                }
            }
        })
    }

    /// Whether the prompt must have been tokenised for a model.
    pub fn is_residency(&self) -> bool {
        matches!(self, Slot::Fleet(_, field) if [PROMPT_TOKENS, RESIDENT_TOKENS].contains(&FLEET[*field].0))
    }

    /// The variable as it was written.
    pub fn name(&self) -> String {
        match self {
            Slot::Fixed(n) => TABLE.get(*n).map_or_else(String::new, |v| v.path.to_owned()),
            Slot::Needs => "request.needs".to_owned(),
            Slot::Metadata => "request.metadata".to_owned(),
            Slot::MetadataKey(key) | Slot::HasMetadata(key) => format!("request.metadata[{key:?}]"),
            Slot::Similarity(name) => format!("signals.similarity.{name}"),
            Slot::Fleet(name, field) => format!("fleet[{name:?}].{}", FLEET[*field].0),
        }
    }
}

/// One line of the reference of variables.
#[derive(Clone, Debug, Serialize)]
pub struct Documented {
    pub name: String,
    #[serde(rename = "type")]
    pub ty: String,
    pub doc: String,
}

/// The reference of all variables, for people and for editors.
pub fn reference() -> Vec<Documented> {
    let entry = |name: &str, ty: Ty, doc: &str| Documented { name: name.into(), ty: ty.to_string(), doc: doc.into() };
    let mut out: Vec<Documented> = TABLE.iter().map(|v| entry(v.path, (v.ty)(), v.doc)).collect();
    out.push(entry(
        "request.needs",
        Ty::List(Box::new(Ty::Text)),
        "what a model must be able to do: `tools`, `response_format`, `images`, `audio`, `logprobs`",
    ));
    out.push(entry(
        "request.metadata",
        Ty::Map,
        "the client's metadata; test with `has(request.metadata.KEY)` before reading",
    ));
    out.push(entry(
        "signals.similarity.NAME",
        Ty::Double,
        "greatest cosine to a text of the example set; -1 without an embedding",
    ));
    for (field, ty, doc) in FLEET {
        out.push(entry(&format!("fleet.NAME.{field}"), ty(), doc));
    }
    out
}
