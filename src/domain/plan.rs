//! The call: the leaf of every plan, and what it is sampled with. The tree above it is [`super::Plan`].

use serde::{Deserialize, Serialize};

use super::Spend;

/// Sampling parameters, as a client asks for them or as a plan overrides them. `None` means: not said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Upper bound on generated tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
}

impl Sampling {
    /// These parameters, with what `over` says taking precedence; stop strings of both count.
    pub fn overridden_by(&self, over: &Sampling) -> Sampling {
        let mut stop = self.stop.clone();
        stop.extend(over.stop.iter().filter(|s| !self.stop.contains(s)).cloned());
        Sampling {
            max_tokens: over.max_tokens.or(self.max_tokens),
            temperature: over.temperature.or(self.temperature),
            top_p: over.top_p.or(self.top_p),
            seed: over.seed.or(self.seed),
            stop,
        }
    }
}

/// One call of one model: the leaf of every plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CallSpec {
    /// Name of a fleet entry.
    pub model: String,
    /// What the plan sets where the client did not, or (`max_tokens`) where the client asked for more.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sampling: Sampling,
    /// Text put before the client's system prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// What the plan sets holds also where the client said otherwise, as of probes, whose answers have to differ.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub firm: bool,
    /// The most that it can use for this request, in decisions whose budgets bound what runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Spend>,
}

fn is_default(sampling: &Sampling) -> bool {
    *sampling == Sampling::default()
}

impl CallSpec {
    /// The plan of a bare model: one call, nothing overridden.
    pub fn bare(model: impl Into<String>) -> Self {
        Self { model: model.into(), sampling: Sampling::default(), system: None, firm: false, worst: None }
    }

    /// What the call is sampled with: the plan's parameters where `client` said nothing (of a firm call always), the lower
    /// of both `max_tokens`, the stop strings of both (the client's first).
    pub fn sampling_for(&self, client: &Sampling) -> Sampling {
        let mut sampling = match self.firm {
            true => client.overridden_by(&self.sampling),
            false => self.sampling.overridden_by(client),
        };
        sampling.stop.clone_from(&client.stop);
        sampling.stop.extend(self.sampling.stop.iter().filter(|s| !client.stop.contains(s)).cloned());
        if let (Some(plan), Some(asked)) = (self.sampling.max_tokens, client.max_tokens) {
            sampling.max_tokens = Some(plan.min(asked));
        }
        sampling
    }
}
