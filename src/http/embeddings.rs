//! `POST /v1/embeddings`: OpenAI's shape over the gateway's embedder.

use std::{borrow::Cow, fmt, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, SeqAccess, Unexpected, Visitor},
};
use utoipa::ToSchema;

use super::{
    App,
    auth::Authorized,
    body,
    error::{ApiError, ErrorBody},
    wire::parse::{self, Integer, Invalid},
};
use crate::domain::canonical;

/// OpenAI's limit on texts in one request.
const MAX_TEXTS: usize = 2048;

/// Texts to embed.
#[derive(Deserialize, ToSchema)]
#[schema(as = EmbeddingRequest)]
pub(super) struct Body<'a> {
    /// The embedder (`GET /v1/models`), or `auto`.
    #[serde(borrow, default)]
    #[schema(value_type = String, required)]
    model: Option<Cow<'a, str>>,
    /// A string, or an array of at most 2048.
    #[serde(default)]
    #[schema(value_type = Vec<String>, required)]
    input: Option<Input>,
    /// `float` or `base64` (little-endian f32).
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    encoding_format: Option<Format>,
    /// Only the embedder's own number is possible.
    #[serde(default)]
    #[schema(value_type = Option<u32>)]
    dimensions: Option<Integer>,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Float,
    Base64,
}

/// Texts to embed, from a string or an array of strings.
struct Input(Vec<String>);

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Input;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string or an array of strings (token ids are of another model's vocabulary: send the text)",
                )
            }

            fn visit_str<E>(self, text: &str) -> Result<Input, E> {
                Ok(Input(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = seq.next_element::<Text>()? {
                    texts.push(text.0);
                }
                Ok(Input(texts))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// A string; token ids in its place get the input's own words rather than `expected a string`.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string (token ids are of another model's vocabulary: send the text)")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Text, A::Error> {
                Err(A::Error::invalid_type(Unexpected::Seq, &self))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// Vectors, in the order of the texts.
#[derive(Serialize, ToSchema)]
#[schema(as = EmbeddingList)]
pub(super) struct ListBody<'a> {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<EmbeddingBody>,
    model: &'a str,
    usage: EmbeddingUsage,
}

/// One text's vector.
#[derive(Serialize, ToSchema)]
#[schema(as = Embedding)]
struct EmbeddingBody {
    #[schema(example = "embedding")]
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// Numbers, or with `encoding_format: base64` their little-endian f32 bytes in base64.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    #[schema(value_type = Vec<f32>)]
    Float(Arc<[f32]>),
    Base64(String),
}

/// Tokens embedded.
#[derive(Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// Embeds texts.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "embeddings",
    request_body = Body,
    responses(
        (status = 200, body = ListBody),
        (status = 400, body = ErrorBody, description = "The request is wrong; `param` names the field"),
        (status = 401, body = ErrorBody, description = "No or a wrong key"),
        (status = 404, body = ErrorBody, description = "No such thing"),
        (status = 413, body = ErrorBody, description = "The body is too large"),
        (status = 503, body = ErrorBody, description = "weir cannot do this now"),
    )
)]
pub(super) async fn embeddings(
    State(app): State<Arc<App>>,
    Authorized(_): Authorized,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = body::read(body, &parts.headers, app.body_limit).await?;
    let body: Body<'_> = parse::object(&bytes)?;
    let model = body.model.filter(|model| !model.is_empty()).ok_or_else(|| {
        Invalid::missing("model", "You must provide 'model': the embedder's name (GET /v1/models), or 'auto'.")
    })?;
    let texts = check(body.input)?;
    let embedded = app.service.embeddings(&model, texts).await?;

    if let (Some(Integer(wanted)), Some(vector)) = (body.dimensions, embedded.vectors.first())
        && usize::try_from(wanted) != Ok(vector.len())
    {
        let message = format!("'dimensions' is {wanted}, but `{}` has {}; leave it out.", embedded.model, vector.len());
        return Err(Invalid::value("dimensions", message).into());
    }
    let format = body.encoding_format.unwrap_or_default();
    let data = embedded
        .vectors
        .into_iter()
        .enumerate()
        .map(|(index, vector)| EmbeddingBody {
            object: "embedding",
            index,
            embedding: match format {
                Format::Float => Vector::Float(vector),
                Format::Base64 => Vector::Base64(canonical::vector_to_base64(&vector)),
            },
        })
        .collect();
    let usage = EmbeddingUsage { prompt_tokens: embedded.tokens, total_tokens: embedded.tokens };
    Ok(Json(ListBody { object: "list", data, model: &embedded.model, usage }).into_response())
}

fn check(input: Option<Input>) -> Result<Vec<String>, Invalid> {
    let Input(texts) = input.ok_or_else(|| {
        Invalid::missing("input", "You must provide 'input': a string or an array of strings to embed.")
    })?;
    if texts.is_empty() {
        return Err(Invalid::value("input", "'input' is an empty array; it needs at least one string."));
    }
    if texts.len() > MAX_TEXTS {
        let message = format!("'input' has {} strings; {MAX_TEXTS} are allowed in one request.", texts.len());
        return Err(Invalid::value("input", message));
    }
    if let Some(i) = texts.iter().position(String::is_empty) {
        let param = format!("input[{i}]");
        return Err(Invalid::value(&param, format!("'{param}' is an empty string, which has no embedding.")));
    }
    Ok(texts)
}
