//! One reservation of memory for the keys and values of all models of a device, cut into superblocks of one size.
//!
//! A superblock belongs to one [`BlockPool`](super::block_pool::BlockPool), so to one layout, until all its blocks are free
//! again; then another may have it. Each pool is promised what its model needs to run one sequence alone: what is promised to
//! the others and not yet theirs is never given out. Which blocks go when the reservation is spent is not decided here.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    collections::BTreeMap,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{number::Line, prefer_large_pages};

/// Bytes of a superblock: many blocks of a small model, and several of a large one.
pub const SUPERBLOCK: usize = 16 << 20;
/// Large pages begin at multiples of it.
const ALIGNMENT: usize = 2 << 20;

/// Zeroed memory of some lines, aligned for large pages where it has any.
pub struct Superblock {
    start: NonNull<Line>,
    layout: Layout,
}

// SAFETY: it owns its memory, and nothing in it belongs to a thread.
unsafe impl Send for Superblock {}
// SAFETY: as above; it gives out a place, no reference.
unsafe impl Sync for Superblock {}

impl Superblock {
    pub(super) fn new(bytes: usize) -> Self {
        let alignment = if bytes < ALIGNMENT { Line::BYTES } else { ALIGNMENT };
        let size = bytes.max(1).next_multiple_of(Line::BYTES);
        let layout = match Layout::from_size_align(size, alignment) {
            Ok(layout) => layout,
            Err(_) => handle_alloc_error(Layout::new::<Line>()),
        };
        // SAFETY: the size is not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<Line>()) else {
            handle_alloc_error(layout)
        };
        // SAFETY: our own fresh memory.
        prefer_large_pages::<Line>(unsafe {
            std::slice::from_raw_parts_mut(start.as_ptr().cast(), size / Line::BYTES)
        });
        Self { start, layout }
    }

    pub(super) fn start(&self) -> NonNull<Line> {
        self.start
    }
}

impl Drop for Superblock {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and those who had places in it have given them back.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) };
    }
}

/// What all models of a device have for keys and values. Clones are the same reservation.
#[derive(Clone)]
pub struct Reservation(Arc<Reserved>);

struct Reserved {
    superblock: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Superblocks that were asked for when it was made.
    asked: usize,
    spare: Vec<Superblock>,
    pools: BTreeMap<u64, Share>,
    next: u64,
}

/// In superblocks.
#[derive(Clone, Copy, Default)]
struct Share {
    promised: usize,
    owned: usize,
}

impl State {
    /// More than was asked for where that cannot keep the promises.
    fn most(&self) -> usize {
        self.asked.max(self.pools.values().map(|share| share.promised).sum())
    }

    /// What is owned or still promised.
    fn spoken_for(&self) -> usize {
        self.pools.values().map(|share| share.owned.max(share.promised)).sum()
    }
}

impl Reservation {
    /// Of so many bytes. Memory is taken from the system when it is first written.
    pub fn new(bytes: usize) -> Self {
        Self::of(bytes / SUPERBLOCK, SUPERBLOCK)
    }

    /// Of so many superblocks of a size of their own.
    pub fn of(superblocks: usize, bytes: usize) -> Self {
        let state = State { asked: superblocks, ..State::default() };
        Self(Arc::new(Reserved { superblock: bytes.max(Line::BYTES), state: Mutex::new(state) }))
    }

    /// Bytes of a superblock.
    pub fn superblock(&self) -> usize {
        self.0.superblock
    }

    /// Bytes that pools own, and that they may own together.
    pub fn bytes(&self) -> (usize, usize) {
        let state = self.state();
        let owned: usize = state.pools.values().map(|share| share.owned).sum();
        (owned * self.0.superblock, state.most().saturating_mul(self.0.superblock))
    }

