//! What the agent serves to the control plane (`godwit_wire::host_api` has the table).

use crate::facts::HostSampler;
use crate::vm::{Command, Registry};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post, put};
use axum::{Json, Router, middleware};
use godwit_channel::problem::{self, Answer, JsonBody, PathArgs, QueryArgs, Refusal};
use godwit_channel::{tls, upgrade};
use godwit_wire::host_api::{
    CancelMigration, HostFacts, HostReport, PrepareIncoming, SERIAL_UPGRADE, StartOutgoing,
    StartVm, StopVm, VmCommand, VmReport,
};
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::IncomingReady;
use serde::Deserialize;
use std::sync::Arc;
use tokio::net::UnixStream;

/// Longest command; a spec is the longest thing in it.
const MAX_COMMAND_BYTES: usize = 256 * 1024;

/// What the handlers and the heartbeats share.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) facts: HostFacts,
    pub(crate) sampler: HostSampler,
    pub(crate) registry: Arc<Registry>,
}

impl Agent {
    pub(crate) fn report(&self) -> HostReport {
        HostReport {
            facts: self.facts.clone(),
            usage: self.sampler.usage(),
            vms: self.registry.context().board.reports(),
        }
    }
}

type Shared = State<Arc<Agent>>;

/// The agent's API; everything in it is for the control plane only.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/vms/{vm}", put(start).delete(destroy))
        .route("/v1/vms/{vm}/stop", post(stop))
        .route("/v1/vms/{vm}/pause", post(pause))
        .route("/v1/vms/{vm}/resume", post(resume))
        .route("/v1/vms/{vm}/incoming", put(prepare))
        .route("/v1/vms/{vm}/outgoing", post(send))
        .route("/v1/vms/{vm}/migration/cancel", post(cancel))
        .route("/v1/vms/{vm}/serial", get(serial))
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_COMMAND_BYTES))
        .layer(middleware::from_fn(tls::require_server))
        .with_state(agent)
}

async fn host(State(agent): Shared) -> Json<HostReport> {
    Json(agent.report())
}

async fn start(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<StartVm>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Start(ask, reply))
            .await?,
    ))
}

async fn stop(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<StopVm>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Stop(ask, reply))
            .await?,
    ))
}

async fn pause(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<VmCommand>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Pause(ask, reply))
            .await?,
    ))
}

async fn resume(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<VmCommand>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Resume(ask, reply))
            .await?,
    ))
}

async fn prepare(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<PrepareIncoming>,
) -> Answer<IncomingReady> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Prepare(ask, reply))
            .await?,
    ))
}

async fn send(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<StartOutgoing>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Send(ask, reply))
            .await?,
    ))
}

async fn cancel(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    JsonBody(ask): JsonBody<CancelMigration>,
) -> Answer<VmReport> {
    Ok(Json(
        agent
            .registry
            .ask(vm, |reply| Command::Cancel(ask, reply))
            .await?,
    ))
}

#[derive(Debug, Deserialize)]
struct DestroyArgs {
    epoch: Epoch,
}

async fn destroy(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    QueryArgs(DestroyArgs { epoch }): QueryArgs<DestroyArgs>,
) -> Result<StatusCode, Refusal> {
    agent
        .registry
        .ask(vm, |reply| Command::Destroy(epoch, reply))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Joins the caller to the VM's serial socket; the VMM sends its ring first.
async fn serial(
    State(agent): Shared,
    PathArgs(vm): PathArgs<VmId>,
    request: Request,
) -> Result<Response, Refusal> {
    let path = agent.registry.context().state.vm(vm).serial_socket();
    let mut console = UnixStream::connect(&path).await.map_err(|error| {
        let detail = format!("VM {vm} has no serial console here: {error}");
        Refusal(
            Problem::conflict("not-running", detail)
                .with_remedy("start the VM, or ask the host it runs on"),
        )
    })?;
    upgrade::accept(request, SERIAL_UPGRADE, move |mut caller| async move {
        if let Err(error) = tokio::io::copy_bidirectional(&mut caller, &mut console).await {
            tracing::debug!(%vm, %error, "a serial console broke off");
        }
    })
}
