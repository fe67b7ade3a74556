//! `weir policy`: write, check, explain and test policy files. Nothing here starts a model: signals are measured on the
//! text, and where a policy asks for an embedding its `no_embedding` branch decides, unless a test gives similarities.

mod calibrate;
mod diff;
mod explain;
pub(super) mod fit;
mod init;
mod report;
pub(super) mod request;
mod stages;
mod state;
mod test;

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::DataDir;
use crate::{
    app,
    domain::{Fleet, ModelCard},
    policy::{self, Diagnostics, Policy, Spec},
    signals::Embedder,
};

const EXAMPLES: &str = "\
Examples:
  weir policy init my-policy.yaml                      a policy to start from, with tests
  weir policy check my-policy.yaml --config weir.yaml  everything that is wrong, at once
  weir policy explain my-policy.yaml --prompt 'I want my money back'
  weir policy test my-policy.yaml
  weir policy schema > policy.schema.json              for completion in an editor

Exit codes: 0 fine, 1 found something wrong, 2 wrong usage.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PolicyArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Write a policy to start from.
    #[command(
        after_help = "Examples:\n  weir policy init\n  weir policy init support.yaml --template privacy-local\n  weir policy init - --template balanced-bandit | less"
    )]
    Init(init::InitArgs),
    /// Report everything that is wrong with policy files, and how many calls each plan makes at most.
    ///
    /// With --config also what each plan may cost at most, for a prompt of 1000 tokens and, where the plan does not bound
    /// them, as many per answer.
    #[command(
        after_help = "Examples:\n  weir policy check policies/*.yaml\n  weir policy check my-policy.yaml --config weir.yaml --json"
    )]
    Check {
        /// Policy files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// Say what a policy does with one request, and why.
    #[command(
        after_help = "Examples:\n  weir policy explain my-policy.yaml --prompt 'I want my money back'\n  weir policy explain my-policy.yaml --request request.json --seed 7 --json"
    )]
    Explain(explain::ExplainArgs),
    /// Say what another version of a policy would do otherwise, on recorded requests, and what that would be worth.
    #[command(
        after_help = "Examples:\n  weir policy diff support.yaml support-next.yaml --last 1000\n  weir policy diff old.yaml new.yaml --database-url $DATABASE_URL --json"
    )]
    Diff(diff::DiffArgs),
    /// Show, export, import or reset what a policy has learnt.
    State(state::StateArgs),
    /// Fit a selector to measured outcomes.
    #[command(
        after_help = "Examples:\n  weir policy fit --selector ensemble --data outcomes.parquet --out support.safetensors\n  weir policy fit --selector knn --data train.parquet --test test.parquet --out knn.safetensors --json"
    )]
    Fit(Box<fit::FitArgs>),
    /// Run the tests that policy files hold.
    #[command(after_help = "Example:\n  weir policy test policies/*.yaml")]
    Test {
        /// Policy files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Say which rules, plans and splits no test touches
        #[arg(long)]
        coverage: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Print the JSON Schema of policy files, or the variables of conditions.
    #[command(after_help = "Examples:\n  weir policy schema > policy.schema.json\n  weir policy schema --variables")]
    Schema {
        /// The variables of conditions instead, with types
        #[arg(long)]
        variables: bool,
        /// With --variables: as a page in Markdown, which policies/VARIABLES.md is
        #[arg(long, requires = "variables")]
        markdown: bool,
        /// One JSON document
        #[arg(long, conflicts_with = "markdown")]
        json: bool,
    },
}

