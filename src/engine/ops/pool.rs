//! A small pool of threads that park while there is nothing to do.
//!
//! Spinning pools collapse when the cores are shared with others (one token per second was seen), so nothing spins
//! here. The caller takes part in its own job, and does not wait for workers that have not woken up in time: with the
//! other cores busy, a job costs what it costs alone.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

type Task = dyn Fn(usize) + Sync;

#[derive(Clone, Copy)]
struct Job {
    /// Lives until [`Pool::run`] returns, which waits for every worker that has taken it.
    run: *const Task,
    tasks: usize,
}

// SAFETY: the pointee is Sync, and `Pool::run` keeps it alive for as long as a worker may use it.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Counts jobs, so that a worker takes each once.
    generation: u64,
    /// Workers inside the present job.
    inside: usize,
    stop: bool,
}

#[derive(Default)]
struct Board {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
    next: AtomicUsize,
    panicked: AtomicBool,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that help the calling thread. One caller at a time (`&mut`-like use by one engine thread).
pub struct Pool {
    board: Arc<Board>,
    workers: Vec<JoinHandle<()>>,
    /// Keeps two callers apart, should there be two.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool in which `threads` threads work, the caller's included; at least 1.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let board = Arc::new(Board::default());
        let mut workers = Vec::new();
        for i in 1..threads.max(1) {
            let board = Arc::clone(&board);
            workers.push(std::thread::Builder::new().name(format!("weir-compute-{i}")).spawn(move || work(&board))?);
        }
        Ok(Self { board, workers, turn: Mutex::new(()) })
    }

    /// Threads that may work on a job, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run` once with each number below `tasks`, in any order and on any thread; returns when all are done.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks < 2 {
            (0..tasks).for_each(run);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime is erased. `finish` below runs before this function returns or unwinds, takes the job
        // off the board and waits until no worker is inside.
        let erased = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(run) };
        {
            let mut state = self.board.lock();
            self.board.next.store(0, Ordering::Relaxed);
            state.job = Some(Job { run: erased, tasks });
            state.generation += 1;
        }
        for _ in 0..self.workers.len().min(tasks - 1) {
            self.board.wake.notify_one();
        }
        let finish = Finish(&self.board);
        take(&self.board, tasks, run);
        drop(finish);
        if self.board.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a compute task panicked on another thread"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.board.lock().stop = true;
        self.board.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
    }
}

/// Takes the job off the board and waits for those inside, also while unwinding.
struct Finish<'a>(&'a Board);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.job = None;
        while state.inside > 0 {
            state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn take(board: &Board, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
    loop {
        let task = board.next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        run(task);
    }
}

fn work(board: &Board) {
    let mut seen = 0;
    let mut state = board.lock();
    loop {
        if state.stop {
            return;
        }
        let Some(job) = state.job.filter(|_| state.generation != seen) else {
            state = board.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        seen = state.generation;
        state.inside += 1;
        drop(state);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: `inside` was raised while the job was on the board, so its owner waits for us.
            let run = unsafe { &*job.run };
            take(board, job.tasks, run);
        }));
        if outcome.is_err() {
            board.panicked.store(true, Ordering::Relaxed);
        }
        state = board.lock();
        state.inside -= 1;
        if state.inside == 0 {
            board.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_is_done_on_return() {
        let pool = Pool::new(4).unwrap();
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..round % 37).map(|_| AtomicUsize::new(0)).collect();
            pool.run(counts.len(), &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "round {round}");
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|i| assert!(i != 40, "boom"))));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }
}
