//! Learning: the fold against a direct solve, its order, forgetting, and that a bandit finds what is better.

use super::{
    super::{select::Selector, state::Ridge},
    *,
};

#[test]
fn the_fold_agrees_with_solving_directly() {
    let policy = build(&BANDIT.replace(", half_life: 7d", ""));
    let mut state = policy.initial_state();
    let mut seen: Vec<(Vec<f64>, f64)> = Vec::new();
    for n in 0..60u64 {
        let mut c = context(&policy, n);
        let vector = unit_vector(n);
        c.embedding = Some(Embedding { vector, embedder: embedder() });
        let Selector::Linear(l) = &policy.selector else { panic!("not linucb") };
        let x = l.features.vector(&c);
        let reward = draw::unit(n, 1, 1);
        policy.fold(&mut state, &update(&policy, n + 1, "small", x.clone(), reward, 5)).unwrap();
        seen.push((x, reward));
    }
    // Gauss-Jordan on the normal equations, apart from the code under test.
    let n = seen[0].0.len();
    let mut m = vec![vec![0.0; n + 1]; n];
    for (i, row) in m.iter_mut().enumerate() {
        row[i] = if i == 0 { 1.0 } else { 25.0 };
    }
    for (x, r) in &seen {
        for i in 0..n {
            for j in 0..n {
                m[i][j] += x[i] * x[j];
            }
            m[i][n] += r * x[i];
        }
    }
    for i in 0..n {
        let pivot = m[i][i];
        m[i].iter_mut().for_each(|v| *v /= pivot);
        for k in (0..n).filter(|k| *k != i) {
            let by = m[k][i];
            let row = m[i].clone();
            m[k].iter_mut().zip(&row).for_each(|(v, p)| *v -= by * p);
        }
    }
    let theta = &state.arms["small"].fit().unwrap().theta;
    for i in 0..n {
        assert!((theta[i] - m[i][n]).abs() < 1e-9, "{i}: {} {}", theta[i], m[i][n]);
    }
    assert_eq!(state.pulls()["small"], 60);
}

#[test]
fn updates_have_one_order_and_one_policy() {
    let policy = build(BANDIT);
    let mut state = policy.initial_state();
    let x = vec![0.5; policy.learner().unwrap().features.dimensions()];
    let good = update(&policy, 1, "small", x.clone(), 0.5, 10);
    policy.fold(&mut state, &good).unwrap();
    let before = state.clone();
    let wrong = [
        (update(&policy, 1, "small", x.clone(), 0.5, 10), "out_of_order"),
        (update(&policy, 3, "small", x.clone(), 0.5, 10), "out_of_order"),
        (update(&policy, 2, "other", x.clone(), 0.5, 10), "unknown_arm"),
        (update(&policy, 2, "small", vec![1.0], 0.5, 10), "features"),
        (update(&policy, 2, "small", x.clone(), f64::NAN, 10), "not_finite"),
        (StateUpdate { policy_hash: Hash::ZERO, ..update(&policy, 2, "small", x, 0.5, 10) }, "other_policy"),
    ];
    for (update, kind) in wrong {
        assert_eq!(policy.fold(&mut state, &update).unwrap_err().kind(), kind);
        assert_eq!(state, before, "{kind} must leave the state alone");
    }
}

#[test]
fn half_lives_count_from_decision_to_decision_of_any_arm() {
    let policy = build(BANDIT);
    let x = vec![1.0; policy.learner().unwrap().features.dimensions()];
    let week = 7 * 86_400_000_000i64;
    let mut state = policy.initial_state();
    policy.fold(&mut state, &update(&policy, 1, "small", x.clone(), 1.0, 100)).unwrap();
    policy.fold(&mut state, &update(&policy, 2, "large", x.clone(), 1.0, 100 + week)).unwrap();
    assert_eq!((state.arms["small"].b[0], state.arms["large"].b[0]), (0.5, 1.0));
    // What was decided a week before the newest counts half when it is learnt late.
    policy.fold(&mut state, &update(&policy, 3, "vault", x, 1.0, 100)).unwrap();
    assert_eq!((state.arms["small"].b[0], state.arms["vault"].b[0]), (0.5, 0.5));
}

/// Draws, rewards and folds `rounds` times; the share of each arm in the last fifth.
fn play(
    policy: &Policy,
    state: &mut State,
    rounds: u64,
    reward: impl Fn(&str, f64) -> Option<f64>,
) -> BTreeMap<String, f64> {
    let mut shares = BTreeMap::new();
    for n in 0..rounds {
        let mut c = Context { seed: draw::unit(n, 5, 5).to_bits(), ..Context::default() };
        c.signals.complexity = draw::unit(n, 6, 6) * 100.0;
        let d = policy.decide(state, &c);
        if n >= rounds - rounds / 5 {
            *shares.entry(d.arm.clone()).or_insert(0.0) += 5.0 / rounds as f64;
        }
        if let Some(r) = reward(&d.arm, c.signals.complexity) {
            let next = state.seq + 1;
            policy.fold(state, &update(policy, next, &d.arm, d.features, r, n as i64)).unwrap();
        }
    }
    shares
}

