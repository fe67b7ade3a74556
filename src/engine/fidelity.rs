//! What reusing documents costs in fidelity, for one model and its prompts: the same prompts with their documents computed apart
//! and in place, and how far what comes next differs. Several ways of reuse are compared; the engine has those of [`Reuse`].

pub mod record;

use std::{collections::HashMap, path::Path, sync::Arc};

use super::{
    Encoded, EngineError, EngineOptions,
    chunk_cache::{Layout, Reuse},
    kept::Key,
    loaded,
    model::{Kv, Llama, llama::Workspace},
    model_file::ModelFile,
    ops::{
        Ops,
        block_pool::{Block, BlockPool},
    },
    template::Template,
    tokenizer::Tokenizer,
};
use crate::domain::Message;

/// A way to reuse documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variant {
    pub anchor: Anchor,
    pub recompute: Recompute,
}

/// What documents are computed behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Nothing, as in MEPIC and EPIC.
    None,
    /// The first token of every prompt.
    First,
    /// What the model's template puts before the first user's text.
    Head,
}

/// Which of a document's tokens are computed in their place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Recompute {
    /// So many first ones: none, EPIC's 16 or 32, MEPIC's first block.
    First(usize),
    /// This share of all, those whose values in the second layer differ most from what they should be (CacheBlend, Yao et al. 2024).
    Deviating(f64),
}

impl Variant {
    /// As [`name`](Self::name) writes it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_name(name: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{name}` is no way of reuse, such as none, first-32, anchor-16, head-0 or deviation-15");
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (kind, number) = match name.split_once('-') {
            Some((kind, text)) => (kind, number(text)?),
            None => (name, 0),
        };
        let first = Recompute::First(number);
        match kind {
            "none" | "first" => Ok(Self { anchor: Anchor::None, recompute: first }),
            "anchor" => Ok(Self { anchor: Anchor::First, recompute: first }),
            "head" => Ok(Self { anchor: Anchor::Head, recompute: first }),
            "deviation" if number <= 100 => {
                Ok(Self { anchor: Anchor::None, recompute: Recompute::Deviating(number as f64 / 100.0) })
            }
            _ => Err(wrong()),
        }
    }

    /// The engine's parameters, for a model whose prompts begin with `head` ([`Anchor::Head`]); `None` where the engine does not have
    /// it.
    pub fn reuse(self, head: &[u32]) -> Option<Reuse> {
        let Recompute::First(recompute) = self.recompute else { return None };
        let anchor = match self.anchor {
            Anchor::None => Arc::default(),
            Anchor::First => head.iter().take(1).copied().collect(),
            Anchor::Head => head.into(),
        };
        Some(Reuse { anchor, recompute, ..Reuse::default() })
    }

    pub fn name(self) -> String {
        match (self.anchor, self.recompute) {
            (Anchor::None, Recompute::First(0)) => "none".to_owned(),
            (Anchor::None, Recompute::First(n)) => format!("first-{n}"),
            (Anchor::First, Recompute::First(n)) => format!("anchor-{n}"),
            (Anchor::Head, Recompute::First(n)) => format!("head-{n}"),
            (_, Recompute::Deviating(share)) => format!("deviation-{:.0}", 100.0 * share),
        }
    }
}

/// How far one variant is from the full computation, for one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// Kullback-Leibler divergence of the next token from the full computation's, by position of the full answer.
    pub divergence: Vec<f64>,
    /// Whether the best token is the same, by position.
    pub agrees: Vec<bool>,
    /// What the model answers by itself.
    pub answer: String,
    /// Tokens of the prompt that are computed when all documents are there.
    pub computed: usize,
}

/// The full computation.
pub struct Reference {
    prompt: Encoded,
    kv: Kv,
    answer: Vec<u32>,
    /// `[answer][vocabulary]`.
    logits: Vec<f32>,
    /// Documents that were computed apart, by what they are.
    apart: HashMap<Key, Vec<Block>>,
}

impl Reference {
    pub fn tokens(&self) -> usize {
        self.prompt.tokens.len()
    }

    pub fn documents(&self) -> usize {
        self.prompt.documents.len()
    }
}

/// A model to be tried out.
pub struct Laboratory {
    model: Llama,
    ops: Ops,
    pool: BlockPool,
    w: Workspace,
    tokenizer: Tokenizer,
    template: Template,
    context: usize,
    identity: u128,
    head: Vec<u32>,
}

