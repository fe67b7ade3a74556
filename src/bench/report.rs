//! From runs to rows: medians over the repeats, what a subject adds to the mock alone, a table for people and one JSON
//! document for programs.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use serde::Serialize;

use super::{BenchError, gateway::Run, load::Mode, subject::Subject};

/// One line of the table: medians over repeats.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub subject: Subject,
    pub mode: Mode,
    pub connections: usize,
    pub repeats: usize,
    /// In all repeats.
    pub requests: u64,
    pub errors: u64,
    pub requests_per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Beyond the mock alone in the same repeat, median of the differences; absent for the mock, and without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added_p50_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added_p99_us: Option<f64>,
    pub first_p50_us: f64,
    pub first_p99_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added_first_p50_us: Option<f64>,
    /// Frames per answer as they arrived at the client.
    pub frames: f64,
    pub cpu_s_per_1000: f64,
    /// Processor time divided by the bare proxy's, where that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_over_bare: Option<f64>,
    pub rss_mib: f64,
    pub rss_peak_mib: f64,
}

/// The machine that the figures are of.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: f64,
    pub os: String,
    pub weir: &'static str,
    /// `release` or `debug`; the figures of a debug build say nothing about weir.
    pub build: &'static str,
}

impl Machine {
    /// What the system tells.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: f64 = memory.as_deref().and_then(|m| m.split(' ').next()?.parse().ok()).unwrap_or(0.0);
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: (kib / f64::from(1 << 20) * 10.0).round() / 10.0,
            os: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim()),
            weir: env!("CARGO_PKG_VERSION"),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

/// The whole result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    /// `<mode>.<connections>.<subject>.<quantity>`; memory as `<subject>.rss_mib`.
    pub figures: BTreeMap<String, f64>,
    pub rows: Vec<Row>,
    pub machine: Machine,
}

/// Median; the mean of the middle two where there are two. 0 for none.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

impl Report {
    /// Of these runs.
    pub fn of(runs: &[Run]) -> Self {
        let mut groups: BTreeMap<(Mode, usize, Subject), Vec<&Run>> = BTreeMap::new();
        for run in runs {
            groups.entry((run.mode, run.connections, run.subject)).or_default().push(run);
        }
        let rows: Vec<Row> = groups
            .iter()
            .map(|((mode, connections, subject), runs)| {
                let mock = groups.get(&(*mode, *connections, Subject::Mock)).filter(|_| *subject != Subject::Mock);
                let bare = groups.get(&(*mode, *connections, Subject::BareProxy));
                let of = |f: fn(&Run) -> f64| median(runs.iter().map(|run| f(run)));
                let added = |f: fn(&Run) -> f64| {
                    mock.map(|mock| {
                        let pairs = runs.iter().filter_map(|run| {
                            let beside = mock.iter().find(|m| m.repeat == run.repeat)?;
                            Some(f(run) - f(beside))
                        });
                        median(pairs)
                    })
                };
                let bare_cpu = bare.map(|runs| median(runs.iter().map(|run| run.cpu_s_per_1000)));
                Row {
                    subject: *subject,
                    mode: *mode,
                    connections: *connections,
                    repeats: runs.len(),
                    requests: runs.iter().map(|run| run.requests).sum(),
                    errors: runs.iter().map(|run| run.errors).sum(),
                    requests_per_s: of(|run| run.requests_per_s),
                    p50_us: of(|run| run.p50_us),
                    p99_us: of(|run| run.p99_us),
                    added_p50_us: added(|run| run.p50_us),
                    added_p99_us: added(|run| run.p99_us),
                    first_p50_us: of(|run| run.first_p50_us),
                    first_p99_us: of(|run| run.first_p99_us),
                    added_first_p50_us: added(|run| run.first_p50_us),
                    frames: of(|run| run.frames),
                    cpu_s_per_1000: of(|run| run.cpu_s_per_1000),
                    cpu_over_bare: bare_cpu.filter(|cpu| *cpu > 0.0).map(|cpu| of(|run| run.cpu_s_per_1000) / cpu),
                    rss_mib: of(|run| run.rss_mib),
                    rss_peak_mib: of(|run| run.rss_peak_mib),
                }
            })
            .collect();
        Self { bench: "gateway", figures: figures(&rows), rows, machine: Machine::here() }
    }

    /// Wrong or missing answers of all rows.
    pub fn errors(&self) -> u64 {
        self.rows.iter().map(|row| row.errors).sum()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let m = &self.machine;
        let _ = writeln!(
            out,
            "{}, {} cores, {} GiB, {}; weir {} ({} build)",
            m.cpu, m.cores, m.memory_gib, m.os, m.weir, m.build
        );
        if m.build == "debug" {
            let _ = writeln!(out, "A debug build: these figures say nothing about weir. Use a release build.");
        }
        let mut part = None;
        for row in &self.rows {
            if part.replace((row.mode, row.connections)) != Some((row.mode, row.connections)) {
                let mode = match row.mode {
                    Mode::Json => "JSON",
                    Mode::Sse => "SSE (21 events)",
                };
                let _ = writeln!(
                    out,
                    "\n{mode}, {} connection{}",
                    row.connections,
                    if row.connections == 1 { "" } else { "s" }
                );
                let _ = writeln!(
                    out,
                    "  {:<27} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>6}",
                    "",
                    "req/s",
                    "p50 us",
                    "p99 us",
                    "+p50 us",
                    "+p99 us",
                    "first us",
                    "CPU s/1k",
                    "x bare",
                    "RSS MiB",
                    "errors"
                );
            }
            let or_dash = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
            let _ = writeln!(
                out,
                "  {:<27} {:>9.0} {:>9.0} {:>9.0} {:>9} {:>9} {:>9.0} {:>9.4} {:>7} {:>8.1} {:>6}",
                row.subject.title(),
                row.requests_per_s,
                row.p50_us,
                row.p99_us,
                or_dash(row.added_p50_us, 0),
                or_dash(row.added_p99_us, 0),
                row.first_p50_us,
                row.cpu_s_per_1000,
                or_dash(row.cpu_over_bare, 2),
                row.rss_mib,
                row.errors
            );
        }
        out
    }

