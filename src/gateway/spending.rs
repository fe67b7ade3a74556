//! What sessions, keys and tenants have cost, for the policies that have budgets. Counted from the record: from what
//! happens as it is stored, and at a start, or when a policy with a new budget is taken into use, from the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    audit::{AuditStore, DecisionFilter, Follower, Logged, StoreError},
    domain::{DecisionId, EventBody, KeyView, Micros, SessionView},
    policy::{Per, Policy},
};

/// Sums that are kept at most before those of times gone by are dropped.
const SUMS: usize = 200_000;

/// Follows the log and adds up.
#[derive(Default)]
pub struct Spending(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// What some policy's budget asks for.
    counted: BTreeSet<(Per, Micros)>,
    /// Who is behind the decisions that have no outcome yet.
    open: BTreeMap<DecisionId, Who>,
    /// By kind, length of time and name: which time, and the sum in USD.
    sums: BTreeMap<(Per, Micros, String), (Micros, f64)>,
}

#[derive(Clone)]
struct Who {
    session: String,
    key: String,
    tenant: String,
}

impl Who {
    fn name(&self, per: Per) -> &str {
        match per {
            Per::Request => "",
            Per::Session => &self.session,
            Per::Key => &self.key,
            Per::Tenant => &self.tenant,
        }
    }
}

impl Table {
    fn add(&mut self, who: &Who, at: Micros, usd: f64, counted: &BTreeSet<(Per, Micros)>) {
        for (per, every) in counted {
            let name = who.name(*per);
            if name.is_empty() || usd <= 0.0 {
                continue;
            }
            let time = at.div_euclid(*every);
            let sum = self.sums.entry((*per, *every, name.to_owned())).or_default();
            match sum.0.cmp(&time) {
                std::cmp::Ordering::Less => *sum = (time, usd),
                std::cmp::Ordering::Equal => sum.1 += usd,
                std::cmp::Ordering::Greater => {}
            }
        }
        if self.sums.len() > SUMS {
            self.sums.retain(|(_, every, _), (time, _)| *time == at.div_euclid(*every));
        }
    }

    fn spent(&self, per: Per, every: Micros, name: &str, now: Micros) -> f64 {
        let sum = self.sums.get(&(per, every, name.to_owned()));
        sum.filter(|(time, _)| *time == now.div_euclid(every)).map_or(0.0, |(_, usd)| *usd)
    }
}

impl Spending {
    /// Counts from now on what this policy's budgets ask for, beginning with what the store knows of the time that runs.
    /// What ends while the store is read may be counted twice, never left out.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn count_for(&self, policy: &Policy, store: &dyn AuditStore, now: Micros) -> Result<(), StoreError> {
        let fresh: BTreeSet<(Per, Micros)> = {
            let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            policy.spending().filter(|asked| table.counted.insert(*asked)).collect()
        };
        let Some(since) = fresh.iter().map(|(_, every)| now.div_euclid(*every) * every).min() else { return Ok(()) };
        let mut before = None;
        loop {
            let filter = DecisionFilter { limit: Some(1000), since: Some(since), before, ..DecisionFilter::default() };
            let page = store.decisions(&filter).await?;
            let Some(oldest) = page.last() else { return Ok(()) };
            before = Some(oldest.id);
            let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for row in page {
                let who = Who { session: row.session, key: row.key, tenant: row.tenant };
                table.add(&who, row.at, row.cost_usd.unwrap_or(0.0), &fresh);
            }
        }
    }

    /// Writes what was spent into what the policy sees of session and key.
    pub fn fill(&self, policy: &Policy, now: Micros, session: &mut SessionView, key: &mut KeyView) {
        let mut asked = policy.spending().peekable();
        if asked.peek().is_none() {
            return;
        }
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (per, every) in asked {
            match per {
                Per::Request => {}
                Per::Session => session.spent_usd = table.spent(per, every, &session.id, now),
                Per::Key => key.spent_usd = table.spent(per, every, &key.id, now),
                Per::Tenant => key.tenant_spent_usd = table.spent(per, every, &key.tenant, now),
            }
        }
    }
}

#[async_trait]
impl Follower for Spending {
    async fn follow(&self, batch: &[Logged]) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.counted.is_empty() {
            return;
        }
        for logged in batch {
            let Some(id) = logged.event.decision else { continue };
            match &logged.event.body {
                EventBody::Decision(record) if !record.dry => {
                    let who =
                        Who { session: record.session.clone(), key: record.key.clone(), tenant: record.tenant.clone() };
                    table.open.insert(id, who);
                }
                EventBody::Outcome(outcome) => {
                    if let Some(who) = table.open.remove(&id) {
                        let counted = table.counted.clone();
                        table.add(&who, logged.event.at, outcome.cost_usd, &counted);
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_of_one_time_and_one_name() {
        let mut table = Table::default();
        let who = Who { session: "s".into(), key: "k".into(), tenant: String::new() };
        let counted = BTreeSet::from([(Per::Session, 100), (Per::Key, 1000), (Per::Tenant, 1000)]);
        for (at, usd) in [(10, 1.0), (90, 2.0), (110, 4.0), (20, 8.0)] {
            table.add(&who, at, usd, &counted);
        }
        // What came late for a time gone by is not counted in the one that runs.
        assert_eq!(table.spent(Per::Session, 100, "s", 150), 4.0);
        assert_eq!(table.spent(Per::Session, 100, "s", 250), 0.0);
        assert_eq!(table.spent(Per::Key, 1000, "k", 999), 15.0);
        assert_eq!(table.spent(Per::Key, 1000, "other", 999), 0.0);
        assert_eq!(table.sums.len(), 2);
    }
}
