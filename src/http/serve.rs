//! The server: accepts, serves HTTP/1.1, drains. hyper directly rather than `axum::serve`, for three things that one lacks:
//! TCP_NODELAY on every accepted socket (without it bursts of SSE stall for 40 ms on delayed acknowledgements), a 503 in
//! place of a refused connection while draining, and a drain that ends.

use std::{
    convert::Infallible,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Response, header},
    response::IntoResponse,
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time,
};
use tower::Service as _;

use super::error::ApiError;
use crate::gateway::GatewayError;

/// After a failed accept (mostly: no file descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// These answer during a drain, too.
const ALWAYS_OPEN: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// For requests under way when shutdown begins; what is left then is cut off.
    pub drain: Duration,
    /// For the head of a request, from its first byte on; also how long an idle connection is kept.
    pub head: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { drain: Duration::from_secs(30), head: Duration::from_secs(75) }
    }
}

/// How a drain went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections cut off because their requests had not ended in time.
    pub cut: usize,
}

/// Serves `app` on `listener` until `shutdown` completes, then drains: requests under way go on, new ones get a 503 with
/// `retry-after`, idle connections are closed. Returns when all is done, at the latest after `options.drain`.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Drained {
    let draining = Arc::new(AtomicBool::new(false));
    let (stop, stopped) = watch::channel(());
    let connection = Connection { app, draining: Arc::clone(&draining), stopped, head: options.head };
    let mut connections = JoinSet::new();
    // Accepted while draining: they get their 503, and nobody waits for them.
    let mut late = JoinSet::new();

    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            stream = accept(&listener) => { connections.spawn(connection.clone().run(stream)); }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }

    draining.store(true, Ordering::Relaxed);
    stop.send_replace(());
    tracing::info!(connections = connections.len(), limit_s = options.drain.as_secs_f64(), "draining");
    let deadline = time::Instant::now() + options.drain;
    loop {
        tokio::select! {
            biased;
            done = connections.join_next() => if done.is_none() { return Drained { cut: 0 } },
            () = time::sleep_until(deadline) => break,
            stream = accept(&listener) => { late.spawn(connection.clone().run(stream)); }
            Some(_) = late.join_next(), if !late.is_empty() => {}
        }
    }
    let cut = connections.len();
    tracing::warn!(connections = cut, "drain time is over; cutting off what is left");
    connections.shutdown().await;
    Drained { cut }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "no TCP_NODELAY on a socket");
                }
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[derive(Clone)]
struct Connection {
    app: Router,
    draining: Arc<AtomicBool>,
    stopped: watch::Receiver<()>,
    head: Duration,
}

impl Connection {
    async fn run(mut self, stream: TcpStream) {
        let Self { app, draining, head, .. } = self;
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let refused = draining.load(Ordering::Relaxed) && !ALWAYS_OPEN.contains(&request.uri().path());
            let answer = (!refused).then(|| app.clone().call(request));
            async move {
                match answer {
                    Some(answer) => answer.await,
                    None => Ok::<Response<Body>, Infallible>(refusal()),
                }
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        // One that is accepted while draining gets its refusal first, which closes it.
        let mut asked = self.stopped.has_changed().unwrap_or(true);
        loop {
            tokio::select! {
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended early");
                    }
                    return;
                }
                _ = self.stopped.changed(), if !asked => {
                    asked = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

fn refusal() -> Response<Body> {
    let mut response = ApiError::from(GatewayError::Draining).into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_sockets_do_not_delay_small_writes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, connected) = tokio::join!(accept(&listener), TcpStream::connect(address));
        assert!(accepted.nodelay().unwrap());
        assert!(!connected.unwrap().nodelay().unwrap(), "it is not the default");
    }
}
