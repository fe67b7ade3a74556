//! From text to token ids and back, by the vocabulary in a GGUF file: byte-level BPE (`gpt2`), or SentencePiece's BPE with
//! a score per token (`llama`: Llama 2, TinyLlama, Mistral), where the neighbours whose union has the greatest score are
//! merged first, spaces are `▁`, and what has no token falls apart into bytes.
//!
//! Special tokens are never found in text that a user wrote: [`Tokenizer::encode_text`] knows none, and
//! [`Tokenizer::encode_template`] recognises them only where the caller says the template put them. The splitting
//! patterns by `tokenizer.ggml.pre` are those of the models' own tokenizer.json files.

use tokenizers::{
    Model, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    models::bpe::{BPE, BpeBuilder, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{
    EngineError,
    model_file::{ModelFile, Value},
};

/// GGUF's `tokenizer.ggml.token_type` of unknown text, of control tokens, of tokens that users defined, and of bytes.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;
/// A space, to SentencePiece.
const SPACE: char = '▁';

/// How a text is cut before tokens are merged.
enum Cut {
    /// Into words, whose bytes are characters.
    Words(PreTokenizerWrapper),
    /// Not at all; spaces are [`SPACE`], and one may be put before the text.
    Spaces { before: bool },
}

/// A model's vocabulary.
pub struct Tokenizer {
    model: BPE,
    cut: Cut,
    /// Runs of white space that have a token by definition, longest first. They are that token wherever they stand, and nothing is
    /// merged across them.
    runs: Vec<(String, u32)>,
    /// The bytes of each token; empty for control tokens.
    bytes: Vec<Box<[u8]>>,
    /// Names of tokens that only templates may use, longest first.
    special: Vec<(String, u32)>,
    /// The first bytes of those names.
    special_first: Vec<u8>,
    longest: usize,
    /// Put before a prompt where the metadata asks for it.
    pub bos: Option<u32>,
    pub add_bos: bool,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
    /// `bos_token` and `eos_token` as templates see them.
    pub bos_text: String,
    pub eos_text: String,
}

impl Tokenizer {
    /// Builds the tokenizer from a file's metadata.
    ///
    /// # Errors
    /// [`EngineError::UnsupportedModel`] for other kinds of tokenizer, [`EngineError::Corrupt`] for lists that do not
    /// fit together.
    pub fn read(file: &ModelFile, vocabulary: usize) -> Result<Self, EngineError> {
        let missing = |key: &str| file.corrupt(format!("metadata `{key}` is missing"));
        let scored = match file.text("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))? {
            "gpt2" => false,
            "llama" => true,
            other => {
                return Err(file.unsupported(format!("its tokenizer is of the kind `{other}`, not `gpt2` or `llama`")));
            }
        };
        let tokens = texts(file, "tokenizer.ggml.tokens")?;
        if tokens.len() != vocabulary {
            return Err(file.corrupt(format!(
                "`tokenizer.ggml.tokens` lists {} tokens, and the embedding has {vocabulary}",
                tokens.len()
            )));
        }
        let types = types(file, tokens.len())?;
        let vocab: Vocab = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id as u32)).collect();
        let built = |builder: BpeBuilder| {
            builder.build().map_err(|e| file.corrupt(format!("its tokenizer cannot be built: {e}")))
        };
        let (model, cut) = if scored {
            let merges = merges_by_score(&tokens, &types, &scores(file, tokens.len())?, &vocab);
            let mut builder = BpeBuilder::new().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
            if let Some(unknown) = types.iter().position(|kind| *kind == UNKNOWN) {
                builder = builder.unk_token(tokens[unknown].to_owned());
            }
            let before = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            (built(builder)?, Cut::Spaces { before })
        } else {
            let pre = file.text("tokenizer.ggml.pre")?.unwrap_or("gpt-2");
            let split = pre_tokenizer(pre).map_err(|reason| file.unsupported(reason))?;
            let merges = listed_merges(file, &vocab)?;
            let builder = BpeBuilder::new().vocab_and_merges(vocab, merges).ignore_merges(pre == "llama-bpe");
            (built(builder)?, Cut::Words(split))
        };

        let mut runs: Vec<(String, u32)> = (0..)
            .zip(tokens.iter().zip(&types))
            .filter(|(_, (token, kind))| **kind == USER_DEFINED && is_white(token))
            .map(|(id, (token, _))| (token.replace(SPACE, " "), id))
            .collect();
        runs.sort_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        let id = |key: &str| -> Result<Option<u32>, EngineError> {
            match file.u64(key)? {
                Some(n) if n >= vocabulary as u64 => Err(file.corrupt(format!("metadata `{key}` is {n}"))),
                n => Ok(n.map(|n| n as u32)),
            }
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let mut ends: Vec<u32> = eos.into_iter().collect();
        ends.extend(id("tokenizer.ggml.eot_token_id")?);
        // Files before `eot_token_id` existed: the usual names of what ends a turn or a text.
        for (index, token) in tokens.iter().enumerate() {
            let names =
                ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>"];
            if types[index] == CONTROL && names.contains(token) {
                ends.push(index as u32);
            }
        }
        ends.sort_unstable();
        ends.dedup();

        let mut special: Vec<(String, u32)> = tokens
            .iter()
            .zip(&types)
            .enumerate()
            .filter(|(_, (token, kind))| match **kind {
                CONTROL => !token.is_empty(),
                USER_DEFINED => !is_white(token),
                _ => false,
            })
            .map(|(id, (token, _))| ((*token).to_owned(), id as u32))
            .collect();
        special.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then(a.cmp(b)));
        let mut special_first: Vec<u8> = special.iter().map(|(name, _)| name.as_bytes()[0]).collect();
        special_first.sort_unstable();
        special_first.dedup();
        let bytes: Vec<Box<[u8]>> = tokens
            .iter()
            .zip(&types)
            .map(|(token, kind)| match *kind {
                CONTROL => Box::default(),
                BYTE if scored => byte_named(token).map_or_else(Box::default, |byte| [byte].into()),
                _ if scored => token.replace(SPACE, " ").into_bytes().into(),
                USER_DEFINED => token.as_bytes().into(),
                _ => bytes_of(token),
            })
            .collect();
        let text = |id: Option<u32>| id.map(|id| tokens[id as usize].to_owned()).unwrap_or_default();
        Ok(Self {
            longest: bytes.iter().map(|b| b.len()).max().unwrap_or(1).max(1),
            model,
            cut,
            runs,
            bytes,
            special,
            special_first,
            bos,
            add_bos: file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(scored) && bos.is_some(),
            ends,
            bos_text: text(bos),
            eos_text: text(eos),
        })
    }

    /// The id of the special token with this text.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.special.iter().find(|(name, _)| name == text).map(|(_, id)| *id)
    }

    /// The special token that begins `text`, or is begun by the whole of it.
    fn special_at(&self, text: &str, whole: bool) -> Option<&(String, u32)> {
        let first = text.as_bytes().first()?;
        if !self.special_first.contains(first) {
            return None;
        }
        self.special.iter().find(|(name, _)| text.starts_with(name.as_str()) || (!whole && name.starts_with(text)))
    }

    /// `text` with `guard` after the first character of every special token in it, and of every beginning of one at its
    /// end, which what follows could complete.
    pub fn guarded(&self, text: &str, guard: char) -> String {
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            out.push(c);
            if self.special_at(&text[at..], false).is_some() {
                out.push(guard);
            }
        }
        out
    }

    /// The fewest tokens that a text of `bytes` bytes can have.
    pub fn fewest(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.longest)
    }

    /// The ids of a text in which nothing is special.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] when the splitting pattern fails on the text.
    pub fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        let (mut plain, mut at) = (0, 0);
        while let Some(c) = text[at..].chars().next() {
            let run = self.runs.iter().find(|(run, _)| c.is_whitespace() && text[at..].starts_with(run.as_str()));
            let Some((run, id)) = run else {
                at += c.len_utf8();
                continue;
            };
            self.encode_plain(&text[plain..at], plain == 0, ids)?;
            ids.push(*id);
            at += run.len();
            plain = at;
        }
        self.encode_plain(&text[plain..], plain == 0, ids)
    }

    /// The ids of what lies between defined runs of white space.
    fn encode_plain(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        if text.is_empty() {
            return Ok(());
        }
        let fail = |e: tokenizers::Error| EngineError::Tokenizer(e.to_string());
        let split = match &self.cut {
            Cut::Words(split) => split,
            Cut::Spaces { before } => {
                let mut spaced = String::with_capacity(text.len() + SPACE.len_utf8());
                if *before && first {
                    spaced.push(SPACE);
                }
                spaced.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
                ids.extend(self.model.tokenize(&spaced).map_err(fail)?.iter().map(|token| token.id));
                return Ok(());
            }
        };
        let mut pieces = PreTokenizedString::from(NormalizedString::from(text));
        split.pre_tokenize(&mut pieces).map_err(fail)?;
        pieces.tokenize(|piece| self.model.tokenize(piece.get())).map_err(fail)?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    /// The ids of a rendered template: special tokens are recognised wherever they stand whole, and `guard`, which
    /// [`guarded`](Self::guarded) has put inside every special token that is not the template's, is taken out of what
    /// lies between them.
    ///
    /// # Errors
    /// As [`encode_text`](Self::encode_text).
    pub fn encode_template(&self, text: &str, guard: char, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        let mut plain = 0;
        let mut at = 0;
        let flush = |from: usize, to: usize, ids: &mut Vec<u32>| {
            let piece = &text[from..to];
            match piece.contains(guard) {
                true => self.encode_text(&piece.replace(guard, ""), ids),
                false => self.encode_text(piece, ids),
            }
        };
        while at < text.len() {
            let rest = &text[at..];
            if let Some((name, id)) = self.special_at(rest, true) {
                flush(plain, at, ids)?;
                ids.push(*id);
                at += name.len();
                plain = at;
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        flush(plain, text.len(), ids)
    }

    /// The bytes that a token adds to a text; none for control tokens.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    pub fn ends(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }
}

/// Whether a token is white space and nothing else.
fn is_white(token: &str) -> bool {
    token.chars().all(|c| c == SPACE || c.is_whitespace())
}

fn texts<'a>(file: &'a ModelFile, key: &str) -> Result<Vec<&'a str>, EngineError> {
    let list = file.list(key)?.ok_or_else(|| file.corrupt(format!("metadata `{key}` is missing")))?;
    list.iter()
        .map(|value| match value {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(file.corrupt(format!("metadata `{key}` is not a list of texts"))),
        })
        .collect()
}

