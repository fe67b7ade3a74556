//! `weir audit`: lists decisions, explains one, verifies the record, sums it up, exports it. Reads only; a weir may be
//! running on the same data directory.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{DataDir, runtime};
use crate::{
    audit::{
        AuditStore, DecisionFilter, DecisionRow, DecisionView, LogReader, StoreError, StoreTarget, VerifyReport,
        explain::{duration, time},
        export::{export_jsonl, export_parquet},
        open_existing,
        stats::{Figures, stats},
        verify_chain, verify_log,
    },
    domain::{DecisionId, Micros},
    replay,
};

#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(subcommand)]
    verb: Box<AuditVerb>,
}

/// Which record is read.
#[derive(Clone, Debug, Args)]
pub struct Source {
    #[command(flatten)]
    data_dir: DataDir,
    /// PostgreSQL to read instead of the data directory's own store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum AuditVerb {
    /// List decisions, newest first
    #[command(after_help = "Example:\n  weir audit list --policy support --status error --limit 20")]
    List(ListArgs),
    /// Tell everything about one decision
    #[command(after_help = "Example:\n  weir audit show chatcmpl-019abf3c-7c1e-7d3a-9d55-3f0e8d1c2b4a")]
    Show(ShowArgs),
    /// Check that the record is whole and unchanged
    #[command(after_help = "Example:\n  weir audit verify\nExit code 1 says that something is wrong.")]
    Verify(VerifyArgs),
    /// Sum up decisions by policy and arm
    #[command(after_help = "Example:\n  weir audit stats --policy support --json")]
    Stats(StatsArgs),
    /// Derive recorded decisions again, from the record alone, and compare the bytes
    #[command(
        after_help = "Examples:\n  weir audit reproduce --last 1000\n  weir audit reproduce ID\nExit code 1 says that a decision came out otherwise."
    )]
    Reproduce(ReproduceArgs),
    /// Write the record to a file for other programs
    #[command(after_help = "Example:\n  weir audit export --parquet decisions.parquet")]
    Export(ExportArgs),
}

#[derive(Debug, Args)]
struct Filter {
    /// Decided by this policy
    #[arg(long)]
    policy: Option<String>,
    /// This arm was taken
    #[arg(long)]
    arm: Option<String>,
    /// Answered by this model
    #[arg(long)]
    model: Option<String>,
    /// Ended so: ok, error, cancelled, refused, interrupted; or open
    #[arg(long, value_parser = ["ok", "error", "cancelled", "refused", "interrupted", "open"])]
    status: Option<String>,
    /// Of this session (its hash, as shown by `weir audit show`)
    #[arg(long)]
    session: Option<String>,
    /// Of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Decided so
    #[arg(long, value_parser = ["rule", "select", "pinned", "shadow", "refused"])]
    decided_by: Option<String>,
    /// Decided at or after this time (2026-11-23T09:00:00Z)
    #[arg(long, value_parser = instant)]
    since: Option<Micros>,
    /// Decided before this time
    #[arg(long, value_parser = instant)]
    until: Option<Micros>,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    filter: Filter,
    /// At most this many (up to 1000)
    #[arg(long, default_value_t = crate::audit::query::DEFAULT_LIMIT, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Older than this decision: the last id of one page gives the next
    #[arg(long, value_name = "ID")]
    before: Option<DecisionId>,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    source: Source,
    /// Id of a decision, as it is, behind `chatcmpl-`, or its first digits
    id: String,
}

#[derive(Debug, Args)]
struct ReproduceArgs {
    #[command(flatten)]
    source: Source,
    /// Id of one decision; the newest ones otherwise
    id: Option<String>,
    /// So many of the newest decisions
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "id")]
    last: usize,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    source: Source,
    /// Verify the files of the event log alone, without the store
    #[arg(long)]
    from_log: bool,
    /// List at most this many problems
    #[arg(long, default_value_t = 20)]
    problems: usize,
}

#[derive(Debug, Args)]
struct StatsArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    filter: Filter,
}

