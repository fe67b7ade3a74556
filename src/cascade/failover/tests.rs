//! The rules over cases, then laws over random candidates, graphs and failures.

use proptest::prelude::*;

use super::{
    shortest::{Graph, Path},
    *,
};

const NAMES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];
const ZERO: FailoverWeights = FailoverWeights { cost: 0.0, latency: 0.0, errors: 0.0, rate_limit: 0.0, order: 0.0 };

fn named(healths: &[Health]) -> Vec<Candidate> {
    NAMES.iter().zip(healths).map(|(name, health)| Candidate { name: (*name).to_owned(), health: *health }).collect()
}

fn of(healths: &[Health]) -> Failover {
    Failover::new(named(healths), FailoverWeights::default()).unwrap()
}

fn edge(after: Option<&str>, to: &str) -> Edge {
    Edge { after: after.map(str::to_owned), to: to.to_owned() }
}

fn seconds(s: i64) -> i64 {
    s * 1_000_000
}

/// Every hop, each failing, and the end.
fn walk(failover: &mut Failover, room: &Room) -> (Vec<usize>, NoPath) {
    let mut hops = Vec::new();
    loop {
        match failover.next(room) {
            Ok(hop) => {
                assert!(hops.len() < failover.candidates.len(), "it does not end");
                failover.fail(&hop.path[0].model, ErrorKind::ServerError);
                hops.push(hop.index);
            }
            Err(none) => return (hops, none),
        }
    }
}

#[test]
fn the_policys_order_stands_unless_a_model_is_much_worse_off() {
    let fine = Health::default();
    let slow = Health { latency_us: seconds(9), ..fine };
    assert_eq!(walk(&mut of(&[slow, fine, fine]), &Room::default()).0, [0, 1, 2]);
    let slower = Health { latency_us: seconds(11), ..fine };
    assert_eq!(walk(&mut of(&[slower, fine, fine]), &Room::default()).0, [1, 0, 2]);
    let failing = Health { reliability: 0.3, ..fine };
    assert_eq!(walk(&mut of(&[failing, fine, fine]), &Room::default()).0, [1, 0, 2]);
    let dear = Health { cost_usd: 0.3, ..fine };
    assert_eq!(walk(&mut of(&[dear, fine, fine]), &Room::default()).0, [1, 2, 0]);
}

#[test]
fn a_hop_says_what_makes_up_its_weight() {
    let scarce = Health { remaining: Some(0.05), reliability: 0.5, cost_usd: 0.02, ..Health::default() };
    let degraded = Health { latency_us: seconds(5), usual_us: seconds(1), ..Health::default() };
    let half_open = Health { availability: Availability::BreakerOpen { until: 5 }, ..Health::default() };
    let mut failover = of(&[scarce, degraded, half_open]);
    let room = Room { now: 5, ..Room::default() };
    let hop = failover.next(&room).unwrap();
    assert_eq!(
        hop.to_string(),
        "`b` (order 1.00 + cost 0.00 + latency 0.50 + rate limit 0.00 + errors 0.00 + slower than usual 0.40): weight 1.90"
    );
    let hop = failover.next(&room).unwrap();
    assert_eq!(
        hop.to_string(),
        "`a` (order 0.00 + cost 0.20 + latency 0.00 + rate limit 0.95 + errors 0.69 + rate limit scarce 1.00): weight 2.84"
    );
    assert_eq!(hop.passed_over, [Left { index: 1, model: "b".to_owned(), why: Why::UnderWay }]);
    let hop = failover.next(&room).unwrap();
    let (parts, added) = (&hop.path[0].parts, &hop.path[0].parts.added);
    assert_eq!((added.len(), added[0].by), (1, Monitor::Availability));
    assert_eq!((parts.call(), hop.weight), (2.0, 2.0 + std::f64::consts::LN_10));
    let json = serde_json::to_string(&hop).unwrap();
    assert_eq!(serde_json::from_str::<Hop>(&json).unwrap(), hop);
}

