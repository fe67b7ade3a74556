//! The language of a query as an ISO 639-1 code (639-3 where there is no two-letter code), or `und`.
//!
//! A chat query is often too short for letter trigrams to be sure of. So the frequent short words of eight languages vote
//! first, which is right more often on a handful of words and costs a few microseconds; what they leave open goes to
//! `whatlang`, whose answer counts only when the library itself calls it reliable and there are enough letters.

use std::{collections::HashMap, sync::LazyLock};

use whatlang::Lang;

/// Enough to tell a language; the cost of `whatlang` grows with the text.
const EXAMINED_BYTES: usize = 1024;

/// With fewer letters than this, trigrams are a guess.
const MIN_LETTERS: usize = 12;

/// Short words that are frequent in one of these languages and rare or unknown in the others.
const WORDS: &[(&str, &[&str])] = &[
    (
        "en",
        &[
            "the", "and", "is", "are", "what", "how", "why", "where", "who", "when", "of", "to", "with", "this",
            "that", "my", "your", "you", "please", "can", "does", "do", "write", "from", "for", "it", "which",
            "should", "would", "between", "about", "an", "have", "has", "not", "if", "be", "me",
        ],
    ),
    (
        "de",
        &[
            "der", "das", "und", "ist", "nicht", "ich", "wie", "wo", "warum", "ein", "eine", "einen", "mit", "für",
            "auf", "zu", "den", "dem", "sind", "bitte", "kann", "mir", "wer", "sie", "von", "über", "wird",
        ],
    ),
    (
        "fr",
        &[
            "le", "les", "des", "est", "et", "je", "vous", "pour", "dans", "qui", "quelle", "quel", "comment",
            "pourquoi", "avec", "sur", "mon", "une", "du", "où", "à", "sont", "ce", "cette", "moi", "suis",
        ],
    ),
    (
        "es",
        &[
            "el", "los", "las", "es", "qué", "cómo", "por", "para", "con", "mi", "una", "está", "dónde", "cuál", "del",
            "quién", "favor", "muy", "son", "pero", "hay", "cuándo", "yo",
        ],
    ),
    (
        "it",
        &[
            "il", "gli", "della", "di", "è", "che", "perché", "sono", "come", "dove", "quale", "per", "con", "mio",
            "questo", "qual", "nel", "alla", "chi", "anche", "più",
        ],
    ),
    (
        "pt",
        &[
            "os", "não", "é", "do", "da", "dos", "em", "uma", "você", "qual", "para", "com", "por", "meu", "são",
            "como", "onde", "isso", "ao", "mais", "quem", "um",
        ],
    ),
    (
        "ru",
        &[
            "что",
            "как",
            "какая",
            "какой",
            "какие",
            "почему",
            "где",
            "это",
            "мне",
            "сколько",
            "для",
            "или",
            "меня",
            "мой",
            "если",
            "нет",
            "когда",
            "кто",
            "вы",
            "я",
            "не",
            "на",
            "в",
            "и",
            "у",
            "с",
        ],
    ),
    (
        "nl",
        &[
            "het", "een", "van", "ik", "niet", "wat", "hoe", "waar", "zijn", "voor", "met", "op", "mijn", "naar",
            "wie", "dat", "aan", "waarom", "deze", "kun", "jij",
        ],
    ),
];

/// Of each listed word, the languages that list it: bit `i` stands for `WORDS[i]`. Only looked up, never iterated.
static LANGUAGES_OF: LazyLock<HashMap<&'static str, u16>> = LazyLock::new(|| {
    let mut languages = HashMap::new();
    for (index, (_, words)) in WORDS.iter().enumerate() {
        for word in *words {
            *languages.entry(*word).or_insert(0) |= 1 << index;
        }
    }
    languages
});

/// The language of `text`. Some 2 us where the short words tell, 100 us where trigrams must.
pub(super) fn detect(text: &str) -> &'static str {
    let text = &text[..text.floor_char_boundary(EXAMINED_BYTES)];
    if let Some(code) = by_words(text) {
        return code;
    }
    if text.chars().filter(|c| c.is_alphabetic()).take(MIN_LETTERS).count() < MIN_LETTERS && !has_own_script(text) {
        return "und";
    }
    match whatlang::detect(text) {
        Some(info) if info.is_reliable() => code(info.lang()),
        _ => "und",
    }
}

