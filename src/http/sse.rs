//! The body of a streamed answer. Chunks that are ready together leave in one frame; while nothing has come yet, comments
//! keep the connection alive, also before it is known who answers ([`SseBody::before`]); a failure ends the stream with an
//! error event and never with `[DONE]`. Dropping the body (the client has left) drops the stream, and that cancels the
//! request.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{body::HttpBody, http::HeaderName};
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture, stream::BoxStream};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::{
    error::ApiError,
    observe::StreamObservation,
    wire::chunk::{self, Encoder},
};
use crate::{domain::Chunk, gateway::GatewayError};

/// While nothing may stream yet.
pub(super) const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// A frame is sent at this size even when more chunks are ready.
const FRAME: usize = 16 << 10;

/// An answer that has begun.
pub(super) struct Begun {
    pub chunks: BoxStream<'static, Result<Chunk, GatewayError>>,
    pub encoder: Encoder,
    /// What the head would have said had it not gone out before, as comments.
    pub said: Vec<(HeaderName, String)>,
}

enum Source {
    /// The head is out; the answer has not begun.
    Waiting(BoxFuture<'static, Result<Begun, ApiError>>),
    Begun(Begun),
    Over,
}

/// Server-sent events of one answer.
pub(super) struct SseBody {
    source: Source,
    buffer: BytesMut,
    heartbeat: Heartbeat,
    /// Told of a failure; ends with this body.
    observation: StreamObservation,
}

enum Heartbeat {
    /// The first poll sets the clock, if it finds nothing.
    Unset(Duration),
    Waiting(Duration, Pin<Box<Sleep>>),
    /// Something has streamed.
    Over,
}

impl SseBody {
    /// Of an answer that has begun.
    pub(super) fn new(begun: Begun, heartbeat: Duration, observation: StreamObservation) -> Self {
        Self::of(Source::Begun(begun), heartbeat, observation)
    }

    /// Of one that is still to come. Begins with a comment, as some proxies pass a head on with what follows it.
    pub(super) fn before(
        answer: BoxFuture<'static, Result<Begun, ApiError>>,
        heartbeat: Duration,
        observation: StreamObservation,
    ) -> Self {
        let mut body = Self::of(Source::Waiting(answer), heartbeat, observation);
        body.buffer.extend_from_slice(chunk::HEARTBEAT);
        body
    }

    fn of(source: Source, heartbeat: Duration, observation: StreamObservation) -> Self {
        let buffer = BytesMut::with_capacity(1024);
        Self { source, buffer, heartbeat: Heartbeat::Unset(heartbeat), observation }
    }

    fn frame(&mut self) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(self.buffer.split().freeze()))))
    }

    /// Ends with an error event.
    fn fail(&mut self, error: &ApiError) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        tracing::warn!(kind = error.kind(), id = ?error.id, "stream failed");
        self.observation.ended(error.status.as_u16());
        chunk::error(&error.json(), &mut self.buffer);
        self.source = Source::Over;
        self.frame()
    }
}

impl HttpBody for SseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            let begun = match &mut this.source {
                Source::Over => return Poll::Ready(None),
                Source::Begun(begun) => Some(begun),
                Source::Waiting(answer) => match answer.poll_unpin(cx) {
                    Poll::Ready(Ok(begun)) => {
                        chunk::comments(&begun.said, &mut this.buffer);
                        this.source = Source::Begun(begun);
                        continue;
                    }
                    Poll::Ready(Err(error)) => return this.fail(&error),
                    Poll::Pending => None,
                },
            };
            let next = begun.map_or(Poll::Pending, |begun| {
                let next = begun.chunks.as_mut().poll_next(cx);
                if let Poll::Ready(Some(Ok(chunk))) = &next {
                    begun.encoder.chunk(chunk, &mut this.buffer);
                }
                next
            });
            match next {
                Poll::Ready(Some(Ok(_))) => {
                    this.heartbeat = Heartbeat::Over;
                    if this.buffer.len() >= FRAME {
                        return this.frame();
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    return this.fail(&ApiError::from(error));
                }
                Poll::Ready(None) => {
                    chunk::done(&mut this.buffer);
                    this.observation.ended(200);
                    this.source = Source::Over;
                    return this.frame();
                }
                Poll::Pending if !this.buffer.is_empty() => return this.frame(),
                Poll::Pending => match &mut this.heartbeat {
                    Heartbeat::Over => return Poll::Pending,
                    Heartbeat::Unset(every) => {
                        let every = *every;
                        this.heartbeat = Heartbeat::Waiting(every, Box::pin(tokio::time::sleep(every)));
                    }
                    Heartbeat::Waiting(every, sleep) => {
                        if sleep.as_mut().poll(cx).is_pending() {
                            return Poll::Pending;
                        }
                        let next = Instant::now() + *every;
                        sleep.as_mut().reset(next);
                        this.buffer.extend_from_slice(chunk::HEARTBEAT);
                        return this.frame();
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Over)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
