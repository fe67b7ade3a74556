//! Off-policy estimates: what a target policy π would have earned, from a log of a policy p alone.
//!
//! A row is one logged decision at context x with arm a and reward r. It carries the weight w = π(a|x) / p(a|x), and where
//! there is a reward model q̂ its value for the arm that was taken, q̂(x, a), and under the target, Σₐ π(a|x) q̂(x, a).
//! Nothing more is needed: every estimator here is a mean over rows, or a ratio of two.
//!
//! | estimator | value | what must hold | source |
//! |---|---|---|---|
//! | replay | mean of r where a draw of π is a | p uniform over the arms | Li, Chu, Langford, Wang, WSDM 2011, theorem 1 |
//! | IPS | mean of w r | p(a\|x) exact, and above 0 wherever π is | Horvitz, Thompson, JASA 1952 |
//! | clipped IPS | mean of min(w, M) r | as IPS; biased towards 0 by what M cuts | Ionides, JCGS 2008 |
//! | SNIPS | Σ w r / Σ w | as IPS; bias of order 1/n | Swaminathan, Joachims, NeurIPS 2015 |
//! | DM | mean of Σₐ π q̂ | q̂ right | Dudík, Langford, Li, ICML 2011, section 2.1 |
//! | DR | mean of Σₐ π q̂ + w (r - q̂(x, a)) | p exact or q̂ right | the same, section 3 |
//! | switch-DR | DR where w ≤ τ, DM elsewhere | as DR; biased by q̂'s error where w > τ | Wang, Agarwal, Dudík, ICML 2017, section 4 |
//!
//! **Rewards that are missing.** Rows without a reward are left out of the means over rewards, and those with one count
//! 1/ρ, ρ being the share of observed rewards ([`Row::observed`]), so that an arm whose users answer less often is not
//! under-represented (inverse probability weighting; Little, Rubin, "Statistical analysis with missing data", 2002, section
//! 3.3). That is right where observation depends on nothing but what ρ was measured by (usually the arm), and wrong where
//! it depends on the reward itself: `eval/ope.md` shows by how much.
//!
//! **Intervals.** A bootstrap over sessions, whose rows are not independent (Davison, Hinkley, "Bootstrap methods and their
//! application", 1997, section 3.8), percentile; and for IPS the empirical Bernstein bound, which holds at every n
//! (Maurer, Pontil, COLT 2009, theorem 4), for rewards and weights within given ranges. Sessions are gathered in at most
//! [`BLOCKS`] blocks by a hash of their name, so memory does not grow with the log.

use serde::{Deserialize, Serialize};

use super::metrics::{SplitMix, middle};

/// Blocks of sessions that the bootstrap draws from.
pub const BLOCKS: usize = 4096;

/// One logged decision, as an estimator needs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Rows of one session are drawn together.
    pub session: u64,
    /// w = π(a|x) / p(a|x) of the arm that was taken.
    pub weight: f64,
    /// Absent where it was never observed.
    #[serde(default)]
    pub reward: Option<f64>,
    /// Probability ρ that the reward of such a row is observed, in (0, 1].
    #[serde(default = "certain")]
    pub observed: f64,
    /// q̂(x, a) of the arm that was taken; 0 without a model.
    #[serde(default)]
    pub model_taken: f64,
    /// Σₐ π(a|x) q̂(x, a); 0 without a model.
    #[serde(default)]
    pub model_target: f64,
}

impl Row {
    /// With a reward that is always observed, and without a model.
    pub fn plain(session: u64, weight: f64, reward: f64) -> Self {
        Self { session, weight, reward: Some(reward), observed: 1.0, model_taken: 0.0, model_target: 0.0 }
    }
}

fn certain() -> f64 {
    1.0
}

