//! From an opened model file to a model that is ready to run, by our own forward pass or by candle's.

use super::{
    Chunks, Computed, EngineError, EngineOptions, ModelInfo,
    candle::{self, CandleModel},
    kv_cache::{Blocks, KvCache},
    model::{Config, Llama},
    model_file::{ModelFile, TensorInfo, TensorType},
    no_thread,
    ops::{Level, Ops, Pool, attention::POSITIONS},
    runner::Runner,
    scheduler::Limits,
};

/// A model that has been read, ready to run.
pub struct Loaded {
    pub info: ModelInfo,
    pub runner: Runner,
    pub blocks: Blocks,
    pub limits: Limits,
}

impl Loaded {
    /// Reads the weights, and makes ready what runs on them.
    ///
    /// # Errors
    /// Whatever is wrong with the file or the options.
    pub fn read(file: &ModelFile, options: &EngineOptions, threads: usize) -> Result<Self, EngineError> {
        match candle::Config::read(file)? {
            Some(config) => Self::candle(file, &config, options, threads),
            None => Self::own(file, options, threads),
        }
    }

    fn own(file: &ModelFile, options: &EngineOptions, threads: usize) -> Result<Self, EngineError> {
        let (model, ops, context) = own_model(file, options, threads)?;
        let config = model.config();
        let info = ModelInfo {
            name: config.name.clone(),
            architecture: config.architecture.name().to_owned(),
            computed_by: Computed::Weir,
            context,
            vocabulary: config.vocabulary,
            weight_bytes: model.weight_bytes(),
            kv_bytes_per_token: config.kv_bytes_per_token(),
            ..of_file(file)
        };
        // One more for the copy that a fork writes to.
        let promised = context.div_ceil(POSITIONS) + 1;
        let block_bytes = config.kv_bytes_per_token() * POSITIONS;
        let most = options.cache_bytes.map_or(usize::MAX, |bytes| promised.max(bytes / block_bytes));
        let mut blocks = options.kv_cache.enter(config, model.identity(), promised, most);
        if let Some((dir, bytes)) = options.disk.as_ref().filter(|_| options.chunks != Chunks::Off) {
            let disk =
                options.kv_cache.disk(config, model.identity(), dir, *bytes).map_err(|e| EngineError::io(dir, &e))?;
            blocks.chunks.set_disk(disk);
        }
        Ok(Self { info, runner: Runner::new(model, ops), blocks, limits: limits(options, options.prompt_lookup, true) })
    }

    fn candle(
        file: &ModelFile,
        config: &candle::Config,
        options: &EngineOptions,
        threads: usize,
    ) -> Result<Self, EngineError> {
        let context = bounded(config.context, options)?;
        let info = ModelInfo {
            name: config.name.clone(),
            architecture: config.architecture.to_owned(),
            computed_by: Computed::Candle,
            context,
            vocabulary: config.vocabulary,
            weight_bytes: file.tensors.values().map(|info| info.bytes as usize).sum(),
            kv_bytes_per_token: config.kv_bytes_per_token(),
            ..of_file(file)
        };
        let bytes = options.cache_bytes.unwrap_or_else(|| options.kv_cache.bytes().1);
        let most = (bytes / (config.kv_bytes_per_token() * POSITIONS)).max(context.div_ceil(POSITIONS) + 1);
        let model = CandleModel::load(file, config, context, threads)?;
        // Guesses that were wrong could not be taken back.
        let limits = limits(options, 0, false);
        Ok(Self { info, runner: Runner::Candle(Box::new(model)), blocks: KvCache::counting(most), limits })
    }
}

/// A model that our own forward pass computes, what it runs on, and its context as the options bound it.
///
/// # Errors
/// Whatever is wrong with the file or the options.
pub fn own_model(
    file: &ModelFile,
    options: &EngineOptions,
    threads: usize,
) -> Result<(Llama, Ops, usize), EngineError> {
    let config = Config::read(file)?;
    let context = bounded(config.context, options)?;
    let model = match &options.packed {
        Some(dir) => Llama::load_packed(file, config, options.format, dir)?,
        None => Llama::load(file, config, options.format)?,
    }
    .with_activations(options.activations);
    let ops = Ops {
        level: options.level.unwrap_or_else(Level::detect).min(Level::detect()),
        pool: Pool::new(threads).map_err(no_thread)?,
    };
    Ok((model, ops, context))
}

fn limits(options: &EngineOptions, guesses: usize, shares: bool) -> Limits {
    Limits { step_tokens: options.step_tokens, sequences: options.max_sequences, guesses, shares }
}

fn bounded(of_model: usize, options: &EngineOptions) -> Result<usize, EngineError> {
    let context = options.context.map_or(of_model, |n| of_model.min(n as usize));
    match context {
        0 | 1 => Err(EngineError::Options("context must be at least 2 tokens".to_owned())),
        n => Ok(n),
    }
}

/// What does not depend on who computes it; the rest is empty.
fn of_file(file: &ModelFile) -> ModelInfo {
    ModelInfo {
        path: file.path().to_owned(),
        name: String::new(),
        architecture: String::new(),
        computed_by: Computed::Weir,
        parameters: file.tensors.values().map(TensorInfo::elements).sum(),
        quantisation: quantisation(file).to_owned(),
        context: 0,
        vocabulary: 0,
        weight_bytes: 0,
        kv_bytes_per_token: 0,
        chunk_reuse: String::new(),
    }
}

/// The element type of most matrix elements but the embedding's.
fn quantisation(file: &ModelFile) -> &'static str {
    let mut counts: Vec<(TensorType, u64)> = Vec::new();
    for (_, info) in file.tensors.iter().filter(|(name, i)| name.starts_with("blk.") && i.dimensions.len() > 1) {
        match counts.iter_mut().find(|(kind, _)| *kind == info.kind) {
            Some((_, count)) => *count += info.elements(),
            None => counts.push((info.kind, info.elements())),
        }
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or("", |(kind, _)| kind.name())
}
