//! The lowest of recent values, in constant memory: that of the present window and of the one before it.

use crate::domain::Micros;

/// Windows follow each other from the first value on.
#[derive(Debug)]
pub(super) struct Lowest {
    window: i64,
    /// Start of the present window, once there is one.
    began: Option<Micros>,
    present: i64,
    before: i64,
}

impl Lowest {
    /// Of one to two windows of so many microseconds each, above 0.
    pub(super) fn new(window: i64) -> Self {
        Self { window, began: None, present: i64::MAX, before: i64::MAX }
    }

    /// Adds a value and gives the lowest, itself included. An instant before the last one counts as the last one.
    pub(super) fn with(&mut self, value: i64, now: Micros) -> i64 {
        let began = *self.began.get_or_insert(now);
        let windows = now.saturating_sub(began) / self.window;
        if windows > 0 {
            self.before = if windows == 1 { self.present } else { i64::MAX };
            self.present = i64::MAX;
            self.began = Some(began.saturating_add(windows.saturating_mul(self.window)));
        }
        self.present = self.present.min(value);
        self.present.min(self.before)
    }
}
