//! Training of the `graph` predictor: edge prediction on the bipartite graph of queries and models (GraphRouter, arXiv
//! 2410.03834), with candle.
//!
//! A query's node is a linear map of [1, embedding, features]. A model's node is made from its description's embedding and
//! from messages along the edges that are visible, each the query's vector times a learnt gate of how far the edge's score
//! and cost are from the model's mean: what sets the queries apart that it does well. The paper's convolution adds query and
//! edge instead, which says of a model only how good it is on average. In every round half of the edges or more are hidden
//! at random (the paper's mask rate is a half), and the hidden ones are predicted: binary cross entropy against the score
//! itself, since a router that weighs quality against cost wants a quality and not only the winner. How many rounds are best
//! is found on a fifth of the queries; then all are trained on.
//!
//! Nothing about a model is learnt but through its description and its edges, so a model that comes later needs no
//! training: the same map on its description and a few observations gives its vector.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops};

use super::{FEATURES, Fitted, Inputs, Task, scale::Scale};
use crate::{
    policy::{Artifact, artifact, predict::kernel::expanded},
    replay::{matrix::Matrix, metrics::SplitMix},
};

/// Length of a node's vector.
const HIDDEN: usize = 32;
/// Rounds at most, and rounds without progress until training stops.
const ROUNDS: usize = 250;
const PATIENCE: usize = 30;
const LEARNING_RATE: f64 = 2e-2;
const WEIGHT_DECAY: f64 = 5e-2;
/// What a message counts for at the start.
const MESSAGE: f32 = 100.0;
/// Place of the odds behind description and messages.
const ODDS: usize = 1;
/// Greatest share of a model's edges that carry messages; in every round each model has another share, down to a
/// sixteenth, so that a model of which little is known is nothing new.
const VISIBLE: f64 = 0.5;

/// What is learnt.
struct Weights {
    /// Columns x hidden.
    query: Var,
    /// Weights of an edge's score and of its cost, both less the model's means.
    gate: Var,
    /// (description + hidden + 3) x (hidden + 1): a model's vector and its bias, from its description, its messages, and its
    /// mean score, the odds of that, and its mean cost.
    model: Var,
}

/// The graph's fixed parts, on the CPU.
struct Graph {
    /// Queries x columns.
    x: Tensor,
    /// Queries x models.
    score: Tensor,
    cost: Tensor,
    /// Models x dimensions.
    description: Tensor,
    /// USD that counts as a cost of 1.
    unit: f64,
}

/// Trains and writes the query's map and the models' vectors into `fitted`.
pub(super) fn train(task: &Task<'_>, fitted: &mut Fitted) -> std::result::Result<(), String> {
    run(task, fitted).map_err(|e| format!("the graph cannot be trained: {e}"))
}

fn run(task: &Task<'_>, fitted: &mut Fitted) -> Result<()> {
    let device = Device::Cpu;
    let models = task.matrix.models.len();
    let order = SplitMix(task.seed ^ 0x0067_7261_7068).order(task.places.len());
    let (held_out, fitted_on) = order.split_at(task.places.len() / 5);
    let unit = task.matrix.means(task.places).iter().map(|p| p.cost).fold(f64::MIN_POSITIVE, f64::max);
    let scale = Scale::of(task);
    let graph = |part: &[usize]| -> Result<Graph> {
        let places: Vec<usize> = part.iter().map(|i| task.places[*i]).collect();
        Graph::of(task, &places, Some(&scale), unit, &device)
    };
    let (_, rounds, error) = trained(&graph(fitted_on)?, Some(&graph(held_out)?), ROUNDS, task.seed, &device)?;
    let whole = Graph::of(task, task.places, Some(&scale), unit, &device)?;
    let (weights, ..) = trained(&whole, None, rounds, task.seed, &device)?;
    fitted.card.parameters.insert("graph.rounds".into(), rounds as f64);
    fitted.card.metrics.insert("graph.cross_entropy".into(), f64::from(error));
    // The vectors that serve know all edges.
    let nodes = weights.models(&whole, &Tensor::ones(whole.score.shape(), DType::F32, &device)?)?;
    let tensor = |t: &Tensor| -> Result<artifact::Tensor> {
        Ok(artifact::Tensor { shape: t.dims().to_vec(), data: t.flatten_all()?.to_vec1::<f32>()? })
    };
    let columns = weights.query.dim(0)?;
    let query = weights.query.t()?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    let mut query: Vec<f64> = query.into_iter().map(f64::from).collect();
    scale.fold(&mut query, HIDDEN);
    let query = query.into_iter().map(|x| x as f32).collect();
    fitted.tensors.insert("graph.query".into(), artifact::Tensor { shape: vec![HIDDEN, columns], data: query });
    fitted.tensors.insert("graph.models".into(), tensor(&nodes.narrow(1, 0, HIDDEN)?.contiguous()?)?);
    let bias = nodes.narrow(1, HIDDEN, 1)?.contiguous()?.reshape((models,))?;
    fitted.tensors.insert("graph.bias".into(), tensor(&bias)?);
    // Serving needs no more; a model that comes later does.
    fitted.tensors.insert("graph.gate".into(), tensor(&weights.gate)?);
    fitted.tensors.insert("graph.model".into(), tensor(&weights.model)?);
    fitted.card.parameters.insert("graph.cost_unit".into(), whole.unit);
    Ok(())
}

