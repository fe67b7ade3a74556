//! The newest events, kept in memory between the sequencer and the feeder, so that feeding a store that keeps up reads
//! no file and parses no JSON. Bounded: a feeder that falls behind reads the segments instead.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::audit::record::Logged;

const MAX_EVENTS: usize = 2048;
const MAX_BYTES: usize = 8 << 20;

#[derive(Debug, Default)]
struct Held {
    events: VecDeque<Logged>,
    bytes: usize,
}

/// A contiguous run of the newest events.
#[derive(Debug, Default)]
pub(super) struct Recent {
    enabled: AtomicBool,
    held: Mutex<Held>,
}

impl Recent {
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    /// Takes events in, the oldest leaving when there are too many.
    pub(super) fn push(&self, events: Vec<Logged>) {
        if !self.enabled.load(Ordering::Relaxed) {
            return;
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            held.bytes += event.size();
            held.events.push_back(event);
        }
        while held.events.len() > MAX_EVENTS || held.bytes > MAX_BYTES {
            let Some(oldest) = held.events.pop_front() else { break };
            held.bytes -= oldest.size();
        }
    }

    /// Removes and gives back events from `seq` on; older ones are dropped. `None` when `seq` is not here.
    pub(super) fn take(&self, seq: u64, max: usize) -> Option<Vec<Logged>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.events.front().is_some_and(|event| event.seq < seq) {
            let Some(oldest) = held.events.pop_front() else { break };
            held.bytes -= oldest.size();
        }
        if held.events.front()?.seq != seq {
            return None;
        }
        let count = held.events.len().min(max);
        let taken: Vec<Logged> = held.events.drain(..count).collect();
        held.bytes -= taken.iter().map(Logged::size).sum::<usize>();
        Some(taken)
    }

    pub(super) fn clear(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held = Held::default();
    }
}
