//! The integration crate: a file per behaviour.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

mod audit_cli;
mod audit_contract;
mod audit_crash;
mod audit_feeder;
mod audit_verify;
mod floors;
#[path = "support/postgres.rs"]
mod postgres;
#[path = "support/store.rs"]
mod store;
