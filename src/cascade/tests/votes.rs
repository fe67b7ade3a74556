//! Counting, ties, early ends, disagreement and verdicts, by hand.

use crate::cascade::{
    Forms,
    vote::{Ballot, approves, count, decided, sigma, verdict},
};

fn forms(texts: &[&str]) -> Vec<u32> {
    let mut forms = Forms::default();
    texts.iter().map(|text| forms.number(text)).collect()
}

fn ballots(forms: &[u32], weights: &[f64]) -> Vec<Ballot> {
    forms.iter().zip(weights).map(|(form, weight)| Ballot { form: *form, weight: *weight }).collect()
}

#[test]
fn the_most_votes_win_and_forms_are_what_is_counted() {
    let forms = forms(&["7", "The answer is 42.", "42.0"]);
    let counted = count(&ballots(&forms, &[1.0; 3])).unwrap();
    assert_eq!((counted.winner, counted.distinct, counted.tie), (1, 2, false));
    assert_eq!(counted.share, 2.0 / 3.0);
    assert_eq!(count(&[]), None);
}

#[test]
fn among_equals_the_first_branch_wins() {
    let forms = forms(&["b", "a", "a", "b"]);
    let counted = count(&ballots(&forms, &[1.0; 4])).unwrap();
    assert_eq!((counted.winner, counted.distinct, counted.share, counted.tie), (0, 2, 0.5, true));
    // A later form that leads ends a tie between earlier ones.
    let three = self::forms(&["a", "b", "c", "c"]);
    assert!(!count(&ballots(&three, &[1.0; 4])).unwrap().tie);
    let none = count(&ballots(&three, &[0.0, f64::NAN, -1.0, f64::INFINITY])).unwrap();
    assert_eq!((none.winner, none.share, none.tie), (0, 0.0, true));
}

#[test]
fn weights_outvote_numbers() {
    let forms = forms(&["a", "b", "b"]);
    let counted = count(&ballots(&forms, &[3.0, 1.0, 1.0])).unwrap();
    assert_eq!((counted.winner, counted.share, counted.tie), (0, 0.6, false));
    assert_eq!(count(&ballots(&forms, &[2.0, 1.0, 1.5])).unwrap().winner, 1);
}

#[test]
fn a_vote_is_decided_when_nothing_outstanding_can_turn_it() {
    let two = forms(&["a", "a"]);
    assert!(decided(&ballots(&two, &[1.0, 1.0]), 1.0));
    assert!(!decided(&ballots(&two, &[1.0, 1.0]), 2.0), "a tie is still possible");
    let split = forms(&["a", "b", "a"]);
    assert!(!decided(&ballots(&split, &[1.0; 3]), 2.0));
    assert!(!decided(&ballots(&split, &[1.0; 3]), 1.0));
    assert!(decided(&ballots(&split, &[1.0; 3]), 0.5));
    assert!(!decided(&[], 0.0));
    assert!(decided(&ballots(&two[..1], &[5.0]), 2.0));
}

#[test]
fn sigma_is_acars() {
    assert_eq!([sigma(1, 3), sigma(2, 3), sigma(3, 3)], [Some(0.0), Some(0.5), Some(1.0)]);
    assert_eq!([sigma(1, 1), sigma(0, 0), sigma(2, 5)], [None, None, Some(0.25)]);
}

#[test]
fn a_verdict_names_one_answer() {
    for (text, named) in [
        ("2", Some(1)),
        ("**2**.", Some(1)),
        ("The best answer is 2. Answer 2 is complete.", Some(1)),
        ("Answer 3 (score 9.5 of 10)", Some(2)),
        ("Of answers 1 and 2 the second", None),
        ("0.2", None),
        ("4", None),
        ("A1", None),
        ("none", None),
    ] {
        assert_eq!(verdict(text, 3), named, "{text:?}");
    }
}

#[test]
fn a_verifying_call_says_yes_no_or_neither() {
    for (text, said) in [
        ("yes", Some(true)),
        (" Yes.", Some(true)),
        ("**No**", Some(false)),
        ("The answer is correct", Some(true)),
        ("incorrect", Some(false)),
        ("Not correct.", Some(false)),
        ("The answer is not entirely right.", Some(false)),
        ("That isn\u{2019}t true", Some(false)),
        ("It is not wrong", Some(true)),
        ("No, the correct answer is 7.", Some(false)),
        ("No. The right answer is 42", Some(false)),
        ("Yes, the answer is correct", Some(true)),
        ("The correct answer is 42.", None),
        ("It is right, or wrong", None),
        ("yes and no", None),
        ("", None),
        ("I know that it is 42", None),
        // What follows is no longer the answer to the question.
        ("yes\nIs the other right? no", Some(true)),
    ] {
        assert_eq!(approves(text), said, "{text:?}");
    }
}
