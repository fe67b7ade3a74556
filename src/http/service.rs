//! What the HTTP edge asks of the house behind it: one trait with the gateway's methods, so that the edge can be tested
//! over a real socket with a fake. Whoever implements it knows neither status codes nor JSON shapes of OpenAI.

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::Value;
use utoipa::IntoParams;

use crate::{
    audit::DecisionFilter,
    domain::{DecisionId, Feedback, KvAnswer, KvCommand, OutcomeStatus, Request},
    gateway::{Answer, Caller, Embedded, Explained, FleetStatus, Gateway, GatewayError, Readiness, Served},
};

/// The gateway as the HTTP edge sees it. Every method may be called from many tasks at once; dropping a future, or the
/// stream of an [`Answer`], means that the client has left.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Decides, calls and answers. Returns once the first call was accepted; a stream goes on afterwards.
    async fn chat(&self, request: Request, caller: Caller) -> Result<Answer, GatewayError>;

    /// Decides and calls nothing.
    async fn decide(&self, request: Request, caller: Caller) -> Result<Explained, GatewayError>;

    /// One vector per text, in order.
    async fn embeddings(&self, model: &str, texts: Vec<String>) -> Result<Embedded, GatewayError>;

    /// Every name that `model` may hold.
    fn served(&self) -> Vec<Served>;

    /// All entries of the fleet, and how they are.
    fn fleet(&self) -> Vec<FleetStatus>;

    /// Loads or unloads a model that runs in this process; gives how it is then.
    async fn set_loaded(&self, name: &str, loaded: bool) -> Result<FleetStatus, GatewayError>;

    /// What a model in this process keeps of keys and values: asked for, computed beforehand, let go.
    async fn kv(&self, name: &str, command: KvCommand) -> Result<KvAnswer, GatewayError>;

    /// Records a judgement; `false` when its idempotency key was seen before.
    async fn feedback(&self, id: DecisionId, feedback: Feedback) -> Result<bool, GatewayError>;

    /// Rows of the record, newest first, at most `query.limit`, each an object with an `id`.
    async fn decisions(&self, query: DecisionsQuery) -> Result<Vec<Value>, GatewayError>;

    /// One decision whole: record, context, candidates, attempts, outcome, feedback.
    async fn decision(&self, id: DecisionId) -> Result<Value, GatewayError>;

    /// Whether requests can be served, and what keeps them from it.
    async fn readiness(&self) -> Readiness;

    /// All metrics as OpenMetrics text.
    fn metrics(&self) -> String;
}

/// Which decisions to list. A filter that is absent lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields, default)]
pub struct DecisionsQuery {
    /// Rows at most, 1 to 1000; 20 when absent.
    pub limit: Option<u32>,
    /// Only decisions older than this one: the page after the one that ended with it.
    #[param(value_type = Option<String>)]
    pub before: Option<DecisionId>,
    /// Only decisions newer than this one.
    #[param(value_type = Option<String>)]
    pub after: Option<DecisionId>,
    /// Policy name.
    pub policy: Option<String>,
    /// Arm that was taken.
    pub arm: Option<String>,
    /// Model whose answer the client got.
    pub model: Option<String>,
    /// `ok`, `error`, `cancelled`, `refused` or `interrupted`.
    #[param(value_type = Option<String>)]
    pub status: Option<OutcomeStatus>,
    /// Session as recorded (a hash).
    pub session: Option<String>,
    /// Tenant of the key.
    pub tenant: Option<String>,
}

impl From<DecisionsQuery> for DecisionFilter {
    fn from(query: DecisionsQuery) -> Self {
        Self {
            limit: query.limit.or(Some(20)),
            before: query.before,
            after: query.after,
            policy: query.policy,
            arm: query.arm,
            model: query.model,
            status: query.status.map(|s| s.as_str().to_owned()),
            session: query.session,
            tenant: query.tenant,
            ..Self::default()
        }
    }
}

#[async_trait]
impl Service for Gateway {
    async fn chat(&self, request: Request, caller: Caller) -> Result<Answer, GatewayError> {
        Gateway::chat(self, request, caller).await
    }

    async fn decide(&self, request: Request, caller: Caller) -> Result<Explained, GatewayError> {
        Gateway::decide(self, request, caller).await
    }

    async fn embeddings(&self, model: &str, texts: Vec<String>) -> Result<Embedded, GatewayError> {
        Gateway::embeddings(self, model, texts).await
    }

    fn served(&self) -> Vec<Served> {
        Gateway::served(self)
    }

    fn fleet(&self) -> Vec<FleetStatus> {
        Gateway::fleet(self)
    }

    async fn set_loaded(&self, name: &str, loaded: bool) -> Result<FleetStatus, GatewayError> {
        Gateway::set_loaded(self, name, loaded).await
    }

    async fn kv(&self, name: &str, command: KvCommand) -> Result<KvAnswer, GatewayError> {
        Gateway::kv(self, name, command).await
    }

    async fn feedback(&self, id: DecisionId, feedback: Feedback) -> Result<bool, GatewayError> {
        Gateway::feedback(self, id, feedback).await
    }

    async fn decisions(&self, query: DecisionsQuery) -> Result<Vec<Value>, GatewayError> {
        let rows = Gateway::decisions(self, query.into()).await?;
        rows.iter().map(json).collect()
    }

    async fn decision(&self, id: DecisionId) -> Result<Value, GatewayError> {
        json(&Gateway::decision(self, id).await?)
    }

    async fn readiness(&self) -> Readiness {
        Gateway::readiness(self).await
    }

    fn metrics(&self) -> String {
        Gateway::metrics(self)
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Value, GatewayError> {
    serde_json::to_value(value).map_err(|e| GatewayError::Store(e.to_string()))
}
