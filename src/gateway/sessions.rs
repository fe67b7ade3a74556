//! What weir remembers of conversations: enough for rules on turns and the last arm; lost at a restart.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use crate::domain::SessionView;

/// What is remembered of conversations: the last arm and the number of requests, for the most recent ones.
#[derive(Default)]
pub(super) struct Sessions(Mutex<SessionTable>);

#[derive(Default)]
struct SessionTable {
    by_id: BTreeMap<String, (u32, String)>,
    /// Order of first sight; the oldest is forgotten first.
    order: VecDeque<String>,
}

/// Conversations remembered at most; an older one starts anew.
const SESSIONS: usize = 100_000;

impl Sessions {
    pub(super) fn view(&self, id: &str) -> SessionView {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (turn, last_arm) = table.by_id.get(id).cloned().unwrap_or_default();
        SessionView { id: id.to_owned(), turn: turn + 1, last_arm }
    }

    pub(super) fn decided(&self, id: &str, arm: &str) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = table.by_id.get_mut(id) {
            *entry = (entry.0 + 1, arm.to_owned());
            return;
        }
        if table.order.len() >= SESSIONS
            && let Some(oldest) = table.order.pop_front()
        {
            table.by_id.remove(&oldest);
        }
        table.order.push_back(id.to_owned());
        table.by_id.insert(id.to_owned(), (1, arm.to_owned()));
    }
}