#[test]
fn no_path_says_why_of_each() {
    let fine = Health::default();
    let late = Health { latency_us: seconds(9), availability: Availability::Down, ..fine };
    let dear = Health { cost_usd: 0.5, retry_at: Some(seconds(900)), ..fine };
    let open = Health { availability: Availability::BreakerOpen { until: seconds(130) }, remaining: Some(0.0), ..fine };
    let limited = Health { retry_at: Some(seconds(112)), remaining: Some(0.0), ..fine };
    let used_up = Health { remaining: Some(0.0), ..fine };
    let unloaded = Health { availability: Availability::Unloaded, ..fine };
    let mut failover = of(&[fine, late, dear, open, limited, used_up, unloaded]);
    assert!(!failover.fail("small", ErrorKind::Timeout) && failover.fail("a", ErrorKind::ServerError));
    let room = Room { now: seconds(100), time_left: Some(seconds(4)), usd_left: Some(0.25) };
    let none = failover.next(&room).unwrap_err();
    assert_eq!(
        none.to_string(),
        concat!(
            "no model is left to fall back to: `small` failed (timeout); `a` failed (server_error); ",
            "`b` would take 9.0 s with 4.0 s left; `c` would cost 0.500000 USD with 0.250000 USD left; ",
            "`d` is left alone for 30.0 s more, as its calls kept failing; `e` is rate limited for 12.0 s more; ",
            "`f` has used up its rate limit; `g` is not loaded"
        )
    );
    let monitors: Vec<Option<Monitor>> = none.candidates.iter().map(|left| left.why.monitor()).collect();
    let [deadline, budget, availability, rate_limit, _] = Monitor::ALL.map(Some);
    assert_eq!(monitors, [None, deadline, budget, availability, rate_limit, rate_limit, availability]);
    // The wait is over: what was left of the limit before it no longer counts.
    assert_eq!(failover.next(&Room { now: seconds(112), ..room }).unwrap().index, 4);
    assert_eq!(of(&[]).next(&room).unwrap_err().to_string(), "no model is left to fall back to: the policy names none");
}

#[test]
fn news_count_from_the_next_hop_on() {
    let fine = Health::default();
    let mut failover = of(&[fine, fine, fine]);
    let down = Health { availability: Availability::Down, ..fine };
    assert!(failover.update("a", down) && !failover.update("z", down));
    assert_eq!(failover.next(&Room::default()).unwrap().index, 1);
    assert!(failover.update("a", fine) && failover.update("b", fine));
    assert_eq!(failover.next(&Room::default()).unwrap().index, 0, "b was given out");
    failover = failover.with_most(2);
    let none = failover.next(&Room::default()).unwrap_err();
    let whys: Vec<Why> = none.candidates.into_iter().map(|left| left.why).collect();
    assert_eq!(whys, [Why::UnderWay, Why::UnderWay, Why::HopsSpent { most: 2 }]);
}

#[test]
fn what_only_follows_another_waits_for_it_to_fail() {
    let fine = Health::default();
    let edges = [edge(None, "a"), edge(None, "b"), edge(Some("b"), "c")];
    let failover = of(&[Health { latency_us: seconds(30), ..fine }, fine, fine]).with_edges(&edges).unwrap();
    let mut asked = failover.clone();
    assert_eq!(asked.next(&Room::default()).unwrap().index, 1);
    assert_eq!(asked.next(&Room::default()).unwrap().index, 0, "b has not failed");
    let none = asked.next(&Room::default()).unwrap_err();
    assert_eq!(none.candidates[2].why, Why::OnlyAfter { models: vec!["b".to_owned()] });
    assert!(none.to_string().ends_with("`c` only follows a failure of `b`"));
    assert!(asked.fail("b", ErrorKind::Cut));
    assert_eq!(asked.next(&Room::default()).unwrap().index, 2);
    // One that cannot be called is passed without a call.
    let mut asked = failover;
    asked.update("b", Health { availability: Availability::Unloaded, ..fine });
    assert_eq!(asked.next(&Room::default()).unwrap().index, 2);
}

