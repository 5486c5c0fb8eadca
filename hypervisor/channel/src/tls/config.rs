//! What each kind of connection demands of its peer.

use super::pin::PinnedAuthority;
use crate::pki::{Fingerprint, Identity, PkiError};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;

/// Protocol of every connection here, for the TLS handshake.
const ALPN: &[u8] = b"http/1.1";

/// TLS that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A key or certificate.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The TLS library refuses them.
    #[error("the TLS library refuses the key or the certificate")]
    Rustls(#[from] rustls::Error),
    /// The CA cannot be used to check clients.
    #[error("the CA cannot be used to check clients")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// For the control plane's agent-facing listener: hosts show their certificate, a host that wants to join has none
/// yet. What each may do is for the handlers ([`Peer`](super::Peer)).
pub fn server_for_hosts_and_joiners(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider())
            .allow_unauthenticated()
            .build()?;
    server(identity, verifier, &[&rustls::version::TLS13])
}

/// For an agent's listener: a certificate of the pool is demanded. That it is the server's is checked by
/// [`require_server`](super::require_server).
pub fn server_for_server_only(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider())
            .build()?;
    server(identity, verifier, &[&rustls::version::TLS13])
}

/// For browsers and the CLI: no client certificate is asked for; TLS 1.2 is still allowed.
pub fn public_server(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    server(
        identity,
        WebPkiClientVerifier::no_client_auth(),
        rustls::ALL_VERSIONS,
    )
}

fn server(
    identity: &Identity,
    verifier: Arc<dyn rustls::server::danger::ClientCertVerifier>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(identity)?, identity.key()?)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// For calls between server and hosts, both ways: shows one's own certificate, trusts the pool's CA alone.
pub fn client(identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(chain(identity)?, identity.key()?)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// For the target of a migration: a certificate of the pool is demanded; that it is the source's, in this very
/// migration, is for [`MigrationTls::check_source`](super::MigrationTls::check_source).
pub(super) fn migration_target(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = Arc::unwrap_or_clone(server_for_server_only(identity)?);
    config.alpn_protocols.clear();
    // Nobody comes twice with the same certificate.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For the source of a migration.
pub(super) fn migration_source(identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = Arc::unwrap_or_clone(client(identity)?);
    config.alpn_protocols.clear();
    Ok(Arc::new(config))
}

/// For joining: nothing is known yet but the CA's fingerprint from the token.
pub fn client_pinned(authority: Fingerprint) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority::new(authority, provider())))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The CA goes along, so that a joining host can compare its fingerprint.
fn chain(identity: &Identity) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    Ok(vec![identity.certificate()?, identity.authority()?])
}

fn roots(identity: &Identity) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority()?)?;
    Ok(roots)
}
