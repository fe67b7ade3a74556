use super::*;

/// SplitMix64, for samples.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 11) as f64) / (1u64 << 53) as f64
    }
}

/// Answers whose scores are equally likely: place i of n has the score (i + 1) / n and is wrong with `risks[i]`. All
/// that can be asked of it is known exactly.
struct Population {
    name: &'static str,
    risks: Vec<f64>,
}

const CELLS: usize = 5000;

impl Population {
    /// As good as continuous.
    fn smooth(name: &'static str, risk: impl Fn(f64) -> f64) -> Self {
        Self { name, risks: (0..CELLS).map(|i| risk((i as f64 + 0.5) / CELLS as f64)).collect() }
    }

    fn score(&self, place: usize, direction: Direction) -> f64 {
        let low = (place + 1) as f64 / self.risks.len() as f64;
        if direction == Direction::LowIsSure { low } else { 1.0 - low }
    }

    fn sample(&self, n: usize, direction: Direction, seed: u64) -> Vec<Point> {
        let mut rng = Rng(seed);
        let mut draw = || {
            let place = (rng.unit() * self.risks.len() as f64) as usize;
            Point { score: self.score(place, direction), wrong: rng.unit() < self.risks[place] }
        };
        (0..n).map(|_| draw()).collect()
    }

    /// Coverage and rate of wrong answers of a gate in this population.
    fn gate(&self, threshold: f64, direction: Direction) -> (f64, f64) {
        let accepts = |place: &usize| direction.accepts(self.score(*place, direction), threshold);
        let accepted: Vec<usize> = (0..self.risks.len()).filter(accepts).collect();
        let risk: f64 = accepted.iter().map(|place| self.risks[*place]).sum();
        (accepted.len() as f64 / self.risks.len() as f64, risk / accepted.len().max(1) as f64)
    }

    /// Samples, of `samples`, whose guarantee is broken by the population itself, and mean coverage.
    fn certify(&self, n: usize, samples: u64, direction: Direction) -> (u64, f64) {
        let (mut broken, mut coverage) = (0, 0.0);
        for seed in 0..samples {
            let points = self.sample(n, direction, seed * 7_919 + n as u64);
            if let Some(found) = fit(direction, points).guaranteed(0.1, 0.95).unwrap() {
                let (covered, risk) = self.gate(found.threshold, direction);
                broken += u64::from(risk > 0.1 + 1e-12);
                coverage += covered / samples as f64;
            }
        }
        (broken, coverage)
    }
}

fn fit(direction: Direction, points: Vec<Point>) -> Calibration {
    Calibration::fit("mean_token_entropy", direction, vec!["small".into()], 0, points).unwrap()
}

fn populations() -> Vec<Population> {
    vec![
        Population::smooth("quadratic", |s| 0.6 * s * s),
        Population::smooth("linear", |s| 0.4 * s),
        Population::smooth("good", |s| 0.24 * s),
        Population::smooth("logistic", |s| 1.0 / (1.0 + libm::exp(-10.0 * (s - 0.7)))),
        Population::smooth("weak", |s| 0.04 + 0.16 * s),
        Population::smooth("steep", |s| 0.02 + 0.8 * s),
        Population::smooth("surest are wrong", |s| {
            if s < 0.1 {
                0.2
            } else if s < 0.6 {
                0.03
            } else {
                0.5
            }
        }),
        Population::smooth("waves", |s| if ((s * 8.0) as u32).is_multiple_of(2) { 0.02 } else { 0.22 }),
        Population::smooth("flat just above", |_| 0.105),
        Population::smooth("flat just below", |_| 0.095),
        Population::smooth("uninformative", |_| 0.2),
        Population::smooth("all wrong", |_| 1.0),
        Population::smooth("none wrong", |_| 0.0),
        Population { name: "four scores", risks: vec![0.02, 0.08, 0.19, 0.6] },
        Population { name: "four scores just above", risks: vec![0.101, 0.101, 0.101, 0.6] },
        Population { name: "one score", risks: vec![0.11] },
    ]
}

/// Of a hundred samples, five at most are expected to break it, with a standard deviation of 2.2.
#[test]
fn the_guarantee_holds_in_the_population() {
    for population in populations() {
        for (n, direction) in [(300, Direction::LowIsSure), (1000, Direction::HighIsSure)] {
            let (broken, _) = population.certify(n, 100, direction);
            assert!(broken <= 10, "{} of 100 at {n}: {}", broken, population.name);
        }
    }
}

/// A rate just above the bound everywhere is the hardest: whatever is certified breaks the guarantee.
#[test]
fn a_rate_just_above_the_bound_is_certified_no_more_often_than_allowed() {
    let population = Population { name: "", risks: vec![0.100_001; CELLS] };
    let (broken, _) = population.certify(400, 2000, Direction::LowIsSure);
    // 5 % are allowed; counts being whole, it is about 3 %, with a standard deviation of 8 samples.
    assert!(broken <= 100, "{broken} of 2000");
    assert!(broken >= 20, "{broken} of 2000: a test that rejects so rarely wastes its points");
}

