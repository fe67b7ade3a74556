//! What a policy takes for documents where clients mark none: whole messages by who said them, and text between lines. Only
//! where parts begin and end changes, never the text.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::domain::{ContentPart, Message, Role};

/// What is a document, computed once and reused wherever it stands, by models that may.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChunksSpec {
    /// All text of messages of these roles, each part a document.
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Text between lines, in any message.
    #[serde(default)]
    pub between: Option<BetweenSpec>,
}

/// Lines around a document; they are no part of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BetweenSpec {
    /// How the line before a document begins, such as `<document`.
    #[schemars(length(min = 1))]
    pub begin: String,
    /// How the line behind it begins; without it, a document ends where the next begins, and with the text.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub end: Option<String>,
}

impl ChunksSpec {
    /// These messages with their documents marked; `None` where there are none but those that are marked already.
    pub fn mark(&self, messages: &[Message]) -> Option<Arc<[Message]>> {
        let mut changed = false;
        let marked = messages.iter().map(|message| {
            let whole = self.roles.contains(&message.role);
            let content = message.content.iter().flat_map(|part| {
                let parts = match (part, &self.between) {
                    (ContentPart::Text(text), _) if whole && !text.is_empty() => vec![ContentPart::Chunk(text.clone())],
                    (ContentPart::Text(text), Some(between)) => between.cut(text),
                    _ => vec![part.clone()],
                };
                changed |= parts[..] != *std::slice::from_ref(part);
                parts
            });
            Message { role: message.role, content: content.collect() }
        });
        let marked: Arc<[Message]> = marked.collect();
        changed.then_some(marked)
    }
}

impl BetweenSpec {
    /// The parts of a text. Joined by line feeds, as parts are, they are the text again.
    fn cut(&self, text: &str) -> Vec<ContentPart> {
        let mut parts = Vec::new();
        // Where what is not a document begins, and where the document at hand does.
        let (mut plain, mut document) = (0, None);
        let mut close = |plain: &mut usize, begin: usize, end: usize| {
            if end > begin {
                parts.push(ContentPart::Text(text[*plain..begin - 1].to_owned()));
                parts.push(ContentPart::Chunk(text[begin..end].to_owned()));
                *plain = text.len().min(end + 1);
            }
        };
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            let behind = at + line.len();
            let opens = line.starts_with(&self.begin) && line.ends_with('\n');
            match (document, &self.end) {
                (Some(begin), Some(end)) if line.starts_with(end.as_str()) => {
                    close(&mut plain, begin, at.saturating_sub(1));
                    document = None;
                }
                (Some(begin), None) if opens => {
                    close(&mut plain, begin, at - 1);
                    document = Some(behind);
                }
                (None, _) if opens => document = Some(behind),
                _ => {}
            }
            at = behind;
        }
        // One whose end never comes is none.
        if let (Some(begin), None) = (document, &self.end) {
            close(&mut plain, begin, text.len());
            if plain == text.len() && !parts.is_empty() {
                return parts;
            }
        }
        parts.push(ContentPart::Text(text[plain..].to_owned()));
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(between: &BetweenSpec, text: &str) -> Vec<String> {
        let shown = |part: &ContentPart| match part {
            ContentPart::Chunk(text) => format!("[{text}]"),
            part => part.text().unwrap().to_owned(),
        };
        between.cut(text).iter().map(shown).collect()
    }

    fn between(end: Option<&str>) -> BetweenSpec {
        BetweenSpec { begin: "<doc".to_owned(), end: end.map(str::to_owned) }
    }

    #[test]
    fn documents_stand_between_lines() {
        let closed = between(Some("</doc"));
        let text = "See:\n<doc 1>\none\n\ntwo\n</doc>\n<doc 2>\nthree\n</doc>\nWhat?";
        let want = ["See:\n<doc 1>", "[one\n\ntwo]", "</doc>\n<doc 2>", "[three]", "</doc>\nWhat?"];
        assert_eq!(parts(&closed, text), want);
        // Nothing in it, never closed, not at a line's beginning.
        for none in ["<doc>\n</doc>", "<doc>\nnever", "a <doc>\nb\n</doc>", "<doc>", "", "</doc>\nx"] {
            assert_eq!(parts(&closed, none), [none]);
        }
        let open = between(None);
        assert_eq!(parts(&open, "<doc 1>\none\n<doc 2>\ntwo"), ["<doc 1>", "[one]", "<doc 2>", "[two]"]);
        assert_eq!(parts(&open, "<doc 1>\none\n"), ["<doc 1>", "[one\n]"]);
    }

    #[test]
    fn messages_of_a_role_are_documents() {
        let spec = ChunksSpec { roles: vec![Role::Tool], between: Some(between(Some("</doc"))) };
        let question = Message::text(Role::User, "<doc>\na\n</doc>");
        let tool = Message::text(Role::Tool, "<doc>\nall of it");
        let marked = spec.mark(&[question.clone(), tool]).unwrap();
        assert_eq!(marked[0].content[1], ContentPart::Chunk("a".to_owned()));
        assert_eq!(marked[1].content, [ContentPart::Chunk("<doc>\nall of it".to_owned())]);
        assert_eq!(marked[0].joined_text(), question.joined_text());
        assert_eq!(spec.mark(&marked), None, "they are marked");
        assert_eq!(spec.mark(&[Message::text(Role::User, "hello")]), None);
    }

    proptest! {
        #[test]
        fn the_text_stays_what_it_is(
            lines in prop::collection::vec(prop::sample::select(vec!["", "<doc>", "</doc>", "a", "é <doc>"]), 0..12),
            closed: bool,
        ) {
            let text = lines.join("\n");
            let cut = between(closed.then_some("</doc")).cut(&text);
            let message = Message { role: Role::User, content: cut };
            prop_assert_eq!(message.joined_text(), text);
            prop_assert!(message.content.iter().all(|part| !matches!(part, ContentPart::Chunk(t) if t.is_empty())));
        }
    }
}
