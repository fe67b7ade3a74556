//! `weir bench gateway`: the runs. All servers are started once; then every repeat visits every combination of mode and
//! connections, and within it every subject, in an order that rotates with the repeat: what disturbs the machine for a
//! while disturbs all of them.

use std::path::PathBuf;

use serde::Serialize;

use super::{
    BenchError,
    load::{self, Answered, Load, Mode},
    process::{Server, Usage},
    subject::{self, Places, Subject},
};

/// A run is preceded by this much unmeasured load: connections, pools and caches are those of a server that has worked.
const WARM_UP_SECONDS: f64 = 0.3;

/// How long a server may go on after the load has ended, with what it put off.
const SETTLE: std::time::Duration = std::time::Duration::from_secs(5);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    pub subjects: Vec<Subject>,
    pub modes: Vec<Mode>,
    pub connections: Vec<usize>,
    pub repeat: usize,
    /// Of each run.
    pub seconds: f64,
    pub requests: Option<u64>,
    pub policy: Option<PathBuf>,
    /// See [`Places::models_of`].
    pub models_of: PathBuf,
}

/// One run, raw.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub subject: Subject,
    pub mode: Mode,
    pub connections: usize,
    pub repeat: usize,
    pub requests: u64,
    pub errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub seconds: f64,
    pub requests_per_s: f64,
    /// Latency of whole answers, microseconds.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Until the first byte of the body, microseconds.
    pub first_p50_us: f64,
    pub first_p99_us: f64,
    /// Frames per answer as the client saw them.
    pub frames: f64,
    /// Of the server's process, what it did after the last answer included.
    pub cpu_s: f64,
    pub cpu_s_per_1000: f64,
    pub rss_mib: f64,
    pub rss_peak_mib: f64,
}

impl Plan {
    /// Says what is wrong with the numbers before anything starts.
    ///
    /// # Errors
    /// When a bound is missing or beyond what this bench is for.
    pub fn check(&self) -> Result<(), BenchError> {
        let wrong = |text: &str| Err(BenchError::Usage(text.to_owned()));
        if self.connections.is_empty() || self.connections.iter().any(|n| !(1..=1024).contains(n)) {
            return wrong("--connections takes numbers from 1 to 1024, for example 1,8,64");
        }
        if !(1..=20).contains(&self.repeat) {
            return wrong("--repeat takes a number from 1 to 20");
        }
        if !(0.05..=600.0).contains(&self.seconds) {
            return wrong("--seconds takes a number from 0.05 to 600");
        }
        if self.requests == Some(0) {
            return wrong("--requests must be at least 1");
        }
        if self.subjects.contains(&Subject::Policy) && self.policy.is_none() {
            return wrong("the subject `policy` needs --policy FILE");
        }
        Ok(())
    }

    /// Runs everything; `progress` is told of each run beforehand.
    ///
    /// # Errors
    /// When a server does not start or dies. Wrong answers are counted in the runs instead.
    pub async fn run(&self, mut progress: impl FnMut(&str)) -> Result<Vec<Run>, BenchError> {
        self.check()?;
        let scratch = tempfile::tempdir().map_err(BenchError::io("a scratch directory"))?;
        let places = Places { scratch: scratch.path(), models_of: &self.models_of, policy: self.policy.as_deref() };
        let mock = subject::start(Subject::Mock, None, places)?;
        let mut servers = Vec::new();
        for subject in self.subjects.iter().filter(|s| **s != Subject::Mock) {
            progress(&format!("starting {}", subject.title()));
            servers.push((*subject, subject::start(*subject, Some(&mock), places)?));
        }
        if self.subjects.contains(&Subject::Mock) {
            servers.insert(0, (Subject::Mock, mock));
        } else {
            // It still serves the others.
            servers.push((Subject::Mock, mock));
        }
        let mut runs = Vec::new();
        for repeat in 0..self.repeat {
            for mode in &self.modes {
                for connections in &self.connections {
                    for place in 0..servers.len() {
                        let (subject, server) = &servers[(place + repeat) % servers.len()];
                        if !self.subjects.contains(subject) {
                            continue;
                        }
                        progress(&format!(
                            "run {} of {}: {}, {}, {connections} connections",
                            runs.len() + 1,
                            self.repeat * self.modes.len() * self.connections.len() * self.subjects.len(),
                            subject.title(),
                            mode.as_str()
                        ));
                        let load = Load {
                            mode: *mode,
                            connections: *connections,
                            seconds: self.seconds,
                            requests: self.requests,
                        };
                        runs.push(measure(*subject, server, load, repeat).await?);
                    }
                }
            }
        }
        Ok(runs)
    }
}

