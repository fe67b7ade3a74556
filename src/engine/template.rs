//! A model's chat template: messages to the text of a prompt, as `transformers` renders it.
//!
//! What a message says must not be able to end its turn or begin another's. So every special token inside a message is
//! broken by a guard character that no message contains before the template sees it; the tokenizer then recognises
//! only whole special tokens, which are the template's own, and takes the guards out. The template still sees the real
//! text (it may trim it), and text without special tokens gives exactly the ids that `transformers` gives.
//!
//! Marked documents are rendered between two further such characters, cut out there and tokenised apart, so that their ids are
//! the same wherever they stand.

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};

use super::{Encoded, EngineError, tokenizer::Tokenizer};
use crate::domain::{ContentPart, Message, Role};

/// The template that is used where a file has none: ChatML.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                      {% endif %}";

const NAME: &str = "chat_template";

/// Around reasoning, as models write it (DeepSeek-R1, Qwen3); a token of its own where the model has one.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles a template's source; `None` takes ChatML.
    ///
    /// # Errors
    /// What is wrong with the template, in words.
    pub fn compile(source: Option<&str>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
            let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
            jiff::fmt::strtime::format(&format, &now)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        environment
            .add_template_owned(NAME, source.unwrap_or(CHATML).to_owned())
            .map_err(|e| format!("the chat template does not compile: {e}"))?;
        Ok(Self { environment })
    }

    /// The token ids of a conversation, up to and with the beginning of the assistant's turn, and where its marked documents are.
    ///
    /// # Errors
    /// [`EngineError::Template`] when the template refuses the messages, [`EngineError::Tokenizer`].
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Encoded, EngineError> {
        let marks = Marks::free_in(messages.iter().flat_map(|m| &m.content).filter_map(ContentPart::text));
        let values: Vec<Value> = messages
            .iter()
            .map(|message| context! { role => role(message.role), content => marks.content(message, tokenizer) })
            .collect();
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages => values,
                    add_generation_prompt => true,
                    bos_token => tokenizer.bos_text.clone(),
                    eos_token => tokenizer.eos_text.clone(),
                })
            })
            .map_err(|e| EngineError::Template(reason(&e)))?;
        let mut out = Encoded::default();
        let mut rest = &rendered[..];
        while let Some((before, inside, behind)) = marks.next_document(rest) {
            marks.encode(before, tokenizer, &mut out.tokens)?;
            let begin = out.tokens.len();
            tokenizer.encode_text(&inside.replace(marks.guard, ""), &mut out.tokens)?;
            if out.tokens.len() > begin {
                out.documents.push(begin..out.tokens.len());
            }
            rest = behind;
        }
        marks.encode(rest, tokenizer, &mut out.tokens)?;
        if tokenizer.add_bos
            && let Some(bos) = tokenizer.bos
            && out.tokens.first() != Some(&bos)
        {
            out.tokens.insert(0, bos);
            out.documents.iter_mut().for_each(|document| *document = document.start + 1..document.end + 1);
        }
        Ok(out)
    }

    /// The token ids of what an answer has begun with. Nothing in it is special but the marks of reasoning.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`].
    pub fn encode_begun(&self, begun: &str, tokenizer: &Tokenizer, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        let mut rest = begun;
        let next = |rest: &str| {
            let mark = |mark: &&str| Some((rest.find(mark)?, mark.len(), tokenizer.special(mark)?));
            REASONING.iter().filter_map(mark).min()
        };
        while let Some((at, length, id)) = next(rest) {
            tokenizer.encode_text(&rest[..at], ids)?;
            ids.push(id);
            rest = &rest[at + length..];
        }
        tokenizer.encode_text(rest, ids)
    }

    /// What stands before the text of a conversation that a user begins.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn head(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, EngineError> {
        let text = Message { role: Role::User, content: vec![ContentPart::Chunk("text".to_owned())] };
        let mut encoded = self.encode(&[text], tokenizer)?;
        encoded.tokens.truncate(encoded.documents.first().map_or(0, |document| document.start));
        Ok(encoded.tokens)
    }
}

/// Characters that no message contains.
#[derive(Clone, Copy)]
struct Marks {
    /// Stands inside special tokens that are not the template's.
    guard: char,
    /// Around documents.
    open: char,
    close: char,
}

impl Marks {
    /// Noncharacters, or else the first free ones of the last private plane.
    fn free_in<'a>(texts: impl Iterator<Item = &'a str> + Clone) -> Self {
        let free = |c: &char| !texts.clone().any(|text| text.contains(*c));
        let mut found = ('\u{fdd0}'..='\u{fdef}').chain('\u{100000}'..='\u{10fffd}').filter(free);
        let mut next = |or: char| found.next().unwrap_or(or);
        Self { guard: next('\u{fdd0}'), open: next('\u{fdd1}'), close: next('\u{fdd2}') }
    }

    /// What the template sees of a message: its text parts, joined by line feeds.
    fn content(self, message: &Message, tokenizer: &Tokenizer) -> String {
        let mut out = String::new();
        // What is not a document is guarded in one piece, as a special token may be put together from two parts.
        let mut plain = String::new();
        for (n, part) in message.content.iter().filter(|part| part.text().is_some()).enumerate() {
            if n > 0 {
                plain.push('\n');
            }
            match part {
                ContentPart::Chunk(text) => {
                    out.push_str(&tokenizer.guarded(&std::mem::take(&mut plain), self.guard));
                    out.push(self.open);
                    out.push_str(&tokenizer.guarded(text, self.guard));
                    out.push(self.close);
                }
                other => plain.push_str(other.text().unwrap_or_default()),
            }
        }
        out + &tokenizer.guarded(&plain, self.guard)
    }

    /// Text before the next whole document, the document's, and what follows. A template may have cut one in two; what is left is no
    /// document.
    fn next_document<'a>(&self, text: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        let (_, behind) = text.split_once(self.open)?;
        let (inside, behind) = behind.split_once(self.close)?;
        // The last opening before the closing.
        let inside = inside.rsplit_once(self.open).map_or(inside, |(_, inside)| inside);
        let begin = inside.as_ptr() as usize - text.as_ptr() as usize;
        Some((&text[..begin - self.open.len_utf8()], inside, behind))
    }

    fn encode(self, text: &str, tokenizer: &Tokenizer, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        match text.contains([self.open, self.close]) {
            true => tokenizer.encode_template(&text.replace([self.open, self.close], ""), self.guard, ids),
            false => tokenizer.encode_template(text, self.guard, ids),
        }
    }
}

/// What a template says when it refuses (`raise_exception`), else the renderer's own words. Neither holds message text.
fn reason(error: &Error) -> String {
    match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    }
}

fn role(role: Role) -> &'static str {
    match role {
        // `developer` is the newer name of `system`; templates know only the older one.
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool | Role::Function => "tool",
    }
}

#[cfg(test)]
mod tests;
