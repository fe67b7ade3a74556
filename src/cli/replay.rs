//! `weir replay`: what policies would have chosen for recorded requests, and what that would have been worth.

mod diff;
mod estimate;
mod log;
mod outcomes;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use super::{audit::instant, policy::fit::InputArgs};
use crate::{
    app,
    audit::{AuditStore, DecisionFilter, DecisionView},
    domain::{Fleet, Micros},
    policy::{self, Policy, Spec},
    replay::{
        Checkpoints, Export, WhatIf,
        report::{self, Readable},
    },
    signals::Embedder,
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
  weir replay --data decisions.parquet --policy new.yaml            the same of what `weir audit export` wrote
  weir replay --data outcomes.parquet --policy policies/*.yaml      what they earn where all answers are known
  weir replay --data outcomes.parquet --policy a.yaml --cost gpt-4=0.5 --without mixtral     what if
  weir replay --data outcomes.parquet --policy a.yaml b.yaml --out report/     the same as a page to hand around"
)]
pub struct ReplayArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// A data directory of `weir serve`, a file of `weir audit export --parquet`, or a file of outcomes (query_id, query, model,
    /// score, cost_usd)
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
    #[arg(long, value_name = "N")]
    last: Option<usize>,
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
    /// As if this model could not be called; may be given several times
    #[arg(long, value_name = "MODEL")]
    without: Vec<String>,
    /// As if a model cost so many times as much, e.g. large=0.5; may be given several times
    #[arg(long, value_name = "MODEL=FACTOR")]
    cost: Vec<String>,
    /// As if the policies' budget per request, session, key or tenant were this many USD, e.g. tenant=5; may be given several
    /// times
    #[arg(long, value_name = "KIND=USD")]
    budget: Vec<String>,
    /// Write report.html, report.md and report.json into this directory, too
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Rows that others have published, to be shown beside those over outcomes: JSON lines with name, source, and what there is
    /// of on, score, cost_usd, pgr, aiq, apgr, cpt_50, cpt_80
    #[arg(long, value_name = "FILE")]
    quoted: Option<PathBuf>,
    /// weir.yaml, whose fleet has the prices and capabilities that policies are to see when an export is replayed
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Keep what is done in this directory, and go on from there if a replay with the same arguments was stopped
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

/// Between two times that what is done is kept.
const KEPT_EVERY: Duration = Duration::from_secs(20);

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
        let ids: Vec<_> = page.iter().map(|row| row.id).collect();
        views.extend(store.whole(&ids).await?.into_iter().rev());
    }
    views.reverse();
    Ok(views)
}

impl ReplayArgs {
    /// The part of a record that is wanted.
    fn filter(&self) -> DecisionFilter {
        DecisionFilter {
            since: self.since,
            until: self.until,
            policy: self.made_by.clone(),
            tenant: self.tenant.clone(),
            ..DecisionFilter::default()
        }
    }

    /// What is to be other than it was; of models that there are.
    fn what_if(&self, models: &BTreeSet<&str>) -> anyhow::Result<WhatIf> {
        let what_if = WhatIf::of(&self.without, &self.cost, &self.budget).map_err(anyhow::Error::msg)?;
        if let Some(model) = what_if.models().find(|m| !models.contains(m.as_str())) {
            let known: Vec<&str> = models.iter().copied().collect();
            anyhow::bail!("--without and --cost: there is no model {model}; there are {}", known.join(", "));
        }
        Ok(what_if)
    }

    fn checkpoints(&self) -> anyhow::Result<Option<Checkpoints>> {
        Ok(self.resume.as_deref().map(|dir| Checkpoints::open(dir, KEPT_EVERY)).transpose()?)
    }

    /// The policies as they are written.
    fn specs(&self) -> anyhow::Result<Vec<Spec>> {
        let mut names = BTreeSet::new();
        let read = |path: &PathBuf| {
            let yaml = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let spec = policy::parse(&path.display().to_string(), &yaml)?;
            anyhow::ensure!(
                names.insert(spec.policy.clone()),
                "{}: a second policy with the name {}: give each its own",
                path.display(),
                spec.policy
            );
            Ok(spec)
        };
        self.policy.iter().map(read).collect()
    }

    /// The policies compiled against their fleets, and the embedder, if one needs it.
    async fn compiled(
        &self,
        specs: &[Spec],
        fleet: &dyn Fn(&Spec) -> Fleet,
    ) -> anyhow::Result<(Vec<Policy>, Option<Arc<dyn Embedder>>)> {
        let mut embedder = None;
        let mut policies = Vec::new();
        for spec in specs {
            let fleet = fleet(spec);
            let made = app::compile_plain(spec, &fleet)?;
            if !made.needs_embedding() {
                policies.push(made);
                continue;
            }
            if embedder.is_none() {
                let data_dir = self.inputs.data_dir.path();
                embedder = Some(app::offline_embedder(&data_dir, &self.inputs.embedder).await?);
            }
            if let Some(embedder) = &embedder {
                policies.push(app::compile_with(spec, &fleet, embedder).await?);
            }
        }
        Ok((policies, embedder))
    }

    /// The report's files, where they are wanted.
    fn write(&self, report: &(impl Readable + serde::Serialize)) -> anyhow::Result<()> {
        let Some(out) = &self.out else { return Ok(()) };
        report::write(out, report).with_context(|| format!("cannot write the report to {}", out.display()))?;
        eprintln!("wrote {}", out.join("report.html").display());
        Ok(())
    }
}

pub fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Some(Verb::Estimate(args)) => return estimate::run(args),
        Some(Verb::Diff(args)) => return diff::run(args),
        None => {}
    }
    let data: &Path = args.data.as_deref().context("--data is required")?;
    match data.is_file() {
        false => log::over_record(data, args),
        true if Export::is_one(data) => log::over_export(data, args),
        true => outcomes::run(data, args),
    }
}
