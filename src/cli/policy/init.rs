//! `weir policy init`: the shipped policies as templates.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde_json::json;

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Where to write; `-` for stdout
    #[arg(default_value = "policy.yaml", value_name = "FILE")]
    file: PathBuf,
    /// Which policy to start from
    #[arg(long, value_enum, default_value_t = Template::CostSaver)]
    template: Template,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

/// The shipped policies.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Template {
    /// Rules send what is hard to a large model, all else to a small one
    CostSaver,
    /// A contextual bandit learns from feedback which model to ask
    BalancedBandit,
    /// Personal data and regulated customers never leave the house
    PrivacyLocal,
    /// The best model for all but small talk
    QualityFirst,
    /// A graph trained on outcomes of open models expects who answers best for the money
    Graph,
    /// What a customer has paid for decides which models may answer
    TenantTiers,
    /// The small model answers where it is sure, else the large one
    FrugalCascade,
    /// Three probes answer where they agree, else larger models and a judge
    SelfConsistencyArena,
    /// A gate that keeps a bound on wrong answers, with a confidence, lets the small model's answers through
    GuaranteedCascade,
    /// Two models reason together, step by step; the small one writes what it is sure of
    GlimpseSteps,
    /// One model answers; when it fails, the best that is left does
    Failover,
}

impl Template {
    fn text(self) -> &'static str {
        match self {
            Template::CostSaver => include_str!("../../../policies/cost-saver.yaml"),
            Template::BalancedBandit => include_str!("../../../policies/balanced-bandit.yaml"),
            Template::PrivacyLocal => include_str!("../../../policies/privacy-local.yaml"),
            Template::QualityFirst => include_str!("../../../policies/quality-first.yaml"),
            Template::Graph => include_str!("../../../policies/graph.yaml"),
            Template::TenantTiers => include_str!("../../../policies/tenant-tiers.yaml"),
            Template::FrugalCascade => include_str!("../../../policies/frugal-cascade.yaml"),
            Template::SelfConsistencyArena => include_str!("../../../policies/self-consistency-arena.yaml"),
            Template::GuaranteedCascade => include_str!("../../../policies/guaranteed-cascade.yaml"),
            Template::GlimpseSteps => include_str!("../../../policies/glimpse-steps.yaml"),
            Template::Failover => include_str!("../../../policies/failover.yaml"),
        }
    }

    /// What the policy needs beside it, and where.
    fn artifact(self) -> Option<(&'static str, &'static [u8])> {
        Some(match self {
            Template::Graph => (
                "artifacts/open-models.graph.safetensors",
                include_bytes!("../../../policies/artifacts/open-models.graph.safetensors"),
            ),
            Template::GuaranteedCascade => (
                "artifacts/smollm2-135m.calibration.json",
                include_bytes!("../../../policies/artifacts/smollm2-135m.calibration.json"),
            ),
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Template::CostSaver => "cost-saver",
            Template::BalancedBandit => "balanced-bandit",
            Template::PrivacyLocal => "privacy-local",
            Template::QualityFirst => "quality-first",
            Template::Graph => "graph",
            Template::TenantTiers => "tenant-tiers",
            Template::FrugalCascade => "frugal-cascade",
            Template::SelfConsistencyArena => "self-consistency-arena",
            Template::GuaranteedCascade => "guaranteed-cascade",
            Template::GlimpseSteps => "glimpse-steps",
            Template::Failover => "failover",
        }
    }
}

pub(super) fn run(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let text = args.template.text();
    if args.file.as_os_str() == "-" {
        say!("{}", text.trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let shown = args.file.display();
    let mut open = std::fs::OpenOptions::new();
    open.write(true);
    match args.force {
        true => open.create(true).truncate(true),
        false => open.create_new(true),
    };
    let mut file = match open.open(&args.file) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            anyhow::bail!("{shown} is there already; give another name, or --force to replace it")
        }
        opened => opened.with_context(|| format!("cannot write {shown}"))?,
    };
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {shown}"))?;
    if let Some((path, bytes)) = args.template.artifact() {
        let artifact = args.file.parent().unwrap_or(std::path::Path::new("")).join(path);
        let wrong = || format!("cannot write {}", artifact.display());
        std::fs::create_dir_all(artifact.parent().unwrap_or(&artifact)).with_context(wrong)?;
        std::fs::write(&artifact, bytes).with_context(wrong)?;
    }
    if args.json {
        say!("{}", json!({"file": args.file, "template": args.template.name()}));
    } else {
        say!("wrote {shown} (from {})", args.template.name());
        say!("next: put your models under `models:`, then");
        say!("  weir policy check {shown}");
        say!("  weir policy test {shown}");
    }
    Ok(ExitCode::SUCCESS)
}
