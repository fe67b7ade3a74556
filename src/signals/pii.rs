//! Personal data found by pattern: mail addresses, phone numbers, payment cards, IBANs, US social security numbers.
//!
//! One pass over the whole text, without a cap: what is sent out must not depend on how far one looked. `@` starts a mail
//! address; every other kind starts at a group of ASCII digits, where patterns anchored there are tried on at most
//! [`REACH`] bytes; so the cost is linear whatever the text. What checks itself is checked (Luhn, ISO 7064 mod 97, the
//! issued ranges of SSNs), to keep false alarms rare. Digits of other scripts and names or street addresses are not found:
//! this is a net with known meshes, not a guarantee.

use std::sync::LazyLock;

use regex::Regex;

use crate::domain::PiiSignals;

/// Longest pattern in bytes: a card of 19 digits with a separator after each group, an IBAN of 34 in groups of four.
const REACH: usize = 48;

/// No personal number of a kind known here is shorter.
const MIN_DIGITS: usize = 7;

/// Groups as printed on cards (4-4-4-4 and longer, Amex 4-6-5, Diners 4-6-4), or 13 to 19 digits in one go. The first digit
/// of an issuer's number is 2 to 6, which keeps out the milliseconds since 1970.
static CARD: LazyLock<Regex> = LazyLock::new(|| {
    constant(
        r"^(?:[2-6]\d{3}(?:[ -]\d{4}){2}[ -]\d{1,4}(?:[ -]\d{1,3})?|[2-6]\d{3}[ -]\d{6}[ -]\d{4,5}|[2-6]\d{12,18})",
    )
});

/// ddd-dd-dddd, with hyphens or with spaces.
static SSN: LazyLock<Regex> = LazyLock::new(|| constant(r"^\d{3}(?:-\d{2}-|\x20\d{2}\x20)\d{4}"));

/// After `+` or `00`: country code and number, 8 to 15 digits (E.164), single separators.
static INTERNATIONAL: LazyLock<Regex> =
    LazyLock::new(|| constant(r"^(?:00)?[1-9](?:(?:[ .\-/]|\x20?\(|\)\x20?)?\d){7,14}"));

/// North America: area and exchange begin with 2 to 9, and something separates the groups.
static NORTH_AMERICAN: LazyLock<Regex> =
    LazyLock::new(|| constant(r"^(?:1[ .-]\(?)?[2-9]\d{2}(?:\)\x20?|[ .-])[2-9]\d{2}[ .-]\d{4}"));

/// With a trunk zero: an area code, then groups of two or more digits.
static NATIONAL: LazyLock<Regex> =
    LazyLock::new(|| constant(r"^0[1-9]\d{0,4}(?:\x20?/\x20?|\)\x20?|[ .-])\d{2,8}(?:[ .-]\d{2,4}){0,4}"));

/// 01.02.2024, 01-02-2024, 01/02/2024: no phone number.
static DATE: LazyLock<Regex> = LazyLock::new(|| constant(r"^\d{1,2}[./ -]\d{1,2}[./ -](?:19|20)\d{2}"));

fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern, compiled by the tests")
}

/// The length of `pattern`'s match at the beginning of `text`.
fn matched(pattern: &Regex, text: &str) -> Option<usize> {
    pattern.find(text).map(|found| found.end())
}

/// Adds what `text` holds to `found`.
pub(super) fn scan(text: &str, found: &mut PiiSignals) {
    mails(text, found);
    numbers(text, found);
}

fn mails(text: &str, found: &mut PiiSignals) {
    let bytes = text.as_bytes();
    for (at, _) in text.match_indices('@') {
        let local = bytes[..at].iter().rev().take(64).take_while(|b| is_local(**b)).count();
        let domain = &bytes[at + 1..bytes.len().min(at + 256)];
        let domain =
            &domain[..domain.iter().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-')).count()];
        // A full stop after the address belongs to the sentence.
        let domain = domain.strip_suffix(b".").unwrap_or(domain);
        let top = domain.iter().rev().take_while(|b| **b != b'.').count();
        let named = top < domain.len() && top >= 2 && domain.iter().rev().take(top).all(u8::is_ascii_alphabetic);
        if local > 0 && named && domain[0].is_ascii_alphanumeric() {
            found.email += 1;
            found.count += 1;
        }
    }
}

fn is_local(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'%' | b'+' | b'-')
}

enum Kind {
    Card,
    Iban,
    Ssn,
    Phone,
}

fn numbers(text: &str, found: &mut PiiSignals) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if !bytes[at].is_ascii_digit() {
            at += 1;
            continue;
        }
        if let Some((kind, end)) = number_at(text, at) {
            match kind {
                Kind::Card => found.card += 1,
                Kind::Iban => found.iban += 1,
                Kind::Ssn => found.ssn += 1,
                Kind::Phone => found.phone += 1,
            }
            found.count += 1;
            at = end;
        }
        // The rest of this group of digits starts nothing.
        while at < bytes.len() && bytes[at].is_ascii_digit() {
            at += 1;
        }
    }
}

