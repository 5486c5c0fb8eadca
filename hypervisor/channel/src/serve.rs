//! The accept loop under every Godwit server.
//!
//! ```text
//! accepting ──shutdown──▶ draining ──all answered, or DRAIN_TIME over──▶ closed
//! ```
//!
//! A connection is a stranger's until its handshake has shown who it is. Strangers have few places and little time,
//! so that they cannot take those of the pool's own.
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

/// Most connections of known peers at once; further ones are turned away.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most connections at once whose peers are not known, or not yet; further ones wait in the kernel's queue.
pub const MAX_STRANGERS: usize = 64;
/// How long a stranger may keep its connection after the handshake, which has a limit of its own; an answer under
/// way then has [`DRAIN_TIME`].
pub const STRANGER_TIME: Duration = Duration::from_secs(5);
/// How long a client may take to send a request's head, and how long it may keep a connection without using it.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests under way may still take once a server shuts down.
pub const DRAIN_TIME: Duration = Duration::from_secs(3);
/// Pause after the kernel could not give us a connection (no file descriptors, say): nothing announces the
/// moment when it can.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a handshake has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// One of ours.
    Known,
    /// Anyone.
    Stranger,
}

/// A connection that is ready for HTTP.
pub(crate) struct Prepared<Io> {
    pub(crate) io: Io,
    /// What to serve on it.
    pub(crate) router: Router,
    pub(crate) standing: Standing,
}

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
    ) -> impl Future<Output = io::Result<Prepared<Self::Io>>> + Send;
}

/// Serves `router` until `shutdown` completes, then lets requests under way finish for at most [`DRAIN_TIME`].
pub(crate) async fn serve<A: Accept>(
    acceptor: A,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
) {
    let acceptor = Arc::new(acceptor);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    let draining = CancellationToken::new();
    let connections = TaskTracker::new();
    tokio::pin!(shutdown);
    loop {
        let next = async {
            let place = strangers
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
        let places = places.clone();
        connections.spawn(async move {
            let prepared = match acceptor.prepare(raw, router).await {
                Ok(prepared) => prepared,
                Err(error) => return tracing::debug!(%error, "a connection was turned away"),
            };
            match prepared.standing {
                Standing::Stranger => {
                    serve_connection(prepared, draining).await;
                    drop(place);
                }
                Standing::Known => {
                    drop(place);
                    match places.try_acquire_owned() {
                        Ok(_place) => serve_connection(prepared, draining).await,
                        Err(_) => tracing::warn!(
                            "{MAX_CONNECTIONS} connections are open; one more was turned away"
                        ),
                    }
                }
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

async fn serve_connection<Io>(prepared: Prepared<Io>, draining: CancellationToken)
where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Prepared {
        io,
        router,
        standing,
    } = prepared;
    let (head_timeout, longest) = match standing {
        Standing::Known => (HEAD_TIMEOUT, None),
        Standing::Stranger => (STRANGER_TIME, Some(STRANGER_TIME)),
    };
    let time_is_up = async {
        match longest {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    let service = tower_service_of(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(service))
        .with_upgrades();
    tokio::pin!(connection);
    let must_end = async {
        tokio::select! {
            () = draining.cancelled() => {}
            () = time_is_up => {}
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = must_end => {
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::sync::{Mutex, mpsc};
    use tokio::time::Instant;

    /// Connections made by the test.
    struct Fake(Mutex<mpsc::UnboundedReceiver<(DuplexStream, Standing)>>);

    impl Accept for Fake {
        type Raw = (DuplexStream, Standing);
        type Io = DuplexStream;

        async fn accept(&self) -> io::Result<Self::Raw> {
            match self.0.lock().await.recv().await {
                Some(raw) => Ok(raw),
                None => std::future::pending().await,
            }
        }

        async fn prepare(
            &self,
            (io, standing): Self::Raw,
            router: Router,
        ) -> io::Result<Prepared<DuplexStream>> {
            Ok(Prepared {
                io,
                router,
                standing,
            })
        }
    }

    struct Front(mpsc::UnboundedSender<(DuplexStream, Standing)>);

    impl Front {
        fn start() -> Self {
            let (sender, receiver) = mpsc::unbounded_channel();
            let router = Router::new().route("/", get(|| async { "served" }));
            tokio::spawn(serve(
                Fake(Mutex::new(receiver)),
                router,
                std::future::pending(),
            ));
            Self(sender)
        }

        fn connect(&self, standing: Standing) -> DuplexStream {
            let (ours, theirs) = duplex(4096);
            self.0.send((theirs, standing)).unwrap();
            ours
        }

        /// How long a request on a new connection takes.
        async fn ask(&self, standing: Standing) -> Duration {
            let begun = Instant::now();
            let mut stream = self.connect(standing);
            let request = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.ends_with("served"), "{answer}");
            begun.elapsed()
        }
    }

    #[tokio::test]
    async fn known_peers_do_not_take_the_places_of_strangers() {
        let front = Front::start();
        let idle = || front.connect(Standing::Known);
        let _idle: Vec<_> = std::iter::repeat_with(idle)
            .take(2 * MAX_STRANGERS)
            .collect();
        assert!(front.ask(Standing::Known).await < STRANGER_TIME);
        assert!(front.ask(Standing::Stranger).await < STRANGER_TIME);
    }

    #[tokio::test]
    async fn strangers_who_only_sit_there_make_way_soon() {
        let front = Front::start();
        let sit = || front.connect(Standing::Stranger);
        let _sitting: Vec<_> = std::iter::repeat_with(sit).take(MAX_STRANGERS).collect();
        let waited = front.ask(Standing::Known).await;
        assert!(waited < STRANGER_TIME + DRAIN_TIME, "{waited:?}");
    }

    #[tokio::test]
    async fn a_stranger_who_sends_slowly_is_cut_off() {
        let front = Front::start();
        let begun = Instant::now();
        let mut stream = front.connect(Standing::Stranger);
        let head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n";
        stream.write_all(head).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(begun.elapsed() < HEAD_TIMEOUT);
    }
}