/// An artifact with models added: each enters by the embedding of its name or description and the outcomes that were
/// observed of it, and nothing is trained again. `matrix` holds these outcomes; its models that the artifact has already
/// are left as they are.
///
/// # Errors
/// When the artifact is no graph, or of another embedder or other features; when there is no new model.
pub fn extend(artifact: &Artifact, matrix: &Matrix, inputs: &Inputs) -> std::result::Result<Fitted, String> {
    let card = &artifact.card;
    if card.selector != "graph" {
        return Err(format!("only a graph takes models in without a new fit; this artifact is of `{}`", card.selector));
    }
    if card.embedder.as_ref() != Some(&inputs.embedder) || card.features != FEATURES {
        return Err("the artifact was fitted with another embedder or other features; fit it anew".to_owned());
    }
    let fresh: Vec<usize> = (0..matrix.models.len()).filter(|m| !card.models.contains(&matrix.models[*m])).collect();
    if fresh.is_empty() {
        return Err(format!("the artifact knows all of {} already", matrix.models.join(", ")));
    }
    let places: Vec<usize> = (0..matrix.len()).collect();
    let task = Task { matrix, inputs, places: &places, seed: card.seed };
    grown(artifact, &task, &fresh).map_err(|e| format!("the artifact cannot be extended: {e}"))
}

fn grown(artifact: &Artifact, task: &Task<'_>, fresh: &[usize]) -> Result<Fitted> {
    let device = Device::Cpu;
    let read = |name: &str| -> Result<Tensor> {
        let t = artifact.tensors.get(name).ok_or_else(|| candle_core::Error::Msg(format!("it has no `{name}`")))?;
        Tensor::from_vec(t.data.clone(), t.shape.clone(), &device)
    };
    let weights = Weights {
        query: Var::from_tensor(&read("graph.query")?.t()?.contiguous()?)?,
        gate: Var::from_tensor(&read("graph.gate")?)?,
        model: Var::from_tensor(&read("graph.model")?)?,
    };
    let unit = artifact.card.parameters.get("graph.cost_unit").copied().unwrap_or(1.0);
    let graph = Graph::of(task, task.places, None, unit, &device)?;
    let nodes = weights.models(&graph, &Tensor::ones(graph.score.shape(), DType::F32, &device)?)?.to_vec2::<f32>()?;
    let mut out = Fitted { card: artifact.card.clone(), tensors: artifact.tensors.clone() };
    let mut costs = Fitted { card: artifact.card.clone(), tensors: BTreeMap::new() };
    super::costs(task, &mut costs).map_err(candle_core::Error::Msg)?;
    for m in fresh {
        out.card.models.push(task.matrix.models[*m].clone());
        for (name, columns, from) in
            [("graph.models", HIDDEN, &nodes[*m][..HIDDEN]), ("graph.bias", 1, &nodes[*m][HIDDEN..])]
        {
            if let Some(tensor) = out.tensors.get_mut(name) {
                tensor.data.extend_from_slice(from);
                tensor.shape[0] = tensor.data.len() / columns;
            }
        }
        for name in ["cost.range", "cost.w"] {
            if let (Some(tensor), Some(more)) = (out.tensors.get_mut(name), costs.tensors.get(name)) {
                let columns = more.shape[1];
                tensor.data.extend_from_slice(&more.data[m * columns..(m + 1) * columns]);
                tensor.shape[0] += 1;
            }
        }
    }
    out.card.metrics.clear();
    Ok(out)
}

