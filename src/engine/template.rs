//! A model's chat template: messages to the text of a prompt, as `transformers` renders it.
//!
//! What a message says must not be able to end its turn or begin another's. So every special token inside a message is
//! broken by a guard character that no message contains before the template sees it; the tokenizer then recognises
//! only whole special tokens, which are the template's own, and takes the guards out. The template still sees the real
//! text (it may trim it), and text without special tokens gives exactly the ids that `transformers` gives.

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};

use super::{EngineError, tokenizer::Tokenizer};
use crate::domain::{Message, Role};

/// The template that is used where a file has none: ChatML.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                      {% endif %}";

const NAME: &str = "chat_template";

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

    /// The token ids of a conversation, up to and with the beginning of the assistant's turn.
    ///
    /// # Errors
    /// [`EngineError::Template`] when the template refuses the messages, [`EngineError::Tokenizer`].
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, EngineError> {
        let texts: Vec<String> = messages.iter().map(Message::joined_text).collect();
        let guard = guard_for(&texts);
        let values: Vec<Value> = messages
            .iter()
            .zip(&texts)
            .map(|(message, text)| context! { role => role(message.role), content => tokenizer.guarded(text, guard) })
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
        let mut ids = Vec::new();
        tokenizer.encode_template(&rendered, guard, &mut ids)?;
        if tokenizer.add_bos
            && let Some(bos) = tokenizer.bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
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

/// A character that none of the texts contains: a noncharacter, or else the first free one of the last private plane.
fn guard_for(texts: &[String]) -> char {
    let free = |c: &char| !texts.iter().any(|text| text.contains(*c));
    ('\u{fdd0}'..='\u{fdef}').find(free).or_else(|| ('\u{100000}'..='\u{10fffd}').find(free)).unwrap_or('\u{fdd0}')
}

#[cfg(test)]
mod tests;
