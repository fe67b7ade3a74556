//! A server in a process of its own: started from this very binary, found by the line in which it says where it listens,
//! measured by the kernel's accounts, ended with the bench.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use super::BenchError;

/// What a server says once it accepts connections, followed by its address.
const LISTENING: &str = "listening on http://";

/// Lines of a server's output kept to explain why it died.
const KEPT_LINES: usize = 20;

/// Processor time and memory of a process at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time of all its threads since it began, those that have ended included; seconds.
    pub cpu_s: f64,
    /// Resident now, and at most so far; bytes.
    pub rss: u64,
    pub rss_peak: u64,
}

/// A running server.
pub struct Server {
    pub name: String,
    pub address: SocketAddr,
    child: Child,
    output: Arc<Mutex<VecDeque<String>>>,
}

impl Server {
    /// Starts `weir` with these arguments and waits until it says where it listens.
    ///
    /// # Errors
    /// When it cannot be started, ends, or says nothing within `patience`; with its last lines.
    pub fn start(name: &str, args: &[String], patience: Duration) -> Result<Self, BenchError> {
        let failed = |reason: String| BenchError::Start { what: name.to_owned(), reason };
        let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
        let mut command = Command::new(program);
        // The operator's own configuration, proxies and keys must not reach a measured server.
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy().to_ascii_uppercase();
            if name.starts_with("WEIR_")
                || name.ends_with("_PROXY")
                || name == "DATABASE_URL"
                || name == "OPENAI_API_KEY"
            {
                command.env_remove(&key);
            }
        }
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
        let output = Arc::new(Mutex::new(VecDeque::new()));
        let (found, address) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            drain(stdout, output.clone(), found.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            drain(stderr, output.clone(), found);
        }
        let mut server = Self { name: name.to_owned(), address: SocketAddr::from(([127, 0, 0, 1], 0)), child, output };
        let start = Instant::now();
        loop {
            match address.recv_timeout(Duration::from_millis(100)) {
                Ok(address) => {
                    server.address = address;
                    return Ok(server);
                }
                Err(mpsc::RecvTimeoutError::Timeout) if start.elapsed() < patience => {}
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let reason =
                        format!("it did not say `{LISTENING}…` within {} s\n{}", patience.as_secs(), server.said());
                    return Err(failed(reason));
                }
                // Both pipes are closed: it has ended.
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(failed(format!("it ended\n{}", server.said())));
                }
            }
        }
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The last lines it wrote.
    pub fn said(&self) -> String {
        let lines = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
    }

    /// Its processor time and memory now.
    ///
    /// # Errors
    /// When it has ended, or the system does not tell (only Linux does, in `/proc`).
    pub fn usage(&self) -> Result<Usage, BenchError> {
        let what = || format!("the kernel's accounts of {} ({})", self.name, self.child.id());
        let pid = self.child.id();
        let (rss, rss_peak) = memory(pid).ok_or_else(|| BenchError::io(what())(std::io::ErrorKind::NotFound.into()))?;
        let cpu_s = cpu_seconds(pid).ok_or_else(|| BenchError::io(what())(std::io::ErrorKind::Unsupported.into()))?;
        Ok(Usage { cpu_s, rss, rss_peak })
    }

    /// Waits until it does nothing any more (less than 2 % of a core for a tenth of a second), at most `patience`: what a
    /// server puts off belongs to the load that caused it. Blocking.
    ///
    /// # Errors
    /// As [`Server::usage`].
    pub fn settle(&self, patience: Duration) -> Result<Usage, BenchError> {
        let start = Instant::now();
        let mut before = self.usage()?;
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.usage()?;
            if now.cpu_s - before.cpu_s < 0.002 || start.elapsed() > patience {
                return Ok(now);
            }
            before = now;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its end of input lets the bench's own servers go; weir drains on SIGTERM.
        drop(self.child.stdin.take());
        terminate(self.child.id());
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end: what the kernel says of it, and its standard output. Its errors go where ours go.
///
/// # Errors
/// When it cannot be started or fails.
pub fn accounts(mut command: Command) -> Result<(Usage, Vec<u8>), BenchError> {
    let what = command.get_program().to_string_lossy().into_owned();
    let failed = |reason: String| BenchError::Start { what: what.clone(), reason };
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|e| failed(e.to_string()))?;
    // The kernel's sum at the end counts what we had in memory when the child began; its own table does not.
    let pid = child.id();
    let (stop, stopped) = mpsc::channel::<()>();
    let peak = std::thread::spawn(move || {
        let mut peak = 0;
        while stopped.recv_timeout(Duration::from_millis(5)) == Err(mpsc::RecvTimeoutError::Timeout) {
            peak = peak.max(memory(pid).map_or(0, |(_, peak)| peak));
        }
        peak
    });
    let mut output = Vec::new();
    let read = child.stdout.as_mut().map(|stdout| stdout.read_to_end(&mut output));
    drop(stop);
    let rss_peak = peak.join().unwrap_or(0);
    let (status, cpu_s) = wait(&mut child).map_err(|e| failed(e.to_string()))?;
    read.transpose().map_err(|e| failed(e.to_string()))?;
    if !status.success() {
        return Err(failed(status.to_string()));
    }
    Ok((Usage { cpu_s, rss: 0, rss_peak }, output))
}

