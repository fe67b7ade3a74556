//! Charts as inline SVG. Colours come from the page, so that they follow light and dark; every point says what it is when
//! pointed at, without a script.

use std::fmt::Write as _;

use serde::Serialize;

/// Points over two axes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// A logarithmic horizontal axis.
    pub log: bool,
    pub series: Vec<Series>,
}

/// Points of one kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    pub name: String,
    pub mark: Mark,
    pub points: Vec<Dot>,
}

/// How points are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    #[default]
    Line,
    Dashed,
    /// Labelled circles, with their intervals.
    Dots,
    /// Small labelled squares.
    Squares,
}

/// A point.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Dot {
    pub x: f64,
    pub y: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub across: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
/// Left, right, top and bottom.
const MARGIN: (f64, f64, f64, f64) = (64.0, 24.0, 16.0, 48.0);
/// Colours of the page.
pub const COLOURS: usize = 8;

/// A way from values to places.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, from: f64, to: f64, log: bool) -> Option<Self> {
        let usable =
            values.filter(|v| v.is_finite() && (!log || *v > 0.0)).map(|v| if log { libm::log10(v) } else { v });
        let (low, high) = usable.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let room = match high - low {
            w if w > 0.0 => 0.05 * w,
            _ if high >= low => 0.5,
            _ => return None,
        };
        Some(Self { low: low - room, high: high + room, from, to, log })
    }

    fn at(&self, value: f64) -> f64 {
        let value = if self.log { libm::log10(value.max(f64::MIN_POSITIVE)) } else { value };
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }

    /// Round values on the axis, with their texts.
    fn ticks(&self) -> Vec<(f64, String)> {
        if self.log {
            let decades = self.low.floor() as i32..=self.high.ceil() as i32;
            let few = self.high - self.low > 2.6;
            let steps: &[f64] = if few { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let values = decades.flat_map(|d| steps.iter().map(move |s| (s * libm::pow(10.0, f64::from(d)), d)));
            let inside = values.filter(|(v, _)| (self.low..=self.high).contains(&libm::log10(*v)));
            return inside.map(|(v, d)| (v, format!("{v:.*}", (-d).max(0) as usize))).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let power = libm::pow(10.0, libm::log10(rough).floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let decimals = (-libm::log10(step).floor()).clamp(0.0, 12.0) as usize;
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).map(|v| (v, format!("{:.decimals$}", v + 0.0))).collect()
    }
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Chart {
    /// The colour class of each series: those that are not dashed have one each.
    fn colour(at: usize) -> String {
        format!("c{}", at % COLOURS)
    }

    /// An `<svg>` element; a sentence where there is nothing to draw.
    pub fn svg(&self) -> String {
        let (left, right, top, bottom) = MARGIN;
        let points = || self.series.iter().flat_map(|s| &s.points);
        let xs = points().flat_map(|p| [p.x].into_iter().chain(p.across.into_iter().flat_map(|(a, b)| [a, b])));
        let ys = points().flat_map(|p| [p.y].into_iter().chain(p.up.into_iter().flat_map(|(a, b)| [a, b])));
        let x = Axis::over(xs, left, WIDTH - right, self.log);
        let y = Axis::over(ys, HEIGHT - bottom, top, false);
        let (Some(x), Some(y)) = (x, y) else { return "<p>There is nothing to draw.</p>".to_owned() };
        let mut out = String::new();
        let _ = writeln!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}: {} over {}\">",
            escaped(&self.title),
            escaped(&self.y),
            escaped(&self.x)
        );
        for (value, text) in x.ticks() {
            let at = x.at(value);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\"/>",
                HEIGHT - bottom
            );
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>",
                HEIGHT - bottom + 18.0
            );
        }
        for (value, text) in y.ticks() {
            let at = y.at(value);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                WIDTH - right
            );
            let _ = writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", left - 8.0, at + 4.0);
        }
        let middle = (left + WIDTH - right) / 2.0;
        let _ = writeln!(
            out,
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 8.0,
            escaped(&self.x)
        );
        let up = (top + HEIGHT - bottom) / 2.0;
        let _ = writeln!(
            out,
            "<text transform=\"translate(16 {up}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escaped(&self.y)
        );
        // No label lies on a point.
        let dots = self.series.iter().filter(|s| matches!(s.mark, Mark::Dots | Mark::Squares)).flat_map(|s| &s.points);
        let mut taken: Vec<Frame> =
            dots.map(|p| (x.at(p.x), y.at(p.y))).map(|(x, y)| (x - 5.0, y - 5.0, x + 5.0, y + 5.0)).collect();
        for (n, series) in self.series.iter().enumerate() {
            let colour = Self::colour(n);
            let place = |p: &Dot| format!("{:.1},{:.1}", x.at(p.x), y.at(p.y));
            if matches!(series.mark, Mark::Line | Mark::Dashed) {
                let way: Vec<String> = series.points.iter().map(place).collect();
                let dashed = if series.mark == Mark::Dashed { " dashed" } else { "" };
                let _ = writeln!(
                    out,
                    "<polyline class=\"{colour}{dashed}\" points=\"{}\"><title>{}</title></polyline>",
                    way.join(" "),
                    escaped(&series.name)
                );
                continue;
            }
            for p in &series.points {
                Self::dot(&mut out, &mut taken, &colour, series, p, (&x, &y));
            }
        }
        out.push_str("</svg>\n");
        out
    }

    fn dot(out: &mut String, taken: &mut Vec<Frame>, colour: &str, series: &Series, p: &Dot, (x, y): (&Axis, &Axis)) {
        let (cx, cy) = (x.at(p.x), y.at(p.y));
        let range =
            |of: Option<(f64, f64)>| of.map_or_else(String::new, |(a, b)| format!(" ({} to {})", short(a), short(b)));
        let name = if p.label.is_empty() { &series.name } else { &p.label };
        let _ = write!(out, "<g class=\"{colour}\"><title>{}: ", escaped(name));
        let _ = write!(out, "{}{} at {}{}</title>", short(p.y), range(p.up), short(p.x), range(p.across));
        if let Some((low, high)) = p.up {
            let _ =
                write!(out, "<line x1=\"{cx:.1}\" x2=\"{cx:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>", y.at(low), y.at(high));
        }
        if let Some((low, high)) = p.across {
            let _ =
                write!(out, "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{cy:.1}\" y2=\"{cy:.1}\"/>", x.at(low), x.at(high));
        }
        let _ = match series.mark {
            Mark::Squares => {
                write!(out, "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\"/>", cx - 3.5, cy - 3.5)
            }
            _ => write!(out, "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"5\"/>"),
        };
        if !p.label.is_empty() {
            let (at, y, anchor) = room((cx, cy), &p.label, taken);
            let _ =
                write!(out, "<text x=\"{at:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(&p.label));
        }
        out.push_str("</g>\n");
    }

    /// Names and colours of the series.
    pub fn legend(&self) -> Vec<(String, String)> {
        self.series.iter().enumerate().map(|(n, s)| (Self::colour(n), s.name.clone())).collect()
    }
}