/// A session's number, by its name.
pub fn session(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    hash.as_bytes().first_chunk().map_or(0, |b: &[u8; 8]| u64::from_le_bytes(*b))
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Asked {
    /// M of clipped IPS.
    pub clip: f64,
    /// τ of switch-DR.
    pub switch: f64,
    /// The range of rewards, for the Bernstein bound.
    pub rewards: (f64, f64),
    /// The greatest weight that any arm could have had, for the same.
    pub max_weight: f64,
    /// 0: no bootstrap.
    pub resamples: usize,
    pub seed: u64,
    /// Share of intervals that are to hold, e.g. 0.95.
    pub confidence: f64,
}

impl Asked {
    /// Rewards may be anything, so there is no Bernstein bound.
    pub fn any_reward() -> Self {
        Self { rewards: (f64::MIN, f64::MAX), ..Self::default() }
    }
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            clip: 10.0,
            switch: 10.0,
            rewards: (0.0, 1.0),
            max_weight: f64::INFINITY,
            resamples: 2000,
            seed: 0x6f70_6531,
            confidence: 0.95,
        }
    }
}

/// An estimator, in the order of [`Estimates`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EstimatorKind {
    Ips,
    Clipped,
    Snips,
    Dm,
    Dr,
    SwitchDr,
}

/// A value with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    /// Bootstrap, percentile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
}

/// What a log says of a target policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimates {
    pub rows: u64,
    /// Rows with a reward.
    pub rewarded: u64,
    /// (Σ w)² / Σ w² over rewarded rows (Kish, "Survey sampling", 1965): how many rows of the target's own log they are
    /// worth.
    pub effective: f64,
    /// Mean weight over all rows; far below 1, the log hardly has what the target would do.
    pub overlap: f64,
    pub greatest_weight: f64,
    pub ips: Estimate,
    pub clipped: Estimate,
    pub snips: Estimate,
    pub dm: Estimate,
    pub dr: Estimate,
    pub switch_dr: Estimate,
    /// Bernstein interval of IPS; absent where no greatest weight is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bernstein: Option<(f64, f64)>,
}

/// Why nothing is estimated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EstimateError {
    #[error("row {row}: {what}")]
    Row { row: u64, what: String },
    #[error("no row has a reward: give feedback, or say a `reward:` whose parts were logged")]
    NoReward,
    #[error(
        "the target policy would have taken none of the rewarded arms: set `min_propensity` in the policy that serves, and \
         the next log can tell"
    )]
    NoOverlap,
}

/// Sums over the rows of a block, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sums {
    rows: f64,
    /// Σ w/ρ, Σ w r/ρ, Σ min(w, M) r/ρ over rewarded rows.
    weight: f64,
    ips: f64,
    clipped: f64,
    dm: f64,
    /// Corrections Σ w (r - q̂)/ρ, and those with w ≤ τ.
    correction: f64,
    switched: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.weight += other.weight;
        self.ips += other.ips;
        self.clipped += other.clipped;
        self.dm += other.dm;
        self.correction += other.correction;
        self.switched += other.switched;
    }

    /// IPS, clipped, SNIPS, DM, DR, switch-DR.
    fn values(&self) -> [f64; 6] {
        let mean = |sum: f64| sum / self.rows;
        [
            mean(self.ips),
            mean(self.clipped),
            self.ips / self.weight,
            mean(self.dm),
            mean(self.dm + self.correction),
            mean(self.dm + self.switched),
        ]
    }
}

/// Takes rows one by one; memory does not grow with their number. Same rows in the same order give the same bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Estimator {
    /// Not kept: [`Asked::any_reward`] when read again.
    #[serde(skip, default = "Asked::any_reward")]
    asked: Asked,
    blocks: Vec<Sums>,
    rows: u64,
    rewarded: u64,
    /// Over all rows, and over rewarded ones.
    weights: f64,
    rewarded_weights: f64,
    squares: f64,
    greatest: f64,
    /// Of the terms w r/ρ, 0 where there is no reward: mean and sum of squared deviations (Welford, 1962).
    mean: f64,
    deviations: f64,
    least_observed: f64,
}

impl Estimator {
    pub fn new(asked: Asked) -> Self {
        Self {
            asked,
            blocks: vec![Sums::default(); BLOCKS],
            rows: 0,
            rewarded: 0,
            weights: 0.0,
            rewarded_weights: 0.0,
            squares: 0.0,
            greatest: 0.0,
            mean: 0.0,
            deviations: 0.0,
            least_observed: 1.0,
        }
    }