/// What the verbs share.
#[derive(Clone, Debug, Args)]
struct Common {
    /// weir.yaml, whose fleet the policy is checked against [default: none: every name and tag of the file's `models`
    /// counts as a fleet entry that can do everything]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    data_dir: DataDir,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

pub fn run(args: PolicyArgs) -> anyhow::Result<ExitCode> {
    match args.verb {
        Verb::Init(args) => init::run(&args),
        Verb::Check { files, common } => report::check(&files, &common),
        Verb::Explain(args) => explain::run(&args),
        Verb::Diff(args) => diff::run(&args),
        Verb::State(args) => state::run(&args),
        Verb::Fit(args) => fit::run(&args),
        Verb::Test { files, coverage, common } => test::run(&files, coverage, &common),
        Verb::Schema { variables, markdown, json } => {
            schema(variables, markdown, json)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn schema(variables: bool, markdown: bool, json: bool) -> anyhow::Result<()> {
    if markdown {
        say!("# Variables of conditions\n");
        say!(
            "Written by `weir policy schema --variables --markdown`, from the table that conditions are checked with.\n"
        );
        say!("| variable | type | meaning |\n|---|---|---|");
        for v in policy::variables() {
            say!("| `{}` | {} | {} |", v.name, v.ty, v.doc);
        }
        return Ok(());
    }
    match (variables, json) {
        (false, _) => say!("{}", serde_json::to_string_pretty(policy::schema())?),
        (true, true) => say!("{}", serde_json::to_string_pretty(&policy::variables())?),
        (true, false) => {
            for v in policy::variables() {
                say!("{:26} {:20} {}", v.name, v.ty, v.doc);
            }
        }
    }
    Ok(())
}

/// Whether diagnostics may have frames and colour.
fn fancy() -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    !no_color && std::io::stdout().is_terminal()
}

/// Compiles a file. The outer error is about reading it at all.
fn load(file: &Path, common: &Common) -> anyhow::Result<Result<Policy, Diagnostics>> {
    let yaml = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let configured = common.config.as_deref().map(request::fleet).transpose()?;
    let fleet = |spec: &Spec| configured.unwrap_or_else(|| implied_fleet(spec));
    let given = |spec: &Spec| (fleet(spec), app::read_artifacts(spec));
    Ok(policy::check_with(&file.display().to_string(), &yaml, given))
}

/// [`load`], and where the policy's selector predicts from the query's embedding also the embedder, fetched if need be:
/// without one such a policy could only say what it does without an embedding.
fn load_to_decide(
    file: &Path,
    common: &Common,
    embedder: &mut Option<Arc<dyn Embedder>>,
) -> anyhow::Result<Result<Policy, Diagnostics>> {
    let policy = match load(file, common)? {
        Ok(policy) if policy.predicts() || policy.tests().iter().any(|case| request::embeds(&policy, case)) => policy,
        other => return Ok(other),
    };
    let version = policy.version();
    let spec = match policy::parse(&version.file, version.yaml.as_bytes()) {
        Ok(spec) => spec,
        Err(diagnostics) => return Ok(Err(diagnostics)),
    };
    let compiled = super::runtime()?.block_on(async {
        let embedder = match embedder {
            Some(embedder) => Arc::clone(embedder),
            None => {
                let name = app::read_artifacts(&spec).into_values().find_map(|a| a.ok()?.card.embedder.clone());
                let name = name.map_or_else(|| "bge-small-en".to_owned(), |e| e.name);
                let loaded = app::offline_embedder(&common.data_dir.path(), &name).await?;
                Arc::clone(embedder.insert(loaded))
            }
        };
        app::compile_with(&spec, &version.fleet, &embedder).await
    });
    match compiled {
        Ok(policy) => Ok(Ok(policy)),
        Err(error) => Err(anyhow::Error::msg(error.to_string())),
    }
}

/// The fleet that a file without a configuration implies: each of its `models` is an entry of the name it asks for, or,
/// asked for by tag, an entry of the alias's own name with that tag; they can do everything and cost nothing.
pub(super) fn implied_fleet(spec: &Spec) -> Fleet {
    let mut cards: BTreeMap<&str, ModelCard> = BTreeMap::new();
    for (alias, model) in &spec.models {
        let name = model.name.as_deref().unwrap_or(alias);
        let card = cards.entry(name).or_insert_with(|| ModelCard {
            name: name.to_owned(),
            tags: Vec::new(),
            context: 0,
            price: crate::domain::Price::default(),
            energy: Some(crate::domain::Energy::default()),
            capabilities: crate::domain::Capabilities { continuation: true, ..Default::default() },
        });
        card.tags.extend(model.tag.clone());
    }
    Fleet::new(cards.into_values())
}