/// Left, top, right and bottom.
type Frame = (f64, f64, f64, f64);

/// Where a label of a point meets no other: to the left where the right has no room, above, below, and further away.
fn room((cx, cy): (f64, f64), label: &str, taken: &mut Vec<Frame>) -> (f64, f64, &'static str) {
    let width = 6.6 * label.chars().count() as f64;
    let (from, anchor) = if cx + 9.0 + width > WIDTH { (cx - 9.0 - width, "end") } else { (cx + 9.0, "start") };
    let meets = |a: &Frame, b: &Frame| a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3;
    let frame = |up: f64| (from, cy + up - 11.0, from + width, cy + up + 3.0);
    let ways = [-6.0, 12.0, -20.0, 26.0, -34.0, 40.0, -48.0, 54.0];
    let up = ways.into_iter().find(|up| !taken.iter().any(|t| meets(t, &frame(*up)))).unwrap_or(-6.0);
    taken.push(frame(up));
    (if anchor == "end" { cx - 9.0 } else { from }, cy + up, anchor)
}

/// Four significant digits.
pub(super) fn short(value: f64) -> String {
    super::dollars(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(low: f64, high: f64, log: bool) -> Vec<String> {
        Axis::over([low, high].into_iter(), 0.0, 100.0, log).unwrap().ticks().into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(axis(0.0, 1.0, false), ["0.0", "0.5", "1.0"]);
        assert_eq!(axis(0.61, 0.83, false), ["0.60", "0.65", "0.70", "0.75", "0.80"]);
        assert_eq!(axis(-300.0, 20.0, false), ["-300", "-200", "-100", "0"]);
        assert_eq!(axis(0.0001, 0.02, true), ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01", "0.02"]);
        assert_eq!(axis(0.001, 100.0, true), ["0.001", "0.01", "0.1", "1", "10", "100"]);
        assert_eq!(axis(5.0, 5.0, false), ["4.6", "4.8", "5.0", "5.2", "5.4"]);
    }

    #[test]
    fn nothing_is_drawn_outside() {
        let dot = |x: f64, y: f64| Dot { x, y, up: Some((y - 1.0, y + 1.0)), label: "a<b".into(), ..Dot::default() };
        let chart = Chart {
            title: "t".into(),
            log: true,
            series: vec![Series {
                name: "s".into(),
                mark: Mark::Dots,
                points: vec![dot(0.0, 1.0), dot(3.0, 2.0), dot(9.0, f64::NAN)],
            }],
            ..Chart::default()
        };
        let svg = chart.svg();
        assert!(svg.contains("a&lt;b") && !svg.contains("-1.0\"") && !svg.contains("inf"), "{svg}");
        assert_eq!(Chart::default().svg(), "<p>There is nothing to draw.</p>");
    }
}