#[derive(Debug, Args)]
struct ExportArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    filter: Filter,
    /// All events, one JSON object a line, each with its hash (`-`: standard output); takes no filter
    #[arg(long, value_name = "FILE", required_unless_present = "parquet")]
    jsonl: Option<PathBuf>,
    /// One row per decision
    #[arg(long, value_name = "FILE")]
    parquet: Option<PathBuf>,
}

pub(super) fn instant(text: &str) -> Result<Micros, String> {
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => Ok(time.as_microsecond()),
        Err(error) => Err(format!("{error}; write it as 2026-11-23T09:00:00Z")),
    }
}

impl Filter {
    fn filter(self) -> DecisionFilter {
        DecisionFilter {
            since: self.since,
            until: self.until,
            policy: self.policy,
            arm: self.arm,
            model: self.model,
            status: self.status,
            session: self.session,
            tenant: self.tenant,
            decided_by: self.decided_by,
            ..DecisionFilter::default()
        }
    }
}

impl Source {
    fn log_dir(&self) -> PathBuf {
        self.data_dir.path().join("log")
    }

    async fn open(&self) -> Result<Arc<dyn AuditStore>, StoreError> {
        open_existing(&StoreTarget::choose(self.database_url.as_deref(), &self.data_dir.path())?).await
    }

    /// Events of the data directory's log that the store does not have yet. Zero where there is no log here.
    async fn not_ingested(&self, store: &dyn AuditStore) -> anyhow::Result<u64> {
        let dir = self.log_dir();
        let cursors = store.replicas().await?;
        let Some(Ok(first)) = LogReader::at_rest(&dir, 1)?.next() else { return Ok(0) };
        let have = cursors.iter().find(|c| c.replica == first.replica).map_or(0, |c| c.seq);
        Ok(LogReader::at_rest(&dir, have + 1)?.take_while(Result::is_ok).count() as u64)
    }

    async fn mention_not_ingested(&self, store: &dyn AuditStore) -> anyhow::Result<()> {
        let waiting = self.not_ingested(store).await?;
        if waiting > 0 {
            eprintln!(
                "{waiting} events are in the log and not yet in the store; a running weir feeds them, else the next start does"
            );
        }
        Ok(())
    }
}

pub fn run(args: AuditArgs) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(async {
        match *args.verb {
            AuditVerb::List(args) => list(args).await,
            AuditVerb::Show(args) => show(args).await,
            AuditVerb::Verify(args) => verify(args).await,
            AuditVerb::Stats(args) => sums(args).await,
            AuditVerb::Reproduce(args) => derive_again(args).await,
            AuditVerb::Export(args) => export(args).await,
        }
    })
}

async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let store = args.source.open().await?;
    let filter = DecisionFilter { limit: Some(args.limit), before: args.before, ..args.filter.filter() };
    let rows = store.decisions(&filter).await?;
    if args.source.json {
        println!("{}", json!({ "decisions": rows }));
        return Ok(ExitCode::SUCCESS);
    }
    if !rows.is_empty() {
        println!(
            "{:<36}  {:<24}  {:<11}  {:<14}  {:<14}  {:<18}  {:>9}  {:>10}",
            "id", "time", "status", "policy", "arm", "model", "latency", "cost $"
        );
    }
    for row in &rows {
        print_row(row);
    }
    args.source.mention_not_ingested(&*store).await?;
    Ok(ExitCode::SUCCESS)
}

fn print_row(row: &DecisionRow) {
    println!(
        "{:<36}  {:<24}  {:<11}  {:<14}  {:<14}  {:<18}  {:>9}  {:>10}",
        row.id.to_string(),
        time(row.at),
        row.status.as_deref().unwrap_or(if row.dry { "dry" } else { "open" }),
        row.policy,
        row.arm,
        row.served_by.as_deref().unwrap_or("-"),
        row.latency_us.map_or("-".to_owned(), duration),
        row.cost_usd.map_or("-".to_owned(), |usd| format!("{usd:.6}")),
    );
}

