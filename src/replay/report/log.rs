//! The report from the record, for people.

use super::{Cell, Chart, Document, Mark, Part, Readable, Section, Series, Table, calibration, chart::Dot, pairs};
use crate::replay::{
    log::{Measured, ReplayReport, ReplayedPolicy},
    metrics::Percentiles,
};

impl Readable for ReplayReport {
    fn document(&self) -> Document {
        let names =
            self.policies.iter().map(|p| format!("{} {}", p.policy, p.hash)).collect::<Vec<String>>().join(", ");
        let mut sections = vec![self.summary()];
        if self.policies.iter().any(|p| p.estimates.is_some()) {
            sections.push(self.estimates());
        }
        if !self.pairs.is_empty() {
            sections.push(pairs(&self.pairs, "reward", "sessions"));
        }
        sections.push(self.measured());
        let calibrated = || self.policies.iter().filter_map(|p| Some((p.policy.as_str(), p.calibration.as_ref()?)));
        if calibrated().next().is_some() {
            sections.push(calibration::section(calibrated(), "of the logged arms"));
        }
        sections.extend(self.policies.iter().map(|p| p.section()));
        let mut facts = vec![
            ("Decisions".to_owned(), self.decisions.to_string()),
            ("Days".to_owned(), format!("{:.2}", self.days)),
            ("Policies".to_owned(), names),
        ];
        facts.extend(self.what_if.iter().map(|what| ("What if".to_owned(), what.clone())));
        Document { title: "Policies on the record".to_owned(), facts, sections }
    }
}

impl ReplayReport {
    fn summary(&self) -> Section {
        let columns = [
            "policy",
            "#decisions",
            "#same arm",
            "#by rule",
            "#left out",
            "#doubly robust reward",
            "#effective decisions",
            "#could not be logged",
        ];
        let mut table = Table::new("Policies", &columns);
        for p in &self.policies {
            let skipped: usize = p.skipped.values().sum();
            let dr = p.estimates.as_ref().map_or(Cell::text("–"), |e| Cell::estimate(e.dr.value, e.dr.interval, 4));
            let made = if p.made_the_log { " (made them)" } else { "" };
            table.rows.push(vec![
                Cell::text(format!("{} {}{made}", p.policy, p.hash)),
                Cell::number(p.decisions as f64, 0),
                Cell::number(p.agreed as f64, 0),
                Cell::number(p.by_rule as f64, 0),
                Cell::number(skipped as f64, 0),
                dr,
                Cell::number(p.estimates.as_ref().map(|e| e.effective), 0),
                Cell::share(p.unsupported),
            ]);
        }
        let note = "What each policy would have chosen for the recorded requests, and its reward per decision, estimated from the \
                    logged probabilities.";
        Section { heading: "Policies".to_owned(), note: note.to_owned(), parts: vec![Part::Table(table)] }
    }

    fn measured(&self) -> Section {
        let joules = self.logged.joules.is_some();
        let ttft = self.logged.ttft_ms.is_some();
        let mut columns = vec!["policy", "#decisions with an end", "#USD per decision"];
        if joules {
            columns.push("#joules per decision");
        }
        columns.extend(["#p50 ms", "#p90 ms", "#p99 ms"]);
        if ttft {
            columns.extend(["#first token p50 ms", "#p90 ms", "#p99 ms"]);
        }
        let mut table = Table::new("Cost and time", &columns);
        let row = |name: String, m: &Measured| {
            let usd = m.cost_usd.map_or(Cell::text("–"), |e| Cell::usd_estimate(e.value, e.interval));
            let mut row = vec![Cell::text(name), Cell::number(m.ended as f64, 0), usd];
            if joules {
                row.push(m.joules.map_or(Cell::text("–"), |e| Cell::estimate(e.value, e.interval, 2)));
            }
            let mut times = |of: Option<Percentiles>| {
                let each = [of.map(|p| p.p50), of.map(|p| p.p90), of.map(|p| p.p99)];
                row.extend(each.map(Cell::ms));
            };
            times(m.latency_ms);
            if ttft {
                times(m.ttft_ms);
            }
            row
        };
        table.rows.push(row("the log".to_owned(), &self.logged));
        let estimated = self.policies.iter().filter(|p| p.measured.ended > 0);
        table.rows.extend(estimated.map(|p| row(format!("{} {}", p.policy, p.hash), &p.measured)));
        let note = "Estimated from the logged ends by self-normalised weights, with 95 % intervals; percentiles are right to half a per \
                    cent. Times are those of the machines and the load that the log was made with.";
        Section { heading: "Cost and time".to_owned(), note: note.to_owned(), parts: vec![Part::Table(table)] }
    }

