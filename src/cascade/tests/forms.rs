//! Canonical forms of answers, each as models write it.

use crate::cascade::canonical::{Form, form};

fn number(text: &str) -> Form {
    Form::Number(text.to_owned())
}

fn all(texts: &[&str], expected: &Form) {
    for text in texts {
        assert_eq!(form(text), *expected, "{text:?}");
    }
}

fn text(text: &str) -> Form {
    Form::Text(text.to_owned())
}

#[test]
fn numbers_are_exact_rationals() {
    all(
        &["42", " 42.", "42.0", "+42", "**42**", "$42$", "\\(42\\)", "4.2e1", "$42", "0042", "84/2", "(42)"],
        &number("42"),
    );
    all(&["-7", "−7", "- 7", "-7.00", "-14/2"], &number("-7"));
    all(&["0", "-0", "0.0", "0/5", "0%"], &number("0"));
    let million = number("1234567");
    all(&["1234567", "1,234,567", "1 234 567", "1'234'567", "1_234_567", "1.234.567"], &million);
    all(&["1\u{a0}234\u{a0}567", "$1,234,567.00", "€ 1.234.567,00"], &million);
    all(&["1,234.5", "1.234,5", "1234.50", "2469/2", "1,234.5."], &number("2469/2"));
    all(
        &["0.5", ".5", "1/2", "50%", "50 %", "50\\%", "\\frac{1}{2}", "$\\dfrac{2}{4}$", "5e-1", "2/4"],
        &number("1/2"),
    );
    all(&["1 1/2", "1.5", "3/2", "150%", "1\\frac{1}{2}"], &number("3/2"));
    all(&["1,000", "1e3", "1E3", "1000", "1.000,0"], &number("1000"));
    all(
        &["12345678901234567890123456789012345678901234567890"],
        &number("12345678901234567890123456789012345678901234567890"),
    );
}

#[test]
fn what_is_not_certainly_a_number_is_text() {
    for (answer, expected) in [
        ("42 km", "42 km"),
        ("1,5", "1,5"),
        ("12,34,567", "12,34,567"),
        ("1/0", "1/0"),
        ("1 000/3", "1 000/3"),
        ("0,123", "0,123"),
        ("1.2.3", "1.2.3"),
        ("1-2", "1-2"),
        ("ten", "ten"),
        ("1e999", "1e999"),
        ("%", "%"),
        ("", ""),
    ] {
        assert_eq!(form(answer), text(expected), "{answer:?}");
    }
    assert_ne!(form("50"), form("50%"));
    assert_ne!(form("1/3"), form("0.333"));
}

#[test]
fn choices_in_the_usual_phrasings() {
    all(
        &[
            "B",
            "b",
            "B.",
            "(B)",
            "[B]",
            "**B**",
            "B)",
            "B) Paris",
            "(B) Paris",
            "B. Paris",
            "B: Paris",
            "Option B",
            "option (b).",
            "Choice B",
            "Answer: B",
            "The answer is B.",
            "The correct answer is (B) Paris.",
            "The answer is: **B**",
            "**Answer:** B",
            "**Answer**: B",
            "Let me see.\nSo the answer is option B.",
            "Answer: B\nBecause Paris is the capital.",
            "The answer is B. Paris is the capital.",
            "\\boxed{B}",
            "$\\boxed{\\text{B}}$",
            "answer b",
        ],
        &Form::Choice('B'),
    );
    all(&["A dog", "a dog"], &text("a dog"));
    assert_eq!(form("E.g. this"), text("e.g. this"));
    assert_eq!(form("F"), text("f"));
    assert_eq!(form("B\nor not"), text("b or not"));
}

#[test]
fn a_marked_final_answer_counts_wherever_it_stands() {
    all(
        &[
            "First 40, then 2 more.\n#### 42",
            "40 + 2 = 42, so \\boxed{42}.",
            "The answer is 40? No. The answer is 42.",
            "The answer is 42. It follows from the above.",
            "**Final Answer:**\n42",
            "Answer: $42$",
            "```python\nprint(40 + 2)\n```\nThe answer is 42.",
        ],
        &number("42"),
    );
    all(
        &["We look it up.\nThe answer is Paris.", "Answer: paris", "\\boxed{Paris}", "Paris", "\"Paris.\""],
        &text("paris"),
    );
    assert_eq!(form("\\boxed{\\frac{1}{2}}"), number("1/2"));
    // Words in the middle of a text are not its answer.
    assert_eq!(form("The answer is long. See\nbelow"), text("the answer is long. see below"));
    assert_eq!(form("Answer:"), text("answer:"));
    assert_eq!(form("\\boxed{4"), text("\\boxed{4"));
}

#[test]
fn json_by_sorted_keys_and_normal_numbers() {
    let expected = Form::Json(r#"{"a":[1,0.5],"b":"x"}"#.to_owned());
    all(
        &[
            r#"{"a":[1,0.5],"b":"x"}"#,
            "{ \"b\": \"x\",\n  \"a\": [1.0, 5e-1] }",
            "```json\n{\"b\": \"x\", \"a\": [1, 0.50]}\n```",
            "Here it is:\n```\n{\"a\": [1, 0.5], \"b\": \"x\"}\n```\nDone.",
        ],
        &expected,
    );
    assert_ne!(form("[1,2]"), form("[2,1]"));
    assert_eq!(form(r#"{"note":"the answer is 5"}"#), Form::Json(r#"{"note":"the answer is 5"}"#.to_owned()));
    assert_eq!(form("{\"a\": 1"), text("{\"a\": 1"));
}

#[test]
fn code_by_normal_form() {
    let expected = Form::Code("def f(x):\n    return x  + 1".to_owned());
    all(
        &[
            "```python\ndef f(x):\n    return x  + 1\n```",
            "Sure!\n\n```\n\ndef f(x):   \n\n\treturn x  + 1\n\n```\nThis adds one.",
            "~~~py\r\n  def f(x):\r\n      return x  + 1\r\n~~~",
            "```python\ndef f(x):\n    return x  + 1",
        ],
        &expected,
    );
    // Two blocks are one program; a fence inside a longer fence is text.
    assert_eq!(form("```\na\n```\nand\n```\nb\n```"), Form::Code("a\nb".to_owned()));
    assert_eq!(form("````\n```\na\n````"), Form::Code("```\na".to_owned()));
    assert_ne!(form("```\na b\n```"), form("```\na  b\n```"));
}

#[test]
fn other_text_by_its_words() {
    all(&["Yes", " yes. ", "**Yes**", "YES", "\"yes\""], &text("yes"));
    all(&["New  York\nCity", "new york city."], &text("new york city"));
    assert_eq!(form("ÄRGER"), form("ärger"));
    assert_ne!(form("yes"), form("no"));
}