impl Laboratory {
    /// Loads a model.
    ///
    /// # Errors
    /// As [`super::Engine::load`]; models that are computed by candle share nothing, and are refused.
    pub fn load(path: &Path, options: &EngineOptions) -> Result<Self, EngineError> {
        let file = ModelFile::open(path)?;
        if super::candle::Config::read(&file)?.is_some() {
            return Err(file.unsupported("candle computes it, and its keys and values are not shared"));
        }
        let threads = if options.threads == 0 { super::default_threads() } else { options.threads };
        let (model, ops, context) = loaded::own_model(&file, options, threads)?;
        let tokenizer = Tokenizer::read(&file, model.config().vocabulary)?;
        let template = Template::compile(file.text("tokenizer.chat_template")?).map_err(|e| file.unsupported(e))?;
        let head = template.head(&tokenizer)?;
        Ok(Self {
            ops,
            pool: model.config().block_pool(),
            w: Workspace::default(),
            identity: model.identity().hash,
            head,
            model,
            tokenizer,
            template,
            context,
        })
    }

    /// The identity of the model's keys and values.
    pub fn identity(&self) -> u128 {
        self.identity
    }

    /// Computes a prompt in full, and an answer of at most `most` tokens, always the best one.
    ///
    /// # Errors
    /// When the prompt cannot be encoded, or is longer than the context.
    pub fn reference(&mut self, messages: &[Message], most: usize) -> Result<Reference, EngineError> {
        let prompt = self.template.encode(messages, &self.tokenizer)?;
        let length = prompt.tokens.len();
        if length + most > self.context {
            return Err(EngineError::PromptTooLong { prompt: length, exact: true, context: self.context });
        }
        let mut kv = Kv::new(&self.pool);
        self.forward(&mut kv, &prompt.tokens, 1);
        let logits = self.w.logits.clone();
        let mut answering = kv.clone();
        let (answer, logits) = self.answer(&mut answering, logits, most);
        Ok(Reference { prompt, kv, answer, logits, apart: HashMap::new() })
    }

    /// Continues by the best tokens; gives them and the logits that each was taken from.
    fn answer(&mut self, kv: &mut Kv, first: Vec<f32>, most: usize) -> (Vec<u32>, Vec<f32>) {
        let (mut answer, mut all) = (Vec::new(), Vec::new());
        let mut logits = first;
        loop {
            let token = best(&logits);
            answer.push(token);
            all.append(&mut logits);
            if answer.len() == most || self.tokenizer.ends(token) {
                return (answer, all);
            }
            self.forward(kv, &[token], 1);
            logits.clone_from(&self.w.logits);
        }
    }

    /// Tries a variant on a prompt; `None` where none of its documents may be reused.
    pub fn attempt(&mut self, reference: &mut Reference, variant: Variant) -> Option<Trial> {
        let (mut kv, computed) = match variant.recompute {
            Recompute::First(_) => self.attached(reference, &variant.reuse(&self.head)?)?,
            Recompute::Deviating(share) => self.blended(reference, share)?,
        };
        let first = self.w.logits.clone();
        let vocabulary = self.model.config().vocabulary;
        let mut forced = first.clone();
        let answer = &reference.answer;
        if answer.len() > 1 {
            self.forward(&mut kv.clone(), &answer[..answer.len() - 1], answer.len() - 1);
            forced.extend_from_slice(&self.w.logits);
        }
        let (mut divergence, mut agrees) = (Vec::new(), Vec::new());
        for (want, got) in reference.logits.chunks_exact(vocabulary).zip(forced.chunks_exact(vocabulary)) {
            divergence.push(kullback_leibler(want, got));
            agrees.push(best(want) == best(got));
        }
        let own = match agrees.iter().all(|same| *same) {
            true => answer.clone(),
            false => self.answer(&mut kv, first, answer.len().max(1)).0,
        };
        Some(Trial { divergence, agrees, answer: self.text(&own), computed })
    }

    /// What the model answers in full.
    pub fn full_answer(&self, reference: &Reference) -> String {
        self.text(&reference.answer)
    }

