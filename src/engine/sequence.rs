//! A sequence: one choice of one request, from its first prompt token to its last generated one.

use std::{sync::Arc, time::Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::{
    GenerateEvent,
    chunk_cache::Layout,
    detokenizer::{StopFilter, Utf8Stream},
    model::Kv,
    ops::{
        attention::POSITIONS,
        block_pool::{Block, BlockPool},
    },
    sampler::{Choosing, Logprobs, TokenMask},
    tokenizer::Tokenizer,
};
use crate::domain::{ChunkReuse, FinishReason, TokenLogprob, TopLogprob, Usage, UsageSource};

/// Tokens that must be the same for a guess.
const SAME: usize = 3;
/// Guesses at once: more would no longer be almost free beside reading the weights.
pub const MOST_GUESSES: usize = 8;

/// What the choices of a request have in common.
pub struct Request {
    pub prompt: Layout,
    pub choosing: Choosing,
    pub max_tokens: usize,
    pub stop: Vec<String>,
    pub logprobs: Option<usize>,
    pub mask: Option<Arc<dyn TokenMask>>,
    pub choices: u32,
    pub chunk_reuse: Option<ChunkReuse>,
    /// Until when its documents are pinned.
    pub keep_until: Option<Instant>,
    /// What is due earlier goes first, on a clock of the caller's.
    pub due: i64,
    pub events: UnboundedSender<GenerateEvent>,
}

/// Counts down the choices of a request, to send its usage after the last.
#[derive(Default)]
pub struct Tally {
    pub finished: u32,
    pub completion_tokens: u32,
    /// Tokens of the prompt that were there already: of its beginning, and of documents.
    pub reused: u32,
    pub attached: u32,
    /// First tokens of such documents that were computed all the same.
    pub recomputed: u32,
}

/// What a sequence waits for before it computes its own tokens: its documents.
#[derive(Default)]
pub struct Gather {
    /// The blocks of its own that are here already.
    pub found: Vec<Block>,
    /// By document of the prompt: its kept blocks, once they are there.
    pub there: Vec<Option<Vec<Block>>>,
    /// Documents that this sequence computes, by their index, with what there is of them.
    pub builds: Vec<(usize, Kv)>,
}

impl Gather {
    pub fn is_missing(&self) -> bool {
        self.there.iter().any(Option::is_none)
    }

    /// What is still being built of the documents that are missing.
    pub fn under_way(&self) -> impl Iterator<Item = &(usize, Kv)> {
        self.builds.iter().filter(|(number, _)| self.there[*number].is_none())
    }
}

/// One choice under way.
pub struct Sequence {
    pub request: Arc<Request>,
    /// Index of the request's tally.
    pub ticket: u64,
    pub choice: u32,
    pub kv: Kv,
    /// `None` once its documents are attached, or where there are none.
    pub gather: Option<Gather>,
    /// The prompt, then what was generated, the last of which is not yet in the cache.
    tokens: Vec<u32>,
    /// Those of them that are not attached.
    own: Vec<u32>,
    /// Of its own positions, those that have been computed at some time: fewer are in the cache once it had to give way.
    pub once: usize,
    /// Tokens that may come next, to be checked with the next step (Saxena 2023, prompt lookup decoding).
    guesses: Vec<u32>,
    /// How many guesses are worth making, and tokens for which none is made after they were wrong too often.
    trust: usize,
    rest: usize,
    utf8: Utf8Stream,
    stops: StopFilter,
    /// Bytes of text decoded, and given out.
    decoded: usize,
    shown: usize,
    /// Log-probabilities of tokens whose text is not all given out: with where their text begins and ends.
    waiting: Vec<(usize, usize, TokenLogprob)>,
}

impl Sequence {
    pub fn new(request: Arc<Request>, ticket: u64, choice: u32, kv: Kv) -> Self {
        let stops = StopFilter::new(request.stop.iter().cloned());
        Self {
            gather: None,
            tokens: request.prompt.tokens.clone(),
            own: request.prompt.own.clone(),
            once: kv.filled(),
            guesses: Vec::new(),
            trust: 2,
            rest: 0,
            request,
            ticket,
            choice,
            kv,
            utf8: Utf8Stream::default(),
            stops,
            decoded: 0,
            shown: 0,
            waiting: Vec::new(),
        }
    }

    /// Another choice of the same request, which continues from this one's cache.
    pub fn fork(&self, choice: u32) -> Self {
        Self::new(Arc::clone(&self.request), self.ticket, choice, self.kv.clone())
    }

    /// Whether the client has gone.
    pub fn abandoned(&self) -> bool {
        self.request.events.is_closed()
    }

    /// Prompt and answer so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What was generated.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.request.prompt.tokens.len()..]
    }

    /// How many tokens were generated.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.tokens.len()
    }

    /// Its own tokens.
    pub fn own(&self) -> &[u32] {
        &self.own
    }

    /// Its own tokens whose keys and values are in the cache.
    pub fn computed(&self) -> &[u32] {
        &self.own[..self.kv.filled()]
    }

    /// Its own tokens that are not in the cache yet.
    pub fn pending(&self) -> &[u32] {
        &self.own[self.kv.filled()..]
    }

    /// Attaches its documents, all of which are there, and begins to compute its own tokens.
    pub fn begin(&mut self, pool: &BlockPool) {
        let Some(gather) = self.gather.take() else { return };
        let chunks = self.request.prompt.chunks.iter().zip(gather.there);
        let attached = chunks.filter_map(|(chunk, blocks)| Some(chunk.attach(blocks?)));
        self.kv = Kv::of(pool, gather.found, attached.collect());
    }

    /// Blocks that it still takes to have computed what is pending, and one to go on.
    pub fn owed(&self) -> usize {
        let Some(gather) = &self.gather else { return self.kv.wanted(self.pending().len()) + 1 };
        let missing = gather.there.iter().zip(&self.request.prompt.chunks).filter(|(there, _)| there.is_none());
        let built: usize = gather.under_way().map(|(_, kv)| kv.blocks().len()).sum();
        let own = self.own.len().div_ceil(POSITIONS) - gather.found.len();
        missing.map(|(_, chunk)| chunk.taken()).sum::<usize>() - built + own + 1
    }

    /// All blocks that it holds.
    pub fn held(&self) -> impl Iterator<Item = &Block> {
        let gathered = self.gather.iter().flat_map(|gather| {
            let builds = gather.builds.iter().flat_map(|(_, kv)| kv.held());
            gather.found.iter().chain(gather.there.iter().flatten().flatten()).chain(builds)
        });
        self.kv.held().chain(gathered)
    }

    /// Lets all blocks go.
    pub fn release(&mut self) {
        self.kv.clear();
        self.gather = None;
    }

    /// Whether more than the token that was generated last is to be computed.
    pub fn prefilling(&self) -> bool {
        self.gather.is_some() || self.generated() == 0 || self.pending().len() > 1
    }

    pub fn guesses(&self) -> &[u32] {
        &self.guesses
    }

    /// Guesses what comes after the token that was generated last: what followed the latest place with the same three
    /// tokens. At most `most`, and no further than the answer may go.
    pub fn guess(&mut self, most: usize) {
        self.guesses.clear();
        let resting = self.rest > 0;
        self.rest = self.rest.saturating_sub(1);
        if self.prefilling() || resting {
            return;
        }
        let most = most.min(self.trust).min(self.request.max_tokens - self.generated() - 1);
        let Some((before, last)) = self.tokens.split_last_chunk::<SAME>() else { return };
        let known = &self.tokens[..before.len() + SAME - 1];
        if let Some(at) = known.windows(SAME).rposition(|window| window == last) {
            self.guesses.extend(self.tokens[at + SAME..].iter().take(most));
        }
    }

    /// Takes no guesses along: there is no room for them.
    pub fn forget_guesses(&mut self) {
        self.guesses.clear();
    }

    /// Learns how many of its guesses were right, and forgets what was computed for those that were not.
    pub fn checked(&mut self, right: usize) {
        self.kv.truncate(self.tokens.len() - 1);
        if self.guesses.is_empty() {
            return;
        }
        if right == self.guesses.len() {
            self.trust = (2 * self.trust).min(MOST_GUESSES);
        } else if right == 0 {
            self.trust /= 2;
            if self.trust == 0 {
                (self.trust, self.rest) = (1, 16);
            }
        }
        self.guesses.clear();
    }

    /// Takes a sampled token, gives out what may be shown, and says whether that was the end.
    pub fn accept(&mut self, token: u32, logprobs: Option<Logprobs>, tokenizer: &Tokenizer) -> Option<FinishReason> {
        self.tokens.push(token);
        self.own.push(token);
        if tokenizer.ends(token) {
            return Some(self.end(FinishReason::Stop));
        }
        let mut text = String::new();
        self.utf8.push(tokenizer.bytes(token), &mut text);
        let begin = self.decoded;
        self.decoded += text.len();
        if let Some(logprobs) = logprobs {
            self.waiting.push((begin, self.decoded, named(token, &logprobs, tokenizer)));
        }
        let (show, stopped) = self.stops.push(&text);
        self.shown += show.len();
        if stopped {
            // Of a token that reaches into the stop string, the part before it has been shown.
            let shown = self.shown;
            self.waiting.retain(|(begin, _, _)| *begin < shown);
            self.waiting.iter_mut().for_each(|(_, end, _)| *end = (*end).min(shown));
            self.show(show);
            return Some(FinishReason::Stop);
        }
        self.show(show);
        (self.generated() >= self.request.max_tokens).then(|| self.end(FinishReason::Length))
    }

    #[cfg(test)]
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.own.push(token);
    }

    /// Gives out what was held back.
    fn end(&mut self, reason: FinishReason) -> FinishReason {
        let mut tail = String::new();
        self.utf8.finish(&mut tail);
        let (mut show, stopped) = self.stops.push(&tail);
        if !stopped {
            show.push_str(&self.stops.finish());
        }
        self.shown = usize::MAX;
        self.show(show);
        reason
    }

    fn show(&mut self, text: String) {
        let ready = self.waiting.iter().take_while(|(_, end, _)| *end <= self.shown).count();
        let logprobs: Vec<TokenLogprob> = self.waiting.drain(..ready).map(|(_, _, logprob)| logprob).collect();
        if !text.is_empty() || !logprobs.is_empty() {
            self.send(GenerateEvent::Text { choice: self.choice, text, logprobs });
        }
    }

    /// Sends an event; a client that has gone is noticed by [`abandoned`](Self::abandoned).
    pub fn send(&self, event: GenerateEvent) {
        let _ = self.request.events.send(event);
    }

    /// The usage of the whole request.
    pub fn usage(&self, tally: &Tally) -> Usage {
        Usage {
            prompt_tokens: self.request.prompt.tokens.len() as u32,
            cached_tokens: tally.reused + tally.attached,
            chunk_tokens: tally.attached,
            recomputed_tokens: tally.recomputed,
            chunk_reuse: self.request.chunk_reuse,
            completion_tokens: tally.completion_tokens,
            source: UsageSource::Reported,
        }
    }
}

fn named(token: u32, logprobs: &Logprobs, tokenizer: &Tokenizer) -> TokenLogprob {
    let text = |token: u32| String::from_utf8_lossy(tokenizer.bytes(token)).into_owned();
    TokenLogprob {
        token: text(token),
        logprob: logprobs.chosen,
        entropy: Some(logprobs.entropy),
        bytes: tokenizer.bytes(token).to_vec(),
        top: logprobs
            .top
            .iter()
            .map(|(token, logprob)| TopLogprob {
                token: text(*token),
                logprob: *logprob,
                bytes: tokenizer.bytes(*token).to_vec(),
            })
            .collect(),
    }
}
