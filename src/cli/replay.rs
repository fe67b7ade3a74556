//! `weir replay`: what policies would have chosen for recorded requests, and what that would have been worth.

mod estimate;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;

use crate::{
    app,
    audit::{AuditStore, DecisionFilter, DecisionView},
    replay::{self, ReplayReport},
};

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Estimate another policy's value from a file of logged decisions
    Estimate(estimate::EstimateArgs),
}

#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  weir replay --data ~/.local/share/weir                            the policies of the record against themselves
  weir replay --data ~/.local/share/weir --policy new.yaml --json   what new.yaml would have chosen"
)]
pub struct ReplayArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// A data directory of `weir serve`
    #[arg(long, value_name = "DIR", required = true)]
    data: Option<PathBuf>,
    /// The record in this PostgreSQL, instead of the directory's embedded store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Policy files; the policies that made the record otherwise
    #[arg(long, value_name = "FILE", num_args = 1..)]
    policy: Vec<PathBuf>,
    /// At most this many of the newest decisions
    #[arg(long, default_value_t = 100_000)]
    last: usize,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

/// The newest `last` decisions, oldest first, with all that belongs to them.
pub(crate) async fn newest(store: &dyn AuditStore, last: usize) -> anyhow::Result<Vec<DecisionView>> {
    let mut views = Vec::new();
    let mut before = None;
    while views.len() < last {
        let filter =
            DecisionFilter { limit: u32::try_from(last - views.len()).ok(), before, ..DecisionFilter::default() };
        let page = store.decisions(&filter).await?;
        let Some(oldest) = page.last() else { break };
        before = Some(oldest.id);
        for row in &page {
            views.extend(store.decision(row.id).await?);
        }
    }
    views.reverse();
    Ok(views)
}

pub fn run(args: ReplayArgs) -> anyhow::Result<ExitCode> {
    if let Some(Verb::Estimate(args)) = &args.verb {
        return estimate::run(args);
    }
    let data = args.data.context("--data is required")?;
    super::runtime()?.block_on(async {
        let store = app::open_record(&data, args.database_url.as_deref()).await?;
        let views = newest(store.as_ref(), args.last).await?;
        anyhow::ensure!(!views.is_empty(), "there are no decisions in {}", data.display());
        let mut policies = Vec::new();
        if args.policy.is_empty() {
            let mut seen = std::collections::BTreeSet::new();
            for view in &views {
                let decision = &view.decision.decision;
                if seen.insert(decision.policy_hash) {
                    policies.push(replay::recorded_policy(store.as_ref(), decision, &view.id.to_string()).await?);
                }
            }
        }
        for path in &args.policy {
            policies.push(
                app::policy_for_replay(path, &data, store.as_ref(), &views)
                    .await
                    .with_context(|| path.display().to_string())?,
            );
        }
        let report = replay::replay_log(store.as_ref(), &views, &policies).await?;
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print(&report);
        }
        let broken = report.policies.iter().any(|p| p.made_the_log && p.agreed != p.decisions);
        Ok(ExitCode::from(u8::from(broken)))
    })
}

fn print(report: &ReplayReport) {
    println!("{} decisions", report.decisions);
    for policy in &report.policies {
        let made = if policy.made_the_log { ", which made them" } else { "" };
        println!("\n{} ({}{made})", policy.policy, policy.hash);
        println!("  same arm    {} of {}", policy.agreed, policy.decisions);
        for (arm, count) in &policy.arms {
            println!("  chose       {arm}: {count}");
        }
        if let Some(mean) = policy.mean_reward {
            println!("  reward      {mean:.4} over {} decisions with known reward", policy.rewarded);
        }
        println!("  by rule     {} of the log", policy.by_rule);
        if let Some(e) = &policy.estimates {
            println!("\nReward per decision, estimated, with 95 % intervals:\n{}", estimate::table(e, true));
        }
        if let Some(why) = &policy.no_estimate {
            println!("  no estimate {why}");
        }
        for (reason, count) in &policy.skipped {
            println!("  left out    {count}: {reason}");
        }
    }
}