    fn text(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.tokenizer.bytes(*token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The prompt as the engine computes it; logits of its last token are in the workspace.
    fn attached(&mut self, reference: &mut Reference, reuse: &Reuse) -> Option<(Kv, usize)> {
        let prompt = &reference.prompt;
        let layout = Layout::new(prompt.tokens.clone(), &prompt.documents, reuse, self.identity, b"");
        if layout.chunks.is_empty() {
            return None;
        }
        let mut parts = Vec::new();
        for chunk in &layout.chunks {
            let blocks = match reference.apart.get(&chunk.key) {
                Some(blocks) => blocks.clone(),
                None => {
                    let mut anchor = Kv::new(&self.pool);
                    self.forward(&mut anchor, &chunk.anchor, 0);
                    let mut kv = chunk.begin(&self.pool, anchor.blocks().cloned().collect());
                    self.forward(&mut kv, &layout.tokens[chunk.tokens.clone()], 0);
                    let blocks: Vec<Block> = kv.blocks().skip(chunk.first()).cloned().collect();
                    reference.apart.insert(chunk.key, blocks.clone());
                    blocks
                }
            };
            parts.push(chunk.attach(blocks));
        }
        let mut kv = Kv::of(&self.pool, Vec::new(), parts);
        self.forward(&mut kv, &layout.own, 1);
        Some((kv, layout.own.len()))
    }

    /// CacheBlend: a copy of all documents' keys and values for this prompt, keys turned to where they stand; the tokens whose
    /// values in the second layer deviate most from the full computation's are computed again in all layers. (CacheBlend computes
    /// the first layer of all tokens to know these values; here they are the full computation's, which are the same.)
    fn blended(&mut self, reference: &mut Reference, share: f64) -> Option<(Kv, usize)> {
        let whole = Reuse { recompute: 0, ..Reuse::default() };
        let prompt = reference.prompt.clone();
        let layout = Layout::new(prompt.tokens.clone(), &prompt.documents, &whole, self.identity, b"");
        let (apart, _) = self.attached(reference, &whole)?;
        let config = self.model.config().clone();
        let mut kv = Kv::new(&self.pool);
        kv.reserve(prompt.tokens.len());
        let mut deviations: Vec<(f64, usize)> = Vec::new();
        let second = 1.min(config.layers - 1);
        for chunk in &layout.chunks {
            for position in chunk.attached.clone() {
                for layer in 0..config.layers {
                    let (mut keys, values) = apart.read(&config, layer, position);
                    self.model.turn(layer, &mut keys, chunk.tokens.start as i64);
                    kv.write(&config, layer, position, &keys, &values);
                    if layer == second {
                        let (_, want) = reference.kv.read(&config, layer, position);
                        let square = want.iter().zip(&values).map(|(w, v)| f64::from(w - v).powi(2)).sum();
                        deviations.push((square, position));
                    }
                }
            }
        }
        let documents = deviations.len();
        deviations.sort_by(|a, b| b.0.total_cmp(&a.0));
        deviations.truncate((share * documents as f64).ceil() as usize);
        let reused = |position: &usize| layout.chunks.iter().any(|chunk| chunk.attached.contains(position));
        let mut positions: Vec<usize> = (0..prompt.tokens.len()).filter(|position| !reused(position)).collect();
        positions.extend(deviations.iter().map(|(_, position)| position));
        positions.sort_unstable();
        let tokens: Vec<u32> = positions.iter().map(|position| prompt.tokens[*position]).collect();
        self.model.revise(&self.ops, &mut kv, &tokens, &positions, &mut self.w);
        Some((kv, tokens.len()))
    }

    /// Appends tokens; the logits of the last `wanted` are in the workspace.
    fn forward(&mut self, kv: &mut Kv, tokens: &[u32], wanted: usize) {
        self.model.append(&self.ops, kv, tokens, wanted, &mut self.w);
    }
}

fn best(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a)));
    best.unwrap_or(0) as u32
}

/// Of the distributions of two rows of logits, in nats.
fn kullback_leibler(p: &[f32], q: &[f32]) -> f64 {
    let normal = |logits: &[f32]| {
        let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
        f64::from(greatest) + logits.iter().map(|l| f64::from(l - greatest).exp()).sum::<f64>().ln()
    };
    let (of_p, of_q) = (normal(p), normal(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - of_p, f64::from(*q) - of_q);
        p.exp() * (p - q)
    });
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests;
