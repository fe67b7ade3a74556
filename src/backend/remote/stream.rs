//! The answer of a remote server as it streams: frames in, chunks out, ids rewritten on the way. Little is done per event:
//! an event that begins like the ones before it is searched for three field names and copied once.

use std::{
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, Sleep};

use super::sse::Splitter;
use crate::{
    backend::{
        BackendError,
        slots::Slot,
        status::{self, ErrorObject},
        tally::Tally,
        wire::{self, Field},
    },
    domain::{Chunk, ErrorKind, Request, Usage},
};

/// No event of a sane server is longer; a stream that never ends one must not fill the memory.
const MAX_EVENT: usize = 16 << 20;

/// How long a finished answer's connection may take to end the body before it is given up.
const DRAIN: Duration = Duration::from_millis(500);

/// The time limits of one stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// The first event must have come by then.
    pub(super) first: Instant,
    pub(super) first_limit: Duration,
    /// Longest silence after that.
    pub(super) idle: Duration,
    /// The last event must have come by then.
    pub(super) end: Option<Instant>,
}

/// One streamed answer.
pub(super) struct RemoteStream {
    body: Option<Incoming>,
    splitter: Splitter,
    /// Model and server, for messages.
    whose: Arc<str>,
    request: Arc<Request>,
    new_id: String,
    upstream_id: Option<String>,
    model_reported: Option<String>,
    usage: Option<Usage>,
    tally: Tally,
    /// Whether any choice has come.
    chosen: bool,
    /// Choices that have said why they ended.
    finished: u32,
    /// A chunk that was read ahead.
    ahead: Option<Chunk>,
    times: Times,
    heard: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
    at: At,
    _slot: Slot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Reading,
    /// `[DONE]` or its equivalent has come; usage is to be told.
    Done,
    Over,
}

impl RemoteStream {
    pub(super) fn new(
        body: Incoming,
        whose: Arc<str>,
        request: Arc<Request>,
        new_id: String,
        times: Times,
        slot: Slot,
    ) -> Self {
        Self {
            body: Some(body),
            splitter: Splitter::default(),
            whose,
            request,
            new_id,
            upstream_id: None,
            model_reported: None,
            usage: None,
            tally: Tally::default(),
            chosen: false,
            finished: 0,
            ahead: None,
            times,
            heard: None,
            alarm: None,
            at: At::Reading,
            _slot: slot,
        }
    }

    /// Waits for the first event, so that a server that fails at once fails before anything is promised to the client.
    pub(super) async fn open(&mut self) -> Result<(), BackendError> {
        let first = std::future::poll_fn(|cx| self.poll_chunk(cx)).await;
        match first {
            Some(Ok(chunk)) => self.ahead = Some(chunk),
            Some(Err(error)) => return Err(error),
            None => {}
        }
        Ok(())
    }

    /// What the server called its model.
    pub(super) fn model_reported(&self) -> Option<String> {
        self.model_reported.clone()
    }

    fn fail(&mut self, kind: ErrorKind, what: &str) -> BackendError {
        self.end();
        BackendError::new(kind, format!("{} {what}", self.whose))
    }

