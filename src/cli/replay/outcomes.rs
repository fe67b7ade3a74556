//! `weir replay` over outcomes: what every model would have answered is known.

use std::{path::Path, process::ExitCode, sync::Arc};

use super::ReplayArgs;
use crate::{
    app,
    cli::policy::fit::bar,
    domain::{Capabilities, Energy, Fleet, ModelCard, Price, Signals},
    fit::{self, embed},
    policy::{Artifact, Policy, Spec},
    replay::{
        matrix::Matrix,
        outcomes::{Origin, OutcomesSetting, Quoted, replay_outcomes},
    },
};

/// Policies on a matrix of outcomes.
pub(super) fn run(data: &Path, args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(!args.policy.is_empty(), "{}: outcomes were made by no policy; give --policy FILE", data.display());
    let mut matrix = Matrix::read(data, &args.inputs.how()?)?;
    let quoted = args.quoted.as_deref().map(Quoted::read).transpose().map_err(anyhow::Error::msg)?.unwrap_or_default();
    let what_if = args.what_if(&matrix.models.iter().map(String::as_str).collect())?;
    what_if.outcomes(&mut matrix);
    let signals: Vec<Signals> = matrix.queries.iter().map(|q| embed::measured(&q.text)).collect();
    // What a model asks per token is taken from what its answers cost.
    let every: Vec<usize> = (0..matrix.len()).collect();
    let tokens = signals.iter().map(|s| f64::from(s.tokens)).sum::<f64>().max(1.0) / matrix.len().max(1) as f64;
    let cards = matrix.models.iter().zip(matrix.means(&every)).map(|(name, mean)| ModelCard {
        name: name.clone(),
        tags: Vec::new(),
        context: 0,
        price: Price { input: mean.cost / tokens * 1e6, ..Price::default() },
        energy: Some(Energy::default()),
        capabilities: Capabilities { continuation: true, ..Capabilities::default() },
    });
    let cards: Vec<ModelCard> = cards.collect();
    let specs = args.specs()?;
    let fleet = |spec: &Spec| {
        let known = crate::cli::policy::implied_fleet(spec);
        let others = known.0.values().filter(|c| !matrix.models.contains(&c.name)).cloned();
        let tagged = cards.iter().cloned().map(|card| {
            let tags = known.get(&card.name).map(|k| k.tags.clone()).unwrap_or_default();
            ModelCard { tags, ..card }
        });
        Fleet::new(tagged.chain(others))
    };
    let (mut policies, inputs) = crate::cli::runtime()?.block_on(async {
        let (policies, embedder) = args.compiled(&specs, &fleet).await?;
        let mut inputs = None;
        if let Some(embedder) = embedder {
            let dir = args.inputs.data_dir.path().join("embeddings");
            let mut cache = embed::Cache::open(&dir, &embedder.identity())?;
            let bar = bar("embedding queries", matrix.len());
            inputs = Some(embed::inputs(&matrix, embedder.as_ref(), &mut cache, || bar.inc(1)).await?);
            bar.finish_and_clear();
        }
        anyhow::Ok((policies, inputs))
    })?;
    what_if.policies(&mut policies).map_err(anyhow::Error::msg)?;
    let context = |policy: &Policy, q: usize| fit::context(policy, signals[q].clone(), inputs.as_ref(), q);
    let steps = policies.iter().map(|p| if p.learns() { args.seeds.max(1) as usize } else { 1 }).sum();
    let bar = bar("replaying", steps);
    let checkpoints = args.checkpoints()?;
    let setting = OutcomesSetting {
        matrix: &matrix,
        policies: &policies,
        context: &context,
        orders: args.seeds,
        what_if: &what_if,
        checkpoints: checkpoints.as_ref(),
    };
    let report = replay_outcomes(&setting, &|| bar.inc(1));
    bar.finish_and_clear();
    let mut report = report.map_err(|e| anyhow::anyhow!("{}: {e}", data.display()))?;
    let fitted_here = |spec: &Spec| {
        let of = |artifact: &Arc<Artifact>| artifact.card.data.hash == report.hash;
        app::read_artifacts(spec).values().flatten().any(of)
    };
    let fitted: Vec<bool> = specs.iter().map(fitted_here).collect();
    for (line, _) in report.policies.iter_mut().zip(fitted).filter(|(_, fitted)| *fitted) {
        line.origin = Origin::InDistribution;
    }
    report.quoted = quoted;
    args.write(&report)?;
    match args.json {
        true => say!("{}", serde_json::to_string_pretty(&report)?),
        false => say!("{}", report.table().trim_end()),
    }
    Ok(ExitCode::SUCCESS)
}
