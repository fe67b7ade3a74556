//! Circuit breakers: a model whose calls keep failing is left alone for a while, so that requests go elsewhere at once and its server
//! can recover (Nygard, "Release It!", 2007, section 5.2; the shares and windows are resilience4j's).
//!
//! Closed, it counts the last calls; when enough of them failed it opens. Open, it lets no call through. When its time is up it is half
//! open: one call at a time goes through, to see; enough good ones close it, a bad one opens it again, for twice as long. Pure: time is an
//! argument, in microseconds, and nothing is drawn.

use std::collections::VecDeque;

use crate::domain::{ErrorKind, Micros};

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerPolicy {
    /// Calls that are looked back at.
    pub window: usize,
    /// It does not open before so many of them have ended.
    pub least: usize,
    /// The share of failed ones that opens it.
    pub share: f64,
    /// For how long it is open at first, and at most, in microseconds.
    pub open: i64,
    pub most_open: i64,
    /// Good calls in a row that close it again.
    pub probes: u32,
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self { window: 20, least: 5, share: 0.5, open: 5_000_000, most_open: 120_000_000, probes: 2 }
    }
}

/// Whether calls go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    /// None, until then.
    Open {
        until: Micros,
    },
    /// One at a time.
    HalfOpen,
}

impl BreakerState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// How a call ended, as far as the model's health goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Good,
    Bad,
    /// It says nothing of the model: the request's own fault, a client that left, a server that is merely busy.
    Neither,
}

impl Verdict {
    /// Of a failed call.
    pub fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Timeout
            | ErrorKind::ServerError
            | ErrorKind::Unreachable
            | ErrorKind::Cut
            | ErrorKind::Garbage
            | ErrorKind::Auth
            | ErrorKind::ModelNotFound => Self::Bad,
            ErrorKind::RateLimited
            | ErrorKind::ContextTooLong
            | ErrorKind::BadRequest
            | ErrorKind::Unsupported
            | ErrorKind::BreakerOpen
            | ErrorKind::Cancelled
            | ErrorKind::Internal => Self::Neither,
        }
    }
}

/// The breaker of one model.
#[derive(Clone, Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: BreakerState,
    /// Whether each of the last calls failed, the oldest first.
    last: VecDeque<bool>,
    /// For how long it is open the next time.
    next: i64,
    /// Half open: whether a call is under way, and good ones so far.
    probing: bool,
    good: u32,
}

impl Breaker {
    pub fn new(policy: BreakerPolicy) -> Self {
        let state = BreakerState::Closed;
        Self { policy, state, last: VecDeque::new(), next: policy.open, probing: false, good: 0 }
    }

    /// How it is at this moment: an open one whose time is up is half open.
    pub fn state(&self, now: Micros) -> BreakerState {
        match self.state {
            BreakerState::Open { until } if until <= now => BreakerState::HalfOpen,
            state => state,
        }
    }

    /// How it was when it was last asked to let a call through or told of an end.
    pub fn as_it_was(&self) -> BreakerState {
        self.state
    }

    /// Whether a call that is made now would go through.
    pub fn admits(&self, now: Micros) -> bool {
        match self.state(now) {
            BreakerState::Closed => true,
            BreakerState::Open { .. } => false,
            BreakerState::HalfOpen => !self.probing,
        }
    }

    /// Lets a call through or not. Each that goes through must [`end`](Self::end).
    pub fn enter(&mut self, now: Micros) -> bool {
        if !self.admits(now) {
            return false;
        }
        self.state = self.state(now);
        self.probing = self.state == BreakerState::HalfOpen;
        true
    }

    /// A call has ended that went through when the breaker was in state `then`.
    pub fn end(&mut self, then: BreakerState, verdict: Verdict, now: Micros) {
        match (self.state(now), then) {
            (BreakerState::Closed, BreakerState::Closed) => self.count(verdict, now),
            (BreakerState::HalfOpen, BreakerState::HalfOpen) => {
                self.probing = false;
                match verdict {
                    Verdict::Good => self.good += 1,
                    Verdict::Bad => return self.open(now),
                    Verdict::Neither => {}
                }
                if self.good >= self.policy.probes {
                    self.state = BreakerState::Closed;
                    self.last.clear();
                    (self.next, self.good) = (self.policy.open, 0);
                }
            }
            // What began before it opened says nothing new.
            _ => {}
        }
    }

    fn count(&mut self, verdict: Verdict, now: Micros) {
        if verdict == Verdict::Neither {
            return;
        }
        self.last.push_back(verdict == Verdict::Bad);
        while self.last.len() > self.policy.window.max(1) {
            self.last.pop_front();
        }
        let (bad, all) = self.failed();
        if all >= self.policy.least && bad as f64 >= self.policy.share * all as f64 && bad > 0 {
            self.open(now);
        }
    }

