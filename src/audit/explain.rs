//! One decision told to a person: when, for whom, by which policy, what was tried, drawn, called and said of it.

use std::fmt::Write;

mod tree;

use super::query::DecisionView;
use crate::domain::{Attempt, Candidate, ChunkReuse, DecidedBy, Micros, Plan, RuleOutcome, Usage, UsageSource};

use super::projection::{decided_by, eliminated};

/// A time as RFC 3339 with milliseconds, UTC.
pub fn time(at: Micros) -> String {
    match jiff::Timestamp::from_microsecond(at) {
        Ok(time) => time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
        Err(_) => format!("{at} µs after 1970"),
    }
}

/// A duration of microseconds in the unit that suits it.
pub fn duration(us: i64) -> String {
    match us {
        ..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

fn money(usd: f64) -> String {
    if usd == 0.0 { "$0".to_owned() } else { format!("${usd:.6}") }
}

fn tokens(usage: &Usage) -> String {
    let mut cached = match (usage.cached_tokens, usage.chunk_tokens) {
        (0, _) => String::new(),
        (all, 0) => format!(" ({all} cached)"),
        (all, chunks) => format!(" ({all} cached, {chunks} of documents, {} computed again)", usage.recomputed_tokens),
    };
    if let Some(why) = usage.chunk_reuse.filter(|reuse| *reuse != ChunkReuse::Reused) {
        cached += &format!(" (documents not reused: {})", why.as_str());
    }
    let source = if usage.source == UsageSource::Estimated { ", estimated" } else { "" };
    format!("{}{cached} + {} tokens{source}", usage.prompt_tokens, usage.completion_tokens)
}

fn or<'a>(text: &'a str, absent: &'a str) -> &'a str {
    if text.is_empty() { absent } else { text }
}

fn candidate(out: &mut String, candidate: &Candidate, drawn: bool) {
    let score = candidate.score.map_or("-".to_owned(), |score| format!("{score:.4}"));
    let mark = if drawn { "*" } else { " " };
    let _ = write!(out, "  {mark} {:<24} score {score:<9} propensity {:.4}", candidate.arm, candidate.propensity);
    if let Some(by) = &candidate.eliminated {
        let _ = write!(out, "  eliminated by {}", eliminated(by));
    }
    out.push('\n');
}

fn rule(outcome: RuleOutcome) -> &'static str {
    match outcome {
        RuleOutcome::NoMatch => "did not match",
        RuleOutcome::Used => "matched and decided",
        RuleOutcome::Restricted => "matched; its restrictions were added",
        RuleOutcome::NotUsable => "matched, but what it uses cannot serve this request",
        RuleOutcome::Dropped => "matched, but left nothing; its restrictions were dropped",
        RuleOutcome::ErrorTaken => "failed to evaluate and was taken as true",
        RuleOutcome::ErrorSkipped => "failed to evaluate and was skipped",
    }
}

/// The explanation, several lines ending in a line feed.
pub fn explain(view: &DecisionView) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_all(&mut out, view);
    out
}