#[test]
fn a_bandit_finds_the_better_arm_per_context_and_cold_arms_are_tried() {
    let policy = build(PLAIN);
    let mut state = policy.initial_state();
    // `a` is good at what is easy, `b` at what is hard, `c` never.
    let better = |arm: &str, complexity: f64| {
        Some(match arm {
            "a" => 1.0 - complexity / 100.0,
            "b" => complexity / 100.0,
            _ => 0.1,
        })
    };
    play(&policy, &mut state, 1500, better);
    let easy =
        Context { signals: crate::domain::Signals { complexity: 5.0, ..Default::default() }, ..Default::default() };
    let hard =
        Context { signals: crate::domain::Signals { complexity: 95.0, ..Default::default() }, ..Default::default() };
    let p = |c: &Context, arm: usize| policy.decide(&state, c).candidates[arm].propensity;
    assert!(p(&easy, 0) > 0.9 && p(&hard, 1) > 0.9, "{} {}", p(&easy, 0), p(&hard, 1));
    assert!(state.pulls()["c"] >= 5, "{:?}", state.pulls());
}

#[test]
fn a_cold_arm_gets_its_fair_share_however_late_rewards_come() {
    let policy = build(PLAIN);
    let mut state = policy.initial_state();
    // Two arms are known to earn 0.9; the bound of the third begins at 0.1 * |x|, far below.
    for n in 0..20u64 {
        let arm = if n % 2 == 0 { "a" } else { "b" };
        policy.fold(&mut state, &update(&policy, n + 1, arm, vec![1.0, 0.5], 0.9, n as i64)).unwrap();
    }
    let d = policy.decide(&state, &Context::default());
    let cold = &d.candidates[2];
    assert!(cold.score.unwrap() < d.candidates[0].score.unwrap());
    assert!(cold.propensity > 0.32 && cold.propensity < 0.34, "{cold:?}");
    // Without any reward for it, it never gets more than that.
    let shares = play(&policy, &mut state, 3000, |_, _| None);
    assert!(shares["c"] > 0.25 && shares["c"] < 0.42, "{shares:?}");
}

#[test]
fn ties_go_to_the_first_arm() {
    let policy =
        build(&PLAIN.replace("min_pulls: 5", "min_pulls: 0").replace("min_propensity: 0.02", "min_propensity: 0"));
    let d = policy.decide(&policy.initial_state(), &Context::default());
    assert_eq!((d.arm.as_str(), d.propensity), ("a", 1.0));
}

#[test]
fn a_window_forgets_all_that_has_left_it() {
    let policy = build(&PLAIN.replace("min_pulls: 5", "min_pulls: 2, window: 4"));
    let mut state = policy.initial_state();
    let arms = ["a", "a", "b", "a", "b", "b", "c"];
    for (n, arm) in arms.iter().enumerate() {
        let x = vec![1.0, 0.1 * n as f64];
        let next = update(&policy, n as u64 + 1, arm, x, 0.3 + 0.1 * n as f64, n as i64);
        policy.fold(&mut state, &next).unwrap();
    }
    // What is left are the updates 4 to 7: one of `a`, two of `b`, one of `c`; nothing of the others, to the last bit.
    assert_eq!(state.pulls(), BTreeMap::from([("a", 1), ("b", 2), ("c", 1)]));
    let mut fresh = policy.initial_state();
    for (n, arm) in arms.iter().enumerate().skip(3) {
        let x = vec![1.0, 0.1 * n as f64];
        let seq = fresh.seq + 1;
        policy.fold(&mut fresh, &update(&policy, seq, arm, x, 0.3 + 0.1 * n as f64, n as i64)).unwrap();
    }
    assert_eq!(state.arms, fresh.arms);
    // An arm without enough pulls in the window is cold again, and gets its fair share.
    let d = policy.decide(&state, &Context::default());
    assert!(d.candidates[0].propensity > 0.3, "{:?}", d.candidates);
    let stored: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(stored, state);
}

#[test]
fn pacing_raises_its_price_until_the_dear_arm_is_left() {
    let paced = PLAIN.replace("min_pulls: 5", "min_pulls: 5, pacing: {usd_per_request: 0.002, step: 0.05}");
    let policy = build(&paced);
    let mut state = policy.initial_state();
    let (mut spent, rounds) = (0.0, 2000);
    for n in 0..rounds {
        let c = Context { seed: draw::unit(n, 5, 5).to_bits(), ..Context::default() };
        let d = policy.decide(&state, &c);
        // `b` earns a little more and costs ten times as much.
        let (reward, cost_usd) = match d.arm.as_str() {
            "a" => (0.7, 0.001),
            "b" => (0.8, 0.01),
            _ => (0.1, 0.001),
        };
        if n >= rounds / 2 {
            spent += cost_usd / (rounds as f64 / 2.0);
        }
        let next = update(&policy, state.seq + 1, &d.arm, d.features, reward, n as i64);
        policy.fold(&mut state, &StateUpdate { cost_usd, ..next }).unwrap();
    }
    assert!((0.001..0.0025).contains(&spent), "{spent}");
    assert!(state.price > 0.0);
    let stored: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(stored, state);
}