#[test]
fn a_path_may_count_on_a_cheap_one_failing() {
    let fine = Health::default();
    let cheap = Health { reliability: 0.05, ..fine };
    let dear = Health { cost_usd: 0.30, ..fine };
    let edges = [edge(None, "a"), edge(Some("a"), "b"), edge(None, "c")];
    let mut failover = of(&[cheap, fine, dear]).with_edges(&edges).unwrap();
    let hop = failover.next(&Room::default()).unwrap();
    // a answers at 3.00, a then b at 0 + 1, c at 2 + 3.
    assert_eq!((hop.index, hop.path.iter().map(|leg| leg.index).collect::<Vec<_>>()), (0, vec![0, 1]));
    assert_eq!(hop.weight, 1.0);
}

#[test]
fn what_an_author_got_wrong_is_refused_by_name() {
    let fine = [Health::default(); 3];
    for bad in [f64::NAN, -0.1, f64::INFINITY, 1e7] {
        let error = Failover::new(named(&fine), FailoverWeights { errors: bad, ..ZERO }).unwrap_err();
        assert!(error.kind() == "weight" && error.to_string().contains("`errors`"), "{error}");
    }
    let mut twice = named(&fine);
    twice[2].name = "a".to_owned();
    assert_eq!(Failover::new(twice, ZERO).unwrap_err(), FailoverError::Twice { name: "a".to_owned() });
    let many = (0..101).map(|i| Candidate { name: i.to_string(), health: fine[0] }).collect();
    assert_eq!(Failover::new(many, ZERO).unwrap_err(), FailoverError::TooMany { n: 101 });
    let wrong = |edges: &[Edge]| of(&fine).with_edges(edges).unwrap_err().kind();
    assert_eq!(wrong(&[edge(None, "z")]), "unknown");
    assert_eq!(wrong(&[edge(Some("z"), "a")]), "unknown");
    assert_eq!(wrong(&[edge(Some("a"), "a")]), "loop");
    assert_eq!(wrong(&[edge(None, "a"), edge(Some("b"), "c"), edge(Some("c"), "b")]), "unreachable");
}

#[test]
fn strange_measurements_count_as_the_worst_or_the_end_of_the_range() {
    let weight = |health: Health| of(&[health]).next(&Room::default()).map(|hop| hop.weight).map_err(|e| e.to_string());
    let fine = Health::default();
    for (strange, same) in [
        (Health { cost_usd: f64::NAN, ..fine }, Health { cost_usd: 10_000.0, ..fine }),
        (Health { cost_usd: f64::INFINITY, ..fine }, Health { cost_usd: 10_000.0, ..fine }),
        (Health { cost_usd: -1.0, ..fine }, fine),
        (Health { latency_us: i64::MIN, ..fine }, fine),
        (Health { latency_us: i64::MAX, ..fine }, Health { latency_us: seconds(86_400), ..fine }),
        (Health { reliability: f64::NAN, ..fine }, Health { reliability: 0.01, ..fine }),
        (Health { reliability: f64::NEG_INFINITY, ..fine }, Health { reliability: 0.01, ..fine }),
        (Health { reliability: 7.0, ..fine }, fine),
        (Health { remaining: Some(f64::NAN), ..fine }, Health { remaining: Some(0.0), ..fine }),
        (Health { remaining: Some(2.0), ..fine }, Health { remaining: Some(1.0), ..fine }),
    ] {
        assert_eq!(weight(strange), weight(same), "{strange:?}");
    }
    let room = |usd: f64| Room { usd_left: Some(usd), ..Room::default() };
    assert!(of(&[Health { cost_usd: f64::NAN, ..fine }]).next(&room(1e9)).is_err());
    assert!(of(&[Health { cost_usd: 0.1, ..fine }]).next(&room(f64::NAN)).is_err());
    let at_once = Room { time_left: Some(0), ..Room::default() };
    assert!(of(&[fine]).next(&at_once).is_err());
}

