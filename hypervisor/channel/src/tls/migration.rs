//! TLS between the two ends of one migration. Each shows a certificate that the pool's CA made for its part in it.

use super::config::{self, TlsError};
use crate::pki::{Identity, migration_dns_name};
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationIdentity, MigrationRole};
use rustls::client::verify_server_name;
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, ServerName};
use std::sync::{Arc, OnceLock};

/// Makes one end's connections of one migration.
#[derive(Clone, Debug)]
pub struct MigrationTls {
    migration: MigrationId,
    identity: Identity,
    source: OnceLock<Arc<ClientConfig>>,
    target: OnceLock<Arc<ServerConfig>>,
}

impl MigrationTls {
    /// For the end that `identity` was made for.
    pub fn new(migration: MigrationId, identity: &MigrationIdentity) -> Self {
        Self {
            migration,
            identity: identity.into(),
            source: OnceLock::new(),
            target: OnceLock::new(),
        }
    }

    /// The source's end of a connection, which believes only the target of this migration.
    pub fn source(&self) -> Result<ClientConnection, TlsError> {
        let config = once(&self.source, || config::migration_source(&self.identity))?;
        let target = self.name(MigrationRole::Target);
        Ok(ClientConnection::new(config, target)?)
    }

    /// The target's end of a connection. Once it is established, [`Self::check_source`].
    pub fn target(&self) -> Result<ServerConnection, TlsError> {
        let config = once(&self.target, || config::migration_target(&self.identity))?;
        Ok(ServerConnection::new(config)?)
    }

    /// Whether the peer is the source of this migration, by the certificates it showed.
    pub fn check_source(&self, shown: Option<&[CertificateDer<'_>]>) -> Result<(), TlsError> {
        let shown = shown
            .and_then(<[_]>::first)
            .ok_or(rustls::Error::NoCertificatesPresented)?;
        let certificate = ParsedCertificate::try_from(shown)?;
        Ok(verify_server_name(
            &certificate,
            &self.name(MigrationRole::Source),
        )?)
    }

    fn name(&self, role: MigrationRole) -> ServerName<'static> {
        migration_dns_name(self.migration, role)
            .try_into()
            .expect("an id and fixed words make a DNS name")
    }
}

/// Keys and certificates are read for the first connection; lanes and strangers come with many.
fn once<T>(
    known: &OnceLock<Arc<T>>,
    make: impl FnOnce() -> Result<Arc<T>, TlsError>,
) -> Result<Arc<T>, TlsError> {
    if let Some(known) = known.get() {
        return Ok(known.clone());
    }
    let made = make()?;
    Ok(known.get_or_init(|| made).clone())
}
