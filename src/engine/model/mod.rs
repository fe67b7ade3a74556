//! Models: what a GGUF file says about itself ([`config`]), its keys and values in memory ([`kv`]), and the forward pass
//! of the llama architecture and its kin ([`llama`]).

pub mod config;
pub mod kv;
pub mod llama;

pub use config::{Architecture, Config};
pub use kv::Kv;
pub use llama::{Batch, Llama, Piece, STEP};