async fn measure(subject: Subject, server: &Server, load: Load, repeat: usize) -> Result<Run, BenchError> {
    let warm_up = Load { seconds: WARM_UP_SECONDS.min(load.seconds), requests: load.requests, ..load };
    load::run(server.address, subject.model(), warm_up).await;
    let before = settled(server)?;
    let answered = load::run(server.address, subject.model(), load).await;
    let after = settled(server)?;
    if answered.whole.is_empty() {
        let reason = answered.error.unwrap_or_else(|| "no request was answered in time".into());
        let reason = format!("{reason}\n{}", server.said());
        return Err(BenchError::Load { what: subject.title().into(), reason });
    }
    Ok(row(subject, load, repeat, &answered, before, after))
}

/// Blocks this task's thread; nothing else has to run meanwhile.
fn settled(server: &Server) -> Result<Usage, BenchError> {
    tokio::task::block_in_place(|| server.settle(SETTLE))
}

fn row(subject: Subject, load: Load, repeat: usize, answered: &Answered, before: Usage, after: Usage) -> Run {
    let requests = answered.whole.len() as u64;
    let micros = |sorted: &[u64], p: f64| percentile(sorted, p) as f64 / 1e3;
    let cpu_s = after.cpu_s - before.cpu_s;
    Run {
        subject,
        mode: load.mode,
        connections: load.connections,
        repeat,
        requests,
        errors: answered.errors,
        error: answered.error.clone(),
        seconds: answered.seconds,
        requests_per_s: requests as f64 / answered.seconds,
        p50_us: micros(&answered.whole, 0.5),
        p99_us: micros(&answered.whole, 0.99),
        first_p50_us: micros(&answered.first, 0.5),
        first_p99_us: micros(&answered.first, 0.99),
        frames: answered.frames as f64 / requests as f64,
        cpu_s,
        cpu_s_per_1000: cpu_s / requests as f64 * 1e3,
        rss_mib: after.rss as f64 / f64::from(1 << 20),
        rss_peak_mib: after.rss_peak as f64 / f64::from(1 << 20),
    }
}

/// Nearest rank: the least value that at least `p` of all do not exceed. 0 for none.
fn percentile(sorted: &[u64], p: f64) -> u64 {
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.99), percentile(&values, 1.0)), (50, 99, 100));
        assert_eq!((percentile(&[7], 0.5), percentile(&[7], 0.99), percentile(&[], 0.5)), (7, 7, 0));
        assert_eq!(percentile(&[1, 2], 0.99), 2);
    }

    #[test]
    fn a_plan_without_bounds_is_refused() {
        let plan = Plan {
            subjects: vec![Subject::Mock],
            modes: vec![Mode::Json],
            connections: vec![1],
            repeat: 1,
            seconds: 1.0,
            requests: None,
            policy: None,
            models_of: PathBuf::new(),
        };
        assert!(plan.check().is_ok());
        for wrong in [
            Plan { connections: vec![0], ..plan.clone() },
            Plan { connections: vec![], ..plan.clone() },
            Plan { seconds: f64::INFINITY, ..plan.clone() },
            Plan { seconds: f64::NAN, ..plan.clone() },
            Plan { repeat: 0, ..plan.clone() },
            Plan { requests: Some(0), ..plan.clone() },
            Plan { subjects: vec![Subject::Policy], ..plan.clone() },
        ] {
            assert_eq!(wrong.check().unwrap_err().kind(), "usage", "{wrong:?}");
        }
    }
}
