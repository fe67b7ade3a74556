//! The report for people, and its figures.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Report, tasks::Kind};

impl Report {
    /// `<gate>.<last stage>.<quantity>`, `guarantee.<score>.<bound>.<quantity>`, `plan.<plan>.<quantity>`, `<set>.<quantity>`.
    pub(super) fn figures(&self) -> BTreeMap<String, f64> {
        let mut figures = BTreeMap::new();
        for row in &self.rows {
            let name = format!("{}.{}", row.gate, row.last).replace(' ', "_");
            figures.insert(format!("{name}.gain"), row.gain);
            figures.insert(format!("{name}.calibration_error"), row.calibration_error);
            figures.extend(row.auroc.map(|auroc| (format!("{name}.auroc"), auroc)));
        }
        for row in &self.guarantees {
            let name = format!("guarantee.{}.{}", row.score.replace(' ', "_"), row.max_error);
            figures.insert(format!("{name}.held"), row.held as f64 / row.draws.max(1) as f64);
            figures.insert(format!("{name}.accepted"), row.accepted);
        }
        for fixed in &self.plans {
            let name = fixed.plan.replace([' ', ','], "_");
            figures.insert(format!("plan.{name}.quality"), fixed.quality);
            figures.insert(format!("plan.{name}.cost_usd"), fixed.cost_usd);
        }
        for set in &self.sets {
            let best = set.rows.iter().filter(|row| row.escalated.is_some()).filter_map(|row| row.gain);
            figures.extend(best.reduce(f64::max).map(|gain| (format!("{}.best_gain", set.name), gain)));
        }
        figures
    }

    /// Tables.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{} questions, {} answers, right by kind:\n", self.asked.questions, self.asked.answers);
        out += "| kind | temperature | answers | right |\n|---|---|---|---|\n";
        for (kind, temperature, all, right) in &self.asked.right {
            let _ = writeln!(out, "| {} | {temperature} | {all} | {:.1} % |", kind.name(), 100.0 * right);
        }
        let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        let _ = writeln!(
            out,
            "\nPlans (a token costs $0.000001 at the small model and ten times that at the simulated one):\n\n\
             | plan | right | {} | USD per 1,000 | calls | answered by stage |\n|---|---|{}---|---|---|",
            kinds.join(" | "),
            "---|".repeat(kinds.len())
        );
        for fixed in &self.plans {
            let percent = |share: &f64| format!("{:.1} %", 100.0 * share);
            let by_kind: Vec<String> = fixed.by_kind.iter().map(percent).collect();
            let stages: Vec<String> = fixed.stages.iter().map(percent).collect();
            let _ = writeln!(
                out,
                "| {}{} | {:.1} % | {} | {:.3} | {:.2} | {} |",
                fixed.plan,
                missed(fixed.missed),
                100.0 * fixed.quality,
                by_kind.join(" | "),
                1e3 * fixed.cost_usd,
                fixed.calls,
                stages.join(", ")
            );
        }
        self.gates(&mut out);
        self.guarantees(&mut out);
        self.sets(&mut out);
        out
    }

    fn gates(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "\nGates, over {} random halves (thresholds from the other half). Gain: area between the gate's curve and escalating at \
             random, over that of perfect foresight. In the middle: quality where half of the further cost is spent.\n\n\
             | gate | then | gain | AUROC | calibration error | never | always | in the middle | at random | foresight |\n\
             |---|---|---|---|---|---|---|---|---|---|",
            self.plan.splits
        );
        for row in &self.rows {
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            let auroc = row.auroc.map_or_else(|| "-".to_owned(), |auroc| format!("{auroc:.3}"));
            let [gate, random, foresight] = row.half.map(percent);
            let _ = writeln!(
                out,
                "| {}{} | {} | {:.3} ± {:.3} | {auroc} | {:.3} | {} | {} | {gate} | {random} | {foresight} |",
                row.gate,
                missed(row.missed),
                row.last,
                row.gain,
                row.gain_deviation,
                row.calibration_error,
                percent(row.never.score),
                percent(row.always.score),
            );
        }
    }

    fn guarantees(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "\nGuaranteed gates: a threshold from a random sample of the answers, by `max_error` and `confidence`; whether the bound holds \
             of all answers.\n\n\
             | score | at most wrong | with confidence | certified | held | accepted | of these wrong |\n|---|---|---|---|---|---|---|"
        );
        for row in &self.guarantees {
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} of {} | {} of {} | {} | {} |",
                row.score,
                percent(row.max_error),
                percent(row.confidence),
                row.certified,
                row.draws,
                row.held,
                row.draws,
                percent(row.accepted),
                percent(row.wrong),
            );
        }
    }

    fn sets(&self, out: &mut String) {
        for set in &self.sets {
            let _ = writeln!(
                out,
                "\n{}: {} queries, {} models; {} plans tried on one half, those on its hull judged on the other.\n\n\
                 | plan | score | USD per 1,000 | mix at that cost | gain (95 %) | calls | escalated |\n|---|---|---|---|---|---|---|",
                set.name, set.queries, set.models, set.tried
            );
            for row in &set.rows {
                let number = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
                let interval =
                    row.interval.map_or_else(String::new, |(low, high)| format!(" ({low:+.4} to {high:+.4})"));
                let gain = row.gain.map_or_else(|| "-".to_owned(), |gain| format!("{gain:+.4}{interval}"));
                let escalated = row.escalated.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
                let _ = writeln!(
                    out,
                    "| {}{} | {:.4} | {:.4} | {} | {gain} | {:.2} | {escalated} |",
                    row.plan,
                    missed(row.missed),
                    row.score,
                    1e3 * row.cost_usd,
                    number(row.zero_router),
                    row.calls
                );
            }
        }
    }
}

fn missed(runs: usize) -> String {
    if runs == 0 { String::new() } else { format!(" ({runs} runs without an answer)") }
}
