//! Group fdatasync for [`super::Durability::Strict`]: one thread syncs, and each round serves all who were waiting.

use std::{
    fs::File,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use tokio::sync::watch;

use super::LogError;

struct State {
    file: Arc<File>,
    /// Last event written, into `file` or into a segment before it (which was synced when it was left).
    written: u64,
    stop: bool,
}

struct Inner {
    state: Mutex<State>,
    wake: Condvar,
    /// Last event on the disk, or why there will be no more.
    synced: watch::Sender<Result<u64, String>>,
}

/// Handle of the syncing thread; the thread ends when it is dropped.
pub(super) struct Syncer(Arc<Inner>);

impl Syncer {
    pub(super) fn start(file: Arc<File>, seq: u64) -> io::Result<Self> {
        // What recovery found was maybe never synced.
        file.sync_data()?;
        let inner = Arc::new(Inner {
            state: Mutex::new(State { file, written: seq, stop: false }),
            wake: Condvar::new(),
            synced: watch::Sender::new(Ok(seq)),
        });
        let of_thread = inner.clone();
        std::thread::Builder::new().name("weir-log-sync".to_owned()).spawn(move || run(&of_thread, seq))?;
        Ok(Self(inner))
    }

    /// Tells the thread what there is to sync.
    pub(super) fn written(&self, file: Arc<File>, seq: u64) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.file = file;
        state.written = seq;
        self.0.wake.notify_one();
    }

    /// Waits until event `seq` is on the disk.
    pub(super) async fn wait(&self, seq: u64) -> Result<(), LogError> {
        let mut synced = self.0.synced.subscribe();
        let reached = synced
            .wait_for(|state| state.as_ref().map_or(true, |&done| done >= seq))
            .await
            .map_err(|_| LogError::Broken("the syncing thread has ended".to_owned()))?;
        match &*reached {
            Ok(_) => Ok(()),
            Err(error) => Err(LogError::Broken(error.clone())),
        }
    }
}

fn run(inner: &Inner, mut done: u64) {
    loop {
        let (file, written) = {
            let mut state = inner.state.lock().unwrap_or_else(PoisonError::into_inner);
            while state.written == done && !state.stop {
                state = inner.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop {
                return;
            }
            (state.file.clone(), state.written)
        };
        match file.sync_data() {
            Ok(()) => {
                done = written;
                let _ = inner.synced.send_replace(Ok(done));
            }
            Err(error) => {
                // After a failed fsync the kernel may have dropped the pages and will report success next time: nothing
                // written since the last good one can be trusted to be there.
                tracing::error!(%error, "the event log cannot be synced");
                let _ = inner.synced.send_replace(Err(error.to_string()));
                return;
            }
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stop = true;
        self.0.wake.notify_one();
    }
}