/// What starts at the group of digits that starts at `at`, and where it ends.
fn number_at(text: &str, at: usize) -> Option<(Kind, usize)> {
    let bytes = text.as_bytes();
    let reach = text.floor_char_boundary(at + REACH);
    let digits = bytes[at..reach].iter().filter(|b| b.is_ascii_digit()).count();
    if digits < MIN_DIGITS {
        return None;
    }
    if let Some(end) = iban(bytes, at) {
        return Some((Kind::Iban, end));
    }
    let previous = bytes[..at].last().copied().unwrap_or(b' ');
    // Inside a name, a hash, or the fraction of a number.
    if previous.is_ascii_alphanumeric()
        || previous == b'_'
        || (previous == b'.' && at >= 2 && bytes[at - 2].is_ascii_digit())
    {
        return None;
    }
    let rest = &text[at..reach];
    let whole = |end: &usize| !continues(bytes, at + end);
    if let Some(end) = matched(&CARD, rest).filter(whole).filter(|end| luhn(&rest.as_bytes()[..*end])) {
        return Some((Kind::Card, at + end));
    }
    if let Some(end) = matched(&SSN, rest).filter(whole).filter(|_| issued_ssn(rest.as_bytes())) {
        return Some((Kind::Ssn, at + end));
    }
    // In the middle of a longer row of numbers, what looks like a phone number is a part of something else.
    let in_row = matches!(previous, b' ' | b'-' | b'.' | b'/') && at >= 2 && bytes[at - 2].is_ascii_digit();
    if in_row || matched(&DATE, rest).is_some() {
        return None;
    }
    let phone = if previous == b'+' || rest.starts_with("00") {
        matched(&INTERNATIONAL, rest)
    } else {
        matched(&NORTH_AMERICAN, rest)
            .or_else(|| matched(&NATIONAL, rest).filter(|end| digits_between(&rest[..*end], 9, 13)))
    };
    phone.filter(whole).map(|end| (Kind::Phone, at + end))
}

/// Whether the number goes on at `end`: with a digit, a letter, or a point and a digit.
fn continues(bytes: &[u8], end: usize) -> bool {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(b' ');
    byte(end).is_ascii_alphanumeric() || (byte(end) == b'.' && byte(end + 1).is_ascii_digit())
}

fn digits_between(text: &str, least: usize, most: usize) -> bool {
    (least..=most).contains(&text.bytes().filter(u8::is_ascii_digit).count())
}