fn types(file: &ModelFile, tokens: usize) -> Result<Vec<u64>, EngineError> {
    let key = "tokenizer.ggml.token_type";
    let Some(list) = file.list(key)? else { return Ok(vec![1; tokens]) };
    if list.len() != tokens {
        return Err(file.corrupt(format!("metadata `{key}` has {} entries for {tokens} tokens", list.len())));
    }
    list.iter()
        .map(|value| match value {
            Value::Signed(n) if *n >= 0 => Ok(*n as u64),
            Value::Unsigned(n) => Ok(*n),
            _ => Err(file.corrupt(format!("metadata `{key}` is not a list of whole numbers"))),
        })
        .collect()
}

fn scores(file: &ModelFile, tokens: usize) -> Result<Vec<f64>, EngineError> {
    let key = "tokenizer.ggml.scores";
    let list = file.list(key)?.ok_or_else(|| file.corrupt(format!("metadata `{key}` is missing")))?;
    let score = |value: &Value| match value {
        Value::Float(x) => Some(*x),
        _ => None,
    };
    let scores: Option<Vec<f64>> = list.iter().map(score).collect();
    scores
        .filter(|scores| scores.len() == tokens && scores.iter().all(|s| !s.is_nan()))
        .ok_or_else(|| file.corrupt(format!("metadata `{key}` is not a list of {tokens} numbers")))
}