    /// Takes a row.
    ///
    /// # Errors
    /// When a number is not finite, the weight is below 0, or the reward is outside of the range that was said; the row is
    /// not counted then. Rows are numbered from 1.
    pub fn take(&mut self, row: &Row) -> Result<(), EstimateError> {
        let wrong = |what: String| Err(EstimateError::Row { row: self.rows + 1, what });
        let Row { session, weight, reward, observed, model_taken, model_target } = *row;
        if !(weight.is_finite() && weight >= 0.0) {
            return wrong(format!("a weight of {weight}; the logged propensity must be above 0"));
        }
        if !(observed > 0.0 && observed <= 1.0) {
            return wrong(format!("`observed` is {observed}, a probability above 0 is expected"));
        }
        if !(model_taken.is_finite() && model_target.is_finite()) {
            return wrong("the model's value is not finite".to_owned());
        }
        let (low, high) = self.asked.rewards;
        if let Some(r) = reward.filter(|r| !(low..=high).contains(r)) {
            return wrong(format!("a reward of {r} is outside of {low}..{high}"));
        }
        // Mixed, so that sessions numbered in order fall anywhere.
        let block = SplitMix(session).below(BLOCKS);
        let sums = &mut self.blocks[block];
        sums.rows += 1.0;
        sums.dm += model_target;
        self.rows += 1;
        self.weights += weight;
        self.greatest = self.greatest.max(weight);
        let mut term = 0.0;
        if let Some(reward) = reward {
            let counted = weight / observed;
            term = counted * reward;
            sums.weight += counted;
            sums.ips += term;
            sums.clipped += weight.min(self.asked.clip) / observed * reward;
            let correction = counted * (reward - model_taken);
            sums.correction += correction;
            sums.switched += if weight <= self.asked.switch { correction } else { 0.0 };
            self.rewarded += 1;
            self.rewarded_weights += weight;
            self.squares += weight * weight;
            self.least_observed = self.least_observed.min(observed);
        }
        let delta = term - self.mean;
        self.mean += delta / self.rows as f64;
        self.deviations += delta * (term - self.mean);
        Ok(())
    }

    /// All estimates with their intervals.
    ///
    /// # Errors
    /// When no row has a reward, or the target would have taken none of the rewarded arms.
    pub fn finish(&self) -> Result<Estimates, EstimateError> {
        if self.rewarded == 0 {
            return Err(EstimateError::NoReward);
        }
        if self.rewarded_weights <= 0.0 {
            return Err(EstimateError::NoOverlap);
        }
        let mut all = Sums::default();
        self.blocks.iter().for_each(|b| all.add(b));
        let values = all.values();
        let intervals = self.intervals();
        let estimate = |i: usize| Estimate { value: values[i], interval: intervals.map(|of| of[i]) };
        Ok(Estimates {
            rows: self.rows,
            rewarded: self.rewarded,
            effective: self.rewarded_weights * self.rewarded_weights / self.squares,
            overlap: self.weights / self.rows as f64,
            greatest_weight: self.greatest,
            ips: estimate(0),
            clipped: estimate(1),
            snips: estimate(2),
            dm: estimate(3),
            dr: estimate(4),
            switch_dr: estimate(5),
            bernstein: self.bernstein(),
        })
    }

    /// What the estimates of this are above those of another over the same log, with percentile intervals of the differences:
    /// the same blocks of sessions are drawn for both, so what they have in common is not counted twice. In the order of
    /// [`Estimates`]; `None` where either has no estimate.
    pub fn less(&self, other: &Self, kind: EstimatorKind, confidence: f64) -> Option<Estimate> {
        let usable = |e: &Self| e.rewarded > 0 && e.rewarded_weights > 0.0;
        if !usable(self) || !usable(other) {
            return None;
        }
        let blocks: Vec<(&Sums, &Sums)> =
            self.blocks.iter().zip(&other.blocks).filter(|(a, b)| a.rows > 0.0 || b.rows > 0.0).collect();
        let of = |(a, b): (Sums, Sums)| a.values()[kind as usize] - b.values()[kind as usize];
        let mut sums = (Sums::default(), Sums::default());
        let add = |sums: &mut (Sums, Sums), (a, b): (&Sums, &Sums)| {
            sums.0.add(a);
            sums.1.add(b);
        };
        blocks.iter().for_each(|pair| add(&mut sums, *pair));
        let mut interval = None;
        if blocks.len() > 1 && self.asked.resamples > 0 {
            let mut rng = SplitMix(self.asked.seed);
            let mut draw = || {
                let mut sums = (Sums::default(), Sums::default());
                (0..blocks.len()).for_each(|_| add(&mut sums, blocks[rng.below(blocks.len())]));
                of(sums)
            };
            let drawn = (0..self.asked.resamples).map(|_| draw()).collect();
            interval = middle(drawn, confidence);
        }
        Some(Estimate { value: of(sums), interval })
    }