fn availability() -> impl Strategy<Value = Availability> {
    prop_oneof![
        5 => Just(Availability::Available),
        1 => Just(Availability::HalfOpen),
        1 => (0i64..200).prop_map(|until| Availability::BreakerOpen { until }),
        1 => Just(Availability::Unloaded),
        1 => Just(Availability::Down),
    ]
}

fn number(most: f64) -> impl Strategy<Value = f64> {
    prop_oneof![8 => 0.0..most, 2 => Just(0.0), 1 => any::<f64>()]
}

prop_compose! {
    fn health()(
        cost_usd in number(0.5),
        latency_us in prop_oneof![8 => 0i64..30_000_000, 1 => any::<i64>()],
        usual_us in 0i64..3_000_000,
        reliability in number(1.0),
        remaining in prop::option::of(number(1.0)),
        retry_at in prop_oneof![4 => Just(None), 1 => (0i64..200).prop_map(Some)],
        availability in availability(),
    ) -> Health {
        Health { cost_usd, latency_us, usual_us, reliability, remaining, retry_at, availability }
    }
}

prop_compose! {
    fn weights()(w in prop::array::uniform5(prop_oneof![1 => Just(0.0), 3 => 0.0..3.0f64])) -> FailoverWeights {
        FailoverWeights { cost: w[0], latency: w[1], errors: w[2], rate_limit: w[3], order: w[4] }
    }
}

prop_compose! {
    fn room()(
        now in 0i64..200,
        time_left in prop::option::of(0i64..60_000_000),
        usd_left in prop::option::of(number(1.0)),
    ) -> Room {
        Room { now, time_left, usd_left }
    }
}

/// Edges among `n`, as pairs of places; the first is the start's where it is `n` or more. Each is reached from the start.
fn edges(n: usize, pairs: &[(usize, usize)]) -> Vec<Edge> {
    let pair =
        |&(from, to): &(usize, usize)| (from < n && to < n && from != to).then(|| edge(Some(NAMES[from]), NAMES[to]));
    let mut edges: Vec<Edge> = pairs.iter().filter_map(pair).collect();
    edges.extend((0..n).filter(|to| *to == 0 || pairs.contains(&(n, *to))).map(|to| edge(None, NAMES[to])));
    edges.extend((1..n).map(|to| edge(Some(NAMES[to - 1]), NAMES[to])));
    edges
}

fn failover(healths: &[Health], weights: FailoverWeights, pairs: Option<&[(usize, usize)]>) -> Failover {
    let failover = Failover::new(named(healths), weights).unwrap();
    match pairs {
        None => failover,
        Some(pairs) => failover.with_edges(&edges(healths.len(), pairs)).unwrap(),
    }
}

fn pairs() -> impl Strategy<Value = Option<Vec<(usize, usize)>>> {
    prop::option::of(prop::collection::vec((0usize..8, 0usize..7), 0..20))
}

/// One that is worse, in one respect or several.
fn worse(health: Health, how: u8, by: f64) -> Health {
    let mut worse = health;
    if how & 1 > 0 {
        worse.cost_usd += by;
    }
    if how & 2 > 0 {
        worse.latency_us = worse.latency_us.saturating_add((by * 2e7) as i64);
    }
    if how & 4 > 0 {
        worse.reliability *= if worse.reliability > 0.0 { 1.0 - by } else { 1.0 };
    }
    if how & 8 > 0 {
        worse.remaining = Some(worse.remaining.map_or(1.0 - by, |left| left.min(1.0 - by)));
    }
    if how & 16 > 0 && worse.availability == Availability::Available {
        worse.availability = if by < 0.5 { Availability::HalfOpen } else { Availability::Down };
    }
    worse
}

