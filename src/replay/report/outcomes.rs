//! The report over outcomes, for people.

use super::{Cell, Chart, Document, Mark, Part, Readable, Section, Series, Table, calibration, chart::Dot, pairs};
use crate::replay::{
    metrics::Point,
    outcomes::{Differing, Line, OutcomesReport},
};

/// What an oracle's lead is worth.
pub const LUCK: &str = "The oracle picks by the very answers that are scored: where an answer is one draw of many, part of its \
                        lead is luck that no router can have.";

impl Readable for OutcomesReport {
    fn document(&self) -> Document {
        let mut sections = vec![self.policies_section(), self.curve_section()];
        if !self.pairs.is_empty() {
            sections.push(pairs(&self.pairs, "score", "queries"));
        }
        sections.push(self.shares_section());
        if self.policies.iter().any(|l| !l.tasks.is_empty()) {
            sections.push(self.tasks_section());
        }
        if self.policies.iter().any(|l| !l.regret.is_empty()) {
            sections.push(self.regret_section());
        }
        let calibrated = || self.policies.iter().filter_map(|l| Some((l.name.as_str(), l.calibration.as_ref()?)));
        if calibrated().next().is_some() {
            sections.push(calibration::section(calibrated(), "over all models, whichever was taken"));
        }
        if !self.differing.is_empty() {
            sections.push(self.differing_section());
        }
        let mut facts = vec![
            (
                "Outcomes".to_owned(),
                format!("{} ({} queries of {} models)", self.outcomes, self.queries, self.models.len()),
            ),
            ("BLAKE3".to_owned(), self.hash.clone()),
            ("Best single model".to_owned(), self.best.clone()),
            ("Cheapest model".to_owned(), self.cheapest.clone()),
            ("Orders of learning policies".to_owned(), self.orders.to_string()),
        ];
        facts.extend(self.what_if.iter().map(|what| ("What if".to_owned(), what.clone())));
        facts.extend(self.left_out.iter().map(|(why, count)| ("Left out".to_owned(), format!("{count} {why}"))));
        let hashes = self.policies.iter().filter_map(|l| Some(format!("{} {}", l.name, l.hash.as_ref()?)));
        facts.push(("Policies".to_owned(), hashes.collect::<Vec<String>>().join(", ")));
        Document { title: format!("Policies on {}", self.outcomes), facts, sections }
    }
}

impl OutcomesReport {
    fn lines(&self) -> impl Iterator<Item = &Line> {
        self.policies.iter().chain(&self.baselines)
    }

