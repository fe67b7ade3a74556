//! Signals as numbers, for what learns from them.

use super::Signals;

impl Signals {
    /// Names of what [`Signals::feature`] gives.
    pub const FEATURES: [&str; 8] =
        ["tokens", "query_tokens", "complexity", "code_share", "turn", "tools", "response_format", "pii"];

    /// A feature by its place in [`Signals::FEATURES`], scaled to about 0 to 1: counts of tokens by log2(1 + n) / 16.
    pub fn feature(&self, n: usize) -> f64 {
        let log = |tokens: u32| libm::log2(1.0 + f64::from(tokens)) / 16.0;
        let flag = |b: bool| if b { 1.0 } else { 0.0 };
        match Self::FEATURES.get(n).copied() {
            Some("tokens") => log(self.tokens),
            Some("query_tokens") => log(self.query_tokens),
            Some("complexity") => self.complexity / 100.0,
            Some("code_share") => self.code_share,
            Some("turn") => f64::from(self.turn.min(8)) / 8.0,
            Some("tools") => flag(self.tools),
            Some("response_format") => flag(self.response_format),
            Some("pii") => flag(self.pii.count > 0),
            _ => 0.0,
        }
    }

    /// All of them.
    pub fn features(&self) -> [f64; Self::FEATURES.len()] {
        std::array::from_fn(|n| self.feature(n))
    }
}
