//! Where logged decisions come from, oldest first, page by page.

use async_trait::async_trait;

use super::entry::Entry;
use crate::{
    audit::{AuditStore, DecisionFilter, DecisionView, by_decision},
    domain::{DecisionId, Hash},
    replay::ReplayError,
};

/// Decisions of one page of a store.
const PAGE: u32 = 1000;

/// How to come by some entries in a row, on any core.
pub struct Page(Box<dyn FnOnce() -> Result<Vec<Entry>, ReplayError> + Send>);

impl Page {
    pub fn of(read: impl FnOnce() -> Result<Vec<Entry>, ReplayError> + Send + 'static) -> Self {
        Self(Box::new(read))
    }

    /// # Errors
    /// When what is read is no log.
    pub fn read(self) -> Result<Vec<Entry>, ReplayError> {
        self.0()
    }
}

/// A log, to be read once.
#[async_trait]
pub trait Source: Send {
    /// The next pages, as many as are worth having at once; nothing after the last.
    ///
    /// # Errors
    /// When the log cannot be read.
    async fn next(&mut self) -> Result<Option<Vec<Page>>, ReplayError>;

    /// What tells this log from others.
    ///
    /// # Errors
    /// When it cannot be read.
    fn about(&self) -> Result<String, ReplayError>;

    /// Behind the pages that were handed out.
    fn place(&self) -> String;

    /// Goes on from a place of the same log.
    ///
    /// # Errors
    /// When it is none.
    fn go_to(&mut self, place: &str) -> Result<(), ReplayError>;
}

/// What is in a part of the record, before it is read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extent {
    pub decisions: usize,
    /// The policy versions that decided, by their first decision here, oldest first.
    pub policies: Vec<(Hash, DecisionId)>,
    /// The newest decision, and the version that made it.
    pub newest: Option<(DecisionId, Hash)>,
}

/// A store.
pub struct Record<'a> {
    store: &'a dyn AuditStore,
    filter: DecisionFilter,
    /// What it begins after.
    from: Option<DecisionId>,
}

impl<'a> Record<'a> {
    /// The newest `last` decisions that the filter lets through, or all, and what they are.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn open(
        store: &'a dyn AuditStore,
        filter: &DecisionFilter,
        last: Option<usize>,
    ) -> Result<(Self, Extent), ReplayError> {
        let mut extent = Extent::default();
        let mut filter = DecisionFilter { limit: Some(PAGE), ..filter.clone() };
        let mut page = filter.clone();
        'all: loop {
            let rows = store.decisions(&page).await?;
            let Some(oldest) = rows.last() else { break };
            page.before = Some(oldest.id);
            for row in &rows {
                if last.is_some_and(|last| extent.decisions >= last) {
                    filter.after = Some(row.id);
                    break 'all;
                }
                extent.decisions += 1;
                extent.newest.get_or_insert((row.id, row.policy_hash));
                match extent.policies.iter_mut().find(|(hash, _)| *hash == row.policy_hash) {
                    Some(known) => known.1 = row.id,
                    None => extent.policies.push((row.policy_hash, row.id)),
                }
            }
        }
        extent.policies.sort_by_key(|(_, first)| *first);
        // What comes in while this is read is not part of it.
        filter.before =
            extent.newest.map(|(id, _)| DecisionId(uuid::Uuid::from_u128(id.0.as_u128().saturating_add(1))));
        filter.oldest_first = true;
        let from = filter.after;
        Ok((Self { store, filter, from }, extent))
    }
}

#[async_trait]
impl Source for Record<'_> {
    async fn next(&mut self) -> Result<Option<Vec<Page>>, ReplayError> {
        let rows = self.store.decisions(&self.filter).await?;
        let Some(last) = rows.last() else { return Ok(None) };
        self.filter.after = Some(last.id);
        let ids: Vec<DecisionId> = rows.iter().map(|row| row.id).collect();
        let mut decisions = by_decision(self.store.decision_events(&ids).await?).into_iter();
        let cores = rayon::current_num_threads().max(1);
        let share = rows.len().div_ceil(cores);
        let pages = (0..cores).map(|_| {
            let some: Vec<_> = decisions.by_ref().take(share).collect();
            let entry = |events| Ok(DecisionView::of(events)?.map(Entry::of));
            Page::of(move || some.into_iter().filter_map(|events| entry(events).transpose()).collect())
        });
        Ok(Some(pages.collect()))
    }

    fn about(&self) -> Result<String, ReplayError> {
        let whole = DecisionFilter { after: self.from, ..self.filter.clone() };
        let filter = serde_json::to_string(&whole).map_err(|e| ReplayError::Place(e.to_string()))?;
        Ok(format!("{} record {filter}", self.store.kind()))
    }

    fn place(&self) -> String {
        self.filter.after.map(|id| id.to_string()).unwrap_or_default()
    }

    fn go_to(&mut self, place: &str) -> Result<(), ReplayError> {
        let wrong = |_| ReplayError::Place(place.to_owned());
        self.filter.after = (!place.is_empty()).then(|| place.parse().map_err(wrong)).transpose()?.map(DecisionId);
        Ok(())
    }
}
