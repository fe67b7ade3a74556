use super::*;
use crate::domain::{ContentPart, Role};
use crate::engine::{model_file::TensorType, testing::tiny};

fn laboratory() -> Laboratory {
    let dir = tempfile::tempdir().unwrap();
    let path = tiny(TensorType::Q4_1, TensorType::Q8_0).write(dir.path());
    Laboratory::load(&path, &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap()
}

fn about(documents: &[&str], text: &str) -> Vec<Message> {
    let mut content: Vec<ContentPart> = documents.iter().map(|d| ContentPart::Chunk((*d).to_owned())).collect();
    content.push(ContentPart::Text(text.to_owned()));
    vec![Message { role: Role::User, content }]
}

const RIVER: &str = "The river rises in snow and runs north through lakes, to a salt sea.";
const BRIDGE: &str = "A keeper of the stone bridge wrote down each cart, flood and toll.";

#[test]
fn ways_of_reuse_differ_by_what_they_leave_out() {
    let mut laboratory = laboratory();
    // Short prompts: the model's context is.
    let mut reference = laboratory.reference(&about(&[RIVER, BRIDGE], "?"), 4).unwrap();
    let mut attempt = |name: &str| {
        let trial = laboratory.attempt(&mut reference, Variant::of_name(name).unwrap()).unwrap();
        (trial.divergence.iter().sum::<f64>() / trial.divergence.len() as f64, trial)
    };
    // All tokens computed again in a copy, and nothing at all: the same as reuse without any.
    let (whole, trial) = attempt("deviation-100");
    assert!(whole < 1e-6 && trial.agrees.iter().all(|same| *same), "{whole}");
    let (blended, none) = (attempt("deviation-0"), attempt("none"));
    assert!((blended.0 - none.0).abs() < 0.05 * none.0, "{} and {}", blended.0, none.0);
    assert_eq!(blended.1.computed, none.1.computed);
    assert!(none.0 > 1e-4, "{}", none.0);
    let first = attempt("first-32");
    // The second document is too short to be reused.
    assert!(first.0 < none.0, "{} and {}", first.0, none.0);
    assert_eq!(first.1.computed, none.1.computed + 32);
}

#[test]
fn behind_the_head_the_first_document_is_exact() {
    let mut laboratory = laboratory();
    let mut reference = laboratory.reference(&about(&[RIVER], "What rises?"), 8).unwrap();
    let trial = laboratory.attempt(&mut reference, Variant::of_name("head-0").unwrap()).unwrap();
    assert!(trial.divergence.iter().all(|d| *d == 0.0), "{:?}", trial.divergence);
    assert_eq!(trial.answer, laboratory.full_answer(&reference));
    assert!(trial.computed < reference.tokens() - 60);
    let none = laboratory.attempt(&mut reference, Variant::of_name("none").unwrap()).unwrap();
    assert!(none.divergence.iter().sum::<f64>() > 0.0);
}

#[test]
fn names_of_variants_are_read_as_they_are_written() {
    for name in ["none", "first-16", "anchor-0", "head-32", "deviation-15"] {
        assert_eq!(Variant::of_name(name).unwrap().name(), name);
    }
    for wrong in ["", "first-", "first-x", "deviation-101", "last-3"] {
        assert!(Variant::of_name(wrong).is_err(), "{wrong}");
    }
}