fn write_all(out: &mut String, view: &DecisionView) -> std::fmt::Result {
    let record = &view.decision;
    let decision = &record.decision;
    writeln!(out, "decision  {}", view.id)?;
    writeln!(out, "when      {}", time(view.at))?;
    let retry = if record.client_retry > 0 { format!(", client retry {}", record.client_retry) } else { String::new() };
    let stream = if record.stream { ", streaming" } else { "" };
    writeln!(out, "asked     model `{}`{stream}{retry}", record.model_requested)?;
    writeln!(
        out,
        "who       key {}, tenant {}, session {}",
        or(&record.key, "none"),
        or(&record.tenant, "none"),
        or(&record.session, "none")
    )?;
    writeln!(
        out,
        "policy    {} ({}), state after {} updates",
        decision.policy, decision.policy_hash, decision.state_seq
    )?;
    writeln!(out, "weir      {}", record.build)?;
    if let Some(embedder) = &record.embedder {
        writeln!(out, "embedder  {} ({}, {} dimensions)", embedder.name, embedder.precision, embedder.dimensions)?;
    }
    if let Some(why) = &decision.no_embedding {
        writeln!(out, "          no embedding: {why}")?;
    }
    let kept = match (&view.context, record.context_hash) {
        (Some(_), _) => "kept",
        (None, Some(_)) => "erased (its hash is still in the record)",
        (None, None) => "not kept",
    };
    writeln!(out, "context   {kept}")?;

    if !decision.rules.is_empty() {
        writeln!(out, "\nrules, in order")?;
        for trace in &decision.rules {
            let error = trace.error.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
            writeln!(out, "    {:<24} {}{error}", trace.rule, rule(trace.outcome))?;
        }
    }
    if !decision.candidates.is_empty() {
        writeln!(out, "\ncandidates (* was taken)")?;
        for each in &decision.candidates {
            candidate(out, each, each.arm == decision.arm);
        }
    }
    let by = match (decision.decided_by, &decision.rule) {
        (DecidedBy::Rule, Some(name)) => format!("rule `{name}`"),
        (DecidedBy::Select, _) => format!("the draw, with probability {:.4}", decision.propensity),
        (DecidedBy::Pinned, _) => "the client, who named it".to_owned(),
        (other, _) => decided_by(other).to_owned(),
    };
    if let Some(of) = &view.decision.shadow_of {
        writeln!(out, "\nshadow of {of}: nothing was called")?;
    }
    match &decision.refusal {
        Some(why) => writeln!(out, "\nrefused: {why}")?,
        None => writeln!(out, "\narm `{}`, chosen by {by}", decision.arm)?,
    }
    match &decision.plan {
        Some(Plan::Call(call)) => writeln!(out, "plan      call {}", call.model)?,
        Some(tree) => writeln!(out, "plan      {tree}")?,
        None => {}
    }
    if let Some(retries) = decision.retries {
        writeln!(out, "retries   {retries} of a call that failed")?;
    }
    if !decision.fallback.is_empty() {
        let models: Vec<&str> = decision.fallback.iter().map(|call| call.model.as_str()).collect();
        writeln!(out, "fallback  on {} to {}", decision.fallback_on.join(", "), models.join(", "))?;
    }
    calls(out, view)?;
    writeln!(out, "\nrecord    event {} of `{}`, BLAKE3 {}", view.seq, view.replica, view.hash)
}

/// One call: what it was, how long it took, what it used and cost, and how it failed.
fn attempt(out: &mut String, attempt: &Attempt, indent: &str) -> std::fmt::Result {
    let reported = attempt.model_reported.as_ref().map(|m| format!(" (as {m})")).unwrap_or_default();
    let ttft = attempt.ttft_us.map(|us| format!(", first token after {}", duration(us))).unwrap_or_default();
    writeln!(
        out,
        "{indent}{} {:<10} {}{reported}, {}: {}{ttft}, {}, {}",
        attempt.index,
        attempt.why.as_str(),
        attempt.model,
        attempt.backend,
        duration(attempt.latency_us),
        tokens(&attempt.usage),
        money(attempt.cost_usd)
    )?;
    if let Some(error) = &attempt.error {
        let detail = attempt.error_detail.as_ref().map(|d| format!(": {d}")).unwrap_or_default();
        writeln!(out, "{indent}             failed: {error}{detail}")?;
    }
    Ok(())
}

fn calls(out: &mut String, view: &DecisionView) -> std::fmt::Result {
    match &view.decision.decision.plan {
        Some(plan) if !matches!(plan, Plan::Call(_)) && !view.attempts.is_empty() => tree::write(out, plan, view)?,
        _ => {
            if !view.attempts.is_empty() {
                writeln!(out, "\ncalls")?;
            }
            for each in &view.attempts {
                attempt(out, each, "    ")?;
            }
            for each in &view.notes {
                writeln!(out, "    {}", each.note.what)?;
            }
        }
    }
    match &view.outcome {
        None if view.decision.dry => writeln!(out, "\noutcome   none: only the decision was asked for")?,
        None => writeln!(out, "\noutcome   none yet")?,
        Some(outcome) => {
            let error = outcome.error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default();
            writeln!(
                out,
                "\noutcome   {}{error}, served by {}, {} after {} calls, {}, {}",
                outcome.status.as_str(),
                or(&outcome.served_by, "none"),
                duration(outcome.latency_us),
                outcome.attempts,
                tokens(&outcome.usage),
                money(outcome.cost_usd)
            )?;
        }
    }
    for given in &view.feedback {
        let feedback = &given.feedback;
        writeln!(out, "feedback  {} {} = {} by {}", time(given.at), feedback.name, feedback.value, feedback.source)?;
    }
    for update in &view.state_updates {
        writeln!(
            out,
            "learnt    update {} of {}: arm `{}`, reward {}",
            update.seq,
            update.policy_hash.short(),
            update.arm,
            update.reward
        )?;
    }
    Ok(())
}