    /// Nothing more is wanted of the server; dropping the body closes its connection.
    fn end(&mut self) {
        self.at = At::Over;
        self.body = None;
        self.alarm = None;
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, BackendError>>> {
        loop {
            match self.at {
                At::Over => return Poll::Ready(None),
                At::Done => {
                    self.at = At::Over;
                    self.alarm = None;
                    let usage = self.usage.unwrap_or_else(|| self.tally.usage(&self.request));
                    return Poll::Ready(Some(Ok(Chunk::Usage(usage))));
                }
                At::Reading => {}
            }
            while let Some(data) = self.splitter.next_event() {
                match self.event(data) {
                    Ok(Some(chunk)) => return Poll::Ready(Some(Ok(chunk))),
                    Ok(None) if self.at == At::Done => {
                        // Asking once more makes the connection read on to the end of the body, after which it can serve
                        // another request.
                        if self.poll_end_of_body(cx).is_ready() {
                            self.body = None;
                        }
                        break;
                    }
                    Ok(None) => {}
                    Err(error) => {
                        self.end();
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
            if self.at != At::Reading {
                continue;
            }
            if self.splitter.pending() > MAX_EVENT {
                let error = self.fail(ErrorKind::Garbage, "sent an event without end");
                return Poll::Ready(Some(Err(error)));
            }
            let Some(body) = self.body.as_mut() else {
                self.at = At::Over;
                continue;
            };
            match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    // Once it has begun to answer, a server that sends heartbeats is not silent.
                    if self.heard.is_some() {
                        self.heard = Some(Instant::now());
                    }
                    if let Ok(data) = frame.into_data() {
                        self.splitter.push(data);
                    }
                }
                Poll::Ready(Some(Err(_))) => {
                    let error = self.fail(ErrorKind::Cut, "broke off its answer");
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    self.body = None;
                    if self.splitter.ends_with_done() || self.finished >= self.request.n.max(1) {
                        if !self.chosen {
                            let error = self.fail(ErrorKind::Garbage, "streamed no completion");
                            return Poll::Ready(Some(Err(error)));
                        }
                        self.at = At::Done;
                        continue;
                    }
                    let error = self.fail(ErrorKind::Cut, "ended its stream before the answer's end");
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Pending => {
                    let Some(what) = std::task::ready!(self.poll_alarm(cx)) else { continue };
                    let error = self.fail(ErrorKind::Timeout, &what);
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    /// Ready when a limit has passed, with the sentence that says so. The timer is moved only when it rings, not per event.
    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> Poll<Option<String>> {
        let times = self.times;
        let quiet_until = match self.heard {
            None => times.first,
            Some(heard) => heard + times.idle,
        };
        let until = times.end.map_or(quiet_until, |end| end.min(quiet_until));
        loop {
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            // From the wait for the first event to the waits after it the limit comes nearer; else it only moves away.
            if alarm.deadline() > until {
                alarm.as_mut().reset(until);
            }
            std::task::ready!(alarm.as_mut().poll(cx));
            if alarm.deadline() >= until {
                break;
            }
            alarm.as_mut().reset(until);
        }
        Poll::Ready(Some(if times.end.is_some_and(|end| end <= quiet_until) {
            "took longer than its total time limit".to_owned()
        } else if self.heard.is_none() {
            format!("sent nothing for {:?}", times.first_limit)
        } else {
            format!("fell silent for {:?} in the middle of its answer", times.idle)
        }))
    }

    /// Takes one event: a chunk for the client, or none when there is nothing to pass on.
    fn event(&mut self, data: Bytes) -> Result<Option<Chunk>, BackendError> {
        if self.heard.is_none() {
            self.heard = Some(Instant::now());
        }
        if data.starts_with(b"[DONE]") {
            if !self.chosen {
                return Err(self.fail(ErrorKind::Garbage, "streamed no completion"));
            }
            self.at = At::Done;
            return Ok(None);
        }
        if data.is_empty() {
            return Ok(None);
        }
        let known = self.upstream_id.as_deref().and_then(|id| wire::leading_id(&data, id));
        let like_the_others = |_: &Range<usize>| self.chosen && !wire::may_hold_error(&data);
        let Some(span) = known.filter(like_the_others) else {
            return self.unlike_the_others(data);
        };
        if wire::may_hold_usage(&data) {
            let Ok(fields) = wire::fields(&data) else { return Err(self.no_json()) };
            if self.is_only_usage(&fields) {
                return Ok(None);
            }
        } else if !wire::is_json(&data) {
            return Err(self.no_json());
        }
        self.tally.wire(data.len());
        self.finished += wire::finish_reasons(&data).count() as u32;
        Ok(Some(Chunk::Wire(wire::splice_id(&data, span, &self.new_id))))
    }

    fn no_json(&mut self) -> BackendError {
        self.fail(ErrorKind::Garbage, "streamed an event that is no JSON object")
    }

    /// Takes what an event says of usage. Whether it is the one that weir asked for and the client did not.
    fn is_only_usage(&mut self, fields: &[Field<'_>]) -> bool {
        if !wire::tells_usage(fields) {
            return false;
        }
        self.usage = wire::usage_in(fields).or(self.usage);
        !self.request.include_usage && wire::has_no_choices(fields)
    }

    /// An event that has to be parsed: the first, one with another id, one that is no chunk.
    fn unlike_the_others(&mut self, data: Bytes) -> Result<Option<Chunk>, BackendError> {
        let Ok(fields) = wire::fields(&data) else { return Err(self.no_json()) };
        if let Some(object) = ErrorObject::in_fields(&fields, &data) {
            let error = status::reported_inside(&self.whose, &object, data.clone());
            self.end();
            return Err(error);
        }
        let text = |name: &str| -> Option<String> {
            let field = fields.iter().rfind(|f| f.key == name)?;
            serde_json::from_str(field.value).ok()
        };
        if !fields.iter().any(|f| f.key == "choices" && f.value.starts_with('[')) {
            return Err(self.fail(ErrorKind::Garbage, "streamed an event that is no completion chunk"));
        }
        if let Some(id) = text("id").filter(|id| !id.is_empty()) {
            self.upstream_id = Some(id);
        }
        if self.model_reported.is_none() {
            self.model_reported = text("model").filter(|m| !m.is_empty());
        }
        self.chosen |= wire::has_choice(&fields);
        if self.is_only_usage(&fields) {
            return Ok(None);
        }
        self.tally.wire(data.len());
        self.finished += wire::finish_reasons(&data).count() as u32;
        Ok(Some(Chunk::Wire(wire::rewrite_id_in(&data, &fields, &self.new_id))))
    }

    /// Reads on to the end of the body, throwing away what comes.
    fn poll_end_of_body(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(body) = self.body.as_mut() else { return Poll::Ready(()) };
        while let Some(Ok(_)) = std::task::ready!(Pin::new(&mut *body).poll_frame(cx)) {}
        Poll::Ready(())
    }
}

impl Stream for RemoteStream {
    type Item = Result<Chunk, BackendError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(chunk) = this.ahead.take() {
            return Poll::Ready(Some(Ok(chunk)));
        }
        this.poll_chunk(cx)
    }
}

impl Drop for RemoteStream {
    fn drop(&mut self) {
        // An answer that came to its end, on a connection that has not told so yet: dropped now it would be closed.
        let ended = self.at == At::Over || self.at == At::Done;
        let Some(mut body) = self.body.take().filter(|_| ended) else { return };
        let mut nobody = Context::from_waker(std::task::Waker::noop());
        if let Poll::Ready(None | Some(Err(_))) = Pin::new(&mut body).poll_frame(&mut nobody) {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let rest = std::future::poll_fn(|cx| {
                    while let Some(Ok(_)) = std::task::ready!(Pin::new(&mut body).poll_frame(cx)) {}
                    Poll::Ready(())
                });
                // Whatever is not over by then is not worth keeping.
                let _ = tokio::time::timeout(DRAIN, rest).await;
            });
        }
    }
}
