//! `weir replay` over logged decisions: of a record, or of an export of one.

use std::{path::Path, process::ExitCode};

use anyhow::Context as _;
use indicatif::ProgressBar;

use super::{ReplayArgs, estimate::table};
use crate::{
    app,
    audit::{AuditStore, DecisionFilter},
    cli::policy::{fit::bar, implied_fleet, request::fleet as fleet_of},
    domain::{Fleet, Hash},
    policy::{self, Policy},
    replay::{self, Export, Measured, Record, ReplayReport, Setting, Source, replay_log, report::significant},
};

/// Policies on a record: those that made it, or others.
pub(super) fn over_record(data: &Path, args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let specs = args.specs()?;
    crate::cli::runtime()?.block_on(async {
        let store = app::open_record(data, args.database_url.as_deref()).await?;
        let store: &dyn AuditStore = store.as_ref();
        let wanted = args.filter();
        let (mut record, extent) = Record::open(store, &wanted, args.last).await?;
        let such = if wanted == DecisionFilter::default() { "decisions" } else { "such decisions" };
        let (_, newest) = extent.newest.with_context(|| format!("there are no {such} in {}", data.display()))?;
        let version = store.policy_version(newest).await?;
        let names = version.iter().flat_map(|v| v.fleet.0.keys());
        let what_if = args.what_if(&names.map(String::as_str).collect())?;
        anyhow::ensure!(
            what_if.is_nothing() || !specs.is_empty(),
            "--without, --cost and --budget: give the policies that would have decided then with --policy FILE"
        );
        let mut policies = Vec::new();
        for (hash, first) in extent.policies.iter().filter(|_| specs.is_empty()) {
            let version = store.policy_version(*hash).await?;
            let version = version.with_context(|| {
                format!("the policy {} that made decision {first} is not in the record", hash.short())
            })?;
            policies.push(replay::policy_of_version(store, &version).await?);
        }
        for path in &args.policy {
            let policy = app::policy_for_replay(path, data, store, newest, &|fleet| what_if.fleet(fleet)).await;
            policies.push(policy.with_context(|| path.display().to_string())?);
        }
        what_if.policies(&mut policies).map_err(anyhow::Error::msg)?;
        // Only what made all of it can be held to the states that it had.
        let own: Vec<Hash> = match &extent.policies[..] {
            [(only, _)] => vec![*only],
            _ => Vec::new(),
        };
        let bar = bar("replaying", extent.decisions);
        let setting = Setting { store: Some(store), own: &own, what_if: &what_if, checkpoints: args.checkpoints()? };
        let report = report(setting, &mut record, &policies, &bar, args).await?;
        let broken = report.policies.iter().any(|p| p.made_the_log && p.agreed != p.decisions);
        Ok(ExitCode::from(u8::from(broken)))
    })
}

