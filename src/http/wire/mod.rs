//! OpenAI's wire format: what clients send ([`chat`], [`parse`]) and what they get back ([`completion`] whole, [`chunk`]
//! streamed). Bytes in, domain types out, and the reverse; no HTTP here.

pub mod chat;
pub mod chunk;
pub mod completion;
pub mod parse;

#[cfg(test)]
mod tests;
