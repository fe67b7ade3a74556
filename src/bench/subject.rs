//! What is compared, and how weir is set up for it. The one place that writes configuration and policies for the bench.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use serde::Serialize;

use super::{BenchError, mock_upstream, process::Server};

/// One thing that answers chat requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The mock upstream itself: what the client and the wire cost.
    Mock,
    /// axum and hyper-util's client, passing bytes.
    BareProxy,
    /// `weir serve --upstream`, the model named by the client: no decision, but the whole record.
    PassThrough,
    /// `auto` under a policy of rules and a fixed choice.
    Decision,
    /// `auto` under a policy that compares the query's embedding with examples.
    DecisionEmbedding,
    /// `auto` under the policy of `--policy`.
    Policy,
}

impl Subject {
    /// As in rows and figures.
    pub fn as_str(self) -> &'static str {
        match self {
            Subject::Mock => "mock",
            Subject::BareProxy => "bare_proxy",
            Subject::PassThrough => "pass_through",
            Subject::Decision => "decision",
            Subject::DecisionEmbedding => "decision_embedding",
            Subject::Policy => "policy",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Subject::Mock => "mock alone",
            Subject::BareProxy => "bare axum + hyper proxy",
            Subject::PassThrough => "weir, pass-through",
            Subject::Decision => "weir, decision",
            Subject::DecisionEmbedding => "weir, decision + embedding",
            Subject::Policy => "weir, --policy",
        }
    }

    /// What the client writes as `model`.
    pub fn model(self) -> &'static str {
        match self {
            Subject::Mock | Subject::BareProxy | Subject::PassThrough => mock_upstream::MODEL,
            Subject::Decision | Subject::DecisionEmbedding | Subject::Policy => "auto",
        }
    }
}

const RULES_AND_STATIC: &str = r#"policy: bench
models:
  small: {name: small}
  large: {name: large}
rules:
  - name: code-goes-large
    when: signals.code_share > 0.5
    use: large
  - name: pii-stays-small
    when: signals.pii.count > 0 || key.tier == "regulated"
    allow_models: [small]
  - name: long-goes-large
    when: signals.tokens > 2000 && signals.language == "en"
    use: large
select:
  arms: [small, large]
  static: small
"#;

const BY_EMBEDDING: &str = r#"policy: bench
models:
  small: {name: small}
  large: {name: large}
examples:
  refund: ["I want my money back", "You charged me twice"]
  code: ["Write a function", "Fix this error in my program"]
select:
  arms: [small, large]
  similarity:
    sets:
      refund: {arm: small, above: 0.8}
      code: {arm: large, above: 0.8}
    default: small
  no_embedding: large
"#;

/// Where weir's files come from and go to.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// A scratch directory of this bench; each weir gets a data directory in it.
    pub scratch: &'a Path,
    /// A data directory whose fetched models are used, so that nothing is fetched again.
    pub models_of: &'a Path,
    /// The file of `--policy`. Its fleet has the entries `small` (tag `small`) and `large` (tag `large`).
    pub policy: Option<&'a Path>,
}

/// Starts `subject` in front of `upstream` on a free port of the loopback interface.
///
/// # Errors
/// When its files cannot be written or it does not start.
pub fn start(subject: Subject, upstream: Option<&Server>, places: Places<'_>) -> Result<Server, BenchError> {
    let url = upstream.map(Server::url).unwrap_or_default();
    let own = |verb: &str, rest: &[&str]| -> Vec<String> {
        ["bench", verb, "--listen", "127.0.0.1:0"].iter().chain(rest).map(|s| (*s).to_owned()).collect()
    };
    let args = match subject {
        Subject::Mock => own("mock-upstream", &[]),
        Subject::BareProxy => own("bare-proxy", &["--upstream", &url]),
        _ => weir_args(subject, &url, places)?,
    };
    // Loading the embedder and embedding the examples takes a few seconds in a debug build.
    Server::start(subject.title(), &args, Duration::from_secs(60))
}

