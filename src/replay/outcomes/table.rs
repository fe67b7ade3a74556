//! The report for a terminal.

use std::fmt::Write as _;

use super::{Origin, OutcomesReport};
use crate::replay::report::{outcomes::LUCK, sparkline};

/// Bars of a curve.
const CURVE: usize = 17;

impl OutcomesReport {
    /// As a table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let all = || self.policies.iter().chain(&self.baselines);
        let width = all().map(|l| l.name.chars().count()).max().unwrap_or(0);
        let _ = writeln!(out, "{} queries, {} models of {}", self.queries, self.models.len(), self.outcomes);
        for (why, count) in &self.left_out {
            let _ = writeln!(out, "left out: {count} {why}");
        }
        self.what_if.iter().for_each(|what| _ = writeln!(out, "what if: {what}"));
        out.push('\n');
        let _ = writeln!(
            out,
            "{:width$}  {:>7}  {:>10}  {:>7}  {:>7}  {:>7}  {:>25}  {:CURVE$}  shares",
            "", "score", "USD", "mix", "PGR", "AIQ", "gain over the best model", "regret"
        );
        for l in all() {
            let optional = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
            let gain = l.interval.map_or_else(
                || format!("{:+.4}", l.gain),
                |(low, high)| format!("{:+.4} ({low:+.3} to {high:+.3})", l.gain),
            );
            let mut shares: Vec<(&String, &f64)> = l.shares.iter().collect();
            shares.sort_by(|a, b| b.1.total_cmp(a.1));
            let shares: Vec<String> = shares.iter().take(3).map(|(m, s)| format!("{m} {:.0} %", 100.0 * **s)).collect();
            let refused = if l.refused > 0.0 { format!(", refused {:.1} %", 100.0 * l.refused) } else { String::new() };
            let missed = if l.missed > 0.0 { format!(", no answer {:.1} %", 100.0 * l.missed) } else { String::new() };
            let curve: Vec<f64> =
                l.regret.iter().step_by(l.regret.len().div_ceil(CURVE).max(1)).map(|(_, regret)| *regret).collect();
            let _ = writeln!(
                out,
                "{:width$}  {:>7.4}  {:>10.3e}  {:>7}  {:>7}  {:>7}  {gain:>25}  {:CURVE$}  {}{refused}{missed}",
                l.name,
                l.mean_score,
                l.mean_cost_usd,
                optional(l.zero_router),
                optional(l.pgr),
                optional(l.aiq),
                sparkline(&curve),
                shares.join(", ")
            );
        }
        for l in self.policies.iter().filter(|l| l.origin == Origin::InDistribution) {
            let _ = writeln!(out, "\n{} was fitted on these very outcomes: no forecast", l.name);
        }
        for q in &self.quoted {
            let figure = |name: &str, of: Option<f64>| of.map(|v| format!("{name} {v}"));
            let figures = [
                figure("score", q.score),
                figure("USD", q.cost_usd),
                figure("PGR", q.pgr),
                figure("AIQ", q.aiq),
                figure("APGR", q.apgr),
                figure("CPT(50)", q.cpt_50),
                figure("CPT(80)", q.cpt_80),
            ];
            let figures: Vec<String> = figures.into_iter().flatten().collect();
            let _ = writeln!(out, "\nquoted, not computed here ({}): {}: {}", q.source, q.told(), figures.join(", "));
        }
        for p in self.pairs.iter().filter(|_| self.policies.len() < 5) {
            let interval = p.interval.map_or_else(String::new, |(low, high)| format!(" ({low:+.4} to {high:+.4})"));
            let _ = writeln!(out, "\n{} less {}: {:+.4}{interval}", p.first, p.second, p.difference);
        }
        for l in &self.policies {
            if let Some(c) = &l.calibration {
                let _ = writeln!(out, "\n{} expects: {:.4} off on average, over all models", l.name, c.error);
            }
        }
        let _ = writeln!(
            out,
            "\nmix: what models drawn at random score at that cost. regret: what the best model would have earned more, as it grows.\n\
             {LUCK}"
        );
        out
    }
}
