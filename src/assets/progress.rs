//! What a person sees while an asset is fetched: a bar or a spinner on stderr when it is a terminal, else plain lines.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Reports on one asset.
pub(super) struct Reporter {
    name: String,
    quiet: bool,
    bar: ProgressBar,
}

impl Reporter {
    /// `quiet`: nothing at all is written.
    pub fn new(name: &str, quiet: bool) -> Self {
        // `stderr()` hides itself when stderr is no terminal.
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        Self { name: name.to_owned(), quiet, bar: ProgressBar::with_draw_target(None, target) }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("weir: {}: {text}", self.name));
        }
    }

    /// Begins a step whose length may be known, in bytes.
    pub fn begin(&self, what: &str, bytes: Option<u64>) {
        let template = match bytes {
            Some(_) => {
                "{prefix}: {msg} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta}"
            }
            None => "{spinner} {prefix}: {msg} {decimal_bytes} {elapsed}",
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        // The style first: each of the other calls may draw.
        self.bar.set_style(style);
        self.bar.set_prefix(self.name.clone());
        self.bar.set_message(what.to_owned());
        match bytes {
            Some(n) => self.bar.set_length(n),
            None => self.bar.unset_length(),
        }
        self.bar.reset();
        if bytes.is_none() {
            self.bar.enable_steady_tick(Duration::from_millis(120));
        }
    }

    /// How far the step is, in bytes.
    pub fn at(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// So many bytes more.
    pub fn more(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Ends the step and clears its line.
    pub fn end(&self) {
        self.bar.disable_steady_tick();
        self.bar.finish_and_clear();
    }
}
