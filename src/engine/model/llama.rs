//! The forward pass of the llama architecture and its kin over a batch of tokens of any number of sequences.
//!
//! RMS norm, grouped-query attention with rotary positions, SwiGLU, residuals; weights as [`Linear`]. Qwen 2 adds biases
//! to queries, keys and values, Qwen 3 normalises the heads of queries and keys; for Gemma 3 see [`Architecture`]. Which
//! two elements of a head are rotated together differs between files; as scores do not depend on the order of a head's elements, rows are brought into one
//! order at load. Nothing here knows about requests: [`super::super::runner`] says which tokens, and keeps the sequences.

use std::path::Path;

use super::{Architecture, Config, Kv};
use crate::engine::{
    EngineError,
    kept::Identity,
    model_file::{ModelFile, TensorType},
    ops::{
        Level, Ops, Precision,
        attention::{self, Angles, POSITIONS, Turns},
        elementwise,
        linear::{Format, Linear, Quantised, dequantise, multiply},
        number::Element,
    },
    packed::{Packed, Writer},
};

/// Tokens that the engine takes at a time unless it is told otherwise, and everybody else too.
pub const STEP: usize = 128;

struct Layer {
    attention_norm: Vec<f32>,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Linear,
    /// Of what attention and the feed-forward network give, before it is added; empty: none.
    attention_after: Vec<f32>,
    feed_forward_after: Vec<f32>,
    feed_forward_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// A matrix with what comes after it: an empty vector is none.
struct Projection {
    weight: Linear,
    bias: Vec<f32>,
    /// Of a head.
    norm: Vec<f32>,
}

/// The weights of a model and the tables that follow from its sizes.
pub struct Llama {
    config: Config,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `None`: tied to the embedding.
    head: Option<Linear>,
    /// Radians per position, by pair of elements of a head.
    frequencies: Vec<f64>,
    /// Those of layers whose attention is local; empty where there are none.
    local_frequencies: Vec<f64>,
    activations: Precision,
    /// Of all tensors that were read.
    weights: [u8; 32],
}

/// Tokens of one sequence within a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index into the caches given with the batch.
    pub cache: usize,
    /// First row of the batch.
    pub row: usize,
    pub count: usize,
}

/// What one forward pass computes. Pieces are in the order of their rows and cover all of them; their positions are the next
/// of their caches' own ([`Kv::reserve`]).
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub pieces: Vec<Piece>,
    /// Rows whose logits are wanted.
    pub logits: Vec<usize>,
}

/// Buffers of the forward pass, kept between steps. Each is `[tokens][width]`.
#[derive(Default)]
pub struct Workspace {
    hidden: Vec<f32>,
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    projected: Vec<f32>,
    heads: Vec<f32>,
    angles: Angles,
    local_angles: Angles,
    turns: Turns,
    local_turns: Turns,
    runs: Vec<Run>,
    quantised: Quantised,
    /// `[wanted rows][vocabulary]`: the result.
    pub logits: Vec<f32>,
}

/// Neighbouring positions of a piece.
#[derive(Clone, Copy)]
struct Run {
    cache: usize,
    row: usize,
    count: usize,
    position: usize,
}

impl Llama {
    /// Reads and packs all weights. With [`Format::F32`], keys and values are f32, too.
    ///
    /// # Errors
    /// [`EngineError::Corrupt`] for missing tensors and wrong shapes, [`EngineError::Io`] when reading fails,
    /// [`EngineError::UnsupportedModel`] for parts that its architecture does not have.
    pub fn load(file: &ModelFile, config: Config, format: Format) -> Result<Self, EngineError> {
        Self::build(&mut Weights { file, format, packed: None, writer: None }, config)
    }