#[test]
fn what_can_be_certified_is() {
    let of = |name| populations().into_iter().find(|p| p.name == name).unwrap();
    for (name, n, least) in [
        ("none wrong", 300, 0.95),
        ("quadratic", 500, 0.43),
        ("quadratic", 2000, 0.6),
        ("good", 1000, 0.53),
        ("surest are wrong", 1000, 0.45),
        ("four scores", 500, 0.4),
    ] {
        let (_, coverage) = of(name).certify(n, 60, Direction::LowIsSure);
        assert!(coverage > least, "{name} at {n}: {coverage}");
    }
    for name in ["all wrong", "uninformative", "one score"] {
        let (_, coverage) = of(name).certify(1000, 60, Direction::LowIsSure);
        assert!(coverage < 0.05, "{name}: {coverage}");
    }
}

#[test]
fn a_guarantee_tells_what_it_rests_on() {
    let calibration = fit(Direction::LowIsSure, populations()[0].sample(1000, Direction::LowIsSure, 5));
    let found = calibration.guaranteed(0.1, 0.95).unwrap().unwrap();
    assert_eq!((found.max_error, found.confidence, found.of), (0.1, 0.95, 800));
    assert_eq!(found.upper_bound, clopper_pearson_upper(found.wrong, found.accepted, 0.95));
    assert!(found.upper_bound <= 0.1);
    assert_eq!(found.coverage, found.accepted as f64 / 800.0);
    // More is asked, less is covered.
    let stricter = calibration.guaranteed(0.05, 0.95).unwrap().unwrap();
    let surer = calibration.guaranteed(0.1, 0.999).unwrap().unwrap();
    assert!(stricter.coverage < found.coverage && surer.coverage < found.coverage);
    for bad in [0.0, 1.0, -1.0, 2.0, f64::NAN] {
        let refused = |name, r: Result<_, CalibrationError>| match r {
            Err(CalibrationError::OutOfRange { name: n, .. }) => n == name,
            _ => false,
        };
        assert!(refused("max_error", calibration.guaranteed(bad, 0.95)), "{bad}");
        assert!(refused("confidence", calibration.guaranteed(0.1, bad)), "{bad}");
    }
}

#[test]
fn probabilities_are_near_those_of_the_population() {
    let population = &populations()[0];
    let calibration = fit(Direction::HighIsSure, population.sample(20_000, Direction::HighIsSure, 1));
    for s in [0.1, 0.3, 0.5, 0.7, 0.9] {
        let found = calibration.p_wrong(1.0 - s);
        assert!((found - 0.6 * s * s).abs() < 0.05, "{s}: {found}");
    }
    // Where 0.6 s^2 is 0.15.
    let threshold = calibration.threshold_at(0.15).unwrap();
    assert!((threshold - 0.5).abs() < 0.06, "{threshold}");
    assert_eq!(calibration.p_wrong(f64::NAN), 1.0);
    assert!(calibration.ece().after < 0.02 && calibration.ece().before > 0.2, "{:?}", calibration.ece());
}

#[test]
fn a_threshold_and_its_gate_agree_in_both_directions() {
    for direction in [Direction::LowIsSure, Direction::HighIsSure] {
        let calibration = fit(direction, populations()[1].sample(1000, direction, 3));
        for p in [0.02, 0.1, 0.25, 0.9] {
            let threshold = calibration.threshold_at(p).unwrap();
            let agree =
                |point: &Point| direction.accepts(point.score, threshold) == (calibration.p_wrong(point.score) <= p);
            assert!(calibration.points().iter().all(agree), "{direction:?} {p}");
        }
    }
    assert!(!Direction::LowIsSure.accepts(1.0, 1.0) && !Direction::HighIsSure.accepts(1.0, 1.0));
    assert!(Direction::LowIsSure.accepts(0.9, 1.0) && Direction::HighIsSure.accepts(1.1, 1.0));
    assert!(!Direction::LowIsSure.accepts(f64::NAN, 1.0) && !Direction::HighIsSure.accepts(f64::NAN, 1.0));
    let all_wrong = fit(Direction::LowIsSure, populations()[11].sample(200, Direction::LowIsSure, 3));
    assert_eq!(all_wrong.threshold_at(0.5), None);
}

#[test]
fn negated_scores_give_the_mirrored_calibration() {
    let points = populations()[0].sample(700, Direction::LowIsSure, 9);
    let negated = points.iter().map(|p| Point { score: -p.score, ..*p }).collect();
    let (low, high) = (fit(Direction::LowIsSure, points), fit(Direction::HighIsSure, negated));
    assert_eq!(low.ece(), high.ece());
    assert_eq!(low.threshold_at(0.2).map(|t| -t), high.threshold_at(0.2));
    let (a, b) = (low.guaranteed(0.1, 0.95).unwrap().unwrap(), high.guaranteed(0.1, 0.95).unwrap().unwrap());
    assert_eq!(Guarantee { threshold: -a.threshold, ..a }, b);
}

