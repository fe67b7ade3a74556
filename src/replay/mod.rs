//! Walking the road of recorded requests again.
//!
//! [`reproduce`] derives recorded decisions a second time, from the record alone, and compares the bytes. [`log`] asks what
//! another policy would have chosen for the same requests, and [`outcomes`] the same where every model's answer is known
//! ([`matrix`]); plans of several calls are run over both by [`plan_run`]; [`diff`] what one policy would do otherwise than another. Values are estimated by [`estimate`], told by
//! [`report`], compared between reports by [`compare`]; what is done of a long replay is kept by [`checkpoint`]. None calls a
//! model.

pub mod calibration;
mod checkpoint;
pub mod compare;
pub mod diff;
pub mod direct;
pub mod estimate;
mod log;
pub mod matrix;
pub mod metrics;
pub mod outcomes;
pub mod plan_run;
pub mod report;
mod reproduce;
pub mod router;
mod what_if;

pub use checkpoint::{CheckpointError, Checkpoints};
pub use log::{
    BySession, Entry, Export, Measured, Page, Record, ReplayReport, ReplayedPolicy, Setting, Source, replay_log,
};
pub use reproduce::{Difference, PlanRuns, ReproduceReport, context_of, policy_of_version, recorded_policy, reproduce};
pub use what_if::WhatIf;

/// What keeps a record from being walked again.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("the store cannot be read: {0}")]
    Store(#[from] crate::audit::StoreError),
    #[error(transparent)]
    Learn(#[from] crate::learn::LearnError),
    #[error("a temporary file for weighed decisions cannot be used: {0}")]
    Temporary(#[from] std::io::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("decision {0} is in the log twice, or the decisions are not in their order")]
    Order(String),
    #[error("`{0}` is no place in this log")]
    Place(String),
    #[error("{file}: {what}")]
    Export { file: String, what: String },
    #[error("the policy {name} ({hash}) that made decision {decision} is not in the record")]
    NoPolicy { name: String, hash: String, decision: String },
    #[error("the recorded policy {name} does not compile to its recorded hash: {reason}")]
    Policy { name: String, reason: String },
}
