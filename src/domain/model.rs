//! The fleet: which models there are, what they cost and what they can do.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// USD per million tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Price {
    pub input: f64,
    pub output: f64,
    /// Input tokens that the server had cached; `input` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<f64>,
}

impl Price {
    /// Cost in USD of a call.
    pub fn cost(&self, usage: &super::Usage) -> f64 {
        let cached = f64::from(usage.cached_tokens);
        let fresh = f64::from(usage.prompt_tokens) - cached;
        (fresh * self.input
            + cached * self.cached_input.unwrap_or(self.input)
            + f64::from(usage.completion_tokens) * self.output)
            / 1e6
    }
}

/// Joules per token, as somebody has measured the model to take: what its server draws, divided by what it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Energy {
    pub input: f64,
    pub output: f64,
}

impl Energy {
    /// Joules of a call. Of the whole call, so that a model pays for its verbosity.
    pub fn joules(&self, usage: &super::Usage) -> f64 {
        f64::from(usage.prompt_tokens) * self.input + f64::from(usage.completion_tokens) * self.output
    }
}

/// Something that a request may need of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    Tools,
    ResponseFormat,
    Images,
    Audio,
    Logprobs,
}

impl Need {
    /// All needs.
    pub const ALL: [Need; 5] = [Need::Tools, Need::ResponseFormat, Need::Images, Need::Audio, Need::Logprobs];

    /// The word used in records and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Need::Tools => "tools",
            Need::ResponseFormat => "response_format",
            Need::Images => "images",
            Need::Audio => "audio",
            Need::Logprobs => "logprobs",
        }
    }
}

/// What a model can do. Remote models are believed to do everything unless configured otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Capabilities {
    pub tools: bool,
    pub response_format: bool,
    pub images: bool,
    pub audio: bool,
    pub logprobs: bool,
    /// Goes on from an answer that has begun, as reasoning steps need it: models in the process, and servers that know
    /// `continue_final_message` (vLLM, SGLang). No remote model is believed to.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub continuation: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { tools: true, response_format: true, images: true, audio: true, logprobs: true, continuation: false }
    }
}

impl Capabilities {
    /// Text in, text out, with log-probabilities: what in-process models do.
    pub fn text_only() -> Self {
        Self { tools: false, response_format: false, images: false, audio: false, logprobs: true, continuation: true }
    }

    /// Whether the model can do what `need` names.
    pub fn has(&self, need: Need) -> bool {
        match need {
            Need::Tools => self.tools,
            Need::ResponseFormat => self.response_format,
            Need::Images => self.images,
            Need::Audio => self.audio,
            Need::Logprobs => self.logprobs,
        }
    }
}

/// One entry of the fleet, as policies see it. Where it runs is the backend's business.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name within the fleet; unique.
    pub name: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Longest prompt plus answer, in tokens; 0 when unknown.
    #[serde(default)]
    pub context: u32,
    #[serde(default)]
    pub price: Price,
    /// Absent where nobody has measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<Energy>,
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// All models of a weir by name. Ordered, because it is hashed and compiled into policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fleet(pub BTreeMap<String, ModelCard>);

impl Fleet {
    /// A fleet of these cards; a later card of the same name replaces an earlier one.
    pub fn new(cards: impl IntoIterator<Item = ModelCard>) -> Self {
        Self(cards.into_iter().map(|card| (card.name.clone(), card)).collect())
    }

    pub fn get(&self, name: &str) -> Option<&ModelCard> {
        self.0.get(name)
    }

    /// The cards that carry `tag`, in name order.
    pub fn tagged<'a>(&'a self, tag: &'a str) -> impl Iterator<Item = &'a ModelCard> {
        self.0.values().filter(move |card| card.tags.iter().any(|t| t == tag))
    }
}