/// Trains for `rounds` rounds, or until `judge` has not been predicted better for a while. Gives the weights, the rounds that
/// were best for `judge`, and its error then.
fn trained(
    learn: &Graph,
    judge: Option<&Graph>,
    rounds: usize,
    seed: u64,
    device: &Device,
) -> Result<(Weights, usize, f32)> {
    let mut rng = SplitMix(seed ^ 0x726f_756e_6473);
    let weights = Weights::start(learn, &mut rng, device)?;
    let params = ParamsAdamW { lr: LEARNING_RATE, weight_decay: WEIGHT_DECAY, ..ParamsAdamW::default() };
    let vars = vec![weights.query.clone(), weights.gate.clone(), weights.model.clone()];
    let mut optimiser = AdamW::new(vars, params)?;
    let everything = Tensor::ones(learn.score.shape(), DType::F32, device)?;
    let mut best = (f32::INFINITY, rounds);
    for round in 1..=rounds {
        let mask = learn.mask(&mut rng, device)?;
        let nodes = weights.models(&learn.without_some_descriptions(&mut rng, device)?, &mask)?;
        let loss = loss(&weights.logits(&learn.x, &nodes)?, &learn.score, &mask.affine(-1.0, 1.0)?)?;
        optimiser.backward_step(&loss)?;
        let Some(judge) = judge else { continue };
        // As it will serve: vectors from all edges of the queries that are learnt from.
        let nodes = weights.models(learn, &everything)?;
        let all = Tensor::ones(judge.score.shape(), DType::F32, device)?;
        let error = self::loss(&weights.logits(&judge.x, &nodes)?, &judge.score, &all)?.to_scalar::<f32>()?;
        if error < best.0 {
            best = (error, round);
        } else if round - best.1 >= PATIENCE {
            break;
        }
    }
    Ok((weights, best.1, best.0))
}

impl Graph {
    fn of(task: &Task<'_>, places: &[usize], scale: Option<&Scale>, unit: f64, device: &Device) -> Result<Self> {
        let (n, models) = (places.len(), task.matrix.models.len());
        let row = |q: &usize| {
            let mut row = expanded(&task.inputs.seen(*q), &[], 0, 0.0);
            scale.into_iter().for_each(|scale| scale.apply(&mut row));
            row
        };
        let rows: Vec<Vec<f64>> = places.iter().map(row).collect();
        let columns = rows.first().map_or(0, Vec::len);
        let flat = |values: Vec<f64>, columns: usize| -> Result<Tensor> {
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            Tensor::from_vec(values, (n, columns), device)
        };
        let cost = places.iter().flat_map(|q| task.matrix.costs(*q)).map(|c| (c / unit).min(4.0)).collect();
        let description: Vec<f32> = task.inputs.models.iter().flat_map(|v| v.iter().copied()).collect();
        let dimensions = description.len() / models.max(1);
        Ok(Self {
            x: flat(rows.into_iter().flatten().collect(), columns)?,
            score: flat(places.iter().flat_map(|q| task.matrix.scores(*q)).copied().collect(), models)?,
            cost: flat(cost, models)?,
            description: Tensor::from_vec(description, (models, dimensions), device)?,
            unit,
        })
    }

    /// 1 for edges that carry messages in this round, 0 for those that are predicted.
    fn mask(&self, rng: &mut SplitMix, device: &Device) -> Result<Tensor> {
        let (n, models) = self.score.dims2()?;
        let shares: Vec<f64> = (0..models).map(|_| VISIBLE.powf(1.0 + 3.0 * rng.unit() * rng.unit())).collect();
        let mask: Vec<f32> = (0..n * models).map(|i| if rng.unit() < shares[i % models] { 1.0 } else { 0.0 }).collect();
        Tensor::from_vec(mask, (n, models), device)
    }

