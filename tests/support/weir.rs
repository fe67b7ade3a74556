//! A weir of its own for a test: the real program, on a free port, in a directory that goes away with it.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long a start may take; generous, because other tests run beside it.
const START: Duration = Duration::from_secs(120);

/// A running weir.
pub struct Weir {
    child: Child,
    pub url: String,
    stderr: Arc<Mutex<String>>,
}

/// The program under test.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    // What the operator's shell happens to hold must not leak into tests.
    for name in ["DATABASE_URL", "WEIR_CONFIG", "WEIR_LISTEN", "WEIR_HOME", "OPENAI_API_KEY", "WEIR_LOG"] {
        command.env_remove(name);
    }
    command.env("WEIR_OFFLINE", "1").env("NO_COLOR", "1");
    command
}

/// Runs a verb to its end: exit code, stdout, stderr.
pub fn run(args: &[&str]) -> (i32, String, String) {
    let out = program().args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}

/// Writes `weir.yaml` into `dir` and gives its path.
pub fn config(dir: &Path, yaml: &str) -> PathBuf {
    let path = dir.join("weir.yaml");
    std::fs::write(&path, yaml).unwrap();
    path
}

impl Weir {
    /// Starts `weir serve --config` on a free port and waits until it listens.
    pub fn start(config: &Path, data_dir: &Path, more: &[&str]) -> Self {
        Self::try_start(config, data_dir, more).unwrap_or_else(|(status, stderr)| {
            panic!("weir did not start ({status:?}):\n{stderr}");
        })
    }

    /// The same, but a weir that ends instead of listening is a result.
    pub fn try_start(config: &Path, data_dir: &Path, more: &[&str]) -> Result<Self, (Option<ExitStatus>, String)> {
        let mut command = program();
        command.args(["serve", "--listen", "127.0.0.1:0", "--config"]).arg(config).arg("--data-dir").arg(data_dir);
        Self::spawn(command.args(more))
    }

    /// The same with no file larger than `kib` KiB: what a full disk feels like.
    pub fn start_limited(config: &Path, data_dir: &Path, kib: u32) -> Self {
        let mut command = program();
        let weir = command.get_program().to_owned();
        let environment: Vec<_> = command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        command = Command::new("bash");
        for (name, value) in environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // SIGXFSZ ignored: the write fails instead. `ulimit -f` counts KiB.
        command.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"")).arg(weir);
        command.args(["serve", "--listen", "127.0.0.1:0", "--config"]).arg(config).arg("--data-dir").arg(data_dir);
        Self::spawn(&mut command)
            .unwrap_or_else(|(status, stderr)| panic!("weir did not start ({status:?}):\n{stderr}"))
    }

    fn spawn(command: &mut Command) -> Result<Self, (Option<ExitStatus>, String)> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut errors = child.stderr.take().unwrap();
        let kept = Arc::clone(&stderr);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = errors.read(&mut buffer) {
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let (found, listening) = std::sync::mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once("http://")
                    && line.contains("listening")
                {
                    let _ = found.send(format!("http://{}", rest.trim_end_matches('/')));
                }
            }
        });
        let started = Instant::now();
        loop {
            if let Ok(url) = listening.recv_timeout(Duration::from_millis(20)) {
                return Ok(Self { child, url, stderr });
            }
            if let Some(status) = child.try_wait().unwrap() {
                let _ = reader.join();
                return Err((Some(status), stderr.lock().unwrap().clone()));
            }
            if started.elapsed() > START {
                let _ = child.kill();
                return Err((None, stderr.lock().unwrap().clone()));
            }
        }
    }

    /// What it has said on stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Its memory in use and the most that it ever was, in KiB.
    pub fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        (of("VmRSS:"), of("VmHWM:"))
    }

    /// kill -9, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) -> ExitStatus {
        // SAFETY: a signal to a child of ours that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.child.wait().unwrap()
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        answer(client().get(format!("{}{path}", self.url)).send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(client().post(format!("{}{path}", self.url)).json(body).send().await.unwrap()).await
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("weir said:\n{}", self.stderr());
        }
    }
}

/// A client without TLS needs; one per call, so that no connection outlives a killed weir.
pub fn client() -> reqwest::Client {
    weir::tls::install_provider();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

async fn answer(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A chat request of one user message.
pub fn chat(model: &str, text: &str) -> Value {
    serde_json::json!({"model": model, "messages": [{"role": "user", "content": text}]})
}