#[test]
fn the_order_of_points_and_models_does_not_matter() {
    let points = populations().pop().unwrap().sample(150, Direction::LowIsSure, 2);
    let points = [points, populations()[13].sample(300, Direction::LowIsSure, 2)].concat();
    let models = |names: [&str; 3]| names.map(String::from).to_vec();
    let fit =
        |points: Vec<Point>, names| Calibration::fit("x", Direction::LowIsSure, models(names), 3, points).unwrap();
    let first = serde_json::to_string(&fit(points.clone(), ["b", "a", "b"])).unwrap();
    let mut rng = Rng(8);
    for _ in 0..20 {
        let mut keyed: Vec<_> = points.iter().map(|p| (rng.unit(), *p)).collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        let shuffled = keyed.into_iter().map(|(_, p)| p).collect();
        assert_eq!(serde_json::to_string(&fit(shuffled, ["a", "b", "a"])).unwrap(), first);
    }
}

#[test]
fn zero_has_one_sign() {
    let points =
        |zero: f64| (0..200).map(move |i| Point { score: if i % 2 == 0 { zero } else { 1.0 }, wrong: i % 4 == 1 });
    for direction in [Direction::LowIsSure, Direction::HighIsSure] {
        assert_eq!(fit(direction, points(0.0).collect()), fit(direction, points(-0.0).collect()));
        let mixed = points(0.0).zip(points(-0.0)).enumerate().map(|(i, (a, b))| if i % 3 == 0 { a } else { b });
        assert_eq!(fit(direction, mixed.collect()), fit(direction, points(0.0).collect()));
    }
}

#[test]
fn too_few_points_and_scores_that_are_none_are_refused() {
    let points = |n: usize| (0..n).map(|i| Point { score: i as f64, wrong: false });
    let fit = |points: Vec<Point>| Calibration::fit("x", Direction::LowIsSure, Vec::new(), 0, points);
    assert_eq!(fit(points(199).collect()).unwrap_err(), CalibrationError::TooFew { found: 199, needed: 200 });
    assert!(fit(points(200).collect()).is_ok());
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 2e300] {
        let mut some: Vec<Point> = points(300).collect();
        some[17].score = bad;
        some[200].score = bad;
        assert_eq!(fit(some).unwrap_err(), CalibrationError::NotFinite { index: 17 });
    }
}

#[test]
fn what_is_written_is_read_and_what_was_edited_is_not() {
    let calibration = fit(Direction::HighIsSure, populations()[0].sample(400, Direction::HighIsSure, 6));
    let text = serde_json::to_string(&calibration).unwrap();
    let read: Calibration = serde_json::from_str(&text).unwrap();
    assert_eq!(read, calibration);
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
    assert_eq!(read.guaranteed(0.1, 0.95), calibration.guaranteed(0.1, 0.95));
    for (from, to, why) in [
        ("\"format\":1", "\"format\":2", "format 2"),
        ("\"wrong\":false", "\"wrong\":true", "its own points"),
        ("high_is_sure", "low_is_sure", "its own points"),
        ("\"seed\":0", "\"seed\":1", "its own points"),
        ("\"before\":0", "\"before\":1", "its own points"),
    ] {
        let edited = text.replacen(from, to, 1);
        assert_ne!(edited, text, "{from}");
        let error = serde_json::from_str::<Calibration>(&edited).unwrap_err().to_string();
        assert!(error.contains(why), "{from}: {error}");
    }
    // What nothing is computed from may be told otherwise.
    assert!(serde_json::from_str::<Calibration>(&text.replace("mean_token_entropy", "mean_margin")).is_ok());
}

#[test]
fn a_share_is_accepted_in_both_directions_and_equal_scores_stay_together() {
    for direction in [Direction::LowIsSure, Direction::HighIsSure] {
        let turn = |x: f64| if direction == Direction::LowIsSure { x } else { -x };
        // Ten points of each score.
        let points = (0..200u32).map(|i| Point { score: turn(f64::from(i / 10)), wrong: i.is_multiple_of(3) });
        let calibration = fit(direction, points.collect());
        for (share, accepted) in [(0.001, 10), (0.05, 10), (0.051, 20), (0.5, 100), (0.999, 200)] {
            let threshold = calibration.threshold_accepting(share).unwrap();
            let passed = calibration.points().iter().filter(|point| direction.accepts(point.score, threshold)).count();
            assert_eq!(passed, accepted, "{direction:?} {share}");
        }
        assert!(calibration.threshold_accepting(1.0).is_err());
    }
}