    fn policies_section(&self) -> Section {
        let mut columns = vec![
            "policy",
            "whose",
            "#score",
            "#USD per query",
            "#gain over the best model",
            "#mix",
            "#PGR",
            "#AIQ",
            "#gap to oracle",
        ];
        let (pair, latency) = (self.lines().any(|l| l.pair.is_some()), self.lines().any(|l| l.latency_ms.is_some()));
        if pair {
            columns.extend(["#APGR", "#CPT(50)", "#CPT(80)"]);
        }
        if latency {
            columns.extend(["#p50 ms", "#p90 ms", "#p99 ms"]);
        }
        let (refused, deviation) = (self.lines().any(|l| l.refused > 0.0), self.lines().any(|l| l.deviation.is_some()));
        if refused {
            columns.push("#refused");
        }
        if deviation {
            columns.push("#deviation over orders");
        }
        let mut table = Table::new("Policies, and what they are compared with", &columns);
        for l in self.lines() {
            let mut row = vec![
                Cell::text(&l.name),
                Cell::text(l.origin.told()),
                Cell::estimate(l.mean_score, l.score_interval, 4),
                Cell::usd(l.mean_cost_usd),
                Cell::estimate(l.gain, l.interval, 4),
                Cell::number(l.zero_router, 4),
                Cell::number(l.pgr, 4),
                Cell::number(l.aiq, 4),
                Cell::number(l.gap_to_oracle, 4),
            ];
            if pair {
                row.push(Cell::number(l.pair.map(|p| p.apgr), 4));
                row.push(Cell::number(l.pair.and_then(|p| p.cpt_50), 4));
                row.push(Cell::number(l.pair.and_then(|p| p.cpt_80), 4));
            }
            if latency {
                let of = l.latency_ms;
                row.extend([of.map(|p| p.p50), of.map(|p| p.p90), of.map(|p| p.p99)].map(|v| Cell::number(v, 0)));
            }
            if refused {
                row.push(Cell::share(l.refused));
            }
            if deviation {
                row.push(Cell::number(l.deviation, 4));
            }
            table.rows.push(row);
        }
        for q in &self.quoted {
            let usd = q.cost_usd.map_or(Cell::text("–"), Cell::usd);
            let mut row = vec![
                Cell::text(q.told()),
                Cell::text(format!("quoted: {}", q.source)),
                Cell::number(q.score, 4),
                usd,
                Cell::text("–"),
                Cell::text("–"),
                Cell::number(q.pgr, 4),
                Cell::number(q.aiq, 4),
                Cell::text("–"),
            ];
            if pair {
                row.extend([q.apgr, q.cpt_50, q.cpt_80].map(|v| Cell::number(v, 4)));
            }
            row.resize(columns.len(), Cell::text("–"));
            table.rows.push(row);
        }
        let zero = self.aiq_zero.map_or_else(String::new, |aiq| format!(" The zero router's AIQ is {aiq:.4}."));
        let note = format!(
            "Scores with 95 % bootstrap intervals over queries; the gain's interval is paired and widened for the number of \
             policies. Mix: what models drawn at random score at that cost (the zero router). PGR: share of the gap between the cheapest \
             and the best model that is recovered. AIQ: mean height of the hull of the line and the single models, over costs from the \
             cheapest to the best model's.{zero} Rows are ours, computed here from the outcomes, or quoted; one fitted on this very file is no \
             forecast. {LUCK}"
        );
        Section { heading: "Policies".to_owned(), note, parts: vec![Part::Table(table)] }
    }

    fn curve_section(&self) -> Section {
        let dot = |label: &str, p: Point| Dot { x: p.cost, y: p.score, label: label.to_owned(), ..Dot::default() };
        let line = |name: &str, mark, points: &[Point]| Series {
            name: name.to_owned(),
            mark,
            points: points.iter().map(|p| dot("", *p)).collect(),
        };
        let models = self.models.iter().zip(&self.points).map(|(name, p)| dot(name, *p)).collect();
        let policies = self.policies.iter().map(|l| Dot {
            across: l.cost_interval,
            up: l.score_interval,
            ..dot(&l.name, Point { cost: l.mean_cost_usd, score: l.mean_score })
        });
        let costs = || self.points.iter().map(|p| p.cost);
        let (low, high) = (costs().fold(f64::MAX, f64::min), costs().fold(0.0, f64::max));
        let chart = Chart {
            title: "Quality and cost".to_owned(),
            x: "USD per query".to_owned(),
            y: "mean score".to_owned(),
            log: low > 0.0 && high > 20.0 * low,
            series: vec![
                line("zero router", Mark::Dashed, &self.zero_hull),
                line("policies and models mixed", Mark::Line, &self.hull),
                Series { name: "single models".to_owned(), mark: Mark::Squares, points: models },
                Series { name: "policies".to_owned(), mark: Mark::Dots, points: policies.collect() },
            ],
        };
        let aiq = match (self.aiq_zero, self.aiq) {
            (Some(zero), Some(all)) => {
                format!(" Its mean height (AIQ) is {all:.4}; that of the single models alone {zero:.4}.")
            }
            _ => String::new(),
        };
        let note = format!(
            "Any two points can be mixed by a draw per request, so what can be had is the hull that never falls.{aiq} Policies \
             have 95 % intervals."
        );
        Section { heading: "Quality and cost".to_owned(), note, parts: vec![Part::Chart(chart)] }
    }