    /// As [`load`](Self::load), with the packed weights mapped from a file in this folder, which is made where there is none.
    ///
    /// # Errors
    /// As for [`load`](Self::load). Where the file cannot be written, weights stay in memory of their own.
    pub fn load_packed(file: &ModelFile, config: Config, format: Format, dir: &Path) -> Result<Self, EngineError> {
        let open = || Packed::open(dir, file, format);
        if let Some(packed) = open() {
            return Self::build(&mut Weights { file, format, packed: Some(packed), writer: None }, config);
        }
        let failed =
            |error: std::io::Error| tracing::warn!(dir = %dir.display(), %error, "packed weights cannot be kept");
        let writer = Writer::new(dir, file, format).map_err(failed).ok();
        let mut weights = Weights { file, format, packed: None, writer };
        let model = Self::build(&mut weights, config.clone())?;
        let written = weights.writer.is_some_and(|writer| writer.finish(model.weights).map_err(failed).is_ok());
        match written.then(open).flatten() {
            Some(packed) => Self::build(&mut Weights { file, format, packed: Some(packed), writer: None }, config),
            None => Ok(model),
        }
    }

    fn build(weights: &mut Weights<'_>, config: Config) -> Result<Self, EngineError> {
        let (file, format) = (weights.file, weights.format);
        let kv = if format == Format::F32 { Element::F32 } else { config.kv };
        let config = Config { kv, ..config };
        let known = |name: &str| {
            let of_attention = ["attn_q.bias", "attn_k.bias", "attn_v.bias"].iter().any(|end| name.ends_with(end));
            !name.ends_with(".bias") || of_attention
        };
        if let Some(name) = file.tensors.keys().find(|name| !known(name)) {
            return Err(file.unsupported(format!("it has biases (`{name}`)")));
        }
        let c = &config;
        let (q, kv) = (c.heads.queries * c.heads.size, c.heads.keys * c.heads.size);
        let mut layers = Vec::with_capacity(c.layers);
        for i in 0..c.layers {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            layers.push(Layer {
                attention_norm: load_vector(file, &name("attn_norm"), c.hidden)?,
                query: load_projection(weights, c, i, "attn_q", q)?,
                key: load_projection(weights, c, i, "attn_k", kv)?,
                value: load_projection(weights, c, i, "attn_v", kv)?,
                output: weights.matrix(&name("attn_output"), c.hidden, q)?,
                attention_after: load_after(file, c, &name("post_attention_norm"))?,
                feed_forward_after: load_after(file, c, &name("post_ffw_norm"))?,
                feed_forward_norm: load_vector(file, &name("ffn_norm"), c.hidden)?,
                gate: weights.matrix(&name("ffn_gate"), c.feed_forward, c.hidden)?,
                up: weights.matrix(&name("ffn_up"), c.feed_forward, c.hidden)?,
                down: weights.matrix(&name("ffn_down"), c.hidden, c.feed_forward)?,
            });
        }
        let embedding = weights.matrix("token_embd.weight", c.vocabulary, c.hidden)?;
        let head = match file.tensors.contains_key("output.weight") {
            true => Some(weights.matrix("output.weight", c.vocabulary, c.hidden)?),
            false => None,
        };
        let norm = load_vector(file, "output_norm.weight", c.hidden)?;
        let factors = match file.tensors.contains_key("rope_freqs.weight") {
            true => load_vector(file, "rope_freqs.weight", c.heads.size / 2)?,
            false => vec![1.0; c.heads.size / 2],
        };
        // base^(-2i / head), divided by the file's factors and the linear scale.
        let half = factors.len() as f64;
        let frequency =
            |(i, factor): (usize, &f32)| c.rope_base.powf(-(i as f64) / half) / f64::from(*factor) / c.rope_scale;
        let frequencies = factors.iter().enumerate().map(frequency).collect();
        // Neither factors nor the scale are theirs.
        let local = |base: f64| (0..factors.len()).map(|i| base.powf(-(i as f64) / half)).collect();
        let local_frequencies = c.local.map_or_else(Vec::new, |l| local(l.rope_base));
        let activations = Precision::Sixteen;
        let weights = weights.packed.as_ref().map_or_else(|| file.hash_of_read(), Packed::weights);
        Ok(Self { embedding, layers, norm, head, frequencies, local_frequencies, activations, weights, config })
    }

