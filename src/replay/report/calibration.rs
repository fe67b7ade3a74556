//! What policies expected beside what came, for people.

use super::{Cell, Chart, Mark, Part, Section, Series, Table, chart::Dot};
use crate::{policy::Expects, replay::calibration::Calibration};

impl Expects {
    /// For people.
    pub(super) fn told(self) -> &'static str {
        match self {
            Expects::Quality => "quality",
            Expects::Reward => "reward",
        }
    }
}

/// Of several policies by name.
pub(super) fn section<'a>(of: impl Iterator<Item = (&'a str, &'a Calibration)>, of_what: &str) -> Section {
    let mut table = Table::new(
        "Expected, and what came",
        &["policy", "expects", "#predictions", "#mean distance", "#mean predicted", "#mean of what came"],
    );
    let mut series = Vec::new();
    let (mut low, mut high) = (f64::MAX, f64::MIN);
    for (name, c) in of {
        let mean = |of: fn(&crate::replay::calibration::Group) -> f64| {
            c.groups.iter().map(|g| g.predictions as f64 * of(g)).sum::<f64>() / c.predictions.max(1) as f64
        };
        table.rows.push(vec![
            Cell::text(name),
            Cell::text(c.of.told()),
            Cell::number(c.predictions as f64, 0),
            Cell::number(c.error, 4),
            Cell::number(mean(|g| g.predicted), 4),
            Cell::number(mean(|g| g.came), 4),
        ]);
        for g in &c.groups {
            (low, high) = (low.min(g.predicted).min(g.came), high.max(g.predicted).max(g.came));
        }
        let dot = |g: &crate::replay::calibration::Group| Dot { x: g.predicted, y: g.came, ..Dot::default() };
        series.push(Series { name: name.to_owned(), mark: Mark::Line, points: c.groups.iter().map(dot).collect() });
    }
    let ends = [low, high].map(|v| Dot { x: v, y: v, ..Dot::default() });
    series.push(Series { name: "as expected".to_owned(), mark: Mark::Dashed, points: ends.into() });
    let chart = Chart {
        title: "Expected, and what came".to_owned(),
        x: "mean expectation".to_owned(),
        y: "mean of what came".to_owned(),
        log: false,
        series,
    };
    let note = format!(
        "Groups of as many predictions each, {of_what}. On the dashed line, what was expected is what came; below it, the policy \
         expected too much. Mean distance: the adaptive calibration error."
    );
    Section { heading: "Calibration".to_owned(), note, parts: vec![Part::Chart(chart), Part::Table(table)] }
}
