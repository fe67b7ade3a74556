//! Reads request bodies up to a limit, kindly: a client that sends more gets its 413 rather than a broken pipe.

use std::time::Duration;

use axum::{
    body::{Body, HttpBody},
    http::{HeaderMap, header},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use super::error::ApiError;

/// How much beyond the limit is read and thrown away so that the client, which writes before it reads, sees the answer.
const DISCARDED: usize = 64 << 20;
/// And for how long.
const DISCARD_TIME: Duration = Duration::from_secs(5);
/// A body that stalls this long is given up.
const STALLED: Duration = Duration::from_secs(30);

/// Reads the whole body.
///
/// # Errors
/// 413 beyond `limit` bytes, 408 when it stalls, 400 when it ends early.
pub(super) async fn read(mut body: Body, headers: &HeaderMap, limit: usize) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    if announced > limit as u64 {
        // Who asks first (`expect: 100-continue`) has sent nothing yet.
        if !headers.contains_key(header::EXPECT) && announced <= (limit + DISCARDED) as u64 {
            discard(body).await;
        }
        return Err(ApiError::too_large(limit));
    }
    // Most bodies come in one frame, which is then the answer, uncopied.
    let Some(first) = frame(&mut body).await? else { return Ok(Bytes::new()) };
    if body.is_end_stream() && first.len() <= limit {
        return Ok(first);
    }
    let mut all = BytesMut::with_capacity((announced as usize).max(first.len()));
    all.extend_from_slice(&first);
    loop {
        if all.len() > limit {
            discard(body).await;
            return Err(ApiError::too_large(limit));
        }
        match frame(&mut body).await? {
            Some(data) => all.extend_from_slice(&data),
            None => return Ok(all.freeze()),
        }
    }
}

/// The next data; `None` at the end.
async fn frame(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        let next = if body.is_end_stream() {
            None
        } else {
            tokio::time::timeout(STALLED, body.frame()).await.map_err(|_| {
                let message = format!("The body did not arrive: nothing for {} s.", STALLED.as_secs());
                ApiError::new(axum::http::StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "body_timeout", message)
            })?
        };
        match next {
            None => return Ok(None),
            Some(Ok(frame)) => {
                // Trailers are nobody's.
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(_)) => {
                return Err(ApiError::invalid("incomplete_body", "The body ended before its length was reached."));
            }
        }
    }
}

async fn discard(mut body: Body) {
    let all = async {
        let mut left = DISCARDED;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(DISCARD_TIME, all).await;
}