    /// Turns keys of all heads of a layer, as a cache has them, by so many positions.
    pub fn turn(&self, layer: usize, keys: &mut [f32], positions: i64) {
        let local = self.config.local.is_some_and(|local| local.has(layer));
        let mut angles = Angles::default();
        angles.push(positions, if local { &self.local_frequencies } else { &self.frequencies });
        elementwise::rope(Level::Scalar, keys, &angles.cos, &angles.sin);
    }

    /// Of how many bits activations are in the products with most of the work: of the feed-forward network and of what
    /// attention gives. Queries, keys, values and logits always take sixteen: they are a fifth of the work and, on
    /// SmolLM2-135M, three quarters of what eight bits lose.
    pub fn with_activations(self, activations: Precision) -> Self {
        Self { activations, ..self }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    fn layer_matrices(&self) -> impl Iterator<Item = &Linear> {
        self.layers
            .iter()
            .flat_map(|l| [&l.query.weight, &l.key.weight, &l.value.weight, &l.output, &l.gate, &l.up, &l.down])
    }

    /// What its keys and values depend on, and what they cost.
    pub fn identity(&self) -> Identity {
        let c = &self.config;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.weights);
        let sizes = (c.architecture, c.layers, c.heads, c.rms_epsilon.to_bits(), c.in_halves, c.kv, self.activations);
        hasher.update(format!("{sizes:?} {:?} {}", c.local, c.score_scale).as_bytes());
        self.frequencies.iter().for_each(|f| _ = hasher.update(&f.to_le_bytes()));
        let mut hash = [0; 16];
        hasher.finalize_xof().fill(&mut hash);
        let weights: usize = self.layer_matrices().map(|w| w.rows() * w.columns()).sum();
        let queries = c.layers * c.heads.queries * c.heads.size;
        Identity::of_model(u128::from_le_bytes(hash), weights, queries, c.kv_bytes_per_token(), POSITIONS)
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layer_matrices().map(Linear::bytes).sum();
        layers + self.embedding.bytes() + self.head.as_ref().map_or(0, Linear::bytes)
    }

