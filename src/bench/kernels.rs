//! `weir bench kernels`: decode attention on an NVIDIA card against its CPU twin on the same keys, values and queries, for every
//! kernel that there is, and how fast it reads its memory beside a plain copy on the same card. Sequences are dense, or of
//! documents that others use, too, at other positions; all of them are seen, or a window.

use serde::Serialize;

use super::BenchError;

/// Farthest from the twin that a result may be, relative to the largest number of its row: sums are f32 in another order.
pub const TOLERANCE: f64 = 1e-4;

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: std::collections::BTreeMap<String, f64>,
    pub card: String,
    /// Whether each case is within [`TOLERANCE`].
    pub agrees: bool,
    pub tolerance: f64,
    /// Bytes read and written per second by copying within the card's memory.
    pub copy_gb_per_s: f64,
    pub cases: Vec<Case>,
    pub rows: Vec<Row>,
    pub machine: super::report::Machine,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    pub what: &'static str,
    pub queries: usize,
    pub keys: usize,
    pub size: usize,
    pub sequences: usize,
    pub longest: usize,
    /// Positions that are seen, where not all are.
    pub window: Option<usize>,
    /// Spans of all sequences, and how many of them do not fill a block.
    pub spans: usize,
    pub partial: usize,
    /// Offsets of spans, 0 apart.
    pub turns: usize,
    pub splits: usize,
    /// The largest difference, relative to the largest number of the row.
    pub apart: f64,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub what: String,
    pub sequences: usize,
    pub length: usize,
    pub splits: usize,
    pub micros: f64,
    /// Keys and values attended to per second; those that sequences share count for each, and may come from a nearer memory.
    pub gb_per_s: f64,
    /// Of what a copy moves.
    pub of_copy: f64,
    pub apart: f64,
}

impl Report {
    /// A table for people.
    pub fn markdown(&self) -> String {
        let worst = self.cases.iter().map(|case| case.apart).fold(0.0, f64::max);
        let mut out = format!(
            "{}: {} cases of decode attention, farthest from the CPU twin {worst:.1e} (may be {:.0e}): {}.\nA copy moves {:.0} GB/s, \
             read and written.\n\n",
            self.card,
            self.cases.len(),
            self.tolerance,
            if self.agrees { "the same" } else { "NOT the same" },
            self.copy_gb_per_s
        );
        out += "| heads | sequences | positions | splits | µs | GB/s of keys and values | of a copy | apart |\n";
        out += "|---|---|---|---|---|---|---|---|\n";
        for r in &self.rows {
            out += &format!(
                "| {} | {} | {} | {} | {:.1} | {:.0} | {:.0} % | {:.1e} |\n",
                r.what,
                r.sequences,
                r.length,
                r.splits,
                r.micros,
                r.gb_per_s,
                100.0 * r.of_copy,
                r.apart
            );
        }
        out
    }
}

/// Compares and measures.
///
/// # Errors
/// [`BenchError::Start`] when weir was built without kernels, there is no card, or it fails.
#[cfg(not(feature = "cuda"))]
pub fn run(_card: usize, _repeats: usize) -> Result<Report, BenchError> {
    Err(BenchError::Start {
        what: "the kernels".to_owned(),
        reason: "this weir was built without them; build it with `kernels/fetch-nvcc && cargo build --release --features cuda`"
            .to_owned(),
    })
}

#[cfg(feature = "cuda")]
pub use with_card::run;

#[cfg(feature = "cuda")]
mod with_card;