    fn shares_section(&self) -> Section {
        let mut columns = vec!["policy".to_owned()];
        columns.extend(self.models.iter().map(|m| format!("#{m}")));
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let mut table = Table::new("Share of the queries that each model gets", &columns);
        for l in self.lines() {
            let share = |m: &String| l.shares.get(m).copied().unwrap_or(0.0);
            let cell = |m: &String| Cell { shade: Some(share(m)).filter(|s| *s > 0.0), ..Cell::share(share(m)) };
            table.rows.push(std::iter::once(Cell::text(&l.name)).chain(self.models.iter().map(cell)).collect());
        }
        Section { heading: "Shares".to_owned(), note: String::new(), parts: vec![Part::Table(table)] }
    }

    fn tasks_section(&self) -> Section {
        let Some(best) = self.baselines.first() else { return Section::default() };
        let mut columns = vec!["task".to_owned()];
        columns.extend(self.lines().map(|l| format!("#{}", l.name)));
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let mut table = Table::new("Mean score by task", &columns);
        // A tenth of a score is a strong colour.
        let shade = |l: &Line, task: &str| {
            let over = l.tasks.get(task)? - best.tasks.get(task)?;
            (over.abs() >= 0.0005).then(|| (over / 0.1).clamp(-1.0, 1.0))
        };
        for task in best.tasks.keys() {
            let cell = |l: &Line| Cell { shade: shade(l, task), ..Cell::number(l.tasks.get(task).copied(), 3) };
            let name = if task.is_empty() { "(none)" } else { task };
            table.rows.push(std::iter::once(Cell::text(name)).chain(self.lines().map(cell)).collect());
        }
        let note = format!("Colours compare with {}: green is above, orange below.", best.name);
        Section { heading: "Tasks".to_owned(), note, parts: vec![Part::Table(table)] }
    }

    fn regret_section(&self) -> Section {
        let series = self.policies.iter().filter(|l| !l.regret.is_empty()).map(|l| Series {
            name: l.name.clone(),
            mark: Mark::Line,
            points: l.regret.iter().map(|(n, r)| Dot { x: *n as f64, y: *r, ..Dot::default() }).collect(),
        });
        let chart = Chart {
            title: format!("Cumulative regret against always {}", self.best),
            x: "queries decided".to_owned(),
            y: "score lost so far".to_owned(),
            log: false,
            series: series.collect(),
        };
        let note = "In the order in which they were decided: that of the file, or, of policies that learn, the mean of the shuffled \
                    orders. What falls earns more than the best single model.";
        Section { heading: "Regret".to_owned(), note: note.to_owned(), parts: vec![Part::Chart(chart)] }
    }

    fn differing_section(&self) -> Section {
        let part = |d: &Differing| {
            let mut table = Table::new(
                "What each policy does",
                &["policy", "likeliest model", "#probability", "#expected score", "#expected USD"],
            );
            let each = || self.policies.iter().zip(&d.policies);
            for (l, c) in each() {
                table.rows.push(vec![
                    Cell::text(&l.name),
                    Cell::text(&c.model),
                    Cell::number(c.probability, 3),
                    Cell::number(c.score, 3),
                    Cell::usd(c.cost_usd),
                ]);
            }
            let task = if d.task.is_empty() { String::new() } else { format!(" ({})", d.task) };
            let start: String = d.text.chars().take(90).collect();
            Part::Case {
                title: format!("{}{task}: {start}", d.id),
                text: d.text.clone(),
                table,
                explanations: each().map(|(l, c)| (l.name.clone(), c.explanation.clone())).collect(),
            }
        };
        Section {
            heading: "Where policies differ most".to_owned(),
            note: "Queries by how far the expected scores are apart. Each decision is explained as the policy explains it when it \
                   serves; one that learns, as in its first order."
                .to_owned(),
            parts: self.differing.iter().map(part).collect(),
        }
    }
}
