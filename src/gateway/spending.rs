//! What sessions, keys and tenants have cost, for the policies that have budgets. Counted from the record: from what
//! happens as it is stored, and at a start, or when a policy with a new budget is taken into use, from the store.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    audit::{AuditStore, DecisionFilter, Follower, Logged, StoreError},
    domain::{DecisionId, EventBody, KeyView, Micros, SessionView},
    policy::{Counted, Policy, Spent, Who},
};

/// Follows the log and adds up.
#[derive(Default)]
pub struct Spending(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// What some policy's budget asks for.
    counted: Counted,
    /// Who is behind the decisions that have no outcome yet.
    open: BTreeMap<DecisionId, Who>,
    spent: Spent,
}

impl Spending {
    /// Counts from now on what this policy's budgets ask for, beginning with what the store knows of the time that runs.
    /// What ends while the store is read may be counted twice, never left out.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn count_for(&self, policy: &Policy, store: &dyn AuditStore, now: Micros) -> Result<(), StoreError> {
        let fresh: Counted = {
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
                table.spent.add(&who, row.at, row.cost_usd.unwrap_or(0.0), &fresh);
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
        table.spent.fill(asked, now, session, key);
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
                        table.spent.add(&who, logged.event.at, outcome.cost_usd, &counted);
                    }
                }
                _ => {}
            }
        }
    }
}
