//! Who is at the other end of a TLS connection, for handlers.

use crate::pki::Holder;
use crate::problem::Refusal;
use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;
use godwit_wire::id::HostId;
use godwit_wire::problem::Problem;

/// Who sent a request; also an axum extractor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The control plane.
    Server,
    /// A host of the pool.
    Host(HostId),
    /// Someone without a certificate.
    Anonymous,
}

impl Peer {
    /// The host, if it is one.
    pub fn host(self) -> Option<HostId> {
        match self {
            Self::Host(host) => Some(host),
            Self::Server | Self::Anonymous => None,
        }
    }
}

impl From<Holder> for Peer {
    fn from(holder: Holder) -> Self {
        match holder {
            Holder::Server => Self::Server,
            Holder::Host(host) => Self::Host(host),
        }
    }
}

/// Nothing is known of a peer on a listener without TLS.
fn peer_of(parts: &Parts) -> Peer {
    parts
        .extensions
        .get::<Peer>()
        .copied()
        .unwrap_or(Peer::Anonymous)
}

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        Ok(peer_of(parts))
    }
}

/// Extractor: the request comes from this host; anyone else is refused with 403.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPeer(pub HostId);

impl<S: Send + Sync> FromRequestParts<S> for HostPeer {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        peer_of(parts)
            .host()
            .map(Self)
            .ok_or_else(|| refused("a host"))
    }
}

/// Extractor: the request comes from the control plane; anyone else is refused with 403.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FromServer;

impl<S: Send + Sync> FromRequestParts<S> for FromServer {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        match peer_of(parts) {
            Peer::Server => Ok(Self),
            Peer::Host(_) | Peer::Anonymous => Err(refused("the server")),
        }
    }
}

/// Middleware (`axum::middleware::from_fn`): only the control plane comes through.
pub async fn require_server(_server: FromServer, request: Request, next: Next) -> Response {
    next.run(request).await
}

fn refused(who: &str) -> Refusal {
    let detail = format!("only {who} of this pool may ask this");
    Refusal(Problem::new(
        403,
        "wrong-certificate",
        "The certificate does not allow this",
        detail,
    ))
}
