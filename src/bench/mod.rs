//! Floor 4: measurements of the whole program. `weir bench gateway` compares weir with a bare proxy in front of the same
//! mock upstream; every server runs in a process of its own, so that the kernel tells its processor time and memory.
//!
//! - [`mock_upstream`], [`bare_proxy`]: the two servers beside weir, run as hidden subcommands of this binary;
//! - [`process`]: starting a server, finding its port, reading its processor time and memory;
//! - [`load`]: the closed-loop client, which checks every answer;
//! - [`subject`]: what is compared, and the configuration that weir is started with;
//! - [`gateway`]: the runs; [`report`]: medians, table, JSON.
//!
//! `weir bench policies` ([`policies`]) judges fitted selectors on routing outcomes,
//! `weir bench bandits` ([`bandits`]) the learning ones, `weir bench decide` ([`decide`]) says what a decision costs,
//! `weir bench ope` ([`ope`]) holds off-policy estimates against the truth, `weir bench replay` ([`replay`]) says how fast
//! a log is replayed, in how much memory, `weir bench engine` ([`engine`]) how fast a model reads and writes, `weir bench kernels` ([`kernels`]) whether a card's
//! kernels compute what the processor does, `weir bench kv` ([`kv`]) what prompts of many
//! documents take, by how these are reused, and `weir bench kv-fidelity` ([`kv_fidelity`]) what that costs on questions ([`questions`]). `weir bench cascade` ([`cascade`]) says what gates of
//! cascades are worth.

pub mod bandits;
pub mod bare_proxy;
pub mod cascade;
pub mod decide;
pub mod engine;
pub mod gateway;
pub mod kernels;
pub mod kv;
pub mod kv_eviction;
pub mod kv_fidelity;
pub mod load;
pub mod mock_upstream;
pub mod ope;
pub mod peer;
pub mod policies;
pub mod process;
pub mod questions;
pub mod replay;
pub mod report;
pub mod subject;

/// Why a measurement did not come about.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A server did not start, or died.
    #[error("{what} did not start: {reason}")]
    Start { what: String, reason: String },
    /// The client could not go on.
    #[error("the load generator failed against {what}: {reason}")]
    Load { what: String, reason: String },
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// A number on the command line makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl BenchError {
    /// Fixed label.
    pub fn kind(&self) -> &'static str {
        match self {
            BenchError::Start { .. } => "start",
            BenchError::Load { .. } => "load",
            BenchError::Io { .. } => "io",
            BenchError::Usage(_) => "usage",
        }
    }

    /// For `map_err`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::Io { what, source }
    }
}

/// Says where a bench server listens, in the words that [`process`] waits for, and returns once nobody holds its standard
/// input any more: so it ends with the bench, however the bench ends.
pub(crate) async fn until_orphaned(address: std::net::SocketAddr) {
    use std::io::Write;
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "listening on http://{address}");
    let _ = stdout.flush();
    let wait = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    let _ = wait.await;
}
