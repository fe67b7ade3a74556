//! Numbers as people and models write them, as exact rationals.
//!
//! Read are: a sign; thousands separated in groups of three by a comma, an apostrophe, an underscore or a space (and by
//! points, where a decimal comma or a second group shows that they are none); a decimal part; an exponent; a fraction
//! `a/b`, `\frac{a}{b}` or mixed `1 1/2`; a percent sign, which divides by 100. A currency sign before the number, and
//! emphasis, math delimiters or a full stop around it, say nothing. A unit after it is none of the number's: then it is text.

use super::bare;

/// More digits than these are not made into a rational.
const DIGITS: usize = 36;

/// A rational in lowest terms, the denominator positive.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rational {
    above: i128,
    below: i128,
}

/// The canonical form of a text that is a number, and nothing else; else `None`.
pub(super) fn number(text: &str) -> Option<String> {
    let text = bare(text);
    let (negative, text) = match text.strip_prefix(['-', '−']) {
        Some(rest) => (true, rest.trim_start()),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let text = text.strip_prefix(['$', '€', '£', '¥']).unwrap_or(text).trim_start();
    let (percent, text) = match text.strip_suffix("\\%").or_else(|| text.strip_suffix('%')) {
        Some(rest) => (true, rest.trim_end()),
        None => (false, text),
    };
    if !text.starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == '\\') {
        return None;
    }
    let read = fraction(text).or_else(|| decimal(text));
    let read = if percent { read.and_then(|r| r.over(Rational { above: 100, below: 1 })) } else { read };
    match read {
        Some(Rational { above, below }) => {
            let above = if negative { -above } else { above };
            Some(if below == 1 { above.to_string() } else { format!("{above}/{below}") })
        }
        // A whole number that is too long to compute with is compared by its digits.
        None if !percent => {
            let digits = ungrouped(text)?;
            let whole = digits.chars().all(|c| c.is_ascii_digit()) && digits.len() > DIGITS;
            let digits = digits.trim_start_matches('0');
            whole.then(|| format!("{}{digits}", if negative { "-" } else { "" }))
        }
        None => None,
    }
}

/// `a/b`, `\frac{a}{b}`, or one of them after a whole number and a space.
fn fraction(text: &str) -> Option<Rational> {
    for command in ["\\frac{", "\\dfrac{", "\\tfrac{"] {
        if let Some(at) = text.find(command) {
            let (above, rest) = text[at + command.len()..].split_once("}{")?;
            let part = decimal(above.trim())?.over(decimal(rest.strip_suffix('}')?.trim())?)?;
            return mixed(text[..at].trim(), part);
        }
    }
    let (above, below) = text.split_once('/')?;
    let below = decimal(below.trim())?;
    let above = above.trim_end();
    match above.rsplit_once(' ') {
        // `1 1/2`; in `1 000/3` the space separates thousands, and what is meant is not certain.
        Some((whole, above)) if digits(whole) && digits(above) => {
            let part = decimal(above)?.over(below)?;
            if (1..part.below).contains(&part.above) { mixed(whole, part) } else { None }
        }
        _ => decimal(above)?.over(below),
    }
}

fn mixed(whole: &str, part: Rational) -> Option<Rational> {
    if whole.is_empty() {
        return Some(part);
    }
    let whole: i128 = digits(whole).then(|| whole.parse().ok())??;
    let above = whole.checked_mul(part.below)?.checked_add(part.above)?;
    Rational::of(above, part.below)
}

/// An unsigned decimal number with separators and an exponent.
fn decimal(text: &str) -> Option<Rational> {
    let text = ungrouped(text)?;
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text.as_str(), 0),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if (whole.is_empty() && part.is_empty()) || !digits_or_none(whole) || !digits_or_none(part) {
        return None;
    }
    if whole.len() + part.len() > DIGITS {
        return None;
    }
    let above: i128 = format!("{whole}{part}").parse().ok()?;
    let exponent = exponent.checked_sub(i32::try_from(part.len()).ok()?)?;
    let power = 10i128.checked_pow(exponent.unsigned_abs())?;
    match exponent >= 0 {
        true => Rational::of(above.checked_mul(power)?, 1),
        false => Rational::of(above, power),
    }
}

/// The number with its thousands' separators taken out and a point before its decimals. `None` where what looks like
/// separators does not make groups of three.
fn ungrouped(text: &str) -> Option<String> {
    let separator = |c: char| matches!(c, ',' | '\'' | '’' | '_' | ' ' | '\u{a0}' | '\u{202f}' | '\u{2009}');
    let points = text.matches('.').count();
    let commas = text.matches(',').count();
    // 1.234,5 and 1.234.567: the points separate thousands.
    let by_points = points > 1 || (points == 1 && commas == 1 && text.find('.') < text.find(','));
    let (whole, part) = match by_points {
        true => text.split_once(',').map_or((text, None), |(whole, part)| (whole, Some(part))),
        false => text.split_once('.').map_or((text, None), |(whole, part)| (whole, Some(part))),
    };
    let mut marks = whole.chars().filter(|c| if by_points { *c == '.' } else { separator(*c) });
    let whole = match marks.next() {
        None => whole.to_owned(),
        Some(mark) => {
            let mut groups = whole.split(mark);
            let first = groups.next()?;
            if !digits(first)
                || first.len() > 3
                || first.starts_with('0')
                || !groups.clone().all(|g| digits(g) && g.len() == 3)
            {
                return None;
            }
            groups.fold(first.to_owned(), |mut all, group| {
                all.push_str(group);
                all
            })
        }
    };
    Some(match part {
        Some(part) => format!("{whole}.{part}"),
        None => whole,
    })
}

fn digits(text: &str) -> bool {
    !text.is_empty() && digits_or_none(text)
}

fn digits_or_none(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit())
}

impl Rational {
    /// In lowest terms; `None` where the denominator is 0.
    fn of(above: i128, below: i128) -> Option<Self> {
        let (mut a, mut b) = (above.unsigned_abs(), below.unsigned_abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let shared = i128::try_from(a).ok().filter(|_| below > 0)?;
        (shared != 0).then(|| Self { above: above / shared, below: below / shared })
    }

    fn over(self, other: Self) -> Option<Self> {
        Self::of(self.above.checked_mul(other.below)?, self.below.checked_mul(other.above)?)
    }
}
