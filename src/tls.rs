//! The one TLS provider of the process (rustls with ring). Two are compiled in through dependencies, so neither is a
//! default: whoever builds an HTTPS client calls [`install_provider`] first.

/// Makes ring the process's TLS provider; does nothing when one is installed already.
pub fn install_provider() {
    // The only error is "already installed", which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
