//! Floor 0: the data that every other floor speaks about, and nothing that acts.
//!
//! A request comes in ([`Request`]), is seen by policies as a [`Context`] that holds no prompt text, becomes a
//! [`Decision`] for a [`Plan`] over the models of a [`Fleet`], is answered by [`Chunk`]s or a [`Completion`], and leaves
//! [`Event`]s behind. No async, no SQL, no HTTP, no tensors here.

pub mod canonical;
mod completion;
mod context;
mod decision;
mod error_kind;
mod event;
mod facts;
mod failover;
mod gate;
mod ids;
mod kv;
mod model;
mod note;
mod plan;
mod plan_tree;
mod request;
mod signals;
mod spend;
mod steps;

pub use completion::{
    Choice, Chunk, ChunkReuse, Completion, FinishReason, TokenLogprob, TopLogprob, Usage, UsageSource,
};
pub use context::{
    Context, Counters, EmbedderIdentity, Embedding, KeyView, ModelState, PiiSignals, RequestView, SessionView, Signals,
};
pub use decision::{Candidate, DecidedBy, Decision, Elimination, RequestBounds, RuleOutcome, RuleTrace};
pub use error_kind::ErrorKind;
pub use event::{
    Admin, Attempt, AttemptReason, DecisionRecord, Event, EventBody, EventKind, Feedback, Outcome, OutcomeStatus,
    PolicyVersion, StateUpdate,
};
pub use facts::{Facts, Reading, Scored};
pub use failover::{Availability, Edge, FailoverGraph, FailoverWeights, Health};
pub use gate::{Bound, Condition, IfUnscored, Score, Scorer};
pub use ids::{DecisionId, Hash, Micros};
pub use kv::{DocumentKv, KvAnswer, KvCleared, KvCommand, KvDisk, KvStat, PromptKv};
pub use model::{Capabilities, Energy, Fleet, ModelCard, Need, Price};
pub use note::{Abort, BestBecause, Ends, Left, Mask, Note, Place, Unscored, What};
pub use plan::{CallSpec, Sampling};
pub use plan_tree::{Aggregate, Plan, PlanError, Stage, Verified};
pub use request::{ContentPart, Message, Request, Role, sharing};
pub use spend::{MicroUsd, Spend};
pub use steps::{StepFacts, Steps};

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
