//! What sessions, keys and tenants have used, by time: sums that are kept beside a policy and put into what it sees.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::AddAssign,
};

use serde::{Deserialize, Serialize};

use crate::{
    domain::{Context, KeyView, Micros, SessionView},
    policy::spec::Per,
};

/// Sums that are kept at most before those of times gone by are dropped.
const SUMS: usize = 200_000;

/// What is counted, and over what time each.
pub type Counted = BTreeSet<(Per, Micros)>;

/// What one request, or several, have used. Whole numbers but for USD and seconds, except where a replay counts means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Used {
    pub usd: f64,
    /// Of all prompts and answers together.
    pub tokens: f64,
    /// Retries and fallback counted.
    pub calls: f64,
    /// From a request's start to the end of its answer.
    pub seconds: f64,
}

impl Used {
    pub(super) const NOTHING: Used = Used { usd: 0.0, tokens: 0.0, calls: 0.0, seconds: 0.0 };
    /// More than anything that can be used.
    pub(crate) const UNBOUNDED: Used =
        Used { usd: f64::INFINITY, tokens: f64::INFINITY, calls: f64::INFINITY, seconds: f64::INFINITY };

    /// Each unit of two together.
    pub(crate) fn zip(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            usd: f(self.usd, other.usd),
            tokens: f(self.tokens, other.tokens),
            calls: f(self.calls, other.calls),
            seconds: f(self.seconds, other.seconds),
        }
    }

    /// So many times as much.
    pub fn times(self, n: f64) -> Self {
        self.zip(self, |each, _| n * each)
    }

    /// Of one, where so many have used it.
    pub fn shared(self, n: f64) -> Self {
        self.zip(self, |each, _| each / n)
    }
}

impl AddAssign for Used {
    fn add_assign(&mut self, other: Self) {
        *self = self.zip(other, |a, b| a + b);
    }
}

/// Who is behind a request; empty where it is not known.
#[derive(Clone, Debug, Default)]
pub struct Who {
    pub session: String,
    pub key: String,
    pub tenant: String,
}

impl Who {
    /// Of a context.
    pub fn of(context: &Context) -> Self {
        let Context { session, key, .. } = context;
        Self { session: session.id.clone(), key: key.id.clone(), tenant: key.tenant.clone() }
    }

    fn name(&self, per: Per) -> &str {
        match per {
            Per::Request => "",
            Per::Session => &self.session,
            Per::Key => &self.key,
            Per::Tenant => &self.tenant,
        }
    }
}

/// What was used, by kind, length of time and name: which time, and the sum.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Vec<Sum>", into = "Vec<Sum>")]
pub struct Spent(BTreeMap<(Per, Micros, String), (Micros, Used)>);

/// A sum as it is kept.
type Sum = ((Per, Micros, String), (Micros, Used));

impl From<Vec<Sum>> for Spent {
    fn from(sums: Vec<Sum>) -> Self {
        Self(sums.into_iter().collect())
    }
}

impl From<Spent> for Vec<Sum> {
    fn from(spent: Spent) -> Self {
        spent.0.into_iter().collect()
    }
}

impl Spent {
    /// Adds what a request has used that ended at `at`.
    pub fn add(&mut self, who: &Who, at: Micros, used: Used, counted: &Counted) {
        for (per, every) in counted {
            let name = who.name(*per);
            if name.is_empty() || used == Used::NOTHING {
                continue;
            }
            let time = at.div_euclid(*every);
            let sum = self.0.entry((*per, *every, name.to_owned())).or_default();
            match sum.0.cmp(&time) {
                std::cmp::Ordering::Less => *sum = (time, used),
                std::cmp::Ordering::Equal => sum.1 += used,
                std::cmp::Ordering::Greater => {}
            }
        }
        if self.0.len() > SUMS {
            self.0.retain(|(_, every, _), (time, _)| *time == at.div_euclid(*every));
        }
    }

    fn of(&self, per: Per, every: Micros, name: &str, now: Micros) -> Used {
        let sum = self.0.get(&(per, every, name.to_owned()));
        sum.filter(|(time, _)| *time == now.div_euclid(every)).map_or(Used::NOTHING, |(_, used)| *used)
    }

    /// Writes what was used into what a policy with these budgets sees of session and key, in the place of what stands there.
    pub fn fill(
        &self,
        budgets: impl Iterator<Item = (Per, Micros)>,
        now: Micros,
        session: &mut SessionView,
        key: &mut KeyView,
    ) {
        let mut sums = [(Per::Session, Used::NOTHING), (Per::Key, Used::NOTHING), (Per::Tenant, Used::NOTHING)];
        for (per, every) in budgets {
            let name = match per {
                Per::Request => continue,
                Per::Session => &session.id,
                Per::Key => &key.id,
                Per::Tenant => &key.tenant,
            };
            let used = self.of(per, every, name, now);
            sums.iter_mut().filter(|(of, _)| *of == per).for_each(|(_, sum)| *sum = used);
        }
        sums.into_iter().for_each(|(per, used)| put(per, used, session, key));
    }
}

