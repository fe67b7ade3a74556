//! The one way from data to bytes that are hashed: canonical JSON (RFC 8785), vectors as base64 of little-endian f32.

mod serializer;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Serialize;

/// Canonical JSON of `value` (RFC 8785: sorted keys, shortest numbers, no white space).
///
/// # Errors
/// When the value cannot be JSON: a NaN or an infinity, a map whose keys are not strings, or a key that comes twice.
pub fn to_bytes<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::with_capacity(1024);
    write(&mut out, value)?;
    Ok(out)
}

/// Appends the canonical JSON of `value` to `out`; on an error `out` is as it was.
///
/// # Errors
/// As [`to_bytes`].
pub fn write<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<(), serde_json::Error> {
    let start = out.len();
    let result = value.serialize(&mut serializer::Canonical::new(out));
    if result.is_err() {
        out.truncate(start);
    }
    result
}

/// A vector as base64 of its little-endian bytes; bit-exact, NaN included.
pub fn vector_to_base64(vector: &[f32]) -> String {
    BASE64_STANDARD.encode(vector_to_bytes(vector))
}

/// The little-endian bytes of a vector, four per element.
pub fn vector_to_bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The inverse of [`vector_to_bytes`]; `None` when the length is no multiple of four.
pub fn vector_from_bytes(bytes: &[u8]) -> Option<Vec<f32>> {
    let (whole, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| whole.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// The inverse of [`vector_to_base64`]; `None` when the text is no base64 of a whole number of elements.
pub fn vector_from_base64(text: &str) -> Option<Vec<f32>> {
    vector_from_bytes(&BASE64_STANDARD.decode(text).ok()?)
}

#[cfg(test)]
mod tests;