/// Writes weir's files for `subject` and gives the command line that reads them.
fn weir_args(subject: Subject, upstream: &str, places: Places<'_>) -> Result<Vec<String>, BenchError> {
    let dir = places.scratch.join(subject.as_str());
    let data = dir.join("data");
    fs::create_dir_all(&data).map_err(BenchError::io(data.display().to_string()))?;
    let models = places.models_of.join("models");
    if let Ok(models) = models.canonicalize() {
        let link = data.join("models");
        link_dir(&models, &link).map_err(BenchError::io(link.display().to_string()))?;
    }
    let mut args: Vec<String> = ["serve", "--listen", "127.0.0.1:0", "--data-dir"].map(str::to_owned).into();
    args.push(data.display().to_string());
    if subject == Subject::PassThrough {
        args.extend(["--upstream".to_owned(), upstream.to_owned()]);
        return Ok(args);
    }
    let policy = match (subject, places.policy) {
        (Subject::Policy, Some(file)) => {
            file.canonicalize().map_err(BenchError::io(format!("--policy {}", file.display())))?
        }
        (Subject::DecisionEmbedding, _) => written(&dir, "policy.yaml", BY_EMBEDDING)?,
        _ => written(&dir, "policy.yaml", RULES_AND_STATIC)?,
    };
    let config = written(&dir, "weir.yaml", &configuration(subject, upstream, &policy))?;
    args.extend(["--config".to_owned(), config.display().to_string()]);
    Ok(args)
}

/// `weir.yaml`: two names for the mock, one policy.
fn configuration(subject: Subject, upstream: &str, policy: &Path) -> String {
    let entry = |name: &str| serde_json::json!({"name": name, "tags": [name], "remote": {"url": upstream, "model": mock_upstream::MODEL}});
    let mut config = serde_json::json!({"fleet": [entry("small"), entry("large")], "policies": [policy]});
    config["embedder"] = match subject {
        Subject::Decision => serde_json::json!({"model": "off"}),
        // However long the queue before the embedder, every decision is to wait for it: that is what is measured.
        _ => serde_json::json!({"model": "bge-small-en", "deadline_ms": 20_000}),
    };
    // JSON is YAML.
    config.to_string()
}

fn written(dir: &Path, name: &str, text: &str) -> Result<std::path::PathBuf, BenchError> {
    let path = dir.join(name);
    fs::write(&path, text).map_err(BenchError::io(path.display().to_string()))?;
    Ok(path)
}

#[cfg(unix)]
fn link_dir(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn link_dir(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_dir(target, link)
}

/// Where a bench server may listen.
///
/// # Errors
/// For anything but the loopback interface: these servers answer everybody.
pub fn loopback(address: SocketAddr) -> Result<SocketAddr, BenchError> {
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err(BenchError::Usage(format!(
        "{address} is not on the loopback interface; bench servers listen on 127.0.0.1 only"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weir_is_started_on_loopback_with_files_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        fs::create_dir_all(home.join("models/bge-small-en")).unwrap();
        let places = Places { scratch: dir.path(), models_of: &home, policy: None };
        let args = weir_args(Subject::DecisionEmbedding, "http://127.0.0.1:9", places).unwrap();
        assert_eq!(args[..3], ["serve", "--listen", "127.0.0.1:0"]);
        let data = Path::new(&args[4]);
        assert!(data.join("models/bge-small-en").is_dir());
        let config: serde_json::Value = serde_json::from_slice(&fs::read(&args[6]).unwrap()).unwrap();
        let policy = config["policies"][0].as_str().unwrap();
        assert!(fs::read_to_string(policy).unwrap().contains("similarity"));
        assert_eq!(config["fleet"][1]["remote"]["url"], "http://127.0.0.1:9");

        let args = weir_args(Subject::PassThrough, "http://127.0.0.1:9", places).unwrap();
        assert_eq!(args[5..], ["--upstream", "http://127.0.0.1:9"]);
    }

    #[test]
    fn only_loopback() {
        assert!(loopback("127.0.0.1:0".parse().unwrap()).is_ok());
        assert!(loopback("0.0.0.0:0".parse().unwrap()).is_err());
    }
}
