//! A decision as text: every rule tried, every arm and why it was or was not possible, the draw, what will be called.

use std::fmt::Write;

use serde::Serialize;

use super::{
    decide::because,
    draw::{self, Purpose},
};
use crate::domain::{
    Aggregate, CallSpec, Context, DecidedBy, Decision, IfUnscored, Plan, RuleOutcome, Steps, Verified,
};

/// The explanation of `decision` on `context`, in lines of plain text.
pub fn text(decision: &Decision, context: &Context) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    let _ = write(&mut out, decision, context);
    out
}

/// The random number that chose among the probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Draw {
    /// In [0, 1): the first arm at which the sum of the probabilities is above it is taken.
    pub u: f64,
}

/// The draw of a decision; `None` where nothing was drawn.
pub fn draw(decision: &Decision, context: &Context) -> Option<Draw> {
    let drawn = decision.decided_by == DecidedBy::Select && decision.split.is_none();
    drawn.then(|| Draw { u: draw::unit(context.seed, Purpose::Arm as u32, 0) })
}

fn write(out: &mut String, d: &Decision, c: &Context) -> std::fmt::Result {
    let by = match d.decided_by {
        DecidedBy::Rule => format!("by the rule `{}`", d.rule.as_deref().unwrap_or_default()),
        DecidedBy::Select => "by the selector".to_owned(),
        DecidedBy::Pinned => "because the client named it".to_owned(),
        DecidedBy::Shadow => "beside the deciding policy".to_owned(),
        DecidedBy::Refused => String::new(),
    };
    match d.plan {
        None => writeln!(out, "REFUSED: {}", d.refusal.as_deref().unwrap_or_default())?,
        _ => writeln!(out, "{} {by} (probability {})", d.arm, number(d.propensity))?,
    }
    writeln!(out, "  policy      {} {} after {} updates", d.policy, d.policy_hash.short(), d.state_seq)?;
    match &d.plan {
        Some(Plan::Call(call)) => writeln!(out, "  call        {}", describe(call))?,
        Some(tree) => {
            writeln!(out, "  plan        {} calls at most", tree.most_calls())?;
            branch(out, tree, 14, "")?;
        }
        None => {}
    }
    if let Some(retries) = d.retries {
        writeln!(out, "  retries     {retries}")?;
    }
    if !d.fallback.is_empty() {
        let calls: Vec<String> = d.fallback.iter().map(describe).collect();
        writeln!(out, "  on error    {} -> {}", d.fallback_on.join(", "), calls.join(" -> "))?;
    }
    let s = &c.signals;
    writeln!(
        out,
        "  signals     tokens {}, query_tokens {}, language {}, code_share {}, complexity {}, turn {}, pii {}",
        s.tokens,
        s.query_tokens,
        if s.language.is_empty() { "und" } else { &s.language },
        number(s.code_share),
        number(s.complexity),
        s.turn,
        s.pii.count
    )?;
    for (name, cosine) in &s.similarity {
        writeln!(out, "              similarity.{name} {}", number(*cosine))?;
    }
    if !c.request.needs.is_empty() {
        let needs: Vec<&str> = c.request.needs.iter().map(|n| n.as_str()).collect();
        writeln!(out, "  needs       {}", needs.join(", "))?;
    }
    if let Some(why) = &d.no_embedding {
        writeln!(out, "  embedding   missing: {why}")?;
    }
    if !d.rules.is_empty() {
        writeln!(out, "  rules")?;
        let width = d.rules.iter().map(|r| r.rule.chars().count()).max().unwrap_or(0);
        for r in &d.rules {
            let outcome = match r.outcome {
                RuleOutcome::NoMatch => "does not hold",
                RuleOutcome::Used => "holds: decided",
                RuleOutcome::Restricted => "holds: restricts",
                RuleOutcome::NotUsable => "holds, but what it would use cannot serve this request",
                RuleOutcome::Dropped => "holds, but would leave no arm: ignored",
                RuleOutcome::ErrorTaken => "failed, and takes effect",
                RuleOutcome::ErrorSkipped => "failed, and is skipped",
            };
            write!(out, "    {:width$}  {outcome}", r.rule)?;
            match &r.error {
                Some(error) => writeln!(out, " ({error})")?,
                None => writeln!(out)?,
            }
        }
    }
    if !d.candidates.is_empty() {
        writeln!(out, "  arms")?;
        let width = d.candidates.iter().map(|a| a.arm.chars().count()).max().unwrap_or(0);
        for a in &d.candidates {
            let score = a.score.map_or_else(String::new, |s| format!("  score {}", number(s)));
            let mark = if a.arm == d.arm { "  <- drawn" } else { "" };
            let out_because = a
                .eliminated
                .as_ref()
                .map_or_else(String::new, |e| format!("  out: {}", because(e, a.model.as_deref())));
            writeln!(out, "    {:width$}  probability {}{score}{mark}{out_because}", a.arm, number(a.propensity))?;
        }
    }
    if let Some(split) = &d.split {
        writeln!(out, "  split       `{split}` has this request in its share")?;
    }
    if let Some(Draw { u }) = draw(d, c) {
        writeln!(out, "  draw        {} from seed {:016x}", number(u), c.seed)?;
    }
    if !d.features.is_empty() {
        let shown: Vec<String> = d.features.iter().take(16).map(|x| number(*x)).collect();
        let more = d.features.len().saturating_sub(16);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        writeln!(out, "  features    {}{more}", shown.join(" "))?;
    }
    Ok(())
}

