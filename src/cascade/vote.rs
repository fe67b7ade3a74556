//! How several answers become one: counting votes over canonical forms, measuring how far they disagree, and reading what a
//! judge or a verifying call says.
//!
//! Majority voting over sampled answers: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language
//! Models", arXiv 2203.11171, section 2. The measure of disagreement is sigma of ACAR ("Adaptive Complexity and Attribution
//! Routing", arXiv 2602.21231): (distinct - 1) / (N - 1) over the N probes' answers, there for N = 3.
//!
//! Numerics: weights are added in the order of the ballots, in f64; the winner's share is one division. Nothing else is
//! rounded.

/// One answer's vote.
#[derive(Clone, Copy, Debug)]
pub struct Ballot {
    /// The number of the answer's form ([`crate::domain::Facts::form`]).
    pub form: u32,
    /// Finite and not negative; anything else counts nothing.
    pub weight: f64,
}

/// A counted vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Count {
    /// The first ballot of the winning form.
    pub winner: usize,
    /// Different forms.
    pub distinct: usize,
    /// The winning form's part of all weight, 0 to 1; 0 where there is no weight at all.
    pub share: f64,
    /// Whether another form has as much weight.
    pub tie: bool,
}

/// Counts ballots; `None` when there are none. The form with the most weight wins; **among forms with the same weight the
/// one whose first ballot comes first**, which with ballots in the order of a plan's branches is the branch that the
/// policy's author named first.
pub fn count(ballots: &[Ballot]) -> Option<Count> {
    let tally = tally(ballots);
    let mut best = *tally.first()?;
    let mut tie = false;
    for &(first, weight) in &tally[1..] {
        if weight > best.1 {
            (best, tie) = ((first, weight), false);
        } else if weight == best.1 {
            tie = true;
        }
    }
    let total: f64 = tally.iter().map(|(_, weight)| weight).sum();
    let share = if total > 0.0 { best.1 / total } else { 0.0 };
    Some(Count { winner: best.0, distinct: tally.len(), share, tie })
}

/// Whether the winning form can no longer change, however the ballots that are outstanding are cast: it leads every other
/// form, also one that nobody has given yet, by more than they weigh together. Which of its answers stands for the form
/// may still have changed.
pub fn decided(ballots: &[Ballot], outstanding: f64) -> bool {
    let mut weights: Vec<f64> = tally(ballots).into_iter().map(|(_, weight)| weight).collect();
    weights.sort_by(|a, b| b.total_cmp(a));
    match weights.first() {
        Some(best) => *best > weights.get(1).copied().unwrap_or(0.0) + outstanding,
        None => false,
    }
}

/// ACAR's sigma: 0 when all answers have one form, 1 when no two have. `None` for fewer than two answers, which can
/// neither agree nor disagree.
pub fn sigma(distinct: usize, answers: usize) -> Option<f64> {
    (answers >= 2).then(|| distinct.saturating_sub(1) as f64 / (answers - 1) as f64)
}

/// Per form, in the order of their first ballots, that ballot's index and the form's weight.
fn tally(ballots: &[Ballot]) -> Vec<(usize, f64)> {
    let mut tally: Vec<(usize, f64)> = Vec::new();
    for (i, ballot) in ballots.iter().enumerate() {
        let weight = if ballot.weight.is_finite() { ballot.weight.max(0.0) } else { 0.0 };
        match tally.iter_mut().find(|(first, _)| ballots[*first].form == ballot.form) {
            Some((_, sum)) => *sum += weight,
            None => tally.push((i, weight)),
        }
    }
    tally
}

/// Which of `answers` answers, numbered from 1, a judge's text names; from 0. `None` where it names none or more than one:
/// numbers outside the range and decimals are not counted, and a number may be named twice.
pub fn verdict(text: &str, answers: usize) -> Option<usize> {
    let mut named = None;
    for run in text.split(|c: char| !c.is_alphanumeric() && c != '.') {
        let number = run.trim_matches('.').parse::<usize>().ok();
        match number.filter(|n| (1..=answers).contains(n)) {
            Some(number) if named.is_none_or(|before| before == number) => named = Some(number),
            Some(_) => return None,
            None => {}
        }
    }
    named.map(|number| number - 1)
}

/// Whether a verifying call's text says that the answer is right, by its first line. Where the line begins with yes or no, that
/// holds, unless it says the other, too. Else words such as `correct` and `wrong` count, turned by a `not` up to three words before; what
/// "the correct answer" is says nothing of the answer that was shown. `None` where nothing is said, or both.
pub fn approves(text: &str) -> Option<bool> {
    let line = text.trim_start().lines().next().unwrap_or_default().to_lowercase().replace('\u{2019}', "'");
    let words: Vec<&str> = line
        .split(|c: char| !c.is_alphanumeric() && c != '\'')
        .map(|word| word.trim_matches('\''))
        .filter(|word| !word.is_empty())
        .collect();
    let plain = |word: &str| match word {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    };
    let agreed = |said: Vec<bool>| said.first().copied().filter(|first| said.iter().all(|other| other == first));
    if words.first().and_then(|word| plain(word)).is_some() {
        return agreed(words.iter().filter_map(|word| plain(word)).collect());
    }
    let says = |(place, word): (usize, &&str)| {
        let said = match *word {
            "right" | "correct" | "true" => true,
            "wrong" | "incorrect" | "false" => false,
            other => return plain(other),
        };
        if matches!(words.get(place + 1), Some(&("answer" | "one" | "answers" | "result" | "solution"))) {
            return None;
        }
        let before = &words[place.saturating_sub(3)..place];
        let turned = before.iter().any(|word| matches!(*word, "not" | "never" | "cannot") || word.ends_with("n't"));
        Some(said != turned)
    };
    agreed(words.iter().enumerate().filter_map(says).collect())
}
