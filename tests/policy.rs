//! Policy files as their authors meet them: what is said about broken ones, and that the shipped ones hold.

use std::{fs, path::Path};

use weir::{
    domain::{Capabilities, Fleet, ModelCard, Price},
    policy,
};

fn card(name: &str, tags: &[&str]) -> ModelCard {
    ModelCard {
        name: name.into(),
        tags: tags.iter().map(|t| (*t).to_owned()).collect(),
        context: 8192,
        price: Price::default(),
        energy: None,
        // As in life: models in the process go on from an answer that has begun.
        capabilities: Capabilities { continuation: tags.contains(&"on-prem"), ..Capabilities::default() },
    }
}

fn fleet() -> Fleet {
    Fleet::new([card("smol", &["small"]), card("gpt-4.1-mini", &["large"]), card("vault", &["on-prem"])])
}

/// What is wrong with a file, as text; `None` when it is accepted.
fn said(file: &str, yaml: &[u8]) -> Option<String> {
    policy::check(file, yaml, |_| fleet()).err().map(|d| d.to_string())
}

#[test]
fn every_broken_file_is_refused_with_its_message() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policies/bad");
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 40, "{}", files.len());
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path("policies/messages");
    settings.set_omit_expression(true);
    settings.bind(|| {
        for path in files {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let said = said(&format!("{name}.yaml"), &fs::read(&path).unwrap());
            let said = said.unwrap_or_else(|| panic!("{name} was accepted"));
            insta::assert_snapshot!(name, said);
        }
    });
}

/// Runs `weir policy …` in the repository's root: exit code, stdout, stderr.
fn weir(args: &[&str]) -> (i32, String, String) {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("policy")
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("NO_COLOR", "1")
        .env("WEIR_HOME", crate::support::test_home())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

const SHIPPED: [&str; 12] = [
    "policies/balanced-bandit.yaml",
    "policies/cost-saver.yaml",
    "policies/default.yaml",
    "policies/failover.yaml",
    "policies/frugal-cascade.yaml",
    "policies/glimpse-steps.yaml",
    "policies/graph.yaml",
    "policies/guaranteed-cascade.yaml",
    "policies/privacy-local.yaml",
    "policies/quality-first.yaml",
    "policies/self-consistency-arena.yaml",
    "policies/tenant-tiers.yaml",
];

#[test]
fn shipped_policies_are_fine_and_pass_their_own_tests() {
    let (code, out, err) = weir(&[&["check"], &SHIPPED[..]].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let (plans, files): (Vec<&str>, Vec<&str>) = out.lines().partition(|line| line.starts_with("  "));
    assert_eq!(files.len(), SHIPPED.len(), "a shipped policy has warnings:\n{out}");
    let probed = "  probed  cascade(vote(small, small, small) if disagreement < 0.4, else judge(medium, large; by large)): at most 6 \
                  calls";
    assert!(plans.contains(&probed), "{out}");
    let (code, out, _) = weir(&[&["test", "--json"], &SHIPPED[..]].concat());
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, report["ok"].as_bool()), (0, Some(true)), "{out}");
    for file in report["files"].as_array().unwrap() {
        assert!(file["passed"].as_u64().unwrap() >= 8, "{file}");
    }
}

#[test]
fn shipped_policies_explain_themselves() {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path("policies/explanations");
    settings.set_omit_expression(true);
    // The hash follows every byte of the file; the explanation is what is golden here.
    let hash = regex::Regex::new(r"(policy +[a-z-]+ )[0-9a-f]{12}").unwrap();
    // An embedder of bytes is not the same to the last digit on every processor.
    let score = regex::Regex::new(r"score -?[0-9.]+").unwrap();
    settings.bind(|| {
        for file in SHIPPED {
            let name = Path::new(file).file_stem().unwrap().to_str().unwrap().to_owned();
            let (code, out, err) =
                weir(&["explain", file, "--prompt", "My card 4111 1111 1111 1111 was declined", "--seed", "7"]);
            assert_eq!(code, 0, "{err}");
            let out = hash.replace(&out, "${1}[hash]").into_owned();
            let out = if name == "graph" { score.replace_all(&out, "score [score]").into_owned() } else { out };
            insta::assert_snapshot!(name, out);
        }
    });
}

