//! Models: what a GGUF file says about itself ([`config`]), its keys and values in memory ([`kv`]), and the forward pass
//! of the llama architecture ([`llama`]).

pub mod config;
pub mod kv;
pub mod llama;

pub use config::Config;
pub use kv::Kv;
pub use llama::{Batch, Llama, Piece};