/// A node of a plan in lines of their own, the first behind `mark`, what is below it further in.
fn branch(out: &mut String, plan: &Plan, indent: usize, mark: &str) -> std::fmt::Result {
    let inner = indent + mark.chars().count();
    write!(out, "{:indent$}{mark}", "")?;
    match plan {
        Plan::Call(call) => writeln!(out, "{}", describe(call)),
        Plan::Hedged { call, hedge, after_ms } => {
            writeln!(out, "{}, after {after_ms} ms beside it {}", describe(call), describe(hedge))
        }
        Plan::Cascade(stages) => {
            writeln!(out, "cascade")?;
            for (i, stage) in stages.iter().enumerate() {
                branch(out, &stage.plan, inner + 2, &format!("{}. ", i + 1))?;
                for (n, condition) in stage.accept_when.iter().enumerate() {
                    let word = if n == 0 { "accepted if" } else { "and" };
                    let unscored =
                        if condition.if_unscored == IfUnscored::Accept { ", or without a score" } else { "" };
                    writeln!(out, "{:width$}{word} {condition}{unscored}", "", width = inner + 7)?;
                }
            }
            Ok(())
        }
        Plan::Parallel { branches, aggregate } => {
            writeln!(out, "parallel, answered by {}", answered(aggregate))?;
            let mut i = 0;
            while let Some(first) = branches.get(i) {
                let weight = |n: usize| match aggregate {
                    Aggregate::WeightedVote { weights } => weights.get(n).copied(),
                    _ => None,
                };
                let same = |n: &usize| branches.get(*n) == Some(first) && weight(*n) == weight(i);
                let next = i + (i..branches.len()).take_while(same).count();
                let times = if next - i > 1 { format!("{} x ", next - i) } else { String::new() };
                let weight = weight(i).map_or_else(String::new, |w| format!("weight {}: ", number(w)));
                branch(out, first, inner + 2, &format!("- {times}{weight}"))?;
                i = next;
            }
            Ok(())
        }
        Plan::Steps(steps) => {
            let Steps { tau, max_steps, max_tokens, .. } = &**steps;
            writeln!(out, "reasoning, at most {max_steps} steps and {max_tokens} tokens")?;
            let width = inner + 2;
            writeln!(out, "{:width$}- begins each step: {}", "", describe(&steps.small))?;
            writeln!(
                out,
                "{:width$}- writes it from {} nats of its first token on: {}",
                "",
                number(*tau),
                describe(&steps.large)
            )?;
            writeln!(out, "{:width$}- answers: {}", "", describe(&steps.answer))
        }
        Plan::Verified(verified) => {
            let Verified { plan, by, times } = &**verified;
            writeln!(out, "verified {times} x by {}", describe(by))?;
            branch(out, plan, inner + 2, "- ")
        }
    }
}

fn answered(aggregate: &Aggregate) -> String {
    match aggregate {
        Aggregate::First => "the first".to_owned(),
        Aggregate::Vote => "a vote".to_owned(),
        Aggregate::WeightedVote { .. } => "a weighted vote".to_owned(),
        Aggregate::Judge { call } => format!("a judge, {}", describe(call)),
        Aggregate::Refine { call } => format!("refining, {}", describe(call)),
    }
}

fn describe(call: &CallSpec) -> String {
    let mut parts = Vec::new();
    let s = &call.sampling;
    parts.extend(s.temperature.map(|t| format!("temperature {}", number(t))));
    parts.extend(s.top_p.map(|t| format!("top_p {}", number(t))));
    parts.extend(s.max_tokens.map(|n| format!("max_tokens {n}")));
    parts.extend(s.seed.map(|n| format!("seed {n}")));
    parts.extend((!s.stop.is_empty()).then(|| format!("{} stop strings", s.stop.len())));
    parts.extend(call.system.as_ref().map(|_| "a system prompt".to_owned()));
    match parts.is_empty() {
        true => call.model.clone(),
        false => format!("{} with {}", call.model, parts.join(", ")),
    }
}

/// At most four digits after the point, none that say nothing.
fn number(x: f64) -> String {
    let text = format!("{x:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() || text == "-0" { "0".to_owned() } else { text.to_owned() }
}
