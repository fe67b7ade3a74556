//! What sessions, keys and tenants have used, for the policies that have budgets. Counted from the record: from what
//! happens as it is stored, and at a start, or when a policy with a new budget is taken into use, from the store.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    audit::{AuditStore, DecisionFilter, Follower, Logged, StoreError},
    domain::{DecidedBy, DecisionId, EventBody, KeyView, Micros, SessionView},
    policy::{Counted, Policy, Spent, Used, Who},
};

/// Requests under way at most; of more, the oldest are taken to have no end.
const OPEN: usize = 100_000;

/// Follows the log and adds up.
#[derive(Default)]
pub struct Spending(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// What some policy's budget asks for.
    counted: Counted,
    /// Who is behind the decisions that have no outcome yet, and the tokens of their calls so far.
    open: BTreeMap<DecisionId, (Who, u64)>,
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
                let (cost, calls) = (row.cost_usd.unwrap_or(0.0), row.attempts.unwrap_or(0));
                let used = used(cost, row.tokens.unwrap_or(0), calls, row.latency_us.unwrap_or(0));
                table.spent.add(&who, row.at, used, &fresh);
            }
        }
    }

    /// Writes what was used into what the policy sees of session and key.
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
                // What nothing is called for has no outcome.
                EventBody::Decision(record) if !record.dry && record.decision.decided_by != DecidedBy::Shadow => {
                    let who =
                        Who { session: record.session.clone(), key: record.key.clone(), tenant: record.tenant.clone() };
                    table.open.insert(id, (who, 0));
                    // Some requests never have an outcome.
                    if table.open.len() > OPEN {
                        table.open.pop_first();
                    }
                }
                EventBody::Attempt(attempt) => {
                    if let Some((_, tokens)) = table.open.get_mut(&id) {
                        *tokens += attempt.usage.total();
                    }
                }
                EventBody::Outcome(outcome) => {
                    if let Some((who, tokens)) = table.open.remove(&id) {
                        let counted = table.counted.clone();
                        let used = used(outcome.cost_usd, tokens, outcome.attempts, outcome.latency_us);
                        table.spent.add(&who, logged.event.at, used, &counted);
                    }
                }
                _ => {}
            }
        }
    }
}

fn used(usd: f64, tokens: u64, calls: u32, latency_us: i64) -> Used {
    Used { usd, tokens: tokens as f64, calls: f64::from(calls), seconds: latency_us as f64 / 1e6 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::{EventLog, LogOptions, StoreTarget, open_store, testing},
        domain::{Capabilities, Event, Fleet, ModelCard, Price},
        policy::check,
    };

    const BUDGETS: &str = "policy: p\nmodels: {m: {name: m}}\nselect: {arms: [m], static: m}\nbudget: [{per: session, calls: 9}, \
                           {per: key, tokens: 9}, {per: tenant, seconds: 9, every: 30d}]\n";

    /// A request that took two calls, one that was only asked about, and one that a shadow decided.
    fn events(ids: &[DecisionId; 3]) -> Vec<Event> {
        let at = 1_764_000_000_000_000;
        let [asked, dry, shadow] = *ids;
        let mut second = testing::attempt(asked, at + 3);
        let mut end = testing::outcome(asked, at + 4);
        if let EventBody::Attempt(attempt) = &mut second.body {
            attempt.index = 1;
        }
        if let EventBody::Outcome(outcome) = &mut end.body {
            outcome.attempts = 2;
        }
        vec![
            testing::decision(asked, at),
            testing::decision_with(dry, at + 1, |record| record.dry = true),
            testing::attempt(asked, at + 2),
            testing::decision_with(shadow, at + 2, |record| record.decision.decided_by = DecidedBy::Shadow),
            second,
            end,
        ]
    }

    #[tokio::test]
    async fn what_is_followed_is_what_a_start_reads_from_the_store() {
        let card = ModelCard {
            name: "m".into(),
            tags: Vec::new(),
            context: 0,
            price: Price::default(),
            energy: None,
            capabilities: Capabilities::default(),
        };
        let policy = check("p.yaml", BUDGETS.as_bytes(), |_| Fleet::new([card])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = open_store(&StoreTarget::Sqlite(dir.path().join("weir.db"))).await.unwrap();
        let options = LogOptions { replica: "r1".to_owned(), ..LogOptions::default() };
        let log = EventLog::open(&dir.path().join("log"), options).unwrap();
        let ids = [(); 3].map(|()| DecisionId::new());
        log.append(events(&ids)).await.unwrap();
        let logged: Vec<Logged> = log.read_from(1).unwrap().collect::<Result<_, _>>().unwrap();
        let now = 1_764_000_000_000_009;
        let (follows, reads) = (Spending::default(), Spending::default());
        follows.count_for(&policy, store.as_ref(), now).await.unwrap();
        follows.follow(&logged).await;
        store.ingest(&logged).await.unwrap();
        reads.count_for(&policy, store.as_ref(), now).await.unwrap();
        // What has no end yet waits for one; what never has one does not.
        assert_eq!(follows.0.lock().unwrap().open.len(), 0);
        for spending in [follows, reads] {
            let mut session = SessionView { id: "9f86d081884c7d65".into(), ..SessionView::default() };
            let mut key = KeyView { id: "team-a".into(), tenant: "acme".into(), ..KeyView::default() };
            spending.fill(&policy, now, &mut session, &mut key);
            // 120 and 42 of each call.
            assert_eq!((session.spent_calls, key.spent_tokens), (2.0, 324.0));
            assert_eq!((session.spent_tokens, key.tenant_spent_calls), (324.0, 2.0));
            assert_eq!((key.tenant_spent_s, key.spent_usd), (0.201, 0.000123));
        }
    }
}