    /// Appends tokens to one sequence, [`STEP`] at a time; the logits of the last `wanted` are in the workspace then.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn append(&self, ops: &Ops, kv: &mut Kv, tokens: &[u32], wanted: usize, w: &mut Workspace) {
        let mut logits = Vec::new();
        for start in (0..tokens.len()).step_by(STEP) {
            let now = &tokens[start..tokens.len().min(start + STEP)];
            let since = (tokens.len() - wanted).saturating_sub(start).min(now.len());
            let pieces = vec![Piece { cache: 0, row: 0, count: now.len() }];
            let batch = Batch { tokens: now.to_vec(), pieces, logits: (since..now.len()).collect() };
            self.forward(ops, &batch, &mut [kv], w);
            logits.append(&mut w.logits);
        }
        w.logits = logits;
    }

    /// Runs the batch, appends its keys and values to the caches, and leaves the wanted logits in the workspace.
    ///
    /// # Panics
    /// When a token is not of the vocabulary: the engine checks that when it accepts a request.
    pub fn forward(&self, ops: &Ops, batch: &Batch, caches: &mut [&mut Kv], w: &mut Workspace) {
        w.runs.clear();
        for piece in &batch.pieces {
            let mut row = piece.row;
            for (position, count) in caches[piece.cache].reserve(piece.count) {
                w.runs.push(Run { cache: piece.cache, row, count, position });
                row += count;
            }
        }
        self.compute(ops, &batch.tokens, &batch.logits, caches, w);
    }

    /// Computes tokens at positions that are a cache's own and there already, in ascending order, once more: with what is before
    /// them now, [`STEP`] at a time. The logits of the last are in the workspace then.
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and when a position is not the cache's own.
    pub fn revise(&self, ops: &Ops, kv: &mut Kv, tokens: &[u32], positions: &[usize], w: &mut Workspace) {
        for (tokens, positions) in tokens.chunks(STEP).zip(positions.chunks(STEP)) {
            w.runs.clear();
            for (row, position) in positions.iter().copied().enumerate() {
                match w.runs.last_mut() {
                    Some(run) if run.position + run.count == position => run.count += 1,
                    _ => w.runs.push(Run { cache: 0, row, count: 1, position }),
                }
            }
            self.compute(ops, tokens, &[tokens.len() - 1], &mut [kv], w);
        }
    }

    fn compute(&self, ops: &Ops, tokens: &[u32], logits: &[usize], caches: &mut [&mut Kv], w: &mut Workspace) {
        let c = &self.config;
        let rows = tokens.len();
        let (q, kv) = (c.heads.queries * c.heads.size, c.heads.keys * c.heads.size);
        w.hidden.resize(rows * c.hidden, 0.0);
        for (token, out) in tokens.iter().zip(w.hidden.chunks_exact_mut(c.hidden)) {
            self.embedding.row(*token as usize, out);
        }
        if c.architecture == Architecture::Gemma3 {
            elementwise::scale(ops.level, &mut w.hidden, (c.hidden as f64).sqrt() as f32);
        }
        w.angles.clear();
        w.local_angles.clear();
        for position in w.runs.iter().flat_map(|run| run.position..run.position + run.count) {
            w.angles.push(position as i64, &self.frequencies);
            w.local_angles.push(position as i64, &self.local_frequencies);
        }
        w.turns.clear();
        w.local_turns.clear();
        for offset in w.runs.iter().flat_map(|run| caches[run.cache].offsets()) {
            let back = |frequencies: &[f64]| {
                let mut angles = Angles::default();
                angles.push(-(offset as i64), frequencies);
                angles
            };
            w.turns.entry(offset).or_insert_with(|| back(&self.frequencies));
            w.local_turns.entry(offset).or_insert_with(|| back(&self.local_frequencies));
        }
        for (buffer, width) in [
            (&mut w.normed, c.hidden),
            (&mut w.query, q),
            (&mut w.key, kv),
            (&mut w.value, kv),
            (&mut w.attended, q),
            (&mut w.gate, c.feed_forward),
            (&mut w.up, c.feed_forward),
            (&mut w.projected, c.hidden),
        ] {
            buffer.resize(rows * width, 0.0);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            self.attention(ops, index, layer, caches, w);
            elementwise::rms_norm(ops.level, &w.hidden, &layer.feed_forward_norm, c.rms_epsilon, &mut w.normed);
            multiply(
                ops,
                &w.normed,
                rows,
                self.activations,
                &mut w.quantised,
                &mut [(&layer.gate, &mut w.gate), (&layer.up, &mut w.up)],
            );
            match c.architecture {
                Architecture::Gemma3 => elementwise::gelu_mul(ops.level, &mut w.gate, &w.up),
                _ => elementwise::silu_mul(ops.level, &mut w.gate, &w.up),
            }
            multiply(ops, &w.gate, rows, self.activations, &mut w.quantised, &mut [(&layer.down, &mut w.projected)]);
            self.after(ops, &layer.feed_forward_after, w);
            elementwise::add(ops.level, &mut w.hidden, &w.projected);
        }
        let wanted = logits.len();
        w.projected.clear();
        for row in logits {
            w.projected.extend_from_slice(&w.hidden[row * c.hidden..][..c.hidden]);
        }
        w.normed.resize(wanted * c.hidden, 0.0);
        elementwise::rms_norm(ops.level, &w.projected, &self.norm, c.rms_epsilon, &mut w.normed);
        w.logits.resize(wanted * c.vocabulary, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        multiply(ops, &w.normed, wanted, Precision::Sixteen, &mut w.quantised, &mut [(head, &mut w.logits)]);
    }

    /// Normalises what is about to be added, where the model does that.
    fn after(&self, ops: &Ops, norm: &[f32], w: &mut Workspace) {
        if !norm.is_empty() {
            elementwise::rms_norm(ops.level, &w.projected, norm, self.config.rms_epsilon, &mut w.normed);
            std::mem::swap(&mut w.projected, &mut w.normed);
        }
    }

    fn attention(&self, ops: &Ops, index: usize, layer: &Layer, caches: &mut [&mut Kv], w: &mut Workspace) {
        let c = &self.config;
        let rows = w.hidden.len() / c.hidden;
        elementwise::rms_norm(ops.level, &w.hidden, &layer.attention_norm, c.rms_epsilon, &mut w.normed);
        multiply(
            ops,
            &w.normed,
            rows,
            Precision::Sixteen,
            &mut w.quantised,
            &mut [
                (&layer.query.weight, &mut w.query),
                (&layer.key.weight, &mut w.key),
                (&layer.value.weight, &mut w.value),
            ],
        );
        let projections = [(&layer.query, &mut w.query), (&layer.key, &mut w.key), (&layer.value, &mut w.value)];
        for (projection, out) in projections {
            if !projection.bias.is_empty() {
                elementwise::add_bias(ops.level, out, &projection.bias);
            }
            if !projection.norm.is_empty() {
                w.heads.resize(out.len(), 0.0);
                elementwise::rms_norm(ops.level, out, &projection.norm, c.rms_epsilon, &mut w.heads);
                std::mem::swap(out, &mut w.heads);
            }
        }
        let local = c.local.filter(|local| local.has(index));
        let (angles, turns) = match local.is_some() {
            true => (&w.local_angles, &w.local_turns),
            false => (&w.angles, &w.turns),
        };
        let (q, kv, half) = (c.heads.queries * c.heads.size, c.heads.keys * c.heads.size, c.heads.size / 2);
        for run in &w.runs {
            for row in run.row..run.row + run.count {
                let (cos, sin) = (&angles.cos[row * half..][..half], &angles.sin[row * half..][..half]);
                elementwise::rope(ops.level, &mut w.query[row * q..][..q], cos, sin);
                elementwise::rope(ops.level, &mut w.key[row * kv..][..kv], cos, sin);
            }
            let span = run.row * kv..(run.row + run.count) * kv;
            caches[run.cache].write(c, index, run.position, &w.key[span.clone()], &w.value[span]);
        }
        let pieces: Vec<attention::Piece<'_>> = w
            .runs
            .iter()
            .map(|run| attention::Piece {
                row: run.row,
                count: run.count,
                position: run.position,
                window: local.map_or(attention::ALL, |local| local.window),
                cache: caches[run.cache].layer(index),
            })
            .collect();
        attention::attend(ops, c.heads, &w.query, &pieces, turns, &mut w.attended);
        multiply(ops, &w.attended, rows, self.activations, &mut w.quantised, &mut [(&layer.output, &mut w.projected)]);
        self.after(ops, &layer.attention_after, w);
        elementwise::add(ops.level, &mut w.hidden, &w.projected);
    }
}

