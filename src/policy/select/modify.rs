//! What may follow any selector: steps that map a vector of probabilities to another, in this order: the tenant's
//! weights, the session's earlier turns, what feedback in the session said, and the cost of leaving the session's arm.
//! Arms that cannot serve have no probability before and after. The exploration floor comes after all of these.

use std::collections::BTreeMap;

use crate::domain::Context;

/// The steps of a policy; the default does nothing.
#[derive(Debug, Default)]
pub(in crate::policy) struct Modifiers {
    /// Per tenant, a factor per arm.
    pub tenants: BTreeMap<String, Vec<f64>>,
    /// Weight of the mean probabilities of the session's earlier turns, in [0, 1].
    pub mix: f64,
    /// Strength of the feedback that an arm got in this session: its odds are multiplied by exp(bias x sum).
    pub bias: f64,
    /// Least gain in score for which a session leaves its arm.
    pub switch_cost: f64,
}

impl Modifiers {
    /// `p` adds up to 1 over the arms that are `alive`, and is 0 elsewhere; so it is afterwards. The feature vector and the
    /// scores are not touched: what was recorded of the selector stays what the selector said.
    pub fn apply(&self, arms: &[String], alive: &[bool], scores: &[Option<f64>], context: &Context, p: &mut [f64]) {
        let session = &context.session;
        if let Some(weights) = self.tenants.get(&context.key.tenant) {
            reweigh(p, |i| weights[i]);
        }
        if self.mix > 0.0 && !session.shares.is_empty() {
            let mut earlier: Vec<f64> = (arms.iter().zip(alive))
                .map(|(arm, alive)| if *alive { session.shares.get(arm).copied().unwrap_or(0.0) } else { 0.0 })
                .collect();
            if normalise(&mut earlier) {
                for (p, e) in p.iter_mut().zip(&earlier) {
                    *p = (1.0 - self.mix) * *p + self.mix * e;
                }
            }
        }
        if self.bias > 0.0 && !session.judged.is_empty() {
            // Within what exp can hold, however much feedback there was.
            let odds = |i: usize| session.judged.get(&arms[i]).map_or(0.0, |sum| (self.bias * sum).clamp(-30.0, 30.0));
            reweigh(p, |i| libm::exp(odds(i)));
        }
        let last = arms.iter().position(|arm| *arm == session.last_arm).filter(|i| alive[*i]);
        if self.switch_cost > 0.0
            && let Some(last) = last
        {
            self.stay(last, scores, p);
        }
    }

    /// Moves to the session's arm the probability of every arm whose score is not higher by the switch cost. Without
    /// scores the cost is itself the share that stays.
    fn stay(&self, last: usize, scores: &[Option<f64>], p: &mut [f64]) {
        let mut staying = 0.0;
        for i in (0..p.len()).filter(|i| *i != last) {
            let share = match (scores[i], scores[last]) {
                (Some(score), Some(here)) if score - here >= self.switch_cost => 0.0,
                (Some(_), Some(_)) => 1.0,
                _ => self.switch_cost.min(1.0),
            };
            staying += share * p[i];
            p[i] *= 1.0 - share;
        }
        p[last] += staying;
    }
}

/// Multiplies by factors and normalises again; leaves `p` alone where nothing would be left.
fn reweigh(p: &mut [f64], factor: impl Fn(usize) -> f64) {
    let mut weighed: Vec<f64> = p.iter().enumerate().map(|(i, p)| p * factor(i)).collect();
    if normalise(&mut weighed) {
        p.copy_from_slice(&weighed);
    }
}

fn normalise(p: &mut [f64]) -> bool {
    let total: f64 = p.iter().sum();
    let possible = total > 0.0 && total.is_finite();
    if possible {
        p.iter_mut().for_each(|p| *p /= total);
    }
    possible
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arms(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("a{i}")).collect()
    }

    fn after(m: &Modifiers, scores: &[Option<f64>], context: &Context, mut p: Vec<f64>) -> Vec<f64> {
        m.apply(&arms(p.len()), &vec![true; p.len()], scores, context, &mut p);
        p
    }

    #[test]
    fn a_session_leaves_its_arm_only_for_enough() {
        let m = Modifiers { switch_cost: 0.1, ..Modifiers::default() };
        let mut c = Context::default();
        c.session.last_arm = "a0".into();
        assert_eq!(after(&m, &[Some(0.5), Some(0.55)], &c, vec![0.0, 1.0]), [1.0, 0.0]);
        assert_eq!(after(&m, &[Some(0.5), Some(0.65)], &c, vec![0.0, 1.0]), [0.0, 1.0]);
        assert_eq!(after(&m, &[None, None], &c, vec![0.5, 0.5]), [0.55, 0.45]);
        // A first turn, or an arm that is gone.
        c.session.last_arm = "gone".into();
        assert_eq!(after(&m, &[Some(0.5), Some(0.55)], &c, vec![0.0, 1.0]), [0.0, 1.0]);
    }

    #[test]
    fn earlier_turns_feedback_and_tenants_move_probability() {
        let mut c = Context::default();
        c.session.shares = BTreeMap::from([("a0".to_owned(), 1.0)]);
        let mix = Modifiers { mix: 0.25, ..Modifiers::default() };
        assert_eq!(after(&mix, &[None, None], &c, vec![0.0, 1.0]), [0.25, 0.75]);
        c.session.judged = BTreeMap::from([("a0".to_owned(), -0.5)]);
        let bias = Modifiers { bias: 2.0, ..Modifiers::default() };
        let p = after(&bias, &[None, None], &c, vec![0.5, 0.5]);
        assert!((p[0] - 1.0 / (1.0 + 1f64.exp())).abs() < 1e-12, "{p:?}");
        c.key.tenant = "acme".into();
        let tenants = BTreeMap::from([("acme".to_owned(), vec![0.0, 3.0])]);
        assert_eq!(after(&Modifiers { tenants, ..Modifiers::default() }, &[None; 2], &c, vec![0.5, 0.5]), [0.0, 1.0]);
    }

    proptest! {
        #[test]
        fn probabilities_stay_probabilities(
            raw in prop::collection::vec((0.0f64..1.0, prop::option::of(-1.0f64..1.0), any::<bool>(), 0.0f64..3.0), 1..6),
            (mix, bias, switch_cost) in (0.0f64..=1.0, 0.0f64..5.0, 0.0f64..2.0),
            (last, judged) in (0usize..6, -20.0f64..20.0),
        ) {
            let arms = arms(raw.len());
            let mut alive: Vec<bool> = raw.iter().map(|r| r.2).collect();
            alive[0] = true;
            let mut p: Vec<f64> = raw.iter().zip(&alive).map(|(r, alive)| if *alive { r.0 + 1e-3 } else { 0.0 }).collect();
            prop_assert!(normalise(&mut p));
            let scores: Vec<Option<f64>> = raw.iter().map(|r| r.1).collect();
            let mut c = Context::default();
            c.key.tenant = "t".into();
            c.session.last_arm = format!("a{last}");
            c.session.judged.insert("a0".into(), judged);
            c.session.shares = arms.iter().zip(&raw).map(|(a, r)| (a.clone(), r.3)).collect();
            let tenants = BTreeMap::from([("t".to_owned(), raw.iter().map(|r| r.3).collect::<Vec<f64>>())]);
            Modifiers { tenants, mix, bias, switch_cost }.apply(&arms, &alive, &scores, &c, &mut p);
            prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{p:?}");
            prop_assert!(p.iter().zip(&alive).all(|(p, alive)| *p >= 0.0 && (*alive || *p == 0.0)), "{p:?}");
        }
    }
}
