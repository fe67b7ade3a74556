//! The body of a streamed answer. Chunks that are ready together leave in one frame; while nothing has come yet, comments
//! keep the connection alive; a failure ends the stream with an error event and never with `[DONE]`. Dropping the body
//! (the client has left) drops the stream, and that cancels the request.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::HttpBody;
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
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

/// Server-sent events of one answer.
pub(super) struct SseBody {
    chunks: Option<BoxStream<'static, Result<Chunk, GatewayError>>>,
    encoder: Encoder,
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
    pub(super) fn new(
        chunks: BoxStream<'static, Result<Chunk, GatewayError>>,
        encoder: Encoder,
        heartbeat: Duration,
        observation: StreamObservation,
    ) -> Self {
        Self {
            chunks: Some(chunks),
            encoder,
            buffer: BytesMut::with_capacity(1024),
            heartbeat: Heartbeat::Unset(heartbeat),
            observation,
        }
    }

    fn frame(&mut self) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(self.buffer.split().freeze()))))
    }
}

impl HttpBody for SseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            let Some(chunks) = &mut this.chunks else { return Poll::Ready(None) };
            match chunks.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(chunk))) => {
                    this.heartbeat = Heartbeat::Over;
                    this.encoder.chunk(&chunk, &mut this.buffer);
                    if this.buffer.len() >= FRAME {
                        return this.frame();
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    let error = ApiError::from(error);
                    tracing::warn!(kind = error.kind(), id = ?error.id, "stream failed");
                    this.observation.ended(error.status.as_u16());
                    chunk::error(&error.json(), &mut this.buffer);
                    this.chunks = None;
                    return this.frame();
                }
                Poll::Ready(None) => {
                    chunk::done(&mut this.buffer);
                    this.observation.ended(200);
                    this.chunks = None;
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
        self.chunks.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
