//! `weir kv`: documents that are computed once and reused wherever they stand. What it costs a model is measured here; what a weir
//! that runs keeps of them is asked over HTTP.

mod calibrate;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use indicatif::{BinaryBytes, HumanDuration};
use jiff::SignedDuration;
use reqwest::Method;
use serde_json::{Value, json};

use super::server::Server;

#[derive(Debug, Args)]
pub struct KvArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measure what reusing documents costs a model, and write its record: models without one do not reuse them.
    #[command(after_help = calibrate::EXAMPLE)]
    Calibrate(calibrate::CalibrateArgs),
    /// What models of a weir that runs keep of prompts and documents.
    #[command(after_help = "Example:\n  weir kv stat --url http://127.0.0.1:8080")]
    Stat {
        #[command(flatten)]
        server: Server,
    },
    /// What a model keeps of documents, or of a whole request.
    #[command(after_help = "Examples:\n  weir kv lookup smollm2-135m-instruct handbook.txt prices.txt\n  \
                            weir kv lookup smollm2-135m-instruct --request request.json --tenant acme")]
    Lookup(Documents),
    /// Compute documents beforehand, and keep them before all that is not pinned.
    #[command(after_help = "Example:\n  weir kv pin smollm2-135m-instruct handbook.txt --ttl 8h --tenant acme")]
    Pin {
        #[command(flatten)]
        documents: Documents,
        /// For how long, such as 30m or 8h
        #[arg(long, value_name = "DURATION", default_value = "1h")]
        ttl: SignedDuration,
    },
    /// Let go of documents, or of all that a model keeps, in memory and on disk; what is in use stays.
    #[command(after_help = "Examples:\n  weir kv clear smollm2-135m-instruct handbook.txt\n  \
                            weir kv clear smollm2-135m-instruct --all")]
    Clear {
        #[command(flatten)]
        documents: Documents,
        /// All that the model keeps, of whomever
        #[arg(long, conflicts_with_all = ["files", "request"])]
        all: bool,
    },
}

/// Documents of a model, and whose.
#[derive(Debug, Args)]
struct Documents {
    /// The entry of the fleet
    model: String,
    /// Texts, each a document as requests have it
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The body of a chat request, its documents marked
    #[arg(long, value_name = "FILE", conflicts_with = "files")]
    request: Option<PathBuf>,
    /// Documents are each tenant's own: whose [default: the key's that asks]
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// Of keys without a tenant: whose, by the key's id
    #[arg(long, value_name = "ID", conflicts_with = "tenant")]
    of_key: Option<String>,
    #[command(flatten)]
    server: Server,
}

impl Documents {
    /// The body of a question about them.
    fn body(&self) -> anyhow::Result<Value> {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).with_context(|| format!("{} cannot be read as text", path.display()))
        };
        let messages = match &self.request {
            Some(path) => {
                let body: Value = serde_json::from_str(&read(path)?)
                    .with_context(|| format!("{} is no JSON document", path.display()))?;
                let messages = body.get("messages").cloned();
                messages.with_context(|| format!("{} has no `messages`", path.display()))?
            }
            None => {
                anyhow::ensure!(!self.files.is_empty(), "name the documents: files with their text, or --request FILE");
                let texts: Vec<String> = self.files.iter().map(read).collect::<anyhow::Result<_>>()?;
                let part = |text: &String| json!({"type": "text", "text": text, "weir": {"chunk": true}});
                json!([{"role": "user", "content": texts.iter().map(part).collect::<Vec<_>>()}])
            }
        };
        let mut body = json!({"model": self.model, "messages": messages});
        for (key, value) in [("tenant", &self.tenant), ("key", &self.of_key)] {
            if let Some(value) = value {
                body[key] = json!(value);
            }
        }
        Ok(body)
    }

    /// Asks, and says what is kept of them.
    fn show(&self, path: &str, body: Value) -> anyhow::Result<ExitCode> {
        let said = self.server.ask(Method::POST, path, Some(body))?;
        if self.server.json {
            say!("{said:#}");
            return Ok(ExitCode::SUCCESS);
        }
        let documents = said["documents"].as_array().map(Vec::as_slice).unwrap_or_default();
        for (number, document) in documents.iter().enumerate() {
            // A request may have more documents than files, and a document out of size is none.
            let alike = self.files.len() == documents.len();
            let name = self.files.get(number).filter(|_| alike).map(|file| file.display().to_string());
            let name = name.unwrap_or_else(|| format!("document {}", number + 1));
            say!("{name}: {}", in_words(document));
        }
        say!(
            "{} tokens in all, {} of the beginning in memory{}",
            said["tokens"],
            said["prefix_tokens"],
            match said["chunk_reuse"].as_str() {
                Some(why) => format!("; documents are not reused: {why}"),
                None if documents.is_empty() => "; no document of a size that is reused".to_owned(),
                None => String::new(),
            }
        );
        Ok(ExitCode::SUCCESS)
    }
}