/// The language whose short words lead: at least two hits among the words and twice the hits of the next, or one hit among
/// at most four words and none elsewhere.
fn by_words(text: &str) -> Option<&'static str> {
    let mut hits = [0_u32; WORDS.len()];
    let mut words = 0_u32;
    let mut lower = String::new();
    for word in text.split(|c: char| !c.is_alphabetic()).filter(|w| !w.is_empty()).take(64) {
        words += 1;
        // The longest listed word has eight letters.
        if word.len() > 12 {
            continue;
        }
        lower.clear();
        lower.extend(word.chars().flat_map(char::to_lowercase));
        let languages = LANGUAGES_OF.get(lower.as_str()).copied().unwrap_or(0);
        for (index, hit) in hits.iter_mut().enumerate() {
            *hit += u32::from(languages >> index & 1);
        }
    }
    let (best, most) = hits.iter().enumerate().max_by_key(|(index, n)| (**n, std::cmp::Reverse(*index)))?;
    let second = hits.iter().enumerate().filter(|(index, _)| *index != best).map(|(_, n)| *n).max().unwrap_or(0);
    let sure = (*most >= 2 && *most >= 2 * second) || (*most == 1 && second == 0 && words <= 4);
    // Eight per cent of a long text is what quotations and names of another language reach.
    (sure && *most * 12 >= words).then(|| WORDS[best].0)
}

/// Scripts in which even a few characters tell the language.
fn has_own_script(text: &str) -> bool {
    text.chars().any(|c| {
        matches!(c, '\u{0e00}'..='\u{0e7f}' | '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}')
    })
}

fn code(lang: Lang) -> &'static str {
    match lang {
        Lang::Epo => "eo",
        Lang::Eng => "en",
        Lang::Rus => "ru",
        Lang::Cmn => "zh",
        Lang::Spa => "es",
        Lang::Por => "pt",
        Lang::Ita => "it",
        Lang::Ben => "bn",
        Lang::Fra => "fr",
        Lang::Deu => "de",
        Lang::Ukr => "uk",
        Lang::Kat => "ka",
        Lang::Ara => "ar",
        Lang::Hin => "hi",
        Lang::Jpn => "ja",
        Lang::Heb => "he",
        Lang::Yid => "yi",
        Lang::Pol => "pl",
        Lang::Amh => "am",
        Lang::Jav => "jv",
        Lang::Kor => "ko",
        Lang::Nob => "nb",
        Lang::Dan => "da",
        Lang::Swe => "sv",
        Lang::Fin => "fi",
        Lang::Tur => "tr",
        Lang::Nld => "nl",
        Lang::Hun => "hu",
        Lang::Ces => "cs",
        Lang::Ell => "el",
        Lang::Bul => "bg",
        Lang::Bel => "be",
        Lang::Mar => "mr",
        Lang::Kan => "kn",
        Lang::Ron => "ro",
        Lang::Slv => "sl",
        Lang::Hrv => "hr",
        Lang::Srp => "sr",
        Lang::Mkd => "mk",
        Lang::Lit => "lt",
        Lang::Lav => "lv",
        Lang::Est => "et",
        Lang::Tam => "ta",
        Lang::Vie => "vi",
        Lang::Urd => "ur",
        Lang::Tha => "th",
        Lang::Guj => "gu",
        Lang::Uzb => "uz",
        Lang::Pan => "pa",
        Lang::Aze => "az",
        Lang::Ind => "id",
        Lang::Tel => "te",
        Lang::Pes => "fa",
        Lang::Mal => "ml",
        Lang::Ori => "or",
        Lang::Mya => "my",
        Lang::Nep => "ne",
        Lang::Sin => "si",
        Lang::Khm => "km",
        Lang::Tuk => "tk",
        Lang::Aka => "ak",
        Lang::Zul => "zu",
        Lang::Sna => "sn",
        Lang::Afr => "af",
        Lang::Lat => "la",
        Lang::Slk => "sk",
        Lang::Cat => "ca",
        Lang::Tgl => "tl",
        Lang::Hye => "hy",
        Lang::Cym => "cy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn languages_of_queries() {
        for (text, expected) in [
            ("What is the capital of France?", "en"),
            ("Write a haiku about autumn", "en"),
            ("My card 4111 1111 1111 1111 was declined", "en"),
            ("Was ist die Hauptstadt von Frankreich?", "de"),
            ("Ich möchte mein Geld zurück", "de"),
            ("Quelle est la capitale de la France ?", "fr"),
            ("¿Cuál es la capital de Francia?", "es"),
            ("Qual è la capitale della Francia?", "it"),
            ("Qual é a capital da França? Não sei.", "pt"),
            ("Wat is de hoofdstad van Frankrijk?", "nl"),
            ("Какая столица у Франции и сколько там жителей?", "ru"),
            ("法国的首都是哪里？", "zh"),
            ("フランスの首都はどこですか？", "ja"),
            ("프랑스의 수도는 어디입니까?", "ko"),
            ("Jaka jest stolica Francji i ilu ma mieszkańców? Proszę o krótką odpowiedź.", "pl"),
        ] {
            assert_eq!(detect(text), expected, "{text}");
        }
    }

    #[test]
    fn too_little_is_undetermined() {
        for text in ["", "42", "ok", "x = y + z", "{}[]();", "\0\0\0", "🦀🦀🦀"] {
            assert_eq!(detect(text), "und", "{text:?}");
        }
    }
}