/// Bytes that a process has in memory now, and at most had.
fn memory(pid: u32) -> Option<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((kib("VmRSS").unwrap_or(0) << 10, kib("VmHWM").unwrap_or(0) << 10))
}

/// Waits for a child; its processor time comes from the kernel with the end of it.
#[cfg(unix)]
fn wait(child: &mut Child) -> std::io::Result<(std::process::ExitStatus, f64)> {
    use std::os::unix::process::ExitStatusExt as _;
    let mut status = 0;
    // SAFETY: a `rusage` is plain numbers, for which zeros are valid; `wait4` writes only to the two locals. The child has
    // not been waited for, so that its id is still its own.
    let (pid, of) = unsafe {
        let mut of: libc::rusage = std::mem::zeroed();
        (libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut of), of)
    };
    if pid < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    Ok((std::process::ExitStatus::from_raw(status), seconds(of.ru_utime) + seconds(of.ru_stime)))
}

#[cfg(not(unix))]
fn wait(child: &mut Child) -> std::io::Result<(std::process::ExitStatus, f64)> {
    Ok((child.wait()?, 0.0))
}

/// Reads a server's output to its end, for a full pipe would stop it.
fn drain(pipe: impl Read + Send + 'static, output: Arc<Mutex<VecDeque<String>>>, found: mpsc::Sender<SocketAddr>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(address) = address_in(&line) {
                let _ = found.send(address);
            }
            let mut lines = output.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.len() == KEPT_LINES {
                lines.pop_front();
            }
            lines.push_back(line);
        }
    });
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once(LISTENING)?;
    let end = rest.find(|c: char| !(c.is_ascii_hexdigit() || matches!(c, '.' | ':' | '[' | ']'))).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// By the process's own clock, in nanoseconds; `/proc/PID/stat` counts ticks of 10 ms, which is coarse for a short run.
#[cfg(target_os = "linux")]
fn cpu_seconds(pid: u32) -> Option<f64> {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write only to the locals they are given, which live throughout.
    let read = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) == 0 && libc::clock_gettime(clock, &mut time) == 0
    };
    if read { Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9) } else { ticks(pid) }
}

#[cfg(not(target_os = "linux"))]
fn cpu_seconds(pid: u32) -> Option<f64> {
    ticks(pid)
}

/// utime and stime of `/proc/PID/stat`, in ticks of 1/100 s (what Linux shows to programs on every architecture).
fn ticks(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets and may hold anything; utime and stime are the 14th and 15th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) / 100.0)
}

#[cfg(unix)]
fn terminate(pid: u32) {
    // SAFETY: the process is a child that has not been waited for, so that its id is still its own.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}

#[cfg(not(unix))]
fn terminate(_pid: u32) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_the_line() {
        let found = |line| address_in(line).map(|a| a.to_string());
        assert_eq!(found("weir 0.1.0 is listening on http://127.0.0.1:8080"), Some("127.0.0.1:8080".into()));
        assert_eq!(found("listening on http://127.0.0.1:41.\u{1b}[0m"), None);
        assert_eq!(found("listening on http://127.0.0.1:41\u{1b}[0m"), Some("127.0.0.1:41".into()));
        assert_eq!(found("listening on http://[::1]:9/v1"), Some("[::1]:9".into()));
        assert_eq!(found("listening"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_clock_and_the_ticks_agree() {
        let pid = std::process::id();
        let start = Instant::now();
        let mut x = 0_u64;
        while start.elapsed() < Duration::from_millis(300) {
            x = std::hint::black_box(x + 1);
        }
        let (clock, ticks) = (cpu_seconds(pid).unwrap(), ticks(pid).unwrap());
        assert!(clock > 0.1 && (clock - ticks).abs() < 0.1 + clock / 5.0, "{clock} {ticks}");
    }
}
