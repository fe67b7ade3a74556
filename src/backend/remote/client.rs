//! The HTTP client: one pool of kept-alive HTTP/1.1 connections per fleet entry. `http` goes straight to the server;
//! `https` goes through the proxy that the environment or the system names (`HTTPS_PROXY`, `NO_PROXY`), by CONNECT.
//!
//! hyper-util's client under rustls, not reqwest: the same connector for both schemes, and nothing between the caller and
//! the frames (no redirects, no cookies, no decompression), because what passes through here is on every request's path.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::{
        legacy::{
            Client,
            connect::{HttpConnector, proxy::Tunnel},
        },
        proxy::matcher::{Intercept, Matcher},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::net::TcpStream;
use tower::Service;

pub(super) type HttpClient = Client<Connect, Full<Bytes>>;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How a TCP connection is come by.
#[derive(Clone)]
pub(super) enum Dial {
    Direct(HttpConnector),
    Proxy(Tunnel<HttpConnector>),
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Dial::Direct(connector) => connector.poll_ready(cx).map_err(Into::into),
            Dial::Proxy(tunnel) => tunnel.poll_ready(cx).map_err(Into::into),
        }
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        match self {
            Dial::Direct(connector) => {
                let connecting = connector.call(to);
                Box::pin(async move { connecting.await.map_err(Into::into) })
            }
            Dial::Proxy(tunnel) => {
                let connecting = tunnel.call(to);
                Box::pin(async move { connecting.await.map_err(Into::into) })
            }
        }
    }
}

/// A connection that may be used: TCP, proxy and TLS together within the time limit, so that a server that accepts and
/// then says nothing counts as unreachable too.
#[derive(Clone)]
pub(super) struct Connect {
    inner: HttpsConnector<Dial>,
    limit: Duration,
}

impl Service<Uri> for Connect {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = tokio::time::timeout(self.limit, self.inner.call(to));
        let limit = self.limit;
        Box::pin(async move {
            connecting.await.unwrap_or_else(|_| Err(format!("no connection stood within {limit:?}").into()))
        })
    }
}

/// A client for the server at `to`.
///
/// # Errors
/// For `https`, when the machine's trusted certificates cannot be read.
pub(super) fn client(to: &Uri, connect: Duration) -> Result<HttpClient, rustls::Error> {
    let mut tcp = HttpConnector::new();
    // Without it a request after an idle moment waits for the server's delayed acknowledgement.
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(connect));
    tcp.set_keepalive(Some(Duration::from_secs(60)));
    tcp.enforce_http(false);

    let https = to.scheme_str() == Some("https");
    let dial = match proxy(to).filter(|_| https) {
        None => Dial::Direct(tcp),
        Some(proxy) => {
            let mut tunnel = Tunnel::new(proxy.uri().clone(), tcp);
            if let Some(auth) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(auth.clone());
            }
            Dial::Proxy(tunnel)
        }
    };
    crate::tls::install_provider();
    let tls = rustls::ClientConfig::builder();
    // An entry that speaks plain HTTP must work on a machine that trusts nobody.
    let tls = if https {
        rustls_platform_verifier::BuilderVerifierExt::with_platform_verifier(tls)?.with_no_client_auth()
    } else {
        tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
    };
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(60))
        .build(Connect { inner: connector.wrap_connector(dial), limit: connect }))
}

/// The proxy for `to`, if it has one.
fn proxy(to: &Uri) -> Option<Intercept> {
    if is_this_machine(to) {
        return None;
    }
    Matcher::from_system().intercept(to)
}

/// Servers on this very machine are never reached through a proxy, whatever the environment says.
fn is_this_machine(to: &Uri) -> bool {
    let host = to.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_never_reached_through_a_proxy() {
        for uri in ["https://127.0.0.1:1/v1", "https://localhost/v1", "https://[::1]:3/v1"] {
            assert!(is_this_machine(&Uri::from_static(uri)), "{uri}");
        }
        for uri in ["https://127.example.com/v1", "https://10.0.0.1/v1", "https://[2001:db8::1]/v1"] {
            assert!(!is_this_machine(&Uri::from_static(uri)), "{uri}");
        }
    }
}