    /// Percentile intervals of the six, resampling blocks of sessions.
    fn intervals(&self) -> Option<[(f64, f64); 6]> {
        let blocks: Vec<&Sums> = self.blocks.iter().filter(|b| b.rows > 0.0).collect();
        if blocks.len() < 2 || self.asked.resamples == 0 {
            return None;
        }
        let mut rng = SplitMix(self.asked.seed);
        let mut drawn: [Vec<f64>; 6] = std::array::from_fn(|_| Vec::with_capacity(self.asked.resamples));
        for _ in 0..self.asked.resamples {
            let mut sums = Sums::default();
            for _ in 0..blocks.len() {
                sums.add(blocks[rng.below(blocks.len())]);
            }
            for (values, value) in drawn.iter_mut().zip(sums.values()) {
                values.push(value);
            }
        }
        Some(drawn.map(|values| middle(values, self.asked.confidence).unwrap_or((f64::NAN, f64::NAN))))
    }

    /// |mean - value| ≤ sqrt(2 V ln(2/δ) / n) + 7 R ln(2/δ) / (3 (n - 1)) on each side with δ half of what is left to
    /// chance; R is the range of w r/ρ, V its sample variance. Rows are taken as independent. Cut to the range of rewards,
    /// within which every policy's value lies.
    fn bernstein(&self) -> Option<(f64, f64)> {
        let (low, high) = self.asked.rewards;
        let weight = self.asked.max_weight / self.least_observed;
        if self.rows < 2 || !(weight * (high - low)).is_finite() {
            return None;
        }
        let n = self.rows as f64;
        let range = weight * (high.max(0.0) - low.min(0.0));
        let log = libm::log(4.0 / (1.0 - self.asked.confidence));
        let variance = self.deviations / (n - 1.0);
        let half = (2.0 * variance * log / n).sqrt() + 7.0 * range * log / (3.0 * (n - 1.0));
        Some(((self.mean - half).max(low), (self.mean + half).min(high)))
    }
}