#[test]
fn exit_codes_and_documents_are_as_promised() {
    let bad = "tests/policies/bad/unknown-keys.yaml";
    let (code, out, _) = weir(&["check", bad, "policies/cost-saver.yaml", "no-such-file.yaml", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["ok"]), (1, &serde_json::Value::Bool(false)));
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.iter().map(|f| f["ok"].as_bool().unwrap()).collect::<Vec<_>>(), [false, true, false]);
    let first = &files[0]["diagnostics"][0];
    assert_eq!((&first["line"], &first["column"], &first["path"]), (&2.into(), &1.into(), &"modles".into()));
    assert!(files[2]["unreadable"].as_str().unwrap().contains("no-such-file.yaml"));
    assert_eq!(weir(&["check"]).0, 2);
    assert_eq!(weir(&["explain", bad, "--prompt", "x"]).0, 1);
    assert_eq!(weir(&["explain", "policies/cost-saver.yaml"]).0, 2);

    let (code, out, _) = weir(&["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &schema["title"]), (0, &"weir policy".into()));
    let (code, out, _) = weir(&["schema", "--variables", "--json"]);
    assert_eq!(code, 0);
    assert!(serde_json::from_str::<serde_json::Value>(&out).unwrap().as_array().unwrap().len() > 25);
}

#[test]
fn the_page_of_variables_is_the_table() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/VARIABLES.md")).unwrap();
    let (code, out, _) = weir(&["schema", "--variables", "--markdown"]);
    assert_eq!((code, out), (0, page), "`weir policy schema --variables --markdown > policies/VARIABLES.md`");
}

#[test]
fn coverage_names_what_no_test_touches() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.yaml");
    let text = "policy: p\nmodels: {a: {name: a}, b: {name: b}}\nrules:\n  - {name: hard, when: signals.complexity > 50, \
                use: b}\n  - {name: any, when: signals.tokens >= 0, deny_models: []}\n";
    let text = text.replace("deny_models: []", "allow_models: [a, b]")
        + "select: {arms: [a, b], weighted: {a: 1, b: 1}}\ntests:\n  - {name: one, prompt: hello, signals: {complexity: 1}, \
           seed: 1, expect: {refused: false}}\n";
    fs::write(&file, text).unwrap();
    let (code, out, _) = weir(&["test", "--coverage", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("the rule never holds: `hard`") && out.contains("the rule always holds: `any`"), "{out}");
    assert_eq!(out.matches("the plan is never taken").count(), 1, "{out}");
}

#[test]
fn a_failing_test_says_what_was_expected_and_what_came() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("failing.yaml");
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/privacy-local.yaml")).unwrap();
    fs::write(&file, text.replace("expect: {plan: hosted, rule: hard-questions-go-out}", "expect: {plan: house}"))
        .unwrap();
    let (code, out, _) = weir(&["test", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(out.contains("FAILED  a hard question goes out"), "{out}");
    assert!(out.contains("expected the plan `house`, got `hosted`"), "{out}");
    assert!(out.contains("7 passed, 1 failed"), "{out}");
}

#[test]
fn init_writes_a_policy_that_is_fine_and_never_overwrites() {
    let dir = tempfile::tempdir().unwrap();
    for template in [
        "cost-saver",
        "balanced-bandit",
        "privacy-local",
        "graph",
        "frugal-cascade",
        "self-consistency-arena",
        "glimpse-steps",
        "guaranteed-cascade",
        "failover",
    ] {
        let file = dir.path().join(format!("{template}.yaml"));
        let file = file.to_str().unwrap();
        assert_eq!(weir(&["init", file, "--template", template]).0, 0);
        assert_eq!(weir(&["check", file]).0, 0);
        assert_eq!(weir(&["test", file]).0, 0);
        let (code, _, err) = weir(&["init", file]);
        assert_eq!(code, 1);
        assert!(err.contains("there already"), "{err}");
    }
}

#[test]
fn a_configuration_decides_which_fleet_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("weir.yaml");
    fs::write(&config, "listen: 127.0.0.1:8080\nfleet:\n  - name: tiny\n    tags: [small]\n    context: 64\n").unwrap();
    let config = config.to_str().unwrap();
    let (code, out, _) = weir(&["check", "policies/cost-saver.yaml", "--config", config]);
    assert_eq!(code, 1);
    assert!(out.contains("no fleet entry has the tag `large`"), "{out}");
    let policy = dir.path().join("p.yaml");
    fs::write(&policy, "policy: p\nmodels: {small: {tag: small}}\nselect: {arms: [small], static: small}\n").unwrap();
    let long = "word ".repeat(200);
    let args = ["explain", policy.to_str().unwrap(), "--config", config, "--prompt", &long];
    let (code, out, _) = weir(&args);
    assert_eq!(code, 0);
    assert!(out.starts_with("REFUSED") && out.contains("tiny: "), "{out}");
}
