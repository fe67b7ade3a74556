//! Memory for keys and values: blocks of one size, cut from the superblocks of a [`Reservation`], counted while anybody holds
//! them and handed out again.

use std::{
    collections::BTreeSet,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    number::{Element, Line, Number, numbers, numbers_mut},
    superblocks::{Reservation, Superblock},
};

/// The keys and values of [`POSITIONS`](super::attention::POSITIONS) neighbouring positions of one sequence in all layers, layer after layer.
pub type Block = Arc<Memory>;

/// The memory of a block, of numbers that those who use it agree upon. Comes from a [`BlockPool`] and goes back to it.
pub struct Memory {
    start: NonNull<Line>,
    lines: usize,
    home: Home,
}

enum Home {
    Pool {
        pool: BlockPool,
        superblock: u32,
        slot: u32,
    },
    /// Of its own.
    #[cfg(test)]
    Own(#[expect(dead_code, reason = "it is held")] Superblock),
}

// SAFETY: the place is this one's alone until it is dropped, and its numbers are plain.
unsafe impl Send for Memory {}
// SAFETY: as above; shared, it is only read.
unsafe impl Sync for Memory {}

impl Memory {
    /// Of its own, with these numbers.
    #[cfg(test)]
    pub fn of<T: Number>(values: &[T]) -> Self {
        let lines = size_of_val(values).div_ceil(Line::BYTES);
        let own = Superblock::new(lines * Line::BYTES);
        let mut memory = Self { start: own.start(), lines, home: Home::Own(own) };
        memory.numbers_mut()[..values.len()].copy_from_slice(values);
        memory
    }

    fn lines(&self) -> &[Line] {
        // SAFETY: the place is whole lines, initialised (zero at first), and lives as long as its home.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.lines) }
    }

    fn lines_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above, and this one's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.lines) }
    }

    pub fn numbers<T: Number>(&self) -> &[T] {
        numbers(self.lines())
    }

    pub fn numbers_mut<T: Number>(&mut self) -> &mut [T] {
        numbers_mut(self.lines_mut())
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: lines are plain numbers, initialised, and live as long as this is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.lines * Line::BYTES) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this one's alone; any bytes are numbers.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.lines * Line::BYTES) }
    }

    /// Takes over what is in another of the same size.
    pub fn copy_from(&mut self, other: &Memory) {
        self.lines_mut().copy_from_slice(other.lines());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.home {
            Home::Pool { pool, superblock, slot } => pool.give_back(*superblock as usize, *slot),
            #[cfg(test)]
            Home::Own(_) => {}
        }
    }
}

/// Blocks of one size. It counts those that live, whoever holds them; memory that comes back is handed out again as it is,
/// without clearing it.
#[derive(Clone)]
pub struct BlockPool(Arc<Pooled>);

struct Pooled {
    reservation: Reservation,
    id: u64,
    element: Element,
    /// Of a block.
    lines: usize,
    /// Superblocks that are taken together, and the blocks in them.
    together: usize,
    per: usize,
    /// Blocks that may live.
    most: usize,
    own: Mutex<Own>,
}

#[derive(Default)]
struct Own {
    superblocks: Vec<Option<Cut>>,
    /// Those with free blocks: how many, and which. The fullest is cut first, so that the others come free.
    open: BTreeSet<(usize, usize)>,
    free: usize,
    live: usize,
    /// Blocks that must stay free for those who have been told that they may take them.
    kept_ready: usize,
}

struct Cut {
    memory: Superblock,
    free: Vec<u32>,
}

/// Whether blocks can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    Yes,
    /// Not before other blocks of this pool come back: it has as many as it may have.
    OwnSpent,
    /// Not before any come back.
    Spent,
}

/// Superblocks that are taken together, at most, so that little of them is left over.
const TOGETHER: usize = 8;

impl BlockPool {
    /// Of blocks of so many numbers ([`Heads::layer_elements`](super::attention::Heads::layer_elements) times layers), without a bound.
    pub fn new(elements: usize, element: Element) -> Self {
        Self::within(&Reservation::new(usize::MAX), elements, element, 0, usize::MAX)
    }

