//! The least that a proxy in this stack costs: axum in front, hyper-util's client behind, bodies passed through as streams.
//! No parsing, no record, no decision. What weir takes beyond it is weir's own.

use std::net::SocketAddr;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, Uri, header::HOST},
    response::{IntoResponse, Response},
    serve::ListenerExt,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::net::TcpListener;

use super::{BenchError, until_orphaned};

#[derive(Clone)]
struct Proxy {
    client: Client<HttpConnector, Body>,
    /// `http://host:port`, no slash at the end.
    upstream: std::sync::Arc<str>,
}

async fn forward(State(proxy): State<Proxy>, mut request: Request) -> Response {
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
    let Ok(uri) = format!("{}{path}", proxy.upstream).parse::<Uri>() else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    *request.uri_mut() = uri;
    request.headers_mut().remove(HOST);
    match proxy.client.request(request).await {
        Ok(response) => response.map(Body::new).into_response(),
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

/// Serves until its standard input closes.
///
/// # Errors
/// When the address cannot be listened on, or the server fails.
pub async fn serve(listen: SocketAddr, upstream: &str) -> Result<(), BenchError> {
    let listener = TcpListener::bind(listen).await.map_err(BenchError::io(format!("cannot listen on {listen}")))?;
    let address = listener.local_addr().map_err(BenchError::io("its own address"))?;
    tokio::select! {
        result = accept(listener, upstream) => result.map_err(BenchError::io("the bare proxy")),
        () = until_orphaned(address) => Ok(()),
    }
}

/// Accepts connections for good.
pub async fn accept(listener: TcpListener, upstream: &str) -> std::io::Result<()> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
    let proxy = Proxy { client, upstream: upstream.trim_end_matches('/').into() };
    let router = Router::new().fallback(forward).with_state(proxy);
    let listener = listener.tap_io(|stream| {
        // Without it a streamed answer stalls for 40 ms.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await
}
