//! `weir replay`: what policies would have chosen for recorded requests, and what that would have been worth.

mod diff;
mod estimate;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;

use super::{audit::instant, policy::fit::InputArgs};
use crate::{
    app,
    audit::{AuditStore, DecisionFilter, DecisionView},
    domain::{Capabilities, Energy, Fleet, Micros, ModelCard, Price, Signals},
    fit::{self, embed},
    policy::{self, Policy},
    replay::{
        self, ReplayReport,
        matrix::Matrix,
        outcomes::replay_outcomes,
        report::{self, Readable},
    },
};

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Estimate another policy's value from a file of logged decisions
    Estimate(estimate::EstimateArgs),
    /// Compare two reports, and fail where one is worse than may be
    Diff(diff::DiffArgs),
}

#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  weir replay --data ~/.local/share/weir                            the policies of the record against themselves
  weir replay --data ~/.local/share/weir --policy new.yaml --json   what new.yaml would have chosen
  weir replay --data outcomes.parquet --policy policies/*.yaml      what they earn where all answers are known
  weir replay --data outcomes.parquet --policy a.yaml b.yaml --out report/     the same as a page to hand around"
)]
pub struct ReplayArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// A data directory of `weir serve`, or a Parquet file of outcomes (query_id, query, model, score, cost_usd)
    #[arg(long, value_name = "PATH", required = true)]
    data: Option<PathBuf>,
    /// The record in this PostgreSQL, instead of the directory's embedded store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Policy files; the policies that made the record otherwise
    #[arg(long, value_name = "FILE", num_args = 1..)]
    policy: Vec<PathBuf>,
    /// Shuffled orders over outcomes, for policies that learn
    #[arg(long, value_name = "N", default_value_t = 20)]
    seeds: u64,
    #[command(flatten)]
    inputs: InputArgs,
    /// At most this many of the newest decisions
    #[arg(long, default_value_t = 100_000)]
    last: usize,
    /// Decisions of the record at or after this time (2026-11-23T09:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = instant)]
    since: Option<Micros>,
    /// Decisions before this time
    #[arg(long, value_name = "TIME", value_parser = instant)]
    until: Option<Micros>,
    /// Decisions of the policy with this name
    #[arg(long, value_name = "NAME")]
    made_by: Option<String>,
    /// Decisions of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Write report.html, report.md and report.json into this directory, too
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

/// The newest `last` decisions that `wanted` lets through, oldest first, with all that belongs to them.
pub(crate) async fn newest(
    store: &dyn AuditStore,
    last: usize,
    wanted: &DecisionFilter,
) -> anyhow::Result<Vec<DecisionView>> {
    let mut views = Vec::new();
    let mut before = None;
    while views.len() < last {
        let filter = DecisionFilter { limit: u32::try_from(last - views.len()).ok(), before, ..wanted.clone() };
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
    match &args.verb {
        Some(Verb::Estimate(args)) => return estimate::run(args),
        Some(Verb::Diff(args)) => return diff::run(args),
        None => {}
    }
    let data = args.data.clone().context("--data is required")?;
    if data.is_file() {
        return over_outcomes(&data, &args);
    }
    super::runtime()?.block_on(async {
        let store = app::open_record(&data, args.database_url.as_deref()).await?;
        let wanted = DecisionFilter {
            since: args.since,
            until: args.until,
            policy: args.made_by.clone(),
            tenant: args.tenant.clone(),
            ..DecisionFilter::default()
        };
        let views = newest(store.as_ref(), args.last, &wanted).await?;
        let filtered = wanted != DecisionFilter::default();
        let such = if filtered { "such decisions" } else { "decisions" };
        anyhow::ensure!(!views.is_empty(), "there are no {such} in {}", data.display());
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
        written(args.out.as_deref(), &report)?;
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print(&report);
        }
        let broken = report.policies.iter().any(|p| p.made_the_log && p.agreed != p.decisions);
        Ok(ExitCode::from(u8::from(broken)))
    })
}

/// Policies on a matrix of outcomes.
fn over_outcomes(data: &Path, args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(!args.policy.is_empty(), "{}: outcomes were made by no policy; give --policy FILE", data.display());
    let prices = super::policy::fit::prices(args.inputs.prices.as_deref())?;
    let matrix = Matrix::read(data, Some(&prices))?;
    let signals: Vec<Signals> = matrix.queries.iter().map(|q| embed::measured(&q.text)).collect();
    // What a model asks per token is taken from what its answers cost.
    let every: Vec<usize> = (0..matrix.len()).collect();
    let tokens = signals.iter().map(|s| f64::from(s.tokens)).sum::<f64>().max(1.0) / matrix.len().max(1) as f64;
    let cards = matrix.models.iter().zip(matrix.means(&every)).map(|(name, mean)| ModelCard {
        name: name.clone(),
        tags: Vec::new(),
        context: 0,
        price: Price { input: mean.cost / tokens * 1e6, ..Price::default() },
        energy: Some(Energy::default()),
        capabilities: Capabilities::default(),
    });
    let cards: Vec<ModelCard> = cards.collect();
    let mut specs = Vec::new();
    let mut names = BTreeSet::new();
    for path in &args.policy {
        let yaml = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let spec = policy::parse(&path.display().to_string(), &yaml)?;
        anyhow::ensure!(
            names.insert(spec.policy.clone()),
            "{}: a second policy with the name {}: give each its own",
            path.display(),
            spec.policy
        );
        specs.push(spec);
    }
    let data_dir = args.inputs.data_dir.path();
    let (policies, inputs) = super::runtime()?.block_on(async {
        let mut plain = Vec::new();
        for spec in &specs {
            let known = super::policy::implied_fleet(spec);
            let others = known.0.values().filter(|c| !matrix.models.contains(&c.name)).cloned();
            let tagged = cards.iter().cloned().map(|card| {
                let tags = known.get(&card.name).map(|k| k.tags.clone()).unwrap_or_default();
                ModelCard { tags, ..card }
            });
            plain.push(Fleet::new(tagged.chain(others)));
        }
        let mut inputs = None;
        let mut policies = Vec::new();
        for (spec, fleet) in specs.iter().zip(&plain) {
            let made = app::compile_plain(spec, fleet)?;
            if !made.needs_embedding() {
                policies.push(made);
                continue;
            }
            let embedder = app::offline_embedder(&data_dir, &args.inputs.embedder).await?;
            if inputs.is_none() {
                let mut cache = embed::Cache::open(&data_dir.join("embeddings"), &embedder.identity())?;
                let bar = super::policy::fit::bar("embedding queries", matrix.len());
                inputs = Some(embed::inputs(&matrix, embedder.as_ref(), &mut cache, || bar.inc(1)).await?);
                bar.finish_and_clear();
            }
            policies.push(app::compile_with(spec, fleet, &embedder).await?);
        }
        anyhow::Ok((policies, inputs))
    })?;
    let context = |policy: &Policy, q: usize| fit::context(policy, signals[q].clone(), inputs.as_ref(), q);
    let steps = policies.iter().map(|p| if p.learns() { args.seeds.max(1) as usize } else { 1 }).sum();
    let bar = super::policy::fit::bar("replaying", steps);
    let report = replay_outcomes(&matrix, &policies, &context, args.seeds, &|| bar.inc(1));
    bar.finish_and_clear();
    let report = report.map_err(|e| anyhow::anyhow!("{}: {e}", data.display()))?;
    written(args.out.as_deref(), &report)?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", report.table()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The report's files, where they are wanted.
fn written(out: Option<&Path>, report: &(impl Readable + serde::Serialize)) -> anyhow::Result<()> {
    let Some(out) = out else { return Ok(()) };
    report::write(out, report).with_context(|| format!("cannot write the report to {}", out.display()))?;
    eprintln!("wrote {}", out.join("report.html").display());
    Ok(())
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
