//! Becoming part of the pool: a one-time token against a certificate.

use crate::backoff::{Backoff, random};
use crate::error::HostError;
use godwit_channel::pki::{self, Holder, HostRequest, Identity, JoinToken};
use godwit_channel::tls::{self, TlsClient};
use godwit_wire::host_api::{HostFacts, JoinReply, JoinRequest};
use godwit_wire::id::HostId;
use std::path::Path;
use std::time::Duration;

/// First and longest pause between two attempts to reach the server.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The host's identity: kept from before, or obtained now with the token. A server that cannot be reached is waited
/// for; one that refuses is not asked twice.
pub(crate) async fn identity(
    directory: &Path,
    authority: &str,
    token: Option<&str>,
    facts: &HostFacts,
) -> Result<(HostId, Identity), HostError> {
    let identity = match Identity::load(directory)? {
        Some(identity) => identity,
        None => {
            let token: JoinToken = token.ok_or(HostError::NotJoined)?.parse()?;
            let identity = join(authority, &token, facts).await?;
            identity.save(directory)?;
            identity
        }
    };
    match identity.holder()? {
        Holder::Host(host) => Ok((host, identity)),
        Holder::Server => Err(HostError::NotAHost {
            path: directory.join(pki::IDENTITY_FILE),
        }),
    }
}

async fn join(
    authority: &str,
    token: &JoinToken,
    facts: &HostFacts,
) -> Result<Identity, HostError> {
    let server = TlsClient::to_server(authority, tls::client_pinned(token.authority)?);
    let request = HostRequest::fresh()?;
    let ask = JoinRequest {
        token: token.secret.clone(),
        csr_pem: request.request_pem.clone(),
        facts: facts.clone(),
    };
    let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        match server.post::<JoinReply>("/v1/join", &ask).await {
            Ok(reply) => {
                tracing::info!(host = %reply.host, server = authority, "joined the pool");
                return Ok(request.signed(reply.certificate_pem, reply.ca_pem));
            }
            Err(error) if !error.is_silence() => return Err(HostError::JoinRefused(error)),
            Err(error) => {
                if pauses.failures() == 0 {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(server = authority, %error, source, "waiting for the server");
                }
                tokio::time::sleep(pauses.next(random())).await;
            }
        }
    }
}
