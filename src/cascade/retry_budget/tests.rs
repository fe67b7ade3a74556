use proptest::prelude::*;

use super::*;

fn of(ratio: f64, min_per_s: u32) -> RetryBudget {
    RetryBudget::new(RetryBudgetPolicy { ratio, min_per_s }, 0)
}

/// All that is left.
fn drain(budget: &mut RetryBudget, now: Micros) -> u64 {
    std::iter::from_fn(|| budget.take(now).then_some(())).count() as u64
}

#[test]
fn calls_and_time_pay_for_retries_up_to_a_cap() {
    let mut budget = of(0.1, 2);
    assert_eq!((budget.left(), drain(&mut budget, 0)), (20, 20));
    (0..9).for_each(|_| budget.call(0));
    assert!(!budget.take(0), "nine tenths");
    budget.call(0);
    assert!(budget.take(0) && !budget.take(0));
    assert_eq!(drain(&mut budget, 2_500_000), 5, "two a second");
    assert!(!budget.take(2_999_999) && budget.take(3_000_000));
    assert_eq!(drain(&mut budget, 1), 0, "time does not go back");
    (0..1000).for_each(|_| budget.call(3_000_000));
    assert_eq!((budget.left(), drain(&mut budget, i64::MAX)), (20, 20));
}

#[test]
fn without_a_minimum_some_can_be_saved_all_the_same() {
    let mut budget = of(0.5, 0);
    assert_eq!(drain(&mut budget, 0), 10);
    (0..6).for_each(|_| budget.call(1_000_000_000));
    assert_eq!(drain(&mut budget, 2_000_000_000), 3);
}

#[test]
fn a_strange_ratio_is_clipped() {
    for (ratio, left) in [(f64::NAN, 0), (-1.0, 0), (f64::INFINITY, 1), (1.0, 1), (0.5, 0)] {
        let mut budget = of(ratio, 0);
        drain(&mut budget, 0);
        budget.call(0);
        assert_eq!(budget.left(), left, "{ratio}");
    }
}

proptest! {
    #[test]
    fn retries_are_bounded_by_calls_time_and_what_was_saved(
        thousandths in 0u32..=1000, min_per_s in 0u32..20,
        calls in prop::collection::vec((any::<bool>(), 0i64..200_000), 0..500),
    ) {
        let mut budget = of(f64::from(thousandths) / 1000.0, min_per_s);
        let cap = u64::from(min_per_s.max(1)) * 10;
        let (mut retries, mut made, mut now) = (0u64, 0u64, 0);
        for (call, wait) in calls {
            now += wait;
            match call {
                true => { budget.call(now); made += 1; }
                false => retries += u64::from(budget.take(now)),
            }
            let earned = u64::from(thousandths) * 1000 * made + u64::from(min_per_s) * now as u64;
            prop_assert!(retries * TOKEN <= cap * TOKEN + earned);
            prop_assert!(budget.left() <= cap);
            // Nothing is withheld either: what was earned and never reached the cap is there.
            if cap * TOKEN >= earned {
                prop_assert!(budget.left() + retries >= cap.min(earned / TOKEN));
            }
        }
    }
}
