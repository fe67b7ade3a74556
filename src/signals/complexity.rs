//! How hard a text is to read: 100 minus Flesch's reading ease, clipped to 0..=100 (GreenServ, arXiv 2601.17551, section 3).
//!
//! Reading ease = 206.835 − 1.015 · words/sentences − 84.6 · syllables/words (Flesch 1948). It is a formula for English;
//! for other languages it still orders texts by the length of their words and sentences.
//! - A word is a run of letters, digits and apostrophes that holds a letter or digit.
//! - A sentence ends at `.`, `!`, `?`, `。`, `！`, `？` or a line feed, and holds a word.
//! - Syllables are runs of vowels (a e i o u y and their accented forms, Cyrillic vowels); a final `e` after a consonant is
//!   silent unless in `-le`; at least one per word. Right for about nine English words in ten.

fn is_vowel(c: char) -> bool {
    matches!(
        c,
        'a' | 'e' | 'i' | 'o' | 'u' | 'y' | 'à'..='æ' | 'è'..='ï' | 'ò'..='ö' | 'ø'..='ý' | 'ÿ' | 'ā' | 'ē' | 'ī' | 'ō'
            | 'ū' | 'ą' | 'ę' | 'ě' | 'ő' | 'ű' | 'œ' | 'а' | 'е' | 'ё' | 'и' | 'о' | 'у' | 'ы' | 'э' | 'ю' | 'я' | 'і' | 'ї'
            | 'є'
    )
}

/// One lower-case letter; characters with longer lower-case forms keep the first.
fn lower(c: char) -> char {
    if c.is_ascii() { c.to_ascii_lowercase() } else { c.to_lowercase().next().unwrap_or(c) }
}

/// What has been seen of the word under way.
#[derive(Default)]
struct Word {
    syllables: u32,
    /// The last three characters, newest last.
    tail: [char; 3],
    length: u32,
}

impl Word {
    fn push(&mut self, c: char) {
        let c = lower(c);
        if is_vowel(c) && !is_vowel(self.tail[2]) {
            self.syllables += 1;
        }
        self.tail = [self.tail[1], self.tail[2], c];
        self.length += 1;
    }

    fn finish(self) -> u32 {
        let [before, last_but_one, last] = self.tail;
        // Of English words, that is: Größe has two.
        let silent = last == 'e'
            && last_but_one.is_ascii_alphabetic()
            && !is_vowel(last_but_one)
            && self.length > 2
            && !(last_but_one == 'l' && !is_vowel(before) && before != '\0');
        (self.syllables - u32::from(silent && self.syllables > 1)).max(1)
    }
}

/// The complexity of `text`, 0 (easy, or no words) to 100.
pub(super) fn of(text: &str) -> f64 {
    let (mut words, mut sentences, mut syllables) = (0_u32, 0_u32, 0_u32);
    let mut word = Word::default();
    let mut words_at_sentence = 0;
    let mut end_word = |word: &mut Word, words: &mut u32| {
        if word.length > 0 {
            syllables += std::mem::take(word).finish();
            *words += 1;
        }
    };
    for c in text.chars() {
        if c.is_alphanumeric() {
            word.push(c);
            continue;
        }
        if matches!(c, '\'' | '’') && word.length > 0 {
            continue;
        }
        end_word(&mut word, &mut words);
        if matches!(c, '.' | '!' | '?' | '\n' | '。' | '！' | '？') && words > words_at_sentence {
            sentences += 1;
            words_at_sentence = words;
        }
    }
    end_word(&mut word, &mut words);
    if words > words_at_sentence {
        sentences += 1;
    }
    if words == 0 {
        return 0.0;
    }
    let (words, sentences) = (f64::from(words), f64::from(sentences));
    let ease = 206.835 - 1.015 * (words / sentences) - 84.6 * (f64::from(syllables) / words);
    (100.0 - ease).clamp(0.0, 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syllables(word: &str) -> u32 {
        let mut w = Word::default();
        word.chars().for_each(|c| w.push(c));
        w.finish()
    }

    #[test]
    fn syllables_of_words() {
        for (word, expected) in [
            ("cat", 1),
            ("the", 1),
            ("make", 1),
            ("table", 2),
            ("apple", 2),
            ("whole", 1),
            ("reading", 2),
            ("syllable", 3),
            ("photosynthesis", 5),
            ("HTTP", 1),
            ("молоко", 3),
            ("größe", 2),
        ] {
            assert_eq!(syllables(word), expected, "{word}");
        }
    }

    #[test]
    fn flesch_by_hand() {
        // 6 words, 1 sentence, 6 syllables: ease 206.835 - 6.09 - 84.6 = 116.145, clipped.
        assert_eq!(of("The cat sat on the mat."), 0.0);
        // 5 words, 2 sentences, 7 syllables: 206.835 - 2.5375 - 118.44 = 85.8575.
        let measured = of("The river rises. Rain fell");
        assert!((measured - (100.0 - 85.8575)).abs() < 1e-9, "{measured}");
        assert_eq!(of(""), 0.0);
        assert_eq!(of("... !!! ---"), 0.0);
        assert_eq!(of("Internationalization necessitates interoperability considerations"), 100.0);
    }
}