/// All rows at once.
///
/// # Errors
/// As for [`Estimator::take`] and [`Estimator::finish`].
pub fn estimate<'a>(rows: impl IntoIterator<Item = &'a Row>, asked: Asked) -> Result<Estimates, EstimateError> {
    let mut estimator = Estimator::new(asked);
    rows.into_iter().try_for_each(|row| estimator.take(row))?;
    estimator.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(session: u64, weight: f64, reward: f64, taken: f64, target: f64) -> Row {
        Row { session, weight, reward: Some(reward), observed: 1.0, model_taken: taken, model_target: target }
    }

    #[test]
    fn they_are_the_formulas() {
        let rows = [row(1, 2.0, 1.0, 0.5, 0.6), row(2, 0.0, 0.3, 0.4, 0.7), row(3, 12.0, 0.5, 0.25, 0.5)];
        let e = estimate(&rows, Asked { max_weight: 12.0, ..Asked::default() }).unwrap();
        let close = |got: Estimate, want: f64| assert!((got.value - want).abs() < 1e-12, "{got:?} {want}");
        close(e.ips, (2.0 + 6.0) / 3.0);
        close(e.clipped, (2.0 + 5.0) / 3.0);
        close(e.snips, 8.0 / 14.0);
        close(e.dm, 1.8 / 3.0);
        close(e.dr, (1.8 + 1.0 + 3.0) / 3.0);
        close(e.switch_dr, (1.8 + 1.0) / 3.0);
        assert!((e.effective - 14.0 * 14.0 / 148.0).abs() < 1e-12);
        assert!((e.overlap - 14.0 / 3.0).abs() < 1e-12);
        // Three rows with such weights bound nothing.
        assert_eq!(e.bernstein, Some((0.0, 1.0)));
    }

    #[test]
    fn a_difference_is_paired() {
        let mut rng = SplitMix(11);
        let (mut a, mut b) = (Estimator::new(Asked::default()), Estimator::new(Asked::default()));
        for session in 0..500 {
            let reward = rng.unit();
            // Two policies that do nearly the same: what they share does not widen the difference.
            let taken = rng.below(2) as f64;
            a.take(&row(session, 1.0 + 0.1 * (taken - 0.5), reward, 0.0, 0.0)).unwrap();
            b.take(&row(session, 1.0 - 0.1 * (taken - 0.5), reward, 0.0, 0.0)).unwrap();
        }
        let (first, second) = (a.finish().unwrap(), b.finish().unwrap());
        let less = a.less(&b, EstimatorKind::Snips, 0.95).unwrap();
        assert!((less.value - (first.snips.value - second.snips.value)).abs() < 1e-12);
        let width = |e: Estimate| e.interval.map(|(low, high)| high - low).unwrap();
        assert!(width(less) < 0.5 * width(first.snips), "{less:?} {first:?}");
        assert!(
            (a.less(&b, EstimatorKind::Dr, 0.95).unwrap().value - (first.dr.value - second.dr.value)).abs() < 1e-12
        );
        assert_eq!(a.less(&a, EstimatorKind::Ips, 0.95).unwrap().interval, Some((0.0, 0.0)));
        assert_eq!(a.less(&Estimator::new(Asked::default()), EstimatorKind::Ips, 0.95), None);
    }

    #[test]
    fn what_cannot_be_estimated_is_refused() {
        let refused = |row: Row| estimate(&[row], Asked::default()).unwrap_err().to_string();
        let good = row(1, 1.0, 0.5, 0.0, 0.0);
        assert!(refused(Row { weight: f64::INFINITY, ..good.clone() }).starts_with("row 1: a weight of inf"));
        assert!(refused(Row { reward: Some(f64::NAN), ..good.clone() }).contains("a reward of NaN is outside of 0..1"));
        assert!(refused(Row { observed: 0.0, ..good.clone() }).contains("`observed` is 0"));
        assert!(refused(Row { model_taken: f64::NAN, ..good.clone() }).contains("not finite"));
        assert!(refused(Row { reward: None, ..good.clone() }).contains("no row has a reward"));
        assert!(refused(Row { weight: 0.0, ..good }).contains("min_propensity"));
    }

    proptest! {
        /// A constant reward is known exactly by the self-normalised estimate, and a model that is right leaves doubly
        /// robust nothing to correct; both whatever the weights.
        #[test]
        fn exact_where_nothing_is_unknown(weights in prop::collection::vec(0.01f64..30.0, 2..50), r in 0.0f64..1.0) {
            let rows: Vec<Row> = weights.iter().zip(0..).map(|(w, n)| row(n, *w, r, r, r)).collect();
            let e = estimate(&rows, Asked { resamples: 50, ..Asked::default() }).unwrap();
            for e in [e.snips, e.dm, e.dr, e.switch_dr] {
                prop_assert!((e.value - r).abs() < 1e-9);
                if let Some((low, high)) = e.interval {
                    prop_assert!((low - r).abs() < 1e-9 && (high - r).abs() < 1e-9);
                }
            }
        }

        /// With the target being the policy that logged, everything is the mean reward.
        #[test]
        fn on_policy_is_the_mean(rewards in prop::collection::vec(0.0f64..1.0, 2..80)) {
            let rows: Vec<Row> = rewards.iter().zip(0..).map(|(r, n)| row(n, 1.0, *r, 0.4, 0.4)).collect();
            let e = estimate(&rows, Asked { max_weight: 1.0, resamples: 100, ..Asked::default() }).unwrap();
            let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
            for e in [e.ips, e.clipped, e.snips, e.dr, e.switch_dr] {
                prop_assert!((e.value - mean).abs() < 1e-9);
            }
            prop_assert!((e.effective - rewards.len() as f64).abs() < 1e-6);
            let (low, high) = e.bernstein.unwrap();
            prop_assert!(low <= mean && mean <= high);
        }
    }
}
