//! Curves of quality against cost, as a threshold moves: what escalating at random and escalating with perfect foresight
//! give at the same cost, and the area between.

use crate::replay::metrics::Point;

/// What the first stage and the last one give for one question. The last one's cost comes on top of the first one's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Both {
    pub first: Point,
    pub last: Point,
}

fn mean(of: impl Iterator<Item = Point>, n: usize) -> Point {
    let sum =
        of.fold(Point { cost: 0.0, score: 0.0 }, |s, p| Point { cost: s.cost + p.cost, score: s.score + p.score });
    Point { cost: sum.cost / n.max(1) as f64, score: sum.score / n.max(1) as f64 }
}

/// Nothing escalated, and everything: between them lies whoever escalates at random.
pub fn random(both: &[Both]) -> [Point; 2] {
    let always = both.iter().map(|b| Point { cost: b.first.cost + b.last.cost, score: b.last.score });
    [mean(both.iter().map(|b| b.first), both.len()), mean(always, both.len())]
}

/// Who knows both answers escalates first where it gains the most for its cost, and last where it loses.
pub fn oracle(both: &[Both]) -> Vec<Point> {
    let mut order: Vec<&Both> = both.iter().collect();
    let rate = |b: &Both| (b.last.score - b.first.score) / b.last.cost.max(f64::MIN_POSITIVE);
    order.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    let n = both.len().max(1) as f64;
    let [mut at, _] = random(both);
    let mut points = vec![at];
    for b in order {
        at = Point { cost: at.cost + b.last.cost / n, score: at.score + (b.last.score - b.first.score) / n };
        points.push(at);
    }
    points
}

/// The curve through points by rising cost; of points at the same cost, the mean. At one cost: linear between points.
pub fn at(points: &[Point], cost: f64) -> f64 {
    let after = points.iter().position(|p| p.cost >= cost);
    match after {
        None => points.last().map_or(0.0, |p| p.score),
        Some(0) => points[0].score,
        Some(n) => {
            let (a, b) = (points[n - 1], points[n]);
            a.score + (b.score - a.score) * (cost - a.cost) / (b.cost - a.cost)
        }
    }
}

/// Sorted by cost, points at the same cost made one.
pub fn sorted(mut points: Vec<Point>) -> Vec<Point> {
    points.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    let same = |a: &Point, b: &Point| (a.cost - b.cost).abs() <= 1e-9 * a.cost.abs();
    points.chunk_by(same).map(|group| mean(group.iter().copied(), group.len())).collect()
}

/// Area under the curve from one cost to another.
pub fn area(points: &[Point], from: f64, to: f64) -> f64 {
    let mut cuts: Vec<f64> = points.iter().map(|p| p.cost).filter(|c| *c > from && *c < to).collect();
    cuts.insert(0, from);
    cuts.push(to);
    cuts.windows(2).map(|w| 0.5 * (at(points, w[0]) + at(points, w[1])) * (w[1] - w[0])).sum()
}

/// Area between a curve and escalating at random, over that between foresight and escalating at random: 1 is foresight, 0 is
/// chance, and what is below 0 is worse. `None` where foresight gains nothing. The curve begins and ends where they do.
pub fn gain(both: &[Both], curve: &[Point]) -> Option<f64> {
    let ends = random(both);
    let (from, to) = (ends[0].cost, ends[1].cost);
    let curve = sorted(curve.iter().copied().chain(ends).collect());
    let chance = area(&ends, from, to);
    let most = area(&sorted(oracle(both)), from, to) - chance;
    (to > from && most > 1e-12).then(|| (area(&curve, from, to) - chance) / most)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(first: f64, last: f64) -> Both {
        Both { first: Point { cost: 1.0, score: first }, last: Point { cost: 10.0, score: last } }
    }

    fn p(cost: f64, score: f64) -> Point {
        Point { cost, score }
    }

    #[test]
    fn chance_and_foresight_on_paper() {
        // Right and right, wrong and right, right and wrong, wrong and wrong.
        let four = [both(1.0, 1.0), both(0.0, 1.0), both(1.0, 0.0), both(0.0, 0.0)];
        assert_eq!(random(&four), [p(1.0, 0.5), p(11.0, 0.5)]);
        let oracle = oracle(&four);
        assert_eq!(oracle, [p(1.0, 0.5), p(3.5, 0.75), p(6.0, 0.75), p(8.5, 0.75), p(11.0, 0.5)]);
        assert!((at(&oracle, 2.25) - 0.625).abs() < 1e-12 && at(&oracle, 0.0) == 0.5 && at(&oracle, 99.0) == 0.5);
        // Two trapezoids of 2.5 x 0.125 on average, and 5 x 0.25 between them, above chance.
        assert!((area(&oracle, 1.0, 11.0) - 5.0 - 1.875).abs() < 1e-12);
        assert!((gain(&four, &oracle).unwrap() - 1.0).abs() < 1e-12);
        assert!(gain(&four, &[]).unwrap().abs() < 1e-12);
        // Escalates what it should, and then the rest at random.
        let half = gain(&four, &[p(3.5, 0.75)]).unwrap();
        assert!((half - (0.25 * 10.0 / 2.0) / 1.875).abs() < 1e-12, "{half}");
        assert!(gain(&four, &[p(3.5, 0.25)]).unwrap() < 0.0);
        assert_eq!(gain(&[both(1.0, 1.0)], &[]), None);
    }

    #[test]
    fn points_at_the_same_cost_are_one() {
        assert_eq!(sorted(vec![p(2.0, 1.0), p(1.0, 0.0), p(2.0, 0.5)]), [p(1.0, 0.0), p(2.0, 0.75)]);
    }
}