/// The range of ids that begin with `prefix`, hexadecimal digits with or without hyphens.
fn id_range(prefix: &str) -> Option<(DecisionId, DecisionId)> {
    let digits: String = prefix.strip_prefix("chatcmpl-").unwrap_or(prefix).chars().filter(|c| *c != '-').collect();
    if digits.is_empty() || digits.len() > 32 {
        return None;
    }
    let bits = 128 - 4 * digits.len() as u32;
    let value = u128::from_str_radix(&digits, 16).ok()?;
    let first = value.checked_shl(bits).unwrap_or(value);
    let last = first | 1u128.checked_shl(bits).map_or(0, |b| b - 1);
    Some((DecisionId(uuid::Uuid::from_u128(first)), DecisionId(uuid::Uuid::from_u128(last))))
}

async fn find(store: &dyn AuditStore, source: &Source, id: &str) -> anyhow::Result<DecisionView> {
    let Some((first, last)) = id_range(id) else {
        bail!(
            "`{id}` is no decision id; it looks like 019abf3c-7c1e-7d3a-9d55-3f0e8d1c2b4a, and its first digits will do"
        );
    };
    let ids = store.ids_between(first, last, 3).await?;
    match ids.as_slice() {
        [id] => store.decision(*id).await?.with_context(|| format!("decision {id} has no record in the store")),
        [] => {
            let waiting = source.not_ingested(store).await?;
            let hint = if waiting > 0 {
                format!("; {waiting} events of the log are not in the store yet")
            } else {
                "; `weir audit list` shows what is there".to_owned()
            };
            bail!("no decision begins with `{id}`{hint}")
        }
        several => {
            let several: Vec<String> = several.iter().map(ToString::to_string).collect();
            bail!("several decisions begin with `{id}`: {}, …; give more digits", several.join(", "))
        }
    }
}

async fn show(args: ShowArgs) -> anyhow::Result<ExitCode> {
    let store = args.source.open().await?;
    let view = find(&*store, &args.source, &args.id).await?;
    if args.source.json {
        println!("{}", serde_json::to_string(&view)?);
    } else {
        print!("{}", view.explanation);
    }
    Ok(ExitCode::SUCCESS)
}

