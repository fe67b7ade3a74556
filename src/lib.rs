//! weir: a multi-model semantic router and cascade orchestrator that speaks the OpenAI API.
//!
//! The way of a request: [`http`] → [`domain::Request`] → [`signals`] (a [`domain::Context`]) → [`policy`]
//! (a [`domain::Decision`]) → [`cascade`] ↔ [`dispatch`] → [`backend`] → back through `http`; every step is appended
//! to the event log of [`audit`], from which [`learn`] folds policy state and [`replay`] walks the same road again.
//!
//! Floors: `domain` (0); `policy`, `cascade` (1, pure); `signals`, `backend`, `audit`, `engine`, `assets` and the small
//! `clock` and `tls` (2); `learn`, `dispatch`, `gateway`, `replay`, `fit`, `telemetry` (3); `http`, `cli`, `config`, `app`, `bench`
//! (4). `tests/floors.rs` holds them.

pub mod domain;

pub mod cascade;
pub mod policy;

pub mod assets;
pub mod audit;
pub mod backend;
pub mod clock;
pub mod engine;
pub mod signals;
pub mod tls;

pub mod dispatch;
pub mod fit;
pub mod gateway;
pub mod learn;
pub mod replay;

pub mod app;
pub mod bench;
pub mod cli;
pub mod config;
pub mod http;
pub mod telemetry;

/// weir's version and the commit it was built from; part of every decision's record.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "+", env!("WEIR_COMMIT"));