/// All simple paths, the slow way.
fn all_paths(graph: &Graph<'_>, so_far: &Path, out: &mut Vec<Path>) {
    let at = *so_far.nodes.last().unwrap();
    out.push(Path { weight: so_far.weight + graph.answer[at], nodes: so_far.nodes.clone() });
    for next in (0..graph.call.len()).filter(|next| !so_far.nodes.contains(next) && (graph.edge)(at, *next)) {
        if let Some(weight) = graph.call[next] {
            let nodes = so_far.nodes.iter().copied().chain([next]).collect();
            all_paths(graph, &Path { weight: so_far.weight + weight, nodes }, out);
        }
    }
}

proptest! {
    /// Small whole weights, so that there are many ties and sums are exact.
    #[test]
    fn the_shortest_path_is_the_least_of_all(
        call in prop::collection::vec(prop::option::weighted(0.8, 0u8..5), 1..6),
        answer in prop::collection::vec(0u8..5, 6),
        first in prop::collection::vec(any::<bool>(), 6),
        edges in prop::collection::vec(any::<bool>(), 36),
    ) {
        let call: Vec<Option<f64>> = call.into_iter().map(|w| w.map(f64::from)).collect();
        let answer: Vec<f64> = answer.into_iter().map(f64::from).collect();
        let graph = Graph { call: &call, answer: &answer, first: &|i| first[i], edge: &|a, b| edges[a * 6 + b] };
        let mut all = Vec::new();
        for i in (0..call.len()).filter(|i| first[*i]) {
            if let Some(weight) = call[i] {
                all_paths(&graph, &Path { weight, nodes: vec![i] }, &mut all);
            }
        }
        let key = |p: &Path| (p.weight as u32, p.nodes.len(), p.nodes.clone());
        prop_assert_eq!(graph.shortest(), all.into_iter().min_by_key(key));
    }

    /// Whatever fails and whatever becomes known: nothing is given out twice, nor after it failed, nor vetoed; it ends; and what is left
    /// names each once.
    #[test]
    fn it_ends_and_accounts_for_each(
        healths in prop::collection::vec(health(), 0..8),
        weights in weights(),
        pairs in pairs(),
        most in 0usize..9,
        steps in prop::collection::vec((0usize..8, 0u8..4, health(), room()), 0..25),
    ) {
        let mut failover = failover(&healths, weights, pairs.as_deref().filter(|_| !healths.is_empty())).with_most(most);
        let (mut known, mut out, mut hops) = (healths.clone(), vec![false; healths.len()], 0);
        for (i, what, health, room) in steps {
            let name = NAMES.get(i).copied().unwrap_or("elsewhere");
            match what {
                0 => prop_assert_eq!(failover.fail(name, ErrorKind::Cut), i < out.len()),
                1 => prop_assert_eq!(failover.update(name, health), i < out.len()),
                _ => match failover.next(&room) {
                    Ok(hop) => {
                        hops += 1;
                        prop_assert!(!out[hop.index] && hops <= most.min(healths.len()));
                        prop_assert!(monitors::veto(&known[hop.index], &room).is_none());
                        prop_assert_eq!(hop.index, hop.path[0].index);
                        let legs = hop.path.iter().map(|leg| leg.parts.call()).sum::<f64>();
                        let whole = legs + hop.path.last().unwrap().parts.answer();
                        prop_assert!(hop.weight.is_finite() && (hop.weight - whole).abs() <= 1e-9 * whole.max(1.0));
                        prop_assert!(hop.passed_over.iter().all(|left| hop.path.iter().all(|leg| leg.index != left.index)));
                        out[hop.index] = true;
                    }
                    Err(none) => {
                        let places: Vec<usize> = none.candidates.iter().map(|left| left.index).collect();
                        prop_assert_eq!(places, (0..healths.len()).collect::<Vec<_>>());
                        for left in &none.candidates {
                            let given_out = matches!(left.why, Why::Failed { .. } | Why::UnderWay);
                            prop_assert_eq!(given_out, out[left.index]);
                            let named = none.to_string().contains(&format!("`{}` ", left.model));
 prop_assert!(named);
                        }
                    }
                },
            }
            match what {
                0 if i < out.len() => out[i] = true,
                1 if i < out.len() => known[i] = health,
                _ => {}
            }
        }
    }

    /// With each failing in turn, all that may be called are, and only those.
    #[test]
    fn nothing_that_may_be_called_is_left_out(
        healths in prop::collection::vec(health(), 1..8), weights in weights(), pairs in pairs(), room in room(),
    ) {
        let (mut hops, none) = walk(&mut failover(&healths, weights, pairs.as_deref()), &room);
        hops.sort_unstable();
        let may = |i: &usize| monitors::veto(&healths[*i], &room).is_none();
        prop_assert_eq!(hops, (0..healths.len()).filter(may).collect::<Vec<_>>());
        let untried = none.candidates.iter().any(|left| matches!(left.why, Why::OnlyAfter { .. } | Why::UnderWay));
        prop_assert!(!untried);
    }

    #[test]
    fn order_alone_is_the_policys_order(
        healths in prop::collection::vec(health(), 1..8), order in prop_oneof![Just(0.0), 1e-9..1e6f64], room in room(),
    ) {
        let weights = FailoverWeights { order, ..ZERO };
        let (hops, _) = walk(&mut failover(&healths, weights, None), &room);
        prop_assert!(hops.is_sorted(), "{:?}", hops);
    }

    /// Equals go by their place, whatever the weights.
    #[test]
    fn ties_go_to_the_first(health in health(), n in 1usize..8, weights in weights(), room in room()) {
        let (hops, _) = walk(&mut failover(&vec![health; n], weights, None), &room);
        prop_assert!(hops.is_empty() || hops == (0..n).collect::<Vec<_>>());
    }

    /// A model that got worse, alone, is not called sooner than before.
    #[test]
    fn worse_is_never_preferred(
        healths in prop::collection::vec(health(), 2..8), weights in weights(), room in room(),
        which in 0usize..8, how in 1u8..32, by in 0.0..1.0f64,
    ) {
        let which = which % healths.len();
        let mut other = healths.clone();
        other[which] = worse(healths[which], how, by);
        let place = |healths: &[Health]| {
            let (hops, _) = walk(&mut failover(healths, weights, None), &room);
            hops.iter().position(|i| *i == which).unwrap_or(usize::MAX)
        };
        prop_assert!(place(&other) >= place(&healths), "{:?}", (healths[which], other[which]));
    }

    /// The same with edges, for the first hop, where it could be called before. (One that is vetoed is passed without a call, so what
    /// follows it may then come sooner, but it may not.)
    #[test]
    fn worse_is_never_preferred_with_edges(
        healths in prop::collection::vec(health(), 2..8), weights in weights(), room in room(), pairs in pairs(),
        which in 0usize..8, how in 1u8..32, by in 0.0..1.0f64,
    ) {
        let which = which % healths.len();
        let mut other = healths.clone();
        other[which] = worse(healths[which], how, by);
        let first = |healths: &[Health]| {
            failover(healths, weights, pairs.as_deref()).next(&room).map(|hop| (hop.index, hop.weight)).ok()
        };
        if let (Some((before, _)), Some((after, weight))) = (first(&healths), first(&other)) && before != which && after == which {
            // Sums along paths are rounded, so that near ties may turn.
            let (_, rest) = first(&healths).unwrap();
            prop_assert!((weight - rest).abs() <= 1e-9 * weight.max(1.0), "{} {}", weight, rest);
        }
    }

    #[test]
    fn the_same_again_is_the_same(
        healths in prop::collection::vec(health(), 0..8), weights in weights(), room in room(),
    ) {
        let run = || walk(&mut failover(&healths, weights, None), &room);
        let (a, b) = (run(), run());
        prop_assert_eq!((a.0, a.1.to_string()), (b.0, b.1.to_string()));
    }
}