    /// Of blocks from a reservation, with a promise of some; no more than `most` are [`ready`](Self::ready) at once.
    pub fn within(reservation: &Reservation, elements: usize, element: Element, promised: usize, most: usize) -> Self {
        let lines = (elements * element.bytes()).div_ceil(Line::BYTES).max(1);
        let bytes = lines * Line::BYTES;
        let superblock = reservation.superblock();
        let fewest = bytes.div_ceil(superblock);
        let little_left = |n: &usize| n * superblock % bytes * 8 <= n * superblock;
        let together = (fewest..fewest + TOGETHER).find(little_left).unwrap_or(fewest);
        let per = together * superblock / bytes;
        let id = reservation.enter(promised.div_ceil(per) * together);
        let reservation = reservation.clone();
        Self(Arc::new(Pooled { reservation, id, element, lines, together, per, most, own: Mutex::default() }))
    }

    /// What the blocks are made of.
    pub fn element(&self) -> Element {
        self.0.element
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.0.lines * Line::BYTES
    }

    /// Blocks that somebody holds.
    pub fn live(&self) -> usize {
        self.own().live
    }

    /// Blocks that it could have if other pools had no more than they are promised.
    pub fn capacity(&self) -> usize {
        let pooled = &*self.0;
        let superblocks = pooled.reservation.most_of(pooled.id);
        (superblocks / pooled.together).saturating_mul(pooled.per).min(pooled.most)
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.0.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has so many blocks ready to be taken, and keeps them so until they are, or until another number is asked for.
    pub fn ready(&self, blocks: usize) -> Ready {
        let mut own = self.own();
        if own.live.saturating_add(blocks) > self.0.most {
            return Ready::OwnSpent;
        }
        while own.free < blocks {
            if !self.grow(&mut own, false) {
                self.shrink(&mut own);
                return Ready::Spent;
            }
        }
        own.kept_ready = blocks;
        Ready::Yes
    }

    /// A block of unknown numbers; beyond all bounds where none is ready.
    pub fn take(&self) -> Memory {
        let mut own = self.own();
        if own.free == 0 {
            self.grow(&mut own, true);
        }
        let pooled = &*self.0;
        let place = own.open.pop_first().and_then(|(free, index)| {
            let cut = own.superblocks[index].as_mut()?;
            let slot = cut.free.pop()?;
            let start = cut.memory.start();
            if free > 1 {
                own.open.insert((free - 1, index));
            }
            Some((start, index, slot))
        });
        let Some((start, index, slot)) = place else { unreachable!("a superblock holds at least one block") };
        own.free -= 1;
        own.live += 1;
        own.kept_ready = own.kept_ready.saturating_sub(1);
        // SAFETY: within the superblock, which has `per` places of `lines` lines.
        let start = unsafe { start.add(slot as usize * pooled.lines) };
        let home = Home::Pool { pool: self.clone(), superblock: index as u32, slot };
        Memory { start, lines: pooled.lines, home }
    }

    /// Takes superblocks; false where there are none.
    fn grow(&self, own: &mut Own, must: bool) -> bool {
        let Pooled { reservation, id, together, per, .. } = &*self.0;
        let Some(memory) = reservation.take(*id, *together, must) else { return false };
        let cut = Cut { memory, free: (0..*per as u32).rev().collect() };
        let index = own.superblocks.iter().position(Option::is_none).unwrap_or(own.superblocks.len());
        match own.superblocks.get_mut(index) {
            Some(place) => *place = Some(cut),
            None => own.superblocks.push(Some(cut)),
        }
        own.open.insert((*per, index));
        own.free += per;
        true
    }

    fn give_back(&self, index: usize, slot: u32) {
        let mut own = self.own();
        let Some(cut) = own.superblocks[index].as_mut() else { return };
        cut.free.push(slot);
        let free = cut.free.len();
        own.open.remove(&(free - 1, index));
        own.open.insert((free, index));
        own.free += 1;
        own.live -= 1;
        if free == self.0.per {
            self.shrink(&mut own);
        }
    }

    /// Gives back superblocks all of whose blocks are free, but for what is kept ready.
    fn shrink(&self, own: &mut Own) {
        let Pooled { reservation, id, together, per, .. } = &*self.0;
        while let Some((free, index)) = own.open.last().copied()
            && free == *per
            && own.free - per >= own.kept_ready
        {
            own.open.pop_last();
            own.free -= per;
            if let Some(cut) = own.superblocks[index].take() {
                reservation.give_back(*id, *together, cut.memory);
            }
        }
    }

    /// Ends what was promised, and what is kept ready: nobody takes blocks any more.
    pub fn retire(&self) {
        self.0.reservation.retire(self.0.id);
        let mut own = self.own();
        own.kept_ready = 0;
        self.shrink(&mut own);
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.reservation.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::Rng;

    /// Of blocks of this many lines.
    fn pool(reservation: &Reservation, lines: usize, promised: usize) -> BlockPool {
        BlockPool::within(reservation, lines * 16, Element::F32, promised, usize::MAX)
    }

    #[test]
    fn pools_of_different_blocks_share_one_reservation_and_never_overlap() {
        let reservation = Reservation::of(24, 16 * Line::BYTES);
        let pools = [pool(&reservation, 1, 0), pool(&reservation, 5, 9), pool(&reservation, 17, 1)];
        assert_eq!(pools[1].0.per * 5, 15, "one line in sixteen is left over");
        assert_eq!((pools[2].0.together, pools[2].0.per), (6, 5), "85 of 96 lines");
        let mut rng = Rng(3);
        let mut below = move |n: usize| rng.below(n);
        let mut held: Vec<(usize, f32, Memory)> = Vec::new();
        let (mut refused, mut taken) = (0, 0);
        for n in 0..100_000 {
            let which = below(3);
            if below(5) < 3 {
                let count = 1 + below(4);
                match pools[which].ready(count) {
                    Ready::Yes => (0..count).for_each(|i| {
                        let mut memory = pools[which].take();
                        let mark = (n * 4 + i) as f32;
                        memory.numbers_mut::<f32>().fill(mark);
                        held.push((which, mark, memory));
                        taken += 1;
                    }),
                    other => {
                        assert_eq!(other, Ready::Spent);
                        refused += 1;
                    }
                }
            } else {
                for _ in 0..below(12).min(held.len()) {
                    let (_, mark, memory) = held.swap_remove(below(held.len()));
                    assert!(memory.numbers::<f32>().iter().all(|n| *n == mark), "somebody else wrote here");
                }
            }
            let (owned, most) = reservation.bytes();
            assert!(owned <= most, "{owned} of {most} bytes");
            for (which, pool) in pools.iter().enumerate() {
                assert_eq!(pool.live(), held.iter().filter(|(of, _, _)| *of == which).count());
            }
            // What is promised can be had whatever the others do.
            if pools[1].live() < 9 {
                assert_eq!(pools[1].ready(9 - pools[1].live()), Ready::Yes);
            }
        }
        assert!(refused > 1_000 && taken > 10_000, "{refused} refused, {taken} taken");
        held.clear();
        pools.iter().for_each(BlockPool::retire);
        assert_eq!(reservation.bytes().0, 0);
    }

    #[test]
    fn a_pool_has_a_bound_of_its_own_and_is_never_without_a_block_when_it_must() {
        let reservation = Reservation::of(2, 2 * Line::BYTES);
        let a = BlockPool::within(&reservation, 16, Element::F32, 0, 3);
        assert_eq!(a.ready(4), Ready::OwnSpent);
        assert_eq!(a.ready(3), Ready::Yes);
        let held: Vec<Memory> = (0..3).map(|_| a.take()).collect();
        let b = pool(&reservation, 1, 0);
        assert_eq!(b.ready(1), Ready::Spent);
        let beyond = b.take();
        assert_eq!(reservation.bytes(), (6 * Line::BYTES, 4 * Line::BYTES));
        drop(beyond);
        assert_eq!(reservation.bytes().0, 4 * Line::BYTES);
        drop(a);
        drop(held);
        assert_eq!(b.ready(4), Ready::Yes);
    }
}
