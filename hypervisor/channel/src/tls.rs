//! Mutual TLS 1.3 inside the pool: server and hosts know each other by the names in certificates of the pool's CA
//! (see [`pki`](crate::pki)), and nothing else is believed.

mod accept;
mod config;
mod migration;
mod peer;
mod pin;

pub use accept::{Listener, serve};
pub use config::{
    TlsError, client, client_pinned, public_server, server_for_hosts_and_joiners,
    server_for_server_only,
};
pub use migration::MigrationTls;
pub use peer::{FromServer, HostPeer, Peer, require_server};

use crate::client::{Dial, HttpClient};
use crate::pki::{self, SERVER_NAME};
use godwit_wire::id::HostId;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A client over TLS. Clones share connections.
pub type TlsClient = HttpClient<TlsDial>;

/// Connects to one address and insists on one name.
#[derive(Clone)]
pub struct TlsDial {
    authority: Arc<str>,
    name: ServerName<'static>,
    connector: TlsConnector,
}

impl std::fmt::Debug for TlsDial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsDial")
            .field("authority", &self.authority)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl HttpClient<TlsDial> {
    /// A client of the control plane at `authority` (`host:port`).
    pub fn to_server(authority: &str, config: Arc<ClientConfig>) -> Self {
        Self::named(authority, SERVER_NAME.to_owned(), config)
    }

    /// A client of the agent of `host` at `authority` (`host:port`); another host at that address is refused.
    pub fn to_host(authority: &str, host: HostId, config: Arc<ClientConfig>) -> Self {
        Self::named(authority, pki::host_dns_name(host), config)
    }

    fn named(authority: &str, name: String, config: Arc<ClientConfig>) -> Self {
        let name = ServerName::try_from(name).expect("our own names are DNS names");
        Self::with_dial(TlsDial {
            authority: authority.into(),
            name,
            connector: TlsConnector::from(config),
        })
    }
}

impl Dial for TlsDial {
    type Io = tokio_rustls::client::TlsStream<TcpStream>;

    async fn dial(&self) -> io::Result<Self::Io> {
        let stream = TcpStream::connect(&*self.authority).await?;
        stream.set_nodelay(true)?;
        self.connector.connect(self.name.clone(), stream).await
    }

    fn peer(&self) -> String {
        self.authority.to_string()
    }

    fn authority(&self) -> String {
        self.authority.to_string()
    }
}

#[cfg(test)]
mod tests;
