//! The integration crate: a file per behaviour.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

mod assets;
mod audit_cli;
mod audit_contract;
mod audit_crash;
mod audit_feeder;
mod audit_verify;
mod bad_input;
mod bench;
mod documents;
mod embedder;
mod engine_model;
mod faults;
mod fit;
mod floors;
mod http;
mod learning;
mod policy;
mod real_model;
mod record;
mod reload;
mod replay;
mod replay_log;
mod setups;
mod support;
