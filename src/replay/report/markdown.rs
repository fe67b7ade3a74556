//! A document as Markdown.

use std::fmt::Write as _;

use super::{Document, Part, Table, chart::short};

/// Text for a line of Markdown: no markup of its own, no line break.
fn inline(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('|', "\\|")
}

/// A fence that the text does not contain.
fn fenced(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    format!("{fence}\n{}\n{fence}\n", text.trim_end())
}

impl Table {
    fn markdown(&self, out: &mut String) {
        let _ = writeln!(out, "{}:\n", inline(&self.caption));
        let names: Vec<String> = self.columns.iter().map(|c| inline(&c.name)).collect();
        let rule: Vec<&str> = self.columns.iter().map(|c| if c.numeric { "---:" } else { "---" }).collect();
        let _ = writeln!(out, "| {} |\n|{}|", names.join(" | "), rule.join("|"));
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|c| inline(&c.text)).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
        out.push('\n');
    }
}

impl Document {
    /// Charts become lists of their points.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", inline(&self.title));
        for (name, value) in &self.facts {
            let _ = writeln!(out, "- {}: {}", inline(name), inline(value));
        }
        for section in &self.sections {
            let _ = writeln!(out, "\n## {}\n", inline(&section.heading));
            if !section.note.is_empty() {
                let _ = writeln!(out, "{}\n", inline(&section.note));
            }
            for part in &section.parts {
                match part {
                    Part::Text { text } => {
                        let _ = writeln!(out, "{}\n", inline(text));
                    }
                    Part::Table(table) => table.markdown(&mut out),
                    Part::Chart(chart) => {
                        let _ = writeln!(
                            out,
                            "{} ({} over {}):\n",
                            inline(&chart.title),
                            inline(&chart.y),
                            inline(&chart.x)
                        );
                        for series in &chart.series {
                            // A curve is long; its ends and eighths say enough.
                            let step = series.points.len().div_ceil(9).max(1);
                            let points = series.points.iter().step_by(step);
                            let points: Vec<String> = points
                                .map(|p| {
                                    let label = if p.label.is_empty() {
                                        String::new()
                                    } else {
                                        format!("{} ", inline(&p.label))
                                    };
                                    format!("{label}{} at {}", short(p.y), short(p.x))
                                })
                                .collect();
                            let _ = writeln!(out, "- {}: {}", inline(&series.name), points.join("; "));
                        }
                        out.push('\n');
                    }
                    Part::Case { title, text, table, explanations } => {
                        let _ = writeln!(out, "### {}\n\n{}", inline(title), fenced(text));
                        table.markdown(&mut out);
                        for (name, text) in explanations {
                            let _ = writeln!(out, "{}:\n\n{}", inline(name), fenced(text));
                        }
                    }
                }
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }
}
