//! Every score against values computed by hand.

use crate::{
    cascade::gate,
    domain::{Score, Scored, TokenLogprob, TopLogprob, Unscored},
};

/// A token with this log-probability and these alternatives.
pub(super) fn token(logprob: f32, top: &[f32], entropy: Option<f32>) -> TokenLogprob {
    let top = top.iter().map(|l| TopLogprob { token: "t".into(), logprob: *l, bytes: vec![b't'] });
    TokenLogprob { token: "t".into(), logprob, bytes: vec![b't'], top: top.collect(), entropy }
}

fn near(scored: Result<Scored, Unscored>, value: f64, exact: bool) {
    let scored = scored.unwrap();
    assert!((scored.value - value).abs() < 1e-6, "{scored:?} is not {value}");
    assert_eq!(scored.exact, exact);
}

fn ln(p: f64) -> f32 {
    p.ln() as f32
}

#[test]
fn entropy_is_exact_where_a_token_carries_it() {
    let tokens = [token(-0.1, &[], Some(0.2)), token(-0.1, &[ln(0.5), ln(0.5)], Some(0.6))];
    near(gate::score(Score::MeanTokenEntropy, &tokens), 0.4, true);
    near(gate::score(Score::FirstTokenEntropy, &tokens), 0.2, true);
}

#[test]
fn entropy_of_listed_alternatives_is_renormalised_and_marked() {
    // 0.4, 0.4 renormalise to a half each: ln 2. 0.6, 0.2 to 3/4 and 1/4: -(3/4 ln 3/4 + 1/4 ln 1/4) = 0.5623351446.
    let even = token(-1.0, &[ln(0.4), ln(0.4)], None);
    let uneven = token(-1.0, &[ln(0.2), ln(0.6)], None);
    near(gate::first_token_entropy(std::slice::from_ref(&even)), std::f64::consts::LN_2, false);
    near(gate::first_token_entropy(std::slice::from_ref(&uneven)), 0.562_335_144_6, false);
    near(gate::mean_token_entropy(&[even.clone(), uneven.clone()]), 0.627_741_162_6, false);
    // One token without its own entropy makes the mean inexact.
    let own = token(-1.0, &[], Some(0.0));
    near(gate::mean_token_entropy(&[own, even.clone(), even]), 2.0 * std::f64::consts::LN_2 / 3.0, false);
    // Impossible alternatives have no weight; they are alternatives all the same.
    near(gate::first_token_entropy(&[token(0.0, &[0.0, f32::NEG_INFINITY], None)]), 0.0, false);
    near(gate::first_token_entropy(&[token(0.0, &[-0.0, -9999.0], None)]), 0.0, false);
    // Twenty equal ones: ln 20, the most there can be.
    near(gate::first_token_entropy(&[token(0.0, &[-5.0; 20], None)]), 2.995_732_273_6, false);
}

#[test]
fn the_margin_is_between_the_two_likeliest_wherever_they_stand() {
    let tokens = [token(-9.0, &[ln(0.1), ln(0.7), ln(0.2)], None), token(-9.0, &[ln(0.4), ln(0.4)], Some(1.0))];
    near(gate::score(Score::MeanMargin, &tokens), 0.25, true);
    near(gate::mean_margin(&[token(0.0, &[0.0, f32::NEG_INFINITY], None)]), 1.0, true);
    assert_eq!(gate::mean_margin(&[token(0.0, &[0.0], Some(0.0))]), Err(Unscored::NoAlternatives));
}

#[test]
fn the_log_probability_is_normalised_by_length() {
    let tokens = [token(-0.5, &[], None), token(-1.5, &[], None), token(-4.0, &[], None)];
    near(gate::score(Score::MeanLogprob, &tokens), -2.0, true);
}

#[test]
fn quantiles_lie_between_order_statistics() {
    let tokens = [-3.0, -0.5, -1.0, -2.0].map(|l| token(l, &[], None));
    // Sorted -3, -2, -1, -0.5; h = 3 q.
    for (q, value) in [(0.0, -3.0), (1.0, -0.5), (0.5, -1.5), (0.25, -2.25), (0.1, -2.7), (2.0 / 3.0, -1.0)] {
        near(gate::score(Score::LogprobQuantile(q), &tokens), value, true);
    }
    near(gate::logprob_quantile(&tokens[..1], 0.3), -3.0, true);
    let never = [token(f32::NEG_INFINITY, &[], None), token(-1.0, &[], None)];
    assert_eq!(gate::score(Score::LogprobQuantile(0.0), &never), Err(Unscored::NotFinite));
    near(gate::score(Score::LogprobQuantile(1.0), &never), -1.0, true);
    assert_eq!(gate::logprob_quantile(&[token(f32::NAN, &[], None)], 0.5), Err(Unscored::NotFinite));
}

#[test]
fn an_answer_that_lacks_what_a_score_needs_has_none() {
    let scores = [
        Score::MeanTokenEntropy,
        Score::FirstTokenEntropy,
        Score::MeanMargin,
        Score::MeanLogprob,
        Score::LogprobQuantile(0.5),
    ];
    for score in scores {
        assert_eq!(gate::score(score, &[]), Err(Unscored::NoLogprobs), "{score}");
    }
    let with = token(-1.0, &[-1.0, -2.0], None);
    for top in [&[][..], &[-1.0], &[-1.0, f32::NAN], &[f32::NEG_INFINITY; 2]] {
        let tokens = [with.clone(), token(-1.0, top, None)];
        assert_eq!(gate::mean_token_entropy(&tokens), Err(Unscored::NoAlternatives), "{top:?}");
        assert!(gate::first_token_entropy(&tokens).is_ok());
    }
    let infinite = [token(-1.0, &[], Some(f32::INFINITY))];
    assert_eq!(gate::score(Score::MeanTokenEntropy, &infinite), Err(Unscored::NotFinite));
    assert_eq!(gate::score(Score::Disagreement, &[with]), Err(Unscored::NoVote));
}

#[test]
fn a_learned_score_is_the_logistic_function_of_the_others() {
    use crate::domain::Scorer;
    let tokens = [token(-0.25, &[-0.25, -1.5], Some(0.75)), token(-0.5, &[-0.5, -1.0], Some(1.25))];
    let of = |score| gate::score(score, &tokens).unwrap().value;
    let mut scorer = Scorer { bias: 0.5, ..Scorer::default() };
    (scorer.weights[0], scorer.weights[3], scorer.weights[7]) = (-2.0, 1.0, 0.25);
    let z = 0.5 - 2.0 * of(Score::MeanTokenEntropy) + of(Score::MeanLogprob) + 0.25 * 3.0f64.ln();
    let scored = gate::score(Score::Learned(scorer), &tokens).unwrap();
    assert!((scored.value - 1.0 / (1.0 + (-z).exp())).abs() < 1e-12 && scored.exact);
    assert_eq!(gate::score(Score::Learned(scorer), &[]), Err(Unscored::NoLogprobs));
    let asked = crate::cascade::readings(&tokens, [Score::Learned(scorer)]);
    assert_eq!((asked.len(), asked[7].read), (8, Ok(scored)));
}
