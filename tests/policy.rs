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
        capabilities: Capabilities::default(),
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
    assert!(files.len() >= 30, "{}", files.len());
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