/// Writes what was used of one kind.
fn put(per: Per, used: Used, session: &mut SessionView, key: &mut KeyView) {
    let Used { usd, tokens, calls, seconds } = used;
    let (to_usd, to_tokens, to_calls, to_s) = match per {
        Per::Request => return,
        Per::Session => {
            (&mut session.spent_usd, &mut session.spent_tokens, &mut session.spent_calls, &mut session.spent_s)
        }
        Per::Key => (&mut key.spent_usd, &mut key.spent_tokens, &mut key.spent_calls, &mut key.spent_s),
        Per::Tenant => (
            &mut key.tenant_spent_usd,
            &mut key.tenant_spent_tokens,
            &mut key.tenant_spent_calls,
            &mut key.tenant_spent_s,
        ),
    };
    (*to_usd, *to_tokens, *to_calls, *to_s) = (usd, tokens, calls, seconds);
}

/// What a context says was used of one kind.
pub(super) fn told(per: Per, Context { session, key, .. }: &Context) -> Used {
    let (usd, tokens, calls, seconds) = match per {
        Per::Request => return Used::NOTHING,
        Per::Session => (session.spent_usd, session.spent_tokens, session.spent_calls, session.spent_s),
        Per::Key => (key.spent_usd, key.spent_tokens, key.spent_calls, key.spent_s),
        Per::Tenant => (key.tenant_spent_usd, key.tenant_spent_tokens, key.tenant_spent_calls, key.tenant_spent_s),
    };
    Used { usd, tokens, calls, seconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(usd: f64) -> Used {
        Used { usd, tokens: 100.0 * usd, calls: 1.0, seconds: 0.5 }
    }

    #[test]
    fn a_sum_is_of_one_time_and_one_name() {
        let mut spent = Spent::default();
        let who = Who { session: "s".into(), key: "k".into(), tenant: String::new() };
        let counted = BTreeSet::from([(Per::Session, 100), (Per::Key, 1000), (Per::Tenant, 1000)]);
        for (at, usd) in [(10, 1.0), (90, 2.0), (110, 4.0), (20, 8.0)] {
            spent.add(&who, at, used(usd), &counted);
        }
        // What came late for a time gone by is not counted in the one that runs.
        assert_eq!(spent.of(Per::Session, 100, "s", 150), used(4.0));
        assert_eq!(spent.of(Per::Session, 100, "s", 250), Used::NOTHING);
        let all = Used { usd: 15.0, tokens: 1500.0, calls: 4.0, seconds: 2.0 };
        assert_eq!(spent.of(Per::Key, 1000, "k", 999), all);
        assert_eq!(spent.of(Per::Key, 1000, "other", 999), Used::NOTHING);
        assert_eq!(spent.0.len(), 2);
        let kept = serde_json::to_vec(&spent).unwrap();
        let back: Spent = serde_json::from_slice(&kept).unwrap();
        assert_eq!(back.of(Per::Key, 1000, "k", 999), all);
    }

    #[test]
    fn what_a_policy_sees_is_of_its_budgets_alone() {
        let mut spent = Spent::default();
        let who = Who { session: "s".into(), key: "k".into(), tenant: "t".into() };
        let counted = BTreeSet::from([(Per::Session, 100), (Per::Key, 100), (Per::Tenant, 1000)]);
        spent.add(&who, 10, used(2.0), &counted);
        // What takes neither money nor tokens is a call all the same.
        spent.add(&who, 20, Used { calls: 1.0, ..Used::NOTHING }, &counted);
        let mut context = Context::default();
        let Context { session, key, .. } = &mut context;
        (session.id, key.id, key.tenant) = ("s".into(), "k".into(), "t".into());
        (session.spent_usd, key.spent_calls) = (7.0, 7.0);
        spent.fill([(Per::Key, 100), (Per::Tenant, 1000)].into_iter(), 30, session, key);
        let sum = Used { calls: 2.0, ..used(2.0) };
        assert_eq!([Per::Session, Per::Key, Per::Tenant].map(|per| told(per, &context)), [Used::NOTHING, sum, sum]);
        let Context { session, key, .. } = &mut context;
        spent.fill([(Per::Key, 100), (Per::Tenant, 1000)].into_iter(), 130, session, key);
        assert_eq!([Per::Key, Per::Tenant].map(|per| told(per, &context)), [Used::NOTHING, sum]);
    }
}
