//! The integration crate: a file per behaviour.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

mod embedder;
mod floors;
mod http;
mod policy;
