//! What is asked of budgets: one call, or what a plan of several begins with.

use super::spent::Used;
use crate::domain::{MicroUsd, Plan, Spend};

/// What bounds are in. The order in which they are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Usd,
    Tokens,
    Calls,
    Seconds,
}

impl Unit {
    const ALL: [Self; 4] = [Self::Usd, Self::Tokens, Self::Calls, Self::Seconds];

    pub(super) fn of(self, used: &Used) -> f64 {
        match self {
            Self::Usd => used.usd,
            Self::Tokens => used.tokens,
            Self::Calls => used.calls,
            Self::Seconds => used.seconds,
        }
    }

    /// The same with no other bound.
    fn alone(self, left: &Used) -> Used {
        let bound = |unit: Self, x: f64| if unit == self { x } else { f64::INFINITY };
        Used {
            usd: bound(Self::Usd, left.usd),
            tokens: bound(Self::Tokens, left.tokens),
            calls: bound(Self::Calls, left.calls),
            seconds: bound(Self::Seconds, left.seconds),
        }
    }
}

/// The least time in which anything can be begun: what clocks tell apart.
const INSTANT: f64 = 1e-6;

/// What is to be begun.
#[derive(Debug)]
pub(super) enum Ask<'a> {
    Call(Used),
    /// With the most that each call may use, in the order of [`Plan::calls`].
    Tree(&'a Plan, Vec<Spend>),
}

impl Ask<'_> {
    /// One call of at most so much.
    pub(super) fn call(usd: f64, tokens: u64) -> Self {
        Self::Call(Used { usd, tokens: tokens as f64, calls: 1.0, seconds: INSTANT })
    }

    /// The first unit of which too little is left.
    pub(super) fn lacks(&self, left: &Used) -> Option<Unit> {
        Unit::ALL.into_iter().find(|unit| !self.fits(&unit.alone(left)))
    }

    /// Whether it can be begun with what is left. What is free is within any bound.
    pub(super) fn fits(&self, left: &Used) -> bool {
        match self {
            Self::Call(need) => {
                Unit::ALL.into_iter().all(|unit| unit.of(need) <= 0.0 || unit.of(need) <= unit.of(left))
            }
            Self::Tree(plan, calls) => {
                left.seconds >= INSTANT && begins(plan, &mut Room::of(left), &mut calls.iter().copied())
            }
        }
    }
}

/// What is left of bounds, in the whole numbers of the machine; what is not bounded is more than any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    usd: MicroUsd,
    tokens: u64,
    calls: u64,
}

impl Room {
    fn of(left: &Used) -> Self {
        Self { usd: micros_down(left.usd), tokens: left.tokens as u64, calls: left.calls as u64 }
    }

    /// Without what these calls may use; `None` where that is more than there is.
    fn without(self, calls: &[Spend]) -> Option<Self> {
        let worst = calls.iter().fold(Spend::default(), |sum, call| sum.saturating_add(*call));
        Some(Self {
            usd: self.usd.checked_sub(worst.usd)?,
            tokens: self.tokens.checked_sub(worst.tokens)?,
            calls: self.calls.checked_sub(calls.len() as u64)?,
        })
    }
}

/// USD in millionths: a cost rounded up, and what is left of a budget rounded down. What is infinite is more than any.
pub(super) fn micros_up(usd: f64) -> MicroUsd {
    (usd * 1e6).ceil() as MicroUsd
}

pub(super) fn micros_down(usd: f64) -> MicroUsd {
    (usd * 1e6).floor() as MicroUsd
}

/// Whether a plan can be begun with what is left, as the machine begins it ([`crate::cascade`]): the first stage of a cascade
/// that fits, as many branches as fit and at least a quorum. Takes what that may use; `worst`: of each call, in order.
fn begins(plan: &Plan, left: &mut Room, worst: &mut impl Iterator<Item = Spend>) -> bool {
    let full = *left;
    match plan {
        Plan::Call(_) | Plan::Hedged { .. } => {
            let call = worst.next().unwrap_or_default();
            // The hedge is made where there is room for it.
            if matches!(plan, Plan::Hedged { .. }) {
                worst.next();
            }
            let rest = left.without(&[call]);
            *left = rest.unwrap_or(full);
            rest.is_some()
        }
        Plan::Cascade(stages) => {
            let mut first = None;
            for stage in stages {
                let mut rest = full;
                if begins(&stage.plan, &mut rest, worst) {
                    first = first.or(Some(rest));
                }
            }
            *left = first.unwrap_or(full);
            first.is_some()
        }
        Plan::Parallel { branches, aggregate } => {
            let fitting = branches.iter().filter(|branch| begins(branch, left, worst)).count();
            if aggregate.call().is_some() {
                worst.next();
            }
            let fits = fitting >= aggregate.quorum(branches.len());
            if !fits {
                *left = full;
            }
            fits
        }
        // The answer has to fit, a step before it need not.
        Plan::Steps(_) => {
            let [small, _, answer] = [(); 3].map(|()| worst.next().unwrap_or_default());
            let rest = left.without(&[small, answer]).or(left.without(&[answer]));
            *left = rest.unwrap_or(full);
            rest.is_some()
        }
        // Verified where there is room for it.
        Plan::Verified(verified) => {
            let begins = begins(&verified.plan, left, worst);
            worst.next();
            begins
        }
    }
}