    /// The same, but half of the models have no description in this round: what is known of a model by its edges must do
    /// without, as few descriptions say little of a model that comes later.
    fn without_some_descriptions(&self, rng: &mut SplitMix, device: &Device) -> Result<Self> {
        let models = self.description.dim(0)?;
        let keep: Vec<f32> = (0..models).map(|_| if rng.unit() < 0.5 { 0.0 } else { 1.0 }).collect();
        let description = self.description.broadcast_mul(&Tensor::from_vec(keep, (models, 1), device)?)?;
        Ok(Graph {
            description,
            x: self.x.clone(),
            score: self.score.clone(),
            cost: self.cost.clone(),
            unit: self.unit,
        })
    }
}

impl Weights {
    /// Random maps of the query; a model's vector begins as its messages, its bias as the odds of its mean score.
    fn start(graph: &Graph, rng: &mut SplitMix, device: &Device) -> Result<Self> {
        let (columns, dimensions) = (graph.x.dim(1)?, graph.description.dim(1)?);
        let side = dimensions + HIDDEN + 3;
        let mut random = |n: usize, scale: f64| -> Vec<f32> { (0..n).map(|_| (rng.normal() * scale) as f32).collect() };
        let query = Tensor::from_vec(random(columns * HIDDEN, 1.0), (columns, HIDDEN), device)?;
        let mut model = random(side * (HIDDEN + 1), 0.3 / (side as f64).sqrt());
        for (i, row) in model.chunks_exact_mut(HIDDEN + 1).enumerate() {
            row[HIDDEN] = if i == dimensions + HIDDEN + ODDS { 1.0 } else { 0.0 };
            if (dimensions..dimensions + HIDDEN).contains(&i) {
                row[i - dimensions] += MESSAGE;
            }
        }
        Ok(Self {
            query: Var::from_tensor(&query)?,
            gate: Var::from_tensor(&Tensor::from_vec(vec![1.0f32, 0.0], (2, 1), device)?)?,
            model: Var::from_tensor(&Tensor::from_vec(model, (side, HIDDEN + 1), device)?)?,
        })
    }

    /// Per model its vector and, as the last column, its bias, from the edges that `mask` shows.
    fn models(&self, graph: &Graph, mask: &Tensor) -> Result<Tensor> {
        let query = graph.x.matmul(&self.query)?;
        let gate = |i: usize| self.gate.narrow(0, i, 1)?.reshape(());
        let n = mask.sum_keepdim(0)?.t()?.contiguous()?;
        let seen = n.affine(1.0, 1.0)?;
        let sum = |of: &Tensor| of.mul(mask)?.sum_keepdim(0)?.t()?.contiguous();
        let (hits, score) = (sum(&graph.score)?, sum(&graph.score)?.div(&seen)?);
        let cost = sum(&graph.cost)?.div(&seen)?;
        let edges = graph
            .score
            .broadcast_sub(&score.t()?)?
            .broadcast_mul(&gate(0)?)?
            .add(&graph.cost.broadcast_sub(&cost.t()?)?.broadcast_mul(&gate(1)?)?)?
            .mul(mask)?;
        let messages = edges.t()?.contiguous()?.matmul(&query)?.broadcast_div(&seen)?;
        // As if there were one more success and one more failure.
        let odds = hits.affine(1.0, 1.0)?.div(&n.sub(&hits)?.affine(1.0, 1.0)?)?.log()?;
        let side = Tensor::cat(&[&graph.description, &messages, &score, &odds, &cost], D::Minus1)?;
        side.matmul(&self.model)
    }

    /// Queries x models.
    fn logits(&self, x: &Tensor, nodes: &Tensor) -> Result<Tensor> {
        let vectors = nodes.narrow(1, 0, HIDDEN)?.t()?.contiguous()?;
        let bias = nodes.narrow(1, HIDDEN, 1)?.t()?.contiguous()?;
        x.matmul(&self.query)?.matmul(&vectors)?.affine(1.0 / HIDDEN as f64, 0.0)?.broadcast_add(&bias)
    }
}

/// Mean binary cross entropy over the edges that `of` shows.
fn loss(logits: &Tensor, target: &Tensor, of: &Tensor) -> Result<Tensor> {
    let p = ops::sigmoid(logits)?.clamp(1e-6, 1.0 - 1e-6)?;
    let yes = target.mul(&p.log()?)?;
    let no = target.affine(-1.0, 1.0)?.mul(&p.affine(-1.0, 1.0)?.log()?)?;
    yes.add(&no)?.mul(of)?.sum_all()?.div(&of.sum_all()?)?.neg()
}