fn read<'a>(file: &'a ModelFile, name: &str, shape: &[u64]) -> Result<(TensorType, Vec<u8>), EngineError> {
    let missing = || file.corrupt(format!("tensor `{name}` is missing"));
    let info: &'a _ = file.tensors.get(name).ok_or_else(missing)?;
    if info.dimensions != shape {
        return Err(file.corrupt(format!("tensor `{name}` has the shape {:?} instead of {shape:?}", info.dimensions)));
    }
    Ok((info.kind, file.read(name)?.ok_or_else(missing)?))
}

/// Queries, keys or values of layer `i`; those that are rotated in the order in which [`elementwise::rope`] wants them.
fn load_projection(
    weights: &mut Weights<'_>,
    c: &Config,
    i: usize,
    part: &str,
    rows: usize,
) -> Result<Projection, EngineError> {
    let file = weights.file;
    let name = |what: &str, end: &str| format!("blk.{i}.{what}.{end}");
    let there = |name: &String| file.tensors.contains_key(name);
    let turned = c.in_halves && part != "attn_v";
    let head = c.heads.size;
    let turn = |raw: Vec<u8>| if turned { in_pairs(&raw, raw.len() / rows, head) } else { raw };
    let vector = |name: String, length: usize| -> Result<Vec<f32>, EngineError> {
        if !there(&name) {
            return Ok(Vec::new());
        }
        let values = load_vector(file, &name, length)?;
        Ok(if turned { in_pairs(&values, 1, head) } else { values })
    };
    let mut out = Projection {
        weight: weights.turned_matrix(&name(part, "weight"), rows, c.hidden, turn)?,
        bias: vector(name(part, "bias"), rows)?,
        norm: vector(name(&format!("{part}_norm"), "weight"), head)?,
    };
    // A file that lacks them would answer nonsense.
    let missing = match c.architecture {
        Architecture::Qwen2 => out.bias.is_empty().then(|| name(part, "bias")),
        Architecture::Qwen3 | Architecture::Gemma3 => {
            (out.norm.is_empty() && turned).then(|| name(&format!("{part}_norm"), "weight"))
        }
        Architecture::Llama => None,
    };
    if part == "attn_q" && c.score_scale != head as f64 {
        // Attention scales by a head's size.
        let more = (head as f64 / c.score_scale).sqrt() as f32;
        out.norm.iter_mut().for_each(|w| *w *= more);
    }
    missing.map_or(Ok(out), |name| Err(file.corrupt(format!("tensor `{name}` is missing"))))
}

