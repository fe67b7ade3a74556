//! Counts and sums over the decisions of a store, by policy and arm.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    query::{DecisionFilter, DecisionRow, MAX_LIMIT},
    store::{AuditStore, StoreError},
};

/// Sums over some decisions. Latencies are those of decisions that ended `ok`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub decisions: u64,
    /// By status; `open` for those without an outcome, `dry` for those that will have none.
    pub status: BTreeMap<String, u64>,
    pub cost_usd: f64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub latency_p50_us: Option<i64>,
    pub latency_p95_us: Option<i64>,
    pub ttft_p50_us: Option<i64>,
    #[serde(skip)]
    latencies: Vec<i64>,
    #[serde(skip)]
    ttfts: Vec<i64>,
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    pub total: Figures,
    /// By policy, then arm (empty where refused).
    pub policies: BTreeMap<String, BTreeMap<String, Figures>>,
    /// By the model that served (empty where none did).
    pub models: BTreeMap<String, u64>,
    /// Times of the oldest and the newest decision.
    pub first: Option<i64>,
    pub last: Option<i64>,
}

impl Figures {
    fn add(&mut self, row: &DecisionRow) {
        self.decisions += 1;
        let status = row.status.as_deref().unwrap_or(if row.dry { "dry" } else { "open" });
        *self.status.entry(status.to_owned()).or_default() += 1;
        self.cost_usd += row.cost_usd.unwrap_or_default();
        self.prompt_tokens += u64::from(row.prompt_tokens.unwrap_or_default());
        self.completion_tokens += u64::from(row.completion_tokens.unwrap_or_default());
        if status == "ok" {
            self.latencies.extend(row.latency_us);
            self.ttfts.extend(row.ttft_us);
        }
    }

    fn finish(&mut self) {
        self.latencies.sort_unstable();
        self.ttfts.sort_unstable();
        self.latency_p50_us = quantile(&self.latencies, 0.5);
        self.latency_p95_us = quantile(&self.latencies, 0.95);
        self.ttft_p50_us = quantile(&self.ttfts, 0.5);
    }
}

/// The nearest-rank quantile of sorted values.
fn quantile(sorted: &[i64], q: f64) -> Option<i64> {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Goes through all decisions that pass the filter (its limit and `before` aside).
///
/// # Errors
/// When the store cannot be read.
pub async fn stats(store: &dyn AuditStore, filter: &DecisionFilter) -> Result<Stats, StoreError> {
    let mut stats = Stats::default();
    let mut filter = DecisionFilter { limit: Some(MAX_LIMIT), before: None, ..filter.clone() };
    loop {
        let rows = store.decisions(&filter).await?;
        for row in &rows {
            stats.total.add(row);
            stats.policies.entry(row.policy.clone()).or_default().entry(row.arm.clone()).or_default().add(row);
            *stats.models.entry(row.served_by.clone().unwrap_or_default()).or_default() += 1;
            stats.first = Some(stats.first.map_or(row.at, |at| at.min(row.at)));
            stats.last = Some(stats.last.map_or(row.at, |at| at.max(row.at)));
        }
        if rows.len() < MAX_LIMIT as usize {
            break;
        }
        filter.before = rows.last().map(|row| row.id);
    }
    stats.total.finish();
    for figures in stats.policies.values_mut().flat_map(BTreeMap::values_mut) {
        figures.finish();
    }
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let values: Vec<i64> = (1..=20).collect();
        assert_eq!(quantile(&values, 0.5), Some(10));
        assert_eq!(quantile(&values, 0.95), Some(19));
        assert_eq!(quantile(&[7], 0.95), Some(7));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
