//! Reports for people: a document of texts, tables and charts, written as one HTML file that needs nothing else, and as
//! Markdown. The same report gives the same bytes: no time, no path and no machine is in it.

mod calibration;
mod chart;
mod html;
mod log;
mod markdown;
pub(super) mod outcomes;

use std::{fs, path::Path};

use serde::Serialize;

use self::chart::{Chart, Mark, Series};
use super::metrics::Pair;

/// A report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Document {
    pub title: String,
    /// What it is about: names with values.
    pub facts: Vec<(String, String)>,
    pub sections: Vec<Section>,
}

/// A part under a heading.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    pub heading: String,
    /// What is to be known to read it.
    pub note: String,
    pub parts: Vec<Part>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Part {
    Text {
        text: String,
    },
    Table(Table),
    Chart(Chart),
    /// One thing that is compared, closed until somebody opens it.
    Case {
        title: String,
        text: String,
        table: Table,
        /// Headings with preformatted text.
        explanations: Vec<(String, String)>,
    },
}

/// Rows with a first cell that names them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    pub caption: String,
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Column {
    pub name: String,
    pub numeric: bool,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    pub text: String,
    /// What it is sorted by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// -1 (worse than what it is compared with) to 1 (better), for heat maps; the sign is in the text, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shade: Option<f64>,
}

impl Cell {
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// A number with as many decimals; a dash for none.
    pub fn number(value: impl Into<Option<f64>>, decimals: usize) -> Self {
        match value.into().filter(|v| v.is_finite()) {
            Some(value) => Self { text: format!("{value:.decimals$}"), value: Some(value), shade: None },
            None => Self::text("–"),
        }
    }

    /// A number and the interval around it.
    pub fn estimate(value: f64, interval: Option<(f64, f64)>, decimals: usize) -> Self {
        let text = match interval {
            Some((low, high)) => format!("{value:.decimals$} ({low:.decimals$} to {high:.decimals$})"),
            None => format!("{value:.decimals$}"),
        };
        Self { text, value: Some(value), shade: None }
    }

    /// Money, of any size.
    pub fn usd(value: f64) -> Self {
        Self { text: dollars(value), value: Some(value), shade: None }
    }

    /// Money with the interval around it.
    pub fn usd_estimate(value: f64, interval: Option<(f64, f64)>) -> Self {
        let around =
            interval.map_or_else(String::new, |(low, high)| format!(" ({} to {})", dollars(low), dollars(high)));
        Self { text: dollars(value) + &around, value: Some(value), shade: None }
    }

    /// A time in milliseconds, of any size.
    pub fn ms(value: Option<f64>) -> Self {
        value.map_or(Self::text("–"), |v| Self { text: significant(v, 3), value: Some(v), shade: None })
    }

    /// A share as per cent; nothing for none.
    pub fn share(value: f64) -> Self {
        let text = if value > 0.0 { format!("{:.1} %", 100.0 * value) } else { String::new() };
        Self { text, value: Some(value), shade: None }
    }
}

/// USD with four significant digits.
pub(super) fn dollars(value: f64) -> String {
    significant(value, 4)
}

/// A number of any size with as many significant digits, never in powers of ten.
pub fn significant(value: f64, digits: u32) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let decimals = i64::from(digits) - 1 - libm::log10(value.abs()).floor() as i64;
    format!("{value:.*}", decimals.clamp(0, 12) as usize)
}

impl Table {
    /// A table with these columns; the names of numeric ones begin with `#`.
    pub fn new(caption: &str, columns: &[&str]) -> Self {
        let column = |name: &&str| match name.strip_prefix('#') {
            Some(name) => Column { name: name.to_owned(), numeric: true },
            None => Column { name: (*name).to_owned(), numeric: false },
        };
        Self { caption: caption.to_owned(), columns: columns.iter().map(column).collect(), rows: Vec::new() }
    }
}

/// Every two policies: the difference `of` something, over queries or sessions.
fn pairs(pairs: &[Pair], of: &str, over: &str) -> Section {
    let column = format!("#{of}, first less second");
    let mut table = Table::new("Every two policies", &["first", "second", &column, "verdict"]);
    for p in pairs {
        let verdict = match p.interval {
            Some((low, _)) if low > 0.0 => "the first is better",
            Some((_, high)) if high < 0.0 => "the second is better",
            _ => "not told apart",
        };
        let difference = Cell::estimate(p.difference, p.interval, 4);
        table.rows.push(vec![Cell::text(&p.first), Cell::text(&p.second), difference, Cell::text(verdict)]);
    }
    let note = format!(
        "Differences on the same {over}, with 95 % bootstrap intervals widened for the number of pairs (Bonferroni)."
    );
    Section { heading: "Pairs".to_owned(), note, parts: vec![Part::Table(table)] }
}

/// A report that people read.
pub trait Readable {
    fn document(&self) -> Document;
}

/// Writes `report.json`, `report.md` and `report.html` into the directory, which is made.
///
/// # Errors
/// When a file cannot be written.
pub fn write(dir: &Path, report: &(impl Readable + Serialize)) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    let document = report.document();
    let json = serde_json::to_string_pretty(report).map_err(std::io::Error::other)?;
    fs::write(dir.join("report.json"), json + "\n")?;
    fs::write(dir.join("report.md"), document.markdown())?;
    fs::write(dir.join("report.html"), document.html().map_err(std::io::Error::other)?)
}

/// Eight heights, for a terminal: the least value is the lowest.
pub fn sparkline(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = finite().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    let bar = |v: f64| match high > low && v.is_finite() {
        true => BARS[(((v - low) / (high - low) * 7.0).round() as usize).min(7)],
        false => BARS[0],
    };
    values.iter().map(|v| bar(*v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_and_dollars_are_short() {
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 7.0]), "▁▂▃█");
        assert_eq!(sparkline(&[3.0, 3.0]), "▁▁");
        assert_eq!(sparkline(&[]), "");
        assert_eq!(
            [0.0, 0.000_012_345_6, 0.012_345_6, 1.5, 12_345.6].map(dollars),
            ["0", "0.00001235", "0.01235", "1.500", "12346"]
        );
        assert_eq!([0.004_21, 87.65, 1234.5].map(|v| significant(v, 3)), ["0.00421", "87.7", "1234"]);
    }

    #[test]
    fn what_people_wrote_stays_text() {
        let mut table = Table::new("a|b", &["name", "#x"]);
        table.rows.push(vec![Cell::text("<script>alert(1)</script>\nnext | line"), Cell::number(f64::NAN, 2)]);
        let document = Document {
            title: "T & U".to_owned(),
            facts: vec![("f".to_owned(), "<b>".to_owned())],
            sections: vec![Section {
                heading: "H".to_owned(),
                note: String::new(),
                parts: vec![
                    Part::Table(table.clone()),
                    Part::Case {
                        title: "</summary>".to_owned(),
                        text: "``` <i>".to_owned(),
                        table,
                        explanations: vec![("p".to_owned(), "```\n</pre>".to_owned())],
                    },
                ],
            }],
        };
        let html = document.html().unwrap();
        assert!(!html.contains("<script>alert") && !html.contains("<i>") && !html.contains("</pre>\n</pre>"), "{html}");
        assert!(html.contains("T &amp; U") && html.contains("&lt;b&gt;"));
        let markdown = document.markdown();
        assert!(markdown.contains("&lt;script&gt;alert(1)&lt;/script&gt; next \\| line"), "{markdown}");
        // The fence is longer than what is fenced.
        assert!(markdown.contains("````\n```\n</pre>\n````"), "{markdown}");
    }
}