pub fn run(args: KvArgs) -> anyhow::Result<ExitCode> {
    match args.verb {
        Verb::Calibrate(args) => calibrate::run(&args),
        Verb::Stat { server } => stat(&server),
        Verb::Lookup(documents) => documents.show("/v1/kv/lookup", documents.body()?),
        Verb::Pin { documents, ttl } => {
            let mut body = documents.body()?;
            body["ttl_s"] = json!(u64::try_from(ttl.as_secs()).context("--ttl is negative")?);
            documents.show("/v1/kv/pin", body)
        }
        Verb::Clear { documents, all } => clear(&documents, all),
    }
}

/// How a document is kept.
fn in_words(document: &Value) -> String {
    let mut places = Vec::new();
    if document["in_memory"] == true {
        places.push("in memory".to_owned());
    }
    if let Some(seconds) = document["pinned_s"].as_u64() {
        places.push(format!("pinned for {} more", HumanDuration(std::time::Duration::from_secs(seconds))));
    }
    if document["on_disk"] == true {
        places.push("on disk".to_owned());
    }
    if places.is_empty() {
        places.push("not kept".to_owned());
    }
    format!("{} tokens, {}", document["tokens"], places.join(", "))
}

fn stat(server: &Server) -> anyhow::Result<ExitCode> {
    let said = server.ask(Method::GET, "/v1/kv", None)?;
    if server.json {
        say!("{said:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let entries = said["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    if entries.is_empty() {
        say!("no model that is loaded in this weir keeps keys and values");
    }
    for entry in entries {
        let kv = &entry["kv"];
        let number = |key: &str| kv[key].as_u64().unwrap_or(0);
        let bytes = |blocks: u64| BinaryBytes(blocks * number("block_bytes"));
        say!("{}", entry["model"].as_str().unwrap_or_default());
        say!(
            "  memory of all models: {} of at most {}",
            BinaryBytes(number("device_bytes")),
            BinaryBytes(number("device_bytes_most"))
        );
        say!("  beginnings of prompts: {} blocks, {}", number("prefix_blocks"), bytes(number("prefix_blocks")));
        say!(
            "  documents: {}, of {} tokens, {}; {} of them pinned, {}",
            number("documents"),
            number("document_tokens"),
            bytes(number("document_blocks")),
            number("pinned"),
            bytes(number("pinned_blocks"))
        );
        if let Some(disk) = kv["disk"].as_object() {
            let number = |key: &str| disk.get(key).and_then(Value::as_u64).unwrap_or(0);
            say!(
                "  on disk: {} documents, {} of at most {}; {} read, {} written, {} damaged",
                number("documents"),
                BinaryBytes(number("bytes")),
                BinaryBytes(number("bytes_most")),
                number("read"),
                number("written"),
                number("damaged")
            );
        }
        let counter = |key: &str| kv["counters"][key].as_u64().unwrap_or(0);
        say!(
            "  tokens of prompts since it was loaded: {} computed, {} reused, of which {} of documents, {} of these from disk",
            counter("prefilled"),
            counter("reused"),
            counter("attached"),
            counter("loaded")
        );
        say!("  reuse of documents: {}", kv["chunk_reuse"].as_str().unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

fn clear(documents: &Documents, all: bool) -> anyhow::Result<ExitCode> {
    let body = match all {
        true => json!({"model": documents.model}),
        false => documents.body().context("--all lets go of all")?,
    };
    let said = documents.server.ask(Method::POST, "/v1/kv/clear", Some(body))?;
    match documents.server.json {
        true => say!("{said:#}"),
        false => say!("gone: {} from memory, {} from disk", said["entries"], said["on_disk"]),
    }
    Ok(ExitCode::SUCCESS)
}
