//! The one choice of a TLS provider for the whole process: rustls on ring. Everything that speaks HTTPS calls
//! [`install`] before it builds a client, because two crates of the tree bring two providers and rustls then chooses none.

use std::sync::Once;

static INSTALLED: Once = Once::new();

/// Makes ring the process's provider. Idempotent and cheap; a provider that somebody else installed before stays.
pub fn install() {
    INSTALLED.call_once(|| {
        // An error means only that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
