//! HTTPS: the handshake puts the [`Peer`] into every request's extensions.

use super::Peer;
use crate::pki::Holder;
use crate::serve::{self, Accept, Prepared, Standing};
use axum::{Extension, Router};
use rustls::ServerConfig;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A TCP listener that speaks TLS.
pub struct Listener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens on `address`; port 0 takes a free one.
    pub async fn bind(address: SocketAddr, config: Arc<ServerConfig>) -> io::Result<Self> {
        Ok(Self::new(TcpListener::bind(address).await?, config))
    }

    /// Speaks TLS on a listener that exists.
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        Self {
            listener,
            acceptor: TlsAcceptor::from(config),
        }
    }

    /// Where it listens.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Accept for Listener {
    type Raw = TcpStream;
    type Io = TlsStream<TcpStream>;

    async fn accept(&self) -> io::Result<TcpStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    async fn prepare(&self, raw: TcpStream, router: Router) -> io::Result<Prepared<Self::Io>> {
        raw.set_nodelay(true)?;
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(raw));
        let stream = handshake.await.map_err(|_| io::ErrorKind::TimedOut)??;
        let (_, session) = stream.get_ref();
        let peer = match session.peer_certificates().and_then(|chain| chain.first()) {
            None => Peer::Anonymous,
            Some(certificate) => Holder::of(certificate).map_err(io::Error::other)?.into(),
        };
        let standing = match peer {
            Peer::Server | Peer::Host(_) => Standing::Known,
            Peer::Anonymous => Standing::Stranger,
        };
        Ok(Prepared {
            io: stream,
            router: router.layer(Extension(peer)),
            standing,
        })
    }
}

/// Serves `router` until `shutdown` completes and requests under way are answered (at most
/// [`serve::DRAIN_TIME`]).
pub async fn serve(listener: Listener, router: Router, shutdown: impl Future<Output = ()> + Send) {
    serve::serve(listener, router, shutdown).await;
}