/// A norm behind attention or the feed-forward network, which Gemma 3 must have and others must not.
fn load_after(file: &ModelFile, c: &Config, name: &str) -> Result<Vec<f32>, EngineError> {
    match (c.architecture, file.tensors.contains_key(name)) {
        (Architecture::Gemma3, _) => load_vector(file, name, c.hidden),
        (_, true) => {
            Err(file.unsupported(format!("it has a tensor `{name}`, which its architecture does not have here")))
        }
        (_, false) => Ok(Vec::new()),
    }
}

/// Rows of heads that are in two halves, so that the i-th of both are neighbours.
fn in_pairs<T: Copy>(rows: &[T], width: usize, head: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head * width) {
        let (first, second) = head.split_at(head.len() / 2);
        for (a, b) in first.chunks_exact(width).zip(second.chunks_exact(width)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

/// Where matrices come from, and where they go to be found packed the next time.
struct Weights<'a> {
    file: &'a ModelFile,
    format: Format,
    packed: Option<Packed>,
    writer: Option<Writer>,
}

impl Weights<'_> {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Linear, EngineError> {
        self.turned_matrix(name, rows, columns, |raw| raw)
    }

    /// A matrix whose rows are brought into another order first.
    fn turned_matrix(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
        turn: impl FnOnce(Vec<u8>) -> Vec<u8>,
    ) -> Result<Linear, EngineError> {
        if let Some(matrix) = self.packed.as_ref().and_then(|packed| packed.matrix(name, rows, columns)) {
            return Ok(matrix);
        }
        let (kind, raw) = read(self.file, name, &[columns as u64, rows as u64])?;
        let matrix = Linear::pack(kind, &turn(raw), rows, columns, self.format)
            .map_err(|e| self.file.corrupt(format!("tensor `{name}` cannot be decoded: {e}")))?;
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.add(name, &matrix)
        {
            tracing::warn!(%error, "packed weights cannot be kept");
            self.writer = None;
        }
        Ok(matrix)
    }
}

fn load_vector(file: &ModelFile, name: &str, length: usize) -> Result<Vec<f32>, EngineError> {
    let (kind, raw) = read(file, name, &[length as u64])?;
    let values =
        dequantise(kind, &raw, length).map_err(|e| file.corrupt(format!("tensor `{name}` cannot be decoded: {e}")))?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(file.corrupt(format!("tensor `{name}` holds numbers that are not finite")));
    }
    Ok(values)
}

#[cfg(test)]
#[path = "goldens/goldens.rs"]
mod goldens;
#[cfg(test)]
mod tests;
