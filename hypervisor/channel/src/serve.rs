//! The accept loop under every Godwit server.
//!
//! ```text
//! accepting ──shutdown──▶ draining ──all answered, or DRAIN_TIME over──▶ closed
//! ```
//!
//! A connection that cannot be accepted or breaks costs nothing but itself.

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most connections served at once; further ones wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send a request's head, and how long it may keep a connection without using it.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests under way may still take once a server shuts down.
pub const DRAIN_TIME: Duration = Duration::from_secs(3);
/// Pause after the kernel could not give us a connection (no file descriptors, say): nothing announces the
/// moment when it can.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where connections come from.
pub(crate) trait Accept: Send + Sync + 'static {
    /// As the kernel hands it over.
    type Raw: Send + 'static;
    /// Ready for HTTP.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// The next connection.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Raw>> + Send;

    /// Makes it ready (a TLS handshake, say) and gives the router to serve on it, with what is known of the peer.
    fn prepare(
        &self,
        raw: Self::Raw,
        router: Router,
    ) -> impl Future<Output = io::Result<(Self::Io, Router)>> + Send;
}

/// Serves `router` until `shutdown` completes, then lets requests under way finish for at most [`DRAIN_TIME`].
pub(crate) async fn serve<A: Accept>(
    acceptor: A,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
) {
    let acceptor = Arc::new(acceptor);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let draining = CancellationToken::new();
    let connections = TaskTracker::new();
    tokio::pin!(shutdown);
    loop {
        let next = async {
            let place = places
                .clone()
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            (place, acceptor.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = &mut shutdown => break,
            next = next => next,
        };
        let raw = match accepted {
            Ok(raw) => raw,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, router, draining) = (acceptor.clone(), router.clone(), draining.clone());
        connections.spawn(async move {
            let _place = place;
            match acceptor.prepare(raw, router).await {
                Ok((io, router)) => serve_connection(io, router, draining).await,
                Err(error) => tracing::debug!(%error, "a connection was turned away"),
            }
        });
    }
    draining.cancel();
    connections.close();
    if tokio::time::timeout(DRAIN_TIME, connections.wait())
        .await
        .is_err()
    {
        tracing::debug!(
            left = connections.len(),
            "connections outlasted the shutdown"
        );
    }
}

async fn serve_connection<Io>(io: Io, router: Router, draining: CancellationToken)
where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = tower_service_of(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(service))
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = draining.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(DRAIN_TIME, connection).await {
                Ok(ended) => ended,
                Err(_) => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

fn tower_service_of(
    router: Router,
) -> impl tower_service::Service<
    hyper::Request<Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future: Send,
> + Clone {
    ToAxum(router)
}

/// Hands hyper's requests to an axum router, which wants its own body type.
#[derive(Clone)]
struct ToAxum(Router);

impl tower_service::Service<hyper::Request<Incoming>> for ToAxum {
    type Response = axum::response::Response;
    type Error = std::convert::Infallible;
    type Future = <Router as tower_service::Service<Request>>::Future;

    fn poll_ready(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        tower_service::Service::<Request>::poll_ready(&mut self.0, context)
    }

    fn call(&mut self, request: hyper::Request<Incoming>) -> Self::Future {
        self.0.call(request.map(axum::body::Body::new))
    }
}