#[test]
fn every_bandit_finds_the_better_arm_per_context() {
    let better = |arm: &str, complexity: f64| {
        Some(match arm {
            "a" => 1.0 - complexity / 100.0,
            "b" => complexity / 100.0,
            _ => 0.1,
        })
    };
    for rule in ["thompson: {noise: 0.3}", "epsilon_greedy: {epsilon: 0.3, decay: 0.99}", "linucb: {window: 400}"] {
        let policy = build(&PLAIN.replace("linucb: {alpha: 0.1, ridge: 1, min_pulls: 5}", rule));
        let mut state = policy.initial_state();
        play(&policy, &mut state, 1500, better);
        let p = |complexity: f64, arm: usize| {
            let mut c = Context::default();
            c.signals.complexity = complexity;
            policy.decide(&state, &c).candidates[arm].propensity
        };
        assert!(p(5.0, 0) > 0.85 && p(95.0, 1) > 0.85, "{rule}: {} {}", p(5.0, 0), p(95.0, 1));
    }
}

/// An operator's update.
fn set(policy: &Policy, state: &State, given: &State) -> StateUpdate {
    StateUpdate {
        set: Some(Box::new(serde_json::to_value(given).unwrap())),
        ..update(policy, state.seq + 1, "", Vec::new(), 0.0, 9)
    }
}

#[test]
fn a_given_state_is_an_update_like_any_other() {
    let policy = build(PLAIN);
    let (mut state, taught) = (learnt(&policy, 20), learnt(&policy, 50));
    policy.fold(&mut state, &set(&policy, &learnt(&policy, 20), &taught)).unwrap();
    assert_eq!((state.seq, &state.arms), (21, &taught.arms));
    // Learning goes on, and forgetting is a state that was given, too.
    policy.fold(&mut state, &update(&policy, 22, "a", vec![1.0, 0.5], 1.0, 10)).unwrap();
    assert_eq!(state.pulls()["a"], taught.pulls()["a"] + 1);
    let reset = set(&policy, &state, &policy.initial_state());
    policy.fold(&mut state, &reset).unwrap();
    assert_eq!((state.seq, state.pulls().len()), (23, 0));
}

#[test]
fn a_state_is_carried_to_another_version_if_it_sees_the_same() {
    let policy = build(PLAIN);
    let taught = learnt(&policy, 50);
    let edited = build(&PLAIN.replace("alpha: 0.1, ridge: 1", "alpha: 0.4, ridge: 2"));
    let carried = edited.carry(&taught).unwrap();
    assert_eq!((carried.policy_hash, carried.seq), (edited.hash(), 0));
    assert_eq!(carried.pulls(), taught.pulls());
    // The coefficients are those of the new ridge.
    let mut fresh = taught.clone();
    (fresh.policy_hash, fresh.ridge, fresh.seq) = (edited.hash(), Ridge { constant: 2.0, features: 50.0 }, 0);
    let again: State = serde_json::from_slice(&serde_json::to_vec(&fresh).unwrap()).unwrap();
    assert_eq!(carried, again);
    let other = build(&PLAIN.replace("features: [complexity]", "features: [complexity, tokens]"));
    let refused = other.carry(&taught).unwrap_err().to_string();
    assert_eq!(refused, "the given state does not fit: it has 2 features, the policy 3");
    let mut state = other.initial_state();
    let bad = set(&other, &state, &taught);
    assert_eq!(other.fold(&mut state, &bad).unwrap_err().kind(), "given");
    assert_eq!(state, other.initial_state());
}

#[test]
fn the_constant_is_learnt_first() {
    let build = |ridge: &str| build(&PLAIN.replace("alpha: 0.1, ridge: 1", &format!("alpha: 0.1, {ridge}")));
    let theta = |policy: &Policy| {
        let mut state = policy.initial_state();
        for n in 1..=20 {
            let x = f64::from(u32::try_from(n % 2).unwrap());
            policy.fold(&mut state, &update(policy, n, "a", vec![1.0, x], x, 10)).unwrap();
        }
        state.arms["a"].fit().unwrap().theta.clone()
    };
    let (pooled, plain) = (theta(&build("ridge: 1")), theta(&build("ridge: 1, feature_ridge: 1")));
    // The reward is the feature. With one ridge for all that is all but learnt after twenty pulls; by default the arm still
    // behaves much as one without context, whose estimate would be the mean.
    assert!(plain[1] > 0.8 && plain[0] < 0.15, "{plain:?}");
    assert!(pooled[1] < 0.3 && (0.3..0.5).contains(&pooled[0]), "{pooled:?}");
}

#[test]
fn a_state_with_one_ridge_for_all_is_read() {
    let policy = build(PLAIN);
    let mut json = serde_json::to_value(learnt(&policy, 20)).unwrap();
    assert_eq!(json["ridge"], serde_json::json!({"constant": 1.0, "features": 25.0}));
    json["ridge"] = serde_json::json!(2.0);
    let state: State = serde_json::from_value(json).unwrap();
    assert_eq!(state.ridge, Ridge { constant: 2.0, features: 2.0 });
}