fn listed_merges(file: &ModelFile, vocab: &Vocab) -> Result<Vec<(String, String)>, EngineError> {
    let mut merges = Vec::new();
    for merge in texts(file, "tokenizer.ggml.merges")? {
        let pair = merge.split_once(' ').filter(|(a, b)| {
            vocab.contains_key(*a) && vocab.contains_key(*b) && vocab.contains_key(&format!("{a}{b}"))
        });
        let Some((a, b)) = pair else {
            return Err(file.corrupt(format!("merge {} of the tokenizer is of unknown tokens", merges.len())));
        };
        merges.push((a.to_owned(), b.to_owned()));
    }
    Ok(merges)
}

/// All ways in which a token is made of two others, those of the greatest score first.
fn merges_by_score(tokens: &[&str], types: &[u64], scores: &[f64], vocab: &Vocab) -> Vec<(String, String)> {
    let mut merges: Vec<(f64, u32, u32)> = Vec::new();
    for ((token, _), score) in
        tokens.iter().zip(types).zip(scores).filter(|((_, kind), _)| !matches!(**kind, CONTROL | BYTE | UNKNOWN))
    {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left), Some(right)) = (vocab.get(left), vocab.get(right)) {
                merges.push((*score, *left, *right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let text = |id: u32| tokens[id as usize].to_owned();
    merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}

/// The byte that a token of the form `<0x0A>` stands for.
fn byte_named(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}

/// How a model cuts text into words, by the name that llama.cpp gives it.
fn pre_tokenizer(name: &str) -> Result<PreTokenizerWrapper, String> {
    const LLAMA3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    const QWEN2: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    let by = |pattern: &str| -> Result<PreTokenizerWrapper, String> {
        Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map(Into::into)
            .map_err(|e| format!("its splitting pattern `{name}` does not compile: {e}"))
    };
    let plain = ByteLevel::new(false, false, false);
    let parts: Vec<PreTokenizerWrapper> = match name {
        "smollm" => vec![Digits::new(true).into(), ByteLevel::new(false, false, true).into()],
        "gpt-2" | "default" => vec![ByteLevel::new(false, false, true).into()],
        "llama-bpe" => vec![by(LLAMA3)?, plain.into()],
        "qwen2" => vec![by(QWEN2)?, plain.into()],
        other => return Err(format!("its tokenizer splits text by `{other}`, which is not known here")),
    };
    Ok(Sequence::new(parts).into())
}

/// The bytes behind a byte-level token, whose characters each stand for one byte as in GPT-2: printable Latin-1 for
/// itself, the rest from U+0100 on. A token with any other character stands for its own UTF-8.
fn bytes_of(token: &str) -> Box<[u8]> {
    let byte = |c: char| -> Option<u8> {
        match u32::from(c) {
            n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(n as u8),
            n @ 0x100..=0x120 => Some((n - 0x100) as u8),
            n @ 0x121..=0x142 => Some((n - 0x121 + 0x7f) as u8),
            0x143 => Some(0xad),
            _ => None,
        }
    };
    let bytes: Option<Vec<u8>> = token.chars().map(byte).collect();
    bytes.map_or_else(|| token.as_bytes().into(), Vec::into_boxed_slice)
}

#[cfg(test)]
mod tests;
