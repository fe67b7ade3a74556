//! `weir policy diff`: what a policy would do otherwise than another, on recorded requests.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use crate::{
    app,
    audit::DecisionFilter,
    cli::{DataDir, replay::newest},
    domain::Fleet,
    learn,
    policy::{Policy, State},
    replay::{
        Entry,
        diff::{DiffReport, diff},
    },
};

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// The policy as it is
    #[arg(value_name = "OLD")]
    old: PathBuf,
    /// The policy as it would be
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// At most this many of the newest decisions
    #[arg(long, value_name = "N", default_value_t = 1000)]
    last: usize,
    #[command(flatten)]
    data_dir: DataDir,
    /// The record in this PostgreSQL, instead of the directory's embedded store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DiffArgs) -> anyhow::Result<ExitCode> {
    let (report, notes) = crate::cli::runtime()?.block_on(async {
        let dir = args.data_dir.path();
        let store = app::open_record(&dir, args.database_url.as_deref()).await?;
        let views = newest(store.as_ref(), args.last, &DecisionFilter::default()).await?;
        let newest = views.last().with_context(|| format!("there are no decisions in {}", dir.display()))?;
        let newest = newest.decision.decision.policy_hash;
        let mut policies: Vec<Policy> = Vec::new();
        for path in [&args.old, &args.new] {
            let policy = app::policy_for_replay(path, &dir, store.as_ref(), newest, &Fleet::clone).await;
            policies.push(policy.with_context(|| path.display().to_string())?);
        }
        let (old, new) = (&policies[0], &policies[1]);
        let mut notes = Vec::new();
        let old_state = learn::restore(store.as_ref(), old, None).await?;
        if old.learns() && old_state.seq == 0 {
            notes.push("OLD has learnt nothing in this record".to_owned());
        }
        let mut new_state: State = learn::restore(store.as_ref(), new, None).await?;
        if new.learns() && new_state.seq == 0 {
            match new.carry(&old_state) {
                Ok(carried) if old_state.seq > 0 => {
                    new_state = carried;
                    notes.push("NEW decides with what OLD has learnt".to_owned());
                }
                Err(error) if old.learns() => notes.push(format!("NEW decides as if nothing was learnt: {error}")),
                _ => notes.push("NEW has learnt nothing in this record".to_owned()),
            }
        }
        let entries: Vec<Entry> = views.into_iter().map(Entry::of).collect();
        anyhow::Ok((diff(&entries, (old, &old_state), (new, &new_state)), notes))
    })?;
    match args.json {
        true => say!("{}", serde_json::to_string_pretty(&json!({"ok": true, "report": report, "notes": notes}))?),
        false => print(&report, &notes),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &DiffReport, notes: &[String]) {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    say!("{} -> {}", report.old, report.new);
    say!("  compared    {} of {} recorded decisions", report.compared, report.decisions);
    for (reason, count) in &report.skipped {
        say!("  left out    {count}: {reason}");
    }
    notes.iter().for_each(|note| say!("  note        {note}"));
    say!("  would move  {}", percent(report.moved));
    for flow in report.flows.iter().take(10) {
        say!("              {} -> {}  {}", flow.from, flow.to, percent(flow.share));
    }
    let width = report.shares.keys().map(|arm| arm.chars().count()).max().unwrap_or(0);
    say!("  shares      {:width$}  {:>8} {:>8}", "", "old", "new");
    for (arm, (old, new)) in &report.shares {
        say!("              {arm:width$}  {:>8} {:>8}", percent(*old), percent(*new));
    }
    match (&report.effect, &report.no_effect) {
        (Some(e), _) => {
            let interval =
                e.interval.map_or_else(String::new, |(low, high)| format!(", 95 % interval {low:+.4} to {high:+.4}"));
            say!("  reward      {:.4} -> {:.4} ({:+.4}{interval})", e.old, e.new, e.difference);
            say!(
                "              estimated from {} rewarded decisions; they count as {:.0} for OLD and {:.0} for NEW",
                e.rewarded,
                e.effective_old,
                e.effective_new
            );
            if e.overlap < 0.8 {
                let share = percent(1.0 - e.overlap);
                say!(
                    "              the log has hardly tried what NEW does ({share} of it is missing): read this with care"
                );
            }
        }
        (None, Some(why)) => say!("  reward      cannot be estimated: {why}"),
        (None, None) => {}
    }
    for moved in &report.requests {
        say!("  {}  {} -> {}  {}", moved.id, moved.from, moved.to, percent(moved.moved));
    }
}
