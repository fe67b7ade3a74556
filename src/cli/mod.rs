//! The command line: one file per verb. Every verb that reports takes `--json` and then prints exactly one JSON document
//! on stdout; logs go to stderr. Exit codes: 0 fine, 1 found something wrong, 2 wrong usage.

/// Like `println!`, but a reader that has gone away (`weir models list | head -1`) is no defect to panic over.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::cli::print(format_args!($($argument)*))
    };
}

mod audit;
mod bench;
mod check;
mod kv;
mod models;
mod policy;
mod replay;
mod serve;
mod server;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

/// A line on stdout.
fn print(line: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    if let Err(error) = writeln!(std::io::stdout(), "{line}")
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        eprintln!("weir: cannot write to stdout: {error}");
    }
}

/// A multi-model semantic router and cascade orchestrator that speaks the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "weir", version, about, propagate_version = true, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve the OpenAI API.
    Serve(serve::ServeArgs),
    /// Check the whole configuration before anything starts.
    Check(check::CheckArgs),
    /// Write, check, explain and test policies.
    Policy(policy::PolicyArgs),
    /// What policies would have done and earned, on recorded decisions or measured outcomes.
    Replay(Box<replay::ReplayArgs>),
    /// Read and verify the record.
    Audit(audit::AuditArgs),
    /// Models and libraries: what is there, fetch it, verify it.
    Models(models::ModelsArgs),
    /// Documents that are computed once and reused wherever they stand.
    Kv(Box<kv::KvArgs>),
    /// Measure.
    Bench(bench::BenchArgs),
}

/// Where weir keeps its data; shared by the verbs that read or write it.
#[derive(Clone, Debug, Args)]
pub struct DataDir {
    /// Data directory: event log, embedded store, cached models [default: the platform's, or WEIR_HOME]
    #[arg(long, value_name = "DIR", env = "WEIR_HOME")]
    pub data_dir: Option<PathBuf>,
}

impl DataDir {
    /// The directory given, else the platform's place for program data, else `./weir-data`.
    pub fn path(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| {
            directories::ProjectDirs::from("", "", "weir")
                .map(|dirs| dirs.data_dir().to_owned())
                .unwrap_or_else(|| PathBuf::from("weir-data"))
        })
    }
}

/// Parses the command line and runs the verb.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.verb {
        Verb::Serve(args) => serve::run(args),
        Verb::Check(args) => check::run(args),
        Verb::Policy(args) => policy::run(args),
        Verb::Replay(args) => replay::run(&args),
        Verb::Audit(args) => audit::run(args),
        Verb::Models(args) => models::run(args),
        Verb::Kv(args) => kv::run(*args),
        Verb::Bench(args) => bench::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weir: {}", told(&error));
            ExitCode::from(1)
        }
    }
}

/// The runtime for verbs that do I/O.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// An error and its causes in one line; a cause that the sentence before it tells already is not told again.
fn told(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |said, cause| {
        let cause = cause.to_string();
        if said.contains(&cause) { said } else { format!("{said}: {cause}") }
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    #[test]
    fn no_cause_is_told_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read x: {source}")]
        struct Read {
            source: std::io::Error,
        }
        let source = std::io::Error::other("no such thing");
        let error = Err::<(), _>(Read { source }).context("while starting").unwrap_err();
        assert_eq!(super::told(&error), "while starting: cannot read x: no such thing");
    }
}
