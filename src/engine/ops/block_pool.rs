//! Memory for keys and values: blocks of one size, counted while anybody holds them and handed out again.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use super::number::{Element, Line, Number, numbers, numbers_mut};

/// The keys and values of [`POSITIONS`](super::attention::POSITIONS) neighbouring positions of one sequence in all layers, layer after layer.
pub type Block = Arc<Memory>;

/// The memory of a block, of numbers that those who use it agree upon. Comes from a [`BlockPool`] and goes back to it; of its own where no pool is named.
pub struct Memory {
    lines: Vec<Line>,
    pool: Option<BlockPool>,
}

impl Memory {
    /// Of its own, with these numbers.
    #[cfg(test)]
    pub fn of<T: Number>(values: &[T]) -> Self {
        let mut lines = vec![Line::default(); size_of_val(values).div_ceil(Line::BYTES)];
        numbers_mut(&mut lines)[..values.len()].copy_from_slice(values);
        Self { lines, pool: None }
    }

    pub fn numbers<T: Number>(&self) -> &[T] {
        numbers(&self.lines)
    }

    pub fn numbers_mut<T: Number>(&mut self) -> &mut [T] {
        numbers_mut(&mut self.lines)
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        match &self.pool {
            Some(pool) => {
                let mut copy = pool.take();
                copy.lines.copy_from_slice(&self.lines);
                copy
            }
            None => Self { lines: self.lines.clone(), pool: None },
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.give_back(std::mem::take(&mut self.lines));
        }
    }
}

/// Blocks of one size. It counts those that live, whoever holds them, so that whoever may let some go can keep them within a
/// bound; memory that comes back is handed out again as it is, without clearing it.
#[derive(Clone)]
pub struct BlockPool(Arc<Pooled>);

struct Pooled {
    element: Element,
    lines: usize,
    live: AtomicUsize,
    free: Mutex<Vec<Vec<Line>>>,
}

impl BlockPool {
    /// Of blocks of so many numbers: [`Heads::layer_elements`](super::attention::Heads::layer_elements) times layers.
    pub fn new(elements: usize, element: Element) -> Self {
        let lines = (elements * element.bytes()).div_ceil(Line::BYTES);
        Self(Arc::new(Pooled { element, lines, live: AtomicUsize::new(0), free: Mutex::default() }))
    }

    /// What the blocks are made of.
    pub fn element(&self) -> Element {
        self.0.element
    }

    /// Blocks that somebody holds.
    pub fn live(&self) -> usize {
        self.0.live.load(Ordering::Relaxed)
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<Line>>> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of unknown numbers.
    pub fn take(&self) -> Memory {
        let again = self.free().pop();
        let lines = again.unwrap_or_else(|| vec![Line::default(); self.0.lines]);
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Memory { lines, pool: Some(self.clone()) }
    }

    fn give_back(&self, lines: Vec<Line>) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
        self.free().push(lines);
    }
}