/// ISO/IEC 7812-1: every second digit from the right doubled, digits of the products summed, a multiple of ten.
fn luhn(text: &[u8]) -> bool {
    let sum: u32 = text
        .iter()
        .rev()
        .filter(|b| b.is_ascii_digit())
        .enumerate()
        .map(|(index, b)| {
            let digit = u32::from(b - b'0');
            let doubled = if index % 2 == 1 { digit * 2 } else { digit };
            doubled / 10 + doubled % 10
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Area numbers 000, 666 and 900 to 999, group 00 and serial 0000 have never been issued.
fn issued_ssn(text: &[u8]) -> bool {
    let area = &text[..3];
    area != b"000" && area != b"666" && area[0] != b'9' && &text[4..6] != b"00" && &text[7..11] != b"0000"
}

/// Lengths by country (SWIFT's IBAN registry).
const IBAN_LENGTHS: &[(&[u8; 2], usize)] = &[
    (b"AD", 24),
    (b"AE", 23),
    (b"AL", 28),
    (b"AT", 20),
    (b"AZ", 28),
    (b"BA", 20),
    (b"BE", 16),
    (b"BG", 22),
    (b"BH", 22),
    (b"BR", 29),
    (b"BY", 28),
    (b"CH", 21),
    (b"CR", 22),
    (b"CY", 28),
    (b"CZ", 24),
    (b"DE", 22),
    (b"DK", 18),
    (b"DO", 28),
    (b"EE", 20),
    (b"EG", 29),
    (b"ES", 24),
    (b"FI", 18),
    (b"FO", 18),
    (b"FR", 27),
    (b"GB", 22),
    (b"GE", 22),
    (b"GI", 23),
    (b"GL", 18),
    (b"GR", 27),
    (b"GT", 28),
    (b"HR", 21),
    (b"HU", 28),
    (b"IE", 22),
    (b"IL", 23),
    (b"IQ", 23),
    (b"IS", 26),
    (b"IT", 27),
    (b"JO", 30),
    (b"KW", 30),
    (b"KZ", 20),
    (b"LB", 28),
    (b"LC", 32),
    (b"LI", 21),
    (b"LT", 20),
    (b"LU", 20),
    (b"LV", 21),
    (b"LY", 25),
    (b"MC", 27),
    (b"MD", 24),
    (b"ME", 22),
    (b"MK", 19),
    (b"MR", 27),
    (b"MT", 31),
    (b"MU", 30),
    (b"NL", 18),
    (b"NO", 15),
    (b"PK", 24),
    (b"PL", 28),
    (b"PS", 29),
    (b"PT", 25),
    (b"QA", 29),
    (b"RO", 24),
    (b"RS", 22),
    (b"SA", 24),
    (b"SC", 31),
    (b"SE", 24),
    (b"SI", 19),
    (b"SK", 24),
    (b"SM", 27),
    (b"ST", 25),
    (b"SV", 28),
    (b"TL", 23),
    (b"TN", 24),
    (b"TR", 26),
    (b"UA", 29),
    (b"VA", 22),
    (b"VG", 24),
    (b"XK", 20),
];

/// The end of the IBAN whose check digits start at `at`: two letters of a known country before them, that country's number
/// of letters and digits with single spaces between, and a remainder of 1 modulo 97 (ISO 13616).
fn iban(bytes: &[u8], at: usize) -> Option<usize> {
    let start = at.checked_sub(2)?;
    let before = start.checked_sub(1).map_or(b' ', |i| bytes[i]);
    if before.is_ascii_alphanumeric() || !bytes[start].is_ascii_alphabetic() || !bytes[start + 1].is_ascii_alphabetic()
    {
        return None;
    }
    let country = [bytes[start].to_ascii_uppercase(), bytes[start + 1].to_ascii_uppercase()];
    let length = IBAN_LENGTHS.iter().find(|(code, _)| **code == country)?.1;
    let mut symbols = [0_u8; 34];
    let (mut count, mut end) = (0, start);
    while count < length {
        let byte = *bytes.get(end)?;
        if byte.is_ascii_alphanumeric() {
            symbols[count] = byte.to_ascii_uppercase();
            count += 1;
        } else if byte != b' ' || bytes[end - 1] == b' ' {
            return None;
        }
        end += 1;
    }
    // The country and the check digits go to the end; letters count as 10 to 35.
    let remainder = symbols[4..length].iter().chain(&symbols[..4]).fold(0_u32, |r, b| match b {
        b'0'..=b'9' => (r * 10 + u32::from(b - b'0')) % 97,
        _ => (r * 100 + u32::from(b - b'A') + 10) % 97,
    });
    (remainder == 1 && !bytes.get(end).is_some_and(u8::is_ascii_alphanumeric)).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> PiiSignals {
        let mut found = PiiSignals::default();
        scan(text, &mut found);
        found
    }

    fn only(kind: &str, text: &str) {
        let f = of(text);
        let kinds = [("email", f.email), ("phone", f.phone), ("card", f.card), ("iban", f.iban), ("ssn", f.ssn)];
        for (name, count) in kinds {
            assert_eq!(count, u32::from(name == kind), "{name} in {text:?}");
        }
        assert_eq!(f.count, u32::from(!kind.is_empty()), "{text:?}");
    }

    #[test]
    fn each_kind_is_found_in_its_usual_forms() {
        for text in ["write to jane.doe+x@mail.example.co.uk.", "<a@b.io>", "Ünal: u@x.de"] {
            only("email", text);
        }
        for text in [
            "4111 1111 1111 1111",
            "card: 4111111111111111!",
            "5500-0000-0000-0004",
            "3782 822463 10005",
            "(6011000990139424)",
        ] {
            only("card", text);
        }
        for text in ["DE89 3704 0044 0532 0130 00", "gb29nwbk60161331926819", "IBAN:NO9386011117947."] {
            only("iban", text);
        }
        for text in ["123-45-6789", "my ssn is 078 05 1120,"] {
            only("ssn", text);
        }
        for text in [
            "+49 30 1234567",
            "+1 (415) 555-2671",
            "+14155552671",
            "call (415) 555-2671 now",
            "415-555-2671",
            "1-415-555-2671",
            "0049 30 1234567",
            "030 1234567",
            "(030) 1234567",
            "06 12 34 56 78",
            "020 7946 0958",
        ] {
            only("phone", text);
        }
    }

    #[test]
    fn what_only_looks_alike_is_not() {
        for text in [
            "4111 1111 1111 1112",
            "0.4111111111111111",
            "1763889600000",
            "DE88 3704 0044 0532 0130 00",
            "XX89 3704 0044 0532 0130 00",
            "000-12-3456",
            "123-00-4567",
            "987-65-4321",
            "2026-11-23",
            "01.02.2024 10",
            "01/02/2024",
            "192.168.100.200",
            "version 1.2.3",
            "550e8400-e29b-41d4-a716-446655440000",
            "order_4111111111111111",
            "me@localhost",
            "@mention and a@",
            "3.14159265358979",
            "1 000 000 000",
            "12345678901",
            "price: 100 200 3000",
            "",
        ] {
            only("", text);
        }
    }

    #[test]
    fn several_in_one_text_and_next_to_other_scripts() {
        let f = of("Я: ivan@почта.рф, ivan@mail.ru, +7 495 123-45-67, карта 4111 1111 1111 1111é и 4111111111111111");
        assert_eq!((f.email, f.phone, f.card), (1, 1, 2), "{f:?}");
        assert_eq!(f.count, 4);
    }

    #[test]
    fn found_however_far_into_the_text() {
        let text = format!("{}4111 1111 1111 1111", "lorem ipsum dolor ".repeat(10_000));
        only("card", &text);
    }
}
