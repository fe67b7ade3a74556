//! `weir policy explain`: one decision, with everything that led to it.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::{Common, fancy, load_to_decide, request};
use crate::policy::{State, explain};

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// A policy file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The only message, from the user
    #[arg(long, value_name = "TEXT", required_unless_present = "request", conflicts_with = "request")]
    prompt: Option<String>,
    /// A file with a chat request in OpenAI's JSON
    #[arg(long, value_name = "FILE")]
    request: Option<PathBuf>,
    /// Seed of the draw
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Learnt state as JSON; nothing learnt otherwise
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let mut embedder = None;
    let policy = match load_to_decide(&args.file, &args.common, &mut embedder)? {
        Ok(policy) => policy,
        Err(diagnostics) => {
            match args.common.json {
                true => say!("{}", serde_json::to_string_pretty(&json!({"ok": false, "diagnostics": diagnostics}))?),
                false => say!("{}", diagnostics.render(fancy())),
            }
            return Ok(ExitCode::from(1));
        }
    };
    let asked = match (&args.prompt, &args.request) {
        (Some(prompt), _) => request::from_prompt(&policy, prompt)?,
        (None, Some(file)) => {
            let shown = file.display();
            let bytes = std::fs::read(file).with_context(|| format!("cannot read {shown}"))?;
            let body: BTreeMap<String, Value> =
                serde_json::from_slice(&bytes).with_context(|| format!("{shown} is not a JSON object"))?;
            request::from_json(&policy, &body, None)?
        }
        (None, None) => anyhow::bail!("give --prompt or --request"),
    };
    let state: State = match &args.state {
        Some(file) => {
            let shown = file.display();
            let bytes = std::fs::read(file).with_context(|| format!("cannot read {shown}"))?;
            let state: State =
                serde_json::from_slice(&bytes).with_context(|| format!("{shown} is not a policy's state"))?;
            anyhow::ensure!(
                state.policy_hash == policy.hash(),
                "{shown} was learnt by the policy {}, this one is {}; the hash covers the file and the fleet",
                state.policy_hash.short(),
                policy.hash().short()
            );
            state
        }
        None => policy.initial_state(),
    };
    let mut context = request::embedded(&policy, &asked, embedder.as_ref().filter(|_| policy.predicts()))?;
    context.seed = args.seed;
    let decision = policy.decide(&state, &context);
    match args.common.json {
        true => {
            let whole = json!({"ok": true, "decision": decision, "draw": explain::draw(&decision, &context), "context": context});
            say!("{}", serde_json::to_string_pretty(&whole)?);
        }
        false => say!("{}", explain::text(&decision, &context).trim_end()),
    }
    Ok(ExitCode::SUCCESS)
}