    /// How many of the last calls failed, and how many these are.
    pub fn failed(&self) -> (usize, usize) {
        (self.last.iter().filter(|bad| **bad).count(), self.last.len())
    }

    fn open(&mut self, now: Micros) {
        self.state = BreakerState::Open { until: now.saturating_add(self.next) };
        self.next = self.next.saturating_mul(2).min(self.policy.most_open);
        (self.probing, self.good) = (false, 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: BreakerPolicy =
        BreakerPolicy { window: 6, least: 3, share: 0.5, open: 100, most_open: 300, probes: 2 };

    fn call(breaker: &mut Breaker, verdict: Verdict, now: Micros) -> bool {
        let through = breaker.enter(now);
        if through {
            breaker.end(breaker.state(now), verdict, now);
        }
        through
    }

    #[test]
    fn it_opens_by_share_probes_and_closes() {
        let mut breaker = Breaker::new(POLICY);
        for verdict in [Verdict::Bad, Verdict::Neither, Verdict::Neither, Verdict::Good] {
            assert!(call(&mut breaker, verdict, 0));
        }
        assert_eq!(breaker.state(0), BreakerState::Closed, "two of those that count");
        assert!(call(&mut breaker, Verdict::Bad, 1));
        assert_eq!(breaker.state(1), BreakerState::Open { until: 101 });
        assert!(!call(&mut breaker, Verdict::Good, 100));
        // One at a time.
        assert!(breaker.enter(101) && !breaker.enter(102));
        breaker.end(BreakerState::HalfOpen, Verdict::Good, 103);
        assert_eq!(breaker.state(103), BreakerState::HalfOpen);
        assert!(call(&mut breaker, Verdict::Neither, 104), "says nothing, and gives the place back");
        assert!(call(&mut breaker, Verdict::Good, 104));
        assert_eq!((breaker.state(104), breaker.failed()), (BreakerState::Closed, (0, 0)));
    }

    #[test]
    fn it_stays_open_for_twice_as_long_each_time_up_to_a_bound() {
        let mut breaker = Breaker::new(POLICY);
        (0..3).for_each(|_| _ = call(&mut breaker, Verdict::Bad, 0));
        let mut now = 0;
        for open in [100, 200, 300, 300] {
            assert_eq!(breaker.state(now), BreakerState::Open { until: now + open });
            now += open;
            assert!(call(&mut breaker, Verdict::Bad, now));
        }
        now += 300;
        assert!(call(&mut breaker, Verdict::Good, now) && call(&mut breaker, Verdict::Good, now));
        (0..3).for_each(|_| _ = call(&mut breaker, Verdict::Bad, now));
        assert_eq!(breaker.state(now), BreakerState::Open { until: now + 100 }, "as at first");
    }

    #[test]
    fn what_began_before_it_opened_says_nothing_new() {
        let mut breaker = Breaker::new(POLICY);
        assert!((0..5).all(|_| breaker.enter(0)));
        (0..3).for_each(|_| breaker.end(BreakerState::Closed, Verdict::Bad, 1));
        assert_eq!(breaker.state(1), BreakerState::Open { until: 101 });
        breaker.end(BreakerState::Closed, Verdict::Good, 50);
        breaker.end(BreakerState::Closed, Verdict::Bad, 102);
        assert_eq!(breaker.state(102), BreakerState::HalfOpen);
        assert!(breaker.enter(102));
    }

    proptest! {
        /// Whatever happens, half open there is at most one call, and an open breaker lets one through in the end.
        #[test]
        fn it_never_sticks(steps in prop::collection::vec((0u8..5, 0i64..60), 1..200)) {
            let mut breaker = Breaker::new(POLICY);
            let (mut now, mut under_way) = (0, Vec::new());
            for (what, wait) in steps {
                now += wait;
                match what {
                    0..=2 => {
                        let state = breaker.state(now);
                        if breaker.enter(now) {
                            let open = matches!(state, BreakerState::Open { .. });
                            prop_assert!(!open);
                            under_way.push(state);
                        }
                    }
                    _ => if let Some(then) = under_way.pop() {
                        breaker.end(then, if what == 3 { Verdict::Good } else { Verdict::Bad }, now);
                    },
                }
                let probes = under_way.iter().filter(|then| **then == BreakerState::HalfOpen).count();
                // A probe may outlive its half-open time only where another's failure ended it, and there is but one.
                prop_assert!(probes <= 1, "{probes}");
            }
            while let Some(then) = under_way.pop() {
                breaker.end(then, Verdict::Bad, now);
            }
            prop_assert!(breaker.enter(now + POLICY.most_open));
        }
    }
}