    fn estimates(&self) -> Section {
        let mut table = Table::new(
            "Reward per decision by estimator, with 95 % intervals",
            &[
                "policy",
                "#IPS",
                "#clipped IPS",
                "#SNIPS",
                "#DM",
                "#DR",
                "#switch-DR",
                "#replay method",
                "#mean weight",
                "#greatest weight",
            ],
        );
        let mut series = Vec::new();
        for (p, at) in self.policies.iter().zip(1u32..) {
            let Some(e) = &p.estimates else { continue };
            let each = [e.ips, e.clipped, e.snips, e.dm, e.dr, e.switch_dr];
            let mut row = vec![Cell::text(&p.policy)];
            row.extend(each.iter().map(|e| Cell::estimate(e.value, e.interval, 4)));
            row.push(p.mean_reward.map_or(Cell::text("–"), |mean| Cell::estimate(mean, p.mean_interval, 4)));
            row.extend([Cell::number(e.overlap, 3), Cell::number(e.greatest_weight, 2)]);
            table.rows.push(row);
            series.push(Series {
                name: p.policy.clone(),
                mark: Mark::Dots,
                points: vec![Dot {
                    x: f64::from(at),
                    y: e.dr.value,
                    up: e.dr.interval,
                    label: p.policy.clone(),
                    ..Dot::default()
                }],
            });
        }
        let chart = Chart {
            title: "Reward per decision, doubly robust".to_owned(),
            x: "policy".to_owned(),
            y: "reward".to_owned(),
            log: false,
            series,
        };
        let note = "IPS, clipped and self-normalised IPS weigh logged rewards by the ratio of probabilities; the direct method (DM) \
                    trusts a model of the reward; the doubly robust ones correct the model by the weighed residuals. The replay \
                    method is the mean where the arms agree; it needs a log whose arms were all alike likely.";
        Section {
            heading: "Estimates".to_owned(),
            note: note.to_owned(),
            parts: vec![Part::Chart(chart), Part::Table(table)],
        }
    }
}

impl ReplayedPolicy {
    fn section(&self) -> Section {
        let mut parts = Vec::new();
        if let Some(why) = &self.no_estimate {
            parts.push(Part::Text { text: format!("There is no estimate: {why}") });
        }
        if let Some(more) = self.to_one_hundredth {
            let text = format!("{} of such a log would have its interval within 0.01 on each side.", more.told());
            parts.push(Part::Text { text });
        }
        if let Some(whole) = &self.by_session {
            let interval =
                whole.reward.interval.map_or_else(String::new, |(low, high)| format!(" ({low:.4} to {high:.4})"));
            let text = format!(
                "With whole sessions weighed, of up to {} turns: a reward of {:.4}{interval} per decision, from what is worth {:.0} \
                 decisions. It differs from the estimates above where what is done in one turn changes the next.",
                whole.longest, whole.reward.value, whole.effective
            );
            parts.push(Part::Text { text });
        }
        let mut arms = Table::new("Arms chosen", &["arm", "#decisions", "#share"]);
        for (arm, count) in &self.arms {
            let share = *count as f64 / self.decisions.max(1) as f64;
            arms.rows.push(vec![Cell::text(arm), Cell::number(*count as f64, 0), Cell::share(share)]);
        }
        parts.push(Part::Table(arms));
        if !self.skipped.is_empty() {
            let mut table = Table::new("Left out", &["reason", "#decisions"]);
            for (reason, count) in &self.skipped {
                table.rows.push(vec![Cell::text(reason), Cell::number(*count as f64, 0)]);
            }
            parts.push(Part::Table(table));
        }
        for d in &self.differing {
            let mut table = Table::new("Arms", &["who", "arm", "#probability of that arm here"]);
            table.rows.push(vec![Cell::text("logged"), Cell::text(&d.logged), Cell::number(d.logged_propensity, 3)]);
            table.rows.push(vec![Cell::text(&self.policy), Cell::text(&d.chosen), Cell::number(d.propensity, 3)]);
            parts.push(Part::Case {
                title: format!("{}: {} instead of {}", d.id, d.chosen, d.logged),
                text: format!("`{}` gives the logged arm a probability of {:.3}.", self.policy, d.target),
                table,
                explanations: vec![(self.policy.clone(), d.explanation.clone())],
            });
        }
        let made = if self.made_the_log { ", which made the decisions" } else { "" };
        let feedback = format!(
            "{} of {} decisions have a known reward{}.",
            self.rewarded_in_log,
            self.decisions,
            if self.differing.is_empty() { "" } else { "; those that differ most are below" }
        );
        Section { heading: format!("{} {}{made}", self.policy, self.hash), note: feedback, parts }
    }
}
