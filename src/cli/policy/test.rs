//! `weir policy test`: the cases that policy files hold.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use serde::Serialize;

use super::{Common, fancy, load_to_decide, request};
use crate::{
    domain::Request,
    policy::{Diagnostics, Policy, TestSpec, testing},
    signals::Embedder,
};

#[derive(Serialize)]
struct Tested {
    file: String,
    ok: bool,
    passed: usize,
    failed: usize,
    cases: Vec<testing::Case>,
    /// Cases that could not be run, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    broken: Vec<Broken>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diagnostics: Option<Diagnostics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    coverage: Option<testing::Coverage>,
}

#[derive(Serialize)]
struct Broken {
    name: String,
    reason: String,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    files: Vec<Tested>,
}

pub(super) fn run(files: &[PathBuf], coverage: bool, common: &Common) -> anyhow::Result<ExitCode> {
    let mut report = Report { ok: true, files: Vec::new() };
    let mut embedder = None;
    for file in files {
        let name = file.display().to_string();
        let tested = match load_to_decide(file, common, &mut embedder) {
            Ok(Ok(policy)) => {
                let mut tested = test(name, &policy, embedder.as_ref());
                if coverage {
                    let decisions = tested.cases.iter().map(|c| &c.decision);
                    tested.coverage = Some(testing::Coverage::of(&policy, decisions));
                }
                tested
            }
            Ok(Err(diagnostics)) => Tested { diagnostics: Some(diagnostics), ..Tested::nothing(name) },
            Err(error) => {
                let broken = vec![Broken { name: String::new(), reason: format!("{error:#}") }];
                Tested { broken, failed: 1, ..Tested::nothing(name) }
            }
        };
        report.ok &= tested.ok;
        report.files.push(tested);
    }
    match common.json {
        true => say!("{}", serde_json::to_string_pretty(&report)?),
        false => print(&report),
    }
    Ok(ExitCode::from(u8::from(!report.ok)))
}

impl Tested {
    fn nothing(file: String) -> Self {
        Tested {
            file,
            ok: false,
            passed: 0,
            failed: 0,
            cases: Vec::new(),
            broken: Vec::new(),
            diagnostics: None,
            coverage: None,
        }
    }
}

fn test(file: String, policy: &Policy, embedder: Option<&Arc<dyn Embedder>>) -> Tested {
    let mut tested = Tested::nothing(file);
    for case in policy.tests() {
        match one(policy, case, embedder) {
            Ok(result) => tested.cases.push(result),
            Err(reason) => tested.broken.push(Broken { name: case.name.clone(), reason }),
        }
    }
    tested.passed = tested.cases.iter().filter(|c| c.passed).count();
    tested.failed = tested.cases.len() - tested.passed + tested.broken.len();
    tested.ok = tested.failed == 0;
    tested
}

/// Runs one case; an error says why it cannot be run.
fn one(policy: &Policy, case: &TestSpec, embedder: Option<&Arc<dyn Embedder>>) -> Result<testing::Case, String> {
    let embedder = embedder.filter(|_| request::embeds(policy, case));
    let seen = |asked: &Request| request::embedded(policy, asked, embedder).map_err(|e| format!("{e:#}"));
    let context = seen(&request::from_test(policy, case).map_err(|e| format!("{e:#}"))?)?;
    let mut state = policy.initial_state();
    for learnt in &case.learnt {
        let context = match &learnt.prompt {
            Some(prompt) => seen(&request::from_prompt(policy, prompt).map_err(|e| format!("{e:#}"))?)?,
            None => testing::overlay(case, context.clone())?,
        };
        testing::learn(policy, &mut state, learnt, &context)?;
    }
    testing::run(policy, &state, case, context)
}

fn print(report: &Report) {
    for file in &report.files {
        if let Some(diagnostics) = &file.diagnostics {
            say!("{}\n", diagnostics.render(fancy()));
            say!("{}: not run", file.file);
            continue;
        }
        for case in &file.cases {
            say!("{}  {}", if case.passed { "ok    " } else { "FAILED" }, case.name);
            for failure in &case.failures {
                say!("          {failure}");
            }
        }
        for broken in &file.broken {
            say!("FAILED  {}\n          {}", broken.name, broken.reason);
        }
        if let Some(coverage) = &file.coverage {
            let missing = coverage.missing();
            missing.iter().for_each(|what| say!("        {what}"));
            if missing.is_empty() {
                say!("        every rule, plan and split is touched");
            }
        }
        match file.passed + file.failed {
            0 => say!("{}: no tests", file.file),
            _ => say!("{}: {} passed, {} failed", file.file, file.passed, file.failed),
        }
    }
}