    /// Superblocks that a pool could own if the others had no more than they are promised.
    pub(super) fn most_of(&self, pool: u64) -> usize {
        let state = self.state();
        let others = state.pools.iter().filter(|(id, _)| **id != pool).map(|(_, share)| share.promised).sum();
        state.most().saturating_sub(others)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new pool, with a promise of so many superblocks.
    pub(super) fn enter(&self, promised: usize) -> u64 {
        let mut state = self.state();
        state.next += 1;
        let id = state.next;
        state.pools.insert(id, Share { promised, owned: 0 });
        id
    }

    /// Ends the promise to a pool.
    pub(super) fn retire(&self, pool: u64) {
        let mut state = self.state();
        if let Some(share) = state.pools.get_mut(&pool) {
            share.promised = 0;
        }
        trim(&mut state);
    }

    pub(super) fn leave(&self, pool: u64) {
        let mut state = self.state();
        state.pools.remove(&pool);
        trim(&mut state);
    }

    /// `count` superblocks in one piece for a pool; `None` where others have or are promised the rest, unless it must be.
    pub(super) fn take(&self, pool: u64, count: usize, must: bool) -> Option<Superblock> {
        let mut state = self.state();
        let share = state.pools.get(&pool).copied().unwrap_or_default();
        let owed = share.promised.saturating_sub(share.owned).min(count);
        if !must && owed < count && state.spoken_for() + (count - owed) > state.most() {
            return None;
        }
        if let Some(share) = state.pools.get_mut(&pool) {
            share.owned += count;
        }
        let again = if count == 1 { state.spare.pop() } else { None };
        trim(&mut state);
        drop(state);
        Some(again.unwrap_or_else(|| Superblock::new(count * self.0.superblock)))
    }

    pub(super) fn give_back(&self, pool: u64, count: usize, superblock: Superblock) {
        let mut state = self.state();
        if let Some(share) = state.pools.get_mut(&pool) {
            share.owned -= count;
        }
        if count == 1 {
            state.spare.push(superblock);
        }
        trim(&mut state);
    }
}

/// Lets go of spare memory beyond the bound.
fn trim(state: &mut State) {
    let owned: usize = state.pools.values().map(|share| share.owned).sum();
    let spare = state.most().saturating_sub(owned);
    state.spare.truncate(spare);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_to_others_is_not_given_out() {
        let reservation = Reservation::of(5, 256);
        let (a, b) = (reservation.enter(2), reservation.enter(2));
        let mut of_a: Vec<Superblock> = (0..3).map(|_| reservation.take(a, 1, false).unwrap()).collect();
        assert!(reservation.take(a, 1, false).is_none(), "two are b's");
        let of_b: Vec<Superblock> = (0..2).map(|_| reservation.take(b, 1, false).unwrap()).collect();
        assert!(reservation.take(b, 1, false).is_none());
        reservation.give_back(a, 1, of_a.pop().unwrap());
        assert!(reservation.take(b, 2, false).is_none(), "there is one");
        assert_eq!(reservation.bytes(), (4 * 256, 5 * 256));
        // More than there is only where it must be; it goes when something comes back.
        let beyond = reservation.take(b, 2, true).unwrap();
        assert_eq!(reservation.bytes().0, 6 * 256);
        reservation.give_back(b, 2, beyond);
        of_b.into_iter().for_each(|superblock| reservation.give_back(b, 1, superblock));
        reservation.leave(b);
        assert_eq!((reservation.bytes(), reservation.state().spare.len()), ((2 * 256, 5 * 256), 2));
        reservation.retire(a);
        of_a.into_iter().for_each(|superblock| reservation.give_back(a, 1, superblock));
        assert_eq!((reservation.bytes().0, reservation.state().spare.len()), (0, 4));
    }

    #[test]
    fn promises_are_kept_beyond_what_was_asked_for() {
        let reservation = Reservation::of(1, 256);
        let (a, b) = (reservation.enter(2), reservation.enter(1));
        assert_eq!(reservation.bytes().1, 3 * 256);
        let first = reservation.take(a, 2, false).unwrap();
        assert!(reservation.take(a, 1, false).is_none());
        assert!(reservation.take(b, 1, false).is_some());
        reservation.give_back(a, 2, first);
        reservation.leave(a);
        assert_eq!((reservation.bytes(), reservation.state().spare.len()), ((256, 256), 0));
    }
}
