//! The integration crate: a file per behaviour.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

mod audit_contract;
mod audit_crash;
mod audit_feeder;
mod floors;
#[path = "support/postgres.rs"]
mod postgres;
