//! The calls that are under way: several at once where the plan has them so.

use std::task::{Context, Poll};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};

use crate::{
    backend::{BackendError, Reply},
    domain::{Chunk, Completion, ErrorKind},
};

type Chunks = BoxStream<'static, Result<Chunk, BackendError>>;

/// What a call did.
pub(super) enum Happened {
    /// It was accepted and answers with a stream.
    Started {
        model_reported: Option<String>,
    },
    /// A piece of its stream.
    Piece(Chunk),
    /// Its answer is there, whole.
    Whole {
        completion: Completion,
        model_reported: Option<String>,
    },
    Failed(BackendError),
}

/// Calls under way, by number.
#[derive(Default)]
pub(super) struct Calls<'a> {
    active: Vec<(u32, Progress<'a>)>,
    /// Which is asked first next time, so that none waits for another's stream to end.
    turn: usize,
}

enum Progress<'a> {
    /// Sent; no answer yet.
    Starting(BoxFuture<'a, Result<Reply, BackendError>>),
    Answering(Chunks),
}

impl<'a> Calls<'a> {
    pub(super) fn start(&mut self, call: u32, reply: BoxFuture<'a, Result<Reply, BackendError>>) {
        self.active.push((call, Progress::Starting(reply)));
    }

    pub(super) fn is_active(&self, call: u32) -> bool {
        self.active.iter().any(|(active, _)| *active == call)
    }

    /// Drops a call, which cancels it.
    pub(super) fn cancel(&mut self, call: u32) {
        self.active.retain(|(active, _)| *active != call);
    }

    /// Gives away a call's stream.
    pub(super) fn take(&mut self, call: u32) -> Option<Chunks> {
        let place = self.active.iter().position(|(active, _)| *active == call)?;
        match self.active.swap_remove(place).1 {
            Progress::Answering(chunks) => Some(chunks),
            Progress::Starting(_) => None,
        }
    }

    /// The next thing that a call does. A call that has ended is no longer there.
    pub(super) async fn next(&mut self) -> (u32, Happened) {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u32, Happened)> {
        let count = self.active.len();
        for step in 0..count {
            let place = (self.turn + step) % count;
            let (call, progress) = &mut self.active[place];
            let call = *call;
            if let Poll::Ready(happened) = progress.poll(cx) {
                match happened {
                    Happened::Whole { .. } | Happened::Failed(_) => self.cancel(call),
                    Happened::Started { .. } | Happened::Piece(_) => {}
                }
                self.turn = place + 1;
                return Poll::Ready((call, happened));
            }
        }
        Poll::Pending
    }
}

impl Progress<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Happened> {
        let happened = match self {
            Progress::Starting(reply) => match std::task::ready!(reply.poll_unpin(cx)) {
                Ok(Reply::Whole { completion, model_reported }) => Happened::Whole { completion, model_reported },
                Ok(Reply::Stream { chunks, model_reported }) => {
                    *self = Progress::Answering(chunks);
                    Happened::Started { model_reported }
                }
                Err(error) => Happened::Failed(error),
            },
            Progress::Answering(chunks) => match std::task::ready!(chunks.poll_next_unpin(cx)) {
                Some(Ok(chunk)) => Happened::Piece(chunk),
                Some(Err(error)) => Happened::Failed(error),
                None => {
                    let what = "the backend's stream ended before its answer did";
                    Happened::Failed(BackendError::new(ErrorKind::Cut, what))
                }
            },
        };
        Poll::Ready(happened)
    }
}
