//! Memory for keys and values: blocks of one size, counted while anybody holds them and handed out again.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

/// The keys and values of [`POSITIONS`](super::attention::POSITIONS) neighbouring positions of one sequence in all layers, layer after layer.
pub type Block = Arc<Memory>;

/// The memory of a block. Comes from a [`BlockPool`] and goes back to it; of its own where no pool is named.
pub struct Memory {
    numbers: Vec<f32>,
    pool: Option<BlockPool>,
}

impl From<Vec<f32>> for Memory {
    fn from(numbers: Vec<f32>) -> Self {
        Self { numbers, pool: None }
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        match &self.pool {
            Some(pool) => {
                let mut copy = pool.take();
                copy.numbers.copy_from_slice(&self.numbers);
                copy
            }
            None => Self::from(self.numbers.clone()),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.give_back(std::mem::take(&mut self.numbers));
        }
    }
}

impl std::ops::Deref for Memory {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers
    }
}

impl std::ops::DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers
    }
}

/// Blocks of one size. It counts those that live, whoever holds them, so that whoever may let some go can keep them within a
/// bound; memory that comes back is handed out again as it is, without clearing it.
#[derive(Clone)]
pub struct BlockPool(Arc<Pooled>);

struct Pooled {
    elements: usize,
    live: AtomicUsize,
    free: Mutex<Vec<Vec<f32>>>,
}

impl BlockPool {
    /// Of blocks of so many numbers: [`Heads::layer_elements`](super::attention::Heads::layer_elements) times layers.
    pub fn new(elements: usize) -> Self {
        Self(Arc::new(Pooled { elements, live: AtomicUsize::new(0), free: Mutex::default() }))
    }

    /// Blocks that somebody holds.
    pub fn live(&self) -> usize {
        self.0.live.load(Ordering::Relaxed)
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of unknown numbers.
    pub fn take(&self) -> Memory {
        let again = self.free().pop();
        let numbers = again.unwrap_or_else(|| vec![0.0; self.0.elements]);
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Memory { numbers, pool: Some(self.clone()) }
    }

    fn give_back(&self, numbers: Vec<f32>) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
        self.free().push(numbers);
    }
}
