//! What several integration tests share.

pub mod hub;
pub mod postgres;
pub mod weir;

use std::path::PathBuf;

/// The data directory whose `models/` the tests share, so that real models are fetched once and not once per test:
/// `WEIR_TEST_HOME`, else `weir-home` in the target directory.
pub fn test_home() -> PathBuf {
    if let Some(home) = std::env::var_os("WEIR_TEST_HOME").filter(|h| !h.is_empty()) {
        return home.into();
    }
    // CARGO_TARGET_TMPDIR is <target>/tmp, wherever the target directory is.
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("weir-home")
}