async fn derive_again(args: ReproduceArgs) -> anyhow::Result<ExitCode> {
    let store = args.source.open().await?;
    let views = match &args.id {
        Some(id) => vec![find(&*store, &args.source, id).await?],
        None => super::replay::newest(&*store, args.last, &DecisionFilter::default()).await?,
    };
    args.source.mention_not_ingested(&*store).await?;
    let report = replay::reproduce(&*store, views).await?;
    if args.source.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} decisions: {} derived again to the same bytes, {} came out otherwise, {} cannot be derived",
            report.asked,
            report.same,
            report.differences.len(),
            report.impossible.len()
        );
        if report.plans.asked > 0 {
            println!(
                "{} plans of several calls: {} run again with the same decisions, {} otherwise",
                report.plans.asked,
                report.plans.same,
                report.plans.differences.len()
            );
        }
        for difference in report.differences.iter().take(10).chain(report.plans.differences.iter().take(10)) {
            println!("\n{}\n  recorded  {}\n  derived   {}", difference.id, difference.recorded, difference.derived);
        }
        for (id, reason) in report.impossible.iter().take(10) {
            println!("{id}: {reason}");
        }
    }
    Ok(if report.all_same() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

async fn verify(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let dir = args.source.log_dir();
    let report = if args.from_log {
        if !dir.exists() {
            bail!("there is no event log at {}", dir.display());
        }
        verify_log(&dir, args.problems)?
    } else {
        let store = args.source.open().await?;
        verify_chain(&*store, Some(&dir), args.problems).await?
    };
    if args.source.json {
        let mut value = serde_json::to_value(&report)?;
        value["passed"] = report.passed().into();
        println!("{value}");
    } else {
        print_report(&report);
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print_report(report: &VerifyReport) {
    println!(
        "{} events in {} chains: {}",
        report.events,
        report.replicas,
        if report.passed() { "whole and unchanged" } else { "NOT in order" }
    );
    println!("{} contexts, embeddings and bodies match their hashes, {} were erased", report.beside, report.erased);
    if report.not_ingested > 0 {
        println!("{} of the events are in the log only, not yet in the store", report.not_ingested);
    }
    for problem in &report.problems {
        println!("  {} event {}: {}", problem.replica, problem.seq, problem.what);
    }
    let more = report.problem_count - report.problems.len() as u64;
    if more > 0 {
        println!("  and {more} more");
    }
}

async fn sums(args: StatsArgs) -> anyhow::Result<ExitCode> {
    let store = args.source.open().await?;
    let stats = stats(&*store, &args.filter.filter()).await?;
    if args.source.json {
        println!("{}", serde_json::to_string(&stats)?);
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(first), Some(last)) = (stats.first, stats.last) {
        println!("{} decisions from {} to {}", stats.total.decisions, time(first), time(last));
    } else {
        println!("no decisions");
    }
    println!(
        "{:<16}  {:<16}  {:>9}  {:>10}  {:>10}  {:>10}  {:>11}  status",
        "policy", "arm", "decisions", "p50", "p95", "ttft p50", "cost $"
    );
    for (policy, arms) in &stats.policies {
        for (arm, figures) in arms {
            print_figures(policy, arm, figures);
        }
    }
    print_figures("all", "", &stats.total);
    args.source.mention_not_ingested(&*store).await?;
    Ok(ExitCode::SUCCESS)
}

fn print_figures(policy: &str, arm: &str, figures: &Figures) {
    let us = |value: Option<i64>| value.map_or("-".to_owned(), duration);
    let status: Vec<String> = figures.status.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!(
        "{policy:<16}  {arm:<16}  {:>9}  {:>10}  {:>10}  {:>10}  {:>11.6}  {}",
        figures.decisions,
        us(figures.latency_p50_us),
        us(figures.latency_p95_us),
        us(figures.ttft_p50_us),
        figures.cost_usd,
        status.join(", ")
    );
}

fn create(path: &Path) -> anyhow::Result<BufWriter<File>> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(BufWriter::new(file))
}

async fn export(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let filter = args.filter.filter();
    if args.jsonl.is_some() && filter != DecisionFilter::default() {
        bail!("--jsonl exports whole chains, so that they can be verified; filters go with --parquet only");
    }
    let to_stdout = args.jsonl.as_deref() == Some(Path::new("-"));
    if to_stdout && args.source.json {
        bail!("--json and --jsonl - both want standard output; give --jsonl a file");
    }
    let store = args.source.open().await?;
    let mut report = json!({});
    if let Some(path) = &args.jsonl {
        let events = if to_stdout {
            export_jsonl(&*store, &mut std::io::stdout().lock()).await?
        } else {
            export_jsonl(&*store, &mut create(path)?).await?
        };
        report["jsonl"] = json!({ "file": path, "events": events });
        if !to_stdout && !args.source.json {
            println!("{events} events in {}", path.display());
        }
    }
    if let Some(path) = &args.parquet {
        let mut out = create(path)?;
        let decisions = export_parquet(&*store, &filter, &mut out).await?;
        out.flush()?;
        report["parquet"] = json!({ "file": path, "decisions": decisions });
        if !to_stdout && !args.source.json {
            println!("{decisions} decisions in {}", path.display());
        }
    }
    if args.source.json {
        println!("{report}");
    }
    args.source.mention_not_ingested(&*store).await?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_spans_the_ids_that_begin_with_it() {
        let id: DecisionId = "019abf3c-7c1e-7d3a-9d55-3f0e8d1c2b4a".parse().unwrap();
        for prefix in
            ["0", "019abf3c", "019abf3c-7c1e-7", "chatcmpl-019abf3c-7c1e", &id.to_string(), &id.completion_id()]
        {
            let (first, last) = id_range(prefix).unwrap();
            assert!(first <= id && id <= last, "{prefix}");
        }
        let (first, last) = id_range(&id.to_string()).unwrap();
        assert_eq!((first, last), (id, id));
        assert!(id_range("019b").unwrap().0 > id);
        for wrong in ["", "xyz", "019abf3c-7c1e-7d3a-9d55-3f0e8d1c2b4a0"] {
            assert!(id_range(wrong).is_none(), "{wrong}");
        }
    }
}
