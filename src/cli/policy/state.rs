//! `weir policy state`: what a policy has learnt.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::{app, cli::DataDir, policy::State};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weir policy state show support
  weir policy state export support > support.state.json
  weir policy state import support support.state.json      after an edit of the policy, or on another weir
  weir policy state reset support

`import` and `reset` write to the log, which only one process may: stop weir first. Both are updates like any other, so
that what was decided before and after can be derived again.")]
pub(super) struct StateArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Of {
    /// Name of a policy
    #[arg(value_name = "POLICY")]
    policy: String,
    /// First digits of a version's hash [default: the version that is in use]
    #[arg(long, value_name = "HASH")]
    hash: Option<String>,
    #[command(flatten)]
    data_dir: DataDir,
    /// The record in this PostgreSQL, instead of the directory's embedded store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// How much was learnt, arm by arm
    Show {
        #[command(flatten)]
        of: Of,
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// Print the state as JSON, for `import` and for `weir policy explain --state`
    Export {
        #[command(flatten)]
        of: Of,
    },
    /// Go on from an exported state
    Import {
        #[command(flatten)]
        of: Of,
        /// What `export` printed; `-` for stdin
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Forget what was learnt
    Reset {
        #[command(flatten)]
        of: Of,
    },
}

pub(super) fn run(args: &StateArgs) -> anyhow::Result<ExitCode> {
    crate::cli::runtime()?.block_on(async {
        match &args.verb {
            Verb::Show { of, json } => show(of, *json).await,
            Verb::Export { of } => {
                let state = learnt(of).await?.state;
                say!("{}", serde_json::to_string(&state)?);
                Ok(())
            }
            Verb::Import { of, file } => {
                let shown = file.display();
                let state: State =
                    serde_json::from_slice(&read(file)?).with_context(|| format!("{shown} is not a policy's state"))?;
                set(of, Some(state)).await
            }
            Verb::Reset { of } => set(of, None).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match file.as_os_str() == "-" {
        true => std::io::stdin().read_to_end(&mut bytes).context("cannot read stdin")?,
        false => {
            bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            0
        }
    };
    Ok(bytes)
}

async fn learnt(of: &Of) -> anyhow::Result<app::state::Learnt> {
    let store = app::open_record(&of.data_dir.path(), of.database_url.as_deref()).await?;
    Ok(app::state::learnt(store.as_ref(), &of.policy, of.hash.as_deref()).await?)
}

async fn set(of: &Of, given: Option<State>) -> anyhow::Result<()> {
    let done = if given.is_some() { "imported" } else { "reset" };
    let (hash, seq) =
        app::state::set_state(&of.data_dir.path(), of.database_url.as_deref(), &of.policy, of.hash.as_deref(), given)
            .await?;
    say!("{done}: the state of {} {} after {seq} updates", of.policy, hash.short());
    Ok(())
}

async fn show(of: &Of, as_json: bool) -> anyhow::Result<()> {
    let app::state::Learnt { policy, state } = learnt(of).await?;
    let pulls = state.pulls();
    let arms: Vec<(&str, u64)> = policy.arms().into_iter().map(|a| (a, pulls.get(a).copied().unwrap_or(0))).collect();
    if as_json {
        let arms: serde_json::Map<String, serde_json::Value> =
            arms.iter().map(|(arm, n)| ((*arm).to_owned(), json!({"pulls": n}))).collect();
        let document = json!({"policy": policy.name(), "hash": policy.hash(), "learns": policy.learns(), "updates": state.seq, "arms": arms});
        say!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    say!("{} {}: {} updates", policy.name(), policy.hash().short(), state.seq);
    if !policy.learns() {
        say!("  its selector does not learn");
        return Ok(());
    }
    let width = arms.iter().map(|(arm, _)| arm.chars().count()).max().unwrap_or(0);
    for (arm, pulls) in arms {
        say!("  {arm:width$}  {pulls} rewarded");
    }
    Ok(())
}