    /// Writes `gateway-<time>.json` (with the raw runs) and `gateway-<time>.txt` (the table) into `dir`.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write(&self, runs: &[Run], dir: &Path) -> Result<(), BenchError> {
        fs::create_dir_all(dir).map_err(BenchError::io(dir.display().to_string()))?;
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H%M%SZ").to_string();
        let document = serde_json::json!({
            "bench": self.bench, "figures": self.figures, "rows": self.rows, "machine": self.machine, "runs": runs,
        });
        for (ending, text) in [("json", format!("{document:#}\n")), ("txt", self.table())] {
            let path = dir.join(format!("gateway-{now}.{ending}"));
            fs::write(&path, text).map_err(BenchError::io(path.display().to_string()))?;
        }
        Ok(())
    }
}

fn figures(rows: &[Row]) -> BTreeMap<String, f64> {
    let mut figures = BTreeMap::new();
    for row in rows {
        let name =
            |quantity: &str| format!("{}.{}.{}.{quantity}", row.mode.as_str(), row.connections, row.subject.as_str());
        let optional = [
            ("added_p50_us", row.added_p50_us),
            ("added_p99_us", row.added_p99_us),
            ("cpu_over_bare", row.cpu_over_bare),
        ];
        let all = [
            ("requests_per_s", row.requests_per_s),
            ("p50_us", row.p50_us),
            ("p99_us", row.p99_us),
            ("first_p50_us", row.first_p50_us),
            ("cpu_s_per_1000", row.cpu_s_per_1000),
            ("errors", row.errors as f64),
        ];
        figures.extend(all.map(|(quantity, value)| (name(quantity), value)));
        figures.extend(optional.into_iter().filter_map(|(quantity, value)| Some((name(quantity), value?))));
        let rss = figures.entry(format!("{}.rss_mib", row.subject.as_str())).or_insert(0.0_f64);
        *rss = rss.max(row.rss_mib);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(subject: Subject, repeat: usize, p50_us: f64) -> Run {
        Run {
            subject,
            mode: Mode::Json,
            connections: 8,
            repeat,
            requests: 100,
            errors: 0,
            error: None,
            seconds: 1.0,
            requests_per_s: 100.0,
            p50_us,
            p99_us: 2.0 * p50_us,
            first_p50_us: p50_us,
            first_p99_us: p50_us,
            frames: 1.0,
            cpu_s: 0.01,
            cpu_s_per_1000: p50_us / 1e3,
            rss_mib: 10.0 + repeat as f64,
            rss_peak_mib: 20.0,
        }
    }

    #[test]
    fn medians_and_differences_within_a_repeat() {
        // The second repeat was disturbed: both were slow, the difference stays.
        let runs = [
            run(Subject::Mock, 0, 100.0),
            run(Subject::Mock, 1, 500.0),
            run(Subject::Mock, 2, 110.0),
            run(Subject::BareProxy, 0, 150.0),
            run(Subject::BareProxy, 1, 560.0),
            run(Subject::BareProxy, 2, 165.0),
            run(Subject::PassThrough, 0, 300.0),
        ];
        let report = Report::of(&runs);
        assert_eq!(report.rows.len(), 3);
        let bare = &report.rows[1];
        assert_eq!((bare.subject, bare.p50_us, bare.added_p50_us), (Subject::BareProxy, 165.0, Some(55.0)));
        assert_eq!((bare.requests, bare.rss_mib), (300, 11.0));
        assert_eq!(report.rows[0].added_p50_us, None);
        assert_eq!(report.figures["json.8.bare_proxy.added_p50_us"], 55.0);
        assert_eq!(report.figures["json.8.pass_through.cpu_over_bare"], 300.0 / 165.0);
        assert_eq!(report.figures["bare_proxy.rss_mib"], 11.0);
        assert!(report.table().contains("bare axum + hyper proxy"));
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0].into_iter()), 2.5);
        assert_eq!(median([].into_iter()), 0.0);
    }

    #[test]
    fn raw_results_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let runs = [run(Subject::Mock, 0, 100.0)];
        Report::of(&runs).write(&runs, &dir.path().join("new")).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path().join("new")).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(names.len(), 2);
        let json = names.iter().find(|p| p.extension().is_some_and(|e| e == "json")).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
        assert_eq!((value["bench"].as_str(), value["runs"].as_array().unwrap().len()), (Some("gateway"), 1));
    }
}
