//! The agent's side of what the server offers to agents.

use godwit_channel::CallError;
use godwit_channel::tls::TlsClient;
use godwit_wire::host_api::{
    CommitReply, CommitRequest, Heartbeat, HeartbeatReply, Resolution, ResolveRequest,
};
use godwit_wire::id::MigrationId;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// How long a heartbeat may take; a third of the lease, so that two more fit into it.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the store may take to decide; the question can be asked again.
const DECISION_TIMEOUT: Duration = Duration::from_secs(2);

/// A client of the server.
#[derive(Clone, Debug)]
pub(crate) struct ControlPlane {
    heartbeats: TlsClient,
    /// Connections of their own: a decision never waits behind a heartbeat, it is inside a guest's blackout.
    decisions: TlsClient,
}

impl ControlPlane {
    pub(crate) fn new(authority: &str, config: &Arc<ClientConfig>) -> Self {
        Self {
            heartbeats: TlsClient::to_server(authority, config.clone()),
            decisions: TlsClient::to_server(authority, config.clone()),
        }
    }

    pub(crate) async fn heartbeat(
        &self,
        heartbeat: &Heartbeat,
    ) -> Result<HeartbeatReply, CallError> {
        self.heartbeats
            .request_within(
                HEARTBEAT_TIMEOUT,
                http::Method::POST,
                "/v1/heartbeat",
                Some(heartbeat),
            )
            .await
    }

    pub(crate) async fn commit(
        &self,
        migration: MigrationId,
        request: &CommitRequest,
    ) -> Result<CommitReply, CallError> {
        let path = format!("/v1/migrations/{migration}/commit");
        self.decisions
            .request_within(DECISION_TIMEOUT, http::Method::POST, &path, Some(request))
            .await
    }

    pub(crate) async fn resolve(
        &self,
        migration: MigrationId,
        request: &ResolveRequest,
    ) -> Result<Resolution, CallError> {
        let path = format!("/v1/migrations/{migration}/resolve");
        self.decisions
            .request_within(DECISION_TIMEOUT, http::Method::POST, &path, Some(request))
            .await
    }
}
