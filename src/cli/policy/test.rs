//! `weir policy test`: the cases that policy files hold.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use serde::Serialize;

use super::{Common, fancy, load_to_decide, request, say};
use crate::{
    policy::{Diagnostics, Policy, testing},
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

pub(super) fn run(files: &[PathBuf], common: &Common) -> anyhow::Result<ExitCode> {
    let mut report = Report { ok: true, files: Vec::new() };
    let mut embedder = None;
    for file in files {
        let name = file.display().to_string();
        let tested = match load_to_decide(file, common, &mut embedder) {
            Ok(Ok(policy)) => test(name, &policy, embedder.as_ref()),
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
        Tested { file, ok: false, passed: 0, failed: 0, cases: Vec::new(), broken: Vec::new(), diagnostics: None }
    }
}

fn test(file: String, policy: &Policy, embedder: Option<&Arc<dyn Embedder>>) -> Tested {
    let mut tested = Tested::nothing(file);
    let state = policy.initial_state();
    for case in policy.tests() {
        let result = request::from_test(policy, case)
            .map_err(|e| format!("{e:#}"))
            .and_then(|asked| request::embedded(policy, &asked, embedder).map_err(|e| format!("{e:#}")))
            .and_then(|context| testing::run(policy, &state, case, context));
        match result {
            Ok(result) => tested.cases.push(result),
            Err(reason) => tested.broken.push(Broken { name: case.name.clone(), reason }),
        }
    }
    tested.passed = tested.cases.iter().filter(|c| c.passed).count();
    tested.failed = tested.cases.len() - tested.passed + tested.broken.len();
    tested.ok = tested.failed == 0;
    tested
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
        match file.passed + file.failed {
            0 => say!("{}: no tests", file.file),
            _ => say!("{}: {} passed, {} failed", file.file, file.passed, file.failed),
        }
    }
}
