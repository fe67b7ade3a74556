//! The record. Every event goes through one write-ahead log ([`EventLog`]: one sequencer, one hash chain per replica)
//! before its effect shows; a [`Feeder`] carries the log into a store ([`AuditStore`]: SQLite or PostgreSQL), in order and
//! idempotently; there it is queried, verified and exported.
//!
//! - [`record`]: what is hashed. The bytes of a record are the truth; every column of a store is a projection of them.
//! - [`frame`], [`segment`], [`log`], [`reader`]: the log on disk, written and followed.
//! - [`store`], [`projection`], [`sqlite`], [`postgres`], [`query`]: the stores.
//! - [`feeder`]: from the log to the store, and on to whoever follows (the learner).
//! - [`verify`], [`explain`], [`export`], [`stats`]: what an auditor asks for.
//!
//! What events mean is the domain's business; who folds them is `learn`'s; deriving decisions again is `replay`'s.

pub mod explain;
pub mod export;
pub mod feeder;
pub mod frame;
pub mod log;
pub mod postgres;
pub mod projection;
pub mod query;
pub mod reader;
pub mod record;
pub mod segment;
pub mod sqlite;
pub mod stats;
pub mod store;
#[doc(hidden)]
pub mod testing;
pub mod verify;

pub use feeder::{Feeder, FeederOptions, FlushError, Follower, close_interrupted};
pub use log::{Durability, EventLog, LogError, LogOptions, Recovery};
pub use query::{DecisionFilter, DecisionRow, DecisionView, FeedbackView};
pub use reader::LogReader;
pub use record::Logged;
pub use store::{
    AuditStore, OpenDecision, Snapshot, StoreError, StoreTarget, StoredEvent, by_decision, open_existing, open_store,
};
pub use verify::{Problem, VerifyReport, verify_chain, verify_log};
