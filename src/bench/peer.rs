//! llama.cpp beside weir's engine: built by pip from its Python package's source on this very machine, run in turn with weir.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use super::{BenchError, engine::Plan};

/// The package whose source distribution brings llama.cpp.
const PACKAGE: &str = "llama-cpp-python==0.3.36";
const SCRIPT: &str = include_str!("../../eval/bench/peer_llama_cpp.py");

/// A Python in which llama.cpp is installed.
pub struct Peer {
    python: PathBuf,
    script: PathBuf,
    dir: PathBuf,
}

/// What one run of the script says.
#[derive(Clone, Debug, Deserialize)]
pub struct Turn {
    pub peer: String,
    pub peak_kib: u64,
    pub rows: Vec<Figure>,
}

/// One figure of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Figure {
    /// `as it is`, or the format that the weights were brought into.
    pub weights: String,
    pub what: String,
    pub threads: usize,
    pub tokens_per_s: f64,
}

impl Peer {
    /// Builds llama.cpp below `dir` where that has not been done (ten minutes on two cores).
    ///
    /// # Errors
    /// When there is no Python with `venv`, or the build fails: with what it said.
    pub fn ensure(dir: &Path) -> Result<Self, BenchError> {
        let dir = dir.join("peers").join(PACKAGE);
        let peer = Self { python: dir.join("bin/python"), script: dir.join("peer.py"), dir };
        let done = peer.dir.join("done");
        if !done.exists() {
            let system = std::env::var_os("WEIR_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
            say(Command::new(system).args(["-m", "venv"]).arg(&peer.dir))?;
            let pip = ["-m", "pip", "install", "-q", "--no-binary", "llama-cpp-python", PACKAGE];
            say(Command::new(&peer.python).args(pip).env("CMAKE_ARGS", "-DGGML_NATIVE=ON"))?;
            std::fs::write(&done, PACKAGE).map_err(BenchError::io("the peer's folder"))?;
        }
        std::fs::write(&peer.script, SCRIPT).map_err(BenchError::io("the peer's folder"))?;
        Ok(peer)
    }

    /// Measures each case of a plan once, with the weights as they are and as Q4_0.
    ///
    /// # Errors
    /// When the script fails: with what it said.
    pub fn turn(&self, plan: &Plan, threads: usize) -> Result<Turn, BenchError> {
        let mut command = Command::new(&self.python);
        command.arg(&self.script).arg(&plan.model).args(["--repeats", "1", "--threads", &threads.to_string()]);
        for (name, values) in [("--prefill", &plan.prefill), ("--depths", &plan.depths), ("--batches", &plan.batches)] {
            command.arg(name).args(values.iter().map(usize::to_string));
        }
        let said = say(command.arg("--requantise").arg(&self.dir))?;
        let what = "llama.cpp".to_owned();
        serde_json::from_str(&said).map_err(|e| BenchError::Start { what, reason: format!("it said no figures: {e}") })
    }
}

/// What a program says on its output.
fn say(command: &mut Command) -> Result<String, BenchError> {
    let what = || command.get_program().display().to_string();
    let failed = |what: String, reason: String| BenchError::Start { what, reason };
    let name = what();
    let output = command.output().map_err(|e| failed(name.clone(), e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = said.lines().rev().take(20).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        return Err(failed(name, format!("{}: {tail}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