/// Policies on an export, which has no states: those that are given.
pub(super) fn over_export(data: &Path, args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let specs = args.specs()?;
    anyhow::ensure!(
        !specs.is_empty(),
        "{}: an export does not hold the policies that made it; give --policy FILE, or the data directory",
        data.display()
    );
    crate::cli::runtime()?.block_on(async {
        let wanted = args.filter();
        anyhow::ensure!(
            args.last.is_none() || wanted == DecisionFilter::default(),
            "--last counts all decisions of an export: give it without --since, --until, --made-by and --tenant, or choose \
             when exporting"
        );
        let mut export = Export::open(data, &wanted, args.last)?;
        let configured = args.config.as_deref().map(fleet_of).transpose()?;
        let plain = |spec: &policy::Spec| configured.clone().unwrap_or_else(|| implied_fleet(spec));
        let fleets: Vec<Fleet> = specs.iter().map(plain).collect();
        let what_if = args.what_if(&fleets.iter().flat_map(|f| f.0.keys()).map(String::as_str).collect())?;
        if let Some(spec) = specs.iter().find(|spec| !spec.budget.is_empty() && configured.is_none()) {
            anyhow::bail!(
                "{}: the policy {} has a budget, and an export does not say what models ask: give the configuration with their \
                 prices (--config weir.yaml), or replay the data directory",
                data.display(),
                spec.policy
            );
        }
        let fleet = |spec: &policy::Spec| what_if.fleet(&plain(spec));
        let (mut policies, _) = args.compiled(&specs, &fleet).await?;
        what_if.policies(&mut policies).map_err(anyhow::Error::msg)?;
        let bar = bar("replaying", export.decisions());
        let setting = Setting { store: None, own: &[], what_if: &what_if, checkpoints: args.checkpoints()? };
        report(setting, &mut export, &policies, &bar, args).await?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn report(
    setting: Setting<'_>,
    source: &mut dyn Source,
    policies: &[Policy],
    bar: &ProgressBar,
    args: &ReplayArgs,
) -> anyhow::Result<ReplayReport> {
    let report = replay_log(setting, source, policies, &|n| bar.inc(n as u64)).await;
    bar.finish_and_clear();
    let report = report?;
    let nothing = args.data.as_deref().unwrap_or(Path::new("")).display();
    anyhow::ensure!(report.decisions > 0, "there are no such decisions in {nothing}");
    args.write(&report)?;
    match args.json {
        true => say!("{}", serde_json::to_string(&report)?),
        false => print(&report),
    }
    Ok(report)
}

/// Cost, energy and times, where there are any.
fn measured(of: &Measured) {
    let short = |v: f64| significant(v, 3);
    let around =
        |i: Option<(f64, f64)>| i.map_or_else(String::new, |(l, h)| format!(" ({} to {})", short(l), short(h)));
    if let Some(cost) = of.cost_usd {
        say!("  cost        ${}{} per decision", short(cost.value), around(cost.interval));
    }
    if let Some(joules) = of.joules {
        say!("  energy      {} J{} per decision", short(joules.value), around(joules.interval));
    }
    for (name, times) in [("time", of.latency_ms), ("first token", of.ttft_ms)] {
        if let Some(p) = times {
            say!("  {name:<12}p50 {} ms, p90 {} ms, p99 {} ms", short(p.p50), short(p.p90), short(p.p99));
        }
    }
}

fn print(report: &ReplayReport) {
    say!("{} decisions in {:.2} days", report.decisions, report.days);
    report.what_if.iter().for_each(|what| say!("what if: {what}"));
    if report.logged.ended > 0 {
        say!("\nthe log");
        measured(&report.logged);
    }
    for policy in &report.policies {
        let made = if policy.made_the_log { ", which made them" } else { "" };
        say!("\n{} ({}{made})", policy.policy, policy.hash);
        say!("  same arm    {} of {}", policy.agreed, policy.decisions);
        for (arm, count) in &policy.arms {
            say!("  chose       {arm}: {count}");
        }
        if let Some(mean) = policy.mean_reward {
            let interval =
                policy.mean_interval.map_or_else(String::new, |(low, high)| format!(" ({low:.4} to {high:.4})"));
            say!(
                "  reward      {mean:.4}{interval} over {} decisions with the same arm and a known reward",
                policy.rewarded
            );
        }
        say!("  by rule     {} of the log", policy.by_rule);
        if let Some(e) = &policy.estimates {
            say!("\nReward per decision, estimated, with 95 % intervals:\n{}", table(e, true));
        }
        if let Some(whole) = policy.by_session {
            let interval = whole.reward.interval.map_or_else(String::new, |(l, h)| format!("  {l:.4} to {h:.4}"));
            say!(
                "{:<12}{:>8.4}{interval}  (whole sessions, up to {} turns; worth {:.0} decisions)\n",
                "by session",
                whole.reward.value,
                whole.longest,
                whole.effective
            );
        }
        measured(&policy.measured);
        if let Some(c) = &policy.calibration {
            say!("  expected    {:.4} off on average, over {} predictions", c.error, c.predictions);
        }
        if let Some(more) = policy.to_one_hundredth {
            say!("To ±0.01: {} of such a log", more.told());
        }
        if let Some(why) = &policy.no_estimate {
            say!("  no estimate {why}");
        }
        for (reason, count) in &policy.skipped {
            say!("  left out    {count}: {reason}");
        }
    }
    for p in report.pairs.iter().filter(|_| report.policies.len() < 5) {
        let interval = p.interval.map_or_else(String::new, |(low, high)| format!(" ({low:+.4} to {high:+.4})"));
        say!("\n{} less {}: {:+.4}{interval}", p.first, p.second, p.difference);
    }
}
