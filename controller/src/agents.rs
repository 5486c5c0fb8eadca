//! What the server answers to host agents: join, heartbeat, commit and resolve.
//!
//! Commit and resolve are one transaction each and nothing else: a guest stands still while they are decided.

mod heartbeat;

mod join;

mod migration;

use crate::core::Core;
use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use godwit_channel::pki::Authority;
use godwit_channel::problem::{Answer, JsonBody, PathArgs, method_not_allowed, no_such_path};
use godwit_channel::tls::HostPeer;
use godwit_wire::host_api::{
    CommitReply, CommitRequest, Heartbeat, HeartbeatReply, JoinReply, JoinRequest, Resolution,
    ResolveRequest,
};
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::problem::Problem;
use std::sync::Arc;

/// Longest request of an agent: a heartbeat with as many VMs as a host may have.
const MAX_BODY_BYTES: usize = 4 << 20;

/// The agent-facing side of a controller. Callers have made sure that `host` is who asks.
#[derive(Clone, Debug)]
pub(crate) struct Agents {
    pub(crate) core: Arc<Core>,
    /// Signs the certificates of hosts that join; a simulation has none.
    pub(crate) authority: Option<Arc<Authority>>,
}

impl Agents {
    pub(crate) async fn heartbeat(
        &self,
        host: HostId,
        beat: Heartbeat,
    ) -> Result<HeartbeatReply, Problem> {
        heartbeat::answer(&self.core, host, beat).await
    }

    pub(crate) async fn commit(
        &self,
        host: HostId,
        migration: MigrationId,
        request: CommitRequest,
    ) -> Result<CommitReply, Problem> {
        migration::commit(&self.core, host, migration, request).await
    }

    pub(crate) async fn resolve(
        &self,
        host: HostId,
        migration: MigrationId,
        request: ResolveRequest,
    ) -> Result<Resolution, Problem> {
        migration::resolve(&self.core, host, migration, request).await
    }

    /// HTTP over these, for the mutual TLS listener.
    pub(crate) fn router(self) -> Router {
        Router::new()
            .route("/v1/join", post(join))
            .route("/v1/heartbeat", post(beat))
            .route("/v1/migrations/{migration}/commit", post(commit))
            .route("/v1/migrations/{migration}/resolve", post(resolve))
            .fallback(no_such_path)
            .method_not_allowed_fallback(method_not_allowed)
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .with_state(self)
    }
}

/// No certificate yet: the token is the proof.
async fn join(
    State(agents): State<Agents>,
    JsonBody(request): JsonBody<JoinRequest>,
) -> Answer<JoinReply> {
    Ok(Json(join::answer(&agents, request).await?))
}

async fn beat(
    State(agents): State<Agents>,
    HostPeer(host): HostPeer,
    JsonBody(beat): JsonBody<Heartbeat>,
) -> Answer<HeartbeatReply> {
    Ok(Json(agents.heartbeat(host, beat).await?))
}

async fn commit(
    State(agents): State<Agents>,
    HostPeer(host): HostPeer,
    PathArgs(migration): PathArgs<MigrationId>,
    JsonBody(request): JsonBody<CommitRequest>,
) -> Answer<CommitReply> {
    Ok(Json(agents.commit(host, migration, request).await?))
}

async fn resolve(
    State(agents): State<Agents>,
    HostPeer(host): HostPeer,
    PathArgs(migration): PathArgs<MigrationId>,
    JsonBody(request): JsonBody<ResolveRequest>,
) -> Answer<Resolution> {
    Ok(Json(agents.resolve(host, migration, request).await?))
}

/// The certificate says one thing and the body another.
fn not_the_caller(said: HostId, is: HostId) -> Problem {
    Problem::new(
        403,
        "wrong-host",
        "The certificate is another host's",
        format!("{said} is asked for by {is}"),
    )
}

/// A certificate of the pool whose host was removed.
fn removed(host: HostId) -> Problem {
    Problem::new(
        403,
        "host-removed",
        "The host is not part of the pool",
        format!("the pool has no host {host}"),
    )
    .with_remedy("delete the host's state directory and join it again with a new token")
}
